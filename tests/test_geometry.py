"""Layer A: every refusal of bad input, and the arithmetic of shapes. Nothing here depends on what is computed."""

from __future__ import annotations

import array
import itertools
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import cuconv
from cuconv.geometry import Conv2dGeometry, depthwise_geometry

# H != W, R != S, C != K, so that no message can name the wrong one and be right by chance.
X = np.zeros((2, 3, 7, 8), np.float32)
W = np.zeros((6, 1, 4, 2), np.float32)
BIAS = np.zeros(6, np.float32)
Y_SHAPE = (2, 6, 4, 7)

_ADDRESSES = itertools.count(step=2**20)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Zeros of any size that take the memory of one."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def cupy_zeros(*shape: int, device: int = 0) -> Any:
    """An array of CuPy's kind on a device that need not exist: to be asked about, not to be read."""
    cupy = pytest.importorskip("cupy")
    address = 2**40 + 2**30 * device + next(_ADDRESSES)
    memory = cupy.cuda.UnownedMemory(address, 2**20, None, device_id=device)
    return cupy.ndarray(shape, np.float32, memptr=cupy.cuda.MemoryPointer(memory, 0))


def refuse(error: type[Exception], words: tuple[Any, ...], **changes: Any) -> str:
    """Assert that the call is refused with exactly this error and all the words, and allocates no array for it."""
    arguments = {"x": X, "w": W, **changes}
    tracemalloc.start()
    try:
        with pytest.raises((TypeError, ValueError, MemoryError, ArithmeticError, AssertionError)) as caught:
            cuconv.depthwise_conv2d(arguments.pop("x"), arguments.pop("w"), arguments.pop("bias", None), **arguments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {message}"
    for word in words:
        assert str(word) in message, f"{word!r} is missing in: {message}"
    assert peak < 2**17, f"{peak} bytes were allocated before the refusal"
    return message


def test_the_good_call_that_the_bad_ones_are_made_from() -> None:
    assert cuconv.depthwise_conv2d(X, W, BIAS).shape == Y_SHAPE


@pytest.mark.parametrize("name", ["x", "w", "bias", "out"])
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ([[1.0]], "list"),
        ((1.0,), "tuple"),
        ("array", "str"),
        (1.5, "float"),
        (np.float32(1), "numpy.float32"),
        (array.array("f", [1.0]), "array.array"),
        (memoryview(b"1234"), "memoryview"),
        (np.ndarray, "type"),
    ],
)
def test_not_an_array(name: str, given: Any, kind: str) -> None:
    refuse(TypeError, (name, kind, "numpy.ndarray", "cupy.ndarray"), **{name: given})


@pytest.mark.parametrize("name", ["x", "w"])
def test_none_for_an_array(name: str) -> None:
    refuse(TypeError, (name, "NoneType", "numpy.ndarray"), **{name: None})


@pytest.mark.parametrize("name", ["x", "w", "bias"])
@pytest.mark.parametrize(
    "dtype",
    [
        np.int8,
        np.int32,
        np.uint64,
        np.bool_,
        np.complex64,
        np.longdouble,
        np.object_,
        np.dtype("S4"),
        np.dtype("M8[s]"),
        np.dtype([("a", np.float32)]),
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
    ],
    ids=lambda dtype: np.dtype(dtype).name,
)
def test_unsupported_dtype(name: str, dtype: Any) -> None:
    good = {"x": X, "w": W, "bias": BIAS}[name]
    message = refuse(TypeError, (name, np.dtype(dtype)), **{name: np.empty(good.shape, dtype)})
    assert all(accepted in message for accepted in ("float16", "bfloat16", "float32", "float64"))


@pytest.mark.parametrize("name", ["x", "w", "bias"])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_foreign_byte_order(name: str, kind: str) -> None:
    dtype = np.dtype(kind)
    native = {key: value.astype(dtype) for key, value in (("x", X), ("w", W), ("bias", BIAS))}
    foreign = native[name].astype(dtype.newbyteorder())
    refuse(TypeError, (name, foreign.dtype, "byte order"), **{**native, name: foreign})


