"""depthwise_conv2d_wgrad on the kernels: see test_depthwise.py."""

from __future__ import annotations

from itertools import product

import numpy as np
import oracle
import pytest
from geometries import GEOMETRIES, LAYOUTS, cases, numbers_of, random_dy, suits

import cuconv
from cuconv import kernels, plan
from cuconv.geometry import depthwise_geometry

# Every variant in the layouts that it takes.
BY_LAYOUT = (
    ("direct", "nchw"),
    ("direct", "nhwc"),
    ("runs", "nchw"),
    ("channels_last", "nhwc"),
    ("channels_last_staged", "nhwc"),
    ("channels_last_runs", "nhwc"),
)
# On tensor cores, for images of whole 16 bytes in 16-bit.
TENSOR = ("diagonals", "pairs")


def random_gradients(rng, g, dtype):
    """dy and x of a convolution."""
    return random_dy(rng, g, dtype), oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype)[0]


@pytest.mark.parametrize(("g", "dtype", "layout", "variant"), list(cases("wgrad")))
def test_every_variant_matches_float64(device, rng, g, dtype, layout, variant):
    dy, x = random_gradients(rng, g, dtype)
    dw_out, dw_guards = device.guarded(g.w_shape, x.dtype)
    dbias_out, dbias_guards = device.guarded((g.K,), x.dtype)
    arrays = device.array(dy, layout), device.array(x, layout), g.w_shape
    with plan.variant(variant):
        dw, dbias = cuconv.depthwise_conv2d_wgrad(*arrays, bias=True, out=(dw_out, dbias_out), **numbers_of(g))
    assert dw is dw_out
    assert dbias is dbias_out
    oracle.assert_wgrad_within_bound(device.host(dw), device.host(dbias), dy, x, **numbers_of(g))
    dw_guards.assert_untouched()
    dbias_guards.assert_untouched()


# The bias adds one sum to those of the taps, whatever the geometry: half of the dtypes, with few geometries.
@pytest.mark.parametrize(
    ("g", "dtype", "layout", "variant"), [case for case in cases("wgrad") if case.values[1] in ("bfloat16", "float64")]
)
def test_every_variant_without_bias(device, rng, g, dtype, layout, variant):
    dy, x = random_gradients(rng, g, dtype)
    out, guards = device.guarded(g.w_shape, x.dtype)
    arrays = device.array(dy, layout), device.array(x, layout), g.w_shape
    with plan.variant(variant):
        assert cuconv.depthwise_conv2d_wgrad(*arrays, out=out, **numbers_of(g)) is out
    oracle.assert_wgrad_within_bound(device.host(out), None, dy, x, **numbers_of(g))
    guards.assert_untouched()


@pytest.mark.parametrize(("variant", "layout"), BY_LAYOUT)
def test_nan_and_infinity_reach_what_they_meet(device, rng, variant, layout):
    """An infinite x at an edge meets some taps only; a dy of infinity meets the zeros of the padding. At every width
    there are patches that reach beyond dy, whose missing elements must meet nothing."""
    for width in (5, 8, 11, 13, 37):
        g = depthwise_geometry((2, 3, 9, width), (3, 1, 3, 2), padding=((1, 1), (1, 0)))
        dy, x = random_gradients(rng, g, "float32")
        x[0, 0, -1, -1] = np.inf
        x[1, 1, 0, 0] = np.nan
        dy[1, 2, 0, -1] = np.inf
        expected = oracle.wgrad(dy, x, g.w_shape, **numbers_of(g))
        with plan.variant(variant):
            given = device.array(dy, layout), device.array(x, layout)
            results = cuconv.depthwise_conv2d_wgrad(*given, g.w_shape, bias=True, **numbers_of(g))
        for exact, result in zip(expected, results, strict=True):
            result = device.host(result)
            np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
            np.testing.assert_array_equal(result[~np.isfinite(exact)], exact[~np.isfinite(exact)])
        finite = np.isfinite(expected[0])
        assert finite[:2].any(axis=(1, 2, 3)).all()
        assert not finite.all(axis=(1, 2, 3)).any()
        assert {*np.isnan(expected[0][2]).ravel()} == {True, False}


