"""depthwise_conv2d_dgrad on the kernels: see test_depthwise.py."""

from __future__ import annotations

from itertools import product

import numpy as np
import oracle
import pytest
from geometries import VARIANT_CASES, cases, numbers_of, random_dy, same_kernel, shifted, suits

import cuconv
from cuconv import plan
from cuconv.geometry import depthwise_geometry


@pytest.mark.parametrize(("g", "dtype", "layout", "variant"), list(cases("dgrad")))
def test_every_variant_matches_float64(device, rng, g, dtype, layout, variant):
    _, w, _ = oracle.random_arrays(rng, (1,), g.w_shape, dtype)
    dy = random_dy(rng, g, dtype)
    out, guards = device.guarded(g.x_shape, dy.dtype, layout)
    arrays = device.array(dy, layout), device.array(w), g.x_shape
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(*arrays, out=out, **numbers_of(g))
    assert dx is out
    oracle.assert_dgrad_within_bound(device.host(dx), dy, w, **numbers_of(g))
    guards.assert_untouched()


@pytest.mark.parametrize(
    ("variant", "dtype", "layout", "stride"),
    [
        ("runs", "float16", "nchw", (2, 3)),
        ("runs", "float32", "nchw", (3, 2)),
        ("channels_last", "float32", "nhwc", (2, 2)),
        ("channels_last", "float16", "nhwc", (2, 1)),
    ],
)
def test_every_phase_of_a_stride(device, rng, variant, dtype, layout, stride):
    """The padding says which rows and columns of x meet which taps, in turn."""
    w = rng.standard_normal((2, 1, 3, 2)).astype(oracle.DTYPES[dtype])
    for before in range(4):
        g = depthwise_geometry((2, 2, 19, 48), w.shape, stride=stride, padding=((before, 1), (3 - before, 2)))
        dy = random_dy(rng, g, dtype)
        arrays = device.array(dy, layout), device.array(w), g.x_shape
        with plan.variant(variant):
            dx = cuconv.depthwise_conv2d_dgrad(*arrays, **numbers_of(g))
        oracle.assert_dgrad_within_bound(device.host(dx), dy, w, **numbers_of(g))


@pytest.mark.parametrize(("variant", "layout"), [("direct", "nchw"), ("runs", "nchw"), ("channels_last", "nhwc")])
def test_strides_at_every_width_and_every_offset(device, rng, variant, layout):
    w = rng.standard_normal((2, 1, 2, 3)).astype(np.float16)
    for width in (*range(1, 19), 23, 31, 32, 33, 40):
        g = depthwise_geometry((2, 2, 3, width), w.shape, stride=(1, 2), padding=((1, 0), (1, 1)))
        dy = random_dy(rng, g, "float16")
        out, guards = device.guarded(g.x_shape, dy.dtype, layout)
        given = shifted(device, dy, layout, width % 8)
        with plan.variant(variant):
            cuconv.depthwise_conv2d_dgrad(given, device.array(w), g.x_shape, out=out, **numbers_of(g))
        oracle.assert_dgrad_within_bound(device.host(out), dy, w, **numbers_of(g))
        guards.assert_untouched()


@pytest.mark.parametrize(("variant", "dtype", "layout"), VARIANT_CASES)
def test_nan_of_dy_reaches_what_it_met_and_nothing_else(device, rng, variant, dtype, layout):
    kernel = (5, 14) if variant == "tiles" else (2, 4)
    for multiplier, stride in product((1, 2), ((1, 1), (2, 3), (2, 1))):
        w = rng.standard_normal((3 * multiplier, 1, *kernel)).astype(oracle.DTYPES[dtype])
        numbers = {"stride": stride, "padding": ((1, 0), (2, 1)), "channels_last": layout == "nhwc"}
        g = depthwise_geometry((2, 3, 14, 20), w.shape, **numbers)
        if not suits(variant, "dgrad", g, dtype):
            continue
        dy = random_dy(rng, g, dtype)
        for place in ((0, 0, 0, 0), (1, -1, -1, -1), (1, 0, 3, 4)):
            dy[place] = np.nan
        arrays = device.array(dy, layout), device.array(w), g.x_shape
        with plan.variant(variant):
            dx = device.host(cuconv.depthwise_conv2d_dgrad(*arrays, **numbers_of(g)))
        met = oracle.dgrad(np.isnan(dy), np.ones_like(w), g.x_shape, **numbers_of(g)) > 0
        np.testing.assert_array_equal(np.isnan(dx), met)
        assert met.sum() > 8


@pytest.mark.parametrize(("variant", "dtype", "layout"), VARIANT_CASES)
def test_more_padding_than_the_kernel_reaches(device, rng, variant, dtype, layout):
    """Outputs that lie in the padding altogether have no part in dx."""
    R, S = (2, 33) if variant == "tiles" else (2, 3)
    w = rng.standard_normal((3, 1, R, S)).astype(oracle.DTYPES[dtype])
    g = depthwise_geometry((2, 3, 5, 9), w.shape, padding=((4, 3), (S + 2, S - 1)))
    dy = random_dy(rng, g, dtype)
    dy[:, :, :3] = dy[..., :3] = np.nan
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(device.array(dy, layout), device.array(w), g.x_shape, **numbers_of(g))
    dy[:, :, :3] = dy[..., :3] = 0
    oracle.assert_dgrad_within_bound(device.host(dx), dy, w, **numbers_of(g))


