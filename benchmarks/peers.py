"""The frameworks that are timed beside the project, on the same numbers in the same memory.

PyTorch launches on the timer's stream and is captured and timed as the project is. JAX keeps to streams of its own and
cannot be captured: one jitted function computes every buffer, up to a limit, is called without waiting, and the clock
on the host is read when all is done.

Both have their defaults: PyTorch's cuDNN may use TF32 for float32 and does not search by trial, JAX may use TF32.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from cuconv.cases import Case
from cuconv.measure import Timer

# Milliseconds of one launch.
Peer = Callable[[Timer], float]

# XLA compiles a copy of the convolution for each buffer; where the limit is met, JAX may find a part in the cache.
_JAX_BUFFERS = 128


def forward(case: Case, xs: list[tuple[Any, ...]], w: Any, bias: Any) -> dict[str, Peer]:
    """Forward convolutions of the CuPy arrays by every framework that is installed."""
    found: dict[str, Peer] = {}
    if importlib.util.find_spec("torch"):
        found["torch"] = partial(_torch_forward, case, xs, w, bias)
        found["torch_channels_last"] = partial(_torch_forward, case, xs, w, bias, channels_last=True)
        found["torch_compile"] = partial(_torch_forward, case, xs, w, bias, compiled=True)
    if importlib.util.find_spec("jax"):
        found["jax"] = partial(_jax_forward, case, xs, w, bias)
    return found


def dgrad(case: Case, dys: list[tuple[Any, ...]], w: Any) -> dict[str, Peer]:
    """Gradients with respect to x likewise, but not by torch.compile, which makes the same call of ATen as PyTorch."""
    found: dict[str, Peer] = {}
    if importlib.util.find_spec("torch"):
        found["torch"] = partial(_torch_dgrad, case, dys, w)
        found["torch_channels_last"] = partial(_torch_dgrad, case, dys, w, channels_last=True)
    if importlib.util.find_spec("jax"):
        found["jax"] = partial(_jax_dgrad, case, dys, w)
    return found


def wgrad(case: Case, gradients: list[tuple[Any, ...]]) -> dict[str, Peer]:
    """Gradients with respect to w, and the bias where the case has one, likewise; of pairs of dy and x."""
    found: dict[str, Peer] = {}
    if importlib.util.find_spec("torch"):
        found["torch"] = partial(_torch_wgrad, case, gradients)
        found["torch_channels_last"] = partial(_torch_wgrad, case, gradients, channels_last=True)
    if importlib.util.find_spec("jax"):
        found["jax"] = partial(_jax_wgrad, case, gradients)
    return found


NAMES = ("torch", "torch_channels_last", "torch_compile", "jax")
# They compile for every case, for most of their time.
_COMPILING = ("torch_compile", "jax")


def budgets(names: Iterable[str], seconds: float) -> dict[str, float]:
    """The seconds that each of the peers may take in a pass: no limit for those that compile nothing."""
    return {name: seconds if name in _COMPILING else math.inf for name in names}


def settings() -> dict[str, str]:
    """How the installed frameworks are set, which is as they come."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    backend = torch.backends.cudnn
    return {"torch": f"cudnn {backend.version()}, benchmark={backend.benchmark}, allow_tf32={backend.allow_tf32}"}