@pytest.mark.parametrize("variant", TENSOR)
def test_nan_and_infinity_reach_what_they_meet_on_tensor_cores(device, rng, variant):
    """At the edges, where chunks hold what belongs to other rows or planes or none; in one channel, not in others."""
    for width, channels in ((5, 8), (12, 2)):
        g = depthwise_geometry((19, channels, 10, width), (channels, 1, 3, 3), padding=1)
        dy, x = random_gradients(rng, g, "float16")
        x[0, 0, -1, -1] = np.inf
        x[17, 0, 0, 0] = -np.inf
        dy[18, 1, 0, -1] = np.nan if width == 5 else np.inf
        expected = oracle.wgrad(dy, x, g.w_shape, **numbers_of(g))
        given = device.array(dy), device.array(x)
        with plan.variant(variant):
            results = cuconv.depthwise_conv2d_wgrad(*given, g.w_shape, bias=True, **numbers_of(g))
        for exact, result in zip(expected, map(device.host, results), strict=True):
            np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
            np.testing.assert_array_equal(result[~np.isfinite(exact)], exact[~np.isfinite(exact)])
        assert {*np.isfinite(expected[0][0]).ravel()} == {True, False}
        assert not np.isfinite(expected[1][1])
        assert np.isfinite(expected[0][2:]).all()


@pytest.mark.parametrize("variant", TENSOR)
def test_finite_data_stay_on_tensor_cores(device, rng, monkeypatch, variant):
    """What is not there, or was never written, must not look like data that are not finite: the block would do its
    work over, plainly and slowly. Here doing so makes NaN."""
    read = kernels._read
    plainly = "  float sum = 0;\n"
    assert read("wgrad_plainly.cuh").count(plainly) == 1
    monkeypatch.setattr(
        kernels, "_read", lambda name: read(name).replace(plainly, "  float sum = __uint_as_float(~0u);\n")
    )
    kernels._kernel.cache_clear()
    kernels.load.cache_clear()
    for name in ("7x7_planes", "14x14_planes", "5x9_planes", "12x20_planes", "28_wide", "odd_planes_dilation_12"):
        g = GEOMETRIES[name]
        if not suits(variant, "wgrad", g, "bfloat16"):
            continue
        dy, x = random_gradients(rng, g, "bfloat16")
        x[-1, -1, -1, -1] = 0
        given = device.array(dy), device.array(x)
        with plan.variant(variant):
            dw, dbias = cuconv.depthwise_conv2d_wgrad(*given, g.w_shape, bias=True, **numbers_of(g))
            assert np.isfinite(device.host(dw).astype(np.float32)).all()
            assert np.isfinite(device.host(dbias).astype(np.float32)).all()
            given[1][-1, -1, -1, -1] = np.inf
            dw, _ = cuconv.depthwise_conv2d_wgrad(*given, g.w_shape, bias=True, **numbers_of(g))
            assert np.isnan(device.host(dw).astype(np.float32)).any()


@pytest.mark.parametrize("width", [13, 16])
def test_nan_and_infinity_reach_what_they_meet_in_large_kernels(device, rng, width):
    """Where dy's rows are no whole steps, the zeros behind them must not meet an infinite x."""
    g = depthwise_geometry((2, 2, 9, width), (2, 1, 7, 11), padding=((3, 3), (5, 5)))
    dy, x = random_gradients(rng, g, "float32")
    x[0, 0, -1, -1] = np.inf
    dy[1, 1, 0, -1] = np.inf
    expected = oracle.wgrad(dy, x, g.w_shape, **numbers_of(g))
    arrays = device.array(dy), device.array(x), g.w_shape
    with plan.variant("tiles"):
        results = cuconv.depthwise_conv2d_wgrad(*arrays, bias=True, **numbers_of(g))
    for result, exact in zip(map(device.host, results), expected, strict=True):
        np.testing.assert_array_equal(np.isnan(result), np.isnan(exact))
        np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
    assert np.isfinite(expected[0]).any()
    assert np.isnan(expected[0]).any()


@pytest.mark.parametrize(
    ("dtype", "variant", "layout"),
    [
        (dtype, *how)
        for dtype, how in product(oracle.DTYPES, BY_LAYOUT)
        if dtype != "float64" or how[0] not in ("channels_last_staged", "channels_last_runs")
    ],
)
def test_small_integers_are_exact(device, rng, dtype, variant, layout):
    channels = 6 if variant in ("channels_last_staged", "channels_last_runs") else 3
    stride_w = 1 if variant == "channels_last_runs" else 2
    dy = rng.integers(-2, 3, (3, 6, 8, 5)).astype(oracle.DTYPES[dtype])
    x = rng.integers(-1, 2, (3, channels, 8, 5 * stride_w)).astype(oracle.DTYPES[dtype])
    numbers = {"stride": (1, stride_w), "padding": ((2, 0), (1, 0)), "dilation": (1, 1)}
    arrays = device.array(dy, layout), device.array(x, layout), (6, 1, 3, 2)
    with plan.variant(variant):
        dw, dbias = cuconv.depthwise_conv2d_wgrad(*arrays, bias=True, **numbers)
    exact = oracle.wgrad(dy, x, (6, 1, 3, 2), **numbers)
    for result, expected in zip((dw, dbias), exact, strict=True):
        np.testing.assert_array_equal(device.host(result).astype(np.float64), expected)


