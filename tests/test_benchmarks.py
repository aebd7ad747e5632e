"""python -m benchmarks, as far as it goes without a GPU: cases, digest, report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as program
from benchmarks import cases, peers, report
from cuconv import measure

ROOT = Path(report.__file__).parent.parent


def row(case: str, dtype: str, ms: float | None = 2.0, **changes: Any) -> dict[str, Any]:
    return {
        "case": case,
        "op": "depthwise",
        "pass": "forward",
        "dtype": dtype,
        "layout": "nchw",
        "precision": "fp32",
        "shape": "1,2,3,4 3x3",
        "kernel": "depthwise_runs",
        "right": True,
        "ms": ms,
        "floor_ms": 1.5,
        "percent_of_floor": None if ms is None else 150 / ms,
        "error": 0.25,
        "copy_GBps": 4240.0,
        "peers": {"torch": 4.0, "torch_compile": 3.0, "jax": None},
    } | changes


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "device": "A GPU",
        "date": "2030-01-02",
        "sources": "0" * 64,
        "copy_GBps": 4240.0,
        "versions": {"numpy": "numpy 2.0.0"},
        "rows": rows,
    }


def test_report_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("a", "float32"), row("a", "float16", peers={}), row("b", "float32", layout="nhwc")]
    rows.append(row("b", "float16", None, right=False, error=None))
    rows.append(row("b", "float64"))
    written = result(rows)
    report.write(written, tmp_path / "new", "gpu")
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == written
    assert (tmp_path / "new" / "gpu.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "new" / "gpu.md").read_text()
    assert "4240 GB/s" in text
    assert "torch_compile ms" in text
    assert text.count("WRONG") == 1


def test_every_pass_has_its_table_and_its_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    backward = {"pass": "dgrad", "kernel": "a_dgrad_kernel", "peers": {"torch": 5.0, "jax": 6.0}}
    pointwise = {"op": "pointwise", "precision": "tf32"}
    lines = [
        row("a", "float32"),
        row("b", "float32"),
        row("a", "float32", **backward),
        row("p", "float32", **pointwise),
    ]
    written = result(lines)
    report.write(written, tmp_path, "gpu")
    plots = {"gpu.png", "gpu_dgrad.png", "gpu_pointwise_forward.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", *plots}
    assert json.loads((tmp_path / "gpu.json").read_text()) == written
    assert (tmp_path / "gpu.png").read_bytes() != (tmp_path / "gpu_dgrad.png").read_bytes()
    head, forward, dgrad, products = (tmp_path / "gpu.md").read_text().split("\n## ")
    assert "4240 GB/s" in head
    assert forward.startswith("depthwise forward\n")
    assert "(gpu.png)" in forward
    assert "a_dgrad_kernel" not in forward
    assert dgrad.startswith("depthwise dgrad\n")
    assert "(gpu_dgrad.png)" in dgrad
    assert dgrad.count("a_dgrad_kernel") == 1
    assert "jax ms" in dgrad
    assert "torch_compile ms" not in dgrad
    assert products.startswith("pointwise forward\n")
    assert "| tf32 " in products


def test_nothing_to_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(result([]), tmp_path, "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"empty.json", "empty.md"}
    report.write(result([row("a", "float32", None)]), tmp_path, "failed")
    assert (tmp_path / "failed.png").exists()


def test_best_peer() -> None:
    assert report.best_peer(row("a", "float32")) == ("torch_compile", 3.0)
    assert report.best_peer(row("a", "float32", peers={"torch": None})) is None


def test_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    def digest() -> str:
        return report.sources_digest(tmp_path)

    for name in ("cuda/a.cu", "cuconv/b.py", "cuconv/__pycache__/b.pyc", "tests/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    first = digest()
    assert digest() == first
    (tmp_path / "cuconv/__pycache__/b.pyc").write_text("other")
    (tmp_path / "tests/c.py").write_text("other")
    assert digest() == first
    (tmp_path / "cuda/a.cu").write_text("other")
    second = digest()
    (tmp_path / "cuda/a.cu").rename(tmp_path / "cuda/d.cu")
    assert len({first, second, digest()}) == 3


def test_sources_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--sources"]) == 0
    assert capsys.readouterr().out.strip() == report.sources_digest()


def test_committed_results_are_well_formed() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        written = json.loads(path.read_text())
        assert {"device", "date", "sources", "copy_GBps", "rows"} <= set(written)
        for line in written["rows"]:
            assert set(row("", "")) <= set(line)


def test_only_peers_that_compile_have_a_limit() -> None:
    """A limit that cut PyTorch off would leave the last cases without a peer."""
    assert peers.budgets(peers.NAMES, 12) == {
        "torch": math.inf,
        "torch_channels_last": math.inf,
        "torch_compile": 12,
        "torch_compile_channels_last": 12,
        "jax": 12,
    }
    assert peers.budgets((), 12) == {}


def test_results_are_added_to_those_of_the_same_sources() -> None:
    old = result([row("a", "float32"), row("b", "float32")]) | {"calls": {}}
    new = result([row("b", "float32", 1.0, copy_GBps=4100.0), row("b", "float32", **{"pass": "wgrad"})])
    both = report.merged(old, new)
    assert [(line["case"], line["pass"], line["ms"]) for line in both["rows"]] == [
        ("a", "forward", 2.0),
        ("b", "forward", 1.0),
        ("b", "wgrad", 2.0),
    ]
    # TF32 is a row of its own beside float32.
    in_tf32 = report.merged(old, result([row("b", "float32", 0.5, precision="tf32")]))
    assert [(line["case"], line["ms"]) for line in in_tf32["rows"]] == [("a", 2.0), ("b", 2.0), ("b", 0.5)]
    assert "calls" in both
    assert "4240 and 4100 GB/s" in report.markdown(result(both["rows"]), "gpu")
    with pytest.raises(ValueError, match="this run's sources"):
        report.merged(old, new | {"sources": "1" * 64})


def test_calls_are_reported() -> None:
    calls = {
        "first": [{"case": "kb82", "pass": "wgrad", "dtype": "float32", "cold_ms": 321.4, "cached_ms": 4.25}],
        "host_us": {"forward": 9.75, "torch conv2d": 12.0},
    }
    text = report.markdown(result([row("a", "float32")]) | {"calls": calls}, "gpu")
    head, table = text.split("## calls")
    assert "321 " in table
    assert " 4.2 " in table
    assert "| forward      | 9.8 " in table
    assert "disk" not in head


def test_cases() -> None:
    assert len(cases.CASE_NAMES) == len(set(cases.CASE_NAMES)) == 30
    assert [case.name for case in cases.CASES if case.operator == "pointwise"] == ["pw512", "kb87"]
    assert str(next(case for case in cases.CASES if case.name == "kb87")) == "16,64->128,1024,1024"
    for case in cases.CASES:
        assert case.geometry.P > 0
    slak = next(case for case in cases.CASES if case.name == "slak51")
    assert slak.geometry.y_shape == (16, 96, 56, 56)


def test_selection() -> None:
    assert [case.name for case, _ in cases.selected(["kb82"], ["float32"])] == ["kb82", "kb82+bias"]
    assert [case.name for case, _ in cases.selected(["kb82+bias"], ["float32"])] == ["kb82+bias"]
    in_float64 = [case.name for case, _ in cases.selected(cases.CASE_NAMES, ["float64"])]
    assert in_float64 == list(cases.FLOAT64_CASES)
    in_tf32 = {case.operator for case, _ in cases.selected(cases.CASE_NAMES, ["tf32"])}
    assert in_tf32 == {"pointwise", "separable"}


def test_no_bias_in_dgrad() -> None:
    todo = program.to_measure(
        ["depthwise"], ["forward", "dgrad"], cases.selected(["kb82"], ["float32", "float16"]), ["nchw"]
    )
    assert [(name, case.name, dtype) for _, name, case, dtype, _ in todo] == [
        ("forward", "kb82", "float32"),
        ("forward", "kb82", "float16"),
        ("forward", "kb82+bias", "float32"),
        ("forward", "kb82+bias", "float16"),
        ("dgrad", "kb82", "float32"),
        ("dgrad", "kb82", "float16"),
    ]
    assert program.to_measure(["depthwise"], ["dgrad"], cases.selected(["kb82+bias"], ["float32"]), ["nchw"]) == []


def test_every_layout_is_measured() -> None:
    todo = program.to_measure(["depthwise"], ["forward"], cases.selected(["mbv1_7"], ["float32"]), list(cases.LAYOUTS))
    assert [layout for *_, layout in todo] == ["nchw", "nhwc"]


def test_a_case_is_measured_by_its_operator() -> None:
    operators = ["depthwise", "pointwise", "separable"]
    every = cases.selected(["kb82", "pw512", "mbv1_sep7"], ["float32"])
    todo = program.to_measure(operators, ["forward", "wgrad", "training"], every, ["nchw"])
    assert {(op, name, case.name) for op, name, case, *_ in todo} == {
        ("depthwise", "forward", "kb82"),
        ("depthwise", "forward", "kb82+bias"),
        ("depthwise", "wgrad", "kb82"),
        ("depthwise", "wgrad", "kb82+bias"),
        ("pointwise", "forward", "pw512"),
        ("pointwise", "wgrad", "pw512"),
        ("separable", "forward", "mbv1_sep7"),
        ("separable", "training", "mbv1_sep7"),
    }
    assert program.to_measure(["separable"], ["forward"], cases.selected(["kb82"], ["float32"]), ["nchw"]) == []


@pytest.mark.skipif(measure.cupy_with_gpu() is not None, reason="there is a GPU")
def test_needs_a_gpu() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs a GPU" in done.stderr


def test_a_gpu_run(tmp_path: Path) -> None:
    if measure.cupy_with_gpu() is None:
        pytest.skip("needs a GPU")
    pytest.importorskip("matplotlib")
    arguments = ["--cases", "b1_14", "--dtypes", "float32", "--no-peers", "--out", str(tmp_path), "--name", "one"]
    assert program.main(arguments) == 0
    rows = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert [line["pass"] for line in rows] == ["forward", "forward", "dgrad", "dgrad", "wgrad", "wgrad"]
    assert [line["layout"] for line in rows] == ["nchw", "nhwc"] * 3
    for line in rows:
        assert line["right"]
        assert 0 < line["percent_of_floor"] < 200


def test_unknown_case() -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(["--cases", "nonsense"])
    assert stop.value.code == 2
