"""Tiles, for large kernels at stride 1: see cuda/depthwise_tiles.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from ..geometry import Conv2dGeometry
from . import runs
from .base import (
    DTYPES,
    MAX_GRID,
    SHARED_RESERVE,
    VECTOR_BYTES,
    Plan,
    Target,
    Unsuitable,
    plane_parameters,
    require_nchw,
)

# Rows and columns of a thread's tile: of 7 x 14, a plane of 56 x 56 has one for each lane of a warp.
_SHAPES = ((7, 14), (4, 14), (2, 28), (2, 14), (8, 8), (7, 8), (7, 7), (4, 16), (4, 8), (2, 16), (4, 4), (1, 8))
# Taps at a time: fewer take fewer registers, more take fewer loads.
_CHUNKS = (8, 4)
_THREADS = (64, 128, 256)
# Sums and the piece of a row of x that a thread may hold, in registers of 32 bits; the compiler takes 30 to 60 more. At
# 120, which lets tiles of 7 x 14 take 8 taps at a time, some kernels spill.
_MAX_VALUES = 118
# Into so many bands a plane may be cut, each way, beside those of so many tiles.
_BANDS = (1, 2, 3, 4)
_BAND_ITEMS = (1, 4, 8, 16)
_BANKS_BYTES = 128
_WARP = 32
# Offsets within a plane's rows and columns are 32-bit integers, those behind the last row too.
_MAX_EXTENT = 2**30


@dataclass(frozen=True, slots=True)
class Tile:
    """What one thread makes, and what one block makes of it."""

    rows: int  # of a thread's tile
    columns: int
    chunk: int  # taps at a time
    vector: int  # values of one load of a row of x in shared memory
    in_vector: int  # elements of one load of x and one store of y
    out_vector: int
    row_items: int  # tiles of a block in one plane
    column_items: int
    block_planes: int
    threads: int
    block_rows: int  # rows of x that one plane of a block needs at most
    pitch: int  # values from one of them to the next
    passes: float  # over the banks of shared memory, of one load of x by a warp
    block_channels: int
    channel_pitch: int
    value_bytes: int

    @property
    def shared_bytes(self) -> int:
        x = (self.block_planes * self.block_rows + 1) * self.pitch
        w = self.block_channels * self.channel_pitch
        return (x + w) * self.value_bytes + self.block_planes * 8


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, turned: bool = False) -> Plan:
    require_nchw(g)
    if g.R * g.S <= runs.MAX_TAPS:
        raise Unsuitable(f"takes more than {runs.MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    if g.stride != (1, 1) or g.dilation != (1, 1):
        raise Unsuitable(f"takes stride 1 and dilation 1, and has {g.stride} and {g.dilation}")
    extent = max(g.H, g.W, g.P, g.Q, *(abs(side) for sides in g.padding for side in sides))
    if extent > _MAX_EXTENT or g.N * g.K > MAX_GRID[0]:
        raise Unsuitable(
            f"takes extents of at most {_MAX_EXTENT} and {MAX_GRID[0]} planes, not {extent} and {g.N * g.K}"
        )
    best = min(tiles(g, dtype, target, aligned), key=lambda tile: cost(g, target, tile), default=None)
    if best is None:
        raise Unsuitable(f"no tile of {g.R} x {g.S} taps of {dtype} fits shared memory and one launch")
    return tile_plan(g, dtype, best, turned)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    """The plan of dx as a convolution of dy."""
    return forward(runs.dense_dgrad_as_forward(g), dtype, target, aligned, turned=True)


def tile_plan(g: Conv2dGeometry, dtype: str, tile: Tile, turned: bool = False) -> Plan:
    return Plan(
        source="depthwise_tiles",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("ROWS", tile.rows),
            ("COLUMNS", tile.columns),
            ("CHUNK", tile.chunk),
            ("WHOLE", int(g.S >= tile.chunk)),
            ("TAIL", g.S % tile.chunk),
            ("VECTOR", tile.vector),
            ("IN_VECTOR", tile.in_vector),
            ("OUT_VECTOR", tile.out_vector),
            ("TURNED", int(turned)),
            ("THREADS", tile.threads),
        ),
        grid=_grid(g, tile),
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("multiplier", g.multiplier),
            ("N", g.N),
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("planes", g.N * g.K),
            ("block_planes", tile.block_planes),
            ("block_channels", tile.block_channels),
            ("row_items", tile.row_items),
            ("column_items", tile.column_items),
            ("block_rows", tile.block_rows),
            ("pitch", tile.pitch),
            ("channel_pitch", tile.channel_pitch),
        ),
    )


def tiles(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Iterator[Tile]:
    """The tiles that registers and shared memory hold, and one launch can count."""
    size = DTYPES[dtype][1]
    value_bytes = max(4, size)
    widest = VECTOR_BYTES // value_bytes
    # More elements a load would be more than a thread holds of several loads.
    of_global = min(4, VECTOR_BYTES // size) if aligned else 1
    budget = target.shared_per_block - SHARED_RESERVE
    for (rows, columns), chunk in product(_SHAPES, _CHUNKS):
        if chunk > _CHUNKS[-1] and g.S <= _CHUNKS[-1]:
            continue
        all_rows, all_columns = -(-g.P // rows), -(-g.Q // columns)
        for column_items, row_items in product(_band_items(all_columns), _band_items(all_rows)):
            vector = math.gcd(columns, widest) if column_items > 1 else widest
            piece = _up(columns + min(chunk, g.S) - 1, vector)
            items = row_items * column_items
            if (rows * columns + piece) * (value_bytes // 4) > _MAX_VALUES or items > _THREADS[-1]:
                continue
            block_rows = min(g.H, row_items * rows + g.R - 1)
            least_pitch = _up((column_items - 1) * columns + _up(columns + g.S - 1, vector), widest)
            if (block_rows * least_pitch + g.R * g.S) * value_bytes > budget:
                continue
            pitch, passes = _pitch(rows, columns, row_items, column_items, least_pitch, vector, value_bytes)
            # Lanes that read the weights of different channels read them from different banks.
            channel_pitch = (-(-g.S // chunk) * g.R * chunk // widest | 1) * widest
            for threads in _THREADS:
                most = min(threads // items, g.N * g.K)
                if threads > _THREADS[0] and 2 * most * items <= threads:
                    continue  # a smaller block has room for as many
                for block_planes in sorted({-(-most // part) for part in (1, 2)} - {0}):
                    tile = Tile(
                        rows=rows,
                        columns=columns,
                        chunk=chunk,
                        vector=vector,
                        in_vector=math.gcd(g.W, of_global),
                        out_vector=math.gcd(math.gcd(g.Q, columns), of_global),
                        row_items=row_items,
                        column_items=column_items,
                        block_planes=block_planes,
                        threads=threads,
                        block_rows=block_rows,
                        pitch=pitch,
                        passes=passes,
                        block_channels=_channels(g.N, block_planes),
                        channel_pitch=channel_pitch,
                        value_bytes=value_bytes,
                    )
                    fits_grid = all(blocks <= limit for blocks, limit in zip(_grid(g, tile), MAX_GRID, strict=True))
                    if tile.shared_bytes <= budget and fits_grid:
                        yield tile


def _grid(g: Conv2dGeometry, tile: Tile) -> tuple[int, int, int]:
    return (
        -(-g.N * g.K // tile.block_planes),
        -(-g.P // (tile.rows * tile.row_items)),
        -(-g.Q // (tile.columns * tile.column_items)),
    )


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _band_items(items: int) -> list[int]:
    """Of so many tiles side by side, how many a block may take."""
    return sorted({-(-items // bands) for bands in _BANDS} | {n for n in _BAND_ITEMS if n < items})


def _channels(images: int, planes: int) -> int:
    """How many channels at most so many neighbouring planes belong to, the images of a channel being neighbours."""
    if planes % images == 0:
        return planes // images
    return 1 if images % planes == 0 else (planes - 2) // images + 2


@lru_cache(maxsize=4096)
def _pitch(
    rows: int, columns: int, row_items: int, column_items: int, least: int, vector: int, value_bytes: int
) -> tuple[int, float]:
    """From `least` on, the first pitch at which the lanes of a warp hinder each other least when they load x, and how
    often such a load passes over the banks."""
    widest = VECTOR_BYTES // value_bytes
    best = (math.inf, least)
    for pitch in range(least, least + _BANKS_BYTES // value_bytes, widest):
        best = min(best, (_passes(rows, columns, row_items, column_items, pitch, vector, value_bytes), pitch))
    return best[1], best[0]


def _passes(
    rows: int, columns: int, row_items: int, column_items: int, pitch: int, vector: int, value_bytes: int
) -> float:
    # As many lanes at a time as can load 128 bytes together; of these, lanes hinder each other in the same bank.
    width = vector * value_bytes
    units = _BANKS_BYTES // width
    lanes = min(_WARP, row_items * column_items)
    passes = 0
    for first in range(0, lanes, units):
        banks: dict[int, set[int]] = {}
        for lane in range(first, min(lanes, first + units)):
            unit = (lane // column_items * rows * pitch + lane % column_items * columns) // vector
            banks.setdefault(unit % units, set()).add(unit)
        passes += max(map(len, banks.values()))
    # Lanes of other planes, where a plane has fewer tiles than a warp has lanes, are taken to do as those of the first.
    return passes * _WARP / lanes if lanes % units == 0 else passes * _WARP / (_up(lanes, units))


def cost(g: Conv2dGeometry, target: Target, tile: Tile) -> float:
    """What ranks tiles: clocks of a multiprocessor, by a count of instructions and of passes over shared memory.

    Beside what is counted it guesses, with nothing measured yet: how often schedulers with few warps wait, two passes
    for a load of one address by all lanes, and what a load from memory takes.
    """
    words = tile.value_bytes // 4
    widest = VECTOR_BYTES // tile.value_bytes
    issue = shared = 0.0
    for chunks, taps in ((g.S // tile.chunk, tile.chunk), (1, g.S % tile.chunk)):
        if not chunks * taps:
            continue
        x_loads = -(-(tile.columns + taps - 1) // tile.vector)
        w_loads = tile.rows * -(-taps // widest)
        # Multiplications in float64 take two slots each; a row's loop takes 20 instructions beside the loads.
        issue += chunks * g.R * (tile.rows * tile.columns * taps * words + w_loads)
        issue += chunks * (g.R + tile.rows - 1) * (x_loads + 20)
        shared += chunks * ((g.R + tile.rows - 1) * x_loads * tile.passes + 2 * g.R * w_loads)
    warps = tile.threads // _WARP
    loads = tile.block_planes * tile.block_rows * g.W / tile.in_vector / tile.threads
    issue += loads * (30 + 8 * tile.in_vector) + tile.rows * tile.columns * 4
    registers = _up(int((tile.rows * tile.columns + tile.columns + tile.chunk) * words * 1.1) + 30, 8)
    resident = min(
        target.shared_per_multiprocessor // (tile.shared_bytes + SHARED_RESERVE),
        2048 // tile.threads,
        65536 // (registers * tile.threads),
    )
    turns = -(-math.prod(_grid(g, tile)) // target.multiprocessors)
    at_once = max(1, min(resident, turns)) * warps
    busy = 1 - math.exp(-0.3 * at_once)
    # Of four schedulers, the one with most warps is waited for.
    uneven = -(-at_once // 4) * 4 / at_once
    clocks = turns * warps * max(issue / 4, shared) * uneven / busy
    return clocks + 0.2 * turns * warps * min(issue / 4, shared) + 2000 * turns / max(1, resident)
