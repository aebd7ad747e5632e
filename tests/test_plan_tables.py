"""Plans choose among tables of tiles: what they choose costs least of all tiles, one by one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from geometries import GEOMETRIES, suits

from cuconv import plan
from cuconv.geometry import Conv2dGeometry, depthwise_geometry
from cuconv.plan import (
    Plan,
    Target,
    Unsuitable,
    channels_last,
    channels_last_mma,
    channels_last_runs,
    channels_last_staged,
    runs,
    tiles,
    toeplitz,
    wgrad,
    wgrad_channels_last,
    wgrad_channels_last_runs,
)
from cuconv.plan import wgrad_channels_last_mma as mma
from cuconv.plan import wgrad_channels_last_staged as staged
from cuconv.plan.base import SHARED_RESERVE

H200 = plan.TARGETS[90]
VARIANTS = ("runs", "channels_last", "channels_last_staged", "channels_last_runs", "toeplitz", "tiles")


def large_geometries():
    """Of networks and at random: where there are many tiles."""
    rng = random.Random(0)
    yield depthwise_geometry((64, 192, 56, 56), (192, 1, 7, 7), padding=3)
    yield depthwise_geometry((16, 128, 56, 56), (128, 1, 31, 31), padding=15)
    yield depthwise_geometry((64, 128, 112, 112), (128, 1, 3, 3), stride=2, padding=1)
    yield depthwise_geometry((64, 192, 14, 14), (192, 1, 3, 3), padding=1, channels_last=True)
    for _ in range(20):
        R, S = rng.choice((1, 3, 3, 5, 7, 11)), rng.choice((1, 3, 3, 5, 7, 11))
        C, extents = rng.choice((3, 8, 67, 256)), (rng.choice((7, 14, 56, 129)), rng.choice((7, 14, 56, 131)))
        yield depthwise_geometry(
            (rng.choice((1, 8, 100)), C, *extents),
            (C * rng.choice((1, 1, 2)), 1, R, S),
            padding=(R // 2, S // 2),
            stride=rng.choice((1, 1, 2)),
            channels_last=rng.random() < 0.4,
        )


def cheapest(variant: str, g: Conv2dGeometry, dtype: str, target: Target) -> Plan:
    """Of the tiles of a variant's forward pass, made one by one."""
    budget = target.shared_per_block - SHARED_RESERVE
    if variant == "runs":
        choices = [tile for patch in runs.patches(g, dtype, True) for tile in runs.tiles(g, dtype, patch, budget)]
        return runs.tile_plan(g, dtype, min(choices, key=lambda tile: float(runs._cost(g, dtype, target, tile))))
    if variant == "channels_last":
        of_channels = channels_last.tiles(g, dtype, target, True)
        best = min(of_channels, key=lambda tile: float(channels_last._cost(g, dtype, target, tile, False)))
        return channels_last.tile_plan(g, dtype, best)
    if variant == "channels_last_staged":
        staged = channels_last_staged.tiles(g, dtype, target, True)
        best_staged = min(staged, key=lambda tile: float(channels_last_staged._cost(g, dtype, target, tile)))
        return channels_last_staged.tile_plan(g, dtype, best_staged)
    if variant == "channels_last_runs":
        of_runs = channels_last_runs.tiles(g, dtype, target)
        best_run = min(of_runs, key=lambda tile: float(channels_last_runs._cost(g, dtype, target, tile)))
        return channels_last_runs.tile_plan(g, dtype, best_run)
    if variant == "channels_last_mma":
        of_quads = channels_last_mma.tiles(g, target)
        return channels_last_mma.tile_plan(
            g, dtype, min(of_quads, key=lambda tile: float(channels_last_mma._cost(g, target, tile)))
        )
    if variant == "toeplitz":
        bands = toeplitz.tiles(g, True, budget)
        return toeplitz.tile_plan(g, dtype, min(bands, key=lambda tile: float(toeplitz._cost(g, target, tile))))
    of_large = tiles.tiles(g, dtype, target, True)
    return tiles.tile_plan(g, dtype, min(of_large, key=lambda tile: float(tiles.cost(g, target, tile))))


