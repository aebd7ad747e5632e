"""Layer B: the reference, through the public function on NumPy arrays, against PyTorch in float64 and by hand."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

import cuconv

# Relative spacing is 2**-bits, and absolute spacing never below the smallest subnormal.
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}


def assert_rounded_once(y, x, w, bias=None, **numbers):
    """y is the float64 convolution, rounded once."""
    magnitude = oracle.convolve(np.abs(x), np.abs(w), None if bias is None else np.abs(bias), **numbers)
    assert_rounded_once_from(y, oracle.convolve(x, w, bias, **numbers), magnitude, w.shape[2] * w.shape[3])


def assert_rounded_once_from(y, exact, magnitude, terms):
    """|y - exact| <= u*|exact|, and what two float64 sums of so many terms can differ by.

    Much tighter than oracle.assert_within_bound, which allows for sums in float32.
    """
    name = y.dtype.name
    assert y.shape == exact.shape
    sums = 2 * (terms + 1) * 2.0**-53 * magnitude
    error = np.abs(y.astype(np.float64) - exact)
    bound = np.maximum(UNIT_ROUNDOFF[name] * np.abs(exact), SMALLEST[name] / 2) + 1.01 * sums
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"
    assert np.count_nonzero(y) * 2 >= np.count_nonzero(magnitude), "too many zeros to mean anything"


# Not the product of all choices, which would be 10,000 cases of the same loops: each line has its rows and columns
# differ in everything, and adds one thing that no other line has.
#                    x                w             stride  padding           dilation
GEOMETRIES = {
    "plain": ((2, 3, 9, 7), (3, 1, 3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "everything": ((2, 3, 23, 19), (6, 1, 5, 3), (3, 2), ((4, 1), (0, 3)), (2, 3)),
    "stride beyond kernel": ((1, 2, 17, 22), (2, 1, 2, 3), (5, 4), ((1, 0), (2, 3)), (1, 1)),
    "stride beyond image": ((2, 2, 5, 6), (2, 1, 3, 2), (9, 7), ((0, 2), (1, 0)), (1, 2)),
    "dilation beyond image": ((1, 3, 4, 6), (3, 1, 3, 2), (1, 2), ((9, 8), (3, 7)), (7, 8)),
    "padding beyond kernel": ((1, 2, 3, 4), (4, 1, 2, 3), (2, 1), ((7, 5), (4, 6)), (1, 2)),
    "multiplier 3": ((2, 5, 8, 11), (15, 1, 3, 2), (1, 2), ((1, 0), (0, 1)), (1, 1)),
    "multiplier of one channel": ((3, 1, 8, 6), (4, 1, 2, 3), (2, 1), ((0, 1), (2, 0)), (1, 1)),
    "one channel": ((2, 1, 12, 10), (1, 1, 4, 3), (1, 1), ((2, 1), (1, 1)), (2, 1)),
    "24 channels, stride 2": ((1, 24, 9, 13), (24, 1, 3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    "kernel 1 x 1": ((2, 3, 5, 8), (6, 1, 1, 1), (2, 3), ((1, 0), (0, 2)), (4, 5)),
    "kernel 3 x 1": ((2, 4, 9, 5), (4, 1, 3, 1), (1, 1), ((1, 1), (0, 0)), (1, 1)),
    "kernel 1 x 7": ((2, 4, 5, 9), (4, 1, 1, 7), (1, 2), ((0, 0), (3, 3)), (1, 1)),
    "kernel 31 x 31": ((1, 2, 20, 33), (2, 1, 31, 31), (1, 2), ((15, 14), (15, 16)), (1, 1)),
    "kernel 51 x 5": ((1, 2, 27, 8), (2, 1, 51, 5), (1, 1), ((25, 25), (2, 2)), (1, 1)),
    "kernel of the image": ((2, 3, 6, 4), (3, 1, 6, 4), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "one pixel": ((2, 3, 1, 1), (3, 1, 3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1)),
    "one row": ((1, 3, 1, 40), (3, 1, 1, 5), (1, 3), ((0, 0), (4, 0)), (1, 2)),
    "one column": ((1, 3, 40, 1), (3, 1, 5, 1), (3, 1), ((0, 4), (0, 0)), (2, 1)),
    "empty batch": ((0, 3, 9, 7), (6, 1, 3, 2), (1, 2), ((1, 1), (0, 0)), (1, 1)),
    "blocks of 3 and 2 channels": ((1, 5, 181, 230), (5, 1, 3, 2), (1, 1), ((1, 0), (0, 1)), (1, 1)),
    "blocks of 18 images and a rest": ((70, 40, 9, 8), (80, 1, 2, 3), (1, 1), ((0, 1), (1, 1)), (1, 1)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_against_torch(case, dtype):
    x_shape, w_shape, stride, padding, dilation = GEOMETRIES[case]
    x, w, bias = oracle.random_arrays(np.random.default_rng(7), x_shape, w_shape, dtype)
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    for given in (bias, None):
        y = cuconv.depthwise_conv2d(x, w, given, **numbers)
        assert type(y) is np.ndarray
        assert y.dtype == x.dtype
        assert_rounded_once(y, x, w, given, **numbers)


@pytest.mark.parametrize("scale", [2.0**-10, 64.0])
def test_against_torch_scaled(scale):
    x_shape, w_shape, stride, padding, dilation = GEOMETRIES["everything"]
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    for dtype in oracle.DTYPES:
        x, w, bias = oracle.random_arrays(np.random.default_rng(8), x_shape, w_shape, dtype)
        x = (x * x.dtype.type(scale)).astype(x.dtype)
        assert_rounded_once(cuconv.depthwise_conv2d(x, w, bias, **numbers), x, w, bias, **numbers)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # a hint about speed
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_same_is_that_of_torch(kernel, dilation):
    x, w, _ = oracle.random_arrays(np.random.default_rng(9), (2, 3, 9, 11), (6, 1, *kernel), "float64")
    arrays = (torch.from_numpy(x), torch.from_numpy(w))
    expected = torch.nn.functional.conv2d(*arrays, padding="same", dilation=dilation, groups=3).numpy()
    y = cuconv.depthwise_conv2d(x, w, padding="same", dilation=dilation)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", ["everything", "multiplier 3", "kernel 1 x 7", "24 channels, stride 2"])
def test_exact_on_small_integers(case, dtype):
    x_shape, w_shape, stride, padding, dilation = GEOMETRIES[case]
    rng = np.random.default_rng(10)
    # Sums stay below 15 * 16 + 9 = 249, which every dtype holds exactly.
    x, w = rng.integers(-4, 5, x_shape), rng.integers(-4, 5, w_shape)
    bias = rng.integers(-9, 10, w_shape[0])
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    y = cuconv.depthwise_conv2d(*(array.astype(oracle.DTYPES[dtype]) for array in (x, w, bias)), **numbers)
    expected = oracle.convolve(x, w, bias, **numbers)
    assert np.count_nonzero(expected) > expected.size * 0.8
    np.testing.assert_array_equal(y.astype(np.float64), expected)


def test_dilation_does_not_stretch_the_padding():
    # Rows 1 ... 5, weights 1, 10, 100, padding 2 above and below, dilation 2. Output row 0 meets rows -2, 0 and 2:
    # 10*1 + 100*3 = 310. With the input row taken as p + (r - padding)*dilation it would meet -4, -2 and 0: 100.
    rows = np.array([1, 2, 3, 4, 5], np.float32)
    w = np.array([1, 10, 100], np.float32)
    expected = [310, 420, 531, 42, 53]
    column = cuconv.depthwise_conv2d(
        rows.reshape(1, 1, 5, 1), w.reshape(1, 1, 3, 1), padding=((2, 2), (0, 0)), dilation=(2, 1)
    )
    row = cuconv.depthwise_conv2d(
        rows.reshape(1, 1, 1, 5), w.reshape(1, 1, 1, 3), padding=((0, 0), (2, 2)), dilation=(1, 2)
    )
    assert column.ravel().tolist() == expected
    assert row.ravel().tolist() == expected


def test_output_channels_of_a_multiplier():
    x = np.array([1, 10, 100], np.float32).reshape(1, 3, 1, 1)
    w = np.arange(1, 7, dtype=np.float32).reshape(6, 1, 1, 1)
    assert cuconv.depthwise_conv2d(x, w).ravel().tolist() == [1, 2, 30, 40, 500, 600]


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_padding_is_a_zero_that_takes_part(dtype):
    # The first and the last tap of a row are infinite: inf * 0 is NaN where they meet the padding.
    x = np.ones((1, 1, 3, 5), oracle.DTYPES[dtype])
    w = np.array([np.inf, 1, np.inf], x.dtype).reshape(1, 1, 1, 3)
    y = cuconv.depthwise_conv2d(x, w, padding=(0, 1)).astype(np.float64)
    assert np.isnan(y[..., [0, -1]]).all()
    assert (y[..., 1:-1] == np.inf).all()
    y = cuconv.depthwise_conv2d(x, w.reshape(1, 1, 3, 1), padding=(1, 0)).astype(np.float64)
    assert np.isnan(y[:, :, [0, -1]]).all()
    assert (y[:, :, 1] == np.inf).all()


# Rows: 11, kernel 3, stride 2, dilation 2, 1 above: row 9 is met by output 3 only, row 10 by none.
POISON = {"stride": (2, 4), "padding": ((1, 0), (0, 2)), "dilation": (2, 1)}


def met_by(pixel, outputs, kernel, axis):
    """The output rows (axis 0) or columns (axis 1) that read the pixel's row or column, from the definition."""
    stride, before, dilation = POISON["stride"][axis], POISON["padding"][axis][0], POISON["dilation"][axis]
    return [o for o in range(outputs) if any(o * stride - before + k * dilation == pixel for k in range(kernel))]


