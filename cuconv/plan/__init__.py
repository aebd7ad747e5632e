"""From geometry, dtype and device to a frozen Plan: which kernel, its compile-time values, its grid and its block.

Planning is pure arithmetic on integers: it needs no GPU, searches nothing by trial and is cached. Every family of
kernels has a file here; this one chooses among them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

from ..geometry import Conv2dGeometry, PointwiseGeometry, SeparableGeometry
from . import (
    channels_last,
    channels_last_mma,
    channels_last_planes,
    channels_last_runs,
    channels_last_staged,
    direct,
    flat,
    images,
    phases,
    pointwise,
    pointwise_groups,
    runs,
    separable,
    separable_backward,
    separable_fragments,
    tiles,
    toeplitz,
    wgrad,
    wgrad_channels_last,
    wgrad_channels_last_mma,
    wgrad_channels_last_runs,
    wgrad_channels_last_staged,
    wgrad_diagonals,
    wgrad_flat,
    wgrad_pairs,
    wgrad_phases,
    wgrad_tiles,
)
from .base import DTYPES, MAX_GRID, TARGETS, VECTOR_BYTES, Plan, Target, Unsuitable
from .layouts import transposed
from .pointwise import Epilogue
from .separable import SeparableEpilogue, activate
from .separable_backward import InPlace
from .wgrad import WgradPlan

__all__ = [
    "DTYPES",
    "MAX_GRID",
    "TARGETS",
    "VARIANTS",
    "VECTOR_BYTES",
    "Epilogue",
    "InPlace",
    "Plan",
    "SeparableEpilogue",
    "Target",
    "Unsuitable",
    "WgradPlan",
    "activate",
    "depthwise_dgrad",
    "depthwise_forward",
    "depthwise_wgrad",
    "forced_variant",
    "in_fastest_layout",
    "pointwise_conv",
    "pointwise_wgrad",
    "separable_conv",
    "separable_gradients",
    "transposed",
    "variant",
]

# Of every pass its variants, the preferred one first: the first that suits is taken.
_FORWARD = {
    "runs": runs.forward,
    "phases": phases.forward,
    "channels_last_staged": channels_last_staged.forward,
    "channels_last_runs": channels_last_runs.forward,
    "channels_last": channels_last.forward,
    "channels_last_mma": channels_last_mma.forward,
    "channels_last_planes": channels_last_planes.forward,
    "toeplitz": toeplitz.forward,
    "flat": flat.forward,
    "images": images.forward,
    "tiles": tiles.forward,
    "direct": direct.forward,
}
_DGRAD = {
    "runs": runs.dgrad,
    "phases": phases.dgrad,
    "channels_last_staged": channels_last_staged.dgrad,
    "channels_last_runs": channels_last_runs.dgrad,
    "channels_last": channels_last.dgrad,
    "channels_last_mma": channels_last_mma.dgrad,
    "channels_last_planes": channels_last_planes.dgrad,
    "toeplitz": toeplitz.dgrad,
    "flat": flat.dgrad,
    "images": images.dgrad,
    "tiles": tiles.dgrad,
    "direct": direct.dgrad,
}
_WGRAD = {
    "runs": wgrad.runs,
    "phases": wgrad_phases.phases,
    "diagonals": wgrad_diagonals.diagonals,
    "pairs": wgrad_pairs.pairs,
    "flat": wgrad_flat.flat,
    "channels_last_staged": wgrad_channels_last_staged.channels_last_staged,
    "channels_last_runs": wgrad_channels_last_runs.channels_last_runs,
    "channels_last": wgrad_channels_last.channels_last,
    "channels_last_mma": wgrad_channels_last_mma.channels_last_mma,
    "channels_last_planes": channels_last_planes.wgrad,
    "tiles": wgrad_tiles.tiles,
    "direct": wgrad.direct,
}

_POINTWISE = {"groups": pointwise_groups.products, "products": pointwise.products, "direct": pointwise.direct}
# Fused, or depthwise and pointwise by kernels of their own.
_SEPARABLE: dict[str, Callable[..., Plan | None]] = {
    "apart": lambda *_: None,
    "fragments": separable_fragments.fragments,
    "fused": separable.fused,
}
# In the memory of dx, or by pieces of the batch.
_SEPARABLE_BACKWARD: dict[str, Callable[..., InPlace | None]] = {
    "recomputed": separable_backward.recomputed,
    "stored": separable_backward.stored,
    "pieces": lambda *_: None,
}
_POINTWISE_WGRAD = {
    "groups": pointwise_groups.wgrad,
    "products": pointwise.wgrad_products,
    "direct": pointwise.wgrad_direct,
}

# Of these, those that are asked before all others: each says where.
_BEATS_OTHERS = {
    "phases": phases.beats_others,
    "channels_last_planes": channels_last_planes.beats_others,
    "images": images.beats_others,
    "toeplitz": toeplitz.beats_others,
    "channels_last_runs": channels_last_runs.beats_others,
    "channels_last": channels_last.beats_others,
    "channels_last_mma": channels_last_mma.beats_others,
    "flat": flat.beats_others,
}
_BEATS_OTHERS_OF_SEPARABLE = {"fragments": separable_fragments.beats_others}
_BEATS_OTHERS_OF_WGRAD = {
    "phases": wgrad_phases.beats_others,
    "channels_last_planes": channels_last_planes.beats_others_of_wgrad,
    "pairs": wgrad_pairs.beats_others,
    "diagonals": wgrad_diagonals.beats_others,
    "channels_last_mma": wgrad_channels_last_mma.beats_others,
    "channels_last_runs": wgrad_channels_last_runs.beats_others,
    "flat": flat.beats_others_of_wgrad,
}

_BEATS_OTHERS_OF_BACKWARD = {"stored": separable_backward.stored_beats_others}

VARIANTS = tuple(dict.fromkeys((*_FORWARD, *_DGRAD, *_WGRAD, *_POINTWISE, *_SEPARABLE, *_SEPARABLE_BACKWARD)))

_forced: ContextVar[str | None] = ContextVar("cuconv_variant", default=None)


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Within the context, in this thread, every call takes the kernel variant `name`, or raises where it cannot run.

    For tests and measurements: the plan's own choice is never slower on purpose.

    >>> import cuconv.plan
    >>> with cuconv.plan.variant("direct"):
    ...     pass
    """
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, and is {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_variant() -> str | None:
    return _forced.get()


def in_fastest_layout(geometry: Conv2dGeometry) -> Conv2dGeometry:
    """The geometry of what is computed: large kernels have their fast variants for (N, C, H, W), and bringing arrays
    there and back takes less time than their arithmetic does."""
    if geometry.channels_last and geometry.R * geometry.S > runs.MAX_TAPS:
        return replace(geometry, channels_last=False)
    return geometry


@lru_cache(maxsize=4096)
def depthwise_forward(
    geometry: Conv2dGeometry, dtype: str, target: Target, forced: str | None = None, aligned: bool = True
) -> Plan:
    """The plan of a depthwise forward convolution; aligned says whether x and y start at multiples of VECTOR_BYTES.

    Unsuitable, a ValueError, where the forced variant cannot run.
    """
    return _first_suitable(_FORWARD, _BEATS_OTHERS, forced, geometry, dtype, target, aligned)


@lru_cache(maxsize=4096)
def depthwise_dgrad(
    geometry: Conv2dGeometry, dtype: str, target: Target, forced: str | None = None, aligned: bool = True
) -> Plan:
    """The plan of the gradient of a depthwise convolution's input; aligned speaks of dy and dx."""
    return _first_suitable(_DGRAD, _BEATS_OTHERS, forced, geometry, dtype, target, aligned)


@lru_cache(maxsize=4096)
def depthwise_wgrad(
    geometry: Conv2dGeometry, dtype: str, bias: bool, target: Target, forced: str | None = None, aligned: bool = True
) -> WgradPlan:
    """The plans of the gradients of a depthwise convolution's weights and, where bias is true, of its bias; aligned
    speaks of dy and x."""
    return _first_suitable(_WGRAD, _BEATS_OTHERS_OF_WGRAD, forced, geometry, dtype, bias, target, aligned)


@lru_cache(maxsize=4096)
def pointwise_conv(
    geometry: PointwiseGeometry,
    dtype: str,
    turned: bool,
    epilogue: Epilogue,
    target: Target,
    forced: str | None = None,
    aligned: bool = True,
) -> Plan:
    """The plan of a pointwise convolution or, turned, of the gradient of its input; aligned speaks of all arrays."""
    return _first_suitable(_POINTWISE, {}, forced, geometry, dtype, turned, epilogue, target, aligned)


@lru_cache(maxsize=4096)
def pointwise_wgrad(
    geometry: PointwiseGeometry,
    dtype: str,
    bias: bool,
    allow_tf32: bool,
    target: Target,
    forced: str | None = None,
    aligned: bool = True,
) -> WgradPlan:
    """The plans of the gradients of a pointwise convolution's weights and, where bias is true, of its bias; aligned
    speaks of dy and x."""
    return _first_suitable(_POINTWISE_WGRAD, {}, forced, geometry, dtype, bias, allow_tf32, target, aligned)


@lru_cache(maxsize=4096)
def separable_conv(
    geometry: SeparableGeometry,
    dtype: str,
    epilogue: SeparableEpilogue,
    target: Target,
    forced: str | None = None,
    aligned: bool = True,
) -> Plan | None:
    """The plan of a separable convolution in one kernel, or None where both parts have one of their own; aligned speaks
    of all arrays."""
    return _first_suitable(_SEPARABLE, _BEATS_OTHERS_OF_SEPARABLE, forced, geometry, dtype, epilogue, target, aligned)


@lru_cache(maxsize=4096)
def separable_gradients(
    geometry: SeparableGeometry,
    dtype: str,
    epilogue: SeparableEpilogue,
    wanted: frozenset[str],
    target: Target,
    forced: str | None = None,
    aligned: bool = True,
) -> InPlace | None:
    """The plans of those gradients of a separable convolution that are wanted, in the memory of dx, or None where they
    are made by pieces of the batch; aligned speaks of all arrays."""
    asked_first = _BEATS_OTHERS_OF_BACKWARD
    return _first_suitable(_SEPARABLE_BACKWARD, asked_first, forced, geometry, dtype, epilogue, wanted, target, aligned)


_Chosen = TypeVar("_Chosen", Plan, WgradPlan, Plan | None, InPlace | None)


def _first_suitable(
    planners: Mapping[str, Callable[..., _Chosen]],
    asked_first: Mapping[str, Callable[..., bool]],
    forced: str | None,
    *arguments: Any,
) -> _Chosen:
    if forced is not None and forced not in planners:
        raise Unsuitable(f"variant {forced}: this pass has {', '.join(planners)}")
    names = [forced] if forced is not None else list(planners)
    if forced is None:
        g, dtype, target = arguments[0], arguments[1], arguments[-2]
        names[:0] = [name for name, beats_others in asked_first.items() if beats_others(g, dtype, target)]
    reasons = []
    for name in names:
        try:
            return planners[name](*arguments)
        except Unsuitable as reason:
            reasons.append(f"variant {name}: {reason}")
    raise Unsuitable("; ".join(reasons))
