"""The door: whose array is this, and how does it lie in memory, asked without importing anyone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

# Sums in float64 lie there, and the elements of any dtype.
ALIGNMENT = 8
# Arguments that need not be given.
OPTIONAL = ("bias", "depthwise_bias", "pointwise_bias", "out", "dbias", "workspace")


def array_module(**arrays: Any) -> ModuleType:
    """The one module, numpy or cupy, that all arrays belong to; those named in OPTIONAL may be None.

    Raises TypeError for anything that is not such an array, and for a mixture of the two.
    """
    # A cupy array can only exist once cupy is imported, so looking among the imported modules is enough.
    cupy = sys.modules.get("cupy")
    first, owner = "", None
    for name, array in arrays.items():
        if array is None and name in OPTIONAL:
            continue
        module = cupy if cupy is not None and isinstance(array, cupy.ndarray) else _numpy(name, array)
        if owner is None:
            first, owner = name, module
        elif module is not owner:
            raise TypeError(
                f"all arrays must live in one place: {first} is a {owner.__name__} array and {name} a "
                f"{module.__name__} array; move one of them with cupy.asarray or cupy.asnumpy"
            )
    if owner is None:
        raise TypeError("no array was given")
    return owner


_Result = TypeVar("_Result")
_MAX_REMEMBERED = 4096
_INT = frozenset({int})


def remembered(check: Callable[..., _Result]) -> Callable[..., _Result]:
    """`check` of arrays and numbers, passed over where it would say what it has said: in a call that differs from an
    earlier one in the addresses of its CuPy arrays alone, which it therefore must not ask for."""
    known: dict[tuple[Any, ...], _Result] = {}

    @functools.wraps(check)
    def checked(*given: Any) -> _Result:
        key = _key(given)
        if key is None:
            return check(*given)
        result = known.get(key)
        if result is None:
            result = check(*given)
            if len(known) >= _MAX_REMEMBERED:
                known.clear()
            known[key] = result
        return result

    checked.cache_clear = known.clear  # type: ignore[attr-defined]  # as functools.lru_cache has it
    return checked


def _key(given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All of the arguments that a check looks at but the addresses; None for other things than CuPy arrays and plain
    numbers, since what merely compares equal to a number, such as True, must not be one."""
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return None
    ndarray = cupy.ndarray
    key: list[Any] = []
    for argument in given:
        kind = type(argument)
        if kind is ndarray:
            memory = argument.data
            key.append((argument.shape, argument.strides, argument.dtype, memory.ptr % ALIGNMENT, memory.device_id))
        elif kind is int or argument is None or kind is str or (kind is tuple and _INT.issuperset(map(type, argument))):
            key.append(argument)
        else:
            return None
    return tuple(key)


def channels_last(array: Any) -> bool:
    """Whether the array (N, C, H, W) lies in memory as (N, H, W, C), and not as (N, C, H, W) at the same time: with one
    channel, or one row and column, it is both."""
    return array.ndim == 4 and not array.flags.c_contiguous and bool(_nhwc(array).flags.c_contiguous)


def contiguous(array: Any, channels_last: bool = False) -> Any:
    """The CuPy array itself where it is dense in this layout and aligned to its element, a copy in it otherwise."""
    if is_contiguous(array, channels_last):
        return array
    if array.data.ptr % array.dtype.itemsize:
        array = _copied_by_bytes(array)
    return _nchw(_nhwc(array).copy("C")) if channels_last else array.copy("C")


def _copied_by_bytes(array: Any) -> Any:
    """A copy of a CuPy array that starts in the midst of an element, which CuPy's own kernels cannot read as it is."""
    if not array.size:
        return array
    first = array[(slice(1),) * array.ndim].view(np.uint8)
    as_strided = sys.modules["cupy"].lib.stride_tricks.as_strided
    of_bytes = as_strided(first, (*array.shape, array.dtype.itemsize), (*array.strides, 1))
    return of_bytes.copy("C").view(array.dtype).reshape(array.shape)


def is_contiguous(array: Any, channels_last: bool = False) -> bool:
    """Whether a kernel for this layout can read or write the CuPy array as it lies."""
    flags = _nhwc(array).flags if channels_last else array.flags
    return bool(flags.c_contiguous) and array.data.ptr % array.dtype.itemsize == 0


def all_contiguous(*arrays: Any, channels_last: bool = False) -> bool:
    """Whether kernels for this layout can read all of the CuPy arrays as they lie; those that are None do not count."""
    return all(array is None or is_contiguous(array, channels_last) for array in arrays)


