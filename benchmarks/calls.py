"""What a call costs beside its kernel: the first one of a shape, compiling or from CuPy's disk cache, and the host's
part of every later one.

Each first call is a process's own: `python -m benchmarks.calls CASE PASS DTYPE` prints one measurement as JSON.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from cuconv.cases import Case

from .cases import CASES

# (case, pass, dtype): kernels of different families, and of long and short compile times.
FIRST_CALLS = (
    ("kb82", "forward", "float32"),
    ("convnext7", "forward", "float32"),
    ("convnext7", "forward", "float16"),
    ("replk31", "forward", "float32"),
    ("mbv1_s2", "dgrad", "float32"),
    ("eff5", "wgrad", "bfloat16"),
)
_ROUNDS, _ROUND_CALLS = 60, 200


def first_calls() -> list[dict[str, Any]]:
    """Milliseconds of every first call, in a new process with an empty cache and then in another with what it left."""
    rows = []
    for case, name, dtype in FIRST_CALLS:
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"CUPY_CACHE_DIR": cache}
            command = [sys.executable, "-m", "benchmarks.calls", case, name, dtype]
            cold, cached = (
                json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
                for _ in range(2)
            )
        rows.append({"case": case, "pass": name, "dtype": dtype, "cold_ms": cold, "cached_ms": cached})
    return rows


def host_us() -> dict[str, float]:
    """Microseconds of the host for one call on a small array once planned, and of PyTorch's where it is installed.

    Of each the best of many rounds, taken in turn: others may have had the processor, and its clock goes up and down by
    half, so that only figures that met the same states compare.
    """
    import cupy

    from cuconv import measure

    x, w = (measure.random_array(shape, "float32", 0, cupy) for shape in ((1, 16, 14, 14), (16, 1, 3, 3)))
    calls = _calls(x, w, x, {"padding": 1})
    if measure.installed("torch"):
        import torch

        tensor, weight = (torch.from_dlpack(array) for array in (x, w))
        calls["torch conv2d"] = lambda: torch.nn.functional.conv2d(tensor, weight, padding=1, groups=16)
    found = dict.fromkeys(calls, math.inf)
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            for _ in range(_ROUND_CALLS):
                call()
            found[name] = min(found[name], (time.perf_counter() - start) * 1e6 / _ROUND_CALLS)
    return found


def _calls(x: Any, w: Any, dy: Any, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Of every pass."""
    import cuconv

    return {
        "forward": lambda: cuconv.depthwise_conv2d(x, w, **options),
        "dgrad": lambda: cuconv.depthwise_conv2d_dgrad(dy, w, x.shape, **options),
        "wgrad": lambda: cuconv.depthwise_conv2d_wgrad(dy, x, w.shape, **options),
    }


def _first_call(case: Case, name: str, dtype: str) -> float:
    """Milliseconds to the end of the first call, in a process that has used the GPU but not cuconv."""
    import cupy

    from cuconv import measure

    g = case.geometry
    x, w, dy = (measure.random_array(shape, dtype, 0, cupy) for shape in (g.x_shape, g.w_shape, g.y_shape))
    run = _calls(x, w, dy, case.options)[name]
    # The compiler's library is loaded by whatever is compiled first, and that is not this call's cost alone.
    cupy.RawModule(code='extern "C" __global__ void nothing() {}').get_function("nothing")
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    run()
    cupy.cuda.Device().synchronize()
    return (time.perf_counter() - start) * 1000


if __name__ == "__main__":
    chosen = next(case for case in CASES if case.name == sys.argv[1])
    print(json.dumps(_first_call(chosen, *sys.argv[2:])))
