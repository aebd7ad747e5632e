"""python -m cuconv: the self-check, what it prints and what it answers when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cuconv.__main__ as program
from cuconv import measure, plan
from cuconv.cases import REFERENCE_CASES

SMALL = [replace(case, N=2, C=5, H=14, W=17) for case in REFERENCE_CASES]
GPU = measure.cupy_with_gpu() is not None


def test_check_prints_a_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.check(SMALL) == 0
    printed = capsys.readouterr().out
    assert f"numpy {np.__version__}" in printed
    assert ("device: no GPU: NumPy reference on the CPU, batch cut to 1" in printed) != GPU
    for case in SMALL:
        assert f"| {case.name} " in printed
    assert "5->128" in printed
    assert "right" in printed.splitlines()[-1]


@pytest.mark.parametrize("fault", ["wrong", "unwritten"])
def test_check_fails(fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = program.depthwise_conv2d

    def wrong(*arrays: np.ndarray, out: np.ndarray, **options: object) -> None:
        result = right(*arrays, **options)
        if fault == "wrong":
            result[0, 0, 0, 0] += result.dtype.type(0.01)
            out[...] = result
        else:
            out[:, :, :-1] = result[:, :, :-1]

    monkeypatch.setattr(program, "depthwise_conv2d", wrong)
    assert program.check(SMALL[:2]) == 1
    assert "wrong" in capsys.readouterr().out.splitlines()[-1]


def test_check_without_bfloat16_or_cupy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    assert program.check(SMALL[:1]) == 0
    assert "no cupy, no ml_dtypes, no torch, no jax" in capsys.readouterr().out


def test_the_program_from_another_folder(tmp_path: Path) -> None:
    """A fresh process imports no framework, and with cut cases takes a moment."""
    script = (
        "import sys, dataclasses, cuconv.__main__ as program\n"
        "program.REFERENCE_CASES = [dataclasses.replace(c, N=1, C=3, H=9, W=8) for c in program.REFERENCE_CASES]\n"
        "status = program.main([])\n"
        "print({'torch', 'jax', 'dask'} & set(sys.modules))\n"
        "sys.exit(status)\n"
    )
    root = str(Path(program.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{script}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.skipif(GPU, reason="on a GPU this is layer E, and larger")
def test_python_m_cuconv() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cuconv"], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    assert "all 9 right" in done.stdout


def test_compile_prints_resources(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    few = tuple(case for case in REFERENCE_CASES if case.name == "kb86")
    monkeypatch.setattr(program, "REFERENCE_CASES", few)
    monkeypatch.setattr(program, "_FURTHER_GEOMETRIES", ())
    assert program.main(["compile", "--arch", "sm_90a"]) == 0
    printed = capsys.readouterr().out
    assert "registers" in printed
    # Kernels for more than 64 taps, and those that take whole planes, have no part in the case of 512 x 512, and some
    # names stand for other operators' kernels.
    whole = {"images", "diagonals", "pairs", "phases", "channels_last_planes"}
    for variant in set(plan.VARIANTS) - {"tiles", "apart", "recomputed", "stored", "pieces", *whole}:
        assert f"| {variant} " in printed
    for kernel in ("forward_direct", "dgrad_direct", "wgrad_direct", "runs", "wgrad_runs", "wgrad_reduce"):
        assert f"| depthwise_{kernel} " in printed
    for kernel in ("pointwise", "pointwise_direct", "pointwise_wgrad", "pointwise_wgrad_direct"):
        assert f"| {kernel} " in printed


def test_compile_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cupy")
    assert program.main(["compile", "--arch", "sm_35"]) == 1
    assert "sm_75, sm_80" in capsys.readouterr().err


def test_compile_without_cupy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    assert program.main(["compile"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_arguments() -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(["nonsense"])
    assert stop.value.code == 2
