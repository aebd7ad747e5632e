"""Arrays of more than 2^31 elements: on the host the last block alone, over memory that is never touched elsewhere."""

from __future__ import annotations

import sys
from dataclasses import replace

import hostcuda
import numpy as np
import oracle
import pytest
from backends import forget_kernels

import cuconv
from cuconv import kernels, plan

# All just beyond 2^31 elements of x and of y.
SHAPES = {"one_plane": (1, 1, 1_074_000, 2000), "many_planes": (46_400, 725, 8, 8)}
CHANNELS_LAST_SHAPES = {"one_image": (1, 40, 26_850, 2000), "many_images": (46_400, 728, 8, 8)}


@pytest.fixture
def last_block_alone(monkeypatch):
    """Kernels run on the host, the last block of each alone."""
    if not hostcuda.available():
        pytest.skip("no g++: kernels do not run on the host")
    monkeypatch.setitem(sys.modules, "cupy", hostcuda.cupy_twin)
    forget_kernels()
    with hostcuda.simulate(blocks=slice(-1, None), poison=False):
        yield
    forget_kernels()


def zeros_with_a_random_end(rng, shape, count=8 * 8 * 2000):
    """Pages that nobody writes take no memory."""
    array = np.zeros(shape, np.float16)
    assert array.size > 2**31
    end = array.reshape(-1)[-count:]
    end[...] = rng.standard_normal(end.shape)
    return array.view(hostcuda.cupy_twin.ndarray)


def random_w(rng, channels, R, S):
    return hostcuda.cupy_twin.asarray(rng.standard_normal((channels, 1, R, S)).astype(np.float16))


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def large(request, last_block_alone, rng):
    """An array that ends in random numbers, and w."""
    return zeros_with_a_random_end(rng, request.param), random_w(rng, request.param[1], 2, 1)


@pytest.fixture(params=CHANNELS_LAST_SHAPES.values(), ids=CHANNELS_LAST_SHAPES)
def large_channels_last(request, last_block_alone, rng):
    """As large, channels-last."""
    N, C, H, W = request.param
    return zeros_with_a_random_end(rng, (N, H, W, C)).transpose(0, 3, 1, 2), random_w(rng, C, 2, 1)


@pytest.mark.parametrize("variant", ["direct", "runs", "toeplitz"])
def test_the_last_block_of_a_large_convolution(large, variant):
    x, w = large
    with plan.variant(variant):
        y = cuconv.depthwise_conv2d(x, w)
    # The last 8 columns of the last row belong to the last block of every variant.
    last = (np.asarray(a) for a in (y[-1:, -1:, -1:, -8:], x[-1:, -1:, -2:, -8:], w[-1:]))
    oracle.assert_within_bound(*last)


@pytest.mark.parametrize("variant", ["direct", "runs", "toeplitz"])
def test_the_last_block_of_a_large_dgrad(large, variant):
    dy, w = large
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(dy, w, (*dy.shape[:2], dy.shape[2] + 1, dy.shape[3]))
    # The last row of dx is the last row of dy times the last row of w.
    exact = np.asarray(dy[-1, -1, -1, -8:], np.float64) * float(w[-1, 0, 1, 0])
    np.testing.assert_array_equal(np.asarray(dx[-1, -1, -1, -8:]), exact.astype(np.float16))


def test_the_last_block_of_a_large_kernel(large, rng):
    x, _ = large
    w = random_w(rng, x.shape[1], 8, 9)
    with plan.variant("tiles"):
        y = cuconv.depthwise_conv2d(x, w, padding=((7, 0), (8, 0)))
    assert y.size > 2**31
    last = np.asarray(x[-1:, -1:, -8:, -9:])
    padding = ((0, 0), (9 - last.shape[3], 0))
    oracle.assert_within_bound(np.asarray(y[-1:, -1:, -1:, -1:]), last, np.asarray(w[-1:]), padding=padding)


def test_the_last_unit_of_many_images(last_block_alone, rng):
    """On so many multiprocessors that every unit has a block of its own."""
    x = zeros_with_a_random_end(rng, SHAPES["many_planes"])
    w = random_w(rng, x.shape[1], 2, 1)
    g = cuconv.geometry.depthwise_geometry(x.shape, w.shape, padding=((1, 0), (0, 0)))
    chosen = plan.depthwise_forward(g, "float16", replace(plan.TARGETS[90], multiprocessors=10**6), "images")
    y = np.zeros(g.y_shape, np.float16).view(hostcuda.cupy_twin.ndarray)
    kernels.load(chosen, 0)(x.data.ptr, w.data.ptr, 0, y.data.ptr)
    last = (np.asarray(a) for a in (y[-1:, -1:], x[-1:, -1:], w[-1:]))
    oracle.assert_within_bound(*last, padding=((1, 0), (0, 0)))


