"""Batch normalisation at inference, as part of the convolution before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import interop
from .geometry import check_dtypes, check_shape


class Folded(NamedTuple):
    """Weights and bias of a convolution that normalises its own result."""

    w: Any
    bias: Any


def fold_batchnorm(
    w: Any, bias: Any, mean: Any, var: Any, gamma: Any = None, beta: Any = None, eps: float = 1e-5
) -> Folded:
    """The convolution and the batch normalisation behind it, in evaluation, as one convolution.

    ``w[k] * scale[k]`` and ``(bias[k] - mean[k]) * scale[k] + beta[k]``, with ``scale = gamma / sqrt(var + eps)``
    (S. Ioffe, C. Szegedy, "Batch normalization", 2015, section 3.1).

    Equivalent to ``torch.nn.utils.fusion.fuse_conv_bn_weights(w, bias, mean, var, eps, gamma, beta)``.

    Parameters
    ----------
    w : (K, ...) float16, bfloat16, float32 or float64
        A NumPy or a CuPy array: the weights of a depthwise or of a pointwise convolution.
    bias : (K,), the dtype of w, or None for none
    mean, var : (K,), any of the dtypes
        The running mean and variance.
    gamma, beta : (K,), any of the dtypes, optional
        Scale and shift; 1 and 0 where they are not given.
    eps : float
        What is added to the variance.

    Returns
    -------
    w, bias : as w, and (K,) in its dtype
        Computed in float64 and rounded once.

    Raises
    ------
    TypeError
        For another kind of array or dtype, and for arrays of different kinds.
    ValueError
        For arrays of other shapes or on different GPUs.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> w = np.ones((2, 1, 1, 1), np.float32)
    >>> mean, var = np.array([1.0, 2.0]), np.array([4.0, 0.25])
    >>> folded = cuconv.fold_batchnorm(w, None, mean, var, eps=0.0)
    >>> folded.w.ravel(), folded.bias
    (array([0.5, 2. ], dtype=float32), array([-0.5, -4. ], dtype=float32))
    """
    statistics = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    given = {name: array for name, array in statistics.items() if array is not None or name in ("mean", "var")}
    module = interop.array_module(w=w, bias=bias, **given)
    check_dtypes(w=w, bias=bias)
    for name, array in {**given, "bias": bias}.items():
        if array is not None:
            check_dtypes(**{name: array})
            check_shape(name, array, (w.shape[0],), "one value for each output channel")
    if module is not np:
        interop.one_device(w=w, bias=bias, **given)
    scale = 1.0 / module.sqrt(_wide(var) + eps)
    if gamma is not None:
        scale = _wide(gamma) * scale
    shift = -_wide(mean) * scale if bias is None else (_wide(bias) - _wide(mean)) * scale
    if beta is not None:
        shift = shift + _wide(beta)
    folded = _wide(w) * scale.reshape(-1, *(1 for _ in w.shape[1:]))
    return Folded(folded.astype(w.dtype), shift.astype(w.dtype))


def _wide(array: Any) -> Any:
    return array.astype(np.float64)
