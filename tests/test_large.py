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


@pytest.mark.skipif(not hostcuda.available(), reason="no g++: kernels do not run on the host")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_the_last_block_of_more_than_2_to_the_31_elements(monkeypatch, rng, shape, variant):
    monkeypatch.setitem(sys.modules, "cupy", hostcuda.cupy_twin)
    forget_kernels()
    x = np.zeros(shape, np.float16)  # pages that nobody writes take no memory
    part = x[-1:, -1:, -8:]
    part[...] = rng.standard_normal(part.shape)
    w = rng.standard_normal((shape[1], 1, 2, 1)).astype(np.float16)
    with hostcuda.simulate(blocks=slice(-1, None), poison=False), plan.variant(variant):
        y = cuconv.depthwise_conv2d(x.view(hostcuda.cupy_twin.ndarray), hostcuda.cupy_twin.asarray(w))
    forget_kernels()
    assert x.size > 2**31
    # The last 8 columns of the last row belong to the last block of every variant.
    oracle.assert_within_bound(np.asarray(y[-1:, -1:, -1:, -8:]), x[-1:, -1:, -2:, -8:], w[-1:])


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
