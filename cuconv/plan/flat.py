"""Planes as they lie in memory, for compute capability 9.0 and newer: see cuda/flat.cuh and cuda/depthwise_flat.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..geometry import Conv2dGeometry
from .base import DTYPES, MAX_GRID, SHARED_RESERVE, Plan, Target, Unsuitable, require_nchw
from .runs import MAX_TAPS, dgrad_as_forward

_SIZE = 2
# Elements of 16 bytes, and units of a product: kChunk and kUnits of cuda/flat.cuh.
CHUNK, UNITS = 8, 16
# kMargin of cuda/flat.cuh.
MARGIN = 32
# A window is three chunks at most; kernels are unrolled over their rows.
_MOST_ROWS, _MOST_COLUMNS = 8, CHUNK + 2
# Outputs of a warp in the fastest tiles, and of a plane where it is small.
_OUTPUTS_OF_WARP, _SMALL = 2200, 1500
# The longest rows, and the fewest elements of an array, that were measured, rounded.
_WIDEST, _MOST_OF_SMALL_LAUNCHES = 320, 2**22
# Results are stored by words, so that units start at even elements.
_SHIFTS = range(0, CHUNK, 2)
_THREADS = (32, 64, 128)
_STAGES = (1, 2)
_IMAGES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block makes: some rows of one channel, of so many images in turn."""

    block_rows: int
    block_images: int
    threads: int
    stages: int
    outputs: int
    input_bytes: int  # of one image
    output_bytes: int

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.input_bytes + self.outputs * self.output_bytes


