"""Small planes of channels-last arrays, a lane's each, for compute capability 8.0 and newer: see
cuda/depthwise_channels_last_planes.cu and cuda/depthwise_wgrad_channels_last_planes.cu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..geometry import Conv2dGeometry
from .base import DTYPES, MAX_GRID, SHARED_RESERVE, VECTOR_BYTES, Plan, Target, Unsuitable
from .runs import dense_dgrad_as_forward
from .wgrad import MOST_OF_CLUSTER, WgradPlan, clustered, with_reduce

_WARP = 32
# Products of a plane, which are unrolled, and values that a lane holds.
_MAX_PRODUCTS = 2100
_MAX_VALUES = 104
_WARPS = (1, 2, 3, 4, 6, 8)
# Of a block that sums: a multiprocessor has four schedulers, and with 5 or 7 warps some of them have more to do.
_WGRAD_WARPS = (8, 4, 2, 1)
_STAGES = (2, 1)
# Blocks and registers of a multiprocessor.
_MAX_BLOCKS, _REGISTERS = 32, 65536
# Of an H200, in a microsecond: clocks, and bytes to or from memory.
_CLOCKS, _BYTES = 1755, 4.2e6


@dataclass(frozen=True, slots=True)
class Tile:
    """What a warp makes, one after the other: so many images of its channels. Of the gradient of weights a block makes
    one of so many slabs of the batch."""

    values: int
    warps: int
    stages: int
    unit_images: int
    slabs: int
    stage_bytes: int  # of one warp
    sums_bytes: int  # of the block, in the end

    @property
    def shared_bytes(self) -> int:
        return max(self.warps * self.stages * self.stage_bytes, self.sums_bytes)

    @property
    def registers(self) -> int:
        """That a thread needs, by a rough count."""
        return min(255, -(-(30 + self.values) // 8) * 8)

    def blocks(self, target: Target) -> int:
        """That a multiprocessor holds at once."""
        warps = _REGISTERS // (4 * 32 * self.registers) * 4
        shared = target.shared_per_multiprocessor // (self.shared_bytes + SHARED_RESERVE)
        return max(1, min(_MAX_BLOCKS, shared, warps // self.warps))


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, turned: bool = False) -> Plan:
    _require_small_planes(g, dtype, target, aligned)
    choices = list(tiles(g, dtype, target))
    if not choices:
        raise Unsuitable(f"planes of {g.H} x {g.W} do not fit shared memory and one launch")
    return tile_plan(g, dtype, target, min(choices, key=lambda tile: _cost(g, dtype, target, tile)), turned)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    """The plan of dx as a convolution of dy."""
    return forward(dense_dgrad_as_forward(g), dtype, target, aligned, turned=True)


def wgrad(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of x and dy is read once."""
    _require_small_planes(g, dtype, target, aligned)
    tile = next(wgrad_tiles(g, dtype, bias, target), None)
    if tile is None:
        raise Unsuitable(f"planes of {g.H} x {g.W} do not fit shared memory and one launch")
    return wgrad_tile_plan(g, dtype, bias, target, tile)


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_channels_last_staged and depthwise_channels_last_mma.

    On an H200, percent of the memory floor by this and by the better of the others, in bfloat16: 5x5 on 128 planes of
    7x7 52 and 45, on 32 of them 30 and 20, on 8x8 42 and 39; 3x3 on 7x7 64 and 64, with 8 images 12 and 10, on 10x10 46
    and 46; in float32 5x5 on 7x7 76 and 72, 3x3 82 and 78.
    """
    return g.channels_last and g.H * g.W <= 64 and g.N >= 8


def beats_others_of_wgrad(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Likewise: 5x5 on 7x7 50 and 33, on 32 planes 22 and 17, on 8x8 39 and 30; 3x3 on 7x7 57 and 46, with 8 images 12
    and 9, on 10x10 37 and 31; in float32 5x5 on 7x7 72 and 62, 3x3 77 and 65.
    """
    return g.channels_last and g.H * g.W <= 100 and g.N >= 8


