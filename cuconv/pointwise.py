"""Pointwise convolution: every pixel's channels mixed, by one matrix for all pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import interop, kernels, layouts, plan, reference
from .geometry import (
    PointwiseGeometry,
    check_activation,
    check_dtypes,
    check_out,
    check_shape,
    pair_argument,
    pointwise_geometry,
    shape_argument,
)


class _Call(NamedTuple):
    """What the arguments of a call, once checked, tell of it."""

    geometry: PointwiseGeometry
    dtype: str
    device: int | None  # None for NumPy arrays
    dense: bool  # whether kernels can read the arrays as they lie


def pointwise_conv2d(
    x: Any,
    w: Any,
    bias: Any = None,
    *,
    stride: Any = 1,
    allow_tf32: bool = False,
    activation: str | None = None,
    out: Any = None,
) -> Any:
    """Pointwise 2-D convolution, of a kernel of one row and column, forward.

    ``y[n, k, p, q] = activation(bias[k] + sum over c of x[n, c, p*stride, q*stride] * w[k, c])``.

    Equivalent to ``torch.nn.functional.conv2d(x, w, bias, stride)`` with w (K, C, 1, 1), and the activation of it.

    Parameters
    ----------
    x : (N, C, H, W) float16, bfloat16, float32 or float64
        A NumPy array, computed by the reference, or a CuPy array, computed on its GPU and on the current stream.
        On the GPU it may lie in memory as (N, C, H, W) or channels-last; see depthwise_conv2d.
    w : (K, C, 1, 1) or (K, C), the dtype of x
    bias : (K,), the dtype of x, optional
    stride : int or (rows, columns)
    allow_tf32 : bool
        Whether float32 may be multiplied as TF32, with 11 bits of each element, as PyTorch's convolutions do unless
        told otherwise. Without it products keep to float32's own roundoff, at two to three times the arithmetic.
    activation : "relu", "relu6", "silu", "hardswish", "gelu" or None
        What is applied to the result before it is rounded; gelu is the exact one, with the error function.
    out : (N, K, P, Q), the dtype of x, optional
        Where the result is written; any strides that do not overlap, and no memory of an input. One that does not lie
        as x does is written by one more copy.

    Returns
    -------
    y : (N, K, P, Q), the dtype of x
        On the GPU channels-last where x is, C-contiguous everywhere else; or out. ``P = (H - 1) // stride + 1``, Q
        likewise. Sums are made in float32, for float64 in float64 (NumPy arrays: always float64), and rounded once.

    Raises
    ------
    TypeError
        For another kind of array, dtype or number, and for arrays of different kinds or dtypes.
    ValueError
        For shapes and numbers that have no convolution, an activation that is not known, arrays on different GPUs, and
        an out that overlaps.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    >>> w = np.array([[1, 0], [1, 1], [1, -1]], np.float32)
    >>> cuconv.pointwise_conv2d(x, w, activation="relu")[0, :, 0]
    array([[0., 1.],
           [4., 6.],
           [0., 0.]], dtype=float32)
    """
    # 1. Check.
    call = _check_forward(x, w, bias, out, stride)
    epilogue = plan.Epilogue(bool(allow_tf32), check_activation("activation", activation))
    if out is not None:
        interop.check_apart(out, x=x, w=w, bias=bias)
    geometry = call.geometry
    if call.device is None:
        return reference.pointwise_conv2d(x, w, bias, geometry, epilogue.activation, out)
    with interop.on_device(call.device):
        # 2. Allocate.
        if not call.dense:
            x, w = layouts.contiguous(x, geometry.channels_last), interop.contiguous(w)
            bias = None if bias is None else interop.contiguous(bias)
        y = interop.output(out, geometry.y_shape, x.dtype, geometry.channels_last)
        if geometry.N:
            # 3. Plan, and 4. kernel: found again once they are known.
            aligned = (x.data.ptr | w.data.ptr | y.data.ptr) % plan.VECTOR_BYTES == 0
            kernel = _kernel(geometry, call.dtype, False, epilogue, call.device, plan.forced_variant(), aligned)
            # 5. Launch.
            kernel(x.data.ptr, w.data.ptr, interop.address(bias), y.data.ptr)
        return layouts.delivered(y, out)


@interop.remembered
def _check_forward(x: Any, w: Any, bias: Any, out: Any, stride: Any) -> _Call:
    module = interop.array_module(x=x, w=w, bias=bias, out=out)
    dtype = check_dtypes(x=x, w=w, bias=bias)
    channels_last = module is not np and interop.channels_last(x)
    geometry = pointwise_geometry(x.shape, w.shape, stride=stride, channels_last=channels_last)
    if bias is not None:
        check_shape("bias", bias, (geometry.K,), "one value for each output channel")
    device = None if module is np else interop.one_device(x=x, w=w, bias=bias, out=out)
    if out is not None:
        check_out(out, geometry.y_shape, x.dtype)
    layout = geometry.channels_last
    dense = device is not None and interop.all_contiguous(x, channels_last=layout) and interop.all_contiguous(w, bias)
    return _Call(geometry, dtype, device, dense)


def pointwise_conv2d_dgrad(
    dy: Any, w: Any, x_shape: Any, *, stride: Any = 1, allow_tf32: bool = False, out: Any = None
) -> Any:
    """Gradient of a pointwise 2-D convolution, without an activation, with respect to its input.

    ``dx[n, c, p*stride, q*stride] = sum over k of dy[n, k, p, q] * w[k, c]``, and zero at all other pixels.

    Equivalent to ``torch.nn.grad.conv2d_input(x_shape, w, dy, stride)`` with w (K, C, 1, 1).

    Parameters
    ----------
    dy : (N, K, P, Q) float16, bfloat16, float32 or float64
        The gradient with respect to the convolution's output. A NumPy or a CuPy array, its layout as that of x in
        pointwise_conv2d.
    w : (K, C, 1, 1) or (K, C), the dtype of dy
    x_shape : (N, C, H, W)
        The input's shape, which dy does not tell at strides above 1.
    stride, allow_tf32
        As they were in pointwise_conv2d.
    out : (N, C, H, W), the dtype of dy, optional
        Where the result is written; any strides that do not overlap, and no memory of an input. One that does not lie
        as dy does is written by one more copy.

    Returns
    -------
    dx : (N, C, H, W), the dtype of dy
        In the layout of dy, as the result of pointwise_conv2d is in that of x. Summed and rounded as there.

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
    >>> dy = np.array([1, 2], np.float32).reshape(1, 2, 1, 1)
    >>> w = np.array([[1, 0, 3], [1, 1, 0]], np.float32)
    >>> cuconv.pointwise_conv2d_dgrad(dy, w, (1, 3, 1, 1)).ravel()
    array([3., 2., 3.], dtype=float32)
    """
    # 1. Check.
    call = _check_dgrad(dy, w, out, x_shape, stride)
    if out is not None:
        interop.check_apart(out, dy=dy, w=w)
    geometry = call.geometry
    if call.device is None:
        return reference.pointwise_conv2d_dgrad(dy, w, geometry, out)
    with interop.on_device(call.device):
        # 2. Allocate.
        if not call.dense:
            dy, w = layouts.contiguous(dy, geometry.channels_last), interop.contiguous(w)
        dx = interop.output(out, geometry.x_shape, dy.dtype, geometry.channels_last)
        if geometry.N:
            if geometry.stride != (1, 1):
                dx.fill(0)
            # 3. Plan, and 4. kernel: found again once they are known.
            aligned = (dy.data.ptr | w.data.ptr | dx.data.ptr) % plan.VECTOR_BYTES == 0
            epilogue = plan.Epilogue(bool(allow_tf32))
            kernel = _kernel(geometry, call.dtype, True, epilogue, call.device, plan.forced_variant(), aligned)
            # 5. Launch.
            kernel(dy.data.ptr, w.data.ptr, 0, dx.data.ptr)
        return layouts.delivered(dx, out)


@interop.remembered
def _check_dgrad(dy: Any, w: Any, out: Any, x_shape: Any, stride: Any) -> _Call:
    module = interop.array_module(dy=dy, w=w, out=out)
    dtype = check_dtypes(dy=dy, w=w)
    x_shape = shape_argument("x_shape", x_shape)
    channels_last = module is not np and interop.channels_last(dy)
    geometry = pointwise_geometry(x_shape, w.shape, stride=stride, channels_last=channels_last)
    check_shape("dy", dy, geometry.y_shape, "that of the convolution's output")
    device = None if module is np else interop.one_device(dy=dy, w=w, out=out)
    if out is not None:
        check_out(out, geometry.x_shape, dy.dtype)
    dense = device is not None and interop.all_contiguous(dy, channels_last=channels_last) and interop.all_contiguous(w)
    return _Call(geometry, dtype, device, dense)


@lru_cache(maxsize=4096)
def _kernel(
    geometry: PointwiseGeometry,
    dtype: str,
    turned: bool,
    epilogue: plan.Epilogue,
    device_id: int,
    forced: str | None,
    aligned: bool,
) -> kernels.Kernel:
    # 3. Plan.
    chosen = plan.pointwise_conv(geometry, dtype, turned, epilogue, kernels.target(device_id), forced, aligned)
    # 4. Kernel.
    return kernels.load(chosen, device_id)


def pointwise_conv2d_wgrad(
    dy: Any,
    x: Any,
    w_shape: Any,
    *,
    stride: Any = 1,
    bias: bool = False,
    allow_tf32: bool = False,
    out: Any = None,
    workspace: Any = None,
) -> Any:
    """Gradients of a pointwise 2-D convolution, without an activation, with respect to its weights and, if asked for,
    its bias, in one pass.

    ``dw[k, c] = sum over n, p, q of dy[n, k, p, q] * x[n, c, p*stride, q*stride]``; ``dbias[k] = sum over n, p, q of
    dy[n, k, p, q]``. The same input gives the same bits.

    Equivalent to ``torch.nn.grad.conv2d_weight(x, w_shape, dy, stride)`` with w_shape (K, C, 1, 1), and
    ``dy.sum((0, 2, 3))``.

    Parameters
    ----------
    dy : (N, K, P, Q) float16, bfloat16, float32 or float64
        The gradient with respect to the convolution's output. A NumPy or a CuPy array, as in pointwise_conv2d.
    x : (N, C, H, W), the dtype of dy
        The convolution's input.
    w_shape : (K, C, 1, 1) or (K, C)
        The shape that dw is wanted in.
    stride, allow_tf32
        As they were in pointwise_conv2d.
    bias : bool
        Whether dbias is wanted too.
    out : of w_shape, the dtype of dy, optional; with bias the pair of it and (K,)
        Where the result is written; any strides that do not overlap, and no memory of an input.
    workspace : any shape and dtype, C-contiguous, optional
        Where sums are kept under way, in place of memory from CuPy's pool. The error for one that is too small says how
        many bytes are needed. NumPy arrays need none.

    Returns
    -------
    dw : of w_shape, the dtype of dy; with bias the pair of it and dbias, (K,)
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
    >>> dy = np.array([[1, 2], [3, 4]], np.float32).reshape(1, 2, 1, 2)
    >>> x = np.array([[1, 0], [1, 1], [0, 2]], np.float32).reshape(1, 3, 1, 2)
    >>> dw, dbias = cuconv.pointwise_conv2d_wgrad(dy, x, (2, 3), bias=True)
    >>> dw
    array([[1., 3., 4.],
           [3., 7., 8.]], dtype=float32)
    >>> dbias
    array([3., 7.], dtype=float32)
    """
    # 1. Check.
    dw_out, dbias_out = pair_argument("out", out) if bias and out is not None else (out, None)
    call = _check_wgrad(dy, x, dw_out, dbias_out, workspace, w_shape, stride)
    w_shape = tuple(w_shape)
    if dw_out is not None:
        interop.check_apart(dw_out, dy=dy, x=x, dbias=dbias_out)
    if dbias_out is not None:
        interop.check_apart(dbias_out, dy=dy, x=x)
    if workspace is not None:
        interop.check_apart(workspace, dy=dy, x=x, out=dw_out, dbias=dbias_out, name="workspace")
    geometry = call.geometry
    if call.device is None:
        dw = np.empty(w_shape, dy.dtype) if dw_out is None else dw_out
        return reference.pointwise_conv2d_wgrad(dy, x, bias, geometry, dw, dbias_out)
    with interop.on_device(call.device):
        # 2. Allocate.
        if not call.dense:
            dy, x = (layouts.contiguous(array, geometry.channels_last) for array in (dy, x))
        dw = interop.output(dw_out, w_shape, dy.dtype)
        dbias = interop.output(dbias_out, (geometry.K,), dy.dtype) if bias else None
        if geometry.N:
            # 3. Plan, and 4. kernels: found again once they are known.
            aligned = (dy.data.ptr | x.data.ptr) % plan.VECTOR_BYTES == 0
            sums, reduce, workspace_bytes = _wgrad_kernels(
                geometry, call.dtype, bool(bias), bool(allow_tf32), call.device, plan.forced_variant(), aligned
            )
            partials = interop.workspace(workspace, workspace_bytes)
            # 5. Launch.
            results = interop.address(partials), dw.data.ptr, interop.address(dbias)
            sums(dy.data.ptr, x.data.ptr, *results)
            if reduce is not None:
                reduce(*results)
        else:
            for gradient in (dw, dbias):
                if gradient is not None:
                    gradient.fill(0)
        dw = layouts.delivered(dw, dw_out)
        return dw if dbias is None else (dw, layouts.delivered(dbias, dbias_out))


@interop.remembered
def _check_wgrad(dy: Any, x: Any, out: Any, dbias: Any, workspace: Any, w_shape: Any, stride: Any) -> _Call:
    module = interop.array_module(dy=dy, x=x, out=out, dbias=dbias, workspace=workspace)
    dtype = check_dtypes(dy=dy, x=x)
    w_shape = shape_argument("w_shape", w_shape)
    channels_last = module is not np and interop.channels_last(dy) and interop.channels_last(x)
    geometry = pointwise_geometry(x.shape, w_shape, stride=stride, channels_last=channels_last, name="w_shape")
    check_shape("dy", dy, geometry.y_shape, "that of the convolution's output")
    arrays = {"dy": dy, "x": x, "out": out, "dbias": dbias, "workspace": workspace}
    device = None if module is np else interop.one_device(**arrays)
    if out is not None:
        check_out(out, w_shape, dy.dtype)
    if dbias is not None:
        check_out(dbias, (geometry.K,), dy.dtype)
    dense = device is not None and interop.all_contiguous(dy, x, channels_last=channels_last)
    return _Call(geometry, dtype, device, dense)


@lru_cache(maxsize=4096)
def _wgrad_kernels(
    geometry: PointwiseGeometry,
    dtype: str,
    bias: bool,
    allow_tf32: bool,
    device_id: int,
    forced: str | None,
    aligned: bool,
) -> tuple[kernels.Kernel, kernels.Kernel | None, int]:
    """The kernel of the sums, that which adds those of slabs where there are several, and the workspace's bytes."""
    # 3. Plan.
    chosen = plan.pointwise_wgrad(geometry, dtype, bias, allow_tf32, kernels.target(device_id), forced, aligned)
    # 4. Kernels.
    sums = kernels.load(chosen.sums, device_id)
    reduce = None if chosen.reduce is None else kernels.load(chosen.reduce, device_id)
    return sums, reduce, chosen.workspace_bytes
