"""python -m cuconv: what is installed, which device, and the reference convolutions, checked and timed.

python -m cuconv compile: registers, spills and shared memory of every kernel variant, for an architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np

from . import __version__, depthwise_conv2d, errors, kernels, measure, plan, separable_conv2d
from .cases import REFERENCE_CASES, Case
from .geometry import Conv2dGeometry, SeparableGeometry
from .plan import TARGETS, Plan, Target, Unsuitable

_PACKAGES = ("numpy", "cupy", "ml_dtypes", "torch", "jax")

# Beside the reference cases: what else changes the kernel that is compiled.
_FURTHER_GEOMETRIES = (
    Case("stride", 128, 128, 112, 112, 3, 3, stride=2, padding=1, dilation=1),
    Case("small planes", 128, 512, 14, 14, 5, 5, stride=1, padding=2, dilation=1),
    Case("dilation", 8, 256, 65, 65, 3, 3, stride=1, padding=12, dilation=12),
    Case("7x7", 64, 192, 56, 56, 7, 7, stride=1, padding=3, dilation=1),
    Case("31x31", 16, 128, 56, 56, 31, 31, stride=1, padding=15, dilation=1),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is zero where everything was right."""
    parser = argparse.ArgumentParser(prog="python -m cuconv", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command")
    compiling = commands.add_parser("compile", help="compile every kernel variant; no GPU is needed")
    compiling.add_argument("--arch", help="an architecture such as sm_90; without it, that of the GPU, or sm_90")
    options = parser.parse_args(arguments)
    if options.command == "compile":
        return compile_variants(options.arch)
    return check(REFERENCE_CASES)


def check(cases: Sequence[Case]) -> int:
    """Compute the cases on the GPU, or without one on NumPy with one image each, and print what came of it."""
    cupy = measure.cupy_with_gpu()
    print(f"cuconv {__version__}, Python {sys.version.split()[0]}, {', '.join(map(_installed, _PACKAGES))}")
    if cupy is None:
        print("device: no GPU: NumPy reference on the CPU, batch cut to 1")
        rows = _rows_on_cpu(cases)
        header = ["operator", "case", "N,C,H,W kernel", "dtype", "by", "error / bound", "ms"]
    else:
        print(f"device: {measure.device_name()}")
        rows = _rows_on_gpu(cases, cupy)
        header = ["operator", "case", "N,C,H,W kernel", "dtype", "by", "error / bound", "ms", "% of floor"]
    print("error: the largest difference from float64, in the first and last image and four channels, over its bound\n")
    errors, cells = [], []
    for error, row in rows:
        errors.append(error)
        cells.append(row + [""] * (len(header) - len(row)))
    print(measure.table(header, cells))
    wrong = sum(not error <= 1 for error in errors)
    print(f"\n{wrong} of {len(errors)} wrong" if wrong else f"\nall {len(errors)} right")
    return 1 if wrong else 0


Row = tuple[float, list[str]]


def _rows_on_cpu(cases: Sequence[Case]) -> Iterator[Row]:
    for case in cases:
        yield _row(replace(case, N=1), "float32", np, None)


def _rows_on_gpu(cases: Sequence[Case], cupy: ModuleType) -> Iterator[Row]:
    dtypes = ["float32", "float16"] + ["bfloat16"] * (importlib.util.find_spec("ml_dtypes") is not None)
    with measure.Timer() as timer:
        for case, dtype in product(cases, dtypes):
            yield _row(_fitting(case, cupy), dtype, cupy, timer)
            cupy.get_default_memory_pool().free_all_blocks()


def _fitting(case: Case, cupy: ModuleType) -> Case:
    """The case with as many of its images as the GPU's free memory holds, thrice in float32."""
    free = cupy.cuda.runtime.memGetInfo()[0]
    g = case.geometry
    image = 4 * max(g.x_size, g.y_size, case.separable.pointwise.y_size if case.K else 0) // g.N
    return replace(case, N=max(1, min(case.N, free // (3 * image))))


def _row(case: Case, dtype: str, module: ModuleType, timer: measure.Timer | None) -> Row:
    """Compute, check and time one case, its output poisoned before."""
    x, w = (measure.random_array(shape, dtype, seed, module) for seed, shape in enumerate(case.shapes))
    bias = measure.random_array((case.C,), dtype, 2, module) if case.bias else None
    inputs: tuple[Any, ...] = (x, w, bias)
    geometry: Conv2dGeometry | SeparableGeometry = case.geometry
    convolve: Callable[..., Any] = depthwise_conv2d
    error_of: Callable[..., float] = errors.slice_error
    if case.K is not None:
        pointwise = measure.random_array((case.K, case.C), dtype, 3, module)
        pointwise_bias = measure.random_array((case.K,), dtype, 4, module) if case.bias else None
        inputs, geometry = (x, w, pointwise, bias, pointwise_bias), case.separable
        convolve, error_of = separable_conv2d, errors.separable_slice_error
    y = module.empty(geometry.y_shape, x.dtype)

    def launch(_: int = 0) -> None:
        convolve(*inputs, out=y, **case.options)

    errors.poison(y)
    start = time.perf_counter()
    launch()
    milliseconds = (time.perf_counter() - start) * 1000
    error = error_of(y, *inputs, geometry)
    cells = [case.operator, case.name, str(case), dtype, "reference", f"{error:.3f}", f"{milliseconds:.1f}"]
    if timer is not None:
        milliseconds = timer.ms(launch, 1)
        floor = measure.floor_ms(sum(a.nbytes for a in (*inputs, y) if a is not None), timer.copy_bandwidth)
        by = _kernels_of(case, dtype, kernels.target(module.cuda.Device().id))
        cells[4:] = [by, f"{error:.3f}", f"{milliseconds:.3f}", f"{100 * floor / milliseconds:.1f}"]
    return error, cells


def _kernels_of(case: Case, dtype: str, target: Target) -> str:
    """What a forward call of the case launches."""
    if case.K is None:
        return plan.depthwise_forward(case.geometry, dtype, target).source
    fused = plan.separable_conv(case.separable, dtype, plan.SeparableEpilogue(), target)
    if fused is not None:
        return fused.source
    depthwise = plan.depthwise_forward(case.geometry, dtype, target)
    pointwise = plan.pointwise_conv(case.separable.pointwise, dtype, False, plan.Epilogue(), target)
    return f"{depthwise.source}, {pointwise.source}"


def compile_variants(architecture: str | None) -> int:
    """Compile what the reference cases and some others take, in every dtype and variant, and print its resources."""
    if importlib.util.find_spec("cupy") is None:
        print(
            "python -m cuconv compile needs CuPy, whose NVRTC is the compiler: pip install cuconv[cuda13]",
            file=sys.stderr,
        )
        return 1
    cupy = measure.cupy_with_gpu()
    if architecture is None:
        architecture = "sm_90" if cupy is None else f"sm_{cupy.cuda.Device().compute_capability}"
    digits = architecture.removeprefix("sm_").rstrip("af")
    if not digits.isdecimal() or int(digits) not in TARGETS:
        choices = ", ".join(f"sm_{number}" for number in TARGETS)
        print(f"--arch must be one of {choices}, with or without a letter, and is {architecture!r}", file=sys.stderr)
        return 1
    rows = []
    for variant, dtype, chosen in _variants(TARGETS[int(digits)]):
        resources = kernels.compile_only(chosen, architecture)
        shared = resources.shared_bytes + chosen.shared_bytes
        values = " ".join(f"{name}={value}" for name, value in chosen.defines if name != "T")
        numbers = (resources.registers, resources.spill_bytes, chosen.block, shared)
        rows.append([chosen.source, variant, dtype, values, *map(str, numbers)])
    print(f"{len(rows)} variants for {architecture}\n")
    header = [
        "kernel",
        "variant",
        "dtype",
        "compile-time values",
        "registers",
        "spilled bytes",
        "threads",
        "shared bytes",
    ]
    print(measure.table(header, rows))
    return 0


def _installed(package: str) -> str:
    return measure.installed(package) or f"no {package}"


def _variants(target: Target) -> Iterator[tuple[str, str, Plan]]:
    """Every kernel once that the cases take on the target, in both layouts and every pass, left to itself or forced."""
    seen = set()
    cases = (*REFERENCE_CASES, *_FURTHER_GEOMETRIES)
    for variant, dtype, case, last in product(plan.VARIANTS, plan.DTYPES, cases, (False, True)):
        depthwise = _passes(replace(case.geometry, channels_last=last), dtype, target, variant)
        others = _pointwise_passes(case, last, dtype, target, variant) if case.K else ()
        for chosen in (*depthwise, *others):
            if (chosen.source, chosen.defines) not in seen:
                seen.add((chosen.source, chosen.defines))
                yield variant, dtype, chosen


def _passes(geometry: Conv2dGeometry, dtype: str, target: Target, variant: str) -> Iterator[Plan]:
    """The launches of every pass that the variant has."""
    for make in (plan.depthwise_forward, plan.depthwise_dgrad):
        with contextlib.suppress(Unsuitable):
            yield make(geometry, dtype, target, variant)
    with contextlib.suppress(Unsuitable):
        wgrad = plan.depthwise_wgrad(geometry, dtype, True, target, variant)
        yield wgrad.sums
        if wgrad.reduce is not None:
            yield wgrad.reduce


def _pointwise_passes(case: Case, last: bool, dtype: str, target: Target, variant: str) -> Iterator[Plan]:
    """Likewise, of a separable case's pointwise part, and of its forward pass."""
    pointwise = replace(case.separable.pointwise, channels_last=last)
    separable = SeparableGeometry(replace(case.geometry, channels_last=last), pointwise)
    with contextlib.suppress(Unsuitable):
        fused = plan.separable_conv(separable, dtype, plan.SeparableEpilogue(), target, variant)
        if fused is not None:
            yield fused
    for turned in (False, True):
        with contextlib.suppress(Unsuitable):
            yield plan.pointwise_conv(pointwise, dtype, turned, plan.Epilogue(), target, variant)
    with contextlib.suppress(Unsuitable):
        wgrad = plan.pointwise_wgrad(pointwise, dtype, True, False, target, variant)
        yield wgrad.sums
        if wgrad.reduce is not None:
            yield wgrad.reduce


if __name__ == "__main__":
    sys.exit(main())
