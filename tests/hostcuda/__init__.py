"""A test tool: the project's .cu source, unmodified, compiled by g++ and run on NumPy arrays without a GPU.

``monkeypatch.setitem(sys.modules, "cupy", hostcuda.cupy_twin)`` makes it the library's CuPy.
"""

from . import cupy_twin
from .cupy_twin import available, sanitizer_environment, simulate

__all__ = ["available", "cupy_twin", "sanitizer_environment", "simulate"]
