"""What is timed of an operator: one function a pass, which makes the data and says how to launch, check and compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cuconv import depthwise_conv2d, depthwise_conv2d_dgrad, kernels, measure, plan
from cuconv.cases import Case
from cuconv.geometry import Conv2dGeometry

from . import peers
from .cases import LAYOUTS
from .peers import Peer


@dataclass(frozen=True)
class Work:
    """One case in one dtype and layout, ready to run: run and error take an input and an output."""

    inputs: list[Any]
    outputs: list[Any]
    weights: list[Any]
    run: Callable[[Any, Any], Any]
    error: Callable[[Any, Any], float]
    kernel: str
    peers: dict[str, Peer]

    def launch(self, i: int) -> None:
        self.run(self.inputs[i], self.outputs[i])

    def check(self) -> float:
        measure.poison(self.outputs[0])
        self.launch(0)
        return self.error(self.inputs[0], self.outputs[0])

    @property
    def bytes(self) -> int:
        """What one launch reads and writes, each once."""
        return sum(array.nbytes for array in (self.inputs[0], self.outputs[0], *self.weights))


def depthwise_forward(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    geometry = case.geometry
    w = _random(geometry.w_shape, dtype, 1)
    bias = _random((geometry.K,), dtype, 2) if case.bias else None
    xs, ys = _buffers(geometry.x_shape, geometry.y_shape, dtype, layout, timer)
    return Work(
        inputs=xs,
        outputs=ys,
        weights=[w] if bias is None else [w, bias],
        run=lambda x, y: depthwise_conv2d(x, w, bias, out=y, **case.options),
        error=lambda x, y: measure.slice_error(y, x, w, bias, geometry),
        kernel=_kernel(plan.depthwise_forward, geometry, dtype, layout, w),
        peers=peers.forward(case, xs, w, bias),
    )


def depthwise_dgrad(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    geometry = case.geometry
    w = _random(geometry.w_shape, dtype, 1)
    dys, dxs = _buffers(geometry.y_shape, geometry.x_shape, dtype, layout, timer)
    return Work(
        inputs=dys,
        outputs=dxs,
        weights=[w],
        run=lambda dy, dx: depthwise_conv2d_dgrad(dy, w, geometry.x_shape, out=dx, **case.options),
        error=lambda dy, dx: measure.dgrad_slice_error(dx, dy, w, geometry),
        kernel=_kernel(plan.depthwise_dgrad, geometry, dtype, layout, w),
        peers=peers.dgrad(case, dys, w),
    )


def _kernel(make: Callable[..., plan.Plan], geometry: Conv2dGeometry, dtype: str, layout: str, w: Any) -> str:
    """The source of the kernel that a call on arrays in the layout takes."""
    geometry = replace(geometry, channels_last=layout == "nhwc")
    return make(geometry, dtype, kernels.target(w.device.id), plan.forced_variant()).source


def _random(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    import cupy

    return measure.random_array(shape, dtype, seed, cupy)


def _buffers(
    input_shape: tuple[int, ...], output_shape: tuple[int, ...], dtype: str, layout: str, timer: measure.Timer
) -> tuple[list[Any], list[Any]]:
    """As many inputs and outputs as the timer asks for."""
    import cupy

    order = LAYOUTS[layout]
    numpy_dtype = measure.numpy_dtype(dtype)

    def in_layout(make: Callable[[list[int]], Any], shape: tuple[int, ...]) -> Any:
        return make([shape[axis] for axis in order]).transpose(*np.argsort(order).tolist())

    turns = range(timer.buffers((math.prod(input_shape) + math.prod(output_shape)) * numpy_dtype.itemsize))
    inputs = [in_layout(lambda shape: measure.random_array(shape, dtype, 0, cupy), input_shape) for _ in turns]
    outputs = [in_layout(lambda shape: cupy.empty(shape, numpy_dtype), output_shape) for _ in turns]
    return inputs, outputs


# (operator, pass): the function.
PASSES: dict[tuple[str, str], Callable[[Case, str, str, measure.Timer], Work]] = {
    ("depthwise", "forward"): depthwise_forward,
    ("depthwise", "dgrad"): depthwise_dgrad,
}


def has_pass(case: Case, name: str) -> bool:
    """Whether the case has a result of its own in the pass: a bias has no part in the gradient of x."""
    return name != "dgrad" or not case.bias
