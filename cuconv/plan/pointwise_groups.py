"""Pointwise convolution by products of warp groups: cuda/pointwise_groups.cu and pointwise_wgrad_groups.cu."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from ..geometry import PointwiseGeometry
from .base import DTYPES, MAX_GRID, SHARED_RESERVE, VECTOR_BYTES, Plan, Target, Unsuitable
from .pointwise import LEAST_TERMS, Epilogue, divisor_of, pixels_parameters
from .wgrad import WgradPlan, with_reduce_of

# Rows of a stage have so many bytes, and right factors start at multiples of so many.
_ROW_BYTES = 128
_RIGHT_ALIGNMENT = 1024
_SUM_BYTES = 4
# Some tiles behind the last pixel are counted too.
_MAX_PIXELS = 2**31 - 2**16


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block of cuda/pointwise_groups.cu makes at a time: see there."""

    channels: int
    products: int
    groups: int
    blocks: int
    stages: int
    resident: bool


def products(g: PointwiseGeometry, dtype: str, turned: bool, epilogue: Epilogue, target: Target, aligned: bool) -> Plan:
    """The plan of cuda/pointwise_groups.cu; turned as for `products`."""
    _require_groups(g, dtype, g.K if turned else g.C, epilogue.allow_tf32, target)
    g = _of_pixels(g)
    t = _tile(g, dtype, turned, epilogue, target)
    return tile_plan(g, dtype, turned, epilogue, target, t, aligned)


def _require_groups(g: PointwiseGeometry, dtype: str, terms: int, allow_tf32: bool, target: Target) -> None:
    """Refuse what kernels of warp groups do not take; sums have so many terms."""
    if target.architecture != 90:
        raise Unsuitable("needs products of warp groups, which compute capability 9.0 alone has")
    if dtype == "float64":
        raise Unsuitable("takes elements of 16 or 32 bits, and float64 has 64")
    if g.stride != (1, 1):
        raise Unsuitable("takes strides of 1")
    if dtype == "float32" and not allow_tf32 and terms < LEAST_TERMS:
        raise Unsuitable(f"keeps float32's bound for sums of {LEAST_TERMS} terms or more, and these have {terms}")
    if g.N * g.P * g.Q >= _MAX_PIXELS:
        raise Unsuitable(f"counts fewer than {_MAX_PIXELS} pixels, and there are {g.N * g.P * g.Q}")


def _of_pixels(g: PointwiseGeometry) -> PointwiseGeometry:
    """The same convolution with images of one pixel as channels-last, which they are too: its rows are longer."""
    return replace(g, channels_last=True) if g.H * g.W == 1 else g


# Channels, products, warp groups and blocks of the tiles that are looked at, of equals the first: a thread has 64 or
# 128 sums, and as many threads fit as their registers let.
_SHAPES = (
    (128, 2, 2, 1),
    (64, 2, 2, 1),
    (128, 1, 3, 1),
    (128, 1, 2, 1),
    (128, 1, 4, 1),
    (256, 1, 2, 1),
    (128, 1, 1, 3),
    (128, 1, 2, 2),
    (128, 2, 1, 2),
    (64, 1, 3, 1),
    (64, 1, 4, 1),
    (64, 1, 3, 2),
)
_STAGES = (4, 3, 2)

# Microseconds on an H200, by the sweeps in benchmarks/NOTES.md. A product of 64 rows, 128 columns and one step; how
# much longer those of several groups take together; what a group waits for at a chunk of the depth, and more where
# groups meet there; what delivering a tile of 64 pixels and 128 channels takes; bringing 64 pixels of a chunk to shared
# memory by single words or from boundary to boundary; laying out 128 channels of a chunk of float32 weights, and of any
# that stay before all else; bytes a microsecond of memory, and bytes that do not pass through it.
_PRODUCT = 64 / 1755
_TOGETHER = 1.1
_WAIT, _MEET = 0.15, 0.1
_DELIVER = 1.4
_SLOW_COPY = 0.4
_LAY_OUT = 0.5
_LAY_OUT_BEFORE = {2: 0.1, 4: 0.8}
_MEMORY, _CACHE = 3.6e6, 60e6


