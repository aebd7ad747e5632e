"""CuPy arrays in the layout that a kernel takes, and results in that of the caller."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from . import interop, kernels, plan

# With fewer channels or fewer pixels CuPy's copy is the faster one: tiles of cuda/transposed.cu are mostly empty. On an
# H200, us by it and by CuPy: 64,6,56,56 in float32 11 and 7, with 8 channels 8 and 9, with 12 8 and 13.
_FEWEST = 10
# Its rows and columns are 32-bit integers, those of a tile behind the last one too.
_MOST = 2**30


def contiguous(array: Any, channels_last: bool = False) -> Any:
    """The CuPy array itself where it is dense in this layout and aligned to its element, a copy in it otherwise.

    On the array's device, which must be the current one.
    """
    if interop.is_contiguous(array, channels_last) or not _turnable(array, channels_last):
        return interop.contiguous(array, channels_last)
    result = interop.output(None, array.shape, array.dtype, channels_last)
    _turn(array, result, channels_last)
    return result


def delivered(result: Any, out: Any, channels_last: bool = False) -> Any:
    """The dense result in the layout of the caller's arrays, copied to `out` where the kernel could not write to it."""
    if out is None:
        return contiguous(result, True) if channels_last else result
    if result is not out:
        for layout in (False, True):
            if _turnable(result, layout) and interop.is_contiguous(out, layout):
                _turn(result, out, layout)
                return out
        out[...] = result
    return out


def _turnable(array: Any, channels_last: bool) -> bool:
    """Whether cuda/transposed.cu is the way from the other layout, in which the array is dense."""
    if array.ndim != 4 or not interop.is_contiguous(array, not channels_last):
        return False
    _, C, H, W = array.shape
    return bool(_FEWEST <= min(C, H * W) and max(C, H * W) <= _MOST)


def _turn(array: Any, result: Any, channels_last: bool) -> None:
    """Write an array (N, C, H, W) to one that is dense in this layout, as it is in the other."""
    if not array.size:
        return
    N, C, H, W = array.shape
    rows, columns = (C, H * W) if channels_last else (H * W, C)
    source, target = array.data, result.data
    aligned = (source.ptr | target.ptr) % plan.VECTOR_BYTES == 0
    _kernel(N, rows, columns, array.dtype.itemsize, source.device_id, aligned)(source.ptr, target.ptr)


@lru_cache(maxsize=4096)
def _kernel(matrices: int, rows: int, columns: int, size: int, device_id: int, aligned: bool) -> kernels.Kernel:
    return kernels.load(plan.transposed(matrices, rows, columns, size, aligned), device_id)
