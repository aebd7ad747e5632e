"""The definition: convolutions in NumPy, summed in float64 and rounded once to the dtype of x.

NumPy inputs run here, and every kernel is judged against it. Padding is a zero that takes part in the sum, so a weight
of infinity gives NaN at the border, as IEEE arithmetic has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import erfc, pi, sqrt
from typing import Any, NamedTuple

import numpy as np

from .geometry import Conv2dGeometry, PointwiseGeometry, SeparableGeometry

Array = np.ndarray[Any, Any]

# Elements of float64 worked on at once: 1 MB stays in a core's cache while every tap passes over it.
_CHUNK_ELEMENTS = 2**17


def depthwise_conv2d(
    x: Array, w: Array, bias: Array | None, geometry: Conv2dGeometry, out: Array | None = None
) -> Array:
    """y[n, c*M + m, p, q] = bias[c*M + m] + sum over r, s of x[n, c, row(p, r), column(q, s)] * w[c*M + m, 0, r, s].

    x (N, C, H, W), w (C*M, 1, R, S), bias (C*M,) or None, out and the result (N, C*M, P, Q).
    """
    g = geometry
    y = np.empty(g.y_shape, x.dtype) if out is None else out
    # Outputs as (N, C, M, P, Q): the multiplier is an axis that x has once.
    weights = w.astype(np.float64).reshape(g.C, g.multiplier, g.R, g.S, 1, 1)
    biases = np.zeros((g.C, g.multiplier)) if bias is None else bias.astype(np.float64).reshape(g.C, g.multiplier)
    with np.errstate(over="ignore", invalid="ignore"):
        for images, channels in _chunks(g):
            padded = np.pad(x[images, channels].astype(np.float64), ((0, 0), (0, 0), *g.padding))
            shape = (padded.shape[0], padded.shape[1], g.multiplier, g.P, g.Q)
            total = np.zeros(shape)
            product = np.empty(shape)
            for r in range(g.R):
                for s in range(g.S):
                    tap = _tap(padded, g, r, s)[:, :, np.newaxis]
                    total += np.multiply(tap, weights[channels, :, r, s], out=product)
            total += biases[channels, :, np.newaxis, np.newaxis]
            outputs = slice(channels.start * g.multiplier, channels.stop * g.multiplier)
            y[images, outputs] = rounded(total, y.dtype).reshape(shape[0], -1, g.P, g.Q)
    return y


def depthwise_conv2d_dgrad(dy: Array, w: Array, geometry: Conv2dGeometry, out: Array | None = None) -> Array:
    """dx[n, c, h, v] = sum over m, r, s of dy[n, c*M + m, p, q] * w[c*M + m, 0, r, s], where r and s are such that
    p = (h + top - r*dilation) / stride and q, likewise, are integers; dy is zero where it has no row p or column q.

    dy (N, C*M, P, Q), w (C*M, 1, R, S), out and the result (N, C, H, W).
    """
    g = geometry
    dx = np.empty(g.x_shape, dy.dtype) if out is None else out
    weights = w.astype(np.float64).reshape(g.C, g.multiplier, g.R, g.S, 1, 1)
    rows = [_dgrad_tap(g, 0, r) for r in range(g.R)]
    columns = [_dgrad_tap(g, 1, s) for s in range(g.S)]
    # Zeros around dy, as many as any tap reaches for.
    around = [
        (max(0, *(-a.first for a in taps)), max(0, *(a.last + 1 - n for a in taps)))
        for taps, n in ((rows, g.P), (columns, g.Q))
    ]
    with np.errstate(over="ignore", invalid="ignore"):
        for images, channels in _chunks(g):
            outputs = slice(channels.start * g.multiplier, channels.stop * g.multiplier)
            padded = np.pad(dy[images, outputs].astype(np.float64), ((0, 0), (0, 0), *around))
            padded = padded.reshape(padded.shape[0], -1, g.multiplier, *padded.shape[2:])
            total = np.zeros((padded.shape[0], padded.shape[1], g.H, g.W))
            for (r, row), (s, column) in product(enumerate(rows), enumerate(columns)):
                part = padded[..., row.slice(around[0][0]), column.slice(around[1][0])]
                target = total[:, :, row.start :: g.stride[0], column.start :: g.stride[1]]
                target += (part * weights[channels, :, r, s]).sum(axis=2)
            dx[images, channels] = rounded(total, dx.dtype)
    return dx


def depthwise_conv2d_wgrad(
    dy: Array,
    x: Array,
    bias: bool,
    geometry: Conv2dGeometry,
    dw_out: Array | None = None,
    dbias_out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """dw[c*M + m, 0, r, s] = sum over n, p, q of dy[n, c*M + m, p, q] * x[n, c, row(p, r), column(q, s)]; with bias
    also dbias[k] = sum over n, p, q of dy[n, k, p, q].

    dy (N, C*M, P, Q), x (N, C, H, W), dw and dw_out (C*M, 1, R, S), dbias and dbias_out (C*M,).
    """
    g = geometry
    weights = np.zeros((g.C, g.multiplier, g.R, g.S))
    biases = np.zeros((g.C, g.multiplier))
    with np.errstate(over="ignore", invalid="ignore"):
        for images, channels in _chunks(g):
            outputs = slice(channels.start * g.multiplier, channels.stop * g.multiplier)
            padded = np.pad(x[images, channels].astype(np.float64), ((0, 0), (0, 0), *g.padding))
            gradient = dy[images, outputs].astype(np.float64).reshape(*padded.shape[:2], g.multiplier, g.P, g.Q)
            for r, s in np.ndindex(g.R, g.S):
                tap = _tap(padded, g, r, s)
                weights[channels, :, r, s] += np.einsum("ncmpq,ncpq->cm", gradient, tap)
            biases[channels] += gradient.sum(axis=(0, 3, 4))
    dw = np.empty(g.w_shape, dy.dtype) if dw_out is None else dw_out
    dw[...] = rounded(weights.reshape(g.w_shape), dy.dtype)
    if not bias:
        return dw
    dbias = np.empty(g.K, dy.dtype) if dbias_out is None else dbias_out
    dbias[...] = rounded(biases.reshape(-1), dy.dtype)
    return dw, dbias


def activated(z: Array, activation: str | None) -> Array:
    """The activation of float64 values; gelu with the error function, as PyTorch has it unless asked otherwise."""
    if activation is None:
        return z
    if activation == "relu":
        return np.maximum(z, 0.0)
    if activation == "relu6":
        return np.clip(z, 0.0, 6.0)
    if activation == "silu":
        return z * _sigmoid(z)
    if activation == "hardswish":
        return z * np.clip(z + 3.0, 0.0, 6.0) / 6.0
    return z * _normal_cdf(z)


def activation_slope(z: Array, activation: str) -> Array:
    """The derivative of the activation at float64 values; where it has none, PyTorch's."""
    if activation == "relu":
        return np.where(z > 0.0, 1.0, 0.0)
    if activation == "relu6":
        return np.where((z > 0.0) & (z < 6.0), 1.0, 0.0)
    if activation == "silu":
        sigmoid = _sigmoid(z)
        return sigmoid * (1.0 + z * (1.0 - sigmoid))
    if activation == "hardswish":
        return np.where(z <= -3.0, 0.0, np.where(z >= 3.0, 1.0, (2.0 * z + 3.0) / 6.0))
    return _normal_cdf(z) + z * np.exp(-0.5 * z * z) / sqrt(2.0 * pi)


