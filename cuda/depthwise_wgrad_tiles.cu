// Depthwise convolution, gradients of the weights and the bias, NCHW, stride 1, of kernels too large for
// depthwise_wgrad_runs: a thread owns neighbouring taps of one kernel row.
//
// A block owns some kernel rows of one channel and a slab of the batch: it goes through units, each some rows of dy in
// one image. Dy and the rows of x that it meets are laid out in shared memory as sums are made, zeros around them, and
// every thread walks over all of dy: kStep elements of it, the same for all threads, meet a window of x that moves
// along.
//
// Compile-time values: T; BIAS (whether dbias is summed too); FINAL (there is one slab, and no need for another
// launch); CHUNK (taps of a thread); THREADS.
#include "indices.cuh"
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kChunk = CUCONV_CHUNK;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kStep = 8;
constexpr int kWindow = 2 * kStep;
constexpr int kWarp = 32;
// Loads of global memory that are under way at once.
constexpr int kAhead = 4;

static_assert(kChunk <= kStep, "the window holds what a step of dy and a chunk of taps meet");

struct Parameters {
  int multiplier;  // planes of dy for each plane of x
  int K;           // output channels
  int R, S;
  int H, W, P, Q;
  int top, left;   // padding
  int stride_h, stride_w, dilation_h, dilation_w;
  int chunks;      // of a kernel row
  uint32 chunks_magic;
  int tap_rows;  // kernel rows of a block
  int unit_rows;   // rows of dy of a unit
  int row_units;   // units of an image
  int units;       // of all images
  int block_units; // that a block goes through
  int x_pitch, dy_pitch;
};

// kStep values of shared memory, from a multiple of 16 bytes on.
__device__ __forceinline__ void load_step(const Sum* source, Sum (&value)[kStep]) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(Sum));
#pragma unroll
  for (int i = 0; i < kStep; i += kPiece) {
    const auto piece = *reinterpret_cast<const Vector<Sum, kPiece>*>(source + i);
#pragma unroll
    for (int e = 0; e < kPiece; ++e) value[i + e] = piece.piece[e];
  }
}

