"""What only hardware shows: streams, graphs, threads, memory that runs out, several devices."""

from __future__ import annotations

import threading

import numpy as np
import oracle
import pytest

import cuconv


@pytest.fixture
def arrays(gpu, rng):
    """x, w, bias on the host and on the GPU."""
    host = oracle.random_arrays(rng, (4, 16, 64, 72), (16, 1, 3, 3), "float32")
    return host, [gpu.array(a) for a in host]


def check(gpu, y, host):
    oracle.assert_within_bound(gpu.host(y), *host, padding=((1, 1), (1, 1)))


def test_runs_on_the_current_stream_without_synchronising(gpu, arrays):
    cupy = gpu.module
    host, (x, w, bias) = arrays
    cuconv.depthwise_conv2d(x, w, bias, padding=1)
    stream = cupy.cuda.Stream(non_blocking=True)
    late = cupy.zeros_like(x)
    busy = cupy.ones((4096, 4096), np.float32)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(40):
            busy = busy @ busy * np.float32(1e-8)
        # What the convolution reads is written only after the products; a launch elsewhere would read zeros.
        cupy.copyto(late, x)
        y = cuconv.depthwise_conv2d(late, w, bias, padding=1)
        assert not stream.done, "the call waited for the stream, or the products were too short to tell"
    stream.synchronize()
    check(gpu, y, host)


def test_captured_in_a_graph_after_a_first_call(gpu, arrays):
    cupy = gpu.module
    host, (x, w, bias) = arrays
    y = cuconv.depthwise_conv2d(x, w, bias, padding=1)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        cuconv.depthwise_conv2d(x, w, bias, padding=1, out=y)
        graph = stream.end_capture()
    y.fill(np.nan)
    graph.launch(stream)
    stream.synchronize()
    check(gpu, y, host)


def test_two_threads_first_call_together(gpu, arrays):
    host, (x, w, bias) = arrays
    start = threading.Barrier(4)
    results = [None] * 4

    def call(index):
        start.wait()
        results[index] = cuconv.depthwise_conv2d(x, w, bias, padding=1)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gpu.module.cuda.Device().synchronize()
    for y in results:
        check(gpu, y, host)


def test_threads_launch_one_kernel_each_on_its_own_arrays(gpu, rng):
    """Launches share what was prepared of a kernel, and nothing that another thread could change under way."""
    cupy = gpu.module
    hosts = [oracle.random_arrays(rng, (2, 4, 10, 11), (4, 1, 3, 3), "float32") for _ in range(8)]
    given = [[gpu.array(a) for a in host] for host in hosts]
    outs = [[cupy.empty((2, 4, 10, 11), np.float32) for _ in range(100)] for _ in hosts]
    cupy.cuda.Device().synchronize()

    def call(index):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for out in outs[index]:
                cuconv.depthwise_conv2d(*given[index], padding=1, out=out)
        stream.synchronize()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for host, ys in zip(hosts, outs, strict=True):
        check(gpu, ys[0], host)
        for y in ys[1:]:
            assert (y == ys[0]).all()


@pytest.mark.parametrize("name", ["null", "ptds"])
def test_runs_on_the_default_streams(gpu, arrays, name):
    """The legacy one, and that of a thread, in a thread that has not used the device yet."""
    host, given = arrays
    results = []

    def call():
        with getattr(gpu.module.cuda.Stream, name) as stream:
            results.append(cuconv.depthwise_conv2d(*given, padding=1))
            stream.synchronize()

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    check(gpu, results[0], host)


def test_after_memory_runs_out_the_next_call_works(gpu, arrays):
    cupy = gpu.module
    host, (x, w, bias) = arrays
    huge = cupy.broadcast_to(cupy.ones((1, 1, 1, 1), np.float32), (2**6, 2**10, 2**11, 2**11))
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cuconv.depthwise_conv2d(huge, cupy.ones((2**10, 1, 1, 1), np.float32))
    check(gpu, cuconv.depthwise_conv2d(x, w, bias, padding=1), host)


def test_arrays_on_a_device_that_is_not_current(gpu, arrays):
    cupy = gpu.module
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU: nothing runs on a second one")
    host, _ = arrays
    with cupy.cuda.Device(1):
        there = [cupy.asarray(a) for a in host]
    assert cupy.cuda.Device().id == 0
    y = cuconv.depthwise_conv2d(*there, padding=1)
    assert y.device.id == 1
    assert cupy.cuda.Device().id == 0
    check(gpu, y, host)
    with pytest.raises(ValueError, match="x is on 1 and w on 0"):
        cuconv.depthwise_conv2d(there[0], cupy.asarray(host[1]))


def test_float32_and_bfloat16_subnormals_flush_to_zero(gpu):
    """CuPy compiles with -ftz=true; the documentation says so, and this notices when it changes."""
    x = gpu.array(np.full((1, 1, 1, 4), 1e-40, np.float32))
    y = cuconv.depthwise_conv2d(x, gpu.array(np.ones((1, 1, 1, 1), np.float32)))
    assert (gpu.host(y) == 0).all()
