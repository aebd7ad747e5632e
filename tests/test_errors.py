"""The error bound: right results pass it, planted faults do not; and the arithmetic around it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

from cuconv import (
    depthwise_conv2d,
    errors,
    measure,
    pointwise_conv2d,
    pointwise_conv2d_wgrad,
    reference,
    separable_conv2d,
)
from cuconv.cases import Case
from cuconv.geometry import (
    Conv2dGeometry,
    SeparableGeometry,
    depthwise_geometry,
    pointwise_geometry,
    separable_geometry,
)

CASE = Case("", 2, 5, 23, 31, 3, 5, stride=(2, 1), padding=(1, 3), dilation=(1, 2), bias=True)
DTYPES = ("float16", "bfloat16", "float32", "float64")


def problem(dtype: str, scale: float = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, Conv2dGeometry]:
    x, w = (measure.random_array(shape, dtype, seed) for seed, shape in enumerate(CASE.shapes))
    return x * x.dtype.type(scale), w, measure.random_array((CASE.C,), dtype, 2), CASE.geometry


@pytest.mark.parametrize("scale", [1, 64, 2.0**-10])
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_results_pass(dtype: str, scale: float) -> None:
    x, w, bias, geometry = problem(dtype, scale)
    y = depthwise_conv2d(x, w, bias, **CASE.options)
    assert 0 < errors.forward_error(y, x, w, bias, geometry) <= 1


def test_depth_multiplier_passes() -> None:
    x = measure.random_array((2, 3, 7, 9), "float32", 0)
    w = measure.random_array((6, 1, 3, 2), "float32", 1)
    y = depthwise_conv2d(x, w)
    geometry = replace(Case("", 2, 3, 7, 9, 3, 2, stride=1, padding=0, dilation=1).geometry, K=6)
    assert errors.forward_error(y, x, w, None, geometry) <= 1
    assert errors.slice_error(y, x, w, None, geometry) <= 1
    assert errors.forward_error(y[:, ::-1].copy(), x, w, None, geometry) > 1


def test_float16_subnormal_results_pass() -> None:
    x, w, _, geometry = problem("float16")
    x = x * np.float16(2.0**-14)
    w = w * np.float16(2.0**-8)
    y = depthwise_conv2d(x, w, **CASE.options)
    assert 0 < np.abs(y).max() < 2.0**-14
    assert errors.forward_error(y, x, w, None, geometry) <= 1


def test_float32_results_flushed_to_zero_pass() -> None:
    x, w, _, geometry = problem("float32")
    x = x * np.float32(2.0**-100)
    w = w * np.float32(2.0**-24)
    y = depthwise_conv2d(x, w, **CASE.options)
    flushed = np.where(np.abs(y) < np.finfo(np.float32).tiny, np.float32(0), y)
    assert (flushed != y).any()
    assert errors.forward_error(flushed, x, w, None, geometry) <= 1


def to_tf32(array: np.ndarray) -> np.ndarray:
    """float32 with 10 bits after the point, as tensor cores take it."""
    return ((array.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def test_tf32_inputs_are_caught() -> None:
    x, w, bias, geometry = problem("float32")
    y = depthwise_conv2d(to_tf32(x), to_tf32(w), bias, **CASE.options)
    assert errors.forward_error(y, x, w, bias, geometry) > 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_in_16_bits_are_caught(dtype: str) -> None:
    x, w, bias, geometry = problem(dtype)
    y = np.zeros(geometry.y_shape, x.dtype)
    for r in range(geometry.R):
        for s in range(geometry.S):
            tap = np.zeros_like(w)
            tap[:, :, r, s] = w[:, :, r, s]
            y = y + depthwise_conv2d(x, tap, **CASE.options)
    assert errors.forward_error(y + bias.reshape(-1, 1, 1), x, w, bias, geometry) > 1


def test_rounding_before_the_bias_is_caught() -> None:
    x, w, bias, geometry = problem("float16")
    y = depthwise_conv2d(x, w, **CASE.options) + bias.reshape(-1, 1, 1)
    assert errors.forward_error(y, x, w, bias, geometry) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["one tap off", "a tap by 1 %", "last column", "last image", "shifted", "no bias"])
def test_faults_are_caught(dtype: str, fault: str) -> None:
    x, w, bias, geometry = problem(dtype)
    wrong = w.copy()
    if fault == "one tap off":
        wrong[3, 0, 2, 4] = 0
    if fault == "a tap by 1 %":
        wrong[3, 0, 2, 4] *= w.dtype.type(1.01)
    y = depthwise_conv2d(x, wrong, None if fault == "no bias" else bias, **CASE.options)
    if fault == "last column":
        y[..., -1] = y[..., -2]
    if fault == "last image":
        y[-1] = y[0]
    if fault == "shifted":
        y = np.roll(y, 1, axis=-1)
    assert errors.forward_error(y, x, w, bias, geometry) > 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_not_finite() -> None:
    x, w, bias, geometry = problem("float32")
    x[0, 0, 10, 10] = np.nan
    x[1, 2, 10, 10] = np.inf
    y = depthwise_conv2d(x, w, bias, **CASE.options)
    assert np.isnan(y).any()
    assert np.isinf(y).any()
    assert errors.forward_error(y, x, w, bias, geometry) <= 1
    for value, other in ((np.nan, 0), (np.inf, -np.inf), (np.inf, 0), (np.inf, np.nan)):
        wrong = y.copy()
        found = np.isnan(y) if np.isnan(value) else y == value
        wrong.flat[np.flatnonzero(found)[0]] = other
        assert errors.forward_error(wrong, x, w, bias, geometry) == np.inf
    for value in (np.nan, np.inf):
        wrong = y.copy()
        wrong[0, -1, -1, -1] = value
        assert errors.forward_error(wrong, x, w, bias, geometry) == np.inf


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_overflow_is_an_infinity() -> None:
    x, w, bias, geometry = problem("float16")
    x[0, 1] = 30000
    w[1] = 2
    y = depthwise_conv2d(x, w, bias, **CASE.options)
    assert np.isinf(y).any()
    assert errors.forward_error(y, x, w, bias, geometry) <= 1
    assert errors.forward_error(np.clip(y, -65504, 65504), x, w, bias, geometry) > 1


def test_mostly_zeros_mean_nothing() -> None:
    # Terms that cancel: within the bound, zero is as right as anything.
    case = Case("", 1, 1, 4, 400, 1, 200, stride=1, padding=0, dilation=1)
    x = np.full(case.shapes[0], 1e4, np.float32)
    w = np.full(case.shapes[1], 1e4, np.float32) * np.where(np.arange(200) % 2, -1, 1).astype(np.float32)
    w[..., 0] += np.float32(0.01)
    y = depthwise_conv2d(x, w)
    assert errors.forward_error(y, x, w, None, case.geometry) <= 1
    assert errors.forward_error(0 * y, x, w, None, case.geometry) == np.inf


def test_wrong_shape_and_empty_batch() -> None:
    x, w, bias, geometry = problem("float32")
    y = depthwise_conv2d(x, w, bias, **CASE.options)
    with pytest.raises(ValueError, match="shape"):
        errors.forward_error(y[:1], x, w, bias, geometry)
    assert errors.forward_error(y[:0], x[:0], w, bias, replace(geometry, N=0)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_slice_error_asks_for_every_element(dtype: str) -> None:
    x, w, bias, geometry = problem(dtype)
    y = np.empty(geometry.y_shape, x.dtype)
    errors.poison(y)
    assert np.isnan(y).all()
    depthwise_conv2d(x, w, bias, out=y, **CASE.options)
    assert errors.slice_error(y, x, w, bias, geometry) <= 1
    for n, c in ((0, 0), (-1, -1), (0, -1)):
        wrong = y.copy()
        wrong[n, c, -1, -1] += wrong.dtype.type(0.1)
        assert errors.slice_error(wrong, x, w, bias, geometry) > 1
    errors.poison(y[0, 3, 2:3])  # a channel of which no value is looked at
    assert errors.slice_error(y, x, w, bias, geometry) == np.inf


# Odd sizes, rows that no output reads, taps that read only padding, more padding than the kernel reaches.
DGRAD_CASES = {
    "stride": CASE.geometry,
    "plain": Case("", 2, 3, 7, 9, 3, 2, stride=1, padding=0, dilation=1).geometry,
    "multiplier": depthwise_geometry((2, 3, 8, 9), (6, 1, 3, 2), stride=(2, 3), padding=1),
    "asymmetric": depthwise_geometry((3, 2, 9, 11), (2, 1, 4, 3), stride=(3, 2), padding=((0, 2), (3, 1))),
    "dilation": depthwise_geometry((1, 6, 17, 16), (12, 1, 3, 4), stride=(2, 3), padding=(4, 2), dilation=(3, 2)),
    "gaps": depthwise_geometry((2, 2, 15, 13), (2, 1, 2, 1), stride=(4, 3)),
    "padded": depthwise_geometry((2, 2, 3, 2), (2, 1, 2, 3), padding=((5, 4), (2, 6))),
}


def gradient_of_x(dy: np.ndarray, w: np.ndarray, geometry: Conv2dGeometry) -> np.ndarray:
    """By PyTorch's autograd in float64, rounded once to the dtype of dy."""
    (top, bottom), (left, right) = geometry.padding
    x = torch.zeros(geometry.x_shape, dtype=torch.float64, requires_grad=True)
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    weights, gradient = (torch.from_numpy(array.astype(np.float64)) for array in (w, dy))
    y = torch.nn.functional.conv2d(
        padded, weights, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.C
    )
    y.backward(gradient)
    return reference.rounded(x.grad.numpy(), dy.dtype)


