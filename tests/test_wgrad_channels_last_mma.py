"""Gradients of the weights and the bias of channels-last arrays on tensor cores: every kind of tile and rule."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wgrad_channels_last import gradients, launch, nhwc_geometry

from cuconv import kernels, plan
from cuconv.plan import wgrad_channels_last_mma as mma

KINDS = pytest.mark.parametrize(
    ("x_shape", "w_shape", "numbers", "dtype"),
    [
        ((5, 24, 14, 14), (24, 1, 3, 3), {"padding": ((1, 1), (1, 1))}, "float16"),
        ((19, 40, 7, 7), (40, 1, 5, 5), {"padding": ((2, 2), (2, 2))}, "bfloat16"),
        ((2, 8, 23, 37), (8, 1, 2, 3), {"padding": ((1, 0), (2, 1))}, "bfloat16"),
        ((3, 16, 9, 19), (16, 1, 3, 4), {"padding": ((0, 1), (3, 2))}, "float16"),
        ((3, 8, 8, 9), (8, 1, 4, 6), {"padding": ((5, 4), (1, 7))}, "float16"),
        ((2, 8, 23, 31), (8, 1, 3, 3), {"padding": ((2, 2), (5, 6)), "dilation": (5, 3)}, "bfloat16"),
        ((3, 16, 11, 8), (16, 1, 7, 7), {"padding": ((3, 3), (3, 3))}, "float16"),
        ((3, 8, 6, 21), (8, 1, 1, 1), {}, "float16"),
        ((5, 8, 9, 8), (8, 1, 5, 3), {"padding": ((0, 4), (1, 1))}, "float16"),
    ],
    ids=["3x3", "5x5_small", "2x3", "3x4", "4x6", "dilated", "7x7", "1x1", "below_alone"],
)


def each_feature_once(g, tiles):
    """Of the tiles, as many as it takes to see every kind of unit, block and slab."""
    seen = set()
    for tile in tiles:
        strip_rows, rows = mma._rows(g, tile)
        pixels = tile.images * tile.columns
        features = {
            ("units", tile.units, tile.warps > 1),
            ("rest", pixels % mma._UNIT > 0, pixels % (tile.units * mma._UNIT) > mma._UNIT),
            ("stages", tile.stages),
            ("rows", tile.rows, strip_rows % tile.rows > 0),
            ("columns", tile.columns < g.Q, g.Q % tile.columns > 0),
            ("images", tile.images, g.N % tile.images > 0),
            ("channels", tile.channels < g.K, g.K % tile.channels > 0, tile.groups % 2),
            ("slab", tile.slab_rows < strip_rows, tile.slab_rows % strip_rows > 0, tile.slab_rows < rows),
            ("last slab", rows % tile.slab_rows > 0),
        }
        if not features <= seen:
            seen |= features
            yield tile


@KINDS
def test_every_kind_of_tile(device, rng, x_shape, w_shape, numbers, dtype):
    dy, x = gradients(rng, x_shape, w_shape, dtype, numbers)
    g = nhwc_geometry(x_shape, w_shape, **numbers)
    tiles = list(mma.tiles(g, True, device.target))
    # In an order of no meaning, so that a tile shows many features that no one before it has shown.
    for tile in each_feature_once(g, [tiles[i] for i in rng.permutation(len(tiles))]):
        chosen = mma.tile_plan(g, dtype, True, tile)
        dw, dbias = launch(device, chosen, dy, x, w_shape)
        oracle.assert_wgrad_within_bound(dw, dbias, dy, x, **numbers)


@pytest.mark.parametrize(
    ("kernel", "numbers", "dtype"),
    [
        ((3, 2), {}, "bfloat16"),
        ((3, 3), {}, "float16"),
        ((2, 3), {"dilation": (2, 3)}, "float16"),
        ((3, 2), {"padding": ((4, 1), (3, 2))}, "bfloat16"),
    ],
    ids=["pairs_of_columns", "single_tap", "dilated_pairs_of_rows", "padding_alone"],
)
def test_nan_and_infinity_reach_what_they_meet(device, rng, kernel, numbers, dtype):
    """An infinite x at an edge meets some taps only; a dy of infinity meets the zeros of the padding, or them alone. At
    every width there are units that reach beyond dy, whose missing elements must meet nothing."""
    numbers = {"padding": ((1, 1), (1, 0)), **numbers}
    w_shape = (8, 1, *kernel)
    for width in (8, 13, 37):
        dy, x = gradients(rng, (3, 8, 9, width), w_shape, dtype, numbers)
        x[0, 0, -1, -1] = np.inf
        x[1, 1, 0, 0] = np.nan
        x[1, 1, 4, width - 2] = -np.inf
        dy[1, 2, 0, -1] = np.inf
        dy[0, 3, -1, 0] = -np.inf
        x[2, 4, 0, 0] = np.inf
        expected = oracle.wgrad(dy, x, w_shape, **numbers)
        assert np.isfinite(expected[0][5:]).all()
        g = nhwc_geometry(x.shape, w_shape, **numbers)
        kinds = {(t.columns < g.Q, t.images, t.units): t for t in mma.tiles(g, True, device.target)}
        for tile in list(kinds.values())[::4]:
            chosen = mma.tile_plan(g, dtype, True, tile)
            for exact, result in zip(expected, launch(device, chosen, dy, x, w_shape), strict=True):
                result = result.astype(np.float64)
                np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
                np.testing.assert_array_equal(result[~np.isfinite(exact)], exact[~np.isfinite(exact)])


def test_finite_data_stay_on_tensor_cores(device, rng, monkeypatch):
    """What is not there, or was never written, must not look like data that are not finite: the block would do its
    work over, plainly and slowly. Here doing so makes NaN."""
    read = kernels._read
    plainly = "      float total = 0;\n      Walk walk;\n"
    assert read("depthwise_wgrad_channels_last_mma.cu").count(plainly) == 1
    monkeypatch.setattr(
        kernels, "_read", lambda name: read(name).replace(plainly, plainly.replace("= 0", "= __uint_as_float(~0u)"))
    )
    kernels._kernel.cache_clear()
    kernels.load.cache_clear()
    for shape, kernel, numbers in (
        ((5, 16, 7, 7), (5, 5), {"padding": ((2, 2), (2, 2))}),
        ((3, 8, 9, 19), (3, 4), {"padding": ((4, 4), (5, 5))}),
        ((2, 8, 23, 31), (2, 3), {"padding": ((2, 2), (5, 6)), "dilation": (5, 3)}),
    ):
        w_shape = (shape[1], 1, *kernel)
        dy, x = gradients(rng, shape, w_shape, "bfloat16", numbers)
        x[-1, -1, -1, -1] = 0
        g = nhwc_geometry(shape, w_shape, **numbers)
        kinds = {(t.columns < g.Q, t.images, t.units): t for t in mma.tiles(g, True, device.target)}
        for tile in list(kinds.values())[::3]:
            chosen = mma.tile_plan(g, "bfloat16", True, tile)
            dw, dbias = launch(device, chosen, dy, x, w_shape)
            oracle.assert_wgrad_within_bound(dw, dbias, dy, x, **numbers)
        x[-1, -1, -1, -1] = np.inf
        assert np.isnan(launch(device, chosen, dy, x, w_shape)[0].astype(np.float32)).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_integers_are_exact_and_the_same_every_time(device, rng, dtype):
    numbers = {"padding": ((2, 1), (1, 1)), "dilation": (1, 2)}
    dy, x = gradients(rng, (9, 16, 9, 11), (16, 1, 4, 3), dtype, numbers)
    dy, x = (rng.integers(-2, 3, array.shape).astype(array.dtype) for array in (dy, x))
    dy[:, :, ::2] = 0
    w_shape = (16, 1, 4, 3)
    g = nhwc_geometry(x.shape, w_shape, **numbers)
    chosen = plan.depthwise_wgrad(g, dtype, True, device.target, "channels_last_mma")
    exact = oracle.wgrad(dy, x, w_shape, **numbers)
    for _ in range(device.repeats):
        for result, expected in zip(launch(device, chosen, dy, x, w_shape), exact, strict=True):
            np.testing.assert_array_equal(result, expected.astype(result.dtype))


extent = st.integers(1, 300)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 40).map(lambda n: 8 * n), extent, extent),
    kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.tuples(st.integers(0, 9), st.integers(0, 9))),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    bias=st.booleans(),
    architecture=st.sampled_from([80, 90, 120]),
)
def test_every_plan_covers_dy_and_fits_the_device(shape, kernel, dilation, padding, dtype, bias, architecture):
    numbers = {"dilation": dilation, "padding": padding}
    try:
        g = nhwc_geometry(shape, (shape[1], 1, *kernel), **numbers)
    except ValueError:
        return  # a kernel larger than its input
    target = plan.TARGETS[architecture]
    chosen = plan.depthwise_wgrad(g, dtype, bias, target, "channels_last_mma")
    values, defines = dict(chosen.sums.parameters), dict(chosen.sums.defines)
    assert all(1 <= extent <= limit for extent, limit in zip(chosen.sums.grid, plan.MAX_GRID, strict=True))
    assert chosen.sums.block == 32 * defines["GROUPS"] * defines["WARPS"] <= 512
    assert 0 < chosen.sums.shared_bytes <= target.shared_per_block
    # Every channel has a group, every row of every strip a slab, every column a block and a unit.
    channels = 8 * defines["GROUPS"]
    channel_blocks, rest = divmod(chosen.sums.grid[0], values["column_blocks"])
    assert rest == 0
    assert (channel_blocks - 1) * channels < g.K <= channel_blocks * channels
    slabs = chosen.sums.grid[1]
    assert (slabs - 1) * values["slab_rows"] < values["rows"] <= slabs * values["slab_rows"]
    assert (chosen.reduce is None) == (slabs * values["column_blocks"] == 1) == bool(defines["FINAL"])
    steps = values["rows"] // values["strip_rows"] // values["spacing_h"]
    assert (steps - 1) * values["images"] < g.N <= steps * values["images"]
    assert values["strip_rows"] * values["spacing_h"] >= g.P
    assert (values["column_blocks"] - 1) * values["columns"] < g.Q <= values["column_blocks"] * values["columns"]
    units = defines["UNITS"] * defines["WARPS"]
    assert values["dy_row_pixels"] == units * 16 >= values["images"] * values["columns"]
    # What its columns meet is copied, of every image, and every copy has its place in a stage.
    assert values["x_slot"] >= values["x_pixels"] == values["columns"] + (g.S - 1) * g.dilation[1]
    assert values["x_row_pixels"] == values["images"] * values["x_slot"]
    for name in ("x", "dy"):
        pixels = values[f"{name}_row_pixels"] * defines["GROUPS"]
        assert pixels <= defines[f"{name.upper()}_COPIES"] * chosen.sums.block < pixels + chosen.sums.block
    pitch = 8 * (defines["GROUPS"] | 1)
    needed = defines["ROWS"] * (values["x_row_pixels"] + values["dy_row_pixels"]) * pitch + 8
    assert values["stage_size"] >= needed
    assert values["stage_size"] % 8 == 0
    assert 2 * values["stage_size"] * defines["STAGES"] <= chosen.sums.shared_bytes
    # Neighbours of two images, too, lie in different banks.
    assert values["images"] == 1 or (values["x_slot"] - values["columns"]) % 8 == 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize(
    ("extent", "kernel", "dilation"),
    [(56, 7, 1), (28, 7, 1), (14, 7, 1), (28, 5, 1), (7, 5, 1), (14, 3, 1), (65, 3, 12), (112, 1, 1), (30, 8, 1)],
)
def test_compiles_without_spills(extent, kernel, dilation, architecture):
    pytest.importorskip("cupy", reason="no cupy: kernels are not compiled (install cuconv[test])")
    numbers = {"padding": kernel // 2 * dilation, "dilation": dilation}
    g = nhwc_geometry((64, 240, extent, extent), (240, 1, kernel, kernel), **numbers)
    target = plan.TARGETS[int(architecture.removeprefix("sm_").rstrip("a"))]
    for dtype, bias in (("bfloat16", False), ("float16", True)):
        chosen = plan.depthwise_wgrad(g, dtype, bias, target, "channels_last_mma").sums
        resources = kernels.compile_only(chosen, architecture)
        assert resources.spill_bytes == 0, f"{chosen} spills {resources.spill_bytes} bytes on {architecture}"


def test_where_it_is_refused():
    g = nhwc_geometry((16, 64, 56, 56), (64, 1, 3, 3))
    refused = [
        (g, "float32", 90, True, "takes float16 and bfloat16, and the dtype is float32"),
        (g, "float16", 75, True, "needs compute capability 8.0, and the device has 7.5"),
        (g, "float16", 90, False, "takes pixels of whole 16 bytes that start at multiples of 16 bytes"),
        (nhwc_geometry((2, 12, 9, 9), (12, 1, 3, 3)), "float16", 90, True, "takes pixels of whole 16 bytes"),
        (nhwc_geometry((2, 32, 9, 9), (64, 1, 3, 3)), "float16", 90, True, "takes multiplier 1 and stride 1"),
        (nhwc_geometry((2, 32, 9, 9), (32, 1, 3, 3), stride=2), "float16", 90, True, "takes multiplier 1 and stride 1"),
        (nhwc_geometry((2, 8, 40, 40), (8, 1, 9, 9)), "float16", 90, True, "takes at most 64 taps.*9 x 9"),
        (nhwc_geometry((2, 8, 70, 9), (8, 1, 64, 1)), "float16", 90, True, "64 x 1 taps.*do not fit"),
    ]
    for geometry, dtype, architecture, aligned, reason in refused:
        with pytest.raises(plan.Unsuitable, match=f"variant channels_last_mma: {reason}"):
            plan.depthwise_wgrad(geometry, dtype, True, plan.TARGETS[architecture], "channels_last_mma", aligned)


def test_where_it_is_the_default():
    """Kernels of many taps in 16-bit, of rows that are not too short for them."""

    def source(x_shape, kernel, dtype="bfloat16", target=plan.TARGETS[90], aligned=True, **numbers):
        g = nhwc_geometry(x_shape, (x_shape[1], 1, *kernel), **numbers)
        chosen = plan.depthwise_wgrad(g, dtype, True, target, aligned=aligned)
        return chosen.source.removeprefix("depthwise_wgrad_channels_last").removeprefix("_")

    for dtype in ("float16", "bfloat16"):
        assert source((128, 240, 28, 28), (5, 5), dtype, padding=2) == "mma"
        assert source((64, 192, 56, 56), (7, 7), dtype, padding=3) == "mma"
        assert source((128, 512, 14, 14), (7, 7), dtype, padding=3) == "mma"
        assert source((1, 192, 56, 56), (7, 7), dtype, padding=3) == "mma"
        assert source((128, 240, 28, 28), (4, 4), dtype) == "mma"
        assert source((128, 672, 14, 14), (5, 5), dtype, padding=2) == "staged"
        assert source((128, 1152, 7, 7), (5, 5), dtype, padding=2) == "planes"
        assert source((128, 512, 14, 14), (3, 3), dtype, padding=1) == "staged"
        assert source((8, 256, 65, 65), (3, 3), dtype, padding=12, dilation=12) == "staged"
    assert source((128, 240, 28, 28), (5, 5), "float32", padding=2) == "staged"
    assert source((128, 240, 28, 28), (5, 5), padding=2, stride=2) == "staged"
    assert source((128, 236, 28, 28), (5, 5), padding=2) == "staged"
    assert source((128, 240, 28, 28), (5, 5), padding=2, target=plan.TARGETS[80]) == "staged"
    assert source((128, 240, 28, 28), (5, 5), padding=2, aligned=False) == "runs"
