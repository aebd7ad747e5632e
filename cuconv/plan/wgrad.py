"""Gradients of the weights and the bias: partial sums of slabs of the batch, and their sum in a second launch.

See cuda/depthwise_wgrad_*.cu.
"""

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
    those_of,
)
from .runs import MAX_TAPS, bank_passes, run_bytes


@dataclass(frozen=True, slots=True)
class WgradPlan:
    """A launch of (dy, x, workspace, dw, dbias) and, where slabs are summed apart, one of (workspace, dw, dbias)."""

    sums: Plan
    reduce: Plan | None
    workspace_bytes: int

    @property
    def source(self) -> str:
        return self.sums.source


def direct(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """A block for every element of dw and dbias."""
    blocks = g.K * (g.R * g.S + bias)
    if blocks > MAX_GRID[0]:
        raise Unsuitable(f"{blocks} gradients are more than one launch can count")
    small = max(g.x_size, g.y_size) <= 2**31 - 1
    sums = Plan(
        source="depthwise_wgrad_direct",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("BIAS", int(bias)),
            ("INDEX", "int" if small else "int64"),
            ("CHANNELS_LAST", int(g.channels_last)),
        ),
        grid=(blocks, 1, 1),
        block=128,
        shared_bytes=0,
        parameters=(
            ("multiplier", g.multiplier),
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("total_terms", g.N * g.P * g.Q),
        ),
    )
    return WgradPlan(sums, None, 0)


# Slabs that may be a cluster of blocks, as many as every device of 9.0 and newer takes: see cuda/slabs.cuh.
MOST_OF_CLUSTER = 8
# Of the blocks that the device holds at once, those of clusters: where it is full, not all clusters of three find room,
# and those left over take as long as all before.
_PART_OF_CLUSTERS = 0.92


def clustered(slabs: Any, groups: Any, held: Any) -> Any:
    """Whether slabs of so many groups of planes are clusters, for which the device, which holds so many blocks at once,
    has room."""
    few = (slabs == 2) | (slabs * groups <= _PART_OF_CLUSTERS * held)
    return (slabs > 1) & (slabs <= MOST_OF_CLUSTER) & few


