"""Every kernel variant compiled by NVRTC for every architecture, with a budget of registers and no spills."""

from __future__ import annotations

from itertools import product

import pytest

from cuconv import kernels, plan
from cuconv.plan import toeplitz

cupy = pytest.importorskip("cupy", reason="no cupy: kernels are not compiled (install cuconv[test])")
from test_plan import geometry  # noqa: E402

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
# Sums, weights and a row of input live in registers; more than this a thread, and too few warps fit a multiprocessor.
REGISTER_BUDGET = 168
# A sum in float64 takes two of them.
REGISTER_BUDGET_FLOAT64 = 200
# Channels-last 7x7 has two for each of 49 weights, and the least of tiles; two blocks of 128 threads have room for 255.
REGISTER_BUDGET_7X7_FLOAT64 = 255
# Patches of 16 rows have 64 sums; their launch bound leaves room for one block of 256 threads.
REGISTER_BUDGET_16_ROWS = 224
# Bytes a thread: sums over multiplied channels in float64 keep one of their weights in memory on sm_100, and patches of
# 4x7 without vectors a word on sm_120.
SPILL_BUDGET = {("3x3_multiplier_2", "nchw"): 16, ("3x3_67_channels", "nchw"): 8}

CASES = {
    "3x3": ((16, 64, 512, 512), (64, 1, 3, 3), {}),
    "3x3_padded": ((16, 64, 512, 512), (64, 1, 3, 3), {"padding": 1}),
    "3x3_stride_2": ((64, 128, 112, 112), (128, 1, 3, 3), {"padding": 1, "stride": 2}),
    "5x5_stride_2": ((64, 144, 56, 56), (144, 1, 5, 5), {"padding": 2, "stride": 2}),
    "3x3_multiplier_2": ((64, 32, 112, 112), (64, 1, 3, 3), {"padding": 1}),
    "3x3_dilation_12": ((8, 256, 65, 65), (256, 1, 3, 3), {"padding": 12, "dilation": 12}),
    "3x3_small": ((128, 512, 14, 14), (512, 1, 3, 3), {"padding": 1}),
    "5x5": ((128, 240, 28, 28), (240, 1, 5, 5), {"padding": 2}),
    "7x7": ((64, 192, 56, 56), (192, 1, 7, 7), {"padding": 3}),
    "3x3_67_channels": ((32, 67, 129, 131), (67, 1, 3, 3), {"padding": 1}),
    "31x31": ((16, 128, 56, 56), (128, 1, 31, 31), {"padding": 15}),
    "51x5": ((16, 96, 56, 56), (96, 1, 51, 5), {"padding": (25, 2)}),
}


# NVRTC takes up to a second for a kernel: on the GPU that kernels are tuned on every pass in every dtype, elsewhere
# some; kernels for channels-last, which all architectures take, on the oldest and on the one where they need most.
MEASURED = "sm_90a"
EVERY = [*product(("forward", "dgrad"), plan.DTYPES)]
SOME = [("forward", "bfloat16"), ("forward", "float32"), ("dgrad", "float64")]
TARGETS = {name: plan.TARGETS[int(name.removeprefix("sm_").rstrip("a"))] for name in ARCHITECTURES}


def budget_cases():
    for architecture, layout in product(ARCHITECTURES, ("nchw", "nhwc")):
        if layout == "nchw" or architecture in ("sm_75", MEASURED, "sm_100a"):
            yield from (
                pytest.param(case, layout, architecture, id=f"{case}-{layout}-{architecture}") for case in CASES
            )


@pytest.mark.parametrize(("case", "layout", "architecture"), list(budget_cases()))
def test_compiles_within_the_budget_of_registers_and_spills(case, layout, architecture):
    x_shape, w_shape, numbers = CASES[case]
    g = geometry(x_shape, w_shape, **numbers, channels_last=layout == "nhwc")
    for direction, dtype in EVERY if architecture == MEASURED else SOME:
        chosen = getattr(plan, f"depthwise_{direction}")(g, dtype, TARGETS[architecture])
        resources = kernels.compile_only(chosen, architecture)
        spilled = resources.spill_bytes
        assert spilled <= SPILL_BUDGET.get((case, layout), 0), f"{chosen} spills {spilled} bytes on {architecture}"
        budget = REGISTER_BUDGET_FLOAT64 if dtype == "float64" else REGISTER_BUDGET
        if (case, layout, dtype) == ("7x7", "nhwc", "float64"):
            budget = REGISTER_BUDGET_7X7_FLOAT64
        assert resources.registers <= budget, f"{chosen} takes {resources.registers} on {architecture}"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if int(name[3:].rstrip("a")) >= 90])
@pytest.mark.parametrize("case", CASES)
def test_toeplitz_compiles_within_its_budget(case, architecture):
    x_shape, w_shape, numbers = CASES[case]
    g = geometry(x_shape, w_shape, **numbers)
    for dtype in ("float16", "bfloat16") if architecture == MEASURED else ("bfloat16",):
        chosen = plan.depthwise_forward(g, dtype, TARGETS[architecture], "toeplitz")
        resources = kernels.compile_only(chosen, architecture)
        assert resources.spill_bytes == 0, f"{chosen} spills {resources.spill_bytes} bytes on {architecture}"
        budget = REGISTER_BUDGET_16_ROWS if dict(chosen.defines)["ROWS"] > 14 else REGISTER_BUDGET
        assert resources.registers <= budget, f"{chosen} takes {resources.registers} on {architecture}"


@pytest.mark.parametrize("kernel", [3, 9, 11])
def test_every_patch_of_toeplitz_compiles_without_spills(kernel):
    g = geometry((8, 16, 64, 64), (16, 1, kernel, kernel), padding=kernel // 2)
    patches = {(t.rows, t.warps): t for t in toeplitz.tiles(g, True, plan.TARGETS[90].shared_per_block // 2)}
    for tile in patches.values():
        resources = kernels.compile_only(toeplitz.tile_plan(g, "bfloat16", tile), "sm_90a")
        assert resources.spill_bytes == 0, f"{tile} spills {resources.spill_bytes} bytes"


def test_a_compile_error_names_variant_architecture_and_log():
    broken = plan.Plan("depthwise_forward_direct", (("T", "f32"), ("INDEX", "no_such_type")), (1, 1, 1), 32, 0, ())
    with pytest.raises(RuntimeError, match=r"(?s)depthwise_forward_direct.*sm_80.*NVRTC.*no_such_type"):
        kernels.compile_only(broken, "sm_80")


def test_flatten_brings_each_header_once_and_keeps_line_numbers():
    text = kernels.flatten("depthwise_runs", (("T", "f32"),))
    assert text.startswith('#define CUCONV_T f32\n#line 1 "depthwise_runs.cu"\n')
    for header in ("ptx.cuh", "numbers.cuh", "runs.cuh"):
        assert text.count(f'#line 1 "{header}"') == 1
    assert "#include" not in text
    source = (kernels.sources_folder() / "depthwise_runs.cu").read_text().splitlines()
    after = text[text.rindex('"depthwise_runs.cu"\n') :].splitlines()[1:]
    line = int(text[: text.rindex(' "depthwise_runs.cu"\n')].rsplit("#line ", 1)[1])
    assert after == source[line - 1 :]
