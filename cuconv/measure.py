"""How fast a launch is: data and one clock for tests, self-check and benchmarks."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Data.

# A prime, so that neighbouring planes do not hold the same numbers.
_RANDOM_PERIOD = 1_000_003


def random_array(shape: Sequence[int], dtype: str, seed: int, module: ModuleType = np) -> Any:
    """Standard normal numbers that repeat after a million, the same on every machine: a NumPy or a CuPy array.

    On a GPU they are copied, not computed, which takes no library of random numbers and no arithmetic in dtype.
    """
    size = int(np.prod(shape, dtype=np.int64))
    period = _random_numbers(dtype, seed)
    bits = module.asarray(period[: max(1, size)].view(f"u{period.dtype.itemsize}"))
    repeated = module.empty((-(-size // bits.size), bits.size), bits.dtype)
    repeated[...] = bits
    return repeated.reshape(-1)[:size].view(period.dtype).reshape(shape)


@lru_cache(maxsize=16)
def _random_numbers(dtype: str, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(_RANDOM_PERIOD).astype(numpy_dtype(dtype))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name; bfloat16 is NumPy's once ml_dtypes is imported."""
    if name == "bfloat16":
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(name)


# Time.

# Of a graph that is timed: launches that take so long together, but not more of them than this.
_GRAPH_MS, _MOST_LAUNCHES = 5.0, 100
_MOST_REPEATS, _FEWEST_REPEATS, _TOTAL_MS = 50, 7, 100.0

Capture = Callable[[Callable[[], None]], Callable[[], Any]]


def cupy_graph(record: Callable[[], None]) -> Callable[[], Any]:
    """What `record` launches on CuPy's current stream, as one CUDA graph: call the result to launch it."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    stream.begin_capture()
    try:
        record()
    finally:
        graph = stream.end_capture()
    launch: Callable[[], Any] = graph.launch
    return launch


class Timer:
    """Times launches on a stream of its own: many in turn in one CUDA graph, the L2 cache cold, medians.

    Use it as a context, within which its stream is CuPy's current one. What is timed must be launched on that stream,
    be it by CuPy or by another framework, and launch(i) must work on the i-th of `buffers` sets of inputs and outputs.
    """

    def __init__(self) -> None:
        import cupy

        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._l2_bytes: int = cupy.cuda.Device().attributes["L2CacheSize"]

    def __enter__(self) -> Timer:
        self.stream.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stream.__exit__(*exception)

    def buffers(self, bytes_of_launch: int) -> int:
        """How many sets of buffers exceed the L2 cache four times."""
        return -(-4 * self._l2_bytes // bytes_of_launch)

    def ms(self, launch: Callable[[int], Any], buffers: int, capture: Capture = cupy_graph) -> float:
        """The time of one launch, of many over all buffers in turn, in one CUDA graph of whose time each has its part.

        The cache is cold, since the sets of buffers exceed it; and what a launch leaves there to be written to memory,
        the next one waits for, so that every launch pays for as much as it writes. Events around every single launch,
        after the cache was filled with other data, would charge it for writing these back, 8 us on an H200, and for
        starting alone.
        """
        launch(0)
        launch(buffers - 1)
        rough = self._median(launch, buffers, 3)
        launches = buffers * -(-min(_MOST_LAUNCHES, max(2, round(_GRAPH_MS / rough))) // buffers)

        def record() -> None:
            for i in range(launches):
                launch(i % buffers)

        replay = capture(record)
        replay()
        return self._median(lambda _: replay(), 1, self._repeats(rough * launches)) / launches

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a device-to-device copy of 1.5 GiB; measured once.

        By events: captured in a graph, the same copy takes a third longer.
        """
        import cupy

        source = random_array((3 * 2**27,), "float32", 0, cupy)
        target = cupy.empty_like(source)

        def copy(_: int) -> None:
            target.data.copy_from_device_async(source.data, source.nbytes, self.stream)

        return 2.0 * int(source.nbytes) / (self._median(copy, 1, _MOST_REPEATS) / 1000)

    @staticmethod
    def _repeats(milliseconds: float) -> int:
        return min(_MOST_REPEATS, max(_FEWEST_REPEATS, int(_TOTAL_MS / milliseconds)))

    def _median(self, launch: Callable[[int], Any], buffers: int, repeats: int) -> float:
        """All launches are queued before the first is waited for, so that the GPU never waits for the host."""
        import cupy

        events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(repeats)]
        for i, (start, stop) in enumerate(events):
            start.record(self.stream)
            launch(i % buffers)
            stop.record(self.stream)
        self.stream.synchronize()
        times: list[float] = [cupy.cuda.get_elapsed_time(start, stop) for start, stop in events]
        return statistics.median(times)


def floor_ms(data_bytes: int, copy_bandwidth: float) -> float:
    """The time that no kernel can beat: every input read once, every output written once, as fast as a copy does."""
    return data_bytes / copy_bandwidth * 1000


# The machine, and tables about it.


def cupy_with_gpu() -> Any:
    """The module cupy, where it is installed and has a GPU to run on; None otherwise."""
    if importlib.util.find_spec("cupy") is None:
        return None
    import cupy

    return cupy if cupy.cuda.is_available() else None


def device_name() -> str:
    """The current GPU in words."""
    import cupy

    device = cupy.cuda.Device()
    name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
    driver = cupy.cuda.runtime.driverGetVersion()
    return (
        f"{name}, sm_{device.compute_capability}, {device.attributes['MultiProcessorCount']} multiprocessors, "
        f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
    )


def installed(package: str) -> str | None:
    """What pip calls the package, and its version: no framework is imported to learn it."""
    if importlib.util.find_spec(package) is None:
        return None
    # CuPy's distributions are named after the version of CUDA that they are for.
    distribution = next(iter(metadata.packages_distributions().get(package, ())), package)
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return package


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as well on a terminal."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
