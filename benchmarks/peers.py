"""The frameworks that are timed beside the project, on the same numbers in the same memory.

PyTorch launches on the timer's stream and is captured and timed as the project is. JAX keeps to streams of its own and
cannot be captured: one jitted function computes every buffer, up to a limit, is called without waiting, and the clock
on the host is read when all is done.

Both have their defaults: PyTorch's cuDNN may use TF32 for float32 and does not search by trial, JAX may use TF32. But
where the project is told whether to use TF32, in pointwise and separable convolutions, they are told the same.
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
from cuconv.geometry import PointwiseGeometry
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


def pointwise_forward(xs: list[tuple[Any, ...]], w: Any, g: PointwiseGeometry, dtype: str) -> dict[str, Peer]:
    """Pointwise convolutions by a w (K, C) likewise."""
    found: dict[str, Peer] = {}
    weights = (w.reshape(g.K, g.C, 1, 1),)
    if importlib.util.find_spec("torch"):
        import torch

        found |= _torch_ways(torch.nn.functional.conv2d, xs, weights, g.y_shape, dtype)
    if importlib.util.find_spec("jax"):
        found["jax"] = partial(_jax_ms, partial(_jax_pointwise, dtype), xs, weights, g.y_shape)
    return found


def pointwise_dgrad(dys: list[tuple[Any, ...]], w: Any, g: PointwiseGeometry, dtype: str) -> dict[str, Peer]:
    """Their gradients with respect to x likewise."""
    import cupy

    found: dict[str, Peer] = {}
    if importlib.util.find_spec("torch"):

        def gradient(dy: Any, w: Any, x: Any) -> Any:
            return _pointwise_backward(dy, x, w, None, (True, False))[0]

        # Of x only shape and layout are looked at.
        others = (w.reshape(g.K, g.C, 1, 1), cupy.empty(g.x_shape, w.dtype))
        found |= _torch_ways(gradient, dys, others, g.x_shape, dtype, compiled=False)
    return found


def pointwise_wgrad(gradients: list[tuple[Any, ...]], g: PointwiseGeometry, dtype: str) -> dict[str, Peer]:
    """Their gradients with respect to w likewise; of pairs of dy and x."""
    import cupy

    found: dict[str, Peer] = {}
    if importlib.util.find_spec("torch"):

        def gradient(dy: Any, x: Any, w: Any) -> Any:
            return _pointwise_backward(dy, x, w, None, (False, True))[1]

        shape = (g.K, g.C, 1, 1)
        others = (cupy.empty(shape, gradients[0][0].dtype),)
        found |= _torch_ways(gradient, gradients, others, shape, dtype, compiled=False)
    return found


def separable_forward(case: Case, xs: list[tuple[Any, ...]], weights: tuple[Any, ...], dtype: str) -> dict[str, Peer]:
    """Depthwise, then pointwise convolutions likewise, by both weights and both biases."""
    found: dict[str, Peer] = {}
    w, pointwise, bias, pointwise_bias = weights
    others = w, pointwise[:, :, None, None], bias, pointwise_bias
    shape = case.separable.y_shape
    if importlib.util.find_spec("torch"):

        def convolve(x: Any, w: Any, pointwise: Any, bias: Any, pointwise_bias: Any) -> Any:
            return _torch_pair(case, x, w, pointwise, bias, pointwise_bias)[1]

        found |= _torch_ways(convolve, xs, others, shape, dtype)
    if importlib.util.find_spec("jax") and not case.bias:

        def jax_convolve(x: Any, w: Any, pointwise: Any, *_: None) -> Any:
            return _jax_pointwise(dtype, _jax_convolution(case, x, w), pointwise)

        found["jax"] = partial(_jax_ms, jax_convolve, xs, others, shape)
    return found


def separable_training(
    case: Case, read: list[tuple[Any, ...]], weights: tuple[Any, ...], dtype: str
) -> dict[str, Peer]:
    """Likewise, with the gradients of everything; of pairs of x and dy."""
    found: dict[str, Peer] = {}
    w, pointwise, bias, pointwise_bias = weights
    if importlib.util.find_spec("torch"):

        def step(x: Any, dy: Any, w: Any, pointwise: Any, bias: Any, pointwise_bias: Any) -> Any:
            middle, y = _torch_pair(case, x, w, pointwise, bias, pointwise_bias)
            dmiddle, *of_pointwise = _pointwise_backward(dy, middle, pointwise, pointwise_bias, (True, True))
            return y, of_pointwise, _depthwise_backward(case, dmiddle, x, w, bias, (True, True))

        others = w, pointwise[:, :, None, None], bias, pointwise_bias
        found |= _torch_ways(step, read, others, case.separable.y_shape, dtype)
    return found


NAMES = ("torch", "torch_channels_last", "torch_compile", "torch_compile_channels_last", "jax")
# They compile for every case, for most of their time.
_COMPILING = ("torch_compile", "torch_compile_channels_last", "jax")


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

    def gradient(dy: Any, w: Any, x: Any) -> Any:
        return _depthwise_backward(case, dy, x, w, None, (True, False))[0]

    # Of x only shape and layout are looked at.
    x = cupy.empty(case.geometry.x_shape, w.dtype)
    return _torch_ms(gradient, dys, (w, x), case.geometry.x_shape, timer, channels_last)


def _torch_wgrad(case: Case, gradients: list[tuple[Any, ...]], timer: Timer, *, channels_last: bool = False) -> float:
    import cupy

    bias = cupy.empty(case.geometry.K, gradients[0][0].dtype) if case.bias else None

    def gradient(dy: Any, x: Any, w: Any, bias: Any) -> Any:
        return _depthwise_backward(case, dy, x, w, bias, (False, True))[1]

    # Of w only shape and layout are looked at.
    w = cupy.empty(case.geometry.w_shape, gradients[0][0].dtype)
    return _torch_ms(gradient, gradients, (w, bias), case.geometry.w_shape, timer, channels_last)


def _depthwise_backward(case: Case, dy: Any, x: Any, w: Any, bias: Any, wanted: tuple[bool, bool]) -> Any:
    """The gradients of x, w and bias, as far as they are wanted and the bias exists."""
    import torch

    g = case.geometry
    padding = [first for first, _ in g.padding]
    sizes = None if bias is None else [g.K]
    mask = [*wanted, wanted[1] and bias is not None]
    return torch.ops.aten.convolution_backward(dy, x, w, sizes, g.stride, padding, g.dilation, False, [0, 0], g.C, mask)


def _pointwise_backward(dy: Any, x: Any, w: Any, bias: Any, wanted: tuple[bool, bool]) -> Any:
    """Likewise."""
    import torch

    sizes = None if bias is None else [w.shape[0]]
    mask = [*wanted, wanted[1] and bias is not None]
    return torch.ops.aten.convolution_backward(dy, x, w, sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)


def _torch_pair(case: Case, x: Any, w: Any, pointwise: Any, bias: Any, pointwise_bias: Any) -> tuple[Any, Any]:
    """What is in between, and the result."""
    import torch

    middle = torch.nn.functional.conv2d(x, w, bias, **case.options, groups=case.C)
    return middle, torch.nn.functional.conv2d(middle, pointwise, pointwise_bias)


def _torch_ways(
    compute: Callable[..., Any],
    inputs: list[tuple[Any, ...]],
    others: tuple[Any, ...],
    shape: tuple[int, ...],
    dtype: str,
    *,
    compiled: bool = True,
) -> dict[str, Peer]:
    """In both layouts and, where it may make a difference, compiled; TF32 only where dtype says so."""

    def ms(timer: Timer, *, channels_last: bool = False, compiled: bool = False) -> float:
        import torch

        of_convolutions, of_products = torch.backends.cudnn, torch.backends.cuda.matmul
        before = of_convolutions.allow_tf32, of_products.allow_tf32
        of_convolutions.allow_tf32 = of_products.allow_tf32 = dtype == "tf32"
        try:
            run = compute
            if compiled:
                torch.compiler.reset()
                run = torch.compile(compute, dynamic=False)
            return _torch_ms(run, inputs, others, shape, timer, channels_last)
        finally:
            of_convolutions.allow_tf32, of_products.allow_tf32 = before

    ways: dict[str, Peer] = {"torch": ms, "torch_channels_last": partial(ms, channels_last=True)}
    if compiled:
        ways["torch_compile"] = partial(ms, compiled=True)
        ways["torch_compile_channels_last"] = partial(ms, channels_last=True, compiled=True)
    return ways


def _torch_ms(
    compute: Callable[..., Any],
    inputs: list[tuple[Any, ...]],
    others: tuple[Any, ...],
    shape: tuple[int, ...],
    timer: Timer,
    channels_last: bool,
) -> float:
    """The time of compute(*one of the inputs, *others), whose (first) result has the shape."""
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
        result = results[0][0] if isinstance(results[0], tuple) else results[0]
        _check_shape(result.shape, shape)
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


def _jax_pointwise(dtype: str, x: Any, w: Any) -> Any:
    import jax

    # By itself JAX takes TF32 for float32.
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", precision=precision)


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
