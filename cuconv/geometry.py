"""Conv2dGeometry: the shapes of one convolution, and every refusal of bad input.

All arithmetic here is on Python integers, before anything is allocated, compiled or launched. The answers follow one
rule: the wrong kind of thing is a TypeError, the right kind with an impossible value a ValueError, and each message
names the argument, what was wanted and what was given.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

DTYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = ("relu", "relu6", "silu", "hardswish", "gelu")

# Rows and columns, padding included, are 32-bit integers in the kernels; offsets of elements are 64-bit.
MAX_EXTENT = 2**31 - 1
# Beyond the memory of any device: refused here, since an expanded view can name them without holding them.
MAX_ELEMENTS = 2**40 - 1


@dataclass(frozen=True, slots=True)
class Conv2dGeometry:
    """Shapes of one depthwise convolution: x (N, C, H, W), w (K, 1, R, S), y (N, K, P, Q), with K = C * multiplier.

    Input row of output row p and kernel row r: ``p * stride[0] - padding[0][0] + r * dilation[0]``; columns likewise.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    stride: Pair
    padding: Padding
    dilation: Pair
    # Whether x and y lie in memory as (N, H, W, C) and (N, P, Q, K); w always as its shape says.
    channels_last: bool = False

    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Asked for at every call, which finds its kernel by the geometry.
        shapes, numbers = (self.x_shape, self.w_shape), (self.stride, self.padding, self.dilation, self.channels_last)
        object.__setattr__(self, "_hash", hash((shapes, numbers)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def multiplier(self) -> int:
        return self.K // self.C

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return (self.K, 1, self.R, self.S)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.K, self.P, self.Q)

    @property
    def x_size(self) -> int:
        return self.N * self.C * self.H * self.W

    @property
    def y_size(self) -> int:
        return self.N * self.K * self.P * self.Q

    @property
    def padded(self) -> bool:
        """Whether any tap of any output can fall outside x."""
        return self.padding != ((0, 0), (0, 0))


def depthwise_geometry(
    x_shape: Any,
    w_shape: Any,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    channels_last: bool = False,
    name: str = "w",
) -> Conv2dGeometry:
    """The geometry of a depthwise convolution of arrays x and w (called `name` in errors) of these shapes;
    channels_last says how x and y lie.

    Raises TypeError or ValueError, in words, for every input that has no such convolution.
    """
    # Found again by its arguments, so that what merely compares equal to a number, such as True, must not be one.
    if not type(stride) is type(padding) is type(dilation) is int:
        stride, dilation = _pair("stride", stride, minimum=1), _pair("dilation", dilation, minimum=1)
        padding = _padding(padding)
    return _depthwise_geometry(tuple(x_shape), tuple(w_shape), stride, padding, dilation, channels_last, name)


@dataclass(frozen=True, slots=True)
class PointwiseGeometry:
    """Shapes of one pointwise convolution: x (N, C, H, W), w (K, C) with or without two axes of 1, y (N, K, P, Q).

    Input row of output row p: ``p * stride[0]``; columns likewise.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    P: int
    Q: int
    stride: Pair
    # Whether x and y lie in memory as (N, H, W, C) and (N, P, Q, K); w always as its shape says.
    channels_last: bool = False

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.K, self.P, self.Q)

    @property
    def x_size(self) -> int:
        return self.N * self.C * self.H * self.W

    @property
    def y_size(self) -> int:
        return self.N * self.K * self.P * self.Q


def pointwise_geometry(
    x_shape: Any, w_shape: Any, *, stride: Any = 1, channels_last: bool = False, name: str = "w"
) -> PointwiseGeometry:
    """The geometry of a pointwise convolution of arrays x and w (called `name` in errors) of these shapes.

    Raises TypeError or ValueError, in words, for every input that has no such convolution.
    """
    return _pointwise_geometry(
        tuple(x_shape), tuple(w_shape), _pair("stride", stride, minimum=1), bool(channels_last), name
    )


@lru_cache(maxsize=4096)
def _pointwise_geometry(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], stride: Pair, channels_last: bool, name: str
) -> PointwiseGeometry:
    if len(x_shape) != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), and has {len(x_shape)}: {x_shape}")
    N, C, H, W = x_shape
    if min(C, H, W) < 1:
        raise ValueError(f"x must have at least one channel, row and column, and has shape {x_shape}")
    if len(w_shape) not in (2, 4) or w_shape[2:] not in ((), (1, 1)):
        raise ValueError(f"{name} must have shape (K, C) or (K, C, 1, 1), and has {w_shape}")
    K = w_shape[0]
    if K < 1:
        raise ValueError(f"{name} must have at least one output channel, and has shape {w_shape}")
    if w_shape[1] != C:
        raise ValueError(f"{name}.shape[1] must be its input's {C} channels, and is {w_shape[1]}: {w_shape}")
    P, Q = ((extent - 1) // step + 1 for extent, step in zip((H, W), stride, strict=True))
    for array, shape in (("x", x_shape), (name, (K, C)), ("the result", (N, K, P, Q))):
        elements = math.prod(shape)
        if elements > MAX_ELEMENTS:
            raise ValueError(f"{array} must have fewer than 2**40 elements, and has {elements}: {shape}")
    for extent_name, extent in (("height", H), ("width", W)):
        if extent > MAX_EXTENT:
            raise ValueError(f"the {extent_name} must be below 2**31, and is {extent}")
    return PointwiseGeometry(N, C, H, W, K, P, Q, stride, channels_last)


@dataclass(frozen=True, slots=True)
class SeparableGeometry:
    """Shapes of a depthwise convolution and the pointwise one of its result."""

    depthwise: Conv2dGeometry
    pointwise: PointwiseGeometry

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.pointwise.y_shape


def separable_geometry(
    x_shape: Any,
    depthwise_w_shape: Any,
    pointwise_w_shape: Any,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    channels_last: bool = False,
) -> SeparableGeometry:
    """The geometry of a depthwise-separable convolution of arrays of these shapes.

    Raises TypeError or ValueError, in words, for every input that has no such convolution.
    """
    depthwise = depthwise_geometry(
        x_shape,
        depthwise_w_shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        channels_last=channels_last,
        name="depthwise_w",
    )
    return SeparableGeometry(
        depthwise,
        pointwise_geometry(depthwise.y_shape, pointwise_w_shape, channels_last=channels_last, name="pointwise_w"),
    )


def check_activation(name: str, value: Any) -> str | None:
    """The activation's name, one of ACTIVATIONS, or None for none."""
    if value is None or (isinstance(value, str) and value in ACTIVATIONS):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name} must be None or a name, and is {value!r}")
    raise ValueError(f"{name} must be None or one of {', '.join(ACTIVATIONS)}, and is {value!r}")


