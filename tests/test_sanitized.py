"""The host-run kernels once more under AddressSanitizer: reads out of bounds that change no value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hostcuda
import pytest

ROOT = Path(__file__).parents[1]
# float16 has the most columns a thread and the most elements in heads and tails; the other dtypes differ in width only.
# Of geometries those with and without vectors and padding, of pieces of planes and of several planes.
GEOMETRIES = (
    "3x3_padded",
    "3x3_dilated_strided",
    "multiplier_3-",
    "planes_together",
    "images_together",
    "large_kernel-",
    "7x7_together",
    "16x8_dilated_alike",
    "7x7_planes",
    "columns_of_padding",
    "odd_dilation_12",
    "40_channels_of_7x6",
)
OTHERS = "(test_runs and small_planes) or (to_its_place and float16) or (test_wgrad_tiles and padding_alone)"
CHOSEN = f"hostcuda and ((float16 and ({' or '.join(GEOMETRIES)})) or {OTHERS})"
NAMES = ("depthwise", "depthwise_dgrad", "depthwise_wgrad", "tile_kinds", "layouts", "wgrad_tiles")
FILES = [f"tests/test_{name}.py" for name in NAMES]


@pytest.mark.skipif(not hostcuda.available(), reason="no g++: kernels do not run on the host")
def test_kernels_stay_within_their_arrays():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", CHOSEN]
    result = subprocess.run(
        command, cwd=ROOT, env=hostcuda.sanitizer_environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1]
