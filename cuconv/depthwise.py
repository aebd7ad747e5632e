"""Depthwise convolution: every channel with kernels of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import interop, kernels, plan, reference
from .geometry import check_dtype, check_out, depthwise_geometry


def depthwise_conv2d(
    x: Any,
    w: Any,
    bias: Any = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    out: Any = None,
) -> Any:
    """Depthwise 2-D convolution (cross-correlation, as in every neural-network library), forward.

    ``y[n, c*M + m, p, q] = bias[c*M + m] + sum over r, s of x[n, c, row, column] * w[c*M + m, 0, r, s]``, with
    ``row = p*stride - top + r*dilation``, ``column`` likewise, and zero outside x.

    Equivalent to ``torch.nn.functional.conv2d(x, w, bias, stride, padding, dilation, groups=x.shape[1])``.

    Parameters
    ----------
    x : (N, C, H, W) float16, bfloat16, float32 or float64
        A NumPy array, computed by the reference, or a CuPy array, computed on its GPU and on the current stream.
        One that is not C-contiguous is copied once on the GPU.
    w : (C*M, 1, R, S), the dtype of x
        Output channel c*M + m belongs to input channel c; M >= 1 is the depth multiplier.
    bias : (C*M,), the dtype of x, optional
    stride, dilation : int or (rows, columns)
    padding : int, (rows, columns), ((top, bottom), (left, right)), "same" (stride 1) or "valid"
    out : (N, C*M, P, Q), the dtype of x, optional
        Where the result is written; any strides that do not overlap, and no memory of an input.

    Returns
    -------
    y : (N, C*M, P, Q), the dtype of x
        ``P = (H + top + bottom - dilation*(R - 1) - 1) // stride + 1``, Q likewise. Sums are made in float32, for
        float64 in float64 (NumPy arrays: always float64), and rounded once.

    Raises
    ------
    TypeError
        For another kind of array, dtype or number, and for arrays of different kinds or dtypes.
    ValueError
        For shapes and numbers that have no convolution, arrays on different GPUs, and an out that overlaps.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.ones((1, 2, 4, 5), np.float32)
    >>> w = np.ones((2, 1, 3, 3), np.float32)
    >>> y = cuconv.depthwise_conv2d(x, w, padding=1)
    >>> y.shape
    (1, 2, 4, 5)
    >>> y[0, 0]
    array([[4., 6., 6., 6., 4.],
           [6., 9., 9., 9., 6.],
           [6., 9., 9., 9., 6.],
           [4., 6., 6., 6., 4.]], dtype=float32)
    """
    # 1. Check.
    module = interop.array_module(x=x, w=w, bias=bias, out=out)
    geometry = depthwise_geometry(x, w, bias, stride=stride, padding=padding, dilation=dilation)
    device = None if module is np else interop.one_device(x=x, w=w, bias=bias, out=out)
    if out is not None:
        check_out(out, geometry.y_shape, x.dtype)
        for name, array in (("x", x), ("w", w), ("bias", bias)):
            if array is not None and interop.share_memory(out, array):
                raise ValueError(f"out must not overlap an input, and shares memory with {name}")
    if device is None:
        return reference.depthwise_conv2d(x, w, bias, geometry, out)
    with device:
        if geometry.N == 0:
            return module.empty(geometry.y_shape, x.dtype) if out is None else out
        # 2. Allocate.
        x, w = interop.contiguous(x), interop.contiguous(w)
        bias = None if bias is None else interop.contiguous(bias)
        y = out if out is not None and interop.is_contiguous(out) else module.empty(geometry.y_shape, x.dtype)
        # 3. Plan.
        aligned = (x.data.ptr | y.data.ptr) % plan.VECTOR_BYTES == 0
        target = kernels.target(device.id)
        chosen = plan.depthwise_forward(geometry, check_dtype("x", x), target, plan.forced_variant(), aligned)
        # 4. Kernel.
        kernel = kernels.load(chosen, device.id)
        # 5. Launch.
        kernel(x.data.ptr, w.data.ptr, 0 if bias is None else bias.data.ptr, y.data.ptr)
        if out is None or y is out:
            return y
        out[...] = y
        return out