def output(out: Any, shape: tuple[int, ...], dtype: Any, channels_last: bool = False) -> Any:
    """What a kernel for this layout writes to: `out` where it can, otherwise a new CuPy array (N, C, H, W)."""
    if out is not None and is_contiguous(out, channels_last):
        return out
    if channels_last:
        N, C, H, W = shape
        return _nchw(sys.modules["cupy"].ndarray((N, H, W, C), dtype))
    return sys.modules["cupy"].ndarray(shape, dtype)  # what cupy.empty returns, half a microsecond sooner


def _nhwc(array: Any) -> Any:
    """The array (N, C, H, W) seen as (N, H, W, C)."""
    return array.transpose(0, 2, 3, 1)


def _nchw(array: Any) -> Any:
    """The array (N, H, W, C) seen as (N, C, H, W)."""
    return array.transpose(0, 3, 1, 2)


def workspace(given: Any, size: int) -> Any:
    """A CuPy array of at least `size` bytes: the one given, or a new one; None where none is needed or given."""
    if given is None:
        return output(None, (size,), np.uint8) if size else None
    if not given.flags.c_contiguous:
        raise ValueError(f"workspace must be C-contiguous, and has strides {given.strides}")
    if given.data.ptr % ALIGNMENT:
        raise ValueError(f"workspace must start at a multiple of {ALIGNMENT} bytes")
    if given.nbytes < size:
        raise ValueError(f"workspace must have at least {size} bytes, and has {given.nbytes}")
    return given


def address(array: Any) -> int:
    """Where a CuPy array starts, as a kernel takes it; of None, 0."""
    return 0 if array is None else array.data.ptr


def _numpy(name: str, array: Any) -> ModuleType:
    # A masked array is one of NumPy's, and its mask would be lost in silence.
    masked = sys.modules.get("numpy.ma")
    if isinstance(array, np.ndarray) and not (masked and isinstance(array, masked.MaskedArray)):
        return np
    given = f"{type(array).__module__}.{type(array).__qualname__}"
    raise TypeError(f"{name} must be a numpy.ndarray or a cupy.ndarray, and is a {given}")


def one_device(**arrays: Any) -> int:
    """The device that all given cupy arrays are on; a ValueError naming two that differ."""
    devices: dict[str, int] = {name: array.data.device_id for name, array in arrays.items() if array is not None}
    first, device = next(iter(devices.items()))
    for name, other in devices.items():
        if other != device:
            raise ValueError(f"all arrays must be on one device: {first} is on {device} and {name} on {other}")
    return device


_NOTHING = nullcontext()


def is_current(device: int) -> bool:
    """Whether this is CuPy's current device."""
    return bool(sys.modules["cupy"].cuda.runtime.getDevice() == device)


def on_device(device: int) -> AbstractContextManager[Any]:
    """With it, this device is CuPy's current one; nothing, as setting it anew takes a microsecond, where it is."""
    cuda = sys.modules["cupy"].cuda
    return _NOTHING if cuda.runtime.getDevice() == device else cuda.Device(device)


def check_apart(written: Any, *, name: str = "out", **others: Any) -> None:
    """Refuse an array that is written to and shares memory with another; those may be None."""
    for other, array in others.items():
        if array is not None and share_memory(written, array):
            raise ValueError(f"{name} must not overlap another array, and shares memory with {other}")


def share_memory(a: Any, b: Any) -> bool:
    """Whether any element of a is an element of b, exactly, for arrays of one module and one device."""
    (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
    if a_end <= b_first or b_end <= a_first:
        return False  # nearly always, and known ten times sooner than NumPy tells
    try:
        return np.shares_memory(_ghost(a), _ghost(b), max_work=10**6)  # type: ignore[arg-type]  # NumPy's stub is too narrow
    except np.exceptions.TooHardError:
        return True


def _span(array: Any) -> tuple[int, int]:
    """The addresses from an array's first byte to behind its last one."""
    first = _pointer(array)
    if array.flags.c_contiguous or not array.size:
        return first, first + array.nbytes
    end = first + array.dtype.itemsize
    for extent, step in zip(array.shape, array.strides, strict=True):
        if step < 0:
            first += (extent - 1) * step
        else:
            end += (extent - 1) * step
    return first, end


def _pointer(array: Any) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


class _Addresses:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _ghost(array: Any) -> np.ndarray[Any, Any]:
    """A NumPy array at the same addresses, device addresses too: asked about, never read."""
    interface = {
        "version": 3,
        "data": (_pointer(array), True),
        "shape": array.shape,
        "strides": array.strides,
        "typestr": f"|V{array.dtype.itemsize}",
    }
    return np.asarray(_Addresses(interface))
