"""depthwise_images, whose products mix neighbouring planes, but for zeros: what is not finite stays in its own."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from geometries import GEOMETRIES, HALVES, numbers_of

import cuconv
from cuconv import plan

KINDS = (np.isnan, np.isposinf, np.isneginf)


def forward(device, x, w, bias, g):
    with plan.variant("images"):
        y = cuconv.depthwise_conv2d(device.array(x), device.array(w), device.array(bias), **numbers_of(g))
    return device.host(y).astype(np.float64)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["7x7_together", "14x14_together", "9x7_strided", "28x28_alike", "8x8_dilated"])
def test_what_is_not_finite_stays_in_its_receptive_field(device, rng, name, dtype):
    """In the first, a middle and the last plane and image, and in corners, where other planes are next."""
    g = GEOMETRIES[name]
    x, w, bias = oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype)
    middle = g.N // 2, g.C // 2
    x[0, 0, 0, 0] = x[-1, -1, -1, -1] = x[(*middle, g.H // 2, g.W // 2)] = np.nan
    x[0, -1, 0, 0] = x[(*middle, -1, 0)] = np.inf
    x[-1, 0, 0, -1] = x[-1, 0, -1, -1] = -np.inf
    y = forward(device, x, w, bias, g)
    exact = oracle.convolve(x, w, bias, **numbers_of(g))
    for kind in KINDS:
        np.testing.assert_array_equal(kind(y), kind(exact))
    finite = np.isfinite(exact)
    assert finite.any()
    np.testing.assert_allclose(y[finite], exact[finite], rtol=0.01, atol=0.05)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_finite_meet_the_padding(device, rng, value):
    g = GEOMETRIES["7x7_together"]
    x, w, bias = oracle.random_arrays(rng, g.x_shape, g.w_shape, "float16")
    w[3, 0, 0, 4] = w[9, 0, 2, 2] = value
    y = forward(device, x, w, bias, g)
    exact = oracle.convolve(x, w, bias, **numbers_of(g))
    for kind in KINDS:
        np.testing.assert_array_equal(kind(y), kind(exact))
    others = np.setdiff1d(np.arange(g.K), (3, 9))
    oracle.assert_within_bound(y[:, others].astype(x.dtype), x[:, others], w[others], bias[others], **numbers_of(g))


@pytest.mark.parametrize("name", ["7x7_together", "14x14_7x7", "28x28_alike"])
def test_finite_sums_are_made_once(device, rng, name, monkeypatch):
    """Nothing that was not written in shared memory, or that another image left there, makes them NaN."""
    g = GEOMETRIES[name]
    x, w, bias = oracle.random_arrays(rng, (16, *g.x_shape[1:]), g.w_shape, "float16")
    flatten = cuconv.kernels.flatten

    def without_second_sums(source, defines):
        text = flatten(source, defines)
        return text.replace("*place = narrow<T>(convolve_one(", "*place = narrow<T>(0.0f * convolve_one(")

    monkeypatch.setattr(cuconv.kernels, "flatten", without_second_sums)
    y = forward(device, x, w, bias, g)
    oracle.assert_within_bound(y.astype(x.dtype), x, w, bias, **numbers_of(g))


def test_small_integers_are_exact(device, rng):
    g = GEOMETRIES["14x14_together"]
    x = rng.integers(-3, 4, g.x_shape).astype(np.float16)
    w = rng.integers(-2, 3, g.w_shape).astype(np.float16)
    np.testing.assert_array_equal(forward(device, x, w, None, g), oracle.convolve(x, w, **numbers_of(g)))


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "numbers", "dtype", "reason"),
    [
        ((16, 8, 7, 7), (8, 1, 3, 3), {}, "float32", "float16 and bfloat16.*float32"),
        ((16, 8, 7, 7), (16, 1, 3, 3), {}, "float16", "multiplier 1.*2"),
        ((16, 8, 33, 32), (8, 1, 3, 3), {}, "float16", "up to 1024 elements.*33 x 32"),
        ((16, 7, 7, 7), (7, 1, 3, 3), {}, "float16", "multiples of 16 bytes"),
        ((16, 8, 14, 14), (8, 1, 64, 64), {"padding": 32}, "float16", "64 x 64 taps of 15 x 15 outputs are too many"),
        ((16, 8, 1, 1), (8, 1, 200, 200), {"padding": 100}, "float16", "200 x 200 taps of 2 x 2 outputs"),
        ((16, 8, 13, 13), (8, 1, 3, 3), {"padding": 1}, "float16", "do not fit registers"),
        ((16, 8, 1, 8), (8, 1, 1, 1), {"padding": ((2**26, 0), (0, 0)), "stride": (2**26, 1)}, "float16", "so far"),
    ],
)
def test_says_why_it_cannot_run(x_shape, w_shape, numbers, dtype, reason):
    g = cuconv.geometry.depthwise_geometry(x_shape, w_shape, **numbers)
    with pytest.raises(plan.Unsuitable, match=f"variant images: .*{reason}"):
        plan.depthwise_forward(g, dtype, plan.TARGETS[90], "images")
    g = GEOMETRIES["7x7_together"]
    for target, aligned, why in ((75, True, "compute capability"), (90, False, "16 bytes")):
        with pytest.raises(plan.Unsuitable, match=why):
            plan.depthwise_forward(g, "float16", plan.TARGETS[target], "images", aligned)
