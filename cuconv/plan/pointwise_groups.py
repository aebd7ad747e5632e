"""Pointwise convolution by products of warp groups: cuda/pointwise_groups.cu and pointwise_wgrad_groups.cu."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from ..geometry import PointwiseGeometry
from .base import DTYPES, MAX_GRID, SHARED_RESERVE, VECTOR_BYTES, Plan, Target, Unsuitable
from .pointwise import LEAST_TERMS, Epilogue, divisor_of, pixels_parameters, require_countable
from .wgrad import WgradPlan, with_reduce_of

# Rows of a stage have so many bytes, and right factors start at multiples of so many.
_ROW_BYTES = 128
_RIGHT_ALIGNMENT = 1024


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
    require_countable(g)


def _of_pixels(g: PointwiseGeometry) -> PointwiseGeometry:
    """The same convolution with images of one pixel as channels-last, which they are too: its rows are longer."""
    return replace(g, channels_last=True) if g.H * g.W == 1 else g


def _tile(g: PointwiseGeometry, dtype: str, turned: bool, epilogue: Epilogue, target: Target) -> Tile:
    channels, depth = (g.C, g.K) if turned else (g.K, g.C)
    size = DTYPES[dtype][1]
    wide = 64 if channels <= 64 else 128
    terms = 2 if dtype == "float32" and not epilogue.allow_tf32 else 1
    resident = -(-depth * size // _ROW_BYTES) * terms * wide * _ROW_BYTES <= 80 * 1024
    return Tile(wide, 2, 2, 1, 3, resident)


def tile_plan(
    g: PointwiseGeometry, dtype: str, turned: bool, epilogue: Epilogue, target: Target, t: Tile, aligned: bool
) -> Plan:
    """The plan of a block's tile, Unsuitable where it does not fit."""
    name, size = DTYPES[dtype]
    channels, depth = (g.C, g.K) if turned else (g.K, g.C)
    vector = VECTOR_BYTES // size if aligned else 1
    plane, tile_pixels = g.P * g.Q, 64 * t.products
    ragged = size == 2 and not g.channels_last and gcd(plane, vector) == 1
    if size == 2 and (not aligned or g.C % 2 == 1 or (g.channels_last and depth % 2 == 1)):
        raise Unsuitable("copies rows of 4 bytes or more")
    if g.channels_last:
        copy, store = gcd(depth, vector), gcd(channels, vector)
    else:
        copy, store = gcd(plane, vector), gcd(plane, vector, 2 * t.products)
    image_tiles = -(-plane // tile_pixels)
    pixels = g.N * plane
    tiles = g.N * image_tiles if ragged else -(-pixels // tile_pixels)
    chunks = -(-depth * size // _ROW_BYTES)
    terms = 2 if dtype == "float32" and not epilogue.allow_tf32 else 1
    rows = -(-channels // t.channels)
    image_tile = tile_pixels * _ROW_BYTES if g.channels_last else _ROW_BYTES * (tile_pixels + 8)
    shared = (
        _RIGHT_ALIGNMENT
        + (chunks if t.resident else t.stages if size == 2 else 2) * terms * t.channels * _ROW_BYTES
        + t.groups * t.stages * image_tile
        + 4 * t.channels
    )
    if shared > target.shared_per_block - SHARED_RESERVE:
        raise Unsuitable(f"needs {shared} bytes of shared memory a block, and the device has {target.shared_per_block}")
    if rows > MAX_GRID[1]:
        raise Unsuitable(f"takes up to {MAX_GRID[1] * t.channels} channels, and there are {channels}")
    block_tiles = -(-tiles // t.groups)
    at_once = min(t.blocks, target.shared_per_multiprocessor // (shared + SHARED_RESERVE))
    columns = max(1, min(block_tiles, target.multiprocessors * max(1, at_once) // rows))
    columns = -(-block_tiles // -(-block_tiles // columns))
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
            ("pixels", pixels),
            ("channels", channels),
            ("depth", depth),
            ("tiles", tiles),
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
    return wgrad_tile_plan(g, dtype, bias, allow_tf32, target, _wgrad_tile(g, dtype, target), aligned)


def _wgrad_tile(g: PointwiseGeometry, dtype: str, target: Target) -> WgradTile:
    columns = 64 if g.C <= 64 else 128
    groups, products = (1, 1) if g.K <= 64 else (2, 1) if g.K <= 128 else (2, 2)
    blocks = 2 if products == 1 else 1
    tiles = -(-g.K // (groups * products * 64)) * -(-g.C // columns)
    return WgradTile(columns, products, groups, blocks, 3, max(1, blocks * target.multiprocessors // tiles))


def wgrad_tile_plan(
    g: PointwiseGeometry, dtype: str, bias: bool, allow_tf32: bool, target: Target, t: WgradTile, aligned: bool
) -> WgradPlan:
    """The plan of a block's tile, Unsuitable where it does not fit."""
    name, size = DTYPES[dtype]
    vector = VECTOR_BYTES // size if aligned else 1
    dy_copy, x_copy = (gcd(g.K, vector), gcd(g.C, vector)) if g.channels_last else 2 * (gcd(g.P * g.Q, vector),)
    ragged = size == 2 and aligned and not g.channels_last and dy_copy == 1
    if not ragged and min(dy_copy, x_copy if g.channels_last else dy_copy) * size < 4:
        raise Unsuitable("copies rows of 4 bytes or more")
    if ragged and t.stages < 3:
        raise Unsuitable("needs three stages for rows at any address")
    terms = 2 if dtype == "float32" and not allow_tf32 else 1
    depth, rows = _ROW_BYTES // size, 64 * t.products
    image_stages = -(-g.P * g.Q // depth)
    pixels = g.N * (image_stages * depth if ragged else g.P * g.Q)
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