@pytest.mark.parametrize("name", ["w", "bias", "out"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_mixed_dtypes(name: str, dtype: Any) -> None:
    good = {"w": W, "bias": BIAS, "out": np.zeros(Y_SHAPE, np.float32)}[name]
    refuse(TypeError, (name, "float32", np.dtype(dtype).name), **{name: good.astype(dtype)})


@pytest.mark.parametrize("name", ["w", "bias", "out"])
def test_host_and_device_arrays_mixed(name: str) -> None:
    shape = {"w": W.shape, "bias": BIAS.shape, "out": Y_SHAPE}[name]
    refuse(TypeError, ("numpy", "cupy", name), **{name: cupy_zeros(*shape)})
    on_device = {"x": cupy_zeros(*X.shape), "w": cupy_zeros(*W.shape)}
    refuse(TypeError, ("numpy", "cupy", name), **{**on_device, name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize("name", ["w", "bias", "out"])
def test_arrays_on_different_gpus(name: str) -> None:
    arrays = {"x": cupy_zeros(*X.shape), "w": cupy_zeros(*W.shape)}
    shape = {"w": W.shape, "bias": BIAS.shape, "out": Y_SHAPE}[name]
    refuse(ValueError, (f"{name} on 3", "x is on 0"), **{**arrays, name: cupy_zeros(*shape, device=3)})


SHAPES = {
    "x 0-D": ({"x": zeros()}, ("x", 4, 0, ())),
    "x 3-D": ({"x": zeros(3, 7, 8)}, ("x", 4, 3, (3, 7, 8))),
    "x 5-D": ({"x": zeros(1, 2, 3, 7, 8)}, ("x", 4, 5, (1, 2, 3, 7, 8))),
    "w 2-D": ({"w": zeros(4, 2)}, ("w", 4, 2, (4, 2))),
    "w 3-D": ({"w": zeros(6, 4, 2)}, ("w", 4, 3, (6, 4, 2))),
    "w.shape[1] of a full convolution": ({"w": zeros(6, 3, 4, 2)}, ("w.shape[1]", 1, 3)),
    "w.shape[1] is 0": ({"w": zeros(6, 0, 4, 2)}, ("w.shape[1]", 1, 0)),
    "w.shape[0] no multiple of C": ({"w": zeros(7, 1, 4, 2)}, ("w.shape[0]", 3, 7)),
    "w.shape[0] below C": ({"w": zeros(2, 1, 4, 2)}, ("w.shape[0]", 3, 2)),
    "w.shape[0] is 0": ({"w": zeros(0, 1, 4, 2)}, ("w.shape[0]", 3, 0)),
    "bias too long": ({"bias": zeros(7)}, ("bias", (6,), (7,))),
    "bias of C": ({"bias": zeros(3)}, ("bias", (6,), (3,))),
    "bias of 1": ({"bias": zeros(1)}, ("bias", (6,), (1,))),
    "bias 0-D": ({"bias": zeros()}, ("bias", (6,), ())),
    "bias 4-D": ({"bias": zeros(1, 6, 1, 1)}, ("bias", (6,), (1, 6, 1, 1))),
    "C = 0": ({"x": zeros(2, 0, 7, 8)}, ("x", "channel", (2, 0, 7, 8))),
    "H = 0": ({"x": zeros(2, 3, 0, 8)}, ("x", "row", (2, 3, 0, 8))),
    "W = 0": ({"x": zeros(2, 3, 7, 0)}, ("x", "column", (2, 3, 7, 0))),
    "H = 0 with padding": ({"x": zeros(2, 3, 0, 8), "padding": 4}, ("x", "row", (2, 3, 0, 8))),
    "C = 0 and N = 0": ({"x": zeros(0, 0, 7, 8)}, ("x", "channel", (0, 0, 7, 8))),
    "R = 0": ({"w": zeros(6, 1, 0, 2)}, ("w", "kernel row", (6, 1, 0, 2))),
    "S = 0": ({"w": zeros(6, 1, 4, 0)}, ("w", "kernel", "column", (6, 1, 4, 0))),
    "kernel higher than the input": ({"w": zeros(6, 1, 9, 2)}, ("kernel", "height", 9, 7)),
    "kernel wider than the input": ({"w": zeros(6, 1, 4, 9)}, ("kernel", "width", 9, 8)),
    "kernel higher than the padded input": (
        {"w": zeros(6, 1, 13, 2), "padding": ((2, 3), (0, 0))},
        ("kernel", "height", 13, 12, 7, (2, 3)),
    ),
    "dilated kernel wider than the padded input": (
        {"padding": ((0, 0), (0, 4)), "dilation": (1, 12)},
        ("kernel", "width", 13, 12, 8, (0, 4)),
    ),
    "kernel too large for an empty batch": ({"x": zeros(0, 3, 7, 8), "w": zeros(6, 1, 9, 2)}, ("kernel", 9, 7)),
}


@pytest.mark.parametrize("row", SHAPES)
def test_impossible_shapes(row: str) -> None:
    changes, words = SHAPES[row]
    refuse(ValueError, words, **changes)


NUMBERS = {
    "0": (0, ValueError, ("at least 1", 0)),
    "-3": (-3, ValueError, (-3,)),
    "(2, 0)": ((2, 0), ValueError, ("at least 1", 0)),
    "(-5, 2)": ((-5, 2), ValueError, (-5,)),
    "2**31": (2**31, ValueError, (2**31,)),
    "2**40": (2**40, ValueError, (2**40,)),
    "2**70": (2**70, ValueError, (2**70,)),
    "-2**70": (-(2**70), ValueError, (-(2**70),)),
    "(1, 2**31)": ((1, 2**31), ValueError, (2**31,)),
    "(2**70, 1)": ((2**70, 1), ValueError, (2**70,)),
    "1.5": (1.5, TypeError, ("integer", 1.5)),
    "1.0": (1.0, TypeError, ("integer", 1.0)),
    "(1, 2.5)": ((1, 2.5), TypeError, ("integer", 2.5)),
    "nan": (float("nan"), TypeError, ("integer", "nan")),
    "'2'": ("2", TypeError, ("integer", "'2'")),
    "None": (None, TypeError, ("integer", None)),
    "True": (True, TypeError, ("integer", True)),
    "(1, True)": ((1, True), TypeError, ("integer", True)),
    "numpy.True_": (np.True_, TypeError, ("integer", "True")),
    "numpy.float32(2)": (np.float32(2), TypeError, ("integer", "2")),
    "a set": ({1, 2}, TypeError, ("integer", {1, 2})),
    "an array of two": (np.array([1, 2]), TypeError, ("integer", "[1, 2]")),
    "()": ((), ValueError, ("pair", 0)),
    "[]": ([], ValueError, ("pair", 0)),
    "(2,)": ((2,), ValueError, ("pair", 1, (2,))),
    "(1, 2, 3)": ((1, 2, 3), ValueError, ("pair", 3, (1, 2, 3))),
    "[1, 2, 3]": ([1, 2, 3], ValueError, ("pair", 3, [1, 2, 3])),
}
# Padding may be 0, and a str is a word there: see test_padding_words.
NOT_FOR_PADDING = {"0", "(2, 0)", "'2'"}


@pytest.mark.parametrize("row", NUMBERS)
@pytest.mark.parametrize("name", ["stride", "dilation"])
def test_impossible_stride_and_dilation(name: str, row: str) -> None:
    given, error, words = NUMBERS[row]
    refuse(error, (name, *words), **{name: given})


@pytest.mark.parametrize("row", [row for row in NUMBERS if row not in NOT_FOR_PADDING])
def test_impossible_padding_numbers(row: str) -> None:
    given, error, words = NUMBERS[row]
    refuse(error, ("padding", *words), padding=given)


@pytest.mark.parametrize("word", ["foo", "SAME", "Valid", "", "2", "same_upper"])
def test_padding_words(word: str) -> None:
    refuse(ValueError, ("padding", '"same"', '"valid"', repr(word)), padding=word)


@pytest.mark.parametrize("stride", [2, (1, 2), (3, 1)])
def test_same_needs_stride_1(stride: Any) -> None:
    pair = stride if isinstance(stride, tuple) else (stride, stride)
    refuse(ValueError, ("padding", '"same"', "stride", pair), padding="same", stride=stride)


@pytest.mark.parametrize(
    ("padding", "error", "words"),
    [
        (((1, -2), (0, 0)), ValueError, (-2,)),
        (((0, 0), (-7, 9)), ValueError, (-7,)),
        (((0, 1.5), (0, 0)), TypeError, (1.5,)),
        (((0, 0), (0, True)), TypeError, (True,)),
        (((0, "same"), (0, 0)), TypeError, ("same",)),
        (((1, 2, 3), (0, 0)), ValueError, (3, (1, 2, 3))),
        (((1,), (0, 0)), ValueError, (1, (1,))),
        (((1, 2), 3), TypeError, ((1, 2),)),
        ((("same", "same"), (0, 0)), TypeError, ("same",)),
        (("same", "valid"), TypeError, ("same",)),
        (((1, 1), (2, 2), (3, 3)), ValueError, (3,)),
        ((1, 2, 3, 4), ValueError, (4, (1, 2, 3, 4))),
        (((0, 2**31), (0, 0)), ValueError, (2**31,)),
        (((0, 0), (2**70, 0)), ValueError, (2**70,)),
    ],
    ids=repr,
)
def test_impossible_padding_pairs(padding: Any, error: type[Exception], words: tuple[Any, ...]) -> None:
    refuse(error, ("padding", *words), padding=padding)


HUGE = {
    "padded height from two paddings": ({"padding": ((2**30, 2**30), (0, 0))}, ("height", 2**31 + 7)),
    "padded width from both": ({"padding": ((0, 0), (2**31 - 1, 2**31 - 1))}, ("width", 2**32 + 6)),
    "H = 2**31": ({"x": zeros(1, 3, 2**31, 2)}, ("height", 2**31)),
    "W = 2**40": ({"x": zeros(1, 3, 4, 2**40)}, ("width", 2**40)),
    "largest dilation": ({"dilation": (2**31 - 1, 1)}, ("kernel", "height", 3 * (2**31 - 1) + 1)),
    "R = 2**40": ({"w": zeros(3, 1, 2**40, 1)}, ("kernel", "height", 2**40)),
    "2**40 elements from one": ({"x": zeros(2**20, 3, 2**20, 4)}, ("x", 3 * 2**42)),
    "N = 2**57": ({"x": zeros(2**57, 1, 4, 2), "w": zeros(1, 1, 1, 1)}, ("x", 2**60)),
    "a result of 2**40": ({"x": zeros(1, 1, 1, 2), "w": zeros(2**20, 1, 1, 1), "padding": (2**19, 0)}, (2**20,)),
    "a padded result of 2**60": ({"padding": 2**29}, ("the result",)),
}


@pytest.mark.parametrize("row", HUGE)
def test_huge_values(row: str) -> None:
    changes, words = HUGE[row]
    refuse(ValueError, words, **changes)


def test_largest_numbers_that_have_a_convolution() -> None:
    most = 2**31 - 1
    geometry = depthwise_geometry((1, 1, most, 3), (1, 1, 2, 1), stride=most, dilation=(most - 1, most))
    assert (geometry.P, geometry.Q) == (1, 1)
    geometry = depthwise_geometry((1, 1, 1, 1), (1, 1, 1, 1), padding=((most - 1, 0), (0, 0)))
    assert (geometry.P, geometry.Q) == (most, 1)


def test_more_than_2_to_the_31_elements_have_a_geometry() -> None:
    geometry = depthwise_geometry((64, 1024, 300, 300), (2048, 1, 3, 3))
    assert geometry.x_size == 64 * 1024 * 300 * 300 > 2**31
    assert geometry.y_size == 64 * 2048 * 298 * 298 > 2**31


OUT = {
    "too few rows": (np.empty((2, 6, 3, 7), np.float32), ValueError, (Y_SHAPE, (2, 6, 3, 7))),
    "the shape of x": (np.empty(X.shape, np.float32), ValueError, (Y_SHAPE, X.shape)),
    "fewer dimensions": (np.empty(Y_SHAPE[1:], np.float32), ValueError, (Y_SHAPE, Y_SHAPE[1:])),
    "stride 0": (as_strided(np.empty(7, np.float32), Y_SHAPE, (0, 0, 0, 4)), ValueError, ("apart", (0, 0, 0, 4))),
}


@pytest.mark.parametrize("row", OUT)
def test_impossible_out(row: str) -> None:
    out, error, words = OUT[row]
    refuse(error, ("out", *words), out=out)


def output_extent(extent: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> int:
    """How many placements of the kernel there are, counted."""
    taps = [r * dilation for r in range(kernel)]
    cells = range(-padding[0], extent + padding[1])
    return sum(1 for first in cells[::stride] if all(first + tap in cells for tap in taps))


AXIS = st.tuples(
    st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.tuples(*[st.integers(0, 4)] * 2), st.integers(1, 4)
)


@settings(deadline=None)
@given(AXIS, AXIS, st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
def test_output_size_is_the_number_of_placements(rows: Any, columns: Any, N: int, C: int, M: int) -> None:
    (H, R, _, _, _), (W, S, _, _, _) = rows, columns
    stride, padding, dilation = zip(rows[2:], columns[2:], strict=True)
    P, Q = output_extent(*rows), output_extent(*columns)
    x, w = zeros(N, C, H, W), zeros(C * M, 1, R, S)
    if P == 0 or Q == 0:
        with pytest.raises(ValueError, match="kernel must fit"):
            depthwise_geometry(x.shape, w.shape, stride=stride, padding=padding, dilation=dilation)
        return
    geometry = depthwise_geometry(x.shape, w.shape, stride=stride, padding=padding, dilation=dilation)
    assert geometry == Conv2dGeometry(N, C, H, W, C * M, R, S, P, Q, stride, padding, dilation)
    assert (geometry.x_shape, geometry.w_shape, geometry.y_shape) == (x.shape, w.shape, (N, C * M, P, Q))
    assert (geometry.multiplier, geometry.x_size, geometry.y_size) == (M, x.size, N * C * M * P * Q)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        (0, ((0, 0), (0, 0))),
        (2, ((2, 2), (2, 2))),
        ((1, 2), ((1, 1), (2, 2))),
        ([1, 2], ((1, 1), (2, 2))),
        (((1, 2), (3, 4)), ((1, 2), (3, 4))),
        ([[1, 2], [3, 4]], ((1, 2), (3, 4))),
        ([(1, 2), [3, 4]], ((1, 2), (3, 4))),
        (np.int64(2), ((2, 2), (2, 2))),
        ((np.uint8(1), np.int16(2)), ((1, 1), (2, 2))),
        ((np.array(1), 2), ((1, 1), (2, 2))),
        ("valid", ((0, 0), (0, 0))),
        ("same", ((3, 3), (0, 1))),  # 4 rows reach over 7 with dilation 2; the odd column is last
    ],
    ids=repr,
)
def test_forms_of_padding(padding: Any, expected: Any) -> None:
    geometry = depthwise_geometry(X.shape, W.shape, padding=padding, dilation=(2, 1))
    assert geometry.padding == expected
    assert all(type(side) is int for pair in geometry.padding for side in pair)


def test_valid_takes_any_stride() -> None:
    assert depthwise_geometry(X.shape, W.shape, padding="valid", stride=(2, 3)).padding == ((0, 0), (0, 0))


@settings(deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 8)] * 2), st.tuples(*[st.integers(1, 5)] * 2))
def test_same_keeps_the_size(image: Any, kernel: Any, dilation: Any) -> None:
    geometry = depthwise_geometry((1, 1, *image), (1, 1, *kernel), padding="same", dilation=dilation)
    assert (geometry.P, geometry.Q) == image
    for before, after in geometry.padding:
        assert after - before in (0, 1)


@pytest.mark.parametrize("form", [2, (2, 2), [2, 2], np.int32(2), (np.uint8(2), 2), np.array(2)], ids=repr)
@pytest.mark.parametrize("name", ["stride", "dilation"])
def test_forms_of_a_pair(name: str, form: Any) -> None:
    geometry = depthwise_geometry(X.shape, W.shape, **{name: form})
    assert geometry == depthwise_geometry(X.shape, W.shape, **{name: (2, 2)})
    assert all(type(number) is int for number in getattr(geometry, name))


@pytest.mark.parametrize("wrong", [True, 1.0, (True, 1), (1, 1.0)], ids=repr)
@pytest.mark.parametrize("name", ["stride", "dilation", "padding"])
def test_what_equals_a_number_is_refused_after_the_number_was_taken(name: str, wrong: Any) -> None:
    """Geometries are found again by their arguments."""
    for right in (1, (1, 1)):
        depthwise_geometry(X.shape, W.shape, **{name: right})
    with pytest.raises(TypeError, match=name):
        depthwise_geometry(X.shape, W.shape, **{name: wrong})


def test_pairs_are_rows_then_columns() -> None:
    geometry = depthwise_geometry(X.shape, W.shape, stride=(2, 3), dilation=(2, 5), padding=(1, 0))
    assert (geometry.P, geometry.Q) == ((7 + 2 - 7) // 2 + 1, (8 - 6) // 3 + 1)
    assert (geometry.stride, geometry.dilation) == ((2, 3), (2, 5))


def test_geometry_is_a_key() -> None:
    first, same = (depthwise_geometry(X.shape, W.shape, padding=form) for form in (1, [[1, 1], [1, 1]]))
    other = depthwise_geometry(X.shape, W.shape, padding=((1, 1), (1, 0)))
    assert hash(first) == hash(same)
    assert {first: "first", other: "other"}[same] == "first"
    with pytest.raises(AttributeError):
        first.H = 9  # type: ignore[misc]
