"""Planning: pure arithmetic, so all of it is tested here without a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from geometries import GEOMETRIES, VARIANTS, suits
from geometries import PASSES as DIRECTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from cuconv import plan
from cuconv.geometry import Conv2dGeometry, depthwise_geometry
from cuconv.plan import (
    base,
    channels_last,
    channels_last_mma,
    channels_last_planes,
    channels_last_runs,
    channels_last_staged,
    flat,
    phases,
    runs,
    tiles,
    toeplitz,
    wgrad,
    wgrad_diagonals,
)

H200, RTX_5090, T4 = plan.TARGETS[90], plan.TARGETS[120], plan.TARGETS[75]


PASSES = (plan.depthwise_forward, plan.depthwise_dgrad)


def geometry(x_shape, w_shape, **numbers) -> Conv2dGeometry:
    return depthwise_geometry(x_shape, w_shape, **numbers)


def test_the_default():
    """The first that suits of runs, channels_last, toeplitz, images, tiles and direct."""

    def sources(g, dtype, target=H200):
        return {make(g, dtype, target).source.removeprefix("depthwise_") for make in PASSES}

    direct = {"forward_direct", "dgrad_direct"}
    small = geometry((16, 64, 512, 512), (64, 1, 3, 3))
    for dtype, target in product(plan.DTYPES, (H200, RTX_5090)):
        assert sources(small, dtype, target) == {"runs"}
    assert sources(small, "float32", T4) == direct
    for extent, chosen in ((56, "toeplitz"), (28, "toeplitz"), (14, "images")):
        g = geometry((64, 192, extent, extent), (192, 1, 7, 7), padding=3)
        assert sources(g, "float16") == sources(g, "bfloat16") == {chosen}
        assert sources(g, "float32") == {"runs"}
    # Many images of small planes, and large kernels on not so small ones.
    for N, C, extent, kernel, chosen in (
        (128, 1024, 7, 3, "images"),
        (128, 1024, 14, 3, "runs"),
        (128, 1152, 7, 5, "images"),
        (16, 1152, 7, 5, "runs"),
        (33, 1152, 7, 5, "runs"),
        (128, 512, 14, 7, "images"),
        (128, 240, 28, 5, "images"),
        (128, 1155, 7, 5, "runs"),
    ):
        g = geometry((N, C, extent, extent), (C, 1, kernel, kernel), padding=kernel // 2)
        assert sources(g, "float16") == sources(g, "bfloat16") == {chosen}
        assert sources(g, "float32") == {"runs"}
    # Dilated kernels whose outputs are as many as their inputs, and small planes channels-last.
    for padding, chosen in ((12, "phases"), (11, "runs")):
        g = geometry((8, 256, 65, 65), (256, 1, 3, 3), padding=padding, dilation=12)
        assert sources(g, "float16") == sources(g, "bfloat16") == sources(g, "float32") == {chosen}
        assert sources(g, "float64") == {"runs"}
    g = geometry((128, 1152, 7, 7), (1152, 1, 5, 5), padding=2, channels_last=True)
    assert sources(g, "float16") == sources(g, "float32") == {"channels_last_planes"}
    large = geometry((16, 128, 56, 56), (128, 1, 31, 31), padding=15)
    assert sources(large, "float16") == sources(large, "bfloat16") == {"toeplitz"}
    assert sources(large, "float32") == sources(large, "float64") == {"tiles"}
    for dtype, target in product(plan.DTYPES, (T4, plan.TARGETS[80])):
        assert sources(large, dtype, target) == {"tiles"}
    strided = geometry((16, 128, 56, 56), (128, 1, 31, 31), padding=15, stride=2)
    dilated = geometry((16, 128, 56, 56), (128, 1, 11, 11), padding=15, dilation=(1, 3))
    huge = geometry((1, 1, 500, 500), (1, 1, 251, 251))
    wide = geometry((1, 1, 3, 10**6), (1, 1, 3, 3))
    for g in (strided, dilated, huge, wide):
        assert sources(g, "float32") == direct


def test_the_default_of_rows_of_odd_length():
    """As they lie in memory, in 16-bit, where the other kernels that take odd rows are slower."""

    def sources(x_shape, kernel, dtype="bfloat16", aligned=True, padding=None, target=H200):
        g = geometry(x_shape, (x_shape[1], 1, kernel, kernel), padding=kernel // 2 if padding is None else padding)
        forward, dgrad = (
            make(g, dtype, target, None, aligned).source.replace("dgrad_d", "forward_d") for make in PASSES
        )
        wgrad = plan.depthwise_wgrad(g, dtype, True, target, None, aligned).source
        assert forward == dgrad
        return forward.removeprefix("depthwise_"), wgrad.removeprefix("depthwise_wgrad_")

    for x_shape in ((32, 67, 129, 131), (64, 3, 225, 225), (32, 128, 57, 57), (16, 16, 300, 301)):
        assert sources(x_shape, 3) == sources(x_shape, 3, "float16") == ("flat", "flat")
        assert sources(x_shape, 3, "float32") == sources(x_shape, 3, aligned=False) == ("runs", "runs")
        assert sources(x_shape, 3, padding=0) == ("runs", "runs")
    assert sources((64, 256, 29, 29), 3) == ("flat", "runs")
    assert sources((64, 256, 29, 29), 5) == sources((32, 128, 57, 57), 5) == ("flat", "diagonals")
    assert sources((32, 67, 129, 131), 5) == ("flat", "flat")
    assert sources((128, 512, 15, 15), 3) == ("runs", "pairs")
    # Even rows, short launches, many taps.
    for x_shape, kernel in (((32, 67, 129, 130), 3), ((1, 67, 129, 131), 3), ((32, 128, 57, 57), 7)):
        assert "flat" not in sources(x_shape, kernel)
    assert sources((32, 67, 129, 131), 3, target=plan.TARGETS[80]) == ("forward_direct", "direct")


def test_the_default_of_wgrad():
    """Tensor cores for kernels of many taps, for large dilations, and for small planes of enough images."""

    def source(x_shape, kernel, dtype="bfloat16", target=H200, **numbers):
        g = geometry(x_shape, (x_shape[1], 1, *kernel), **numbers)
        return plan.depthwise_wgrad(g, dtype, True, target).source.removeprefix("depthwise_wgrad_")

    assert source((128, 240, 28, 28), (5, 5), padding=2) == "diagonals"
    assert source((128, 240, 28, 28), (5, 5), "float32", padding=2) == "runs"
    assert source((128, 240, 28, 28), (3, 3), padding=1) == "runs"
    assert source((8, 256, 65, 65), (3, 3), padding=12, dilation=12) == "phases"
    assert source((8, 256, 65, 65), (3, 3), "float32", padding=12, dilation=12) == "phases"
    assert source((8, 256, 65, 65), (3, 3), padding=11, dilation=12) == "diagonals"
    assert source((128, 1152, 7, 7), (5, 5), padding=2, channels_last=True) == "channels_last_planes"
    assert source((16, 96, 56, 56), (51, 5), padding=(25, 2)) == "diagonals"
    assert source((16, 96, 56, 56), (51, 5), "float32", padding=(25, 2)) == "tiles"
    assert source((128, 1152, 7, 7), (5, 5), padding=2) == "pairs"
    assert source((1, 1152, 7, 7), (3, 3), padding=1) == "runs"
    assert source((16, 3, 129, 131), (7, 7), padding=3) == "runs"
    assert source((128, 1152, 7, 7), (5, 5), target=plan.TARGETS[80], padding=2) == "direct"


def test_few_outputs_wait_for_memory_once():
    """A patch of them loads all its rows of x at once, where registers hold these; one of many loads them in turn."""
    last = {"channels_last": True}
    for shape, kernel, stride in (
        ((1, 512, 14, 14), 3, 1),
        ((1, 144, 56, 56), 3, 1),
        ((1, 144, 56, 56), 3, 2),
        ((1, 672, 14, 14), 5, 1),
    ):
        g = geometry(shape, (shape[1], 1, kernel, kernel), padding=kernel // 2, stride=stride, **last)
        for make, dtype in product(PASSES, ("float32", "float16", "bfloat16")):
            chosen = make(g, dtype, H200)
            assert chosen.source == "depthwise_channels_last"
            assert dict(chosen.defines)["ROWS"] == dict(chosen.parameters)["rows"] > 0
    for g in (
        geometry((1, 512, 14, 14), (512, 1, 7, 7), padding=3, **last),
        geometry((1, 512, 14, 14), (1024, 1, 3, 3), padding=1, **last),
        geometry((1, 512, 14, 14), (512, 1, 3, 3), padding=2, dilation=2, **last),
        geometry((64, 512, 14, 14), (512, 1, 3, 3), padding=1, **last),
    ):
        assert dict(plan.depthwise_forward(g, "float32", H200, "channels_last").defines)["ROWS"] == 0


def test_tiles_that_were_the_fastest_of_those_timed():
    last = {"channels_last": True}

    def of(chosen):
        return {**dict(chosen.defines), **dict(chosen.parameters)}

    # Long rows of x that allow loads of two floats.
    for shape, block_rows in (((16, 64, 512, 512), 14), ((64, 128, 256, 512), 16)):
        tile = of(plan.depthwise_dgrad(geometry(shape, (shape[1], 1, 3, 3)), "float32", H200))
        assert (tile["VECTOR"], tile["COLUMNS"], tile["block_rows"]) == (2, 2, block_rows)
    # Parts of pixels that are no halves of lines, in float32.
    eff5 = geometry((128, 240, 28, 28), (240, 1, 5, 5), padding=2, **last)
    for make in PASSES:
        tile = of(make(eff5, "float32", H200))
        assert tile["GROUPS"] * tile["VECTOR"] == 120
    # Strides in float32.
    tile = of(
        plan.depthwise_forward(
            geometry((64, 128, 112, 112), (128, 1, 3, 3), padding=1, stride=2, **last), "float32", H200
        )
    )
    assert (tile["rows"], tile["COLUMNS"]) == (4, 2)
    # Blocks at once in float32.
    odd = geometry((32, 67, 129, 131), (67, 1, 3, 3), padding=1, **last)
    for make in PASSES:
        assert of(make(odd, "float32", H200))["BLOCKS"] == 1
    # Slabs of few elements are a cluster, one of which has every column.
    few = geometry((1, 512, 14, 14), (512, 1, 3, 3), padding=1, **last)
    for dtype in ("float32", "float16", "bfloat16"):
        chosen = plan.depthwise_wgrad(few, dtype, False, H200)
        assert of(chosen.sums)["CLUSTER"] == chosen.sums.grid[0] > 1
        assert chosen.reduce is None
        assert of(plan.depthwise_wgrad(few, dtype, False, plan.TARGETS[80]).sums)["CLUSTER"] == 1


def test_the_default_of_channels_last():
    last = {"channels_last": True}
    for numbers in ({}, {"padding": 1}, {"stride": 2}, {"dilation": 12, "padding": 12}):
        g = geometry((16, 64, 112, 112), (64, 1, 3, 3), **numbers, **last)
        for target, make, dtype in product((H200, T4), PASSES, plan.DTYPES):
            strided_dgrad = make is plan.depthwise_dgrad and "stride" in numbers
            staged = target is H200 and dtype != "float64" and not strided_dgrad
            assert make(g, dtype, target).source == f"depthwise_channels_last{'_staged' * staged}"
    # Copies are whole words of 4 bytes, and of unaligned arrays single elements; runs start at any element.
    for channels, dtype, aligned, how in (
        (67, "float32", True, "_runs"),
        (67, "float64", True, ""),
        (67, "bfloat16", True, "_runs"),
        (66, "bfloat16", True, "_staged"),
        (66, "bfloat16", False, "_runs"),
        (66, "float32", False, "_staged"),
        (3, "float32", True, "_runs"),
    ):
        g = geometry((16, channels, 40, 50), (channels, 1, 3, 3), **last)
        for make in PASSES:
            assert make(g, dtype, H200, None, aligned).source == f"depthwise_channels_last{how}"
        strided = geometry((16, channels, 40, 50), (channels, 1, 3, 3), stride=2, **last)
        assert not plan.depthwise_forward(strided, dtype, H200, None, aligned).source.endswith("_runs")
        wgrad = plan.depthwise_wgrad(g, dtype, True, H200, None, aligned).source
        assert wgrad == f"depthwise_wgrad_channels_last{how}"
    many_taps = geometry((16, 67, 40, 50), (67, 1, 7, 7), padding=3, **last)
    assert plan.depthwise_forward(many_taps, "float32", H200).source == "depthwise_channels_last_staged"
    assert plan.depthwise_forward(many_taps, "float16", H200).source == "depthwise_channels_last_runs"
    assert plan.depthwise_wgrad(many_taps, "float32", True, H200).source == "depthwise_wgrad_channels_last_runs"
    odd = geometry((16, 67, 40, 50), (67, 1, 3, 3), **last)
    assert plan.depthwise_forward(odd, "bfloat16", plan.TARGETS[80]).source == "depthwise_channels_last"
    assert plan.depthwise_forward(odd, "float32", plan.TARGETS[80]).source == "depthwise_channels_last_staged"
    # Of pixels of less than 64 bytes the gradient of the weights alone is staged.
    for channels, dtype, staged in (
        (8, "float32", False),
        (14, "float32", False),
        (16, "float32", True),
        (8, "float16", False),
        (30, "float16", False),
        (32, "float16", True),
    ):
        g = geometry((64, channels, 512, 512), (channels, 1, 3, 1), **last)
        for make in PASSES:
            assert make(g, dtype, H200).source == f"depthwise_channels_last{'_staged' * staged}"
        assert plan.depthwise_wgrad(g, dtype, True, H200).source == "depthwise_wgrad_channels_last_staged"
    # Of many taps on tensor cores.
    for kernel, dtype, aligned, channels, chosen in (
        ((5, 5), "float16", True, 64, "mma"),
        ((3, 9), "bfloat16", True, 64, "mma"),
        ((7, 7), "bfloat16", True, 200, "mma"),
        ((5, 5), "float32", True, 64, "staged"),
        ((5, 5), "float16", False, 64, "runs"),
        ((5, 5), "float16", True, 68, "staged"),
        ((4, 4), "float16", True, 64, "staged"),
        ((2, 20), "float16", True, 64, "staged"),
    ):
        g = geometry((16, channels, 28, 28), (channels, 1, *kernel), padding=kernel[0] // 2, **last)
        for make in PASSES:
            assert make(g, dtype, H200, None, aligned).source.endswith(chosen)
        assert plan.depthwise_forward(g, dtype, T4, None, aligned).source == "depthwise_channels_last"
    large = geometry((16, 128, 56, 56), (128, 1, 31, 31), padding=15, **last)
    assert plan.depthwise_forward(large, "float32", H200).source == "depthwise_forward_direct"
    multiplied = geometry((2, 3, 9, 12), (6, 1, 3, 2), **last)
    assert plan.depthwise_forward(multiplied, "float32", H200).source == "depthwise_channels_last"
    assert plan.depthwise_dgrad(multiplied, "float32", H200).source == "depthwise_dgrad_direct"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_takes_what_the_tests_expect_of_it(variant, direction):
    """Neither less, which would leave its tests out, nor more, which would go untested."""
    of_pointwise, of_separable = {"groups", "products"}, {"fragments", "fused", "apart"}
    of_gradients = {"recomputed", "stored", "pieces"}
    assert {*VARIANTS, *of_pointwise, *of_separable, *of_gradients} == set(plan.VARIANTS)
    for nchw, dtype, last in product(GEOMETRIES.values(), plan.DTYPES, (False, True)):
        g = replace(nchw, channels_last=last)
        bias = (True,) if direction == "wgrad" else ()
        chosen, reason = plan_or_reason(getattr(plan, f"depthwise_{direction}"), g, dtype, *bias, H200, variant)
        assert (chosen is not None) == suits(variant, direction, g, dtype), (g, dtype, reason)


def plan_or_reason(make, *arguments):
    """A plan, or None and why there is none."""
    try:
        return make(*arguments), None
    except plan.Unsuitable as reason:
        return None, str(reason)


def test_a_forced_variant_never_becomes_another():
    g = geometry((16, 64, 512, 512), (64, 1, 3, 3))
    assert plan.depthwise_forward(g, "float32", H200, "direct").source == "depthwise_forward_direct"
    with pytest.raises(plan.Unsuitable, match=r"compute capability 9.0.*7.5"):
        plan.depthwise_forward(g, "float32", T4, "runs")


def test_plans_are_cached_and_hashable():
    g = geometry((16, 64, 512, 512), (64, 1, 3, 3))
    first = plan.depthwise_forward(g, "float32", H200)
    assert plan.depthwise_forward(g, "float32", H200) is first
    assert hash(first) == hash(plan.depthwise_forward.__wrapped__(g, "float32", H200))


def check_direct(g, chosen, dtype, dgrad):
    outputs = g.x_size if dgrad else g.y_size
    assert (chosen.grid[0] - 1) * chosen.block < outputs <= chosen.grid[0] * chosen.block


def check_runs(g, chosen, dtype, dgrad):
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    width, (rows, columns), channels = (g.Q, (g.H, g.W), g.C) if dgrad else (g.W, (g.P, g.Q), g.K)
    # Every row, plane and image has one block.
    block_rows, block_planes = values["block_rows"], values["block_planes"]
    assert chosen.grid[0] * block_rows >= rows > (chosen.grid[0] - 1) * block_rows
    assert chosen.grid[1] * block_planes >= values["image_planes"]
    assert chosen.grid[2] * values["block_images"] >= values["images"]
    assert (values["images"] - 1) * values["image_planes"] + values["last_image_planes"] == g.N * channels
    assert 0 < values["last_image_planes"] <= values["image_planes"]
    assert values["image_planes"] % channels == 0
    # Every output of a block is in one patch; of several planes, every one has threads of its own.
    assert defines["ROWS"] * values["row_items"] >= block_rows
    assert defines["COLUMNS"] * values["column_items"] >= columns
    items = values["row_items"] * values["column_items"]
    assert block_planes == 1 or block_planes * items <= chosen.block
    assert block_planes == 1 or block_rows == rows
    # A spread has the same phase in every patch, or there is only one.
    for extent, patch, by in ((rows, "ROWS", "SPREAD_H"), (columns, "COLUMNS", "SPREAD_W")):
        assert defines[patch] % defines[by] == 0 or defines[patch] >= extent
    # The rows that a block needs fit its run.
    for first in range(0, rows, block_rows):
        needed = rows_needed(g, dgrad, first, min(rows, first + block_rows))
        summands = values["multiplier"] if defines["SUMMED"] else 1
        elements = len(needed) * width
        assert block_planes > 1 or summands == 1 or elements <= values["addend"]
        elements += (summands - 1) * values["addend"]
        assert block_planes > 1 or elements * plan.DTYPES[dtype][1] + 16 <= values["input_bytes"]


def rows_needed(g, dgrad, first, end):
    """The rows of x, for dgrad of dy, of which the output rows from first on are made, and those between them."""
    (top, _), stride, dilation = g.padding[0], g.stride[0], g.dilation[0]
    if not dgrad:
        needed = {p * stride - top + r * dilation for p in (first, end - 1) for r in (0, g.R - 1)}
        needed = {min(max(row, 0), g.H - 1) for row in needed}
    else:
        met = product(range(first, end), range(g.R))
        over = [h + top - r * dilation for h, r in met]
        needed = {p // stride for p in over if p % stride == 0 and 0 <= p // stride < g.P}
    return range(min(needed), max(needed) + 1) if needed else range(0)


def check_toeplitz(g, chosen, dtype, dgrad):
    g = runs.dense_dgrad_as_forward(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    # Every row, plane and image has one block.
    assert chosen.grid[0] * values["block_rows"] >= g.P > (chosen.grid[0] - 1) * values["block_rows"]
    assert chosen.grid[1] * values["block_planes"] >= g.K > (chosen.grid[1] - 1) * values["block_planes"]
    images = values["block_images"] * values["block_turns"]
    assert chosen.grid[2] * images >= g.N > (chosen.grid[2] - 1) * images
    assert values["block_planes"] == 1 or values["block_rows"] == g.P
    # Every output of a block is in one unit, and every unit in one product.
    groups, rest = divmod(values["row_items"], values["spacing_h"])
    rows = groups * values["spacing_h"] * defines["ROWS"] if groups else g.P
    assert rows >= values["block_rows"]
    assert rest == 0 or (groups == 0 and values["row_items"] == g.P)
    assert values["segments"] * 8 >= g.Q
    units = values["block_images"] * values["row_items"] * values["segments"]
    assert values["tiles"] * 16 >= units > (values["tiles"] - 1) * 16
    # The window holds every tap, its start and every row's start are aligned.
    span = values["phase"] + 7 * g.stride[1] + (g.S - 1) * g.dilation[1] + 1
    assert values["steps"] * 16 >= span
    assert values["lead"] == values["phase"] + g.padding[1][0]
    assert values["pitch"] % 8 == values["plane_pitch"] % 8 == 0
    assert values["lead"] % defines["VECTOR"] == g.W % defines["VECTOR"] == 0
    # The last window of the last row of the last plane is inside the layout, and so is the last element of x.
    last = units // values["block_images"] // values["segments"] - 1
    last += last // values["spacing_h"] * (defines["ROWS"] - 1) * values["spacing_h"]
    last_row = (last + (defines["ROWS"] - 1) * values["spacing_h"]) * g.stride[0] + (g.R - 1) * g.dilation[0]
    last_column = (values["segments"] - 1) * 8 * g.stride[1] + values["steps"] * 16
    planes = values["block_inputs"] * values["block_images"]
    end = (planes - 1) * values["plane_pitch"] + last_row * values["pitch"] + max(last_column, values["lead"] + g.W)
    assert end * 2 <= values["layout_bytes"]
    assert (last_row + 1) * values["pitch"] <= values["plane_pitch"]
    # A row meets nothing of the next one where it meets padding: there is as much of it before the next.
    right = (g.Q - 1) * g.stride[1] + (g.S - 1) * g.dilation[1] + 1 + values["phase"]
    assert values["pitch"] >= max(values["lead"] + g.W, right - max(0, values["lead"]))


def check_tiles(g, chosen, dtype, dgrad):
    g = runs.dense_dgrad_as_forward(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    rows, columns = defines["ROWS"] * values["row_items"], defines["COLUMNS"] * values["column_items"]
    # Every plane, row and column has one block, and every output of a block has one thread.
    assert values["planes"] == g.N * g.K
    covered = (values["block_planes"], rows, columns)
    for blocks, of_block, extent in zip(chosen.grid, covered, (g.N * g.K, g.P, g.Q), strict=True):
        assert (blocks - 1) * of_block < extent <= blocks * of_block
    assert values["block_planes"] * values["row_items"] * values["column_items"] <= defines["THREADS"]
    # There is room for the rows of x that a block's outputs need, for what a thread loads of them, and for the weights.
    assert values["block_rows"] >= min(g.H, rows + g.R - 1)
    vector, chunk = defines["VECTOR"], defines["CHUNK"]
    full, tail = divmod(g.S, chunk)
    assert tail == defines["TAIL"]
    ends = [(full - 1) * chunk + -(-(defines["COLUMNS"] + chunk - 1) // vector) * vector] if full else []
    ends += [full * chunk + -(-(defines["COLUMNS"] + tail - 1) // vector) * vector] if tail else []
    assert values["pitch"] >= columns - defines["COLUMNS"] + max(ends)
    assert values["channel_pitch"] >= -(-g.S // chunk) * g.R * chunk
    starts = range(0, g.N * g.K, values["block_planes"])
    for first in starts[:50]:
        last = min(first + values["block_planes"], g.N * g.K) - 1
        assert last // g.N - first // g.N + 1 <= values["block_channels"]
    # Vectors start where vectors may: in shared memory and in x and y.
    size = max(4, plan.DTYPES[dtype][1])
    assert values["pitch"] * size % 16 == values["channel_pitch"] * size % 16 == 0
    assert values["column_items"] == 1 or defines["COLUMNS"] % vector == 0
    assert g.W % defines["IN_VECTOR"] == 0
    assert g.Q % defines["OUT_VECTOR"] == defines["COLUMNS"] % defines["OUT_VECTOR"] == 0


def check_channels_last(g, chosen, dtype, dgrad):
    """Every output is in one patch and every patch has a thread."""
    g = channels_last.swapped(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    assert values["groups"] * defines["VECTOR"] == g.K
    items = values["groups"] * values["column_items"] * values["row_items"] * g.N
    assert values["items"] == items
    assert (chosen.grid[0] - 1) * chosen.block < items <= chosen.grid[0] * chosen.block <= 2**31 - 1
    extents = ((g.P, values["rows"], "row", "h", 0), (g.Q, defines["COLUMNS"], "column", "w", 1))
    for extent, count, name, suffix, axis in extents:
        patches, spacing = np.arange(values[f"{name}_items"]), values[f"spacing_{suffix}"]
        starts = patches + patches // spacing * (count - 1) * spacing
        if defines["TRANSPOSED"]:
            stride = defines[f"STRIDE_{suffix.upper()}"]
            assert count % stride == 0
            starts -= g.padding[axis][0] % stride
        outputs = (starts[:, None] + np.arange(count) * spacing).ravel()
        outputs = outputs[(outputs >= 0) & (outputs < extent)]
        np.testing.assert_array_equal(np.sort(outputs), np.arange(extent))


def check_channels_last_staged(g, chosen, dtype, dgrad):
    """Every output is in one strip, every strip of a block has a thread, and its columns of x are copied."""
    g = runs.dense_dgrad_as_forward(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    size, channels = plan.DTYPES[dtype][1], defines["GROUPS"] * defines["VECTOR"]
    assert g.K % defines["VECTOR"] == g.K * size % defines["COPY"] == channels * size % defines["COPY"] == 0
    channel_blocks, rest = divmod(chosen.grid[0], values["column_blocks"])
    assert rest == 0
    assert (channel_blocks - 1) * channels < g.K <= channel_blocks * channels
    images = values["images"] * values["turns"]
    assert (chosen.grid[2] - 1) * images < g.N <= chosen.grid[2] * images
    assert values["turns"] == 1 or g.N % values["images"] == 0
    assert values["images"] * values["strips"] * defines["GROUPS"] <= chosen.block == defines["THREADS"]
    copied = values["images"] * values["pixels"] * channels * size
    assert copied <= defines["COPIES"] * defines["COPY"] * chosen.block
    assert chosen.shared_bytes >= defines["STAGES"] * copied + channels * g.R * g.S * size
    items = {"h": chosen.grid[1], "w": values["column_blocks"] * values["strips"]}
    for extent, count, suffix in ((g.P, values["rows"], "h"), (g.Q, defines["COLUMNS"], "w")):
        strips, spacing = np.arange(items[suffix]), values[f"spacing_{suffix}"]
        starts = strips + strips // spacing * (count - 1) * spacing
        outputs = (starts[:, None] + np.arange(count) * spacing).ravel()
        np.testing.assert_array_equal(np.sort(outputs[outputs < extent]), np.arange(extent))
    # Columns of x of the first and the last output of every strip that has any, from the block's first on.
    first = (starts // (count * values["strips"]) * count * values["strips"]) if g.dilation == (1, 1) else 0
    last = np.where(starts < extent, (starts - first + (count - 1) * spacing) * g.stride[1], 0)
    assert (last >= 0).all()
    if defines["WIDTH"]:
        assert (defines["WIDTH"], defines["LEFT"], defines["COLUMNS"]) == (g.W, g.padding[1][0], g.Q)
        assert values["pixels"] == g.W
    else:
        assert (last + (g.S - 1) * g.dilation[1] < values["pixels"]).all()


def check_channels_last_runs(g, chosen, dtype, dgrad):
    """Every output is in one block, and every block has room for its strips and their rows."""
    g = runs.dense_dgrad_as_forward(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    columns, size = values["strips"] * defines["COLUMNS"], plan.DTYPES[dtype][1]
    assert (chosen.grid[0] - 1) * columns < g.Q <= chosen.grid[0] * columns
    assert g.Q - (chosen.grid[0] - 1) * columns >= defines["COLUMNS"]
    assert (chosen.grid[1] - 1) * values["slab_rows"] < g.N * g.P <= chosen.grid[1] * values["slab_rows"]
    assert values["rows"] == g.N * g.P
    assert values["strips"] * g.K <= chosen.block - 64
    assert defines["CHANNELS"] in (0, g.K)
    # Of a row that starts 15 bytes behind a boundary all that lies between boundaries, behind 16 bytes of zeros.
    x_columns = min(g.W, columns + g.S - 1)
    assert values["x_bytes"] >= 16 + -(-(15 // size * size + x_columns * g.K * size) // 16) * 16
    assert values["y_bytes"] >= 15 // size * size + columns * g.K * size
    assert values["x_bytes"] % 16 == values["y_bytes"] % 16 == 0
    rows = defines["ROWS"] * defines["STAGES"]
    assert chosen.shared_bytes >= values["x_bytes"] * (rows + 1) + values["y_bytes"] * rows
    # What may be padding of any strip that starts at a column of y and ends at one.
    starts = np.arange(g.Q - defines["COLUMNS"] + 1)[:, None] - g.padding[1][0]
    j = np.arange(defines["COLUMNS"] + g.S - 1)
    missing = ((starts + j < 0) | (starts + j >= g.W)).any(axis=0)
    assert not missing[defines["LEFT"] : len(j) - defines["RIGHT"]].any()


def check_channels_last_mma(g, chosen, dtype, dgrad):
    """Every quad of outputs has a place in a warp, and the columns of x that it looks at are copied."""
    g = runs.dense_dgrad_as_forward(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    channels, quads = defines["GROUPS"] * 4, values["quads"]
    assert g.K % 8 == channels % 8 == 0
    channel_blocks, rest = divmod(chosen.grid[0], values["column_blocks"])
    assert rest == 0
    assert (channel_blocks - 1) * channels < g.K <= channel_blocks * channels
    assert (values["column_blocks"] - 1) * quads * 4 < g.Q <= values["column_blocks"] * quads * 4
    assert (chosen.grid[1] - 1) * values["rows"] < g.P <= chosen.grid[1] * values["rows"]
    images = values["images"] * values["turns"]
    assert (chosen.grid[2] - 1) * images < g.N <= chosen.grid[2] * images
    assert values["turns"] == 1 or g.N % images == 0
    assert values["images"] * quads * defines["GROUPS"] <= 16 * chosen.block // 32
    assert chosen.block == defines["THREADS"]
    # The last column of the last quad's window, in whole pieces of 4.
    assert values["pixels"] == (quads - 1) * 4 + -(-(g.S + 3) // 4) * 4
    copied = values["images"] * values["pixels"] * channels * 2
    assert copied <= defines["COPIES"] * 16 * chosen.block
    outputs = chosen.block // 32 // defines["GROUPS"] * 64 * channels * 2
    rows = defines["STAGES"] * copied + 2 * outputs
    assert chosen.shared_bytes >= defines["BATCH"] * rows + channels * g.R * g.S * 2


def check_images(g, chosen, dtype, dgrad):
    g = runs.dense_dgrad_as_forward(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    # Every image and plane is in one unit, and every unit in one block.
    units = -(-g.N // 16) * -(-g.K // values["block_planes"])
    assert chosen.grid[0] * values["block_units"] + values["extra_units"] == units
    assert 0 <= values["extra_units"] < chosen.grid[0]
    # Runs start at grains, images in other banks than their neighbours.
    x_plane, y_plane = g.H * g.W, g.P * g.Q
    planes = values["block_planes"]
    assert planes * x_plane % 8 == planes * y_plane % 8 == 0
    for pitch, plane in (("input_pitch", x_plane), ("output_pitch", y_plane)):
        assert values[pitch] >= planes * plane * 2
        assert values[pitch] % 32 == 16
    assert defines["IN_VECTORS"] * 512 >= planes * x_plane * 2
    assert defines["OUT_VECTORS"] * 512 >= planes * y_plane * 2
    # Every output's tile has products of all k-steps in which it meets a pixel, and is an edge where it has neighbours.
    masks = [int(mask, 16) for mask in defines["MASKS"].split(", ")]
    assert all(mask < 1 << defines["STEPS"] for mask in masks)
    assert chosen.block == 32 * values["groups"] * planes or defines["PERIODIC"]
    p, q, r, s = np.meshgrid(*map(np.arange, (g.P, g.Q, g.R, g.S)), indexing="ij")
    h = p * g.stride[0] - g.padding[0][0] + r * g.dilation[0]
    v = q * g.stride[1] - g.padding[1][0] + s * g.dilation[1]
    met = (h >= 0) & (h < g.H) & (v >= 0) & (v < g.W)
    output, pixel = (p * g.Q + q)[met], (h * g.W + v)[met]
    for plane in range(planes):
        x_start, y_start = plane * x_plane % 8, plane * y_plane % 8
        group, tile = np.divmod((y_start + output) // 8, len(masks))
        step = ((x_start + pixel) // 8 - values["first_grain"] - group * values["group_grains"]) // 2
        assert (step >= 0).all()
        assert (np.array(masks)[tile] >> step & 1).all()
        last_group, last_tile = divmod((y_start + y_plane - 1) // 8, len(masks))
        assert last_group < values["groups"]
        edges = {0} if y_start else set()
        edges |= {last_tile} if (y_start + y_plane) % 8 else set()
        edges |= set(range(last_tile + 1, len(masks))) if last_group == values["groups"] - 1 else set(range(len(masks)))
        assert all(int(defines["EDGES"], 16) >> edge & 1 for edge in edges)
    # Windows stay between the guards.
    first = values["first_grain"] * 16
    last = (planes - 1) * x_plane // 8 + values["first_grain"] + (values["groups"] - 1) * values["group_grains"]
    end = (last + 2 * defines["STEPS"]) * 16
    assert values["guard_bytes"] >= max(0, -first, end - planes * x_plane * 2)
    if defines["PERIODIC"]:
        # Zeros between images, where windows reach beyond the plane.
        assert planes == 1
        assert values["input_pitch"] >= x_plane * 2 + values["guard_bytes"]
        assert values["group_grains"] == len(masks)
        assert len(masks) * 8 % g.W == g.W - g.Q == 0
        assert values["rows_before"] * g.W >= -values["first_grain"] * 8


def check_flat(g, chosen, dtype, dgrad):
    g = runs.dense_dgrad_as_forward(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    # Every row, channel and image has one block.
    blocks = (values["block_rows"], 1, values["block_images"])
    for extent, count, of_block in zip((g.H, g.K, g.N), chosen.grid, blocks, strict=True):
        assert count * of_block >= extent > (count - 1) * of_block
    assert defines["STAGES"] <= values["block_images"]
    # Words of results lie at even elements, and every window within the chunks that are loaded.
    assert values["shift"] % 2 == 0
    for r in range(g.R):
        place = (values["shift"] - g.padding[1][0] + (r - g.padding[0][0]) * g.W) % 8
        assert place + 7 + g.S <= (3 if defines["WIDE"] >> r & 1 else 2) * 8
    # Before the first row that is needed, which starts at any element of a chunk, there is room for the chunk before
    # the first window; behind it for that of a unit behind the last one, and for its results.
    assert flat.MARGIN >= g.padding[1][0] + 7 + 7 + 8
    outputs = values["block_rows"] * g.W
    last = flat.MARGIN + 7 + (g.R - 1) * g.W + outputs + 14 + 8 + 32
    assert max(last, flat.MARGIN + 7 + (g.R - 1) * g.W + outputs + 16) * 2 <= values["input_bytes"]
    assert (8 + 7 + outputs + 7 + 8) * 2 <= values["output_bytes"]


def check_phases(g, chosen, dtype, dgrad):
    g = runs.dense_dgrad_as_forward(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    size = plan.DTYPES[dtype][1]
    per_word = 4 // size
    # Every channel and image has one block, whose turns are enough for its stages; of one stage there is one turn.
    assert chosen.grid[0] == g.K
    assert (chosen.grid[1] - 1) * values["block_images"] < g.N <= chosen.grid[1] * values["block_images"]
    turns = values["block_images"] / defines["PLANES"]
    assert turns >= defines["STAGES"]
    assert turns == 1 or defines["STAGES"] > 1
    # A phase has all columns of a row, be it that they begin one before, and rows keep to words.
    assert defines["PLACES"] * defines["DILATION_W"] >= g.W + g.W % per_word
    assert defines["DILATION_W"] % per_word == values["dilation_h"] * g.W % per_word == 0
    assert (defines["BEFORE_H"] * g.dilation[0], defines["BEFORE_W"] * g.dilation[1]) == (
        g.padding[0][0],
        g.padding[1][0],
    )
    # A buffer has room for a plane that starts anywhere in 16 bytes, and for the last words behind it.
    assert values["plane_bytes"] % 16 == 0
    assert values["plane_bytes"] >= g.H * g.W * size + 16
    held = defines["STAGES"] * defines["PLANES"] * values["plane_bytes"]
    assert chosen.shared_bytes >= held + g.dilation[1] * size


def check_channels_last_planes(g, chosen, dtype, dgrad):
    g = runs.dense_dgrad_as_forward(g) if dgrad else g
    values, defines = dict(chosen.parameters), dict(chosen.defines)
    assert values["groups"] == -(-g.K // 32)
    units = values["groups"] * -(-g.N // values["unit_images"])
    warps = chosen.block // 32
    assert (chosen.grid[0] - 1) * warps < units <= chosen.grid[0] * warps
    assert defines["STAGES"] <= values["unit_images"]
    assert chosen.shared_bytes == warps * defines["STAGES"] * g.H * g.W * 32 * plan.DTYPES[dtype][1]
    assert (defines["TOP"], defines["LEFT"]) == (g.padding[0][0], g.padding[1][0])


CHECKS = {
    "phases": check_phases,
    "channels_last_planes": check_channels_last_planes,
    "direct": check_direct,
    "runs": check_runs,
    "flat": check_flat,
    "toeplitz": check_toeplitz,
    "images": check_images,
    "tiles": check_tiles,
    "channels_last": check_channels_last,
    "channels_last_staged": check_channels_last_staged,
    "channels_last_runs": check_channels_last_runs,
    "channels_last_mma": check_channels_last_mma,
}

extent = st.integers(1, 300)


@st.composite
def geometries_of_equal_extents(draw, variant):
    """Of x and y, with padding of whole dilations: of large dilations, or of small planes."""
    kernel = draw(st.tuples(*[st.integers(1, 5)] * 2))
    if variant == "phases":
        N, C, H, W = draw(st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 150), st.integers(1, 150)))
        dilation = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    else:
        N, C, H, W = draw(st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 14), st.integers(1, 14)))
        C, dilation = 8 * C, (1, 1)
    before = [draw(st.integers(0, taps - 1)) for taps in kernel]
    padding = tuple((d * b, d * (k - 1 - b)) for d, b, k in zip(dilation, before, kernel, strict=True))
    numbers = {"padding": padding, "dilation": dilation, "channels_last": variant != "phases"}
    return geometry((N, C, H, W), (C, 1, *kernel), **numbers)


@st.composite
def geometries(draw, variant):
    """Geometries that the variant takes, forward at least: of a small kernel or, for tiles, a large one."""
    if variant in ("phases", "channels_last_planes"):
        return draw(geometries_of_equal_extents(variant))
    N, C, H, W = draw(st.tuples(st.integers(1, 70), st.integers(1, 70), extent, extent))
    numbers = {"channels_last": variant.startswith("channels_last") or (variant == "direct" and draw(st.booleans()))}
    if variant == "tiles":
        kernel = draw(
            st.tuples(st.integers(1, 40), st.integers(2, 40)).filter(lambda kernel: kernel[0] * kernel[1] > 64)
        )
        most_padding = 50
    else:
        kernel = draw(st.tuples(*[st.integers(1, 9)] * 2).filter(lambda kernel: kernel[0] * kernel[1] <= 64))
        numbers |= {name: draw(st.tuples(*[st.integers(1, 4)] * 2)) for name in ("stride", "dilation")}
        most_padding = 9
    multiplier = draw(st.integers(1, 3))
    if variant == "images":
        C, H, W, multiplier = 8 * (C // 8 + 1), H % 32 + 1, W % 32 + 1, 1
    if variant == "channels_last_mma":
        C, multiplier, numbers = 8 * C, 1, {"channels_last": True}
    if variant == "flat":
        multiplier, numbers = 1, {}
    side = st.integers(0, most_padding)
    # No smaller than what the kernel reaches over.
    reach = [d * (k - 1) + 1 for d, k in zip(numbers.get("dilation", (1, 1)), kernel, strict=True)]
    padding = [draw(st.tuples(side, side)) for _ in range(2)]
    if variant == "flat":
        # The output has the extents of x, where that is no narrower than the kernel.
        padding = [(before % k, k - 1 - before % k) for (before, _), k in zip(padding, kernel, strict=True)]
        W += kernel[1]
    H, W = (max(size, r - sum(around)) for size, r, around in zip((H, W), reach, padding, strict=True))
    return geometry((N, C, H, W), (C * multiplier, 1, *kernel), padding=tuple(padding), **numbers)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(list(plan.DTYPES)),
    target=st.sampled_from([H200, RTX_5090]),
    aligned=st.booleans(),
)
def test_every_plan_covers_the_output_and_fits_the_device(variant, data, dtype, target, aligned):
    g = data.draw(geometries(variant))
    dtype = "bfloat16" if variant in ("flat", "toeplitz", "images", "channels_last_mma") else dtype
    most_threads = {
        "phases": 512,
        "images": 512,
        "channels_last_staged": 512,
        "channels_last_mma": 640,
        "channels_last_runs": 1024,
    }
    for direction, make in zip(("forward", "dgrad"), PASSES, strict=True):
        chosen, reason = plan_or_reason(make, g, dtype, target, variant, aligned)
        if chosen is None:
            whole = variant in ("flat", "images", "phases", "channels_last_planes")
            unaligned = not aligned and (whole or "aligned" in reason)
            assert not suits(variant, direction, g, dtype) or unaligned or "fit" in reason
            continue
        assert suits(variant, direction, g, dtype)
        assert all(1 <= extent <= limit for extent, limit in zip(chosen.grid, plan.MAX_GRID, strict=True))
        assert 1 <= chosen.block <= most_threads.get(variant, 256)
        assert 0 <= chosen.shared_bytes <= target.shared_per_block
        struct = chosen.parameter_struct()
        assert all(struct[name] == value for name, value in chosen.parameters)
        CHECKS[variant](g, chosen, dtype, direction == "dgrad")


def test_strided_gradients_begin_before_the_padding():
    for height, width, top, left, stride in product((8, 9, 16), (14, 15), (0, 1, 2, 3), (0, 1), ((2, 2), (1, 2))):
        padding = ((top, 1), (left, 2))
        g = geometry((2, 6, height, width), (6, 1, 3, 2), stride=stride, padding=padding, channels_last=True)
        swapped = channels_last.swapped(g)
        for tile in channels_last.tiles(swapped, "float32", H200, True, transposed=True):
            check_channels_last(g, channels_last.tile_plan(swapped, "float32", tile, transposed=True), "float32", True)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 63, 64, 65, 1000, 2**16 + 1, 2**30 - 1, 2**30 + 1, 2**31 - 1])
def test_division_by_a_reciprocal_is_exact(divisor):
    magic, shift = channels_last.reciprocal(divisor)
    assert magic < 2**32
    assert shift < 64
    for number in {0, 1, divisor - 1, divisor, divisor + 1, 2**31 - 2, 2**31 - 1, 2**31 // divisor * divisor - 1}:
        if number < 2**31:
            assert number * magic >> shift == number // divisor


def test_vectors_of_channels_need_aligned_arrays_and_whole_vectors():
    for channels, dtype, vectors in (
        (64, "float32", {1, 2, 4}),
        (64, "float16", {1, 2, 4, 8}),
        (64, "float64", {1, 2}),
        (67, "float32", {1}),
        (66, "float16", {1, 2}),
    ):
        g = geometry((16, channels, 40, 50), (channels, 1, 3, 1), channels_last=True)
        assert {tile.vector for tile in channels_last.tiles(g, dtype, H200, True)} == vectors
        assert {tile.vector for tile in channels_last.tiles(g, dtype, H200, False)} == {1}


def test_the_number_of_channels_last_variants_is_bounded():
    rng = np.random.default_rng(7)
    seen = {}
    for padding, stride, dilation, make in product((0, 1, 9), (1, 2, 3), (1, 2), PASSES):
        for _ in range(10):
            n, c, h, w = (int(v) for v in rng.integers(1, 200, 4))
            numbers = {"padding": padding, "stride": stride, "dilation": dilation, "channels_last": True}
            g = geometry((n, c, h + 5, w + 5), (c, 1, 3, 3), **numbers)
            chosen, _ = plan_or_reason(make, g, "float32", H200, "channels_last")
            for name, value in chosen.defines if chosen else ():
                seen.setdefault(name, set()).add(value)
    rows = range(1, channels_last._ROWS_AT_ONCE + 1)
    assert seen.pop("COLUMNS") <= set(channels_last._COLUMNS)
    assert seen.pop("DEPTH") <= {*channels_last._DEPTHS, *((n - 1) * stride + 3 for n in rows for stride in (1, 2))}
    assert seen.pop("ROWS") <= {0, *rows}
    assert seen.pop("VECTOR") <= {1, 2, 4}
    assert all(len(values) <= 2 for values in seen.values()), seen


def test_the_number_of_variants_on_quads_is_bounded():
    rng = np.random.default_rng(7)
    seen = {}
    for padding, make in product((0, 2, 9), PASSES):
        for _ in range(30):
            n, c, h, w = (int(v) for v in rng.integers(1, 200, 4))
            g = geometry((n, 8 * c, h + 5, w + 5), (8 * c, 1, 5, 5), padding=padding, channels_last=True)
            chosen = make(g, "float16", H200, "channels_last_mma")
            for name, value in chosen.defines:
                seen.setdefault(name, set()).add(value)
    mma = channels_last_mma
    assert seen.pop("BATCH") <= {batch for batch, _ in mma._BATCHES}
    assert seen.pop("STAGES") <= {stages for _, stages in mma._BATCHES}
    assert seen.pop("GROUPS") <= set(range(2, mma._CHANNELS[-1] // 4 + 1, 2))
    assert seen.pop("THREADS") <= set(range(64, 32 * mma._MAX_WARPS + 1, 64))
    assert seen.pop("BLOCKS") <= set(range(1, 33))
    assert seen.pop("COPIES") <= set(range(1, mma._MAX_COPIES + 1))
    assert all(len(values) <= 2 for values in seen.values()), seen


def test_the_number_of_staged_variants_is_bounded():
    rng = np.random.default_rng(7)
    seen = {}
    for padding, stride, dilation, make in product((0, 2, 9), (1, 2, 3), (1, 2), PASSES):
        for _ in range(5):
            n, c, h, w = (int(v) for v in rng.integers(1, 200, 4))
            numbers = {"padding": padding, "stride": stride, "dilation": dilation, "channels_last": True}
            g = geometry((n, c, h + 5, w + 5), (c, 1, 3, 3), **numbers)
            chosen, _ = plan_or_reason(make, g, "float32", H200, "channels_last_staged")
            for name, value in chosen.defines if chosen else ():
                seen.setdefault(name, set()).add(value)
    staged = channels_last_staged
    assert seen.pop("VECTOR") <= {1, 2, 4}
    assert seen.pop("GROUPS") <= set(range(1, staged._CHANNELS[-1] + 1))
    assert seen.pop("COLUMNS") <= {*staged._COLUMNS, *range(1, staged._MAX_WIDTH + 1)}
    assert seen.pop("THREADS") <= set(range(32, staged._MAX_THREADS + 1, 32))
    assert seen.pop("BLOCKS") <= set(range(1, 33))
    assert seen.pop("COPY") <= {4, 8, 16}
    assert seen.pop("COPIES") <= set(range(1, staged._MAX_COPIES + 1))
    assert seen.pop("WIDTH") <= set(range(3 * staged._MAX_WIDTH + 1))
    assert seen.pop("LEFT") <= {0, 2, 9}
    strides = (seen.pop("STRIDE_H"), seen.pop("STRIDE_W"))
    assert max(strides) <= {1, 2, 3}
    assert all(len(values) <= 2 for values in seen.values()), seen


def test_the_number_of_variants_by_runs_is_bounded():
    rng = np.random.default_rng(7)
    seen = {}
    for padding, make in product((0, 1, 9), PASSES):
        for _ in range(20):
            n, c, h, w = (int(v) for v in rng.integers(1, 400, 4))
            g = geometry((n, c, h + 5, w + 5), (c, 1, 3, 3), padding=padding, channels_last=True)
            chosen, _ = plan_or_reason(make, g, "float32", H200, "channels_last_runs")
            for name, value in chosen.defines if chosen else ():
                seen.setdefault(name, set()).add(value)
    assert seen.pop("COLUMNS") <= set(channels_last_runs._COLUMNS)
    assert seen.pop("CHANNELS") <= set(range(channels_last_runs._MOST_KNOWN_CHANNELS + 1))
    assert seen.pop("THREADS") <= set(range(96, 1025, 32))
    assert seen.pop("BLOCKS") <= set(range(1, 33))
    assert seen.pop("STAGES") <= set(channels_last_runs._STAGES)
    assert max(seen.pop("LEFT") | seen.pop("RIGHT")) <= 9
    assert all(len(values) <= 2 for values in seen.values()), seen


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 63, 1000, 2**15 - 1])
def test_division_by_a_magic_number_is_exact(divisor):
    numbers = np.arange(2**15, dtype=np.uint64)
    np.testing.assert_array_equal(numbers * np.uint64(base.magic(divisor)) >> np.uint64(31), numbers // divisor)


def test_offsets_are_64_bit_only_where_needed():
    below = geometry((1, 1, 2**15, 2**16 - 1), (1, 1, 1, 1))
    above = geometry((1, 1, 2**15, 2**16), (1, 1, 1, 1))
    multiplied = geometry((1, 1, 2**15, 2**15), (2, 1, 1, 1))
    index = [dict(plan.depthwise_forward(g, "float32", T4).defines)["INDEX"] for g in (below, above, multiplied)]
    assert index == ["int", "int64", "int64"]


def test_a_grid_beyond_the_hardware_is_refused():
    g = geometry((2**10, 2**10, 2**10, 2**9 + 2), (2**10, 1, 1, 1))
    with pytest.raises(plan.Unsuitable, match="more than one launch"):
        plan.depthwise_forward(g, "float16", T4)


@pytest.mark.parametrize("make", PASSES)
def test_the_number_of_variants_is_bounded(make):
    """Compile-time values come from small sets, whatever the shapes, so that a program compiles a bounded number."""
    rng = np.random.default_rng(7)
    seen = {}
    strides = (1, 2, 3)
    for padding, stride, dilation in product((0, 1, 9), strides, (1, 2)):
        for _ in range(15):
            n, c, h, w = (int(v) for v in rng.integers(1, 200, 4))
            g = geometry((n, c, h + 5, w + 5), (c, 1, 3, 3), padding=padding, stride=stride, dilation=dilation)
            for name, value in make(g, "float32", H200).defines:
                seen.setdefault(name, set()).add(value)
    choices = {name: len(values) for name, values in seen.items()}
    # Where dy is spread, patches have whole spreads.
    spreads = len(strides) if make is plan.depthwise_dgrad else 1
    for name in ("SPREAD_H", "SPREAD_W", "FIRST_H", "FIRST_W"):
        assert choices.pop(name) <= spreads
    assert seen["ROWS"] <= {*runs._ROWS, 2 * 3, 3}
    choices.pop("ROWS")
    # A number of columns, and with it the padding and W, comes from the shape where a patch spans a narrow row.
    assert choices.pop("COLUMNS") <= spreads * len(runs._COLUMNS) + runs._MAX_WIDTH
    assert choices.pop("WIDTH") <= 2 * runs._MAX_WIDTH + 1
    # H and the padding above, where a patch spans a low plane.
    assert choices.pop("HEIGHT") <= 2 * max(runs._ROWS) + 1
    assert choices.pop("TOP") <= 10
    assert choices.pop("THREADS") <= len(runs._THREADS)
    assert choices.pop("VECTOR") <= 3
    assert choices.pop("OUT_VECTOR") <= 3
    assert choices.pop("LEFT") <= 10
    assert choices.pop("INDEX", 1) == 1  # dgrad of strides and dilations is direct
    assert all(count <= 2 for count in choices.values()), choices


def test_the_number_of_toeplitz_variants_is_bounded():
    rng = np.random.default_rng(7)
    seen = {}
    for padding, stride, dilation, r in product((0, 9), (1, 2, 3), (1, 2), (3, 5, 13)):
        for _ in range(5):
            n, c, h, w = (int(v) for v in rng.integers(1, 200, 4))
            g = geometry((n, c, h + 25, w + 5), (c, 1, r, 3), padding=padding, stride=stride, dilation=dilation)
            for name, value in plan.depthwise_forward(g, "float16", H200, "toeplitz").defines:
                seen.setdefault(name, set()).add(value)
    choices = {name: len(values) for name, values in seen.items()}
    assert seen.pop("R") <= {0, 3, 5}
    assert seen.pop("ROWS") <= {*toeplitz._HELD_ROWS, *toeplitz._RING_ROWS}
    assert seen.pop("STRIDE_H") <= {1, 2, 3}
    assert seen.pop("VECTOR") <= {1, 2, 4, 8}
    assert all(len(values) <= 2 for values in seen.values()), choices


def test_the_number_of_variants_of_phases_and_small_planes_is_bounded():
    rng = np.random.default_rng(7)
    seen = {}
    for name, make in product(("phases", "channels_last_planes"), (*PASSES, plan.depthwise_wgrad)):
        for _ in range(60):
            n, c, h, w, d = (int(v) for v in rng.integers(1, (40, 40, 150, 150, 20)))
            small = name == "channels_last_planes"
            shape, d = ((n, 8 * c, h % 12 + 1, w % 12 + 1), 1) if small else ((n, c, h, w), 2 * d)
            numbers = {"padding": d, "dilation": d, "channels_last": small}
            bias = (True,) if make is plan.depthwise_wgrad else ()
            g = geometry(shape, (shape[1], 1, 3, 3), **numbers)
            chosen, _ = plan_or_reason(make, g, "float16", *bias, H200, name)
            for define, value in getattr(chosen, "sums", chosen).defines if chosen else ():
                seen.setdefault(define, set()).add(value)
    assert seen.pop("PLACES") <= set(range(1, 14))
    assert seen.pop("DILATION_W") <= set(range(2, 41, 2))
    assert seen.pop("H") | seen.pop("W") <= set(range(1, 13))
    assert seen.pop("THREADS") <= set(range(32, phases._MAX_THREADS + 1, 32))
    assert seen.pop("BLOCKS") <= set(range(1, 33))
    assert seen.pop("PLANES") <= set(phases._PLANES)
    assert seen.pop("STAGES") <= {*phases._STAGES, *channels_last_planes._STAGES}
    assert seen.pop("CLUSTER") <= set(range(1, wgrad.MOST_OF_CLUSTER + 1))
    assert all(len(values) <= 2 for values in seen.values()), seen


@pytest.mark.parametrize(
    ("numbers", "dtype", "target", "aligned", "reason"),
    [
        ({}, "float64", H200, True, "at most 4 bytes.*float64"),
        ({}, "float16", plan.TARGETS[80], True, "compute capability 9.0.*8.0"),
        ({"stride": 2}, "float16", H200, True, "stride 1, and outputs as many as inputs"),
        ({"padding": 4}, "float16", H200, True, "outputs as many"),
        ({"padding": ((7, 5), (6, 6))}, "float16", H200, True, "whole dilations.*7, 5"),
        ({"padding": 1, "dilation": 1}, "float16", H200, True, r"whole words apart.*\(1, 1\)"),
        ({"padding": (3, 6), "dilation": (3, 6)}, "float16", H200, True, "whole words apart.*rows of 65"),
        ({}, "float16", H200, False, "multiples of 16 bytes"),
        ({"padding": 2, "dilation": 2}, "float16", H200, True, "65 x 65.*do not fit"),
    ],
)
def test_phases_say_why_they_cannot_run(numbers, dtype, target, aligned, reason):
    g = geometry((2, 3, 65, 65), (3, 1, 3, 3), **{"padding": 6, "dilation": 6, **numbers})
    for make, bias in ((plan.depthwise_forward, ()), (plan.depthwise_wgrad, (True,))):
        with pytest.raises(plan.Unsuitable, match=f"variant phases: .*{reason}"):
            make(g, dtype, *bias, target, "phases", aligned)


@pytest.mark.parametrize(
    ("shape", "numbers", "dtype", "target", "aligned", "reason"),
    [
        ((2, 8, 7, 7), {}, "float64", H200, True, "at most 4 bytes.*float64"),
        ((2, 8, 7, 7), {}, "float16", T4, True, "compute capability 8.0.*7.5"),
        ((2, 8, 7, 7), {"channels_last": False}, "float16", H200, True, "takes channels-last"),
        ((2, 8, 7, 7), {"padding": 0}, "float16", H200, True, "outputs as many as inputs"),
        ((2, 12, 7, 7), {}, "float16", H200, True, "multiples of 16 bytes"),
        ((2, 8, 7, 7), {}, "float16", H200, False, "multiples of 16 bytes"),
        ((2, 8, 16, 16), {}, "float16", H200, True, "16 x 16.*more than is unrolled"),
    ],
)
def test_small_planes_say_why_they_cannot_run(shape, numbers, dtype, target, aligned, reason):
    g = geometry(shape, (shape[1], 1, 3, 3), **{"padding": 1, "channels_last": True, **numbers})
    for make, bias in ((plan.depthwise_forward, ()), (plan.depthwise_wgrad, (True,))):
        with pytest.raises(plan.Unsuitable, match=f"variant channels_last_planes: .*{reason}"):
            make(g, dtype, *bias, target, "channels_last_planes", aligned)


@pytest.mark.parametrize("variant", ["diagonals", "pairs"])
def test_the_number_of_variants_of_wgrad_on_tensor_cores_is_bounded(variant):
    rng = np.random.default_rng(7)
    seen = {}
    for _ in range(400):
        n, h, w, R, S = (int(v) for v in rng.integers(1, (70, 17, 17, 8, 8)))
        scale = 1 if variant == "pairs" else int(rng.integers(1, 7))
        kernel = (R, S) if variant == "pairs" else (R * scale, S)
        padding = tuple(((taps - 1) // 2, taps // 2) for taps in kernel)
        g = geometry((n, 8 * scale, h * scale, w * scale), (8 * scale, 1, *kernel), padding=padding)
        chosen, _ = plan_or_reason(plan.depthwise_wgrad, g, "float16", True, H200, variant)
        for name, value in chosen.sums.defines if chosen is not None else ():
            seen.setdefault(name, set()).add(value)
    assert seen.pop("THREADS") <= {32 * warps for warps in range(1, 17)}
    assert seen.pop("BLOCKS") <= set(range(1, 33))
    if variant == "diagonals":
        assert seen.pop("VECTOR") <= {1, 2, 4, 8}
        assert seen.pop("PAIRS") <= set(range(1, max(wgrad_diagonals._PAIRS) + 1))
        assert seen.pop("X_CHUNKS") | seen.pop("DY_CHUNKS") <= set(range(1, wgrad_diagonals._MAX_CHUNKS + 1))
        assert seen.pop("FIRST") <= {-1, 0}
        assert max(seen.pop("APART")).bit_length() <= 3
        assert seen.pop("CLUSTER") <= set(range(1, wgrad.MOST_OF_CLUSTER + 1))
    else:
        assert seen.pop("R") | seen.pop("S") <= set(range(1, 9))
        assert seen.pop("CHUNKS") <= {1, 2, 3, 4, 5, 6, 7}
        assert seen.pop("PLANE_CHUNKS") <= set(range(1, 34))
        assert seen.pop("FIRST") <= set(range(-8, 1))
        assert seen.pop("OFFSETS") <= set(range(1, 17))
    assert all(len(values) <= 2 for values in seen.values()), seen


def test_the_number_of_flat_variants_is_bounded():
    rng = np.random.default_rng(7)
    seen = {}
    for _ in range(150):
        n, c, h, w, R, S = (int(v) for v in rng.integers(1, (70, 300, 300, 300, 9, 9)))
        padding = tuple((before, taps - 1 - before) for taps in (R, S) for before in [int(rng.integers(taps))])
        g = geometry((n, c, h, w + S), (c, 1, R, S), padding=padding)
        forward, _ = plan_or_reason(plan.depthwise_forward, g, "float16", H200, "flat")
        gradient, _ = plan_or_reason(plan.depthwise_wgrad, g, "float16", True, H200, "flat")
        for chosen in filter(None, (forward, gradient and gradient.sums)):
            for name, value in chosen.defines:
                seen.setdefault(name, set()).add(value)
    assert seen.pop("R") | seen.pop("S") | seen.pop("LEFT") <= set(range(9))
    # A kernel row's windows are wide or not: what there is follows from the width of rows and where units start.
    assert len(seen.pop("WIDE")) <= 64
    assert seen.pop("THREADS") <= {32, 64, 128, 256}
    assert seen.pop("STAGES") | seen.pop("OUTPUTS") <= {1, 2, 3}
    assert seen.pop("CLUSTER") <= set(range(1, wgrad.MOST_OF_CLUSTER + 1))
    assert all(len(values) <= 2 for values in seen.values()), seen


def test_the_number_of_tiles_variants_is_bounded():
    rng = np.random.default_rng(7)
    seen = {}
    for _ in range(60):
        n, c, h, w, R, S = (int(v) for v in rng.integers(1, (70, 70, 100, 100, 50, 50)))
        if R * S > runs.MAX_TAPS:
            g = geometry((n, c, h + R, w + S), (c, 1, R, S), padding=(R // 2, S // 2))
            for name, value in plan.depthwise_forward(g, "float32", H200, "tiles").defines:
                seen.setdefault(name, set()).add(value)
    choices = {name: len(values) for name, values in seen.items()}
    assert choices.pop("ROWS") <= len({rows for rows, _ in tiles._SHAPES})
    assert choices.pop("COLUMNS") <= len({columns for _, columns in tiles._SHAPES})
    assert choices.pop("TAIL") <= max(tiles._CHUNKS)
    assert all(count <= 3 for count in choices.values()), choices


@pytest.mark.parametrize(
    ("dtype", "target", "numbers", "reason"),
    [
        ("float32", H200, {}, "float16 and bfloat16.*float32"),
        ("float16", plan.TARGETS[80], {}, "compute capability 9.0.*8.0"),
        ("float16", H200, {"dilation": (1, 70)}, "8 k-steps.*10"),
        ("float16", H200, {"stride": (5, 1)}, "stride of rows.*5"),
        ("float16", H200, {"x_shape": (1, 1, 9, 10**6)}, "fit shared memory"),
    ],
)
def test_toeplitz_says_why_it_cannot_run(dtype, target, numbers, reason):
    x_shape = numbers.get("x_shape", (2, 1, 30, 300))
    g = geometry(x_shape, (1, 1, 3, 3), **{name: number for name, number in numbers.items() if name != "x_shape"})
    with pytest.raises(plan.Unsuitable, match=rf"variant toeplitz.*{reason}"):
        plan.depthwise_forward(g, dtype, target, "toeplitz")


def test_toeplitz_rows_are_laid_out_by_vectors_where_that_costs_no_k_step():
    def window(w, kernel, padding):
        return toeplitz.window_of(geometry((1, 1, 60, w), (1, 1, kernel, kernel), padding=padding), aligned=True)

    assert window(28, 5, 2) == toeplitz.Window(phase=2, steps=1, lead=4, vector=4)
    assert window(56, 7, 3) == toeplitz.Window(phase=1, steps=1, lead=4, vector=4)
    assert window(56, 31, 15) == toeplitz.Window(phase=1, steps=3, lead=16, vector=8)
    assert window(57, 7, 3) == toeplitz.Window(phase=0, steps=1, lead=3, vector=1)
    assert window(56, 9, 1) == toeplitz.Window(phase=0, steps=1, lead=1, vector=1)


def test_parameter_struct_matches_the_fields_of_the_kernels():
    """Names and order in the plan are those of the C++ struct."""
    from cuconv import kernels

    plans = []
    for variant, make in product(VARIANTS, (*PASSES, plan.depthwise_wgrad)):
        R = 9 if variant == "tiles" else 3
        dilation = 2 if variant == "phases" else 1
        numbers = {"padding": R // 2 * dilation, "dilation": dilation}
        g = geometry((2, 8, 9, 10), (8, 1, R, R), **numbers, channels_last=variant.startswith("channels_last"))
        if make is plan.depthwise_wgrad and suits(variant, "wgrad", g, "float16"):
            of_wgrad = make(g, "float16", True, H200, variant)
            plans += filter(None, (of_wgrad.sums, of_wgrad.reduce))
        elif make is not plan.depthwise_wgrad and suits(variant, "forward", g, "float16"):
            plans.append(make(g, "float16", H200, variant))
    assert len({chosen.source for chosen in plans}) == 26
    for chosen in plans:
        text = (kernels.sources_folder() / f"{chosen.source}.cu").read_text()
        body = text[text.index("struct Parameters {") : text.index("};", text.index("struct Parameters {"))]
        fields = []
        for line in body.splitlines()[1:]:
            kind, _, names = line.split("//")[0].strip().rstrip(";").partition(" ")
            dtype = {"int": "int32", "uint32": "uint32", "int64": "int64"}[kind]
            fields += [(name.strip(), dtype) for name in names.split(",")]
        struct = chosen.parameter_struct()
        assert [(name, str(struct.dtype[name])) for name in struct.dtype.names] == fields


def test_dgrad_is_a_turned_forward_convolution_at_stride_1():
    g = geometry((2, 3, 9, 12), (3, 1, 3, 2), padding=((0, 1), (3, 0)), dilation=(2, 1))
    turned, spread = runs.dgrad_as_forward(g)
    assert (turned.x_shape, turned.y_shape) == (g.y_shape, g.x_shape)
    assert turned.padding == ((4, 3), (-2, 1))
    assert spread == runs.Spread()
    # The shapes follow from the paddings, negative ones too.
    assert turned.P == turned.H + 4 + 3 - 2 * (3 - 1)
    assert turned.Q == turned.W - 2 + 1 - (2 - 1)
    chosen = plan.depthwise_dgrad(g, "float32", H200)
    assert chosen.source == "depthwise_runs"
    assert dict(chosen.defines)["TURNED"] == 1


def test_dgrad_of_strides_is_a_convolution_of_a_spread_dy():
    # Of the kernel turned around, tap 1 brings row 0 of dy to row 0 of x, and tap 0 column 0 to column 0. To row 9 of
    # x, its last, tap 2 would bring row 5 of dy, which has 5 rows.
    g = geometry((2, 3, 10, 14), (3, 1, 3, 4), stride=(2, 3), padding=((1, 0), (3, 2)))
    turned, spread = runs.dgrad_as_forward(g)
    assert (turned.x_shape, turned.y_shape, turned.stride) == (g.y_shape, g.x_shape, (1, 1))
    assert spread == runs.Spread(by=(2, 3), first=(1, 0))
    assert turned.padding == ((0, 1), (0, 0))
    for dtype in plan.DTYPES:
        assert plan.depthwise_dgrad(g, dtype, H200).source == "depthwise_runs"
    # A kernel as large as the stride covers x once, so that nothing is outside of dy.
    exact, _ = runs.dgrad_as_forward(geometry((2, 3, 10, 15), (3, 1, 2, 3), stride=(2, 3)))
    assert not exact.padded
    # What dy does not reach is outside of it.
    unreached, _ = runs.dgrad_as_forward(geometry((2, 3, 11, 16), (3, 1, 2, 3), stride=(2, 3)))
    assert unreached.padding == ((0, 1), (0, 1))


def test_dgrad_of_multipliers_is_a_sum_over_planes():
    g = geometry((2, 3, 9, 12), (6, 1, 3, 2), stride=(1, 2))
    values = dict(plan.depthwise_dgrad(g, "float32", H200, "runs").parameters)
    turned, _ = runs.dgrad_as_forward(g)
    assert (turned.x_shape, turned.y_shape) == (g.y_shape, g.x_shape)
    assert (values["multiplier"], values["K"]) == (2, 3)
    # Of planes in pieces, every summand is a run of its own, as far from a boundary of 16 bytes as in dy.
    large = geometry((2, 3, 512, 512), (6, 1, 4, 4))
    values = dict(plan.depthwise_dgrad(large, "float32", H200).parameters)
    assert values["block_rows"] < large.H
    assert values["addend"] < large.P * large.Q
    assert (large.P * large.Q - values["addend"]) % 4 == 0


def test_dgrad_of_strides_and_dilations_along_one_axis_is_direct():
    both = geometry((2, 3, 9, 12), (3, 1, 3, 2), stride=(1, 2), dilation=(1, 3))
    assert plan.depthwise_dgrad(both, "float32", H200).source == "depthwise_dgrad_direct"
    with pytest.raises(plan.Unsuitable, match="stride 1 or dilation 1"):
        plan.depthwise_dgrad(both, "float32", H200, "runs")
    apart = geometry((2, 3, 9, 12), (3, 1, 3, 2), stride=(1, 2), dilation=(3, 1))
    # A kernel one element wide has nothing to dilate.
    narrow = geometry((2, 3, 9, 12), (3, 1, 3, 1), stride=(1, 2), dilation=(3, 3))
    for g in (apart, narrow):
        assert plan.depthwise_dgrad(g, "float32", H200).source == "depthwise_runs"


def test_planning_imports_no_cupy():
    code = "import sys, cuconv.plan; raise SystemExit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
