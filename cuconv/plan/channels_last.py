"""Channels-last arrays (NHWC in memory): see cuda/depthwise_channels_last.cu."""

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

# Weights live in registers, and kernels are unrolled over them: beyond this many, the direct kernel.
MAX_TAPS = 64
_COLUMNS = (8, 7, 6, 4, 3, 2, 1)
_DEPTHS = (1, 2, 3)
# Patches one below the other: fewer go through fewer rows twice, more of them fill more multiprocessors.
_PIECES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
_THREADS = (128, 256)
# Of x on its way to a thread, where more than one row is: 384 threads then have 36 KB, and the memory needs about 12.
_MAX_BYTES_AHEAD = 96
# Sums on the way, weights, rows of x and what their columns need, in registers of a thread: beyond, the compiler spills
# or takes more of them than three blocks a multiprocessor have.
_MAX_VALUES = 118
# Bytes of a pixel, of which less is for this kernel what is not for the staged one.
_SHORT_PIXEL = 64
# Outputs that are done before the device is full.
_SMALL = 2**19
# Images, their elements and taps for which this takes less time than the staged kernel.
_FEW_IMAGES, _FEW_ELEMENTS, _FEW_TAPS = 2, 2**20, 25
# From compute capability 10.0 on, the compiler takes some more for itself in bfloat16.
_MAX_VALUES_10_0 = 112
# Multiplications of the unrolled rows: beyond, the code outgrows the instruction cache and takes seconds to compile.
_MAX_PRODUCTS = 2000
# At larger strides patches share little.
_MAX_STRIDE = 2
# Of a patch that loads all its rows at once, in words: its own rows, and the registers of what it loads, of its weights
# and of its sums.
_ROWS_AT_ONCE = 4
_MAX_VALUES_AT_ONCE = 96
# More than any such patch costs.
_LONG = 1e3


@dataclass(frozen=True, slots=True)
class Tile:
    """What one thread makes, rows x columns outputs of `vector` channels, `depth` rows of x loaded ahead; and how many
    threads are a block. The rows alone are no compile-time value, but where a patch loads all of x `at_once`.

    The rows of a patch are spacing[0] apart, and as a convolution of their own have stride[0]; columns likewise.
    """

    vector: int
    rows: int
    columns: int
    depth: int
    threads: int
    stride: Pair
    spacing: Pair
    at_once: bool


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_channels_last_staged, which shares out short pixels to few threads, and
    waits for its first rows before it begins.

    On an H200, percent of the floor by this and by the other: 3x1 of 8 channels 96 and 77 in float32, 89 and 50 in
    bfloat16. Microseconds in float32: one image of 512 planes of 14x14 3.0 and 3.5, of 144 of 56x56 4.2 and 6.0, two of
    these 5.5 and 6.1; four of 96 planes of 28x28 4.2 and 4.1, and 7x7 on one of 96 planes of 56x56 8.1 and 6.9.
    """
    few = g.N <= _FEW_IMAGES and g.x_size <= _FEW_ELEMENTS and g.R * g.S <= _FEW_TAPS
    return g.channels_last and (g.K * DTYPES[dtype][1] < _SHORT_PIXEL or few)


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    _check(g)
    return _best(g, dtype, target, aligned, transposed=False)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    _check(g)
    if g.multiplier > 1:
        raise Unsuitable(f"takes multiplier 1 here, and has {g.multiplier}")
    if g.stride != (1, 1) and (g.dilation != (1, 1) or max(g.stride) > _MAX_STRIDE):
        raise Unsuitable(
            f"takes strides up to {_MAX_STRIDE} without dilation, or dilation without stride here, and has stride "
            f"{g.stride} and dilation {g.dilation}"
        )
    return _best(swapped(g), dtype, target, aligned, transposed=True)


def swapped(g: Conv2dGeometry) -> Conv2dGeometry:
    """The geometry of dx from dy: what is read and what is written change places, all else is the forward pass's."""
    return replace(g, H=g.P, W=g.Q, P=g.H, Q=g.W)


