"""What is timed of an operator: one function a pass, which makes the data and says how to launch, check and compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cuconv import (
    depthwise_conv2d,
    depthwise_conv2d_dgrad,
    depthwise_conv2d_wgrad,
    errors,
    kernels,
    measure,
    plan,
    pointwise_conv2d,
    pointwise_conv2d_dgrad,
    pointwise_conv2d_wgrad,
    separable_conv2d,
    separable_conv2d_backward,
)
from cuconv.cases import Case
from cuconv.geometry import Conv2dGeometry, PointwiseGeometry, SeparableGeometry

from . import peers
from .cases import LAYOUTS, dtype_of
from .peers import Peer

Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class Work:
    """One case in one dtype and layout, ready to run: run and error take what one launch reads, and what it writes."""

    inputs: list[Arrays]
    outputs: list[Arrays]
    weights: Arrays
    run: Callable[[Arrays, Arrays], Any]
    error: Callable[[Arrays, Arrays], float]
    kernel: str
    peers: dict[str, Peer]
    # Written in memory of a launch's own.
    further_bytes: int = 0

    def launch(self, i: int) -> None:
        self.run(self.inputs[i], self.outputs[i])

    def check(self) -> float:
        for array in self.outputs[0]:
            errors.poison(array)
        self.launch(0)
        return self.error(self.inputs[0], self.outputs[0])

    @property
    def bytes(self) -> int:
        """What one launch reads and writes, each once."""
        return sum(array.nbytes for array in (*self.inputs[0], *self.outputs[0], *self.weights)) + self.further_bytes


def depthwise_forward(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    geometry = case.geometry
    w = _random(geometry.w_shape, dtype, 1)
    bias = _random((geometry.K,), dtype, 2) if case.bias else None
    xs, ys = _buffers((geometry.x_shape,), (geometry.y_shape,), dtype, layout, timer)
    return Work(
        inputs=xs,
        outputs=ys,
        weights=(w,) if bias is None else (w, bias),
        run=lambda x, y: depthwise_conv2d(*x, w, bias, out=y[0], **case.options),
        error=lambda x, y: errors.slice_error(*y, *x, w, bias, geometry),
        kernel=_kernel(plan.depthwise_forward, geometry, (dtype,), layout, w),
        peers=peers.forward(case, xs, w, bias),
    )


def depthwise_dgrad(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    geometry = case.geometry
    w = _random(geometry.w_shape, dtype, 1)
    dys, dxs = _buffers((geometry.y_shape,), (geometry.x_shape,), dtype, layout, timer)
    return Work(
        inputs=dys,
        outputs=dxs,
        weights=(w,),
        run=lambda dy, dx: depthwise_conv2d_dgrad(*dy, w, geometry.x_shape, out=dx[0], **case.options),
        error=lambda dy, dx: errors.dgrad_slice_error(*dx, *dy, w, geometry),
        kernel=_kernel(plan.depthwise_dgrad, geometry, (dtype,), layout, w),
        peers=peers.dgrad(case, dys, w),
    )


def depthwise_wgrad(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    geometry = case.geometry
    gradients, _ = _buffers((geometry.y_shape, geometry.x_shape), (), dtype, layout, timer)
    dw = _random(geometry.w_shape, dtype, 1)
    results = (dw, _random((geometry.K,), dtype, 2)) if case.bias else (dw,)
    return Work(
        inputs=gradients,
        # The same for all launches: a few kilobytes in the cache or not make no difference.
        outputs=[results] * len(gradients),
        weights=(),
        run=lambda read, out: depthwise_conv2d_wgrad(
            *read, geometry.w_shape, bias=case.bias, out=out if case.bias else out[0], **case.options
        ),
        error=lambda read, out: errors.wgrad_slice_error(*(*out, None)[:2], *read, geometry),
        kernel=_kernel(plan.depthwise_wgrad, geometry, (dtype, case.bias), layout, dw),
        peers=peers.wgrad(case, gradients),
    )


def pointwise_forward(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    g, options = _pointwise(case, layout), _precision(dtype)
    w = _random((g.K, g.C), dtype, 1)
    xs, ys = _buffers((g.x_shape,), (g.y_shape,), dtype, layout, timer)
    epilogue = plan.Epilogue(**options)
    return Work(
        inputs=xs,
        outputs=ys,
        weights=(w,),
        run=lambda x, y: pointwise_conv2d(*x, w, out=y[0], **options),
        error=lambda x, y: errors.pointwise_slice_error(*y, *x, w, None, g, dtype == "tf32"),
        kernel=plan.pointwise_conv(g, dtype_of(dtype), False, epilogue, _target(w), plan.forced_variant()).source,
        peers=peers.pointwise_forward(xs, w, g, dtype),
    )


def pointwise_dgrad(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    g, options = _pointwise(case, layout), _precision(dtype)
    w = _random((g.K, g.C), dtype, 1)
    dys, dxs = _buffers((g.y_shape,), (g.x_shape,), dtype, layout, timer)
    turned = replace(g, C=g.K, K=g.C)
    epilogue = plan.Epilogue(**options)
    return Work(
        inputs=dys,
        outputs=dxs,
        weights=(w,),
        run=lambda dy, dx: pointwise_conv2d_dgrad(*dy, w, g.x_shape, out=dx[0], **options),
        error=lambda dy, dx: errors.pointwise_slice_error(*dx, *dy, w.T, None, turned, dtype == "tf32"),
        kernel=plan.pointwise_conv(g, dtype_of(dtype), True, epilogue, _target(w), plan.forced_variant()).source,
        peers=peers.pointwise_dgrad(dys, w, g, dtype),
    )


def pointwise_wgrad(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    g, options = _pointwise(case, layout), _precision(dtype)
    gradients, _ = _buffers((g.y_shape, g.x_shape), (), dtype, layout, timer)
    dw = _random((g.K, g.C), dtype, 1)
    tf32 = options["allow_tf32"]
    forced = plan.forced_variant()
    return Work(
        inputs=gradients,
        outputs=[(dw,)] * len(gradients),
        weights=(),
        run=lambda read, out: pointwise_conv2d_wgrad(*read, dw.shape, out=out[0], **options),
        error=lambda read, out: errors.pointwise_wgrad_slice_error(*out, None, *read, tf32),
        kernel=plan.pointwise_wgrad(g, dtype_of(dtype), False, tf32, _target(dw), forced).sums.source,
        peers=peers.pointwise_wgrad(gradients, g, dtype),
    )


def separable_forward(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    g, options = _in_layout(case.separable, layout), _precision(dtype)
    weights = _separable_weights(case, dtype)
    xs, ys = _buffers((g.depthwise.x_shape,), (g.y_shape,), dtype, layout, timer)
    return Work(
        inputs=xs,
        outputs=ys,
        weights=tuple(w for w in weights if w is not None),
        run=lambda x, y: separable_conv2d(*x, *weights, out=y[0], **case.options, **options),
        error=lambda x, y: errors.separable_slice_error(*y, *x, *weights, g, dtype == "tf32"),
        kernel=_separable_kernel(g, dtype, weights[0]),
        peers=peers.separable_forward(case, xs, weights, dtype),
    )


def separable_training(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    """Forward, and the gradients of all that there is."""
    g, options = _in_layout(case.separable, layout), _precision(dtype)
    weights = _separable_weights(case, dtype)
    read, written = _buffers((g.depthwise.x_shape, g.y_shape), (g.y_shape,), dtype, layout, timer)
    made: list[Any] = [None]

    def run(read: Arrays, y: Arrays) -> None:
        x, dy = read
        separable_conv2d(x, *weights, out=y[0], **case.options, **options)
        made[0] = separable_conv2d_backward(dy, x, *weights, **case.options, **options)

    def error(read: Arrays, y: Arrays) -> float:
        x, dy = read
        tf32 = dtype == "tf32"
        of_gradients = errors.separable_gradients_slice_error(made[0], dy, x, *weights[:3], g, tf32)
        return max(of_gradients, errors.separable_slice_error(*y, x, *weights, g, tf32))

    # The gradient of x is written, too, and those of the weights.
    return Work(
        inputs=read,
        outputs=written,
        weights=tuple(w for w in weights if w is not None) * 2,
        run=run,
        error=error,
        kernel=_separable_kernel(g, dtype, weights[0]),
        peers=peers.separable_training(case, read, weights, dtype),
        further_bytes=read[0][0].nbytes,
    )


def _pointwise(case: Case, layout: str) -> PointwiseGeometry:
    return replace(case.separable.pointwise, channels_last=layout == "nhwc")


def _in_layout(g: SeparableGeometry, layout: str) -> SeparableGeometry:
    last = layout == "nhwc"
    return SeparableGeometry(replace(g.depthwise, channels_last=last), replace(g.pointwise, channels_last=last))


def _precision(dtype: str) -> dict[str, bool]:
    return {"allow_tf32": dtype == "tf32"}


def _separable_weights(case: Case, dtype: str) -> Arrays:
    """Both weights and both biases, or None."""
    biases = [_random((size,), dtype, seed) if case.bias else None for size, seed in ((case.C, 2), (case.K or 0, 5))]
    return _random(case.shapes[1], dtype, 1), _random((case.K or 0, case.C), dtype, 4), *biases


def _separable_kernel(g: SeparableGeometry, dtype: str, w: Any) -> str:
    epilogue = plan.SeparableEpilogue(**_precision(dtype))
    fused = plan.separable_conv(g, dtype_of(dtype), epilogue, _target(w), plan.forced_variant())
    return "apart" if fused is None else fused.source


def _target(array: Any) -> plan.Target:
    return kernels.target(array.device.id)


def _kernel(
    make: Callable[..., plan.Plan | plan.WgradPlan], geometry: Conv2dGeometry, of: tuple[Any, ...], layout: str, w: Any
) -> str:
    """The source of the kernel that a call on arrays in the layout takes; `of` is what else the plan depends on."""
    geometry = plan.in_fastest_layout(replace(geometry, channels_last=layout == "nhwc"))
    return make(geometry, *of, _target(w), plan.forced_variant()).source


def _random(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    import cupy

    return measure.random_array(shape, dtype_of(dtype), seed, cupy)


def _buffers(
    input_shapes: tuple[tuple[int, ...], ...],
    output_shapes: tuple[tuple[int, ...], ...],
    dtype: str,
    layout: str,
    timer: measure.Timer,
) -> tuple[list[Arrays], list[Arrays]]:
    """As many inputs and outputs as the timer asks for."""
    import cupy

    order, dtype = LAYOUTS[layout], dtype_of(dtype)
    numpy_dtype = measure.numpy_dtype(dtype)

    def in_layout(make: Callable[[list[int]], Any], shape: tuple[int, ...]) -> Any:
        return make([shape[axis] for axis in order]).transpose(*np.argsort(order).tolist())

    turns = range(timer.buffers(sum(map(math.prod, (*input_shapes, *output_shapes))) * numpy_dtype.itemsize))
    inputs = [
        tuple(
            in_layout(lambda shape, seed=seed: measure.random_array(shape, dtype, seed, cupy), shape)
            for seed, shape in zip((0, 3), input_shapes, strict=False)
        )
        for _ in turns
    ]
    outputs = [
        tuple(in_layout(lambda shape: cupy.empty(shape, numpy_dtype), shape) for shape in output_shapes) for _ in turns
    ]
    return inputs, outputs


# (operator, pass): the function.
PASSES: dict[tuple[str, str], Callable[[Case, str, str, measure.Timer], Work]] = {
    ("depthwise", "forward"): depthwise_forward,
    ("depthwise", "dgrad"): depthwise_dgrad,
    ("depthwise", "wgrad"): depthwise_wgrad,
    ("pointwise", "forward"): pointwise_forward,
    ("pointwise", "dgrad"): pointwise_dgrad,
    ("pointwise", "wgrad"): pointwise_wgrad,
    ("separable", "forward"): separable_forward,
    ("separable", "training"): separable_training,
}


def has_pass(case: Case, name: str) -> bool:
    """Whether the case has a result of its own in the pass: a bias has no part in the gradient of x."""
    return name != "dgrad" or not case.bias
