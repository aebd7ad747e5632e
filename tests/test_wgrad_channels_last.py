"""Gradients of the weights and the bias of channels-last arrays: every geometry, every kind of tile, every rule."""

from __future__ import annotations

from itertools import product

import numpy as np
import oracle
import pytest
from geometries import EVERYWHERE, tells_layout
from hypothesis import given, settings
from hypothesis import strategies as st

import cuconv
from cuconv import kernels, plan
from cuconv.geometry import depthwise_geometry
from cuconv.plan import channels_last, wgrad_channels_last

SOURCE = "depthwise_wgrad_channels_last"
FEW_TAPS = {name: numbers for name, numbers in EVERYWHERE.items() if np.prod(numbers[1]) <= 64 * numbers[1][0]}


def cases():
    """Those that test_depthwise_wgrad leaves out: arrays whose strides do not tell their layout."""
    for name, (x_shape, w_shape, *numbers) in FEW_TAPS.items():
        if not tells_layout(x_shape):
            numbers = dict(zip(("stride", "padding", "dilation"), numbers, strict=True))
            yield pytest.param(x_shape, w_shape, numbers, "float32", id=name)


def gradients(rng, x_shape, w_shape, dtype, numbers):
    """dy and x of a convolution, random."""
    x, w, _ = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    return rng.standard_normal(oracle.convolve(x, w, **numbers).shape).astype(x.dtype), x


def launch(device, chosen, dy, x, w_shape):
    """dw and dbias of a plan, all that it writes to poisoned before."""
    (dw, dw_guards), (dbias, dbias_guards) = (device.guarded(shape, x.dtype) for shape in (w_shape, w_shape[:1]))
    workspace = device.array(np.full(max(1, chosen.workspace_bytes), 0xFF, np.uint8))
    given = device.array(dy, "nhwc"), device.array(x, "nhwc"), workspace, dw, dbias
    kernels.load(chosen.sums, 0)(*(array.data.ptr for array in given))
    if chosen.reduce is not None:
        kernels.load(chosen.reduce, 0)(*(array.data.ptr for array in given[2:]))
    dw_guards.assert_untouched()
    dbias_guards.assert_untouched()
    return device.host(dw), device.host(dbias)


def nhwc_geometry(x_shape, w_shape, **numbers):
    return depthwise_geometry(x_shape, w_shape, channels_last=True, **numbers)


@pytest.mark.parametrize(("x_shape", "w_shape", "numbers", "dtype"), list(cases()))
def test_matches_float64(device, rng, x_shape, w_shape, numbers, dtype):
    """By plan, since arrays of one channel or one pixel count as (N, C, H, W) and never come here by themselves."""
    dy, x = gradients(rng, x_shape, w_shape, dtype, numbers)
    g = nhwc_geometry(x_shape, w_shape, **numbers)
    for bias in (True, False) if dtype == "float32" else (True,):
        chosen = plan.depthwise_wgrad(g, dtype, bias, device.target, "channels_last")
        assert chosen.source == SOURCE
        dw, dbias = launch(device, chosen, dy, x, w_shape)
        oracle.assert_wgrad_within_bound(dw, dbias if bias else None, dy, x, **numbers)
        assert bias or (dbias.view(np.uint8) == 0xFF).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 23, 24, 25, 64, 67])