def dgrad_problem(name: str, dtype: str) -> tuple[np.ndarray, np.ndarray, Conv2dGeometry]:
    geometry = DGRAD_CASES[name]
    dy = measure.random_array(geometry.y_shape, dtype, 0)
    return dy, measure.random_array(geometry.w_shape, dtype, 1), geometry


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DGRAD_CASES)
def test_right_dgrad_passes(name: str, dtype: str) -> None:
    dy, w, geometry = dgrad_problem(name, dtype)
    dx = gradient_of_x(dy, w, geometry)
    assert dx.any()
    assert 0 < errors.dgrad_error(dx, dy, w, geometry) <= 1
    assert 0 < errors.dgrad_slice_error(dx, dy, w, geometry) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["stride", "multiplier", "asymmetric", "dilation"])
@pytest.mark.parametrize("fault", ["one tap off", "a tap by 1 %", "all by 1 %", "shifted", "last row", "last image"])
def test_dgrad_faults_are_caught(fault: str, name: str, dtype: str) -> None:
    dy, w, geometry = dgrad_problem(name, dtype)
    dy, w = (array.copy() for array in (dy, w))
    given, weights = dy.copy(), w.copy()
    if fault == "one tap off":
        weights[-1, 0, -1, -1] = 0
    if fault == "a tap by 1 %":
        weights[-1, 0, 1, -1] *= w.dtype.type(1.01)
    if fault == "all by 1 %":
        weights *= w.dtype.type(1.01)
    if fault == "shifted":
        given = np.roll(dy, 1, axis=-1)
    dx = gradient_of_x(given, weights, geometry)
    if fault == "last row":
        dx[:, :, np.flatnonzero(dx.any(axis=(0, 1, 3)))[-1]] = 0
    if fault == "last image":
        dx[-1] = np.roll(dx[-1], 1, axis=0)
    assert errors.dgrad_error(dx, dy, w, geometry) > 1


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dy", "dx"),
    [
        ([1, np.inf], 1, 0, [3, 5], [np.nan, np.inf, np.inf]),
        ([np.inf, 1], 1, 0, [3, 5], [np.inf, np.inf, np.nan]),
        ([np.inf, 1, 2], 2, ((0, 0), (1, 0)), [3, 5], [3, np.inf, 5, np.nan, 0]),
    ],
)
def test_zeros_take_part_in_dgrad(kernel: list, stride: int, padding: object, dy: list, dx: list) -> None:
    w, dy, dx = (np.array(values, np.float32).reshape(1, 1, 1, -1) for values in (kernel, dy, dx))
    geometry = depthwise_geometry(dx.shape, w.shape, stride=(1, stride), padding=padding)
    assert errors.dgrad_error(dx, dy, w, geometry) <= 1
    assert errors.dgrad_error(np.nan_to_num(dx, nan=0, posinf=np.inf), dy, w, geometry) == np.inf


