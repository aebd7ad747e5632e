"""Calls that differ from an earlier one in addresses alone are not checked again: what else they differ in is seen."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

import cuconv
from cuconv import depthwise, interop, plan

X_SHAPE, W_SHAPE = (2, 4, 6, 6), (4, 1, 3, 3)


def pairs(number):
    return (number, number) if isinstance(number, int) else number


def check(device, x, w, bias=None, x_host=None, **numbers):
    """Of arrays of the device: all three passes are right. x_host is what x holds, where CuPy cannot copy it."""
    y = cuconv.depthwise_conv2d(x, w, bias, **numbers)
    x_host = device.host(x) if x_host is None else x_host
    w_host, bias_host = (None if a is None else device.host(a) for a in (w, bias))
    plain = {name: pairs(number) for name, number in numbers.items()}
    plain["padding"] = tuple(map(pairs, plain.get("padding", (0, 0))))
    oracle.assert_within_bound(device.host(y), x_host, w_host, bias_host, **plain)
    dx = cuconv.depthwise_conv2d_dgrad(y, w, x.shape, **numbers)
    oracle.assert_dgrad_within_bound(device.host(dx), device.host(y), w_host, **plain)
    dw, dbias = cuconv.depthwise_conv2d_wgrad(y, x, w.shape, bias=True, **numbers)
    oracle.assert_wgrad_within_bound(device.host(dw), device.host(dbias), device.host(y), x_host, **plain)
    return y


@pytest.fixture
def arrays(device, rng):
    return [device.array(a) for a in oracle.random_arrays(rng, X_SHAPE, W_SHAPE, "float32")]


def test_calls_that_differ_in_one_thing_are_told_apart(device, rng, arrays):
    x, w, bias = arrays
    base = device.array(rng.standard_normal(2 * 4 * 6 * 6 + 1).astype(np.float32))
    misplaced = base[1:].reshape(X_SHAPE)
    halves = [device.array(device.host(a).astype(np.float16)) for a in arrays]
    calls = [
        ((x, w), {}),
        ((x, w, bias), {}),
        ((x.transpose(0, 1, 3, 2), w), {}),
        ((device.array(device.host(x), "nhwc"), w), {}),
        ((x.reshape(4, 2, 6, 6), w[:2]), {}),
        ((x, w.transpose(0, 1, 3, 2)), {}),
        ((misplaced, w), {}),
        ((x[:1], w), {}),
        (halves, {}),
        ([a.astype(oracle.BFLOAT16) for a in halves], {}),
        ((x, w), {"stride": 2}),
        ((x, w), {"stride": (1, 2)}),
        ((x, w), {"padding": 1}),
        ((x, w), {"padding": (1, 0)}),
        ((x, w), {"padding": ((1, 0), (0, 1))}),
        ((x, w), {"dilation": 2}),
        ((x, w), {"stride": 2, "padding": 1, "dilation": 1}),
        ((x, w), {"stride": 1, "padding": 2, "dilation": 1}),
        ((x, w), {"stride": 1, "padding": 1, "dilation": 2}),
    ]
    for _ in range(2):
        for given, numbers in calls:
            check(device, *given, **numbers)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_an_element_at_half_of_its_bytes_is_copied(device, rng, arrays, layout):
    """A view of bytes can start anywhere; no kernel reads what is not aligned."""
    x, w = device.array(device.host(arrays[0]), layout), arrays[1]
    check(device, x, w)
    order = (0, 1, 2, 3) if layout == "nchw" else (0, 2, 3, 1)
    in_memory = x.transpose(*order)
    memory = device.array(np.zeros(x.nbytes + 2, np.uint8))
    askew = memory[2:].view(np.float32).reshape(in_memory.shape).transpose(*np.argsort(order).tolist())
    assert askew.data.ptr % 4 == 2
    memory[2:] = in_memory.reshape(-1).view(np.uint8)
    check(device, askew, w, x_host=device.host(x))
    check(device, x, w)


def test_plans_follow_the_variant_and_the_alignment(device, rng, arrays, monkeypatch):
    """Kernels are remembered by both, beside the check."""
    taken = []
    x, w, _ = arrays
    memory = device.array(np.zeros(x.size + 16, np.float32))
    first = -memory.data.ptr // 4 % 4
    starts = [memory[first + offset :][: x.size].reshape(X_SHAPE) for offset in (0, 1, 4)]
    with monkeypatch.context() as context:
        kernel = depthwise._forward_kernel

        def noted(*of):
            launch = kernel(*of)

            def noted_launch(*addresses):
                taken.append(of[-2:])
                launch(*addresses)

            return noted_launch

        context.setattr(depthwise, "_forward_kernel", noted)
        for start in starts:
            start[...] = x
            check(device, start, w)
        with plan.variant("direct"):
            check(device, starts[0], w)
        check(device, starts[0], w)
    assert taken == [(None, True), (None, False), (None, True), ("direct", True), (None, True)]


def test_a_call_alike_is_not_checked_again_and_one_of_other_arrays_is(device, arrays, monkeypatch):
    x, w, bias = arrays
    y = check(device, x, w, bias, padding=1)

    def again(*_, **__):
        raise AssertionError("checked again")

    monkeypatch.setattr(depthwise, "depthwise_geometry", again)
    others = [a.copy() for a in (x, w, bias)]
    np.testing.assert_array_equal(device.host(cuconv.depthwise_conv2d(*others, padding=1)), device.host(y))
    cuconv.depthwise_conv2d_dgrad(y, w, x.shape, padding=1)
    cuconv.depthwise_conv2d_wgrad(y, x, w.shape, padding=1, bias=True)
    with pytest.raises(AssertionError, match="checked again"):
        cuconv.depthwise_conv2d(*arrays, padding=2)


@pytest.mark.parametrize("wrong", [True, 1.0, (True, 1), (1, 1.0), ((True, 1), (1, 1)), "1", None], ids=repr)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_what_equals_a_number_is_refused_after_the_number_was_taken(device, arrays, name, wrong):
    x, w, _ = arrays
    rights = [1, (1, 1)] + [((1, 1), (1, 1))] * (name == "padding")
    for right in rights:
        cuconv.depthwise_conv2d(x, w, **{name: right})
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=name):
            cuconv.depthwise_conv2d(x, w, **{name: wrong})


def test_other_arrays_are_refused_after_good_ones_were_taken(device, arrays):
    x, w, bias = arrays
    y = cuconv.depthwise_conv2d(x, w, bias)
    for _ in range(2):
        for given, error in (
            ((x, device.host(w).view(np.ndarray).copy()), TypeError),
            ((x, w.astype(np.float64)), TypeError),
            ((x.view(np.int32), w.view(np.int32)), TypeError),
            ((x, w, w), ValueError),
            ((x, w.shape), TypeError),
            ((1, w), TypeError),
            ((x, w, 1), TypeError),
        ):
            with pytest.raises(error):
                cuconv.depthwise_conv2d(*given)
        for x_shape in (tuple(map(float, x.shape)), (True, *x.shape[1:]), (2, 4, 7, 6)):
            with pytest.raises((TypeError, ValueError)):
                cuconv.depthwise_conv2d_dgrad(y, w, x_shape)
        cuconv.depthwise_conv2d_dgrad(y, w, x.shape)


def test_where_a_result_is_written_is_looked_at_each_time(device, arrays):
    x, w, _ = arrays
    apart, dw, dbias = x.copy(), w.copy(), w[:, 0, 0, 0].copy()
    many = device.array(np.zeros(2**14, np.uint8))
    for _ in range(2):
        assert cuconv.depthwise_conv2d(x, w, padding=1, out=apart) is apart
        with pytest.raises(ValueError, match="out must not overlap another array, and shares memory with x"):
            cuconv.depthwise_conv2d(x, w, padding=1, out=x)
        assert cuconv.depthwise_conv2d_dgrad(x, w, x.shape, padding=1, out=apart) is apart
        with pytest.raises(ValueError, match="out must not overlap another array, and shares memory with dy"):
            cuconv.depthwise_conv2d_dgrad(x, w, x.shape, padding=1, out=x)
        found = cuconv.depthwise_conv2d_wgrad(apart, x, w.shape, padding=1, bias=True, out=(dw, dbias), workspace=many)
        assert found[0] is dw
        assert found[1] is dbias
        beside = apart.reshape(-1)
        for out, workspace, named in (
            ((beside[: w.size].reshape(w.shape), dbias), many, "out .* with dy"),
            ((dw, beside[:4]), many, "out .* with dy"),
            ((dw, dw.reshape(-1)[:4]), many, "out .* with dbias"),
            ((dw, dbias), x.reshape(-1), "workspace .* with x"),
        ):
            with pytest.raises(ValueError, match=f"^{named}$"):
                cuconv.depthwise_conv2d_wgrad(apart, x, w.shape, padding=1, bias=True, out=out, workspace=workspace)


def test_results_of_other_kinds_are_told_apart(device, arrays):
    """What is written to is remembered as what is read."""
    x, w, _ = arrays
    y = device.host(cuconv.depthwise_conv2d(x, w, padding=1))
    for _ in range(2):
        for layout in ("nchw", "nhwc"):
            out = device.array(np.zeros_like(y), layout)
            assert cuconv.depthwise_conv2d(x, w, padding=1, out=out) is out
            np.testing.assert_array_equal(device.host(out), y)
        for out, error in ((x[:1], ValueError), (x.astype(np.float64), TypeError), (x.view(np.int32), TypeError)):
            with pytest.raises(error, match=r"^out must have"):
                cuconv.depthwise_conv2d(x, w, padding=1, out=out)


def test_two_devices_are_told_apart():
    cupy = pytest.importorskip("cupy")

    def key(device):
        memory = cupy.cuda.UnownedMemory(2**40, 2**20, None, device_id=device)
        return interop._key((cupy.ndarray(X_SHAPE, np.float32, memptr=cupy.cuda.MemoryPointer(memory, 0)), 1))

    assert key(0) == key(0) != key(1)


def test_what_is_remembered_is_bounded(device, arrays, monkeypatch):
    monkeypatch.setattr(interop, "_MAX_REMEMBERED", 2)
    seen = []

    @interop.remembered
    def note(x, number):
        seen.append(number)
        return number

    x = arrays[0]
    for number in (0, 1, 0, 1, 2, 2, 0, 2):
        assert note(x, number) == number
    assert seen == [0, 1, 2, 0]


@pytest.mark.parametrize("current", [0, 1])
def test_a_thread_without_a_context_is_given_the_devices(device, arrays, monkeypatch, current):
    """Found out by a launch that fails, and any other failure reaches the caller."""
    x, w, _ = arrays
    y = device.host(cuconv.depthwise_conv2d(x, w))
    cuda = device.module.cuda
    launch_kernel, set_to = cuda.driver.launchKernel, []

    def refuse(*numbers):
        if not set_to:
            raise cuda.driver.CUDADriverError(201)
        launch_kernel(*numbers)

    monkeypatch.setattr(cuda.driver, "launchKernel", refuse)
    monkeypatch.setattr(cuda.driver, "ctxGetCurrent", lambda: current)
    monkeypatch.setattr(cuda.runtime, "setDevice", set_to.append, raising=False)
    if current:
        with pytest.raises(cuda.driver.CUDADriverError):
            cuconv.depthwise_conv2d(x, w)
    else:
        np.testing.assert_array_equal(device.host(cuconv.depthwise_conv2d(x, w)), y)
    assert set_to == ([] if current else [0])