@pytest.mark.parametrize("variant", ["channels_last", "channels_last_staged"])
def test_channels_around_every_vector(device, rng, variant, channels, dtype):
    numbers = {"padding": ((1, 1), (1, 1))}
    dy, x = gradients(rng, (3, channels, 5, 6), (channels, 1, 3, 3), dtype, numbers)
    g = nhwc_geometry(x.shape, (channels, 1, 3, 3), **numbers)
    chosen = plan.depthwise_wgrad(g, dtype, True, device.target, variant)
    dw, dbias = launch(device, chosen, dy, x, g.w_shape)
    oracle.assert_wgrad_within_bound(dw, dbias, dy, x, **numbers)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "numbers", "dtype"),
    [
        ((5, 20, 14, 14), (20, 1, 3, 3), {"padding": ((1, 1), (1, 1))}, "float16"),
        ((3, 96, 9, 11), (96, 1, 3, 3), {"padding": ((1, 1), (1, 1))}, "float32"),
        ((5, 8, 37, 22), (8, 1, 2, 3), {"padding": ((1, 0), (2, 1)), "stride": (2, 2)}, "bfloat16"),
        ((2, 3, 40, 31), (6, 1, 3, 2), {"padding": ((2, 2), (0, 3)), "dilation": (2, 3)}, "float32"),
        ((3, 16, 17, 9), (16, 1, 5, 5), {"padding": ((2, 2), (2, 2))}, "bfloat16"),
    ],
    ids=["3x3", "channels_apart", "strided", "dilated_multiplied", "5x5"],
)
def test_every_kind_of_tile(device, rng, x_shape, w_shape, numbers, dtype):
    dy, x = gradients(rng, x_shape, w_shape, dtype, numbers)
    g = nhwc_geometry(x_shape, w_shape, **numbers)
    tiles = list(wgrad_channels_last.tiles(g, dtype, True, device.target, aligned=True))
    # In an order of no meaning, so that a tile shows many features that no one before it has shown.
    for tile in each_feature_once(g, [tiles[i] for i in rng.permutation(len(tiles))]):
        chosen = wgrad_channels_last.tile_plan(g, dtype, True, device.target, tile)
        dw, dbias = launch(device, chosen, dy, x, w_shape)
        oracle.assert_wgrad_within_bound(dw, dbias, dy, x, **numbers)


def each_feature_once(g, tiles):
    """Of the tiles, as many as it takes to see every kind of strip, block and slab."""
    seen = set()
    for tile in tiles:
        column_items, strip_rows, rows = wgrad_channels_last._extents(g, tile)
        features = {
            ("vector", tile.vector),
            ("depth", tile.depth),
            ("columns", tile.columns),
            ("beyond", g.Q % (tile.columns * tile.spacing[1]) > 0),
            ("strips", tile.strips > 1),
            ("images", tile.strips > column_items),
            ("last strips", g.N * column_items % tile.strips > 0),
            ("channels", tile.groups * tile.vector < g.K, g.K % (tile.groups * tile.vector) > 0),
            ("idle", tile.threads > tile.groups * tile.strips),
            ("slab", tile.slab_rows < strip_rows, tile.slab_rows % strip_rows > 0, tile.slab_rows < rows),
            ("last slab", rows % tile.slab_rows > 0),
        }
        if not features <= seen:
            seen |= features
            yield tile


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [({}, "float32"), ({}, "bfloat16"), ({"stride": (2, 2)}, "float16"), ({"dilation": (2, 3)}, "float32")],
    ids=["float32", "bfloat16", "strided", "dilated"],
)
def test_nan_and_infinity_reach_what_they_meet(device, rng, numbers, dtype):
    """An infinite x at an edge meets some taps only; a dy of infinity meets the zeros of the padding. At every width
    there are strips that reach beyond dy, whose missing elements must meet nothing."""
    numbers = {"padding": ((1, 1), (1, 0)), **numbers}
    w_shape = (4, 1, 3, 2)
    for width in (8, 13, 37):
        dy, x = gradients(rng, (2, 4, 9, width), w_shape, dtype, numbers)
        x[0, 0, -1, -1] = np.inf
        x[1, 1, 0, 0] = np.nan
        x[1, 1, 4, width - 2] = -np.inf
        dy[1, 2, 0, -1] = np.inf
        dy[0, 3, -1, 0] = -np.inf
        expected = oracle.wgrad(dy, x, w_shape, **numbers)
        assert np.isnan(expected[0][2:]).any(axis=(1, 2, 3)).all()
        g = nhwc_geometry(x.shape, w_shape, **numbers)
        tiles = wgrad_channels_last.tiles(g, dtype, True, device.target, aligned=True)
        # Exact or not, and a strip that is missing altogether where there are more of them in a block than in dy.
        kinds = {(tile.columns, tile.strips > g.N * 2): tile for tile in tiles if tile.columns in (3, 4)}
        for tile in kinds.values():
            chosen = wgrad_channels_last.tile_plan(g, dtype, True, device.target, tile)
            for exact, result in zip(expected, launch(device, chosen, dy, x, w_shape), strict=True):
                result = result.astype(np.float64)
                np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
                np.testing.assert_array_equal(result[~np.isfinite(exact)], exact[~np.isfinite(exact)])