def slabs_of_cluster(groups: Any, held: Any) -> Any:
    """The most slabs that are a cluster, or 1."""
    return np.clip(_PART_OF_CLUSTERS * held // groups, 1, MOST_OF_CLUSTER).astype(np.int64)


# As many results as a block of depthwise_wgrad_reduce has, and its threads.
_REDUCE_RESULTS, _REDUCE_THREADS = 32, 256


def with_reduce(sums: Plan, slabs: int, g: Conv2dGeometry, dtype: str, bias: bool) -> WgradPlan:
    """Sums of several slabs, and the launch that adds them."""
    return with_reduce_of(sums, slabs, g.K, g.R * g.S, dtype, bias)


def with_reduce_of(
    sums: Plan, slabs: int, K: int, taps: int, dtype: str, bias: bool, *, as_dw: bool = False
) -> WgradPlan:
    """Likewise, of so many weights an output channel; the workspace is (slabs, taps and one for dbias, K), or as dw
    lies, (slabs, K, taps) with dbias behind each."""
    total = K * (taps + bias)
    if as_dw:
        K, taps = 1, K * taps
    reduce = Plan(
        source="depthwise_wgrad_reduce",
        defines=(("T", DTYPES[dtype][0]),),
        grid=(-(-total // _REDUCE_RESULTS), 1, 1),
        block=_REDUCE_THREADS,
        shared_bytes=0,
        parameters=(("K", K), ("taps", taps), ("slabs", slabs), ("total_entries", total)),
    )
    return WgradPlan(sums, reduce, slabs * total * sum_bytes(dtype))


def sum_bytes(dtype: str) -> int:
    """Of one sum, made in float32 or float64."""
    return 8 if dtype == "float64" else 4


# Rows and columns of a thread's patch. Patches that end where dy does are the fast ones: hence so many numbers.
_ROWS = (16, 15, 14, 12, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1)
_COLUMNS = (8, 7, 6, 5, 4, 3, 2, 1)
# Rows of up to this many elements of dy may be one thread's.
_MAX_WIDTH = 16
# Sums, a row of x and the rows of dy that meet it, in registers: beyond, the compiler spills.
_MAX_VALUES = 136
_THREADS = (128, 64, 256)
_STAGES = (2, 3, 4)
# Patches of a unit one below the other; as many as the plane has, too.
_GROUPS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Patch:
    """What one thread takes of dy at once: see runs.Patch."""

    rows: int
    columns: int
    stride: Pair
    spacing: Pair
    vector: int
    out_vector: int
    whole_rows: bool
    # By a rough count, an element of dy: issue slots, and passes over the banks of shared memory.
    slots: float
    passes: float
    registers: int


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block takes: units of some rows of one plane or of several whole planes, a number of them in turn."""

    patch: Patch
    block_rows: int
    block_planes: int
    row_items: int
    column_items: int
    threads: int
    stages: int
    slabs: int
    x_bytes: int  # of one unit
    dy_bytes: int


def runs(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of x and dy is read once."""
    require_nchw(g)
    if target.architecture < 90:
        raise Unsuitable(f"needs compute capability 9.0, and the device has {target.architecture / 10}")
    if g.R * g.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    table, fits = _table(g, dtype, bias, target, aligned)
    best = cheapest_of(table, fits, _cost(g, dtype, bias, target, table))
    if best is None:
        raise Unsuitable(f"{g.R} rows of {g.W} elements do not fit shared memory")
    return tile_plan(g, dtype, bias, target, best)


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> WgradPlan:
    """The plan of one choice of tiles_of_runs()."""
    patch = tile.patch
    row_units = -(-g.P // tile.block_rows)
    units = g.N * row_units
    block_units = -(-units // tile.slabs)
    slabs = -(-units // block_units)
    grid = (slabs, -(-g.K // tile.block_planes), 1)
    # Of single columns without dilation, those that exist whatever the patch: of x, and of dy.
    single = g.dilation == (1, 1) and patch.vector == 1 and not patch.whole_rows
    inside = _inside_of_all(g, patch.columns, patch.stride[1]) if single else (0, 0)
    existing = g.Q - (g.Q - 1) // patch.columns * patch.columns if single else 0
    cluster = bool(clustered(slabs, grid[1], target.multiprocessors * _resident(g, dtype, bias, target, tile)))
    if units > 2**31 - 1 or any(extent > limit for extent, limit in zip(grid, MAX_GRID, strict=True)):
        raise Unsuitable(f"{grid} blocks are more than one launch can count")
    sums = Plan(
        source="depthwise_wgrad_runs",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("BIAS", int(bias)),
            ("FINAL", int(slabs == 1 or cluster)),
            ("CLUSTER", slabs if cluster else 1),
            ("PADDED", int(g.padded)),
            ("MULTIPLIED", int(g.multiplier > 1)),
            ("EXACT", int(_exact(g, patch))),
            ("THREADS", tile.threads),
            ("BLOCKS", int(_resident(g, dtype, bias, target, tile))),
            ("STAGES", tile.stages),
            ("ROWS", patch.rows),
            ("COLUMNS", patch.columns),
            ("STRIDE_H", patch.stride[0]),
            ("STRIDE_W", patch.stride[1]),
            ("DILATED", int(g.dilation != (1, 1))),
            ("VECTOR", patch.vector),
            ("OUT_VECTOR", patch.out_vector),
            ("LEFT", g.padding[1][0] if patch.whole_rows else g.padding[1][0] % patch.vector),
            ("WIDTH", g.W if patch.whole_rows else 0),
            ("INSIDE_FROM", inside[0]),
            ("INSIDE_TO", inside[1]),
            ("EXISTING", existing),
        ),
        grid=grid,
        block=tile.threads,
        shared_bytes=int(_shared_bytes(g, dtype, bias, tile)),
        parameters=(
            ("multiplier", g.multiplier),
            ("K", g.K),
            *plane_parameters(g),
            ("spacing_h", patch.spacing[0]),
            ("spacing_w", patch.spacing[1]),
            ("row_items", tile.row_items),
            ("column_items", tile.column_items),
            ("items_magic", magic(tile.row_items * tile.column_items)),
            ("column_items_magic", magic(tile.column_items)),
            ("spacing_h_magic", magic(patch.spacing[0])),
            ("spacing_w_magic", magic(patch.spacing[1])),
            ("block_planes", tile.block_planes),
            ("block_planes_magic", magic(tile.block_planes)),
            ("block_rows", tile.block_rows),
            ("row_units", row_units),
            ("units", units),
            ("block_units", block_units),
            ("x_bytes", tile.x_bytes),
            ("dy_bytes", tile.dy_bytes),
        ),
    )
    return WgradPlan(sums, None, 0) if slabs == 1 or cluster else with_reduce(sums, slabs, g, dtype, bias)


def _inside_of_all(g: Conv2dGeometry, columns: int, stride: int) -> Pair:
    """Of the columns of x that a patch of so many columns needs, from which to which they exist whatever the patch: the
    first may begin outside, and the last end there."""
    left, last = g.padding[1][0], (g.Q - 1) // columns * columns
    to = min((columns - 1) * stride + g.S, g.W + left - last * g.stride[1])
    return (left, to) if 0 <= left < to else (0, 0)


def _exact(g: Conv2dGeometry, patch: Patch) -> Any:
    """Whether patches end where dy does."""
    return (g.P % (patch.rows * patch.spacing[0]) == 0) & (g.Q % (patch.columns * patch.spacing[1]) == 0)


def _shared_bytes(g: Conv2dGeometry, dtype: str, bias: bool, tile: Tile) -> Any:
    """For the units under way; in the end for the sums of every thread, and of the block."""
    sums = (g.R * g.S + bias) * (tile.threads + tile.block_planes) * sum_bytes(dtype)
    return np.maximum(tile.stages * (tile.x_bytes + tile.dy_bytes), sums)


def _patches(g: Conv2dGeometry, dtype: str, aligned: bool) -> Iterator[Patch]:
    """The patches that a thread's registers hold."""
    size = DTYPES[dtype][1]
    dilated = g.dilation != (1, 1)
    # Rows this far apart read rows that are whole dilations apart, so that they can share them.
    common = [math.gcd(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)]
    spacing = (g.dilation[0] // common[0], g.dilation[1] // common[1])
    stride = (g.stride[0] // common[0], g.stride[1] // common[1])
    widest = VECTOR_BYTES // size if aligned and not dilated else 1
    of_x, of_dy = (math.gcd(extent, widest) for extent in (g.W, g.Q))
    columns_choices = [c for c in _COLUMNS if c == 1 or (stride[1] <= 2 and (c - 1) * spacing[1] < g.Q)]
    # One that ends where dy does, and a power of two: the others would only take longer to choose among.
    fitting = [c for c in columns_choices if g.Q % (c * spacing[1]) == 0][:2]
    # Odd numbers of columns keep the lanes of scalar loads apart in the banks of shared memory.
    usual = (4, 2, 1) if of_x > 1 or dilated else (7, 5, 3, 4, 2, 1)
    columns_choices = [c for c in columns_choices if c in fitting or c in usual]
    if not dilated and g.Q <= _MAX_WIDTH and g.W <= 2 * _MAX_WIDTH and stride[1] <= 2:
        columns_choices.append(g.Q)
    rows_choices = [r for r in _ROWS if r == 1 or stride[0] <= 2]
    tall = [r for r in rows_choices if r * spacing[0] >= g.P]
    rows_choices = [r for r in rows_choices if r not in tall[:-1]]
    fitting = [r for r in rows_choices if g.P % (r * spacing[0]) == 0][:3]
    rows_choices = [r for r in rows_choices if r in fitting or r in (*tall, 8, 4, 2, 1)]
    for columns, rows in product(dict.fromkeys(columns_choices), rows_choices):
        patch_stride = (stride[0] if rows > 1 else 1, stride[1] if columns > 1 else 1)
        whole_rows = not dilated and columns == g.Q
        vector = of_x if whole_rows else math.gcd(of_x, columns * patch_stride[1])
        out_vector = math.gcd(of_dy, columns)
        span_rows = (rows - 1) * patch_stride[0] + g.R
        span = (columns - 1) * patch_stride[1] + g.S
        loads = g.W / vector if whole_rows else (span - 1) // vector + 1 + (g.padding[1][0] % vector > 0)
        words = max(1, size // 4)
        # Rows of dy that one row of x meets.
        meeting = min(rows, -(-g.R // patch_stride[0]))
        values = (g.R * g.S + span + meeting * columns) * words
        if values > _MAX_VALUES:
            continue
        narrow = size == 2
        x_slots = loads + 2 + (loads + 1 + span / 2 if g.padded else 0) + (1.5 * span if narrow else 0)
        dy_slots = columns / out_vector + (1.5 * columns if narrow else 0) + 2
        slots = (x_slots * span_rows + dy_slots * rows + 30) / (rows * columns) + g.R * g.S * words
        if whole_rows:
            apart, apart_dy = rows * g.stride[0] * g.W, rows * g.Q
        elif dilated:
            apart, apart_dy = 1, 1
        else:
            apart, apart_dy = columns * patch_stride[1], columns
        x_passes = loads * span_rows * bank_passes(apart * size, vector * size)
        dy_passes = rows * columns / out_vector * bank_passes(apart_dy * size, out_vector * size)
        yield Patch(
            rows=rows,
            columns=columns,
            stride=patch_stride,
            spacing=(spacing[0] if rows > 1 else 1, spacing[1] if columns > 1 else 1),
            vector=vector,
            out_vector=out_vector,
            whole_rows=whole_rows,
            slots=slots,
            passes=(x_passes + dy_passes) / (rows * columns),
            registers=min(255, int(1.5 * values) + 44),
        )


def tiles_of_runs(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> Iterator[Tile]:
    """The tiles that fit the device's shared memory."""
    return iter(dict.fromkeys(each_of(*_table(g, dtype, bias, target, aligned))))


def _table(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> tuple[Tile, Any]:
    """All tiles as one of arrays, and which of them fit."""
    size = DTYPES[dtype][1]
    budget = target.shared_per_block - SHARED_RESERVE
    patches = list(_patches(g, dtype, aligned))
    if not patches:
        raise Unsuitable(f"{g.R} x {g.S} taps do not fit registers")
    # Axes: patches, patches of a unit one below the other, threads, parts of the planes there are threads for, stages.
    patch = stack(patches, 4)
    group_rows, group_columns = patch.rows * patch.spacing[0], patch.columns * patch.spacing[1]
    column_items = -(-g.Q // group_columns) * patch.spacing[1]
    all_groups = -(-g.P // group_rows)
    some_groups, threads, parts, stages = (
        axis_of(_GROUPS, 3),
        axis_of(_THREADS, 2),
        axis_of((4, 2, 1), 1),
        axis_of(_STAGES, 0),
    )
    groups = np.concatenate((np.minimum(some_groups, all_groups), all_groups), axis=1)
    block_rows = np.minimum(g.P, groups * group_rows)
    row_items: Any = groups * patch.spacing[0]
    items = row_items * column_items
    input_rows = (block_rows - 1) * g.stride[0] + (g.R - 1) * g.dilation[0] + 1
    # Offsets of rows, those in the padding too, are 32-bit integers.
    fits = (input_rows + max(0, *g.padding[0])) * g.W <= 2**31 - 1
    input_rows = np.minimum(input_rows, g.H)
    fits = fits & ((input_rows * g.W + block_rows * g.Q) * size <= budget) & (items <= MAX_DIVIDEND)
    most = np.where(block_rows == g.P, np.clip(threads // items, 1, g.K), 1)
    planes: Any = -(-most // parts)
    x_planes = np.minimum(planes, (planes - 2) // g.multiplier + 2)
    tile = Tile(
        patch=patch,
        block_rows=block_rows,
        block_planes=planes,
        row_items=row_items,
        column_items=column_items,
        threads=threads,
        stages=stages,
        slabs=1,
        # A vector more, since a row's first and last may be loaded in part.
        x_bytes=run_bytes(((x_planes - 1) * g.H * g.W + input_rows * g.W + 2 * patch.vector) * size),
        dy_bytes=run_bytes(((planes - 1) * g.P * g.Q + block_rows * g.Q) * size),
    )
    # Each once: fewer groups than all, and other planes than a smaller part.
    fits = fits & np.concatenate((some_groups < all_groups, all_groups > 0), axis=1)
    fits = fits & np.concatenate((most > 0, np.diff(planes, axis=3) > 0), axis=3)
    return _slabs(g, dtype, bias, target, those_of(tile, fits & (_shared_bytes(g, dtype, bias, tile) <= budget), 1))


def _resident(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> Any:
    """Blocks that a multiprocessor holds at once, of the registers that a patch is allowed: the compiler is held to
    them."""
    by_shared = target.shared_per_multiprocessor // (_shared_bytes(g, dtype, bias, tile) + SHARED_RESERVE)
    by_registers = 65536 // (tile.patch.registers * tile.threads)
    return np.maximum(1, np.minimum(by_shared, np.minimum(2048 // tile.threads, by_registers)))


def _slabs(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> tuple[Tile, Any]:
    """The tiles with as many slabs as fill the device once, with half as many, and with a cluster's and one, which take
    one launch, on one more axis. All of them fit."""
    units = g.N * -(-g.P // tile.block_rows)
    groups = -(-g.K // tile.block_planes)
    held = target.multiprocessors * _resident(g, dtype, bias, target, tile)
    some = np.maximum(1, np.minimum(units, held // axis_of((1, 2), 0) // groups))
    cluster = np.minimum(units, slabs_of_cluster(groups, held))
    slabs: Any = np.concatenate((np.ones_like(units), cluster, some), axis=1)
    return replace(tile, slabs=slabs), np.ones(slabs.shape, bool)


def _cost(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> Any:
    """What ranks tiles: the time of a launch, up to a factor.

    The weights were fitted to the times of 4,300 tiles (15 cases in float32 and float16 on an H200), and once more, a
    little, to 500 with clusters: of these, the tile of least cost takes 2 % longer than the fastest on average,
    and at most 14 % (eff5 in float32).
    """
    size, patch = DTYPES[dtype][1], tile.patch
    elements = tile.block_planes * tile.block_rows * g.Q
    items = tile.row_items * tile.column_items
    row_units = -(-g.P // tile.block_rows)
    units = g.N * row_units
    block_units = -(-units // tile.slabs)
    slabs = -(-units // block_units)
    # Lanes with nothing to do, and the last unit of a plane with few rows left.
    idle = -(-tile.block_planes * items // tile.threads) * tile.threads * patch.rows * patch.columns / elements
    idle = idle * (row_units * tile.block_rows / g.P)
    needed = (tile.block_rows - 1) * g.stride[0] + (g.R - 1) * g.dilation[0] + 1
    halo = np.where(row_units == 1, 1.0, needed / (tile.block_rows * g.stride[0]))
    # Every scheduler has so many warps to choose from: few of them leave it waiting.
    resident = _resident(g, dtype, bias, target, tile)
    groups = -(-g.K // tile.block_planes)
    filled = slabs * groups / target.multiprocessors
    active = np.minimum(resident, filled)
    busy = 1 - np.exp(-0.7 * active * tile.threads / 128)
    # A unit's work whatever it holds; the sums in the end, which are added across threads where several share a plane.
    entries = g.R * g.S + bias
    plane_threads = np.where(tile.block_planes > 1, items, tile.threads)
    added = entries * (tile.threads + (plane_threads > 1) * tile.block_planes * plane_threads)
    once = (97 * added + 134 * tile.threads) / (elements * block_units)
    # Bounds, where a patch may reach beyond its unit.
    slots = patch.slots + np.where(_exact(g, patch), 0, 11.6)
    issue = (slots * idle + 43 * tile.threads / elements + once + 0.48 * patch.passes * idle) / 128 / busy
    moved = (halo * g.x_size / g.y_size + 1) * size
    moved = moved + np.where(slabs > 1, 8 * entries * tile.block_planes / (elements * block_units), 0)
    # The less is on its way to a multiprocessor, the longer it takes.
    memory = 10.4 / 18 * moved * (1 + 140 / (active * _shared_bytes(g, dtype, bias, tile)))
    # Some multiprocessors have a block more than others.
    rounds = np.where(filled < resident, np.ceil(filled), np.ceil(filled / resident) * resident)
    uneven = rounds / filled
    time = np.maximum(issue, memory) + 2.66 * np.minimum(issue, memory) + 61 / (active * elements)
    time = time * (1 + 0.0365 * (tile.stages - 2))
    cluster = clustered(slabs, groups, target.multiprocessors * resident)
    # Another launch takes 2.5 us; blocks of a cluster wait for each other.
    apart = np.where(cluster, 1_500, 10_000) * (slabs > 1)
    return time * (1 + 0.07 * (uneven - 1)) * g.y_size / target.multiprocessors + apart
