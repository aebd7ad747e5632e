"""The gradients of a separable convolution, in memory that has no room for what is in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd, prod

from ..geometry import Conv2dGeometry, Pair, SeparableGeometry
from .base import DTYPES, MAX_GRID, SHARED_RESERVE, VECTOR_BYTES, Plan, Target, Unsuitable
from .pointwise import wgrad_slabs, wgrad_tile
from .separable import SeparableEpilogue, wgrad
from .wgrad import WgradPlan, sum_bytes, with_reduce_of

# Of the bytes of x, what may be allocated besides inputs and results.
WORKSPACE_SHARE = 0.05
# Of that, what pieces may take: the rest is for the sums of weights and what the allocator rounds up.
_PIECES_SHARE = 0.6
# Of that, what the partial sums of pointwise weights may take.
_PARTIALS_SHARE = 0.2
# Stages of every kernel of pointwise weight gradients divide so many pixels.
_SLAB_PIXELS = 128
_ALIGNMENT = 256
_ACTIVATION_THREADS = 256


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of the depthwise result and those of x that they are made of, or that they make the gradient of, with
    the padding that makes a convolution of them by themselves."""

    first: int  # of the result
    end: int
    first_of_x: int
    end_of_x: int
    padding: Pair

    @property
    def count(self) -> int:
        return self.end - self.first

    @property
    def count_of_x(self) -> int:
        return self.end_of_x - self.first_of_x


@dataclass(frozen=True, slots=True)
class Piece:
    """Images, and of each of them some rows of the middle, with those of x that they are made of. Sums are made over
    them, or not, and from their gradient rows of dx, or none."""

    first_image: int
    end_image: int
    rows: Rows
    summed: bool
    of_dx: Rows | None

    @property
    def images(self) -> int:
        return self.end_image - self.first_image


def rows_forward(g: Conv2dGeometry, first: int, end: int) -> Rows:
    """Rows of the result, and all rows of x that they are made of. The first of them is to begin within x or above."""
    top, stride = g.padding[0][0], g.stride[0]
    reach = g.dilation[0] * (g.R - 1) + 1
    start, stop = first * stride - top, (end - 1) * stride - top + reach
    first_of_x = max(0, start)
    end_of_x = max(first_of_x + 1, min(g.H, stop))
    return Rows(first, end, first_of_x, end_of_x, (first_of_x - start, max(0, stop - end_of_x)))


