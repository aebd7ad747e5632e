"""From geometry, dtype and device to a frozen Plan: which kernel, its compile-time values, its grid and its block.

Planning is pure arithmetic on integers: it needs no GPU, searches nothing by trial and is cached.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from .geometry import Conv2dGeometry

# The C++ name (cuda/numbers.cuh) and the bytes of every dtype.
DTYPES = {"float16": ("f16", 2), "bfloat16": ("bf16", 2), "float32": ("f32", 4), "float64": ("f64", 8)}

MAX_GRID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Target:
    """What planning needs to know of a device; shared memory in bytes."""

    architecture: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


# A usual device of each architecture, by which kernels are planned and compiled where there is none: shared memory as
# in the table of compute capabilities of the CUDA programming guide.
TARGETS = {
    target.architecture: target
    for target in (
        Target(75, 40, 64 * 1024, 64 * 1024),
        Target(80, 108, 163 * 1024, 164 * 1024),
        Target(86, 84, 99 * 1024, 100 * 1024),
        Target(89, 128, 99 * 1024, 100 * 1024),
        Target(90, 132, 227 * 1024, 228 * 1024),
        Target(100, 148, 227 * 1024, 228 * 1024),
        Target(120, 170, 99 * 1024, 100 * 1024),
    )
}


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch of cuda/<source>.cu, whose entry has the same name."""

    source: str
    defines: tuple[tuple[str, int | str], ...]
    grid: int
    block: int
    shared_bytes: int
    parameters: tuple[tuple[str, int], ...]

    def parameter_struct(self) -> np.void:
        """The kernel's by-value Parameters: 32-bit integers in order, but for 64-bit ones, which are named total_*."""
        fields = [(name, np.int64 if name.startswith("total_") else np.int32) for name, _ in self.parameters]
        struct: np.void = np.zeros(1, np.dtype(fields, align=True))[0]
        for name, value in self.parameters:
            struct[name] = value
        return struct


class Unsuitable(ValueError):
    """The variant cannot run this geometry on this device."""


