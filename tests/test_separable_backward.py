"""The gradients of separable convolution: the reference against PyTorch's own differentiation in float64."""

from __future__ import annotations

import sys
import tracemalloc
from itertools import product

import hostcuda
import numpy as np
import oracle
import pytest
import torch
from backends import forget_kernels
from test_pointwise import LAYOUTS, TORCH
from test_separable import CASES, ROUNDOFF, D, P, X, numbers_of, random_arrays
from torch.nn import functional

import cuconv
from cuconv import kernels, plan, reference
from cuconv.geometry import depthwise_geometry, separable_geometry
from cuconv.plan import separable, separable_backward

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
    in_place = stride == (1, 1) and same and w_shape[0] == x_shape[1]
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


# x, w, padding, dilation of convolutions whose result is as large as x: planes that are cut into chunks of rows, the
# last of them short, chunks and planes that start at any element, columns of several turns of the threads.
SAME = {
    "3x3": ((2, 5, 37, 29), (3, 3), ((1, 1), (1, 1)), (1, 1)),
    "5x3_dilated": ((3, 4, 41, 24), (5, 3), ((4, 4), (3, 1)), (2, 2)),
    "1x4_to_one_side": ((1, 3, 20, 300), (1, 4), ((0, 0), (3, 0)), (1, 1)),
    "own_place_unmet": ((2, 2, 35, 31), (3, 2), ((3, 1), (1, 2)), (2, 3)),
    "2x2": ((7, 16, 9, 10), (2, 2), ((1, 0), (0, 1)), (1, 1)),
}


