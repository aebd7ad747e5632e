"""Every kernel variant compiled by NVRTC for every architecture, with a budget of registers and no spills."""

from __future__ import annotations

from itertools import product

import pytest

from cuconv import kernels, plan
from cuconv.geometry import pointwise_geometry
from cuconv.plan import channels_last, channels_last_mma, images, phases, separable_backward, toeplitz, wgrad_phases

cupy = pytest.importorskip("cupy", reason="no cupy: kernels are not compiled (install cuconv[test])")
from test_plan import geometry, plan_or_reason  # noqa: E402

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
# Sums, weights and a row of input live in registers; more than this a thread, and too few warps fit a multiprocessor.
REGISTER_BUDGET = 168
# A sum in float64 takes two of them.
REGISTER_BUDGET_FLOAT64 = 200
# Channels-last 7x7 has two for each of 49 weights, and the least of tiles; two blocks of 128 threads have room for 255.
REGISTER_BUDGET_7X7_FLOAT64 = 255
# Staged in shared memory, strips as wide as a plane of 14 hold 98 sums and 49 weights, in two blocks of 128 threads.
REGISTER_BUDGET_STAGED = 232
# Of a 7x7 kernel channels-last, by runs, a thread has 49 weights or sums and 7 rows of sums or of dy.
REGISTER_BUDGET_RUNS = 200
# Patches of 16 rows have 64 sums; their launch bound leaves room for one block of 256 threads.
REGISTER_BUDGET_16_ROWS = 224
# Of 31x31 a thread has 80 sums, and one block of 8 warps fits.
REGISTER_BUDGET_TENSOR_WGRAD = 216
# A word or two, of which those of slak51 and convnext7 are written once and read once a turn, and that of eff5 is
# sm_100's.
SPILL_BUDGET_TENSOR_WGRAD = {"slak51": 16, "convnext7": 16, "eff5": 8}
# Of 7x7 in flat planes there are 29 products, in the gradient of the weights with four sums each, and 49 sums of edges.
REGISTER_BUDGET_FLAT = 255
# A word or two on sm_120: 3x3 in float16, of which the compiler takes 64 registers by itself.
SPILL_BUDGET_FLAT = {"sm_120": 8}
# Small planes keep the products of a group; a tile is offered where its blocks leave room for all of them.
REGISTER_BUDGET_IMAGES = 255
# On sm_100 and sm_120, whose tiles are chosen by the registers that sm_90 needs: 7x7 on 14x14.
SPILL_BUDGET_IMAGES = 16
# 7x7 has 56 sums and 42 registers of weights, in three blocks of 4 warps or fewer.
REGISTER_BUDGET_QUADS = 184
# A few words on sm_90a, where a fifth block fits: of 5x5 on 7x7 it makes 43 % of the floor of 39.
SPILL_BUDGET_QUADS = 16
# 16-bit rows of an odd number of elements on both sides, one by one.
REGISTER_BUDGET_TRANSPOSED = 96
SPILL_BUDGET_LARGE_WGRAD = 0
# Bytes a thread: sums over multiplied channels in float64 keep one of their weights in memory on sm_100, and patches of
# 4x7 without vectors a word on sm_120. In the tile that was the fastest of those measured, the gradient at dilation 12
# in bfloat16 keeps two addresses there. 31x31 in bfloat16, which tensor cores make from sm_90 on, keeps six words on
# older ones.
SPILL_BUDGET = {
    ("3x3_multiplier_2", "nchw"): 16,
    ("3x3_67_channels", "nchw"): 8,
    ("3x3_dilation_12", "nhwc"): 16,
    ("31x31", "nchw"): 24,
}

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
            for case in CASES:
                yield pytest.param(case, layout, None, architecture, id=f"{case}-{layout}-{architecture}")
                # What the default takes of old devices and of what cannot be staged.
                if layout == "nhwc" and architecture == MEASURED and case != "31x31" and case != "51x5":
                    for variant in ("channels_last", "channels_last_runs"):
                        name = f"{case}-{layout}-{variant}-{architecture}"
                        yield pytest.param(case, layout, variant, architecture, id=name)