def _tile(g: PointwiseGeometry, dtype: str, turned: bool, epilogue: Epilogue, target: Target) -> Tile:
    """The tile of least cost, of the deepest ring of stages that fits."""
    channels, size = g.C if turned else g.K, DTYPES[dtype][1]
    terms = _terms(dtype, epilogue.allow_tf32)
    tiles = []
    for shape in _SHAPES:
        if shape[0] > 64 and shape[0] >= 2 * channels:
            continue
        for resident in (True, False):
            for stages in _STAGES:
                t = Tile(*shape, stages, resident)
                if _at_once(g, size, terms, turned, target, t) == t.blocks:
                    tiles.append((_cost(g, size, terms, turned, target, t), t))
                    break
    if not tiles:
        raise Unsuitable("finds no tile that fits shared memory")
    return min(tiles, key=lambda ranked: ranked[0])[1]


def _cost(g: PointwiseGeometry, size: int, terms: int, turned: bool, target: Target, t: Tile) -> float:
    read, written = (g.K, g.C) if turned else (g.C, g.K)
    pixels, chunks = g.N * g.P * g.Q, _chunks(g, size, turned)
    columns, block_tiles, rows = _columns(g, size, turned, target, t, t.blocks)
    rounds = -(-block_tiles // columns) * -(-columns * rows // (target.multiprocessors * t.blocks))
    wide = t.channels / 128
    products = 4 * t.products * (2 * terms - 1) * wide * _PRODUCT
    slow = not g.channels_last and gcd(g.P * g.Q, VECTOR_BYTES // size) == 1
    copies = t.products * _SLOW_COPY if slow else 0
    laid_out = wide * _LAY_OUT if size == 4 and not t.resident else 0
    deliver = _DELIVER * t.products * wide
    alone = chunks * (products + copies + laid_out + _WAIT) + deliver
    together = t.blocks * chunks * (t.groups * (products * _TOGETHER + copies) + laid_out)
    before = chunks * wide * _LAY_OUT_BEFORE[size] if t.resident else rounds * chunks * _MEET
    # What is read for more channels at another time is hoped to be in the cache, half of it.
    data = pixels * size * (read * (rows + 1) / 2 + written)
    return max(rounds * max(alone, together) + before, data / _MEMORY if data > _CACHE else 0)


def _terms(dtype: str, allow_tf32: bool) -> int:
    return 2 if dtype == "float32" and not allow_tf32 else 1


def _chunks(g: PointwiseGeometry, size: int, turned: bool) -> int:
    return -(-(g.K if turned else g.C) * size // _ROW_BYTES)


def _is_ragged(g: PointwiseGeometry, size: int) -> bool:
    """Whether rows are copied from boundary to boundary: those of 16-bit planes of an odd number of elements."""
    return size == 2 and not g.channels_last and g.P * g.Q % 2 == 1


def _shared_bytes(g: PointwiseGeometry, size: int, terms: int, turned: bool, t: Tile) -> int:
    """Of a block, as cuda/pointwise_groups.cu lays it out."""
    weights = _chunks(g, size, turned) if t.resident else t.stages if size == 2 else 2
    image_tile = 64 * t.products * _ROW_BYTES if g.channels_last else _ROW_BYTES * (64 * t.products + 8)
    return (
        _RIGHT_ALIGNMENT
        + weights * terms * t.channels * _ROW_BYTES
        + t.groups * t.stages * image_tile
        + _SUM_BYTES * t.channels
    )


def _at_once(g: PointwiseGeometry, size: int, terms: int, turned: bool, target: Target, t: Tile) -> int:
    """Blocks on a multiprocessor."""
    shared = _shared_bytes(g, size, terms, turned, t)
    if shared > target.shared_per_block - SHARED_RESERVE:
        return 0
    return min(t.blocks, target.shared_per_multiprocessor // (shared + SHARED_RESERVE))


def _tiles(g: PointwiseGeometry, size: int, t: Tile) -> int:
    """Of pixels."""
    rows = 64 * t.products
    return g.N * -(-g.P * g.Q // rows) if _is_ragged(g, size) else -(-g.N * g.P * g.Q // rows)


def _columns(
    g: PointwiseGeometry, size: int, turned: bool, target: Target, t: Tile, at_once: int
) -> tuple[int, int, int]:
    """Columns of the grid, that all have as many tiles; tiles of a block; and rows of the grid."""
    rows = -(-(g.C if turned else g.K) // t.channels)
    block_tiles = -(-_tiles(g, size, t) // t.groups)
    columns = max(1, min(block_tiles, target.multiprocessors * at_once // rows))
    return -(-block_tiles // -(-block_tiles // columns)), block_tiles, rows


def tile_plan(
    g: PointwiseGeometry, dtype: str, turned: bool, epilogue: Epilogue, target: Target, t: Tile, aligned: bool
) -> Plan:
    """The plan of a block's tile, Unsuitable where it does not fit."""
    name, size = DTYPES[dtype]
    channels, depth = (g.C, g.K) if turned else (g.K, g.C)
    vector = VECTOR_BYTES // size if aligned else 1
    plane, ragged, terms = g.P * g.Q, _is_ragged(g, size), _terms(dtype, epilogue.allow_tf32)
    if size == 2 and (not aligned or g.C % 2 == 1 or (g.channels_last and depth % 2 == 1)):
        raise Unsuitable("copies rows of 4 bytes or more")
    if g.channels_last:
        copy, store = gcd(depth, vector), gcd(channels, vector)
    else:
        copy, store = gcd(plane, vector), gcd(plane, vector, 2 * t.products)
    shared = _shared_bytes(g, size, terms, turned, t)
    if shared > target.shared_per_block - SHARED_RESERVE:
        raise Unsuitable(f"needs {shared} bytes of shared memory a block, and the device has {target.shared_per_block}")
    at_once = _at_once(g, size, terms, turned, target, t)
    columns, _, rows = _columns(g, size, turned, target, t, max(1, at_once))
    if rows > MAX_GRID[1]:
        raise Unsuitable(f"takes up to {MAX_GRID[1] * t.channels} channels, and there are {channels}")
    image_tiles = -(-plane // (64 * t.products))
    image_tiles_magic, image_tiles_shift = divisor_of(image_tiles)
    return Plan(
        source="pointwise_groups",
        defines=(
            ("T", name),
            ("CHANNELS_LAST", int(g.channels_last)),
            ("RIGHT_ALONG_COLUMNS", int(turned)),
            ("COLUMNS", t.channels),
            ("PRODUCTS", t.products),
            ("GROUPS", t.groups),
            ("BLOCKS", t.blocks),
            ("STAGES", t.stages),
            ("RESIDENT", int(t.resident)),
            ("COPY", copy),
            ("RAGGED", int(ragged)),
            ("WEIGHT_COPY", gcd(g.C, vector)),
            ("STORE", store),
            ("TERMS", terms),
            ("ACTIVATION", epilogue.activation or "none"),
        ),
        grid=(columns, rows, 1),
        block=128 * t.groups,
        shared_bytes=shared,
        parameters=(
            ("pixels", g.N * plane),
            ("channels", channels),
            ("depth", depth),
            ("tiles", _tiles(g, size, t)),
            ("image_tiles", image_tiles),
            ("image_tiles_magic", image_tiles_magic),
            ("image_tiles_shift", image_tiles_shift),
            *pixels_parameters(g, "input", depth, of_x=not turned),
            *pixels_parameters(g, "output", channels, of_x=turned),
        ),
    )


@dataclass(frozen=True, slots=True)
class WgradTile:
    """What a block of cuda/pointwise_wgrad_groups.cu makes: see there; slabs is how many there may be at most."""

    columns: int
    products: int
    groups: int
    blocks: int
    stages: int
    slabs: int


def wgrad(g: PointwiseGeometry, dtype: str, bias: bool, allow_tf32: bool, target: Target, aligned: bool) -> WgradPlan:
    """The plan of cuda/pointwise_wgrad_groups.cu."""
    _require_groups(g, dtype, g.N * g.P * g.Q, allow_tf32, target)
    g = _of_pixels(g)
    return wgrad_tile_plan(
        g, dtype, bias, allow_tf32, target, _wgrad_tile(g, dtype, _terms(dtype, allow_tf32), target), aligned
    )


def _wgrad_tile(g: PointwiseGeometry, dtype: str, terms: int, target: Target) -> WgradTile:
    if g.C <= 64:
        # Memory is the bound: many blocks, few sums. As TF32 a third block lacks a register or two.
        shape = (64, 1 if g.K <= 64 else 2, 1, 2 if dtype == "float32" and terms == 1 else 3)
    elif dtype == "float32":
        shape = (128, 1, 3, 1)
    else:
        shape = (128, 2, 2, 1)
    columns, products, groups, blocks = shape
    tiles = -(-g.K // (groups * products * 64)) * -(-g.C // columns)
    return WgradTile(*shape, 3, max(1, blocks * target.multiprocessors // tiles))


def wgrad_tile_plan(
    g: PointwiseGeometry, dtype: str, bias: bool, allow_tf32: bool, target: Target, t: WgradTile, aligned: bool
) -> WgradPlan:
    """The plan of a block's tile, Unsuitable where it does not fit."""
    name, size = DTYPES[dtype]
    vector = VECTOR_BYTES // size if aligned else 1
    dy_copy, x_copy = (gcd(g.K, vector), gcd(g.C, vector)) if g.channels_last else 2 * (gcd(g.P * g.Q, vector),)
    ragged = aligned and _is_ragged(g, size)
    if not ragged and min(dy_copy, x_copy if g.channels_last else dy_copy) * size < 4:
        raise Unsuitable("copies rows of 4 bytes or more")
    if ragged and t.stages < 3:
        raise Unsuitable("needs three stages for rows at any address")
    terms = _terms(dtype, allow_tf32)
    depth, rows = _ROW_BYTES // size, 64 * t.products
    image_stages = -(-g.P * g.Q // depth)
    pixels = g.N * (image_stages * depth if ragged else g.P * g.Q)
    if pixels >= _MAX_PIXELS:
        raise Unsuitable(f"counts fewer than {_MAX_PIXELS} pixels, with those that fill stages, and there are {pixels}")
    x_tiles = t.stages if size == 2 and not ragged else 2
    if ragged:
        row_bytes = _ROW_BYTES + VECTOR_BYTES
        ring = t.stages * (t.groups * rows + t.columns) * row_bytes
    else:
        ring = t.groups * t.stages * (_ROW_BYTES * (rows + 8) if g.channels_last else rows * _ROW_BYTES)
    shared = _RIGHT_ALIGNMENT + x_tiles * terms * t.columns * _ROW_BYTES + ring
    if shared > target.shared_per_block - SHARED_RESERVE:
        raise Unsuitable(f"needs {shared} bytes of shared memory a block, and the device has {target.shared_per_block}")
    row_tiles, column_tiles = -(-g.K // (t.groups * rows)), -(-g.C // t.columns)
    slab = -(-pixels // min(t.slabs, MAX_GRID[1]))
    slab = -(-slab // depth) * depth
    slabs = -(-pixels // slab)
    image_stages_magic, image_stages_shift = divisor_of(image_stages)
    sums = Plan(
        source="pointwise_wgrad_groups",
        defines=(
            ("T", name),
            ("CHANNELS_LAST", int(g.channels_last)),
            ("BIAS", int(bias)),
            ("COLUMNS", t.columns),
            ("PRODUCTS", t.products),
            ("GROUPS", t.groups),
            ("BLOCKS", t.blocks),
            ("STAGES", t.stages),
            ("DY_COPY", dy_copy),
            ("X_COPY", x_copy),
            ("RAGGED", int(ragged)),
            ("RIGHT_ALONG_COLUMNS", int(g.channels_last)),
            ("TERMS", terms),
        ),
        grid=(row_tiles * column_tiles, slabs, 1),
        block=128 * t.groups,
        shared_bytes=shared,
        parameters=(
            ("pixels", pixels),
            ("slab_pixels", slab),
            ("C", g.C),
            ("K", g.K),
            ("row_tiles", row_tiles),
            ("image_stages", image_stages),
            ("image_stages_magic", image_stages_magic),
            ("image_stages_shift", image_stages_shift),
            *pixels_parameters(g, "x", g.C, of_x=True),
            *pixels_parameters(g, "dy", g.K, of_x=False),
        ),
    )
    return with_reduce_of(sums, slabs, g.K, g.C, dtype, bias, as_dw=True)