@pytest.mark.parametrize(("activation", "dtype"), [(None, "float16"), (None, "float32"), ("silu", "float64")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAME)
def test_every_tile_of_planes_in_place(device, rng, name, layout, activation, dtype):
    shape, kernel, padding, dilation = SAME[name]
    x, w, bias = oracle.random_arrays(rng, shape, (shape[1], 1, *kernel), dtype)
    gradient = rng.standard_normal(shape).astype(x.dtype)
    numbers = {"padding": padding, "dilation": dilation}
    g = depthwise_geometry(shape, w.shape, **numbers, channels_last=layout == "nhwc")
    _, slope = slopes(activation, oracle.convolve(x, w, bias, **numbers))
    before = np.asarray(gradient, np.float64) * slope
    if layout == "nhwc" and shape[1] % 2 and dtype == "float16":
        with pytest.raises(ValueError, match="do not fit"):
            separable_backward.planes_tiles(g, dtype, True, device.target, True)
        return
    tiles = separable_backward.planes_tiles(g, dtype, True, device.target, True)
    assert {tile.whole for tile in tiles} == {True, False} or name == "1x4_to_one_side"
    for tile in [tile for tile in tiles if tile.planes < 4 or tile.planes == shape[1] or layout == "nhwc"]:
        dx, guards = device.guarded(shape, x.dtype, layout)
        dx[...] = device.array(gradient)
        dw, dw_guards = device.guarded(w.shape, x.dtype)
        dbias, _ = device.guarded(bias.shape, x.dtype)
        epilogue = plan.SeparableEpilogue(depthwise_activation=activation)
        chosen = separable_backward.planes_plan(g, dtype, True, epilogue, device.target, tile)
        workspace = device.module.empty(chosen.workspace_bytes, np.uint8)
        read = device.array(x, layout), device.array(w), device.array(bias)
        kernels.load(chosen.sums, 0)(dx.data.ptr, *(a.data.ptr for a in read), workspace.data.ptr)
        kernels.load(chosen.reduce, 0)(workspace.data.ptr, dw.data.ptr, dbias.data.ptr)
        dx, dw, dbias = map(device.host, (dx, dw, dbias))
        if activation is None:
            oracle.assert_dgrad_within_bound(dx, gradient, w, **numbers)
            oracle.assert_wgrad_within_bound(dw, dbias, gradient, x, **numbers)
        else:
            of_weights = oracle.wgrad(before, x, w.shape, **numbers)
            exact = oracle.dgrad(before, w, shape, **numbers), *of_weights
            for got, right in zip((dx, dw, dbias), exact, strict=True):
                np.testing.assert_allclose(got, right, rtol=1e-12, atol=1e-12 * np.abs(right).max())
        guards.assert_untouched()
        dw_guards.assert_untouched()


@pytest.mark.parametrize(("dtype", "layout"), list(product(("float16", "float32"), LAYOUTS)))
def test_what_is_not_finite_stays_in_its_sums_of_planes(device, rng, dtype, layout):
    """An element of x meets those taps alone that read it; padding is a zero that takes part."""
    shape, w_shape, numbers = (2, 6, 11, 13), (6, 1, 3, 3), {"padding": ((1, 1), (1, 1))}
    x, w, bias = oracle.random_arrays(rng, shape, w_shape, dtype)
    gradient = rng.standard_normal(shape).astype(x.dtype)
    x[0, 1, 0, 0], x[1, 2, 5, 6], x[1, 3, 10, 4] = np.nan, np.inf, -np.inf
    gradient[0, 4, 0, 3], gradient[1, 5, 5, 5] = np.inf, np.nan
    w[2, 0, 0, 1] = np.inf
    g = depthwise_geometry(shape, w_shape, **numbers, channels_last=layout == "nhwc")
    exact = [reference.depthwise_conv2d_dgrad(*(np.asarray(a, np.float64) for a in (gradient, w)), g)]
    exact += reference.depthwise_conv2d_wgrad(*(np.asarray(a, np.float64) for a in (gradient, x)), True, g)
    for tile in separable_backward.planes_tiles(g, dtype, True, device.target, True):
        chosen = separable_backward.planes_plan(g, dtype, True, plan.SeparableEpilogue(), device.target, tile)
        arrays = [device.array(gradient, layout), device.array(x, layout), device.array(w), device.array(bias)]
        workspace = device.module.empty(chosen.workspace_bytes, np.uint8)
        dw, dbias = device.module.empty(w_shape, x.dtype), device.module.empty(6, x.dtype)
        kernels.load(chosen.sums, 0)(*(a.data.ptr for a in arrays), workspace.data.ptr)
        kernels.load(chosen.reduce, 0)(workspace.data.ptr, dw.data.ptr, dbias.data.ptr)
        for got, right in zip((arrays[0], dw, dbias), exact, strict=True):
            for kind in (np.isnan, np.isposinf, np.isneginf):
                np.testing.assert_array_equal(kind(np.asarray(device.host(got), np.float64)), kind(right))
    for right in exact:
        assert 0 < np.isfinite(right).sum() < right.size


PAIRS = [("relu6", None), ("silu", "gelu"), (None, "hardswish"), ("gelu", "relu")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activations", PAIRS)
def test_activations_are_differentiated(device, rng, activations, variant, layout):
    if activations[1] is not None:
        variant = "pieces"
    for dtype in ("float32", "float64"):
        if dtype == "float64" and variant == "recomputed":
            continue
        arrays = random_arrays(rng, "3x3_padded", dtype)
        numbers = numbers_of("3x3_padded")
        z = oracle.convolve(arrays[0], arrays[1], arrays[3], **numbers)
        dy = rng.standard_normal((*z.shape[:1], 24, *z.shape[2:])).astype(arrays[0].dtype)
        options = dict(zip(("depthwise_activation", "pointwise_activation"), activations, strict=True))
        with plan.variant(variant):
            got = cuconv.separable_conv2d_backward(
                device.array(dy, layout), *on_device(device, arrays, layout), **options, **numbers
            )
        assert_gradients(list(map(device.host, got)), dy, arrays, activations, numbers)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_reference_matches_float64(rng, name, dtype):
    arrays, numbers = random_arrays(rng, name, dtype), numbers_of(name)
    g = separable_geometry(arrays[0].shape, arrays[1].shape, arrays[2].shape, **numbers)
    dy = rng.standard_normal(g.y_shape).astype(arrays[0].dtype)
    got = cuconv.separable_conv2d_backward(dy, *arrays, **numbers)
    assert_gradients(got, dy, arrays, (None, None), numbers)


@pytest.mark.parametrize("activations", [(None, None), ("silu", "gelu")])
def test_gradients_are_the_slopes_of_the_forward_pass(device, rng, activations):
    """By differences of float64, in a random direction of each array."""
    arrays, numbers = random_arrays(rng, "3x3_odd", "float64"), numbers_of("3x3_odd")
    options = {**numbers, **dict(zip(("depthwise_activation", "pointwise_activation"), activations, strict=True))}
    given = [device.array(a) for a in arrays]
    y = device.host(cuconv.separable_conv2d(*given, **options))
    dy = rng.standard_normal(y.shape)
    gradients = cuconv.separable_conv2d_backward(device.array(dy), *given, **options)
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(arrays[i].shape)
        step = 1e-5
        ends = []
        for sign in (1, -1):
            moved = [a + sign * step * direction if i == j else a for j, a in enumerate(arrays)]
            ends.append(device.host(cuconv.separable_conv2d(*map(device.array, moved), **options)))
        slope = ((ends[0] - ends[1]) / (2 * step) * dy).sum()
        np.testing.assert_allclose((device.host(gradient) * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("needs", [(name,) for name in NAMES] + [("depthwise_w", "pointwise_bias"), ()])
def test_only_what_is_needed_is_made(device, rng, needs, variant):
    arrays, numbers = random_arrays(rng, "3x3_padded", "float32"), numbers_of("3x3_padded")
    dy = rng.standard_normal((2, 24, 9, 16)).astype(np.float32)
    given = [device.array(a) for a in arrays]
    if "x" not in needs:
        variant = "pieces"
    with plan.variant(variant):
        some = cuconv.separable_conv2d_backward(device.array(dy), *given, **numbers, needs=needs)
        every = cuconv.separable_conv2d_backward(device.array(dy), *given, **numbers)
    for name in NAMES:
        if name in needs:
            np.testing.assert_array_equal(device.host(getattr(some, name)), device.host(getattr(every, name)))
        else:
            assert getattr(some, name) is None


def test_a_bias_that_is_not_there_has_no_gradient(device, rng):
    x, w, pointwise, bias, _ = random_arrays(rng, "3x3_padded", "float32")
    dy = rng.standard_normal((2, 24, 9, 16)).astype(np.float32)
    got = cuconv.separable_conv2d_backward(*map(device.array, (dy, x, w, pointwise)), padding=1)
    assert got.depthwise_bias is None
    assert got.pointwise_bias is None
    of_zero = [x, w, pointwise, 0 * bias, np.zeros(24, np.float32)]
    numbers = numbers_of("3x3_padded")
    zeros = cuconv.separable_conv2d_backward(*map(device.array, (dy, *of_zero)), padding=1)
    assert_gradients(list(map(device.host, (*got[:3], *zeros[3:]))), dy, of_zero, (None, None), numbers)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_same_bits_every_time(device, rng, dtype, variant):
    arrays, numbers = random_arrays(rng, "3x3_padded", dtype), numbers_of("3x3_padded")
    dy = device.array(rng.standard_normal((2, 24, 9, 16)).astype(arrays[0].dtype))
    given = [device.array(a) for a in arrays]
    with plan.variant(variant):
        first = [device.host(a) for a in cuconv.separable_conv2d_backward(dy, *given, **numbers)]
        for _ in range(min(device.repeats, 20)):
            for got, before in zip(cuconv.separable_conv2d_backward(dy, *given, **numbers), first, strict=True):
                np.testing.assert_array_equal(device.host(got).view(np.uint8), before.view(np.uint8))


MEMORY = {
    "several_images": ((16, 64, 128, 128), 128, {"padding": 1}),
    "one_image": ((1, 64, 512, 384), 96, {"padding": 1}),
    "stride_2": ((8, 48, 160, 128), 64, {"padding": 1, "stride": 2}),
    "pointwise_activation": ((16, 64, 128, 128), 64, {"padding": 1, "pointwise_activation": "relu"}),
    "weights_alone": ((16, 64, 128, 128), 64, {"padding": 1, "needs": ("depthwise_w", "pointwise_w")}),
}


# Of convolutions whose time is measured.
ASKED = {
    "kb86": ((16, 64, 512, 512), 128, {"padding": 1}),
    "mbv1_sep14": ((64, 512, 14, 14), 512, {"padding": 1}),
    "mbv1_sep7": ((128, 1024, 7, 7), 1024, {"padding": 1}),
    "xception_mid": ((32, 728, 19, 19), 728, {"padding": 1}),
    "deeplab": ((8, 304, 129, 129), 256, {"padding": 1}),
}


@pytest.mark.parametrize(("dtype", "layout"), list(product(("float16", "float32"), LAYOUTS)))
@pytest.mark.parametrize("name", MEMORY)
def test_memory_besides_inputs_and_results_is_a_twentieth_of_x(gpu, rng, name, dtype, layout):
    """By the high-water mark of CuPy's pool, which holds on to what was ever asked for at once."""
    (N, C, H, W), K, options = MEMORY[name]
    cupy = gpu.module

    def image(*shape):
        array = cupy.ones(shape if layout == "nchw" else (shape[0], *shape[2:], shape[1]), dtype)
        return array if layout == "nchw" else array.transpose(0, 3, 1, 2)

    stride = options.get("stride", 1)
    x, dy = image(N, C, H, W), image(N, K, -(-H // stride), -(-W // stride))
    weights = cupy.ones((C, 1, 3, 3), dtype), cupy.ones((K, C), dtype), cupy.ones(C, dtype), cupy.ones(K, dtype)
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        got = cuconv.separable_conv2d_backward(dy, x, *weights, **options)
        results = sum(gradient.nbytes for gradient in got if gradient is not None)
        assert pool.total_bytes() - results < 0.05 * x.nbytes
        del got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", [*MEMORY, *ASKED])
def test_what_is_allocated_is_a_twentieth_of_x(monkeypatch, name, dtype, layout):
    """Likewise without a GPU: by what NumPy allocates for the twin of CuPy, with no kernel run."""
    twin = hostcuda.cupy_twin
    (N, C, H, W), K, options = {**MEMORY, **ASKED}[name]
    monkeypatch.setitem(sys.modules, "cupy", twin)
    forget_kernels()

    def image(*shape):
        array = twin.empty(shape if layout == "nchw" else (shape[0], *shape[2:], shape[1]), dtype)
        return array if layout == "nchw" else array.transpose(0, 3, 1, 2)

    stride = options.get("stride", 1)
    with hostcuda.simulate(poison=False), np.errstate(all="ignore"), monkeypatch.context() as patched:
        patched.setattr(kernels, "load", lambda *_: lambda *_: None)
        x, dy = image(N, C, H, W), image(N, K, -(-H // stride), -(-W // stride))
        weights = [twin.asarray(np.ones(shape, dtype)) for shape in ((C, 1, 3, 3), (K, C), (C,), (K,))]
        cuconv.separable_conv2d_backward(dy, x, *weights, **options)  # plans are remembered, their tables are not
        tracemalloc.start()
        got = cuconv.separable_conv2d_backward(dy, x, *weights, **options)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    forget_kernels()
    assert most - sum(gradient.nbytes for gradient in got if gradient is not None) < 0.05 * x.nbytes


def test_empty_batch(device):
    arrays = np.empty((0, 4, 6, 6), np.float32), np.ones((4, 1, 3, 3), np.float32), np.ones((8, 4), np.float32)
    dy = np.empty((0, 8, 4, 4), np.float32)
    got = cuconv.separable_conv2d_backward(*map(device.array, (dy, *arrays)))
    assert got.x.shape == (0, 4, 6, 6)
    assert not device.host(got.depthwise_w).any()
    assert not device.host(got.pointwise_w).any()


DY = np.ones((2, 4, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((DY[:, :3], X, D, P), {}, ValueError, r"dy must have shape \(2, 4, 4, 3\), that of the convolution's output"),
        ((DY, X, D[:5], P), {}, ValueError, r"depthwise_w.shape\[0\] must be a multiple of x's 3 channels, and is 5"),
        ((DY, X, D, P, np.ones(3, np.float32)), {}, ValueError, r"depthwise_bias must have shape \(6,\)"),
        ((DY.astype(np.float16), X, D, P), {}, TypeError, "x must have dy's dtype"),
        ((DY, X, D, P), {"needs": "x"}, TypeError, "needs must be names of arrays"),
        ((DY, X, D, P), {"needs": ("x", "w")}, ValueError, "needs must be some of x, depthwise_w.*'w'"),
        ((DY, X, D, P), {"out": X}, TypeError, "out must be five arrays"),
        ((DY, X, D, P), {"out": (None, None, None, None, P[:, 0])}, ValueError, "bias that is not given"),
        ((DY, X, D, P), {"out": (X, None, None, None, None)}, ValueError, "shares memory with x"),
        ((DY, X, D, P), {"out": (X[1:], None, None, None, None)}, ValueError, "out must have the result's shape"),
        ((DY, X, D, P), {"pointwise_activation": "elu"}, ValueError, "pointwise_activation must be None or one of"),
    ],
)
def test_bad_input_is_refused(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        cuconv.separable_conv2d_backward(*arguments, **options)


def test_a_forced_variant_that_cannot_run_says_why(device, rng):
    x, w, pointwise, _, _ = random_arrays(rng, "3x3_stride_2", "float32")
    dy = np.ones((1, 72, 8, 8), np.float32)
    given = [device.array(a) for a in (dy, x, w, pointwise)]
    numbers = numbers_of("3x3_stride_2")
    with (
        plan.variant("stored"),
        pytest.raises(ValueError, match="variant stored: takes a depthwise result of the shape"),
    ):
        cuconv.separable_conv2d_backward(*given, **numbers)
    with plan.variant("recomputed"), pytest.raises(ValueError, match="takes the memory of dx, which is not wanted"):
        cuconv.separable_conv2d_backward(*given, **numbers, needs=("pointwise_w",))
    with plan.variant("fused"), pytest.raises(ValueError, match="this pass has recomputed, stored, pieces"):
        cuconv.separable_conv2d_backward(*given, **numbers)


@pytest.mark.parametrize("architecture", [75, 80, 120])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_older_and_newer_devices_have_a_way(rng, architecture, dtype):
    """What the plan takes where nothing is forced, of a case that in place suits and of one that it does not."""
    wanted = frozenset(NAMES)
    for name in ("3x3_padded", "3x3_stride_2"):
        x_shape, w_shape, K, *_ = CASES[name]
        g = separable_geometry(x_shape, w_shape, (K, w_shape[0]), **numbers_of(name))
        chosen = plan.separable_gradients(
            g, dtype, plan.SeparableEpilogue(), wanted, plan.TARGETS[architecture], None, True
        )
        assert (chosen is not None) == (architecture >= 80 and name == "3x3_padded")
