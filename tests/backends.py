"""Where a kernel test runs: on a GPU through CuPy, and on the host through the twin that compiles the same sources."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import hostcuda
import numpy as np
import pytest

from cuconv import depthwise, kernels, layouts, pointwise, separable, separable_backward

GUARD = 4096  # elements around an output, more than any tile is wide


def forget_kernels() -> None:
    """What is memoised for one kind of device must not serve another."""
    for memoised in (kernels.target, kernels.load, kernels._kernel):
        memoised.cache_clear()
    for memoised in (
        layouts._kernel,
        depthwise._forward_kernel,
        depthwise._dgrad_kernel,
        depthwise._wgrad_kernels,
        pointwise._kernel,
        pointwise._wgrad_kernels,
        separable._launch,
        separable_backward._launch,
        separable_backward._part_kernels,
        # What is remembered of a call has its kernels.
        depthwise._check_forward,
        depthwise._check_dgrad,
        depthwise._check_wgrad,
    ):
        memoised.cache_clear()


@dataclass
class Guards:
    before: Any
    after: Any
    device: Any

    def assert_untouched(self) -> None:
        for band in (self.before, self.after):
            assert (self.device.host(band).view(np.uint8) == 0xFF).all(), "written outside of the output"


class Backend:
    """Arrays of one kind of device, and the way back to the host."""

    module: Any
    repeats = 100

    @property
    def array_type(self) -> type:
        return self.module.ndarray

    @property
    def target(self) -> Any:
        return kernels.target(0)

    def array(self, host: np.ndarray | None, layout: str = "nchw") -> Any:
        """The same values on the device; of four axes, in memory as the layout says."""
        if host is None or layout == "nchw":
            return None if host is None else self.module.asarray(host)
        return self.module.asarray(np.ascontiguousarray(host.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)

    def guarded(self, shape: tuple[int, ...], dtype: np.dtype, layout: str = "nchw") -> tuple[Any, Guards]:
        """An output full of NaN between two bands that must stay as they are."""
        size = int(np.prod(shape))
        memory = self.module.empty(size + 2 * GUARD, dtype)
        memory.view(np.uint8).fill(0xFF)
        guards = Guards(memory[:GUARD], memory[GUARD + size :], self)
        if layout == "nchw":
            return memory[GUARD : GUARD + size].reshape(shape), guards
        N, C, H, W = shape
        return memory[GUARD : GUARD + size].reshape(N, H, W, C).transpose(0, 3, 1, 2), guards

    def launch(
        self, plan: Any, x: Any, w: Any, bias: Any, y_shape: tuple[int, ...], layout: str = "nchw"
    ) -> np.ndarray:
        """Run one plan on host arrays, into a poisoned result between guards."""
        arrays = [self.array(x, layout), self.array(w), self.array(bias)]
        y, guards = self.guarded(y_shape, x.dtype, layout)
        kernels.load(plan, 0)(*(0 if a is None else a.data.ptr for a in arrays), y.data.ptr)
        guards.assert_untouched()
        return self.host(y)


class HostCuda(Backend):
    module = hostcuda.cupy_twin
    repeats = 3

    def host(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def broadcast(self, array: Any) -> Any:
        return np.broadcast_to(array[:, :1], array.shape, subok=True)


class Gpu(Backend):
    def __init__(self) -> None:
        import cupy

        self.module = cupy

    def host(self, array: Any) -> np.ndarray:
        return self.module.asnumpy(array)

    def broadcast(self, array: Any) -> Any:
        return self.module.broadcast_to(array[:, :1], array.shape)


def gpu_missing() -> str | None:
    """Why there is no GPU to test on, or None where there is one."""
    try:
        import cupy
    except ImportError:
        return "no cupy: kernels do not run on a GPU here"
    return None if cupy.cuda.is_available() else "no GPU: kernels run on the host only"


@pytest.fixture(params=["hostcuda", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Backend; each test body runs on the host-run sources and, where there is one, on a GPU."""
    forget_kernels()
    if request.param == "gpu":
        reason = gpu_missing()
        if reason:
            pytest.skip(reason)
        yield Gpu()
    else:
        if not hostcuda.available():
            pytest.skip("no g++: kernels do not run on the host")
        monkeypatch.setitem(sys.modules, "cupy", hostcuda.cupy_twin)
        # A warp and a block may run in any order: every test takes another, and the same one in every run.
        with hostcuda.simulate(order="random", seed=len(request.node.nodeid)):
            yield HostCuda()
    forget_kernels()


@pytest.fixture
def gpu() -> Any:
    """A GPU's Backend, for what only hardware shows."""
    reason = gpu_missing()
    if reason:
        pytest.skip(reason)
    forget_kernels()
    return Gpu()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers, of every test's own and the same in every run."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