def _require_small_planes(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> None:
    size = DTYPES[dtype][1]
    if size > 4:
        raise Unsuitable(f"takes elements of at most 4 bytes, and the dtype is {dtype}")
    if not g.channels_last:
        raise Unsuitable("takes channels-last arrays, and these are (N, C, H, W)")
    if target.architecture < 80:
        raise Unsuitable(f"needs compute capability 8.0, and the device has {target.architecture / 10}")
    if g.multiplier > 1 or g.stride != (1, 1) or g.dilation != (1, 1) or (g.P, g.Q) != (g.H, g.W):
        raise Unsuitable("takes stride, dilation and multiplier 1, and outputs as many as inputs")
    if not aligned or g.C * size % VECTOR_BYTES:
        raise Unsuitable(f"takes pixels that start at multiples of {VECTOR_BYTES} bytes, aligned")
    values = (g.R + 1) * g.W + g.R * g.S
    if g.H * g.W * g.R * g.S > _MAX_PRODUCTS or values > _MAX_VALUES:
        raise Unsuitable(f"planes of {g.H} x {g.W} and {g.R} x {g.S} taps are more than is unrolled")


def _defines(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile) -> tuple[tuple[str, int | str], ...]:
    # Registers were counted on sm_90; others, whose compilers order so much straight code otherwise, are given more.
    blocks = tile.blocks(target) if target.architecture == 90 else max(1, tile.blocks(target) // 2)
    return (
        ("T", DTYPES[dtype][0]),
        ("R", g.R),
        ("S", g.S),
        ("H", g.H),
        ("W", g.W),
        ("TOP", g.padding[0][0]),
        ("LEFT", g.padding[1][0]),
        ("THREADS", _WARP * tile.warps),
        ("BLOCKS", blocks),
        ("STAGES", tile.stages),
    )


def tile_plan(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile, turned: bool = False) -> Plan:
    groups = -(-g.C // _WARP)
    units = groups * -(-g.N // tile.unit_images)
    return Plan(
        source="depthwise_channels_last_planes",
        defines=(*_defines(g, dtype, target, tile), ("TURNED", int(turned))),
        grid=(-(-units // tile.warps), 1, 1),
        block=_WARP * tile.warps,
        shared_bytes=tile.shared_bytes,
        parameters=(("K", g.K), ("groups", groups), ("images", g.N), ("unit_images", tile.unit_images)),
    )


def tiles(g: Conv2dGeometry, dtype: str, target: Target) -> Iterator[Tile]:
    """The tiles that fit the device's shared memory."""
    values = (g.R + 1) * g.W + g.R * g.S
    stage_bytes = g.H * g.W * _WARP * DTYPES[dtype][1]
    groups = -(-g.C // _WARP)
    for warps, stages, images in product(_WARPS, _STAGES, (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)):
        tile = Tile(values, warps, stages, images, 1, stage_bytes, 0)
        if stages > images or images > g.N or tile.shared_bytes > target.shared_per_block - SHARED_RESERVE:
            continue
        if groups * -(-g.N // images) < MAX_GRID[0]:
            yield tile


def wgrad_tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> WgradPlan:
    """The plan of one choice of wgrad_tiles()."""
    groups = -(-g.C // _WARP)
    held = target.multiprocessors * tile.blocks(target)
    cluster = target.architecture >= 90 and bool(clustered(tile.slabs, groups, held))
    single = tile.slabs == 1 or cluster
    sums = Plan(
        source="depthwise_wgrad_channels_last_planes",
        defines=(
            *_defines(g, dtype, target, tile),
            ("BIAS", int(bias)),
            ("FINAL", int(single)),
            ("CLUSTER", tile.slabs if cluster else 1),
        ),
        grid=(tile.slabs, groups, 1),
        block=_WARP * tile.warps,
        shared_bytes=tile.shared_bytes,
        parameters=(("K", g.K), ("images", g.N), ("block_images", -(-g.N // tile.slabs))),
    )
    return WgradPlan(sums, None, 0) if single else with_reduce(sums, tile.slabs, g, dtype, bias)


def wgrad_tiles(g: Conv2dGeometry, dtype: str, bias: bool, target: Target) -> Iterator[Tile]:
    """The tiles that fit the device's shared memory; measured tiles are of these, and the plan's is the first."""
    groups = -(-g.C // _WARP)
    budget = target.shared_per_block - SHARED_RESERVE
    # A slab, or a cluster of them, that leaves a part of the device free: clusters of one block for almost every
    # multiprocessor find no room for some, and eff5_7 and mbv1_7 took 15 % longer.
    most = max(1, min(MOST_OF_CLUSTER, int(0.85 * target.multiprocessors) // groups, g.N // _WGRAD_WARPS[0]))
    for slabs, warps, stages in product(dict.fromkeys((most, *range(1, MOST_OF_CLUSTER + 1))), _WGRAD_WARPS, _STAGES):
        tile = _wgrad_tile(g, dtype, bias, warps, stages, slabs)
        if tile.shared_bytes <= budget and stages <= tile.unit_images and groups <= MAX_GRID[1] and slabs <= g.N:
            yield tile


def _wgrad_tile(g: Conv2dGeometry, dtype: str, bias: bool, warps: int, stages: int, slabs: int) -> Tile:
    block_images = -(-g.N // slabs)
    warps = min(warps, block_images)
    return Tile(
        values=(g.R + 1) * g.W + g.R * g.S + bias,
        warps=warps,
        stages=stages,
        unit_images=-(-block_images // warps),
        slabs=-(-g.N // block_images),
        stage_bytes=2 * g.H * g.W * _WARP * DTYPES[dtype][1],
        sums_bytes=4 * _WARP * (g.R * g.S + bias) * (warps + 1),
    )


def _cost(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile) -> float:
    """What ranks tiles: microseconds of an H200.

    The weights were fitted to the times of 250 tiles (two cases in three dtypes). Of those that were measured the tile
    of least cost takes 3 % longer than the fastest on average, and at most 5 %.
    """
    size = DTYPES[dtype][1]
    instructions = _products(g) + g.H * g.W * (4 + 0.29 * (size - 2)) + 60
    blocks = -(-(-(-g.C // _WARP) * -(-g.N // tile.unit_images)) // tile.warps)
    most, held = -(-blocks // target.multiprocessors), tile.blocks(target)
    # Blocks that are held all at once end with the slowest multiprocessor; of more of them each takes what it can.
    waves = 1 if most <= held else max(1.0, blocks / target.multiprocessors / held)
    of_multiprocessor = most if most <= held else blocks / target.multiprocessors
    work = of_multiprocessor * tile.warps * tile.unit_images * instructions / 4 / _CLOCKS
    alone = waves * tile.unit_images * instructions / _CLOCKS
    memory = (g.x_size + g.y_size) * size / _BYTES
    # What brings all images at once leaves none to be brought while others are taken back.
    at_once = work if tile.stages == tile.unit_images > 1 else 0
    one_by_one = waves * tile.unit_images if tile.stages == 1 else 0
    return 3.0 + 0.645 * work + 0.915 * alone + 0.71 * memory + 0.423 * one_by_one + 0.227 * waves + 0.489 * at_once


def _products(g: Conv2dGeometry) -> int:
    """Of a plane, without those that meet padding."""
    met = [
        sum(0 <= output + tap - before < extent for output, tap in product(range(extent), range(taps)))
        for extent, taps, before in ((g.H, g.R, g.padding[0][0]), (g.W, g.S, g.padding[1][0]))
    ]
    return met[0] * met[1]
