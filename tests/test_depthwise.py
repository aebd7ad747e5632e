"""depthwise_conv2d on the kernels: the same bodies on a GPU, and on the host where the real sources run as C++."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import oracle
import pytest
from backends import Gpu
from geometries import (
    GEOMETRIES,
    HALVES,
    LAYOUTS,
    VARIANT_CASES,
    VARIANTS,
    cases,
    numbers_of,
    same_kernel,
    shifted,
    suits,
)

import cuconv
from cuconv import kernels, plan
from cuconv.geometry import depthwise_geometry


@pytest.mark.parametrize(("g", "dtype", "layout", "variant"), list(cases("forward")))
def test_every_variant_matches_float64(device, rng, g, dtype, layout, variant):
    x, w, bias = oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype)
    out, guards = device.guarded(g.y_shape, x.dtype, layout)
    arrays = device.array(x, layout), device.array(w), device.array(bias)
    with plan.variant(variant):
        y = cuconv.depthwise_conv2d(*arrays, out=out, **numbers_of(g))
    assert y is out
    oracle.assert_within_bound(device.host(y), x, w, bias, **numbers_of(g))
    guards.assert_untouched()


def integer_cases():
    strided = depthwise_geometry((2, 3, 9, 10), (6, 1, 3, 2), stride=(1, 2), padding=((2, 0), (1, 1)))
    large = depthwise_geometry((2, 3, 9, 10), (6, 1, 7, 10), padding=((2, 5), (1, 4)))
    dense = depthwise_geometry((2, 3, 9, 10), (3, 1, 3, 2), padding=((2, 0), (1, 1)))
    others = {"tiles": large, "channels_last_runs": dense}
    for variant, dtype in product(VARIANTS, oracle.DTYPES):
        g = replace(others.get(variant, strided), channels_last=variant.startswith("channels_last"))
        if suits(variant, "forward", g, dtype):
            yield pytest.param(g, dtype, variant, id=f"{dtype}-{variant}")


@pytest.mark.parametrize(("g", "dtype", "variant"), list(integer_cases()))
def test_small_integers_are_exact(device, rng, g, dtype, variant):
    x = rng.integers(-3, 4, g.x_shape).astype(oracle.DTYPES[dtype])
    w = rng.integers(-2, 3, g.w_shape).astype(oracle.DTYPES[dtype])
    layout = LAYOUTS[g.channels_last]
    with plan.variant(variant):
        y = cuconv.depthwise_conv2d(device.array(x, layout), device.array(w), **numbers_of(g))
    # Sums beyond 256 are rounded once in bfloat16.
    expected = oracle.convolve(x, w, **numbers_of(g)).astype(x.dtype)
    np.testing.assert_array_equal(device.host(y).astype(np.float64), expected.astype(np.float64))


# Of narrow rows every width is a kernel of its own. 57 and 230 are just beyond four tiles and a block of them.
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 31, 33, 57, 64, 65, 129, 230, 256, 257)


@pytest.mark.parametrize(
    ("variant", "dtype", "layout"),
    [*VARIANT_CASES, ("runs", "float16", "nchw"), ("tiles", "float16", "nchw"), ("channels_last", "float16", "nhwc")],
)
def test_every_width_and_every_offset(device, rng, variant, dtype, layout):
    """Runs start at any element and end at any element, so that heads and tails of every length occur."""
    size = oracle.DTYPES[dtype].itemsize
    kernel, numbers = same_kernel(variant)
    w = rng.standard_normal((2, 1, *kernel)).astype(oracle.DTYPES[dtype])
    for width in WIDTHS:
        x = rng.standard_normal((2, 2, 3, width)).astype(oracle.DTYPES[dtype])
        with plan.variant(variant):
            y = cuconv.depthwise_conv2d(shifted(device, x, layout, width % (16 // size)), device.array(w), **numbers)
        oracle.assert_within_bound(device.host(y), x, w, **numbers)


@pytest.mark.parametrize(("variant", "dtype", "layout"), VARIANT_CASES)
def test_channels_around_every_group_size(device, rng, variant, dtype, layout):
    kernel, numbers = same_kernel(variant)
    # Of one channel an array channels-last counts as NCHW.
    for channels in (1 if layout == "nchw" else 4, 2, 23, 24, 25, 63, 64, 65):
        x, w, bias = oracle.random_arrays(rng, (3, channels, 4, 5), (channels, 1, *kernel), dtype)
        arrays = device.array(x, layout), device.array(w), device.array(bias)
        with plan.variant(variant):
            y = cuconv.depthwise_conv2d(*arrays, **numbers)
        oracle.assert_within_bound(device.host(y), x, w, bias, **numbers)


@pytest.mark.parametrize(("variant", "dtype", "layout"), VARIANT_CASES)
def test_padding_takes_part_as_a_zero(device, variant, dtype, layout):
    (R, S), numbers = same_kernel(variant)
    x = np.ones((1, 2, 9, 16), oracle.DTYPES[dtype])
    w = np.ones((2, 1, R, S), oracle.DTYPES[dtype])
    w[:, 0, 0, 0] = np.inf
    with plan.variant(variant):
        y = cuconv.depthwise_conv2d(device.array(x, layout), device.array(w), **numbers)
    y = device.host(y).astype(np.float64)
    outside = np.zeros(y.shape, bool)
    # Where the tap of infinity falls into the padding.
    outside[:, :, : R // 2] = outside[..., : S // 2] = True
    np.testing.assert_array_equal(np.isnan(y), outside)
    assert np.isposinf(y[~outside]).all()


@pytest.mark.parametrize(("variant", "dtype", "layout"), VARIANT_CASES)
def test_nan_poisons_its_receptive_field_and_nothing_else(device, rng, variant, dtype, layout):
    kernel, numbers = (3, 2), {"stride": (2, 1), "padding": ((1, 0), (0, 1)), "dilation": (1, 2)}
    if variant == "tiles":
        kernel, numbers = (7, 13), {"padding": ((3, 1), (4, 6))}
    if variant == "channels_last_runs":
        numbers = {"padding": ((1, 0), (0, 1))}
    x, w, _ = oracle.random_arrays(rng, (2, 3, 9, 8), (3, 1, *kernel), dtype)
    x[1, 2, 4, 5] = np.nan
    with plan.variant(variant):
        y = device.host(cuconv.depthwise_conv2d(device.array(x, layout), device.array(w), **numbers))
    poisoned = np.isnan(oracle.convolve(x, w, **numbers))
    np.testing.assert_array_equal(np.isnan(y), poisoned)
    assert poisoned.any()
    assert not poisoned[1].all()


@pytest.mark.parametrize(
    ("variant", "dtype", "layout"), [case for case in VARIANT_CASES if case[0] not in ("tiles", "channels_last_runs")]
)
def test_nan_in_unread_pixels_poisons_nothing(device, rng, variant, dtype, layout):
    x, w, _ = oracle.random_arrays(rng, (2, 3, 9, 10), (3, 1, 1, 1), dtype)
    x[:, :, 1::2] = np.nan
    x[:, :, :, 1::2] = np.nan
    with plan.variant(variant):
        y = device.host(cuconv.depthwise_conv2d(device.array(x, layout), device.array(w), stride=2))
    oracle.assert_within_bound(y, x[:, :, ::2, ::2], w)


def infinity_cases():
    names = ("3x3_padded", "3x3_dilated_strided", "planes_together", "images_together", "5x5_padded", "9x9_channels")
    for name, (variant, dtype, layout) in product(names, VARIANT_CASES):
        g = replace(GEOMETRIES[name], channels_last=layout == "nhwc")
        if suits(variant, "forward", g, dtype):
            yield pytest.param(g, dtype, layout, variant, id=f"{name}-{dtype}-{layout}-{variant}")


@pytest.mark.parametrize(("g", "dtype", "layout", "variant"), list(infinity_cases()))
def test_infinities_stay_in_their_receptive_field(device, rng, g, dtype, layout, variant):
    x, w, bias = oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype)
    x[0, 0, 0, 0] = x[-1, -1, 2, 4] = np.inf
    x[-1, -1, 4, 3] = -np.inf
    arrays = device.array(x, layout), device.array(w), device.array(bias)
    with plan.variant(variant):
        y = device.host(cuconv.depthwise_conv2d(*arrays, **numbers_of(g))).astype(np.float64)
    exact = oracle.convolve(x, w, bias, **numbers_of(g))
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(y), kind(exact))
    finite = np.isfinite(exact)
    assert 0 < finite.sum() < finite.size
    np.testing.assert_allclose(y[finite], exact[finite], rtol=0.01, atol=0.05)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_large_kernels_keep_nan_and_infinity_in_their_receptive_field(device, rng, value, dtype):
    g = GEOMETRIES["large_kernel_strided"]
    x, w, _ = oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype, bias=False)
    x[1, 1, 20, 11] = value
    with plan.variant("toeplitz"):
        y = device.host(cuconv.depthwise_conv2d(device.array(x), device.array(w), **numbers_of(g)))
    exact = oracle.convolve(x, w, **numbers_of(g))
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(y.astype(np.float64)), kind(exact))


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


def layouts_of(array):
    """The layouts in which the array of the device is dense."""
    nhwc = array.transpose(0, 2, 3, 1).flags.c_contiguous
    return {layout for layout, dense in zip(LAYOUTS, (array.flags.c_contiguous, nhwc), strict=True) if dense}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_has_the_layout_of_the_input(device, rng, layout):
    x, w, bias = oracle.random_arrays(rng, (2, 3, 7, 8), (6, 1, 3, 3), "float32")
    y = cuconv.depthwise_conv2d(device.array(x, layout), device.array(w), device.array(bias))
    assert layouts_of(y) == {layout}
    oracle.assert_within_bound(device.host(y), x, w, bias)
    dx = cuconv.depthwise_conv2d_dgrad(y, device.array(w), x.shape)
    assert layouts_of(dx) == {layout}
    oracle.assert_dgrad_within_bound(device.host(dx), device.host(y), w)
    # w in other strides is the same w.
    again = cuconv.depthwise_conv2d(device.array(x, layout), device.array(w, "nhwc"), device.array(bias))
    np.testing.assert_array_equal(device.host(again), device.host(y))


@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (3, 4, 1, 1), (1, 1, 1, 1)])
def test_an_array_of_both_layouts_counts_as_nchw(device, rng, shape):
    x, w, _ = oracle.random_arrays(rng, shape, (4, 1, 1, 1), "float32")
    numbers = {"stride": (1, 1), "padding": ((1, 1), (0, 1)), "dilation": (1, 1)}
    y = cuconv.depthwise_conv2d(device.array(x, "nhwc"), device.array(w), **numbers)
    assert layouts_of(y) == {"nchw"}
    oracle.assert_within_bound(device.host(y), x, w, **numbers)


@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_in_each_layout(device, rng, layout, out_layout):
    x, w, bias = oracle.random_arrays(rng, (2, 3, 7, 8), (3, 1, 3, 3), "float32")
    out, guards = device.guarded((2, 3, 5, 6), x.dtype, out_layout)
    y = cuconv.depthwise_conv2d(device.array(x, layout), device.array(w), device.array(bias), out=out)
    assert y is out
    assert layouts_of(out) == {out_layout}
    oracle.assert_within_bound(device.host(out), x, w, bias)
    dx, dx_guards = device.guarded(x.shape, x.dtype, out_layout)
    assert cuconv.depthwise_conv2d_dgrad(device.array(x[..., :5, :6], layout), device.array(w), x.shape, out=dx) is dx
    oracle.assert_dgrad_within_bound(device.host(dx), x[..., :5, :6], w)
    guards.assert_untouched()
    dx_guards.assert_untouched()


@pytest.mark.parametrize("view", ["channels", "columns", "reversed", "rows"])
def test_views_of_channels_last_are_copied_to_nchw(device, rng, view):
    base = rng.standard_normal((3, 6, 9, 10)).astype(np.float32)
    take = {
        "channels": lambda a: a[:, 1:4],
        "columns": lambda a: a[..., 2:8],
        "reversed": lambda a: a[:, ::-1],
        "rows": lambda a: a[:, :, ::2],
    }[view]
    x = take(base)
    w = rng.standard_normal((x.shape[1], 1, 3, 2)).astype(np.float32)
    y = cuconv.depthwise_conv2d(take(device.array(base, "nhwc")), device.array(w))
    assert layouts_of(y) == {"nchw"}
    oracle.assert_within_bound(device.host(y), x, w)


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
    with plan.variant("toeplitz"), pytest.raises(ValueError, match=r"variant toeplitz.*float16.*float32"):
        cuconv.depthwise_conv2d(x, w)
    with plan.variant("tiles"), pytest.raises(ValueError, match=r"variant tiles.*more than 64 taps.*3 x 3"):
        cuconv.depthwise_conv2d(x, device.array(np.ones((1, 1, 3, 3), np.float32)))
    with plan.variant("tiles"), pytest.raises(ValueError, match=r"variant tiles.*stride 1 and dilation 1.*\(1, 2\)"):
        cuconv.depthwise_conv2d(x, w, stride=(1, 2))
    with pytest.raises(ValueError, match=rf"variant must be one of {', '.join(plan.VARIANTS)}.*'fast'"):  # noqa: SIM117
        with plan.variant("fast"):
            pass


def test_a_forced_variant_refuses_the_other_layout(device):
    x, w = np.ones((1, 2, 12, 12), np.float32), np.ones((2, 1, 3, 3), np.float32)
    for call in (cuconv.depthwise_conv2d, lambda dy, w: cuconv.depthwise_conv2d_dgrad(dy, w, (1, 2, 14, 14))):
        with plan.variant("runs"), pytest.raises(ValueError, match=r"variant runs: .*channels-last"):
            call(device.array(x, "nhwc"), device.array(w))
        with plan.variant("channels_last"), pytest.raises(ValueError, match=r"variant channels_last: .*\(N, C, H, W\)"):
            call(device.array(x), device.array(w))


def one_plan_of_every_source():
    """Of every file of kernels that the passes launch, one plan."""
    found = {}
    for direction, planner in (("forward", plan.depthwise_forward), ("dgrad", plan.depthwise_dgrad)):
        for case in cases(direction):
            g, dtype, _, variant = case.values
            chosen = planner(g, dtype, plan.TARGETS[90], variant)
            found.setdefault(chosen.source, chosen)
    for case in cases("wgrad"):
        g, dtype, _, variant = case.values
        chosen = plan.depthwise_wgrad(g, dtype, True, plan.TARGETS[90], variant)
        for launch in (chosen.sums, chosen.reduce):
            if launch is not None:
                found.setdefault(launch.source, launch)
    return [pytest.param(chosen, id=source) for source, chosen in found.items()]


@pytest.mark.parametrize("chosen", one_plan_of_every_source())
def test_parameters_have_the_bytes_that_the_kernel_takes(device, chosen):
    """The driver cannot tell: it copies as many as the kernel's parameters have, from whatever address it is given."""
    if isinstance(device, Gpu):
        pytest.skip("only the twin knows the size of a kernel's parameters")
    *arrays, parameters = kernels._kernel(chosen.source, chosen.defines, 0).parameter_sizes
    assert parameters == chosen.parameter_struct().nbytes
    assert set(arrays) == {8}
    assert len(arrays) <= kernels._MAX_ARRAYS
