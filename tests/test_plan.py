"""Planning: pure arithmetic, so all of it is tested here without a GPU."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuconv import plan
from cuconv.geometry import Conv2dGeometry, depthwise_geometry
from cuconv.plan import base, runs, toeplitz

H200, RTX_5090, T4 = plan.TARGETS[90], plan.TARGETS[120], plan.TARGETS[75]


PASSES = (plan.depthwise_forward, plan.depthwise_dgrad)


def geometry(x_shape, w_shape, **numbers) -> Conv2dGeometry:
    return depthwise_geometry(x_shape, w_shape, **numbers)


def test_the_default_is_runs_where_they_run_then_toeplitz_then_direct():
    g = geometry((16, 64, 512, 512), (64, 1, 3, 3))
    assert plan.depthwise_forward(g, "float32", H200).source == "depthwise_runs"
    assert plan.depthwise_forward(g, "float32", RTX_5090).source == "depthwise_runs"
    assert plan.depthwise_forward(g, "float32", T4).source == "depthwise_forward_direct"
    large = geometry((16, 128, 56, 56), (128, 1, 31, 31), padding=15)
    assert plan.depthwise_forward(large, "float32", H200).source == "depthwise_forward_direct"
    assert plan.depthwise_forward(large, "bfloat16", H200).source == "depthwise_toeplitz"
    assert plan.depthwise_dgrad(large, "float16", H200).source == "depthwise_toeplitz"
    assert plan.depthwise_forward(large, "float16", plan.TARGETS[80]).source == "depthwise_forward_direct"
    small = geometry((64, 192, 56, 56), (192, 1, 7, 7), padding=3)
    assert plan.depthwise_forward(small, "float16", H200).source == "depthwise_runs"
    wide = geometry((1, 1, 3, 10**6), (1, 1, 3, 3))
    assert plan.depthwise_forward(wide, "float32", H200).source == "depthwise_forward_direct"


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


def covers_by_toeplitz(g, chosen):
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


extent = st.integers(1, 300)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), extent, extent),
    multiplier=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.tuples(st.integers(0, 9), st.integers(0, 9))),
    dtype=st.sampled_from(list(plan.DTYPES)),
    target=st.sampled_from([H200, RTX_5090]),
)
def test_every_plan_covers_the_output_and_fits_the_device(
    shape, multiplier, kernel, stride, dilation, padding, dtype, target
):
    try:
        g = geometry(shape, (shape[1] * multiplier, 1, *kernel), stride=stride, dilation=dilation, padding=padding)
    except ValueError:
        return  # a kernel larger than its input
    forward = ((g.H, g.W), (g.P, g.Q), g.K, g.y_size)
    dgrad = ((g.P, g.Q), (g.H, g.W), g.C, g.x_size)
    for (make, sizes), variant in product(zip(PASSES, (forward, dgrad), strict=True), plan.VARIANTS):
        (_, width), (rows, columns), channels, outputs = sizes
        try:
            chosen = make(g, dtype, target, variant)
        except plan.Unsuitable:
            continue
        values, defines = dict(chosen.parameters), dict(chosen.defines)
        assert all(1 <= extent <= limit for extent, limit in zip(chosen.grid, plan.MAX_GRID, strict=True))
        assert 1 <= chosen.block <= 256
        assert 0 <= chosen.shared_bytes <= target.shared_per_block
        struct = chosen.parameter_struct()
        assert all(struct[name] == value for name, value in chosen.parameters)
        if variant == "direct":
            assert (chosen.grid[0] - 1) * chosen.block < outputs <= chosen.grid[0] * chosen.block
            continue
        if variant == "toeplitz":
            covers_by_toeplitz(g, chosen)
            continue
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
            needed = rows_needed(make, g, first, min(rows, first + block_rows))
            summands = values["multiplier"] if defines["SUMMED"] else 1
            elements = len(needed) * width
            assert block_planes > 1 or summands == 1 or elements <= values["addend"]
            elements += (summands - 1) * values["addend"]
            assert block_planes > 1 or elements * plan.DTYPES[dtype][1] + 16 <= values["input_bytes"]


def rows_needed(make, g, first, end):
    """The rows of x, for dgrad of dy, of which the output rows from first on are made, and those between them."""
    (top, _), stride, dilation = g.padding[0], g.stride[0], g.dilation[0]
    if make is plan.depthwise_forward:
        needed = {p * stride - top + r * dilation for p in (first, end - 1) for r in (0, g.R - 1)}
        needed = {min(max(row, 0), g.H - 1) for row in needed}
    else:
        met = product(range(first, end), range(g.R))
        over = [h + top - r * dilation for h, r in met]
        needed = {p // stride for p in over if p % stride == 0 and 0 <= p // stride < g.P}
    return range(min(needed), max(needed) + 1) if needed else range(0)


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
        for _ in range(40):
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

    g = geometry((2, 3, 9, 9), (3, 1, 3, 3))
    plans = [make(g, "float16", H200, variant) for make in PASSES for variant in plan.VARIANTS]
    assert len({chosen.source for chosen in plans}) == 4
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
