"""Pointwise convolution and its gradients, on the reference and on the kernels: see test_depthwise.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import oracle
import pytest
import torch
from backends import forget_kernels
from torch.nn import functional

import cuconv
from cuconv import kernels, plan, reference
from cuconv.geometry import ACTIVATIONS, pointwise_geometry
from cuconv.plan import pointwise_groups

VARIANTS = ("groups", "products", "direct")
ON_ALL_DEVICES = ("products", "direct")
LAYOUTS = ("nchw", "nhwc")
# x, K, stride. Channels below, at and beyond tiles and stages; planes of every alignment, one and several a tile.
CASES = {
    "plain": ((2, 24, 7, 9), 40, 1),
    "whole_tiles": ((2, 64, 16, 8), 128, 1),
    "few_channels": ((3, 5, 5, 7), 3, 1),
    "strides": ((2, 16, 9, 12), 33, (2, 1)),
    "stride_beyond_image": ((2, 8, 3, 4), 16, (5, 3)),
    "deep": ((2, 200, 4, 4), 8, 1),
    "wide": ((1, 8, 3, 6), 150, 1),
    "pixels": ((70, 12, 1, 1), 16, 1),
    "one_channel": ((2, 1, 9, 33), 1, 1),
}


UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def exact(x, w, bias=None, stride=1):
    of = [None if a is None else torch.from_numpy(np.asarray(a, np.float64)) for a in (x, w, bias)]
    return functional.conv2d(of[0], of[1].reshape(*of[1].shape[:2], 1, 1), of[2], stride).numpy()


def exact_dgrad(dy, w, x_shape, stride=1):
    dy, w = (torch.from_numpy(np.asarray(a, np.float64)) for a in (dy, w))
    return torch.nn.grad.conv2d_input(x_shape, w.reshape(*w.shape[:2], 1, 1), dy, stride).numpy()


def exact_wgrad(dy, x, w_shape, stride=1):
    dy, x = (torch.from_numpy(np.asarray(a, np.float64)) for a in (dy, x))
    shape = (*w_shape[:2], 1, 1)
    return torch.nn.grad.conv2d_weight(x, shape, dy, stride).numpy().reshape(w_shape), dy.sum((0, 2, 3)).numpy()


def assert_bound(got, of, terms):
    """of(np.asarray) is the exact result, of(np.abs) that of the magnitudes."""
    oracle.assert_sum_within_bound(got, of(np.asarray), of(np.abs), terms)


ARGUMENTS = ("x_shape", "K", "stride", "dtype", "layout", "variant")


def takes(variant, dtype, terms):
    """Whether the variant has sums of so many terms, TF32 not allowed."""
    return variant == "direct" or dtype in ("float16", "bfloat16") or (dtype == "float32" and terms >= 16)


def copied_by_words(dtype, *rows):
    """Whether all rows of so many elements can be."""
    return dtype == "float32" or all(row % 2 == 0 for row in rows)


def groups_take(dtype, layout, x_shape, K, terms):
    """Whether forward, or dgrad, by warp groups does: rows of weights and, channels-last, of images are copied so."""
    return copied_by_words(dtype, x_shape[1], *((terms,) if layout == "nhwc" else ()))


def groups_take_wgrad(dtype, layout, x_shape, K, terms):
    return layout == "nchw" or copied_by_words(dtype, x_shape[1], K)


def all_cases(terms_of, groups_take=groups_take):
    """Every case, where sums have so many terms: a function of x's shape, K and the stride."""
    for (name, (x_shape, K, stride)), dtype, layout, variant in product(
        CASES.items(), oracle.DTYPES, LAYOUTS, VARIANTS
    ):
        terms = terms_of(x_shape, K, stride)
        if variant == "groups" and not (stride == 1 and groups_take(dtype, layout, x_shape, K, terms)):
            continue
        # Of one channel an array channels-last counts as NCHW.
        if takes(variant, dtype, terms) and not (name == "one_channel" and layout == "nhwc"):
            name_of_test = f"{name}-{dtype}-{layout}-{variant}"
            yield pytest.param(x_shape, K, stride, dtype, layout, variant, id=name_of_test)