def test_nan_poisons_its_receptive_field_and_nothing_else():
    x, w, _ = oracle.random_arrays(np.random.default_rng(11), (2, 3, 11, 13), (6, 1, 3, 2), "float32")
    clean = cuconv.depthwise_conv2d(x, w, **POISON)
    assert not np.isnan(clean).any()
    unread = 0
    for row in range(11):
        for column in range(13):
            poisoned = x.copy()
            poisoned[1, 2, row, column] = np.nan
            y = cuconv.depthwise_conv2d(poisoned, w, **POISON)
            expected = np.zeros(y.shape, bool)
            met = np.ix_(met_by(row, y.shape[2], 3, 0), met_by(column, y.shape[3], 2, 1))
            expected[1, 4:6][:, *met] = True
            np.testing.assert_array_equal(np.isnan(y), expected)
            np.testing.assert_array_equal(y[~expected], clean[~expected])
            unread += not expected.any()
    assert unread > 13, "some pixels must be read by no output"


def test_nan_in_one_weight_poisons_one_output_channel():
    x, w, bias = oracle.random_arrays(np.random.default_rng(12), (2, 3, 7, 5), (6, 1, 3, 2), "float32")
    w[4, 0, 2, 1] = np.nan
    y = cuconv.depthwise_conv2d(x, w, bias, padding=2)
    assert np.isnan(y[:, 4]).all()
    assert not np.isnan(np.delete(y, 4, axis=1)).any()