def test_dgrad_slice_error_asks_for_every_element() -> None:
    dy, w, geometry = dgrad_problem("dilation", "float32")
    dx = gradient_of_x(dy, w, geometry)
    for c in (0, -1):
        wrong = dx.copy()
        wrong[-1, c, -1, -1] += np.float32(0.1)
        assert errors.dgrad_slice_error(wrong, dy, w, geometry) > 1
    errors.poison(dx[0, 4, 2:3])  # a channel of which no value is looked at
    assert errors.dgrad_slice_error(dx, dy, w, geometry) == np.inf


def pointwise_problem(dtype: str) -> tuple[np.ndarray, ...]:
    x = measure.random_array((3, 20, 7, 9), dtype, 0)
    w, bias = measure.random_array((10, 20, 1, 1), dtype, 1), measure.random_array((10,), dtype, 2)
    return pointwise_conv2d(x, w, bias, stride=(2, 1)), x, w, bias


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise_slice_error(dtype: str) -> None:
    y, x, w, bias = pointwise_problem(dtype)
    g = pointwise_geometry(x.shape, w.shape, stride=(2, 1))
    assert 0 < errors.pointwise_slice_error(y, x, w, bias, g) <= 1
    assert errors.pointwise_slice_error(y, x, w, None, g) > 1
    for n, k, p in ((0, 0, 0), (-1, -1, -1), (0, 3, 1)):
        wrong = y.copy()
        wrong[n, k, p, -1] += wrong.dtype.type(0.5)
        assert errors.pointwise_slice_error(wrong, x, w, bias, g) > 1
    weights = w.copy()
    weights[9, 17] *= w.dtype.type(1.1)
    assert errors.pointwise_slice_error(pointwise_conv2d(x, weights, bias, stride=(2, 1)), x, w, bias, g) > 1
    errors.poison(y[0, 4, 2:3])  # a channel of which no value is looked at
    assert errors.pointwise_slice_error(y, x, w, bias, g) == np.inf


