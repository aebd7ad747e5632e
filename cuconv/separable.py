"""Depthwise-separable convolution: depthwise, then pointwise, in one kernel where that takes less time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import interop, kernels, layouts, plan, reference
from .geometry import (
    SeparableGeometry,
    check_activation,
    check_dtypes,
    check_out,
    check_shape,
    separable_geometry,
)


class _Call(NamedTuple):
    """What the arguments of a call, once checked, tell of it."""

    geometry: SeparableGeometry
    dtype: str
    device: int | None  # None for NumPy arrays
    channels_last: bool
    dense: bool  # whether kernels can read the arrays as they lie


def separable_conv2d(
    x: Any,
    depthwise_w: Any,
    pointwise_w: Any,
    depthwise_bias: Any = None,
    pointwise_bias: Any = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    depthwise_activation: str | None = None,
    pointwise_activation: str | None = None,
    allow_tf32: bool = False,
    out: Any = None,
) -> Any:
    """Depthwise-separable 2-D convolution: a depthwise convolution with its bias and activation, and the pointwise one
    of its result with its own. What is in between never touches the GPU's memory where one kernel makes both.

    Equivalent to ``conv2d(conv2d(x, depthwise_w, depthwise_bias, stride, padding, dilation, groups=x.shape[1]),
    pointwise_w, pointwise_bias)`` of ``torch.nn.functional``, with the activations after each.

    Parameters
    ----------
    x : (N, C, H, W) float16, bfloat16, float32 or float64
        A NumPy array, computed by the reference, or a CuPy array, computed on its GPU and on the current stream.
        On the GPU it may lie in memory as (N, C, H, W) or channels-last; see depthwise_conv2d.
    depthwise_w : (C*M, 1, R, S), the dtype of x
    pointwise_w : (K, C*M, 1, 1) or (K, C*M), the dtype of x
    depthwise_bias : (C*M,), the dtype of x, optional
    pointwise_bias : (K,), the dtype of x, optional
    stride, padding, dilation
        Of the depthwise convolution, as in depthwise_conv2d.
    depthwise_activation, pointwise_activation : "relu", "relu6", "silu", "hardswish", "gelu" or None
        What is applied to each result, its bias added.
    allow_tf32 : bool
        As in pointwise_conv2d.
    out : (N, K, P, Q), the dtype of x, optional
        Where the result is written; any strides that do not overlap, and no memory of an input. One that does not lie
        as x does is written by one more copy.

    Returns
    -------
    y : (N, K, P, Q), the dtype of x
        In the layout of x, or out. Each part is summed and rounded as by itself: what is in between has the dtype of x.

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
    >>> x = np.ones((1, 2, 3, 3), np.float32)
    >>> depthwise_w = np.ones((2, 1, 3, 3), np.float32)
    >>> pointwise_w = np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    >>> y = cuconv.separable_conv2d(x, depthwise_w, pointwise_w, padding=1, pointwise_activation="relu")
    >>> y[0, :, 1, 1]
    array([18.,  0.,  0.], dtype=float32)
    """
    # 1. Check.
    call = _check_forward(x, depthwise_w, pointwise_w, depthwise_bias, pointwise_bias, out, stride, padding, dilation)
    epilogue = plan.SeparableEpilogue(
        bool(allow_tf32),
        check_activation("depthwise_activation", depthwise_activation),
        check_activation("pointwise_activation", pointwise_activation),
    )
    inputs = (x, depthwise_w, depthwise_bias, pointwise_w, pointwise_bias)
    if out is not None:
        interop.check_apart(
            out,
            x=x,
            depthwise_w=depthwise_w,
            pointwise_w=pointwise_w,
            depthwise_bias=depthwise_bias,
            pointwise_bias=pointwise_bias,
        )
    if call.device is None:
        return reference.separable_conv2d(
            x,
            depthwise_w,
            pointwise_w,
            depthwise_bias,
            pointwise_bias,
            call.geometry,
            epilogue.depthwise_activation,
            epilogue.pointwise_activation,
            out,
        )
    with interop.on_device(call.device):
        # 2. Allocate.
        if not call.dense:
            inputs = (
                layouts.contiguous(x, call.channels_last),
                *(None if array is None else interop.contiguous(array) for array in inputs[1:]),
            )
        y = interop.output(out, call.geometry.y_shape, x.dtype, call.channels_last)
        if call.geometry.depthwise.N:
            # 3. Plan, and 4. kernels: found again once they are known.
            addresses = [interop.address(array) for array in (*inputs, y)]
            aligned = not any(address % plan.VECTOR_BYTES for address in addresses)
            launch = _launch(call.geometry, call.dtype, epilogue, call.device, plan.forced_variant(), aligned)
            # 5. Launch.
            launch(*addresses)
        return layouts.delivered(y, out)


@interop.remembered
def _check_forward(
    x: Any,
    depthwise_w: Any,
    pointwise_w: Any,
    depthwise_bias: Any,
    pointwise_bias: Any,
    out: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
) -> _Call:
    inputs = {"x": x, "depthwise_w": depthwise_w, "pointwise_w": pointwise_w}
    biases = {"depthwise_bias": depthwise_bias, "pointwise_bias": pointwise_bias}
    module = interop.array_module(**inputs, **biases, out=out)
    dtype = check_dtypes(**inputs, **biases)
    channels_last = module is not np and interop.channels_last(x)
    geometry = separable_geometry(
        x.shape,
        depthwise_w.shape,
        pointwise_w.shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        channels_last=channels_last,
    )
    for (name, bias), channels in zip(biases.items(), (geometry.depthwise.K, geometry.pointwise.K), strict=True):
        if bias is not None:
            check_shape(name, bias, (channels,), "one value for each output channel")
    device = None if module is np else interop.one_device(**inputs, **biases, out=out)
    if out is not None:
        check_out(out, geometry.y_shape, x.dtype)
    others = (depthwise_w, pointwise_w, depthwise_bias, pointwise_bias)
    dense = (
        device is not None
        and interop.all_contiguous(x, channels_last=channels_last)
        and interop.all_contiguous(*others)
    )
    return _Call(geometry, dtype, device, channels_last, dense)


@lru_cache(maxsize=4096)
def _launch(
    geometry: SeparableGeometry,
    dtype: str,
    epilogue: plan.SeparableEpilogue,
    device_id: int,
    forced: str | None,
    aligned: bool,
) -> Callable[..., None]:
    """Called with the addresses of x, the depthwise weights and bias, the pointwise ones, and y."""
    target = kernels.target(device_id)
    # 3. Plan.
    chosen = plan.separable_conv(geometry, dtype, epilogue, target, forced, aligned)
    # 4. Kernels.
    if chosen is not None:
        return kernels.load(chosen, device_id)
    return _apart(geometry, dtype, epilogue, device_id, aligned)


def _apart(
    geometry: SeparableGeometry, dtype: str, epilogue: plan.SeparableEpilogue, device_id: int, aligned: bool
) -> Callable[..., None]:
    """Likewise, by the kernels of both parts, and memory for what is in between."""
    target = kernels.target(device_id)
    of_depthwise = geometry.depthwise
    depthwise = kernels.load(plan.depthwise_forward(of_depthwise, dtype, target, None, aligned), device_id)
    activate = None
    if epilogue.depthwise_activation is not None:
        elements = of_depthwise.y_size
        activate = kernels.load(plan.activate(elements, dtype, epilogue.depthwise_activation, target), device_id)
    of_pointwise = plan.Epilogue(epilogue.allow_tf32, epilogue.pointwise_activation)
    pointwise = kernels.load(
        plan.pointwise_conv(geometry.pointwise, dtype, False, of_pointwise, target, None, aligned), device_id
    )
    size = of_depthwise.y_size * plan.DTYPES[dtype][1]

    def launch(x: int, depthwise_w: int, depthwise_bias: int, pointwise_w: int, pointwise_bias: int, y: int) -> None:
        middle = interop.workspace(None, size)
        depthwise(x, depthwise_w, depthwise_bias, middle.data.ptr)
        if activate is not None:
            activate(middle.data.ptr)
        pointwise(middle.data.ptr, pointwise_w, pointwise_bias, y)

    return launch
