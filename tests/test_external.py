"""Layer B: numbers that nobody in this project wrote. Skipped, with the reason, where they are not at hand."""

from __future__ import annotations

import csv
import json

import numpy as np
import oracle
import pytest

import cuconv
from cuconv.geometry import depthwise_geometry
from cuconv.plan import MAX_GRID, depthwise_forward

TARGETS = {f"sm_{number}": cuconv.plan.TARGETS[number] for number in (90, 75)}


def zeros(*shape):
    """Zeros of any size that take the memory of one."""
    return np.broadcast_to(np.float32(0), shape)


def tensor(literal):
    return np.array(literal["data"], np.float32).reshape(literal["shape"])


ACTIVATIONS = {
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.clip(y, 0, 6),
    "relu_n1_to_1": lambda y: np.clip(y, -1, 1),
    "sigmoid": lambda y: 1 / (1 + np.exp(-y)),
}


# With the number of cases in each, so that none goes missing in silence.
@pytest.mark.parametrize(
    ("name", "count"), [("tfjs", 31), ("tflite", 10), ("tf", 1), ("ort", 9), ("onnx", 10), ("wpt", 2)]
)
def test_literal_outputs(external_data, name, count):
    cases = json.loads((external_data / "literal" / f"{name}.json").read_text())["cases"]
    cases = [case for case in cases if case["op"] == "depthwise" and "y" in case]
    assert len(cases) == count
    for case in cases:
        top, bottom, left, right = case["padding"]
        y = cuconv.depthwise_conv2d(
            tensor(case["x"]),
            tensor(case["w"]),
            tensor(case["b"]) if "b" in case else None,
            stride=case["stride"],
            padding=((top, bottom), (left, right)),
            dilation=case["dilation"],
        )
        if "activation" in case:
            y = ACTIVATIONS[case["activation"]](y)
        expected = tensor(case["y"])
        assert y.shape == expected.shape, case["id"]
        np.testing.assert_allclose(y, expected, rtol=0, atol=case["atol"], err_msg=case["id"])


def shape_rows(folder):
    """The rows of depthwise_shapes.csv as dicts of integers, but for those with negative padding, which is cropping."""
    with open(folder / "depthwise_shapes.csv", newline="") as file:
        rows = [{key: int(value) for key, value in row.items() if key != "source"} for row in csv.DictReader(file)]
    rows = [row for row in rows if min(row["pt"], row["pb"], row["pl"], row["pr"]) >= 0]
    assert len(rows) == 7284
    return rows


def arguments(row):
    """x's shape, w's shape and the keyword arguments of a row."""
    return (
        (row["n"], row["c"], row["h"], row["w"]),
        (row["c"] * row["mult"], 1, row["kh"], row["kw"]),
        {
            "stride": (row["sh"], row["sw"]),
            "padding": ((row["pt"], row["pb"]), (row["pl"], row["pr"])),
            "dilation": (row["dh"], row["dw"]),
        },
    )


def test_output_sizes_of_others(external_data):
    for row in shape_rows(external_data):
        x_shape, w_shape, numbers = arguments(row)
        geometry = depthwise_geometry(x_shape, w_shape, **numbers)
        assert geometry.y_shape == (row["n"], w_shape[0], row["oh"], row["ow"]), row


def test_results_in_the_shapes_of_others(external_data):
    # Every 20th of those of at most 200,000 multiplications: 323 of 6,446 geometries, in about a second.
    rows = [
        row
        for row in shape_rows(external_data)
        if row["n"] * row["c"] * row["mult"] * row["oh"] * row["ow"] * row["kh"] * row["kw"] <= 200_000
    ][::20]
    assert len(rows) > 300
    rng = np.random.default_rng(20)
    for row in rows:
        x_shape, w_shape, numbers = arguments(row)
        x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, "float32")
        y = cuconv.depthwise_conv2d(x, w, bias, **numbers)
        exact = oracle.convolve(x, w, bias, **numbers)
        # Summed in float64 and rounded once to float32; sums of up to a few hundred terms around 1.
        np.testing.assert_allclose(y, exact, rtol=2.0**-24, atol=1e-12, err_msg=str(row))


def timm_padding(row):
    """((top, bottom), (left, right)) of a row of timm_depthwise_layers.csv."""
    if row["pad"] == "same_dynamic":
        pairs = []
        for extent, kernel, stride, dilation in (("h", "kh", "sh", "dh"), ("w", "kw", "sw", "dw")):
            outputs = -(-int(row[extent]) // int(row[stride]))
            needed = (outputs - 1) * int(row[stride]) + int(row[dilation]) * (int(row[kernel]) - 1) + 1
            total = max(needed - int(row[extent]), 0)
            pairs.append((total // 2, total - total // 2))
        return tuple(pairs)
    rows, columns = map(int, row["pad"].split("x"))
    return ((rows, rows), (columns, columns))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_layer_of_timm_has_a_plan(external_data, target, dtype):
    with open(external_data / "timm_depthwise_layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2328
    for row in rows:
        C, K = int(row["c"]), int(row["c"]) * int(row["mult"])
        geometry = depthwise_geometry(
            (32, C, int(row["h"]), int(row["w"])),
            (K, 1, int(row["kh"]), int(row["kw"])),
            stride=(int(row["sh"]), int(row["sw"])),
            padding=timm_padding(row),
            dilation=(int(row["dh"]), int(row["dw"])),
        )
        if row["pad"] == "same_dynamic":
            assert geometry.P == -(-geometry.H // geometry.stride[0]), row
        plan = depthwise_forward(geometry, dtype, TARGETS[target])
        assert all(1 <= extent <= limit for extent, limit in zip(plan.grid, MAX_GRID, strict=True)), row
        assert 1 <= plan.block <= 1024, row
        assert 0 <= plan.shared_bytes <= TARGETS[target].shared_per_block, row
        large = geometry.R * geometry.S > 64 and geometry.stride == geometry.dilation == (1, 1)
        on_turing = "depthwise_tiles" if large else "depthwise_forward_direct"
        assert target == "sm_90" or plan.source == on_turing, row
