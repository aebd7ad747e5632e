"""The host-run tool catches what it says it catches: each kernel here has one planted fault, or none."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostcuda import available, cupy_twin, sanitizer_environment, simulate

pytestmark = pytest.mark.skipif(not available(), reason="g++ is missing: no kernel can run on the host")

TESTS = Path(__file__).parent
PTX = (TESTS.parent / "cuda" / "ptx.cuh").read_text().replace("#pragma once", "")


def run(body, *arrays, block=32, grid=1, parameters="float* x", shared=0, helpers="", **changes):
    """Launch a kernel with this body on NumPy arrays, given as its pointers; the arrays come back as it left them."""
    code = f'{PTX}\n{helpers}\nextern "C" __global__ void kernel({parameters}) {{\n{body}\n}}\n'
    with simulate(**changes):
        kernel = cupy_twin.RawModule(code=code, options=("-DCUCONV_TEST=1",)).get_function("kernel")
        device = [cupy_twin.asarray(array) for array in arrays]
        kernel((grid,), (block,), tuple(array.data.ptr for array in device), shared_mem=shared)
    return [np.asarray(array) for array in device]


def zeros(count=32):
    return np.zeros(count, np.float32)


REVERSE = """
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  {barrier}
  x[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
"""


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_barrier(order):
    numbers = np.arange(64, dtype=np.float32)
    (right,) = run(REVERSE.format(barrier="__syncthreads();"), numbers, block=64, order=order)
    assert np.array_equal(right, numbers[::-1])
    (wrong,) = run(REVERSE.format(barrier=""), numbers, block=64, order=order)
    assert np.isnan(wrong).any()


def test_shared_memory_of_templates_is_poisoned_before_each_block():
    helpers = """
    template <int kCount> __device__ float keep(float value) {
      __shared__ float kept[kCount];
      const float before = kept[0];
      kept[0] = value;
      return before;
    }"""
    body = """
    CUCONV_DYNAMIC_SHARED(bytes);
    float* const dynamic = reinterpret_cast<float*>(bytes);
    x[2 * blockIdx.x] = keep<3>(1.0f);
    x[2 * blockIdx.x + 1] = *dynamic;
    *dynamic = 1.0f;"""
    (x,) = run(body, zeros(6), block=1, grid=3, shared=4, helpers=helpers)
    assert np.isnan(x).all()


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_divergent_barriers_are_refused(order):
    body = "if (threadIdx.x < 7)\n __syncthreads();\nelse\n __syncthreads();"
    with pytest.raises(RuntimeError, match=r"waits at the __syncthreads of line \d+, and \d+ threads at that of line"):
        run(body, zeros(), order=order)


@pytest.mark.parametrize(
    ("order", "message"),
    [("forward", "have exited"), ("reverse", "exits while"), ("random", "have exited|exits while")],
)
def test_exited_threads_are_refused(order, message):
    with pytest.raises(RuntimeError, match=message):
        run("if (threadIdx.x < 31) return;\n__syncthreads();", zeros(), order=order)


def test_orders():
    body = "x[1 + int(x[0])] = threadIdx.x;\nx[0] += 1;"
    ran = {order: run(body, zeros(33), order=order)[0][1:].tolist() for order in ("forward", "reverse", "random")}
    other = run(body, zeros(33), order="random", seed=1)[0][1:].tolist()
    assert ran["forward"] == list(range(32))
    assert ran["reverse"] == list(range(31, -1, -1))
    assert sorted(ran["random"]) == sorted(other) == list(range(32))
    assert len({*map(tuple, ran.values()), tuple(other)}) == 4


def test_threads_and_blocks_have_their_numbers():
    code = f"""{PTX}
    extern "C" __global__ void number(int64* x) {{
      const int64 block = blockIdx.x + int64(gridDim.x) * (blockIdx.y + gridDim.y * blockIdx.z);
      const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      x[block % 24 * 30 + thread] = block + 1000 * thread;
    }}"""
    kernel = cupy_twin.RawModule(code=code).get_function("number")
    x = cupy_twin.empty((24, 30), np.int64)
    kernel((2, 3, 4), (5, 3, 2), (x.data.ptr,))
    assert np.array_equal(x, np.arange(24)[:, None] + 1000 * np.arange(30))
    with simulate(blocks=slice(-1, None)):
        kernel((2**31 - 1, 65535, 65535), (1,), (x.data.ptr,))
    last = (2**31 - 1) * 65535 * 65535 - 1
    assert x[last % 24, 0] == last


@pytest.mark.parametrize("order", ["forward", "random"])
def test_shuffles_and_votes(order):
    body = """
    const int i = threadIdx.x, lane = i % 32;
    const unsigned all = 0xffffffffu;
    const double value = i;
    out[i] = __shfl_sync(all, value, 5);
    out[64 + i] = __shfl_up_sync(all, value, 3, 16);
    out[128 + i] = __shfl_down_sync(all, value, 3, 8);
    out[192 + i] = __shfl_xor_sync(all, value, 9);
    out[256 + i] = __ballot_sync(all, lane % 3 == 0);
    out[320 + i] = __any_sync(all, i == 40);
    __syncwarp();
    if (lane < 4) out[384 + i] = __shfl_sync(0xfu, value, lane + 1, 4);"""
    (out,) = run(body, np.zeros(448), block=64, parameters="double* out", order=order)
    got = out.reshape(7, 64)
    i = np.arange(64)
    lane = i % 32
    assert np.array_equal(got[0], i // 32 * 32 + 5)
    assert np.array_equal(got[1], np.where(lane % 16 >= 3, i - 3, i))
    assert np.array_equal(got[2], np.where(lane % 8 < 5, i + 3, i))
    assert np.array_equal(got[3], i // 32 * 32 + (lane ^ 9))
    assert np.array_equal(got[4], np.full(64, sum(1 << b for b in range(0, 32, 3))))
    assert np.array_equal(got[5], i >= 32)
    assert np.array_equal(got[6], np.where(lane < 4, i // 32 * 32 + (lane + 1) % 4, 0))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x[0] = __shfl_sync(0x1u, x[0], 0);", "leaves it out"),
        ("if (threadIdx.x < 2) x[0] = __shfl_sync(0x3u, x[0], 9);", "reads lane 9"),
        ("if (threadIdx.x != 3) __syncwarp();", r"deadlock: .*thread 3 has exited"),
        ("if (threadIdx.x < 3) __syncwarp();\nelse __syncwarp();", "deadlock"),
    ],
)
def test_bad_warp_operations_are_refused(body, message):
    with pytest.raises(RuntimeError, match=message):
        run(body, zeros())
    with pytest.raises(RuntimeError, match="lanes that the block lacks"):
        run("__syncwarp();", zeros(), block=31)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("int n = 2147483647; n += int(x[0]) + 1; x[0] = n;", "overflow .* in kernel.cu, line"),
        ("float t[4]; t[int(x[0]) + 4] = 1; x[0] = t[0];", "index outside its array"),
        ("x[0] = reinterpret_cast<float4*>(x + 1)->x;", "misaligned"),
        ("x[0] = 1 << (32 + int(x[0]));", "shift"),
    ],
)
def test_undefined_behaviour_is_refused(body, message):
    with pytest.raises(RuntimeError, match=message):
        run(body, zeros(), block=1)


COPY = """
  CUCONV_DYNAMIC_SHARED(bytes);
  float* const tile = reinterpret_cast<float*>(bytes);
  __shared__ uint64 barrier[2];
  const bool leader = threadIdx.x == 0;
  if (leader) {
    ptx::barrier_init(&barrier[0], 32);
    ptx::barrier_init(&barrier[1], 32);
  }
  __syncthreads();
  for (int i = 0; i < 4; i++) {
    if (leader) {
      ptx::barrier_arrive_expect(&barrier[i % 2], 128);
      ptx::bulk_load(tile + i % 2 * 32, x + 32 * i, 128, &barrier[i % 2]);
    } else {
      ptx::barrier_arrive(&barrier[i % 2]);
    }
    ptx::barrier_wait(&barrier[i % 2], i / 2 % 2);
    tile[i % 2 * 32 + threadIdx.x] += 1;
    ptx::fence_shared_for_bulk();
    __syncthreads();
    if (leader) {
      ptx::bulk_store(y + 32 * i, tile + i % 2 * 32, 128);
      ptx::bulk_store_commit();
      ptx::bulk_store_wait_read<1>();
    }
    __syncthreads();
  }
  if (leader) ptx::bulk_store_wait_read<0>();
"""


def copy(body, **changes):
    x = np.arange(128, dtype=np.float32)
    return run(body, x, zeros(128), parameters="const float* x, float* y", shared=256, **changes)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_bulk_copies(order):
    x, y = copy(COPY, order=order)
    assert np.array_equal(y, x + 1)


def broken_copy(old, new, order):
    assert old in COPY
    return copy(COPY.replace(old, new), order=order)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("wait_read<1>", "wait_read<2>", "changed between bulk_store"),
        ("if (leader) ptx::bulk_store_wait_read<0>();", "", "exits before"),
        ("ptx::bulk_store_commit();", "", "exits before"),
        ("ptx::fence_shared_for_bulk();", "", "no fence_shared_for_bulk"),
        ("128, &barrier", "120, &barrier", "whole 16 bytes"),
        ("x + 32 * i, 128", "x + 32 * i, 112", "deadlock: .*barrier_wait"),
        ("i / 2 % 2", "i % 2", "once too often"),
        ("tile + i % 2 * 32, x", "tile + i * 32, x", "leaves shared memory"),
        ("ptx::barrier_init(&barrier[1], 32);", "", "before barrier_init"),
    ],
)
def test_faulty_bulk_copies_are_refused(old, new, message, order):
    with pytest.raises(RuntimeError, match=message):
        broken_copy(old, new, order)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_a_missing_wait_shows(order):
    wait = "ptx::barrier_wait(&barrier[i % 2], i / 2 % 2);"
    x, y = broken_copy(wait, f"if (threadIdx.x % 2) {wait}", order)
    assert np.array_equal(y[1::2], x[1::2] + 1)
    assert not np.any(y[::2] == x[::2] + 1)
    with pytest.raises(RuntimeError, match=r"changed between|once too often"):
        broken_copy(wait, "", order)


def test_bulk_loads_land_late():
    body = """
    CUCONV_DYNAMIC_SHARED(bytes);
    __shared__ uint64 barrier;
    ptx::barrier_init(&barrier, 1);
    ptx::barrier_arrive_expect(&barrier, 16);
    *reinterpret_cast<float*>(bytes) = 5;
    ptx::bulk_load(bytes, x, 16, &barrier);
    const float early = *reinterpret_cast<float*>(bytes);
    ptx::barrier_wait(&barrier, 0);
    x[1] = early;
    x[2] = *reinterpret_cast<float*>(bytes);"""
    (x,) = run(body, np.full(4, 7, np.float32), block=1, shared=16)
    assert np.isnan(x[1])
    assert x[2] == 7


# Four times 32 numbers by 8 threads, the next on their way while the last are written.
COPY_ASYNC = """
  CUCONV_DYNAMIC_SHARED(bytes);
  float* const tile = reinterpret_cast<float*>(bytes);
  const int own = 4 * threadIdx.x;
  const auto load = [&](int i) {
    if (i < 4) ptx::copy_async<16>(tile + i % 2 * 32 + own, x + 32 * i + own);
    ptx::copy_async_commit();
  };
  load(0);
  for (int i = 0; i < 4; i++) {
    load(i + 1);
    ptx::copy_async_wait<1>();
    for (int e = 0; e < 4; e++) y[32 * i + own + e] = tile[i % 2 * 32 + own + e] + 1;
  }
  ptx::copy_async_wait<0>();
"""


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_asynchronous_copies(order):
    x, y = copy(COPY_ASYNC, block=8, order=order)
    assert np.array_equal(y, x + 1)
    x, y = copy(COPY_ASYNC.replace("wait<1>", "wait<2>"), block=8, order=order)
    assert np.isnan(y).any()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("x + 32 * i + own);", "x + 32 * i + own + 1);", "copy_async needs addresses"),
        ("tile + i % 2 * 32 + own,", "tile + i * 32 + own,", "copy_async of 16 bytes leaves shared memory"),
        ("ptx::copy_async_commit();", "if (i < 3) ptx::copy_async_commit();", "exits before copy_async_commit"),
    ],
)
def test_faulty_asynchronous_copies_are_refused(old, new, message):
    assert old in COPY_ASYNC
    with pytest.raises(RuntimeError, match=message):
        copy(COPY_ASYNC.replace(old, new), block=8)


def test_older_architectures_have_no_bulk_copies():
    (x,) = run("x[0] = __CUDA_ARCH__;", zeros(), compute_capability="75")
    assert x[0] == 750
    with pytest.raises(RuntimeError, match="barrier_init"):
        copy(COPY, compute_capability="75")


def test_conversions():
    import ml_dtypes

    every = np.arange(2**16, dtype=np.uint16)
    rng = np.random.default_rng(0)
    halfway = (every.astype(np.uint32) << 16) + np.array([[0x7FFF], [0x8000], [0x8001]], np.uint32)
    floats = [rng.integers(0, 2**32, 2**18, dtype=np.uint32), halfway.ravel()]
    # A half's neighbourhood: its own bits, the halfway points beside it, and one bit to either side of those.
    halves = every.view(np.float16).astype(np.float32).view(np.uint32)
    floats += [halves + np.uint32(step) for step in (0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001)]
    floats = np.concatenate(floats).view(np.float32)
    for name, dtype in (("half", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        body = f"""
        for (int64 i = threadIdx.x; i < {floats.size}; i += 32) {{
          narrow[i] = ptx::float_to_{name}(wide[i]);
          if (i < 65536) back[i] = ptx::{name}_to_float(static_cast<uint16>(i));
        }}"""
        parameters = "const float* wide, uint16* narrow, float* back"
        _, narrow, back = run(body, floats, np.zeros(floats.size, np.uint16), zeros(2**16), parameters=parameters)
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = floats.astype(dtype)
        nan = np.isnan(floats)
        assert np.array_equal(narrow[~nan], wanted.view(np.uint16)[~nan])
        assert np.isnan(narrow[nan].view(dtype).astype(np.float32)).all()
        wanted = every.view(dtype).astype(np.float32)
        nan = np.isnan(wanted)
        assert np.array_equal(back[~nan].view(np.uint32), wanted[~nan].view(np.uint32))
        assert np.isnan(back[nan]).all()


MATRICES = """
  CUCONV_DYNAMIC_SHARED(bytes);
  uint16* const tile = reinterpret_cast<uint16*>(bytes);
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < 16 * 24; i += blockDim.x) tile[i] = a[i];
  __syncthreads();
  uint32 piece[4];
  ptx::load_matrices(tile + lane % 16 * 24 + lane / 16 * 8, piece);
  // What a warp has loaded is its own, whatever comes over it.
  tile[lane] = 0;
  uint32 right[2];
  for (int half = 0; half < 2; half++) {
    const int k = half * 8 + lane % 4 * 2;
    right[half] = b[k * 8 + lane / 4] | static_cast<uint32>(b[(k + 1) * 8 + lane / 4]) << 16;
  }
  float sum[4] = {1, 2, 3, 4};
  ptx::multiply_NAME(sum, piece, right);
  if (threadIdx.x < 32)
    for (int e = 0; e < 4; e++) y[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sum[e];
"""


def multiply(body, a, b, **changes):
    parameters = "const uint16* a, const uint16* b, float* y"
    arrays = (a.view(np.uint16), b.view(np.uint16), zeros(128))
    return run(body, *arrays, parameters=parameters, shared=16 * 24 * 2, **changes)[2].reshape(16, 8)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", ["halves", "bfloat16s"])
def test_matrix_products(name, order):
    import ml_dtypes

    dtype = {"halves": np.float16, "bfloat16s": ml_dtypes.bfloat16}[name]
    rng = np.random.default_rng(3)
    # Small integers: sums are exact in any order. Columns behind the 16th are not the product's.
    a, b = (rng.integers(-9, 10, shape).astype(dtype) for shape in ((16, 24), (16, 8)))
    y = multiply(MATRICES.replace("NAME", name), a, b, order=order)
    start = np.array([1, 2] * 4) + 2 * (np.arange(16) >= 8)[:, None]
    assert np.array_equal(y, a[:, :16].astype(np.float32) @ b.astype(np.float32) + start)


def test_transposed_matrices():
    """Every lane's pieces, of a tile whose elements are numbered."""
    body = """
  CUCONV_DYNAMIC_SHARED(bytes);
  uint16* const tile = reinterpret_cast<uint16*>(bytes);
  for (int i = threadIdx.x; i < 32 * 8; i += blockDim.x) tile[i] = a[i];
  __syncthreads();
  uint32 piece[4];
  ptx::load_matrices_transposed(tile + threadIdx.x * 8, piece);
  for (int m = 0; m < 4; m++) y[threadIdx.x * 4 + m] = piece[m];
"""
    numbers = np.arange(32 * 8, dtype=np.uint16)
    parameters = "const uint16* a, uint32* y"
    _, y = run(body, numbers, np.zeros(128, np.uint32), parameters=parameters, shared=512, block=32)
    lanes = np.arange(32)
    for m in range(4):
        matrix = numbers.reshape(4, 8, 8)[m]
        lower, upper = (matrix[lanes % 4 * 2 + e, lanes // 4].astype(np.uint32) for e in (0, 1))
        np.testing.assert_array_equal(y.reshape(32, 4)[:, m], lower | upper << 16)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lane / 16 * 8, piece", "lane / 16 * 9, piece", "aligned to 16 bytes"),
        ("lane % 16 * 24 +", "lane * 24 +", "outside shared memory"),
        ("tile + lane % 16 * 24", "reinterpret_cast<const uint16*>(a) + lane % 16 * 24", "outside shared memory"),
        ("ptx::load_m", "if (lane < 31) ptx::load_m", "deadlock"),
        ("ptx::multiply_", "if (lane != 5) ptx::multiply_", "deadlock"),
    ],
)
def test_faulty_matrix_products_are_refused(old, new, message):
    body = MATRICES.replace("NAME", "halves")
    assert old in body
    a, b = np.ones((16, 24), np.float16), np.ones((16, 8), np.float16)
    with pytest.raises(RuntimeError, match=message):
        multiply(body.replace(old, new), a, b)
    with pytest.raises(RuntimeError, match="load_matrices"):
        multiply(body, a, b, compute_capability="75")


def test_arguments_are_checked():
    code = """
    struct Pair { int a; float b; };
    extern "C" __global__ void kernel(float* x, const __grid_constant__ Pair pair, int n, double scale) {
      x[n] = pair.a + pair.b * scale;
    }"""
    kernel = cupy_twin.RawModule(code=code).get_function("kernel")
    x = cupy_twin.asarray(zeros(4))
    pair = np.array((3, 0.5), np.dtype([("a", "i4"), ("b", "f4")]))[()]
    kernel((1,), (1,), (x.data.ptr, pair, np.int32(2), np.float64(8)))
    assert x.tolist() == [0, 0, 7, 0]
    for args in ((x.data.ptr, pair, 2, np.float64(8)), (x.data.ptr, pair, np.int32(2), np.float32(8)), (x.data.ptr,)):
        with pytest.raises(ValueError, match="bytes"):
            kernel((1,), (1,), args)
    for wrong in (8.0, x, True, None):
        with pytest.raises(TypeError, match="int or a NumPy scalar"):
            kernel((1,), (1,), (x.data.ptr, pair, np.int32(2), wrong))


def test_launches_are_checked():
    kernel = cupy_twin.RawModule(code='extern "C" __global__ void kernel() {}').get_function("kernel")
    kernel((1, 1, 1), (1024,), (), shared_mem=48 * 1024)
    for grid, block in (((0,), (32,)), ((2**31,), (32,)), ((1, 65536), (32,)), ((1,), (1025,)), ((1,), (32, 0))):
        with pytest.raises(ValueError, match="no device launches"):
            kernel(grid, block, ())
    with pytest.raises(ValueError, match="shared memory"):
        kernel((1,), (32,), (), shared_mem=48 * 1024 + 1)
    kernel.max_dynamic_shared_size_bytes = 100 * 1024
    kernel((1,), (32,), (), shared_mem=100 * 1024)
    with simulate(shared_per_block=64 * 1024), pytest.raises(ValueError, match="shared memory"):
        kernel((1,), (32,), (), shared_mem=64 * 1024)


def test_compile_errors_carry_the_log():
    with pytest.raises(RuntimeError, match="nonsense"):
        run("nonsense();", zeros())


def test_arrays():
    source = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = cupy_twin.asarray(source)
    array[0, 0] = 9
    assert source[0, 0] == 0
    assert cupy_twin.asarray(array).data.ptr == array.data.ptr
    assert cupy_twin.ascontiguousarray(array[:, 1:]).flags.c_contiguous
    assert isinstance(array[1:], cupy_twin.ndarray)
    assert array[1:].data.ptr == array.data.ptr + 12
    assert np.isnan(cupy_twin.empty((2, 3), np.float16)).all()
    with array.device as device, simulate(compute_capability="75", multiprocessors=40):
        assert device.compute_capability == "75"
        runtime = cupy_twin.cuda.runtime
        assert runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device.id) == 40


