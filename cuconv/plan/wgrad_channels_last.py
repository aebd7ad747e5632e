"""Gradients of the weights and the bias of channels-last arrays: see cuda/depthwise_wgrad_channels_last.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..geometry import Conv2dGeometry, Pair
from .base import (
    DTYPES,
    MAX_GRID,
    SHARED_RESERVE,
    VECTOR_BYTES,
    Plan,
    Target,
    Unsuitable,
    axis_of,
    cheapest_of,
    each_of,
    plane_parameters,
    those_of,
)
from .channels_last import MAX_TAPS, reciprocal
from .wgrad import WgradPlan, sum_bytes, with_reduce

_COLUMNS = (8, 7, 6, 5, 4, 3, 2, 1)
_DEPTHS = (1, 2, 3)
# A block has at most so many threads, and a multiple of 32: as few as its strips and channels need.
_MOST_THREADS = (128, 192, 256)
# What a block reads of a pixel at least, where the pixel has so much: two sectors.
_LEAST_BYTES = 64
# Of a turn on its way to a thread, where more than one turn is: 256 threads then have 32 KB, and the memory needs 25.
_MAX_BYTES_AHEAD = 128
# From 256 vectors of 16 bytes.
_HALVINGS = 6
# What a thread keeps, in registers: beyond, the compiler spills.
_MAX_VALUES = 176
# Multiplications of the unrolled turns: beyond, the code outgrows the instruction cache and takes seconds to compile.
_MAX_PRODUCTS = 2400
# At larger strides neighbouring columns share little.
_MAX_STRIDE = 2


@dataclass(frozen=True, slots=True)
class Tile:
    """A thread takes strips of `columns` columns of dy of `vector` channels, `depth` rows loaded ahead; a block so many
    vectors of channels, `groups`, of `strips` strips side by side, and of all their rows `slab_rows`.

    The rows of a strip are spacing[0] apart, and as a convolution of their own have stride[0]; columns likewise.
    """

    vector: int
    columns: int
    depth: int
    groups: int
    strips: int
    slab_rows: int
    stride: Pair
    spacing: Pair

    @property
    def threads(self) -> int:
        """Of a block: whole warps."""
        return -(-self.groups * self.strips // 32) * 32


def channels_last(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of dy is read once, and of x but for the columns that neighbouring strips share."""
    if not g.channels_last:
        raise Unsuitable("takes channels-last arrays, and these are (N, C, H, W) in memory")
    if g.R * g.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    table, fits = _table(g, dtype, bias, target, aligned)
    best = cheapest_of(table, fits, _cost(g, dtype, bias, target, table))
    if best is None:
        raise Unsuitable(f"the sums of {g.R} x {g.S} taps do not fit shared memory")
    return tile_plan(g, dtype, bias, target, best)


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> WgradPlan:
    """The plan of one choice of tiles()."""
    groups = g.K // tile.vector
    column_items, strip_rows, rows = _extents(g, tile)
    strips = g.N * column_items
    slabs = -(-rows // tile.slab_rows)
    grid = (-(-groups // tile.groups), slabs, 1)
    # The kernel counts strips, turns, rows of x and pixels of a row in 32-bit integers; it looks a few strips ahead.
    counts = (strips + (2 + tile.depth) * tile.strips, slabs * tile.slab_rows * _ring(tile, g))
    down = (strip_rows + g.R + tile.depth) * tile.spacing[0] * g.stride[0] + g.R * g.dilation[0]
    across = g.W + max(_span(tile, g) * g.dilation[1] * g.C, tile.columns * tile.spacing[1] * g.K)
    if any(extent > limit for extent, limit in zip(grid, MAX_GRID, strict=True)) or max(counts) > MAX_GRID[0]:
        raise Unsuitable(f"{rows} rows of strips are more than one launch can count")
    if max(down, across) > MAX_GRID[0]:
        raise Unsuitable(f"{g.P} rows and {g.Q} columns of {g.K} channels are more than it can count")
    exact = _exact(tile, g)
    magic, shift = reciprocal(column_items)
    sums = Plan(
        source="depthwise_wgrad_channels_last",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("BIAS", int(bias)),
            ("FINAL", int(slabs == 1)),
            ("MULTIPLIED", int(g.multiplier > 1)),
            ("CHECKED", int(g.padded or not exact)),
            ("EXACT", int(exact)),
            ("THREADS", tile.threads),
            ("BLOCKS", int(_resident(g, dtype, bias, target, tile))),
            ("VECTOR", tile.vector),
            ("COLUMNS", tile.columns),
            ("DEPTH", tile.depth),
            ("STRIDE_H", tile.stride[0]),
            ("STRIDE_W", tile.stride[1]),
            ("DILATED", int(g.dilation != (1, 1))),
        ),
        grid=grid,
        block=tile.threads,
        shared_bytes=_shared_bytes(g, dtype, bias, tile),
        parameters=(
            ("multiplier", g.multiplier),
            ("K", g.K),
            *plane_parameters(g),
            ("spacing_h", tile.spacing[0]),
            ("spacing_w", tile.spacing[1]),
            ("groups", groups),
            ("block_groups", tile.groups),
            ("block_strips", tile.strips),
            ("column_items", column_items),
            ("strips", strips),
            ("strip_rows", strip_rows),
            ("rows", rows),
            ("slab_rows", tile.slab_rows),
            ("column_items_magic", magic),
            ("column_items_shift", shift),
        ),
    )
    return WgradPlan(sums, None, 0) if slabs == 1 else with_reduce(sums, slabs, g, dtype, bias)


def tiles(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> Iterator[Tile]:
    """The tiles that a thread's registers and a block's shared memory hold."""
    return iter(dict.fromkeys(each_of(*_table(g, dtype, bias, target, aligned))))


def _table(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> tuple[Tile, Any]:
    """All tiles as one of arrays, some of them several times, and which of them fit."""
    size = DTYPES[dtype][1]
    # Rows this far apart read rows that are whole dilations apart, so that they can share them.
    common = [math.gcd(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)]
    spacing = (g.dilation[0] // common[0], g.dilation[1] // common[1])
    stride = (g.stride[0] // common[0], g.stride[1] // common[1])
    widest = math.gcd(g.K, VECTOR_BYTES // size) if aligned and g.multiplier == 1 else 1
    columns_choices = [n for n in _COLUMNS if n == 1 or stride[1] <= _MAX_STRIDE]
    # Of those that span the plane, the narrowest.
    spanning = [n for n in columns_choices if n * spacing[1] >= g.Q]
    columns_choices = [n for n in columns_choices if n not in spanning[:-1]]
    vector, columns, depth = (
        axis_of([n for n in (8, 4, 2, 1) if widest % n == 0], 2),
        axis_of(columns_choices, 1),
        axis_of(_DEPTHS, 0),
    )
    stride_w: Any = np.where(columns > 1, stride[1], 1)
    spacing_w: Any = np.where(columns > 1, spacing[1], 1)
    of_thread = Tile(
        vector=vector,
        columns=columns,
        depth=depth,
        groups=1,
        strips=1,
        slab_rows=1,
        # Of a longer stride, no more rows than the kernel has meet dy.
        stride=(min(stride[0], g.R), stride_w),
        spacing=(spacing[0], spacing_w),
    )
    # One column of one channel is a tile of every geometry.
    fits = _fits(of_thread, g, bias, size) | ((vector == 1) & (columns == 1) & (depth == 1))
    of_block, fits = _blocks(g, those_of(of_thread, fits, 2), size)
    fits = fits & (_shared_bytes(g, dtype, bias, of_block) <= target.shared_per_block - SHARED_RESERVE)
    return _slabs(g, dtype, bias, target, those_of(of_block, fits, 1))


def _fits(tile: Tile, g: Conv2dGeometry, bias: bool, size: int) -> Any:
    """Whether a thread's registers hold the tile, and the instruction cache its code."""
    ahead = tile.depth * _turn_pixels(tile, g) * tile.vector * size
    # kUnrolled: turns.
    unrolled = np.lcm(_ring(tile, g), tile.depth + (size >= 4))
    return (
        ((tile.depth == 1) | (ahead <= _MAX_BYTES_AHEAD))
        & (unrolled * g.R * g.S * tile.columns * tile.vector <= _MAX_PRODUCTS)
        & (_values(tile, g, bias, size) <= _MAX_VALUES)
    )


def _blocks(g: Conv2dGeometry, tile: Tile, size: int) -> tuple[Tile, Any]:
    """The tiles with the vectors of channels, and strips, of a block, on two more axes; and which there are."""
    groups = g.K // tile.vector
    most, halvings = axis_of(_MOST_THREADS, 1), axis_of(range(_HALVINGS + 1), 0)
    of_block = -(-groups // (-(-groups // most) << halvings))
    strips = np.minimum(most // of_block, g.N * _extents(g, tile)[0])
    fits = (halvings == 0) | (of_block * tile.vector * size >= _LEAST_BYTES)
    return replace(tile, groups=of_block, strips=strips), fits


def _slabs(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> tuple[Tile, Any]:
    """The tiles with as many slabs as fill the device once, twice and by half, and with one, which takes one launch;
    the slabs of any rows, and of whole strips: on one more axis. All of them fit."""
    _, strip_rows, rows = _extents(g, tile)
    blocks = target.multiprocessors * _resident(g, dtype, bias, target, tile)
    chunks = -(-g.K // tile.vector // tile.groups)
    slabs = np.floor(blocks * np.array((2.0, 1.0, 0.5))) // chunks
    any_rows = np.ceil(rows / np.clip(slabs, 1, MAX_GRID[1])).astype(np.int64)
    whole_strips = -(-any_rows // strip_rows) * strip_rows
    some = np.stack((any_rows, whole_strips), axis=-1).reshape(len(rows), -1)
    slab_rows: Any = np.concatenate((rows, some), axis=1)
    return replace(tile, slab_rows=slab_rows), np.ones(slab_rows.shape, bool)


def _extents(g: Conv2dGeometry, tile: Tile) -> tuple[Any, Any, Any]:
    """Strips of an image side by side, one for each of `spacing` beginnings; rows of one; and rows of all, of which a
    block takes those of `strips` strips together."""
    column_items = -(-g.Q // (tile.columns * tile.spacing[1])) * tile.spacing[1]
    strip_rows = -(-g.P // tile.spacing[0])
    return column_items, strip_rows, -(-g.N * column_items // tile.strips) * tile.spacing[0] * strip_rows


def _exact(tile: Tile, g: Conv2dGeometry) -> Any:
    """Whether all columns of all strips exist."""
    return g.Q % (tile.columns * tile.spacing[1]) == 0


def _ring(tile: Tile, g: Conv2dGeometry) -> Any:
    """kRing: rows of dy that one row of x meets."""
    return -(-g.R // tile.stride[0])


def _span(tile: Tile, g: Conv2dGeometry) -> Any:
    """kSpan: columns of x that a strip needs."""
    return (tile.columns - 1) * tile.stride[1] + g.S


def _turn_pixels(tile: Tile, g: Conv2dGeometry) -> Any:
    """Loads of a turn."""
    return tile.stride[0] * _span(tile, g) + tile.columns


def _shared_bytes(g: Conv2dGeometry, dtype: str, bias: bool, tile: Tile) -> Any:
    """The sums of every thread in the end."""
    return (g.R * g.S + bias) * tile.groups * tile.strips * tile.vector * sum_bytes(dtype)


def _values(tile: Tile, g: Conv2dGeometry, bias: bool, size: int) -> Any:
    """Registers of a thread's sums, its ring of dy, its rows of x, and what is on its way."""
    words = max(1, size // 4)
    widened = g.R * g.S + bias + _ring(tile, g) * tile.columns + tile.stride[0] * _span(tile, g)
    ahead = tile.depth * _turn_pixels(tile, g) * np.maximum(1, tile.vector * size // 4)
    return tile.vector * widened * words + ahead


def _registers(tile: Tile, g: Conv2dGeometry, bias: bool, size: int) -> Any:
    """A bound that the compiler keeps without spilling: addresses, and which columns there are."""
    columns = _span(tile, g) * np.where(_exact(tile, g), 1.0, 2.5) + 1.4 * _turn_pixels(tile, g) * (tile.vector == 1)
    return np.minimum(255, 36 + np.floor(columns) + _values(tile, g, bias, size))


def _resident(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> Any:
    """Blocks that a multiprocessor holds at once."""
    # Its registers are in four parts, each of 512 for a warp's every thread, and are given out by eights.
    registers = -(-_registers(tile, g, bias, DTYPES[dtype][1]) // 8) * 8
    by_registers = 4 * (512 // registers) // (tile.threads // 32)
    # Half of the memory that shared memory and the first cache share is the cache's.
    by_shared = target.shared_per_multiprocessor // 2 // (_shared_bytes(g, dtype, bias, tile) + SHARED_RESERVE)
    return np.maximum(1, np.minimum(by_registers, np.minimum(by_shared, 1024 // tile.threads)))


def _split(g: Conv2dGeometry, size: int, tile: Tile) -> Any:
    """How much more the memory moves for blocks that take a part of every pixel: sectors of 32 bytes, lines of 128."""
    read = tile.groups * tile.vector * size
    part = np.where(read % 32 == 0, 1.0, 1 + 28 / read) * np.where(read % 128 == 0, 1.0, 1.04)
    return np.where(read >= g.K * size, 1.0, part)


def _cost(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> Any:
    """What ranks tiles: issue slots an element of dy, and what else takes time in the same unit.

    The weights were fitted to the times of 1,300 tiles (11 cases in float32 and float16 on an H200): of those measured,
    the tile of least cost takes 1.5 % longer than the fastest on average, and at most 8 %.
    """
    size = DTYPES[dtype][1]
    words, narrow = max(1, size // 4), size == 2
    _, strip_rows, rows = _extents(g, tile)
    slabs = -(-rows // tile.slab_rows)
    chunks = -(-g.K // tile.vector // tile.groups)
    blocks = slabs * chunks
    pixels, outputs = _turn_pixels(tile, g), tile.columns * tile.vector
    # Of a block: rows, and turns with those behind the rows of every strip.
    ends = tile.slab_rows / strip_rows + (tile.slab_rows % strip_rows > 0)
    turns = tile.slab_rows + ends * (_ring(tile, g) - 1)
    # Loads, their addresses, zeros where they fall outside, conversions.
    turn_slots = (
        pixels * (7.9 + tile.vector * (0.22 * size + 1.6 * narrow) + 4.8 * np.logical_not(_exact(tile, g))) + 13
    )
    row_slots = outputs * (g.R * g.S + bias) * words
    entries = g.R * g.S + bias
    fixed = 170 + 810 * ends + 4.8 * entries * tile.vector
    slots = tile.threads * (turns * turn_slots + tile.slab_rows * row_slots + fixed)
    # 128 bytes a pass through L1.
    passes = tile.threads * turns * pixels * np.maximum(1, tile.vector * size / 4)
    # Of the pixels of x that neighbouring strips share, those at a block's edges come out of L2 or memory once more.
    across = tile.strips * tile.columns * tile.stride[1]
    halo = (across + g.S - tile.stride[1]) / across
    moved = size * (1 + g.x_size / g.y_size * (0.5 + 0.5 * halo) * (0.7 + 0.3 * turns / tile.slab_rows))
    moved = moved * _split(g, size, tile)
    moved = moved + blocks * entries * tile.groups * tile.vector * sum_bytes(dtype) / g.y_size
    # Blocks that the busiest multiprocessor has, and how many of them at once.
    resident = _resident(g, dtype, bias, target, tile)
    most = -(-blocks // target.multiprocessors)
    most = np.where(most <= resident, most, -(-most // resident) * resident)
    waves = most * target.multiprocessors / blocks
    warps = np.minimum(resident, most) * tile.threads / 32
    # The less is on its way to a multiprocessor, the longer the memory takes.
    flight = warps * 32 * tile.depth * pixels * tile.vector * size
    busy = 1 - np.exp(-0.064 * warps)
    issue = blocks * (slots / busy + 10.4 * passes) / g.y_size
    memory = 2.7 * moved * (1 + 22_400 / flight)
    # The second launch.
    launch = np.where(slabs == 1, 0.0, 9500 * 128 * target.multiprocessors / g.y_size)
    return (np.maximum(issue, memory) + 1.25 * np.minimum(issue, memory)) * (1 + 0.81 * (waves - 1)) + launch