_forced: ContextVar[str | None] = ContextVar("cuconv_variant", default=None)


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Within the context, in this thread, every call takes the kernel variant `name`, or raises where it cannot run.

    For tests and measurements: the plan's own choice is never slower on purpose.

    >>> import cuconv.plan
    >>> with cuconv.plan.variant("direct"):
    ...     pass
    """
    if name not in DEPTHWISE_FORWARD:
        raise ValueError(f"variant must be one of {', '.join(DEPTHWISE_FORWARD)}, and is {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_variant() -> str | None:
    return _forced.get()


@lru_cache(maxsize=4096)
def depthwise_forward(geometry: Conv2dGeometry, dtype: str, target: Target, forced: str | None = None) -> Plan:
    """The plan of a depthwise forward convolution; Unsuitable, a ValueError, where the forced variant cannot run."""
    if forced is not None:
        return DEPTHWISE_FORWARD[forced](geometry, dtype, target)
    try:
        return _forward_runs(geometry, dtype, target)
    except Unsuitable:
        return _forward_direct(geometry, dtype, target)


# Direct: one output a thread.

_DIRECT_THREADS = 256


def _forward_direct(g: Conv2dGeometry, dtype: str, target: Target) -> Plan:
    grid = -(-g.y_size // _DIRECT_THREADS)
    if grid > MAX_GRID:
        raise Unsuitable(f"variant direct: {g.y_size} outputs are more than one launch can count")
    small = max(g.x_size, g.y_size) <= 2**31 - 1
    return Plan(
        source="depthwise_forward_direct",
        defines=(("T", DTYPES[dtype][0]), ("INDEX", "int" if small else "int64")),
        grid=grid,
        block=_DIRECT_THREADS,
        shared_bytes=0,
        parameters=(
            ("multiplier", g.multiplier),
            ("K", g.K),
            ("R", g.R),
            ("S", g.S),
            *_plane_parameters(g),
            ("total_outputs", g.y_size),
        ),
    )


# Runs: see cuda/runs.cuh and cuda/depthwise_forward_runs.cu.

# Weights live in registers, and kernels are unrolled over them: beyond this many, the direct kernel.
_RUNS_MAX_TAPS = 64
# Outputs that a thread makes down a column, for (slide, float64). More rows share more loads: 16 rows take 18 rows of
# input at 3x3, and 7 and 14 fit the planes that networks have most. A sum in float64 takes two registers, and without
# sharing, more rows only take registers.
_RUNS_ROWS = {(True, False): (16, 14, 8, 7, 4), (True, True): (8, 7, 4), (False, False): (4,), (False, True): (2,)}
_RUNS_THREADS = (256, 128, 64)
_RUNS_IMAGES = (1, 2, 4, 8)
# Blocks a multiprocessor that overlap loading, arithmetic and storing: at 3x3 on 512 x 512, six small ones took 98.7 %
# of the floor and three of twice the size 97.0 (float32, H200); fewer where rows are too long for six.
_RUNS_BLOCKS = (6, 3, 1)
# Threads a multiprocessor that keep it busy.
_RUNS_BUSY_THREADS = 768
# Static shared memory and what the system keeps for itself, a block.
_SHARED_RESERVE = 1024 + 128


@dataclass(frozen=True, slots=True)
class _RunsTile:
    """One way to cut the work among threads and blocks."""

    rows: int  # outputs of a thread
    columns: int
    block_rows: int
    block_planes: int
    block_images: int
    threads: int
    input_bytes: int  # of one image of a block
    output_bytes: int

    @property
    def stages(self) -> int:
        return min(2, self.block_images)

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.input_bytes + self.output_bytes)


def _forward_runs(g: Conv2dGeometry, dtype: str, target: Target) -> Plan:
    if target.architecture < 90:
        raise Unsuitable(f"variant runs: needs compute capability 9.0, and the device has {target.architecture / 10}")
    if g.R * g.S > _RUNS_MAX_TAPS:
        raise Unsuitable(f"variant runs: takes at most {_RUNS_MAX_TAPS} taps, and the kernel has {g.R} x {g.S}")
    for blocks in _RUNS_BLOCKS:
        budget = min(target.shared_per_block, target.shared_per_multiprocessor // blocks) - _SHARED_RESERVE
        tiles = list(_runs_tiles(g, dtype, budget))
        if tiles:
            return _runs_plan(g, dtype, min(tiles, key=lambda tile: _runs_cost(g, target, tile)))
    raise Unsuitable(f"variant runs: {g.R} rows of {g.W} elements do not fit shared memory")


def _runs_plan(g: Conv2dGeometry, dtype: str, tile: _RunsTile) -> Plan:
    slide = _slides(g)
    image_planes, images = _runs_images(g, tile)
    plane_groups = -(-image_planes // tile.block_planes)
    row_groups = -(-g.P // tile.block_rows)
    grid = -(-images // tile.block_images) * plane_groups * row_groups
    if grid > MAX_GRID:
        raise Unsuitable(f"variant runs: {grid} blocks are more than one launch can count")
    return Plan(
        source="depthwise_forward_runs",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("R", g.R),
            ("S", g.S),
            ("PADDED", int(g.padded)),
            ("THREADS", tile.threads),
            ("ROWS", tile.rows),
            ("COLUMNS", tile.columns),
            ("SLIDE", int(slide)),
            ("STRIDE_H", g.stride[0] if slide else 1),
            ("STRIDE_W", g.stride[1] if slide else 1),
        ),
        grid=grid,
        block=tile.threads,
        shared_bytes=tile.shared_bytes,
        parameters=(
            ("multiplier", g.multiplier),
            ("K", g.K),
            *_plane_parameters(g),
            ("image_planes", image_planes),
            ("images", images),
            ("block_planes", tile.block_planes),
            ("block_rows", tile.block_rows),
            ("block_images", tile.block_images),
            ("plane_groups", plane_groups),
            ("row_groups", row_groups),
            ("stages", tile.stages),
            ("input_bytes", tile.input_bytes),
            ("output_bytes", tile.output_bytes),
            ("total_planes", g.N * g.K),
        ),
    )


def _slides(g: Conv2dGeometry) -> bool:
    """Whether a loaded value serves several outputs: the kernel's SLIDE."""
    return g.dilation == (1, 1) and max(g.stride) <= 2


