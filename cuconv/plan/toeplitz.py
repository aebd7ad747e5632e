"""Toeplitz bands on tensor cores, 16-bit, for compute capability 9.0 and newer: see cuda/depthwise_toeplitz.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
    plane_parameters,
    require_nchw,
)
from .runs import dense_dgrad_as_forward

# A tensor-core product is units x k-steps x outputs of a segment.
_UNITS, _STEP, _SEGMENT = 16, 16, 8
_SIZE = 2
# Bands of up to this many kernel rows stay in registers, two each, and the kernel is unrolled over them. Of more rows,
# it is the rows of x that a kernel row meets.
MAX_HELD_ROWS = 9
# Rows of a patch, four sums each for a thread. 7 and 14 fit the planes that networks have most; held rows of x take
# four registers more each.
_HELD_ROWS = (16, 14, 8, 7, 4)
_RING_ROWS = (8, 7, 4)
# Patches are unrolled over their stride.
_MAX_STRIDE = 4
# A window is longer where the dilation is: 8 k-steps are 16 products for each one of 16 columns.
_MAX_STEPS = 8
_WARPS = (4, 8)
_PLANES = (1, 2, 4, 8, 16)
_IMAGES = (1, 2, 4, 8, 16)
_TURNS = (1, 2, 4, 8)
# Patches of a block one below the other; as many as the plane has, too.
_GROUPS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Window:
    """The columns that a segment needs of a row of x: so many k-steps, of which the first tap is `phase` columns in.

    Rows are laid out with `lead` zeros before them, in vectors of so many elements.
    """

    phase: int
    steps: int
    lead: int
    vector: int


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block makes: a piece of one plane or several whole planes, of several images at once, so many times."""

    window: Window
    rows: int  # of a patch, `spacing` apart
    spacing: int
    stride: int  # of the patch's rows, in units of the dilation
    block_rows: int
    block_planes: int
    block_images: int
    block_turns: int
    block_inputs: int
    row_items: int
    segments: int
    warps: int
    pitch: int
    plane_pitch: int
    layout_bytes: int
    bands_bytes: int
    input_bytes: int  # of one image
    output_bytes: int
    pairs: bool  # whether neighbouring results are stored together
    # Passes over the banks of shared memory for every 8 rows of a fragment.
    passes: float

    @property
    def shared_bytes(self) -> int:
        return self.layout_bytes + self.bands_bytes + self.block_images * (self.input_bytes + self.output_bytes)

    @property
    def products(self) -> int:
        """Products of 16 units for one plane of all images."""
        return -(-self.block_images * self.row_items * self.segments // _UNITS)


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where tensor cores take less time than the multiplications of depthwise_runs.

    On an H200, percent of the floor by toeplitz and by runs in float16: 7x7 on 56x56 55 and 32, on 28x28 43 and 29, on
    14x14 24 and 27; 5x5 on 56x56 48 and 55, on 28x28 49 and 51.
    """
    return DTYPES[dtype][1] == _SIZE and g.R * g.S > 36 and min(g.P, g.Q) >= 24


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, turned: bool = False) -> Plan:
    if DTYPES[dtype][1] != _SIZE:
        raise Unsuitable(f"takes float16 and bfloat16, and the dtype is {dtype}")
    require_nchw(g)
    if target.architecture < 90:
        raise Unsuitable(f"needs compute capability 9.0, and the device has {target.architecture / 10}")
    table, fits = _table(g, aligned, target.shared_per_block - SHARED_RESERVE)
    best = cheapest_of(table, fits, _cost(g, target, table))
    if best is None:
        raise Unsuitable(f"{g.R} rows of {g.W} elements do not fit shared memory")
    return tile_plan(g, dtype, best, turned)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    """The plan of dx as a convolution of dy."""
    return forward(dense_dgrad_as_forward(g), dtype, target, aligned, turned=True)


def tile_plan(g: Conv2dGeometry, dtype: str, tile: Tile, turned: bool = False) -> Plan:
    grid = (
        -(-g.P // tile.block_rows),
        -(-g.K // tile.block_planes),
        -(-g.N // (tile.block_images * tile.block_turns)),
    )
    if any(extent > limit for extent, limit in zip(grid, MAX_GRID, strict=True)):
        raise Unsuitable(f"{grid} blocks are more than one launch can count")
    window = tile.window
    vectors = max(1, (g.W - max(0, -window.lead)) // window.vector)
    return Plan(
        source="depthwise_toeplitz",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R if g.R <= MAX_HELD_ROWS else 0),
            ("TURNED", int(turned)),
            ("MULTIPLIED", int(g.multiplier > 1)),
            ("THREADS", 32 * tile.warps),
            ("ROWS", tile.rows),
            ("STRIDE_H", tile.stride),
            ("VECTOR", window.vector),
            ("PAIRS", int(tile.pairs)),
        ),
        grid=grid,
        block=32 * tile.warps,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("multiplier", g.multiplier),
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("spacing_h", tile.spacing),
            ("steps", window.steps),
            ("phase", window.phase),
            ("lead", window.lead),
            ("pitch", tile.pitch),
            ("plane_pitch", tile.plane_pitch),
            ("layout_bytes", tile.layout_bytes),
            ("bands_bytes", tile.bands_bytes),
            ("input_bytes", tile.input_bytes),
            ("output_bytes", tile.output_bytes),
            ("row_items", tile.row_items),
            ("segments", tile.segments),
            ("image_units_magic", magic(tile.row_items * tile.segments)),
            ("segments_magic", magic(tile.segments)),
            ("spacing_h_magic", magic(tile.spacing)),
            ("steps_magic", magic(window.steps)),
            ("R_magic", magic(g.R)),
            ("dilation_w_magic", magic(g.dilation[1])),
            ("tiles", tile.products),
            ("tiles_magic", magic(tile.products)),
            ("row_shift", min(5, (vectors - 1).bit_length())),
            ("images", g.N),
            ("block_planes", tile.block_planes),
            ("block_inputs", tile.block_inputs),
            ("block_rows", tile.block_rows),
            ("block_images", tile.block_images),
            ("block_turns", tile.block_turns),
        ),
    )


def window_of(g: Conv2dGeometry, aligned: bool) -> Window:
    """The window that needs the fewest k-steps; among these, the one whose rows are laid out by the widest vectors."""
    left = g.padding[1][0]
    span = (_SEGMENT - 1) * g.stride[1] + (g.S - 1) * g.dilation[1] + 1
    steps = -(-span // _STEP)
    widest = math.gcd(g.W, VECTOR_BYTES // _SIZE) if aligned else 1
    for vector in (8, 4, 2, 1):
        phase = -left % vector
        if widest % vector == 0 and span + phase <= steps * _STEP:
            break
    if steps > _MAX_STEPS:
        raise Unsuitable(f"takes kernels of up to {_MAX_STEPS} k-steps of {_STEP} columns, and this one needs {steps}")
    return Window(phase, steps, phase + left, vector)


def tiles(g: Conv2dGeometry, aligned: bool, budget: int) -> Iterator[Tile]:
    """The tiles that fit `budget` bytes of shared memory."""
    return each_of(*_table(g, aligned, budget))


def _table(g: Conv2dGeometry, aligned: bool, budget: int) -> tuple[Tile, Any]:
    """All tiles as one of arrays, and which of them fit: axes are rows of patches and of blocks, planes, images, turns
    and warps."""
    window = window_of(g, aligned)
    common = math.gcd(g.stride[0], g.dilation[0])
    spacing, stride = g.dilation[0] // common, g.stride[0] // common
    if stride > _MAX_STRIDE:
        raise Unsuitable(f"takes a stride of rows of up to {_MAX_STRIDE} between dilated rows, and has {stride}")
    segments = -(-g.Q // _SEGMENT)
    # Columns of x from the first to the last tap of the block, those included that no output needs: of segments and
    # windows that overhang the last column. The zeros before a row are those behind the row above, too.
    needed = (g.Q - 1) * g.stride[1] + (g.S - 1) * g.dilation[1] + 1 + window.phase
    overhang = (segments - 1) * _SEGMENT * g.stride[1] + window.steps * _STEP
    columns = max(g.W + window.lead, needed - max(0, window.lead))
    pieces = axis_of(_pieces(g, spacing, columns, budget), 4).reshape(-1, 5, 1, 1, 1, 1)
    rows, block_rows, row_items, layout_rows, input_rows = pieces.swapaxes(0, 1)
    pitch, plane_pitch, passes = _pitches(g, columns, layout_rows, row_items, segments, rows, spacing)
    planes, images, turns, warps = axis_of(_PLANES, 3), axis_of(_IMAGES, 2), axis_of(_TURNS, 1), axis_of(_WARPS, 0)
    # Output planes that begin in the midst of an input plane's may need one input plane more.
    inputs = np.minimum(planes, (planes - 2) // g.multiplier + 2)
    layout = ((inputs * images - 1) * plane_pitch + (layout_rows - 1) * pitch + np.maximum(pitch, overhang)) * _SIZE
    input_elements = (inputs - 1) * g.H * g.W + input_rows * g.W
    output_elements = (planes - 1) * g.P * g.Q + block_rows * g.Q
    table = Tile(
        window=window,
        rows=rows,
        spacing=spacing,
        stride=stride,
        block_rows=block_rows,
        block_planes=planes,
        block_images=images,
        block_turns=turns,
        block_inputs=inputs,
        row_items=row_items,
        segments=segments,
        warps=warps,
        pitch=pitch,
        plane_pitch=plane_pitch,
        layout_bytes=_line(layout),
        bands_bytes=_line(planes * g.R * window.steps * 256),
        input_bytes=_line(input_elements * _SIZE + VECTOR_BYTES),
        output_bytes=_line(output_elements * _SIZE + VECTOR_BYTES),
        pairs=aligned and g.Q % 2 == 0,
        passes=passes,
    )
    units = images * row_items * segments
    counts = (
        units + _UNITS,
        images * inputs * input_rows,
        planes * g.R * window.steps,
        planes * -(-units // _UNITS),
        np.array(overhang),
    )
    fits = (planes == 1) | ((block_rows == g.P) & (planes <= g.K))
    fits = fits & ((images == 1) | (images < 2 * g.N)) & ((turns == 1) | (turns * images < 2 * g.N))
    for count in counts:
        fits = fits & (count <= MAX_DIVIDEND)
    return table, fits & (table.shared_bytes <= budget) & (warps > 0)


def _pieces(g: Conv2dGeometry, spacing: int, columns: int, budget: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Rows of a patch, rows of a block, its row items, and rows of x that it lays out and that it loads."""
    choices = _HELD_ROWS if g.R <= MAX_HELD_ROWS else _RING_ROWS
    reach = (g.R - 1) * g.dilation[0] + 1
    # Of the patches taller than the plane, the lowest.
    tall = [rows for rows in choices if rows * spacing >= g.P]
    for rows in (rows for rows in choices if rows not in tall[:-1]):
        all_groups = -(-g.P // (rows * spacing))
        for groups in (*(n for n in _GROUPS if n < all_groups), all_groups):
            block_rows = min(g.P, groups * rows * spacing)
            row_items = min(spacing, g.P) if groups == 1 else groups * spacing
            # From the first to the last tap of the block, those included that no output needs: of patches that overhang
            # the last row.
            last_row = (groups * rows - 1) * spacing + min(spacing, row_items) - 1
            layout_rows = last_row * g.stride[0] + reach
            input_rows = min((block_rows - 1) * g.stride[0] + reach, g.H)
            # Both are needed within integers of 32 bits, and far within shared memory.
            if (layout_rows * columns + input_rows * g.W + block_rows * g.Q) * _SIZE <= budget:
                yield rows, block_rows, row_items, layout_rows, input_rows


def _line(size: Any) -> Any:
    """Shared bytes, so that what follows starts at a cache line."""
    return -(-size // 128) * 128


def _pitches(
    g: Conv2dGeometry, columns: int, layout_rows: Any, row_items: Any, segments: int, rows: Any, spacing: int
) -> tuple[Any, Any, Any]:
    """Elements from row to row and from plane to plane of the layout, and the passes over the banks that follow.

    A fragment's rows are windows of 8 units, each 16 bytes of every 128 that the banks hold: units that share a place
    there take turns. A few bytes between rows or planes bring them apart.
    """
    # Two more axes: pitches to choose among, and units by eights.
    units = np.arange(4 * _UNITS).reshape(1, 1, -1, 8)
    layout_rows, row_items, rows = (of_piece.reshape(-1, 1, 1, 1) for of_piece in (layout_rows, row_items, rows))
    image, rest = units // (row_items * segments), units % (row_items * segments)
    item, segment = rest // segments, rest % segments
    row = (item + item // spacing * (rows - 1) * spacing) * g.stride[0]
    least = -(-columns // 8)
    pitch, extra = (choice.reshape(1, -1, 1, 1) for choice in np.divmod(np.arange(2 * 8), 8))
    pitch = least + pitch
    plane_pitch = layout_rows * pitch + extra
    places = (image * plane_pitch + row * pitch + segment * g.stride[1]) % 8
    # How many of eight units share a place: their counts in four bits each.
    counts = (1 << 4 * places).sum(-1, keepdims=True) >> 4 * np.arange(8) & 15
    passes = counts.max(-1).sum(-1) / 8
    # A tenth of a pass is worth a tenth of the memory. Where units are of one image, it does not matter how far planes
    # are apart.
    rank = passes + (plane_pitch / (layout_rows * least))[..., 0, 0]
    rank[(row_items * segments >= 2 * _UNITS)[..., 0, 0] & (extra > 0)[..., 0, 0]] = np.inf
    best = rank.argmin(1)
    chosen = np.arange(len(best)), best
    of_best = (8 * np.broadcast_to(pitch, plane_pitch.shape)[..., 0, 0][chosen], 8 * plane_pitch[..., 0, 0][chosen])
    return tuple(values.reshape(-1, 1, 1, 1, 1) for values in (*of_best, passes[chosen]))


def _cost(g: Conv2dGeometry, target: Target, tile: Tile) -> Any:
    """What ranks tiles: clocks of a multiprocessor for an output, by a count of what each of its parts has to do.

    The weights were fitted to the times of 700 tiles (10 cases in float16 on an H200): of those measured, the tile of
    least cost takes 3 % longer than the fastest on average, and at most 16 %.
    """
    window, threads = tile.window, 32 * tile.warps
    items = tile.block_planes * tile.products
    images = np.minimum(tile.block_images, g.N)
    row_groups = -(-g.P // tile.block_rows)
    # The last block of a plane has few rows left, the last turn few images.
    turns = g.N / tile.block_images
    outputs = tile.block_planes * images * g.P / row_groups * g.Q * turns / np.ceil(turns)
    outputs *= g.K / tile.block_planes / np.ceil(g.K / tile.block_planes)
    held = g.R <= MAX_HELD_ROWS
    span = (tile.rows - 1) * tile.stride + g.R
    # Warps with nothing to do in the last round.
    uneven = -(-items // tile.warps) * tile.warps / items
    products = items * tile.rows * g.R * window.steps * uneven
    fragments = items * span * window.steps * uneven
    bands = items * g.R * window.steps * uneven
    laid_rows = tile.block_inputs * images * np.minimum((tile.block_rows - 1) * g.stride[0] + g.R, g.H)
    vectors = max(1, g.W // window.vector)
    lanes = 1 << min(5, (vectors - 1).bit_length())
    laid = laid_rows * -(-vectors // lanes) * lanes / 32
    stores = items * tile.rows * (1 if tile.pairs else 2) * uneven
    issue = products + 2 * fragments + bands + 3.3 * laid + 4.9 * laid_rows * lanes / 32 + 7.1 * stores
    issue += 594 * items * uneven
    passes = 4 * tile.passes * fragments + 2 * bands + laid * (2 + 0.07 * window.vector) + stores / 2
    moved = (laid_rows * g.W + outputs) * _SIZE
    registers = np.minimum(255, 65 + (4 * tile.rows + 2 * g.R if held else 8 * tile.rows))
    by_shared = target.shared_per_multiprocessor // (tile.shared_bytes + SHARED_RESERVE)
    resident = np.maximum(1, np.minimum(by_shared, np.minimum(2048 // threads, 65536 // registers // threads)))
    busy = 1 - np.exp(-0.6 * resident * tile.warps / 4)
    # For a block: zeros, bands, and the first load, which nothing overlaps but other blocks.
    begin = 1.8 * (tile.layout_bytes / 128 + 2.5 * tile.bands_bytes / 128) + 4000 / resident
    # A turn's barriers and the stores' tail.
    turn = (3.2 * products + issue / 4 + 0.25 * passes) / busy + 0.34 * moved / 18 + 2090 / resident
    blocks = row_groups * -(-g.K // tile.block_planes) * -(-g.N // (tile.block_images * tile.block_turns))
    waves = blocks / (target.multiprocessors * resident)
    return (turn + begin / tile.block_turns) / outputs * (1 + 0.12 / waves)