def _check(g: Conv2dGeometry) -> None:
    if not g.channels_last:
        raise Unsuitable("takes channels-last arrays, and these are (N, C, H, W) in memory")
    if g.R * g.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")


def _best(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, transposed: bool) -> Plan:
    table = _table(g, dtype, target, aligned, transposed)
    best = cheapest_of(table, np.ones(table.rows.shape, bool), _cost(g, dtype, target, table, transposed))
    if best is None:
        raise Unsuitable(f"the weights of a block, {g.R} x {g.S} a channel, do not fit shared memory")
    return tile_plan(g, dtype, best, transposed)


def tile_plan(g: Conv2dGeometry, dtype: str, tile: Tile, transposed: bool = False) -> Plan:
    """The plan of a tile; of the gradient, g is swapped."""
    groups = g.K // tile.vector
    column_items, row_items = _items(g, tile, transposed)
    items = g.N * row_items * column_items * groups
    blocks = -(-items // tile.threads)
    # The kernel counts patches, and the pixels of a row of one, in 32-bit integers.
    if blocks * tile.threads > MAX_GRID[0]:
        raise Unsuitable(f"{items} patches are more than one launch can count")
    furthest = max(
        (extent + count * space) * stride + _span(tile, g, axis, transposed) * dilation
        for axis, (extent, count, space, stride, dilation) in enumerate(
            zip((g.P, g.Q), (tile.rows, tile.columns), tile.spacing, g.stride, g.dilation, strict=True)
        )
    )
    across = max(_span(tile, g, 1, transposed) * g.dilation[1], tile.columns * tile.spacing[1]) * g.K
    if max(furthest, across, 2 * g.K * g.R * g.S) > MAX_GRID[0]:
        raise Unsuitable(f"{g.Q} columns of {g.K} channels are more than it can count")
    return Plan(
        source="depthwise_channels_last",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("TRANSPOSED", int(transposed)),
            ("MULTIPLIED", int(g.multiplier > 1)),
            ("THREADS", tile.threads),
            ("VECTOR", tile.vector),
            ("COLUMNS", tile.columns),
            ("DEPTH", tile.depth),
            ("ROWS", tile.rows if tile.at_once else 0),
            ("STRIDE_H", tile.stride[0]),
            ("STRIDE_W", tile.stride[1]),
            ("DILATED", int(g.dilation != (1, 1))),
        ),
        grid=(blocks, 1, 1),
        block=tile.threads,
        shared_bytes=int(_shared_bytes(g, dtype, tile.vector, tile.threads)),
        parameters=(
            ("multiplier", g.multiplier),
            ("K", g.K),
            *plane_parameters(g),
            ("spacing_h", tile.spacing[0]),
            ("spacing_w", tile.spacing[1]),
            ("rows", tile.rows),
            ("groups", groups),
            ("column_items", column_items),
            ("row_items", row_items),
            ("items", items),
            ("groups_magic", reciprocal(groups)[0]),
            ("column_items_magic", reciprocal(column_items)[0]),
            ("row_items_magic", reciprocal(row_items)[0]),
            ("groups_shift", reciprocal(groups)[1]),
            ("column_items_shift", reciprocal(column_items)[1]),
            ("row_items_shift", reciprocal(row_items)[1]),
        ),
    )


