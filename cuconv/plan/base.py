"""What every plan is made of: the device as planning sees it, and the frozen Plan of one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np

from ..geometry import Conv2dGeometry

# The C++ name (cuda/numbers.cuh) and the bytes of every dtype.
DTYPES = {"float16": ("f16", 2), "bfloat16": ("bf16", 2), "float32": ("f32", 4), "float64": ("f64", 8)}

MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
# A vector of this many bytes is the widest load, and where arrays must start for vectors to be used at all.
VECTOR_BYTES = 16
# Static shared memory and what the system keeps for itself, a block.
SHARED_RESERVE = 1024 + 128
# What a kernel divides, and by what, is at most this: see divide in cuda/indices.cuh.
MAX_DIVIDEND = 2**15 - 1


def magic(divisor: int) -> int:
    """By which a kernel multiplies to divide."""
    return -(-(2**31) // divisor)


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
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    parameters: tuple[tuple[str, int], ...]

    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Asked for at every call, which finds its kernel by the plan.
        object.__setattr__(self, "_hash", hash((self.source, self.defines, self.grid, self.block, self.parameters)))

    def __hash__(self) -> int:
        return self._hash

    def parameter_struct(self) -> np.void:
        """The kernel's by-value Parameters: 32-bit integers in order; those named total_* have 64 bits, and those
        named *_magic no sign."""
        fields = [(name, _field_type(name)) for name, _ in self.parameters]
        struct: np.void = np.zeros(1, np.dtype(fields, align=True))[0]
        for name, value in self.parameters:
            struct[name] = value
        return struct


def _field_type(name: str) -> type[np.integer[Any]]:
    if name.startswith("total_"):
        return np.int64
    return np.uint32 if name.endswith("_magic") else np.int32


class Unsuitable(ValueError):
    """The variant cannot run this geometry on this device."""


def require_nchw(g: Conv2dGeometry) -> None:
    """Refuse channels-last arrays."""
    if g.channels_last:
        raise Unsuitable("takes arrays (N, C, H, W), and these are channels-last")


def plane_parameters(g: Conv2dGeometry) -> tuple[tuple[str, int], ...]:
    """The Parameters that all kernels of a convolution begin to work from."""
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


_Tile = TypeVar("_Tile")

# Tables of choices. Thousands of tiles one by one take some ten milliseconds to make and to rank, and every first call
# of a shape waits for that. As one "tile" whose fields are arrays, an axis for every choice, they take about one.


def axis_of(choices: Iterable[Any], behind: int) -> Any:
    """Choices as an array's first axis, before so many others."""
    along = np.array(list(choices), np.int64)
    return along.reshape(along.shape + (1,) * behind)


def stack(tiles: Sequence[_Tile], behind: int) -> _Tile:
    """The table of these, some at least, on one axis before so many others."""

    def column(values: Sequence[Any]) -> Any:
        if isinstance(values[0], tuple):
            return tuple(column(of_one) for of_one in zip(*values, strict=True))
        if is_dataclass(values[0]):
            return stack(values, behind)
        return np.array(values).reshape((-1,) + (1,) * behind)

    return type(tiles[0])(*(column([getattr(t, field.name) for t in tiles]) for field in fields(tiles[0])))  # type: ignore[arg-type]


def tile_at(table: _Tile, index: Any) -> _Tile:
    """One tile of a table."""

    def value(array: Any) -> Any:
        last = index[len(index) - array.ndim :]
        return array[tuple(0 if n == 1 else i for i, n in zip(last, array.shape, strict=True))].item()

    return _of_arrays(table, value)


def those_of(table: _Tile, fits: Any, behind: int = 0) -> _Tile:
    """The table of those tiles that fit, on one axis before so many others."""
    return _of_arrays(table, lambda array: np.broadcast_to(array, fits.shape)[fits].reshape((-1,) + (1,) * behind))


def _of_arrays(table: _Tile, function: Callable[[Any], Any]) -> _Tile:
    """The same with every array, of a pair or of a part of the tile too, replaced by a function of it."""

    def value(of_all: Any) -> Any:
        if isinstance(of_all, tuple):
            return tuple(value(of_one) for of_one in of_all)
        if is_dataclass(of_all):
            return _of_arrays(of_all, function)
        return function(of_all) if isinstance(of_all, np.ndarray) else of_all

    return type(table)(*(value(getattr(table, field.name)) for field in fields(table)))  # type: ignore[arg-type]


def each_of(table: _Tile, fits: Any) -> Iterator[_Tile]:
    """The tiles of a table that fit; of the fields that are arrays, `fits` has all axes, and the others some."""
    for index in np.argwhere(fits):
        yield tile_at(table, index)


def cheapest_of(table: _Tile, fits: Any, cost: Any) -> _Tile | None:
    """The tile of least cost of those that fit, the first one of equals."""
    if not fits.any():
        return None
    ranked = np.where(fits, cost, np.inf)
    return tile_at(table, np.unravel_index(ranked.argmin(), ranked.shape))
