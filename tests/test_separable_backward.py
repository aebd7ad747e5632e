"""The gradients of separable convolution: the reference against PyTorch's own differentiation in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import oracle
import pytest
import torch
from test_pointwise import LAYOUTS, TORCH
from test_separable import CASES, ROUNDOFF, numbers_of, random_arrays
from torch.nn import functional

import cuconv
from cuconv import kernels, plan, reference
from cuconv.geometry import separable_geometry
from cuconv.plan import separable

NAMES = ("x", "depthwise_w", "pointwise_w", "depthwise_bias", "pointwise_bias")


def exact_gradients(dy, arrays, activations, numbers):
    x, w, pointwise, bias, pointwise_bias = leaves = [
        torch.from_numpy(np.asarray(a, np.float64)).requires_grad_() for a in arrays
    ]
    (top, bottom), (left, right) = numbers["padding"]
    padded = functional.pad(x, (left, right, top, bottom))
    of = [TORCH.get(activation, lambda a: a) for activation in activations]
    middle = of[0](functional.conv2d(padded, w, bias, numbers["stride"], 0, numbers["dilation"], groups=x.shape[1]))
    y = of[1](functional.conv2d(middle, pointwise, pointwise_bias))
    y.backward(torch.from_numpy(np.asarray(dy, np.float64)))
    return [leaf.grad.numpy() for leaf in leaves]


@pytest.mark.parametrize("activations", [(None, None), ("relu6", "silu"), ("gelu", "hardswish"), ("silu", None)])
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_derivative(rng, name, activations):
    # In float64 what is in between is not rounded.
    arrays = random_arrays(rng, name, "float64")
    g = separable_geometry(arrays[0].shape, arrays[1].shape, arrays[2].shape, **numbers_of(name))
    dy = rng.standard_normal(g.y_shape)
    got = reference.separable_conv2d_backward(dy, *arrays, g, *activations, frozenset(NAMES))
    for gradient, exact in zip(got, exact_gradients(dy, arrays, activations, numbers_of(name)), strict=True):
        np.testing.assert_allclose(gradient, exact, rtol=1e-10, atol=1e-10 * np.abs(exact).max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_pointwise_weights_needs_no_middle(device, rng, name, dtype, layout):
    x, w, pointwise, bias, _ = random_arrays(rng, name, dtype)
    numbers = numbers_of(name)
    g = separable_geometry(x.shape, w.shape, pointwise.shape, **numbers, channels_last=layout == "nhwc")
    dy = rng.standard_normal(g.y_shape).astype(x.dtype)
    epilogue = plan.SeparableEpilogue(depthwise_activation="relu")
    chosen = separable.wgrad(g, dtype, True, epilogue, device.target, aligned=True)
    workspace = device.module.empty(chosen.workspace_bytes, np.uint8)
    dw, guards = device.guarded(pointwise.shape[:2], x.dtype)
    dbias, _ = device.guarded((pointwise.shape[0],), x.dtype)
    read = [device.array(dy, layout), device.array(x, layout), device.array(w), device.array(bias)]
    kernels.load(chosen.sums, 0)(*(array.data.ptr for array in read), workspace.data.ptr)
    kernels.load(chosen.reduce, 0)(workspace.data.ptr, dw.data.ptr, dbias.data.ptr)
    z = oracle.convolve(x, w, bias, **numbers)
    middle = np.maximum(z, 0)
    magnitude = oracle.convolve(np.abs(x), np.abs(w), np.abs(bias), **numbers)
    of_sums = 2.0**-24 * (w.shape[2] * w.shape[3] + 2) * magnitude
    gradient, terms = np.asarray(dy, np.float64), dy.size // dy.shape[1]
    exact = np.einsum("nkpq,ncpq->kc", gradient, middle)
    roundoff = ROUNDOFF[dtype]
    slack = np.einsum("nkpq,ncpq->kc", np.abs(gradient), 2 * roundoff * middle + of_sums)
    slack += 2.0**-24 * (terms + 4) * np.einsum("nkpq,ncpq->kc", np.abs(gradient), middle)
    error = np.abs(device.host(dw).astype(np.float64) - exact)
    assert (error <= roundoff * np.abs(exact) + slack).all()
    assert np.count_nonzero(exact)
    oracle.assert_sum_within_bound(device.host(dbias), gradient.sum((0, 2, 3)), np.abs(gradient).sum((0, 2, 3)), terms)
    guards.assert_untouched()


@pytest.mark.parametrize("wanted", NAMES)
def test_only_what_is_asked_for_is_made(rng, wanted):
    arrays = random_arrays(rng, "3x3_padded", "float32")
    g = separable_geometry(arrays[0].shape, arrays[1].shape, arrays[2].shape, **numbers_of("3x3_padded"))
    dy = rng.standard_normal(g.y_shape).astype(np.float32)
    every = reference.separable_conv2d_backward(dy, *arrays, g, None, "relu", frozenset(NAMES))
    one = reference.separable_conv2d_backward(dy, *arrays, g, None, "relu", frozenset({wanted}))
    for name in NAMES:
        if name == wanted:
            np.testing.assert_array_equal(getattr(one, name), getattr(every, name))
            assert getattr(one, name).dtype == np.float32
        else:
            assert getattr(one, name) is None


def slopes(activation, z):
    z = torch.from_numpy(z).requires_grad_()
    value = z * 1.0 if activation is None else TORCH[activation](z)
    value.sum().backward()
    return value.detach().numpy(), z.grad.numpy()


def bounds_of_gradients(dy, arrays, activations, numbers):
    """Of every gradient how far rounding may bring it from exact_gradients: of the middle and its gradient twice their
    unit roundoff and the errors of their sums, of dy, where a slope is its factor, likewise, as sums pass them on; of
    the result its own roundoff. Slopes are at most 1.5 times as large as arguments move, away from their jumps."""
    name = arrays[0].dtype.name
    x, w, pointwise, bias, pointwise_bias = (np.asarray(a, np.float64) for a in arrays)
    dy = np.asarray(dy, np.float64)
    u, u_sum = ROUNDOFF[name], 2.0**-53 if name == "float64" else 2.0**-24
    taps, matrix = w.shape[2] * w.shape[3], pointwise[:, :, 0, 0]
    K, channels = matrix.shape

    def mixed(matrix, images):
        return np.einsum("kc,ncpq->nkpq", matrix, images)

    before = oracle.convolve(x, w, bias, **numbers)
    of_before = (taps + 17) * u_sum * oracle.convolve(np.abs(x), np.abs(w), np.abs(bias), **numbers)
    middle, slope = slopes(activations[0], before)
    of_middle = 1.5 * of_before + 2 * u * np.abs(middle)
    dz, of_dz = dy, 0 * dy
    if activations[1] is not None:
        z = mixed(matrix, middle) + pointwise_bias[:, None, None]
        magnitude = mixed(np.abs(matrix), np.abs(middle)) + np.abs(pointwise_bias)[:, None, None]
        of_z = mixed(np.abs(matrix), of_middle) + (channels + 17) * u_sum * magnitude + 2 * u * np.abs(z)
        slope_of_dz = slopes(activations[1], z)[1]
        dz = dy * slope_of_dz
        of_dz = 1.5 * np.abs(dy) * of_z + 2 * u * np.abs(dz)
    gradient = mixed(matrix.T, dz)
    of_gradient = mixed(np.abs(matrix).T, of_dz + (K + 17) * u_sum * np.abs(dz)) + 2 * u * np.abs(gradient)
    of_gradient = np.abs(slope) * of_gradient + 1.5 * of_before * np.abs(gradient)
    gradient = gradient * slope
    of_gradient += 2 * u * np.abs(gradient)

    terms = (dz.size // K + 17) * u_sum
    size = np.abs(gradient) + of_gradient
    dx = oracle.dgrad(of_gradient + (w.size // x.shape[1] + 17) * u_sum * size, np.abs(w), x.shape, **numbers)
    dw, dbias = oracle.wgrad(of_gradient + terms * size, np.abs(x), w.shape, **numbers)
    magnitude = np.abs(middle) + of_middle
    dpointwise = np.einsum("nkpq,ncpq->kc", of_dz + terms * np.abs(dz), magnitude)
    dpointwise += np.einsum("nkpq,ncpq->kc", np.abs(dz), of_middle)
    dpointwise_bias = (of_dz + terms * np.abs(dz)).sum((0, 2, 3))
    return dx, dw, dpointwise.reshape(pointwise.shape), dbias, dpointwise_bias


def assert_gradients(got, dy, arrays, activations, numbers):
    exact = exact_gradients(dy, arrays, activations, numbers)
    bounds = bounds_of_gradients(dy, arrays, activations, numbers)
    u = ROUNDOFF[arrays[0].dtype.name]
    for name, gradient, right, bound in zip(NAMES, got, exact, bounds, strict=True):
        assert gradient.shape == right.shape, name
        error = np.abs(np.asarray(gradient, np.float64) - right)
        ratio = error / (u * np.abs(right) + bound + 2.0**-24)
        assert ratio.max() <= 1, (
            f"{name} is at {np.unravel_index(ratio.argmax(), ratio.shape)} {ratio.max()} bounds off"
        )
        assert np.count_nonzero(right)


VARIANTS = ("recomputed", "stored", "pieces")


def suits(variant, name, dtype, layout):
    """Whether a variant can run a case: in place where the depthwise result is as large as x."""
    x_shape, w_shape, _, stride, padding, dilation = CASES[name]
    same = all(sum(p) == d * (k - 1) for p, d, k in zip(padding, dilation, w_shape[2:], strict=True))
    in_place = layout == "nchw" and stride == (1, 1) and same and w_shape[0] == x_shape[1]
    return variant == "pieces" or (in_place and (variant == "stored" or dtype != "float64"))


def on_device(device, arrays, layout):
    return [device.array(a, layout if i == 0 else "nchw") for i, a in enumerate(arrays)]


def all_cases():
    for name, dtype, layout, variant in product(CASES, oracle.DTYPES, LAYOUTS, VARIANTS):
        if suits(variant, name, dtype, layout):
            yield pytest.param(name, dtype, layout, variant, id=f"{name}-{dtype}-{layout}-{variant}")


@pytest.mark.parametrize(("name", "dtype", "layout", "variant"), list(all_cases()))
def test_every_variant_matches_float64(device, rng, name, dtype, layout, variant):
    arrays = random_arrays(rng, name, dtype)
    numbers = numbers_of(name)
    g = separable_geometry(arrays[0].shape, arrays[1].shape, arrays[2].shape, **numbers)
    dy = rng.standard_normal(g.y_shape).astype(arrays[0].dtype)
    given = on_device(device, arrays, layout)
    outs, guards = zip(
        *(device.guarded(a.shape, a.dtype, layout if i == 0 else "nchw") for i, a in enumerate(arrays)), strict=True
    )
    with plan.variant(variant):
        got = cuconv.separable_conv2d_backward(device.array(dy, layout), *given, **numbers, out=outs)
    assert all(a is b for a, b in zip(got, outs, strict=True))
    assert_gradients(list(map(device.host, got)), dy, arrays, (None, None), numbers)
    for guard in guards:
        guard.assert_untouched()