def counted(x_shape, K, stride):
    return pointwise_geometry(x_shape, (K, x_shape[1]), stride=stride).y_size // K


def random_arrays(rng, x_shape, K, dtype):
    return oracle.random_arrays(rng, x_shape, (K, x_shape[1], 1, 1), dtype)


@pytest.mark.parametrize(ARGUMENTS, list(all_cases(lambda x, K, stride: x[1])))
def test_every_variant_matches_float64(device, rng, x_shape, K, stride, dtype, layout, variant):
    x, w, bias = random_arrays(rng, x_shape, K, dtype)
    g = pointwise_geometry(x_shape, w.shape, stride=stride)
    out, guards = device.guarded(g.y_shape, x.dtype, layout)
    with plan.variant(variant):
        arrays = device.array(x, layout), device.array(w), device.array(bias)
        assert cuconv.pointwise_conv2d(*arrays, stride=stride, out=out) is out
        again = cuconv.pointwise_conv2d(*arrays[:2], stride=stride)
    assert_bound(device.host(out), lambda of: exact(of(x), of(w), of(bias), stride), g.C)
    assert_bound(device.host(again), lambda of: exact(of(x), of(w), None, stride), g.C)
    guards.assert_untouched()


@pytest.mark.parametrize(ARGUMENTS, list(all_cases(lambda x, K, stride: K)))
def test_every_variant_of_dgrad_matches_float64(device, rng, x_shape, K, stride, dtype, layout, variant):
    g = pointwise_geometry(x_shape, (K, x_shape[1]), stride=stride)
    dy, w, _ = random_arrays(rng, g.y_shape, x_shape[1], dtype)
    w = np.ascontiguousarray(w.transpose(1, 0, 2, 3))
    out, guards = device.guarded(x_shape, dy.dtype, layout)
    with plan.variant(variant):
        arrays = device.array(dy, layout), device.array(w)
        assert cuconv.pointwise_conv2d_dgrad(*arrays, x_shape, stride=stride, out=out) is out
    assert_bound(device.host(out), lambda of: exact_dgrad(of(dy), of(w), x_shape, stride), K)
    guards.assert_untouched()


@pytest.mark.parametrize(ARGUMENTS, list(all_cases(counted, groups_take_wgrad)))
def test_every_variant_of_wgrad_matches_float64(device, rng, x_shape, K, stride, dtype, layout, variant):
    x, w, _ = random_arrays(rng, x_shape, K, dtype)
    g = pointwise_geometry(x_shape, w.shape, stride=stride)
    dy = rng.standard_normal(g.y_shape).astype(x.dtype)
    dw, dw_guards = device.guarded(w.shape, x.dtype)
    dbias, dbias_guards = device.guarded((K,), x.dtype)
    arrays = device.array(dy, layout), device.array(x, layout)
    with plan.variant(variant):
        got = cuconv.pointwise_conv2d_wgrad(*arrays, w.shape, stride=stride, bias=True, out=(dw, dbias))
        alone = cuconv.pointwise_conv2d_wgrad(*arrays, w.shape[:2], stride=stride)
    assert got == (dw, dbias)
    terms = g.N * g.P * g.Q
    assert_bound(device.host(dw), lambda of: exact_wgrad(of(dy), of(x), w.shape, stride)[0], terms)
    assert_bound(device.host(dbias), lambda of: exact_wgrad(of(dy), of(x), w.shape, stride)[1], terms)
    np.testing.assert_array_equal(device.host(alone), device.host(dw).reshape(w.shape[:2]))
    dw_guards.assert_untouched()
    dbias_guards.assert_untouched()