def test_nan_that_no_tap_reads_poisons_nothing(device, rng):
    numbers = {"stride": (2, 2)}
    dy, x = gradients(rng, (2, 8, 9, 10), (8, 1, 1, 1), "float32", numbers)
    read = x[:, :, ::2, ::2].copy()
    x[:, :, 1::2] = x[:, :, :, 1::2] = np.nan
    arrays = device.array(dy, "nhwc"), device.array(x, "nhwc"), (8, 1, 1, 1)
    dw = cuconv.depthwise_conv2d_wgrad(*arrays, **numbers)
    oracle.assert_wgrad_within_bound(device.host(dw), None, dy, read)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_arrays_at_any_element(device, rng, offset):
    numbers = {"padding": ((1, 1), (1, 1))}
    dy, x = gradients(rng, (2, 8, 9, 8), (8, 1, 3, 3), "float16", numbers)

    def shifted(array):
        memory = np.concatenate([np.zeros(offset, array.dtype), array.transpose(0, 2, 3, 1).ravel()])
        N, C, H, W = array.shape
        return device.array(memory)[offset:].reshape(N, H, W, C).transpose(0, 3, 1, 2)

    dw, dbias = cuconv.depthwise_conv2d_wgrad(shifted(dy), shifted(x), (8, 1, 3, 3), bias=True, **numbers)
    oracle.assert_wgrad_within_bound(device.host(dw), device.host(dbias), dy, x, **numbers)


extent = st.integers(1, 300)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 300), extent, extent),
    multiplier=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    stride=st.tuples(st.integers(1, 9), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.tuples(st.integers(0, 9), st.integers(0, 9))),
    dtype=st.sampled_from(list(plan.DTYPES)),
    architecture=st.sampled_from([75, 90, 120]),
    aligned=st.booleans(),
)
def test_every_plan_covers_dy_and_fits_the_device(
    shape, multiplier, kernel, stride, dilation, padding, dtype, architecture, aligned
):
    numbers = {"stride": stride, "dilation": dilation, "padding": padding}
    try:
        g = nhwc_geometry(shape, (shape[1] * multiplier, 1, *kernel), **numbers)
    except ValueError:
        return  # a kernel larger than its input
    target = plan.TARGETS[architecture]
    chosen = plan.depthwise_wgrad(g, dtype, True, target, "channels_last", aligned)
    values, defines = dict(chosen.sums.parameters), dict(chosen.sums.defines)
    chunks, slabs, _ = chosen.sums.grid
    assert all(1 <= extent <= limit for extent, limit in zip(chosen.sums.grid, plan.MAX_GRID, strict=True))
    assert values["block_groups"] * values["block_strips"] <= chosen.sums.block <= 256
    assert chosen.sums.block == defines["THREADS"]
    assert 0 < chosen.sums.shared_bytes <= target.shared_per_block
    assert (chosen.reduce is None) == (slabs == 1) == bool(defines["FINAL"])
    # Every channel has a thread, every row of every strip a slab, every column a strip.
    assert values["groups"] * defines["VECTOR"] == g.K
    assert g.C % defines["VECTOR"] == 0
    assert aligned or defines["VECTOR"] == 1
    assert (chunks - 1) * values["block_groups"] < values["groups"] <= chunks * values["block_groups"]
    assert (slabs - 1) * values["slab_rows"] < values["rows"] <= slabs * values["slab_rows"]
    assert values["strips"] == g.N * values["column_items"]
    steps = values["rows"] // values["strip_rows"] // values["spacing_h"]
    assert (steps - 1) * values["block_strips"] < values["strips"] <= steps * values["block_strips"]
    assert values["strip_rows"] * values["spacing_h"] >= g.P
    assert values["column_items"] * defines["COLUMNS"] >= g.Q
    assert values["column_items"] % values["spacing_w"] == 0
    # Compile-time values come from small sets, whatever the shapes.
    assert defines["COLUMNS"] in wgrad_channels_last._COLUMNS
    assert defines["STRIDE_W"] <= 2
    assert defines["STRIDE_H"] <= g.R
    assert defines["THREADS"] % 32 == 0


