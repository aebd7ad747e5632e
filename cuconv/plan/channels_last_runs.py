"""Channels-last arrays (NHWC in memory) by runs, for compute capability 9.0 and newer: see
cuda/depthwise_channels_last_runs.cu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..geometry import Conv2dGeometry
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
    magic,
    those_of,
)
from .runs import dense_dgrad_as_forward

# Weights live in registers, and kernels are unrolled over them.
MAX_TAPS = 64
# In float32, beyond so many depthwise_channels_last_staged is faster.
_MAX_TAPS_FLOAT32 = 25
_COLUMNS = (16, 12, 11, 10, 8, 7, 6, 5, 4, 3, 2, 1)
_ROWS = (1, 2)
_STAGES = (2, 3, 4, 6, 8)
# As many slabs as fill a device so often.
_FILLS = (1, 2, 3, 4, 6)
# Threads with outputs that a block is to have; of one strip there may be more.
_THREADS = (64, 128, 192, 256, 384, 512, 768)
WARP = 32
# A kernel for each of these.
_MOST_KNOWN_CHANNELS = 256
# Of a block, those that bring and take rows.
SERVICE = 2 * WARP
MAX_CHANNELS = 1024 - SERVICE
_MAX_REGISTERS = 200
_MAX_PRODUCTS = 3000


@dataclass(frozen=True, slots=True)
class Tile:
    """A block makes slab_rows rows of `strips` strips of columns side by side. `rows` rows at a time are a stage of its
    rings; a multiprocessor is to hold so many blocks."""

    columns: int
    strips: int
    rows: int
    stages: int
    blocks: int
    slab_rows: int


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than the others: pixels of odd numbers of channels start at any element, which the
    others load or copy one by one.

    On an H200, percent of the floor by this and by the best of the others: 3x3 of 67 channels on 129x131 83 and 77 in
    float32, 77 and 54 in float16; 5x5 of 65 channels 70 and 50, 43 and 27; 7x7 of 33 channels 41 and 45, 20 and 16. Of
    20 and of 100 channels depthwise_channels_last_staged is as fast or faster.
    """
    return g.channels_last and g.K % 2 == 1 and (DTYPES[dtype][1] == 2 or g.R * g.S <= _MAX_TAPS_FLOAT32)


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _best(g, dtype, target, turned=False)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _best(dense_dgrad_as_forward(g), dtype, target, turned=True)


def _best(g: Conv2dGeometry, dtype: str, target: Target, turned: bool) -> Plan:
    if not g.channels_last:
        raise Unsuitable("takes channels-last arrays, and these are (N, C, H, W) in memory")
    if target.architecture < 90:
        raise Unsuitable(f"needs compute capability 9.0, and the device has {target.architecture / 10}")
    if dtype == "float64":
        raise Unsuitable("takes no float64")
    if g.multiplier > 1 or g.stride != (1, 1) or g.dilation != (1, 1):
        raise Unsuitable(
            f"takes multiplier 1, stride 1 and dilation 1, and has {g.multiplier}, {g.stride} and {g.dilation}"
        )
    if g.R * g.S > MAX_TAPS or g.K > MAX_CHANNELS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps and {MAX_CHANNELS} channels, and has {g.R} x {g.S} and {g.K}")
    table, fits = _table(g, dtype, target)
    best = cheapest_of(table, fits, _cost(g, dtype, target, table))
    if best is None:
        raise Unsuitable(f"{g.R} x {g.S} taps of {g.K} channels do not fit registers and shared memory")
    return tile_plan(g, dtype, best, turned)


