"""Depthwise-separable convolution in one kernel whose middle stays in registers: see cuda/fragments.cuh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..geometry import Conv2dGeometry, PointwiseGeometry, SeparableGeometry
from .base import DTYPES, SHARED_RESERVE, VECTOR_BYTES, Plan, Target, Unsuitable
from .separable import MAX_TAPS, SeparableEpilogue, middle_parameters

# Pixels of a lane along a row, and groups of them in a tile.
_COLUMNS = 4
_GROUPS = 8
# Channels of the result that are made at a time: as kRowsTogether, a term, and as kAbreast.
_PRODUCT_ROWS = 16
_ABREAST = 32
# Warps that bring rows, and those that shift them into place; and how many rows they copy meanwhile, kAhead.
_BRINGERS = 1
_SHIFTERS = 4
_AHEAD = 2
# Columns of a strip, at most. Wide ones read fewer columns twice.
_STRIPS = (128, 64, 32)
# Registers of a lane's middle: what leaves room for a dozen warps, and what can be kept at all.
_FEW_WORDS = 64
_MOST_WORDS = 128
# 64 -> 128 channels, 112x112 and 512x512, took from 59 to 69 % of the time that the parts take.
_TIMED_CHANNELS = 64
_TIMED_RESULTS = 128
_TIMED_COLUMNS = 112
_FLOAT_BYTES = 4
_BARRIER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block of cuda/separable_fragments.cu makes: see there."""

    lane_rows: int
    warps: int
    strip: int  # columns
    widest: int
    slots: int
    chunk: int  # rows
    shared_bytes: int


def fragments(g: SeparableGeometry, dtype: str, epilogue: SeparableEpilogue, target: Target, aligned: bool) -> Plan:
    """The plan of cuda/separable_fragments.cu; aligned speaks of all arrays."""
    require(g, dtype, target, aligned)
    tile = next(tiles(g, dtype, epilogue, target), None)
    if tile is None:
        raise Unsuitable(
            f"keeps {g.depthwise.C} channels in registers and rows of them in shared memory, which do not fit"
        )
    return tile_plan(g, dtype, epilogue, target, tile)


def beats_others(g: SeparableGeometry, dtype: str, target: Target) -> bool:
    """Where it was timed beside kernels for each part, and took less: see benchmarks/NOTES.md."""
    size = DTYPES[dtype][1]
    few = g.pointwise.C <= _TIMED_CHANNELS and g.pointwise.K <= _TIMED_RESULTS
    return few and not g.depthwise.channels_last and _whole(g.depthwise, size) and g.depthwise.Q >= _TIMED_COLUMNS


def require(g: SeparableGeometry, dtype: str, target: Target, aligned: bool) -> None:
    """Refuse what the kernel cannot run."""
    depthwise, pointwise = g.depthwise, g.pointwise
    if target.architecture < 90:
        raise Unsuitable("needs barriers of compute capability 9.0 or newer")
    if dtype == "float64":
        raise Unsuitable("takes elements of 16 or 32 bits, and float64 has 64")
    if depthwise.stride != (1, 1) or depthwise.dilation != (1, 1) or depthwise.multiplier != 1:
        raise Unsuitable("takes stride 1, no dilation and multiplier 1")
    if depthwise.R * depthwise.S > MAX_TAPS:
        raise Unsuitable(f"takes at most {MAX_TAPS} taps, and the kernel has {depthwise.R} x {depthwise.S}")
    piece = VECTOR_BYTES // DTYPES[dtype][1]
    if not aligned or (depthwise.channels_last and (pointwise.C % piece or pointwise.K % piece)):
        raise Unsuitable(f"takes pixels of whole {VECTOR_BYTES} bytes, from such a boundary on")
    if not depthwise.channels_last and (depthwise.padding[1][0] >= piece or depthwise.S - 1 > piece):
        raise Unsuitable(f"reaches {piece} columns beyond a row at most")
    if pointwise.N * pointwise.P * pointwise.Q >= 2**31:
        raise Unsuitable("counts fewer than 2**31 pixels")


def tiles(g: SeparableGeometry, dtype: str, epilogue: SeparableEpilogue, target: Target) -> Iterator[Tile]:
    """All tiles that fit, the preferred one first."""
    for lane_rows in (2, 1):
        for warps in _warps(g, dtype, lane_rows):
            for widest in _STRIPS:
                tile = _tile(g, dtype, epilogue, target, lane_rows, warps, widest)
                if tile is not None:
                    yield tile


def _warps(g: SeparableGeometry, dtype: str, lane_rows: int) -> tuple[int, ...]:
    """How many of them compute, such that a lane's registers suffice for so many rows."""
    last, size = g.depthwise.channels_last, DTYPES[dtype][1]
    whole = _whole(g.depthwise, size)
    blocks = _depth_blocks(g.pointwise, size)
    words = 2 * _COLUMNS * lane_rows * blocks  # of a lane's middle
    if lane_rows > 1 and (words > _FEW_WORDS or size > 2 or last or not whole):
        return ()
    if words > _FEW_WORDS:
        return () if words > _MOST_WORDS else (7,) if whole else (4,)
    if not whole:
        return (8, 4)
    return (7,) if (last and size == 4) or (not last and size == 2 and blocks > 4) else (11, 7)


