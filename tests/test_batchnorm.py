"""fold_batchnorm: the folded convolution is the convolution and its normalisation."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

import cuconv


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [(24, 1, 3, 3), (24, 16, 1, 1), (24, 16)])
@pytest.mark.parametrize("parts", [("bias", "gamma", "beta"), ("gamma",), ()])
def test_folded_weights_are_those_of_torch(rng, shape, dtype, parts):
    w = rng.standard_normal(shape).astype(oracle.DTYPES[dtype])
    bias, gamma, beta = (
        rng.standard_normal(24).astype(oracle.DTYPES[dtype]) if name in parts else None
        for name in ("bias", "gamma", "beta")
    )
    mean, var = rng.standard_normal(24).astype(np.float32), rng.random(24).astype(np.float32)
    folded = cuconv.fold_batchnorm(w, bias, mean, var, gamma, beta, eps=1e-3)
    wide = [None if a is None else torch.from_numpy(a.astype(np.float64)) for a in (w, bias, mean, var, gamma, beta)]
    gamma, beta = (torch.full((24,), fill) if a is None else a for a, fill in zip(wide[4:], (1.0, 0.0), strict=True))
    exact = torch.nn.utils.fusion.fuse_conv_bn_weights(*wide[:4], 1e-3, gamma.double(), beta.double())
    for got, expected in zip(folded, exact, strict=True):
        assert got.dtype == w.dtype
        rounded = expected.detach().numpy().astype(w.dtype)
        np.testing.assert_allclose(got.astype(np.float64), rounded.astype(np.float64), rtol=4e-15, atol=1e-15)


def test_a_folded_layer_is_the_layer_and_its_normalisation(rng):
    layer, norm = torch.nn.Conv2d(8, 8, 3, groups=8).double(), torch.nn.BatchNorm2d(8).double()
    norm(torch.from_numpy(rng.standard_normal((16, 8, 5, 5))))
    norm.eval()
    x = rng.standard_normal((2, 8, 9, 7))
    w, bias, gamma, beta = (p.detach().numpy() for p in (layer.weight, layer.bias, norm.weight, norm.bias))
    statistics = norm.running_mean.numpy(), norm.running_var.numpy()
    folded = cuconv.fold_batchnorm(w, bias, *statistics, gamma, beta, norm.eps)
    y = cuconv.depthwise_conv2d(x, folded.w, folded.bias)
    np.testing.assert_allclose(y, norm(layer(torch.from_numpy(x))).detach().numpy(), rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused():
    w, ones = np.ones((4, 1, 3, 3), np.float32), np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"mean must have shape \(4,\).*\(3,\)"):
        cuconv.fold_batchnorm(w, None, ones[:3], ones)
    with pytest.raises(TypeError, match="bias must have w's dtype"):
        cuconv.fold_batchnorm(w, ones.astype(np.float64), ones, ones)
    with pytest.raises(TypeError, match=r"var must be a numpy\.ndarray"):
        cuconv.fold_batchnorm(w, None, ones, None)
    with pytest.raises(TypeError, match="gamma must be one of"):
        cuconv.fold_batchnorm(w, None, ones, ones, ones.astype(np.int32))