@pytest.mark.parametrize(
    "variant",
    ["runs", "channels_last", "channels_last_staged", "channels_last_runs", "channels_last_mma", "toeplitz", "tiles"],
)
def test_a_plan_is_of_the_tile_that_costs_least(variant):
    seen = 0
    for g in (*large_geometries(), *GEOMETRIES.values()):
        dtype = "bfloat16" if variant in ("toeplitz", "channels_last_mma") else "float32"
        g = replace(g, channels_last=True) if variant in ("channels_last_runs", "channels_last_mma") else g
        try:
            chosen = plan.depthwise_forward(g, dtype, H200, variant)
        except Unsuitable:
            continue
        assert chosen == cheapest(variant, g, dtype, H200)
        seen += 1
    assert seen >= 6


@pytest.mark.parametrize("variant", ["runs", "channels_last"])
def test_a_plan_of_wgrad_is_of_the_tile_that_costs_least(variant):
    seen = 0
    planner = {"runs": wgrad, "channels_last": wgrad_channels_last}[variant]
    every = {"runs": wgrad.tiles_of_runs, "channels_last": wgrad_channels_last.tiles}[variant]
    for g in (*large_geometries(), *GEOMETRIES.values()):
        arguments = (g, "float16", True, H200)
        try:
            chosen = plan.depthwise_wgrad(*arguments, variant)
        except Unsuitable:
            continue
        best = min(every(*arguments, True), key=lambda tile, given=arguments: float(planner._cost(*given, tile)))
        assert chosen == planner.tile_plan(*arguments, best)
        seen += 1
    assert seen >= 6


def test_a_staged_plan_of_wgrad_is_of_the_tile_that_costs_least():
    seen = 0
    for g in (*large_geometries(), *GEOMETRIES.values()):
        g = replace(g, channels_last=True)
        arguments = (g, "float16", True, H200)
        try:
            chosen = plan.depthwise_wgrad(*arguments, "channels_last_staged")
        except Unsuitable:
            continue
        check_types(chosen.sums)
        best = min(staged.tiles(*arguments, True), key=lambda tile, given=arguments: float(staged._cost(*given, tile)))
        assert chosen == staged.tile_plan(g, "float16", True, H200, best)
        seen += 1
    assert seen >= 6


def test_a_plan_of_wgrad_on_tensor_cores_is_of_the_tile_that_costs_least():
    seen = 0
    for g in (*large_geometries(), *GEOMETRIES.values()):
        g = replace(g, channels_last=True)
        arguments = (g, "bfloat16", True, H200)
        try:
            chosen = plan.depthwise_wgrad(*arguments, "channels_last_mma")
        except Unsuitable:
            continue
        check_types(chosen.sums)
        best = min(mma.tiles(g, True, H200), key=lambda tile, g=g: float(mma._cost(g, H200, tile)))
        assert chosen == mma.tile_plan(g, "bfloat16", True, best)
        seen += 1
    assert seen >= 6


def test_a_plan_of_wgrad_by_runs_is_of_the_tile_that_costs_least():
    seen = 0
    for g in (*large_geometries(), *GEOMETRIES.values()):
        g = replace(g, channels_last=True)
        arguments = (g, "float16", True, H200)
        try:
            chosen = plan.depthwise_wgrad(*arguments, "channels_last_runs")
        except Unsuitable:
            continue
        check_types(chosen.sums)
        every = wgrad_channels_last_runs.tiles(*arguments, True)
        best = min(every, key=lambda tile, given=arguments: float(wgrad_channels_last_runs._cost(*given, tile)))
        assert chosen == wgrad_channels_last_runs.tile_plan(g, "float16", True, best)
        seen += 1
    assert seen >= 6


def test_plans_hold_integers_and_strings_alone():
    """An integer of NumPy's would be another text in a define, and another type in a launch."""
    for g in GEOMETRIES.values():
        for variant in VARIANTS:
            if suits(variant, "forward", g, "float16"):
                chosen = plan.depthwise_forward(g, "float16", H200, variant)
                check_types(chosen)
        sums = plan.depthwise_wgrad(g, "float16", True, H200).sums
        check_types(sums)


def check_types(chosen: Plan) -> None:
    numbers = (*chosen.grid, chosen.block, chosen.shared_bytes, *(value for _, value in chosen.parameters))
    assert {type(number) for number in numbers} == {int}
    assert {type(value) for _, value in chosen.defines} <= {int, str}
