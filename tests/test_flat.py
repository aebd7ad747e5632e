"""Planes as they lie in memory: every place of rows in chunks of 16 bytes, every kind of tile, all rules of padding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from backends import forget_kernels
from geometries import numbers_of, random_dy

import cuconv
from cuconv import kernels, plan
from cuconv.geometry import depthwise_geometry
from cuconv.plan import flat, runs, wgrad_flat

# Rows that start at every element of a chunk, at some, and at one; windows of two chunks and of three; kernels of one
# column, of one row, and as wide as windows can be; padding at one side alone.
KINDS = {
    "3x3": ((3, 2, 19, 21), (2, 1, 3, 3), ((1, 1), (1, 1)), "bfloat16"),
    "5x5": ((2, 3, 23, 29), (3, 1, 5, 5), ((2, 2), (2, 2)), "float16"),
    "7x7_even": ((2, 1, 14, 18), (1, 1, 7, 7), ((3, 3), (3, 3)), "float16"),
    "4x2_left": ((5, 2, 9, 31), (2, 1, 4, 2), ((3, 0), (1, 0)), "bfloat16"),
    "2x4_right": ((3, 2, 17, 24), (2, 1, 2, 4), ((0, 1), (0, 3)), "float16"),
    "6x10": ((1, 3, 11, 37), (3, 1, 6, 10), ((1, 4), (7, 2)), "bfloat16"),
    "8x1": ((2, 2, 33, 5), (2, 1, 8, 1), ((4, 3), (0, 0)), "float16"),
    "1x6_narrow": ((4, 3, 40, 6), (3, 1, 1, 6), ((0, 0), (3, 2)), "bfloat16"),
    "wide": ((1, 2, 3, 301), (2, 1, 3, 3), ((1, 1), (1, 1)), "float16"),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def geometry_of(kind):
    x_shape, w_shape, padding, dtype = KINDS[kind]
    return depthwise_geometry(x_shape, w_shape, padding=padding), dtype


def each_feature_once(rng, tiles, features_of):
    """Of the tiles, in an order of no meaning, as many as it takes to see every feature."""
    seen = set()
    for i in rng.permutation(len(tiles)):
        features = features_of(tiles[i])
        if not features <= seen:
            seen |= features
            yield tiles[i]


def forward_features(g):
    def features(tile):
        return {
            ("rows", tile.block_rows < g.H, g.H % tile.block_rows > 0),
            ("images", tile.block_images < g.N, g.N % tile.block_images > 0, tile.block_images > tile.stages),
            ("stages", tile.stages, tile.outputs),
            ("threads", tile.threads),
            ("units", tile.block_rows * g.W < tile.threads * 4),
        }

    return features


def wgrad_features(g):
    def features(tile):
        return {
            ("rows", tile.block_rows < g.H, g.H % tile.block_rows > 0),
            ("stages", tile.stages),
            ("threads", tile.threads),
            ("slabs", tile.slabs > 1, tile.slabs > 8),
        }

    return features


@EACH
def test_every_kind_of_tile(device, rng, kind):
    g, dtype = geometry_of(kind)
    x, w, bias = oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype)
    for tile in each_feature_once(rng, list(flat.tiles(g, device.target)), forward_features(g)):
        y = device.launch(flat.tile_plan(g, dtype, tile), x, w, bias, g.y_shape)
        oracle.assert_within_bound(y, x, w, bias, padding=g.padding)


@EACH
def test_every_kind_of_tile_of_dgrad(device, rng, kind):
    g, dtype = geometry_of(kind)
    turned = runs.dense_dgrad_as_forward(g)
    _, w, _ = oracle.random_arrays(rng, (1,), g.w_shape, dtype)
    dy = random_dy(rng, g, dtype)
    tiles = list(each_feature_once(rng, list(flat.tiles(turned, device.target)), forward_features(turned)))
    for tile in tiles[:3]:
        dx = device.launch(flat.tile_plan(turned, dtype, tile, turned=True), dy, w, None, g.x_shape)
        oracle.assert_dgrad_within_bound(dx, dy, w, padding=g.padding)


def launch_wgrad(device, chosen, dy, x, w_shape):
    """dw and dbias of a plan, all that it writes to poisoned before."""
    (dw, dw_guards), (dbias, dbias_guards) = (device.guarded(shape, x.dtype) for shape in (w_shape, w_shape[:1]))
    workspace = device.array(np.full(max(1, chosen.workspace_bytes), 0xFF, np.uint8))
    given = device.array(dy), device.array(x), workspace, dw, dbias
    kernels.load(chosen.sums, 0)(*(array.data.ptr for array in given))
    if chosen.reduce is not None:
        kernels.load(chosen.reduce, 0)(*(array.data.ptr for array in given[2:]))
    dw_guards.assert_untouched()
    dbias_guards.assert_untouched()
    return device.host(dw), device.host(dbias)


@EACH
def test_every_kind_of_tile_of_wgrad(device, rng, kind):
    g, dtype = geometry_of(kind)
    x, _, _ = oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype)
    dy = random_dy(rng, g, dtype)
    for tile in each_feature_once(rng, list(wgrad_flat.tiles(g, True, device.target)), wgrad_features(g)):
        chosen = wgrad_flat.tile_plan(g, dtype, True, device.target, tile)
        dw, dbias = launch_wgrad(device, chosen, dy, x, g.w_shape)
        oracle.assert_wgrad_within_bound(dw, dbias, dy, x, padding=g.padding)


@pytest.mark.parametrize("kind", ["3x3", "5x5", "6x10"])
def test_finite_data_are_made_by_products_alone(device, rng, monkeypatch, kind):
    """Whatever windows reach beyond the rows is finite: nothing is made again, tap by tap."""
    never = {
        "depthwise_flat.cu": (
            "__syncthreads_or(sum_seen != sum_seen)",
            "__syncthreads_or(false && sum_seen != sum_seen)",
        ),
        "depthwise_wgrad_flat.cu": ("__syncthreads_or(seen != seen)", "__syncthreads_or(false && seen != seen)"),
    }
    read = kernels._read

    def read_without(name):
        text = read(name)
        if name not in never:
            return text
        assert text.count(never[name][0]) == 1
        return text.replace(*never[name])

    monkeypatch.setattr(kernels, "_read", read_without)
    forget_kernels()
    g, dtype = geometry_of(kind)
    x, w, bias = oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype)
    dy = random_dy(rng, g, dtype)
    for tile in each_feature_once(rng, list(flat.tiles(g, device.target)), forward_features(g)):
        y = device.launch(flat.tile_plan(g, dtype, tile), x, w, bias, g.y_shape)
        oracle.assert_within_bound(y, x, w, bias, padding=g.padding)
    for tile in each_feature_once(rng, list(wgrad_flat.tiles(g, True, device.target)), wgrad_features(g)):
        chosen = wgrad_flat.tile_plan(g, dtype, True, device.target, tile)
        dw, dbias = launch_wgrad(device, chosen, dy, x, g.w_shape)
        oracle.assert_wgrad_within_bound(dw, dbias, dy, x, padding=g.padding)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_width(device, rng, dtype):
    """Rows start at every element of a chunk, and a plane's last rows and columns in every part of a product."""
    for width in (3, 4, 7, 8, 9, 15, 16, 17, 22, 31, 57, 64, 127, 130):
        g = depthwise_geometry((2, 3, 7, width), (3, 1, 3, 3), padding=1)
        x, w, bias = oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype)
        dy = random_dy(rng, g, dtype)
        given = device.array(x), device.array(w), device.array(dy)
        with plan.variant("flat"):
            y = cuconv.depthwise_conv2d(given[0], given[1], device.array(bias), padding=1)
            dx = cuconv.depthwise_conv2d_dgrad(given[2], given[1], g.x_shape, padding=1)
            dw, dbias = cuconv.depthwise_conv2d_wgrad(given[2], given[0], g.w_shape, bias=True, padding=1)
        oracle.assert_within_bound(device.host(y), x, w, bias, padding=g.padding)
        oracle.assert_dgrad_within_bound(device.host(dx), dy, w, padding=g.padding)
        oracle.assert_wgrad_within_bound(device.host(dw), device.host(dbias), dy, x, padding=g.padding)


