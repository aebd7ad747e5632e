"""Channels-last arrays (NHWC in memory), 16-bit, on tensor cores: see cuda/depthwise_channels_last_mma.cu."""

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
# Kernels of fewer taps take less time by depthwise_channels_last_staged.
_MANY_TAPS = 25
_SIZE = 2
# Columns of a quad, quads of a warp, and its channels.
_QUAD, _QUADS, _VECTOR = 4, 16, 4
# Channels of a copy.
_PIECE = VECTOR_BYTES // _SIZE
# Rows of x between barriers, and how many times as many are in the ring.
_BATCHES = ((1, 4), (2, 3), (4, 3))
_STRIPS = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128)
_PIECES = (1, 2, 4, 8, 16, 64)
_IMAGES = (1, 2, 4, 8, 16)
_TURNS = (1, 2, 4)
_CHANNELS = (16, 32, 48, 64, 80)
# Of a block, and of a multiprocessor.
_MAX_WARPS = 20
_MAX_COPIES = 8
# What a thread needs beside sums, weights, a row of x and the bias: on sm_90 less, and the compiler spills; more, and
# it schedules better.
_REGISTERS_BESIDE = (24, 44)
_MAX_REGISTERS = 255


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block makes: `rows` rows of `quads` quads of outputs of `images` images, `turns` times one after the
    other, of `groups` times four channels; and how: so many rows of x at a time, `stages` times as many in the ring, so
    many blocks of a multiprocessor."""

    groups: int
    rows: int
    quads: int
    images: int
    turns: int
    batch: int
    stages: int
    blocks: int

    @property
    def channels(self) -> int:
        return _VECTOR * self.groups

    @property
    def warps(self) -> int:
        return self.groups * -(-self.quads * self.images // _QUADS)


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_channels_last_staged.

    On an H200, percent of the floor by this and by the other in float16: 5x5 on 28x28 66 and 55, on 56x56 64 and 53, on
    256x256 76 and 57, on 7x7 45 and 41, on 14x14 53 and 53; 7x7 on 56x56 58 and 36, on 28x28 50 and 32, on 14x14 41 and
    35; 3x9 on 28x28 34 and 29; 3x3 on 28x28 62 and 71.
    """
    many_taps = _MANY_TAPS <= g.R * g.S <= MAX_TAPS and min(g.R, g.S) > 2
    return g.channels_last and DTYPES[dtype][1] == _SIZE and many_taps


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _best(g, dtype, target, aligned, turned=False)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _best(dense_dgrad_as_forward(g), dtype, target, aligned, turned=True)


def _best(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, turned: bool) -> Plan:
    if not g.channels_last:
        raise Unsuitable("takes channels-last arrays, and these are (N, C, H, W) in memory")
    if DTYPES[dtype][1] != _SIZE:
        raise Unsuitable(f"takes float16 and bfloat16, and the dtype is {dtype}")
    if target.architecture < 80:
        raise Unsuitable(f"needs compute capability 8.0, and the device has {target.architecture / 10}")
    if g.stride != (1, 1) or g.dilation != (1, 1):
        raise Unsuitable(f"takes stride 1 and dilation 1, and has {g.stride} and {g.dilation}")
    if g.R * g.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    if g.multiplier > 1:
        raise Unsuitable(f"takes multiplier 1, and has {g.multiplier}")
    if not aligned or g.K % _PIECE:
        raise Unsuitable(f"copies {_PIECE} channels of aligned arrays at once, and has {g.K}")
    table, fits = _table(g, target)
    best = cheapest_of(table, fits, _cost(g, target, table))
    if best is None:
        raise Unsuitable(f"{g.R} x {g.S} taps on rows of {g.W} columns do not fit registers and shared memory")
    return tile_plan(g, dtype, best, turned)


