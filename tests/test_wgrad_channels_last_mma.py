"""Gradients of the weights and the bias of channels-last arrays on tensor cores: every kind of tile and rule."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wgrad_channels_last import gradients, launch, nhwc_geometry

from cuconv import kernels, plan
from cuconv.plan import wgrad_channels_last_mma as mma

KINDS = pytest.mark.parametrize(
    ("x_shape", "w_shape", "numbers", "dtype"),
    [
        ((5, 24, 14, 14), (24, 1, 3, 3), {"padding": ((1, 1), (1, 1))}, "float16"),
        ((19, 40, 7, 7), (40, 1, 5, 5), {"padding": ((2, 2), (2, 2))}, "bfloat16"),
        ((2, 8, 23, 37), (8, 1, 2, 3), {"padding": ((1, 0), (2, 1))}, "bfloat16"),
        ((3, 16, 9, 19), (16, 1, 3, 4), {"padding": ((0, 1), (3, 2))}, "float16"),
        ((3, 8, 8, 9), (8, 1, 4, 6), {"padding": ((5, 4), (1, 7))}, "float16"),
        ((2, 8, 23, 31), (8, 1, 3, 3), {"padding": ((2, 2), (5, 6)), "dilation": (5, 3)}, "bfloat16"),
        ((3, 16, 11, 8), (16, 1, 7, 7), {"padding": ((3, 3), (3, 3))}, "float16"),
        ((3, 8, 6, 21), (8, 1, 1, 1), {}, "float16"),
    ],
    ids=["3x3", "5x5_small", "2x3", "3x4", "4x6", "dilated", "7x7", "1x1"],
)


def each_feature_once(g, tiles):
    """Of the tiles, as many as it takes to see every kind of unit, block and slab."""
    seen = set()
    for tile in tiles:
        strip_rows, rows = mma._rows(g, tile)
        pixels = tile.images * tile.columns
        features = {
            ("units", tile.units, tile.warps > 1),
            ("rest", pixels % mma._UNIT > 0, pixels % (tile.units * mma._UNIT) > mma._UNIT),
            ("stages", tile.stages),
            ("columns", tile.columns < g.Q, g.Q % tile.columns > 0),
            ("images", tile.images, g.N % tile.images > 0),
            ("channels", tile.channels < g.K, g.K % tile.channels > 0, tile.groups % 2),
            ("slab", tile.slab_rows < strip_rows, tile.slab_rows % strip_rows > 0, tile.slab_rows < rows),
            ("last slab", rows % tile.slab_rows > 0),
        }
        if not features <= seen:
            seen |= features
            yield tile


@KINDS
def test_every_kind_of_tile(device, rng, x_shape, w_shape, numbers, dtype):
    dy, x = gradients(rng, x_shape, w_shape, dtype, numbers)
    g = nhwc_geometry(x_shape, w_shape, **numbers)
    tiles = list(mma.tiles(g, dtype, True, device.target))
    # In an order of no meaning, so that a tile shows many features that no one before it has shown.
    for tile in each_feature_once(g, [tiles[i] for i in rng.permutation(len(tiles))]):
        chosen = mma.tile_plan(g, dtype, True, tile)
        dw, dbias = launch(device, chosen, dy, x, w_shape)
        oracle.assert_wgrad_within_bound(dw, dbias, dy, x, **numbers)