OVERRUNS = {
    "none": "x[31] = 0;",
    "global": "x[32] = 0;",
    "global, before": "x[0] = x[zero - 1];",
    "dynamic": "CUCONV_DYNAMIC_SHARED(bytes); bytes[100 + zero] = 0;",
    "static in a template": "touch<5>(zero);",
    "static, aligned": "__shared__ __align__(128) float tile[3]; float* p = tile; x[0] = p[3 + zero];",
}
TOUCH = "template <int n> __device__ void touch(int i) { __shared__ float t[n]; float* p = t; p[n + i] = 0; }"


def overrun(number):
    """One kernel with every overrun, so that it compiles once; x[0] says which, and x[1] is zero."""
    cases = "\n".join(f"if (x[0] == {i}) {{ {body} }}" for i, body in enumerate(OVERRUNS.values()))
    x = zeros()
    x[0] = number
    run(f"const int zero = int(x[1]);\n{cases}", x, block=1, shared=100, helpers=TOUCH)


def test_overruns_end_the_process_under_the_address_sanitizer():
    def start(number):
        script = f"import test_hostcuda; test_hostcuda.overrun({number})"
        environment = sanitizer_environment() | {"PYTHONPATH": str(TESTS)}
        return subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)

    right = start(0)
    _, output = right.communicate()
    assert right.returncode == 0, output
    children = [start(number) for number in range(1, len(OVERRUNS))]
    for name, child in zip(list(OVERRUNS)[1:], children, strict=True):
        _, output = child.communicate()
        assert child.returncode != 0, name
        assert "AddressSanitizer" in output, name
        assert "kernel.cu" in output, name


