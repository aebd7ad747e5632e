"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from backends import device, gpu, rng  # noqa: F401 - fixtures of all tests

_VARIABLE = "CUCONV_EXTERNAL_DATA"
_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data"


def _external_folder() -> Path | None:
    given = os.environ.get(_VARIABLE)
    if given:
        return Path(given)
    return _DEFAULT if _DEFAULT.is_dir() else None


def pytest_report_header() -> str:
    return f"outside numbers: {_external_folder() or f'none, {_VARIABLE} is not set'}"


@pytest.fixture(scope="session")
def external_data() -> Path:
    """The folder of numbers from outside the project; the test is skipped without one, and fails with a wrong one."""
    folder = _external_folder()
    if folder is None:
        pytest.skip(f"no outside numbers: set {_VARIABLE} to their folder")
    if not folder.is_dir():
        pytest.fail(f"{_VARIABLE} names no folder: {folder}")
    return folder