@pytest.mark.parametrize(
    "variant", ["direct", "channels_last", "channels_last_staged", "channels_last_mma", "channels_last_runs"]
)
def test_the_last_block_of_a_large_channels_last_convolution(large_channels_last, variant):
    x, w = large_channels_last
    with plan.variant(variant):
        y = cuconv.depthwise_conv2d(x, w)
    # The last channels of the last pixel belong to the last block of every variant.
    last = (np.asarray(a) for a in (y[-1:, -8:, -1:, -1:], x[-1:, -8:, -2:, -1:], w[-8:]))
    oracle.assert_within_bound(*last)


@pytest.mark.parametrize(
    "variant", ["direct", "channels_last", "channels_last_staged", "channels_last_mma", "channels_last_runs"]
)
def test_the_last_block_of_a_large_channels_last_dgrad(large_channels_last, variant):
    dy, w = large_channels_last
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(dy, w, (*dy.shape[:2], dy.shape[2] + 1, dy.shape[3]))
    exact = np.asarray(dy[-1, -8:, -1, -1], np.float64) * np.asarray(w[-8:, 0, 1, 0], np.float64)
    np.testing.assert_array_equal(np.asarray(dx[-1, -8:, -1, -1]), exact.astype(np.float16))


# Of dy, few enough for the last block of every variant to take them all.
WGRAD_END = 64


def assert_last_dw(dy, x, variant):
    """Of the last channel's kernel of 2 x 1 the last tap, which meets x where dy is; blocks that do not run would leave
    sums of zero."""
    workspace = np.zeros(2**28, np.uint8).view(hostcuda.cupy_twin.ndarray)
    w_shape, padding = (x.shape[1], 1, 2, 1), ((1, 0), (0, 0))
    with plan.variant(variant):
        dw = cuconv.depthwise_conv2d_wgrad(dy, x, w_shape, padding=padding, workspace=workspace)
    last = (np.asarray(a[-4:, -1:, -8:]) for a in (dy, x))
    oracle.assert_wgrad_within_bound(np.asarray(dw[-1:, :, 1:]), None, *last)


@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_the_last_block_of_a_large_wgrad(large, rng, variant):
    x, _ = large
    assert_last_dw(zeros_with_a_random_end(rng, x.shape, WGRAD_END), x, variant)


@pytest.mark.parametrize("variant", ["direct", "channels_last", "channels_last_runs"])
def test_the_last_block_of_a_large_channels_last_wgrad(large_channels_last, rng, variant):
    x, _ = large_channels_last
    N, C, H, W = x.shape
    assert_last_dw(zeros_with_a_random_end(rng, (N, H, W, C), WGRAD_END).transpose(0, 3, 1, 2), x, variant)


@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_more_than_2_to_the_31_elements_on_a_gpu(gpu, rng, variant):
    cupy = gpu.module
    x = cupy.empty((33, 1024, 256, 256), np.float16)
    x[...] = cupy.asarray(rng.standard_normal((1, 1, 256, 256)).astype(np.float16))
    x[32, 1023] = cupy.asarray(rng.standard_normal((256, 256)).astype(np.float16))
    w = rng.standard_normal((1024, 1, 3, 3)).astype(np.float16)
    assert x.size > 2**31
    with plan.variant(variant):
        y = cuconv.depthwise_conv2d(x, cupy.asarray(w), padding=1)
    for image, channel in ((0, 0), (31, 1000), (32, 1023)):
        part = gpu.host(x[image, channel])[None, None]
        result = gpu.host(y[image, channel])[None, None]
        oracle.assert_within_bound(result, part, w[channel : channel + 1], padding=((1, 1), (1, 1)))
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(x, cupy.asarray(w), x.shape, padding=1, out=y)
    for image, channel in ((0, 0), (31, 1000), (32, 1023)):
        part = gpu.host(x[image, channel])[None, None]
        result = gpu.host(dx[image, channel])[None, None]
        oracle.assert_dgrad_within_bound(result, part, w[channel : channel + 1], padding=((1, 1), (1, 1)))
    # So that float16 holds sums of two million products.
    y *= y.dtype.type(2.0**-8)
    with plan.variant(variant):
        dw, dbias = cuconv.depthwise_conv2d_wgrad(y, x, w.shape, padding=1, bias=True)
    for channel in (0, 1000, 1023):
        dy, part = (gpu.host(a[:, channel])[:, None] for a in (y, x))
        gradients = (gpu.host(a[channel : channel + 1]) for a in (dw, dbias))
        oracle.assert_wgrad_within_bound(*gradients, dy, part, padding=((1, 1), (1, 1)))
