"""A twin of the part of CuPy that cuconv uses: arrays are NumPy's, and RawModule compiles with g++ (see hostcuda.h)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
import os
import shutil
import subprocess
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")
DEFAULT_SHARED = 48 * 1024
UNDEFINED = "alignment,null,bounds,signed-integer-overflow,integer-divide-by-zero,shift"


@dataclass(frozen=True)
class Settings:
    """The simulated device, an H200 unless told otherwise, and how a launch runs on it."""

    compute_capability: str = "90"
    multiprocessors: int = 132
    shared_per_block: int = 227 * 1024
    shared_per_multiprocessor: int = 228 * 1024
    order: str = "forward"
    seed: int = 0
    blocks: slice | None = None  # of the grid in linear order; slice(-1, None) runs the last block alone
    poison: bool = True  # whether empty() fills with 0xFF; not for arrays larger than the machine's memory
    sanitize: bool = os.environ.get("CUCONV_HOSTCUDA_SANITIZE") == "1"  # ASan must then be preloaded


settings = Settings()


@contextlib.contextmanager
def simulate(**changes: Any) -> Iterator[None]:
    """Change the settings for the length of a with block."""
    global settings
    before = settings
    settings = replace(settings, **changes)
    try:
        yield
    finally:
        settings = before


def available() -> bool:
    return shutil.which("g++") is not None


def sanitizer_environment() -> dict[str, str]:
    """The environment of a Python process whose kernels run under AddressSanitizer."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return os.environ | {
        "LD_PRELOAD": library.stdout.strip(),
        "ASAN_OPTIONS": options,
        "CUCONV_HOSTCUDA_SANITIZE": "1",
    }


class ndarray(np.ndarray):
    def __new__(cls, shape: Any, dtype: Any = float) -> ndarray:
        return empty(shape, dtype)

    @property
    def data(self) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data, device_id=0)

    @property
    def device(self) -> Device:  # type: ignore[override]
        return Device(0)


def empty(shape: Any, dtype: Any = float) -> ndarray:
    array = np.empty(shape, dtype)
    if settings.poison:
        array.reshape(-1).view(np.uint8).fill(0xFF)
    return array.view(ndarray)


def asarray(array: Any, dtype: Any = None) -> ndarray:
    """An array of the device is itself; anything else is copied to it."""
    return np.array(array, dtype, copy=None if isinstance(array, ndarray) else True).view(ndarray)


def ascontiguousarray(array: Any, dtype: Any = None) -> ndarray:
    return np.ascontiguousarray(asarray(array, dtype)).view(ndarray)


def _as_strided(array: ndarray, shape: Any, strides: Any) -> ndarray:
    return np.lib.stride_tricks.as_strided(array, shape, strides, subok=True)


lib = SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=_as_strided))


class Device:
    def __init__(self, device: int = 0) -> None:
        self.id = int(device)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    @property
    def compute_capability(self) -> str:
        return settings.compute_capability


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        self.code = code
        # NVRTC's other options (architecture, registers, denormals) mean nothing here.
        self.options = tuple(option for option in options if option.startswith(("-D", "--std=")))

    def get_function(self, name: str) -> _Kernel:
        architecture = f"-D__CUDA_ARCH__={settings.compute_capability}0"
        return _Kernel(_build(self.code, name, (*self.options, architecture), settings.sanitize))


# -Og, since optimising takes g++ longer than the small launches of tests gain by it.
_COMMAND = ("g++", "-Og", "-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")
_COMMAND += ("-fdata-sections", "-Werror=frame-larger-than=32768")
_COMMAND += (f"-fsanitize={UNDEFINED}", f"-fno-sanitize-recover={UNDEFINED}")


@functools.cache
def _build(code: str, name: str, options: tuple[str, ...], sanitize: bool) -> ctypes.PyDLL:
    # Debug information, a fifth of the time, is for ASan's report; the others name lines without it.
    command = (*_COMMAND, *options, *(("-fsanitize=address", "-g") if sanitize else ()))
    library = _folder() / f"{_key(*command, code, name)}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
            source, entry, built = (Path(scratch) / file for file in ("kernel.cu", "entry.cpp", "kernel.so"))
            source.write_text(code)
            # Within the unnamed namespace, since ASan skips the variables of templates that other files could share.
            entry.write_text(
                f'#include "host.h"\nnamespace {{\n#include "kernel.cu"\nconstexpr auto entry = &{name};\n}}\n'
                'extern "C" const int* parameter_sizes() { return hostcuda::parameter_sizes(entry); }\n'
                'extern "C" const char* launch(void** arguments, const hostcuda::Launch* how) {\n'
                "  return hostcuda::launch(entry, arguments, *how);\n}\n"
            )
            folders = f"-I{_precompiled(command)}", f"-I{HERE}"
            linked = "-shared", f"-Wl,-T,{HERE}/shared.ld", "-o", str(built)
            _compile([*command, "-Winvalid-pch", *folders, *linked, str(entry)], name)
            os.replace(built, library)
    return _load(str(library))


@functools.cache
def _precompiled(command: tuple[str, ...]) -> Path:
    """The folder of host.h, which includes hostcuda.h: compiled once for all kernels of the same options, since that is
    a third of the time that a kernel takes."""
    made = _folder() / f"{_key(*command)}.headers"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
            built = Path(scratch) / "headers"
            built.mkdir()
            (built / "host.h").write_text('#include "hostcuda.h"\n')
            _compile([*command, f"-I{HERE}", "-x", "c++-header", str(built / "host.h")], "hostcuda.h")
            with contextlib.suppress(OSError):  # another process was first
                built.rename(made)
    return made