def _runs_images(g: Conv2dGeometry, tile: _RunsTile) -> tuple[int, int]:
    """Planes of an image, and images, as the kernel counts them: images so small that a block takes several are seen
    as fewer images with more planes."""
    fold = max(1, tile.block_planes // g.K)
    return fold * g.K, -(-g.N // fold)


def _runs_tiles(g: Conv2dGeometry, dtype: str, budget: int) -> Iterator[_RunsTile]:
    """The tiles that fit `budget` bytes of shared memory: a piece of one plane, or several whole planes, of one image
    or of several in turn."""
    size = DTYPES[dtype][1]
    slide = _slides(g)
    # Two 16-bit columns share a bank of shared memory; more, or two of 32 bits, would meet in one.
    columns = 2 if slide and size == 2 else 1
    column_items = -(-g.Q // columns)
    reach = (g.R - 1) * g.dilation[0] + 1
    for rows in _RUNS_ROWS[slide, size == 8]:
        for pieces in range(1, -(-g.P // rows) + 1):
            block_rows = min(g.P, pieces * rows)
            whole = block_rows == g.P
            # Rows that a thread may look at, though it may not store what comes of the last of them.
            input_rows = (pieces * rows - 1) * g.stride[0] + reach
            if (input_rows + max(g.padding[0])) * g.W > 2**31 - 1:
                break  # offsets of rows, those in the padding too, are 32-bit integers
            if g.padded:
                input_rows = min(input_rows, g.H)
            if (input_rows * g.W + block_rows * g.Q) * size > budget:
                break
            images = [i for i in _RUNS_IMAGES if i == 1 or (whole and i <= g.N)]
            for threads in _RUNS_THREADS:
                # Whole planes: as many as there are threads for, or a part of them.
                most = max(1, min(threads // (pieces * column_items), g.N * g.K)) if whole else 1
                for planes, block_images in product({-(-most // part) for part in (1, 2, 4, 8)}, images):
                    block_planes = planes - planes % g.K if planes > g.K else planes
                    # Output planes that begin in the midst of an input plane's may need one input plane more.
                    input_planes = min(block_planes, (block_planes - 2) // g.multiplier + 2) if block_planes > 1 else 1
                    input_elements = (input_planes - 1) * g.H * g.W + input_rows * g.W + columns * g.stride[1]
                    output_elements = (block_planes - 1) * g.P * g.Q + block_rows * g.Q
                    tile = _RunsTile(
                        rows=rows,
                        columns=columns,
                        block_rows=block_rows,
                        block_planes=block_planes,
                        block_images=block_images,
                        threads=threads,
                        input_bytes=_run_bytes(input_elements * size),
                        output_bytes=_run_bytes(output_elements * size),
                    )
                    if tile.shared_bytes <= budget:
                        yield tile


def _run_bytes(size: int) -> int:
    """Shared bytes for a run of `size` bytes that starts anywhere within 16; the next one starts at a cache line."""
    return -(-(size + 16) // 128) * 128


def _runs_cost(g: Conv2dGeometry, target: Target, tile: _RunsTile) -> float:
    """A rough count of issue slots an output, the waiting for memory counted in: good enough to rank tiles."""
    if _slides(g):
        span_rows = (tile.rows - 1) * g.stride[0] + g.R
        loads = span_rows * ((tile.columns - 1) * g.stride[1] + g.S) / (tile.rows * tile.columns)
    else:
        loads = g.R * g.S
    outputs = tile.block_planes * tile.block_rows * g.Q
    items = tile.block_planes * -(-tile.block_rows // tile.rows) * -(-g.Q // tile.columns)
    # Lanes with nothing to do, and the last block of a plane with few rows left.
    idle = -(-items // tile.threads) * tile.threads * tile.rows * tile.columns / outputs
    row_groups = -(-g.P // tile.block_rows)
    idle *= row_groups * tile.block_rows / g.P
    # The halo comes from L2, and costs about ten slots for each time that the input is read.
    needed = (tile.block_rows - 1) * g.stride[0] + (g.R - 1) * g.dilation[0] + 1
    halo = 1.0 if row_groups == 1 else needed / (tile.block_rows * g.stride[0])
    # A block costs about a hundred slots a thread before and after its arithmetic, an image of it about twenty.
    overhead = (20 + 80 / tile.block_images) * tile.threads / outputs
    image_planes, images = _runs_images(g, tile)
    blocks = -(-images // tile.block_images) * -(-image_planes // tile.block_planes) * row_groups
    resident = min(target.shared_per_multiprocessor // (tile.shared_bytes + _SHARED_RESERVE), 2048 // tile.threads)
    starved = max(1.0, _RUNS_BUSY_THREADS / (tile.threads * resident))
    # Waves of blocks: the last one is never full.
    waves = blocks / (target.multiprocessors * resident)
    return ((loads + g.R * g.S + 4) * idle + overhead + 10 * halo) * starved * (1 + 0.5 / waves)


def _plane_parameters(g: Conv2dGeometry) -> tuple[tuple[str, int], ...]:
    return (
        ("H", g.H),
        ("W", g.W),
        ("P", g.P),
        ("Q", g.Q),
        ("top", g.padding[0][0]),
        ("left", g.padding[1][0]),
        ("stride_h", g.stride[0]),
        ("stride_w", g.stride[1]),
        ("dilation_h", g.dilation[0]),
        ("dilation_w", g.dilation[1]),
    )


DEPTHWISE_FORWARD = {"runs": _forward_runs, "direct": _forward_direct}