def _sigmoid(z: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-z))


def _normal_cdf(z: Array) -> Array:
    cdf: Array = 0.5 * np.vectorize(erfc, otypes=[np.float64])(z / -sqrt(2.0))
    return cdf


def pointwise_conv2d(
    x: Array,
    w: Array,
    bias: Array | None,
    geometry: PointwiseGeometry,
    activation: str | None,
    out: Array | None = None,
) -> Array:
    """y[n, k, p, q] = activation(bias[k] + sum over c of x[n, c, p*stride, q*stride] * w[k, c]).

    x (N, C, H, W), w (K, C) with or without two axes of 1, bias (K,) or None, out and the result (N, K, P, Q).
    """
    g = geometry
    y = np.empty(g.y_shape, x.dtype) if out is None else out
    weights = _matrix(w)
    with np.errstate(over="ignore", invalid="ignore"):
        for n in range(g.N):
            total = np.tensordot(weights, _strided(x[n], g).astype(np.float64), 1)
            if bias is not None:
                total += bias.astype(np.float64)[:, np.newaxis, np.newaxis]
            y[n] = rounded(activated(total, activation), y.dtype)
    return y


def pointwise_conv2d_dgrad(dy: Array, w: Array, geometry: PointwiseGeometry, out: Array | None = None) -> Array:
    """dx[n, c, p*stride, q*stride] = sum over k of dy[n, k, p, q] * w[k, c], and zero everywhere else.

    dy (N, K, P, Q), w (K, C) with or without two axes of 1, out and the result (N, C, H, W).
    """
    g = geometry
    dx = np.empty(g.x_shape, dy.dtype) if out is None else out
    if g.stride != (1, 1):
        dx.fill(0)
    weights = _matrix(w).T
    with np.errstate(over="ignore", invalid="ignore"):
        for n in range(g.N):
            total = np.tensordot(weights, dy[n].astype(np.float64), 1)
            _strided(dx[n], g)[...] = rounded(total, dx.dtype)
    return dx


