"""Gradients of the weights and the bias of channels-last arrays, through shared memory: see
cuda/depthwise_wgrad_channels_last_staged.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from .channels_last import MAX_TAPS
from .wgrad import WgradPlan, clustered, slabs_of_cluster, sum_bytes, with_reduce

_COLUMNS = (14, 8, 7, 6, 5, 4, 3, 2, 1)
# Of narrow outputs a strip may be as wide as they are: which columns are padding is then known at compile time.
_MAX_WIDTH = 16
# Of elements of dy, those that are done before the device is full: a second launch is a good part of the time then.
_SMALL = 2**19
# Of a cluster: to add more sums takes longer than a second launch.
_FEW_TAPS = 25
_STAGES = (3, 4, 6, 8)
_IMAGES = (1, 2, 3, 4, 8, 16)
_STRIPS = (1, 2, 3, 4, 6, 8, 12, 16)
# Of a row of strips.
_MAX_PARTS = 16
_MAX_THREADS = 512
# Of fewer a block may be where it has all channels that it can have.
_LEAST_THREADS = 96
# Of a thread: beyond, the compiler spills, and it does so where small tiles are allowed fewer.
_LEAST_REGISTERS, _MAX_REGISTERS = 96, 232
# Multiplications of the unrolled turns: beyond, the code outgrows the instruction cache and takes seconds to compile.
_MAX_PRODUCTS = 2800
# What a stage of shared memory ends with, kWords of the kernel; and of what it is a multiple, so that a line of memory
# is not copied to parts of two.
_WORD_BYTES, _LINE_BYTES = 8, 128
# What a turn brings is told by a bit for every row of dy that a row of x meets, and for every row of x: see kImagesBit.
_MAX_BITS = 20
# Rows of x of a turn that may have phases of their own: see kPhaseBits.
_MAX_RUNS = 9
# At larger strides neighbouring columns share little.
_MAX_STRIDE = 2


@dataclass(frozen=True, slots=True)
class Tile:
    """A thread takes strips of `columns` columns of dy of `vector` channels; a block `groups` vectors of channels of
    `strips` strips of each of `images` images, `stages` turns in shared memory, and of all their rows `slab_rows`.

    The rows of a strip are spacing[0] apart, and as a convolution of their own have stride[0]; columns likewise.
    """

    vector: int
    groups: int
    columns: int
    strips: int
    images: int
    stages: int
    blocks: int
    slab_rows: int
    copy: int
    stride: Pair
    spacing: Pair
    runs: bool = False

    @property
    def channels(self) -> int:
        return self.vector * self.groups

    @property
    def threads(self) -> int:
        """Of a block: whole warps."""
        return -(-self.groups * self.strips * self.images // 32) * 32


def channels_last_staged(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of dy is read once, and of x but for the columns that neighbouring blocks share."""
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
    if not (aligned or size == 4):
        raise Unsuitable("copies words of 4 bytes, and elements of 2 bytes do not start at a multiple of that")
    table, fits = _table(g, dtype, bias, target, aligned)
    best = cheapest_of(table, fits, _cost(g, dtype, bias, target, table))
    if best is None:
        raise Unsuitable(f"{g.R} x {g.S} taps on rows of {g.W} columns do not fit registers and shared memory")
    return tile_plan(g, dtype, bias, target, best)


