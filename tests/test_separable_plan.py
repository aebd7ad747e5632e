"""Plans of separable convolutions in one kernel: what is chosen where, what a tile promises, what a kernel takes."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuconv import kernels, plan
from cuconv.geometry import separable_geometry
from cuconv.plan import separable_fragments

H200, A100 = plan.TARGETS[90], plan.TARGETS[80]
EXACT, TF32 = plan.SeparableEpilogue(), plan.SeparableEpilogue(allow_tf32=True)


def geometry(x_shape, K, kernel=3, padding=1, **numbers):
    C = x_shape[1]
    return separable_geometry(
        x_shape, (C, 1, kernel, kernel), (K, C, 1, 1), **{"stride": 1, "padding": padding, "dilation": 1, **numbers}
    )


def source(g, dtype, epilogue=EXACT, target=H200, **options):
    chosen = plan.separable_conv(g, dtype, epilogue, target, **options)
    return None if chosen is None else chosen.source


def test_few_channels_stay_in_registers_and_all_else_is_made_apart():
    for channels_last, chosen in ((False, "separable_fragments"), (True, None)):
        g = geometry((64, 64, 112, 112), 128, channels_last=channels_last)
        assert source(g, "float16") == source(g, "float32", TF32) == chosen
        assert source(g, "float16", forced="fragments").startswith("separable_fragments")
        for other in (
            geometry((64, 128, 147, 147), 128, channels_last=channels_last),
            geometry((64, 512, 14, 14), 512, channels_last=channels_last),
            geometry((64, 64, 112, 112), 128, channels_last=channels_last, stride=2),
            geometry((64, 64, 112, 112), 128, channels_last=channels_last, padding=2, dilation=2),
        ):
            assert source(other, "float16") is None
        assert source(g, "float64") is None
        assert source(g, "float16", target=A100) is None


@pytest.mark.parametrize(
    ("numbers", "dtype", "target", "reason"),
    [
        ({}, "float16", A100, "compute capability 9.0"),
        ({}, "float64", H200, "float64 has 64"),
        ({"stride": 2}, "float16", H200, "stride 1"),
        ({"channels_last": True, "K": 20}, "float16", H200, "pixels of whole 16 bytes"),
        ({"kernel": 9, "padding": 4}, "float16", H200, "at most 64 taps"),
        ({"kernel": 7, "padding": 3}, "float32", H200, "4 columns beyond a row"),
        ({"C": 640}, "float32", H200, "640 channels"),
    ],
)
def test_a_reason_is_given_where_fragments_cannot_run(numbers, dtype, target, reason):
    numbers = dict(numbers)
    C, K = numbers.pop("C", 32), numbers.pop("K", 24)
    with pytest.raises(plan.Unsuitable, match=reason):
        plan.separable_conv(geometry((2, C, 24, 24), K, **numbers), dtype, EXACT, target, "fragments")


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 160), st.integers(1, 300), st.integers(1, 400)),
    st.integers(1, 300),
    st.sampled_from([(1, 0), (3, 1), (3, 0), (5, 2), (2, 1)]),
    st.booleans(),
    st.sampled_from(["float16", "float32"]),
)
@settings(max_examples=200, deadline=None)
def test_every_tile_covers_the_result_and_fits_the_device(x_shape, K, kernel, channels_last, dtype):
    N, _, H, W = x_shape
    size, padding = kernel
    if min(H, W) + 2 * padding < size:
        return
    g = geometry(x_shape, K, size, padding, channels_last=channels_last)
    piece = 16 // plan.DTYPES[dtype][1]
    try:
        separable_fragments.require(g, dtype, H200, aligned=True)
    except plan.Unsuitable:
        return
    for t in separable_fragments.tiles(g, dtype, EXACT, H200):
        chosen = separable_fragments.tile_plan(g, dtype, EXACT, H200, t)
        numbers, defines = dict(chosen.parameters), dict(chosen.defines)
        P, Q = g.depthwise.P, g.depthwise.Q
        assert (numbers["strips"] - 1) * t.strip < Q <= numbers["strips"] * t.strip
        assert (numbers["chunks"] - 1) * t.chunk < P <= numbers["chunks"] * t.chunk
        assert numbers["tasks"] == N * numbers["strips"] * numbers["chunks"] >= chosen.grid[0] >= 1
        assert t.strip <= t.widest
        assert t.strip % piece == t.chunk % t.lane_rows == 0
        assert chosen.shared_bytes <= H200.shared_per_block - 1024
        # A tile that begins in the midst of a row, and rows that must have come before its own are announced.
        rows = (1 + -(-7 // -(-t.strip // 4))) * t.lane_rows + g.depthwise.R - 1
        assert t.slots >= rows + (0 if defines.get("WHOLE", 1) else 2)
        assert chosen.block == 32 * (t.warps + defines["BRINGERS"]) <= 1024


# What is kept of a task while a tile of 128 channels is made; the loops over channels spill nothing.
SPILL_BUDGET = 128
CASES = [(64, 128, 112), (128, 128, 147), (32, 64, 56)]


@pytest.mark.parametrize(("case", "channels_last"), list(product(CASES, (False, True))))
def test_compiles_without_spills(case, channels_last):
    C, K, extent = case
    g = geometry((32, C, extent, extent), K, channels_last=channels_last)
    for dtype, epilogue in (("float16", EXACT), ("bfloat16", EXACT), ("float32", TF32), ("float32", EXACT)):
        chosen = plan.separable_conv(g, dtype, epilogue, H200, "fragments")
        resources = kernels.compile_only(chosen, "sm_90a")
        budget = SPILL_BUDGET if C == 128 else 0
        assert resources.spill_bytes <= budget, f"{chosen} spills {resources.spill_bytes} bytes"