def pointwise_conv2d_wgrad(
    dy: Array,
    x: Array,
    bias: bool,
    geometry: PointwiseGeometry,
    dw: Array,
    dbias: Array | None = None,
) -> Array | tuple[Array, Array]:
    """dw[k, c] = sum over n, p, q of dy[n, k, p, q] * x[n, c, p*stride, q*stride]; with bias also dbias[k] = sum over
    n, p, q of dy[n, k, p, q].

    dy (N, K, P, Q), x (N, C, H, W), dw (K, C) with or without two axes of 1 and dbias (K,) are written.
    """
    g = geometry
    weights, biases = np.zeros((g.K, g.C)), np.zeros(g.K)
    with np.errstate(over="ignore", invalid="ignore"):
        for n in range(g.N):
            gradient = dy[n].astype(np.float64).reshape(g.K, -1)
            weights += gradient @ _strided(x[n], g).astype(np.float64).reshape(g.C, -1).T
            biases += gradient.sum(axis=1)
    dw[...] = rounded(weights, dw.dtype).reshape(dw.shape)
    if not bias:
        return dw
    dbias = np.empty(g.K, dy.dtype) if dbias is None else dbias
    dbias[...] = rounded(biases, dbias.dtype)
    return dw, dbias


class SeparableGradients(NamedTuple):
    """What separable_conv2d_backward returns: None for what was not asked for."""

    x: Any = None
    depthwise_w: Any = None
    pointwise_w: Any = None
    depthwise_bias: Any = None
    pointwise_bias: Any = None


def separable_conv2d(
    x: Array,
    depthwise_w: Array,
    pointwise_w: Array,
    depthwise_bias: Array | None,
    pointwise_bias: Array | None,
    geometry: SeparableGeometry,
    depthwise_activation: str | None,
    pointwise_activation: str | None,
    out: Array | None = None,
) -> Array:
    """The pointwise convolution of the depthwise one, each with its bias and activation; in between, values are rounded
    to the dtype of x, as two layers have them.

    x (N, C, H, W), depthwise_w (C*M, 1, R, S), pointwise_w (K, C*M) with or without two axes of 1, biases (C*M,) and
    (K,) or None, out and the result (N, K, P, Q).
    """
    _, middle = _middle(x, depthwise_w, depthwise_bias, geometry.depthwise, depthwise_activation)
    return pointwise_conv2d(middle, pointwise_w, pointwise_bias, geometry.pointwise, pointwise_activation, out)


def separable_conv2d_backward(
    dy: Array,
    x: Array,
    depthwise_w: Array,
    pointwise_w: Array,
    depthwise_bias: Array | None,
    pointwise_bias: Array | None,
    geometry: SeparableGeometry,
    depthwise_activation: str | None,
    pointwise_activation: str | None,
    wanted: frozenset[str],
) -> SeparableGradients:
    """The gradients of separable_conv2d that are in `wanted`, by the names of SeparableGradients. Nothing but the
    middle, and each gradient in the end, is rounded."""
    depthwise, pointwise = geometry.depthwise, geometry.pointwise
    before, middle = _middle(x, depthwise_w, depthwise_bias, depthwise, depthwise_activation)
    gradient = dy.astype(np.float64)
    if pointwise_activation is not None:
        wide_bias = None if pointwise_bias is None else pointwise_bias.astype(np.float64)
        z = pointwise_conv2d(middle.astype(np.float64), pointwise_w, wide_bias, pointwise, None)
        with np.errstate(over="ignore", invalid="ignore"):
            gradient = gradient * activation_slope(z, pointwise_activation)
    results: dict[str, Any] = {}
    if wanted & {"pointwise_w", "pointwise_bias"}:
        dw, dbias = pointwise_conv2d_wgrad(
            gradient, middle, True, pointwise, np.empty(pointwise_w.shape, x.dtype), np.empty(pointwise.K, x.dtype)
        )
        results |= {"pointwise_w": dw, "pointwise_bias": dbias}
    if wanted & {"x", "depthwise_w", "depthwise_bias"}:
        gradient = pointwise_conv2d_dgrad(gradient, pointwise_w, pointwise)
        if depthwise_activation is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                gradient = gradient * activation_slope(before, depthwise_activation)
        if "x" in wanted:
            results["x"] = depthwise_conv2d_dgrad(gradient, depthwise_w, depthwise, np.empty(x.shape, x.dtype))
        if wanted & {"depthwise_w", "depthwise_bias"}:
            dw, dbias = depthwise_conv2d_wgrad(
                gradient, x, True, depthwise, np.empty(depthwise_w.shape, x.dtype), np.empty(depthwise.K, x.dtype)
            )
            results |= {"depthwise_w": dw, "depthwise_bias": dbias}
    return SeparableGradients(**{name: value for name, value in results.items() if name in wanted})