def reciprocal(divisor: int) -> Pair:
    """magic and shift, by which the kernel divides any number below 2**31: see divide there."""
    shift = 31 + (divisor - 1).bit_length()
    return -(-(2**shift) // divisor), shift


def tiles(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, transposed: bool = False) -> Iterator[Tile]:
    """The tiles that a thread's registers and a block's shared memory hold; of the gradient, g is swapped."""
    table = _table(g, dtype, target, aligned, transposed)
    return each_of(table, np.ones(table.rows.shape, bool))


def _table(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, transposed: bool) -> Any:
    """The same as one tile of arrays."""
    size = DTYPES[dtype][1]
    # Rows this far apart read rows that are whole dilations apart, so that they can share them.
    common = [math.gcd(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)]
    spacing = (g.dilation[0] // common[0], g.dilation[1] // common[1])
    stride = (g.stride[0] // common[0], g.stride[1] // common[1])
    widest = math.gcd(g.K, VECTOR_BYTES // size) if aligned and g.multiplier == 1 else 1
    vectors = [vector for vector in (8, 4, 2, 1) if widest % vector == 0]
    before = _before(g, transposed)
    columns_choices = [n for n in _COLUMNS if n % stride[1] == 0 or (not transposed and n == 1)]
    if not transposed and stride[1] > _MAX_STRIDE:
        columns_choices = [1]
    # Of those that span the plane, the lowest.
    spanning = [n for n in columns_choices if n * spacing[1] >= g.Q + before[1]]
    columns_choices = [n for n in columns_choices if n not in spanning[:-1]]
    down = -(-(g.P + before[0]) // spacing[0])
    unit = stride[0] if transposed else 1
    rows_choices = {-(-down // (pieces * unit)) * unit for pieces in _PIECES}
    if not transposed and stride[0] > _MAX_STRIDE:
        rows_choices = {1}
    # Axes; a depth of 0 stands for all rows.
    vector, columns, ahead = axis_of(vectors, 4), axis_of(columns_choices, 3), axis_of((*_DEPTHS, 0), 2)
    threads, rows = axis_of(_THREADS, 1), axis_of(rows_choices, 0)
    tile = Tile(
        vector=vector,
        rows=rows,
        columns=columns,
        depth=ahead,
        threads=threads,
        stride=_where(rows > 1, stride[0], columns > 1, stride[1]),
        spacing=_where(rows > 1, spacing[0], columns > 1, spacing[1]),
        at_once=ahead == 0,
    )
    tile = replace(tile, depth=np.where(tile.at_once, _span(tile, g, 0, transposed), ahead))
    # One column of one channel is a tile of every geometry.
    fits = (vector == 1) & (ahead == 1) & (columns == columns_choices[-1]) | _fits(tile, g, size, target, transposed)
    shared = _shared_bytes(g, dtype, vector, threads) <= target.shared_per_block - SHARED_RESERVE
    return those_of(tile, fits & shared)


def _where(several_rows: Any, of_rows: int, several_columns: Any, of_columns: int) -> Any:
    """A pair where there are several rows and columns, and 1 where not."""
    return np.where(several_rows, of_rows, 1), np.where(several_columns, of_columns, 1)


def _fits(tile: Tile, g: Conv2dGeometry, size: int, target: Target, transposed: bool) -> Any:
    """Whether a thread's registers hold the tile, and the instruction cache its code."""
    few = g.y_size <= _SMALL and g.dilation == (1, 1) and g.multiplier == 1 and size <= 4
    at_once = (
        few
        & (tile.vector * size <= 4)
        & (tile.rows <= _ROWS_AT_ONCE)
        & (_values_at_once(tile, g, size, transposed) <= _MAX_VALUES_AT_ONCE)
    )
    ahead = tile.depth * _span(tile, g, 1, transposed) * tile.vector * size
    products = _unrolled(tile, g, transposed) * g.R * g.S * tile.columns * tile.vector // tile.stride[0]
    if transposed:
        products = products * tile.stride[0] // tile.stride[1]
    in_turn = (
        ((tile.depth == 1) | (ahead <= _MAX_BYTES_AHEAD))
        & (products <= _MAX_PRODUCTS)
        & (_values(tile, g, size, transposed) <= (_MAX_VALUES if target.architecture < 100 else _MAX_VALUES_10_0))
    )
    return np.where(tile.at_once, at_once, in_turn)


def _ring(tile: Tile, g: Conv2dGeometry, transposed: bool) -> Any:
    """kRing: rows of sums on the way."""
    stride = tile.stride[0]
    return ((g.R - 1) // stride + 1) * stride if transposed else -(-g.R // stride)


def _unrolled(tile: Tile, g: Conv2dGeometry, transposed: bool) -> Any:
    """kUnrolled: rows of x."""
    ring, stride = _ring(tile, g, transposed), tile.stride[0]
    return np.lcm(ring // stride if transposed else ring * stride, tile.depth)


def _before(g: Conv2dGeometry, transposed: bool) -> Pair:
    """Rows and columns by which a gradient's first patches begin outside: they begin at whole strides, padding
    counted."""
    (top, _), (left, _) = g.padding
    return (top % g.stride[0], left % g.stride[1]) if transposed else (0, 0)


def _items(g: Conv2dGeometry, tile: Tile, transposed: bool) -> tuple[Any, Any]:
    """Patches side by side, and one below the other: one for each of `spacing` beginnings."""
    before = _before(g, transposed)
    down = -(-(g.P + before[0]) // (tile.rows * tile.spacing[0])) * tile.spacing[0]
    across = -(-(g.Q + before[1]) // (tile.columns * tile.spacing[1])) * tile.spacing[1]
    return across, down


def _span(tile: Tile, g: Conv2dGeometry, axis: int, transposed: bool) -> Any:
    """Rows (axis 0) or columns (1) of x that a patch needs, in units of the dilation: kSpanH and kSpanW."""
    count, taps, stride = (tile.rows, tile.columns)[axis], (g.R, g.S)[axis], tile.stride[axis]
    if transposed:
        return (taps - 1) // stride + (count - 1) // stride + 1
    return (count - 1) * stride + taps


def _shared_bytes(g: Conv2dGeometry, dtype: str, vector: Any, threads: Any) -> Any:
    """The weights of a block's channels."""
    return np.minimum(g.K, threads * vector) * g.R * g.S * DTYPES[dtype][1]


def _values(tile: Tile, g: Conv2dGeometry, size: int, transposed: bool) -> Any:
    """Registers that a thread's sums on the way, its weights and its rows of x take."""
    words = max(1, size // 4)
    row = _span(tile, g, 1, transposed)
    widened = (_ring(tile, g, transposed) * tile.columns + g.R * g.S + row) * words
    return tile.vector * widened + tile.depth * row * np.maximum(1, tile.vector * size // 4) + 2 * row


def _values_at_once(tile: Tile, g: Conv2dGeometry, size: int, transposed: bool) -> Any:
    """Registers that all rows of x of a patch, its weights and its sums take."""
    loads = tile.depth * _span(tile, g, 1, transposed) * np.maximum(1, tile.vector * size // 4)
    return loads + tile.vector * (g.R * g.S + tile.rows * tile.columns)


def _cost(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile, transposed: bool) -> Any:
    """What ranks tiles: issue slots an output, and what else takes time in the same unit; of small outputs, latency.

    The weights were fitted to the times of 1,700 tiles (11 cases in float32 and float16 on an H200): of those measured,
    the tile of least cost takes 1.5 % longer than the fastest on average, and at most 7 %.
    """
    size = DTYPES[dtype][1]
    rows, columns = (_span(tile, g, axis, transposed) for axis in (0, 1))
    outputs = tile.rows * tile.columns * tile.vector
    column_items, row_items = _items(g, tile, transposed)
    items = g.N * row_items * column_items * (g.K // tile.vector)
    idle = items * outputs / g.y_size
    narrow = size == 2
    # Loads, their addresses, zeros where they fall outside, conversions.
    row_slots = columns * (8.6 + tile.vector * (2.8 * size + 12.6 * narrow)) + 0.4
    stores = tile.columns * (3.6 + tile.vector / 2 * narrow)
    fixed = 234 + 0.43 * g.R * g.S * tile.vector
    # Rows of x that the patch's neighbours need too meet sums in vain.
    products = rows * g.R * g.S * max(1, size // 4) / (tile.rows * (g.stride[1] if transposed else tile.stride[0]))
    slots = (rows * row_slots + tile.rows * stores + fixed) / outputs + products
    if g.y_size <= _SMALL:
        in_turn = _latency(g, target, tile, rows, slots * outputs, items, rows * columns * tile.vector * size)
        # Waits for memory in turn always take longer.
        return np.where(tile.at_once, _latency_at_once(g, size, target, tile, items, transposed), _LONG + in_turn)
    # 128 bytes a pass through L1.
    passes = np.maximum(1, tile.vector * size / 4) * (rows * columns + tile.rows * tile.columns) / outputs
    registers = np.minimum(255, 10.6 + 1.3 * _values(tile, g, size, transposed))
    resident = np.maximum(1, np.minimum(2048 // tile.threads, 65536 // registers // tile.threads))
    # x and y once each, the rows that patches share once more out of L2.
    moved = size * (1 + g.x_size / g.y_size * (1 + 0.04 * (rows / (tile.rows * tile.stride[0]) - 1)))
    # About 3 KB must be on their way to a multiprocessor for half of its share of the bandwidth.
    flight = resident * tile.threads * tile.depth * columns * tile.vector * size
    busy = 1 - np.exp(-0.74 * resident * tile.threads / 128)
    waves = -(-items // tile.threads) / (target.multiprocessors * resident)
    issue = slots * idle / busy + 0.72 * passes * idle
    # At the memory's bandwidth a multiprocessor moves a byte in the time of 7 issue slots.
    memory = 7 * moved * (1 + 3260 / flight)
    return (np.maximum(issue, memory) + 0.19 * np.minimum(issue, memory)) * (1 + 0.52 / waves)


def _latency(g: Conv2dGeometry, target: Target, tile: Tile, rows: Any, slots: Any, items: Any, loaded: Any) -> Any:
    """What ranks tiles of rows in turn where a launch is over before the device is full: a thread's waits for memory.

    `slots` and the bytes `loaded` are a thread's. Fitted to the times of 1,000 tiles (18 passes of one image, 3x3 and
    5x5, in float32 and float16 on an H200): of those measured, the tile of least cost takes 3 % longer than the fastest
    on average, and at most 9 %.
    """
    # Of the multiprocessor that has the most.
    blocks = np.ceil(items / tile.threads)
    warps_of_scheduler = np.ceil(blocks / target.multiprocessors) * tile.threads / 128
    waits = np.maximum(0, rows - tile.depth) / tile.depth
    return (
        waits
        + slots * (0.0204 + 0.00164 * warps_of_scheduler)
        + 1.02e-4 * loaded * items / target.multiprocessors
        + (2.37 + 0.0106 * g.R * g.S * tile.vector) * warps_of_scheduler
    )


def _latency_at_once(g: Conv2dGeometry, size: int, target: Target, tile: Tile, items: Any, transposed: bool) -> Any:
    """What ranks tiles that load all rows at once: microseconds.

    Fitted to the times of 600 tiles (16 passes of one image, 3x3 and 5x5, in float32 and 16-bit on an H200): of those
    measured, the tile of least cost takes 2 % longer than the fastest on average, and at most 5 %.
    """
    loads = tile.depth * _span(tile, g, 1, transposed)
    outputs = tile.rows * tile.columns
    products = outputs * tile.vector * g.R * g.S / (tile.stride[0] * tile.stride[1] if transposed else 1)
    slots = 6.9 * loads + 22.5 * outputs + 0.2 * products + 12.4 * g.R * g.S * tile.vector
    slots = slots + (4.6 * loads * tile.vector if size == 2 else 0)
    # Of the multiprocessor that has the most.
    blocks = np.ceil(items / tile.threads)
    warps_of_scheduler = np.ceil(blocks / target.multiprocessors) * tile.threads / 128
    loaded = loads * tile.vector * size * items / target.multiprocessors
    return 1.44 + slots * (0.00054 + 0.00024 * warps_of_scheduler) + 1.5e-5 * loaded + 0.052 * warps_of_scheduler
