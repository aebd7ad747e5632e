"""What is timed of an operator: one function a pass, which makes the data and says how to launch, check and compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuconv import depthwise_conv2d, kernels, measure, plan
from cuconv.cases import Case

from . import peers
from .cases import LAYOUTS
from .peers import Peer


@dataclass(frozen=True)
class Work:
    """One case in one dtype and layout, ready to run: launch(i) works on the i-th of `buffers` sets of arrays."""

    launch: Callable[[int], Any]
    check: Callable[[], float]
    buffers: int
    bytes: int
    kernel: str
    peers: dict[str, Peer]


def depthwise_forward(case: Case, dtype: str, layout: str, timer: measure.Timer) -> Work:
    import cupy

    geometry, order = case.geometry, LAYOUTS[layout]

    def in_layout(make: Callable[[list[int]], Any], shape: tuple[int, ...]) -> Any:
        return make([shape[axis] for axis in order]).transpose(*np.argsort(order).tolist())

    x_shape, w_shape = case.shapes
    w = measure.random_array(w_shape, dtype, 1, cupy)
    bias = measure.random_array((geometry.K,), dtype, 2, cupy) if case.bias else None
    data_bytes = (geometry.x_size + geometry.y_size) * w.itemsize + w.nbytes + (0 if bias is None else bias.nbytes)
    buffers = timer.buffers(data_bytes)
    xs = [in_layout(lambda shape: measure.random_array(shape, dtype, 0, cupy), x_shape) for _ in range(buffers)]
    ys = [in_layout(lambda shape: cupy.empty(shape, w.dtype), geometry.y_shape) for _ in range(buffers)]

    def launch(i: int) -> None:
        depthwise_conv2d(xs[i], w, bias, out=ys[i], **case.options)

    def check() -> float:
        measure.poison(ys[0])
        launch(0)
        return measure.slice_error(ys[0], xs[0], w, bias, geometry)

    chosen = plan.depthwise_forward(geometry, dtype, kernels.target(w.device.id), plan.forced_variant())
    return Work(launch, check, buffers, data_bytes, chosen.source, peers.forward(case, xs, w, bias))


# (operator, pass): the function.
PASSES: dict[tuple[str, str], Callable[[Case, str, str, measure.Timer], Work]] = {
    ("depthwise", "forward"): depthwise_forward,
}