@pytest.mark.parametrize(("variant", "dtype", "layout"), VARIANT_CASES)
def test_zeros_around_dy_take_part(device, variant, dtype, layout):
    """A kernel row of infinity gives NaN where it meets no row of dy, in the reference and in every variant alike."""
    (R, S), numbers = same_kernel(variant)
    dy, w = np.ones((1, 2, 9, 15), oracle.DTYPES[dtype]), np.ones((2, 1, R, S), oracle.DTYPES[dtype])
    w[:, 0, -1, :] = np.inf
    expected = cuconv.depthwise_conv2d_dgrad(dy, w, dy.shape, **numbers).astype(np.float64)
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(device.array(dy, layout), device.array(w), dy.shape, **numbers)
    np.testing.assert_array_equal(device.host(dx).astype(np.float64), expected)
    assert np.isnan(expected[:, :, : R // 2]).all()
    assert not np.isnan(expected[:, :, R // 2 :, S // 2 : -(S // 2)]).any()


@pytest.mark.parametrize(("variant", "layout"), [("direct", "nchw"), ("direct", "nhwc"), ("runs", "nchw")])
def test_what_no_dy_reaches_is_zero_and_meets_no_weight(device, variant, layout):
    """Between the rows and columns of a dy whose stride is beyond the kernel there is nothing, behind them zeros."""
    dy, w = np.ones((1, 2, 2, 2), np.float32), np.full((2, 1, 2, 3), np.inf, np.float32)
    x_shape, stride = (1, 2, 7, 12), (3, 5)
    expected = np.full(x_shape, np.inf, np.float32)
    expected[:, :, 6] = expected[..., 10:] = np.nan
    expected[:, :, 2::3] = expected[..., 3:5] = expected[..., 8:10] = 0
    np.testing.assert_array_equal(cuconv.depthwise_conv2d_dgrad(dy, w, x_shape, stride=stride), expected)
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(device.array(dy, layout), device.array(w), x_shape, stride=stride)
    np.testing.assert_array_equal(device.host(dx), expected)


def test_refuses_what_does_not_fit(device):
    dy, w = device.array(np.ones((2, 3, 5, 6), np.float32)), device.array(np.ones((3, 1, 3, 3), np.float32))
    with pytest.raises(ValueError, match=r"dy must have shape \(2, 3, 4, 6\).*\(2, 3, 5, 6\)"):
        cuconv.depthwise_conv2d_dgrad(dy, w, (2, 3, 6, 8))
    with pytest.raises(TypeError, match=r"x_shape must be an integer.*7.5"):
        cuconv.depthwise_conv2d_dgrad(dy, w, (2, 3, 7.5, 8))
    with pytest.raises(TypeError, match=r"x_shape must be a tuple.*7"):
        cuconv.depthwise_conv2d_dgrad(dy, w, 7)
    with pytest.raises(TypeError, match=r"w must have dy's dtype, float32.*float64"):
        cuconv.depthwise_conv2d_dgrad(dy, w.astype(np.float64), (2, 3, 7, 8))
    with pytest.raises(ValueError, match=r"out must not overlap another array.*dy"):
        cuconv.depthwise_conv2d_dgrad(dy, w, (2, 3, 5, 6), padding=1, out=dy)
    with plan.variant("runs"), pytest.raises(ValueError, match=r"variant runs.*stride 1 or dilation 1.*\(1, 2\)"):
        cuconv.depthwise_conv2d_dgrad(dy, w, (2, 3, 7, 15), stride=(1, 2), dilation=(1, 2))
    empty = cuconv.depthwise_conv2d_dgrad(dy[:0], w, (0, 3, 7, 8))
    assert empty.shape == (0, 3, 7, 8)


def test_channels_last_gradients_that_are_direct(device):
    """Forced, they say why."""
    w = device.array(np.ones((4, 1, 3, 3), np.float32))
    for shape, numbers, reason in (
        ((1, 2, 9, 10), {}, "multiplier 1.*2"),
        ((1, 4, 9, 10), {"stride": 3}, r"stride \(3, 3\)"),
        ((1, 4, 9, 10), {"stride": 2, "dilation": 2}, r"dilation \(2, 2\)"),
    ):
        g = depthwise_geometry(shape, w.shape, **numbers)
        dy = device.array(np.ones(g.y_shape, np.float32), "nhwc")
        with plan.variant("channels_last"), pytest.raises(ValueError, match=f"variant channels_last: .*{reason}"):
            cuconv.depthwise_conv2d_dgrad(dy, w, shape, **numbers)
        cuconv.depthwise_conv2d_dgrad(dy, w, shape, **numbers)
