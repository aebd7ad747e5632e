"""From cuda/*.cu to a loaded kernel, by cupy.RawModule: the only reader of cuda/.

A source is flattened, each header once, with a plan's compile-time values as #define lines at its head, so that the
text alone is the key of CuPy's disk cache: CuPy does not look into headers, and takes long over new compiler options.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .plan import Plan, Target

_INCLUDE = re.compile(r'#include "([a-z_0-9]+\.cuh)"\n')
# As CuPy spells it for its own kernels, whose check of the compiler then serves these too: 12 ms a process.
_OPTIONS = ("--std=c++17",)
# Sources that take what an architecture alone has, and no newer one.
_OF_ONE_ARCHITECTURE = {"pointwise_groups": "sm_90a", "pointwise_wgrad_groups": "sm_90a"}
# What a block may hold without asking for more.
_DEFAULT_SHARED_BYTES = 48 * 1024
# A kernel's arrays, at most.
_MAX_ARRAYS = 8

# A launch: it takes the addresses of a kernel's arrays.
Kernel = Callable[..., None]


@lru_cache(maxsize=64)
def target(device_id: int) -> Target:
    """What planning needs to know of a device. RuntimeError where no kernel can run on it."""
    import cupy

    device = cupy.cuda.Device(device_id)
    architecture = int(device.compute_capability)
    if architecture < 75:
        raise RuntimeError(
            f"cuconv needs a GPU of compute capability 7.5 or newer; device {device_id} has {architecture / 10}"
        )
    runtime = cupy.cuda.runtime
    # One by one: device.attributes asks for all of them, which takes more than a millisecond.
    return Target(
        architecture=architecture,
        multiprocessors=runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device_id),
        shared_per_block=runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device_id),
        shared_per_multiprocessor=runtime.deviceGetAttribute(
            runtime.cudaDevAttrMaxSharedMemoryPerMultiprocessor, device_id
        ),
    )


@lru_cache(maxsize=4096)
def load(plan: Plan, device_id: int) -> Kernel:
    """The plan's kernel on the current device: call it with the addresses of its arrays, in the kernel's order.

    It is launched on the current stream, without synchronisation.
    """
    import cupy

    kernel = _kernel(plan.source, plan.defines, device_id)
    if plan.shared_bytes > _DEFAULT_SHARED_BYTES:
        kernel.max_dynamic_shared_size_bytes = max(kernel.max_dynamic_shared_size_bytes, plan.shared_bytes)
    # By the driver, since CuPy's own launch looks at every argument anew and takes half as long again.
    driver, current_stream = cupy.cuda.driver, cupy.cuda.get_current_stream
    function, (grid_x, grid_y, grid_z), block, shared_bytes = kernel.kernel, plan.grid, plan.block, plan.shared_bytes
    words, pointers = _arguments(plan.parameter_struct())
    lock = threading.Lock()

    def launch(*addresses: int) -> None:
        first = _MAX_ARRAYS - len(addresses)
        stream, arguments = current_stream(device_id).ptr, pointers + 8 * first
        try:
            # The driver copies the arguments while other threads may run, and want to launch the same kernel.
            with lock:
                words[first:] = addresses
                driver.launchKernel(
                    function.ptr, grid_x, grid_y, grid_z, block, 1, 1, shared_bytes, stream, arguments, 0
                )
        except driver.CUDADriverError:
            if driver.ctxGetCurrent():
                raise
            # A thread that has not used the device yet: not asked before every launch, since that takes time.
            cupy.cuda.runtime.setDevice(device_id)
            launch(*addresses)

    return launch


def _arguments(parameters: np.void) -> tuple[Any, int]:
    """A kernel's arguments as the driver takes them: where to write the addresses of its arrays, the last one last, and
    the address of the pointers to each of these and, behind them, to the parameters."""
    count = _MAX_ARRAYS + 1
    block: Any = np.zeros(2 * count - 1 + -(-parameters.nbytes // 8), np.uint64)
    block[:count] = block.ctypes.data + 8 * np.arange(count, 2 * count)
    block[2 * count - 1 :].view(np.uint8)[: parameters.nbytes] = np.frombuffer(parameters.tobytes(), np.uint8)
    # These words keep the whole block alive.
    return (ctypes.c_uint64 * _MAX_ARRAYS).from_buffer(block, 8 * count), block.ctypes.data


@lru_cache(maxsize=1024)
def _kernel(source: str, defines: tuple[tuple[str, int | str], ...], device_id: int) -> Any:
    import cupy

    options: tuple[str, ...] = _OPTIONS
    if source in _OF_ONE_ARCHITECTURE:
        options = (*_OPTIONS, f"-arch={_OF_ONE_ARCHITECTURE[source]}")
    module = cupy.RawModule(code=flatten(source, defines), options=options)
    return module.get_function(source)


@dataclass(frozen=True)
class Resources:
    """What one compiled variant takes: registers a thread, bytes spilled a thread, static shared bytes a block."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_only(plan: Plan, architecture: str) -> Resources:
    """Compile a plan's kernel for an architecture such as "sm_90a", or for its own, by NVRTC; no GPU is needed.

    Raises RuntimeError with variant, architecture, NVRTC version and log.
    """
    from cupy.cuda import nvrtc

    architecture = _OF_ONE_ARCHITECTURE.get(plan.source, architecture)
    program = nvrtc.createProgram(flatten(plan.source, plan.defines), f"{plan.source}.cu", (), ())
    try:
        nvrtc.compileProgram(
            program, (f"-arch={architecture}", "--ptxas-options=-v", "--no-cache", "-ftz=true", *_OPTIONS)
        )
    except nvrtc.NVRTCError as error:
        version = ".".join(map(str, nvrtc.getVersion()))
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(
            f"{plan} does not compile for {architecture} with NVRTC {version}: {error}\n{log}"
        ) from error
    log = nvrtc.getProgramLog(program)
    nvrtc.destroyProgram(program)
    return Resources(
        registers=_from_log(r"Used (\d+) registers", log),
        spill_bytes=_from_log(r"(\d+) bytes spill stores", log) + _from_log(r"(\d+) bytes spill loads", log),
        shared_bytes=_from_log(r"(\d+) bytes smem", log, default=0),
    )


def _from_log(pattern: str, log: str, default: int | None = None) -> int:
    match = re.search(pattern, log)
    if match is None:
        if default is None:
            raise RuntimeError(f"no {pattern!r} in the compiler's log:\n{log}")
        return default
    return int(match.group(1))


def flatten(source: str, defines: tuple[tuple[str, int | str], ...]) -> str:
    """The text that is compiled for cuda/<source>.cu: its defines, then every header once, in order of use."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        text = _read(name)

        def include(match: re.Match[str]) -> str:
            header = match.group(1)
            if header in seen:
                return "\n"
            seen.add(header)
            line = text.count("\n", 0, match.end()) + 1
            return f'#line 1 "{header}"\n{expand(header)}#line {line} "{name}"\n'

        return _INCLUDE.sub(include, text).replace("#pragma once\n", "\n")

    head = "".join(f"#define CUCONV_{name} {value}\n" for name, value in defines)
    return f'{head}#line 1 "{source}.cu"\n{expand(source + ".cu")}'


@lru_cache(maxsize=64)
def _read(name: str) -> str:
    return (sources_folder() / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def sources_folder() -> Path:
    """cuda/: inside the package where a wheel was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "cuda", package.parent / "cuda"):
        if folder.is_dir():
            return folder
    raise RuntimeError(f"cuda/, the kernel sources, is neither in {package} nor beside it")
