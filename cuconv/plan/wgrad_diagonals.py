"""Gradients of weights and bias on tensor cores, 16-bit, for compute capability 9.0 and newer: see
cuda/depthwise_wgrad_diagonals.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from .runs import bank_passes
from .wgrad import WgradPlan, clustered, slabs_of_cluster, with_reduce

_SIZE = 2
# Columns of a chunk, and rows of dy in a product: see the kernel.
_CHUNK, _STEP = 8, 16
# A warp's products of one step are unrolled: so many chunks of a row and pairs of kernel rows.
_MAX_CHUNKS = 16
_PAIRS = (4, 8)
# Sums of a lane.
_MAX_SUMS = 112
# Blocks and registers of a multiprocessor.
_MAX_BLOCKS, _REGISTERS = 32, 65536
_PLANES = (1, 2, 4)
_IMAGES = (1, 2, 3, 4, 6, 8, 16, 32)
_PARTS = (1, 2, 4, 8)
# Of a block: more than the former only where the kernel has as many groups of rows.
_USUAL_WARPS, _MAX_WARPS = 8, 16


@dataclass(frozen=True, slots=True)
class Window:
    """How rows of x are laid out, `shift` zeros first, and which of their chunks those of dy meet: chunk d of dy the
    chunk d + first + t of x for every bit t of `apart`."""

    shift: int
    vector: int
    first: int
    apart: int
    x_chunks: int
    dy_chunks: int

    @property
    def offsets(self) -> int:
        return self.apart.bit_length()

    @property
    def products(self) -> int:
        """Of 16 rows and one pair of kernel rows."""
        meeting = [self.first + t for t in range(self.offsets) if self.apart >> t & 1]
        return sum(0 <= d + t < self.x_chunks for d, t in product(range(self.dy_chunks), meeting))


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block takes at a time: whole planes of several images, each the work of row_groups * parts warps."""

    window: Window
    pairs: int
    row_groups: int
    parts: int
    planes: int
    images: int
    slabs: int
    gap: int
    x_unit: int
    dy_unit: int
    x_layout_bytes: int
    dy_layout_bytes: int
    sums_bytes: int

    @property
    def threads(self) -> int:
        return 32 * self.planes * self.row_groups * self.parts

    @property
    def zeros_bytes(self) -> int:
        return (self.window.dy_chunks | 1) * _CHUNK * _SIZE

    @property
    def layout_bytes(self) -> int:
        return self.x_layout_bytes + self.dy_layout_bytes + self.zeros_bytes

    @property
    def shared_bytes(self) -> int:
        arrivals = self.planes * self.images * (self.x_unit + self.dy_unit) * _SIZE
        # Two chunks more, since what lies behind the last row is loaded too.
        return max(self.layout_bytes + arrivals + 2 * _CHUNK * _SIZE, self.sums_bytes)

    @property
    def registers(self) -> int:
        """That a thread is allowed."""
        single = 8 * (self.window.vector == 1)
        return min(255, 48 + single + 4 * self.pairs * self.window.offsets + 2 * self.window.dy_chunks)

    @property
    def blocks_of_registers(self) -> int:
        """That the registers of a multiprocessor are enough for, which the compiler is held to. Each of its four
        schedulers has a quarter of them."""
        warps = _REGISTERS // (4 * 32 * -(-self.registers // 8) * 8) * 4
        return max(1, min(_MAX_BLOCKS, 32 * warps // self.threads))

    def blocks(self, target: Target) -> int:
        """That a multiprocessor holds at once."""
        shared = target.shared_per_multiprocessor // (self.shared_bytes + SHARED_RESERVE)
        return max(1, min(shared, self.blocks_of_registers))

    def clustered(self, g: Conv2dGeometry, target: Target) -> bool:
        """Whether its slabs are a cluster."""
        return bool(clustered(self.slabs, -(-g.K // self.planes), target.multiprocessors * self.blocks(target)))


def beats_others(g: Conv2dGeometry, dtype: str, target: Target) -> bool:
    """Where this takes less time than depthwise_wgrad_runs.

    On an H200, percent of the memory floor by this and by runs in bfloat16: 7x7 on 56x56 62 and 28, on 28x28 50 and 24,
    on 14x14 41 and 22; 5x5 on 56x56 53 and 45, on 28x28 54 and 48; 3x3 on 56x56 74 and 79, on 28x28 61 and 70; 3x3 of
    dilation 12 on 65x65 38 and 25.
    """
    return DTYPES[dtype][1] == _SIZE and (g.R * g.S >= 25 or g.dilation != (1, 1))


def diagonals(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> WgradPlan:
    """Every element of x and dy is read once."""
    if DTYPES[dtype][1] != _SIZE:
        raise Unsuitable(f"takes float16 and bfloat16, and the dtype is {dtype}")
    require_nchw(g)
    if target.architecture < 90:
        raise Unsuitable(f"needs compute capability 9.0, and the device has {target.architecture / 10}")
    if g.multiplier > 1 or g.stride[1] > 1:
        raise Unsuitable(
            f"takes one output channel an input channel, and rows of stride 1; has {g.multiplier}, {g.stride}"
        )
    if not aligned or g.C * g.H * g.W % _CHUNK or g.K * g.P * g.Q % _CHUNK:
        raise Unsuitable("takes images that start at multiples of 16 bytes")
    choices = list(tiles(g, bias, target))
    if not choices:
        raise Unsuitable(f"planes of {g.H} x {g.W} elements, padded, do not fit shared memory and one launch")
    return tile_plan(g, dtype, bias, target, min(choices, key=lambda tile: _cost(g, bias, target, tile)))


def tile_plan(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, tile: Tile) -> WgradPlan:
    """The plan of one choice of tiles()."""
    window = tile.window
    slabs = tile.slabs
    cluster = tile.clustered(g, target)
    sums = Plan(
        source="depthwise_wgrad_diagonals",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("BIAS", int(bias)),
            ("FINAL", int(slabs == 1 or cluster)),
            ("CLUSTER", slabs if cluster else 1),
            ("THREADS", tile.threads),
            ("BLOCKS", tile.blocks_of_registers),
            ("VECTOR", window.vector),
            ("DOWN", int(_down(g, window))),
            ("DENSE", int((tile.x_unit, tile.dy_unit) == (g.H * g.W, g.P * g.Q))),
            ("GROUPED", int(tile.row_groups > 1)),
            ("DILATED", int(g.dilation[0] > 1)),
            ("PAIRS", tile.pairs),
            ("X_CHUNKS", window.x_chunks),
            ("DY_CHUNKS", window.dy_chunks),
            ("FIRST", window.first),
            ("APART", window.apart),
        ),
        grid=(slabs, -(-g.K // tile.planes), 1),
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("shift", window.shift),
            ("gap", tile.gap),
            ("x_unit", tile.x_unit),
            ("dy_unit", tile.dy_unit),
            ("layout_bytes", tile.layout_bytes),
            ("x_layout_bytes", tile.x_layout_bytes),
            ("zeros", tile.dy_layout_bytes // _SIZE),
            ("x_arrival_bytes", tile.planes * tile.images * tile.x_unit * _SIZE),
            ("H_magic", magic(g.H)),
            ("P_magic", magic(g.P)),
            ("images", tile.images),
            ("all_images", g.N),
            ("block_images", _block_images(g, tile)),
            ("block_planes", tile.planes),
            ("row_groups", tile.row_groups),
            ("parts", tile.parts),
        ),
    )
    return WgradPlan(sums, None, 0) if slabs == 1 or cluster else with_reduce(sums, slabs, g, dtype, bias)


def _block_images(g: Conv2dGeometry, tile: Tile) -> int:
    """Images of a slab: whole turns."""
    turns = -(-g.N // tile.images)
    return -(-turns // tile.slabs) * tile.images


def _down(g: Conv2dGeometry, window: Window) -> bool:
    """Whether neighbouring rows, as they arrive, lie in more banks than neighbouring chunks of a row. Where single
    elements are loaded rows do so, too, and yet take longer."""
    passes = max(bank_passes(width * _SIZE, _SIZE) for width in (g.W, g.Q))
    return window.vector > 1 and passes < bank_passes(_CHUNK * _SIZE, _SIZE)


def _window(g: Conv2dGeometry) -> Window | None:
    """The layout with the fewest products, of those the one that takes the fewest loads."""
    dy_chunks = -(-g.Q // _CHUNK)
    windows = []
    for shift in range(_CHUNK + 1):
        starts = [s * g.dilation[1] - g.padding[1][0] + shift for s in range(g.S)]
        meeting = sorted({start // _CHUNK for start in starts} | {(start + _CHUNK - 1) // _CHUNK for start in starts})
        first = meeting[0]
        # Every chunk of dy meets one of x, if only of zeros, so that an infinity in dy is noticed.
        x_chunks = max(-(-(g.W + shift) // _CHUNK), dy_chunks + first)
        if meeting[-1] < 0 or max(x_chunks, dy_chunks) > _MAX_CHUNKS:
            continue
        meeting = [t for t in meeting if -dy_chunks < t < x_chunks]
        first = meeting[0]
        apart = sum(1 << (t - first) for t in meeting)
        windows.append(Window(shift, math.gcd(_CHUNK, g.W, g.Q, shift), first, apart, x_chunks, dy_chunks))
    return min(windows, key=lambda w: (w.products + 0.1 * w.x_chunks * (_CHUNK / w.vector), w.shift), default=None)


def tiles(g: Conv2dGeometry, bias: bool, target: Target) -> Iterator[Tile]:
    """The tiles that fit the device's shared memory."""
    window = _window(g)
    if window is None or g.H * g.W > 2**30:
        return
    budget = target.shared_per_block - SHARED_RESERVE
    all_pairs = -(-g.R // 2)
    gap = max(g.padding[0])
    x_pitch, dy_pitch = (chunks | 1 for chunks in (window.x_chunks, window.dy_chunks))
    pairs_choices = set()
    for most in _PAIRS:
        groups = -(-all_pairs // max(1, min(most, _MAX_SUMS // (4 * window.offsets))))
        pairs_choices.add((-(-all_pairs // groups), groups))
    for (pairs, groups), planes, parts, images in product(sorted(pairs_choices), _PLANES, _PARTS, _IMAGES):
        warps, slots = planes * groups * parts, images * planes
        steps = -(-images * g.P // _STEP)
        if warps > max(_USUAL_WARPS, groups) or groups > _MAX_WARPS or parts > steps or planes > g.K or images > g.N:
            continue
        if planes > 1 and any(planes * plane % _CHUNK for plane in (g.H * g.W, g.P * g.Q)):
            continue
        if max(slots * max(g.H, g.P), 32 * warps) + 32 * warps > MAX_DIVIDEND:
            continue
        # Below the last plane as many zeros, and as many rows more as the last group of kernel rows has in excess.
        rows = slots * (gap + g.H) + gap + (2 * pairs * groups - g.R) * g.dilation[0]
        tile = Tile(
            window=window,
            pairs=pairs,
            row_groups=groups,
            parts=parts,
            planes=planes,
            images=images,
            slabs=1,
            gap=gap,
            x_unit=_unit(g.H * g.W, planes),
            dy_unit=_unit(g.P * g.Q, planes),
            x_layout_bytes=rows * x_pitch * _CHUNK * _SIZE,
            dy_layout_bytes=slots * g.P * dy_pitch * _CHUNK * _SIZE,
            sums_bytes=4 * (32 * warps * 4 * (pairs * window.offsets + bias) + planes * (g.R * g.S + bias)),
        )
        channel_groups = -(-g.K // planes)
        if tile.shared_bytes > budget or channel_groups > MAX_GRID[1]:
            continue
        turns = -(-g.N // images)
        held = target.multiprocessors * tile.blocks(target)
        # One slab, or a cluster of them, or as many as fill the device once or twice.
        filling = max(1, min(turns, held // channel_groups))
        twice = max(1, min(turns, 2 * held // channel_groups))
        for slabs in sorted({1, min(turns, int(slabs_of_cluster(channel_groups, held))), filling, twice}):
            yield replace(tile, slabs=-(-turns // -(-turns // slabs)))


def _unit(plane: int, planes: int) -> int:
    """Elements from one plane to the next, as they arrive. One by itself starts at any multiple of what it and a chunk
    have in common."""
    if planes > 1 or plane % _CHUNK == 0:
        return plane
    return -(-(plane + _CHUNK - math.gcd(plane, _CHUNK)) // _CHUNK) * _CHUNK


def _cost(g: Conv2dGeometry, bias: bool, target: Target, tile: Tile) -> float:
    """What ranks tiles: the clocks of a multiprocessor.

    The weights were fitted to the times of 850 tiles (12 cases in bfloat16 on an H200). Of those that were measured,
    the tile of least cost takes 2 % longer than the fastest on average where this is the default, and at most 5 %.
    """
    window = tile.window
    turns = -(-_block_images(g, tile) // tile.images)
    steps = -(-tile.images * g.P // _STEP)
    warps = tile.threads / 32
    # Of a turn, instructions of warps: what lays out chunks; products and the loads of their operands.
    chunks = tile.planes * tile.images * (g.H * window.x_chunks + g.P * window.dy_chunks) / 32
    pieces = _CHUNK / window.vector
    laying = chunks * (pieces * (1.5 if window.vector == 1 else 1) + 10)
    fragments = tile.row_groups * (tile.pairs * window.x_chunks + window.dy_chunks / 2)
    products = tile.row_groups * tile.pairs * window.products + window.dy_chunks
    issue = (
        laying + tile.planes * steps * (products + fragments + 25 * tile.row_groups) + 150 * warps + 40 * tile.images
    )
    # Passes over shared memory.
    passes = tile.planes * steps * fragments * 4 + chunks * (pieces + 4) * 1.3
    # What one block does in turn, whatever others do.
    rounds = -(-steps // tile.parts)
    serial = laying / warps + rounds * (tile.pairs * (window.products + window.x_chunks) + 25)
    once = warps * 16 * tile.pairs * window.offsets + tile.layout_bytes / 128 + tile.planes * g.R * g.S * tile.parts
    of_multiprocessor = -(-tile.slabs * -(-g.K // tile.planes) // target.multiprocessors)
    in_turn = -(-of_multiprocessor // tile.blocks(target))
    time = of_multiprocessor * (turns * (0.21 * issue + 0.65 * passes) + 0.035 * once)
    time += in_turn * (turns * (2.2 * serial + 750) + 4700)
    # Another launch, or that blocks of a cluster wait for each other.
    return time + (0 if tile.slabs == 1 else 1000 if tile.clustered(g, target) else 5000)
