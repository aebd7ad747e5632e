"""Gradients of the weights and the bias of large kernels: every kind of tile and unit, and every rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from test_wgrad_channels_last import gradients

from cuconv import kernels, plan
from cuconv.geometry import depthwise_geometry
from cuconv.plan import wgrad_tiles

KINDS = {
    "tall": ((5, 2, 9, 17), (2, 1, 33, 2), {"padding": ((16, 16), (1, 0))}, "float32"),
    "wide": ((3, 2, 7, 30), (2, 1, 3, 25), {"padding": ((1, 1), (12, 12))}, "float32"),
    "square": ((2, 2, 14, 14), (2, 1, 13, 13), {"padding": ((6, 6), (6, 6))}, "float32"),
    "uneven": ((4, 2, 20, 11), (4, 1, 11, 7), {"padding": ((9, 2), (1, 6))}, "float16"),
    "no_padding": ((2, 1, 19, 23), (1, 1, 9, 9), {}, "bfloat16"),
    "float64": ((3, 2, 10, 13), (2, 1, 12, 17), {"padding": ((6, 5), (8, 8))}, "float64"),
    # dy has rows that meet nothing but padding, for some tiles of taps or for all.
    "padding_alone": ((2, 1, 3, 5), (1, 1, 9, 8), {"padding": ((12, 7), (9, 4))}, "float32"),
}


def launch(device, chosen, dy, x, w_shape, bias):
    """dw and dbias of a plan, all that it writes to poisoned before."""
    (dw, dw_guards), (dbias, dbias_guards) = (device.guarded(shape, x.dtype) for shape in (w_shape, w_shape[:1]))
    workspace = device.array(np.full(max(1, chosen.workspace_bytes), 0xFF, np.uint8))
    results = workspace.data.ptr, dw.data.ptr, dbias.data.ptr if bias else 0
    given = device.array(dy), device.array(x)
    kernels.load(chosen.sums, 0)(*(array.data.ptr for array in given), *results)
    if chosen.reduce is not None:
        kernels.load(chosen.reduce, 0)(*results)
    dw_guards.assert_untouched()
    dbias_guards.assert_untouched()
    return device.host(dw), device.host(dbias)


def each_feature_once(rng, g, tiles):
    """Of the tiles, in an order of no meaning, as many as it takes to see every feature."""
    seen = set()
    for i in rng.permutation(len(tiles)):
        tile = tiles[i]
        items = tile.images * tile.parts * tile.strips
        features = {
            ("rows", tile.rows),
            ("rounds", tile.rounds > 1, tile.block_units > 1),
            ("tiles", -(-g.R // tile.rows) * wgrad_tiles.chunks_of(g.S)[1] > tile.warps * tile.rounds),
            ("images", tile.images > 1, g.N % tile.images > 0),
            ("parts", tile.parts > 1, tile.parts > g.H),
            ("lanes", items > 32, items % 32 > 0),
            ("slabs", tile.block_units * tile.images >= g.N),
            ("units of rows", tile.unit_rows < g.P, g.P % tile.unit_rows > 0),
        }
        if not features <= seen:
            seen |= features
            yield tile


def all_tiles(rng, g, dtype, target, monkeypatch):
    """Of the device, of one of so few multiprocessors that blocks have several units, and of one that has so little
    shared memory, too, that units are some rows of an image."""
    yield from each_feature_once(rng, g, list(wgrad_tiles.tiles_of(g, dtype, target)))
    monkeypatch.setattr(wgrad_tiles, "_MOST_BLOCKS", 2 * g.K)
    few = replace(target, multiprocessors=1)
    yield from list(each_feature_once(rng, g, list(wgrad_tiles.tiles_of(g, dtype, few))))[:4]
    cut: list[wgrad_tiles.Tile] = []
    for little in range(2**15, 2048, -256):
        device = replace(few, shared_per_block=little, shared_per_multiprocessor=8 * little)
        cut = cut or [tile for tile in wgrad_tiles.tiles_of(g, dtype, device) if tile.unit_rows < g.P]
    assert cut
    yield from list(each_feature_once(rng, g, cut))[:4]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tile(device, rng, monkeypatch, kind):
    x_shape, w_shape, numbers, dtype = KINDS[kind]
    dy, x = gradients(rng, x_shape, w_shape, dtype, numbers)
    g = depthwise_geometry(x_shape, w_shape, **numbers)
    for i, tile in enumerate(all_tiles(rng, g, dtype, device.target, monkeypatch)):
        bias, aligned = i % 2 == 0, i % 3 > 0
        chosen = wgrad_tiles.tile_plan(g, dtype, bias, tile, aligned)
        dw, dbias = launch(device, chosen, dy, x, w_shape, bias)
        oracle.assert_wgrad_within_bound(dw, dbias if bias else None, dy, x, **numbers)


def test_nan_and_infinity_reach_what_they_meet(device, rng):
    """An infinite x meets some taps only; an infinite dy meets the zeros of the padding, rows of them that are passed
    over too. Where dy's rows are no whole steps, the zeros behind them must not meet an infinite x."""
    w_shape, numbers = (4, 1, 9, 8), {"padding": ((4, 4), (5, 2))}
    dy, x = gradients(rng, (3, 4, 11, 13), w_shape, "float32", numbers)
    x[0, 0, -1, -1] = np.inf
    x[1, 1, 0, 0] = np.nan
    dy[1, 2, 0, 5] = np.inf
    dy[2, 3, -1, -1] = -np.inf
    expected = oracle.wgrad(dy, x, w_shape, **numbers)
    assert np.isnan(expected[0][1:]).any(axis=(1, 2, 3)).all()
    g = depthwise_geometry(x.shape, w_shape, **numbers)
    tiles = {(t.rows, t.images > 1): t for t in wgrad_tiles.tiles_of(g, "float32", device.target)}
    for tile in tiles.values():
        results = launch(device, wgrad_tiles.tile_plan(g, "float32", True, tile, True), dy, x, w_shape, True)
        for exact, result in zip(expected, results, strict=True):
            np.testing.assert_array_equal(np.isfinite(result), np.isfinite(exact))
            np.testing.assert_array_equal(result[~np.isfinite(exact)], exact[~np.isfinite(exact)])


def test_what_32_bits_cannot_count_is_refused(device):
    g = depthwise_geometry((2**15, 1, 2**16, 8), (1, 1, 9, 8))
    with pytest.raises(plan.Unsuitable, match=r"variant tiles: takes extents, and rows of dy"):
        plan.depthwise_wgrad(g, "float32", True, device.target, "tiles")
