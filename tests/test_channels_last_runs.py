"""Channels-last arrays by runs: every kind of tile, forward and the gradients of the weights and the bias."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from test_wgrad_channels_last import gradients, launch, nhwc_geometry

from cuconv.plan import channels_last_runs as runs
from cuconv.plan import wgrad_channels_last_runs as wgrad_runs

# Blocks of all columns and of some, the last of them with fewer strips; channels that are known at compile time and
# that are not; columns in the padding of one strip and of several, and none.
KINDS = pytest.mark.parametrize(
    ("x_shape", "w_shape", "padding", "dtype"),
    [
        ((2, 67, 9, 27), (67, 1, 3, 3), ((1, 1), (1, 1)), "bfloat16"),
        ((1, 5, 37, 43), (5, 1, 2, 4), ((0, 1), (3, 2)), "float16"),
        ((3, 259, 5, 9), (259, 1, 3, 2), ((1, 0), (0, 1)), "float32"),
        ((2, 6, 11, 13), (6, 1, 5, 3), ((6, 3), (7, 5)), "float16"),
        ((2, 3, 21, 19), (3, 1, 1, 5), ((0, 2), (0, 0)), "bfloat16"),
    ],
    ids=["67_channels", "2x4", "many_channels", "much_padding", "one_row"],
)


def each_feature_once(rng, g, tiles):
    """Of the tiles, in an order of no meaning, as many as it takes to see every feature."""
    seen = set()
    for i in rng.permutation(len(tiles)):
        features = features_of(g, tiles[i])
        if not features <= seen:
            seen |= features
            yield tiles[i]


def features_of(g, tile):
    strips = -(-g.Q // tile.columns)
    return {
        ("slab", tile.slab_rows < g.P, tile.slab_rows % g.P > 0, g.N * g.P % tile.slab_rows > 0),
        ("columns", tile.columns % 3),
        ("stages", tile.stages),
        ("strips", tile.strips > 1, tile.strips < strips, strips % tile.strips > 0, g.Q % tile.columns > 0),
    }


@KINDS
def test_every_kind_of_tile(device, rng, x_shape, w_shape, padding, dtype):
    g = nhwc_geometry(x_shape, w_shape, padding=padding)
    x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    for tile in each_feature_once(rng, g, list(runs.tiles(g, dtype, device.target))):
        y = device.launch(runs.tile_plan(g, dtype, tile), x, w, bias, g.y_shape, "nhwc")
        oracle.assert_within_bound(y, x, w, bias, padding=padding)


@KINDS
def test_every_kind_of_tile_of_wgrad(device, rng, x_shape, w_shape, padding, dtype):
    g = nhwc_geometry(x_shape, w_shape, padding=padding)
    dy, x = gradients(rng, x_shape, w_shape, dtype, {"padding": padding})
    for tile in each_feature_once(rng, g, list(wgrad_runs.tiles(g, dtype, True, device.target, True))):
        dw, dbias = launch(device, wgrad_runs.tile_plan(g, dtype, True, tile), dy, x, w_shape)
        oracle.assert_wgrad_within_bound(dw, dbias, dy, x, padding=padding)


def test_what_is_not_finite_meets_what_it_should(device, rng):
    """Of wgrad, where strips share columns of dy and slabs share rows of x."""
    padding, w_shape = ((1, 1), (1, 0)), (3, 1, 3, 2)
    for width in (8, 13, 37):
        dy, x = gradients(rng, (2, 3, 9, width), w_shape, "float16", {"padding": padding})
        x[0, 0, -1, -1] = np.inf
        x[1, 1, 0, 0] = np.nan
        x[1, 1, 4, width - 2] = -np.inf
        dy[1, 2, 0, -1] = np.inf
        expected = oracle.wgrad(dy, x, w_shape, padding=padding)
        assert np.isnan(expected[0]).any()
        g = nhwc_geometry(x.shape, w_shape, padding=padding)
        tiles = wgrad_runs.tiles(g, "float16", True, device.target, True)
        kinds = {(t.columns, t.slab_rows < g.P): t for t in tiles if t.columns in (1, 3, 5)}
        for tile in kinds.values():
            chosen = wgrad_runs.tile_plan(g, "float16", True, tile)
            for exact, result in zip(expected, launch(device, chosen, dy, x, w_shape), strict=True):
                result = result.astype(np.float64)
                np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
                np.testing.assert_array_equal(result[~np.isfinite(exact)], exact[~np.isfinite(exact)])
