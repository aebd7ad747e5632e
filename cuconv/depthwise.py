"""Depthwise convolution: every channel with kernels of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from . import interop, kernels, layouts, plan, reference
from .geometry import (
    Conv2dGeometry,
    check_dtypes,
    check_out,
    check_shape,
    depthwise_geometry,
    pair_argument,
    shape_argument,
)


@dataclass(slots=True, eq=False)
class _Call:
    """What the arguments of a call, once checked, tell of it."""

    geometry: Conv2dGeometry
    dtype: str
    device: int | None  # None for NumPy arrays
    channels_last: bool  # how the result is to lie; the kernel's may lie otherwise
    dense: bool  # whether kernels can read the arrays as they lie
    shape: tuple[int, ...]  # the result's
    # Kernels found so far, by what else they depend on: the variant forced, and whether the arrays are aligned.
    kernels: dict[tuple[Any, ...], Any] = field(default_factory=dict)


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
        On the GPU it may lie in memory as (N, C, H, W) or channels-last, as (N, H, W, C); its strides tell, as in
        PyTorch, and where they are both (C = 1, or H = W = 1) it counts as the former. With any other strides it is
        copied once, to (N, C, H, W); channels-last with a kernel of more than 64 taps too, and its result back.
    w : (C*M, 1, R, S), the dtype of x
        Output channel c*M + m belongs to input channel c; M >= 1 is the depth multiplier.
    bias : (C*M,), the dtype of x, optional
    stride, dilation : int or (rows, columns)
    padding : int, (rows, columns), ((top, bottom), (left, right)), "same" (stride 1) or "valid"
    out : (N, C*M, P, Q), the dtype of x, optional
        Where the result is written; any strides that do not overlap, and no memory of an input. One that does not lie
        as x does is written by one more copy.

    Returns
    -------
    y : (N, C*M, P, Q), the dtype of x
        On the GPU channels-last where x is, C-contiguous everywhere else; or out.
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
    call = _check_forward(x, w, bias, out, stride, padding, dilation)
    if out is not None:
        interop.check_apart(out, x=x, w=w, bias=bias)
    geometry = call.geometry
    if call.device is None:
        return reference.depthwise_conv2d(x, w, bias, geometry, out)
    if not interop.is_current(call.device):
        with interop.on_device(call.device):
            return depthwise_conv2d(x, w, bias, stride=stride, padding=padding, dilation=dilation, out=out)
    # 2. Allocate.
    if not call.dense:
        x, w = layouts.contiguous(x, geometry.channels_last), interop.contiguous(w)
        bias = None if bias is None else interop.contiguous(bias)
    y = interop.output(out, call.shape, x.dtype, geometry.channels_last)
    if geometry.N:
        # 3. Plan, and 4. kernel: found again once they are known.
        x_start, y_start = x.data.ptr, y.data.ptr
        of = plan.forced_variant(), (x_start | y_start) % plan.VECTOR_BYTES == 0
        kernel = call.kernels.get(of)
        if kernel is None:
            kernel = call.kernels[of] = _forward_kernel(geometry, call.dtype, call.device, *of)
        # 5. Launch.
        kernel(x_start, w.data.ptr, 0 if bias is None else bias.data.ptr, y_start)
    return layouts.delivered(y, out, call.channels_last != geometry.channels_last)


@interop.remembered
def _check_forward(x: Any, w: Any, bias: Any, out: Any, stride: Any, padding: Any, dilation: Any) -> _Call:
    module = interop.array_module(x=x, w=w, bias=bias, out=out)
    dtype = check_dtypes(x=x, w=w, bias=bias)
    channels_last = module is not np and interop.channels_last(x)
    geometry = depthwise_geometry(
        x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, channels_last=channels_last
    )
    geometry = plan.in_fastest_layout(geometry)
    if bias is not None:
        check_shape("bias", bias, (geometry.K,), "one value for each output channel")
    device = None if module is np else interop.one_device(x=x, w=w, bias=bias, out=out)
    if out is not None:
        check_out(out, geometry.y_shape, x.dtype)
    layout = geometry.channels_last
    dense = device is not None and interop.all_contiguous(x, channels_last=layout) and interop.all_contiguous(w, bias)
    return _Call(geometry, dtype, device, channels_last, dense, geometry.y_shape)


@lru_cache(maxsize=4096)
def _forward_kernel(
    geometry: Conv2dGeometry, dtype: str, device_id: int, forced: str | None, aligned: bool
) -> kernels.Kernel:
    # 3. Plan.
    chosen = plan.depthwise_forward(geometry, dtype, kernels.target(device_id), forced, aligned)
    # 4. Kernel.
    return kernels.load(chosen, device_id)


def depthwise_conv2d_dgrad(
    dy: Any,
    w: Any,
    x_shape: Any,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    out: Any = None,
) -> Any:
    """Gradient of a depthwise 2-D convolution with respect to its input.

    ``dx[n, c, h, v] = sum over m, r, s of dy[n, c*M + m, p, q] * w[c*M + m, 0, r, s]``, for those r and s for which
    ``p = (h + top - r*dilation) / stride`` and q, likewise, are integers; dy is zero where it has no row p or column q.

    Equivalent to ``torch.nn.grad.conv2d_input(x_shape, w, dy, stride, padding, dilation, groups=x_shape[1])``.

    Parameters
    ----------
    dy : (N, C*M, P, Q) float16, bfloat16, float32 or float64
        The gradient with respect to the convolution's output. A NumPy or a CuPy array, its layout as that of x in
        depthwise_conv2d.
    w : (C*M, 1, R, S), the dtype of dy
    x_shape : (N, C, H, W)
        The input's shape, which dy does not tell at strides above 1.
    stride, padding, dilation
        As they were in depthwise_conv2d.
    out : (N, C, H, W), the dtype of dy, optional
        Where the result is written; any strides that do not overlap, and no memory of an input. One that does not lie
        as dy does is written by one more copy.

    Returns
    -------
    dx : (N, C, H, W), the dtype of dy
        In the layout of dy, as the result of depthwise_conv2d is in that of x.
        Summed and rounded as in depthwise_conv2d.

    Raises
    ------
    TypeError
        For another kind of array, dtype or number, and for arrays of different kinds or dtypes.
    ValueError
        For shapes and numbers that have no convolution, a dy that is not of its output's shape, arrays on different
        GPUs, and an out that overlaps.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> dy = np.ones((1, 1, 2, 3), np.float32)
    >>> w = np.array([[[[1, 2], [3, 4]]]], np.float32)
    >>> cuconv.depthwise_conv2d_dgrad(dy, w, (1, 1, 3, 4))[0, 0]
    array([[ 1.,  3.,  3.,  2.],
           [ 4., 10., 10.,  6.],
           [ 3.,  7.,  7.,  4.]], dtype=float32)
    """
    # 1. Check.
    call = _check_dgrad(dy, w, out, x_shape, stride, padding, dilation)
    if out is not None:
        interop.check_apart(out, dy=dy, w=w)
    geometry = call.geometry
    if call.device is None:
        return reference.depthwise_conv2d_dgrad(dy, w, geometry, out)
    if not interop.is_current(call.device):
        with interop.on_device(call.device):
            return depthwise_conv2d_dgrad(dy, w, x_shape, stride=stride, padding=padding, dilation=dilation, out=out)
    # 2. Allocate.
    if not call.dense:
        dy, w = layouts.contiguous(dy, geometry.channels_last), interop.contiguous(w)
    dx = interop.output(out, call.shape, dy.dtype, geometry.channels_last)
    if geometry.N:
        # 3. Plan, and 4. kernel: found again once they are known.
        dy_start, dx_start = dy.data.ptr, dx.data.ptr
        of = plan.forced_variant(), (dy_start | dx_start) % plan.VECTOR_BYTES == 0
        kernel = call.kernels.get(of)
        if kernel is None:
            kernel = call.kernels[of] = _dgrad_kernel(geometry, call.dtype, call.device, *of)
        # 5. Launch.
        kernel(dy_start, w.data.ptr, 0, dx_start)
    return layouts.delivered(dx, out, call.channels_last != geometry.channels_last)


@interop.remembered
def _check_dgrad(dy: Any, w: Any, out: Any, x_shape: Any, stride: Any, padding: Any, dilation: Any) -> _Call:
    module = interop.array_module(dy=dy, w=w, out=out)
    dtype = check_dtypes(dy=dy, w=w)
    x_shape = shape_argument("x_shape", x_shape)
    channels_last = module is not np and interop.channels_last(dy)
    geometry = depthwise_geometry(
        x_shape, w.shape, stride=stride, padding=padding, dilation=dilation, channels_last=channels_last
    )
    geometry = plan.in_fastest_layout(geometry)
    check_shape("dy", dy, geometry.y_shape, "that of the convolution's output")
    device = None if module is np else interop.one_device(dy=dy, w=w, out=out)
    if out is not None:
        check_out(out, geometry.x_shape, dy.dtype)
    layout = geometry.channels_last
    dense = device is not None and interop.all_contiguous(dy, channels_last=layout) and interop.all_contiguous(w)
    return _Call(geometry, dtype, device, channels_last, dense, geometry.x_shape)


@lru_cache(maxsize=4096)
def _dgrad_kernel(
    geometry: Conv2dGeometry, dtype: str, device_id: int, forced: str | None, aligned: bool
) -> kernels.Kernel:
    # 3. Plan.
    chosen = plan.depthwise_dgrad(geometry, dtype, kernels.target(device_id), forced, aligned)
    # 4. Kernel.
    return kernels.load(chosen, device_id)


def depthwise_conv2d_wgrad(
    dy: Any,
    x: Any,
    w_shape: Any,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    bias: bool = False,
    out: Any = None,
    workspace: Any = None,
) -> Any:
    """Gradients of a depthwise 2-D convolution with respect to its weights and, if asked for, its bias, in one pass.

    ``dw[c*M + m, 0, r, s] = sum over n, p, q of dy[n, c*M + m, p, q] * x[n, c, row, column]``, with row and column as
    in depthwise_conv2d, and zero outside x; ``dbias[k] = sum over n, p, q of dy[n, k, p, q]``. The same input gives
    the same bits.

    Equivalent to ``torch.nn.grad.conv2d_weight(x, w_shape, dy, stride, padding, dilation, groups=x.shape[1])`` and
    ``dy.sum((0, 2, 3))``.

    Parameters
    ----------
    dy : (N, C*M, P, Q) float16, bfloat16, float32 or float64
        The gradient with respect to the convolution's output. A NumPy or a CuPy array, as in depthwise_conv2d.
    x : (N, C, H, W), the dtype of dy
        The convolution's input.
    w_shape : (C*M, 1, R, S)
        The weights' shape, which dy and x do not tell at strides above 1.
    stride, padding, dilation
        As they were in depthwise_conv2d.
    bias : bool
        Whether dbias is wanted too.
    out : (C*M, 1, R, S), the dtype of dy, optional; with bias the pair of it and (C*M,)
        Where the result is written; any strides that do not overlap, and no memory of an input.
    workspace : any shape and dtype, C-contiguous, optional
        Where sums are kept under way, in place of memory from CuPy's pool. The error for one that is too small says how
        many bytes are needed. NumPy arrays need none.

    Returns
    -------
    dw : (C*M, 1, R, S), the dtype of dy; with bias the pair of it and dbias, (C*M,)
        Sums are made in float32, for float64 in float64 (NumPy arrays: always float64), and rounded once.

    Raises
    ------
    TypeError
        For another kind of array, dtype or number, and for arrays of different kinds or dtypes.
    ValueError
        For shapes and numbers that have no convolution, a dy that is not of its output's shape, arrays on different
        GPUs, an out that overlaps, and a workspace that is too small.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> dy = np.ones((1, 1, 2, 3), np.float32)
    >>> x = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    >>> dw, dbias = cuconv.depthwise_conv2d_wgrad(dy, x, (1, 1, 2, 2), bias=True)
    >>> dw[0, 0]
    array([[18., 24.],
           [42., 48.]], dtype=float32)
    >>> dbias
    array([6.], dtype=float32)
    """
    # 1. Check.
    dw_out, dbias_out = pair_argument("out", out) if bias and out is not None else (out, None)
    call = _check_wgrad(dy, x, dw_out, dbias_out, workspace, w_shape, stride, padding, dilation)
    if dw_out is not None:
        interop.check_apart(dw_out, dy=dy, x=x, dbias=dbias_out)
    if dbias_out is not None:
        interop.check_apart(dbias_out, dy=dy, x=x)
    if workspace is not None:
        interop.check_apart(workspace, dy=dy, x=x, out=dw_out, dbias=dbias_out, name="workspace")
    geometry = call.geometry
    if call.device is None:
        return reference.depthwise_conv2d_wgrad(dy, x, bias, geometry, dw_out, dbias_out)
    if not interop.is_current(call.device):
        with interop.on_device(call.device):
            return depthwise_conv2d_wgrad(
                dy,
                x,
                w_shape,
                stride=stride,
                padding=padding,
                dilation=dilation,
                bias=bias,
                out=out,
                workspace=workspace,
            )
    # 2. Allocate.
    if not call.dense:
        dy, x = (layouts.contiguous(array, geometry.channels_last) for array in (dy, x))
    dw = interop.output(dw_out, call.shape, dy.dtype)
    dbias = interop.output(dbias_out, (geometry.K,), dy.dtype) if bias else None
    if geometry.N:
        # 3. Plan, and 4. kernels: found again once they are known.
        dy_start, x_start = dy.data.ptr, x.data.ptr
        of = plan.forced_variant(), (dy_start | x_start) % plan.VECTOR_BYTES == 0, bool(bias)
        found = call.kernels.get(of)
        if found is None:
            found = call.kernels[of] = _wgrad_kernels(geometry, call.dtype, call.device, *of)
        sums, reduce, workspace_bytes = found
        none_needed = workspace is None and workspace_bytes == 0
        partials = None if none_needed else interop.workspace(workspace, workspace_bytes)
        # 5. Launch.
        partials_start = 0 if partials is None else partials.data.ptr
        dw_start, dbias_start = dw.data.ptr, 0 if dbias is None else dbias.data.ptr
        sums(dy_start, x_start, partials_start, dw_start, dbias_start)
        if reduce is not None:
            reduce(partials_start, dw_start, dbias_start)
    else:
        for gradient in (dw, dbias):
            if gradient is not None:
                gradient.fill(0)
    dw = layouts.delivered(dw, dw_out)
    return dw if dbias is None else (dw, layouts.delivered(dbias, dbias_out))


@interop.remembered
def _check_wgrad(
    dy: Any, x: Any, out: Any, dbias: Any, workspace: Any, w_shape: Any, stride: Any, padding: Any, dilation: Any
) -> _Call:
    module = interop.array_module(dy=dy, x=x, out=out, dbias=dbias, workspace=workspace)
    dtype = check_dtypes(dy=dy, x=x)
    w_shape = shape_argument("w_shape", w_shape)
    channels_last = module is not np and interop.channels_last(dy) and interop.channels_last(x)
    geometry = depthwise_geometry(
        x.shape, w_shape, stride=stride, padding=padding, dilation=dilation, channels_last=channels_last
    )
    geometry = plan.in_fastest_layout(geometry)
    check_shape("dy", dy, geometry.y_shape, "that of the convolution's output")
    device = None if module is np else interop.one_device(dy=dy, x=x, out=out, dbias=dbias, workspace=workspace)
    if out is not None:
        check_out(out, geometry.w_shape, dy.dtype)
    if dbias is not None:
        check_out(dbias, (geometry.K,), dy.dtype)
    dense = device is not None and interop.all_contiguous(dy, x, channels_last=geometry.channels_last)
    return _Call(geometry, dtype, device, channels_last, dense, geometry.w_shape)


@lru_cache(maxsize=4096)
def _wgrad_kernels(
    geometry: Conv2dGeometry, dtype: str, device_id: int, forced: str | None, aligned: bool, bias: bool
) -> tuple[kernels.Kernel, kernels.Kernel | None, int]:
    """The kernel of the sums, that which adds those of slabs where there are several, and the workspace's bytes."""
    # 3. Plan.
    chosen = plan.depthwise_wgrad(geometry, dtype, bias, kernels.target(device_id), forced, aligned)
    # 4. Kernels.
    sums = kernels.load(chosen.sums, device_id)
    reduce = None if chosen.reduce is None else kernels.load(chosen.reduce, device_id)
    return sums, reduce, chosen.workspace_bytes