def _middle(
    x: Array, w: Array, bias: Array | None, geometry: Conv2dGeometry, activation: str | None
) -> tuple[Array, Array]:
    """A depthwise convolution before its activation, in float64, and behind it, in the dtype of x."""
    wide_bias = None if bias is None else bias.astype(np.float64)
    before = depthwise_conv2d(x.astype(np.float64), w, wide_bias, geometry)
    with np.errstate(over="ignore", invalid="ignore"):
        return before, rounded(activated(before, activation), x.dtype)


class _DgradTap(NamedTuple):
    """Along one axis, what one kernel row or column takes part in: x from `start` on in steps of the stride, with dy
    from `first` to `last`, which need not exist."""

    start: int
    first: int
    last: int

    def slice(self, before: int) -> slice:
        return slice(before + self.first, before + self.last + 1)


def _dgrad_tap(g: Conv2dGeometry, axis: int, k: int) -> _DgradTap:
    """See _DgradTap; axis 0 for rows, 1 for columns."""
    extent, stride = (g.H, g.W)[axis], g.stride[axis]
    offset = g.padding[axis][0] - k * g.dilation[axis]
    start = -offset % stride
    first = (start + offset) // stride
    return _DgradTap(start, first, first + len(range(start, extent, stride)) - 1)


def rounded(values: Array, dtype: Any) -> Array:
    """float64 values in dtype, rounded once, to nearest even."""
    if np.dtype(dtype).name != "bfloat16":
        return values.astype(dtype)
    # ml_dtypes goes through float32 and so rounds twice. Rounding to odd on the way keeps what the second rounding
    # needs to know (S. Boldo, G. Melquiond, "When double rounding is odd", 2005).
    nearest = values.astype(np.float32)
    truncated = np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)
    truncated.view(np.uint32)[...] |= truncated != values
    return truncated.astype(dtype)


def _matrix(w: Array) -> Array:
    """The weights of a pointwise convolution as a matrix (K, C) of float64."""
    return w.astype(np.float64).reshape(w.shape[:2])


def _strided(x: Array, g: PointwiseGeometry) -> Array:
    """Those pixels of x, or of one of its images, that a pointwise convolution reads."""
    return x[..., :: g.stride[0], :: g.stride[1]]


def _tap(padded: Array, g: Conv2dGeometry, r: int, s: int) -> Array:
    """The padded input that kernel element (r, s) meets: a (..., P, Q) view."""
    top, left = r * g.dilation[0], s * g.dilation[1]
    rows = slice(top, top + (g.P - 1) * g.stride[0] + 1, g.stride[0])
    columns = slice(left, left + (g.Q - 1) * g.stride[1] + 1, g.stride[1])
    return padded[..., rows, columns]


def _chunks(g: Conv2dGeometry) -> Iterator[tuple[slice, slice]]:
    """Slices over images and channels whose planes, input or output, hold about _CHUNK_ELEMENTS."""
    rows, columns = g.H + sum(g.padding[0]), g.W + sum(g.padding[1])
    plane = max(rows * columns, g.multiplier * g.P * g.Q)
    channels = min(g.C, max(1, _CHUNK_ELEMENTS // plane))
    images = max(1, _CHUNK_ELEMENTS // (plane * channels))
    for n in range(0, g.N, images):
        for c in range(0, g.C, channels):
            yield slice(n, min(n + images, g.N)), slice(c, min(c + channels, g.C))