def _tile(
    g: SeparableGeometry,
    dtype: str,
    epilogue: SeparableEpilogue,
    target: Target,
    lane_rows: int,
    warps: int,
    widest: int,
) -> Tile | None:
    depthwise, pointwise = g.depthwise, g.pointwise
    size = DTYPES[dtype][1]
    piece = VECTOR_BYTES // size
    strips = -(-depthwise.Q // widest)
    strip = -(-depthwise.Q // (strips * piece)) * piece
    depth = _depth_blocks(pointwise, size) * _product_depth(size)
    if depthwise.channels_last:
        slot, channels = (widest + depthwise.S - 1) * (depth + piece), -(-pointwise.K // _ABREAST) * _ABREAST
        taps = (depthwise.R * depthwise.S + 1) * depth
    else:
        together = _PRODUCT_ROWS * _terms(dtype, epilogue)
        slot, channels = depth * (widest + 3 * piece), -(-pointwise.K // together) * together
        taps = depth * (-(-(depthwise.R * depthwise.S + 1) // 4) * 4)
    fixed = channels * (depth + piece) * size + (taps + channels) * _FLOAT_BYTES
    slot = slot * size + 2 * _BARRIER_BYTES
    whole = _whole(depthwise, size)
    if not whole:
        fixed += warps * _PRODUCT_ROWS * (lane_rows * _GROUPS * _COLUMNS + piece) * size
    slots = min(16, (target.shared_per_block - SHARED_RESERVE - fixed) // slot)
    groups = -(-strip // _COLUMNS)
    units = 1 + -(-(_GROUPS - 1) // groups)
    if slots < units * lane_rows + depthwise.R - 1 + (0 if whole else _AHEAD):
        return None
    # As many rows at a time as leave few multiprocessors without any.
    units_of_strip = -(-depthwise.P // lane_rows)

    def time(chunks: int) -> float:
        chunk = -(-units_of_strip // chunks) * lane_rows
        return -(-depthwise.N * strips * -(-depthwise.P // chunk) // target.multiprocessors) * (chunk + 2)

    chunks = min(range(1, min(units_of_strip, 64) + 1), key=time)
    chunk = -(-units_of_strip // chunks) * lane_rows
    return Tile(lane_rows, warps, strip, widest, slots, chunk, fixed + slots * slot)


def tile_plan(g: SeparableGeometry, dtype: str, epilogue: SeparableEpilogue, target: Target, t: Tile) -> Plan:
    depthwise, pointwise = g.depthwise, g.pointwise
    name, size = DTYPES[dtype]
    piece = VECTOR_BYTES // size
    strips, chunks = -(-depthwise.Q // t.strip), -(-depthwise.P // t.chunk)
    tasks = depthwise.N * chunks * strips
    whole = _whole(depthwise, size)
    bringers = _BRINGERS if whole else _SHIFTERS
    return Plan(
        source="separable_fragments_channels_last" if depthwise.channels_last else "separable_fragments",
        defines=(
            ("T", name),
            ("CHANNELS_LAST", int(depthwise.channels_last)),
            ("R", depthwise.R),
            ("S", depthwise.S),
            ("LEFT", depthwise.padding[1][0]),
            ("VECTOR", piece),
            ("STRIP", piece),
            ("DEPTHWISE_ACTIVATION", epilogue.depthwise_activation or "none"),
            ("LANE_ROWS", t.lane_rows),
            ("DEPTH_BLOCKS", _depth_blocks(pointwise, size)),
            ("WIDEST", t.widest),
            ("SLOTS", t.slots),
            ("WARPS", t.warps),
            ("BRINGERS", bringers),
            *(() if depthwise.channels_last else (("WHOLE", int(whole)),)),
            ("TERMS", _terms(dtype, epilogue)),
            ("ACTIVATION", epilogue.pointwise_activation or "none"),
        ),
        grid=(min(tasks, target.multiprocessors), 1, 1),
        block=32 * (t.warps + bringers),
        shared_bytes=t.shared_bytes,
        parameters=(
            ("N", depthwise.N),
            ("K", pointwise.K),
            ("P", depthwise.P),
            ("Q", depthwise.Q),
            ("strips", strips),
            ("strip", t.strip),
            ("chunks", chunks),
            ("chunk", t.chunk),
            ("tasks", tasks),
            *middle_parameters(depthwise),
        ),
    )


def _terms(dtype: str, epilogue: SeparableEpilogue) -> int:
    return 2 if dtype == "float32" and not epilogue.allow_tf32 else 1


def _whole(g: Conv2dGeometry, size: int) -> bool:
    """Whether rows, or channels-last pixels, are whole pieces."""
    return g.channels_last or not (g.W * size % VECTOR_BYTES or g.Q * size % VECTOR_BYTES)


def _product_depth(size: int) -> int:
    return 16 if size == 2 else 8


def _depth_blocks(g: PointwiseGeometry, size: int) -> int:
    """Blocks of channels; channels-last a lane makes those of two of them together."""
    together = 1 + g.channels_last
    return -(-g.C // (together * _product_depth(size))) * together