def test_overflow_is_infinity_without_a_warning():
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        largest = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.7e308}[dtype]
        x = np.array([largest, -largest], oracle.DTYPES[dtype]).reshape(1, 2, 1, 1)
        y = cuconv.depthwise_conv2d(x, np.full((2, 1, 1, 1), 4, x.dtype))
        assert y.ravel().astype(np.float64).tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7), ("float32", 23)])
def test_rounded_once(dtype, bits, sign):
    # 1 + half a unit in the last place is a tie, which goes to the even 1; anything more goes up. A sum that passed
    # through float32 on its way to 16 bits would lose the 2**-40, and a float32 accumulator with it.
    def convolve(*terms):
        x, w = (np.array(column, float).astype(oracle.DTYPES[dtype]) for column in zip(*terms, strict=True))
        y = cuconv.depthwise_conv2d(sign * x.reshape(1, 1, 1, -1), w.reshape(1, 1, 1, -1))
        return sign * float(y[0, 0, 0, 0])

    half, unit, little = (2.0 ** -(bits + 1), 1), 2.0**-bits, (2.0**-20, 2.0**-20)
    assert convolve((1, 1), half) == 1
    assert convolve((1, 1), half, little) == 1 + unit
    assert convolve((1 + unit, 1), half) == 1 + 2 * unit
    assert convolve((1 + unit, 1), half, (-little[0], little[1])) == 1 + unit


