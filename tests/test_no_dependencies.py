"""The floors of the house: what importing cuconv must not do, and which file may import which."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cuconv

PACKAGE = Path(cuconv.__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[1]

# Each imports from lower floors only. What is not named here stands on top: nothing named here may import it.
FLOORS = (
    {"geometry"},
    {"plan", "reference", "interop"},
    {"kernels"},
    {"layouts"},
    {"batchnorm", "depthwise", "pointwise", "separable", "separable_backward"},
    {"__init__"},
)


def run(code: str, folder: Path) -> str:
    """What a fresh interpreter prints, with this cuconv and the current one's packages, started in the folder."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_and_a_numpy_call_leave_the_frameworks_out(tmp_path: Path) -> None:
    code = """
import sys
import cuconv
import numpy as np
y = cuconv.depthwise_conv2d(np.ones((1, 2, 4, 5), np.float32), np.ones((2, 1, 3, 2), np.float32))
assert y.shape == (1, 2, 2, 4)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "jax", "dask", "cupy", "ml_dtypes", "numpy"}))
"""
    assert run(code, tmp_path) == "['numpy']"


def test_import_does_nothing_else(tmp_path: Path) -> None:
    # With NumPy there already: no file but cuconv's own modules is opened, no program started, no library loaded, and
    # the environment is not read.
    code = """
import os, sys
import numpy
import contextlib, contextvars, dataclasses, functools, operator, pathlib, re, types, typing

class Unread(dict):
    def __getitem__(self, key): raise AssertionError(f"the environment is read: {key}")
    get = __contains__ = __getitem__

seen = []
def hook(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")) and "__pycache__" not in str(arguments[0]):
        seen.append((event, str(arguments[0])))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen", "socket.connect"):
        seen.append((event, str(arguments)))

os.environ = Unread()
sys.addaudithook(hook)
import cuconv
print(seen)
"""
    assert run(code, tmp_path) == "[]"


def files(module: str) -> list[Path]:
    """Of a module of the package: its file, or those of its folder."""
    folder = PACKAGE / module
    return sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


def imports(module: str, modules: set[str]) -> set[str]:
    """Which of the package's other modules one imports, at the top of a file or inside a function; "__init__" is the
    package."""
    found = set()
    for path in files(module):
        inside = list(path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = inside[: len(inside) - node.level + 1] if node.level else []
                names = [".".join(filter(None, [*base, node.module or "", alias.name])) for alias in node.names]
            else:
                continue
            for name in names:
                top, _, rest = name.partition(".")
                if top == "cuconv":
                    other = rest.partition(".")[0]
                    found.add(other if other in modules else "__init__")
    return found - {module}


def import_graph() -> dict[str, set[str]]:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    return {module: imports(module, modules) for module in modules}


def test_no_import_runs_upward() -> None:
    graph = import_graph()
    assert set().union(*FLOORS) <= set(graph), "a floor names a file that is gone"
    assert "geometry" in graph["depthwise"], "the graph is not read right"
    lower: set[str] = set()
    for floor in FLOORS:
        for module in floor:
            assert graph[module] <= lower, f"cuconv/{module}.py imports upward: {sorted(graph[module] - lower)}"
        lower |= floor


def test_no_two_files_import_each_other() -> None:
    graphlib.TopologicalSorter(import_graph()).prepare()


def test_the_core_names_no_framework() -> None:
    # At the top of a file NumPy and the standard library only; CuPy inside functions of kernels.py, once it is needed.
    for module, path in [(floor, path) for floor in set().union(*FLOORS) for path in files(floor)]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                allowed = top in sys.stdlib_module_names or top == "numpy"
                allowed |= top == "cupy" and module == "kernels" and node not in tree.body
                assert allowed, f"{path.name} imports {name} in line {node.lineno}"


def test_cuda_is_a_folder_of_cuda_sources_only() -> None:
    folder = ROOT / "cuda"
    assert folder.is_dir()
    assert {path.suffix for path in folder.rglob("*")} == {".cu", ".cuh"}


def test_cuda_beside_the_package_hides_no_package_of_that_name() -> None:
    # From the repository's root `cuda` could be taken for this folder; CuPy needs the installed packages in `cuda`.
    # Looked for, not imported: an import that this folder breaks must not pass for a machine without CuPy.
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    assert run("import cuda.pathfinder, cupy; print(cupy.__name__)", ROOT) == "cupy"
