"""Gradients of the weights and the bias of channels-last arrays, by runs, for compute capability 9.0 and newer: see
cuda/depthwise_wgrad_channels_last_runs.cu."""

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
from .channels_last_runs import (
    MAX_CHANNELS,
    MAX_TAPS,
    SERVICE,
    WARP,
    blocks_in_turn,
    edge,
    even_strips,
    known_channels,
    last_strip_fits,
    run_bytes,
    slabs,
    turns_of_block,
)
from .wgrad import WgradPlan, sum_bytes, with_reduce

_COLUMNS = (12, 11, 10, 8, 7, 6, 5, 4, 3, 2, 1)
_STAGES = (2, 3, 4, 6)
_MAX_REGISTERS = 200
# Multiplications of the unrolled turns: beyond, the code outgrows the instruction cache and takes seconds to compile.
_MAX_PRODUCTS = 2800
# As many slabs as fill a device so often.
_FILLS = (0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Tile:
    """A block takes slab_rows rows of `strips` strips of columns of dy side by side, `stages` times as many rows as a
    kernel has at once in shared memory; a multiprocessor is to hold so many blocks."""

    columns: int
    strips: int
    stages: int
    blocks: int
    slab_rows: int


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than the others: see channels_last_runs.beats_others.

    On an H200, percent of the floor by this and by the best of the others: 3x3 of 67 channels on 129x131 87 and 80 in
    float32, 73 and 51 in float16; 5x5 of 65 channels 50 and 53, 30 and 30; 7x7 of 33 channels 33 and 28, 18 and 15.
    """
    return g.channels_last and g.K % 2 == 1


def channels_last_runs(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of dy is read once, and of x but for the columns that neighbouring blocks share."""
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
    table, fits = _table(g, dtype, bias, target)
    best = cheapest_of(table, fits, _cost(g, dtype, bias, target, table))
    if best is None:
        raise Unsuitable(f"{g.R} x {g.S} taps of {g.K} channels do not fit registers and shared memory")
    return tile_plan(g, dtype, bias, best)


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, tile: Tile) -> WgradPlan:
    """The plan of one choice of tiles()."""
    rows = g.N * g.P
    grid = (-(-g.Q // (tile.strips * tile.columns)), -(-rows // tile.slab_rows), 1)
    partials = grid[0] * grid[1]
    if rows > MAX_GRID[0]:
        raise Unsuitable(f"{rows} rows are more than it can count")
    x_bytes, dy_bytes = (int(row_bytes) for row_bytes in _row_bytes(g, dtype, tile))
    threads = int(_threads(g, tile))
    sums = Plan(
        source="depthwise_wgrad_channels_last_runs",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("BIAS", int(bias)),
            ("FINAL", int(partials == 1)),
            ("THREADS", threads),
            ("BLOCKS", tile.blocks),
            ("CHANNELS", known_channels(g)),
            ("COLUMNS", tile.columns),
            ("LEFT", edge(g, tile.columns, 0)),
            ("RIGHT", edge(g, tile.columns, 1)),
            ("REPEATED", -g.Q % tile.columns),
            ("TURNS", _turns(g)),
            ("STAGES", tile.stages),
        ),
        grid=grid,
        block=threads,
        shared_bytes=int(_shared_bytes(g, dtype, bias, tile)),
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
            ("dy_bytes", dy_bytes),
            ("rows", rows),
            ("slab_rows", tile.slab_rows),
            ("K_magic", magic(g.K)),
            ("total_x", g.x_size),
            ("total_dy", g.y_size),
        ),
    )
    return WgradPlan(sums, None, 0) if partials == 1 else with_reduce(sums, partials, g, dtype, bias)