@pytest.mark.parametrize(("variant", "layout"), BY_LAYOUT)
def test_same_bits_every_time(device, rng, variant, layout):
    dy, x = (device.array(rng.standard_normal((9, 5, 37, 41)).astype(np.float32), layout) for _ in range(2))

    def bits():
        gradients = cuconv.depthwise_conv2d_wgrad(dy, x, (5, 1, 3, 3), padding=1, bias=True)
        return np.concatenate([device.host(one).ravel() for one in gradients]).view(np.uint32)

    with plan.variant(variant):
        first = bits()
        for _ in range(device.repeats):
            np.testing.assert_array_equal(bits(), first)


@pytest.mark.parametrize("variant", TENSOR)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_integers_are_exact_on_tensor_cores(device, rng, dtype, variant):
    shape = (20, 8, 9, 7)
    dy, x = (rng.integers(-2, 3, shape).astype(oracle.DTYPES[dtype]) for _ in range(2))
    dy[:, :, ::2] = 0
    numbers = {"stride": (1, 1), "padding": ((2, 1), (1, 1)), "dilation": (1, 1)}
    with plan.variant(variant):
        dw, dbias = cuconv.depthwise_conv2d_wgrad(device.array(dy), device.array(x), (8, 1, 4, 3), bias=True, **numbers)
    exact = oracle.wgrad(dy, x, (8, 1, 4, 3), **numbers)
    for result, expected in zip((dw, dbias), exact, strict=True):
        np.testing.assert_array_equal(device.host(result), expected.astype(result.dtype))


@pytest.mark.parametrize("variant", TENSOR)
@pytest.mark.parametrize("images", [37, 300])
def test_same_bits_every_time_on_tensor_cores(device, rng, variant, images):
    if images > 37 and device.repeats < 100:
        pytest.skip("as many images as fill a GPU: the host takes a minute")
    dy, x = (device.array(rng.standard_normal((images, 8, 14, 14)).astype(np.float16)) for _ in range(2))

    def bits():
        gradients = cuconv.depthwise_conv2d_wgrad(dy, x, (8, 1, 3, 3), padding=1, bias=True)
        return np.concatenate([device.host(one).ravel() for one in gradients]).view(np.uint16)

    with plan.variant(variant):
        first = bits()
        for _ in range(device.repeats):
            np.testing.assert_array_equal(bits(), first)


@pytest.mark.parametrize("variant", TENSOR)
def test_tensor_cores_refuse_what_they_do_not_take(device, variant):
    def refused(match, shape=(2, 8, 6, 6), kernel=(3, 3), dtype=np.float16, multiplier=1, offset=0, **numbers):
        x = device.array(np.ones(int(np.prod(shape)) + offset, dtype))[offset:].reshape(shape)
        w_shape = (shape[1] * multiplier, 1, *kernel)
        g = depthwise_geometry(shape, w_shape, **numbers)
        dy = device.array(np.ones(g.y_shape, dtype))
        with plan.variant(variant), pytest.raises(ValueError, match=rf"variant {variant}: .*{match}"):
            cuconv.depthwise_conv2d_wgrad(dy, x, w_shape, **numbers)

    refused("float16 and bfloat16.*float32", dtype=np.float32)
    refused("one output channel an input channel", multiplier=2, padding=1)
    refused("stride", stride=2, padding=1)
    refused("images that start at multiples of 16 bytes", shape=(2, 3, 5, 5), padding=1)
    refused("images that start at multiples of 16 bytes", padding=1, offset=1)
    if variant == "pairs":
        refused("a dy of x's extents.*5 x 6", kernel=(2, 3), padding=((0, 0), (1, 1)))
        refused("planes of up to 256 elements", shape=(2, 1, 20, 20), padding=1)
        refused("kernels of 64", shape=(2, 1, 16, 16), kernel=(9, 9), padding=4)
    else:
        refused("do not fit", shape=(2, 1, 8, 400), padding=1)


@pytest.mark.parametrize("layouts", list(product(LAYOUTS, LAYOUTS)), ids="-".join)
def test_each_array_has_a_layout_of_its_own(device, rng, layouts):
    g = depthwise_geometry((2, 3, 9, 8), (6, 1, 3, 2), stride=(1, 2))
    dy, x = random_gradients(rng, g, "float32")
    arrays = (device.array(array, layout) for array, layout in zip((dy, x), layouts, strict=True))
    dw, dbias = cuconv.depthwise_conv2d_wgrad(*arrays, g.w_shape, bias=True, **numbers_of(g))
    oracle.assert_wgrad_within_bound(device.host(dw), device.host(dbias), dy, x, **numbers_of(g))


