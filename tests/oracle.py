"""The truth that tests hold results against: PyTorch's convolution in float64, and the bound that rounding allows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch.nn import functional

# These convolutions are small, and the threads of several test processes would wait for one another: hundreds of times
# as long, where channels are many.
torch.set_num_threads(1)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
_UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
# Below the normal range the spacing no longer shrinks (float16), or results are flushed to zero (CuPy's -ftz=true).
_UNDERFLOW = {"float16": 2.0**-25, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1075}


def convolve(x, w, bias=None, *, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1)):
    """Depthwise convolution in float64 of host arrays of any dtype; padding as ((top, bottom), (left, right))."""
    (top, bottom), (left, right) = padding
    padded = functional.pad(_tensor(x), (left, right, top, bottom))
    bias = None if bias is None else _tensor(bias)
    return functional.conv2d(padded, _tensor(w), bias, stride, 0, dilation, groups=x.shape[1]).numpy()


def dgrad(dy, w, x_shape, *, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1)):
    """The gradient of convolve with respect to x, for the upstream gradient dy: that of the padded x, cut out."""
    N, C, H, W = x_shape
    (top, bottom), (left, right) = padding
    padded = (N, C, top + H + bottom, left + W + right)
    dx = torch.nn.grad.conv2d_input(padded, _tensor(w), _tensor(dy), stride, 0, dilation, groups=C)
    return dx.numpy()[:, :, top : top + H, left : left + W]


def wgrad(dy, x, w_shape, *, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1)):
    """The gradient of convolve with respect to w, and that of its bias."""
    (top, bottom), (left, right) = padding
    padded = functional.pad(_tensor(x), (left, right, top, bottom))
    dy = _tensor(dy)
    dw = torch.nn.grad.conv2d_weight(padded, w_shape, dy, stride, 0, dilation, groups=x.shape[1])
    return dw.numpy(), dy.sum((0, 2, 3)).numpy()


def assert_within_bound(y, x, w, bias=None, **numbers):
    """|y - exact| <= u_out*|exact| + (taps + 1) * u_sum * (|x| conv |w| + |bias|), for finite data."""
    magnitude = convolve(np.abs(x), np.abs(w), None if bias is None else np.abs(bias), **numbers)
    _assert_bound(y, convolve(x, w, bias, **numbers), magnitude, w.shape[2] * w.shape[3])


def assert_dgrad_within_bound(dx, dy, w, **numbers):
    """As assert_within_bound; a sum has at most as many terms as a channel has weights."""
    exact, magnitude = (dgrad(of(dy), of(w), dx.shape, **numbers) for of in (np.asarray, np.abs))
    _assert_bound(dx, exact, magnitude, w.size // dx.shape[1])


def assert_wgrad_within_bound(dw, dbias, dy, x, **numbers):
    """As assert_within_bound; a sum has as many terms as a channel has elements of dy. dbias may be None."""
    of = [wgrad(of(dy), of(x), dw.shape, **numbers) for of in (np.asarray, np.abs)]
    terms = dy.size // dy.shape[1]
    for gradient, exact, magnitude in zip((dw, dbias), *of, strict=True):
        if gradient is not None:
            _assert_bound(gradient, exact, magnitude, terms)


def assert_sum_within_bound(y, exact, magnitude, terms):
    """As assert_within_bound, of any sum of so many terms: what it is, and what it is of their magnitudes."""
    _assert_bound(y, exact, magnitude, terms)


def _assert_bound(y, exact, magnitude, taps):
    name = y.dtype.name
    assert y.shape == exact.shape
    sum_roundoff = 2.0**-53 if name == "float64" else 2.0**-24
    bound = _UNIT_ROUNDOFF[name] * np.abs(exact) + (taps + 1) * sum_roundoff * magnitude + _UNDERFLOW[name]
    error = np.abs(y.astype(np.float64) - exact)
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} outputs are beyond the bound, the first at "
        f"{tuple(int(i) for i in np.argwhere(wrong)[0])}: {y[wrong][0]} for {exact[wrong][0]}"
    )
    # All zeros would pass where everything cancels; random data does not cancel.
    assert exact.size == 0 or np.count_nonzero(y) >= np.count_nonzero(magnitude) // 2


def random_arrays(rng, x_shape, w_shape, dtype, bias=True):
    """x, w and bias (or None) with values around 1, in the dtype of the given name."""
    dtype = DTYPES[dtype]
    x = rng.standard_normal(x_shape).astype(dtype)
    w = rng.standard_normal(w_shape).astype(dtype)
    return x, w, rng.standard_normal(w_shape[0]).astype(dtype) if bias else None


def _tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
