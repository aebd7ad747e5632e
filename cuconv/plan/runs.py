"""Runs, for compute capability 9.0 and newer: see cuda/runs.cuh and cuda/depthwise_runs.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
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
    require_nchw,
    stack,
)

# Weights live in registers, and kernels are unrolled over them: beyond this many, the direct kernel.
MAX_TAPS = 64
# Rows of a thread's patch. More share more loads: 16 take 18 rows of input at 3x3; 7 and 14 fit the planes that
# networks have most.
_ROWS = (16, 14, 8, 7, 6, 4, 2, 1)
_COLUMNS = (4, 2, 1)
# Of rows without vectors, too: with odd numbers, the lanes of a scalar load meet different banks of shared memory.
_UNALIGNED_COLUMNS = (7, 5, 3, 4, 2, 1)
_PAIRED_COLUMNS = (6, 4, 2, 1)
# Rows of up to this many outputs may be one thread's.
_MAX_WIDTH = 16
# Sums, weights and one row of input that a thread may hold, in registers: beyond, the compiler spills.
_MAX_VALUES = 128
# Columns left of x that pairs are loaded from before they are masked lie in the results' shared memory.
_MASKED_BYTES = 128
_THREADS = (128, 64, 256)
_IMAGES = (1, 2, 4)
# Of a row, elements from which on patches of two columns in float32 take less time than their slots say.
_LONG_ROW = 256
# Patches of a block one below the other; as many as the plane has, too.
_GROUPS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Spread:
    """How far apart the rows and columns of x lie, as if between them were others that no tap meets.

    Tap `first` of the first output is the first that may meet a row of x; the padding counts rows of x, rounded down.
    """

    by: Pair = (1, 1)
    first: Pair = (0, 0)


_NO_SPREAD = Spread()


@dataclass(frozen=True, slots=True)
class Patch:
    """What one thread makes: rows x columns outputs, by loads and stores of so many elements.

    The rows of a patch are spacing[0] apart, and as a convolution of their own have stride[0]; columns likewise.
    """

    rows: int
    columns: int
    stride: Pair
    spread: Spread
    spacing: Pair
    dilated: bool
    vector: int
    out_vector: int
    # Whether it spans rows, and columns, from end to end, so that what falls outside is known when it is compiled.
    whole_rows: bool
    whole_columns: bool
    # Whether, of dilated columns, every two are neighbours.
    paired: bool
    # By a rough count, an output: issue slots, and passes over the banks of shared memory.
    slots: float
    passes: float
    registers: int

    @property
    def column_group(self) -> int:
        """Columns that are patched together, a patch for each beginning."""
        return self.spacing[1] * self.columns // (1 + self.paired)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block makes: of one image or of several in turn, a piece of one plane or several whole planes."""

    patch: Patch
    block_rows: int
    block_planes: int
    block_images: int
    row_items: int
    column_items: int
    threads: int
    addend: int  # elements of shared memory from one input plane to the next of those that are summed
    input_bytes: int  # of one image
    output_bytes: int

    @property
    def stages(self) -> int:
        return np.minimum(2, self.block_images)  # type: ignore[no-any-return]

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.input_bytes + self.output_bytes)


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _plan(g, dtype, target, aligned, _NO_SPREAD, turned=False)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    """The plan of dx as a convolution of dy."""
    turned, spread = dgrad_as_forward(g)
    return _plan(turned, dtype, target, aligned, spread, turned=True)


