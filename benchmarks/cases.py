"""What is timed: cases, dtypes and layouts."""

from __future__ import annotations

from cuconv.cases import REFERENCE_CASES, Case

CASES = (
    *(case for case in REFERENCE_CASES if case.operator == "depthwise"),
    Case("mbv1_s2", 64, 128, 112, 112, 3, 3, stride=2, padding=1, dilation=1),
    Case("mbv1_14", 128, 512, 14, 14, 3, 3, stride=1, padding=1, dilation=1),
    Case("mbv1_7", 128, 1024, 7, 7, 3, 3, stride=1, padding=1, dilation=1),
    Case("eff5", 128, 240, 28, 28, 5, 5, stride=1, padding=2, dilation=1),
    Case("eff5_7", 128, 1152, 7, 7, 5, 5, stride=1, padding=2, dilation=1),
    Case("convnext7", 64, 192, 56, 56, 7, 7, stride=1, padding=3, dilation=1),
    Case("convnext7_14", 128, 512, 14, 14, 7, 7, stride=1, padding=3, dilation=1),
    Case("deeplab_d12", 8, 256, 65, 65, 3, 3, stride=1, padding=12, dilation=12),
    Case("odd", 32, 67, 129, 131, 3, 3, stride=1, padding=1, dilation=1),
    Case("b1_14", 1, 512, 14, 14, 3, 3, stride=1, padding=1, dilation=1),
    Case("b1_56", 1, 144, 56, 56, 3, 3, stride=1, padding=1, dilation=1),
    # Last, since JAX takes most of its time for them.
    Case("replk31", 16, 128, 56, 56, 31, 31, stride=1, padding=15, dilation=1),
    Case("slak51", 16, 96, 56, 56, 51, 5, stride=1, padding=(25, 2), dilation=1),
    # One with 2**31 results.
    *(Case(name, 16, 64, n, n, 1, 1, 1, 0, 1, K=128) for name, n in (("pw512", 512), ("kb87", 1024))),
    *(case for case in REFERENCE_CASES if case.operator == "separable"),
    *(
        Case(name, N, C, n, n, 3, 3, stride=1, padding=1, dilation=1, K=K)
        for name, N, C, K, n in (
            ("mbv1_sep2", 64, 64, 128, 112),
            ("xception_entry", 32, 128, 128, 147),
            ("mbv1_sep14", 64, 512, 512, 14),
            ("mbv1_sep7", 128, 1024, 1024, 7),
            ("xception_mid", 32, 728, 728, 19),
            ("deeplab_sep", 8, 304, 256, 129),
        )
    ),
)

CASE_NAMES = [case.name for case in CASES]

# tf32 is float32 whose products may be of that precision: see `dtype_of`.
DTYPES = ("float32", "tf32", "float16", "bfloat16", "float64")
# Networks are not run in float64: two cases, one of them with awkward extents, show that its kernels are sound.
FLOAT64_CASES = ("kb82", "odd")

# The order of the axes N, C, H, W in memory, slowest first.
LAYOUTS = {"nchw": (0, 1, 2, 3), "nhwc": (0, 2, 3, 1)}


def dtype_of(name: str) -> str:
    """Of the arrays of one of DTYPES."""
    return "float32" if name == "tf32" else name


def selected(cases: list[str], dtypes: list[str]) -> list[tuple[Case, str]]:
    """The cases named, with or without their +bias, in the dtypes that each is timed in."""
    return [
        (case, dtype)
        for case in CASES
        if case.name in cases or case.name.removesuffix("+bias") in cases
        for dtype in dtypes
        if dtype != "float64" or case.name in FLOAT64_CASES
        if dtype != "tf32" or case.operator != "depthwise"
    ]
