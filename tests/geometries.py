"""Which convolutions the kernel tests run, and which variant takes which of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import oracle
import pytest

from cuconv.geometry import depthwise_geometry

# x, w, stride, padding, dilation. Rows, columns and their numbers differ wherever they can; the product of all choices
# is pruned to geometries that each reach a branch of a kernel or of its plan that the others do not.
EVERYWHERE = {
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

# What only kernels for more than 64 taps branch on: few columns or rows of taps, many planes, planes below the kernel.
_LARGE = {
    "9x9_channels": ((2, 23, 7, 8), (23, 1, 9, 9), (1, 1), ((4, 4), (4, 4)), (1, 1)),
    "9x8_valid": ((2, 3, 17, 30), (3, 1, 9, 8), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "31x31": ((2, 2, 13, 57), (2, 1, 31, 31), (1, 1), ((15, 15), (15, 15)), (1, 1)),
    "51x5": ((3, 1, 29, 15), (1, 1, 51, 5), (1, 1), ((25, 25), (2, 2)), (1, 1)),
    "5x51_asymmetric": ((1, 2, 6, 29), (2, 1, 5, 51), (1, 1), ((1, 4), (40, 12)), (1, 1)),
    "65x1": ((2, 2, 66, 3), (2, 1, 65, 1), (1, 1), ((3, 0), (0, 0)), (1, 1)),
    "1x65": ((2, 2, 3, 66), (2, 1, 1, 65), (1, 1), ((0, 0), (0, 3)), (1, 1)),
    "9x9_multiplier_3": ((3, 2, 9, 10), (6, 1, 9, 9), (1, 1), ((4, 3), (2, 5)), (1, 1)),
    "9x9_all_padding": ((1, 2, 3, 4), (2, 1, 9, 9), (1, 1), ((20, 11), (9, 17)), (1, 1)),
}

# What only the gradient of large weights branches on: units of a part of a plane, several groups of kernel rows.
_WGRAD = {
    "9x9_rows_apart": ((1, 1, 300, 40), (1, 1, 9, 9), (1, 1), ((4, 4), (4, 4)), (1, 1)),
    "120x20": ((2, 1, 125, 40), (1, 1, 120, 20), (1, 1), ((3, 1), (0, 7)), (1, 1)),
}

# What only the gradient of weights on tensor cores branches on, whose images are multiples of 16 bytes: rows of one
# chunk and of several, planes that start at any element or at no multiple of 16 bytes, channels and images that fill no
# block, groups of kernel rows, chunks and rows far apart, chunks of padding alone.
_TENSOR_WGRAD = {
    "7x7_planes": ((9, 24, 7, 7), (24, 1, 5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "14x14_planes": ((5, 6, 14, 14), (6, 1, 7, 7), (1, 1), ((3, 3), (3, 3)), (1, 1)),
    "28_wide": ((4, 2, 12, 28), (2, 1, 5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "56_wide": ((3, 1, 9, 56), (1, 1, 7, 7), (1, 1), ((3, 3), (3, 3)), (1, 1)),
    "120_wide": ((2, 1, 3, 120), (1, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "odd_planes_dilation_12": ((3, 8, 21, 23), (8, 1, 3, 3), (1, 1), ((12, 12), (12, 11)), (12, 12)),
    "4x9_stride_2_1_dilated": ((3, 8, 13, 20), (8, 1, 4, 9), (2, 1), ((0, 1), (0, 0)), (3, 1)),
    "2x6_asymmetric": ((2, 8, 9, 11), (8, 1, 2, 6), (1, 1), ((4, 0), (1, 9)), (1, 1)),
    "51x5_channels": ((3, 3, 30, 16), (3, 1, 51, 5), (1, 1), ((25, 25), (2, 2)), (1, 1)),
    "31x31_narrow": ((2, 1, 20, 24), (1, 1, 31, 31), (1, 1), ((15, 15), (15, 15)), (1, 1)),
    "7x7_kernel_7x7_planes": ((35, 8, 7, 7), (8, 1, 7, 7), (1, 1), ((3, 3), (3, 3)), (1, 1)),
    "5x9_planes": ((21, 8, 5, 9), (8, 1, 4, 3), (1, 1), ((3, 0), (0, 2)), (1, 1)),
    "12x20_planes": ((17, 2, 12, 20), (2, 1, 2, 2), (1, 1), ((0, 1), (1, 0)), (1, 1)),
    "pixels": ((5, 24, 1, 1), (24, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "columns_of_padding": ((2, 8, 3, 5), (8, 1, 2, 3), (1, 1), ((6, 7), (2, 19)), (1, 1)),
}

# What strides and multipliers do to dx only: rows and columns that no dy reaches, a dy that covers x exactly, strides
# along one axis and dilation along the other, or along one where the kernel is one element wide, sums of planes.
_DGRAD = {
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

# What only channels-last kernels branch on: vectors of 8 and of 2 channels, more of them than a block has threads,
# strided gradients that not every row takes part in.
_CHANNELS_LAST = {
    "8_channels": ((2, 8, 13, 11), (8, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "14_channels": ((1, 14, 9, 20), (14, 1, 3, 2), (1, 2), ((0, 1), (2, 0)), (1, 1)),
    "281_channels": ((2, 281, 4, 5), (281, 1, 2, 3), (1, 1), ((1, 0), (1, 1)), (1, 1)),
    "1x1_stride_2": ((2, 4, 7, 9), (4, 1, 1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    "4x5_stride_2": ((1, 6, 11, 14), (6, 1, 4, 5), (2, 2), ((1, 2), (3, 2)), (1, 1)),
}

# What only images side by side branch on: more and fewer of them than the rows of a product, planes that begin at every
# element of a grain and at some, groups of a plane that are alike and that are not, planes that are too few for a unit.
_IMAGES = {
    "7x7_together": ((17, 16, 7, 7), (16, 1, 5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "7x7_rest": ((5, 24, 7, 7), (24, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "14x14_together": ((35, 6, 14, 14), (6, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "14x14_7x7": ((16, 2, 14, 14), (2, 1, 7, 7), (1, 1), ((3, 3), (3, 3)), (1, 1)),
    "28x28_alike": ((18, 2, 28, 28), (2, 1, 5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "16x8_dilated_alike": ((3, 3, 16, 8), (3, 1, 3, 3), (1, 1), ((3, 2), (2, 2)), (3, 2)),
    "9x7_strided": ((3, 8, 9, 7), (8, 1, 3, 4), (2, 1), ((1, 0), (2, 1)), (1, 1)),
    "8x8_dilated": ((3, 3, 8, 8), (3, 1, 3, 2), (1, 1), ((2, 2), (2, 2)), (2, 3)),
    "6x5_valid": ((2, 8, 6, 5), (8, 1, 3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "one_pixel_of_8": ((20, 8, 1, 1), (8, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "4x4_much_padding": ((2, 2, 4, 4), (2, 1, 2, 2), (1, 1), ((6, 7), (5, 9)), (1, 1)),
}

# What only quads of columns branch on: windows of one to four pieces of them, quads that fill no warp, of one image and
# of several, rows that are no whole quads, channels that fill no block, padding that some or all of their rows are.
_QUADS = {
    "3x1_quads": ((3, 8, 9, 8), (8, 1, 3, 1), (1, 1), ((0, 0), (1, 0)), (1, 1)),
    "3x4_quads": ((2, 16, 12, 33), (16, 1, 3, 4), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "5x5_quads": ((9, 24, 7, 7), (24, 1, 5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "5x4_much_padding": ((4, 32, 7, 6), (32, 1, 5, 4), (1, 1), ((9, 0), (0, 7)), (1, 1)),
    "7x7_quads": ((2, 40, 14, 15), (40, 1, 7, 7), (1, 1), ((3, 3), (3, 3)), (1, 1)),
    "2x13_quads": ((2, 8, 4, 90), (8, 1, 2, 13), (1, 1), ((1, 0), (6, 6)), (1, 1)),
    "136_channels": ((1, 136, 5, 6), (136, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
}

# What only phases of dilated rows branch on, whose outputs are as many as their inputs: rows that begin in the midst of
# a word; fewer rows and columns than a dilation; padding on one side alone; more images than a block works on at once,
# and than are whole turns.
_PHASES = {
    "odd_dilation_12": ((3, 3, 30, 37), (3, 1, 3, 3), (1, 1), ((12, 12), (12, 12)), (12, 12)),
    "even_dilation_3_2": ((11, 2, 13, 14), (2, 1, 3, 3), (1, 1), ((3, 3), (2, 2)), (3, 2)),
    "odd_one_sided": ((5, 3, 9, 19), (3, 1, 3, 3), (1, 1), ((4, 0), (0, 8)), (2, 4)),
    "below_a_dilation": ((9, 5, 5, 7), (5, 1, 3, 3), (1, 1), ((7, 7), (8, 8)), (7, 8)),
    "2x5_phases": ((2, 2, 14, 11), (2, 1, 2, 5), (1, 1), ((0, 4), (4, 4)), (4, 2)),
    "4x1_phases": ((23, 1, 15, 5), (1, 1, 4, 1), (1, 1), ((4, 2), (0, 0)), (2, 6)),
}

# What only planes unrolled altogether branch on: channels that fill no warp, planes below the kernel, padding on one
# side alone, more images than a warp works on.
_PLANES = {
    "40_channels_of_7x6": ((21, 40, 7, 6), (40, 1, 5, 3), (1, 1), ((2, 2), (1, 1)), (1, 1)),
    "planes_below_the_kernel": ((3, 72, 2, 3), (72, 1, 5, 7), (1, 1), ((1, 3), (4, 2)), (1, 1)),
    "one_sided_planes": ((5, 8, 6, 9), (8, 1, 3, 4), (1, 1), ((2, 0), (0, 3)), (1, 1)),
}


def _geometries(table):
    return {
        name: depthwise_geometry(x, w, stride=stride, padding=padding, dilation=dilation)
        for name, (x, w, stride, padding, dilation) in table.items()
    }


GEOMETRIES = _geometries(
    EVERYWHERE | _LARGE | _DGRAD | _WGRAD | _TENSOR_WGRAD | _CHANNELS_LAST | _IMAGES | _QUADS | _PHASES | _PLANES
)
# As rows of images they need more products than registers hold.
_TOO_MANY_PRODUCTS = [
    GEOMETRIES[name]
    for name in (
        "large_kernel_dilated",
        "56_wide",
        "51x5_channels",
        "2x6_asymmetric",
        "31x31_narrow",
        "3x4_quads",
        "7x7_quads",
    )
]

LAYOUTS = ("nchw", "nhwc")
PASSES = ("forward", "dgrad", "wgrad")
VARIANTS = (
    "direct",
    "runs",
    "flat",
    "phases",
    "toeplitz",
    "images",
    "diagonals",
    "pairs",
    "tiles",
    "channels_last",
    "channels_last_staged",
    "channels_last_mma",
    "channels_last_runs",
    "channels_last_planes",
)
HALVES = ("float16", "bfloat16")


def suits(variant, direction, g, dtype):
    """Whether a variant has this pass of a geometry no larger than those above, on an H200.

    It is said here once more, and not asked of the plan, so that a plan that refuses what it took before is noticed.
    """
    few_taps = g.R * g.S <= 64
    dense, multiplied = g.stride == g.dilation == (1, 1), g.multiplier > 1
    forward, nchw = direction == "forward", not g.channels_last
    if variant == "direct":
        return True
    if variant == "phases":
        size = {"float32": 4, "float64": 8}.get(dtype, 2)
        same = g.stride == (1, 1) and (g.P, g.Q) == (g.H, g.W) and not multiplied
        whole_dilations = all(before % d == 0 for (before, _), d in zip(g.padding, g.dilation, strict=True))
        # Columns of a phase, in words; rows of an odd number of halves begin in the midst of one.
        per_word = max(1, 4 // size)
        columns = per_word * -(-(g.W + (per_word == 2 and g.W % 2)) // g.dilation[1])
        held = (g.R + 1) * columns + g.R * g.S + (direction == "wgrad") <= 104
        in_words = g.dilation[1] * size % 4 == g.dilation[0] * g.W * size % 4 == 0
        return nchw and size <= 4 and in_words and same and whole_dilations and held
    whole = all(size // g.N % 8 == 0 for size in (g.x_size, g.y_size))
    if variant == "pairs":
        takes = nchw and dtype in HALVES and not multiplied and dense and few_taps
        return direction == "wgrad" and takes and whole and (g.P, g.Q) == (g.H, g.W) and g.H * g.W <= 256
    if variant == "flat":
        takes = nchw and dtype in HALVES and not multiplied and dense and few_taps
        return takes and (g.P, g.Q) == (g.H, g.W) and g.R <= 8 and g.S <= min(g.W, 10)
    if variant == "diagonals":
        # Chunks of 8 columns; of 16 no more. The last tap of the first column is not beyond the padding.
        narrow = max(g.W, g.Q) <= 120 and (g.S - 1) * g.dilation[1] + 7 >= g.padding[1][0]
        takes = nchw and dtype in HALVES and not multiplied and g.stride[1] == 1
        return direction == "wgrad" and takes and whole and narrow
    if variant == "channels_last_mma" and direction == "wgrad":
        takes = dtype in HALVES and not multiplied and g.stride == (1, 1) and g.C % 8 == 0
        return not nchw and few_taps and takes
    if variant == "channels_last_runs":
        return not nchw and few_taps and dense and dtype != "float64" and not multiplied
    if variant == "channels_last_planes":
        # A plane is unrolled, and pixels are whole 16 bytes.
        same = dense and not multiplied and (g.P, g.Q) == (g.H, g.W)
        few = g.H * g.W * g.R * g.S <= 2100 and (g.R + 1) * g.W + g.R * g.S <= 104
        whole = dtype != "float64" and g.C % (4 if dtype == "float32" else 8) == 0
        return not nchw and same and few and whole
    if direction == "wgrad":
        words = dtype == "float32" or (dtype in HALVES and (g.C % 2 == 0 or g.dilation == (1, 1)))
        staged = not nchw and words and not multiplied
        few = {"runs": nchw, "channels_last": not nchw, "channels_last_staged": staged}.get(variant, False)
        return few if few_taps else variant == "tiles" and nchw and dense
    if variant == "runs":
        axes = zip((g.R, g.S), g.stride, g.dilation, strict=True)
        return nchw and few_taps and (forward or all(1 in axis for axis in axes))
    if variant == "toeplitz":
        rows_apart = g.stride[0] // math.gcd(g.stride[0], g.dilation[0])
        takes = rows_apart <= 4 if forward else g.stride == (1, 1) and not multiplied
        return nchw and dtype in HALVES and takes
    if variant == "images":
        planes = [g.H * g.W, g.P * g.Q]
        # Of so many planes the first and the last element are at multiples of 16 bytes.
        together = math.lcm(*(8 // math.gcd(8, plane) for plane in planes))
        whole = all(g.K * plane % 8 == 0 for plane in planes) and not multiplied
        outputs = planes[1 if forward else 0]
        few = max(planes) <= 1024 and together * outputs <= 1024 and g not in _TOO_MANY_PRODUCTS
        return nchw and dtype in HALVES and whole and few and (forward or g.stride == (1, 1))
    if variant == "tiles":
        return nchw and not few_taps and dense and (forward or not multiplied)
    if variant == "channels_last_staged":
        words = dtype == "float32" or (dtype in HALVES and g.C % 2 == 0)
        return not nchw and few_taps and words and not multiplied and (forward or g.stride == (1, 1))
    if variant == "channels_last_mma":
        # Of four channels the registers for sums and weights; all columns that a quad needs, in pieces of four.
        steps = (g.S + 6) // 4
        held = g.R * (4 + steps) + 2 * steps <= 103
        takes = dtype in HALVES and dense and few_taps and not multiplied and g.C % 8 == 0 and held
        return not nchw and direction != "wgrad" and takes
    assert variant == "channels_last"
    simple = g.stride == (1, 1) or (max(g.stride) <= 2 and g.dilation == (1, 1))
    return not nchw and few_taps and (forward or (simple and not multiplied))


# In a kernel dtypes differ by the bytes of an element, and so by the elements of a vector, and by their conversion. g++
# compiles every kernel anew: hence every geometry in the dtypes for which the choices of a variant differ most, and in
# the others those that bring padding, strides, dilation, multipliers, several planes a block and large kernels.
_MAIN_DTYPES = {
    "direct": ("float16", "float32"),
    "runs": ("float16", "float32"),
    "flat": ("float16",),
    "phases": ("float16", "float32"),
    "toeplitz": ("float16",),
    "images": ("float16",),
    "diagonals": ("float16",),
    "pairs": ("float16",),
    "tiles": ("float32",),  # 16-bit elements are widened before they are shared
    "channels_last": ("float16",),
    "channels_last_staged": ("float16", "float32"),
    "channels_last_mma": ("float16",),
    "channels_last_runs": ("float16",),
    "channels_last_planes": ("float16",),
}
_FEW = (
    "3x3_padded",
    "3x3_stride_2",
    "3x3_dilated_strided",
    "5x3_dilated",
    "multiplier_3",
    "planes_together",
    "large_kernel",
    "large_kernel_strided",
    "9x9_channels",
    "8_channels",
    "7x7_together",
    "14x14_7x7",
    "7x7_planes",
    "14x14_planes",
    "51x5_channels",
    "5x5_quads",
    "7x7_quads",
    "odd_dilation_12",
)


def cases(direction):
    """pytest.param(g, dtype, layout, variant) of all that a pass of every variant is tested with."""
    nchw_names = EVERYWHERE | _LARGE | {"forward": {}, "dgrad": _DGRAD, "wgrad": _WGRAD}[direction]
    names = {"nchw": nchw_names, "nhwc": nchw_names | _CHANNELS_LAST}
    for layout, variant, dtype in product(LAYOUTS, VARIANTS, oracle.DTYPES):
        of_variant = names[layout] | (_IMAGES if variant == "images" else {})
        of_variant |= _QUADS | _PLANES if variant == "channels_last_planes" else {}
        of_variant |= _PHASES if variant == "phases" else {}
        of_variant |= _TENSOR_WGRAD if variant in ("diagonals", "pairs") else {}
        of_variant |= _QUADS if variant == "channels_last_mma" else {}
        for name in of_variant if dtype in _MAIN_DTYPES[variant] else filter(of_variant.__contains__, _FEW):
            g = replace(GEOMETRIES[name], channels_last=layout == "nhwc")
            if layout == "nhwc" and not all(map(tells_layout, _read(direction, g))):
                continue
            if suits(variant, direction, g, dtype):
                yield pytest.param(g, dtype, layout, variant, id=f"{name}-{dtype}-{layout}-{variant}")


def _read(direction, g):
    """The shapes of the arrays whose strides say what layout a call has."""
    return {"forward": (g.x_shape,), "dgrad": (g.y_shape,), "wgrad": (g.x_shape, g.y_shape)}[direction]


def tells_layout(shape):
    """Whether the strides of an array of this shape tell its layout: where they do not, it counts as NCHW."""
    return shape[1] > 1 and shape[2:] != (1, 1)


def numbers_of(g):
    """The keyword arguments of a convolution."""
    return {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}


def random_dy(rng, g, dtype):
    return rng.standard_normal(g.y_shape).astype(oracle.DTYPES[dtype])


# For tests of what is no matter of a kernel's size: every variant in a dtype that it takes, in its layout.
VARIANT_CASES = (
    ("direct", "float32", "nchw"),
    ("direct", "float32", "nhwc"),
    ("runs", "float32", "nchw"),
    ("toeplitz", "float16", "nchw"),
    ("toeplitz", "bfloat16", "nchw"),
    ("tiles", "float32", "nchw"),
    ("channels_last", "float32", "nhwc"),
    ("channels_last_staged", "float32", "nhwc"),
    ("channels_last_runs", "bfloat16", "nhwc"),
)


def same_kernel(variant):
    """A kernel that the variant takes, and the arguments with which a convolution by it keeps the extents of x."""
    R, S = (7, 13) if variant == "tiles" else (3, 3)
    return (R, S), {"stride": (1, 1), "padding": ((R // 2, R // 2), (S // 2, S // 2)), "dilation": (1, 1)}


def shifted(device, array, layout, offset):
    """The array on the device, `offset` elements behind where it would begin."""
    flat = np.concatenate([np.zeros(offset, array.dtype), array.ravel()])
    if layout == "nchw":
        return device.array(flat)[offset:].reshape(array.shape)
    N, C, H, W = array.shape
    flat[offset:] = array.transpose(0, 2, 3, 1).ravel()
    return device.array(flat)[offset:].reshape(N, H, W, C).transpose(0, 3, 1, 2)
