"""depthwise_images: planes whose images are the rows of tensor-core products."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from geometries import numbers_of, random_dy

import cuconv
from cuconv import plan
from cuconv.geometry import depthwise_geometry

GEOMETRIES = {
    "7x7_5x5": ((17, 16, 7, 7), (16, 1, 5, 5), {"padding": 2}),
    "7x7_3x3_rest": ((5, 24, 7, 7), (24, 1, 3, 3), {"padding": 1}),
    "14x14_3x3": ((35, 6, 14, 14), (6, 1, 3, 3), {"padding": 1}),
    "14x14_7x7": ((16, 2, 14, 14), (2, 1, 7, 7), {"padding": 3}),
    "strided": ((3, 8, 9, 7), (8, 1, 3, 4), {"padding": ((1, 0), (2, 1)), "stride": (2, 1)}),
    "dilated": ((3, 3, 8, 8), (3, 1, 3, 2), {"padding": 2, "dilation": (2, 3)}),
    "valid": ((2, 8, 6, 5), (8, 1, 3, 3), {}),
    "one_pixel": ((20, 8, 1, 1), (8, 1, 3, 3), {"padding": 1}),
    "much_padding": ((2, 2, 4, 4), (2, 1, 2, 2), {"padding": ((6, 7), (5, 9))}),
    "28x28_3x3": ((2, 2, 28, 28), (2, 1, 3, 3), {"padding": 1}),
    "28x28_5x5": ((2, 2, 28, 28), (2, 1, 5, 5), {"padding": 2}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_forward(device, rng, name):
    x_shape, w_shape, numbers = GEOMETRIES[name]
    g = depthwise_geometry(x_shape, w_shape, **numbers)
    x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, "float16")
    out, guards = device.guarded(g.y_shape, x.dtype)
    with plan.variant("images"):
        y = cuconv.depthwise_conv2d(device.array(x), device.array(w), device.array(bias), out=out, **numbers)
    oracle.assert_within_bound(device.host(y), x, w, bias, **numbers_of(g))
    guards.assert_untouched()
