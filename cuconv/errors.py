"""How right a result is: one error bound for tests, self-check and benchmarks.

The sums here share nothing with reference.py, so that a mistake there is seen and not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .geometry import Conv2dGeometry

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


def separable_error(
    y: Array,
    x: Array,
    w: Array,
    bias: Array | None,
    pointwise: Array,
    pointwise_bias: Array | None,
    geometry: Conv2dGeometry,
) -> float:
    """As forward_error, for a depthwise and then a pointwise convolution, of which nothing is rounded in between.

    pointwise (K, C*M) and pointwise_bias (K,) may be some rows of the whole, as long as y has only their channels. The
    length of a sum is that of both parts, one after the other.
    """
    exact, magnitude = (
        np.einsum("kc,ncpq->nkpq", of(_wide(pointwise)), _depthwise(x, w, bias, geometry, of))
        + (0 if pointwise_bias is None else of(_wide(pointwise_bias)).reshape(-1, 1, 1))
        for of in (np.asarray, np.abs)
    )
    return _fraction_of_bound(y, exact, magnitude, geometry.R * geometry.S + geometry.K + 1)


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


def _fraction_of_bound(y: Array, exact: Array, magnitude: Array, taps: int) -> float:
    if y.shape != exact.shape:
        raise ValueError(f"y must have the result's shape, {exact.shape}, and has {y.shape}")
    if not y.size:
        return 0.0
    unit, tiny = _ROUNDING[y.dtype.name]
    sum_unit, sum_tiny = _ROUNDING["float64" if y.dtype == np.float64 else "float32"]
    values = _wide(y)
    with np.errstate(all="ignore"):
        bound = unit * np.abs(exact) + tiny + (taps + 1) * (sum_unit * magnitude + sum_tiny)
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
    channels = _some_channels(g)
    of_k = [c * g.multiplier + m for c in channels for m in range(g.multiplier)]
    some_dy, some_x = (np.stack([_host(array[:, c]) for c in of], axis=1) for array, of in ((dy, of_k), (x, channels)))
    some_dw, some_dbias = _host(dw)[of_k], None if dbias is None else _host(dbias)[of_k]
    some = replace(g, C=len(channels), K=len(of_k), channels_last=False)
    return wgrad_error(some_dw, some_dbias, some_dy, some_x, some)


def _some_channels(g: Conv2dGeometry) -> list[int]:
    return sorted({0, g.C // 3, g.C // 2, g.C - 1})


def _slice_error(
    error: Callable[..., float], activations: tuple[Any, Any], weights: tuple[Any, ...], g: Conv2dGeometry
) -> float:
    """activations are the result and the input, of all images; weights, or None in their place, belong to channels."""
    if unwritten(activations[0]):
        return float("inf")
    images = sorted({0, g.N - 1})
    channels = _some_channels(g)

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
