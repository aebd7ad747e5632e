"""Depthwise-separable convolution in one kernel: see cuda/separable.cu."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ..geometry import Conv2dGeometry, SeparableGeometry
from .base import DTYPES, MAX_GRID, SHARED_RESERVE, VECTOR_BYTES, Plan, Target, Unsuitable
from .pointwise import (
    Tile,
    pixels_parameters,
    require_countable,
    tile_bytes,
    tile_defines,
    wgrad_slabs,
    wgrad_tile,
    wgrad_tile_bytes,
    wgrad_tile_defines,
)
from .wgrad import WgradPlan, with_reduce_of

# The depthwise part is unrolled over its taps.
MAX_TAPS = 64
_SUM_BYTES = 4


@dataclass(frozen=True, slots=True)
class SeparableEpilogue:
    """What a separable convolution is besides its geometry: how exact, and what follows each part."""

    allow_tf32: bool = False
    depthwise_activation: str | None = None
    pointwise_activation: str | None = None


def fused(g: SeparableGeometry, dtype: str, epilogue: SeparableEpilogue, target: Target, aligned: bool) -> Plan:
    """The plan of cuda/separable.cu; aligned speaks of all arrays."""
    depthwise, pointwise = g.depthwise, g.pointwise
    name, size = DTYPES[dtype]
    if target.architecture < 80:
        raise Unsuitable("needs tensor cores of compute capability 8.0 or newer")
    if dtype == "float64":
        raise Unsuitable("takes elements of 16 or 32 bits, and float64 has 64")
    if depthwise.R * depthwise.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {depthwise.R} x {depthwise.S}")
    require_countable(pointwise)
    depth = 32 if size == 2 else 16
    chunks = -(-pointwise.C // depth)
    channels = 64 if pointwise.K <= 64 else 128
    tile = Tile(channels, 128, depth, 2, 4, 1, 2, chunks * depth * channels * size <= 40 * 1024)
    taps_bytes = depthwise.K * depthwise.R * depthwise.S * _SUM_BYTES
    shared = tile_bytes(tile, pointwise.channels_last, size, False, chunks) + taps_bytes
    if shared > target.shared_per_block - SHARED_RESERVE:
        raise Unsuitable(f"needs {shared} bytes of shared memory a block, and the device has {target.shared_per_block}")
    rows = -(-pointwise.K // tile.channels)
    if rows > MAX_GRID[1]:
        raise Unsuitable(f"takes up to {MAX_GRID[1] * tile.channels} channels, and there are {pointwise.K}")

    widest = VECTOR_BYTES // size if aligned else 1
    if pointwise.channels_last:
        store = gcd(pointwise.K, widest, tile.channels)
    else:
        store = gcd(pointwise.P * pointwise.Q, widest, tile.pixels)
    pixels = pointwise.N * pointwise.P * pointwise.Q
    tiles = -(-pixels // tile.pixels)
    threads = 32 * tile.channel_warps * tile.pixel_warps
    per_multiprocessor = min(2048 // threads, max(1, target.shared_per_multiprocessor // (shared + SHARED_RESERVE)))
    columns = max(1, min(tiles, -(-target.multiprocessors * per_multiprocessor // rows)))
    return Plan(
        source="separable",
        defines=(
            ("T", name),
            ("CHANNELS_LAST", int(pointwise.channels_last)),
            ("TURNED", 0),
            *tile_defines(tile),
            ("WEIGHT_COPY", gcd(pointwise.C, widest)),
            ("STORE", store),
            ("STRIDED_OUTPUT", 0),
            ("TERMS", 2 if dtype == "float32" and not epilogue.allow_tf32 else 1),
            ("ACTIVATION", epilogue.pointwise_activation or "none"),
            *middle_defines(depthwise, widest, epilogue.depthwise_activation),
        ),
        grid=(columns, rows, 1),
        block=threads,
        shared_bytes=shared,
        parameters=(
            ("pixels", pixels),
            ("channels", pointwise.K),
            ("tiles", tiles),
            *middle_parameters(depthwise),
            *pixels_parameters(pointwise, "output", pointwise.K, of_x=False),
        ),
    )


def wgrad(
    g: SeparableGeometry, dtype: str, bias: bool, epilogue: SeparableEpilogue, target: Target, aligned: bool
) -> WgradPlan:
    """The plans of cuda/separable_wgrad.cu, of (dy, x, depthwise w and bias, workspace), and of the sums of slabs;
    aligned speaks of all arrays."""
    depthwise, pointwise = g.depthwise, g.pointwise
    name, size = DTYPES[dtype]
    if target.architecture < 80:
        raise Unsuitable("needs tensor cores of compute capability 8.0 or newer")
    if dtype == "float64":
        raise Unsuitable("takes elements of 16 or 32 bits, and float64 has 64")
    if depthwise.R * depthwise.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {depthwise.R} x {depthwise.S}")
    require_countable(pointwise)
    t = wgrad_tile(pointwise, size, stages=2)
    taps_bytes = depthwise.K * depthwise.R * depthwise.S * _SUM_BYTES
    shared = wgrad_tile_bytes(t, pointwise.channels_last, size, target, taps_bytes)
    row_tiles, column_tiles = -(-pointwise.C // t.rows), -(-pointwise.K // t.columns)
    pixels = pointwise.N * pointwise.P * pointwise.Q
    slab, slabs = wgrad_slabs(pixels, t, row_tiles * column_tiles, target)
    widest = VECTOR_BYTES // size if aligned else 1
    sums = Plan(
        source="separable_wgrad",
        defines=(
            ("T", name),
            ("CHANNELS_LAST", int(pointwise.channels_last)),
            ("BIAS", int(bias)),
            *wgrad_tile_defines(t),
            ("DY_COPY", gcd(pointwise.K if pointwise.channels_last else pointwise.P * pointwise.Q, widest)),
            ("TERMS", 2 if dtype == "float32" and not epilogue.allow_tf32 else 1),
            *middle_defines(depthwise, widest, epilogue.depthwise_activation),
        ),
        grid=(row_tiles * column_tiles, slabs, 1),
        block=32 * t.row_warps * t.column_warps,
        shared_bytes=shared,
        parameters=(
            ("pixels", pixels),
            ("slab_pixels", slab),
            ("K", pointwise.K),
            ("row_tiles", row_tiles),
            *middle_parameters(depthwise),
            *pixels_parameters(pointwise, "dy", pointwise.K, of_x=False),
        ),
    )
    return with_reduce_of(sums, slabs, pointwise.K, pointwise.C, dtype, bias)


def middle_defines(g: Conv2dGeometry, widest: int, activation: str | None) -> tuple[tuple[str, int | str], ...]:
    """The compile-time values of cuda/middle.cuh; loads are of so many elements at most."""
    if g.channels_last:
        vector = gcd(g.C, widest) if g.multiplier == 1 else 1
    else:
        vector = gcd(g.W, g.Q, widest) if g.stride[1] == g.dilation[1] == 1 else 1
    return (
        ("R", g.R),
        ("S", g.S),
        ("VECTOR", vector),
        ("STRIP", vector),
        ("LEFT", g.padding[1][0] % vector),
        ("DEPTHWISE_ACTIVATION", activation or "none"),
    )


def middle_parameters(g: Conv2dGeometry) -> tuple[tuple[str, int], ...]:
    """A Middle of cuda/middle.cuh."""
    return (
        ("middle_channels", g.K),
        ("middle_multiplier", g.multiplier),
        ("middle_H", g.H),
        ("middle_W", g.W),
        ("middle_top", g.padding[0][0]),
        ("middle_left", g.padding[1][0]),
        ("middle_stride_h", g.stride[0]),
        ("middle_stride_w", g.stride[1]),
        ("middle_dilation_h", g.dilation[0]),
        ("middle_dilation_w", g.dilation[1]),
    )


_ACTIVATE_THREADS = 256


def activate(elements: int, dtype: str, activation: str, target: Target) -> Plan:
    """The plan of cuda/activate.cu, on so many elements."""
    blocks = min(-(-elements // _ACTIVATE_THREADS), 8 * target.multiprocessors)
    return Plan(
        source="activate",
        defines=(("T", DTYPES[dtype][0]), ("ACTIVATION", activation)),
        grid=(blocks, 1, 1),
        block=_ACTIVATE_THREADS,
        shared_bytes=0,
        parameters=(("total_elements", elements),),
    )