def test_bfloat16_underflow_and_special_values():
    x = np.array([2.0**-133, 2.0**-133, 2.0**-133, np.inf, np.nan, -0.0], oracle.BFLOAT16).reshape(1, 6, 1, 1)
    w = np.array([1, 0.5, 0.75, -1, 1, 1], oracle.BFLOAT16).reshape(6, 1, 1, 1)
    y = cuconv.depthwise_conv2d(x, w).ravel().astype(np.float64)
    np.testing.assert_array_equal(y, [2.0**-133, 0, 2.0**-133, -np.inf, np.nan, 0])


# A view, made of a contiguous array of any values, for every way in which strides can be unlike a contiguous array's.
VIEWS = {
    "every second column": lambda a: np.repeat(a, 2, -1)[..., ::2],
    "columns reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "everything reversed": lambda a: np.flip(np.flip(a).copy()),
    "channels last": lambda a: np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1),
    "rows and columns swapped": lambda a: a.swapaxes(-1, -2).copy().swapaxes(-1, -2),
    "Fortran order": np.asfortranarray,
    "an offset inside a larger array": lambda a: np.pad(a, [(1, 2)] * a.ndim)[(slice(1, -2),) * a.ndim],
    "every third image, backwards": lambda a: np.repeat(a, 3, 0)[::-3][::-1],
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, dtype):
    x, w, bias = oracle.random_arrays(np.random.default_rng(13), (3, 4, 7, 6), (8, 1, 3, 2), dtype)
    numbers = {"stride": (2, 1), "padding": ((1, 0), (0, 2))}
    expected = cuconv.depthwise_conv2d(x, w, bias, **numbers)
    views = [VIEWS[view](array) for array in (x, w)] + [np.repeat(bias, 2)[::-2][::-1]]
    for array, same in zip((x, w), views, strict=False):
        np.testing.assert_array_equal(array, same)
        assert array.strides != same.strides
    np.testing.assert_array_equal(cuconv.depthwise_conv2d(*views, **numbers), expected)


def test_views_that_repeat_elements():
    image = np.random.default_rng(14).standard_normal((1, 1, 7, 6)).astype(np.float32)
    w = np.random.default_rng(15).standard_normal((1, 1, 3, 1)).astype(np.float32)
    x, w, bias = np.broadcast_to(image, (2, 3, 7, 6)), np.broadcast_to(w, (6, 1, 3, 2)), np.broadcast_to(w[0, 0, 0], 6)
    y = cuconv.depthwise_conv2d(x, w, bias, padding=1)
    np.testing.assert_array_equal(y, cuconv.depthwise_conv2d(x.copy(), w.copy(), bias.copy(), padding=1))
    windows = as_strided(image, (5, 1, 3, 6), (24, 0, 24, 4))
    np.testing.assert_array_equal(
        cuconv.depthwise_conv2d(windows, w[:1]), cuconv.depthwise_conv2d(windows.copy(), w[:1].copy())
    )


