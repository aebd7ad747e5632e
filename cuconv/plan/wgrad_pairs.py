"""Gradients of weights and bias on tensor cores, small planes in 16-bit, for compute capability 9.0 and newer: see
cuda/depthwise_wgrad_pairs.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..geometry import Conv2dGeometry
from .base import (
    DTYPES,
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
# Larger planes have more sums than the registers of a multiprocessor hold.
_MAX_PIXELS = 256
_MAX_TAPS = 64
_MAX_THREADS = 512
# Registers of a multiprocessor, and of a thread: more than the latter spill.
_REGISTERS, _MAX_REGISTERS = 65536, 255
# Blocks of a multiprocessor.
_MAX_BLOCKS = 32
_STAGES = 2
# On an H200 these chunks of dy a warp and planes a block were fastest among 30 to 200 tiles a case: the former while
# 128 registers a thread are enough, then the latter. 3x3 on 14x14 took 19.0 us so and 20.6 with one plane and 4 chunks;
# 5x5 on 7x7 13.3 and 14.2 with two planes and 4 chunks.
_MANY, _FEW = (7, 4), (4, 1)
_REGISTERS_OF_MANY = 136
# Chunks of x that a chunk of dy meets: 7x7 on 14x14, which has 13, takes 34.1 us, and depthwise_wgrad_diagonals 30.0;
# 5x5 there has 9, and takes 30.2 and 37.2.
_MOST_OFFSETS = 10


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
        warps = _REGISTERS // (4 * 32 * -(-self.registers // 8) * 8) * 4
        return min(_MAX_BLOCKS, 32 * warps // self.threads)

    def blocks(self, target: Target) -> int:
        """That a multiprocessor holds at once."""
        if self.shared_bytes > target.shared_per_block - SHARED_RESERVE:
            return 0
        shared = target.shared_per_multiprocessor // (self.shared_bytes + SHARED_RESERVE)
        return min(shared, self.blocks_of_registers)

    def fits(self, g: Conv2dGeometry, target: Target) -> bool:
        held = self.registers <= _MAX_REGISTERS and self.threads <= _MAX_THREADS and self.blocks(target) > 0
        return held and self.planes <= g.K <= self.planes * MAX_GRID[1]


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_wgrad_runs, and than depthwise_wgrad_diagonals.

    On an H200, percent of the memory floor by this and by runs in bfloat16, of 128 images: 3x3 on 7x7 61 and 46, on
    14x14 66 and 63; 5x5 on 7x7 55 and 37, on 14x14 54 and 41; 7x7 on 7x7 42 and 13. Products take 16 images at once.
    """
    return DTYPES[dtype][1] == _SIZE and g.N >= 2 * _STEP and _offsets(g)[1] <= _MOST_OFFSETS


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
            f"takes planes of up to {_MAX_PIXELS} elements and kernels of {_MAX_TAPS}, and these have "
            f"{g.H} x {g.W} and {g.R} x {g.S}"
        )
    if not aligned or g.K * g.H * g.W % _CHUNK:
        raise Unsuitable("takes images that start at multiples of 16 bytes")
    choices = [choice for choice in tiles(g, bias) if choice.fits(g, target)]
    if not choices:
        raise Unsuitable(f"{g.R} x {g.S} taps and planes of {g.H} x {g.W} elements do not fit registers and one launch")
    return tile_plan(g, dtype, bias, replace(choices[0], slabs=_slabs(g, target, choices[0])))


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, tile: Tile) -> WgradPlan:
    """The plan of one tile."""
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
            ("STAGES", _STAGES),
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


def _offsets(g: Conv2dGeometry) -> tuple[int, int]:
    """Chunk d of dy meets so many chunks of x, of which the first is d plus the first of these numbers."""
    nearest = -g.padding[0][0] * g.W - g.padding[1][0]
    first = nearest // _CHUNK
    return first, (nearest + (g.R - 1) * g.W + g.S - 1 + _CHUNK - 1) // _CHUNK - first + 1


def tiles(g: Conv2dGeometry, bias: bool) -> Iterator[Tile]:
    """The preferred tile first; then those with fewer planes and chunks, which need less."""
    chunks, planes = _MANY
    if make_tile(g, bias, chunks, 1, _STEP).registers > _REGISTERS_OF_MANY:
        chunks, planes = _FEW
    # 3x3 took 10.3 us of 32 images on 7x7 and 10.7 of 16; on 14x14 these were four planes' fastest, 19.0 and 19.3.
    images = _STEP if planes * g.H * g.W > 512 else 2 * _STEP
    while planes > 1:
        yield make_tile(g, bias, chunks, planes, images)
        planes //= 2
    while chunks > 0:
        yield make_tile(g, bias, chunks, 1, images)
        chunks //= 2


def make_tile(g: Conv2dGeometry, bias: bool, chunks: int, planes: int, images: int, slabs: int = 1) -> Tile:
    """Of so many chunks of dy a warp, as far as a plane has them, and so many planes and images a block."""
    pixels = g.H * g.W
    # A plane starts at any multiple of what it and a chunk have in common.
    plane_chunks = -(-(pixels + _CHUNK - math.gcd(pixels, _CHUNK)) // _CHUNK)
    chunks = min(chunks, plane_chunks)
    plane_warps = -(-plane_chunks // chunks)
    first, offsets = _offsets(g)
    # An odd number of 16 bytes from image to image: eight chunks of eight images lie in different banks.
    run = planes * pixels
    pitch = (-(-(run + _CHUNK - math.gcd(run, _CHUNK)) // _CHUNK) | 1) * _CHUNK
    margin = -min(0, first) * _CHUNK
    behind = (plane_warps * chunks + offsets + 2) * _CHUNK
    arrivals = (margin + _STAGES * 2 * images * pitch + behind) * _SIZE
    # In the end, in float32: the sums of four chunks at a time; every lane's of every tap.
    sums = max(min(4, chunks) * _CHUNK * (offsets * _CHUNK + 1), (g.R * g.S + bias) * 33) * 4
    return Tile(
        plane_chunks=plane_chunks,
        chunks=chunks,
        first=first,
        offsets=offsets,
        planes=planes,
        plane_warps=plane_warps,
        images=images,
        slabs=slabs,
        pitch=pitch,
        margin=margin,
        shared_bytes=max(arrivals, planes * plane_warps * sums),
        registers=max(80, 30 + 4 * _products(chunks, plane_chunks, first, offsets) + 2 * chunks),
    )


def _slabs(g: Conv2dGeometry, target: Target, tile: Tile) -> int:
    """One, which takes one launch, where there are enough planes; else as many as fill the device once."""
    groups = -(-g.K // tile.planes)
    turns = -(-g.N // tile.images)
    # 128 blocks on 132 multiprocessors are enough planes.
    slabs = max(1, min(turns, target.multiprocessors * tile.blocks(target) // groups))
    return 1 if 16 * groups >= 15 * target.multiprocessors else -(-turns // -(-turns // slabs))