// Lays `rows` rows of a plane (extent_h, extent_w), from first_row and first_column on, out in `pitch` columns each:
// zeros where there is none. Adds up all elements, and in `seen` a NaN where one is not finite.
__device__ __forceinline__ void lay_out(const T* plane, int extent_h, int extent_w, int first_row, int first_column,
                                        int rows, int pitch, Sum* shared, Sum& total, Sum& seen) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < rows; row += kThreads / kWarp) {
    const T* const source = plane + static_cast<int64>(first_row + row) * extent_w + first_column;
    const bool row_within = within(first_row + row, extent_h);
    for (int column = lane; column < pitch; column += kAhead * kWarp) {
      Sum value[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = column + i * kWarp;
        value[i] = row_within && within(first_column + at, extent_w) ? widen(source[at]) : Sum(0);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (column + i * kWarp < pitch) {
          shared[row * pitch + column + i * kWarp] = value[i];
          total += value[i];
          seen = fma(value[i], Sum(0), seen);
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    depthwise_wgrad_tiles(const T* dy, const T* x, Sum* partials, T* dw, T* dbias,
                          const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  Sum* const x_shared = reinterpret_cast<Sum*>(shared);
  Sum* const dy_shared = x_shared + (g.unit_rows + g.tap_rows - 1) * g.x_pitch;
  const int thread = static_cast<int>(threadIdx.x);
  const int first_unit = static_cast<int>(blockIdx.x) * g.block_units;
  const int units = min(g.block_units, g.units - first_unit);
  const int k = static_cast<int>(blockIdx.y);
  const int C = g.K / g.multiplier;
  const int r0 = static_cast<int>(blockIdx.z) * g.tap_rows;
  const int of_block = divide(thread, g.chunks_magic);
  const int chunk = thread - of_block * g.chunks;
  const int r = r0 + of_block;
  const bool owner = of_block < g.tap_rows && r < g.R;
  const int64 x_plane = static_cast<int64>(g.H) * g.W;
  const int64 dy_plane = static_cast<int64>(g.P) * g.Q;

  Sum sum[kChunk] = {};
  Sum bias_sum = 0, seen = 0, unused = 0;
  for (int turn = 0; turn < units; ++turn) {
    const int unit = first_unit + turn;
    const int image = unit / g.row_units;
    const int p0 = (unit - image * g.row_units) * g.unit_rows;
    const int rows = min(g.unit_rows, g.P - p0);
    __syncthreads();
    lay_out(x + (static_cast<int64>(image) * C + k / g.multiplier) * x_plane, g.H, g.W, p0 - g.top + r0, -g.left,
            rows + g.tap_rows - 1, g.x_pitch, x_shared, unused, seen);
    lay_out(dy + (static_cast<int64>(image) * g.K + k) * dy_plane + static_cast<int64>(p0) * g.Q, rows, g.Q, 0, 0, rows,
            g.dy_pitch, dy_shared, bias_sum, unused);
    __syncthreads();
    if (!owner) continue;
    for (int p = 0; p < rows; ++p) {
      const Sum* const x_row = x_shared + (p + of_block) * g.x_pitch + chunk * kChunk;
      const Sum* const dy_row = dy_shared + p * g.dy_pitch;
      Sum before[kStep], after[kStep], gradient[kStep];
      load_step(x_row, before);
#pragma unroll 2
      for (int q = 0; q < g.Q; q += kStep) {
        load_step(x_row + q + kStep, after);
        load_step(dy_row + q, gradient);
#pragma unroll
        for (int v = 0; v < kStep; ++v)
#pragma unroll
          for (int s = 0; s < kChunk; ++s)
            sum[s] = fma(v + s < kStep ? before[v + s] : after[v + s - kStep], gradient[v], sum[s]);
#pragma unroll
        for (int v = 0; v < kStep; ++v) before[v] = after[v];
      }
    }
  }

  // The zeros behind a row of dy have met elements of x that are not finite: once more without them.
  if (__syncthreads_or(g.Q % kStep != 0 && seen != seen)) {
#pragma unroll
    for (int s = 0; s < kChunk; ++s) sum[s] = Sum(0);
    for (int turn = 0; turn < units && owner; ++turn) {
      const int unit = first_unit + turn;
      const int image = unit / g.row_units;
      const int p0 = (unit - image * g.row_units) * g.unit_rows;
      const T* const x_source = x + (static_cast<int64>(image) * C + k / g.multiplier) * x_plane;
      const T* const dy_source = dy + (static_cast<int64>(image) * g.K + k) * dy_plane;
      for (int p = p0; p < min(p0 + g.unit_rows, g.P); ++p)
        for (int q = 0; q < g.Q; ++q) {
          const Sum gradient = widen(dy_source[static_cast<int64>(p) * g.Q + q]);
          const int row = p - g.top + r;
          const int column = q - g.left + chunk * kChunk;
#pragma unroll
          for (int s = 0; s < kChunk; ++s) {
            const bool exists = within(row, g.H) && within(column + s, g.W);
            const Sum value = exists ? widen(x_source[static_cast<int64>(row) * g.W + column + s]) : Sum(0);
            sum[s] = fma(value, gradient, sum[s]);
          }
        }
    }
  }

  const auto deliver = [&](int tap, Sum total) {
    const int entries = g.R * g.S + kBias;
    if (!kFinal) {
      partials[(static_cast<int64>(blockIdx.x) * entries + tap) * g.K + k] = total;
    } else if (tap < g.R * g.S) {
      dw[static_cast<int64>(k) * (g.R * g.S) + tap] = narrow<T>(total);
    } else {
      dbias[k] = narrow<T>(total);
    }
  };
#pragma unroll
  for (int s = 0; s < kChunk; ++s)
    if (owner && chunk * kChunk + s < g.S) deliver(r * g.S + chunk * kChunk + s, sum[s]);
  if (kBias && r0 == 0) {
    __syncthreads();
    x_shared[thread] = bias_sum;
    __syncthreads();
    if (thread == 0) {
      Sum total = 0;
      for (int i = 0; i < kThreads; ++i) total += x_shared[i];
      deliver(g.R * g.S, total);
    }
  }
}
