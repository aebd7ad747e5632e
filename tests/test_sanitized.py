"""The host-run kernels once more under AddressSanitizer: reads out of bounds that change no value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hostcuda
import pytest

ROOT = Path(__file__).parents[1]
# float16 has the most columns a thread and the most elements in heads and tails; the other dtypes differ in width only.
CHOSEN = "hostcuda and (float16 or several_images or padding_takes_part)"


@pytest.mark.skipif(not hostcuda.available(), reason="no g++: kernels do not run on the host")
def test_kernels_stay_within_their_arrays():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_depthwise.py", "-k", CHOSEN]
    result = subprocess.run(
        command, cwd=ROOT, env=hostcuda.sanitizer_environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1]