CLUSTER = """
  CUCONV_DYNAMIC_SHARED(bytes);
  float* const own = reinterpret_cast<float*>(bytes);
  own[threadIdx.x] = x[32 * blockIdx.x + threadIdx.x];
  {meeting}
  if (blockIdx.x == {reader}) {{
    float total = 0;
    for (int rank = 0; rank < 3; ++rank) total += ptx::load_of_cluster(own + {at}, rank);
    x[threadIdx.x] = total;
  }}
  ptx::cluster_meet();
"""


def test_the_last_block_of_a_cluster_reads_what_the_others_have():
    numbers = np.arange(96, dtype=np.float32)
    launch = {"grid": 3, "shared": 128, "parameters": "float* x"}
    right = CLUSTER.format(meeting="ptx::cluster_meet();", reader=2, at="threadIdx.x")
    (totals,) = run(right, numbers, **launch)
    assert np.array_equal(totals[:32], numbers.reshape(3, 32).sum(axis=0))
    for fault, message in (
        ({"meeting": "", "reader": 2, "at": "threadIdx.x"}, "has not met it"),
        ({"meeting": "ptx::cluster_meet();", "reader": 1, "at": "threadIdx.x"}, "has not met it"),
        ({"meeting": "ptx::cluster_meet();", "reader": 2, "at": "threadIdx.x + 1"}, "outside shared memory"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(CLUSTER.format(**fault), numbers, **launch)