@pytest.mark.parametrize(("case", "layout", "variant", "architecture"), list(budget_cases()))
def test_compiles_within_the_budget_of_registers_and_spills(case, layout, variant, architecture):
    x_shape, w_shape, numbers = CASES[case]
    g = geometry(x_shape, w_shape, **numbers, channels_last=layout == "nhwc")
    for direction, dtype in EVERY if architecture == MEASURED else SOME:
        try:
            chosen = getattr(plan, f"depthwise_{direction}")(g, dtype, TARGETS[architecture], variant)
        except plan.Unsuitable:
            assert variant is not None
            continue
        resources = kernels.compile_only(chosen, architecture)
        spilled = resources.spill_bytes
        assert spilled <= SPILL_BUDGET.get((case, layout), 0), f"{chosen} spills {spilled} bytes on {architecture}"
        budget = REGISTER_BUDGET_FLOAT64 if dtype == "float64" else REGISTER_BUDGET
        if (case, layout, dtype) == ("7x7", "nhwc", "float64"):
            budget = REGISTER_BUDGET_7X7_FLOAT64
        if chosen.source == "depthwise_channels_last_staged":
            budget = REGISTER_BUDGET_STAGED
        if chosen.source == "depthwise_images":
            budget = REGISTER_BUDGET_IMAGES
        if chosen.source == "depthwise_channels_last_mma":
            budget = REGISTER_BUDGET_QUADS
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


# What their measured figures are of, and with which variant.
TENSOR_WGRAD = {
    "eff5": ("diagonals", (128, 240, 28, 28), (5, 5), 2),
    "convnext7": ("diagonals", (64, 192, 56, 56), (7, 7), 3),
    "slak51": ("diagonals", (16, 96, 56, 56), (51, 5), (25, 2)),
    "replk31": ("diagonals", (16, 128, 56, 56), (31, 31), 15),
    "mbv1_14": ("pairs", (128, 512, 14, 14), (3, 3), 1),
    "mbv1_7": ("pairs", (128, 1024, 7, 7), (3, 3), 1),
    "eff5_7": ("pairs", (128, 1152, 7, 7), (5, 5), 2),
    "convnext7_14": ("pairs", (128, 512, 14, 14), (7, 7), 3),
}


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if int(name[3:].rstrip("a")) >= 90])
@pytest.mark.parametrize("case", TENSOR_WGRAD)
def test_wgrad_on_tensor_cores_compiles_within_its_budget(case, architecture):
    variant, x_shape, kernel, padding = TENSOR_WGRAD[case]
    g = geometry(x_shape, (x_shape[1], 1, *kernel), padding=padding)
    target = TARGETS[architecture]
    all_of_them = product(("float16", "bfloat16"), (False, True))
    for dtype, bias in all_of_them if architecture == MEASURED else [("bfloat16", True)]:
        try:
            chosen = plan.depthwise_wgrad(g, dtype, bias, target, variant).sums
        except plan.Unsuitable:
            # Some planes do not fit shared memory where there is less of it.
            assert target.shared_per_block < TARGETS[MEASURED].shared_per_block
            continue
        resources = kernels.compile_only(chosen, architecture)
        spilled, budget = resources.spill_bytes, SPILL_BUDGET_TENSOR_WGRAD.get(case, 0)
        assert spilled <= budget, f"{chosen} spills {spilled} bytes on {architecture}"
        assert resources.registers <= REGISTER_BUDGET_TENSOR_WGRAD, f"{chosen} takes {resources.registers}"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if int(name[3:].rstrip("a")) >= 80])
