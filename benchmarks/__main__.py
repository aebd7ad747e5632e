"""python -m benchmarks: every case in every dtype, checked, then timed, peers beside it; results to a folder.

Needs a GPU, and for the plot the extra [bench].
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cuconv import measure, plan
from cuconv.cases import Case

from . import calls, peers, report
from .cases import CASE_NAMES, DTYPES, LAYOUTS, dtype_of, selected
from .passes import PASSES, Work, has_pass

_PACKAGES = ("cuconv", "numpy", "cupy", "ml_dtypes", "torch", "jax")
_QUICK_CASES = ("kb82", "mbv1_14", "b1_14")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is zero where every row was computed and right."""
    options = _parser().parse_args(arguments)
    if options.sources:
        print(report.sources_digest())
        return 0
    if measure.cupy_with_gpu() is None:
        print("python -m benchmarks needs a GPU, and CuPy: pip install -e '.[cuda13,bench]'", file=sys.stderr)
        return 2
    if options.quick:
        options.cases, options.dtypes = options.cases or list(_QUICK_CASES), options.dtypes or ["float32"]
        options.peers = False
    cases = selected(options.cases or CASE_NAMES, options.dtypes or list(DTYPES))
    todo = to_measure(options.operators, options.passes, cases, options.layouts)
    result = run(todo, peers.NAMES if options.peers else (), options.variant, options.peer_seconds)
    if options.calls:
        result["calls"] = {"first": calls.first_calls(), "host_us": calls.host_us()}
    if options.add:
        result = report.merged(report.read(options.out, options.name), result)
    print(report.markdown(result, options.name))
    report.write(result, options.out, options.name)
    wrong = [row for row in result["rows"] if not row["right"]]
    for row in wrong:
        print(f"WRONG: {row['case']} {row['pass']} {row['dtype']} {row['layout']}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    passes = list(dict.fromkeys(name for _, name in PASSES))
    cases = ", ".join(CASE_NAMES)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--cases", nargs="+", metavar="CASE", choices=CASE_NAMES, help=f"of {cases}; a name brings its +bias along")
    add("--dtypes", nargs="+", choices=DTYPES)
    operators = list(dict.fromkeys(op for op, _ in PASSES))
    add("--operators", nargs="+", choices=operators, default=operators)
    add("--passes", nargs="+", choices=passes, default=passes)
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of the arrays in memory")
    add("--variant", choices=plan.VARIANTS, help="force a kernel; what it cannot run is left out")
    add("--peers", action=argparse.BooleanOptionalAction, default=True, help="time PyTorch and JAX too")
    add(
        "--peer-seconds",
        type=float,
        default=120,
        help="time JAX and torch.compile until each took that long in a pass of an operator, compiling included",
    )
    add("--calls", action="store_true", help="time first calls and the host's part of every call, too")
    add("--add", action="store_true", help="to results of the same sources, such as those of the other passes")
    add("--quick", action="store_true", help=f"{', '.join(_QUICK_CASES)} in float32, no peers")
    add("--out", type=Path, default=report.ROOT / "benchmarks" / "results", metavar="FOLDER")
    add("--name", default="latest", help="of the files written, such as h200")
    add("--sources", action="store_true", help="print the digest of cuda/ and cuconv/, and stop")
    return parser


Todo = tuple[str, str, Case, str, str]


def to_measure(
    operators: Sequence[str], passes: Sequence[str], cases: Sequence[tuple[Case, str]], layouts: Sequence[str]
) -> list[Todo]:
    """Every (case, dtype) in each of its operator's passes, where it has a result of its own, and layouts."""
    return [
        (op, name, case, dtype, layout)
        for op, name in PASSES
        if op in operators and name in passes
        for case, dtype in cases
        if case.operator == op and has_pass(case, name)
        for layout in layouts
    ]


def run(todo: Sequence[Todo], peer_names: Sequence[str], variant: str | None, peer_seconds: float) -> report.Result:
    """Measure every (operator, pass, case, dtype, layout) on the current GPU."""
    from tqdm import tqdm

    budgets = {(op, name): peers.budgets(peer_names, peer_seconds) for op, name, *_ in todo}
    # Peers are given their own layouts: what they take is the same in every layout of the project's arrays.
    peers_of: dict[tuple[str, ...], dict[str, float | None]] = {}
    rows = []
    forced = contextlib.nullcontext() if variant is None else plan.variant(variant)
    with measure.Timer() as timer, forced:
        copy_bandwidth = timer.copy_bandwidth
        # A bar on a terminal, nothing elsewhere.
        bar = tqdm(todo, disable=None, unit="row")
        for op, name, case, dtype, layout in bar:
            bar.set_postfix_str(f"{case.name} {name} {dtype}")
            row: report.Row = {
                "case": case.name,
                "op": op,
                "pass": name,
                "dtype": dtype_of(dtype),
                "layout": layout,
                "precision": "tf32" if dtype == "tf32" else "fp32",
                "copy_GBps": copy_bandwidth / 1e9,
                "shape": str(case) if op == "pointwise" else f"{case}, {_numbers(case)}",
                **dict.fromkeys(("kernel", "ms", "floor_ms", "percent_of_floor", "error")),
                "right": False,
                "peers": {},
            }
            try:
                work = PASSES[op, name](case, dtype, layout, timer)
                _measure(row, work, timer, budgets[op, name], peers_of.get((op, name, case.name, dtype)))
                del work
                peers_of[op, name, case.name, dtype] = row["peers"]
            except plan.Unsuitable as reason:
                tqdm.write(f"{case.name} {name} {dtype}: left out: {reason}")
                continue
            except Exception as error:  # the other rows are worth having; this one fails the run
                row["right"] = False
                tqdm.write(f"{case.name} {name} {dtype}: {type(error).__name__}: {error}")
            rows.append(row)
            _release()
    return {
        "device": measure.device_name(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "sources": report.sources_digest(),
        "copy_GBps": copy_bandwidth / 1e9,
        "versions": {
            "python": platform.python_version(),
            **{package: version for package in _PACKAGES if (version := measure.installed(package))},
            **{f"{peer} settings": setting for peer, setting in (peers.settings() if peer_names else {}).items()},
        },
        "rows": rows,
    }


def _numbers(case: Case) -> str:
    return f"stride {case.stride}, pad {case.padding}, dilation {case.dilation}"


def _measure(
    row: report.Row,
    work: Work,
    timer: measure.Timer,
    budget: dict[str, float],
    known: dict[str, float | None] | None,
) -> None:
    """Fill in the figures of one row; peers that are not known take the seconds that they need off their budget."""
    from tqdm import tqdm

    error = work.check()
    row["kernel"], row["right"] = work.kernel, error <= 1
    row["error"] = error if math.isfinite(error) else None
    row["ms"] = timer.ms(work.launch, len(work.inputs))
    row["floor_ms"] = measure.floor_ms(work.bytes, timer.copy_bandwidth)
    row["percent_of_floor"] = 100 * row["floor_ms"] / row["ms"]
    if known is not None:
        row["peers"] = known
        return
    for peer in filter(budget.__contains__, work.peers):
        row["peers"][peer] = None
        if budget[peer] <= 0:
            tqdm.write(f"{row['case']} {row['pass']} {row['dtype']}: {peer} left out, its time is spent")
            continue
        _release()
        start = time.perf_counter()
        try:
            row["peers"][peer] = work.peers[peer](timer)
        except Exception as problem:  # whatever a framework may raise: said, and the row goes on without it
            tqdm.write(f"{row['case']} {row['pass']} {row['dtype']}: {peer}: {type(problem).__name__}: {problem}")
        budget[peer] -= time.perf_counter() - start


def _release() -> None:
    """Leave what is measured next all of the GPU's memory."""
    import cupy

    gc.collect()
    peers.release()
    cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    sys.exit(main())