# Of warp groups: every extent of a tile, weights that stay and that do not, one multiprocessor for many tiles; planes
# whose rows are copied in whole pieces, and of an odd number of elements, one and several tiles an image.
GROUPS_TILES = [
    pointwise_groups.Tile(64, 1, 1, 1, 2, True),
    pointwise_groups.Tile(64, 2, 2, 1, 3, False),
    pointwise_groups.Tile(128, 1, 3, 1, 2, True),
    pointwise_groups.Tile(128, 2, 1, 1, 4, False),
    pointwise_groups.Tile(256, 1, 2, 1, 3, False),
]
OF_TILES = list(product(range(5), ((3, 72, 9, 12), (2, 72, 9, 15)), ("float32", "float16"), LAYOUTS))


def one_multiprocessor(device):
    return replace(device.target, multiprocessors=1)


@pytest.mark.parametrize("turned", [False, True], ids=["forward", "dgrad"])
@pytest.mark.parametrize(("tile", "x_shape", "dtype", "layout"), OF_TILES)
def test_every_tile_of_warp_groups(device, rng, tile, x_shape, dtype, layout, turned):
    if device.target.architecture != 90:
        pytest.skip("no warp groups")
    x, w, bias = random_arrays(rng, x_shape, 136, dtype)
    g = pointwise_geometry(x_shape, w.shape, channels_last=layout == "nhwc")
    arguments = plan.Epilogue(), one_multiprocessor(device), GROUPS_TILES[tile], True
    chosen = pointwise_groups.tile_plan(g, dtype, turned, *arguments)
    if turned:
        dy = rng.standard_normal(g.y_shape).astype(x.dtype)
        dx = device.launch(chosen, dy, w, None, x_shape, layout)
        assert_bound(dx, lambda of: exact_dgrad(of(dy), of(w), x_shape), 136)
    else:
        y = device.launch(chosen, x, w, bias, g.y_shape, layout)
        assert_bound(y, lambda of: exact(of(x), of(w), of(bias)), 72)


WGRAD_GROUPS_TILES = [
    pointwise_groups.WgradTile(64, 1, 1, 1, 3, 1),
    pointwise_groups.WgradTile(64, 2, 2, 1, 3, 2),
    pointwise_groups.WgradTile(128, 1, 3, 1, 4, 2),
    pointwise_groups.WgradTile(128, 2, 1, 1, 3, 3),
    pointwise_groups.WgradTile(256, 1, 1, 1, 3, 2),
]


