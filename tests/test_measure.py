"""Data, the clock, and what is printed."""

from __future__ import annotations

import numpy as np
import pytest

from cuconv import measure
from cuconv.cases import REFERENCE_CASES


def test_random_arrays_repeat_without_meeting_planes() -> None:
    a = measure.random_array((3, 700, 701), "float32", 0)
    assert a.shape == (3, 700, 701)
    assert a.dtype == np.float32
    assert a.flat[0] == a.flat[1_000_003]
    assert not (a[0] == a[1]).any()
    assert abs(a.std() - 1) < 0.01
    assert (measure.random_array((4,), "float32", 1) != measure.random_array((4,), "float32", 0)).all()
    assert measure.random_array((0, 3), "bfloat16", 0).shape == (0, 3)


def test_floor_is_every_byte_once() -> None:
    assert measure.floor_ms(4_000_000_000, 4e12) == pytest.approx(1)


def test_table_is_aligned_markdown() -> None:
    assert measure.table(["a", "long name"], [["1.5", "x"]]) == (
        "| a   | long name |\n| --- | --------- |\n| 1.5 | x         |"
    )


def test_installed() -> None:
    assert measure.installed("numpy") == f"numpy {np.__version__}"
    assert measure.installed("no_such_package") is None


def test_reference_cases() -> None:
    by_name = {case.name: case for case in REFERENCE_CASES}
    assert len(by_name) == len(REFERENCE_CASES) == 9
    assert by_name["kb83+bias"].bias
    assert not by_name["kb83"].bias
    assert by_name["kb84"].geometry.y_shape == (64, 128, 254, 510)
    assert str(by_name["kb86"]) == "16,64->128,512,512 3x3"


def test_timer_on_a_gpu() -> None:
    cupy = measure.cupy_with_gpu()
    if cupy is None:
        pytest.skip("needs a GPU")
    with measure.Timer() as timer:
        assert 1e10 < timer.copy_bandwidth < 1e14
        for size in (2**10, 2**28):  # many in a graph, and few
            arrays = [cupy.ones(size, np.float32) for _ in range(3)]

            def launch(i: int, arrays: list = arrays) -> None:
                cupy.add(arrays[i], 1, out=arrays[i])

            milliseconds = timer.ms(launch, 3)
            assert milliseconds > 0.5 * measure.floor_ms(8 * size, timer.copy_bandwidth)
            assert milliseconds < 10
            assert all((array > 1).all() for array in arrays)
