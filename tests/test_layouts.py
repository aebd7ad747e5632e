"""Arrays from one layout to the other: the same values in other places, bit for bit, and nothing else is written."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from geometries import LAYOUTS, shifted

import cuconv
from cuconv import layouts

OTHER = {"nchw": "nhwc", "nhwc": "nchw"}
# Tiles are 64 x 64 in 16-bit, 32 x 32 in float32, 16 x 16 in float64: whole ones, parts of them, numbers that vectors
# divide in one direction alone, and so few channels or pixels that CuPy copies.
SHAPES = [(2, 64, 8, 8), (3, 72, 5, 8), (2, 130, 9, 7), (1, 10, 1, 67), (2, 67, 2, 5), (1, 33, 16, 12), (2, 3, 4, 5)]


def bits(rng, shape, dtype):
    """Any bits, those of NaN too."""
    words = rng.integers(0, 2**16, (*shape, dtype.itemsize // 2), np.uint16)
    return words.view(dtype).reshape(shape)


def assert_same_bits(array, expected):
    assert array.dtype == expected.dtype
    word = f"u{expected.dtype.itemsize}"
    np.testing.assert_array_equal(np.ascontiguousarray(array).view(word), np.ascontiguousarray(expected).view(word))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_comes_to_its_place(device, rng, shape, dtype, layout):
    x = bits(rng, shape, oracle.DTYPES[dtype])
    y = layouts.contiguous(device.array(x, layout), OTHER[layout] == "nhwc")
    assert (y.transpose(0, 2, 3, 1) if layout == "nchw" else y).flags.c_contiguous
    assert_same_bits(device.host(y), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_results_are_delivered_to_where_they_are_wanted(device, rng, dtype, layout):
    x = bits(rng, (2, 24, 7, 8), oracle.DTYPES[dtype])
    out, guards = device.guarded(x.shape, x.dtype, OTHER[layout])
    assert layouts.delivered(device.array(x, layout), out) is out
    guards.assert_untouched()
    assert_same_bits(device.host(out), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_arrays_may_start_at_any_element(device, rng, offset, layout):
    x = bits(rng, (2, 24, 4, 6), np.dtype(np.float16))
    y = layouts.contiguous(shifted(device, x, layout, offset), OTHER[layout] == "nhwc")
    assert_same_bits(device.host(y), x)


def test_arrays_that_lie_as_they_should_are_not_copied(device, rng):
    for layout in LAYOUTS:
        x = device.array(rng.standard_normal((2, 3, 4, 5)), layout)
        assert layouts.contiguous(x, layout == "nhwc") is x


def test_more_images_than_a_grid_has_rows(device, rng, monkeypatch):
    x = rng.integers(0, 256, (3, 10, 2, 5)).astype(np.float16)
    monkeypatch.setattr("cuconv.plan.layouts.MAX_GRID", (2**31 - 1, 2, 1))
    assert_same_bits(device.host(layouts.contiguous(device.array(x, "nhwc"))), x)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_kernels_channels_last(device, rng, dtype):
    """There and back around a kernel for (N, C, H, W), in every pass."""
    x, w, bias = oracle.random_arrays(rng, (2, 5, 11, 12), (5, 1, 9, 8), dtype)
    dy = rng.standard_normal((2, 5, 7, 8)).astype(x.dtype)
    numbers = {"padding": ((2, 2), (2, 1))}
    given = [device.array(a, "nhwc") for a in (x, dy)]
    y = cuconv.depthwise_conv2d(given[0], device.array(w), device.array(bias), **numbers)
    dx = cuconv.depthwise_conv2d_dgrad(given[1], device.array(w), x.shape, **numbers)
    dw = cuconv.depthwise_conv2d_wgrad(given[1], given[0], w.shape, **numbers)
    for result in (y, dx):
        assert result.transpose(0, 2, 3, 1).flags.c_contiguous
    oracle.assert_within_bound(device.host(y), x, w, bias, **numbers)
    oracle.assert_dgrad_within_bound(device.host(dx), dy, w, **numbers)
    oracle.assert_wgrad_within_bound(device.host(dw), None, dy, x, **numbers)
