"""Gradients of the weights and the bias of channels-last arrays through shared memory: every kind of tile and rule."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wgrad_channels_last import COMPILED, gradients, launch, nhwc_geometry

from cuconv import kernels, plan
from cuconv.plan import wgrad_channels_last_staged as staged

KINDS = pytest.mark.parametrize(
    ("x_shape", "w_shape", "numbers", "dtype"),
    [
        ((5, 20, 14, 14), (20, 1, 3, 3), {"padding": ((1, 1), (1, 1))}, "float16"),
        ((3, 96, 9, 11), (96, 1, 3, 3), {"padding": ((1, 1), (1, 1))}, "float32"),
        ((5, 8, 37, 22), (8, 1, 2, 3), {"padding": ((1, 0), (2, 1)), "stride": (2, 2)}, "bfloat16"),
        ((2, 6, 40, 31), (6, 1, 3, 2), {"padding": ((2, 2), (0, 3)), "dilation": (2, 3)}, "float32"),
        ((3, 16, 17, 9), (16, 1, 5, 5), {"padding": ((2, 2), (2, 2))}, "bfloat16"),
        ((3, 7, 9, 19), (7, 1, 3, 4), {"padding": ((1, 1), (3, 2))}, "float16"),
        ((2, 6, 11, 17), (6, 1, 3, 3), {"padding": ((1, 0), (1, 2)), "stride": (2, 2)}, "bfloat16"),
        ((3, 16, 7, 8), (16, 1, 7, 5), {"padding": ((3, 3), (2, 2))}, "float32"),
    ],
    ids=["3x3_small", "channels_apart", "strided", "dilated", "5x5", "odd", "runs_strided", "7x5"],
)


def each_feature_once(g, target, tiles):
    """Of the tiles, as many as it takes to see every kind of strip, block and slab."""
    seen = set()
    for tile in tiles:
        items = staged._column_items(g, tile)
        strip_rows, rows = staged._rows(g, tile)
        features = {
            ("vector", tile.vector),
            ("stages", tile.stages),
            ("columns", tile.columns),
            ("beyond", g.Q % (tile.columns * tile.spacing[1]) > 0),
            ("strips", tile.strips > 1, tile.strips < items, items % tile.strips > 0),
            ("images", tile.images > 1, g.N % tile.images > 0),
            ("channels", tile.channels < g.K, g.K % tile.channels > 0),
            ("idle", tile.threads > tile.groups * tile.strips * tile.images),
            ("runs", tile.runs),
            ("columns of runs", tile.columns, tile.strips, tile.runs),
            ("slab", tile.slab_rows < strip_rows, tile.slab_rows % strip_rows > 0, tile.slab_rows < rows),
            ("last slab", rows % tile.slab_rows > 0),
            ("cluster", staged._clustered(g, target, tile, -(-rows // tile.slab_rows)), tile.images > 1),
        }
        if not features <= seen:
            seen |= features
            yield tile


@KINDS
def test_every_kind_of_tile(device, rng, x_shape, w_shape, numbers, dtype):
    dy, x = gradients(rng, x_shape, w_shape, dtype, numbers)
    g = nhwc_geometry(x_shape, w_shape, **numbers)
    tiles = list(staged.tiles(g, dtype, True, device.target, aligned=True))
    # In an order of no meaning, so that a tile shows many features that no one before it has shown.
    for tile in each_feature_once(g, device.target, [tiles[i] for i in rng.permutation(len(tiles))]):
        chosen = staged.tile_plan(g, dtype, True, device.target, tile)
        dw, dbias = launch(device, chosen, dy, x, w_shape)
        oracle.assert_wgrad_within_bound(dw, dbias, dy, x, **numbers)


@pytest.mark.parametrize(
    ("channels", "numbers", "dtype"),
    [
        (4, {}, "float32"),
        (8, {}, "bfloat16"),
        (5, {}, "float16"),
        (4, {"stride": (2, 2)}, "float16"),
        (4, {"dilation": (2, 3)}, "float32"),
        (8, {"padding": ((4, 1), (3, 2))}, "float16"),
    ],
    ids=["float32", "bfloat16", "runs", "strided", "dilated", "padding_alone"],
)
def test_nan_and_infinity_reach_what_they_meet(device, rng, channels, numbers, dtype):
    """An infinite x at an edge meets some taps only; a dy of infinity meets the zeros of the padding, or them alone. At
    every width there are strips that reach beyond dy, whose missing elements must meet nothing."""
    numbers = {"padding": ((1, 1), (1, 0)), **numbers}
    w_shape = (channels, 1, 3, 2)
    for width in (8, 13, 37):
        dy, x = gradients(rng, (2, channels, 9, width), w_shape, dtype, numbers)
        x[0, 0, -1, -1] = np.inf
        x[1, 1, 0, 0] = np.nan
        x[1, 1, 4, width - 2] = -np.inf
        dy[1, 2, 0, -1] = np.inf
        dy[0, 3, -1, 0] = -np.inf
        expected = oracle.wgrad(dy, x, w_shape, **numbers)
        assert np.isnan(expected[0][2:4]).any(axis=(1, 2, 3)).all()
        g = nhwc_geometry(x.shape, w_shape, **numbers)
        tiles = staged.tiles(g, dtype, True, device.target, aligned=True)
        # Exact or not, as wide as dy or not, and of several images.
        kinds = {(tile.columns, tile.runs): tile for tile in tiles if tile.columns in (3, 4, g.Q)}
        for tile in kinds.values():
            chosen = staged.tile_plan(g, dtype, True, device.target, tile)
            for exact, result in zip(expected, launch(device, chosen, dy, x, w_shape), strict=True):
                result = result.astype(np.float64)
                np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
                np.testing.assert_array_equal(result[~np.isfinite(exact)], exact[~np.isfinite(exact)])


extent = st.integers(1, 300)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 300), extent, extent),
    kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    stride=st.tuples(st.integers(1, 9), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.tuples(st.integers(0, 9), st.integers(0, 9))),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    architecture=st.sampled_from([80, 90, 120]),
    aligned=st.booleans(),
)
def test_every_plan_covers_dy_and_fits_the_device(
    shape, kernel, stride, dilation, padding, dtype, architecture, aligned
):
    numbers = {"stride": stride, "dilation": dilation, "padding": padding}
    try:
        g = nhwc_geometry(shape, (shape[1], 1, *kernel), **numbers)
    except ValueError:
        return  # a kernel larger than its input
    target, size = plan.TARGETS[architecture], plan.DTYPES[dtype][1]
    try:
        chosen = plan.depthwise_wgrad(g, dtype, True, target, "channels_last_staged", aligned)
    except plan.Unsuitable as reason:
        # All columns of dilated rows are one block's; elements of 2 bytes may be such as cannot be copied.
        if size == 4 and "do not fit" not in str(reason):
            raise
        return
    values, defines = dict(chosen.sums.parameters), dict(chosen.sums.defines)
    assert all(1 <= extent <= limit for extent, limit in zip(chosen.sums.grid, plan.MAX_GRID, strict=True))
    assert chosen.sums.block == defines["THREADS"] <= 512
    assert values["images"] * values["strips"] * defines["GROUPS"] <= chosen.sums.block
    assert 0 < chosen.sums.shared_bytes <= target.shared_per_block
    # Every channel has a thread, every row of every strip a slab, every column a strip.
    channels = defines["GROUPS"] * defines["VECTOR"]
    beside, slabs = chosen.sums.grid[:2] if defines["CLUSTER"] == 1 else chosen.sums.grid[1::-1]
    channel_blocks, rest = divmod(beside, values["column_blocks"])
    assert rest == 0
    assert (channel_blocks - 1) * channels < g.K <= channel_blocks * channels
    assert defines["CLUSTER"] in (1, slabs)
    assert (slabs - 1) * values["slab_rows"] < values["rows"] <= slabs * values["slab_rows"]
    alone = defines["CLUSTER"] > 1 or slabs * values["column_blocks"] == 1
    assert (chosen.reduce is None) == alone == bool(defines["FINAL"])
    if defines["CLUSTER"] > 1:
        assert architecture >= 90
        assert values["column_blocks"] == 1
    steps = values["rows"] // values["strip_rows"] // values["spacing_h"]
    assert (steps - 1) * values["images"] < g.N <= steps * values["images"]
    assert values["strip_rows"] * values["spacing_h"] >= g.P
    items, spacing = values["column_blocks"] * values["strips"], values["spacing_w"]
    strips = np.arange(items)
    starts = strips + strips // spacing * (defines["COLUMNS"] - 1) * spacing
    columns = (starts[:, None] + np.arange(defines["COLUMNS"]) * spacing).ravel()
    np.testing.assert_array_equal(np.sort(columns[columns < g.Q]), np.arange(g.Q))
    # What a strip needs of the block's columns is copied.
    first = strips // values["strips"] * values["strips"] * defines["COLUMNS"] if g.dilation == (1, 1) else 0 * strips
    last = (starts - first + (defines["COLUMNS"] - 1) * spacing)[starts < g.Q]
    assert (last < values["dy_pixels"]).all()
    if defines["WIDTH"]:
        assert (defines["WIDTH"], defines["LEFT"], defines["COLUMNS"]) == (g.W, g.padding[1][0], g.Q)
        assert values["x_pixels"] == g.W
    else:
        assert (last * g.stride[1] + (g.S - 1) * g.dilation[1] < values["x_pixels"]).all()
    for name in ("x", "dy"):
        copied = defines[f"{name.upper()}_COPIES"] * defines["COPY"] * chosen.sums.block
        assert values[f"{name}_size"] * size <= copied
        assert values[f"{name}_size"] >= values["images"] * values[f"{name}_pixels"] * channels
    # Copies begin where both ends are aligned, and so do vectors.
    assert defines["COPY"] % (defines["VECTOR"] * size) == 0
    assert defines["RUNS"] or g.K * size % defines["COPY"] == channels * size % defines["COPY"] == 0
    assert not defines["RUNS"] or (aligned and channels == g.K and values["images"] == 1)
    # Compile-time values come from small sets, whatever the shapes.
    assert defines["COLUMNS"] <= 16
    assert defines["STRIDE_W"] <= 2
    assert defines["STRIDE_H"] <= g.R


def test_parameter_struct_matches_the_fields_of_the_kernel():
    g = nhwc_geometry((2, 8, 9, 9), (8, 1, 3, 3))
    chosen = plan.depthwise_wgrad(g, "float16", True, plan.TARGETS[90], "channels_last_staged")
    text = (kernels.sources_folder() / "depthwise_wgrad_channels_last_staged.cu").read_text()
    body = text[text.index("struct Parameters {") : text.index("};", text.index("struct Parameters {"))]
    fields = []
    for line in body.splitlines()[1:]:
        kind, _, names = line.split("//")[0].strip().rstrip(";").partition(" ")
        fields += [(name.strip(), {"int": "int32", "uint32": "uint32"}[kind]) for name in names.split(",")]
    struct = chosen.sums.parameter_struct()
    assert [(name, str(struct.dtype[name])) for name in struct.dtype.names] == fields


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("case", [name for name in COMPILED if "multiplier" not in name])
def test_compiles_without_spills(case, architecture):
    pytest.importorskip("cupy", reason="no cupy: kernels are not compiled (install cuconv[test])")
    x_shape, w_shape, numbers = COMPILED[case]
    target = plan.TARGETS[int(architecture.removeprefix("sm_").rstrip("a"))]
    g = nhwc_geometry(x_shape, w_shape, **numbers)
    for dtype, bias in (("float32", True), ("bfloat16", False), ("float16", True)):
        chosen = plan.depthwise_wgrad(g, dtype, bias, target, "channels_last_staged").sums
        resources = kernels.compile_only(chosen, architecture)
        assert resources.spill_bytes == 0, f"{chosen} spills {resources.spill_bytes} bytes on {architecture}"


def test_the_default_and_where_it_is_another():
    g = nhwc_geometry((16, 64, 56, 56), (64, 1, 3, 3))
    odd = nhwc_geometry((16, 67, 56, 56), (67, 1, 3, 3))
    for dtype in ("float16", "bfloat16", "float32"):
        for chosen, variant in ((g, "staged"), (odd, "runs")):
            source = plan.depthwise_wgrad(chosen, dtype, True, plan.TARGETS[90]).source
            assert source == f"depthwise_wgrad_channels_last_{variant}"
    multiplied = nhwc_geometry((2, 32, 9, 9), (64, 1, 3, 3))
    others = [
        (g, "float32", plan.TARGETS[75], True, "needs compute capability 8.0, and the device has 7.5"),
        (g, "float64", plan.TARGETS[90], True, "takes no float64"),
        (g, "float16", plan.TARGETS[90], False, "copies words of 4 bytes"),
        (multiplied, "float32", plan.TARGETS[90], True, "takes multiplier 1, and has 2"),
    ]
    for geometry, dtype, target, aligned, reason in others:
        chosen = plan.depthwise_wgrad(geometry, dtype, True, target, aligned=aligned)
        assert chosen.source == "depthwise_wgrad_channels_last" + "_runs" * (not aligned)
        with pytest.raises(plan.Unsuitable, match=f"variant channels_last_staged: {reason}"):
            plan.depthwise_wgrad(geometry, dtype, True, target, "channels_last_staged", aligned)
    many_taps = nhwc_geometry((2, 3, 40, 40), (3, 1, 9, 9))
    with pytest.raises(plan.Unsuitable, match=r"takes at most 64 taps.*9 x 9"):
        plan.depthwise_wgrad(many_taps, "float32", True, plan.TARGETS[90], "channels_last_staged")