def test_data_that_is_not_aligned():
    x, w, bias = oracle.random_arrays(np.random.default_rng(16), (2, 3, 7, 6), (6, 1, 3, 2), "float32")
    expected = cuconv.depthwise_conv2d(x, w, bias)

    def shifted(array):
        memory = np.zeros(array.nbytes + 1, np.uint8)
        memory[1:] = np.frombuffer(array.tobytes(), np.uint8)
        return memory[1:].view(array.dtype).reshape(array.shape)

    np.testing.assert_array_equal(cuconv.depthwise_conv2d(shifted(x), shifted(w), shifted(bias)), expected)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_inputs_are_never_written(dtype):
    arrays = oracle.random_arrays(np.random.default_rng(17), (2, 3, 9, 7), (6, 1, 3, 2), dtype)
    before = [array.tobytes() for array in arrays]
    first = cuconv.depthwise_conv2d(*arrays, padding=1)
    assert [array.tobytes() for array in arrays] == before
    for array in arrays:
        array.setflags(write=False)
    assert cuconv.depthwise_conv2d(*arrays, padding=1).tobytes() == first.tobytes()


# out=. Guarded memory around every out is poison, and must stay so.
POISON_BYTE = 0xFF
OUT_SHAPE = (2, 6, 7, 6)

