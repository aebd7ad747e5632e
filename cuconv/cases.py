"""The convolutions that the self-check computes and the benchmarks time, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .geometry import Conv2dGeometry, Pair, SeparableGeometry, depthwise_geometry, separable_geometry


@dataclass(frozen=True, slots=True)
class Case:
    """One convolution: x (N, C, H, W), depthwise kernel R x S, with or without bias.

    stride, padding and dilation are what the public functions take. K, where it is given, is the number of output
    channels of the pointwise convolution that follows: a separable case or, with a kernel of one tap, a pointwise one.
    """

    name: str
    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    stride: int | Pair
    padding: int | Pair
    dilation: int | Pair
    bias: bool = False
    K: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of a call."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def operator(self) -> str:
        if self.K is None:
            return "depthwise"
        return "pointwise" if self.R == self.S == 1 else "separable"

    @property
    def geometry(self) -> Conv2dGeometry:
        """The geometry of the depthwise part."""
        return depthwise_geometry(*self.shapes, **self.options)

    @property
    def separable(self) -> SeparableGeometry:
        """The geometry of both parts of a case that has a K."""
        return separable_geometry(*self.shapes, (self.K, self.C), **self.options)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of x and of the depthwise w."""
        return (self.N, self.C, self.H, self.W), (self.C, 1, self.R, self.S)

    def __str__(self) -> str:
        channels = f"{self.C}" if self.K is None else f"{self.C}->{self.K}"
        kernel = "" if self.operator == "pointwise" else f" {self.R}x{self.S}"
        return f"{self.N},{channels},{self.H},{self.W}{kernel}"


def without_and_with_bias(*cases: Case) -> tuple[Case, ...]:
    """Every case twice: as it is, and as <name>+bias."""
    return tuple(both for case in cases for both in (case, replace(case, name=f"{case.name}+bias", bias=True)))


REFERENCE_CASES = (
    *without_and_with_bias(
        Case("kb82", 16, 64, 512, 512, 3, 3, stride=1, padding=0, dilation=1),
        Case("kb83", 64, 8, 512, 512, 3, 1, stride=1, padding=0, dilation=1),
    ),
    Case("kb84", 64, 128, 256, 512, 3, 3, stride=1, padding=0, dilation=1),
    *without_and_with_bias(
        Case("kb86_depthwise", 16, 64, 512, 512, 3, 3, stride=1, padding=1, dilation=1),
        Case("kb86", 16, 64, 512, 512, 3, 3, stride=1, padding=1, dilation=1, K=128),
    ),
)