def require_flat(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> None:
    """Refuse what does not have every input and output at the same place of its plane."""
    require_nchw(g)
    if DTYPES[dtype][1] != _SIZE:
        raise Unsuitable(f"takes float16 and bfloat16, and the dtype is {dtype}")
    if target.architecture < 90:
        raise Unsuitable(f"needs compute capability 9.0, and the device has {target.architecture / 10}")
    if g.multiplier > 1 or g.stride != (1, 1) or g.dilation != (1, 1) or (g.P, g.Q) != (g.H, g.W):
        raise Unsuitable(
            "takes one output channel an input channel, stride 1, dilation 1 and a y of x's extents; has "
            f"{g.multiplier}, {g.stride}, {g.dilation} and {g.P} x {g.Q} of {g.H} x {g.W}"
        )
    if g.R * g.S > MAX_TAPS or g.R > _MOST_ROWS or g.S > min(g.W, _MOST_COLUMNS):
        raise Unsuitable(
            f"takes {MAX_TAPS} taps of up to {_MOST_ROWS} rows and {_MOST_COLUMNS} columns, and no more of these than "
            f"x has, and the kernel has {g.R} x {g.S} of rows of {g.W}"
        )
    if not aligned:
        raise Unsuitable("takes arrays that start at multiples of 16 bytes")
    if g.K > MAX_GRID[1]:
        raise Unsuitable(f"{g.K} channels are more than one launch can count")


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_runs: rows of an odd number of elements, of enough of them.

    On an H200, percent of the memory floor by this, in the best tile measured, and by runs: 3x3 on 129x131 88 and 73,
    on 225x225 72 and 54, on 300x301 82 and 74, on 57x57 77 and 62, on 29x29 58 and 57, on 21x21 36 and 48; 5x5 on
    129x131 70 and 37, on 57x57 54 and 34, on 29x29 41 and 33.
    """
    return _measured(g, dtype, 29)


def beats_others_of_wgrad(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Likewise, percent by depthwise_wgrad_flat, in the best tile measured, and by depthwise_wgrad_runs.

    3x3 on 129x131 80 and 53, on 225x225 52 and 40, on 57x57 57 and 41, on 29x29 35 and 43; 5x5 on 57x57 45 and 24.
    """
    return _measured(g, dtype, 57)


def _measured(g: Conv2dGeometry, dtype: str, narrowest: int) -> bool:
    """Of what the figures are: rows of no less than `narrowest` elements and no fewer of them, kernels of 5x5 at most,
    and launches of more than some microseconds."""
    odd = g.W % 2 == 1 and narrowest <= g.W <= _WIDEST and g.H >= narrowest
    return DTYPES[dtype][1] == _SIZE and odd and g.R * g.S <= 25 and g.y_size >= _MOST_OF_SMALL_LAUNCHES


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _plan(g, dtype, target, aligned, turned=False)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    """The plan of dx as a convolution of dy."""
    require_flat(g, dtype, target, aligned)
    return _plan(dgrad_as_forward(g)[0], dtype, target, aligned, turned=True)


def _plan(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, turned: bool) -> Plan:
    require_flat(g, dtype, target, aligned)
    choices = list(tiles(g, target))
    if not choices:
        raise Unsuitable(f"{g.R} rows of {g.W} elements do not fit shared memory")
    return tile_plan(g, dtype, min(choices, key=lambda tile: _cost(g, target, tile)), turned)


def tile_plan(g: Conv2dGeometry, dtype: str, tile: Tile, turned: bool = False) -> Plan:
    shift, wide = windows(g)
    grid = (-(-g.H // tile.block_rows), g.K, -(-g.N // tile.block_images))
    if any(extent > limit for extent, limit in zip(grid, MAX_GRID, strict=True)):
        raise Unsuitable(f"{grid} blocks are more than one launch can count")
    return Plan(
        source="depthwise_flat",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("LEFT", g.padding[1][0]),
            ("TURNED", int(turned)),
            ("WIDE", wide),
            ("THREADS", tile.threads),
            ("STAGES", tile.stages),
            ("OUTPUTS", tile.outputs),
        ),
        grid=grid,
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("K", g.K),
            ("H", g.H),
            ("W", g.W),
            ("top", g.padding[0][0]),
            ("shift", shift),
            ("images", g.N),
            ("block_rows", tile.block_rows),
            ("block_images", tile.block_images),
            ("input_bytes", tile.input_bytes),
            ("output_bytes", tile.output_bytes),
            ("total_x", g.x_size),
        ),
    )


def windows(g: Conv2dGeometry) -> tuple[int, int]:
    """Where units start in a chunk, and the kernel rows, as bits, whose windows then reach into a third chunk: as few
    as can be."""

    return min(((shift, wide_windows(g, shift)) for shift in _SHIFTS), key=lambda choice: choice[1].bit_count())


def wide_windows(g: Conv2dGeometry, shift: int) -> int:
    """The kernel rows, as bits, whose windows reach into a third chunk where units start so far behind a chunk."""
    places = [(shift - g.padding[1][0] + (r - g.padding[0][0]) * g.W) % CHUNK for r in range(g.R)]
    return sum(1 << r for r, place in enumerate(places) if place + CHUNK - 1 + g.S > 2 * CHUNK)


def whole(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def tiles(g: Conv2dGeometry, target: Target) -> Iterator[Tile]:
    """Those that fit the device's shared memory."""
    budget = target.shared_per_block - SHARED_RESERVE
    parts = sorted({-(-g.H // n) for n in range(1, g.H + 1)})
    for rows, threads, stages, images in product(parts, _THREADS, _STAGES, _IMAGES):
        if stages > images or images > max(1, g.N) or rows * g.W > budget:
            continue
        # A margin, the rows of x from any place of a chunk on, and what windows reach beyond; results likewise.
        inputs, outputs = MARGIN + (rows + g.R - 1) * g.W + 8 * CHUNK, rows * g.W + 4 * CHUNK
        tile = Tile(
            block_rows=rows,
            block_images=images,
            threads=threads,
            stages=stages,
            outputs=stages,
            input_bytes=whole(inputs * _SIZE, 128),
            output_bytes=whole(outputs * _SIZE, 128),
        )
        if tile.shared_bytes <= budget:
            yield tile


def products_length(outputs: int, warps: int) -> int:
    """Units that each of 16 lanes of a warp goes through, at most: an odd number."""
    return -(-(outputs + 2 * CHUNK) // (CHUNK * UNITS * warps)) // 2 * 2 + 1


def edge_instructions(g: Conv2dGeometry, rows: int) -> int:
    """Of all warps that make the ends of so many rows."""
    return -(-2 * rows // 32) * (12 + 4 * (g.S - 1) * g.R)


def _cost(g: Conv2dGeometry, target: Target, tile: Tile) -> float:
    """What ranks tiles, by what the fastest of 480 have in common (3x3 and 5x5, rows of 15 to 301, on an H200).

    That is some 2,200 outputs a warp, few rows read twice, many blocks on a multiprocessor, one image a block, and two
    of small planes.
    """
    outputs, images = tile.block_rows * g.W, tile.block_images
    row_groups = -(-g.H // tile.block_rows)
    filled = row_groups * g.K * -(-g.N // images) / target.multiprocessors
    halo = (tile.block_rows + g.R - 1) / tile.block_rows if row_groups > 1 else 1.0
    idle = row_groups * tile.block_rows / g.H
    resident = target.shared_per_multiprocessor // (tile.shared_bytes + SHARED_RESERVE)
    resident = max(1, min(32, 2048 // tile.threads, resident))
    preferred = 2 if g.H * g.W < _SMALL and g.N > 1 else 1
    turns = 1 + 0.05 * abs(math.log2(images / preferred)) + 0.03 * (tile.stages - 1)
    uneven = 1 + 0.06 * abs(math.log2(outputs * 32 / tile.threads / _OUTPUTS_OF_WARP))
    return (1 + halo) * idle * uneven * (1 + 0.6 / resident) * turns / min(1, filled)