def rows_of_gradient(g: Conv2dGeometry, first_of_x: int, end_of_x: int) -> Rows:
    """Rows of x, and all rows of the result that they take part in; one row at least."""
    top, stride = g.padding[0][0], g.stride[0]
    reach = g.dilation[0] * (g.R - 1) + 1
    below = min(g.P - 1, (first_of_x + top) // stride)  # the last one that does not begin below the first row
    first = min(below, max(0, -((reach - 1 - first_of_x - top) // stride)))
    end = max(first + 1, min(g.P, (end_of_x - 1 + top) // stride + 1))
    above = top + first_of_x - first * stride
    behind = (end - first - 1) * stride + reach - (end_of_x - first_of_x) - above
    return Rows(first, end, first_of_x, end_of_x, (above, max(0, behind)))


def part_of(g: SeparableGeometry, images: int, rows: Rows) -> SeparableGeometry:
    """The convolution of these rows by themselves, as arrays (N, C, H, W)."""
    depthwise = replace(
        g.depthwise,
        N=images,
        H=rows.count_of_x,
        P=rows.count,
        padding=(rows.padding, g.depthwise.padding[1]),
        channels_last=False,
    )
    pointwise = replace(g.pointwise, N=images, H=rows.count, P=rows.count, channels_last=False)
    return SeparableGeometry(depthwise, pointwise)


def pieces(g: SeparableGeometry, images: int, cuts: int, sums: bool, dx: bool) -> Iterator[Piece]:
    """All of the batch, so many images at a time, or one, cut into so many parts of about as many rows."""
    depthwise = g.depthwise
    # Rows of the middle that are made of padding alone are parts of the first piece and the last.
    top, stride = depthwise.padding[0][0], depthwise.stride[0]
    reach = depthwise.dilation[0] * (depthwise.R - 1) + 1
    least, most = max(1, -((reach - 1 - top) // stride) + 1), (depthwise.H - 1 + top) // stride
    inner = (max(least, min(most, i * depthwise.P // cuts)) for i in range(1, cuts))
    starts = [0, *(start if start <= most else depthwise.P for start in inner), depthwise.P]
    starts_of_x = [i * depthwise.H // cuts for i in range(cuts + 1)]
    for first_image in range(0, depthwise.N, images):
        end_image = min(depthwise.N, first_image + images)
        for i in range(cuts):
            first, end = (starts[i], starts[i + 1]) if sums else (0, 0)
            of_dx = rows_of_gradient(depthwise, starts_of_x[i], starts_of_x[i + 1]) if dx else None
            together = of_dx is not None and (of_dx.first, of_dx.end) == (first, end)
            if first < end:
                rows = rows_forward(depthwise, first, end)
                yield Piece(first_image, end_image, rows, True, of_dx if together else None)
            if of_dx is not None and not together:
                yield Piece(first_image, end_image, rows_forward(depthwise, of_dx.first, of_dx.end), False, of_dx)


def shapes_of(g: SeparableGeometry, piece: Piece) -> tuple[tuple[int, int, int, int], ...]:
    """Of a piece's arrays: x, dy, the middle, its gradient and, where it makes one, dx."""
    part = part_of(g, piece.images, piece.rows)
    dx = () if piece.of_dx is None else (part_of(g, piece.images, piece.of_dx).depthwise.x_shape,)
    middle = part.depthwise.y_shape
    return part.depthwise.x_shape, part.y_shape, middle, middle, *dx


def piece_bytes(g: SeparableGeometry, piece: Piece, size: int, slope: bool) -> int:
    """What the arrays of a piece take, with one of dy more where that is multiplied by a slope."""
    shapes = shapes_of(g, piece)
    return sum(aligned_bytes(shape, size) for shape in (*shapes, *shapes[1 : 1 + slope]))


def aligned_bytes(shape: tuple[int, ...], size: int) -> int:
    return -(-prod(shape) * size // _ALIGNMENT) * _ALIGNMENT


def fitting_pieces(
    g: SeparableGeometry, dtype: str, slope: bool, sums: bool, dx: bool
) -> tuple[tuple[Piece, ...], int]:
    """As few pieces as fit their share of the workspace, or as many as there are, and the bytes of the largest; slope
    says whether dy is multiplied by one."""
    depthwise = g.depthwise
    size = sum_bytes(dtype)
    most = WORKSPACE_SHARE * _PIECES_SHARE * (1 - _PARTIALS_SHARE) * depthwise.x_size * DTYPES[dtype][1]

    def largest(of: SeparableGeometry, images: int, cuts: int) -> int:
        return max((piece_bytes(of, piece, size, slope) for piece in pieces(of, images, cuts, sums, dx)), default=0)

    of_one = replace_images(g, 1)
    rows = min(depthwise.P, depthwise.H)
    images, cuts = min(depthwise.N, int(most // max(1, largest(of_one, 1, 1)))), 1
    while not images and cuts < rows:
        cuts = min(rows, 2 * cuts)
        images = int(largest(of_one, 1, cuts) <= most)
    images = max(1, images)
    return tuple(pieces(g, images, cuts, sums, dx)), largest(replace_images(g, images), images, cuts)


def replace_images(g: SeparableGeometry, images: int) -> SeparableGeometry:
    return SeparableGeometry(replace(g.depthwise, N=images), replace(g.pointwise, N=images))


def partials_bytes(g: SeparableGeometry, dtype: str) -> int:
    """What partial sums of pointwise weights may take."""
    return int(WORKSPACE_SHARE * _PIECES_SHARE * _PARTIALS_SHARE * g.depthwise.x_size * DTYPES[dtype][1])


def stored_partials_bytes(g: SeparableGeometry, dtype: str) -> int:
    """Likewise, where the middle is stored in the memory of dx, and no pieces are."""
    return int(WORKSPACE_SHARE * _PIECES_SHARE * g.depthwise.x_size * DTYPES[dtype][1])


def stored_beats_others(g: SeparableGeometry, dtype: str, target: Target) -> bool:
    """Where sums of the pointwise weights that fill the device fit the workspace: the kernels of either part are the
    faster ones, and with the middle made on chip those sums find room in the memory of dx."""
    size = DTYPES[dtype][1]
    t = wgrad_tile(g.pointwise, size, stages=3)
    tiles = -(-g.pointwise.C // t.rows) * -(-g.pointwise.K // t.columns)
    _, slabs = wgrad_slabs(g.pointwise.N * g.pointwise.P * g.pointwise.Q, t, tiles, target)
    return slabs * (g.pointwise.C + 1) * g.pointwise.K * sum_bytes(dtype) <= stored_partials_bytes(g, dtype)


def within_bytes(chosen: WgradPlan, most: int) -> WgradPlan:
    """The plan with as few slabs as take so many bytes, or one."""
    if chosen.reduce is None or chosen.workspace_bytes <= most:
        return chosen
    reduce_parameters, parameters = dict(chosen.reduce.parameters), dict(chosen.sums.parameters)
    slab_bytes = chosen.workspace_bytes // reduce_parameters["slabs"]
    pixels = int(parameters["pixels"])
    slab = -(-pixels // max(1, most // slab_bytes))
    slab = -(-slab // _SLAB_PIXELS) * _SLAB_PIXELS
    slabs = -(-pixels // slab)
    parameters["slab_pixels"], reduce_parameters["slabs"] = slab, slabs
    sums = replace(chosen.sums, grid=(chosen.sums.grid[0], slabs, 1), parameters=tuple(parameters.items()))
    reduce = replace(chosen.reduce, parameters=tuple(reduce_parameters.items()))
    return WgradPlan(sums, reduce, slabs * slab_bytes)


def activation_slope(elements: int, dtype: str, activation: str, target: Target) -> Plan:
    """The plan of cuda/activation_slope.cu, on so many elements."""
    blocks = min(-(-elements // _ACTIVATION_THREADS), 8 * target.multiprocessors)
    return Plan(
        source="activation_slope",
        defines=(("T", DTYPES[dtype][0]), ("ACTIVATION", activation)),
        grid=(blocks, 1, 1),
        block=_ACTIVATION_THREADS,
        shared_bytes=0,
        parameters=(("total_elements", elements),),
    )


# Weights, sums and the rows that they meet are registers of a thread of cuda/separable_planes.cu.
_PLANES_TAPS = 25
_PLANES_THREADS = 256
_PLANES_ROWS = (2, 4, 8, 16, 32)
# Of a multiprocessor: beyond, more threads bring nothing.
_ENOUGH_THREADS = 1024
# Of the bytes of x, what its partial sums may take.
_PLANES_PARTIALS_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class PlanesTile:
    """What a block of cuda/separable_planes.cu works on at a time: so many planes whole, or rows of one."""

    planes: int
    rows: int
    whole: bool
    threads: int
    vector: int
    slot: int  # elements
    shared: int
    blocks: int  # of a multiprocessor


def planes(
    g: Conv2dGeometry, dtype: str, bias: bool, epilogue: SeparableEpilogue, target: Target, aligned: bool
) -> WgradPlan:
    """The plans of cuda/separable_planes.cu, of (gradient and dx, x, w, bias, workspace), and of the sums of slabs;
    aligned speaks of the first two."""
    t = max(
        # As many threads as can be with a column of their own, since they hide each other's loads.
        planes_tiles(g, dtype, bias, target, aligned),
        key=lambda t: (_busy(g, target, t), -t.shared),
    )
    return planes_plan(g, dtype, bias, epilogue, target, t)


def planes_tiles(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> list[PlanesTile]:
    """All tiles that fit; Unsuitable where there is none."""
    if target.architecture < 80:
        raise Unsuitable("needs copies of compute capability 8.0 or newer")
    if g.stride != (1, 1) or g.multiplier > 1 or (g.P, g.Q) != (g.H, g.W):
        raise Unsuitable("takes a depthwise result of the shape of x")
    if g.R * g.S > _PLANES_TAPS:
        raise Unsuitable(f"takes at most {_PLANES_TAPS} taps, and the kernel has {g.R} x {g.S}")
    fitting = [t for t in _all_tiles(g, dtype, bias, target, aligned) if t.blocks]
    if not fitting:
        raise Unsuitable(f"rows of {g.W} elements, as many as the taps reach over, do not fit shared memory")
    return fitting


def planes_plan(
    g: Conv2dGeometry, dtype: str, bias: bool, epilogue: SeparableEpilogue, target: Target, t: PlanesTile
) -> WgradPlan:
    """The plans of a tile."""
    size = DTYPES[dtype][1]
    groups = -(-g.C // t.planes)
    most = max(1, int(_PLANES_PARTIALS_SHARE * g.x_size * size / (g.K * (g.R * g.S + bias) * sum_bytes(dtype))))
    slabs = max(1, min(g.N, most, MAX_GRID[1], -(-2 * target.multiprocessors * t.blocks // groups)))
    slab_images = -(-g.N // slabs)
    slabs = -(-g.N // slab_images)
    (top, _), (left, _) = g.padding
    own = -1
    if top % g.dilation[0] == 0 and left % g.dilation[1] == 0:
        r, s = top // g.dilation[0], left // g.dilation[1]
        own = r * g.S + s if r < g.R and s < g.S else -1
    active = epilogue.depthwise_activation is not None
    sums = Plan(
        source="separable_planes",
        defines=(
            ("T", DTYPES[dtype][0]),
            ("CHANNELS_LAST", int(g.channels_last)),
            ("GROUP", t.planes if g.channels_last else 1),
            ("R", g.R),
            ("S", g.S),
            ("WHOLE", int(t.whole)),
            ("RING", 2 if t.whole else 4),
            ("VECTOR", t.vector),
            ("SLIDES", int(g.dilation[0] == 1)),
            ("OWN", own),
            ("BIAS", int(bias)),
            ("ACTIVE", int(active)),
            ("ACTIVATION", epilogue.depthwise_activation or "none"),
            ("THREADS", t.threads),
            # An activation's slope takes some registers more.
            ("BLOCKS", max(1, t.blocks - active)),
        ),
        grid=(groups, slabs, 1),
        block=t.threads,
        shared_bytes=t.shared,
        parameters=(
            ("N", g.N),
            ("C", g.C),
            ("H", g.H),
            ("W", g.W),
            ("top", top),
            ("left", left),
            ("dilation_h", g.dilation[0]),
            ("dilation_w", g.dilation[1]),
            ("planes", t.planes),
            ("rows", t.rows),
            ("chunks", 1 if t.whole else -(-g.H // t.rows)),
            ("slab_images", slab_images),
            ("slot", t.slot),
            ("x_slot", t.slot if t.whole else t.slot + t.vector),
        ),
    )
    return with_reduce_of(sums, slabs, g.K, g.R * g.S, dtype, bias)


def _busy(g: Conv2dGeometry, target: Target, t: PlanesTile) -> float:
    """Threads of a multiprocessor that have a column, on average; rows that are read anew count little."""
    columns = t.planes * g.W if t.whole or g.channels_last else g.W
    turns = 1 if t.whole and not g.channels_last else -(-columns // t.threads)
    blocks = min(t.blocks, -(-g.N * g.C // t.planes // target.multiprocessors))
    return min(blocks * columns / turns, _ENOUGH_THREADS) * t.rows / (t.rows + (0 if t.whole else 1))


def _all_tiles(g: Conv2dGeometry, dtype: str, bias: bool, target: Target, aligned: bool) -> Iterator[PlanesTile]:
    size = DTYPES[dtype][1]
    widest = VECTOR_BYTES // size if aligned else 1
    # What a thread needs, by what compilers took.
    registers = min(255, (24 + 11 * g.R * g.S // 2) * sum_bytes(dtype) // 4)

    def tile(planes: int, rows: int, whole: bool, threads: int, vector: int) -> PlanesTile:
        slot = planes * rows * g.W
        if whole:
            slot = -(-slot // vector) * vector + vector
        shared = size * ((2 if whole else 4) * slot + vector + 2 * (slot if whole else slot + vector))
        shared = max(shared, threads * (g.R * g.S + bias) * sum_bytes(dtype))
        shared = -(-shared // VECTOR_BYTES) * VECTOR_BYTES
        blocks = min(
            target.shared_per_multiprocessor // (shared + SHARED_RESERVE),
            65536 // (-(-registers // 8) * 8 * threads),
            32,
        )
        if shared > target.shared_per_block - SHARED_RESERVE:
            blocks = 0
        return PlanesTile(planes, rows, whole, threads, vector, slot, shared, blocks)

    top, reach = g.padding[0][0], g.dilation[0] * (g.R - 1)
    # What a chunk is made from lies in it and in its neighbours.
    row_choices = [rows for rows in _PLANES_ROWS if max(top, reach - top) <= rows < g.H]
    if g.channels_last:
        group = gcd(g.C, widest)
        if group * size >= 4:
            for threads in (128, 256, 512):
                yield tile(group, g.H, True, threads, group)
                for rows in row_choices:
                    yield tile(group, rows, False, threads, group)
        return
    for planes in range(1, min(g.C, _PLANES_THREADS // g.W) + 1):
        yield tile(planes, g.H, True, -(-planes * g.W // 32) * 32, widest)
    passes = -(-g.W // _PLANES_THREADS)
    columns = -(-g.W // passes)
    threads = -(-columns // 32) * 32
    vector = gcd(g.C * g.H * g.W, widest)
    if vector * size < 4:
        vector = 1
    for rows in row_choices:
        if rows * g.W % vector == 0:
            yield tile(1, rows, False, threads, vector)


@dataclass(frozen=True, slots=True)
class InPlace:
    """Gradients whose own memory is room for what is in between: that of dx first for partial sums or for the middle,
    then for the middle's gradient, which becomes dx.

    pointwise makes the middle itself; where it is None, and pointwise gradients are wanted, the middle is to be stored.
    """

    pointwise: WgradPlan | None
    planes: WgradPlan


def recomputed(
    g: SeparableGeometry,
    dtype: str,
    epilogue: SeparableEpilogue,
    wanted: frozenset[str],
    target: Target,
    aligned: bool,
) -> InPlace:
    """In place, with the middle made on chip."""
    made = stored(g, dtype, epilogue, wanted, target, aligned)
    if not wanted & {"pointwise_w", "pointwise_bias"}:
        return made
    sums = wgrad(g, dtype, "pointwise_bias" in wanted, epilogue, target, aligned)
    sums = within_bytes(sums, g.depthwise.x_size * DTYPES[dtype][1])
    return replace(made, pointwise=sums)


def stored(
    g: SeparableGeometry,
    dtype: str,
    epilogue: SeparableEpilogue,
    wanted: frozenset[str],
    target: Target,
    aligned: bool,
) -> InPlace:
    """In place, with the middle where dx will be."""
    if "x" not in wanted:
        raise Unsuitable("takes the memory of dx, which is not wanted")
    if epilogue.pointwise_activation is not None:
        raise Unsuitable("takes no pointwise activation")
    return InPlace(None, planes(g.depthwise, dtype, "depthwise_bias" in wanted, epilogue, target, aligned))