def release() -> None:
    """Hand back the memory that PyTorch keeps for later."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.cuda.empty_cache()


def _torch_forward(
    case: Case,
    xs: list[tuple[Any, ...]],
    w: Any,
    bias: Any,
    timer: Timer,
    *,
    channels_last: bool = False,
    compiled: bool = False,
) -> float:
    import torch

    def convolve(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, w, bias, **case.options, groups=case.C)

    if compiled:
        torch.compiler.reset()
        convolve = torch.compile(convolve, dynamic=False)
    return _torch_ms(convolve, xs, (w, bias), case.geometry.y_shape, timer, channels_last)


def _torch_dgrad(case: Case, dys: list[tuple[Any, ...]], w: Any, timer: Timer, *, channels_last: bool = False) -> float:
    import cupy
    import torch

    g = case.geometry
    padding = [first for first, _ in g.padding]

    def gradient(dy: torch.Tensor, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        only_dx = [True, False, False]
        dx: torch.Tensor = torch.ops.aten.convolution_backward(
            dy, x, w, None, g.stride, padding, g.dilation, False, [0, 0], g.C, only_dx
        )[0]
        return dx

    # Of x only shape and layout are looked at.
    x = cupy.empty(g.x_shape, w.dtype)
    return _torch_ms(gradient, dys, (w, x), g.x_shape, timer, channels_last)


def _torch_wgrad(case: Case, gradients: list[tuple[Any, ...]], timer: Timer, *, channels_last: bool = False) -> float:
    import cupy
    import torch

    g = case.geometry
    padding = [first for first, _ in g.padding]
    wanted = [False, True, case.bias]

    def gradient(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        dw: torch.Tensor = torch.ops.aten.convolution_backward(
            dy, x, w, [g.K] if case.bias else None, g.stride, padding, g.dilation, False, [0, 0], g.C, wanted
        )[1]
        return dw

    # Of w only shape and layout are looked at.
    w = cupy.empty(g.w_shape, gradients[0][0].dtype)
    return _torch_ms(gradient, gradients, (w,), g.w_shape, timer, channels_last)


def _torch_ms(
    compute: Callable[..., Any],
    inputs: list[tuple[Any, ...]],
    others: tuple[Any, ...],
    shape: tuple[int, ...],
    timer: Timer,
    channels_last: bool,
) -> float:
    """The time of compute(*one of the inputs, *others), whose result has the shape."""
    import torch

    def tensor(array: Any) -> torch.Tensor | None:
        """The same memory, or for channels_last a copy; bfloat16 passes as integers."""
        if array is None:
            return None
        if array.dtype.name == "bfloat16":
            same = torch.utils.dlpack.from_dlpack(array.view("int16")).view(torch.bfloat16)
        else:
            same = torch.utils.dlpack.from_dlpack(array)
        return same.contiguous(memory_format=torch.channels_last) if channels_last and same.ndim == 4 else same

    with torch.cuda.stream(torch.cuda.ExternalStream(timer.stream.ptr)), torch.no_grad():
        tensors = [[tensor(array) for array in one] for one in inputs]
        rest = [tensor(array) for array in others]
        # Results are kept until their buffer's next turn, so that they too lie in memory that is not in the cache.
        results: list[Any] = [None] * len(inputs)

        def launch(i: int) -> None:
            results[i] = compute(*tensors[i], *rest)

        def capture(record: Callable[[], None]) -> Callable[[], Any]:
            # Its own capture, since CuPy's knows nothing of the memory that PyTorch allocates under way.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                record()
            return graph.replay

        launch(0)
        _check_shape(results[0].shape, shape)
        return timer.ms(launch, len(inputs), capture)


def _jax_forward(case: Case, xs: list[tuple[Any, ...]], w: Any, bias: Any, timer: Timer) -> float:
    def convolve(x: Any, w: Any, bias: Any) -> Any:
        y = _jax_convolution(case, x, w)
        return y if bias is None else y + bias[:, None, None]

    return _jax_ms(convolve, xs, (w, bias), case.geometry.y_shape, timer)


def _jax_dgrad(case: Case, dys: list[tuple[Any, ...]], w: Any, timer: Timer) -> float:
    def gradient(dy: Any, w: Any) -> Any:
        import jax

        # What jax.vjp gives, without an x: the convolution is linear in it.
        x = jax.ShapeDtypeStruct(case.geometry.x_shape, dy.dtype)
        (dx,) = jax.linear_transpose(lambda x: _jax_convolution(case, x, w), x)(dy)
        return dx

    return _jax_ms(gradient, dys, (w,), case.geometry.x_shape, timer)


def _jax_wgrad(case: Case, gradients: list[tuple[Any, ...]], timer: Timer) -> float:
    def gradient(dy: Any, x: Any) -> Any:
        import jax

        w = jax.ShapeDtypeStruct(case.geometry.w_shape, dy.dtype)
        # Of w alone: a bias's gradient would be one more launch.
        (dw,) = jax.linear_transpose(lambda w: _jax_convolution(case, x, w), w)(dy)
        return dw

    return _jax_ms(gradient, gradients, (), case.geometry.w_shape, timer)


def _jax_convolution(case: Case, x: Any, w: Any) -> Any:
    import jax

    g = case.geometry
    return jax.lax.conv_general_dilated(x, w, g.stride, g.padding, rhs_dilation=g.dilation, feature_group_count=g.C)


def _jax_ms(
    compute: Callable[..., Any],
    inputs: list[tuple[Any, ...]],
    others: tuple[Any, ...],
    shape: tuple[int, ...],
    timer: Timer,
) -> float:
    """As _torch_ms."""
    # Read when JAX first meets the GPU, of which it would take three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    jax.config.update("jax_enable_x64", True)
    timer.stream.synchronize()

    def tensor(array: Any) -> Any:
        if array is None:
            return None
        if array.dtype.name == "bfloat16":
            return jax.lax.bitcast_convert_type(jax.numpy.from_dlpack(array.view("int16")), jax.numpy.bfloat16)
        return jax.numpy.from_dlpack(array)

    @jax.jit
    def compute_all(tensors: list[list[Any]], rest: list[Any]) -> list[Any]:
        return [compute(*one, *rest) for one in tensors]

    arguments = (
        [[tensor(array) for array in one] for one in inputs[:_JAX_BUFFERS]],
        [tensor(array) for array in others],
    )

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            results = compute_all(*arguments)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / calls

    _check_shape(jax.block_until_ready(compute_all(*arguments))[0].shape, shape)
    calls = min(100, max(3, int(0.05 / seconds(2))))
    return 1000 * statistics.median(seconds(calls) for _ in range(5)) / len(arguments[0])


def _check_shape(shape: Any, wanted: tuple[int, ...]) -> None:
    if tuple(shape) != wanted:
        raise RuntimeError(f"the peer gives {tuple(shape)}, and the result has {wanted}")