def tile_plan(g: Conv2dGeometry, dtype: str, tile: Tile, turned: bool = False) -> Plan:
    column_blocks = -(-g.Q // (tile.quads * _QUAD))
    pixels = int(_pixels(g, tile))
    grid = (
        -(-g.K // tile.channels) * column_blocks,
        -(-g.P // tile.rows),
        -(-g.N // (tile.images * tile.turns)),
    )
    if any(count > most for count, most in zip(grid, MAX_GRID, strict=True)):
        raise Unsuitable(f"a grid of {grid} blocks is more than one launch can have")
    # What the kernel counts in 32-bit integers: elements of x and of y from a block's first image to the end of a row
    # of its last.
    planes = ((tile.images - 1) * g.H + 1) * g.W, ((tile.images - 1) * g.P + 1) * g.Q
    if max(planes) * g.K > MAX_GRID[0]:
        raise Unsuitable(f"{g.H} x {g.W} pixels of {g.K} channels are more than it can count")
    threads = 32 * tile.warps
    if tile.images * pixels + threads > MAX_DIVIDEND:
        raise Unsuitable(f"{tile.images * pixels} pixels of a row are more than it can divide")
    return Plan(
        source="depthwise_channels_last_mma",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("TURNED", int(turned)),
            ("THREADS", threads),
            ("BLOCKS", tile.blocks),
            ("GROUPS", tile.groups),
            ("BATCH", tile.batch),
            ("STAGES", tile.stages),
            ("COPIES", int(_copies(g, tile))),
            ("TURNS", int(tile.turns > 1)),
        ),
        grid=grid,
        block=threads,
        shared_bytes=int(_shared_bytes(g, tile)),
        parameters=(
            ("N", g.N),
            ("K", g.K),
            ("H", g.H),
            ("W", g.W),
            ("P", g.P),
            ("Q", g.Q),
            ("top", g.padding[0][0]),
            ("left", g.padding[1][0]),
            ("rows", tile.rows),
            ("quads", tile.quads),
            ("images", tile.images),
            ("turns", tile.turns),
            ("column_blocks", column_blocks),
            ("pixels", pixels),
            ("quads_magic", magic(tile.quads)),
            ("pixels_magic", magic(pixels)),
        ),
    )


def tiles(g: Conv2dGeometry, target: Target) -> Iterator[Tile]:
    """The tiles that a thread's registers and a block's shared memory hold."""
    return each_of(*_table(g, target))


def _table(g: Conv2dGeometry, target: Target) -> tuple[Tile, Any]:
    """The same as one tile of arrays, and which of them fit."""
    all_quads = -(-g.Q // _QUAD)
    channels = axis_of(_channel_choices(g.K), 3)
    quads = axis_of(sorted({-(-all_quads // strips) for strips in _STRIPS}), 2)
    images = axis_of(_IMAGES, 1)
    batch, stages = (axis_of(of_both, 0) for of_both in zip(*_BATCHES, strict=True))
    bare = Tile(channels // _VECTOR, 1, quads, images, 1, batch, stages, 1)
    fits = (
        ((images == 1) | (quads == all_quads) & (images <= g.N))
        & (bare.warps <= _MAX_WARPS)
        & (_registers(g, min(_REGISTERS_BESIDE)) <= _MAX_REGISTERS)
        & (_copies(g, bare) <= _MAX_COPIES)
        & (_shared_bytes(g, bare) <= target.shared_per_block - SHARED_RESERVE)
    )
    bare = those_of(bare, fits, 3)
    beside = axis_of(_REGISTERS_BESIDE if target.architecture == 90 else _REGISTERS_BESIDE[-1:], 2)
    turns = axis_of(_TURNS, 0)
    rows = axis_of(sorted({-(-g.P // pieces) for pieces in _PIECES}), 1)
    registers = np.minimum(_MAX_REGISTERS, _registers(g, beside))
    # The four parts of a multiprocessor share registers out by warps.
    most = np.minimum(_MAX_WARPS, 4 * (512 // (-(-registers // 8) * 8))) // bare.warps
    most = np.minimum(most, target.shared_per_multiprocessor // (_shared_bytes(g, bare) + SHARED_RESERVE))
    fits = (
        (most > 0)
        & (np.diff(most, axis=1, prepend=0) != 0)
        & ((turns == 1) | (rows == g.P) & (g.N % (bare.images * turns) == 0))
    )
    # Costs are divided by blocks, those of tiles that do not fit too.
    return replace(bare, rows=rows, turns=turns, blocks=np.clip(most, 1, 32)), fits


def _channel_choices(K: int) -> list[int]:
    """Channels of a block: divisors of K, or what leaves few warps idle."""
    whole = [n for n in range(_PIECE, min(K, _CHANNELS[-1]) + 1, _PIECE) if K % n == 0]
    choices = set()
    for most in _CHANNELS:
        divisor = max((n for n in whole if n <= most), default=0)
        if divisor > 0.8 * most:
            choices.add(divisor)
        elif most < K:
            choices.add(most)
    if K <= _CHANNELS[-1]:
        choices.add(K)
    return sorted(choices)


def _steps(g: Conv2dGeometry) -> int:
    """kSteps: pieces of a quad's window."""
    return -(-(_QUAD + g.S - 1) // _QUAD)


def _registers(g: Conv2dGeometry, beside: Any) -> Any:
    """Registers that a thread is to have, so many of them beside."""
    return _VECTOR // 2 * (4 * g.R + g.R * _steps(g) + 2 * _steps(g) + 2) + beside


def _pixels(g: Conv2dGeometry, tile: Tile) -> Any:
    """Columns of x from the first that a block's quads look at to the last."""
    return (tile.quads - 1 + _steps(g)) * _QUAD


def _pitch(tile: Tile) -> Any:
    """kPitch, in bytes."""
    return (tile.channels // _PIECE | 1) * VECTOR_BYTES


def _copies(g: Conv2dGeometry, tile: Tile) -> Any:
    """Of a thread and row."""
    return -(-tile.images * _pixels(g, tile) * (tile.channels // _PIECE) // (32 * tile.warps))


def _shared_bytes(g: Conv2dGeometry, tile: Tile) -> Any:
    """The ring of rows, the weights of a block's channels, and the rows of outputs, idle quads included."""
    ring = tile.stages * tile.images * _pixels(g, tile)
    outputs = 2 * tile.warps // tile.groups * _QUADS * _QUAD
    return (ring + outputs) * tile.batch * _pitch(tile) + g.R * g.S * tile.channels * _SIZE


def _cost(g: Conv2dGeometry, target: Target, tile: Tile) -> Any:
    """What ranks tiles: clocks of a multiprocessor for all of the outputs.

    The weights were fitted to the times of 500 tiles (18 cases in float16 on an H200): of those measured, the tile of
    least cost takes 2 % longer than the fastest on average, and at most 13 %, of 8 images.
    """
    of_an_image = -(-g.K // tile.channels) * -(-g.Q // (tile.quads * _QUAD)) * -(-g.P // tile.rows)
    blocks = of_an_image * -(-g.N // (tile.images * tile.turns)) / target.multiprocessors
    resident = np.minimum(tile.blocks, np.ceil(blocks)) * tile.warps
    products = g.R * _steps(g)
    # A row by one warp alone, and by all warps in turn, which are the later at the barrier the more they are; and what
    # is under way from afar in the meantime.
    by_one = 310 + 130 / tile.batch + 3.2 * products
    row = np.maximum(by_one, resident / 4 * (54 + 7.3 * products)) * (1 + 0.13 * np.log2(tile.warps / 4 + 1))
    row = np.maximum(row, 1400 / (tile.batch * (tile.stages - 1)))
    inputs = tile.rows + g.R - 1
    of_x = np.minimum(inputs, g.H)
    turn = of_x * row + (inputs - of_x) * 130 * np.maximum(1, resident / 8)
    waves = blocks / tile.blocks
    busy = (2400 + 63 * resident + tile.turns * turn) * np.where(waves < 4, np.ceil(waves), waves + 0.27)
    # Short runs of memory take longer, and rows that blocks below each other need are read again.
    memory = 0.111 * (g.y_size + g.x_size * (1 + 0.08 * (inputs / tile.rows - 1))) / target.multiprocessors
    memory = memory * (1 + 0.1 * np.log2(np.maximum(1, 64 / tile.channels)))
    # Barriers are far apart where many warps meet, and near where images have few rows.
    apart = np.where(tile.warps > 4, 2, 0.6) * (of_x >= 14)
    batch = 1 + 0.02 * abs(np.log2(tile.batch) - apart)
    # A launch begins and ends, and blocks hide a part of it for each other.
    alone = 5500 + 1500 / np.minimum(tile.blocks, np.ceil(blocks))
    return (np.maximum(busy, memory) + 0.37 * np.minimum(busy, memory) + alone) * batch
