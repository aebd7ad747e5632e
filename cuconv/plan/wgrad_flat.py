"""Gradients of the weights from planes as they lie in memory: see cuda/depthwise_wgrad_flat.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ..geometry import Conv2dGeometry
from .base import DTYPES, MAX_GRID, SHARED_RESERVE, Plan, Target, Unsuitable
from .flat import CHUNK, MARGIN, UNITS, edge_instructions, products_length, require_flat, whole, wide_windows
from .wgrad import WgradPlan, clustered, slabs_of_cluster, with_reduce

_SIZE = 2
_WARP = 32
_THREADS = (64, 128, 256)
_STAGES = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block takes: units of work of some rows of one channel, a slab of them in turn."""

    block_rows: int
    threads: int
    stages: int
    slabs: int
    x_bytes: int  # of one unit of work
    dy_bytes: int
    shared_bytes: int
    registers: int  # of a thread, at most: kBlocks of cuda/depthwise_wgrad_flat.cu

    def blocks(self, target: Target) -> int:
        """Blocks that a multiprocessor holds at once."""
        of_shared = target.shared_per_multiprocessor // (self.shared_bytes + SHARED_RESERVE)
        return min(32, of_shared, 65536 // (self.threads * self.registers))


def flat(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of x and dy is read once."""
    require_flat(g, dtype, target, aligned)
    choices = list(tiles(g, bias, target))
    if not choices:
        raise Unsuitable(f"{g.R} rows of {g.W} elements do not fit shared memory")
    return tile_plan(g, dtype, bias, target, min(choices, key=lambda tile: _cost(g, target, tile)))


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> WgradPlan:
    row_units = -(-g.H // tile.block_rows)
    units = g.N * row_units
    block_units = -(-units // tile.slabs)
    slabs = -(-units // block_units)
    if units > 2**31 - 1 or slabs > MAX_GRID[0]:
        raise Unsuitable(f"{units} units of work are more than one launch can count")
    cluster = bool(clustered(slabs, g.K, target.multiprocessors * tile.blocks(target)))
    sums = Plan(
        source="depthwise_wgrad_flat",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("LEFT", g.padding[1][0]),
            ("WIDE", wide_windows(g, 0)),
            ("BIAS", int(bias)),
            ("FINAL", int(slabs == 1 or cluster)),
            ("CLUSTER", slabs if cluster else 1),
            ("THREADS", tile.threads),
            ("STAGES", tile.stages),
        ),
        grid=(slabs, g.K, 1),
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("K", g.K),
            ("H", g.H),
            ("W", g.W),
            ("top", g.padding[0][0]),
            ("block_rows", tile.block_rows),
            ("row_units", row_units),
            ("units", units),
            ("block_units", block_units),
            ("x_bytes", tile.x_bytes),
            ("dy_bytes", tile.dy_bytes),
            ("total_elements", g.x_size),
        ),
    )
    return WgradPlan(sums, None, 0) if slabs == 1 or cluster else with_reduce(sums, slabs, g, dtype, bias)


def tiles(g: Conv2dGeometry, bias: bool, target: Target) -> Iterator[Tile]:
    """Those that fit the device's shared memory."""
    budget = target.shared_per_block - SHARED_RESERVE
    products = 3 * g.R + wide_windows(g, 0).bit_count() + bias
    sums = 4 * products + g.R * g.S
    registers = 256 if sums > 110 else 168 if sums > 60 else 128
    for rows, threads, stages in product(sorted({-(-g.H // n) for n in range(1, g.H + 1)}), _THREADS, _STAGES):
        if rows * g.W > budget:
            continue
        units = g.N * -(-g.H // rows)
        # Each of 16 lanes of a warp has an odd number of units.
        reach = rows * g.W + CHUNK + 2 * CHUNK * UNITS * (threads // _WARP)
        x_bytes = whole((MARGIN + (g.R - 1) * g.W + reach + 5 * CHUNK) * _SIZE, 128)
        dy_bytes = whole((5 * CHUNK + rows * g.W) * _SIZE, 128)
        entries = g.R * g.S + bias
        sums_bytes = 4 * (threads // _WARP * (4 * products * _WARP + entries) + entries)
        shared = max(128 + stages * (x_bytes + dy_bytes), sums_bytes)
        if stages > units or shared > budget:
            continue
        tile = Tile(rows, threads, stages, 1, x_bytes, dy_bytes, shared, registers)
        held = target.multiprocessors * tile.blocks(target)
        some = {
            1,
            int(min(units, slabs_of_cluster(g.K, held))),
            *(max(1, min(units, held // n // g.K)) for n in (1, 2)),
        }
        for slabs in sorted(some):
            yield replace(tile, slabs=slabs)


def _cost(g: Conv2dGeometry, target: Target, tile: Tile) -> float:
    """What ranks tiles: clocks of a multiprocessor for an element, up to a factor.

    The weights were fitted to the times of 250 tiles (3x3 and 5x5, rows of 29 to 225, on an H200): of those measured,
    the tile of least cost takes 3 % longer than the fastest on average, and at most 5 %.
    """
    elements, warps = tile.block_rows * g.W, tile.threads / _WARP
    row_units = -(-g.H // tile.block_rows)
    units = g.N * row_units
    block_units = -(-units // tile.slabs)
    slabs = -(-units // block_units)
    active = min(max(1, tile.blocks(target)), slabs * g.K / target.multiprocessors)
    # A warp's instructions: for every block and unit of work, for two units of 16 lanes, for the ends of rows.
    instructions = warps * (169 + 2726 / block_units)
    instructions += warps * (products_length(elements, tile.threads // _WARP) + 1) / 2 * (8 + 6 * g.R)
    instructions += edge_instructions(g, tile.block_rows)
    busy = 1 - math.exp(-0.072 * active * warps)
    halo = (tile.block_rows + g.R - 1) / tile.block_rows if row_units > 1 else 1.0
    memory = (halo + 1) * _SIZE / 18
    latency = (1600 / math.sqrt(tile.stages) + 2444 / block_units) / (active * elements)
    idle = block_units * slabs / units * row_units * tile.block_rows / g.H
    time = (0.323 * instructions / elements / busy + memory + latency) * idle
    # Two stages and two warps are the fastest of what is alike otherwise.
    return time * (1 + 0.06 * abs(tile.stages - 2)) * (1 + 0.04 * math.log2(tile.threads / 64))
