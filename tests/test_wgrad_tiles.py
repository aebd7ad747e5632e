"""The gradient of large kernels' weights by depthwise_wgrad_tiles."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

import cuconv
from cuconv import plan

# name: x, w, padding. Units of a part of a plane, several groups of kernel rows, chunks that are and are not full.
GEOMETRIES = {
    "31x31": ((3, 2, 13, 57), (2, 1, 31, 31), ((15, 15), (15, 15))),
    "51x5": ((3, 2, 29, 15), (2, 1, 51, 5), ((25, 25), (2, 2))),
    "5x51": ((2, 2, 6, 29), (2, 1, 5, 51), ((1, 4), (40, 12))),
    "multiplier_3": ((3, 2, 9, 10), (6, 1, 9, 9), ((4, 3), (2, 5))),
    "9x8_valid": ((2, 3, 17, 30), (3, 1, 9, 8), ((0, 0), (0, 0))),
    "rows_apart": ((1, 1, 300, 40), (1, 1, 9, 9), ((4, 4), (4, 4))),
    "1x65": ((2, 2, 3, 66), (2, 1, 1, 65), ((0, 0), (0, 3))),
    "120x20": ((2, 1, 125, 40), (1, 1, 120, 20), ((3, 1), (0, 7))),
}


def random_gradients(rng, x_shape, w_shape, padding, dtype):
    x, w, _ = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    return rng.standard_normal(oracle.convolve(x, w, padding=padding).shape).astype(x.dtype), x


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("x_shape", "w_shape", "padding"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_matches_float64(device, rng, x_shape, w_shape, padding, dtype):
    dy, x = random_gradients(rng, x_shape, w_shape, padding, dtype)
    given = device.array(dy), device.array(x), w_shape
    with plan.variant("tiles"):
        dw, dbias = cuconv.depthwise_conv2d_wgrad(*given, padding=padding, bias=True)
        alone = cuconv.depthwise_conv2d_wgrad(*given, padding=padding)
    oracle.assert_wgrad_within_bound(device.host(dw), device.host(dbias), dy, x, padding=padding)
    np.testing.assert_array_equal(device.host(alone), device.host(dw))


@pytest.mark.parametrize("width", [13, 16])
def test_nan_and_infinity_reach_what_they_meet(device, rng, width):
    """Where dy's rows are no whole steps, the zeros behind them must not meet an infinite x."""
    w_shape, padding = (2, 1, 7, 11), ((3, 3), (5, 5))
    dy, x = random_gradients(rng, (2, 2, 9, width), w_shape, padding, "float32")
    x[0, 0, -1, -1] = np.inf
    dy[1, 1, 0, -1] = np.inf
    expected = oracle.wgrad(dy, x, w_shape, padding=padding)
    with plan.variant("tiles"):
        results = cuconv.depthwise_conv2d_wgrad(device.array(dy), device.array(x), w_shape, padding=padding, bias=True)
    for result, exact in zip(map(device.host, results), expected, strict=True):
        np.testing.assert_array_equal(np.isnan(result), np.isnan(exact))
        np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
    assert np.isfinite(expected[0]).any()
    assert np.isnan(expected[0]).any()


def test_refuses_what_it_does_not_take(device):
    dy, x = (device.array(np.ones((1, 1, 20, 20), np.float32)) for _ in range(2))
    with plan.variant("tiles"), pytest.raises(ValueError, match=r"variant tiles: takes more than 64 taps.* 3 x 3"):
        cuconv.depthwise_conv2d_wgrad(dy, x, (1, 1, 3, 3), padding=1)
    with plan.variant("tiles"), pytest.raises(ValueError, match=r"variant tiles: takes stride 1 and dilation 1.*2"):
        cuconv.depthwise_conv2d_wgrad(dy, x, (1, 1, 11, 11), padding=10, dilation=2)