@pytest.mark.parametrize("case", ["3x3_small", "5x5", "7x7"])
def test_quads_compile_within_their_budget(case, architecture):
    """Every number of blocks for which the plan makes room, and of the rows between barriers most and fewest."""
    x_shape, w_shape, numbers = CASES[case]
    g = geometry(x_shape, w_shape, **numbers, channels_last=True)
    kinds = {}
    for tile in channels_last_mma.tiles(g, TARGETS[architecture]):
        few_warps = tile.warps <= 4
        if few_warps and (architecture == MEASURED or tile.batch == 2):
            kinds[tile.blocks * tile.warps // 4, tile.batch, tile.turns > 1] = tile
    for tile in kinds.values():
        resources = kernels.compile_only(channels_last_mma.tile_plan(g, "bfloat16", tile), architecture)
        budget = SPILL_BUDGET_QUADS if architecture == MEASURED else 0
        assert resources.spill_bytes <= budget, f"{tile} spills {resources.spill_bytes} bytes"
        assert resources.registers <= REGISTER_BUDGET_QUADS, f"{tile} takes {resources.registers}"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if int(name[3:].rstrip("a")) >= 90])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_flat_compiles_within_its_budget(kernel, architecture):
    """Rows that start at every odd place of a chunk from row to row, which says what windows are wide."""
    dtypes = ("float16", "bfloat16") if architecture == MEASURED else ("float16",)
    for width, dtype in product((15, 29, 57, 131), dtypes):
        g = geometry((32, 67, 57, width), (67, 1, kernel, kernel), padding=kernel // 2)
        target = TARGETS[architecture]
        wgrad = plan.depthwise_wgrad(g, dtype, True, target, "flat").sums
        for chosen in (plan.depthwise_forward(g, dtype, target, "flat"), wgrad):
            resources = kernels.compile_only(chosen, architecture)
            spilled = resources.spill_bytes
            assert spilled <= SPILL_BUDGET_FLAT.get(architecture, 0), (
                f"{chosen} spills {spilled} bytes on {architecture}"
            )
            assert resources.registers <= REGISTER_BUDGET_FLAT, f"{chosen} takes {resources.registers}"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if int(name[3:].rstrip("a")) >= 90])
@pytest.mark.parametrize("dilation", [4, 6, 12, 24])
def test_phases_compile_without_spills(dilation, architecture):
    """Of each number of places the tiles that leave a thread most and fewest registers."""
    g = geometry((8, 256, 65, 65), (256, 1, 3, 3), padding=dilation, dilation=dilation)
    target = TARGETS[architecture]
    for dtype in ("float16", "bfloat16", "float32") if architecture == MEASURED else ("bfloat16",):
        of_threads = {
            t.blocks(target) * t.threads: phases.tile_plan(g, dtype, target, t) for t in phases.tiles(g, dtype, target)
        }
        of_wgrad = {
            t.blocks(target) * t.threads: wgrad_phases.tile_plan(g, dtype, True, target, t).sums
            for t in wgrad_phases.tiles(g, dtype, True, target)
        }
        for of_all in (of_threads, of_wgrad):
            for chosen in (of_all[min(of_all)], of_all[max(of_all)]) if of_all else ():
                spilled = kernels.compile_only(chosen, architecture).spill_bytes
                assert spilled == 0, f"{chosen} spills {spilled} bytes on {architecture}"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if int(name[3:].rstrip("a")) >= 80])