def same_kinds_of_numbers(result, exact):
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(result.astype(np.float64)), kind(exact))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 1, 8, -1), (1, 0, -1, 0), (0, 1, -1, -1), (1, 1, 5, 9)])
def test_what_is_not_finite_meets_what_it_should(device, rng, place, value):
    """An element at the end of a row meets nothing of the next row, which lies beside it."""
    g = depthwise_geometry((2, 2, 13, 19), (2, 1, 3, 3), padding=1)
    x, w, _ = oracle.random_arrays(rng, g.x_shape, g.w_shape, "bfloat16")
    dy = random_dy(rng, g, "bfloat16")
    bad_x, bad_dy = x.copy(), dy.copy()
    bad_x[place] = bad_dy[place] = value
    exact_y = oracle.convolve(bad_x, w, **numbers_of(g))
    exact_dx = oracle.dgrad(bad_dy, w, g.x_shape, **numbers_of(g))
    with plan.variant("flat"):
        y = cuconv.depthwise_conv2d(device.array(bad_x), device.array(w), padding=1)
        dx = cuconv.depthwise_conv2d_dgrad(device.array(bad_dy), device.array(w), g.x_shape, padding=1)
        of_x, of_dy = (
            cuconv.depthwise_conv2d_wgrad(device.array(a), device.array(b), g.w_shape, bias=True, padding=1)
            for a, b in ((dy, bad_x), (bad_dy, x))
        )
    same_kinds_of_numbers(device.host(y), exact_y)
    same_kinds_of_numbers(device.host(dx), exact_dx)
    assert np.isfinite(exact_y).any()
    for results, exact in (
        (of_x, oracle.wgrad(dy, bad_x, g.w_shape, **numbers_of(g))),
        (of_dy, oracle.wgrad(bad_dy, x, g.w_shape, **numbers_of(g))),
    ):
        for result, expected in zip(results, exact, strict=True):
            same_kinds_of_numbers(device.host(result), expected)


