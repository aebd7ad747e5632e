"""Dilated kernels by phases, for compute capability 9.0 and newer: see cuda/depthwise_phases.cu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

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
    require_nchw,
)
from .runs import dense_dgrad_as_forward

_WORD = 4
# Values that a thread may hold: sums, a row, weights.
_MAX_VALUES = 104
_PLANES = (1, 2, 4, 8)
_STAGES = (1, 2, 4)
_MAX_THREADS, _USUAL_THREADS, _FEW_THREADS = 512, 192, 96
# Of the lanes of a block, those without a phase; of shared memory, what several planes at a time may take.
_MOST_IDLE, _USUAL_BYTES = 0.15, 20 * 1024
# Words of a phase with which there are warps enough for two stages.
_FEW_PLACES = 9
# Phases of a thread, one after the other.
_PARTS = (1, 2, 3, 4)
# Blocks and registers of a multiprocessor.
_MAX_BLOCKS, _REGISTERS = 32, 65536
# The banks of shared memory, all of them.
_BANKS_BYTES = 128


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block makes: so many planes of one channel at a time, of block_images images."""

    places: int
    values: int
    planes: int
    stages: int
    block_images: int
    threads: int
    plane_bytes: int
    behind_bytes: int  # words of phases that end behind the last plane are loaded before they are masked

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.planes * self.plane_bytes + self.behind_bytes

    @property
    def registers(self) -> int:
        """That a thread needs, by a rough count."""
        return min(255, -(-(36 + self.values) // 8) * 8)

    def blocks(self, target: Target) -> int:
        """That a multiprocessor holds at once."""
        warps = _REGISTERS // (4 * 32 * self.registers) * 4
        shared = target.shared_per_multiprocessor // (self.shared_bytes + SHARED_RESERVE)
        return max(1, min(_MAX_BLOCKS, shared, 32 * warps // self.threads))


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_runs.

    On an H200, percent of the memory floor by this and by runs, 3x3: in bfloat16 on 65x65 of dilation 12 60 and 53, of
    dilation 24 63 and 38, of dilation 6 46 and 44, one image of dilation 12 22 and 21; on 64x64 of dilation 12 64 and
    42, on 129x129 58 and 48; on 33x33 of dilation 6 42 and 37, of dilation 4 40 and 34. In float32 on 65x65 of dilation
    12 79 and 77, of dilation 24 78 and 71, of dilation 6 74 and 77; on 33x33 of dilation 6 67 and 68, of dilation 4 57
    and 62.
    """
    return not g.channels_last and min(g.dilation) >= (4 if per_word(dtype) == 2 else 12)


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool, turned: bool = False) -> Plan:
    require_phases(g, dtype, target, aligned)
    choices = list(tiles(g, dtype, target))
    if not choices:
        raise Unsuitable(f"planes of {g.H} x {g.W}, dilated by {g.dilation}, do not fit registers and shared memory")
    return tile_plan(g, dtype, target, min(choices, key=lambda tile: _rank(g, dtype, tile)), turned)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    """The plan of dx as a convolution of dy."""
    return forward(dense_dgrad_as_forward(g), dtype, target, aligned, turned=True)


def require_phases(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> None:
    """Refuse what has no phases of whole words, or whose outputs lie elsewhere than its inputs."""
    size = DTYPES[dtype][1]
    if size > _WORD:
        raise Unsuitable(f"takes elements of at most {_WORD} bytes, and the dtype is {dtype}")
    require_nchw(g)
    if target.architecture < 90:
        raise Unsuitable(f"needs compute capability 9.0, and the device has {target.architecture / 10}")
    if g.multiplier > 1 or g.stride != (1, 1) or (g.P, g.Q) != (g.H, g.W):
        raise Unsuitable("takes one output channel an input channel, stride 1, and outputs as many as inputs")
    if any(pad[0] % dilation for pad, dilation in zip(g.padding, g.dilation, strict=True)):
        raise Unsuitable(f"takes padding of whole dilations, and has {g.padding} and {g.dilation}")
    if g.dilation[1] * size % _WORD or g.dilation[0] * g.W * size % _WORD:
        raise Unsuitable(f"takes taps that are whole words apart, and has {g.dilation} in rows of {g.W}")
    if not aligned:
        raise Unsuitable(f"takes arrays that start at multiples of {VECTOR_BYTES} bytes")


def per_word(dtype: str) -> int:
    """Elements of a word, which are as many columns of a phase."""
    return _WORD // DTYPES[dtype][1]


def places_of(g: Conv2dGeometry, dtype: str) -> int:
    """Words of a phase in a row. Of an odd number of halves it may begin a column before the row."""
    return -(-(g.W + g.W % per_word(dtype)) // g.dilation[1])


def plane_bytes_of(g: Conv2dGeometry, dtype: str, planes: int) -> int:
    """Of shared memory, for each of so many planes: the lanes that have the same phase of them meet different banks."""
    least = -(-(g.H * g.W * DTYPES[dtype][1] + VECTOR_BYTES) // VECTOR_BYTES) * VECTOR_BYTES
    return least + (_BANKS_BYTES // planes - least) % _BANKS_BYTES if planes > 1 else least


def tile_plan(g: Conv2dGeometry, dtype: str, target: Target, tile: Tile, turned: bool = False) -> Plan:
    return Plan(
        source="depthwise_phases",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("TURNED", int(turned)),
            ("BEFORE_H", g.padding[0][0] // g.dilation[0]),
            ("BEFORE_W", g.padding[1][0] // g.dilation[1]),
            ("THREADS", tile.threads),
            ("BLOCKS", tile.blocks(target)),
            ("PLANES", tile.planes),
            ("STAGES", tile.stages),
            ("DILATION_W", g.dilation[1]),
            ("PLACES", tile.places),
        ),
        grid=(g.K, -(-g.N // tile.block_images), 1),
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("K", g.K),
            ("H", g.H),
            ("W", g.W),
            ("dilation_h", g.dilation[0]),
            ("images", g.N),
            ("block_images", tile.block_images),
            ("plane_bytes", tile.plane_bytes),
        ),
    )


def behind_bytes_of(g: Conv2dGeometry, dtype: str) -> int:
    """That the last word of a row may lie behind it."""
    return -(-g.dilation[1] * DTYPES[dtype][1] // VECTOR_BYTES) * VECTOR_BYTES


def tiles(g: Conv2dGeometry, dtype: str, target: Target) -> Iterator[Tile]:
    """The tiles that fit the device's registers and shared memory."""
    places = places_of(g, dtype)
    values = (g.R + 1) * places * per_word(dtype) + g.R * g.S
    if values > _MAX_VALUES:
        return
    for planes, stages, threads in shapes(g, dtype):
        plane_bytes = plane_bytes_of(g, dtype, planes)
        turns, behind = -(-g.N // planes), behind_bytes_of(g, dtype)
        for block_turns in sorted({t for t in (1, 2, 4, 8, turns) if stages <= t <= turns}):
            tile = Tile(places, values, planes, stages, block_turns * planes, threads, plane_bytes, behind)
            fits = tile.shared_bytes <= target.shared_per_block - SHARED_RESERVE
            if fits and (stages > 1 or block_turns == 1) and -(-turns // block_turns) <= MAX_GRID[1]:
                yield tile


def shapes(g: Conv2dGeometry, dtype: str) -> Iterator[tuple[int, int, int]]:
    """Planes at a time, stages, and threads of a block, which take one phase each or some in turn."""
    items = g.dilation[0] * g.dilation[1] // per_word(dtype)
    for planes, stages in product(_PLANES, _STAGES):
        if planes <= g.N and planes * items <= MAX_DIVIDEND:
            for threads in sorted({32 * -(-planes * items // (32 * parts)) for parts in _PARTS}):
                if threads <= _MAX_THREADS:
                    yield planes, stages, threads


def _rank(g: Conv2dGeometry, dtype: str, tile: Tile) -> tuple[float, ...]:
    """By what a tile is chosen: the least is best.

    Of the tiles that were measured what this chooses is within 2 % of the fastest in 15 of the 17 cases in which it is
    the default, and within 9 % in all.

    As few planes at a time as fill the lanes of a block of not too many threads. In 16-bit two turns, both on their way
    from the beginning; in float32, where memory takes longer than the rest, one, so that there are many blocks, of
    which some load while others store.
    """
    halves = per_word(dtype) == 2
    items = tile.planes * g.dilation[0] * g.dilation[1] // per_word(dtype)
    in_turn = -(-items // tile.threads)
    idle = 1 - items / (in_turn * tile.threads)
    wanted = min(2 if halves and tile.places <= _FEW_PLACES else 1, -(-g.N // tile.planes))
    return (
        tile.threads > _USUAL_THREADS,
        tile.planes > 1 and tile.planes * tile.plane_bytes > _USUAL_BYTES,
        idle > _MOST_IDLE,
        tile.planes,
        abs(tile.block_images // tile.planes - wanted) + abs(tile.stages - wanted),
        idle,
        abs(tile.threads - _FEW_THREADS) if halves else in_turn,
    )


def work_of_phase(g: Conv2dGeometry, dtype: str) -> float:
    """Instructions, by a rough count."""
    words = places_of(g, dtype)
    products = g.R * per_word(dtype) * (words * g.S - 2)
    return 90 + -(-g.H // g.dilation[0]) * (products + 2 * words * (per_word(dtype) + 1) + 25)