def tiles(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> Iterator[Tile]:
    """The tiles that a thread's registers and a block's shared memory hold."""
    return each_of(*_table(g, dtype, bias, target))


def _table(g: Conv2dGeometry, dtype: str, bias: bool, target: Target) -> tuple[Tile, Any]:
    """All tiles as one of arrays, and which of them fit."""
    columns, stages = axis_of([n for n in _COLUMNS if n <= g.Q], 2), axis_of(_STAGES, 0)
    strips: Any = even_strips(g, columns, 1)
    bare = Tile(columns, strips, stages, 1, 1)
    threads, shared = _threads(g, bare), _shared_bytes(g, dtype, bias, bare)
    fits = (
        (np.diff(strips, axis=1, prepend=0) > 0)
        & last_strip_fits(g, columns, strips)
        & (threads <= MAX_CHANNELS + SERVICE)
        & (_registers(g, bare) <= np.minimum(_MAX_REGISTERS, 65536 // threads // 8 * 8))
        & ((g.R * g.S * columns * _turns(g) <= _MAX_PRODUCTS) | (columns == 1))
        & (shared <= target.shared_per_block - SHARED_RESERVE)
    )
    bare = those_of(bare, fits, 1)
    threads, shared = _threads(g, bare), _shared_bytes(g, dtype, bias, bare)
    of_registers = 4 * (512 // (-(-_registers(g, bare) // 8) * 8)) * WARP // threads
    blocks = np.minimum(
        np.minimum(of_registers, 2048 // threads), target.shared_per_multiprocessor // (shared + SHARED_RESERVE)
    )
    tile = replace(bare, blocks=np.maximum(1, blocks))
    slab_rows = slabs(g, target, tile, _FILLS)
    return replace(tile, slab_rows=slab_rows), (blocks > 0) & (np.diff(slab_rows, axis=1, prepend=0) != 0)


def _turns(g: Conv2dGeometry) -> int:
    """Of a stage: a multiple of R, so that what is where in the ring of rows of dy is known at compile time."""
    return g.R * max(1, 2 // g.R)


def _threads(g: Conv2dGeometry, tile: Tile) -> Any:
    return SERVICE + -(-tile.strips * g.K // WARP) * WARP


def _registers(g: Conv2dGeometry, tile: Tile) -> Any:
    """Of a thread: rows of dy, a row of x, where their columns are, sums, and all else."""
    addresses = 2 if known_channels(g) else 2 * tile.columns
    return (g.R + 1) * tile.columns + addresses + 2 * (g.S - 1) + g.R * g.S + 22


def _row_bytes(g: Conv2dGeometry, dtype: str, tile: Tile) -> tuple[Any, Any]:
    """Of a row of x and of one of dy in shared memory, with zeros before it."""
    columns = tile.strips * tile.columns
    x_columns = np.minimum(g.W, columns + g.S - 1)
    return VECTOR_BYTES + run_bytes(g, dtype, x_columns), VECTOR_BYTES + run_bytes(g, dtype, columns)


def _shared_bytes(g: Conv2dGeometry, dtype: str, bias: bool, tile: Tile) -> Any:
    """For a row of zeros and the ring; in the end for the sums of every thread."""
    x_bytes, dy_bytes = _row_bytes(g, dtype, tile)
    ring = np.maximum(x_bytes, dy_bytes) + tile.stages * _turns(g) * (x_bytes + dy_bytes)
    return np.maximum(ring, (g.R * g.S + bias) * tile.strips * g.K * sum_bytes(dtype))


def _cost(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> Any:
    """What ranks tiles: the clocks of a multiprocessor.

    The weights were fitted to the times of 470 tiles (16 cases on an H200): of those measured, the tile of least cost
    takes 4 % longer than the fastest on average, and at most 12 %.
    """
    narrow = DTYPES[dtype][1] == 2
    in_turn, at_once = blocks_in_turn(g, target, tile)
    turns = in_turn * turns_of_block(g, tile)
    addresses = 0 if known_channels(g) else 2 * tile.columns
    slots: Any = tile.columns * (g.R * g.S + 2 + narrow) + (tile.columns + g.S - 1) * (1 + narrow)
    slots = slots + addresses + 6 + 16 / _turns(g)
    warps = at_once * (_threads(g, tile) - SERVICE) / WARP
    issue = turns * warps * slots / 4 / (1 - np.exp(-0.24 * warps))
    # Of the memory's bandwidth a multiprocessor has 18 bytes a clock.
    x_bytes, dy_bytes = _row_bytes(g, dtype, tile)
    memory = turns * at_once * (x_bytes + dy_bytes) / 18
    # What one thread does to bring a row, and how long the row takes.
    service, latency = 350 * turns, 1350 * turns / ((tile.stages - 1) * _turns(g))
    return np.sqrt(issue**2 + memory**2 + service**2 + latency**2) + 3900 * in_turn + 70 * turns * at_once
