"""The gradients of separable convolution, without ever storing what is in between, or its gradient, whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import interop, kernels, layouts, plan, reference
from .geometry import (
    SeparableGeometry,
    check_activation,
    check_dtypes,
    check_out,
    check_shape,
    separable_geometry,
)
from .plan import separable_backward
from .reference import SeparableGradients

_NAMES = SeparableGradients._fields


class _Call(NamedTuple):
    """What the arguments of a call, once checked, tell of it."""

    geometry: SeparableGeometry
    dtype: str
    device: int | None  # None for NumPy arrays
    channels_last: bool
    dense: bool  # whether kernels can read the arrays as they lie


def separable_conv2d_backward(
    dy: Any,
    x: Any,
    depthwise_w: Any,
    pointwise_w: Any,
    depthwise_bias: Any = None,
    pointwise_bias: Any = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    depthwise_activation: str | None = None,
    pointwise_activation: str | None = None,
    allow_tf32: bool = False,
    needs: Any = _NAMES,
    out: Any = None,
) -> SeparableGradients:
    """Gradients of separable_conv2d with respect to its arrays, those that are asked for, from its inputs and dy alone.
    What is in between, and its gradient, are made again in parts: besides inputs and results it takes memory of less
    than 5 % of x, and where x is small of some sums of the pointwise weights. The same input gives the same bits.

    Equivalent to ``torch.autograd.grad(y, (x, depthwise_w, pointwise_w, depthwise_bias, pointwise_bias), dy)`` with y
    from ``torch.nn.functional`` as in separable_conv2d.

    Parameters
    ----------
    dy : (N, K, P, Q) float16, bfloat16, float32 or float64
        The gradient with respect to the convolution's output. A NumPy or a CuPy array, its layout as that of x.
    x : (N, C, H, W), the dtype of dy
    depthwise_w : (C*M, 1, R, S), the dtype of dy
    pointwise_w : (K, C*M, 1, 1) or (K, C*M), the dtype of dy
    depthwise_bias : (C*M,), the dtype of dy, optional
    pointwise_bias : (K,), the dtype of dy, optional
    stride, padding, dilation, depthwise_activation, pointwise_activation, allow_tf32
        As they were in separable_conv2d.
    needs : names of arrays, "x", "depthwise_w", "pointwise_w", "depthwise_bias", "pointwise_bias"
        Whose gradients are wanted, in any order; all of them unless told otherwise. That of a bias that was not given
        is not made.
    out : five arrays, or None for each, in the order of the result, optional
        Where gradients are written; any strides that do not overlap, and no memory of an input.

    Returns
    -------
    gradients : SeparableGradients, a named tuple (x, depthwise_w, pointwise_w, depthwise_bias, pointwise_bias)
        Each of the shape of its array and the dtype of dy, that of x in the layout of x, or out; None for what is not
        wanted. Sums are made in float32, for float64 in float64 (NumPy arrays: always float64), and rounded once.

    Raises
    ------
    TypeError
        For another kind of array, dtype or number, and for arrays of different kinds or dtypes.
    ValueError
        For shapes and numbers that have no convolution, a dy that is not of its output's shape, names and activations
        that are not known, arrays on different GPUs, and an out that overlaps.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    >>> depthwise_w, pointwise_w = np.ones((1, 1, 2, 2), np.float32), np.array([[2], [3]], np.float32)
    >>> dy = np.ones((1, 2, 2, 2), np.float32)
    >>> gradients = cuconv.separable_conv2d_backward(dy, x, depthwise_w, pointwise_w, needs=("x", "pointwise_w"))
    >>> gradients.x[0, 0]
    array([[ 5., 10.,  5.],
           [10., 20., 10.],
           [ 5., 10.,  5.]], dtype=float32)
    >>> gradients.pointwise_w
    array([[64.],
           [64.]], dtype=float32)
    >>> gradients.depthwise_w is None
    True
    """
    # 1. Check.
    outs = _outs(out)
    call = _check(dy, x, depthwise_w, pointwise_w, depthwise_bias, pointwise_bias, *outs, stride, padding, dilation)
    inputs = SeparableGradients(x, depthwise_w, pointwise_w, depthwise_bias, pointwise_bias)
    wanted = _wanted(needs, inputs)
    epilogue = plan.SeparableEpilogue(
        bool(allow_tf32),
        check_activation("depthwise_activation", depthwise_activation),
        check_activation("pointwise_activation", pointwise_activation),
    )
    for i, given in enumerate(outs):
        if given is not None:
            later = {f"the out of {name}": other for name, other in zip(_NAMES[i + 1 :], outs[i + 1 :], strict=True)}
            interop.check_apart(given, dy=dy, **inputs._asdict(), **later)
    if call.device is None:
        made = reference.separable_conv2d_backward(
            dy,
            *inputs,
            call.geometry,
            epilogue.depthwise_activation,
            epilogue.pointwise_activation,
            wanted,
        )
        return SeparableGradients(*map(_copied_to, outs, made))
    with interop.on_device(call.device):
        # 2. Allocate.
        if not call.dense:
            dy, x = (layouts.contiguous(array, call.channels_last) for array in (dy, x))
            inputs = SeparableGradients(x, *(None if a is None else interop.contiguous(a) for a in inputs[1:]))
        results = SeparableGradients(
            *(
                interop.output(given, array.shape, x.dtype, call.channels_last and name == "x")
                if name in wanted
                else None
                for name, array, given in zip(_NAMES, inputs, outs, strict=True)
            )
        )
        if call.geometry.depthwise.N and wanted:
            # 3. Plan, and 4. kernels: found again once they are known.
            arrays = dy, *inputs, results.x
            aligned = not any(interop.address(array) % plan.VECTOR_BYTES for array in arrays)
            launch = _launch(call.geometry, call.dtype, epilogue, wanted, call.device, plan.forced_variant(), aligned)
            # 5. Launch.
            if launch is not None:
                launch(dy, inputs, results)
            else:
                _in_pieces(call, epilogue, dy, inputs, results)
        else:
            for gradient in results:
                if gradient is not None:
                    gradient.fill(0)
        return SeparableGradients(
            *(
                None if made is None else layouts.delivered(made, given)
                for made, given in zip(results, outs, strict=True)
            )
        )


def _outs(out: Any) -> SeparableGradients:
    if out is None:
        return SeparableGradients()
    if not isinstance(out, (tuple, list)) or len(out) != len(_NAMES):
        raise TypeError(f"out must be five arrays, or None for each, in the order {', '.join(_NAMES)}")
    return SeparableGradients(*out)


def _wanted(needs: Any, inputs: SeparableGradients) -> frozenset[str]:
    """The names of the gradients to be made."""
    if isinstance(needs, str) or not all(isinstance(name, str) for name in needs):
        raise TypeError(f"needs must be names of arrays, such as ('x', 'pointwise_w'), and is {needs!r}")
    for name in needs:
        if name not in _NAMES:
            raise ValueError(f"needs must be some of {', '.join(_NAMES)}, and has {name!r}")
    return frozenset(name for name in needs if getattr(inputs, name) is not None)


def _copied_to(out: Any, made: Any) -> Any:
    if out is None or made is None:
        return made
    out[...] = made
    return out


@interop.remembered
def _check(
    dy: Any,
    x: Any,
    depthwise_w: Any,
    pointwise_w: Any,
    depthwise_bias: Any,
    pointwise_bias: Any,
    *given: Any,
) -> _Call:
    *outs, stride, padding, dilation = given
    inputs = {"x": x, "depthwise_w": depthwise_w, "pointwise_w": pointwise_w}
    biases = {"depthwise_bias": depthwise_bias, "pointwise_bias": pointwise_bias}
    written = {f"out[{i}]": array for i, array in enumerate(outs) if array is not None}
    module = interop.array_module(dy=dy, **inputs, **biases, **written)
    dtype = check_dtypes(dy=dy, **inputs, **biases)
    channels_last = module is not np and interop.channels_last(x)
    geometry = separable_geometry(
        x.shape,
        depthwise_w.shape,
        pointwise_w.shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        channels_last=channels_last,
    )
    check_shape("dy", dy, geometry.y_shape, "that of the convolution's output")
    for (name, bias), channels in zip(biases.items(), (geometry.depthwise.K, geometry.pointwise.K), strict=True):
        if bias is not None:
            check_shape(name, bias, (channels,), "one value for each output channel")
    for array, of in zip(outs, (*inputs.values(), *biases.values()), strict=True):
        if array is not None:
            if of is None:
                raise ValueError("out must be None for the gradient of a bias that is not given")
            check_out(array, tuple(of.shape), x.dtype)
    device = None if module is np else interop.one_device(dy=dy, **inputs, **biases, **written)
    dense = (
        device is not None
        and interop.all_contiguous(dy, x, channels_last=channels_last)
        and interop.all_contiguous(depthwise_w, pointwise_w, depthwise_bias, pointwise_bias)
    )
    return _Call(geometry, dtype, device, channels_last, dense)


# The kernel of the sums, that which adds those of slabs where there are several, and the workspace's bytes.
_Sums = tuple[kernels.Kernel, kernels.Kernel | None, int]


@lru_cache(maxsize=4096)
def _launch(
    geometry: SeparableGeometry,
    dtype: str,
    epilogue: plan.SeparableEpilogue,
    wanted: frozenset[str],
    device_id: int,
    forced: str | None,
    aligned: bool,
) -> Callable[[Any, SeparableGradients, SeparableGradients], None] | None:
    """Called with dy, the inputs and where their gradients are wanted; None where they are to be made in pieces."""
    target = kernels.target(device_id)
    chosen = plan.separable_gradients(geometry, dtype, epilogue, wanted, target, forced, aligned)
    if chosen is None:
        return None
    depthwise, pointwise, tf32 = geometry.depthwise, geometry.pointwise, epilogue.allow_tf32
    bias = "pointwise_bias" in wanted
    wants_pointwise = bool(wanted & {"pointwise_w", "pointwise_bias"})

    def load_sums(chosen: plan.WgradPlan) -> _Sums:
        reduce = None if chosen.reduce is None else kernels.load(chosen.reduce, device_id)
        return kernels.load(chosen.sums, device_id), reduce, chosen.workspace_bytes

    middle = activate = None
    if chosen.pointwise is not None:
        of_pointwise = load_sums(chosen.pointwise)
    elif wants_pointwise:
        middle = kernels.load(plan.depthwise_forward(depthwise, dtype, target, None, aligned), device_id)
        if epilogue.depthwise_activation is not None:
            of_middle = plan.activate(depthwise.y_size, dtype, epilogue.depthwise_activation, target)
            activate = kernels.load(of_middle, device_id)
        sums = plan.pointwise_wgrad(pointwise, dtype, bias, tf32, target, None, aligned)
        of_pointwise = load_sums(
            separable_backward.within_bytes(sums, separable_backward.stored_partials_bytes(geometry, dtype))
        )
    planes = load_sums(chosen.planes)
    gradient_plan = plan.pointwise_conv(pointwise, dtype, True, plan.Epilogue(tf32), target, None, aligned)
    gradient = kernels.load(gradient_plan, device_id)

    def launch(dy: Any, inputs: SeparableGradients, results: SeparableGradients) -> None:
        x, depthwise_w, pointwise_w, depthwise_bias, _ = map(interop.address, inputs)
        dy_address, dx = interop.address(dy), interop.address(results.x)
        dtype = inputs.x.dtype
        planes_sums, planes_reduce, size = planes
        if middle is not None:
            size = max(size, of_pointwise[2])
        workspace = interop.workspace(None, size)
        if wants_pointwise:
            dw = interop.output(results.pointwise_w, inputs.pointwise_w.shape, dtype)
            written = dw.data.ptr, interop.address(results.pointwise_bias)
            sums, reduce, size = of_pointwise
            if middle is None:
                # Until the middle's gradient is there the memory of dx has room, if for one slab.
                has_room = size <= results.x.nbytes and dx % interop.ALIGNMENT == 0
                partials = results.x if has_room else interop.workspace(None, size)
                sums(dy_address, x, depthwise_w, depthwise_bias, interop.address(partials))
            else:
                middle(x, depthwise_w, depthwise_bias, dx)
                if activate is not None:
                    activate(dx)
                partials = workspace
                sums(dy_address, dx, interop.address(partials), *written)
            if reduce is not None:
                reduce(interop.address(partials), *written)
        gradient(dy_address, pointwise_w, 0, dx)
        dw = interop.output(results.depthwise_w, inputs.depthwise_w.shape, dtype)
        planes_sums(dx, x, depthwise_w, depthwise_bias, workspace.data.ptr)
        if planes_reduce is not None:
            planes_reduce(workspace.data.ptr, dw.data.ptr, interop.address(results.depthwise_bias))

    return launch


class _PartKernels(NamedTuple):
    """What a part of the batch takes, in the dtype of sums; None for what it has no use for."""

    middle: kernels.Kernel
    activate: kernels.Kernel | None
    pointwise: kernels.Kernel | None
    slope_of_dy: kernels.Kernel | None
    pointwise_wgrad: _Sums
    gradient: kernels.Kernel
    slope_of_gradient: kernels.Kernel | None
    depthwise_wgrad: _Sums
    dgrad: kernels.Kernel | None


@lru_cache(maxsize=4096)
def _part_kernels(
    part: SeparableGeometry,
    of_dx: SeparableGeometry | None,
    dtype: str,
    epilogue: plan.SeparableEpilogue,
    partials_bytes: int,
    device_id: int,
    aligned: bool,
) -> _PartKernels:
    target = kernels.target(device_id)
    depthwise, pointwise, tf32 = part.depthwise, part.pointwise, epilogue.allow_tf32

    def load(chosen: plan.Plan) -> kernels.Kernel:
        return kernels.load(chosen, device_id)

    def load_sums(chosen: plan.WgradPlan) -> _Sums:
        return load(chosen.sums), None if chosen.reduce is None else load(chosen.reduce), chosen.workspace_bytes

    plain = plan.Epilogue(tf32)
    before, behind = epilogue.depthwise_activation, epilogue.pointwise_activation
    elements, gradients = depthwise.y_size, pointwise.y_size
    of_pointwise_w = plan.pointwise_wgrad(pointwise, dtype, True, tf32, target, None, True)
    return _PartKernels(
        middle=load(plan.depthwise_forward(depthwise, dtype, target, None, aligned)),
        activate=load(plan.activate(elements, dtype, before, target)) if before else None,
        pointwise=load(plan.pointwise_conv(pointwise, dtype, False, plain, target, None, aligned)) if behind else None,
        slope_of_dy=load(separable_backward.activation_slope(gradients, dtype, behind, target)) if behind else None,
        pointwise_wgrad=load_sums(separable_backward.within_bytes(of_pointwise_w, partials_bytes)),
        gradient=load(plan.pointwise_conv(pointwise, dtype, True, plain, target, None, aligned)),
        slope_of_gradient=load(separable_backward.activation_slope(elements, dtype, before, target))
        if before
        else None,
        depthwise_wgrad=load_sums(plan.depthwise_wgrad(depthwise, dtype, True, target, None, True)),
        dgrad=None if of_dx is None else load(plan.depthwise_dgrad(of_dx.depthwise, dtype, target, None, aligned)),
    )


class _Room:
    """Memory of which parts are taken, one behind the other."""

    def __init__(self, memory: Any, dtype: Any) -> None:
        self._memory = memory
        self._dtype = np.dtype(dtype)
        self._taken = 0

    def array(self, shape: tuple[int, ...]) -> Any:
        size = separable_backward.aligned_bytes(shape, self._dtype.itemsize)
        elements = int(np.prod(shape))
        part = self._memory[self._taken : self._taken + elements * self._dtype.itemsize]
        self._taken += size
        return part.view(self._dtype).reshape(shape)


_fitting_pieces = lru_cache(maxsize=4096)(separable_backward.fitting_pieces)


def _in_pieces(
    call: _Call, epilogue: plan.SeparableEpilogue, dy: Any, inputs: SeparableGradients, results: SeparableGradients
) -> None:
    """By the kernels of both parts, on pieces whose arrays fit the workspace. Pieces are copied in the dtype of sums,
    so that what is added up over pieces is rounded once; 16-bit elements are exact as TF32."""
    geometry = call.geometry
    wide = "float64" if call.dtype == "float64" else "float32"
    epilogue = replace(epilogue, allow_tf32=epilogue.allow_tf32 or call.dtype in ("float16", "bfloat16"))
    of_weights = results._replace(x=None)
    sums = any(gradient is not None for gradient in of_weights)
    sums_pointwise = results.pointwise_w is not None or results.pointwise_bias is not None
    sums_depthwise = results.depthwise_w is not None or results.depthwise_bias is not None
    slope = epilogue.pointwise_activation is not None
    pieces, most = _fitting_pieces(geometry, call.dtype, slope, sums, results.x is not None)

    x = inputs.x
    depthwise_w, pointwise_w, depthwise_bias, pointwise_bias = (
        None if a is None else a.astype(wide, copy=False) for a in inputs[1:]
    )
    shapes = geometry.depthwise.w_shape, inputs.pointwise_w.shape, (geometry.depthwise.K,), (geometry.pointwise.K,)
    totals, parts = ([interop.output(None, shape, np.dtype(wide)) for shape in shapes] for _ in range(2))
    for total in totals:
        total.fill(0)
    addresses = [interop.address(a) for a in (depthwise_w, pointwise_w, depthwise_bias, pointwise_bias)]
    aligned = not any(address % plan.VECTOR_BYTES for address in addresses)
    partials_bytes = separable_backward.partials_bytes(geometry, call.dtype)

    def kernels_of(piece: separable_backward.Piece) -> _PartKernels:
        part = separable_backward.part_of(geometry, piece.images, piece.rows)
        of_dx = piece.of_dx and separable_backward.part_of(geometry, piece.images, piece.of_dx)
        return _part_kernels(part, of_dx, wide, epilogue, partials_bytes, call.device, aligned)

    runs = list(map(kernels_of, pieces))
    partial_bytes = max((max(run.pointwise_wgrad[2], run.depthwise_wgrad[2]) for run in runs), default=0)
    partials = interop.workspace(None, partial_bytes) if sums else None
    memory = interop.output(None, (most,), np.uint8)

    def add(sums_of: _Sums, of_dy: Any, of_x: Any, weights: int, bias: int) -> None:
        launch, reduce, _ = sums_of
        where = interop.address(partials), parts[weights].data.ptr, parts[bias].data.ptr
        launch(of_dy.data.ptr, of_x.data.ptr, *where)
        if reduce is not None:
            reduce(*where)
        for i in (weights, bias):
            totals[i] += parts[i]

    for piece, run in zip(pieces, runs, strict=True):
        room = _Room(memory, wide)
        images, rows, of_dx = slice(piece.first_image, piece.end_image), piece.rows, piece.of_dx
        x_part, dy_part, middle, gradient, *dx_part = map(room.array, separable_backward.shapes_of(geometry, piece))
        x_part[...] = x[images, :, rows.first_of_x : rows.end_of_x]
        dy_part[...] = dy[images, :, rows.first : rows.end]
        if slope or (piece.summed and sums_pointwise):
            run.middle(x_part.data.ptr, addresses[0], addresses[2], middle.data.ptr)
            if run.activate is not None:
                run.activate(middle.data.ptr)
        if run.pointwise is not None and run.slope_of_dy is not None:
            z = room.array(dy_part.shape)
            run.pointwise(middle.data.ptr, addresses[1], addresses[3], z.data.ptr)
            run.slope_of_dy(dy_part.data.ptr, z.data.ptr)
            dy_part = z
        if piece.summed and sums_pointwise:
            add(run.pointwise_wgrad, dy_part, middle, 1, 3)
        if of_dx is None and not sums_depthwise:
            continue
        run.gradient(dy_part.data.ptr, addresses[1], 0, gradient.data.ptr)
        if run.slope_of_gradient is not None:
            run.middle(x_part.data.ptr, addresses[0], addresses[2], middle.data.ptr)
            run.slope_of_gradient(gradient.data.ptr, middle.data.ptr)
            gradient = middle
        if piece.summed and sums_depthwise:
            add(run.depthwise_wgrad, gradient, x_part, 0, 2)
        if of_dx is not None and run.dgrad is not None:
            run.dgrad(gradient.data.ptr, addresses[0], 0, dx_part[0].data.ptr)
            results.x[images, :, of_dx.first_of_x : of_dx.end_of_x] = dx_part[0]
    for result, total in zip(of_weights[1:], totals, strict=True):
        if result is not None:
            result[...] = total.reshape(result.shape)
