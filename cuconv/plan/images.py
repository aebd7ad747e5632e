"""Small planes on tensor cores, 16-bit, for compute capability 9.0 and newer: see cuda/depthwise_images.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
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
    magic,
    plane_parameters,
    require_nchw,
)
from .runs import dense_dgrad_as_forward

# A tensor-core product is images x pixels x outputs.
_IMAGES, _STEP, _TILE = 16, 16, 8
_SIZE = 2
# Windows and tiles may start at every so many elements.
_GRAIN = VECTOR_BYTES // _SIZE
# Planes of x and of y. Larger ones leave no images to keep the warps of a block busy.
MAX_PLANE = 1024
# The needs of a plane are looked at tap by tap.
_MAX_MEETINGS = 2**17
_FEW_WARPS, _MAX_WARPS = 4, 16
# Elements of a table of weights, and how far from its beginning an index may be: less than kNowhere in the kernel.
_MAX_TABLE, _MAX_REACH = 2**15, 2**27
_MAX_TILES = 8
_MAX_STEPS = 24
_STAGES = (2, 3, 4)
_BLOCKS = (1, 2, 3, 4)
# What a warp copies at once.
_WARP_BYTES = 32 * VECTOR_BYTES
# Registers of a thread beside those of products, sums and pixels: with fewer, some groups spill.
_OTHER_REGISTERS = 45
_REGISTERS = 65536


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring tiles of a plane's outputs, whose products one warp keeps, and the window of pixels that they need.

    All groups of a plane are alike, and all planes: only where tiles and windows start differs.
    """

    masks: tuple[int, ...]  # of every tile, the k-steps of the window that it needs
    steps: int
    first: int  # where the first group's window starts, in grains from the one in which the plane starts
    apart: int  # and the next group's, from there
    count: int  # groups of a plane

    @property
    def products(self) -> int:
        return sum(mask.bit_count() for mask in self.masks)

    @property
    def registers(self) -> int:
        return 2 * self.products + 4 * len(self.masks) + 2 * self.steps + _OTHER_REGISTERS


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block makes: units of 16 images of so many planes."""

    group: Group
    periodic: bool  # whether all groups have the same products
    warps: int
    block_planes: int
    stages: int
    blocks: int  # of a multiprocessor
    guard_bytes: int
    input_pitch: int
    output_pitch: int
    table_pitch: int
    table_size: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def own_bytes(self) -> int:
        """A warp's: two places of a pixel and an output, and a table with a zero behind it."""
        places = self.group.steps * _STEP + len(self.group.masks) * _TILE
        return -(-(places * 4 + (self.table_size + 1) * _SIZE) // 8) * 8

    @property
    def shared_bytes(self) -> int:
        inputs = self.stages * (_IMAGES * self.input_pitch + self.guard_bytes) + self.guard_bytes
        return inputs + 2 * _IMAGES * self.output_pitch + self.warps * self.own_bytes


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_runs and depthwise_toeplitz.

    On an H200, percent of the floor by this and by the better of the two, in float16: 128 images, 3x3 on 7x7 59 and 54,
    on 14x14 68 and 79, on 28x28 66 and 75, 3x3 with stride 2 on 14x14 57 and 68; 5x5 on 7x7 53 and 37, on 8x8 59 and
    48, on 14x14 53 and 51, on 16x16 65 and 39, on 28x28 68 and 50; 7x7 on 7x7 44 and 23, on 14x14 49 and 27. With 32
    images 5x5 on 7x7, 1,152 channels, 29 and 22, with 16 images, which are 6,800 outputs a multiprocessor, 19 and 19.
    """
    dense = g.stride == g.dilation == (1, 1)
    small = max(g.H * g.W, g.P * g.Q) <= 64
    most_rows = g.N / (_IMAGES * -(-g.N // _IMAGES)) >= 0.75
    enough = g.y_size >= 9600 * target.multiprocessors
    return DTYPES[dtype][1] == _SIZE and dense and (small or g.R * g.S >= 25) and most_rows and enough


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, turned: bool = False) -> Plan:
    if DTYPES[dtype][1] != _SIZE:
        raise Unsuitable(f"takes float16 and bfloat16, and the dtype is {dtype}")
    require_nchw(g)
    if target.architecture < 90:
        raise Unsuitable(f"needs compute capability 9.0, and the device has {target.architecture / 10}")
    choices = list(tiles(g, target, aligned))
    if not choices:
        raise Unsuitable(
            f"the products of {g.R} x {g.S} taps with planes of {g.H} x {g.W} and {g.P} x {g.Q} "
            "do not fit registers and shared memory"
        )
    best = min(choices, key=lambda tile: _cost(g, target, tile))
    return tile_plan(g, dtype, target, best, turned)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    """The plan of dx as a convolution of dy."""
    return forward(dense_dgrad_as_forward(g), dtype, target, aligned, turned=True)


def tile_plan(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile, turned: bool = False) -> Plan:
    image_units = -(-g.N // _IMAGES)
    units = image_units * -(-g.K // tile.block_planes)
    blocks = min(units, target.multiprocessors * tile.blocks)
    if units > MAX_GRID[0]:
        raise Unsuitable(f"{units} units are more than one launch can count")
    return Plan(
        source="depthwise_images",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("TURNED", int(turned)),
            ("THREADS", tile.threads),
            ("BLOCKS", tile.blocks),
            ("STAGES", tile.stages),
            ("IN_VECTORS", -(-tile.block_planes * g.H * g.W * _SIZE // _WARP_BYTES)),
            ("OUT_VECTORS", -(-tile.block_planes * g.P * g.Q * _SIZE // _WARP_BYTES)),
            ("STEPS", tile.group.steps),
            ("MASKS", ", ".join(map(hex, tile.group.masks))),
            ("PAIRS", int(g.P * g.Q % 2 == 0)),
            ("EDGES", hex(edges(g, tile.group))),
            ("PERIODIC", int(tile.periodic)),
        ),
        grid=(blocks, 1, 1),
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("W_magic", magic(g.W)),
            ("Q_magic", magic(g.Q)),
            ("S_magic", magic(g.S)),
            ("groups_magic", magic(tile.group.count)),
            ("table_pitch", tile.table_pitch),
            ("table_size", tile.table_size),
            ("rows_before", max(0, -(tile.group.first * _GRAIN // g.W)) if tile.periodic else 0),
            ("first_grain", tile.group.first),
            ("group_grains", tile.group.apart),
            ("groups", tile.group.count),
            ("images", g.N),
            ("image_units", image_units),
            ("block_planes", tile.block_planes),
            ("block_units", units // blocks),
            ("extra_units", units % blocks),
            ("own_bytes", tile.own_bytes),
            ("guard_bytes", tile.guard_bytes),
            ("input_pitch", tile.input_pitch),
            ("output_pitch", tile.output_pitch),
        ),
    )


def tiles(g: Conv2dGeometry, target: Target, aligned: bool) -> Iterator[Tile]:
    """The tiles that fit a block's registers and shared memory."""
    x_plane, y_plane = g.H * g.W, g.P * g.Q
    if g.multiplier > 1:
        raise Unsuitable(f"takes multiplier 1, and has {g.multiplier}")
    if max(x_plane, y_plane) > MAX_PLANE:
        raise Unsuitable(f"takes planes of up to {MAX_PLANE} elements, and has {g.H} x {g.W} and {g.P} x {g.Q}")
    if g.R * g.S > MAX_DIVIDEND or y_plane * g.R * g.S > _MAX_MEETINGS:
        raise Unsuitable(f"{g.R} x {g.S} taps of {g.P} x {g.Q} outputs are too many")
    if not aligned or g.K * x_plane % _GRAIN or g.K * y_plane % _GRAIN:
        raise Unsuitable(f"needs images that start at multiples of {VECTOR_BYTES} bytes")
    # So many planes start at multiples of a grain in x and in y.
    together = math.lcm(*(_GRAIN // math.gcd(_GRAIN, size) for size in (x_plane, y_plane)))
    table_pitch = g.W + (g.Q - 1) * g.stride[1]
    table_size = ((g.R - 1) * g.dilation[0] + 1) * table_pitch
    reach = max(abs(g.padding[0][0]), g.P * g.stride[0], g.R * g.dilation[0]) * table_pitch
    if table_size >= _MAX_TABLE or reach >= _MAX_REACH:
        raise Unsuitable(f"{g.R} x {g.S} taps that reach so far do not fit shared memory")
    for group in groups(_shape(g)):
        periodic = is_periodic(g, group)
        if periodic:
            shapes = [(1, -(-group.count // rounds)) for rounds in range(1, group.count // _FEW_WARPS + 2)]
        else:
            shapes = [(planes, planes * group.count) for planes in range(together, g.K + together, together)]
        for planes, warps in dict.fromkeys(shapes):
            if warps > _MAX_WARPS or (periodic and warps < min(_FEW_WARPS, group.count)):
                continue
            input_bytes, output_bytes = planes * x_plane * _SIZE, planes * y_plane * _SIZE
            last = ((planes - 1) * x_plane // _GRAIN + group.first + (group.count - 1) * group.apart) * VECTOR_BYTES
            after = last + group.steps * _STEP * _SIZE - input_bytes
            guard = max(0, -group.first * VECTOR_BYTES, after)
            for stages, blocks in product(_STAGES, _BLOCKS):
                tile = Tile(
                    group=group,
                    periodic=periodic,
                    warps=warps,
                    block_planes=planes,
                    stages=stages,
                    blocks=blocks,
                    guard_bytes=guard,
                    input_pitch=_pitch(input_bytes + (guard if periodic else 0)),
                    output_pitch=_pitch(output_bytes),
                    table_pitch=table_pitch,
                    table_size=table_size,
                )
                # Warps are dealt to four schedulers, each with registers of its own.
                registers = min(255, _REGISTERS // (-(-warps // 4) * 128 * blocks) // 8 * 8)
                if (
                    tile.shared_bytes + SHARED_RESERVE <= target.shared_per_multiprocessor // blocks
                    and tile.shared_bytes + SHARED_RESERVE <= target.shared_per_block
                    and group.registers <= registers
                ):
                    yield tile


def is_periodic(g: Conv2dGeometry, group: Group) -> bool:
    """Whether all groups of a plane have the same products: each is some whole rows, and x is as wide as y."""
    return (
        g.stride == (1, 1)
        and g.Q == g.W
        and g.H * g.W % _GRAIN == g.P * g.Q % _TILE == len(group.masks) * _TILE % g.W == 0
        and group.apart == len(group.masks)
    )


def edges(g: Conv2dGeometry, group: Group) -> int:
    """A mask of the tiles of a group that in any plane may have outputs of other planes."""
    size, mask = len(group.masks), 0
    for start in {c * g.P * g.Q % _TILE for c in range(_TILE)}:
        for tile in range(group.count * size):
            if not start <= tile * _TILE <= start + g.P * g.Q - _TILE:
                mask |= 1 << tile % size
    return mask


def _shape(g: Conv2dGeometry) -> tuple[Any, ...]:
    """What the groups of a plane follow from."""
    return (g.H, g.W, g.P, g.Q, g.R, g.S, g.stride, g.padding, g.dilation)


def _pitch(run_bytes: int) -> int:
    """Bytes from one image to the next, so that rows of fragments, 16 bytes of 8 neighbouring images, lie in different
    banks."""
    return (run_bytes // VECTOR_BYTES | 1) * VECTOR_BYTES


@lru_cache(maxsize=256)
def groups(shape: tuple[Any, ...]) -> tuple[Group, ...]:
    """Every number of tiles a group, with the window that makes the fewest products."""
    needed = _needed(*shape)
    all_tiles = len(needed)
    found = {}
    for size in range(1, _MAX_TILES + 1):
        count = -(-all_tiles // size)
        size = -(-all_tiles // count)
        rate = size * needed.shape[1] / all_tiles
        candidates = [
            group
            for apart, early in product(sorted({int(rate), round(rate), math.ceil(rate)}), (0, 1))
            if (group := _group(needed, size, count, apart if count > 1 else 0, early)) is not None
        ]
        if candidates:
            found[size] = min(candidates, key=lambda group: (group.products, group.steps))
    return tuple(found.values())


def _group(needed: Any, size: int, count: int, apart: int, early: int) -> Group | None:
    starts = [
        int(np.flatnonzero(rows.any(axis=0))[0]) - i * apart
        for i in range(count)
        if (rows := needed[i * size : (i + 1) * size]).any()
    ]
    first = min(starts, default=0) - early
    masks = [0] * size
    for tile, grain in zip(*np.nonzero(needed), strict=True):
        i, place = divmod(int(tile), size)
        masks[place] |= 1 << (int(grain) - first - i * apart) * _GRAIN // _STEP
    steps = max(1, *(mask.bit_length() for mask in masks))
    return Group(tuple(masks), steps, first, apart, count) if steps <= _MAX_STEPS else None


def _needed(
    H: int,
    W: int,
    P: int,
    Q: int,
    R: int,
    S: int,
    stride: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
) -> Any:
    """Of every tile of y's plane (first axis) whether any of its outputs meets a pixel of a grain of x's plane (second
    axis), wherever the planes start within their first tile and grain."""
    h, v = (
        np.arange(outputs)[:, None] * step - before + np.arange(taps) * apart
        for outputs, step, (before, _), taps, apart in zip((P, Q), stride, padding, (R, S), dilation, strict=True)
    )
    pixel = h[:, None, :, None] * W + v[None, :, None, :]
    met = ((h >= 0) & (h < H))[:, None, :, None] & ((v >= 0) & (v < W))[None, :, None, :]
    output = np.broadcast_to(np.arange(P * Q).reshape(P, Q, 1, 1), pixel.shape)[met]
    pixel = pixel[met]
    places = {(c * H * W % _GRAIN, c * P * Q % _GRAIN) for c in range(_GRAIN)}
    tiles = max(-(-(place + P * Q) // _TILE) for _, place in places)
    grains = max(-(-(place + H * W) // _GRAIN) for place, _ in places)
    needed = np.zeros((tiles, grains), bool)
    for x_place, y_place in places:
        needed[(y_place + output) // _TILE, (x_place + pixel) // _GRAIN] = True
    return needed


def _cost(g: Conv2dGeometry, target: Target, tile: Tile) -> float:
    """What ranks tiles: clocks of a launch, by a count of what each of its parts has to do.

    The weights were fitted to the times of 137 tiles (15 cases in float16 on an H200, of 16 to 128 images): of those
    measured, the tile of least cost takes 3 % longer than the fastest on average, and at most 17 %.
    """
    group, warps = tile.group, tile.warps
    image_units = -(-g.N // _IMAGES)
    units = image_units * -(-g.K // tile.block_planes)
    blocks = min(units, target.multiprocessors * tile.blocks)
    turns = -(-units // blocks)
    resident = blocks / target.multiprocessors
    rounds = -(-group.count // warps) if tile.periodic else 1
    elements = _IMAGES * tile.block_planes
    # Of a unit: what passes through, products that wait for each other, and what no other warp hides.
    moved = elements * (g.H * g.W + g.P * g.Q) * _SIZE / 18
    unit = 0.63 * moved * resident + 9.7 * group.products * rounds + 795 + 400 / ((tile.stages - 1) * tile.blocks)
    make = (14 * group.products + 10 * group.steps + 300) * warps / 4
    makes = 1 + (turns - 1) / image_units
    # The first loads of a launch, that all blocks wait for.
    fill = tile.stages * elements * g.H * g.W * _SIZE / 18
    return 4460 + turns * unit + (0.72 * makes * make + 0.2 * fill) * resident