@pytest.mark.parametrize(("tile", "x_shape", "dtype", "layout"), OF_TILES)
def test_every_tile_of_warp_groups_of_wgrad(device, rng, tile, x_shape, dtype, layout):
    if device.target.architecture != 90:
        pytest.skip("no warp groups")
    x, w, _ = random_arrays(rng, x_shape, 136, dtype)
    g = pointwise_geometry(x_shape, w.shape, channels_last=layout == "nhwc")
    dy = rng.standard_normal(g.y_shape).astype(x.dtype)
    chosen = pointwise_groups.wgrad_tile_plan(g, dtype, True, False, device.target, WGRAD_GROUPS_TILES[tile], True)
    dw, dw_guards = device.guarded(w.shape, x.dtype)
    dbias, dbias_guards = device.guarded((136,), x.dtype)
    arrays = device.array(dy, layout), device.array(x, layout)
    partials = device.module.empty(max(1, chosen.workspace_bytes), np.uint8)
    results = partials.data.ptr, dw.data.ptr, dbias.data.ptr
    kernels.load(chosen.sums, 0)(*(array.data.ptr for array in arrays), *results)
    if chosen.reduce:
        kernels.load(chosen.reduce, 0)(*results)
    terms = g.N * g.P * g.Q
    assert_bound(device.host(dw), lambda of: exact_wgrad(of(dy), of(x), w.shape)[0], terms)
    assert_bound(device.host(dbias), lambda of: exact_wgrad(of(dy), of(x), w.shape)[1], terms)
    dw_guards.assert_untouched()
    dbias_guards.assert_untouched()


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_reference_matches_float64(rng, name, dtype):
    x_shape, K, stride = CASES[name]
    x, w, bias = random_arrays(rng, x_shape, K, dtype)
    y = cuconv.pointwise_conv2d(x, w, bias, stride=stride)
    assert_bound(y, lambda of: exact(of(x), of(w), of(bias), stride), x_shape[1])
    dy = rng.standard_normal(y.shape).astype(x.dtype)
    dx = cuconv.pointwise_conv2d_dgrad(dy, w, x_shape, stride=stride)
    assert_bound(dx, lambda of: exact_dgrad(of(dy), of(w), x_shape, stride), K)
    dw, dbias = cuconv.pointwise_conv2d_wgrad(dy, x, w.shape, stride=stride, bias=True)
    for i, got in enumerate((dw, dbias)):
        assert_bound(got, lambda of, i=i: exact_wgrad(of(dy), of(x), w.shape, stride)[i], dy.size // K)


TORCH = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "gelu": functional.gelu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_slopes_are_those_of_torch(activation):
    z = np.concatenate([np.linspace(-9, 9, 1001), [0.0, -0.0, 3.0, -3.0, 6.0, 1e300, -30.0]])
    tensor = torch.from_numpy(z).requires_grad_()
    value = TORCH[activation](tensor)
    value.sum().backward()
    with np.errstate(over="ignore"):
        values, slopes = reference.activated(z, activation), reference.activation_slope(z, activation)
    np.testing.assert_allclose(values, value.detach().numpy(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(slopes, tensor.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("activation", "dtype"), list(product(ACTIVATIONS, ("float32", "bfloat16", "float64"))))
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_follow_the_bias(device, rng, activation, dtype, variant):
    if variant != "direct" and dtype == "float64":
        variant = "direct"
    x, w, bias = random_arrays(rng, (2, 16, 5, 6), 24, dtype)
    with plan.variant(variant):
        y = cuconv.pointwise_conv2d(device.array(x), device.array(w), device.array(bias), activation=activation)
    z = exact(x, w, bias)
    expected = TORCH[activation](torch.from_numpy(z)).numpy()
    # No activation is steeper than 1.5, and exp and erfc are right to a few units of the last place.
    slack = 1.5 * 17 * exact(np.abs(x), np.abs(w), np.abs(bias)) + 16 * np.abs(z)
    roundoff, sums = UNIT_ROUNDOFF[dtype], UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"]
    error = np.abs(device.host(y).astype(np.float64) - expected)
    assert (error <= roundoff * np.abs(expected) + sums * slack).all()
    assert 0 < np.count_nonzero(expected)


def test_float32_is_float32_and_tf32_is_not(device, rng):
    """The bound tells three products from one."""
    x, w, _ = random_arrays(rng, (2, 64, 8, 8), 32, "float32")
    arrays = device.array(x), device.array(w)
    with plan.variant("products"):
        assert_bound(device.host(cuconv.pointwise_conv2d(*arrays)), lambda of: exact(of(x), of(w)), 64)
        rough = device.host(cuconv.pointwise_conv2d(*arrays, allow_tf32=True))
        with pytest.raises(AssertionError, match="beyond the bound"):
            assert_bound(rough, lambda of: exact(of(x), of(w)), 64)
    # Each factor is rounded to 11 bits.
    error = np.abs(rough - exact(x, w))
    assert (error <= 2.0**-10 * exact(np.abs(x), np.abs(w))).all()


@pytest.mark.parametrize(("variant", "dtype", "layout"), list(product(VARIANTS, ("float32", "float16"), LAYOUTS)))
def test_infinities_and_nan_stay_in_their_pixels(device, rng, variant, dtype, layout):
    x, w, bias = random_arrays(rng, (2, 20, 6, 7), 24, dtype)
    x[0, 3, 2, 1], x[1, 19, 5, 6], x[1, 0, 0, 0], x[0, 7, 4, 4] = np.inf, -np.inf, np.nan, np.finfo(x.dtype).max
    if dtype == "float32":
        x[0, 7, 4, 4] = w[:, 7] = 1e19
    arrays = device.array(x, layout), device.array(w), device.array(bias)
    with plan.variant(variant):
        y = device.host(cuconv.pointwise_conv2d(*arrays)).astype(np.float64)
    with np.errstate(over="ignore"):
        expected = exact(x, w, bias).astype(x.dtype).astype(np.float64)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(y), kind(expected))
    finite = np.isfinite(expected)
    assert 0 < finite.sum() < finite.size
    np.testing.assert_allclose(y[finite], expected[finite], rtol=0.01, atol=0.05)


# At the beginning of a channel's plane, which is read behind the end of the one before where rows are of any address.
@pytest.mark.parametrize(
    ("variant", "layout", "dtype", "rows"), list(product(VARIANTS, LAYOUTS, ("float32", "float16"), (5, 6)))
)
def test_infinities_stay_in_their_channels_of_wgrad(device, rng, variant, layout, dtype, rows):
    x, _, _ = random_arrays(rng, (2, 20, rows, 7), 24, dtype)
    dy = rng.standard_normal((2, 24, rows, 7)).astype(dtype)
    x[0, 3, 0, 1], dy[1, 5, 0, 0] = np.inf, -np.inf
    arrays = device.array(dy, layout), device.array(x, layout)
    with plan.variant(variant):
        dw, dbias = (device.host(a) for a in cuconv.pointwise_conv2d_wgrad(*arrays, (24, 20), bias=True))
    for got, expected in zip((dw, dbias), exact_wgrad(dy, x, (24, 20)), strict=True):
        for kind in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(kind(got), kind(expected))
        assert np.isfinite(got).any()


@pytest.mark.parametrize(("offset", "variant"), list(product((1, 3, 4), ON_ALL_DEVICES)))
def test_arrays_at_any_offset(device, rng, offset, variant):
    x, w, _ = random_arrays(rng, (2, 16, 4, 4), 16, "float16")
    shifted = []
    for array in (x, w):
        memory = device.array(np.concatenate([np.zeros(offset, array.dtype), array.ravel()]))
        shifted.append(memory[offset:].reshape(array.shape))
    with plan.variant(variant):
        y = cuconv.pointwise_conv2d(*shifted)
    assert_bound(device.host(y), lambda of: exact(of(x), of(w)), 16)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_wgrad_has_the_same_bits_every_time(device, rng, dtype):
    x, w, _ = random_arrays(rng, (3, 40, 9, 8), 24, dtype)
    dy = device.array(rng.standard_normal((3, 24, 9, 8)).astype(x.dtype))
    x = device.array(x)
    first = [device.host(a) for a in cuconv.pointwise_conv2d_wgrad(dy, x, w.shape, bias=True)]
    for _ in range(device.repeats):
        for got, before in zip(cuconv.pointwise_conv2d_wgrad(dy, x, w.shape, bias=True), first, strict=True):
            np.testing.assert_array_equal(device.host(got).view(np.uint8), before.view(np.uint8))


def test_the_result_has_the_layout_of_the_input(device, rng):
    x, w, _ = random_arrays(rng, (2, 8, 5, 6), 4, "float32")
    y = cuconv.pointwise_conv2d(device.array(x, "nhwc"), device.array(w))
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    dx = cuconv.pointwise_conv2d_dgrad(y, device.array(w), x.shape)
    assert dx.transpose(0, 2, 3, 1).flags.c_contiguous


def test_empty_batch(device):
    x, w = device.array(np.empty((0, 3, 4, 5), np.float32)), device.array(np.ones((6, 3), np.float32))
    y = cuconv.pointwise_conv2d(x, w)
    assert y.shape == (0, 6, 4, 5)
    assert cuconv.pointwise_conv2d_dgrad(y, w, x.shape).shape == x.shape
    dw, dbias = cuconv.pointwise_conv2d_wgrad(y, x, w.shape, bias=True)
    assert not device.host(dw).any()
    assert not device.host(dbias).any()


def test_workspace_is_taken_and_measured(device, rng):
    x, w, _ = random_arrays(rng, (2, 24, 8, 8), 16, "float32")
    dy = rng.standard_normal((2, 16, 8, 8)).astype(np.float32)
    arrays = device.array(dy), device.array(x)
    with pytest.raises(ValueError, match=r"workspace must have at least (\d+) bytes") as error:
        cuconv.pointwise_conv2d_wgrad(*arrays, w.shape, workspace=device.array(np.empty(1, np.float64)))
    needed = int(str(error.value).split("at least ")[1].split(" ")[0])
    dw = cuconv.pointwise_conv2d_wgrad(*arrays, w.shape, workspace=device.array(np.empty(needed // 8, np.float64)))
    assert_bound(device.host(dw), lambda of: exact_wgrad(of(dy), of(x), w.shape)[0], 2 * 64)


X, W = np.ones((2, 3, 4, 5), np.float32), np.ones((6, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((X, np.ones((6, 4), np.float32)), ValueError, r"w.shape\[1\] must be its input's 3 channels, and is 4"),
        ((X, np.ones((6, 3, 1), np.float32)), ValueError, r"w must have shape \(K, C\) or \(K, C, 1, 1\)"),
        ((X, np.ones((6, 3, 3, 3), np.float32)), ValueError, r"w must have shape .* and has \(6, 3, 3, 3\)"),
        ((X, np.ones((0, 3), np.float32)), ValueError, "at least one output channel"),
        ((X[0], W), ValueError, "x must have 4 dimensions"),
        ((X[:, :0], W[:, :0]), ValueError, "x must have at least one channel"),
        ((X, W, np.ones(5, np.float32)), ValueError, r"bias must have shape \(6,\)"),
        ((X, W.astype(np.float64)), TypeError, "w must have x's dtype, float32, and has float64"),
        ((X, [1.0]), TypeError, "w must be a numpy.ndarray"),
        ((np.broadcast_to(np.float32(1), (2**30, 3, 2**10, 1)), W), ValueError, "fewer than 2\\*\\*40 elements"),
    ],
)
def test_bad_arrays_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        cuconv.pointwise_conv2d(*arguments)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": 1.5}, TypeError, "stride must be an integer"),
        ({"activation": "tanh"}, ValueError, "activation must be None or one of relu.*'tanh'"),
        ({"activation": 1}, TypeError, "activation must be None or a name"),
        ({"out": np.ones((2, 6, 4, 4), np.float32)}, ValueError, r"out must have the result's shape, \(2, 6, 4, 5\)"),
    ],
)
def test_bad_options_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        cuconv.pointwise_conv2d(X, W, **options)


def test_a_forced_variant_that_cannot_run_says_why(device):
    x, w = device.array(X.astype(np.float64)), device.array(W.astype(np.float64))
    with plan.variant("products"), pytest.raises(ValueError, match=r"variant products.*float64 has 64"):
        cuconv.pointwise_conv2d(x, w)
    few = device.array(X), device.array(W)
    with plan.variant("products"), pytest.raises(ValueError, match=r"sums of 16 terms or more, and these have 3"):
        cuconv.pointwise_conv2d(*few)
    with plan.variant("runs"), pytest.raises(ValueError, match=r"variant runs: this pass has groups, products, direct"):
        cuconv.pointwise_conv2d(x, w)


@pytest.mark.parametrize(
    ("target", "dtype", "stride", "channels", "message"),
    [
        (plan.TARGETS[80], "float32", 1, 16, r"needs products of warp groups, which compute capability 9.0 alone has"),
        (plan.TARGETS[100], "float32", 1, 16, r"needs products of warp groups"),
        (plan.TARGETS[90], "float64", 1, 16, r"float64 has 64"),
        (plan.TARGETS[90], "float32", 2, 16, r"takes strides of 1"),
        (plan.TARGETS[90], "float32", 1, 8, r"sums of 16 terms or more, and these have 8"),
        (plan.TARGETS[90], "float16", 1, 17, r"copies rows of 4 bytes or more"),
    ],
)
def test_warp_groups_say_what_they_do_not_take(target, dtype, stride, channels, message):
    g = pointwise_geometry((2, channels, 4, 6), (32, channels), stride=stride)
    with pytest.raises(plan.Unsuitable, match=message):
        plan.pointwise_conv(g, dtype, False, plan.Epilogue(), target, "groups")
    forget_kernels()