def test_out_and_workspace(device, rng):
    # Of one channel, so that sums are of more slabs than a cluster has.
    g = depthwise_geometry((64, 1, 16, 15), (1, 1, 3, 3), padding=1)
    dy, x = random_gradients(rng, g, "float32")
    on_device, numbers = (device.array(dy), device.array(x), g.w_shape), numbers_of(g)
    buffer, bias_buffer = device.array(np.zeros((1, 2, 3, 6), np.float32)), device.array(np.zeros(2, np.float32))
    out = (buffer[:, 1:, ::-1, ::2], bias_buffer[::-2])
    with pytest.raises(ValueError, match=r"workspace must have at least \d+ bytes, and has 8") as refusal:
        cuconv.depthwise_conv2d_wgrad(*on_device, bias=True, workspace=device.array(np.zeros(8, np.uint8)), **numbers)
    needed = int(str(refusal.value).split("at least ")[1].split()[0])
    workspace = device.array(np.full(-(-needed // 4), np.nan, np.float32))
    results = cuconv.depthwise_conv2d_wgrad(*on_device, bias=True, out=out, workspace=workspace, **numbers)
    assert all(result is given for result, given in zip(results, out, strict=True))
    oracle.assert_wgrad_within_bound(*map(device.host, out), dy, x, **numbers)
    assert not device.host(buffer)[:, 0].any()
    assert not device.host(buffer)[..., 1::2].any()


def test_refuses_what_does_not_fit(device):
    dy, x = (device.array(np.ones((2, 3, 5, 6), np.float32)) for _ in range(2))
    wgrad = cuconv.depthwise_conv2d_wgrad
    with pytest.raises(ValueError, match=r"dy must have shape \(2, 3, 3, 4\).*\(2, 3, 5, 6\)"):
        wgrad(dy, x, (3, 1, 3, 3))
    with pytest.raises(TypeError, match=r"w_shape must be a tuple.*3"):
        wgrad(dy, x, 3)
    with pytest.raises(TypeError, match=r"x must have dy's dtype, float32.*float64"):
        wgrad(dy, x.astype(np.float64), (3, 1, 1, 1))
    with pytest.raises(TypeError, match=r"out must be a pair, and is"):
        wgrad(dy, x, (3, 1, 1, 1), bias=True, out=device.array(np.ones((3, 1, 1, 1), np.float32)))
    pair = tuple(device.array(np.ones(shape, np.float32)) for shape in ((3, 1, 1, 1), (4,)))
    with pytest.raises(ValueError, match=r"out must have the result's shape, \(3,\), and has \(4,\)"):
        wgrad(dy, x, (3, 1, 1, 1), bias=True, out=pair)
    with pytest.raises(ValueError, match=r"out must not overlap another array.*x"):
        wgrad(dy, x, (3, 1, 1, 1), out=x[:1, :, :1, :1].reshape(3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"workspace must not overlap another array.*dy"):
        wgrad(dy, x, (3, 1, 1, 1), workspace=dy)
    with pytest.raises(ValueError, match=r"workspace must be C-contiguous"):
        wgrad(dy, x, (3, 1, 1, 1), workspace=device.array(np.ones((9, 9), np.float32))[:, ::2])
    with pytest.raises(TypeError, match=r"dy is a .* array and x a numpy array"):
        wgrad(dy, device.host(x), (3, 1, 1, 1))


def test_an_empty_batch_is_zero(device):
    dy, x = (device.array(np.ones((0, 3, 5, 6), np.float32)) for _ in range(2))
    for gradient in cuconv.depthwise_conv2d_wgrad(dy, x, (3, 1, 3, 3), padding=1, bias=True):
        np.testing.assert_array_equal(device.host(gradient), np.zeros(gradient.shape))


def test_tiles_refuse_what_they_do_not_take(device):
    dy, x = (device.array(np.ones((1, 1, 20, 20), np.float32)) for _ in range(2))
    with plan.variant("tiles"), pytest.raises(ValueError, match=r"variant tiles: takes more than 64 taps.* 3 x 3"):
        cuconv.depthwise_conv2d_wgrad(dy, x, (1, 1, 3, 3), padding=1)
    with plan.variant("tiles"), pytest.raises(ValueError, match=r"variant tiles: takes stride 1 and dilation 1.*2"):
        cuconv.depthwise_conv2d_wgrad(dy, x, (1, 1, 11, 11), padding=10, dilation=2)
