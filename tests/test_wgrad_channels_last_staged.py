"""Gradients of the weights and the bias of channels-last arrays through shared memory: every kind of tile, every rule."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from geometries import EVERYWHERE, numbers_of, random_dy
from test_wgrad_channels_last import gradients, launch, nhwc_geometry

from cuconv.plan import wgrad_channels_last_staged as staged

KINDS = pytest.mark.parametrize(
    ("x_shape", "w_shape", "numbers", "dtype"),
    [
        ((5, 20, 14, 14), (20, 1, 3, 3), {"padding": ((1, 1), (1, 1))}, "float16"),
        ((3, 96, 9, 11), (96, 1, 3, 3), {"padding": ((1, 1), (1, 1))}, "float32"),
        ((5, 8, 37, 22), (8, 1, 2, 3), {"padding": ((1, 0), (2, 1)), "stride": (2, 2)}, "bfloat16"),
        ((2, 6, 40, 31), (6, 1, 3, 2), {"padding": ((2, 2), (0, 3)), "dilation": (2, 3)}, "float32"),
        ((3, 16, 17, 9), (16, 1, 5, 5), {"padding": ((2, 2), (2, 2))}, "bfloat16"),
        ((3, 7, 9, 19), (7, 1, 3, 4), {"padding": ((1, 1), (3, 2))}, "float16"),
        ((2, 6, 11, 17), (6, 1, 3, 3), {"padding": ((1, 0), (1, 2)), "stride": (2, 2)}, "bfloat16"),
        ((3, 16, 7, 8), (16, 1, 7, 5), {"padding": ((3, 3), (2, 2))}, "float32"),
    ],
    ids=["3x3_small", "channels_apart", "strided", "dilated", "5x5", "odd", "runs_strided", "7x5"],
)


def each_feature_once(g, tiles):
    """Of the tiles, as many as it takes to see every kind of strip, block and slab."""
    seen = set()
    for tile in tiles:
        items = staged._column_items(g, tile)
        strip_rows, rows = staged._rows(g, tile)
        features = {
            ("vector", tile.vector),
            ("stages", tile.stages),
            ("columns", tile.columns),
            ("beyond", g.Q % (tile.columns * tile.spacing[1]) > 0),
            ("strips", tile.strips > 1, tile.strips < items, items % tile.strips > 0),
            ("images", tile.images > 1, g.N % tile.images > 0),
            ("channels", tile.channels < g.K, g.K % tile.channels > 0),
            ("idle", tile.threads > tile.groups * tile.strips * tile.images),
            ("skip", tile.skip, tile.runs),
            ("columns of runs", tile.columns, tile.strips, tile.runs),
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
    tiles = list(staged.tiles(g, dtype, True, device.target, aligned=True))
    # In an order of no meaning, so that a tile shows many features that no one before it has shown.
    for tile in each_feature_once(g, [tiles[i] for i in rng.permutation(len(tiles))]):
        chosen = staged.tile_plan(g, dtype, True, tile)
        dw, dbias = launch(device, chosen, dy, x, w_shape)
        oracle.assert_wgrad_within_bound(dw, dbias, dy, x, **numbers)