# (the memory's shape, the view of it with shape OUT_SHAPE)
OUTS = {
    "contiguous": ((2, 6, 7, 6), lambda a: a),
    "inside a larger array": ((4, 9, 12, 9), lambda a: a[1:3, 2:8, 3:10, 1:7]),
    "every second column": ((2, 6, 7, 12), lambda a: a[..., ::2]),
    "every third row, backwards": ((2, 6, 21, 6), lambda a: a[:, :, ::-3]),
    "channels last": ((2, 7, 6, 6), lambda a: np.moveaxis(a, -1, 1)),
    "channels last, padded": ((2, 7, 6, 8), lambda a: np.moveaxis(a[..., :6], -1, 1)),
    "all axes swapped": ((6, 7, 6, 2), np.transpose),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("kind", OUTS)
def test_out(kind, dtype):
    memory_shape, view = OUTS[kind]
    x, w, bias = oracle.random_arrays(np.random.default_rng(18), (2, 3, 9, 7), (6, 1, 3, 2), dtype)
    memory = np.full(np.prod(memory_shape) * x.itemsize, POISON_BYTE, np.uint8)
    out = view(memory.view(x.dtype).reshape(memory_shape))
    y = cuconv.depthwise_conv2d(x, w, bias, out=out)
    assert y is out
    assert out.shape == OUT_SHAPE
    np.testing.assert_array_equal(out, cuconv.depthwise_conv2d(x, w, bias))
    out.view(f"u{x.itemsize}")[...] = 0
    assert (memory == POISON_BYTE).sum() == memory.size - out.nbytes, "something beside out was written"


def test_out_of_an_empty_batch():
    out = np.empty((0, 3, 7, 6), np.float32)
    x, w = np.empty((0, 3, 9, 7), np.float32), np.ones((3, 1, 3, 2), np.float32)
    assert cuconv.depthwise_conv2d(x, w, out=out) is out


@pytest.mark.parametrize("name", ["x", "w", "bias"])
def test_out_over_an_input(name):
    # All three are views of one memory; so is out, over the last element of the one and the first of its own.
    memory = np.ones(4096, np.float32)
    parts = {
        "x": memory[:192].reshape(2, 3, 4, 8),
        "w": memory[1000:1006].reshape(6, 1, 1, 1),
        "bias": memory[3000:3006],
    }
    first = {"x": 191, "w": 1005, "bias": 3005}[name]
    before = memory.copy()
    with pytest.raises(ValueError, match=f"out must not overlap another array, and shares memory with {name}"):
        cuconv.depthwise_conv2d(**parts, out=memory[first : first + 384].reshape(2, 6, 4, 8))
    np.testing.assert_array_equal(memory, before)
    beside = memory[first + 1 : first + 385].reshape(2, 6, 4, 8)
    assert (cuconv.depthwise_conv2d(**parts, out=beside) == 2).all()


def test_out_over_the_input_itself():
    x = np.ones((1, 2, 3, 4), np.float32)
    with pytest.raises(ValueError, match="shares memory with x"):
        cuconv.depthwise_conv2d(x, np.ones((2, 1, 1, 1), np.float32), out=x)


def test_out_between_the_elements_of_an_input():
    memory = np.random.default_rng(19).standard_normal((2, 3, 5, 8)).astype(np.float32)
    x, out = memory[..., ::2], memory[..., 1::2]
    w = np.full((3, 1, 1, 1), 3, np.float32)
    before = x.copy()
    assert cuconv.depthwise_conv2d(x, w, out=out) is out
    np.testing.assert_array_equal(out, before * 3)
    np.testing.assert_array_equal(x, before)
    with pytest.raises(ValueError, match="shares memory with x"):
        cuconv.depthwise_conv2d(x, w, out=memory[..., :4])


@pytest.mark.parametrize(
    "strides",
    [(96, 32, 8, 0), (0, 96, 24, 4), (96, 32, 4, 4), (96, 16, 12, 4), (96, 32, 12, 2), (96, -32, -12, 1)],
    ids=repr,
)
def test_out_over_itself(strides):
    out = as_strided(np.zeros(1000, np.float32)[500:], (2, 3, 2, 3), strides)
    x, w = np.ones((2, 3, 2, 3), np.float32), np.ones((3, 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="out's strides must keep its elements apart") as caught:
        cuconv.depthwise_conv2d(x, w, out=out)
    assert str(strides) in str(caught.value)
    assert not out.any()


def test_a_read_only_out_and_a_masked_array_are_refused():
    x, w = np.ones((1, 1, 4, 5), np.float32), np.ones((1, 1, 2, 2), np.float32)
    out = np.empty((1, 1, 3, 4), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        cuconv.depthwise_conv2d(x, w, out=out)
    with pytest.raises(TypeError, match=r"x must be a numpy.ndarray.*MaskedArray"):
        cuconv.depthwise_conv2d(np.ma.masked_array(x), w)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_dgrad_against_torch(rng, case, dtype):
    x_shape, w_shape, stride, padding, dilation = GEOMETRIES[case]
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    x, w, _ = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    dy = rng.standard_normal(oracle.convolve(x, w, **numbers).shape).astype(x.dtype)
    out = np.full(x_shape, np.nan).astype(x.dtype)
    dx = cuconv.depthwise_conv2d_dgrad(dy, w, x_shape, out=out, **numbers)
    assert dx is out
    exact, magnitude = (oracle.dgrad(of(dy), of(w), x_shape, **numbers) for of in (np.asarray, np.abs))
    assert_rounded_once_from(dx, exact, magnitude, w.size // x_shape[1])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_wgrad_against_torch(rng, case, dtype):
    x_shape, w_shape, stride, padding, dilation = GEOMETRIES[case]
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    x, w, _ = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    dy = rng.standard_normal(oracle.convolve(x, w, **numbers).shape).astype(x.dtype)
    outs = tuple(np.full(shape, np.nan).astype(x.dtype) for shape in (w_shape, w_shape[:1]))
    results = cuconv.depthwise_conv2d_wgrad(dy, x, w_shape, bias=True, out=outs, **numbers)
    exact, magnitude = (oracle.wgrad(of(dy), of(x), w_shape, **numbers) for of in (np.asarray, np.abs))
    for result, out, *truth in zip(results, outs, exact, magnitude, strict=True):
        assert result is out
        assert_rounded_once_from(result, *truth, dy.size // dy.shape[1])
