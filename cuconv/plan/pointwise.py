"""Pointwise convolution: products of matrices on tensor cores (cuda/pointwise.cu), or element by element (direct)."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ..geometry import PointwiseGeometry
from .base import DTYPES, MAX_GRID, SHARED_RESERVE, VECTOR_BYTES, Plan, Target, Unsuitable
from .wgrad import WgradPlan, with_reduce_of

# What three products of TF32 leave out of each term, some three units of the last place, is below what a sum of so many
# terms in float32 may be off by.
LEAST_TERMS = 16

# As in cuda/pointwise_direct.cu and cuda/pointwise_wgrad_direct.cu.
_DIRECT_THREADS = 256
_DIRECT_CHANNELS = 8


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What a pointwise convolution is besides its geometry: how exact, and what follows it."""

    allow_tf32: bool = False
    activation: str | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block of cuda/pointwise.cu makes at a time: see there."""

    channels: int
    pixels: int
    depth: int
    channel_warps: int
    pixel_warps: int
    blocks: int
    stages: int
    resident: bool


def products(g: PointwiseGeometry, dtype: str, turned: bool, epilogue: Epilogue, target: Target, aligned: bool) -> Plan:
    """The plan of cuda/pointwise.cu; turned: dgrad, which reads what forward writes."""
    if target.architecture < 80:
        raise Unsuitable("needs tensor cores of compute capability 8.0 or newer")
    if dtype == "float64":
        raise Unsuitable("takes elements of 16 or 32 bits, and float64 has 64")
    depth = g.K if turned else g.C
    if dtype == "float32" and not epilogue.allow_tf32 and depth < LEAST_TERMS:
        raise Unsuitable(f"keeps float32's bound for sums of {LEAST_TERMS} terms or more, and these have {depth}")
    require_countable(g)
    return tile_plan(g, dtype, turned, epilogue, target, _tile(g, DTYPES[dtype][1], turned), aligned)


def direct(g: PointwiseGeometry, dtype: str, turned: bool, epilogue: Epilogue, target: Target, aligned: bool) -> Plan:
    """The plan of cuda/pointwise_direct.cu."""
    require_countable(g)
    channels, depth = (g.C, g.K) if turned else (g.K, g.C)
    pixels = g.N * g.P * g.Q
    grid = (-(-pixels // _DIRECT_THREADS), -(-channels // _DIRECT_CHANNELS), 1)
    if grid[1] > MAX_GRID[1]:
        raise Unsuitable(f"takes up to {MAX_GRID[1] * _DIRECT_CHANNELS} channels, and there are {channels}")
    strided = g.stride != (1, 1)
    return Plan(
        source="pointwise_direct",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("CHANNELS_LAST", int(g.channels_last)),
            ("TURNED", int(turned)),
            ("STRIDED_INPUT", int(strided and not turned)),
            ("STRIDED_OUTPUT", int(strided and turned)),
            ("ACTIVATION", epilogue.activation or "none"),
        ),
        grid=grid,
        block=_DIRECT_THREADS,
        shared_bytes=0,
        parameters=(
            ("pixels", pixels),
            ("channels", channels),
            ("depth", depth),
            *pixels_parameters(g, "input", depth, of_x=not turned),
            *pixels_parameters(g, "output", channels, of_x=turned),
        ),
    )


@dataclass(frozen=True, slots=True)
class WgradTile:
    """What a block of cuda/pointwise_wgrad.cu makes: see there; pixels in a slab are multiples of the depth."""

    rows: int
    columns: int
    depth: int
    row_warps: int
    column_warps: int
    blocks: int
    stages: int


def wgrad_products(
    g: PointwiseGeometry, dtype: str, bias: bool, allow_tf32: bool, target: Target, aligned: bool
) -> WgradPlan:
    """The plan of cuda/pointwise_wgrad.cu."""
    if target.architecture < 80:
        raise Unsuitable("needs tensor cores of compute capability 8.0 or newer")
    if dtype == "float64":
        raise Unsuitable("takes elements of 16 or 32 bits, and float64 has 64")
    pixels = g.N * g.P * g.Q
    if dtype == "float32" and not allow_tf32 and pixels < LEAST_TERMS:
        raise Unsuitable(f"keeps float32's bound for sums of {LEAST_TERMS} terms or more, and these have {pixels}")
    require_countable(g)
    name, size = DTYPES[dtype]
    t = wgrad_tile(g, size, stages=3)
    shared = wgrad_tile_bytes(t, g.channels_last, size, target)
    row_tiles, column_tiles = -(-g.C // t.rows), -(-g.K // t.columns)
    slab, slabs = wgrad_slabs(pixels, t, row_tiles * column_tiles, target)
    vector = VECTOR_BYTES // size if aligned else 1
    strided = g.stride != (1, 1)
    dy_copy = gcd(g.K, vector) if g.channels_last else gcd(g.P * g.Q, vector)
    x_copy = gcd(g.C, vector) if g.channels_last else 1 if strided else dy_copy
    sums = Plan(
        source="pointwise_wgrad",
        defines=(
            ("T", name),
            ("CHANNELS_LAST", int(g.channels_last)),
            ("BIAS", int(bias)),
            *wgrad_tile_defines(t),
            ("X_COPY", x_copy),
            ("DY_COPY", dy_copy),
            ("STRIDED", int(strided)),
            ("TERMS", 2 if dtype == "float32" and not allow_tf32 else 1),
        ),
        grid=(row_tiles * column_tiles, slabs, 1),
        block=32 * t.row_warps * t.column_warps,
        shared_bytes=shared,
        parameters=(
            ("pixels", pixels),
            ("slab_pixels", slab),
            ("C", g.C),
            ("K", g.K),
            ("row_tiles", row_tiles),
            *pixels_parameters(g, "x", g.C, of_x=True),
            *pixels_parameters(g, "dy", g.K, of_x=False),
        ),
    )
    return with_reduce_of(sums, slabs, g.K, g.C, dtype, bias)


def wgrad_tile(g: PointwiseGeometry, size: int, stages: int) -> WgradTile:
    rows, columns = (64 if extent <= 64 else 128 for extent in (g.C, g.K))
    return WgradTile(rows, columns, 64 if size == 2 else 32, 2, 4, 1, stages)


def wgrad_tile_bytes(t: WgradTile, channels_last: bool, size: int, target: Target, others: int = 0) -> int:
    """Shared memory of a block, with pitches as in cuda/pointwise_wgrad_tiles.cuh, and so many other bytes."""
    pad = 8 if size == 2 or channels_last else 4
    tile = t.depth * (t.rows + t.columns + 2 * pad) if channels_last else (t.rows + t.columns) * (t.depth + pad)
    shared = size * t.stages * tile + others
    if shared > target.shared_per_block - SHARED_RESERVE:
        raise Unsuitable(f"needs {shared} bytes of shared memory a block, and the device has {target.shared_per_block}")
    return shared


def wgrad_slabs(pixels: int, t: WgradTile, tiles: int, target: Target) -> tuple[int, int]:
    """Pixels of a slab, and slabs: as many as fill the device twice, with so many tiles of dw."""
    slab = -(-pixels // min(max(1, 2 * target.multiprocessors // tiles), MAX_GRID[1]))
    slab = -(-slab // t.depth) * t.depth
    return slab, -(-pixels // slab)


def wgrad_tile_defines(t: WgradTile) -> tuple[tuple[str, int | str], ...]:
    """The extents of a tile, as cuda/pointwise_wgrad_tiles.cuh has them."""
    return (
        ("ROWS", t.rows),
        ("COLUMNS", t.columns),
        ("DEPTH", t.depth),
        ("ROW_WARPS", t.row_warps),
        ("COLUMN_WARPS", t.column_warps),
        ("BLOCKS", t.blocks),
        ("STAGES", t.stages),
    )


def wgrad_direct(
    g: PointwiseGeometry, dtype: str, bias: bool, allow_tf32: bool, target: Target, aligned: bool
) -> WgradPlan:
    """The plan of cuda/pointwise_wgrad_direct.cu, a block for every element of dw and dbias."""
    require_countable(g)
    if g.K > MAX_GRID[1]:
        raise Unsuitable(f"takes up to {MAX_GRID[1]} output channels, and there are {g.K}")
    sums = Plan(
        source="pointwise_wgrad_direct",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("CHANNELS_LAST", int(g.channels_last)),
            ("STRIDED", int(g.stride != (1, 1))),
        ),
        grid=(g.C + bias, g.K, 1),
        block=_DIRECT_THREADS,
        shared_bytes=0,
        parameters=(
            ("pixels", g.N * g.P * g.Q),
            ("C", g.C),
            *pixels_parameters(g, "x", g.C, of_x=True),
            *pixels_parameters(g, "dy", g.K, of_x=False),
        ),
    )
    return WgradPlan(sums, None, 0)


def require_countable(g: PointwiseGeometry) -> None:
    """Refuse more pixels than kernels count."""
    if g.N * g.P * g.Q >= 2**31:
        raise Unsuitable(f"counts fewer than 2**31 pixels, and there are {g.N * g.P * g.Q}")


def _tile(g: PointwiseGeometry, size: int, turned: bool) -> Tile:
    channels = g.C if turned else g.K
    depth = g.K if turned else g.C
    wide = 64 if channels <= 64 else 128
    chunk = 32 if size == 2 else 16
    resident = -(-depth // chunk) * chunk * wide * size <= 40 * 1024
    return Tile(wide, 128, chunk, 2, 4, 1, 3, resident)


def tile_plan(
    g: PointwiseGeometry, dtype: str, turned: bool, epilogue: Epilogue, target: Target, t: Tile, aligned: bool
) -> Plan:
    """The plan of a block's tile, Unsuitable where it does not fit."""
    name, size = DTYPES[dtype]
    channels, depth = (g.C, g.K) if turned else (g.K, g.C)
    chunks = -(-depth // t.depth)
    strided = g.stride != (1, 1)
    pixels, tile_rows = g.N * g.P * g.Q, -(-channels // t.channels)
    tiles = -(-pixels // t.pixels)

    shared = tile_bytes(t, g.channels_last, size, turned, chunks)
    if shared > target.shared_per_block - SHARED_RESERVE:
        raise Unsuitable(f"needs {shared} bytes of shared memory a block, and the device has {target.shared_per_block}")
    if tile_rows > MAX_GRID[1]:
        raise Unsuitable(f"takes up to {MAX_GRID[1] * t.channels} channels, and there are {channels}")

    vector = VECTOR_BYTES // size if aligned else 1

    def along(channels: int, strided: bool, most: int) -> int:
        """Elements of a copy along memory."""
        if g.channels_last:
            return gcd(channels, vector, most)
        return 1 if strided else gcd(g.P * g.Q, vector, most)

    read, written = (g.K, g.C) if turned else (g.C, g.K)
    threads = 32 * t.channel_warps * t.pixel_warps
    per_multiprocessor = max(1, target.shared_per_multiprocessor // (shared + SHARED_RESERVE))
    columns = max(1, min(tiles, -(-target.multiprocessors * min(per_multiprocessor, 2048 // threads) // tile_rows)))
    return Plan(
        source="pointwise",
        defines=(
            ("T", name),
            ("CHANNELS_LAST", int(g.channels_last)),
            ("TURNED", int(turned)),
            *tile_defines(t),
            ("COPY", along(read, strided and not turned, t.depth if g.channels_last else t.pixels)),
            ("WEIGHT_COPY", gcd(g.C, vector)),
            ("STORE", along(written, strided and turned, t.channels if g.channels_last else t.pixels)),
            ("STRIDED_INPUT", int(strided and not turned)),
            ("STRIDED_OUTPUT", int(strided and turned)),
            ("TERMS", 2 if dtype == "float32" and not epilogue.allow_tf32 else 1),
            ("ACTIVATION", epilogue.activation or "none"),
        ),
        grid=(columns, tile_rows, 1),
        block=threads,
        shared_bytes=shared,
        parameters=(
            ("pixels", pixels),
            ("channels", channels),
            ("depth", depth),
            ("tiles", tiles),
            *pixels_parameters(g, "input", read, of_x=not turned),
            *pixels_parameters(g, "output", written, of_x=turned),
        ),
    )


def tile_bytes(t: Tile, channels_last: bool, size: int, turned: bool, chunks: int) -> int:
    """Shared memory of a block, with pitches as in cuda/pointwise_tiles.cuh."""
    pad = 8 if size == 2 else 4
    weight_tile = t.depth * (t.channels + 8) if turned else t.channels * (t.depth + pad)
    image_tile = t.pixels * (t.depth + pad) if channels_last else t.depth * (t.pixels + 8)
    result = t.pixels * (t.channels + 8) if channels_last else t.channels * (t.pixels + 8)
    return size * ((chunks if t.resident else t.stages) * weight_tile + t.stages * image_tile + result)


def tile_defines(t: Tile) -> tuple[tuple[str, int | str], ...]:
    """The extents of a tile, as cuda/pointwise_tiles.cuh has them."""
    return (
        ("CHANNELS", t.channels),
        ("PIXELS", t.pixels),
        ("DEPTH", t.depth),
        ("CHANNEL_WARPS", t.channel_warps),
        ("PIXEL_WARPS", t.pixel_warps),
        ("BLOCKS", t.blocks),
        ("STAGES", t.stages),
        ("RESIDENT", int(t.resident)),
    )


def pixels_parameters(g: PointwiseGeometry, name: str, channels: int, *, of_x: bool) -> tuple[tuple[str, int], ...]:
    """A Pixels of cuda/pixels.cuh."""
    rows, columns = (g.H, g.W) if of_x else (g.P, g.Q)
    step = g.stride if of_x else (1, 1)
    counted_magic, counted_shift = divisor_of(g.P * g.Q)
    row_magic, row_shift = divisor_of(g.Q)
    return (
        (f"{name}_channels", channels),
        (f"{name}_plane", rows * columns),
        (f"{name}_columns", columns),
        (f"{name}_step_h", step[0]),
        (f"{name}_step_w", step[1]),
        (f"{name}_counted", g.P * g.Q),
        (f"{name}_counted_magic", counted_magic),
        (f"{name}_row_magic", row_magic),
        (f"{name}_counted_shift", counted_shift),
        (f"{name}_row_shift", row_shift),
        (f"{name}_row", g.Q),
    )


def divisor_of(divisor: int) -> tuple[int, int]:
    """Magic and shift of divide_by in cuda/pixels.cuh."""
    shift = (divisor - 1).bit_length()
    return -(-(2 ** (31 + shift)) // divisor), shift