def _copy(g: Conv2dGeometry, size: int, aligned: bool) -> int:
    return math.gcd(g.K * size, VECTOR_BYTES) if aligned else size


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> WgradPlan:
    """The plan of one choice of tiles()."""
    size = DTYPES[dtype][1]
    column_blocks = -(-_column_items(g, tile) // tile.strips)
    strip_rows, rows = _rows(g, tile)
    slabs = -(-rows // tile.slab_rows)
    beside = -(-g.K // tile.channels) * column_blocks
    cluster = bool(_clustered(g, target, tile, slabs))
    grid = (slabs, beside, 1) if cluster else (beside, slabs, 1)
    if any(count > most for count, most in zip(grid, MAX_GRID, strict=True)) or rows > MAX_GRID[0]:
        raise Unsuitable(f"a grid of {grid} blocks is more than one launch can have")
    x_pixels, dy_pixels = map(int, _pixels(g, tile))
    largest = tile.images * max(g.H * g.W, g.P * g.Q) * g.K
    if largest > MAX_GRID[0] or tile.images * max(x_pixels, dy_pixels) + tile.threads > MAX_DIVIDEND:
        raise Unsuitable(f"{g.H} x {g.W} pixels of {g.K} channels are more than it can count")
    x_size, dy_size = map(int, _sizes(g, tile, size))
    whole = _whole(g, tile)
    sums = Plan(
        source="depthwise_wgrad_channels_last_staged",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("BIAS", int(bias)),
            ("FINAL", int(cluster or slabs * column_blocks == 1)),
            ("CLUSTER", slabs if cluster else 1),
            ("THREADS", tile.threads),
            ("BLOCKS", tile.blocks),
            ("VECTOR", tile.vector),
            ("GROUPS", tile.groups),
            ("COLUMNS", tile.columns),
            ("STAGES", tile.stages),
            ("COPY", tile.copy),
            ("X_COPIES", _copies(tile, x_size, size)),
            ("DY_COPIES", _copies(tile, dy_size, size)),
            ("STRIDE_H", tile.stride[0]),
            ("STRIDE_W", tile.stride[1]),
            ("RUNS", int(tile.runs)),
            ("DILATED", int(g.dilation != (1, 1))),
            ("WIDTH", g.W if whole else 0),
            ("LEFT", g.padding[1][0] if whole else 0),
        ),
        grid=grid,
        block=tile.threads,
        shared_bytes=int(_shared_bytes(g, dtype, bias, tile, cluster)),
        parameters=(
            ("N", g.N),
            ("K", g.K),
            *plane_parameters(g),
            ("spacing_h", tile.spacing[0]),
            ("spacing_w", tile.spacing[1]),
            ("strips", tile.strips),
            ("images", tile.images),
            ("column_blocks", column_blocks),
            ("x_pixels", x_pixels),
            ("dy_pixels", dy_pixels),
            ("x_size", x_size),
            ("dy_size", dy_size),
            ("stage_size", int(_stage_bytes(g, tile, size)) // size),
            ("x_plane", g.H * g.W * g.K),
            ("dy_plane", g.P * g.Q * g.K),
            ("x_line", g.dilation[0] * g.W * g.K),
            ("x_down", tile.spacing[0] * g.stride[0] * g.W * g.K),
            ("dy_down", tile.spacing[0] * g.Q * g.K),
            ("down", tile.spacing[0] * g.stride[0]),
            ("strip_rows", strip_rows),
            ("rows", rows),
            ("slab_rows", tile.slab_rows),
            ("strips_magic", magic(tile.strips)),
            ("x_pixels_magic", magic(x_pixels)),
            ("dy_pixels_magic", magic(dy_pixels)),
        ),
    )
    slabs *= column_blocks
    return WgradPlan(sums, None, 0) if slabs == 1 or cluster else with_reduce(sums, slabs, g, dtype, bias)


def tiles(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> Iterator[Tile]:
    """The tiles that a thread's registers and a block's shared memory hold."""
    return iter(dict.fromkeys(each_of(*_table(g, dtype, bias, target, aligned))))


def _table(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> tuple[Tile, Any]:
    """All tiles as one of arrays, some of them several times, and which of them fit."""
    size = DTYPES[dtype][1]
    copy = _copy(g, size, aligned)
    of_thread = those_of(*_threads(g, size, copy, aligned), 2)
    of_block = those_of(*_blocks(g, of_thread, copy // size), 1)
    stages: Any = axis_of(_STAGES, 0)
    staged = replace(of_block, stages=stages)
    shared = _shared_bytes(g, dtype, bias, staged)
    resident = np.minimum(
        target.shared_per_multiprocessor // (shared + SHARED_RESERVE),
        # Registers are in four parts, each of 512 for a warp's every thread, and are given out by eights.
        np.minimum(4 * (512 // _registers(g, staged)) // (staged.threads // 32), 2048 // staged.threads),
    )
    fits = (shared <= target.shared_per_block - SHARED_RESERVE) & (resident >= 1)
    return _slabs(g, target, those_of(replace(staged, blocks=resident), fits, 1))


def _threads(g: Conv2dGeometry, size: int, copy: int, aligned: bool) -> tuple[Tile, Any]:
    """The tiles of one thread, and which of them its registers hold."""
    # Rows this far apart read rows that are whole dilations apart, so that they can share them.
    common = [math.gcd(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)]
    spacing = (g.dilation[0] // common[0], g.dilation[1] // common[1])
    # Of a longer stride, no more rows than the kernel has meet dy.
    stride = (min(g.stride[0] // common[0], g.R), g.stride[1] // common[1])
    widest = math.gcd(g.K, VECTOR_BYTES // size) if aligned else 1
    columns_choices = [n for n in _COLUMNS if n == 1 or (stride[1] <= _MAX_STRIDE and (n - 1) * spacing[1] < g.Q)]
    # Few columns share little, too.
    columns_choices = [n for n in columns_choices if n >= 3] or columns_choices
    if g.Q not in columns_choices and stride[1] <= _MAX_STRIDE and _narrow(g):
        columns_choices.append(g.Q)
    columns, vector, runs = (
        axis_of(columns_choices, 2),
        axis_of([vector for vector in (4, 2, 1) if widest % vector == 0], 1),
        axis_of((False, True), 0).astype(bool),
    )
    copies: Any = np.where(runs, VECTOR_BYTES, copy)
    stride_w: Any = np.where(columns > 1, stride[1], 1)
    spacing_w: Any = np.where(columns > 1, spacing[1], 1)
    thread = Tile(
        vector=vector,
        groups=1,
        columns=columns,
        strips=1,
        images=1,
        stages=2,
        blocks=1,
        slab_rows=1,
        copy=copies,
        stride=(stride[0], stride_w),
        spacing=(spacing[0], spacing_w),
        runs=runs,
    )
    ring = _ring(g, thread)
    products = g.R * g.S * columns * vector * ring
    small = (_registers(g, thread) <= _MAX_REGISTERS) & (products <= _MAX_PRODUCTS)
    # One column of one channel is a tile whatever it takes.
    fits = (small | ((columns == 1) & (vector == 1))) & (ring + stride[0] <= _MAX_BITS)
    some_runs = copy < VECTOR_BYTES and aligned and g.dilation == (1, 1) and stride[0] <= _MAX_RUNS
    fit_runs = some_runs & (g.K // vector <= _MAX_THREADS)
    return thread, fits & np.where(runs, fit_runs, copy >= 4)


def _blocks(g: Conv2dGeometry, thread: Tile, piece: int) -> tuple[Tile, Any]:
    """The tiles with the channels, and the strips and images, of a block, on two more axes; and which there are."""
    choices = _channel_choices(g.K, piece)
    most = np.where(thread.runs, g.K, choices[-1])
    channels = axis_of(sorted({*choices, g.K}), 1)
    # Strips of even parts of rows, or of whole ones, here 0, which several images may have.
    part = axis_of((*_STRIPS, *(0 for _ in _IMAGES)), 0)
    images = axis_of((*(1 for _ in _STRIPS), *_IMAGES), 0)
    column_items = _column_items(g, thread)
    strips: Any = np.where(part > 0, part, column_items)
    parts = -(-column_items // strips)
    even = (strips < column_items) & (parts <= _MAX_PARTS) & (-(-column_items // parts) == strips)
    tile = replace(thread, groups=channels // thread.vector, strips=strips, images=images)
    fits = (channels % thread.vector == 0) & np.where(thread.runs, channels == g.K, channels <= most)
    fits = fits & ((part == 0) | (even & (g.dilation == (1, 1))))
    fits = fits & ((images == 1) | ((images <= g.N) & np.logical_not(thread.runs)))
    return tile, fits & (tile.threads <= _MAX_THREADS) & ((tile.threads >= _LEAST_THREADS) | (channels == most))


def _slabs(g: Conv2dGeometry, target: Target, tile: Tile) -> tuple[Tile, Any]:
    """The tiles with as many slabs as fill the device, of any rows and of whole strips, or half of it; and with one: on
    one more axis. All of them fit."""
    strip_rows, rows = _rows(g, tile)
    side_by_side = _side_by_side(g, tile)
    blocks = target.multiprocessors * tile.blocks
    once, half = (-(-rows // np.clip(n // side_by_side, 1, MAX_GRID[1])) for n in (blocks, blocks // 2))
    whole_strips = (-(-slab // strip_rows) * strip_rows for slab in (once, half))
    choices = [rows, once, *whole_strips]
    if g.y_size <= _SMALL:
        choices += [-(-rows // np.clip(slabs_of_cluster(side_by_side, blocks) // n, 1, rows)) for n in (1, 2)]
    slab_rows: Any = np.concatenate(choices, axis=1)
    return replace(tile, slab_rows=slab_rows), np.ones(slab_rows.shape, bool)


def _clustered(g: Conv2dGeometry, target: Target, tile: Tile, slabs: Any) -> Any:
    """Whether so many slabs are a cluster, which is for few elements and sums, and for blocks of all columns."""
    possible = g.y_size <= _SMALL and g.R * g.S <= _FEW_TAPS and target.architecture >= 90
    held = target.multiprocessors * tile.blocks
    return possible & (_column_items(g, tile) == tile.strips) & clustered(slabs, -(-g.K // tile.channels), held)


def _whole(g: Conv2dGeometry, tile: Tile) -> Any:
    """Whether a strip is as wide as dy, and x narrow enough for its width to be known at compile time."""
    return (tile.columns == g.Q) & np.logical_not(tile.runs) & _narrow(g)


def _narrow(g: Conv2dGeometry) -> bool:
    return g.dilation == (1, 1) and g.W <= _MAX_WIDTH * g.stride[1] and g.Q <= _MAX_WIDTH


def _channel_choices(K: int, piece: int) -> list[int]:
    """Channels of a block: divisors of K, or what leaves few threads idle."""
    whole = [n for n in range(piece, min(K, 256) + 1, piece) if K % n == 0 and (16 <= n <= 128 or n == K)]
    some = [n for n in (32, 64, 128) if n < K and n % piece == 0]
    return sorted({*whole, *some}) or [-(-K // piece) * piece]


def _column_items(g: Conv2dGeometry, tile: Tile) -> Any:
    """Strips of an image side by side, one for each of `spacing` beginnings."""
    return -(-g.Q // (tile.columns * tile.spacing[1])) * tile.spacing[1]


def _side_by_side(g: Conv2dGeometry, tile: Tile) -> Any:
    """Blocks of one slab."""
    return -(-g.K // tile.channels) * -(-_column_items(g, tile) // tile.strips)


def _rows(g: Conv2dGeometry, tile: Tile) -> tuple[Any, Any]:
    """Rows of a strip, and of all strips that a block's threads go down together, one after the other."""
    strip_rows = -(-g.P // tile.spacing[0])
    return strip_rows, -(-g.N // tile.images) * tile.spacing[0] * strip_rows


def _ring(g: Conv2dGeometry, tile: Tile) -> Any:
    """kRing: rows of dy that one row of x meets."""
    return -(-g.R // tile.stride[0])


def _span(g: Conv2dGeometry, tile: Tile) -> Any:
    """kSpan: columns of x that a strip needs."""
    return (tile.columns - 1) * tile.stride[1] + g.S


def _pixels(g: Conv2dGeometry, tile: Tile) -> tuple[Any, Any]:
    """Columns of x and of dy from the first that a block's strips need to the last."""
    strip = tile.strips - 1
    last = strip + strip // tile.spacing[1] * (tile.columns - 1) * tile.spacing[1]
    of_dy = last + (tile.columns - 1) * tile.spacing[1] + 1
    of_x = last * g.stride[1] + (_span(g, tile) - 1) * g.dilation[1] + 1
    return np.where(_whole(g, tile), g.W, of_x), of_dy


def _sizes(g: Conv2dGeometry, tile: Tile, size: int) -> tuple[Any, Any]:
    """Elements of a row of x and of one of dy in shared memory."""
    x_pixels, dy_pixels = _pixels(g, tile)
    # Of runs whole copies, those of zeros before the row too; a row begins anywhere in its first.
    piece = VECTOR_BYTES // size
    lead = -(-g.padding[1][0] * g.K // piece)
    of_x, of_dy = (-(-(pixels * g.K + piece - 1) // piece) for pixels in (x_pixels, dy_pixels))
    x_size = np.where(tile.runs, (lead + of_x) * piece, tile.images * x_pixels * tile.channels)
    return x_size, np.where(tile.runs, of_dy * piece, tile.images * dy_pixels * tile.channels)


def _stage_bytes(g: Conv2dGeometry, tile: Tile, size: int) -> Any:
    x_size, dy_size = _sizes(g, tile, size)
    used = (tile.stride[0] * x_size + dy_size) * size + _WORD_BYTES
    return -(-used // _LINE_BYTES) * _LINE_BYTES


def _copies(tile: Tile, elements: Any, size: int) -> Any:
    """Of a thread and row."""
    return -(-elements * size // tile.copy // tile.threads)


def _registers(g: Conv2dGeometry, tile: Tile) -> Any:
    """Registers that a thread is to have: as many with runs as without."""
    span = np.where(_whole(g, replace(tile, runs=False)), g.W, _span(g, tile))
    values = g.R * g.S + 1 + _ring(g, tile) * tile.columns + span
    return np.clip(-(-(values * tile.vector + 44) // 8) * 8, _LEAST_REGISTERS, 255)


def _shared_bytes(g: Conv2dGeometry, dtype: str, bias: bool, tile: Tile, cluster: bool = False) -> Any:
    """For the ring of turns; in the end for the sums of every thread, and in a cluster for the block's."""
    turn = _stage_bytes(g, tile, DTYPES[dtype][1])
    sums = (g.R * g.S + bias) * (tile.images * tile.strips + cluster) * tile.channels * sum_bytes(dtype)
    return np.maximum(tile.stages * turn, sums)


def _met(outputs: int, inputs: int, taps: int, stride: int, dilation: int, before: int) -> float:
    """Of the products of an axis, those with what is no padding."""
    reach = np.arange(taps) * dilation - before
    # Of every tap, the outputs from the first that meets an input to the first behind the last.
    first, behind = (np.clip(-((reach - bound) // stride), 0, outputs) for bound in (0, inputs))
    return float(np.sum(behind - first)) / (outputs * taps)


def _cost(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> Any:
    """What ranks tiles: issue slots an element of dy, and what else takes time in the same unit.

    The weights were fitted to the times of 700 tiles (13 cases in three dtypes on an H200): of those measured, the tile
    of least cost takes 2 % longer than the fastest on average, and at most 20 %.
    """
    size = DTYPES[dtype][1]
    strip_rows, rows = _rows(g, tile)
    side_by_side = _side_by_side(g, tile)
    blocks = -(-rows // tile.slab_rows) * side_by_side
    ring, entries = _ring(g, tile), g.R * g.S + bias
    # Of a block: rows, and turns with those before the first row of x in every strip, or behind its last.
    ends = tile.slab_rows / strip_rows + (tile.slab_rows % strip_rows > 0)
    turns = tile.slab_rows + ends * np.maximum(0, ring - 1 - g.padding[0][1] / (tile.stride[0] * g.dilation[0]))
    x_size, dy_size = _sizes(g, tile, size)
    copies = tile.stride[0] * _copies(tile, x_size, size) + _copies(tile, dy_size, size)
    whole = _whole(g, tile)
    loads = tile.stride[0] * np.where(whole, g.W, _span(g, tile)) + tile.columns
    met_of_row = np.where(whole, _met(g.Q, g.W, g.S, g.stride[1], 1, g.padding[1][0]), 1.0)
    met = _met(g.P, g.H, g.R, g.stride[0], g.dilation[0], g.padding[0][0]) * met_of_row
    outputs = tile.columns * tile.vector
    conversions = 2.4 * tile.vector * (size == 2)
    slots = turns * (48 + 23 * copies + loads * (0.3 + conversions))
    slots += tile.slab_rows * outputs * (g.R * g.S * met + 1)
    slots += 54 + 330 * ends + 22 * entries * tile.vector
    # Unrolled turns come out of an instruction cache.
    code = ring * (g.R * g.S * outputs + 2 * loads * tile.vector + 100)
    slots *= 1 + 0.093 * np.maximum(0.0, np.log(code / 1500))
    # Blocks that the busiest multiprocessor has, and how many of them at once.
    most = -(-blocks // target.multiprocessors)
    active = np.minimum(most, tile.blocks)
    most = np.where(most <= tile.blocks, most, -(-most // tile.blocks) * tile.blocks)
    waves = most * target.multiprocessors / blocks
    busy = 1 - np.exp(-0.22 * active * tile.threads / 32)
    # 128 bytes a pass over the banks of shared memory.
    passes = turns * loads * np.maximum(1, tile.vector * size / 4)
    issue = blocks * tile.threads / g.y_size * (slots / busy + 0.08 * passes)
    # Lines of 128 bytes that two blocks share, or that are copied to parts of two.
    stage = _stage_bytes(g, tile, size)
    moved = blocks * turns * stage * np.where(tile.channels * size % _LINE_BYTES > 0, 1.37, 1.0)
    moved += 2 * blocks * entries * tile.channels * sum_bytes(dtype)
    # The less is on its way to a multiprocessor, the longer the memory takes.
    flight = active * (tile.stages - 1) * stage
    memory = 7 * moved / g.y_size * (1 + 4400 / flight)
    # The second launch, or that blocks of a cluster wait for each other; of few elements, the turns of a block too, one
    # after the other.
    slabs = -(-rows // tile.slab_rows)
    one = (slabs == 1) & (side_by_side * tile.channels < g.K + tile.channels)
    launch = np.where(one, 0.0, np.where(_clustered(g, target, tile, slabs), 1.7e8, 3e8) / g.y_size)
    if g.y_size <= _SMALL:
        launch = launch + 2e7 * turns * (0.7 + outputs / 16) / g.y_size
    return (np.maximum(issue, memory) + 0.27 * np.minimum(issue, memory)) * waves + launch
