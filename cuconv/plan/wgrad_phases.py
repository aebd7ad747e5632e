"""Gradients of weights and bias of dilated kernels by phases, for compute capability 9.0 and newer: see
cuda/depthwise_wgrad_phases.cu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..geometry import Conv2dGeometry
from .base import DTYPES, MAX_GRID, SHARED_RESERVE, Plan, Target, Unsuitable, plane_parameters
from .phases import behind_bytes_of, per_word, places_of, plane_bytes_of, require_phases, shapes, work_of_phase
from .wgrad import WgradPlan, clustered, slabs_of_cluster, with_reduce

# Values that a thread may hold: rows of x, one of dy, sums.
_MAX_VALUES = 104
# Blocks and registers of a multiprocessor.
_MAX_BLOCKS, _REGISTERS = 32, 65536
# Of an H200, in a microsecond.
_CLOCKS = 1755


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block makes: so many planes of one channel at a time, of a slab of the batch."""

    places: int
    values: int
    planes: int
    stages: int
    slabs: int
    threads: int
    plane_bytes: int
    behind_bytes: int

    @property
    def shared_bytes(self) -> int:
        return 2 * self.stages * self.planes * self.plane_bytes + self.behind_bytes

    @property
    def registers(self) -> int:
        """That a thread needs, by a rough count."""
        return min(255, -(-(36 + self.values) // 8) * 8)

    def blocks(self, target: Target) -> int:
        """That a multiprocessor holds at once."""
        warps = _REGISTERS // (4 * 32 * self.registers) * 4
        shared = target.shared_per_multiprocessor // (self.shared_bytes + SHARED_RESERVE)
        return max(1, min(_MAX_BLOCKS, shared, 32 * warps // self.threads))

    def clustered(self, g: Conv2dGeometry, target: Target) -> bool:
        """Whether its slabs are a cluster."""
        return bool(clustered(self.slabs, g.K, target.multiprocessors * self.blocks(target)))


def phases(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of x and dy is read once."""
    require_phases(g, dtype, target, aligned)
    choices = list(tiles(g, dtype, bias, target))
    if not choices:
        raise Unsuitable(f"planes of {g.H} x {g.W}, dilated by {g.dilation}, do not fit registers and shared memory")
    return tile_plan(g, dtype, bias, target, min(choices, key=lambda tile: _cost(g, dtype, target, tile)))


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> WgradPlan:
    """The plan of one choice of tiles()."""
    cluster = tile.clustered(g, target)
    single = tile.slabs == 1 or cluster
    sums = Plan(
        source="depthwise_wgrad_phases",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("BIAS", int(bias)),
            ("FINAL", int(single)),
            ("CLUSTER", tile.slabs if cluster else 1),
            ("BEFORE_H", g.padding[0][0] // g.dilation[0]),
            ("BEFORE_W", g.padding[1][0] // g.dilation[1]),
            ("THREADS", tile.threads),
            ("BLOCKS", tile.blocks(target)),
            ("PLANES", tile.planes),
            ("STAGES", tile.stages),
            ("DILATION_W", g.dilation[1]),
            ("PLACES", tile.places),
        ),
        grid=(tile.slabs, g.K, 1),
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("images", g.N),
            ("block_images", _block_turns(g, tile) * tile.planes),
            ("plane_bytes", tile.plane_bytes),
        ),
    )
    return WgradPlan(sums, None, 0) if single else with_reduce(sums, tile.slabs, g, dtype, bias)


def _block_turns(g: Conv2dGeometry, tile: Tile) -> int:
    """Of a slab, in which as many planes are worked on at a time."""
    turns = -(-g.N // tile.planes)
    return -(-turns // tile.slabs)


def tiles(g: Conv2dGeometry, dtype: str, bias: bool, target: Target) -> Iterator[Tile]:
    """The tiles that fit the device's registers and shared memory."""
    places = places_of(g, dtype)
    values = (g.R + 1) * places * per_word(dtype) + g.R * g.S + bias
    if values > _MAX_VALUES or g.K > MAX_GRID[1]:
        return
    for planes, stages, threads in shapes(g, dtype):
        turns = -(-g.N // planes)
        plane_bytes, behind = plane_bytes_of(g, dtype, planes), behind_bytes_of(g, dtype)
        tile = Tile(places, values, planes, stages, 1, threads, plane_bytes, behind)
        if tile.shared_bytes > target.shared_per_block - SHARED_RESERVE:
            continue
        held = target.multiprocessors * tile.blocks(target)
        # One slab, or a cluster of them, or as many as fill the device.
        for slabs in sorted({1, min(turns, int(slabs_of_cluster(g.K, held))), max(1, min(turns, held // g.K))}):
            block_turns = -(-turns // slabs)
            if stages <= block_turns:
                yield replace(tile, slabs=-(-turns // block_turns))


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_wgrad_diagonals and depthwise_wgrad_runs.

    On an H200, percent of the memory floor by this and by the better of the two, 3x3: in bfloat16 on 65x65 of dilation
    12 52 and 41, of dilation 24 52 and 41; on 33x33 of dilation 6 40 and 34, of dilation 4 37 and 37. In float32 77 and
    51, 76 and 44, 65 and 34, 58 and 38.
    """
    return not g.channels_last and min(g.dilation) >= 4


def _cost(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile) -> float:
    """What ranks tiles: microseconds of an H200, without what all of them take.

    The weights were fitted to the times of 250 tiles (four cases in three dtypes). Of those that were measured the tile
    of least cost takes 3 % longer than the fastest on average, and at most 15 %.
    """
    blocks, turns = g.K * tile.slabs, _block_turns(g, tile)
    most, held = -(-blocks // target.multiprocessors), tile.blocks(target)
    # Blocks that are held all at once end with the slowest multiprocessor; of more of them each takes what it can.
    at_once = most <= held
    waves = 1 if at_once else max(1.0, blocks / target.multiprocessors / held)
    warps = tile.threads / 32 * (most if at_once else blocks / target.multiprocessors)
    items = tile.planes * g.dilation[0] * g.dilation[1] // per_word(dtype)
    of_thread = turns * -(-items // tile.threads) * work_of_phase(g, dtype) / _CLOCKS
    time = 0.332 * warps / 4 * of_thread + 0.895 * waves * of_thread
    time += waves * (4.59 + 0.126 * turns + 0.199 * max(0, turns - tile.stages))
    if turns > tile.stages == 1:
        # What a multiprocessor waits for in every turn.
        time += waves * turns * 1.6e-5 * min(most, held) * tile.planes * g.H * g.W * DTYPES[dtype][1]
    return time + (0 if tile.slabs == 1 else 1.4 if tile.clustered(g, target) else 4.0)