def tile_plan(g: Conv2dGeometry, dtype: str, tile: Tile, turned: bool = False) -> Plan:
    """The plan of a tile; of the gradient, g is the forward convolution that it is."""
    x_bytes, y_bytes = (int(row_bytes) for row_bytes in _row_bytes(g, dtype, tile))
    rows = g.N * g.P
    grid = (-(-g.Q // (tile.strips * tile.columns)), -(-rows // tile.slab_rows), 1)
    if rows > MAX_GRID[0]:
        raise Unsuitable(f"{rows} rows are more than it can count")
    return Plan(
        source="depthwise_channels_last_runs",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("TURNED", int(turned)),
            ("THREADS", int(_threads(g, tile))),
            ("BLOCKS", tile.blocks),
            ("CHANNELS", known_channels(g)),
            ("COLUMNS", tile.columns),
            ("LEFT", edge(g, tile.columns, 0)),
            ("RIGHT", edge(g, tile.columns, 1)),
            ("ROWS", tile.rows),
            ("STAGES", tile.stages),
        ),
        grid=grid,
        block=int(_threads(g, tile)),
        shared_bytes=int(_shared_bytes(g, dtype, tile)),
        parameters=(
            ("K", g.K),
            ("H", g.H),
            ("W", g.W),
            ("P", g.P),
            ("Q", g.Q),
            ("top", g.padding[0][0]),
            ("left", g.padding[1][0]),
            ("strips", tile.strips),
            ("x_bytes", x_bytes),
            ("y_bytes", y_bytes),
            ("rows", rows),
            ("slab_rows", tile.slab_rows),
            ("K_magic", magic(g.K)),
            ("total_x", g.x_size),
        ),
    )


def tiles(g: Conv2dGeometry, dtype: str, target: Target) -> Iterator[Tile]:
    """The tiles that a thread's registers and a block's shared memory hold."""
    return each_of(*_table(g, dtype, target))


def _table(g: Conv2dGeometry, dtype: str, target: Target) -> tuple[Tile, Any]:
    """The same as one tile of arrays, and which of them fit."""
    columns_choices = [n for n in _COLUMNS if n <= g.Q]
    # Axes of what decides whether a tile fits; strips never get fewer, so that equal numbers are neighbours.
    columns, rows, stages = axis_of(columns_choices, 3), axis_of(_ROWS, 1), axis_of(_STAGES, 0)
    strips: Any = even_strips(g, columns, 1)
    bare = Tile(columns, strips, rows, stages, 1, 1)
    threads, shared = _threads(g, bare), _shared_bytes(g, dtype, bare)
    fits = (
        (np.diff(strips, axis=1, prepend=0) > 0)
        & last_strip_fits(g, columns, strips)
        & (threads <= MAX_CHANNELS + SERVICE)
        & (_registers(g, bare) <= np.minimum(_MAX_REGISTERS, 65536 // threads // 8 * 8))
        & (g.R * g.R * g.S * columns * rows <= _MAX_PRODUCTS)
        & (shared <= target.shared_per_block - SHARED_RESERVE)
    )
    bare = those_of(bare, fits, 1)
    threads, shared = _threads(g, bare), _shared_bytes(g, dtype, bare)
    of_registers = 4 * (512 // (-(-_registers(g, bare) // 8) * 8)) * WARP // threads
    blocks = np.minimum(
        np.minimum(of_registers, 2048 // threads), target.shared_per_multiprocessor // (shared + SHARED_RESERVE)
    )
    tile = replace(bare, blocks=np.maximum(1, blocks))
    slab_rows = slabs(g, target, tile, _FILLS)
    return replace(tile, slab_rows=slab_rows), (blocks > 0) & (np.diff(slab_rows, axis=1, prepend=0) != 0)


def _threads(g: Conv2dGeometry, tile: Tile) -> Any:
    return SERVICE + -(-tile.strips * g.K // WARP) * WARP


def _registers(g: Conv2dGeometry, tile: Tile) -> Any:
    """Of a thread: sums, weights, a row of x and where its columns are, and all else."""
    addresses = 1 if known_channels(g) else tile.columns
    return g.R * tile.columns + g.R * g.S + tile.columns + addresses + 2 * (g.S - 1) + 20


def even_strips(g: Conv2dGeometry, columns: Any, axis: int) -> Any:
    """Strips of a block, along an axis: as many as some threads have channels for, or fewer that fill the blocks side
    by side evenly; all that lie side by side last."""
    column_items = -(-g.Q // columns)
    most = [np.clip(threads // g.K, 1, column_items) for threads in _THREADS]
    return np.concatenate([-(-column_items // -(-column_items // n)) for n in (*most, column_items)], axis=axis)


def slabs(g: Conv2dGeometry, target: Target, tile: Any, fills: tuple[float, ...]) -> Any:
    """Rows of a slab where so many fill the device so often, on one more axis."""
    side_by_side = -(-g.Q // (tile.strips * tile.columns))
    held = target.multiprocessors * tile.blocks
    counts = (np.clip(np.floor(fill * held / side_by_side), 1, MAX_GRID[1]) for fill in fills)
    return np.concatenate([np.ceil(g.N * g.P / count).astype(np.int64) for count in counts], axis=1)


def last_strip_fits(g: Conv2dGeometry, columns: Any, strips: Any) -> Any:
    """Whether the last block has room for a strip."""
    rest = g.Q % (strips * columns)
    return (rest == 0) | (rest >= columns)


def known_channels(g: Conv2dGeometry) -> int:
    """CHANNELS: known at compile time, loads and stores of all columns have one address."""
    return g.K if g.K <= _MOST_KNOWN_CHANNELS else 0


def edge(g: Conv2dGeometry, columns: int, side: int) -> int:
    """LEFT (side 0) or RIGHT (1): of the columns of x that a strip needs, those at an end that may be padding."""
    return min(max(0, g.padding[1][side]), columns + g.S - 1)


def run_bytes(g: Conv2dGeometry, dtype: str, columns: Any) -> Any:
    """Of so many columns in shared memory: a run may begin up to 15 bytes behind a boundary, and is brought from
    boundary to boundary."""
    return -(-(columns * g.K * DTYPES[dtype][1] + VECTOR_BYTES - 1) // VECTOR_BYTES) * VECTOR_BYTES


def _row_bytes(g: Conv2dGeometry, dtype: str, tile: Tile) -> tuple[Any, Any]:
    """Of a row of x, with zeros before it, and of a row of y in shared memory."""
    columns = tile.strips * tile.columns
    x_columns = np.minimum(g.W, columns + g.S - 1)
    return VECTOR_BYTES + run_bytes(g, dtype, x_columns), run_bytes(g, dtype, columns)


def _shared_bytes(g: Conv2dGeometry, dtype: str, tile: Tile) -> Any:
    """A row of zeros and the rings."""
    x_bytes, y_bytes = _row_bytes(g, dtype, tile)
    return x_bytes + tile.stages * tile.rows * (x_bytes + y_bytes)


def blocks_in_turn(g: Conv2dGeometry, target: Target, tile: Any) -> tuple[Any, Any]:
    """Blocks that the busiest multiprocessor has one after the other, and at once."""
    blocks = -(-g.Q // (tile.strips * tile.columns)) * -(-g.N * g.P // tile.slab_rows)
    most = -(-blocks // target.multiprocessors)
    return -(-most // tile.blocks), np.minimum(most, tile.blocks)


def turns_of_block(g: Conv2dGeometry, tile: Any) -> Any:
    """Rows of x that come, one a turn: for every image of a slab more than it has rows of y."""
    return tile.slab_rows + (1 + tile.slab_rows / g.P) * (g.R - 1)


def _cost(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile) -> Any:
    """What ranks tiles: the clocks of a multiprocessor.

    The weights were fitted to the times of 730 tiles (18 cases on an H200): of those measured, the tile of least cost
    takes 3 % longer than the fastest on average, and at most 17 %.
    """
    narrow = DTYPES[dtype][1] == 2
    in_turn, at_once = blocks_in_turn(g, target, tile)
    turns = in_turn * turns_of_block(g, tile)
    addresses = 0 if known_channels(g) else 2 * tile.columns
    slots: Any = tile.columns * (g.R * g.S + 1 + 2 * narrow) + (tile.columns + g.S - 1) * (1 + narrow)
    slots = slots + (addresses + 8 + 20 / tile.rows)
    warps = at_once * (_threads(g, tile) - SERVICE) / WARP
    issue = turns * warps * slots / 4 / (1 - np.exp(-0.084 * warps))
    # Of the memory's bandwidth a multiprocessor has 18 bytes a clock.
    x_bytes, y_bytes = _row_bytes(g, dtype, tile)
    flight = at_once * (tile.stages - 2) * tile.rows * x_bytes
    memory = turns * at_once * (x_bytes + y_bytes) / 18 * (1 + 420 / np.maximum(500, flight))
    # What one thread does to bring a row, and how long the row takes.
    service, latency = 550 * turns, 1840 * turns / (np.maximum(1, tile.stages - 2) * tile.rows)
    clocks = np.sqrt(issue**2 + memory**2 + service**2 + latency**2) + 35 * turns * at_once
    # Several blocks at once take longer in float32: 3x3 of 67 channels 82 % of the floor by two, 83 to 84 by one.
    return clocks * np.where(narrow | (at_once == 1), 1, 1.04)
