"""Gradients of weights and bias on tensor cores, small planes in 16-bit, for compute capability 9.0 and newer: see
cuda/depthwise_wgrad_pairs.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..geometry import Conv2dGeometry
from .base import (
    DTYPES,
    MAX_DIVIDEND,
    MAX_GRID,
    SHARED_RESERVE,
    Plan,
    Target,
    Unsuitable,
    magic,
    plane_parameters,
    require_nchw,
)
from .wgrad import WgradPlan, with_reduce

_SIZE = 2
# Pixels of a chunk, and images of a product: see the kernel.
_CHUNK, _STEP = 8, 16
# Larger planes have more sums than the registers of a multiprocessor hold twice.
_MAX_PIXELS = 256
# Of a warp; the sums of dbias have room for 8.
_CHUNKS = (1, 2, 3, 4, 5, 6, 7, 8)
_MAX_SUMS = 128
_PLANES = (1, 2, 4, 8, 16)
_STEPS = (1, 2)
_STAGES = (2, 3, 4)
_MAX_WARPS = 16
_MAX_TAPS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block takes at a time: whole planes of several images. Each plane is the work of plane_warps warps."""

    plane_chunks: int
    chunks: int  # of dy, a warp
    first: int
    offsets: int
    planes: int
    plane_warps: int
    images: int
    stages: int
    slabs: int
    pitch: int
    margin: int
    shared_bytes: int
    registers: int  # that a thread is allowed

    @property
    def threads(self) -> int:
        return 32 * self.planes * self.plane_warps

    @property
    def blocks_of_registers(self) -> int:
        """That the registers of a multiprocessor are enough for, which the compiler is held to. Each of its four
        schedulers has a quarter of them."""
        warps = 65536 // (4 * 32 * -(-self.registers // 8) * 8) * 4
        return max(1, min(2048, 32 * warps) // self.threads)

    def blocks(self, target: Target) -> int:
        """That a multiprocessor holds at once."""
        shared = target.shared_per_multiprocessor // (self.shared_bytes + SHARED_RESERVE)
        return max(1, min(shared, self.blocks_of_registers))


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_wgrad_runs: products take 16 images at once."""
    return DTYPES[dtype][1] == _SIZE and g.N >= 2 * _STEP


def pairs(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of x and dy is read once."""
    if DTYPES[dtype][1] != _SIZE:
        raise Unsuitable(f"takes float16 and bfloat16, and the dtype is {dtype}")
    require_nchw(g)
    if target.architecture < 90:
        raise Unsuitable(f"needs compute capability 9.0, and the device has {target.architecture / 10}")
    if g.multiplier > 1 or g.stride != (1, 1) or g.dilation != (1, 1) or (g.P, g.Q) != (g.H, g.W):
        raise Unsuitable(
            "takes one output channel an input channel, stride 1, dilation 1 and a dy of x's extents; has "
            f"{g.multiplier}, {g.stride}, {g.dilation} and {g.P} x {g.Q} of {g.H} x {g.W}"
        )
    if g.H * g.W > _MAX_PIXELS or g.R * g.S > _MAX_TAPS:
        raise Unsuitable(
            f"takes planes of up to {_MAX_PIXELS} elements and kernels of {_MAX_TAPS}, and these have {g.H} x {g.W} and "
            f"{g.R} x {g.S}"
        )
    if not aligned or g.K * g.H * g.W % _CHUNK:
        raise Unsuitable("takes images that start at multiples of 16 bytes")
    choices = list(tiles(g, bias, target))
    if not choices:
        raise Unsuitable(f"{g.R} x {g.S} taps and planes of {g.H} x {g.W} elements do not fit registers and one launch")
    return tile_plan(g, dtype, bias, target, min(choices, key=lambda tile: _cost(g, bias, target, tile)))


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> WgradPlan:
    """The plan of one choice of tiles()."""
    sums = Plan(
        source="depthwise_wgrad_pairs",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("BIAS", int(bias)),
            ("FINAL", int(tile.slabs == 1)),
            ("THREADS", tile.threads),
            ("BLOCKS", tile.blocks_of_registers),
            ("STAGES", tile.stages),
            ("PLANE_CHUNKS", tile.plane_chunks),
            ("CHUNKS", tile.chunks),
            ("FIRST", tile.first),
            ("OFFSETS", tile.offsets),
        ),
        grid=(tile.slabs, -(-g.K // tile.planes), 1),
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("W_magic", magic(g.W)),
            ("pitch", tile.pitch),
            ("margin", tile.margin),
            ("images", tile.images),
            ("all_images", g.N),
            ("block_images", _block_images(g, tile)),
            ("block_planes", tile.planes),
            ("plane_warps", tile.plane_warps),
        ),
    )
    return WgradPlan(sums, None, 0) if tile.slabs == 1 else with_reduce(sums, tile.slabs, g, dtype, bias)


def _block_images(g: Conv2dGeometry, tile: Tile) -> int:
    """Images of a slab: whole turns."""
    turns = -(-g.N // tile.images)
    return -(-turns // tile.slabs) * tile.images


def _products(chunks: int, plane_chunks: int, first: int, offsets: int) -> int:
    """Of a warp and 16 images: see meets in the kernel."""
    total = 0
    for i in range(chunks):
        for pair in range(i // 2, (i + offsets - 1) // 2 + 1):
            chunk = first + 2 * pair
            beside = chunks >= plane_chunks and (chunk + 1 < 0 or chunk >= plane_chunks or i >= plane_chunks)
            total += not beside
    return total


def tiles(g: Conv2dGeometry, bias: bool, target: Target) -> Iterator[Tile]:
    """The tiles that fit the device's registers and shared memory."""
    pixels = g.H * g.W
    budget = target.shared_per_block - SHARED_RESERVE
    # A plane starts at any multiple of what it and a chunk have in common.
    plane_chunks = -(-(pixels + _CHUNK - math.gcd(pixels, _CHUNK)) // _CHUNK)
    nearest = -g.padding[0][0] * g.W - g.padding[1][0]
    first = nearest // _CHUNK
    offsets = (nearest + (g.R - 1) * g.W + g.S - 1 + _CHUNK - 1) // _CHUNK - first + 1
    taps = g.R * g.S + bias
    for chunks, planes, steps, stages in product(_CHUNKS, _PLANES, _STEPS, _STAGES):
        plane_warps = -(-plane_chunks // chunks)
        warps = planes * plane_warps
        if (
            chunks > plane_chunks
            or plane_warps > 1
            and -(-plane_chunks // (chunks - 1 or 1)) == plane_warps
            and chunks > 1
        ):
            continue
        sums = 4 * _products(chunks, plane_chunks, first, offsets)
        images = steps * _STEP
        if warps > _MAX_WARPS or sums > _MAX_SUMS or planes > g.K or (steps > 1 and images // 2 >= g.N):
            continue
        # An odd number of 16 bytes from image to image: eight chunks of eight images lie in different banks.
        pitch = (-(-(planes * pixels + _CHUNK - math.gcd(planes * pixels, _CHUNK)) // _CHUNK) | 1) * _CHUNK
        margin = -min(0, first) * _CHUNK
        behind = (plane_warps * chunks + offsets + 2) * _CHUNK
        pixel_sums = min(4, chunks) * _CHUNK * (offsets * _CHUNK + 1)
        shared = max((margin + stages * 2 * images * pitch + behind) * _SIZE, warps * max(pixel_sums, taps * 33) * 4)
        if shared > budget or -(-g.K // planes) > MAX_GRID[1] or 32 * warps > MAX_DIVIDEND:
            continue
        turns = -(-g.N // images)
        base = dict(
            plane_chunks=plane_chunks,
            chunks=chunks,
            first=first,
            offsets=offsets,
            planes=planes,
            plane_warps=plane_warps,
            images=images,
            stages=stages,
            pitch=pitch,
            margin=margin,
            shared_bytes=shared,
            registers=min(255, max(80, 40 + sums + 2 * chunks)),
        )
        tile = Tile(slabs=1, **base)
        held = target.multiprocessors * tile.blocks(target)
        for slabs in sorted({1, *(max(1, min(turns, part * held // -(-g.K // planes))) for part in (1, 2))}):
            yield Tile(slabs=-(-turns // -(-turns // slabs)), **base)


def _cost(g: Conv2dGeometry, bias: bool, target: Target, tile: Tile) -> float:
    """What ranks tiles: clocks of a multiprocessor, roughly."""
    warps = tile.threads / 32
    turns = _block_images(g, tile) / tile.images
    steps = tile.images / _STEP
    products = _products(tile.chunks, tile.plane_chunks, tile.first, tile.offsets) + bias * tile.chunks
    loads = (tile.chunks + tile.offsets) / 2 + tile.chunks / 2
    of_turn = steps * warps * (products + loads + 14 + 2 * bias * tile.chunks) + 8 * 2 * tile.images + 60 * warps
    once = warps * (400 + 4 * products * 2 + (g.R * g.S) * (8 + 4 * -(-tile.chunks // 4)))
    moved = 2 * tile.images * tile.planes * g.H * g.W * _SIZE / 18
    held = tile.blocks(target)
    grid = tile.slabs * -(-g.K // tile.planes)
    full, rest = divmod(grid, held * target.multiprocessors)
    time = 0.0
    for count in [held] * full + ([-(-rest // target.multiprocessors)] if rest else []):
        time += turns * max(count * max(moved, of_turn / 3), 400 + of_turn) + 2500 + count * once / 3
    return time + 4400 * (tile.slabs > 1)
