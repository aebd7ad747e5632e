"""What is timed of an operator: one function a pass, which makes the data and says how to launch, check and compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cuconv import depthwise_conv2d, depthwise_conv2d_dgrad, depthwise_conv2d_wgrad, errors, kernels, measure, plan
from cuconv.cases import Case
from cuconv.geometry import Conv2dGeometry

from . import peers
from .cases import LAYOUTS
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
        return sum(array.nbytes for array in (*self.inputs[0], *self.outputs[0], *self.weights))


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


def _kernel(
    make: Callable[..., plan.Plan | plan.WgradPlan], geometry: Conv2dGeometry, of: tuple[Any, ...], layout: str, w: Any
) -> str:
    """The source of the kernel that a call on arrays in the layout takes; `of` is what else the plan depends on."""
    geometry = plan.in_fastest_layout(replace(geometry, channels_last=layout == "nhwc"))
    return make(geometry, *of, kernels.target(w.device.id), plan.forced_variant()).source


def _random(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    import cupy

    return measure.random_array(shape, dtype, seed, cupy)


def _buffers(
    input_shapes: tuple[tuple[int, ...], ...],
    output_shapes: tuple[tuple[int, ...], ...],
    dtype: str,
    layout: str,
    timer: measure.Timer,
) -> tuple[list[Arrays], list[Arrays]]:
    """As many inputs and outputs as the timer asks for."""
    import cupy

    order = LAYOUTS[layout]
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
}


def has_pass(case: Case, name: str) -> bool:
    """Whether the case has a result of its own in the pass: a bias has no part in the gradient of x."""
    return name != "dgrad" or not case.bias
