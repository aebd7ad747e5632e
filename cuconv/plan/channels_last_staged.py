"""Channels-last arrays (NHWC in memory) through shared memory: see cuda/depthwise_channels_last_staged.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..geometry import Conv2dGeometry, Pair
from .base import (
    DTYPES,
    MAX_DIVIDEND,
    MAX_GRID,
    SHARED_RESERVE,
    VECTOR_BYTES,
    Plan,
    Target,
    Unsuitable,
    axis_of,
    cheapest_of,
    each_of,
    magic,
    plane_parameters,
    those_of,
)
from .runs import dense_dgrad_as_forward

# Weights live in registers, and kernels are unrolled over them.
MAX_TAPS = 64
_COLUMNS = (14, 8, 7, 6, 5, 4, 3, 2)
# Of narrow outputs a strip may be as wide as they are: which columns are padding is then known at compile time.
_MAX_WIDTH = 16
# Of x, columns from which on strides are better gone through in few rows and columns at a time.
_WIDE = 56
_STAGES = 4
_PIECES = (1, 2, 3, 4, 6, 8, 16, 32, 64)
_IMAGES = (1, 2, 4, 8)
_TURNS = (1, 2, 4)
_BLOCK_STRIPS = (1, 2, 4, 8)
_CHANNELS = (16, 32, 64, 128)
_MAX_THREADS = 512
_MAX_COPIES = 8
# What a thread needs beside weights, sums and a row of x: less, and the compiler spills; more, and it schedules better.
_REGISTERS_BESIDE = (12, 28)
_MAX_REGISTERS = 200
_MAX_PRODUCTS = 5000
_MIN_THREADS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """What one thread makes, rows x columns outputs of `vector` channels; and of what a block consists: `groups`
    vectors of channels of `strips` strips of columns of `images` images, `turns` times one after the other.

    The rows of a strip are spacing[0] apart, and as a convolution of their own have stride[0]; columns likewise.
    """

    vector: int
    groups: int
    rows: int
    columns: int
    strips: int
    images: int
    turns: int
    stages: int
    blocks: int
    copy: int
    stride: Pair
    spacing: Pair

    @property
    def channels(self) -> int:
        return self.vector * self.groups

    @property
    def threads(self) -> int:
        return -(-self.groups * self.strips * self.images // 32) * 32


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _best(g, dtype, target, aligned, turned=False)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _best(dense_dgrad_as_forward(g), dtype, target, aligned, turned=True)


def _best(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, turned: bool) -> Plan:
    if not g.channels_last:
        raise Unsuitable("takes channels-last arrays, and these are (N, C, H, W) in memory")
    if target.architecture < 80:
        raise Unsuitable(f"needs compute capability 8.0, and the device has {target.architecture / 10}")
    if dtype == "float64":
        raise Unsuitable("takes no float64")
    if g.R * g.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    if g.multiplier > 1:
        raise Unsuitable(f"takes multiplier 1, and has {g.multiplier}")
    size = DTYPES[dtype][1]
    if _copy(g, size, aligned) < 4:
        raise Unsuitable(f"copies words of 4 bytes of aligned arrays, and has {g.K} channels of {size} bytes")
    table, fits = _table(g, dtype, target, aligned)
    best = cheapest_of(table, fits, _cost(g, dtype, target, table))
    if best is None:
        raise Unsuitable(f"{g.R} x {g.S} taps on rows of {g.W} columns do not fit registers and shared memory")
    return tile_plan(g, dtype, best, turned)


def _copy(g: Conv2dGeometry, size: int, aligned: bool) -> int:
    return math.gcd(g.K * size, VECTOR_BYTES) if aligned else size


def tile_plan(g: Conv2dGeometry, dtype: str, tile: Tile, turned: bool = False) -> Plan:
    size = DTYPES[dtype][1]
    column_items, row_items = _items(g, tile)
    column_blocks = -(-column_items // tile.strips)
    pixels = int(_pixels(g, tile))
    grid = (-(-g.K // tile.channels) * column_blocks, row_items, -(-g.N // (tile.images * tile.turns)))
    if any(count > most for count, most in zip(grid, MAX_GRID, strict=True)):
        raise Unsuitable(f"a grid of {grid} blocks is more than one launch can have")
    # What the kernel counts in 32-bit integers: elements from a block's first image to its last, from a row of x or y
    # to the next, and pixels, which it divides.
    apart = max(tile.spacing[0] * g.Q, g.dilation[0] * g.W) * g.K
    if max(((tile.images - 1) * g.H + 1) * g.W * g.K, apart, 2 * pixels * tile.channels) > MAX_GRID[0]:
        raise Unsuitable(f"{g.H} x {g.W} pixels of {g.K} channels are more than it can count")
    if tile.images * pixels + tile.threads > MAX_DIVIDEND:
        raise Unsuitable(f"{tile.images * pixels} pixels of a row are more than it can divide")
    return Plan(
        source="depthwise_channels_last_staged",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("TURNED", int(turned)),
            ("THREADS", tile.threads),
            ("BLOCKS", tile.blocks),
            ("VECTOR", tile.vector),
            ("GROUPS", tile.groups),
            ("COLUMNS", tile.columns),
            ("STAGES", tile.stages),
            ("COPY", tile.copy),
            ("COPIES", int(_copies(g, tile, size))),
            ("STRIDE_H", tile.stride[0]),
            ("STRIDE_W", tile.stride[1]),
            ("DILATED", int(g.dilation != (1, 1))),
            ("EXACT", int(tile.columns * column_items == g.Q)),
            ("TURNS", int(tile.turns > 1)),
            ("WIDTH", g.W if _whole(g, tile.columns) else 0),
            ("LEFT", g.padding[1][0] if _whole(g, tile.columns) else 0),
        ),
        grid=grid,
        block=tile.threads,
        shared_bytes=int(_shared_bytes(g, tile, size)),
        parameters=(
            ("N", g.N),
            ("K", g.K),
            *plane_parameters(g),
            ("spacing_h", tile.spacing[0]),
            ("spacing_w", tile.spacing[1]),
            ("rows", tile.rows),
            ("strips", tile.strips),
            ("images", tile.images),
            ("turns", tile.turns),
            ("column_blocks", column_blocks),
            ("pixels", pixels),
            ("strips_magic", magic(tile.strips)),
            ("pixels_magic", magic(pixels)),
        ),
    )


def tiles(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Iterator[Tile]:
    """The tiles that a thread's registers and a block's shared memory hold."""
    return each_of(*_table(g, dtype, target, aligned))


def _table(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> tuple[Tile, Any]:
    """The same as one tile of arrays, and which of them fit."""
    size = DTYPES[dtype][1]
    copy = _copy(g, size, aligned)
    # Rows this far apart read rows that are whole dilations apart, so that they can share them.
    common = [math.gcd(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)]
    spacing = (g.dilation[0] // common[0], g.dilation[1] // common[1])
    stride = (g.stride[0] // common[0], g.stride[1] // common[1])
    widest = math.gcd(g.K, VECTOR_BYTES // size) if aligned else 1
    vectors = [vector for vector in (4, 2, 1) if widest % vector == 0]
    columns_choices = [n for n in _COLUMNS if (n - 1) * spacing[1] < g.Q] or [1]
    if _whole(g, g.Q):
        columns_choices = [g.Q, *(n for n in columns_choices if n < g.Q)]
    down = -(-g.P // spacing[0])
    rows_choices = sorted({-(-down // pieces) for pieces in _PIECES})
    # Axes of what decides whether a tile fits; channels are whole vectors.
    columns, vector = axis_of(columns_choices, 4), axis_of(vectors, 3)
    channels, images = axis_of(_channel_choices(g.K, copy // size), 2), axis_of(_IMAGES, 0)
    # Strips of a block, all that lie side by side last: they never get fewer, so that equal numbers are neighbours.
    column_items = -(-g.Q // (columns * spacing[1])) * spacing[1]
    some = () if g.dilation != (1, 1) else _BLOCK_STRIPS
    strips: Any = np.concatenate([-(-column_items // -(-column_items // n)) for n in (*some, column_items)], axis=3)
    bare = Tile(vector, channels // vector, 1, columns, strips, images, 1, _STAGES, 1, copy, stride, spacing)
    all_strips = strips == column_items
    fits = (
        (np.diff(strips, axis=3, prepend=0) > 0)
        & ((images == 1) | all_strips & (images <= g.N) & (bare.threads <= 256))
        & (bare.threads <= _MAX_THREADS)
        & ((bare.threads >= _MIN_THREADS) | all_strips)
        & (_registers(g, bare, min(_REGISTERS_BESIDE)) <= _MAX_REGISTERS)
        & (_products(g, bare) <= _MAX_PRODUCTS)
        & (_shared_bytes(g, bare, size) <= target.shared_per_block - SHARED_RESERVE)
        & (_copies(g, bare, size) <= _MAX_COPIES)
    )
    # Those that do, on one axis before the others.
    bare = those_of(bare, fits, 3)
    beside, rows, turns = axis_of(_REGISTERS_BESIDE, 2), axis_of(rows_choices, 1), axis_of(_TURNS, 0)
    threads, copies, shared = bare.threads, _copies(g, bare, size), _shared_bytes(g, bare, size)
    most = np.minimum(np.minimum(32, 2048 // threads), target.shared_per_multiprocessor // (shared + SHARED_RESERVE))
    registers = _registers(g, bare, beside) + 4 * np.maximum(0, copies - 4)
    blocks = np.minimum(most, _blocks(threads, registers))
    fits = (
        (blocks > 0)
        & (np.diff(blocks, axis=1, prepend=0) != 0)
        & ((turns == 1) | (rows == down) & (g.N % (bare.images * turns) == 0))
    )
    # Costs are divided by blocks, those of tiles that do not fit too.
    return replace(bare, rows=rows, turns=turns, blocks=np.maximum(1, blocks)), fits


def _whole(g: Conv2dGeometry, columns: Any) -> Any:
    """Whether a strip of so many columns is as wide as y, and x is narrow enough to be known at compile time."""
    return (columns == g.Q) & (g.dilation == (1, 1) and g.W <= _MAX_WIDTH * g.stride[1] and g.Q <= _MAX_WIDTH)


def _channel_choices(K: int, piece: int) -> list[int]:
    """Channels of a block: divisors of K, or what leaves few threads idle."""
    whole = [n for n in range(piece, min(K, 256) + 1, piece) if K % n == 0]
    choices = set()
    for most in _CHANNELS:
        divisor = max((n for n in whole if n <= most), default=0)
        if divisor > 0.7 * most:
            choices.add(divisor)
        elif most < K and most % piece == 0:
            choices.add(most)
    if K <= _CHANNELS[-1]:
        choices.add(-(-K // piece) * piece)
    return sorted(choices)


def _registers(g: Conv2dGeometry, tile: Tile, beside: Any) -> Any:
    """Registers that a thread is to have, so many of them beside."""
    stride = tile.stride
    values = _ring(g, stride) * tile.columns + g.R * g.S + (tile.columns - 1) * stride[1] + g.S
    return np.minimum(255, values * tile.vector + beside)


def _blocks(threads: Any, registers: Any) -> Any:
    """Of so many threads of so many registers each, those that a multiprocessor holds: its four parts share them out by
    warps."""
    warps_of_part = 512 // (-(-registers // 8) * 8)
    return 4 * warps_of_part * 32 // threads


def _copies(g: Conv2dGeometry, tile: Tile, size: int) -> Any:
    """Of a thread and row."""
    copies = tile.images * _pixels(g, tile) * tile.channels * size // tile.copy
    return -(-copies // tile.threads)


def _products(g: Conv2dGeometry, tile: Tile) -> Any:
    return g.R * g.S * tile.columns * tile.vector * _ring(g, tile.stride)


def _ring(g: Conv2dGeometry, stride: Pair) -> int:
    """kRing: rows of sums on the way."""
    return -(-g.R // stride[0])


def _items(g: Conv2dGeometry, tile: Tile) -> tuple[Any, Any]:
    """Strips side by side, and one below the other: one for each of `spacing` beginnings."""
    across = -(-g.Q // (tile.columns * tile.spacing[1])) * tile.spacing[1]
    down = -(-g.P // (tile.rows * tile.spacing[0])) * tile.spacing[0]
    return across, down


def _pixels(g: Conv2dGeometry, tile: Tile) -> Any:
    """Columns of x from the first that a block's strips need to the last."""
    strip = tile.strips - 1
    last = strip + strip // tile.spacing[1] * (tile.columns - 1) * tile.spacing[1]
    span = (tile.columns - 1) * tile.stride[1] + g.S
    return np.where(_whole(g, tile.columns), g.W, last * g.stride[1] + (span - 1) * g.dilation[1] + 1)


