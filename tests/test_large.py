"""Arrays of more than 2^31 elements: on the host the last block alone, over memory that is never touched elsewhere."""

from __future__ import annotations

import sys

import hostcuda
import numpy as np
import oracle
import pytest
from backends import forget_kernels

import cuconv
from cuconv import plan

# Both just beyond 2^31 elements of x and of y.
SHAPES = {"one_plane": (1, 1, 1_074_000, 2000), "many_planes": (46_400, 725, 8, 8)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def large(request, monkeypatch, rng):
    """An array of zeros with random numbers at its end, and w, for the kernels on the host: the last block alone."""
    if not hostcuda.available():
        pytest.skip("no g++: kernels do not run on the host")
    monkeypatch.setitem(sys.modules, "cupy", hostcuda.cupy_twin)
    forget_kernels()
    shape = request.param
    array = np.zeros(shape, np.float16)  # pages that nobody writes take no memory
    assert array.size > 2**31
    part = array[-1:, -1:, -8:]
    part[...] = rng.standard_normal(part.shape)
    w = rng.standard_normal((shape[1], 1, 2, 1)).astype(np.float16)
    with hostcuda.simulate(blocks=slice(-1, None), poison=False):
        yield array.view(hostcuda.cupy_twin.ndarray), hostcuda.cupy_twin.asarray(w)
    forget_kernels()


@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_the_last_block_of_a_large_convolution(large, variant):
    x, w = large
    with plan.variant(variant):
        y = cuconv.depthwise_conv2d(x, w)
    # The last 8 columns of the last row belong to the last block of every variant.
    last = (np.asarray(a) for a in (y[-1:, -1:, -1:, -8:], x[-1:, -1:, -2:, -8:], w[-1:]))
    oracle.assert_within_bound(*last)


@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_the_last_block_of_a_large_dgrad(large, variant):
    dy, w = large
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(dy, w, (*dy.shape[:2], dy.shape[2] + 1, dy.shape[3]))
    # The last row of dx is the last row of dy times the last row of w.
    exact = np.asarray(dy[-1, -1, -1, -8:], np.float64) * float(w[-1, 0, 1, 0])
    np.testing.assert_array_equal(np.asarray(dx[-1, -1, -1, -8:]), exact.astype(np.float16))


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