def _folder() -> Path:
    """What is built stays there: each file is renamed into it as a whole, since several test processes may build the
    same one at once."""
    folder = Path(tempfile.gettempdir()) / f"cuconv-hostcuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _key(*parts: str) -> str:
    own = [(HERE / file).read_text() for file in ("hostcuda.h", "machine.h", "shared.ld", "cupy_twin.py")]
    return hashlib.sha256("\0".join([*own, *parts]).encode()).hexdigest()[:24]


def _compile(command: list[str], name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"g++ refuses {name}:\n{result.stderr}")
    if result.stderr:
        warnings.warn(f"g++ on {name}:\n{result.stderr}", stacklevel=5)


def _load(path: str) -> ctypes.PyDLL:
    # PyDLL keeps the GIL, as a library has room for one launch at a time.
    library = ctypes.PyDLL(path)
    library.launch.restype = ctypes.c_char_p
    library.parameter_sizes.restype = ctypes.POINTER(ctypes.c_int)
    return library


def _argument(value: Any) -> bytes:
    """CuPy's rule: a Python integer is 8 bytes, a NumPy scalar what it is."""
    if isinstance(value, np.generic):
        return value.tobytes()
    if type(value) is int:
        return value.to_bytes(8, "little", signed=True)
    raise TypeError(f"a kernel argument must be an int or a NumPy scalar, and is {value!r}")


class _Kernel:
    def __init__(self, library: ctypes.PyDLL) -> None:
        self._library = library
        self.max_dynamic_shared_size_bytes = DEFAULT_SHARED

        _loaded[self.ptr] = self

    @property
    def kernel(self) -> _Kernel:
        """What is launched on the current device: there is only one."""
        return self

    @property
    def ptr(self) -> int:
        return id(self)

    @property
    def parameter_sizes(self) -> list[int]:
        """Bytes of each of the kernel's parameters."""
        sizes = self._library.parameter_sizes()
        return list(itertools.takewhile(lambda size: size >= 0, (sizes[i] for i in itertools.count())))

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        grid, block = (tuple(map(int, extent)) + (1,) * (3 - len(extent)) for extent in (grid, block))
        if not all(0 < extent <= limit for extent, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=True)):
            raise ValueError(f"no device launches the grid {grid}")
        if min(block) < 1 or math.prod(block) > 1024 or block[2] > 64:
            raise ValueError(f"no device launches the block {block}")
        if not 0 <= shared_mem <= self.max_dynamic_shared_size_bytes <= settings.shared_per_block:
            raise ValueError(
                f"{shared_mem} bytes of dynamic shared memory, of {self.max_dynamic_shared_size_bytes} allowed by "
                f"max_dynamic_shared_size_bytes and {settings.shared_per_block} by the device"
            )
        values = [_argument(value) for value in args]
        wanted = self.parameter_sizes
        if [len(value) for value in values] != wanted:
            raise ValueError(f"the parameters have {wanted} bytes, the arguments {[len(value) for value in values]}")
        buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
        pointers = (ctypes.c_void_p * (len(buffers) + 1))(*map(ctypes.addressof, buffers))
        first, last, _ = (settings.blocks or slice(None)).indices(math.prod(grid))
        order = ORDERS.index(settings.order)
        how = (ctypes.c_longlong * 11)(*grid, *block, shared_mem, order, settings.seed, first, last)
        problem = self._library.launch(pointers, how)
        if problem:
            raise RuntimeError(problem.decode())


# By what stands for a CUfunction; gone with the kernel, as the code on a device is gone with its module.
_loaded: weakref.WeakValueDictionary[int, _Kernel] = weakref.WeakValueDictionary()


class CUDADriverError(RuntimeError):
    """What CuPy raises where the driver returns an error; the host's launches raise what went wrong."""


def _launch_kernel(function: int, *numbers: int) -> None:
    """cuLaunchKernel: grid, block, shared memory, stream, the address of as many pointers as there are parameters, and
    nothing extra."""
    *extents, shared_mem, _, pointers, _ = numbers
    kernel = _loaded[function]
    sizes = kernel.parameter_sizes
    values = [
        np.frombuffer(ctypes.string_at(pointer, size), f"V{size}")[0]
        for pointer, size in zip((ctypes.c_void_p * len(sizes)).from_address(pointers), sizes, strict=True)
    ]
    kernel(tuple(extents[:3]), tuple(extents[3:]), tuple(values), shared_mem=shared_mem)


cuda = SimpleNamespace(
    Device=Device,
    driver=SimpleNamespace(ctxGetCurrent=lambda: 1, launchKernel=_launch_kernel, CUDADriverError=CUDADriverError),
    get_current_stream=lambda device_id: SimpleNamespace(ptr=0),
    runtime=SimpleNamespace(
        getDevice=lambda: 0,
        # Attributes are the names of settings.
        deviceGetAttribute=lambda attribute, _: getattr(settings, attribute),
        cudaDevAttrMultiProcessorCount="multiprocessors",
        cudaDevAttrMaxSharedMemoryPerBlockOptin="shared_per_block",
        cudaDevAttrMaxSharedMemoryPerMultiprocessor="shared_per_multiprocessor",
    ),
)
