"""From cuda/*.cu to a loaded kernel, by cupy.RawModule: the only reader of cuda/.

A source is flattened, each header once, with a plan's compile-time values as #define lines at its head, so that the
text alone is the key of CuPy's disk cache: CuPy does not look into headers, and takes long over new compiler options.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .plan import Plan, Target

_INCLUDE = re.compile(r'^#include "([a-z_0-9]+\.cuh)"\n', re.MULTILINE)
_OPTIONS = ("-std=c++17",)
# What a block may hold without asking for more.
_DEFAULT_SHARED_BYTES = 48 * 1024


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
    attributes = device.attributes
    return Target(
        architecture=architecture,
        multiprocessors=attributes["MultiProcessorCount"],
        shared_per_block=attributes["MaxSharedMemoryPerBlockOptin"],
        shared_per_multiprocessor=attributes["MaxSharedMemoryPerMultiprocessor"],
    )


@lru_cache(maxsize=4096)
def load(plan: Plan, device_id: int) -> Callable[..., None]:
    """The plan's kernel on the current device: call it with the addresses of its arrays, in the kernel's order.

    It is launched on the current stream, without synchronisation.
    """
    kernel = _kernel(plan.source, plan.defines, device_id)
    if plan.shared_bytes > _DEFAULT_SHARED_BYTES:
        kernel.max_dynamic_shared_size_bytes = max(kernel.max_dynamic_shared_size_bytes, plan.shared_bytes)
    grid, block, shared_bytes = plan.grid, (plan.block,), plan.shared_bytes
    # Bytes without fields: CuPy takes a microsecond longer over a structure.
    struct = plan.parameter_struct()
    parameters = np.frombuffer(struct.tobytes(), np.dtype((np.void, struct.nbytes)))[0]

    def launch(*addresses: int) -> None:
        kernel(grid, block, (*addresses, parameters), shared_mem=shared_bytes)

    return launch


@lru_cache(maxsize=1024)
def _kernel(source: str, defines: tuple[tuple[str, int | str], ...], device_id: int) -> Any:
    import cupy

    module = cupy.RawModule(code=flatten(source, defines), options=_OPTIONS)
    return module.get_function(source)


@dataclass(frozen=True)
class Resources:
    """What one compiled variant takes: registers a thread, bytes spilled a thread, static shared bytes a block."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_only(plan: Plan, architecture: str) -> Resources:
    """Compile a plan's kernel for an architecture such as "sm_90a" by NVRTC; no GPU is needed.

    Raises RuntimeError with variant, architecture, NVRTC version and log.
    """
    from cupy.cuda import nvrtc

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