def shape_argument(name: str, shape: Any) -> tuple[int, ...]:
    """A shape that the caller gave in numbers, as a tuple of integers."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of integers, and is {shape!r}")
    return tuple(_integer(name, extent, 0) for extent in shape)


def pair_argument(name: str, pair: Any) -> tuple[Any, Any]:
    """Two things that the caller gave as one argument."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair, and is {type(pair).__name__}")
    return pair[0], pair[1]


def check_dtypes(**arrays: Any) -> str:
    """The name of the one dtype of all given arrays, one of DTYPES; arrays that are None do not count."""
    first, dtype, given = "", "", None
    for name, array in arrays.items():
        if array is None:
            continue
        if given is None:
            first, dtype, given = name, check_dtype(name, array), array.dtype
        elif array.dtype is not given and check_dtype(name, array) != dtype:
            raise TypeError(f"{name} must have {first}'s dtype, {dtype}, and has {array.dtype}: cast one of them first")
    return dtype


def check_shape(name: str, array: Any, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse an array whose shape does not follow from the others'."""
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, {meaning}, and has {tuple(array.shape)}")


def check_dtype(name: str, array: Any) -> str:
    """The name of array's dtype, if it is one of DTYPES in the machine's byte order; a TypeError otherwise."""
    known = _dtype_name(array.dtype)
    if known is None:
        order = "" if array.dtype.isnative else " in foreign byte order"
        raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, and is {array.dtype}{order}")
    return known


@lru_cache(maxsize=64)
def _dtype_name(dtype: Any) -> str | None:
    # NumPy makes a dtype's name anew each time it is asked, which takes longer than the rest of the check.
    return dtype.name if dtype.isnative and dtype.name in DTYPES else None


def check_out(out: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Refuse an out= of another shape or dtype than the result's, a read-only one, and one that may overlap itself."""
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have the result's shape, {shape}, and has {tuple(out.shape)}")
    if out.dtype != dtype:
        raise TypeError(f"out must have x's dtype, {dtype}, and has {out.dtype}")
    if not getattr(out.flags, "writeable", True):
        raise ValueError("out must be writeable, and is read-only")
    reach = out.dtype.itemsize
    for extent, step in sorted(zip(out.shape, out.strides, strict=True), key=lambda axis: abs(axis[1])):
        if extent > 1 and out.size:
            if abs(step) < reach:
                raise ValueError(
                    f"out's strides must keep its elements apart, axis by axis, and are {out.strides} for {out.shape}"
                )
            reach = abs(step) * (extent - 1) + reach


@lru_cache(maxsize=4096)
def _depthwise_geometry(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: Pair | int,
    padding: Padding | str | int,
    dilation: Pair | int,
    channels_last: bool,
    w_name: str,
) -> Conv2dGeometry:
    stride, dilation = _pair("stride", stride, minimum=1), _pair("dilation", dilation, minimum=1)
    padding = _padding(padding)
    if len(x_shape) != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), and has {len(x_shape)}: {x_shape}")
    if len(w_shape) != 4:
        raise ValueError(
            f"{w_name} must have 4 dimensions (C * multiplier, 1, R, S), and has {len(w_shape)}: {w_shape}"
        )
    N, C, H, W = x_shape
    K, one, R, S = w_shape
    if min(C, H, W) < 1:
        raise ValueError(f"x must have at least one channel, row and column, and has shape {x_shape}")
    if one != 1:
        raise ValueError(f"{w_name}.shape[1] must be 1 for a depthwise convolution, and is {one}: {w_shape}")
    if min(R, S) < 1:
        raise ValueError(f"{w_name} must have at least one kernel row and column, and has shape {w_shape}")
    if K < 1 or K % C:
        raise ValueError(f"{w_name}.shape[0] must be a multiple of x's {C} channels, and is {K}")

    padding = _resolve_padding(padding, (R, S), stride, dilation)
    P = _output_extent("height", H, R, stride[0], padding[0], dilation[0])
    Q = _output_extent("width", W, S, stride[1], padding[1], dilation[1])
    for name, shape in (("x", x_shape), (w_name, w_shape), ("the result", (N, K, P, Q))):
        elements = shape[0] * shape[1] * shape[2] * shape[3]
        if elements > MAX_ELEMENTS:
            raise ValueError(f"{name} must have fewer than 2**40 elements, and has {elements}: {shape}")
    return Conv2dGeometry(N, C, H, W, K, R, S, P, Q, stride, padding, dilation, channels_last)


def _output_extent(name: str, extent: int, kernel: int, stride: int, padding: Pair, dilation: int) -> int:
    padded = extent + padding[0] + padding[1]
    reach = dilation * (kernel - 1) + 1
    if padded > MAX_EXTENT:
        raise ValueError(f"the padded {name} must be below 2**31, and is {padded}")
    if reach > padded:
        raise ValueError(
            f"the kernel must fit the padded input: along the {name} it reaches over {reach} elements "
            f"({kernel} with dilation {dilation}), and the input has {padded} ({extent} padded by {padding})"
        )
    return (padded - reach) // stride + 1


def _resolve_padding(padding: Padding | str, kernel: Pair, stride: Pair, dilation: Pair) -> Padding:
    if padding == "valid":
        return ((0, 0), (0, 0))
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f'padding "same" needs stride 1, and stride is {stride}: give the padding in numbers')
        # An odd total puts the extra row or column last, as PyTorch and TensorFlow do.
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return ((total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2))
    if isinstance(padding, str):
        raise ValueError(f'padding must be "same", "valid" or numbers, and is {padding!r}')
    return padding


def _integer(name: str, value: Any, minimum: int) -> int:
    if type(value) is int and minimum <= value <= MAX_EXTENT:
        return value
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, and is {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer or a pair of them, and is {value!r}") from None
    if not minimum <= number <= MAX_EXTENT:
        raise ValueError(f"{name} must be at least {minimum} and below 2**31, and is {number}")
    return number


def _pair(name: str, value: Any, minimum: int) -> Pair:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(
                f"{name} must be an integer or a pair (rows, columns), and has {len(value)} entries: {value}"
            )
        return (_integer(name, value[0], minimum), _integer(name, value[1], minimum))
    number = _integer(name, value, minimum)
    return (number, number)


def _padding(value: Any) -> Padding | str:
    if isinstance(value, str):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(side, (tuple, list)) for side in value):
        return (_pair("padding", value[0], 0), _pair("padding", value[1], 0))
    rows, columns = _pair("padding", value, 0)
    return ((rows, rows), (columns, columns))
