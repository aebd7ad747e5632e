"""The gradients of separable convolution: the reference against PyTorch's own differentiation in float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from test_pointwise import LAYOUTS, TORCH
from test_separable import CASES, ROUNDOFF, numbers_of, random_arrays
from torch.nn import functional

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
