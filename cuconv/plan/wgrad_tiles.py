"""Gradients of the weights and the bias of large kernels at stride 1: see cuda/depthwise_wgrad_tiles.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..geometry import Conv2dGeometry
from .base import (
    DTYPES,
    MAX_DIVIDEND,
    MAX_GRID,
    SHARED_RESERVE,
    Plan,
    Target,
    Unsuitable,
    magic,
    plane_parameters,
    require_nchw,
)
from .runs import MAX_TAPS
from .wgrad import WgradPlan, sum_bytes, with_reduce

_WARP = 32
# A microsecond's, of an H200, by what its multiprocessors have made of them.
_CLOCKS = 1450
_PIECE_BYTES = 16
# Taps of a kernel row that a lane has: all of a short one, so many of a longer one.
_SHORT, _CHUNK = 12, 8
# Kernel rows of a tile, and registers with which the compiler spills nothing: of up to 5 taps a row, up to 8, and more.
_ROWS = {3: (80, 128, 128), 4: (104, 128, 168), 5: (128, 168, 168)}
_ROWS_FLOAT64 = {1: (88, 88, 88), 2: (104, 104, 128)}
_WARPS = range(4, 13)
_IMAGES = (1, 2, 4, 8, 16, 32)
_PARTS = (1, 2, 4, 8, 16, 32)
# Slabs are so few that a multiprocessor has no more blocks than this, or there is one: the workspace stays small.
_MOST_BLOCKS = 16
# Units, and offsets within rows and columns, are 32-bit integers.
_MAX_EXTENT = 2**30


@dataclass(frozen=True, slots=True)
class Tile:
    """What a warp, a block and a unit have."""

    rows: int  # kernel rows of a tile of taps
    chunk: int  # taps of each
    warps: int  # of a block, each with a tile,
    rounds: int  # and then with others
    blocks: int  # of a multiprocessor
    phase: int
    images: int  # of a unit
    parts: int  # into which the rows of a unit are cut
    unit_rows: int  # of dy
    block_units: int
    strips: int
    x_half: int  # values of half a row of shared memory, from row to row, and from image to image
    x_rows: int
    x_pitch: int
    x_image: int
    dy_half: int
    dy_pitch: int
    dy_image: int
    shared_bytes: int


def tiles(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Kernels of more taps than runs takes."""
    require_nchw(g)
    if g.R * g.S <= MAX_TAPS:
        raise Unsuitable(f"takes more than {MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    if g.stride != (1, 1) or g.dilation != (1, 1):
        raise Unsuitable(f"takes stride 1 and dilation 1, and has {g.stride} and {g.dilation}")
    extent = max(g.H, g.W, g.P, g.Q, *(side for sides in g.padding for side in sides))
    if extent > _MAX_EXTENT or g.N * g.P > _MAX_EXTENT:
        raise Unsuitable(f"takes extents, and rows of dy, of at most {_MAX_EXTENT}, not {extent} and {g.N * g.P}")
    best = min(tiles_of(g, dtype, target), key=lambda tile: cost(g, dtype, target, tile), default=None)
    if best is None:
        raise Unsuitable(f"{g.R} x {g.S} taps and rows of {g.W} elements do not fit shared memory and one launch")
    return tile_plan(g, dtype, bias, best, aligned)


def chunks_of(S: int) -> tuple[int, int]:
    """Taps of a tile in a kernel row, and tiles beside each other."""
    return (S, 1) if S <= _SHORT else (_CHUNK, -(-S // _CHUNK))


def tile_of(
    g: Conv2dGeometry,
    dtype: str,
    target: Target,
    rows: int,
    warps: int,
    rounds: int,
    images: int,
    parts: int,
    held: int = 1,
) -> Tile | None:
    """The tile of these choices, or None where it does not fit. Where an image does not, a unit is so few of its rows
    that a multiprocessor holds `held` blocks."""
    size = sum_bytes(dtype)
    piece = _PIECE_BYTES // size
    step = 2 * piece
    chunk, chunks = chunks_of(g.S)
    strips = -(-g.Q // step)
    # x's first column is a piece's first.
    left = g.padding[1][0]
    phase = -left % piece
    window = -(-(phase + step + chunk - 1) // piece) * piece
    columns = max((chunks - 1) * chunk + (strips - 1) * step + window, phase + left + g.W)
    x_half = -(-columns // step) * piece
    dy_half = strips * piece
    # From image to image so many pieces that lanes of the next go on, in the banks, where those of this one end; where
    # lanes are in different rows an odd number from row to row.
    apart = piece if parts > 1 else 0
    x_pitch, dy_pitch = 2 * x_half + apart, 2 * dy_half + apart
    # Kernel rows of all tiles of a block.
    groups = -(-g.R // rows)
    block_tiles = warps * rounds
    firsts = range(0, groups * chunks, block_tiles)
    tap_rows = max(min((first + block_tiles - 1) // chunks + 1, groups) - first // chunks for first in firsts) * rows
    budget = target.shared_per_block - SHARED_RESERVE

    def of_rows(unit_rows: int) -> tuple[int, int, int, int]:
        x_rows = min(unit_rows + tap_rows - 1, g.H)
        x_image = _image(x_rows * x_pitch, strips, piece)
        dy_image = _image((unit_rows + 2 * (rows - 1)) * dy_pitch, strips, piece)
        values = max(images * (x_image + dy_image), warps * _WARP)
        return x_rows, x_image, dy_image, values * size

    unit_rows = g.P
    if images == 1 and of_rows(unit_rows)[3] > budget:
        while unit_rows > 1 and of_rows(unit_rows)[3] > budget // held:
            unit_rows = -(-unit_rows // 2)
    units = -(-g.N // images) * -(-g.P // unit_rows)
    block_units = -(-units // max(1, _MOST_BLOCKS * target.multiprocessors // g.K))
    x_rows, x_image, dy_image, shared_bytes = of_rows(unit_rows)
    if shared_bytes > budget or images * parts * strips > MAX_DIVIDEND or images > g.N:
        return None
    registers = _registers(dtype)[rows][(chunk > 5) + (chunk > _CHUNK)]
    by_registers = 65536 // (warps * _WARP * registers)
    by_shared = target.shared_per_multiprocessor // (shared_bytes + SHARED_RESERVE)
    threads_held = 1024 if target.architecture == 75 else 1536
    blocks = max(1, min(by_registers, by_shared, threads_held // (warps * _WARP)))
    return Tile(
        rows,
        chunk,
        warps,
        rounds,
        blocks,
        phase,
        images,
        parts,
        unit_rows,
        block_units,
        strips,
        x_half,
        x_rows,
        x_pitch,
        x_image,
        dy_half,
        dy_pitch,
        dy_image,
        shared_bytes,
    )


def _image(values: int, strips: int, piece: int) -> int:
    """So many values or a few more, so that they are `strips` pieces and any number of times 8."""
    return values + (strips * piece - values) % (8 * piece)


def _registers(dtype: str) -> dict[int, tuple[int, int, int]]:
    return _ROWS_FLOAT64 if dtype == "float64" else _ROWS


def tiles_of(g: Conv2dGeometry, dtype: str, target: Target) -> Iterator[Tile]:
    """The tiles that fit: of units that keep most lanes busy, or, where these do not fit, of any."""
    strips = -(-g.Q // (2 * _PIECE_BYTES // sum_bytes(dtype)))

    def busy_lanes(unit: tuple[int, int]) -> float:
        images, parts = unit
        lanes = images * parts * strips
        return lanes / (-(-lanes // _WARP) * _WARP) * (g.N / images) / -(-g.N // images)

    units = [(images, parts) for images in _IMAGES for parts in _PARTS if images <= g.N and parts <= g.P]
    enough = 0.85 * max(map(busy_lanes, units))
    found = False
    for of_units in ([u for u in units if busy_lanes(u) >= enough], [u for u in units if busy_lanes(u) < enough]):
        for rows, unit in product(_registers(dtype), of_units):
            taps = -(-g.R // rows) * chunks_of(g.S)[1]
            for turns in sorted({-(-taps // warps) for warps in _WARPS}):
                for rounds in sorted({turns, 1}):
                    for held in (1, 2):
                        tile = tile_of(g, dtype, target, rows, -(-taps // turns), rounds, *unit, held)
                        if tile is not None:
                            found = True
                            yield tile
                        if tile is None or tile.unit_rows == g.P:
                            break
        if found:
            return


def cost(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile) -> float:
    """What ranks tiles: the time of a launch in us, by a count of what a multiprocessor issues."""
    piece = _PIECE_BYTES // sum_bytes(dtype)
    step = 2 * piece
    chunks = chunks_of(g.S)[1]
    groups = -(-g.R // tile.rows)
    taps = groups * chunks
    z = -(-taps // (tile.warps * tile.rounds))
    row_units = -(-g.P // tile.unit_rows)
    slabs = -(-(-(-g.N // tile.images) * row_units) // tile.block_units)
    # Rows of x that a tile of taps meets in a unit, and what a lane does with one of them.
    met = [
        max(0, min(tile.unit_rows - 1 - g.padding[0][0] + r + tile.rows, g.H) - max(r - g.padding[0][0], 0))
        for r in range(0, groups * tile.rows, tile.rows)
    ]
    window = -(-(tile.phase + step + tile.chunk - 1) // piece)
    row = tile.rows * step * tile.chunk + 2.2 * (window + 2) + 8
    passes = -(-tile.images * tile.parts * tile.strips // _WARP)
    units = slabs * tile.block_units
    sums = units * chunks * passes * sum(-(-n // tile.parts) * row + 60 + 8 * tile.rows for n in met)
    # Laying out, by all threads; again for every round where a block has several units.
    vectors = tile.x_rows * -(-g.W // piece) + (tile.unit_rows + 2 * tile.rows) * 2 * tile.strips
    layouts = z * (tile.rounds if tile.block_units > 1 else 1)
    laid = units * layouts * tile.images * (vectors / _WARP * 20 + 100 * tile.warps)
    once = slabs * z * (300 * tile.warps + tile.x_image * tile.images / (_WARP * piece) * 2) + slabs * taps * 170
    issued = g.K * (sums + laid + once)
    # Warps that the four parts of a multiprocessor share; blocks left over when all others are done; and barriers.
    blocks = slabs * z * g.K / target.multiprocessors
    warps = min(tile.blocks, math.ceil(blocks)) * tile.warps
    uneven = math.ceil(warps / 4) / (warps / 4)
    left_over = math.ceil(blocks) / blocks
    busy = (1 - math.exp(-0.2 * warps)) * (0.8 if tile.block_units > 1 else 1)
    time = issued / (4 * target.multiprocessors) / busy / _CLOCKS * (0.4 + 0.6 * uneven) * (0.5 + 0.5 * left_over)
    return time + 4 * (slabs > 1)


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, tile: Tile, aligned: bool) -> WgradPlan:
    """The plan of one choice of tiles_of()."""
    chunks = chunks_of(g.S)[1]
    row_units = -(-g.P // tile.unit_rows)
    units = -(-g.N // tile.images) * row_units
    slabs = -(-units // tile.block_units)
    warps, threads = tile.warps, tile.warps * _WARP
    piece = _PIECE_BYTES // sum_bytes(dtype)
    x_pieces, dy_pieces = -(-g.W // piece), 2 * tile.strips
    grid = (slabs, g.K, -(-(-(-g.R // tile.rows) * chunks) // (warps * tile.rounds)))
    if any(extent > limit for extent, limit in zip(grid, MAX_GRID, strict=True)):
        raise Unsuitable(f"{grid} blocks are more than one launch can count")
    sums = Plan(
        source="depthwise_wgrad_tiles",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("BIAS", int(bias)),
            ("FINAL", int(slabs == 1)),
            ("ROWS", tile.rows),
            ("CHUNK", tile.chunk),
            ("PHASE", tile.phase),
            ("IN_VECTOR", math.gcd(g.W, g.Q, piece if aligned else 1)),
            ("THREADS", threads),
            ("BLOCKS", tile.blocks),
        ),
        grid=grid,
        block=threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("multiplier", g.multiplier),
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("N", g.N),
            ("chunks", chunks),
            ("rounds", tile.rounds),
            ("strips", tile.strips),
            ("parts", tile.parts),
            ("items", tile.images * tile.parts * tile.strips),
            ("strips_magic", magic(tile.strips)),
            ("parts_magic", magic(tile.parts)),
            ("unit_images", tile.images),
            ("unit_rows", tile.unit_rows),
            ("row_units", row_units),
            ("units", units),
            ("block_units", tile.block_units),
            ("x_pieces", x_pieces),
            ("dy_pieces", dy_pieces),
            ("x_pieces_magic", magic(x_pieces)),
            ("dy_pieces_magic", magic(dy_pieces)),
            ("lead", (tile.phase + g.padding[1][0]) // piece),
            ("x_half", tile.x_half),
            ("x_pitch", tile.x_pitch),
            ("x_image", tile.x_image),
            ("dy_half", tile.dy_half),
            ("dy_pitch", tile.dy_pitch),
            ("dy_image", tile.dy_image),
        ),
    )
    return WgradPlan(sums, None, 0) if slabs == 1 else with_reduce(sums, slabs, g, dtype, bias)