def test_padding_takes_part_as_a_zero(device):
    x, w = np.ones((1, 2, 9, 17), np.float16), np.ones((2, 1, 3, 3), np.float16)
    w[1, 0, 0, 0] = np.inf
    with plan.variant("flat"):
        y = device.host(cuconv.depthwise_conv2d(device.array(x), device.array(w), padding=1))
    expected = np.full((9, 17), np.inf)
    expected[0] = expected[:, 0] = np.nan
    np.testing.assert_array_equal(y[0, 1], expected)
    assert np.isfinite(y[0, 0]).all()


def test_same_bits_every_time(device, rng):
    dy, x = (device.array(rng.standard_normal((9, 5, 33, 35)).astype(np.float16)) for _ in range(2))
    w = device.array(rng.standard_normal((5, 1, 3, 3)).astype(np.float16))

    def bits():
        y = cuconv.depthwise_conv2d(x, w, padding=1)
        gradients = cuconv.depthwise_conv2d_wgrad(dy, x, w.shape, padding=1, bias=True)
        return np.concatenate([device.host(one).ravel() for one in (y, *gradients)]).view(np.uint16)

    with plan.variant("flat"):
        first = bits()
        for _ in range(device.repeats):
            np.testing.assert_array_equal(bits(), first)


@pytest.mark.parametrize("call", ["forward", "dgrad", "wgrad"])
def test_refuses_what_it_does_not_take(device, call):
    def refused(match, g, dtype="float16", aligned=True):
        bias = (True,) if call == "wgrad" else ()
        with pytest.raises(plan.Unsuitable, match=rf"variant flat: .*{match}"):
            getattr(plan, f"depthwise_{call}")(g, dtype, *bias, device.target, "flat", aligned)

    same = depthwise_geometry((2, 3, 9, 11), (3, 1, 3, 3), padding=1)
    refused("float16 and bfloat16.*float32", same, "float32")
    refused("multiples of 16 bytes", same, aligned=False)
    refused(r"\(N, C, H, W\)", replace(same, channels_last=True))
    refused("7 x 9 of 9 x 11", depthwise_geometry((2, 3, 9, 11), (3, 1, 3, 3)))
    refused("stride 1", depthwise_geometry((2, 3, 9, 11), (3, 1, 3, 3), padding=1, stride=2))
    refused("one output channel", depthwise_geometry((2, 3, 9, 11), (6, 1, 3, 3), padding=1))
    refused("64 taps", depthwise_geometry((2, 3, 9, 11), (3, 1, 9, 9), padding=4))
    refused("10 columns", depthwise_geometry((2, 3, 9, 15), (3, 1, 1, 11), padding=((0, 0), (5, 5))))
    refused("do not fit", depthwise_geometry((1, 1, 3, 70_001), (1, 1, 3, 3), padding=1))