def _shared_bytes(g: Conv2dGeometry, tile: Tile, size: int) -> Any:
    """The ring of rows, and the weights of a block's channels."""
    return (tile.stages * tile.images * _pixels(g, tile) + g.R * g.S) * tile.channels * size


def _cost(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile) -> Any:
    """What ranks tiles: issue slots an output, and what else takes time in the same unit.

    The weights were fitted to the times of 2,000 tiles (13 cases in float32 and 16-bit on an H200): of those measured,
    the tile of least cost takes 2 % longer than the fastest on average, and at most 10 %.
    """
    size = DTYPES[dtype][1]
    narrow = size == 2
    column_items, row_items = _items(g, tile)
    column_blocks = -(-column_items // tile.strips)
    blocks = -(-g.K // tile.channels) * column_blocks * row_items * -(-g.N // (tile.images * tile.turns))
    pieces = row_items // tile.spacing[0]
    stride_h, stride_w = tile.stride
    whole = _whole(g, tile.columns)
    threads = tile.threads
    rows = (tile.rows - 1) * stride_h + g.R
    # Of them those of x.
    of_x = np.minimum(rows, (-(-g.H // g.dilation[0]) + (pieces - 1) * max(0, g.R - stride_h)) / pieces)
    columns = np.where(whole, _column_pairs(g) if np.any(whole) else 0, g.S * tile.columns)
    span = np.where(whole, g.W, (tile.columns - 1) * stride_w + g.S)
    slots = (
        of_x * g.R / stride_h * columns * tile.vector
        + of_x * span * (1.4 + 0.51 * tile.vector * narrow)
        + rows * (16 + 22 * _copies(g, tile, size))
        + tile.rows * tile.columns * (2.4 + 6 * tile.vector * narrow)
        + 460 / tile.turns
    )
    busy = 1 - np.exp(-0.19 * tile.blocks * threads / 32)
    issue = slots * blocks * threads * tile.turns / g.y_size / busy
    # Rows and columns of x that neighbouring blocks need too come out of the L2 cache.
    again = of_x / (tile.rows * stride_h) - 1
    beside = _pixels(g, tile) / np.maximum(1, np.minimum(g.W, tile.strips * tile.columns * g.stride[1])) - 1
    # At strides, of wide rows in float32, they cost nothing, and few columns are faster: 3x3 on 112x112 takes 102 % of
    # the floor by 4 rows of 2 columns in 4 blocks, 98 in 5, whose threads have fewer registers, 96 by 10 rows of 4.
    strided = (size == 4) & (stride_h > 1) & (g.W >= _WIDE)
    moved = 1 + g.x_size / g.y_size * (1 + np.where(strided, 0, 2.4) * again) * (1 + 0.13 * beside)
    memory = 6.1 * size * moved
    # Short runs of memory that warps store and blocks load; rows far apart at the same time; few warps a block or many.
    apart = 0.00042 * (128 / np.minimum(128, tile.vector * size * np.minimum(tile.groups, 32)) - 1)
    apart = apart + 0.003 * (min(256, g.K * size) / np.minimum(256, tile.channels * size) - 1)
    apart = apart + 0.0099 * np.log2(np.maximum(1, tile.rows / 8)) + 0.013 * abs(np.log2(threads / 128))
    # Blocks side by side in float32: 3x3 on 512x512 takes 93 % of the floor by strips of 3 columns, 96 by 2.
    beside_in_float32 = (size == 4) & (column_blocks > 1) & (stride_w == 1)
    apart = apart + 0.03 * (beside_in_float32 | strided) * np.log2(np.clip(tile.columns / 2, 1, 4))
    apart = apart + 0.002 * strided * tile.blocks
    # In float32, parts of pixels that are no halves of a line of memory, or no sectors of one: 5x5 on 28x28 takes 74 %
    # of the floor by 24 of 240 channels, 76 by 120, 64 by 60.
    run = np.where((size == 4) & (tile.channels < g.K), tile.channels * size, 256)
    apart = apart + 0.02 * ((run % 64 > 0) & (run < 256)) + 0.03 * (run % 32 > 0)
    waves = blocks / (target.multiprocessors * tile.blocks)
    uneven = np.where(waves < 8, np.ceil(waves) / waves, 1) - 1 + 0.091 / np.maximum(waves, 1)
    return (np.maximum(issue, memory) + 0.1 * np.minimum(issue, memory)) * (1 + apart) * (1 + 0.27 * uneven)


@lru_cache(maxsize=256)
def _column_pairs(g: Conv2dGeometry) -> int:
    """Pairs of a column of outputs and one of x that meet."""
    first = range(-g.padding[1][0], g.Q * g.stride[1] - g.padding[1][0], g.stride[1])
    return sum(0 <= start + tap < g.W for start in first for tap in range(g.S))
