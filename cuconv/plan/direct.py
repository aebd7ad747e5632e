"""Direct kernels: one element of the result a thread. They run everything everywhere."""

from __future__ import annotations

from ..geometry import Conv2dGeometry
from .base import DTYPES, MAX_GRID, Plan, Target, Unsuitable, plane_parameters

_THREADS = 256


def forward(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _plan("depthwise_forward_direct", g, dtype, ("K", g.K), g.y_size)


def dgrad(g: Conv2dGeometry, dtype: str, target: Target, aligned: bool) -> Plan:
    return _plan("depthwise_dgrad_direct", g, dtype, ("C", g.C), g.x_size)


def _plan(source: str, g: Conv2dGeometry, dtype: str, channels: tuple[str, int], outputs: int) -> Plan:
    grid = -(-outputs // _THREADS)
    if grid > MAX_GRID[0]:
        raise Unsuitable(f"{outputs} outputs are more than one launch can count")
    small = max(g.x_size, g.y_size) <= 2**31 - 1
    return Plan(
        source=source,
        defines=(
            ("T", DTYPES[dtype][0]),
            ("INDEX", "int" if small else "int64"),
            ("CHANNELS_LAST", int(g.channels_last)),
        ),
        grid=(grid, 1, 1),
        block=_THREADS,
        shared_bytes=0,
        parameters=(
            ("multiplier", g.multiplier),
            channels,
            ("R", g.R),
            ("S", g.S),
            *plane_parameters(g),
            ("total_outputs", outputs),
        ),
    )
