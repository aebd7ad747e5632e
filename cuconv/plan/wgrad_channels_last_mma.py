"""Gradients of the weights and the bias of channels-last arrays, 16-bit, on tensor cores: see
cuda/depthwise_wgrad_channels_last_mma.cu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..geometry import Conv2dGeometry
from .base import (
    DTYPES,
    MAX_DIVIDEND,
    MAX_GRID,
    SHARED_RESERVE,
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
from .channels_last import MAX_TAPS
from .wgrad import WgradPlan, with_reduce

_SIZE = 2
# Channels of a group, and pixels of a unit: see the kernel.
_GROUP, _UNIT = 8, 16
_GROUPS = (1, 2, 3, 4, 6, 8)
_UNITS = (1, 2, 3, 4, 5, 7)
_IMAGES = (1, 2, 3, 4, 8, 16)
# Blocks side by side that share the columns of a row.
_PARTS = (1, 2, 4, 7, 8, 16, 32, 64, 128)
_ROWS = (1, 2, 3, 4)
_STAGES = (2, 3, 4, 6)
_LEAST_THREADS, _MAX_THREADS = 128, 512
# Copies of a thread and row.
_MAX_COPIES = 8
# Of a thread, by a count that is one too many at times.
_MAX_REGISTERS = 260
# Kernels of so many taps are faster here than elsewhere; of rows of so few columns, which leave units of pixels unused
# and blocks little to do, kernels of twice as many.
_MANY_TAPS, _NARROW = 16, 14
# What a stage of shared memory ends with: kWords of the kernel.
_WORD_BYTES = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """A warp takes `units` units of 16 pixels of a group of 8 channels; a block `groups` groups of `columns` columns of
    `images` images, `rows` rows in a turn, `stages` turns in shared memory, and of all rows `slab_rows`."""

    columns: int
    images: int
    units: int
    groups: int
    rows: int
    stages: int
    blocks: int
    slab_rows: int

    @property
    def warps(self) -> int:
        """Of a group."""
        return -(-self.images * self.columns // (_UNIT * self.units))

    @property
    def threads(self) -> int:
        return 32 * self.groups * self.warps

    @property
    def channels(self) -> int:
        return _GROUP * self.groups


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_wgrad_channels_last_staged, of devices that it was measured on.

    On an H200, percent of the memory floor by this and by staged in float16: 7x7 on 56x56 38 and 31, on 28x28 35 and
    25, on 14x14 32 and 22, on 7x7 21 and 21; 5x5 on 56x56 53 and 35, on 28x28 51 and 37, on 14x14 37 and 43, on 7x7 31
    and 33; 4x4 on 28x28 59 and 52, 3x5 57 and 56; 3x3 on 56x56 71 and 75, on 14x14 60 and 61.
    """
    taps = g.R * g.S if g.Q > _NARROW else g.R * g.S // 2
    return DTYPES[dtype][1] == _SIZE and g.channels_last and target.architecture >= 90 and taps >= _MANY_TAPS