def test_parameter_struct_matches_the_fields_of_the_kernel():
    g = nhwc_geometry((2, 3, 9, 9), (3, 1, 3, 3))
    chosen = plan.depthwise_wgrad(g, "float16", True, plan.TARGETS[90], "channels_last")
    text = (kernels.sources_folder() / f"{SOURCE}.cu").read_text()
    body = text[text.index("struct Parameters {") : text.index("};", text.index("struct Parameters {"))]
    fields = []
    for line in body.splitlines()[1:]:
        kind, _, names = line.split("//")[0].strip().rstrip(";").partition(" ")
        fields += [(name.strip(), {"int": "int32", "uint32": "uint32"}[kind]) for name in names.split(",")]
    struct = chosen.sums.parameter_struct()
    assert [(name, str(struct.dtype[name])) for name in struct.dtype.names] == fields


COMPILED = {
    "3x3": ((16, 64, 512, 512), (64, 1, 3, 3), {}),
    "3x3_odd": ((32, 67, 129, 131), (67, 1, 3, 3), {"padding": 1}),
    "3x3_stride_2": ((64, 128, 112, 112), (128, 1, 3, 3), {"padding": 1, "stride": 2}),
    "3x3_multiplier_2": ((64, 32, 112, 112), (64, 1, 3, 3), {"padding": 1}),
    "3x3_dilation_12": ((8, 256, 65, 65), (256, 1, 3, 3), {"padding": 12, "dilation": 12}),
    "3x3_small": ((128, 512, 14, 14), (512, 1, 3, 3), {"padding": 1}),
    "5x5": ((128, 240, 28, 28), (240, 1, 5, 5), {"padding": 2}),
    "7x7": ((64, 192, 56, 56), (192, 1, 7, 7), {"padding": 3}),
}


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_without_spills(case, architecture):
    pytest.importorskip("cupy", reason="no cupy: kernels are not compiled (install cuconv[test])")
    x_shape, w_shape, numbers = COMPILED[case]
    target = plan.TARGETS[int(architecture.removeprefix("sm_").rstrip("a"))]
    g = nhwc_geometry(x_shape, w_shape, **numbers)
    for dtype, bias in product(("float32", "bfloat16", "float64"), (True, False)):
        chosen = plan.depthwise_wgrad(g, dtype, bias, target, "channels_last").sums
        assert chosen.source == SOURCE
        resources = kernels.compile_only(chosen, architecture)
        assert resources.spill_bytes == 0, f"{chosen} spills {resources.spill_bytes} bytes on {architecture}"


def test_refuses_in_words(device):
    many_taps = nhwc_geometry((2, 3, 40, 40), (3, 1, 9, 9))
    assert plan.depthwise_wgrad(many_taps, "float32", True, device.target).source == "depthwise_wgrad_direct"
    with pytest.raises(plan.Unsuitable, match=r"variant channels_last: takes at most 64 taps.*9 x 9"):
        plan.depthwise_wgrad(many_taps, "float32", True, device.target, "channels_last")
    planes = depthwise_geometry((2, 3, 40, 40), (3, 1, 3, 3))
    with pytest.raises(plan.Unsuitable, match=r"variant channels_last: takes channels-last arrays"):
        plan.depthwise_wgrad(planes, "float32", True, device.target, "channels_last")
    assert channels_last.MAX_TAPS == 64