def dgrad_as_forward(g: Conv2dGeometry) -> tuple[Conv2dGeometry, Spread]:
    """The convolution of dy, spread by the stride, with the kernel turned around whose output is dx.

    Its padding is what the kernel reaches beyond the forward padding, and negative where that is more than the reach:
    rows of dy that no row of x had a part in are then passed over. Its output channels are sums over as many of its
    input channels as the forward multiplier says.
    """
    padding, first, dilations = [], [], []
    for axis, (x, y, kernel) in enumerate(((g.H, g.P, g.R), (g.W, g.Q, g.S))):
        stride = g.stride[axis]
        dilation = g.dilation[axis] if stride == 1 or kernel > 1 else 1
        if stride > 1 and dilation > 1:
            raise Unsuitable(f"takes stride 1 or dilation 1 along an axis here, and has {g.stride} and {g.dilation}")
        reach = dilation * (kernel - 1)
        before = reach - g.padding[axis][0]
        after = x - 1 + reach - before - (y - 1) * stride
        padding.append((before // stride, after // stride))
        first.append(before % stride)
        dilations.append(dilation)
    as_forward = replace(
        g,
        C=g.K,
        K=g.C,
        H=g.P,
        W=g.Q,
        P=g.H,
        Q=g.W,
        stride=(1, 1),
        padding=(padding[0], padding[1]),
        dilation=(dilations[0], dilations[1]),
    )
    return as_forward, Spread(g.stride, (first[0], first[1]))


def dense_dgrad_as_forward(g: Conv2dGeometry) -> Conv2dGeometry:
    """The same for kernels that know neither a spread input nor sums over input channels."""
    if g.stride != (1, 1) or g.multiplier > 1:
        raise Unsuitable(f"takes stride 1 and multiplier 1 here, and has {g.stride} and {g.multiplier}")
    return dgrad_as_forward(g)[0]


def _plan(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, spread: Spread, turned: bool) -> Plan:
    require_nchw(g)
    if target.architecture < 90:
        raise Unsuitable(f"needs compute capability 9.0, and the device has {target.architecture / 10}")
    if g.R * g.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    budget = target.shared_per_block - SHARED_RESERVE
    choices = list(patches(g, dtype, aligned, spread))
    table, fits = _table(g, dtype, choices, budget) if choices else (None, None)
    best = cheapest_of(table, fits, _cost(g, dtype, target, table)) if table else None
    if best is None:
        raise Unsuitable(
            f"{g.R} x {g.S} taps, and rows of {g.W} elements {spread.by} apart, do not fit registers and shared memory"
        )
    return tile_plan(g, dtype, best, turned)


def tile_plan(g: Conv2dGeometry, dtype: str, tile: Tile, turned: bool = False) -> Plan:
    patch = tile.patch
    image_planes, images = map(int, _images(g, tile.block_planes))
    grid = (-(-g.P // tile.block_rows), -(-image_planes // tile.block_planes), -(-images // tile.block_images))
    if any(extent > limit for extent, limit in zip(grid, MAX_GRID, strict=True)):
        raise Unsuitable(f"{grid} blocks are more than one launch can count")
    return Plan(
        source="depthwise_runs",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("PADDED", int(g.padded)),
            ("TURNED", int(turned)),
            ("MULTIPLIED", int(g.K > g.C)),
            ("SUMMED", int(g.C > g.K)),
            ("THREADS", tile.threads),
            ("STAGES", int(tile.stages)),
            ("ROWS", patch.rows),
            ("COLUMNS", patch.columns),
            ("STRIDE_H", patch.stride[0]),
            ("STRIDE_W", patch.stride[1]),
            ("SPREAD_H", patch.spread.by[0]),
            ("SPREAD_W", patch.spread.by[1]),
            ("FIRST_H", patch.spread.first[0]),
            ("FIRST_W", patch.spread.first[1]),
            ("DILATED", int(patch.dilated)),
            ("VECTOR", patch.vector),
            ("OUT_VECTOR", patch.out_vector),
            ("LEFT", g.padding[1][0] if patch.whole_rows else g.padding[1][0] % patch.vector),
            ("WIDTH", g.W if patch.whole_rows else 0),
            ("TOP", g.padding[0][0] if patch.whole_columns else 0),
            ("HEIGHT", g.H if patch.whole_columns else 0),
            ("PAIRED", int(patch.paired)),
        ),
        grid=grid,
        block=tile.threads,
        shared_bytes=int(tile.shared_bytes),
        parameters=(
            ("multiplier", max(g.multiplier, _summed(g))),
            ("K", g.K),
            *plane_parameters(g),
            ("spacing_h", patch.spacing[0]),
            ("spacing_w", patch.spacing[1]),
            ("row_items", tile.row_items),
            ("column_items", tile.column_items),
            ("items_magic", magic(tile.row_items * tile.column_items)),
            ("column_items_magic", magic(tile.column_items)),
            ("spacing_h_magic", magic(patch.spacing[0])),
            ("spacing_w_magic", magic(patch.spacing[1] // (2 if patch.paired else 1))),
            # Without a magic number for it, every output plane of an image is a channel.
            ("K_magic", magic(g.K) if image_planes > g.K else 0),
            ("image_planes", image_planes),
            ("last_image_planes", g.N * g.K - (images - 1) * image_planes),
            ("images", images),
            ("block_planes", tile.block_planes),
            ("block_rows", tile.block_rows),
            ("block_images", tile.block_images),
            ("addend", tile.addend if _summed(g) > 1 else 0),
            ("input_bytes", tile.input_bytes),
            ("output_bytes", tile.output_bytes),
            ("total_x", g.x_size),
        ),
    )


def _summed(g: Conv2dGeometry) -> int:
    """Of how many input planes an output plane is the sum."""
    return max(1, g.C // g.K)


def _input_planes(g: Conv2dGeometry, planes: Any) -> Any:
    """The most input planes that so many neighbouring output planes need."""
    if g.K <= g.C:
        return planes * _summed(g)
    # Output planes that begin in the midst of an input plane's may need one input plane more.
    return np.minimum(planes, (planes - 2) // g.multiplier + 2)


def _images(g: Conv2dGeometry, block_planes: Any) -> tuple[Any, Any]:
    """Planes of an image, and images, as the kernel counts them: images so small that a block takes several are seen
    as fewer images with more planes."""
    fold = np.maximum(1, block_planes // g.K)
    return fold * g.K, -(-g.N // fold)


def patches(g: Conv2dGeometry, dtype: str, aligned: bool, spread: Spread = _NO_SPREAD) -> Iterator[Patch]:
    """The patches that a thread's registers hold."""
    size = DTYPES[dtype][1]
    dilated = g.dilation != (1, 1)
    # Rows this far apart read rows that are whole dilations apart, so that they can share them.
    common = [math.gcd(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)]
    spacing = (g.dilation[0] // common[0], g.dilation[1] // common[1])
    stride = (g.stride[0] // common[0], g.stride[1] // common[1])
    # The widest vectors that rows of x and of y are made of.
    widest = VECTOR_BYTES // size if aligned and not dilated else 1
    of_x, of_y = (math.gcd(extent, widest) for extent in (g.W, g.Q))
    # Of a spread x, every patch has whole spreads.
    (by_h, by_w), (first_h, first_w) = spread.by, spread.first
    summed = _summed(g)
    # Rows and columns whole dilations apart have the same place in a pair.
    pairable = dilated and size <= 4 and summed == 1 and g.stride[1] == 1 and g.dilation[1] % 2 == 0
    pairable = pairable and g.dilation[0] * g.W % 2 == 0 and (g.padding[1][0] + 1) * size <= _MASKED_BYTES
    unaligned = not dilated and of_x == 1
    choices = _UNALIGNED_COLUMNS if unaligned else _PAIRED_COLUMNS if pairable else _COLUMNS
    columns_choices = [by_w * c for c in choices if c == 1 or (stride[1] <= 2 and (by_w * c - 1) * spacing[1] < g.Q)]
    if not dilated and by_w <= g.Q <= _MAX_WIDTH and g.W <= 2 * _MAX_WIDTH and stride[1] <= 2:
        columns_choices.append(g.Q)
    rows_choices = [r for r in _ROWS if r % by_h == 0 and (r == 1 or stride[0] <= 2)]
    if by_h > 1:
        rows_choices = sorted({*rows_choices, by_h, 2 * by_h}, reverse=True)
    # Of the patches taller than the plane, the lowest.
    tall = [r for r in rows_choices if r * spacing[0] >= g.P]
    rows_choices = [r for r in rows_choices if r not in tall[:-1]]
    for columns, rows in product(dict.fromkeys(columns_choices), rows_choices):
        patch_stride = (stride[0] if rows > 1 else 1, stride[1] if columns > 1 else 1)
        whole_rows = not dilated and columns == g.Q
        whole_columns = not dilated and rows >= g.P and g.padded
        paired = pairable and columns % 2 == 0
        vector = of_x if whole_rows else math.gcd(of_x, columns // by_w * patch_stride[1])
        out_vector = math.gcd(of_y, columns)
        span_rows = _met((rows - 1) * patch_stride[0] + g.R, by_h, first_h)
        span = g.W if whole_rows else _met((columns - 1) * patch_stride[1] + g.S, by_w, first_w)
        if paired:
            span = 2 * (columns // 2 - 1 + g.S)
            loads = span / 2
        else:
            loads = span / vector if whole_rows else (span - 1) // vector + 1 + (g.padding[1][0] % vector > 0)
        words = max(1, size // 4)
        values = (rows * columns + g.R * g.S + span) * words
        if values > _MAX_VALUES:
            continue
        # Of a spread x, sums are done with sooner.
        live = values - rows * columns * words * (1 - 1 / (by_h * by_w))
        loaded_rows = min(span_rows, g.H) if whole_columns else span_rows
        # Of one row: loads, what they are where they fall outside, conversions, the bounds.
        if paired:
            row_slots = loads + 2 + (loads + span * size / 4 if g.padded else 0) + (span if size == 2 else 0)
        else:
            row_slots = loads + 2 + (loads + 1 + span / 2 if g.padded else 0) + (1.5 * span if size == 2 else 0)
        if summed > 1:
            row_slots = summed * (row_slots + 2 * g.R * g.S / span_rows)  # the weights of every channel, once a patch
        stored = columns / out_vector
        stores = (1 + size / 4 if size < 4 else 1) * stored + (columns if size == 2 else 0) + 2
        slots = (row_slots * loaded_rows + rows * stores + 30) / (rows * columns)
        products_h = _products(rows, patch_stride[0], g.R, by_h, first_h, g.padding[0][0], g.H if whole_columns else 0)
        products_w = _products(columns, patch_stride[1], g.S, by_w, first_w, g.padding[1][0], g.W if whole_rows else 0)
        slots += summed * products_h * products_w * words / (rows * columns)
        # Lanes are so many elements apart.
        if whole_rows:
            between, between_out = rows // by_h * g.stride[0] * g.W, rows * g.Q
        elif dilated:
            between, between_out = (2, 2) if paired else (1, 1)
        else:
            between, between_out = columns // by_w * patch_stride[1], columns
        load_passes = summed * loads * loaded_rows * bank_passes(between * size, (2 if paired else vector) * size)
        store_passes = rows * stored * bank_passes(between_out * size, out_vector * size)
        yield Patch(
            rows=rows,
            columns=columns,
            stride=patch_stride,
            spread=spread,
            spacing=(spacing[0] if rows > 1 else 1, _column_spacing(spacing[1], columns, paired)),
            dilated=dilated,
            vector=vector,
            out_vector=out_vector,
            whole_rows=whole_rows,
            whole_columns=whole_columns,
            paired=paired,
            slots=slots,
            passes=(load_passes + store_passes) / (rows * columns),
            registers=_registers(live + 3 * whole_columns),
        )


def _registers(values: float) -> int:
    """What the compiler takes for a patch of so many values: beyond 72 of them it loads more rows ahead."""
    return min(255, 8 * math.ceil((26 + 1.31 * values + 0.76 * max(0, values - 72)) / 8))


def _column_spacing(spacing: int, columns: int, paired: bool) -> int:
    """Of a single column or pair, its own width."""
    alone = 2 if paired else 1
    return spacing if columns > alone else alone


def _products(outputs: int, stride: int, taps: int, by: int, first: int, before: int, extent: int) -> float:
    """How many products a row of outputs is made of along one axis; of those that meet x alone where its extent, and
    what lies before it, are known, and 0 stands for any extent."""
    if not extent:
        return outputs * taps / by
    met = (output * stride + tap - first for output in range(outputs) for tap in range(taps))
    return sum(place % by == 0 and 0 <= place // by - before < extent for place in met)


def _met(taps: Any, by: int, first: int) -> Any:
    """How many rows of a spread x a number of taps one below the other meets."""
    return (taps - 1 - first) // by + 1


def bank_passes(apart: int, width: int) -> float:
    """How often a warp's access passes over the 32 banks of 4 bytes, its lanes `apart` bytes apart, `width` each."""
    return max(1, width / 4, math.gcd(apart // 4, 32) if apart % 4 == 0 else 1)


def tiles(g: Conv2dGeometry, dtype: str, patch: Patch, budget: int) -> Iterator[Tile]:
    """The tiles of a patch that fit `budget` bytes of shared memory."""
    return iter(dict.fromkeys(each_of(*_table(g, dtype, [patch], budget))))


def _table(g: Conv2dGeometry, dtype: str, choices: list[Patch], budget: int) -> tuple[Tile, Any]:
    """The tiles of all patches as one of arrays, some of them several times, and which of them fit. Axes are patches,
    patches of a block one below the other, threads, parts of the planes that there are threads for, and images."""
    size = DTYPES[dtype][1]
    summed = _summed(g)
    reach = [(kernel - 1) * dilation + 1 for kernel, dilation in zip((g.R, g.S), g.dilation, strict=True)]
    (by_h, by_w), (first_h, first_w) = choices[0].spread.by, choices[0].spread.first
    patch = stack(choices, 4)
    # Rows and columns that are patched together: a patch for each of `spacing` beginnings.
    group_rows, group_columns = patch.rows * patch.spacing[0], patch.column_group
    # Pairs may start a column before the row.
    column_groups = -(-(g.Q + patch.paired) // group_columns)
    column_items = column_groups * group_columns // patch.columns
    # Columns that a thread may look at behind the last row, though it may not store what comes of them.
    overhang: Any = 2 * patch.vector
    last = _met((column_groups * group_columns - 1) * g.stride[1] + reach[1], by_w, first_w) - g.padding[1][0]
    overhang = overhang + np.where(patch.paired | (not g.padded), np.maximum(0, last - g.W), 0)
    all_groups = -(-g.P // group_rows)
    some_groups, threads, parts, images = (
        axis_of(_GROUPS, 3),
        axis_of(_THREADS, 2),
        axis_of((1, 2, 4), 1),
        axis_of(_IMAGES, 0),
    )
    groups = np.concatenate((np.minimum(some_groups, all_groups), all_groups), axis=1)
    block_rows = np.minimum(g.P, groups * group_rows)
    row_items: Any = groups * patch.spacing[0]
    # Rows likewise.
    input_rows = _met((groups * group_rows - 1) * g.stride[0] + reach[0], by_h, first_h)
    # Offsets of rows, those in the padding too, are 32-bit integers.
    fits = (input_rows + max(0, *g.padding[0])) * g.W <= 2**31 - 1
    if g.padded:
        input_rows = np.minimum(input_rows, g.H)
    items = row_items * column_items
    fits = fits & ((summed * input_rows * g.W + block_rows * g.Q) * size <= budget) & (items <= MAX_DIVIDEND)
    # Whole planes: as many as there are threads for, or a part of them.
    most = np.where(block_rows == g.P, np.clip(threads // items, 1, g.N * g.K), 1)
    planes = -(-most // parts)
    block_planes: Any = np.where(planes > g.K, planes - planes % g.K, planes)
    # Every one of those that are summed is a run, and must lie as far from a boundary of the copy engine as in x.
    apart = input_rows * g.W + (g.H * g.W - input_rows * g.W) % (VECTOR_BYTES // size)
    addend: Any = np.where((block_planes == 1) & (summed > 1), apart, g.H * g.W)
    input_elements = (_input_planes(g, block_planes) - summed) * g.H * g.W + (summed - 1) * addend
    input_elements = input_elements + input_rows * g.W + overhang
    output_elements = (block_planes - 1) * g.P * g.Q + block_rows * g.Q
    tile = Tile(
        patch=patch,
        block_rows=block_rows,
        block_planes=block_planes,
        block_images=images,
        row_items=row_items,
        column_items=column_items,
        threads=threads,
        addend=addend,
        input_bytes=run_bytes(input_elements * size),
        output_bytes=run_bytes(output_elements * size),
    )
    # Fewer groups than all, once.
    fits = fits & np.concatenate((some_groups < all_groups, all_groups > 0), axis=1)
    return tile, fits & (images <= g.N) & (tile.shared_bytes <= budget)


def run_bytes(size: Any) -> Any:
    """Shared bytes for a run of `size` bytes that starts anywhere within 16; the next one starts at a cache line."""
    return -(-(size + 16) // 128) * 128


def _cost(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile) -> Any:
    """What ranks tiles: clocks of a multiprocessor for an output, up to a factor.

    The weights were fitted to the times of 2,400 tiles (15 cases, forward and dgrad, in float32 and 16-bit types on
    an H200): of those measured, the tile of least cost takes 3 % longer than the fastest on average, and at most 13 %.
    """
    size, patch = DTYPES[dtype][1], tile.patch
    outputs = tile.block_planes * tile.block_rows * g.Q
    items = tile.block_planes * tile.row_items * tile.column_items
    row_groups = -(-g.P // tile.block_rows)
    # Lanes with nothing to do, and the last block of a plane with few rows left.
    idle = -(-items // tile.threads) * tile.threads * patch.rows * patch.columns / outputs
    idle = idle * (row_groups * tile.block_rows / g.P)
    # A thread's work for every image, and for the weights, which it fetches once.
    fixed = (19 + 14.7 * g.R * g.S / tile.block_images) * tile.threads / outputs
    by, first = patch.spread.by[0], patch.spread.first[0]
    needed = _met((tile.block_rows - 1) * g.stride[0] + (g.R - 1) * g.dilation[0] + 1, by, first)
    halo = np.where(row_groups == 1, 1.0, needed * by / (tile.block_rows * g.stride[0]))
    moved = (halo * g.x_size / g.y_size + 1) * size
    # Every scheduler has so many warps to choose from: few of them leave it waiting.
    by_shared = target.shared_per_multiprocessor // (tile.shared_bytes + SHARED_RESERVE)
    by_registers = 65536 // (patch.registers * tile.threads)
    resident = np.maximum(1, np.minimum(by_shared, np.minimum(2048 // tile.threads, by_registers)))
    image_planes, images = _images(g, tile.block_planes)
    blocks = -(-images // tile.block_images) * -(-image_planes // tile.block_planes) * row_groups
    filled = blocks / target.multiprocessors
    active = np.minimum(resident, filled)
    busy = 1 - np.exp(-0.483 * active * tile.threads / 128)
    issue = ((patch.slots + 0.065 * patch.passes) * idle + fixed) / 128
    # Loads and stores on the way; with one image after the other a block begins and ends but once.
    latency = (np.where(tile.stages == 1, 0.35, 103) + 3.7 / tile.block_images) / (active * outputs)
    # Some multiprocessors have a block more than others.
    rounds = np.where(filled < resident, np.ceil(filled), np.ceil(filled / resident) * resident)
    uneven = rounds / filled
    # Few blocks have less to do while one of them waits for its memory or its slowest warp.
    alone = (1 + 0.2 / active) * (1 + 0.46 * (uneven - 1))
    # A thread with a whole plane and a thousand products takes longer than its slots say: in float32, 5x5 on 7x7 takes
    # 21.2 us so, and 19.1 by patches of 7x4.
    long = (size == 4) & patch.whole_rows & patch.whole_columns & (patch.rows * patch.columns * g.R * g.S > 1000)
    alone = alone * np.where(long, 1.5, 1.0)
    # Long rows of floats that allow loads of two: lanes side by side load so by patches of two columns. 3x3 from
    # 510x510 takes 96.3 % of the floor by patches of 14x2, 95.3 by 8x4.
    in_twos = (size == 4) & (patch.vector == 2) & (patch.columns == 2) & (tile.block_rows >= 12)
    alone = alone * np.where(in_twos & (g.W % 4 == 2) & (g.W >= _LONG_ROW) & (g.R * g.S <= 9), 0.88, 1.0)
    return (issue / busy + 0.067 / 18 * moved + latency) * alone