def channels_last_mma(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of dy is read once, and of x but for the columns that neighbouring blocks share."""
    if DTYPES[dtype][1] != _SIZE:
        raise Unsuitable(f"takes float16 and bfloat16, and the dtype is {dtype}")
    if not g.channels_last:
        raise Unsuitable("takes channels-last arrays, and these are (N, C, H, W) in memory")
    if target.architecture < 80:
        raise Unsuitable(f"needs compute capability 8.0, and the device has {target.architecture / 10}")
    if g.R * g.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    if g.multiplier > 1 or g.stride != (1, 1):
        raise Unsuitable(f"takes multiplier 1 and stride 1, and has {g.multiplier}, {g.stride}")
    if not aligned or g.K % _GROUP:
        raise Unsuitable("takes pixels of whole 16 bytes that start at multiples of 16 bytes")
    if _plane(g) > MAX_GRID[0]:
        raise Unsuitable(f"{g.H} x {g.W} pixels of {g.K} channels are more than it can count")
    table, fits = _table(g, bias, target)
    best = cheapest_of(table, fits, _cost(g, target, table))
    if best is None:
        raise Unsuitable(f"{g.R} x {g.S} taps on rows of {g.W} columns do not fit registers and shared memory")
    return tile_plan(g, dtype, bias, best)


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, tile: Tile) -> WgradPlan:
    """The plan of one choice of tiles()."""
    column_blocks = -(-g.Q // tile.columns)
    strip_rows, rows = _rows(g, tile)
    slabs = -(-rows // tile.slab_rows)
    grid = (-(-g.K // tile.channels) * column_blocks, slabs, 1)
    if any(count > most for count, most in zip(grid, MAX_GRID, strict=True)) or rows > MAX_GRID[0]:
        raise Unsuitable(f"a grid of {grid} blocks is more than one launch can have")
    x_slot, x_pixels, x_row, dy_row = map(int, _pixels(g, tile))
    sums = Plan(
        source="depthwise_wgrad_channels_last_mma",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("BIAS", int(bias)),
            ("FINAL", int(slabs * column_blocks == 1)),
            ("GROUPS", tile.groups),
            ("WARPS", tile.warps),
            ("UNITS", tile.units),
            ("BLOCKS", tile.blocks),
            ("ROWS", tile.rows),
            ("STAGES", tile.stages),
            ("X_COPIES", int(_copies(tile, x_row))),
            ("DY_COPIES", int(_copies(tile, dy_row))),
            ("DILATED", int(g.dilation != (1, 1))),
        ),
        grid=grid,
        block=tile.threads,
        shared_bytes=int(_shared_bytes(g, bias, tile)),
        parameters=(
            ("N", g.N),
            ("K", g.K),
            *plane_parameters(g),
            ("spacing_h", g.dilation[0]),
            ("images", tile.images),
            ("columns", tile.columns),
            ("column_blocks", column_blocks),
            ("x_slot", x_slot),
            ("x_pixels", x_pixels),
            ("x_row_pixels", x_row),
            ("dy_row_pixels", dy_row),
            ("stage_size", int(_stage_bytes(g, tile)) // _SIZE),
            ("x_plane", g.H * g.W * g.K),
            ("dy_plane", g.P * g.Q * g.K),
            ("x_down", g.dilation[0] * g.W * g.K),
            ("dy_down", g.dilation[0] * g.Q * g.K),
            ("down", g.dilation[0]),
            ("strip_rows", strip_rows),
            ("rows", rows),
            ("slab_rows", tile.slab_rows),
            ("x_slot_magic", magic(x_slot)),
            ("columns_magic", magic(tile.columns)),
        ),
    )
    slabs *= column_blocks
    return WgradPlan(sums, None, 0) if slabs == 1 else with_reduce(sums, slabs, g, dtype, bias)


def tiles(g: Conv2dGeometry, bias: bool, target: Target) -> Iterator[Tile]:
    """The tiles that a thread's registers and a block's shared memory hold."""
    return iter(dict.fromkeys(each_of(*_table(g, bias, target))))


def _table(g: Conv2dGeometry, bias: bool, target: Target) -> tuple[Tile, Any]:
    """All tiles as one of arrays, some of them several times, and which of them fit."""
    tile = Tile(
        columns=axis_of(sorted({-(-g.Q // parts) for parts in _PARTS if parts <= g.Q}), 5),
        images=axis_of([n for n in _IMAGES if n <= max(1, g.N)], 4),
        units=axis_of(_UNITS, 3),
        groups=axis_of(sorted({min(n, g.K // _GROUP) for n in _GROUPS}), 2),
        rows=axis_of(_ROWS, 1),
        stages=axis_of(_STAGES, 0),
        blocks=1,
        slab_rows=1,
    )
    shared = _shared_bytes(g, bias, tile)
    _, _, x_row, dy_row = _pixels(g, tile)
    warps = tile.threads // 32
    resident = np.minimum(
        target.shared_per_multiprocessor // (shared + SHARED_RESERVE),
        # Registers are in four parts, each of 512 for a warp's every thread, and are given out by eights.
        np.minimum(4 * (512 // np.minimum(_registers(g, tile), 256)) // warps, 2048 // tile.threads),
    )
    fits = (shared <= target.shared_per_block - SHARED_RESERVE) & (resident >= 1)
    fits = fits & (tile.threads <= _MAX_THREADS) & (_registers(g, tile) <= _MAX_REGISTERS)
    fits = fits & (np.maximum(_copies(tile, x_row), _copies(tile, dy_row)) <= _MAX_COPIES)
    # Parts of rows of several images where these are a unit at most; no more units than there are.
    fits = fits & ((tile.images == 1) | (tile.columns == g.Q) | (tile.columns <= _UNIT))
    fits = fits & ((tile.units == 1) | (tile.images * tile.columns > _UNIT * (tile.units - 1)))
    # What a copy and a division count.
    fits = fits & (tile.images * _plane(g) <= MAX_GRID[0]) & (np.maximum(x_row, dy_row) + _MAX_THREADS <= MAX_DIVIDEND)
    many = fits & (tile.threads >= _LEAST_THREADS)
    fits = many if many.any() else fits
    return _slabs(g, target, those_of(replace(tile, blocks=resident), fits, 1))


def _slabs(g: Conv2dGeometry, target: Target, tile: Tile) -> tuple[Tile, Any]:
    """The tiles with as many slabs as fill the device, of any rows and of whole strips, or half of it; and with one: on
    one more axis. All of them fit."""
    strip_rows, rows = _rows(g, tile)
    side_by_side = _side_by_side(g, tile)
    blocks = target.multiprocessors * tile.blocks
    once, half = (-(-rows // np.clip(n // side_by_side, 1, MAX_GRID[1])) for n in (blocks, blocks // 2))
    whole_strips = (-(-slab // strip_rows) * strip_rows for slab in (once, half))
    slab_rows: Any = np.concatenate((rows, once, *whole_strips), axis=1)
    return replace(tile, slab_rows=slab_rows), np.ones(slab_rows.shape, bool)


def _plane(g: Conv2dGeometry) -> int:
    """Elements of the larger image."""
    return max(g.H * g.W, g.P * g.Q) * g.K


def _side_by_side(g: Conv2dGeometry, tile: Tile) -> Any:
    """Blocks of one slab."""
    return -(-g.K // tile.channels) * -(-g.Q // tile.columns)


def _rows(g: Conv2dGeometry, tile: Tile) -> tuple[int, Any]:
    """Rows of a strip, and of all strips: see cuda/row_walk.cuh."""
    strip_rows = -(-g.P // g.dilation[0])
    return strip_rows, -(-g.N // tile.images) * g.dilation[0] * strip_rows


def _pixels(g: Conv2dGeometry, tile: Tile) -> tuple[Any, Any, Any, Any]:
    """Of a row in shared memory: pixels of x from one image to the next, of these those that exist, pixels of x of all
    images, and of dy."""
    needed = tile.columns + (g.S - 1) * g.dilation[1]
    # Eight neighbours in dy, of two images too, are to lie in different banks.
    slot = needed + np.where(tile.images > 1, (tile.columns - needed) % 8, 0)
    return slot, needed, tile.images * slot, tile.warps * tile.units * _UNIT


def _pitch_bytes(tile: Tile) -> Any:
    return (tile.groups | 1) * _GROUP * _SIZE


def _stage_bytes(g: Conv2dGeometry, tile: Tile) -> Any:
    _, _, x_row, dy_row = _pixels(g, tile)
    return tile.rows * (x_row + dy_row) * _pitch_bytes(tile) + _WORD_BYTES


def _shared_bytes(g: Conv2dGeometry, bias: bool, tile: Tile) -> Any:
    """For the ring of turns; in the end for the sums of every warp."""
    sums = tile.warps * (g.R * g.S + bias) * tile.channels * 4
    return np.maximum(tile.stages * _stage_bytes(g, tile), sums)


def _copies(tile: Tile, pixels: Any) -> Any:
    """Of a thread and row."""
    return -(-pixels * tile.groups // tile.threads)


def _products(g: Conv2dGeometry) -> int:
    """Of one row of x in one unit."""
    return g.R * (g.S // 2) + g.S % 2 * (g.R // 2) + 1


def _registers(g: Conv2dGeometry, tile: Tile) -> Any:
    """That a thread is to have."""
    values = 4 * _products(g) + tile.units * (2 * (g.R + tile.rows) + 7) + 56
    return -(-values // 8) * 8


def _cost(g: Conv2dGeometry, target: Target, tile: Tile) -> Any:
    """What ranks tiles: clocks of a multiprocessor, more or less.

    The weights were fitted to the times of 1,000 tiles (10 cases in float16 on an H200). Of those that were measured,
    the tile of least cost takes up to 3 % longer than the fastest where this is the default, and up to 40 % elsewhere.
    """
    strip_rows, rows = _rows(g, tile)
    blocks = -(-rows // tile.slab_rows) * _side_by_side(g, tile)
    of_device = -(-blocks // target.multiprocessors)
    active = np.minimum(of_device, tile.blocks)
    waves = -(-of_device // active)
    # Of a block: steps; rows of x, at the ends of a part of a strip some that other blocks have too; rows of dy alone
    # or of x once more; turns.
    part = tile.slab_rows % strip_rows > 0
    steps = tile.slab_rows / strip_rows + part
    full = tile.slab_rows + 0.5 * (g.R - 1) * part * steps
    light = steps * (g.padding[0][0] / g.dilation[0] + 1)
    turns = (full + light) / tile.rows + 0.5 * steps * (tile.rows - 1) / tile.rows
    _, x_pixels, _, _ = _pixels(g, tile)
    warps = tile.threads / 32
    # Of a turn: what one warp does one after the other, and what all of a multiprocessor do in its units.
    rows_of_turn = (full + light) / turns
    products = tile.units * (full * _products(g) + light * (g.R / 2 + 1)) / turns
    latency = 67 + 24 * warps + 33 * rows_of_turn * (1 + 0.3 * tile.units) + 9.1 * products
    tensor = 1.38 * active * warps * products
    moved = 2 * tile.rows * tile.images * (np.minimum(x_pixels, g.W) + tile.columns) * tile.channels
    # Lines and sectors of which two blocks have a part each.
    parts_of_lines = 1 + 0.26 * np.log2(8 / tile.groups) + 0.4 * (tile.groups % 2)
    # The less is on its way to a multiprocessor, the longer the memory takes.
    flight = active * (tile.stages - 1) * _stage_bytes(g, tile)
    memory = active * moved / 38 * parts_of_lines * (1 + 6500 / flight)
    most = np.maximum(np.maximum(latency, tensor), memory)
    of_turn = most + 0.185 * (latency + tensor + memory - most)
    # The second launch.
    one = (rows <= tile.slab_rows) & (tile.columns >= g.Q)
    return (turns * of_turn + 18000) * waves + np.where(one, 0.0, 5700)
