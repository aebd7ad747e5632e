"""Tiles of every kind of every family, on arrays so small that the plan would choose few of them.

g++ takes most of the time, once for every tile: hence not every geometry in every dtype, and no products of kinds.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product

import numpy as np
import oracle
import pytest
from geometries import numbers_of, random_dy

from cuconv import errors, kernels
from cuconv.geometry import depthwise_geometry
from cuconv.plan import (
    channels_last,
    channels_last_mma,
    channels_last_planes,
    channels_last_staged,
    images,
    phases,
    runs,
    tiles,
    toeplitz,
    wgrad,
    wgrad_diagonals,
    wgrad_pairs,
    wgrad_phases,
)


def each_kind_once(choices, kinds_of):
    """Of the tiles, few that together are of every kind; kinds_of(tile) names those that a tile is of."""
    kinds = [(tile, set(kinds_of(tile))) for tile in choices]
    unseen = set().union(*(of_tile for _, of_tile in kinds))
    while unseen:
        tile, of_tile = max(kinds, key=lambda pair: len(pair[1] & unseen))
        unseen -= of_tile
        yield tile


def fields(tile, *names):
    return {(name, getattr(tile, name)) for name in names}


@pytest.mark.parametrize(
    ("dtype", "x_shape", "w_shape", "numbers"),
    [
        ("float32", (17, 90, 7, 6), (90, 1, 3, 3), {"padding": 1}),
        ("bfloat16", (3, 4, 37, 22), (8, 1, 3, 2), {"padding": ((1, 0), (2, 1)), "stride": (2, 1)}),
        ("float64", (2, 3, 40, 31), (3, 1, 2, 3), {"padding": 2, "dilation": (2, 3)}),
        ("bfloat16", (3, 4, 23, 33), (4, 1, 3, 3), {"padding": ((5, 4), (3, 8)), "dilation": 4}),
        ("float32", (3, 4, 23, 32), (8, 1, 3, 3), {"stride": (2, 1), "padding": ((5, 4), (4, 0)), "dilation": (3, 4)}),
    ],
    ids=["small_planes", "strided", "dilated", "pairs", "pairs_strided"],
)
def test_runs(device, rng, dtype, x_shape, w_shape, numbers):
    """Pieces of planes and several planes; blocks that go through images in turn, two of them under way at once."""
    g = depthwise_geometry(x_shape, w_shape, **numbers)
    x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, dtype)
    choices = [
        tile
        for patch in runs.patches(g, dtype, aligned=True)
        for tile in runs.tiles(g, dtype, patch, device.target.shared_per_block // 2)
    ]

    def kinds(tile):
        patch = tile.patch
        yield "planes", tile.block_planes > 1, g.K % tile.block_planes > 0
        yield "images", tile.block_images, tile.block_planes > 1
        yield "rows", tile.block_rows < g.P, g.P % tile.block_rows > 0
        yield "patch", patch.whole_rows, patch.vector, patch.out_vector
        yield "pairs", patch.paired and patch.columns
        yield "padding", patch.whole_rows, patch.whole_columns

    chosen = list(each_kind_once(choices, kinds))
    assert {tile.block_images for tile in chosen} == {1, 2, 4} & {n for n in (1, 2, 4) if n <= g.N}
    for tile in chosen:
        y = device.launch(runs.tile_plan(g, dtype, tile), x, w, bias, g.y_shape)
        oracle.assert_within_bound(y, x, w, bias, **numbers_of(g))


@pytest.mark.parametrize(
    ("dtype", "x_shape", "w_shape", "numbers"),
    [
        ("float32", (5, 7, 14, 14), (7, 1, 3, 3), {"stride": (2, 2), "padding": ((1, 1), (1, 1))}),
        ("bfloat16", (4, 3, 37, 22), (6, 1, 2, 3), {"stride": (2, 1), "padding": ((1, 0), (2, 1))}),
        ("float32", (4, 3, 25, 32), (9, 1, 3, 2), {"stride": (1, 3), "padding": ((2, 2), (0, 3))}),
        ("bfloat16", (3, 2, 40, 24), (2, 1, 4, 4), {"stride": (4, 4)}),
    ],
    ids=["spread", "spread_and_summed", "summed", "covered_once"],
)
def test_runs_of_dgrad(device, rng, dtype, x_shape, w_shape, numbers):
    """Parts of planes, several planes, several images in turn, of a dy that is spread, summed or both."""
    g = depthwise_geometry(x_shape, w_shape, **numbers)
    dy, w = (rng.standard_normal(shape).astype(oracle.DTYPES[dtype]) for shape in (g.y_shape, w_shape))
    as_forward, spread = runs.dgrad_as_forward(g)
    choices = [
        tile
        for patch in runs.patches(as_forward, dtype, True, spread)
        for tile in runs.tiles(as_forward, dtype, patch, device.target.shared_per_block // 2)
    ]

    def kinds(tile):
        patch = tile.patch
        yield patch.whole_rows, tile.block_planes > 1, tile.block_rows < g.H, tile.stages
        yield "padding", patch.whole_rows, patch.whole_columns

    chosen = list(each_kind_once(choices, kinds))
    assert len(chosen) >= 6
    for tile in chosen:
        dx = device.launch(runs.tile_plan(as_forward, dtype, tile, turned=True), dy, w, None, x_shape)
        oracle.assert_dgrad_within_bound(dx, dy, w, **numbers_of(g))


@pytest.mark.parametrize("whole", list(product((False, True), repeat=2)), ids=str)
def test_runs_with_infinite_weights(device, rng, whole):
    """Taps that are known to fall into the padding are passed over only while weights are finite."""
    g = depthwise_geometry((2, 5, 6, 7), (10, 1, 3, 5), padding=((1, 2), (2, 1)))
    x, w, bias = oracle.random_arrays(rng, g.x_shape, g.w_shape, "float32")
    w[1, 0, 0, 2], w[3, 0, 2, 0], w[4, 0, 1, 4], w[8, 0, 2, 4] = np.inf, -np.inf, np.nan, np.inf
    exact = oracle.convolve(x, w, bias, **numbers_of(g))
    tile = next(
        tile
        for patch in runs.patches(g, "float32", aligned=True)
        for tile in runs.tiles(g, "float32", patch, device.target.shared_per_block // 2)
        if (patch.whole_rows, patch.whole_columns) == whole
    )
    y = device.launch(runs.tile_plan(g, "float32", tile), x, w, bias, g.y_shape)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(y), kind(exact))
    finite = np.isfinite(exact)
    np.testing.assert_allclose(y[finite], exact[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "x_shape", "w_shape", "numbers"),
    [
        ("float32", (3, 20, 14, 14), (20, 1, 3, 3), {"padding": ((1, 1), (1, 1))}),
        ("bfloat16", (5, 2, 37, 22), (4, 1, 2, 3), {"padding": ((1, 0), (2, 1)), "stride": (2, 1)}),
        ("float32", (2, 3, 40, 31), (3, 1, 3, 2), {"padding": ((2, 2), (0, 3)), "dilation": (2, 3)}),
        ("bfloat16", (6, 3, 21, 33), (3, 1, 3, 3), {"padding": ((1, 2), (1, 2))}),
        ("float16", (3, 2, 19, 41), (2, 1, 3, 4), {"padding": (1, 0), "stride": (1, 2)}),
    ],
    ids=["small_planes", "strided", "dilated", "odd_rows", "odd_rows_strided"],
)
def test_runs_of_wgrad(device, rng, dtype, x_shape, w_shape, numbers):
    """Units of rows and of planes, few and many slabs, all stages, patches that end where dy does and that do not."""
    g = depthwise_geometry(x_shape, w_shape, **numbers)
    dy, x = random_dy(rng, g, dtype), oracle.random_arrays(rng, x_shape, w_shape, dtype)[0]

    def kinds(tile):
        patch = tile.patch
        yield "beyond rows", g.P % (patch.rows * patch.spacing[0]) > 0
        yield "beyond columns", g.Q % (patch.columns * patch.spacing[1]) > 0
        yield "last unit shorter", g.P % tile.block_rows > 0, patch.rows > 1
        yield "vectors", patch.vector, patch.out_vector, patch.whole_rows
        yield "planes", tile.block_planes > 1, g.K % tile.block_planes > 0
        yield "stages", tile.stages, tile.slabs > g.N
        yield "slabs", tile.slabs > 1, blocks_of_cluster(wgrad.tile_plan(g, dtype, True, device.target, tile))

    for tile in each_kind_once(wgrad.tiles_of_runs(g, dtype, True, device.target, aligned=True), kinds):
        check_wgrad(device, g, wgrad.tile_plan(g, dtype, True, device.target, tile), dy, x)


def blocks_of_cluster(chosen):
    return dict(chosen.sums.defines)["CLUSTER"]


def check_wgrad(device, g, chosen, dy, x, layout="nchw"):
    """Launch the plans of gradients of weights and bias, into poisoned results and a poisoned workspace."""
    dw, dbias = (device.guarded(shape, x.dtype)[0] for shape in (g.w_shape, g.w_shape[:1]))
    workspace = device.array(np.full(max(1, chosen.workspace_bytes), 0xFF, np.uint8))
    given = device.array(dy, layout), device.array(x, layout), workspace, dw, dbias
    kernels.load(chosen.sums, 0)(*(array.data.ptr for array in given))
    if chosen.reduce is not None:
        kernels.load(chosen.reduce, 0)(*(array.data.ptr for array in given[2:]))
    oracle.assert_wgrad_within_bound(device.host(dw), device.host(dbias), dy, x, **numbers_of(g))


@pytest.mark.parametrize("variant", ["runs", "diagonals", "phases", "channels_last_planes"])
def test_clusters_of_wgrad_with_infinities(device, rng, variant):
    """A block that does its work over meets the others of its cluster as they meet it."""
    planes = variant == "channels_last_planes"
    dilation = 2 if variant == "phases" else 1
    shape = (6, 8, 13, 14)
    g = depthwise_geometry(shape, (8, 1, 3, 3), padding=dilation, dilation=dilation, channels_last=planes)
    dy, x = random_dy(rng, g, "float16"), oracle.random_arrays(rng, g.x_shape, g.w_shape, "float16")[0]
    x[1, 2, 5, 0], dy[5, 4, 0, 13] = np.inf, np.nan
    if variant == "runs":
        choices = wgrad.tiles_of_runs(g, "float16", True, device.target, aligned=True)
        plans = [wgrad.tile_plan(g, "float16", True, device.target, tile) for tile in choices]
    elif variant == "phases":
        choices = wgrad_phases.tiles(g, "float16", True, device.target)
        plans = [wgrad_phases.tile_plan(g, "float16", True, device.target, tile) for tile in choices]
    elif planes:
        choices = channels_last_planes.wgrad_tiles(g, "float16", True, device.target)
        plans = [channels_last_planes.wgrad_tile_plan(g, "float16", True, device.target, tile) for tile in choices]
    else:
        choices = wgrad_diagonals.tiles(g, True, device.target)
        plans = [wgrad_diagonals.tile_plan(g, "float16", True, device.target, tile) for tile in choices]
    chosen = next(plan for plan in plans if blocks_of_cluster(plan) > 2)
    dw, dbias = (device.guarded(shape, x.dtype)[0] for shape in (g.w_shape, g.w_shape[:1]))
    layout = "nhwc" if planes else "nchw"
    given = device.array(dy, layout), device.array(x, layout), device.array(np.zeros(1, np.uint8)), dw, dbias
    kernels.load(chosen.sums, 0)(*(array.data.ptr for array in given))
    for exact, result in zip(oracle.wgrad(dy, x, g.w_shape, **numbers_of(g)), (dw, dbias), strict=True):
        result, finite = device.host(result), np.isfinite(exact)
        assert 0 < finite.sum() < exact.size
        np.testing.assert_array_equal(np.isfinite(result), finite)
        np.testing.assert_array_equal(result[~finite], exact[~finite])


# Rows that begin in the midst of a word and rows that do not, in planes that do and do not; of 11 images the last turns
# are not whole.
DILATED = [
    ("bfloat16", (11, 3, 13, 17), {"padding": (6, 4), "dilation": (6, 4)}),
    ("float16", (11, 3, 9, 12), {"padding": ((3, 3), (0, 4)), "dilation": (3, 2)}),
    ("float32", (11, 3, 8, 9), {"padding": ((2, 2), (6, 0)), "dilation": (2, 3)}),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("dtype", "shape", "numbers"), DILATED)
def test_phases(device, rng, turned, dtype, shape, numbers):
    """Every number of planes at a time, of stages and of turns, a phase a thread and several; with infinities and NaN,
    in weights too, whose products with the padding are to be seen."""
    g = depthwise_geometry(shape, (shape[1], 1, 3, 3), **numbers)
    x, w, bias = oracle.random_arrays(rng, shape, g.w_shape, dtype)
    of_tile = runs.dense_dgrad_as_forward(g) if turned else g
    infinite = [array.copy() for array in (x, w)]
    infinite[0][0, 0, 3, 3], infinite[0][-1, 1, 0, 0], infinite[0][2, 2, -1, -1] = np.inf, -np.inf, np.nan
    infinite[1][0, 0, 0, 1], infinite[1][2, 0, 2, 2] = np.inf, np.nan

    def kinds(tile):
        yield from fields(tile, "planes", "stages", "block_images")
        yield "threads", tile.planes, tile.threads

    chosen = list(each_kind_once(phases.tiles(of_tile, dtype, device.target), kinds))
    assert {tile.stages for tile in chosen} == set(phases._STAGES)
    for tile in chosen:
        kernel = phases.tile_plan(of_tile, dtype, device.target, tile, turned)
        for x_of, w_of in ((x, w), infinite):
            if turned:
                dx = device.launch(kernel, x_of, w_of, None, g.x_shape)
                assert errors.dgrad_error(dx, x_of, w_of, g) <= 1
            else:
                y = device.launch(kernel, x_of, w_of, bias, g.y_shape)
                assert errors.forward_error(y, x_of, w_of, bias, g) <= 1


@pytest.mark.parametrize(("dtype", "shape", "numbers"), DILATED)
def test_phases_of_wgrad(device, rng, dtype, shape, numbers):
    """Likewise, and slabs by themselves and in clusters."""
    g = depthwise_geometry(shape, (shape[1], 1, 3, 3), **numbers)
    dy, x = random_dy(rng, g, dtype), oracle.random_arrays(rng, shape, g.w_shape, dtype)[0]
    # So few multiprocessors that some slabs are no cluster.
    target = replace(device.target, multiprocessors=3)

    def kinds(tile):
        yield from fields(tile, "planes", "stages")
        yield "threads", tile.planes, tile.threads
        yield "slabs", tile.slabs > 1, tile.clustered(g, target)

    chosen = list(each_kind_once(wgrad_phases.tiles(g, dtype, True, target), kinds))
    assert {tile.clustered(g, target) for tile in chosen} == {False, True}
    for tile in chosen:
        check_wgrad(device, g, wgrad_phases.tile_plan(g, dtype, True, target, tile), dy, x)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_channels_last_planes(device, rng, turned, dtype):
    """Every number of warps, stages and images, channels that fill no warp; infinities and NaN, in weights too."""
    x, w, bias = oracle.random_arrays(rng, (11, 72, 5, 6), (72, 1, 4, 3), dtype)
    g = depthwise_geometry(x.shape, w.shape, padding=((1, 2), (2, 0)), channels_last=True)
    of_tile = runs.dense_dgrad_as_forward(g) if turned else g
    infinite = [array.copy() for array in (x, w)]
    infinite[0][0, 0, 3, 3], infinite[0][-1, 33, 0, 0], infinite[0][2, 71, -1, -1] = np.inf, -np.inf, np.nan
    infinite[1][0, 0, 0, 1], infinite[1][40, 0, 2, 2] = np.inf, np.nan
    choices = channels_last_planes.tiles(of_tile, dtype, device.target)
    for tile in each_kind_once(choices, lambda tile: fields(tile, "warps", "stages", "unit_images")):
        kernel = channels_last_planes.tile_plan(of_tile, dtype, device.target, tile, turned)
        for x_of, w_of in ((x, w), infinite):
            if turned:
                dx = device.launch(kernel, x_of, w_of, None, g.x_shape, "nhwc")
                assert errors.dgrad_error(dx, x_of, w_of, g) <= 1
            else:
                y = device.launch(kernel, x_of, w_of, bias, g.y_shape, "nhwc")
                assert errors.forward_error(y, x_of, w_of, bias, g) <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_channels_last_planes_of_wgrad(device, rng, dtype):
    """Likewise, and slabs by themselves and in clusters."""
    g = depthwise_geometry((11, 72, 5, 6), (72, 1, 4, 3), padding=((1, 2), (2, 0)), channels_last=True)
    dy, x = random_dy(rng, g, dtype), oracle.random_arrays(rng, g.x_shape, g.w_shape, dtype)[0]
    target = replace(device.target, multiprocessors=10)

    def plan_of(tile):
        return channels_last_planes.wgrad_tile_plan(g, dtype, True, target, tile)

    def kinds(tile):
        yield from fields(tile, "warps", "stages")
        yield "slabs", tile.slabs > 1, blocks_of_cluster(plan_of(tile)) > 1

    chosen = list(each_kind_once(channels_last_planes.wgrad_tiles(g, dtype, True, target), kinds))
    assert {blocks_of_cluster(plan_of(tile)) > 1 for tile in chosen} == {False, True}
    for tile in chosen:
        check_wgrad(device, g, plan_of(tile), dy, x, "nhwc")


@pytest.mark.parametrize(
    ("dtype", "x_shape", "w_shape", "numbers"),
    [
        ("float16", (9, 24, 7, 7), (24, 1, 5, 5), {"padding": 2}),
        ("bfloat16", (7, 6, 14, 28), (6, 1, 3, 5), {"padding": (1, 2)}),
        ("float16", (3, 2, 34, 20), (2, 1, 27, 3), {"padding": (13, 1)}),
        ("bfloat16", (3, 8, 11, 13), (8, 1, 2, 2), {"padding": ((0, 1), (1, 2)), "stride": (2, 1)}),
    ],
    ids=["small_planes", "planes", "large_kernel", "odd_planes"],
)
def test_diagonals(device, rng, dtype, x_shape, w_shape, numbers):
    """Planes and images that do not fill a block, parts of rows with and without work, groups of kernel rows, slabs."""
    g = depthwise_geometry(x_shape, w_shape, **numbers)
    dy, x = random_dy(rng, g, dtype), oracle.random_arrays(rng, x_shape, w_shape, dtype)[0]

    def kinds(tile):
        yield "planes", min(tile.planes, 2), g.K % tile.planes > 0
        yield "images", tile.images, g.N % tile.images > 0
        yield "groups", tile.row_groups
        yield "warps", min(tile.parts, 3), tile.planes > 1
        yield "slabs", tile.slabs > 1, blocks_of_cluster(wgrad_diagonals.tile_plan(g, dtype, True, device.target, tile))

    for tile in each_kind_once(wgrad_diagonals.tiles(g, True, device.target), kinds):
        check_wgrad(device, g, wgrad_diagonals.tile_plan(g, dtype, True, device.target, tile), dy, x)


@pytest.mark.parametrize(
    ("dtype", "x_shape", "w_shape", "numbers"),
    [
        ("float16", (35, 24, 7, 7), (24, 1, 5, 5), {"padding": 2}),
        ("bfloat16", (70, 6, 14, 14), (6, 1, 3, 3), {"padding": 1}),
        ("float16", (17, 8, 9, 5), (8, 1, 2, 6), {"padding": ((1, 0), (0, 5))}),
    ],
    ids=["7x7", "14x14", "asymmetric"],
)
def test_pairs(device, rng, dtype, x_shape, w_shape, numbers):
    """Warps with a whole plane and with parts of it, planes that fill no block, one step of images and two, slabs."""
    g = depthwise_geometry(x_shape, w_shape, **numbers)
    dy, x = random_dy(rng, g, dtype), oracle.random_arrays(rng, x_shape, w_shape, dtype)[0]
    kinds = ((7, 4, 16, 1), (7, 1, 32, 2), (4, 2, 32, 1), (3, 1, 16, 3), (2, 5, 16, 2), (1, 1, 16, 1))
    for chunks, planes, together, slabs in kinds:
        slabs = min(slabs, -(-g.N // together))
        tile = wgrad_pairs.make_tile(g, True, chunks, planes, together, slabs)
        if tile.fits(g, device.target):
            check_wgrad(device, g, wgrad_pairs.tile_plan(g, dtype, True, tile), dy, x)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "numbers"),
    [
        ((11, 9, 13, 12), (9, 1, 3, 3), {"padding": 1}),
        ((3, 4, 40, 15), (8, 1, 12, 4), {"padding": (5, 2), "stride": (2, 1)}),
    ],
    ids=["bands_held", "rows_held"],
)
def test_toeplitz(device, rng, x_shape, w_shape, numbers):
    """Every choice of every part of a tile, each at least once."""
    g = depthwise_geometry(x_shape, w_shape, **numbers)
    x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, "float16")
    parts = ("rows", "block_rows", "block_planes", "block_images", "block_turns", "warps")
    choices = toeplitz.tiles(g, aligned=True, budget=device.target.shared_per_block // 2)
    chosen = list(each_kind_once(choices, lambda tile: fields(tile, *parts)))
    assert all(len({getattr(tile, part) for tile in chosen}) > 1 for part in parts)
    for tile in chosen:
        y = device.launch(toeplitz.tile_plan(g, "float16", tile), x, w, bias, g.y_shape)
        oracle.assert_within_bound(y, x, w, bias, **numbers_of(g))


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "numbers"),
    [
        ((50, 8, 12, 10), (8, 1, 3, 2), {"padding": ((1, 0), (2, 1)), "stride": (2, 1)}),
        ((35, 3, 16, 16), (3, 1, 5, 3), {"padding": (2, 1)}),
    ],
    ids=["groups_apart", "groups_alike"],
)
def test_images(device, rng, x_shape, w_shape, numbers):
    """Every number of planes, stages and tiles a group, alike and not; blocks that go from planes to planes."""
    g = depthwise_geometry(x_shape, w_shape, **numbers)
    x, w, bias = oracle.random_arrays(rng, x_shape, w_shape, "float16")
    # So few multiprocessors that a block makes several units.
    target = replace(device.target, multiprocessors=2)

    def kinds(tile):
        yield from fields(tile, "block_planes", "stages", "periodic")
        yield "tiles", len(tile.group.masks)
        yield "rounds", tile.periodic, tile.group.count > tile.warps

    chosen = list(each_kind_once(images.tiles(g, target, aligned=True), kinds))
    assert {tile.stages for tile in chosen} == set(images._STAGES)
    for tile in chosen:
        y = device.launch(images.tile_plan(g, "float16", target, tile), x, w, bias, g.y_shape)
        oracle.assert_within_bound(y, x, w, bias, **numbers_of(g))


def test_tiles(device, rng):
    """Every shape of a thread's tile; bands of columns, of rows and of both, several channels, the images of one; every
    other with the kernel turned around, as in dgrad."""
    x, w, bias = oracle.random_arrays(rng, (3, 4, 19, 31), (4, 1, 6, 11), "float32")
    g = depthwise_geometry(x.shape, w.shape, padding=((2, 5), (7, 1)))

    def kinds(tile):
        yield "shape", tile.rows, tile.columns
        yield "loads", tile.chunk, tile.vector
        yield "bands", tile.column_items * tile.columns < g.Q, tile.row_items * tile.rows < g.P, tile.chunk
        yield "planes", min(tile.block_channels, 3), tile.block_planes > 1

    chosen = list(each_kind_once(tiles.tiles(g, "float32", device.target, aligned=True), kinds))
    assert {tile.chunk for tile in chosen} == {4, 8}
    assert {(tile.rows, tile.columns) for tile in chosen} == set(tiles._SHAPES)
    assert max(tile.block_channels for tile in chosen) > 2
    for turned, tile in zip(cycle((False, True)), chosen, strict=False):
        y = device.launch(tiles.tile_plan(g, "float32", tile, turned), x, w, bias, g.y_shape)
        oracle.assert_within_bound(y, x, w[:, :, ::-1, ::-1] if turned else w, bias, **numbers_of(g))


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [((13, 9), "float16"), ((9, 12), "bfloat16"), ((33, 3), "float32"), ((9, 12), "float64")],
)
def test_nan_poisons_its_receptive_field_in_the_largest_of_tiles(device, rng, kernel, dtype):
    """A pixel of NaN in every plane, at another place each."""
    x, w, bias = oracle.random_arrays(rng, (9, 3, 21, 31), (3, 1, *kernel), dtype)
    g = depthwise_geometry(x.shape, w.shape, padding=((kernel[0] - 3, 3), (2, kernel[1] - 2)))
    largest = max(tiles.tiles(g, dtype, device.target, aligned=True), key=lambda t: (t.rows * t.columns, t.chunk))
    chosen = tiles.tile_plan(g, dtype, largest)
    oracle.assert_within_bound(device.launch(chosen, x, w, bias, g.y_shape), x, w, bias, **numbers_of(g))
    for place, plane in enumerate(x.reshape(-1, 21, 31)):
        plane[place * 20 // 26, place * 7 % 31] = np.nan
    expected = np.isnan(oracle.convolve(x, w, **numbers_of(g)))
    np.testing.assert_array_equal(np.isnan(device.launch(chosen, x, w, bias, g.y_shape)), expected)
    assert 0 < expected.sum() < expected.size / 2


@pytest.mark.parametrize(
    ("transposed", "dtype", "stride"),
    [(False, "float16", 1), (False, "float32", 2), (True, "float32", 1), (True, "float16", 2)],
)
def test_channels_last(device, rng, transposed, dtype, stride):
    """Every vector, number of columns and depth, patches of few and all rows, and those that load all of x at once."""
    x, w, bias = oracle.random_arrays(rng, (2, 24, 13, 10), (24, 1, 3, 2), dtype)
    padding = ((1, 0), (1, 1))
    g = depthwise_geometry(x.shape, w.shape, stride=stride, padding=padding, channels_last=True)
    dy = random_dy(rng, g, dtype)
    of_tile = channels_last.swapped(g) if transposed else g

    def kinds(tile):
        yield from fields(tile, "vector", "columns", "threads")
        yield tile.at_once, tile.rows if tile.at_once else tile.depth
        yield "rows", min(tile.rows, 2 * stride), tile.rows >= of_tile.P

    choices = list(channels_last.tiles(of_tile, dtype, device.target, True, transposed))
    chosen = list(each_kind_once(choices, kinds))
    assert {tile.vector for tile in chosen} >= {1, 2, 4}
    for tile in chosen:
        kernel = channels_last.tile_plan(of_tile, dtype, tile, transposed)
        if transposed:
            dx = device.launch(kernel, dy, w, None, g.x_shape, "nhwc")
            oracle.assert_dgrad_within_bound(dx, dy, w, **numbers_of(g))
        else:
            y = device.launch(kernel, x, w, bias, g.y_shape, "nhwc")
            oracle.assert_within_bound(y, x, w, bias, **numbers_of(g))


@pytest.mark.parametrize(
    ("turned", "dtype", "kernel", "numbers"),
    [
        (False, "float16", (3, 2), {}),
        (True, "float32", (5, 3), {}),
        (False, "bfloat16", (5, 2), {"stride": (2, 1)}),
        (False, "float32", (4, 3), {"stride": (1, 2)}),
        (True, "float16", (3, 3), {"dilation": (2, 3)}),
    ],
)
def test_channels_last_staged(device, rng, turned, dtype, kernel, numbers):
    """Every vector, number of columns and of stages, one and several strips and images, few and all rows; once with a
    weight that is not finite, whose products with the padding are to be seen."""
    x, w, bias = oracle.random_arrays(rng, (4, 24, 13, 10), (24, 1, *kernel), dtype)
    g = depthwise_geometry(x.shape, w.shape, padding=((1, 2), (1, 1)), channels_last=True, **numbers)
    dy = random_dy(rng, g, dtype)
    of_tile = runs.dense_dgrad_as_forward(g) if turned else g

    def kinds(tile):
        yield from fields(tile, "vector", "columns", "stages", "turns")
        yield "block", tile.strips > 1, tile.images > 1, tile.images == 2, tile.channels < g.K, g.K % tile.channels > 0
        yield "rows", min(tile.rows, 3), tile.rows >= of_tile.P

    choices = list(channels_last_staged.tiles(of_tile, dtype, device.target, True))
    chosen = list(each_kind_once(choices, kinds))
    assert {tile.vector for tile in chosen} == {1, 2, 4}
    infinite = w.copy()
    infinite[::5, 0, 0, 0] = np.inf
    for tile in chosen:
        kernel = channels_last_staged.tile_plan(of_tile, dtype, tile, turned)
        if turned:
            dx = device.launch(kernel, dy, w, None, g.x_shape, "nhwc")
            oracle.assert_dgrad_within_bound(dx, dy, w, **numbers_of(g))
        else:
            y = device.launch(kernel, x, w, bias, g.y_shape, "nhwc")
            oracle.assert_within_bound(y, x, w, bias, **numbers_of(g))
            y = device.launch(kernel, x, infinite, bias, g.y_shape, "nhwc")
            exact = oracle.convolve(x, infinite, bias, **numbers_of(g))
            np.testing.assert_array_equal(np.isnan(y.astype(np.float64)), np.isnan(exact))


@pytest.mark.parametrize(
    ("turned", "dtype", "kernel"),
    [(False, "float16", (3, 2)), (True, "bfloat16", (5, 5)), (False, "bfloat16", (3, 7)), (True, "float16", (2, 10))],
)
def test_channels_last_mma(device, rng, turned, dtype, kernel):
    """Every number of rows between barriers and of stages, one and several blocks of columns, warps of quads and
    images, few and all rows, and infinities and NaN, whose neighbours are to stay as they are."""
    x, w, bias = oracle.random_arrays(rng, (4, 24, 11, 38), (24, 1, *kernel), dtype)
    g = depthwise_geometry(x.shape, w.shape, padding=((1, 2), (1, 1)), channels_last=True)
    dy = random_dy(rng, g, dtype)
    of_tile = runs.dense_dgrad_as_forward(g) if turned else g

    def kinds(tile):
        yield from fields(tile, "batch", "stages", "turns", "images")
        yield "block", tile.quads * 4 < g.Q, tile.warps > tile.groups, tile.channels < g.K, g.K % tile.channels > 0
        yield "rows", min(tile.rows, 3), tile.rows >= of_tile.P

    choices = list(channels_last_mma.tiles(of_tile, device.target))
    chosen = list(each_kind_once(choices, kinds))
    assert {tile.batch for tile in chosen} == {1, 2, 4}
    for array in (x, dy):
        array[0, 1, 3, 3] = array[-1, 8, 0, 0] = np.inf
        array[1, 6, 4, 5] = np.nan
        array[-1, 8, 1, 1] = array[-1, -1, -1, -1] = -np.inf
    for tile in chosen:
        plan_of_tile = channels_last_mma.tile_plan(of_tile, dtype, tile, turned)
        if turned:
            dx = device.launch(plan_of_tile, dy, w, None, g.x_shape, "nhwc")
            assert errors.dgrad_error(dx, dy, w, g) <= 1
        else:
            y = device.launch(plan_of_tile, x, w, bias, g.y_shape, "nhwc")
            assert errors.forward_error(y, x, w, bias, g) <= 1


def test_channels_last_mma_meets_the_padding_with_weights_that_are_not_finite(device, rng):
    """Rows of padding are passed over, and taps beside an infinite one are zeros."""
    x, w, bias = oracle.random_arrays(rng, (2, 16, 7, 9), (16, 1, 5, 5), "float16")
    w[3, 0, 0, 0], w[8, 0, 4, 2], w[9, 0, 2, 4] = np.inf, -np.inf, np.nan
    g = depthwise_geometry(x.shape, w.shape, padding=2, channels_last=True)
    for rows in (2, 7):
        tiles_of_rows = (tile for tile in channels_last_mma.tiles(g, device.target) if tile.rows == rows)
        y = device.launch(channels_last_mma.tile_plan(g, "float16", next(tiles_of_rows)), x, w, bias, g.y_shape, "nhwc")
        assert errors.forward_error(y, x, w, bias, g) <= 1
