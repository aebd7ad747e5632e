"""depthwise_conv2d on the kernels: the same bodies on a GPU, and on the host where the real sources run as C++."""

from __future__ import annotations

from itertools import product

import numpy as np
import oracle
import pytest

import cuconv
from cuconv import kernels, plan
from cuconv.plan import runs, toeplitz, wgrad

# name: x, w, stride, padding, dilation. Rows, columns and their numbers differ wherever they can; the product of all
# choices is pruned to geometries that each reach a branch of a kernel or of its plan that the others do not.
GEOMETRIES = {
    "3x3": ((2, 3, 11, 13), (3, 1, 3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "3x3_padded": ((2, 3, 11, 13), (3, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "3x1": ((3, 2, 9, 8), (2, 1, 3, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "1x7_asymmetric": ((1, 2, 5, 19), (2, 1, 1, 7), (1, 1), ((0, 0), (5, 1)), (1, 1)),
    "1x1": ((2, 5, 4, 6), (5, 1, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "2x3_stride_2_1": ((2, 3, 12, 9), (3, 1, 2, 3), (2, 1), ((1, 0), (0, 2)), (1, 1)),
    "3x3_stride_2": ((2, 4, 15, 18), (4, 1, 3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    "3x2_stride_1_3": ((2, 2, 10, 14), (2, 1, 3, 2), (1, 3), ((2, 1), (0, 1)), (1, 1)),
    "5x3_dilated": ((1, 3, 21, 17), (3, 1, 5, 3), (1, 1), ((3, 4), (2, 1)), (2, 3)),
    "3x3_dilated_strided": ((2, 2, 19, 23), (2, 1, 3, 3), (2, 3), ((2, 1), (4, 0)), (3, 2)),
    "5x5_padded": ((2, 3, 9, 12), (3, 1, 5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "7x7_small": ((2, 4, 7, 7), (4, 1, 7, 7), (1, 1), ((3, 3), (3, 3)), (1, 1)),
    "multiplier_3": ((2, 2, 8, 9), (6, 1, 3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1)),
    "multiplier_2_rows": ((1, 2, 70, 33), (4, 1, 3, 3), (2, 1), ((1, 1), (1, 1)), (1, 1)),
    "planes_together": ((3, 25, 6, 5), (25, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "images_together": ((23, 2, 5, 6), (2, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "one_channel": ((37, 1, 4, 3), (1, 1, 2, 2), (1, 1), ((0, 1), (1, 0)), (1, 1)),
    "multiplier_together": ((5, 3, 4, 5), (15, 1, 2, 2), (1, 1), ((0, 1), (1, 0)), (1, 1)),
    "rows_apart": ((1, 1, 150, 260), (1, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "one_pixel": ((2, 3, 1, 1), (3, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "all_padding": ((1, 2, 3, 4), (2, 1, 2, 2), (1, 1), ((6, 7), (5, 9)), (1, 1)),
    "one_column": ((2, 3, 40, 1), (3, 1, 4, 1), (1, 1), ((1, 2), (0, 0)), (1, 1)),
    "3x3_dilation_12": ((1, 2, 30, 37), (2, 1, 3, 3), (1, 1), ((12, 12), (12, 11)), (12, 12)),
    "stride_above_kernel": ((2, 2, 17, 20), (2, 1, 2, 3), (4, 3), ((1, 0), (0, 2)), (1, 1)),
    "stride_and_dilation_share_a_factor": ((2, 3, 29, 31), (3, 1, 3, 4), (4, 2), ((2, 3), (1, 4)), (2, 6)),
    "planes_of_many_rows": ((3, 2, 40, 24), (2, 1, 5, 3), (1, 1), ((2, 2), (1, 1)), (1, 1)),
    "large_kernel_strided": ((2, 2, 41, 23), (2, 1, 13, 5), (3, 2), ((6, 5), (2, 3)), (1, 1)),
    "large_kernel_dilated": ((1, 3, 38, 24), (3, 1, 10, 3), (1, 1), ((9, 8), (2, 2)), (3, 2)),
    "large_kernel": ((1, 2, 20, 35), (2, 1, 11, 31), (1, 1), ((5, 5), (15, 15)), (1, 1)),
}

# What strides and multipliers do to dx only: rows and columns that no dy reaches, a dy that covers x exactly, strides
# along one axis and dilation along the other, or along one where the kernel is one element wide, sums of planes.
DGRAD_GEOMETRIES = {
    "3x2_stride_4_3": ((2, 3, 18, 16), (3, 1, 3, 2), (4, 3), ((0, 1), (1, 0)), (1, 1)),
    "2x4_stride_2_4": ((2, 3, 12, 32), (3, 1, 2, 4), (2, 4), ((0, 0), (0, 0)), (1, 1)),
    "3x3_stride_2_1_dilated_1_3": ((2, 2, 13, 21), (2, 1, 3, 3), (2, 1), ((1, 1), (3, 2)), (1, 3)),
    "1x3_stride_2_dilated_3_1": ((2, 2, 9, 14), (2, 1, 1, 3), (2, 2), ((1, 0), (0, 1)), (3, 1)),
    "5x5_stride_1_2": ((2, 3, 15, 40), (3, 1, 5, 5), (1, 2), ((2, 2), (2, 1)), (1, 1)),
    "one_row_of_dy": ((2, 3, 5, 9), (3, 1, 2, 3), (7, 2), ((0, 0), (2, 3)), (1, 1)),
    "more_padding_than_kernel": ((2, 3, 6, 11), (3, 1, 2, 3), (2, 3), ((5, 4), (7, 6)), (1, 1)),
    "multiplier_2_stride_2": ((3, 4, 13, 10), (8, 1, 3, 3), (2, 2), ((1, 0), (1, 1)), (1, 1)),
    "multiplier_3_dilated": ((2, 2, 9, 12), (6, 1, 3, 2), (1, 1), ((2, 1), (0, 3)), (2, 3)),
    "multiplier_4_one_channel": ((3, 1, 20, 21), (4, 1, 3, 3), (1, 2), ((1, 1), (0, 1)), (1, 1)),
}


HALVES = ("float16", "bfloat16")
# Every variant in a dtype that it takes.
VARIANTS = (("direct", "float32"), ("runs", "float32"), ("toeplitz", "float16"), ("toeplitz", "bfloat16"))


def variants(w_shape, dtype):
    yield "direct"
    if w_shape[2] * w_shape[3] <= runs.MAX_TAPS:
        yield "runs"
    if dtype in HALVES:
        yield "toeplitz"


def cases(dtypes, geometries=GEOMETRIES):
    for dtype in dtypes:
        for name, (x_shape, w_shape, *numbers) in geometries.items():
            for variant in variants(w_shape, dtype):
                arguments = (x_shape, w_shape, dict(zip(("stride", "padding", "dilation"), numbers, strict=True)))
                yield pytest.param(*arguments, dtype, variant, id=f"{name}-{dtype}-{variant}")


@pytest.mark.parametrize(("x_shape", "w_shape", "numbers", "dtype", "variant"), list(cases(oracle.DTYPES)))
def test_every_variant_matches_float64(device, rng, x_shape, w_shape, numbers, dtype, variant):
    x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    shape = oracle.convolve(x, w, **numbers).shape
    out, guards = device.guarded(shape, x.dtype)
    with plan.variant(variant):
        y = cuconv.depthwise_conv2d(device.array(x), device.array(w), device.array(bias), out=out, **numbers)
    assert y is out
    oracle.assert_within_bound(device.host(y), x, w, bias, **numbers)
    guards.assert_untouched()


def dgrad_cases(dtypes):
    for case in cases(dtypes, GEOMETRIES | DGRAD_GEOMETRIES):
        x_shape, (K, _, R, S), numbers, _, variant = case.values
        axes = zip((R, S), numbers["stride"], numbers["dilation"], strict=True)
        suits = {
            "direct": True,
            "runs": all(1 in axis for axis in axes),
            "toeplitz": numbers["stride"] == (1, 1) and K == x_shape[1],
        }
        if suits[variant]:
            yield case


@pytest.mark.parametrize(("x_shape", "w_shape", "numbers", "dtype", "variant"), list(dgrad_cases(oracle.DTYPES)))
def test_every_variant_of_dgrad_matches_float64(device, rng, x_shape, w_shape, numbers, dtype, variant):
    x, w, _ = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    dy = rng.standard_normal(oracle.convolve(x, w, **numbers).shape).astype(x.dtype)
    out, guards = device.guarded(x_shape, x.dtype)
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(device.array(dy), device.array(w), x_shape, out=out, **numbers)
    assert dx is out
    oracle.assert_dgrad_within_bound(device.host(dx), dy, w, **numbers)
    guards.assert_untouched()


@pytest.mark.parametrize("stride", [(2, 3), (3, 2)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dgrad_at_every_phase_of_a_stride(device, rng, dtype, stride):
    """The padding says which rows and columns of x meet which taps, in turn."""
    w = rng.standard_normal((2, 1, 3, 2)).astype(oracle.DTYPES[dtype])
    for before in range(4):
        numbers = {"stride": stride, "padding": ((before, 1), (3 - before, 2)), "dilation": (1, 1)}
        x_shape = (2, 2, 19, 48)
        dy = rng.standard_normal(oracle.convolve(np.zeros(x_shape), w, **numbers).shape).astype(w.dtype)
        with plan.variant("runs"):
            dx = cuconv.depthwise_conv2d_dgrad(device.array(dy), device.array(w), x_shape, **numbers)
        oracle.assert_dgrad_within_bound(device.host(dx), dy, w, **numbers)


@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_dgrad_of_strides_at_every_width_and_every_offset(device, rng, variant):
    w = rng.standard_normal((2, 1, 2, 3)).astype(np.float16)
    numbers = {"stride": (1, 2), "padding": ((1, 0), (1, 1)), "dilation": (1, 1)}
    for width in range(1, 41):
        x_shape = (2, 2, 3, width)
        dy = rng.standard_normal(oracle.convolve(np.zeros(x_shape), w, **numbers).shape).astype(w.dtype)
        offset = width % 8
        shifted = device.array(np.concatenate([np.zeros(offset, dy.dtype), dy.ravel()]))[offset:].reshape(dy.shape)
        out, guards = device.guarded(x_shape, dy.dtype)
        with plan.variant(variant):
            cuconv.depthwise_conv2d_dgrad(shifted, device.array(w), x_shape, out=out, **numbers)
        oracle.assert_dgrad_within_bound(device.host(out), dy, w, **numbers)
        guards.assert_untouched()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_tile_of_dgrad(device, rng, dtype):
    """Parts of planes, several planes, several images in turn, of a dy that is spread, summed or both."""
    for x_shape, w_shape, numbers in (
        ((5, 7, 14, 14), (7, 1, 3, 3), {"stride": (2, 2), "padding": ((1, 1), (1, 1))}),
        ((4, 3, 37, 22), (6, 1, 2, 3), {"stride": (2, 1), "padding": ((1, 0), (2, 1))}),
        ((4, 3, 25, 32), (9, 1, 3, 2), {"stride": (1, 3), "padding": ((2, 2), (0, 3))}),
        ((3, 2, 40, 24), (2, 1, 4, 4), {"stride": (4, 4)}),
    ):
        g = cuconv.geometry.depthwise_geometry(x_shape, w_shape, **numbers)
        dy, w = (rng.standard_normal(shape).astype(oracle.DTYPES[dtype]) for shape in (g.y_shape, w_shape))
        as_forward, spread = runs.dgrad_as_forward(g)
        kinds = {}
        for patch in runs.patches(as_forward, dtype, True, spread):
            for tile in runs.tiles(as_forward, dtype, patch, device.target.shared_per_block // 2):
                kind = (patch.whole_rows, tile.block_planes > 1, tile.block_rows < g.H, tile.stages)
                kinds.setdefault(kind, runs.tile_plan(as_forward, dtype, tile, turned=True))
        assert len(kinds) >= 6
        for chosen in kinds.values():
            dx = device.launch(chosen, dy, w, None, x_shape)
            oracle.assert_dgrad_within_bound(dx, dy, w, stride=g.stride, padding=g.padding)


@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_nan_of_dy_reaches_what_it_met_and_nothing_else(device, rng, variant):
    for multiplier, stride in product((1, 2), ((1, 1), (2, 3))):
        w = rng.standard_normal((3 * multiplier, 1, 2, 4)).astype(np.float32)
        numbers = {"stride": stride, "padding": ((1, 0), (2, 1)), "dilation": (1, 1)}
        x_shape = (2, 3, 14, 20)
        dy = rng.standard_normal(oracle.convolve(np.zeros(x_shape), w, **numbers).shape).astype(np.float32)
        for place in ((0, 0, 0, 0), (1, -1, -1, -1), (1, 0, 3, 4)):
            dy[place] = np.nan
        with plan.variant(variant):
            dx = device.host(cuconv.depthwise_conv2d_dgrad(device.array(dy), device.array(w), x_shape, **numbers))
        met = oracle.dgrad(np.isnan(dy), np.ones_like(w), x_shape, **numbers) > 0
        np.testing.assert_array_equal(np.isnan(dx), met)
        assert met.sum() > 8


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS)
def test_dgrad_of_more_padding_than_the_kernel_reaches(device, rng, variant, dtype):
    """Outputs that lie in the padding altogether have no part in dx."""
    w = rng.standard_normal((3, 1, 2, 3)).astype(oracle.DTYPES[dtype])
    numbers = {"stride": (1, 1), "padding": ((4, 3), (5, 2)), "dilation": (1, 1)}
    dy = rng.standard_normal((2, 3, 11, 14)).astype(oracle.DTYPES[dtype])
    dy[:, :, :3] = np.nan
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(device.array(dy), device.array(w), (2, 3, 5, 9), **numbers)
    dy[:, :, :3] = 0
    oracle.assert_dgrad_within_bound(device.host(dx), dy, w, **numbers)


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS)
def test_zeros_around_dy_take_part(device, variant, dtype):
    """A kernel row of infinity gives NaN where it meets no row of dy, in the reference and in every variant alike."""
    dy, w = np.ones((1, 1, 4, 5), oracle.DTYPES[dtype]), np.ones((1, 1, 3, 3), oracle.DTYPES[dtype])
    w[0, 0, 2, :] = np.inf
    expected = cuconv.depthwise_conv2d_dgrad(dy, w, (1, 1, 4, 5), padding=1).astype(np.float64)
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(device.array(dy), device.array(w), (1, 1, 4, 5), padding=1)
    np.testing.assert_array_equal(device.host(dx).astype(np.float64), expected)
    assert np.isnan(expected[:, :, 0]).all()
    assert not np.isnan(expected[:, :, 1:, 1:4]).any()


@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_what_no_dy_reaches_is_zero_and_meets_no_weight(device, variant):
    """Between the rows and columns of a dy whose stride is beyond the kernel there is nothing, behind them zeros."""
    dy, w = np.ones((1, 1, 2, 2), np.float32), np.full((1, 1, 2, 3), np.inf, np.float32)
    x_shape, stride = (1, 1, 7, 12), (3, 5)
    expected = np.full(x_shape, np.inf, np.float32)
    expected[:, :, 6] = expected[..., 10:] = np.nan
    expected[:, :, 2::3] = expected[..., 3:5] = expected[..., 8:10] = 0
    np.testing.assert_array_equal(cuconv.depthwise_conv2d_dgrad(dy, w, x_shape, stride=stride), expected)
    with plan.variant(variant):
        dx = cuconv.depthwise_conv2d_dgrad(device.array(dy), device.array(w), x_shape, stride=stride)
    np.testing.assert_array_equal(device.host(dx), expected)


def test_dgrad_refuses_what_does_not_fit(device):
    dy, w = device.array(np.ones((2, 3, 5, 6), np.float32)), device.array(np.ones((3, 1, 3, 3), np.float32))
    with pytest.raises(ValueError, match=r"dy must have shape \(2, 3, 4, 6\).*\(2, 3, 5, 6\)"):
        cuconv.depthwise_conv2d_dgrad(dy, w, (2, 3, 6, 8))
    with pytest.raises(TypeError, match=r"x_shape must be an integer.*7.5"):
        cuconv.depthwise_conv2d_dgrad(dy, w, (2, 3, 7.5, 8))
    with pytest.raises(TypeError, match=r"x_shape must be a tuple.*7"):
        cuconv.depthwise_conv2d_dgrad(dy, w, 7)
    with pytest.raises(TypeError, match=r"w must have dy's dtype, float32.*float64"):
        cuconv.depthwise_conv2d_dgrad(dy, w.astype(np.float64), (2, 3, 7, 8))
    with pytest.raises(ValueError, match=r"out must not overlap another array.*dy"):
        cuconv.depthwise_conv2d_dgrad(dy, w, (2, 3, 5, 6), padding=1, out=dy)
    with plan.variant("runs"), pytest.raises(ValueError, match=r"variant runs.*stride 1 or dilation 1.*\(1, 2\)"):
        cuconv.depthwise_conv2d_dgrad(dy, w, (2, 3, 7, 15), stride=(1, 2), dilation=(1, 2))
    empty = cuconv.depthwise_conv2d_dgrad(dy[:0], w, (0, 3, 7, 8))
    assert empty.shape == (0, 3, 7, 8)


def gradients(rng, x_shape, w_shape, dtype, numbers):
    """dy and x of a convolution, random."""
    x, w, _ = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    return rng.standard_normal(oracle.convolve(x, w, **numbers).shape).astype(x.dtype), x


def wgrad_cases(dtypes):
    return [case for case in cases(dtypes) if case.values[-1] != "toeplitz"]


@pytest.mark.parametrize(("x_shape", "w_shape", "numbers", "dtype", "variant"), list(wgrad_cases(oracle.DTYPES)))
def test_every_variant_of_wgrad_matches_float64(device, rng, x_shape, w_shape, numbers, dtype, variant):
    dy, x = gradients(rng, x_shape, w_shape, dtype, numbers)
    dw_out, dw_guards = device.guarded(w_shape, x.dtype)
    dbias_out, dbias_guards = device.guarded(w_shape[:1], x.dtype)
    arrays = device.array(dy), device.array(x), w_shape
    with plan.variant(variant):
        dw, dbias = cuconv.depthwise_conv2d_wgrad(*arrays, bias=True, out=(dw_out, dbias_out), **numbers)
        alone = cuconv.depthwise_conv2d_wgrad(*arrays, **numbers)
    assert dw is dw_out
    assert dbias is dbias_out
    oracle.assert_wgrad_within_bound(device.host(dw), device.host(dbias), dy, x, **numbers)
    oracle.assert_wgrad_within_bound(device.host(alone), None, dy, x, **numbers)
    dw_guards.assert_untouched()
    dbias_guards.assert_untouched()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_tile_of_wgrad(device, rng, dtype):
    """Units of rows and of planes, few and many slabs, all stages, patches that end where dy does and that do not."""
    for x_shape, w_shape, numbers in (
        ((3, 20, 14, 14), (20, 1, 3, 3), {"padding": ((1, 1), (1, 1))}),
        ((5, 2, 37, 22), (4, 1, 2, 3), {"padding": ((1, 0), (2, 1)), "stride": (2, 1)}),
        ((2, 3, 40, 31), (3, 1, 3, 2), {"padding": ((2, 2), (0, 3)), "dilation": (2, 3)}),
    ):
        dy, x = gradients(rng, x_shape, w_shape, dtype, numbers)
        g = cuconv.geometry.depthwise_geometry(x_shape, w_shape, **numbers)
        tiles = list(wgrad.tiles_of_runs(g, dtype, True, device.target, aligned=True))
        for tile in each_feature_once(g, tiles):
            chosen = wgrad.tile_plan(g, dtype, True, device.target, tile)
            dw, dbias = (device.guarded(shape, x.dtype)[0] for shape in (w_shape, w_shape[:1]))
            workspace = device.array(np.full(max(1, chosen.workspace_bytes), 0xFF, np.uint8))
            given = device.array(dy), device.array(x), workspace, dw, dbias
            kernels.load(chosen.sums, 0)(*(array.data.ptr for array in given))
            if chosen.reduce is not None:
                kernels.load(chosen.reduce, 0)(*(array.data.ptr for array in given[2:]))
            oracle.assert_wgrad_within_bound(device.host(dw), device.host(dbias), dy, x, **numbers)


def each_feature_once(g, tiles):
    """Of the tiles of wgrad, as many as it takes to see every kind of patch, unit and slab."""
    seen = set()
    for tile in tiles:
        patch = tile.patch
        features = {
            ("beyond rows", g.P % (patch.rows * patch.spacing[0]) > 0),
            ("beyond columns", g.Q % (patch.columns * patch.spacing[1]) > 0),
            ("last unit shorter", g.P % tile.block_rows > 0, patch.rows > 1),
            ("vectors", patch.vector, patch.out_vector, patch.whole_rows),
            ("planes", tile.block_planes > 1, g.K % tile.block_planes > 0),
            ("stages", tile.stages, tile.slabs > g.N),
            ("slabs", tile.slabs > 1),
        }
        if not features <= seen:
            seen |= features
            yield tile


@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_nan_and_infinity_in_wgrad_reach_what_they_meet(device, rng, variant):
    """An infinite x at an edge meets some taps only; a dy of infinity meets the zeros of the padding. At every width
    there are patches that reach beyond dy, whose missing elements must meet nothing."""
    for width in (5, 8, 11, 13, 37):
        numbers = {"stride": (1, 1), "padding": ((1, 1), (1, 0)), "dilation": (1, 1)}
        dy, x = gradients(rng, (2, 3, 9, width), (3, 1, 3, 2), "float32", numbers)
        x[0, 0, -1, -1] = np.inf
        x[1, 1, 0, 0] = np.nan
        dy[1, 2, 0, -1] = np.inf
        expected = oracle.wgrad(dy, x, (3, 1, 3, 2), **numbers)
        with plan.variant(variant):
            given = device.array(dy), device.array(x)
            results = cuconv.depthwise_conv2d_wgrad(*given, (3, 1, 3, 2), bias=True, **numbers)
        for exact, result in zip(expected, results, strict=True):
            result = device.host(result)
            np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
            np.testing.assert_array_equal(result[~np.isfinite(exact)], exact[~np.isfinite(exact)])
        finite = np.isfinite(expected[0])
        assert finite[:2].any(axis=(1, 2, 3)).all()
        assert not finite.all(axis=(1, 2, 3)).any()
        assert {*np.isnan(expected[0][2]).ravel()} == {True, False}


@pytest.mark.parametrize("variant", ["direct", "runs"])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_small_integers_are_exact_in_wgrad(device, rng, dtype, variant):
    dy = rng.integers(-2, 3, (3, 6, 8, 5)).astype(oracle.DTYPES[dtype])
    x = rng.integers(-1, 2, (3, 3, 8, 10)).astype(oracle.DTYPES[dtype])
    numbers = {"stride": (1, 2), "padding": ((2, 0), (1, 0)), "dilation": (1, 1)}
    with plan.variant(variant):
        dw, dbias = cuconv.depthwise_conv2d_wgrad(device.array(dy), device.array(x), (6, 1, 3, 2), bias=True, **numbers)
    exact = oracle.wgrad(dy, x, (6, 1, 3, 2), **numbers)
    for result, expected in zip((dw, dbias), exact, strict=True):
        np.testing.assert_array_equal(device.host(result).astype(np.float64), expected)


@pytest.mark.parametrize("variant", ["direct", "runs"])
def test_same_bits_of_wgrad_every_time(device, rng, variant):
    dy, x = (device.array(rng.standard_normal((9, 5, 37, 41)).astype(np.float32)) for _ in range(2))

    def bits():
        gradients = cuconv.depthwise_conv2d_wgrad(dy, x, (5, 1, 3, 3), padding=1, bias=True)
        return np.concatenate([device.host(one).ravel() for one in gradients]).view(np.uint32)

    with plan.variant(variant):
        first = bits()
        for _ in range(device.repeats):
            np.testing.assert_array_equal(bits(), first)


def test_wgrad_out_and_workspace(device, rng):
    numbers = {"padding": ((1, 1), (1, 1))}
    dy, x = gradients(rng, (2, 3, 9, 8), (3, 1, 3, 3), "float32", numbers)
    on_device = device.array(dy), device.array(x), (3, 1, 3, 3)
    buffer, bias_buffer = device.array(np.zeros((3, 2, 3, 6), np.float32)), device.array(np.zeros(6, np.float32))
    out = (buffer[:, 1:, ::-1, ::2], bias_buffer[::-2])
    with pytest.raises(ValueError, match=r"workspace must have at least \d+ bytes, and has 8") as refusal:
        cuconv.depthwise_conv2d_wgrad(*on_device, bias=True, workspace=device.array(np.zeros(8, np.uint8)), **numbers)
    needed = int(str(refusal.value).split("at least ")[1].split()[0])
    workspace = device.array(np.full(-(-needed // 4), np.nan, np.float32))
    results = cuconv.depthwise_conv2d_wgrad(*on_device, bias=True, out=out, workspace=workspace, **numbers)
    assert all(result is given for result, given in zip(results, out, strict=True))
    oracle.assert_wgrad_within_bound(*map(device.host, out), dy, x, **numbers)
    assert not device.host(buffer)[:, 0].any()
    assert not device.host(buffer)[..., 1::2].any()


def test_wgrad_refuses_what_does_not_fit(device):
    dy, x = (device.array(np.ones((2, 3, 5, 6), np.float32)) for _ in range(2))
    wgrad = cuconv.depthwise_conv2d_wgrad
    with pytest.raises(ValueError, match=r"dy must have shape \(2, 3, 3, 4\).*\(2, 3, 5, 6\)"):
        wgrad(dy, x, (3, 1, 3, 3))
    with pytest.raises(TypeError, match=r"w_shape must be a tuple.*3"):
        wgrad(dy, x, 3)
    with pytest.raises(TypeError, match=r"x must have dy's dtype, float32.*float64"):
        wgrad(dy, x.astype(np.float64), (3, 1, 1, 1))
    with pytest.raises(TypeError, match=r"out must be a pair, and is"):
        wgrad(dy, x, (3, 1, 1, 1), bias=True, out=device.array(np.ones((3, 1, 1, 1), np.float32)))
    pair = tuple(device.array(np.ones(shape, np.float32)) for shape in ((3, 1, 1, 1), (4,)))
    with pytest.raises(ValueError, match=r"out must have the result's shape, \(3,\), and has \(4,\)"):
        wgrad(dy, x, (3, 1, 1, 1), bias=True, out=pair)
    with pytest.raises(ValueError, match=r"out must not overlap another array.*x"):
        wgrad(dy, x, (3, 1, 1, 1), out=x[:1, :, :1, :1].reshape(3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"workspace must not overlap another array.*dy"):
        wgrad(dy, x, (3, 1, 1, 1), workspace=dy)
    with pytest.raises(ValueError, match=r"workspace must be C-contiguous"):
        wgrad(dy, x, (3, 1, 1, 1), workspace=device.array(np.ones((9, 9), np.float32))[:, ::2])
    with pytest.raises(TypeError, match=r"dy is a .* array and x a numpy array"):
        wgrad(dy, device.host(x), (3, 1, 1, 1))


def test_wgrad_of_an_empty_batch_is_zero(device):
    dy, x = (device.array(np.ones((0, 3, 5, 6), np.float32)) for _ in range(2))
    for gradient in cuconv.depthwise_conv2d_wgrad(dy, x, (3, 1, 3, 3), padding=1, bias=True):
        np.testing.assert_array_equal(device.host(gradient), np.zeros(gradient.shape))


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, dtype) for dtype in oracle.DTYPES for variant in variants((6, 1, 3, 2), dtype)],
)
def test_small_integers_are_exact(device, rng, variant, dtype):
    x = rng.integers(-3, 4, (2, 3, 9, 10)).astype(oracle.DTYPES[dtype])
    w = rng.integers(-2, 3, (6, 1, 3, 2)).astype(oracle.DTYPES[dtype])
    numbers = {"stride": (1, 2), "padding": ((2, 0), (1, 1)), "dilation": (1, 1)}
    with plan.variant(variant):
        y = cuconv.depthwise_conv2d(device.array(x), device.array(w), **numbers)
    np.testing.assert_array_equal(device.host(y).astype(np.float64), oracle.convolve(x, w, **numbers))


@pytest.mark.parametrize(("variant", "dtype"), [*VARIANTS, ("direct", "float16"), ("runs", "float16")])
def test_every_width_and_every_offset(device, rng, variant, dtype):
    """Runs start at any element and end at any element, so that heads and tails of every length occur."""
    size = oracle.DTYPES[dtype].itemsize
    w = rng.standard_normal((2, 1, 3, 3)).astype(oracle.DTYPES[dtype])
    numbers = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    for width in (*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257):
        x = rng.standard_normal((2, 2, 3, width)).astype(oracle.DTYPES[dtype])
        offset = width % (16 // size)
        shifted = device.array(np.concatenate([np.zeros(offset, x.dtype), x.ravel()]))[offset:].reshape(x.shape)
        with plan.variant(variant):
            y = cuconv.depthwise_conv2d(shifted, device.array(w), **numbers)
        oracle.assert_within_bound(device.host(y), x, w, **numbers)


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS)
def test_channels_around_every_group_size(device, rng, variant, dtype):
    for channels in (1, 2, 23, 24, 25, 63, 64, 65):
        x, w, bias = oracle.random_arrays(rng, (3, channels, 4, 5), (channels, 1, 3, 3), dtype)
        with plan.variant(variant):
            y = cuconv.depthwise_conv2d(device.array(x), device.array(w), device.array(bias), padding=1)
        oracle.assert_within_bound(device.host(y), x, w, bias, padding=((1, 1), (1, 1)))


def test_several_images_a_block(device, rng):
    """Small planes of many images: blocks that go through images in turn, two of them under way at once."""
    x, w, bias = oracle.random_arrays(rng, (17, 90, 7, 6), (90, 1, 3, 3), "float32")
    geometry = cuconv.geometry.depthwise_geometry(x.shape, w.shape, padding=1)
    tiles = {
        tile.block_images: tile
        for patch in runs.patches(geometry, "float32", aligned=True)
        for tile in runs.tiles(geometry, "float32", patch, device.target.shared_per_block // 2)
        if tile.block_planes > 1
    }
    assert set(tiles) == {1, 2, 4}
    for tile in tiles.values():
        y = device.launch(runs.tile_plan(geometry, "float32", tile), x, w, bias, geometry.y_shape)
        oracle.assert_within_bound(y, x, w, bias, padding=((1, 1), (1, 1)))


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS)
def test_padding_takes_part_as_a_zero(device, variant, dtype):
    x = np.ones((1, 1, 5, 6), oracle.DTYPES[dtype])
    w = np.ones((1, 1, 3, 3), oracle.DTYPES[dtype])
    w[0, 0, 0, 0] = np.inf
    with plan.variant(variant):
        y = device.host(cuconv.depthwise_conv2d(device.array(x), device.array(w), padding=1)).astype(np.float64)
    outside = np.zeros(y.shape, bool)
    outside[:, :, 0, :] = outside[:, :, :, 0] = True  # where the tap of infinity falls into the padding
    np.testing.assert_array_equal(np.isnan(y), outside)
    assert np.isposinf(y[~outside]).all()


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS)
def test_nan_poisons_its_receptive_field_and_nothing_else(device, rng, variant, dtype):
    x, w, _ = oracle.random_arrays(rng, (2, 3, 9, 8), (3, 1, 3, 2), dtype)
    numbers = {"stride": (2, 1), "padding": ((1, 0), (0, 1)), "dilation": (1, 2)}
    x[1, 2, 4, 5] = np.nan
    with plan.variant(variant):
        y = device.host(cuconv.depthwise_conv2d(device.array(x), device.array(w), **numbers))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(oracle.convolve(x, w, **numbers)))
    assert np.isnan(y).any()


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS)
def test_nan_in_unread_pixels_poisons_nothing(device, rng, variant, dtype):
    x, w, _ = oracle.random_arrays(rng, (2, 3, 9, 10), (3, 1, 1, 1), dtype)
    x[:, :, 1::2] = np.nan
    x[:, :, :, 1::2] = np.nan
    with plan.variant(variant):
        y = device.host(cuconv.depthwise_conv2d(device.array(x), device.array(w), stride=2))
    oracle.assert_within_bound(y, x[:, :, ::2, ::2], w)


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS)
@pytest.mark.parametrize(
    "name", ["3x3_padded", "3x3_dilated_strided", "planes_together", "images_together", "5x5_padded"]
)
def test_infinities_stay_in_their_receptive_field(device, rng, name, variant, dtype):
    x_shape, w_shape, *numbers = GEOMETRIES[name]
    numbers = dict(zip(("stride", "padding", "dilation"), numbers, strict=True))
    x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    x[0, 0, 0, 0] = x[-1, -1, 2, 4] = np.inf
    x[-1, -1, 4, 3] = -np.inf
    with plan.variant(variant):
        y = device.host(cuconv.depthwise_conv2d(*map(device.array, (x, w, bias)), **numbers)).astype(np.float64)
    exact = oracle.convolve(x, w, bias, **numbers)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(y), kind(exact))
    finite = np.isfinite(exact)
    assert 0 < finite.sum() < finite.size
    np.testing.assert_allclose(y[finite], exact[finite], rtol=0.01, atol=0.05)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_large_kernels_keep_nan_and_infinity_in_their_receptive_field(device, rng, value, dtype):
    x_shape, w_shape, stride, padding, dilation = GEOMETRIES["large_kernel_strided"]
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    x, w, _ = oracle.random_arrays(rng, x_shape, w_shape, dtype, bias=False)
    x[1, 1, 20, 11] = value
    with plan.variant("toeplitz"):
        y = device.host(cuconv.depthwise_conv2d(device.array(x), device.array(w), **numbers)).astype(np.float64)
    exact = oracle.convolve(x, w, **numbers)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(y), kind(exact))


def test_infinite_weights_of_large_kernels_meet_the_padding(device):
    """As test_padding_takes_part_as_a_zero, on windows of several k-steps."""
    x, w = np.ones((1, 1, 20, 21), np.float16), np.ones((1, 1, 11, 31), np.float16)
    w[0, 0, 0, 30] = np.inf
    with plan.variant("toeplitz"):
        y = device.host(cuconv.depthwise_conv2d(device.array(x), device.array(w), padding=((5, 5), (15, 15))))
    outside = np.zeros(y.shape, bool)
    outside[:, :, :5] = outside[:, :, :, 6:] = True
    np.testing.assert_array_equal(np.isnan(y), outside)
    assert np.isposinf(y[~outside]).all()


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "numbers"),
    [
        ((11, 9, 13, 12), (9, 1, 3, 3), {"padding": 1}),
        ((3, 4, 40, 15), (8, 1, 12, 4), {"padding": (5, 2), "stride": (2, 1)}),
    ],
    ids=["bands_held", "rows_held"],
)
def test_toeplitz_tiles_of_every_kind(device, rng, x_shape, w_shape, numbers):
    """Every choice of every part of a tile, each at least once."""
    x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, "float16")
    geometry = cuconv.geometry.depthwise_geometry(x.shape, w.shape, **numbers)
    parts = ("rows", "block_rows", "block_planes", "block_images", "block_turns", "warps")
    seen = {part: set() for part in parts}
    numbers = {"padding": geometry.padding, "stride": geometry.stride}
    for tile in toeplitz.tiles(geometry, aligned=True, budget=device.target.shared_per_block // 2):
        if all(getattr(tile, part) in seen[part] for part in parts):
            continue
        for part in parts:
            seen[part].add(getattr(tile, part))
        chosen = toeplitz.tile_plan(geometry, "float16", tile)
        y = device.launch(chosen, x, w, bias, geometry.y_shape)
        oracle.assert_within_bound(y, x, w, bias, **numbers)
    assert min(len(values) for values in seen.values()) > 1


@pytest.mark.parametrize("view", ["reversed", "transposed", "strided", "offset", "broadcast"])
def test_views_of_any_strides(device, rng, view):
    base = rng.standard_normal((3, 4, 12, 10)).astype(np.float32)
    take = {
        "reversed": lambda a: a[:, :, ::-1, ::-1],
        "transposed": lambda a: a.transpose(1, 0, 3, 2),
        "strided": lambda a: a[::2, 1:3, ::3, 1:],
        "offset": lambda a: a[1:, 2:, 3:, 1:],
        "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape) if type(a) is np.ndarray else device.broadcast(a),
    }[view]
    x = take(base)
    w = rng.standard_normal((x.shape[1], 1, 2, 3)).astype(np.float32)
    y = cuconv.depthwise_conv2d(take(device.array(base)), device.array(w[:, :, ::-1])[:, :, ::-1])
    oracle.assert_within_bound(device.host(y), x, w)


def test_out_of_other_strides_is_written_right(device, rng):
    x, w, bias = oracle.random_arrays(rng, (2, 3, 7, 8), (3, 1, 3, 3), "float32")
    buffer = device.array(np.full((2, 6, 16, 5), 7, np.float32))
    out = buffer[:, ::2, ::-2].transpose(0, 1, 3, 2)
    assert out.shape == (2, 3, 5, 8)
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 6\).*\(2, 3, 5, 8\)"):
        cuconv.depthwise_conv2d(device.array(x), device.array(w), out=out)
    out = out[..., 1:7]
    y = cuconv.depthwise_conv2d(device.array(x), device.array(w), device.array(bias), out=out)
    assert y is out
    oracle.assert_within_bound(device.host(y), x, w, bias)
    rest = device.host(buffer)
    written = np.zeros(rest.shape, bool)
    written[:, ::2, ::-2].transpose(0, 1, 3, 2)[..., 1:7] = True
    assert (rest[~written] == 7).all()


def test_inputs_are_never_written(device, rng):
    x, w, bias = oracle.random_arrays(rng, (2, 3, 7, 8), (3, 1, 3, 3), "float32")
    arrays = [device.array(a) for a in (x, w, bias)]
    cuconv.depthwise_conv2d(*arrays, padding=1)
    for before, after in zip((x, w, bias), arrays, strict=True):
        np.testing.assert_array_equal(before, device.host(after))


def test_empty_batch(device):
    x, w = np.empty((0, 3, 7, 8), np.float32), np.ones((6, 1, 3, 3), np.float32)
    y = cuconv.depthwise_conv2d(device.array(x), device.array(w))
    assert y.shape == (0, 6, 5, 6)
    assert y.dtype == np.float32
    assert type(y) is device.array_type


def test_same_bits_every_time(device, rng):
    x, w, bias = (device.array(a) for a in oracle.random_arrays(rng, (2, 9, 17, 15), (9, 1, 3, 3), "float32"))
    first = device.host(cuconv.depthwise_conv2d(x, w, bias, padding=1)).view(np.uint32)
    for _ in range(device.repeats):
        again = device.host(cuconv.depthwise_conv2d(x, w, bias, padding=1)).view(np.uint32)
        np.testing.assert_array_equal(again, first)


def test_out_may_not_overlap_an_input(device):
    buffer = device.array(np.ones((2, 4, 6, 6), np.float32))
    w = device.array(np.ones((2, 1, 3, 3), np.float32))
    with pytest.raises(ValueError, match=r"out must not overlap another array.*x"):
        cuconv.depthwise_conv2d(buffer[:, :2], w, padding=1, out=buffer[:, 1:3])
    # Neighbouring channels of one buffer interleave in memory, and share none of it.
    y = cuconv.depthwise_conv2d(buffer[:, :2], w, padding=1, out=buffer[:, 2:])
    assert device.host(y)[0, 0, 1, 1] == 9


def test_host_and_device_arrays_do_not_mix(device):
    x, w = np.ones((1, 2, 5, 5), np.float32), np.ones((2, 1, 3, 3), np.float32)
    with pytest.raises(TypeError, match=r"x is a .* array and w a numpy array"):
        cuconv.depthwise_conv2d(device.array(x), w)
    with pytest.raises(TypeError, match=r"x is a numpy array and out a"):
        cuconv.depthwise_conv2d(x, w, out=device.array(np.ones((1, 2, 3, 3), np.float32)))


def test_a_forced_variant_that_cannot_run_says_why(device):
    x, w = device.array(np.ones((1, 1, 12, 12), np.float32)), device.array(np.ones((1, 1, 9, 9), np.float32))
    with plan.variant("runs"), pytest.raises(ValueError, match=r"variant runs.*64 taps.*9 x 9"):
        cuconv.depthwise_conv2d(x, w)
    with (
        pytest.raises(ValueError, match=r"variant must be one of runs, toeplitz, direct.*'fast'"),
        plan.variant("fast"),
    ):
        pass
