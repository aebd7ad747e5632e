"""How right a result is: one error bound for tests, self-check and benchmarks.

The sums here share nothing with reference.py, so that a mistake there is seen and not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .geometry import Conv2dGeometry, PointwiseGeometry, SeparableGeometry, depthwise_geometry

Array = np.ndarray[Any, Any]

# The error bound.

# Of every dtype: its unit roundoff, and how far off a result too small to be normal may be. float16 and float64 keep
# subnormals, and round them by half their spacing (of float64, whose half is no number, the whole). CuPy compiles with
# -ftz=true, so float32 subnormals become zero, and with them bfloat16's, which have the same smallest normal number.
_ROUNDING = {
    "float16": (2.0**-11, 2.0**-25),
    "bfloat16": (2.0**-8, 2.0**-126),
    "float32": (2.0**-24, 2.0**-126),
    "float64": (2.0**-53, 2.0**-1074),
}


def forward_error(y: Array, x: Array, w: Array, bias: Array | None, geometry: Conv2dGeometry) -> float:
    """The largest error of a depthwise convolution's y, as a fraction of its bound: right is at most 1.

    The bound is ``u_out*|ref| + (taps + 1) * u_acc * (|x| conv |w| + |bias|)``, with u_out and u_acc the unit roundoffs
    of y's dtype and of the accumulator, float32 or for float64 itself. A NaN or an infinity that one has and the other
    has not counts as infinitely wrong, and so does a y that is mostly zeros.

    x (N, C, H, W), w (C*M, 1, R, S), bias (C*M,), y (N, C*M, P, Q): NumPy arrays of one dtype.
    """
    exact, magnitude = (_depthwise(x, w, bias, geometry, of) for of in (np.asarray, np.abs))
    return _fraction_of_bound(y, exact, magnitude, geometry.R * geometry.S)


def dgrad_error(dx: Array, dy: Array, w: Array, geometry: Conv2dGeometry) -> float:
    """As forward_error, for dx (N, C, H, W), the gradient with respect to x; no sum has more than M*R*S terms."""
    exact, magnitude = (_depthwise_dgrad(dy, w, geometry, of) for of in (np.asarray, np.abs))
    return _fraction_of_bound(dx, exact, magnitude, geometry.multiplier * geometry.R * geometry.S)


def wgrad_error(dw: Array, dbias: Array | None, dy: Array, x: Array, geometry: Conv2dGeometry) -> float:
    """As forward_error, for the gradients with respect to weights and bias, dw (C*M, 1, R, S) and dbias (C*M,) or None.

    A sum has as many terms as a channel has elements of dy.
    """
    g = geometry
    terms = g.N * g.P * g.Q
    exact, magnitude = (_depthwise_wgrad(dy, x, g, of) for of in (np.asarray, np.abs))
    error = _fraction_of_bound(dw, exact, magnitude, terms)
    if dbias is None:
        return error
    exact, magnitude = (of(_wide(dy)).sum(axis=(0, 2, 3)) for of in (np.asarray, np.abs))
    return max(error, _fraction_of_bound(dbias, exact, magnitude, terms))


def _depthwise(x: Array, w: Array, bias: Array | None, g: Conv2dGeometry, of: Callable[[Array], Array]) -> Array:
    """The convolution, unrounded, of the arrays as they are or of their magnitudes."""
    windows = _windows(of(_wide(x)), g)
    weights = of(_wide(w)).reshape(g.C, g.multiplier, g.R, g.S)
    with np.errstate(all="ignore"):
        y: Array = np.einsum("ncpqrs,cmrs->ncmpq", windows, weights).reshape(g.y_shape)
        return y if bias is None else y + of(_wide(bias)).reshape(-1, 1, 1)


def _depthwise_dgrad(dy: Array, w: Array, g: Conv2dGeometry, of: Callable[[Array], Array]) -> Array:
    """Likewise the gradient with respect to x: every dy is added to what its output has read of the padded x.

    Zeros take part, so dy is surrounded by as many of them as have a tap that reaches x.
    """
    around, corner = [], []
    for extent, kernel, outputs, step, dilation, (first, _) in zip(
        (g.H, g.W), (g.R, g.S), (g.P, g.Q), g.stride, g.dilation, g.padding, strict=True
    ):
        before = (kernel - 1) * dilation // step
        last = -(-(first + extent - 1) // step)
        around.append((before, max(0, last + 1 - outputs)))
        corner.append(before * step + first)
    terms = np.pad(of(_wide(dy)), ((0, 0), (0, 0), *around))
    terms = terms.reshape(g.N, g.C, g.multiplier, *terms.shape[2:])
    weights = of(_wide(w)).reshape(g.C, g.multiplier, g.R, g.S)
    height, width = ((outputs - 1) * step + 1 for outputs, step in zip(terms.shape[3:], g.stride, strict=True))
    reach = [(kernel - 1) * dilation for kernel, dilation in zip((g.R, g.S), g.dilation, strict=True)]
    dx = np.zeros((g.N, g.C, height + reach[0], width + reach[1]), terms.dtype)
    for r, s in np.ndindex(g.R, g.S):
        top, left = r * g.dilation[0], s * g.dilation[1]
        read = dx[..., top : top + height : g.stride[0], left : left + width : g.stride[1]]
        with np.errstate(all="ignore"):
            read += np.einsum("ncmpq,cm->ncpq", terms, weights[:, :, r, s])
    return dx[..., corner[0] : corner[0] + g.H, corner[1] : corner[1] + g.W]


def _depthwise_wgrad(dy: Array, x: Array, g: Conv2dGeometry, of: Callable[[Array], Array]) -> Array:
    """Likewise the gradient with respect to w, an image at a time: large batches are wider than memory."""
    dw: Array = np.zeros(g.w_shape, _wide(dy[:0]).dtype)
    with np.errstate(all="ignore"):
        for n in range(g.N):
            windows = _windows(of(_wide(x[n : n + 1])), g)[0]
            gradient = of(_wide(dy[n])).reshape(g.C, g.multiplier, g.P, g.Q)
            for r, s in np.ndindex(g.R, g.S):
                dw[:, 0, r, s] += np.einsum("cpq,cmpq->cm", windows[..., r, s], gradient).reshape(-1)
    return dw


def _wide(array: Array) -> Array:
    """In float64; a float64 array, to have something to be judged by, in the widest float of the machine."""
    return array.astype(np.longdouble if array.dtype == np.float64 else np.float64)


def _windows(x: Array, g: Conv2dGeometry) -> Array:
    """What every output sees, (N, C, P, Q, R, S), as a view of the padded x."""
    padded = np.pad(x, ((0, 0), (0, 0), *g.padding))
    reach = [(kernel - 1) * step + 1 for kernel, step in zip((g.R, g.S), g.dilation, strict=True)]
    windows: Array = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    return windows[:, :, :: g.stride[0], :: g.stride[1], :: g.dilation[0], :: g.dilation[1]]


def _fraction_of_bound(y: Array, exact: Array, magnitude: Array, taps: int, slack: Array | float = 0) -> float:
    """slack is what may be added to the bound: for what the terms themselves are off by."""
    if y.shape != exact.shape:
        raise ValueError(f"y must have the result's shape, {exact.shape}, and has {y.shape}")
    if not y.size:
        return 0.0
    unit, tiny = _ROUNDING[y.dtype.name]
    sum_unit, sum_tiny = _ROUNDING["float64" if y.dtype == np.float64 else "float32"]
    values = _wide(y)
    with np.errstate(all="ignore"):
        bound = unit * np.abs(exact) + tiny + (taps + 1) * (sum_unit * magnitude + sum_tiny) + slack
        error = np.abs(values - exact) / bound
        # Equal infinities (an overflow too) and NaNs in the same place are right; any other is found below.
        rounded = _wide(exact.astype(y.dtype))
        error[(~np.isfinite(rounded) & (values == rounded)) | (np.isnan(values) & np.isnan(exact))] = 0
        meant = np.abs(exact) > tiny / unit  # normal numbers
        if np.any(meant) and np.mean(values[meant] == 0) > 0.5:
            return float("inf")
    return float("inf") if np.isnan(error).any() else float(error.max())


# A large result, checked in part.


def poison(y: Any) -> None:
    """Fill a NumPy or CuPy array with NaNs that no arithmetic makes."""
    bits = _bits(y)
    bits[...] = _ones(bits)


def unwritten(y: Any) -> bool:
    """Whether any poison is left."""
    bits = _bits(y)
    return bool((bits == _ones(bits)).any())


def _bits(array: Any) -> Any:
    return array.view(f"u{array.dtype.itemsize}")


def _ones(bits: Any) -> Any:
    return bits.dtype.type(np.iinfo(bits.dtype).max)


def slice_error(y: Any, x: Any, w: Any, bias: Any, geometry: Conv2dGeometry) -> float:
    """forward_error of the first and the last image, at the first, two middle and the last input channels.

    NumPy or CuPy arrays. y must have been poisoned before it was computed: all of it must have been written.
    """
    return _slice_error(forward_error, (y, x), (w, bias), geometry)


def dgrad_slice_error(dx: Any, dy: Any, w: Any, geometry: Conv2dGeometry) -> float:
    """As slice_error, of dgrad_error."""
    return _slice_error(dgrad_error, (dx, dy), (w,), geometry)


def wgrad_slice_error(dw: Any, dbias: Any, dy: Any, x: Any, geometry: Conv2dGeometry) -> float:
    """wgrad_error of all images, at the first, two middle and the last input channels; dbias may be None.

    NumPy or CuPy arrays. dw and dbias must have been poisoned before they were computed.
    """
    g = geometry
    if unwritten(dw) or (dbias is not None and unwritten(dbias)):
        return float("inf")
    channels = _some(g.C)
    of_k = [c * g.multiplier + m for c in channels for m in range(g.multiplier)]
    some_dy, some_x = (np.stack([_host(array[:, c]) for c in of], axis=1) for array, of in ((dy, of_k), (x, channels)))
    some_dw, some_dbias = _host(dw)[of_k], None if dbias is None else _host(dbias)[of_k]
    some = replace(g, C=len(channels), K=len(of_k), channels_last=False)
    return wgrad_error(some_dw, some_dbias, some_dy, some_x, some)


def _slice_error(
    error: Callable[..., float], activations: tuple[Any, Any], weights: tuple[Any, ...], g: Conv2dGeometry
) -> float:
    """activations are the result and the input, of all images; weights, or None in their place, belong to channels."""
    if unwritten(activations[0]):
        return float("inf")
    images = _ends(g.N)
    channels = _some(g.C)

    def some(array: Any) -> Array:
        """Of an array whose first axis is that of channels, input or output; fetched one by one, no copy made there."""
        width = array.shape[0] // g.C
        return np.concatenate([_host(array[c * width : (c + 1) * width]) for c in channels])

    return error(
        *(np.stack([some(array[n]) for n in images]) for array in activations),
        *(None if array is None else some(array) for array in weights),
        replace(g, N=len(images), C=len(channels), K=len(channels) * g.multiplier),
    )


def _host(array: Any) -> Array:
    return np.asarray(array.get() if hasattr(array, "get") else array)


# Pointwise and separable: sums over channels, so that all channels are looked at, in some rows.

# Products of TF32 have factors that are rounded to 11 bits each.
_TF32 = 2.0**-10
# Tensor cores add up some terms at a time, cut off where the largest ends.
_EXTRA_TERMS = 16


def pointwise_slice_error(y: Any, x: Any, w: Any, bias: Any, geometry: PointwiseGeometry, tf32: bool = False) -> float:
    """As slice_error, for a pointwise convolution, at the first, two middle and the last output channels, in the first,
    a middle and the last row of the first and the last image. tf32: whether factors may be rounded to it.

    x (N, C, H, W), w (K, C) or (K, C, 1, 1), bias (K,), y (N, K, P, Q). dgrad is the same of dy and the transposed w.
    """
    if unwritten(y):
        return float("inf")
    g = geometry
    of_k = _some(g.K)
    matrix = _wide(_host(w)).reshape(g.K, g.C)[of_k]
    added = np.zeros(len(of_k)) if bias is None else _wide(_host(bias))[of_k]
    error = 0.0
    for n in _ends(g.N):
        for p in _some(g.P):
            read = _wide(_host(x[n, :, p * g.stride[0], :: g.stride[1]]))
            exact, magnitude = (of(matrix) @ of(read) + of(added)[:, None] for of in (np.asarray, np.abs))
            made = np.stack([_host(y[n, k, p]) for k in of_k])
            slack = _TF32 * magnitude if tf32 else 0.0
            error = max(error, _fraction_of_bound(made, exact, magnitude, g.C + _EXTRA_TERMS, slack))
    return error


def pointwise_wgrad_slice_error(dw: Any, dbias: Any, dy: Any, x: Any, tf32: bool = False) -> float:
    """Likewise, for dw (K, C) or (K, C, 1, 1) and dbias (K,) or None, of dy (N, K, P, Q) and x (N, C, P, Q): at four
    channels of each, all images."""
    if unwritten(dw) or (dbias is not None and unwritten(dbias)):
        return float("inf")
    of_k, of_c = _some(dy.shape[1]), _some(x.shape[1])
    read_dy, read_x = (np.stack([_wide(_host(a[:, i])) for i in of]) for a, of in ((dy, of_k), (x, of_c)))
    made = _host(dw).reshape(dy.shape[1], x.shape[1])[np.ix_(of_k, of_c)]
    return max(
        _matrix_error(made, read_dy, read_x, tf32),
        0.0 if dbias is None else _row_sums_error(_host(dbias)[of_k], read_dy),
    )


def separable_slice_error(
    y: Any, x: Any, w: Any, pointwise: Any, bias: Any, pointwise_bias: Any, g: SeparableGeometry, tf32: bool = False
) -> float:
    """As pointwise_slice_error, for a separable convolution, whose middle is rounded once to the dtype of x."""
    if unwritten(y):
        return float("inf")
    of_k = _some(g.pointwise.K)
    matrix = _wide(_host(pointwise)).reshape(g.pointwise.K, g.pointwise.C)[of_k]
    added = np.zeros(len(of_k)) if pointwise_bias is None else _wide(_host(pointwise_bias))[of_k]
    error = 0.0
    for n in _ends(g.pointwise.N):
        for p in _some(g.pointwise.P):
            middle, off = _middle_row(x[n], w, bias, g.depthwise, p)
            exact = matrix @ middle + added[:, None]
            magnitude = np.abs(matrix) @ (np.abs(middle) + off) + np.abs(added)[:, None]
            slack = np.abs(matrix) @ off + (_TF32 * magnitude if tf32 else 0.0)
            made = np.stack([_host(y[n, k, p]) for k in of_k])
            error = max(error, _fraction_of_bound(made, exact, magnitude, g.pointwise.C + _EXTRA_TERMS, slack))
    return error


def separable_gradients_slice_error(
    gradients: Any, dy: Any, x: Any, w: Any, pointwise: Any, bias: Any, g: SeparableGeometry, tf32: bool = False
) -> float:
    """Likewise, for the gradients of x, both weights and both biases (or None), in this order, without activations:
    that of x in some rows of some channels, those of weights and biases at some channels."""
    dx, dw, dpointwise, dbias, dpointwise_bias = gradients
    if any(a is not None and unwritten(a) for a in gradients):
        return float("inf")
    d = g.depthwise
    unit = _ROUNDING[x.dtype.name][0]
    of_c, of_k = _ends(d.C), _some(g.pointwise.K)
    of_m = [c * d.multiplier + m for c in of_c for m in range(d.multiplier)]
    matrix = _wide(_host(pointwise)).reshape(g.pointwise.K, d.K)[:, of_m].T
    weights = _wide(_host(w))[of_m]
    # What rounding does to a gradient of the middle, of the magnitude of its terms.
    per_term = unit + (g.pointwise.K + _EXTRA_TERMS) * _ROUNDING["float32"][0] + (_TF32 if tf32 else 0.0)
    error = 0.0
    for n in _ends(d.N):
        for h in _some(d.H):
            exact, magnitude = (_dx_row(of, dy[n], weights, matrix, d, h, len(of_c)) for of in (np.asarray, np.abs))
            made = np.stack([_host(dx[n, c, h]) for c in of_c])
            error = max(error, _fraction_of_bound(made, exact, magnitude, weights[0].size, per_term * magnitude))

    some_x = np.stack([_host(x[:, c]) for c in of_c], axis=1)
    some = replace(d, C=len(of_c), K=len(of_m), channels_last=False)
    some_bias = None if bias is None else _host(bias)[of_m]
    middle, terms = (_depthwise(some_x, _host(w)[of_m], some_bias, some, of) for of in (np.asarray, np.abs))
    off = 2 * unit * np.abs(middle) + (d.R * d.S + 1) * _ROUNDING["float32"][0] * terms
    some_dy = np.stack([_wide(_host(dy[:, k])) for k in of_k])
    error = max(
        error,
        _matrix_error(
            _host(dpointwise).reshape(-1, d.K)[np.ix_(of_k, of_m)], some_dy, middle.swapaxes(0, 1), tf32, off
        ),
    )
    if dpointwise_bias is not None:
        error = max(error, _row_sums_error(_host(dpointwise_bias)[of_k], some_dy))

    dmiddle, magnitude = (
        np.stack([_weighted_sum(of, dy, row) for row in matrix], axis=1) for of in (np.asarray, np.abs)
    )
    exact = _depthwise_wgrad(dmiddle, some_x, some, np.asarray)
    terms = _depthwise_wgrad(magnitude, some_x, some, np.abs)
    sums = d.N * d.P * d.Q
    error = max(error, _fraction_of_bound(_host(dw)[of_m], exact, terms, sums, per_term * terms))
    if dbias is not None:
        exact, terms = dmiddle.sum(axis=(0, 2, 3)), magnitude.sum(axis=(0, 2, 3))
        error = max(error, _fraction_of_bound(_host(dbias)[of_m], exact, terms, sums, per_term * terms))
    return error


def _middle_row(x: Any, w: Any, bias: Any, g: Conv2dGeometry, p: int) -> tuple[Array, Array]:
    """Row p of the depthwise part of one image, (C*M, Q), and by how much its rounded values may be off."""
    rows = np.zeros((1, g.C, g.R, g.W), x.dtype)
    for r in range(g.R):
        h = p * g.stride[0] - g.padding[0][0] + r * g.dilation[0]
        if 0 <= h < g.H:
            rows[0, :, r] = _host(x[:, h])
    one = depthwise_geometry(
        rows.shape, g.w_shape, stride=(1, g.stride[1]), padding=((0, 0), g.padding[1]), dilation=(1, g.dilation[1])
    )
    bias = None if bias is None else _host(bias)
    middle, magnitude = (_depthwise(rows, _host(w), bias, one, of)[0, :, 0] for of in (np.asarray, np.abs))
    sums = _ROUNDING["float64" if x.dtype == np.float64 else "float32"][0]
    return middle, 2 * _ROUNDING[x.dtype.name][0] * np.abs(middle) + (g.R * g.S + 1) * sums * magnitude


def _dx_row(
    of: Callable[[Array], Array], dy: Any, w: Array, matrix: Array, g: Conv2dGeometry, h: int, channels: int
) -> Array:
    """Row h of the gradient of x of one image, (channels, W), of w (channels*M, 1, R, S) and matrix (channels*M, K)."""
    total = np.zeros((channels, g.W))
    one = depthwise_geometry(
        (1, channels, 1, g.W),
        (len(w), 1, 1, g.S),
        stride=(1, g.stride[1]),
        padding=((0, 0), g.padding[1]),
        dilation=(1, g.dilation[1]),
    )
    for r in range(g.R):
        p, between = divmod(h + g.padding[0][0] - r * g.dilation[0], g.stride[0])
        if between == 0 and 0 <= p < g.P:
            dmiddle = of(matrix) @ of(_wide(_host(dy[:, p])))
            total += _depthwise_dgrad(dmiddle[None, :, None], w[:, :, r : r + 1], one, of)[0, :, 0]
    return total


def _weighted_sum(of: Callable[[Array], Array], dy: Any, weights: Array) -> Array:
    """Over the channels of dy, (N, P, Q), added up where dy is."""
    total: Any = 0.0
    for k, weight in enumerate(weights):
        term = float(weight) * dy[:, k].astype(np.float64)
        # A GPU's array is no argument of np.asarray.
        total = total + (abs(term) if of is np.abs else term)
    return _host(total)


def _matrix_error(dw: Array, dy: Array, x: Array, tf32: bool, off: Array | float = 0.0) -> float:
    """Of dw (K, C), summed over all but the first axis of dy (K, ...) and x (C, ...); x may be off by so much."""
    terms = dy[0].size
    dy, x = dy.reshape(len(dy), -1), x.reshape(len(x), -1)
    exact, magnitude = (of(dy) @ of(x).T for of in (np.asarray, np.abs))
    slack: Array | float = _TF32 * magnitude if tf32 else 0.0
    if isinstance(off, np.ndarray):
        slack = slack + np.abs(dy) @ off.swapaxes(0, 1).reshape(len(x), -1).T
    return _fraction_of_bound(dw, exact, magnitude, terms + _EXTRA_TERMS, slack)


def _row_sums_error(dbias: Array, dy: Array) -> float:
    """Of dbias (K,), summed over all but the first axis of dy."""
    exact, magnitude = (of(dy).reshape(len(dy), -1).sum(axis=1) for of in (np.asarray, np.abs))
    return _fraction_of_bound(dbias, exact, magnitude, dy[0].size + _EXTRA_TERMS)


def _some(extent: int) -> list[int]:
    return sorted({0, extent // 3, extent // 2, extent - 1})


def _ends(extent: int) -> list[int]:
    return sorted({0, extent - 1})