def as_tf32(array: np.ndarray) -> np.ndarray:
    """float32 cut off after 10 bits of the fraction."""
    return (array.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def test_tf32_is_told_from_float32() -> None:
    _, x, w, bias = pointwise_problem("float32")
    g = pointwise_geometry(x.shape, w.shape, stride=(2, 1))
    rough = pointwise_conv2d(as_tf32(x * (1 + 2.0**-11)), as_tf32(w * (1 + 2.0**-11)), bias, stride=(2, 1))
    assert errors.pointwise_slice_error(rough, x, w, bias, g) > 1
    assert 0 < errors.pointwise_slice_error(rough, x, w, bias, g, tf32=True) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise_wgrad_slice_error(dtype: str) -> None:
    _, x, w, _ = pointwise_problem(dtype)
    dy = measure.random_array((3, 10, 7, 9), dtype, 3)
    dw, dbias = pointwise_conv2d_wgrad(dy, x, w.shape, bias=True)
    assert 0 < errors.pointwise_wgrad_slice_error(dw, dbias, dy, x) <= 1
    assert errors.pointwise_wgrad_slice_error(dw, dbias, dy[:, ::-1], x) > 1
    assert errors.pointwise_wgrad_slice_error(dw, dbias * dbias.dtype.type(1.1), dy, x) > 1
    assert errors.pointwise_wgrad_slice_error(dw.swapaxes(0, 1).reshape(dw.shape), None, dy, x) > 1
    errors.poison(dw[1:2])
    assert errors.pointwise_wgrad_slice_error(dw, dbias, dy, x) == np.inf


# Strides, dilations and multipliers of both axes, and padding that rows at the ends meet.
SEPARABLE_CASES = {
    "stride": ((2, 4, 9, 11), (4, 1, 3, 2), {"stride": (2, 1), "padding": (1, 2)}),
    "multiplier": ((3, 5, 8, 7), (10, 1, 2, 3), {"padding": ((0, 1), (2, 0)), "dilation": (1, 2)}),
    "plain": ((1, 6, 6, 6), (6, 1, 3, 3), {}),
}


def separable_problem(name: str, dtype: str) -> tuple[list[np.ndarray], dict, SeparableGeometry]:
    x_shape, w_shape, options = SEPARABLE_CASES[name]
    shapes = (x_shape, w_shape, (7, w_shape[0]), (w_shape[0],), (7,))
    arrays = [measure.random_array(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    return arrays, options, separable_geometry(*shapes[:3], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEPARABLE_CASES)
def test_separable_slice_error(name: str, dtype: str) -> None:
    arrays, options, g = separable_problem(name, dtype)
    y = separable_conv2d(*arrays, **options)
    assert 0 < errors.separable_slice_error(y, *arrays, g) <= 1
    assert errors.separable_slice_error(y, *arrays[:3], None, arrays[4], g) > 1
    assert errors.separable_slice_error(y, *arrays[:4], None, g) > 1
    x, w = arrays[0], arrays[1].copy()
    w[-1, 0, -1, -1] *= w.dtype.type(1.5)
    assert errors.separable_slice_error(separable_conv2d(x, w, *arrays[2:], **options), *arrays, g) > 1
    errors.poison(y[0, 1, 2:3])  # a channel of which no value is looked at
    assert errors.separable_slice_error(y, *arrays, g) == np.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", SEPARABLE_CASES)
def test_separable_gradients_slice_error(name: str, dtype: str) -> None:
    arrays, _, g = separable_problem(name, dtype)
    dy = measure.random_array(g.y_shape, dtype, 5)
    every = frozenset(("x", "depthwise_w", "pointwise_w", "depthwise_bias", "pointwise_bias"))
    gradients = list(reference.separable_conv2d_backward(dy, *arrays, g, None, None, every))
    given = dy, *arrays[:4], g
    assert 0 < errors.separable_gradients_slice_error(gradients, *given) <= 1
    for i, gradient in enumerate(gradients):
        wrong = [*gradients]
        wrong[i] = gradient * gradient.dtype.type(1.5)
        assert errors.separable_gradients_slice_error(wrong, *given) > 1
        errors.poison(wrong[i])
        assert errors.separable_gradients_slice_error(wrong, *given) == np.inf
    assert 0 < errors.separable_gradients_slice_error([*gradients[:3], None, None], *given) <= 1


WGRAD_CASES = {
    "stride": depthwise_geometry((3, 5, 9, 12), (5, 1, 3, 2), stride=(2, 1), padding=((1, 0), (0, 2))),
    "multiplier": depthwise_geometry((2, 6, 7, 8), (12, 1, 2, 3), padding=1),
    "dilation": depthwise_geometry((2, 7, 11, 9), (7, 1, 3, 2), dilation=(2, 3), padding=((2, 1), (0, 3))),
}


def wgrad_problem(name: str, dtype: str) -> tuple[np.ndarray, ...]:
    """dy, x and, from PyTorch in float64, dw and dbias."""
    g = WGRAD_CASES[name]
    dy, x = (measure.random_array(shape, dtype, seed) for seed, shape in enumerate((g.y_shape, g.x_shape)))
    numbers = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
    return dy, x, *(gradient.astype(dy.dtype) for gradient in oracle.wgrad(dy, x, g.w_shape, **numbers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WGRAD_CASES)
def test_right_wgrad_passes(name: str, dtype: str) -> None:
    dy, x, dw, dbias = wgrad_problem(name, dtype)
    for error in (errors.wgrad_error, errors.wgrad_slice_error):
        assert 0 < error(dw, dbias, dy, x, WGRAD_CASES[name]) <= 1
        assert 0 < error(dw, None, dy, x, WGRAD_CASES[name]) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WGRAD_CASES)
@pytest.mark.parametrize("fault", ["a tap by 2 %", "a tap of another", "bias by 2 %", "an image less", "unwritten"])
def test_wgrad_faults_are_caught(fault: str, name: str, dtype: str) -> None:
    dy, x, dw, dbias = wgrad_problem(name, dtype)
    more = dw.dtype.type(1.02)
    if fault == "a tap by 2 %":
        dw[-1, 0, 1, -1] *= more
    if fault == "a tap of another":
        dw[0, 0, 0] = dw[0, 0, 0, ::-1]
    if fault == "bias by 2 %":
        dbias[-1] *= more
    if fault == "an image less":
        dbias -= dy[0].astype(np.float64).sum(axis=(1, 2)).astype(dbias.dtype)
    if fault == "unwritten":
        errors.poison(dw[1:2])
    assert errors.wgrad_slice_error(dw, dbias, dy, x, WGRAD_CASES[name]) > 1
