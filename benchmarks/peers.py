"""The frameworks that are timed beside the project, on the same numbers in the same memory.

PyTorch launches on the timer's stream and is captured and timed as the project is. JAX keeps to streams of its own and
cannot be captured: one jitted function computes every buffer, up to a limit, is called without waiting, and the clock
on the host is read when all is done.

Both have their defaults: PyTorch's cuDNN may use TF32 for float32 and does not search by trial, JAX may use TF32.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cuconv.cases import Case
from cuconv.measure import Timer

# Milliseconds of one launch.
Peer = Callable[[Timer], float]

# XLA compiles a copy of the convolution for each buffer; where the limit is met, JAX may find a part in the cache.
_JAX_BUFFERS = 128


def forward(case: Case, xs: list[Any], w: Any, bias: Any) -> dict[str, Peer]:
    """Forward convolutions of the CuPy arrays by every framework that is installed."""
    found: dict[str, Peer] = {}
    if importlib.util.find_spec("torch"):
        found["torch"] = partial(_torch_forward, case, xs, w, bias)
        found["torch_channels_last"] = partial(_torch_forward, case, xs, w, bias, channels_last=True)
        found["torch_compile"] = partial(_torch_forward, case, xs, w, bias, compiled=True)
    if importlib.util.find_spec("jax"):
        found["jax"] = partial(_jax_forward, case, xs, w, bias)
    return found


NAMES = ("torch", "torch_channels_last", "torch_compile", "jax")


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
    case: Case, xs: list[Any], w: Any, bias: Any, timer: Timer, *, channels_last: bool = False, compiled: bool = False
) -> float:
    import torch

    def tensor(array: Any) -> torch.Tensor:
        """The same memory; bfloat16 passes as integers."""
        if array.dtype.name == "bfloat16":
            return torch.utils.dlpack.from_dlpack(array.view("int16")).view(torch.bfloat16)
        return torch.utils.dlpack.from_dlpack(array)

    with torch.cuda.stream(torch.cuda.ExternalStream(timer.stream.ptr)), torch.no_grad():
        inputs, weight = [tensor(x) for x in xs], tensor(w)
        offsets = None if bias is None else tensor(bias)
        if channels_last:
            inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
            weight = weight.contiguous(memory_format=torch.channels_last)

        def convolve(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, weight, offsets, **case.options, groups=case.C)

        if compiled:
            torch.compiler.reset()
            convolve = torch.compile(convolve, dynamic=False)
        # Results are kept until their buffer's next turn, so that they too lie in memory that is not in the cache.
        results: list[Any] = [None] * len(xs)

        def launch(i: int) -> None:
            results[i] = convolve(inputs[i])

        def capture(record: Callable[[], None]) -> Callable[[], Any]:
            # Its own capture, since CuPy's knows nothing of the memory that PyTorch allocates under way.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                record()
            return graph.replay

        launch(0)
        _check_shape(results[0].shape, case)
        return timer.ms(launch, len(xs), capture)


def _jax_forward(case: Case, xs: list[Any], w: Any, bias: Any, timer: Timer) -> float:
    # Read when JAX first meets the GPU, of which it would take three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    jax.config.update("jax_enable_x64", True)
    timer.stream.synchronize()

    def tensor(array: Any) -> Any:
        if array.dtype.name == "bfloat16":
            return jax.lax.bitcast_convert_type(jax.numpy.from_dlpack(array.view("int16")), jax.numpy.bfloat16)
        return jax.numpy.from_dlpack(array)

    geometry = case.geometry

    @jax.jit
    def convolve(xs: list[Any], w: Any, bias: Any) -> list[Any]:
        results = [
            jax.lax.conv_general_dilated(
                x,
                w,
                geometry.stride,
                geometry.padding,
                rhs_dilation=geometry.dilation,
                feature_group_count=geometry.C,
            )
            for x in xs
        ]
        return results if bias is None else [y + bias[:, None, None] for y in results]

    inputs = [tensor(x) for x in xs[:_JAX_BUFFERS]], tensor(w), None if bias is None else tensor(bias)

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            results = convolve(*inputs)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / calls

    _check_shape(jax.block_until_ready(convolve(*inputs))[0].shape, case)
    calls = min(100, max(3, int(0.05 / seconds(2))))
    return 1000 * statistics.median(seconds(calls) for _ in range(5)) / len(inputs[0])


def _check_shape(shape: Any, case: Case) -> None:
    if tuple(shape) != case.geometry.y_shape:
        raise RuntimeError(f"the peer gives {tuple(shape)}, and the result has {case.geometry.y_shape}")
