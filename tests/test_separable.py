"""Separable convolution, on the reference and on the kernels: see test_depthwise.py."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product

import numpy as np
import oracle
import pytest
import torch
from test_pointwise import LAYOUTS, TORCH, UNIT_ROUNDOFF

import cuconv
from cuconv import kernels, plan
from cuconv.geometry import separable_geometry

ROUNDOFF = {"float16": 2.0**-11, **UNIT_ROUNDOFF}
# x, depthwise w, K, stride, padding, dilation: strips that span a row and that do not, rows of whole vectors and of odd
# numbers, chunks of channels that are full and that are not, several tiles of output channels.
CASES = {
    "3x3_padded": ((2, 32, 9, 16), (32, 1, 3, 3), 24, (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "3x3_odd": ((2, 24, 7, 9), (24, 1, 3, 3), 40, (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "3x2_stride_2_1": ((3, 16, 9, 12), (16, 1, 3, 2), 16, (2, 1), ((1, 0), (0, 2)), (1, 1)),
    "3x3_stride_2": ((1, 40, 16, 16), (40, 1, 3, 3), 72, (2, 2), ((1, 1), (1, 1)), (1, 1)),
    "5x3_dilated": ((2, 16, 14, 17), (16, 1, 5, 3), 8, (1, 1), ((3, 4), (2, 1)), (2, 3)),
    "5x5": ((1, 72, 8, 24), (72, 1, 5, 5), 130, (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "multiplier_3": ((2, 6, 8, 9), (18, 1, 3, 2), 10, (1, 1), ((1, 1), (0, 1)), (1, 1)),
    "1x1": ((5, 16, 3, 3), (16, 1, 1, 1), 16, (1, 1), ((0, 0), (0, 0)), (1, 1)),
    # Several strips, the last one narrower, and tasks of an odd number of rows.
    "wide": ((2, 16, 5, 296), (16, 1, 3, 3), 40, (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "wide_odd": ((2, 24, 6, 147), (24, 1, 3, 3), 40, (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "tall": ((3, 48, 35, 8), (48, 1, 3, 3), 16, (1, 1), ((0, 2), (1, 1)), (1, 1)),
    "asymmetric": ((1, 16, 6, 16), (16, 1, 2, 4), 16, (1, 1), ((1, 0), (3, 0)), (1, 1)),
}


def random_arrays(rng, name, dtype):
    x_shape, w_shape, K, *_ = CASES[name]
    x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    pointwise = rng.standard_normal((K, w_shape[0], 1, 1)).astype(x.dtype)
    return x, w, pointwise, bias, rng.standard_normal(K).astype(x.dtype)


def numbers_of(name):
    return dict(zip(("stride", "padding", "dilation"), CASES[name][3:], strict=True))


def wide(array):
    return np.asarray(array, np.float64)


def assert_right(y, x, w, pointwise, bias, pointwise_bias, activations, numbers):
    """Both parts in float64, and what rounding may change: of the middle twice its unit roundoff and the error of its
    sums, as the pointwise part passes it on, and of the result as of any sum. No activation is steeper than 1.5."""
    name = x.dtype.name
    u, u_sum = ROUNDOFF[name], 2.0**-53 if name == "float64" else 2.0**-24
    z = oracle.convolve(x, w, bias, **numbers)
    magnitude = oracle.convolve(np.abs(x), np.abs(w), None if bias is None else np.abs(bias), **numbers)
    of = [TORCH.get(activation, lambda a: a) for activation in activations]
    middle = of[0](torch.from_numpy(z)).numpy()
    taps = w.shape[2] * w.shape[3]
    middle_error = 2 * u * np.abs(middle) + 1.5 * (taps + 17) * u_sum * magnitude
    matrix = wide(pointwise)[:, :, 0, 0]
    total = np.einsum("kc,ncpq->nkpq", matrix, middle)
    mixed = np.einsum("kc,ncpq->nkpq", np.abs(matrix), np.abs(middle) + middle_error)
    slack = np.einsum("kc,ncpq->nkpq", np.abs(matrix), middle_error) + (matrix.shape[1] + 17) * u_sum * mixed
    if pointwise_bias is not None:
        total = total + wide(pointwise_bias)[:, None, None]
        slack = slack + (matrix.shape[1] + 17) * u_sum * np.abs(wide(pointwise_bias))[:, None, None]
    exact = of[1](torch.from_numpy(total)).numpy()
    error = np.abs(wide(y) - exact)
    bound = u * np.abs(exact) + 1.5 * slack
    assert y.shape == exact.shape
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"
    assert np.count_nonzero(exact)


def suits(variant, name, dtype, layout):
    (_, C, _, _), (_, _, R, S), _, stride, _, dilation = CASES[name]
    if variant == "apart":
        return True
    if dtype == "float64":
        return False
    if variant == "fused":
        return True
    piece = 4 if dtype == "float32" else 8
    undilated = stride == dilation == (1, 1) and not name.startswith("multiplier")
    K = CASES[name][2]
    whole = C % piece == K % piece == 0 if layout == "nhwc" else S - 1 <= piece
    return undilated and whole and C * R * S < 1000


def all_cases():
    for name, dtype, layout, variant in product(CASES, oracle.DTYPES, LAYOUTS, ("fragments", "fused", "apart")):
        if not suits(variant, name, dtype, layout):
            continue
        yield pytest.param(name, dtype, layout, variant, id=f"{name}-{dtype}-{layout}-{variant}")


@pytest.mark.parametrize(("name", "dtype", "layout", "variant"), list(all_cases()))
def test_every_variant_matches_float64(device, rng, name, dtype, layout, variant):
    arrays = random_arrays(rng, name, dtype)
    x, w, pointwise, *_ = arrays
    g = separable_geometry(x.shape, w.shape, pointwise.shape, **numbers_of(name))
    out, guards = device.guarded(g.y_shape, x.dtype, layout)
    on_device = [device.array(a, layout if i == 0 else "nchw") for i, a in enumerate(arrays)]
    with plan.variant(variant):
        assert cuconv.separable_conv2d(*on_device, out=out, **numbers_of(name)) is out
        bare = cuconv.separable_conv2d(*on_device[:3], **numbers_of(name))
    assert_right(device.host(out), *arrays, (None, None), numbers_of(name))
    assert_right(device.host(bare), *arrays[:3], None, None, (None, None), numbers_of(name))
    guards.assert_untouched()


@pytest.mark.parametrize("columns", [24, 27])
@pytest.mark.parametrize(("dtype", "layout"), list(product(("float16", "float32"), LAYOUTS)))
def test_a_block_takes_many_rows_and_several_tasks(device, rng, monkeypatch, dtype, layout, columns):
    """More rows than the ring has slots, as a device of two multiprocessors takes them."""
    small = replace(device.target, multiprocessors=2)
    monkeypatch.setattr(kernels, "target", lru_cache(lambda device_id: small))
    x, w, bias = oracle.random_arrays(rng, (5, 16, 45, columns), (16, 1, 3, 3), dtype)
    pointwise = rng.standard_normal((8, 16, 1, 1)).astype(x.dtype)
    on_device = device.array(x, layout), device.array(w), device.array(pointwise), device.array(bias)
    numbers = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    with plan.variant("fragments"):
        y = cuconv.separable_conv2d(*on_device, padding=1)
    assert_right(device.host(y), x, w, pointwise, bias, None, (None, None), numbers)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_reference_matches_float64(rng, name, dtype):
    arrays = random_arrays(rng, name, dtype)
    y = cuconv.separable_conv2d(*arrays, **numbers_of(name))
    assert_right(y, *arrays, (None, None), numbers_of(name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["fragments", "fused", "apart"])
@pytest.mark.parametrize("activations", [("relu", "gelu"), ("silu", "relu6"), ("hardswish", None)])
def test_activations_follow_their_biases(device, rng, activations, variant, layout):
    arrays = random_arrays(rng, "3x3_padded", "float32")
    options = dict(zip(("depthwise_activation", "pointwise_activation"), activations, strict=True))
    on_device = [device.array(a, layout if i == 0 else "nchw") for i, a in enumerate(arrays)]
    with plan.variant(variant):
        y = cuconv.separable_conv2d(*on_device, **options, **numbers_of("3x3_padded"))
    assert_right(device.host(y), *arrays, activations, numbers_of("3x3_padded"))
    assert_right(
        cuconv.separable_conv2d(*arrays, **options, **numbers_of("3x3_padded")),
        *arrays,
        activations,
        numbers_of("3x3_padded"),
    )


@pytest.mark.parametrize("variant", ["fragments", "fused"])
@pytest.mark.parametrize(("dtype", "layout"), list(product(("float16", "float32"), LAYOUTS)))
def test_padding_takes_part_as_a_zero_and_nan_stays_where_it_is(device, rng, dtype, layout, variant):
    x, w, pointwise, _, _ = random_arrays(rng, "3x3_padded", dtype)
    w[3, 0, 0, 0] = np.inf
    x[1, 5, 4, 7] = np.nan
    on_device = device.array(x, layout), device.array(w), device.array(pointwise)
    with plan.variant(variant):
        y = device.host(cuconv.separable_conv2d(*on_device, padding=1)).astype(np.float64)
    middle = oracle.convolve(x, w, padding=((1, 1), (1, 1)))
    with np.errstate(invalid="ignore"):
        exact = np.einsum("kc,ncpq->nkpq", wide(pointwise)[:, :, 0, 0], middle)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(exact))
    # Infinite in the middle wherever the tap of infinity does not meet the padding.
    assert np.isinf(y).any()
    assert np.isnan(exact[:, :, 0]).all()
    assert not np.isnan(exact[0, :, 1:, 1:]).any()


def test_empty_batch(device):
    arrays = np.empty((0, 4, 6, 6), np.float32), np.ones((4, 1, 3, 3), np.float32), np.ones((8, 4), np.float32)
    y = cuconv.separable_conv2d(*map(device.array, arrays))
    assert y.shape == (0, 8, 4, 4)


X, D, P = np.ones((2, 3, 6, 5), np.float32), np.ones((6, 1, 3, 3), np.float32), np.ones((4, 6), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((X, D[:5], P), {}, ValueError, r"depthwise_w.shape\[0\] must be a multiple of x's 3 channels, and is 5"),
        ((X, D, P[:, :3]), {}, ValueError, r"pointwise_w.shape\[1\] must be its input's 6 channels, and is 3"),
        ((X, D, P, np.ones(3, np.float32)), {}, ValueError, r"depthwise_bias must have shape \(6,\)"),
        ((X, D, P, None, np.ones(6, np.float32)), {}, ValueError, r"pointwise_bias must have shape \(4,\)"),
        ((X, D, P.astype(np.float16)), {}, TypeError, "pointwise_w must have x's dtype"),
        ((X, D, P), {"depthwise_activation": "elu"}, ValueError, "depthwise_activation must be None or one of"),
        ((X, D, P), {"out": np.ones((2, 4, 6, 5), np.float32)}, ValueError, r"out must have the result's shape"),
    ],
)
def test_bad_input_is_refused(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        cuconv.separable_conv2d(*arguments, **options)
