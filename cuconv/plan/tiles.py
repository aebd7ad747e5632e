"""Tiles, for large kernels at stride 1: see cuda/depthwise_tiles.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from ..geometry import Conv2dGeometry
from . import runs
from .base import (
    DTYPES,
    MAX_GRID,
    SHARED_RESERVE,
    VECTOR_BYTES,
    Plan,
    Target,
    Unsuitable,
    axis_of,
    each_of,
    plane_parameters,
    require_nchw,
    those_of,
    tile_at,
)

# Rows and columns of a thread's tile: of 7 x 14, a plane of 56 x 56 has one for each lane of a warp.
_SHAPES = ((7, 14), (4, 14), (2, 28), (2, 14), (8, 8), (7, 8), (7, 7), (4, 16), (4, 8), (2, 16), (4, 4), (1, 8))
# Taps at a time: fewer take fewer registers, more take fewer loads.
_CHUNKS = (8, 4)
_THREADS = (64, 128, 256)
# Sums and the piece of a row of x that a thread may hold, in registers of 32 bits; the compiler takes 30 to 60 more. At
# 120, which lets tiles of 7 x 14 take 8 taps at a time, some kernels spill.
_MAX_VALUES = 118
# Into so many bands a plane may be cut, each way, beside those of so many tiles.
_BANDS = (1, 2, 3, 4)
_BAND_ITEMS = (1, 4, 8, 16)
_BANKS_BYTES = 128
_WARP = 32
# Offsets within a plane's rows and columns are 32-bit integers, those behind the last row too.
_MAX_EXTENT = 2**30


@dataclass(frozen=True, slots=True)
class Tile:
    """What one thread makes, and what one block makes of it."""

    rows: int  # of a thread's tile
    columns: int
    chunk: int  # taps at a time
    vector: int  # values of one load of a row of x in shared memory
    in_vector: int  # elements of one load of x and one store of y
    out_vector: int
    row_items: int  # tiles of a block in one plane
    column_items: int
    block_planes: int
    threads: int
    block_rows: int  # rows of x that one plane of a block needs at most
    pitch: int  # values from one of them to the next
    passes: float  # over the banks of shared memory, of one load of x by a warp
    block_channels: int
    channel_pitch: int
    value_bytes: int

    @property
    def shared_bytes(self) -> int:
        x = (self.block_planes * self.block_rows + 1) * self.pitch
        w = self.block_channels * self.channel_pitch
        return (x + w) * self.value_bytes + self.block_planes * 8


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, turned: bool = False) -> Plan:
    require_nchw(g)
    if g.R * g.S <= runs.MAX_TAPS:
        raise Unsuitable(f"takes more than {runs.MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    if g.stride != (1, 1) or g.dilation != (1, 1):
        raise Unsuitable(f"takes stride 1 and dilation 1, and has {g.stride} and {g.dilation}")
    extent = max(g.H, g.W, g.P, g.Q, *(abs(side) for sides in g.padding for side in sides))
    if extent > _MAX_EXTENT or g.N * g.K > MAX_GRID[0]:
        raise Unsuitable(
            f"takes extents of at most {_MAX_EXTENT} and {MAX_GRID[0]} planes, not {extent} and {g.N * g.K}"
        )
    best = _cheapest(g, dtype, target, aligned)
    if best is None:
        raise Unsuitable(f"no tile of {g.R} x {g.S} taps of {dtype} fits shared memory and one launch")
    return tile_plan(g, dtype, best, turned)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    """The plan of dx as a convolution of dy."""
    return forward(runs.dense_dgrad_as_forward(g), dtype, target, aligned, turned=True)


def tile_plan(g: Conv2dGeometry, dtype: str, tile: Tile, turned: bool = False) -> Plan:
    return Plan(
        source="depthwise_tiles",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("ROWS", tile.rows),
            ("COLUMNS", tile.columns),
            ("CHUNK", tile.chunk),
            ("WHOLE", int(g.S >= tile.chunk)),
            ("TAIL", g.S % tile.chunk),
            ("VECTOR", tile.vector),
            ("IN_VECTOR", tile.in_vector),
            ("OUT_VECTOR", tile.out_vector),
            ("TURNED", int(turned)),
            ("THREADS", tile.threads),
        ),
        grid=_grid(g, tile),
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("multiplier", g.multiplier),
            ("N", g.N),
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("planes", g.N * g.K),
            ("block_planes", tile.block_planes),
            ("block_channels", tile.block_channels),
            ("row_items", tile.row_items),
            ("column_items", tile.column_items),
            ("block_rows", tile.block_rows),
            ("pitch", tile.pitch),
            ("channel_pitch", tile.channel_pitch),
        ),
    )


def tiles(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Iterator[Tile]:
    """The tiles that registers and shared memory hold, and one launch can count."""
    budget = target.shared_per_block - SHARED_RESERVE
    return filter(lambda tile: tile.shared_bytes <= budget, map(_pitched, each_of(*_table(g, dtype, target, aligned))))


def _cheapest(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Tile | None:
    """The tile of least cost, the first one of equals.

    Pitches take long to find, and no tile costs less with one than without.
    """
    table = those_of(*_table(g, dtype, target, aligned))
    # Exponentials of an array may differ from a number's in the last bit.
    bounds = cost(g, target, table) * (1 - 1e-12)
    best, least = None, (math.inf, 0)
    # In order of their bounds; sorting all of them would take longer than looking at the first few.
    while bounds.size:
        place = int(bounds.argmin())
        if bounds[place] > least[0] or bounds[place] == math.inf:
            break
        bounds[place] = math.inf
        tile = _pitched(tile_at(table, (place,)))
        if tile.shared_bytes <= target.shared_per_block - SHARED_RESERVE:
            best, least = min((best, least), (tile, (float(cost(g, target, tile)), place)), key=lambda found: found[1])
    return best


def _table(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> tuple[Tile, Any]:
    """All tiles as one of arrays, without their pitches, and which of them fit: axes are shapes and chunks, columns of
    tiles, rows of tiles, threads, and parts of the planes that there are threads for."""
    size = DTYPES[dtype][1]
    value_bytes = max(4, size)
    widest = VECTOR_BYTES // value_bytes
    # More elements a load would be more than a thread holds of several loads.
    of_global = min(4, VECTOR_BYTES // size) if aligned else 1
    budget = target.shared_per_block - SHARED_RESERVE
    shapes = [
        (*shape, chunk) for shape, chunk in product(_SHAPES, _CHUNKS) if chunk <= _CHUNKS[-1] or g.S > _CHUNKS[-1]
    ]
    rows, columns, chunk = axis_of(zip(*shapes, strict=True), 4)
    column_items = axis_of((_band_items(-(-g.Q // columns)) for _, columns, _ in shapes), 3)
    row_items = axis_of((_band_items(-(-g.P // rows)) for rows, _, _ in shapes), 2)[:, None]
    threads, parts = axis_of(_THREADS, 1), axis_of((2, 1), 0)
    items = row_items * column_items
    vector: Any = np.where(column_items > 1, np.gcd(columns, widest), widest)
    most = np.minimum(threads // items, g.N * g.K)
    block_planes = np.maximum(1, -(-most // parts))
    # Of lanes that do not hinder each other.
    fewest_passes: Any = _WARP * value_bytes * vector / _BANKS_BYTES
    table = Tile(
        rows=rows,
        columns=columns,
        chunk=chunk,
        vector=vector,
        in_vector=math.gcd(g.W, of_global),
        out_vector=np.gcd(math.gcd(g.Q, of_global), columns),
        row_items=row_items,
        column_items=column_items,
        block_planes=block_planes,
        threads=threads,
        block_rows=np.minimum(g.H, row_items * rows + g.R - 1),
        pitch=_up((column_items - 1) * columns + _up(columns + g.S - 1, vector), widest),
        passes=fewest_passes,
        block_channels=_channels(g.N, block_planes),
        # Lanes that read the weights of different channels read them from different banks.
        channel_pitch=(-(-g.S // chunk) * g.R * chunk // widest | 1) * widest,
        value_bytes=value_bytes,
    )
    piece = _up(columns + np.minimum(chunk, g.S) - 1, vector)
    fits = (items <= _THREADS[-1]) & ((rows * columns + piece) * (value_bytes // 4) <= _MAX_VALUES)
    fits = fits & ((table.block_rows * table.pitch + g.R * g.S) * value_bytes <= budget)
    # A smaller block has room for as many.
    fits = fits & (most > 0) & ((threads == _THREADS[0]) | (2 * most * items > threads))
    fits = fits & ((parts == 1) | (most > 1))
    for blocks, limit in zip(_grid(g, table), MAX_GRID, strict=True):
        fits = fits & (blocks <= limit)
    return table, fits & (table.shared_bytes <= budget)


def _pitched(tile: Tile) -> Tile:
    """The tile with its pitch."""
    pitch, passes = _pitch(
        tile.rows, tile.columns, tile.row_items, tile.column_items, tile.pitch, tile.vector, tile.value_bytes
    )
    return replace(tile, pitch=pitch, passes=passes)


def _grid(g: Conv2dGeometry, tile: Tile) -> tuple[int, int, int]:
    return (
        -(-g.N * g.K // tile.block_planes),
        -(-g.P // (tile.rows * tile.row_items)),
        -(-g.Q // (tile.columns * tile.column_items)),
    )


def _up(count: Any, multiple: Any) -> Any:
    return -(-count // multiple) * multiple


def _band_items(items: int) -> list[int]:
    """Of so many tiles side by side, how many a block may take; then more than any takes."""
    choices = {-(-items // bands) for bands in _BANDS} | {n for n in _BAND_ITEMS if n < items}
    return sorted(choices) + [_THREADS[-1] + 1] * (len(_BANDS) + len(_BAND_ITEMS) - len(choices))


def _channels(images: int, planes: Any) -> Any:
    """How many channels at most so many neighbouring planes belong to, the images of a channel being neighbours."""
    some = np.where(images % planes == 0, 1, (planes - 2) // images + 2)
    return np.where(planes % images == 0, planes // images, some)


@lru_cache(maxsize=4096)
def _pitch(
    rows: int, columns: int, row_items: int, column_items: int, least: int, vector: int, value_bytes: int
) -> tuple[int, float]:
    """From `least` on, the first pitch at which the lanes of a warp hinder each other least when they load x, and how
    often such a load passes over the banks."""
    widest = VECTOR_BYTES // value_bytes
    best = (math.inf, least)
    for pitch in range(least, least + _BANKS_BYTES // value_bytes, widest):
        best = min(best, (_passes(rows, columns, row_items, column_items, pitch, vector, value_bytes), pitch))
    return best[1], best[0]


def _passes(
    rows: int, columns: int, row_items: int, column_items: int, pitch: int, vector: int, value_bytes: int
) -> float:
    # As many lanes at a time as can load 128 bytes together; of these, lanes hinder each other in the same bank.
    width = vector * value_bytes
    units = _BANKS_BYTES // width
    lanes = min(_WARP, row_items * column_items)
    passes = 0
    for first in range(0, lanes, units):
        banks: dict[int, set[int]] = {}
        for lane in range(first, min(lanes, first + units)):
            unit = (lane // column_items * rows * pitch + lane % column_items * columns) // vector
            banks.setdefault(unit % units, set()).add(unit)
        passes += max(map(len, banks.values()))
    # Lanes of other planes, where a plane has fewer tiles than a warp has lanes, are taken to do as those of the first.
    return passes * _WARP / lanes if lanes % units == 0 else passes * _WARP / (_up(lanes, units))


def cost(g: Conv2dGeometry, target: Target, tile: Tile) -> Any:
    """What ranks tiles: clocks of a multiprocessor, by a count of instructions and of passes over shared memory.

    Beside what is counted it guesses, with nothing measured yet: how often schedulers with few warps wait, two passes
    for a load of one address by all lanes, and what a load from memory takes.
    """
    words = tile.value_bytes // 4
    widest = VECTOR_BYTES // tile.value_bytes
    issue = shared = 0.0
    tail = g.S % tile.chunk
    for chunks, taps in ((g.S // tile.chunk, tile.chunk), (np.minimum(tail, 1), tail)):
        x_loads = -(-(tile.columns + taps - 1) // tile.vector)
        w_loads = tile.rows * -(-taps // widest)
        # Multiplications in float64 take two slots each; a row's loop takes 20 instructions beside the loads.
        issue = issue + chunks * g.R * (tile.rows * tile.columns * taps * words + w_loads)
        issue = issue + chunks * (g.R + tile.rows - 1) * (x_loads + 20)
        shared = shared + chunks * ((g.R + tile.rows - 1) * x_loads * tile.passes + 2 * g.R * w_loads)
    warps = tile.threads // _WARP
    loads = tile.block_planes * tile.block_rows * g.W / tile.in_vector / tile.threads
    issue = issue + loads * (30 + 8 * tile.in_vector) + tile.rows * tile.columns * 4
    values = (tile.rows * tile.columns + tile.columns + tile.chunk) * words
    registers = _up(np.floor(values * 1.1) + 30, 8)
    by_shared = target.shared_per_multiprocessor // (tile.shared_bytes + SHARED_RESERVE)
    resident = np.minimum(by_shared, np.minimum(2048 // tile.threads, 65536 // (registers * tile.threads)))
    turns = -(-math.prod(_grid(g, tile)) // target.multiprocessors)
    at_once = np.maximum(1, np.minimum(resident, turns)) * warps
    busy = 1 - np.exp(-0.3 * at_once)
    # Of four schedulers, the one with most warps is waited for.
    uneven = -(-at_once // 4) * 4 / at_once
    clocks = turns * warps * np.maximum(issue / 4, shared) * uneven / busy
    return clocks + 0.2 * turns * warps * np.minimum(issue / 4, shared) + 2000 * turns / np.maximum(1, resident)