@pytest.mark.parametrize(("extents", "kernel"), [((7, 7), 3), ((7, 7), 5), ((8, 8), 5), ((14, 14), 3)])
def test_small_planes_compile_without_spills(extents, kernel, architecture):
    g = geometry((128, 1152, *extents), (1152, 1, kernel, kernel), padding=kernel // 2, channels_last=True)
    target = TARGETS[architecture]
    for dtype in ("float16", "bfloat16", "float32") if architecture == MEASURED else ("bfloat16",):
        forward = plan.depthwise_forward(g, dtype, target, "channels_last_planes")
        wgrad = plan.depthwise_wgrad(g, dtype, True, target, "channels_last_planes")
        for chosen in (forward, wgrad.sums):
            resources = kernels.compile_only(chosen, architecture)
            assert resources.spill_bytes == 0, f"{chosen} spills {resources.spill_bytes} bytes on {architecture}"


@pytest.mark.parametrize("kernel", [3, 9, 11])
def test_every_patch_of_toeplitz_compiles_without_spills(kernel):
    g = geometry((8, 16, 64, 64), (16, 1, kernel, kernel), padding=kernel // 2)
    patches = {(t.rows, t.warps): t for t in toeplitz.tiles(g, True, plan.TARGETS[90].shared_per_block // 2)}
    for tile in patches.values():
        resources = kernels.compile_only(toeplitz.tile_plan(g, "bfloat16", tile), "sm_90a")
        assert resources.spill_bytes == 0, f"{tile} spills {resources.spill_bytes} bytes"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if int(name[3:].rstrip("a")) >= 90])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_channels_last_runs_compile_within_their_budget(kernel, architecture):
    """With channels that are known at compile time and with more of them, of which every column has an address."""
    for channels, dtype in product((67, 301), ("bfloat16", "float32")):
        g = geometry((32, channels, 57, 59), (channels, 1, kernel, kernel), padding=kernel // 2, channels_last=True)
        target = TARGETS[architecture]
        forward = plan.depthwise_forward(g, dtype, target, "channels_last_runs")
        wgrad, reason = plan_or_reason(plan.depthwise_wgrad, g, dtype, True, target, "channels_last_runs")
        # Turns of seven rows of many channels do not fit where there is less shared memory.
        assert wgrad is not None or ("fit" in reason and architecture == "sm_120")
        for chosen in (forward, wgrad and wgrad.sums):
            if chosen is None:
                continue
            resources = kernels.compile_only(chosen, architecture)
            assert resources.spill_bytes == 0, f"{chosen} spills {resources.spill_bytes} bytes on {architecture}"
            assert resources.registers <= REGISTER_BUDGET_RUNS, f"{chosen} takes {resources.registers}"


@pytest.mark.parametrize("architecture", ["sm_75", MEASURED, "sm_120"])
def test_the_largest_patches_that_load_all_rows_at_once_compile_without_spills(architecture):
    target = TARGETS[architecture]
    for kernel, stride, dtype, back in product((3, 5), (1, 2), ("bfloat16", "float32"), (False, True)):
        numbers = {"padding": kernel // 2, "stride": stride, "channels_last": True}
        g = geometry((1, 144, 40, 41), (144, 1, kernel, kernel), **numbers)
        g = channels_last.swapped(g) if back else g
        tiles = [tile for tile in channels_last.tiles(g, dtype, target, True, back) if tile.at_once]
        size = plan.DTYPES[dtype][1]
        largest = max(tiles, key=lambda tile, g=g, back=back: channels_last._values_at_once(tile, g, size, back))
        resources = kernels.compile_only(channels_last.tile_plan(g, dtype, largest, back), architecture)
        assert resources.spill_bytes == 0, f"{largest} spills {resources.spill_bytes} bytes on {architecture}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_transposition_compiles_within_its_budget(size, architecture):
    """Vectors on both sides, on one and on none."""
    for rows, columns in product((3136, 3135), (128, 67)):
        resources = kernels.compile_only(plan.transposed(16, rows, columns, size, True), architecture)
        assert resources.spill_bytes == 0
        assert resources.registers <= REGISTER_BUDGET_TRANSPOSED, f"{rows} x {columns}: {resources.registers}"


LARGE = {
    "slak51": ((16, 96, 56, 56), (51, 5), (25, 2)),
    "slak5x51": ((16, 96, 56, 56), (5, 51), (2, 25)),
    "replk31": ((16, 128, 56, 56), (31, 31), 15),
    "13x13": ((16, 512, 14, 14), (13, 13), 6),
    "9x9_7": ((64, 1024, 7, 7), (9, 9), 4),
    "12x11_image": ((1, 64, 200, 200), (12, 11), 5),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", LARGE)
def test_wgrad_of_large_kernels_compiles_within_its_budget(case, architecture):
    x_shape, kernel, padding = LARGE[case]
    g = geometry(x_shape, (x_shape[1], 1, *kernel), padding=padding)
    every = product(("float32", "bfloat16", "float64"), (False, True))
    for dtype, bias in every if architecture == MEASURED else [("float32", True), ("float64", False)]:
        chosen = plan.depthwise_wgrad(g, dtype, bias, TARGETS[architecture], "tiles").sums
        resources = kernels.compile_only(chosen, architecture)
        spilled = resources.spill_bytes
        assert spilled <= SPILL_BUDGET_LARGE_WGRAD, f"{chosen} spills {spilled} bytes on {architecture}"
        assert resources.registers <= REGISTER_BUDGET, f"{chosen} takes {resources.registers}"


SMALL_PLANES = {
    "7x7": ((128, 1152, 7, 7), (1152, 1, 5, 5), {"padding": 2}),
    "14x14": ((128, 512, 14, 14), (512, 1, 7, 7), {"padding": 3}),
    "14x14_stride_2": ((128, 512, 14, 14), (512, 1, 3, 3), {"padding": 1, "stride": 2}),
    "28x28": ((128, 240, 28, 28), (240, 1, 5, 5), {"padding": 2}),
}


@pytest.mark.parametrize("case", SMALL_PLANES)
def test_every_tile_of_images_compiles_without_spills(case):
    """Registers are what its blocks leave; a tile that needs more is not to be offered."""
    x_shape, w_shape, numbers = SMALL_PLANES[case]
    g = geometry(x_shape, w_shape, **numbers)
    kinds = {(t.group, t.warps, t.blocks): t for t in images.tiles(g, plan.TARGETS[90], True)}
    assert kinds
    for tile in kinds.values():
        resources = kernels.compile_only(images.tile_plan(g, "bfloat16", plan.TARGETS[90], tile), "sm_90a")
        assert resources.spill_bytes == 0, f"{tile} spills {resources.spill_bytes} bytes"


@pytest.mark.parametrize("architecture", ["sm_100a", "sm_120"])
@pytest.mark.parametrize("case", SMALL_PLANES)
def test_images_compile_within_their_budget_elsewhere(case, architecture):
    """Its register counts are those of sm_90a: elsewhere a few of them may be too few."""
    x_shape, w_shape, numbers = SMALL_PLANES[case]
    g = geometry(x_shape, w_shape, **numbers)
    chosen, reason = plan_or_reason(plan.depthwise_forward, g, "float16", TARGETS[architecture], "images")
    if chosen is None:
        assert "fit" in reason
    else:
        spilled = kernels.compile_only(chosen, architecture).spill_bytes
        assert spilled <= SPILL_BUDGET_IMAGES, f"{chosen} spills {spilled} bytes on {architecture}"


# Products of warp groups have 64 or 128 sums a thread, and one or two fragments of their left factor.
POINTWISE = {
    "pw512": ((16, 64, 512, 512), 128),
    "mbv1_14": ((64, 512, 14, 14), 512),
    "mbv1_7": ((128, 1024, 7, 7), 1024),
    "xception": ((32, 728, 19, 19), 728),
    "deeplab": ((8, 304, 129, 129), 256),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", POINTWISE)
def test_warp_groups_compile_without_spills(case, channels_last):
    x_shape, K = POINTWISE[case]
    g = pointwise_geometry(x_shape, (K, x_shape[1]), channels_last=channels_last)
    target = TARGETS[MEASURED]
    for dtype, allow_tf32 in (("float32", False), ("float32", True), ("float16", False), ("bfloat16", False)):
        plans = [plan.pointwise_conv(g, dtype, turned, plan.Epilogue(allow_tf32), target) for turned in (False, True)]
        plans.append(plan.pointwise_wgrad(g, dtype, True, allow_tf32, target).sums)
        for chosen in plans:
            resources = kernels.compile_only(chosen, MEASURED)
            assert resources.spill_bytes == 0, f"{chosen} spills {resources.spill_bytes} bytes"


PLANES = {
    "kb86": ((16, 64, 512, 512), 3),
    "mbv1_14": ((64, 512, 14, 14), 3),
    "xception": ((32, 728, 19, 19), 3),
    "5x5": ((64, 192, 57, 56), 5),
}


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if int(name[3:].rstrip("a")) >= 80])
@pytest.mark.parametrize(("case", "layout"), list(product(PLANES, ("nchw", "nhwc"))))
def test_planes_in_place_compile_within_their_budget(case, layout, architecture):
    x_shape, kernel = PLANES[case]
    w_shape = (x_shape[1], 1, kernel, kernel)
    g = geometry(x_shape, w_shape, padding=kernel // 2, channels_last=layout == "nhwc")
    epilogues = [plan.SeparableEpilogue(), plan.SeparableEpilogue(depthwise_activation="silu")]
    for dtype, epilogue in product(plan.DTYPES if architecture == MEASURED else ("bfloat16",), epilogues):
        chosen = separable_backward.planes(g, dtype, True, epilogue, TARGETS[architecture], True).sums
        resources = kernels.compile_only(chosen, architecture)
        assert resources.spill_bytes == 0, f"{chosen} spills {resources.spill_bytes} bytes on {architecture}"
        blocks, registers = dict(chosen.defines)["BLOCKS"], -(-resources.registers // 8) * 8
        assert blocks * chosen.block * registers <= 65536


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
