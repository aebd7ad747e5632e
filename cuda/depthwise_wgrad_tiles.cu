// Depthwise convolution, gradients of the weights and the bias, NCHW, stride 1, of kernels too large for
// depthwise_wgrad_runs: a thread owns neighbouring taps of some kernel rows, one below the other.
//
// A block owns some kernel rows of one channel and a slab of the batch: it goes through units, each some rows of dy in
// one image. Dy and the rows of x that it meets are laid out in shared memory as sums are made, zeros around them. A
// thread walks down some rows of dy, kStep columns at a time: a row of these meets ROWS windows of x, of which the next
// row of dy meets all but one again. Threads with the same taps and other rows of dy are added in the end.
//
// Compile-time values: T; BIAS (whether dbias is summed too); FINAL (there is one slab, and no need for another
// launch); ROWS, CHUNK (of a thread: kernel rows, and taps of each); THREADS.
#include "indices.cuh"
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kRows = CUCONV_ROWS;
constexpr int kChunk = CUCONV_CHUNK;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kStep = 8;
// Columns of x that a step of dy and a chunk of taps meet, in whole vectors.
constexpr int kPiece = 16 / static_cast<int>(sizeof(Sum));
constexpr int kWindow = (kStep + kChunk - 1 + kPiece - 1) / kPiece * kPiece;
constexpr int kWarp = 32;
// Loads of global memory that are under way at once.
constexpr int kAhead = 4;

struct Parameters {
  int multiplier;  // planes of dy for each plane of x
  int K;           // output channels
  int R, S;
  int H, W, P, Q;
  int top, left;   // padding
  int stride_h, stride_w, dilation_h, dilation_w;
  int chunks;      // of a kernel row
  int tap_threads; // that have all taps of the block, among them
  uint32 chunks_magic, tap_threads_magic;
  int tap_rows;    // kernel rows of a block: a multiple of ROWS
  int unit_rows;   // rows of dy of a unit
  int thread_rows; // of them that a thread walks down
  int row_units;   // units of an image
  int units;       // of all images
  int block_units; // that a block goes through
  int x_pitch, dy_pitch;
};

// Values of shared memory, from a multiple of 16 bytes on.
template <int kCount>
__device__ __forceinline__ void load_vectors(const Sum* source, Sum (&value)[kCount]) {
  static_assert(kCount % kPiece == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += kPiece) {
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
  const int part = divide(thread, g.tap_threads_magic);
  const int of_part = thread - part * g.tap_threads;
  const int group = divide(of_part, g.chunks_magic);
  const int chunk = of_part - group * g.chunks;
  const int first_row = group * kRows;
  const bool owner = part * g.thread_rows < g.unit_rows;
  const int64 x_plane = static_cast<int64>(g.H) * g.W;
  const int64 dy_plane = static_cast<int64>(g.P) * g.Q;

  Sum sum[kRows][kChunk] = {};
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
            g.dy_pitch, dy_shared, bias_sum, seen);
    __syncthreads();
    // The thread's rows of dy, and of them those whose rows of x are not all padding.
    const int above = g.top - r0 - first_row - p0;
    const int p_begin = max(part * g.thread_rows, above - (kRows - 1));
    const int p_end = min(min(rows, (part + 1) * g.thread_rows), above + g.H);
    if (!owner || p_begin >= p_end) continue;
#pragma unroll 1
    for (int q = 0; q < g.Q; q += kStep) {
      const Sum* x_row = x_shared + (p_begin + first_row) * g.x_pitch + chunk * kChunk + q;
      const Sum* dy_row = dy_shared + p_begin * g.dy_pitch + q;
      Sum window[kRows][kWindow];
#pragma unroll
      for (int i = 0; i < kRows - 1; ++i, x_row += g.x_pitch) load_vectors(x_row, window[i]);
#pragma unroll 1
      for (int p = p_begin; p < p_end; p += kRows) {
#pragma unroll
        for (int phase = 0; phase < kRows; ++phase) {
          if (p + phase >= p_end) break;
          Sum gradient[kStep];
          load_vectors(dy_row, gradient);
          load_vectors(x_row, window[(phase + kRows - 1) % kRows]);
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int v = 0; v < kStep; ++v)
#pragma unroll
              for (int s = 0; s < kChunk; ++s)
                sum[i][s] = fma(window[(phase + i) % kRows][v + s], gradient[v], sum[i][s]);
          x_row += g.x_pitch;
          dy_row += g.dy_pitch;
        }
      }
    }
  }

  // The zeros behind a row of dy have met elements of x that are not finite, and rows of dy that are not finite have not
  // met the padding: once more, tap by tap.
  if (__syncthreads_or(seen != seen)) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int s = 0; s < kChunk; ++s) sum[i][s] = Sum(0);
    for (int turn = 0; turn < units && owner; ++turn) {
      const int unit = first_unit + turn;
      const int image = unit / g.row_units;
      const int p0 = (unit - image * g.row_units) * g.unit_rows;
      const T* const x_source = x + (static_cast<int64>(image) * C + k / g.multiplier) * x_plane;
      const T* const dy_source = dy + (static_cast<int64>(image) * g.K + k) * dy_plane;
      const int end = min(min(p0 + g.unit_rows, g.P), p0 + (part + 1) * g.thread_rows);
      for (int p = p0 + part * g.thread_rows; p < end; ++p)
        for (int q = 0; q < g.Q; ++q) {
          const Sum gradient = widen(dy_source[static_cast<int64>(p) * g.Q + q]);
          const int column = q - g.left + chunk * kChunk;
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int s = 0; s < kChunk; ++s) {
              const int row = p - g.top + r0 + first_row + i;
              const bool exists = within(row, g.H) && within(column + s, g.W);
              const Sum value = exists ? widen(x_source[static_cast<int64>(row) * g.W + column + s]) : Sum(0);
              sum[i][s] = fma(value, gradient, sum[i][s]);
            }
        }
    }
  }

  // Threads with the same taps add up, always in the same order.
  constexpr int kTaps = kRows * kChunk;
  const int parts = (g.unit_rows + g.thread_rows - 1) / g.thread_rows;
  __syncthreads();
  if (owner && part > 0) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
      x_shared[((part - 1) * kTaps + tap) * g.tap_threads + of_part] = sum[tap / kChunk][tap % kChunk];
  }
  __syncthreads();
  if (part == 0) {
    for (int other = 0; other < parts - 1; ++other)
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
        sum[tap / kChunk][tap % kChunk] += x_shared[(other * kTaps + tap) * g.tap_threads + of_part];
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
  if (part == 0) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int s = 0; s < kChunk; ++s) {
        const int r = r0 + first_row + i;
        const int column = chunk * kChunk + s;
        if (first_row + i < g.tap_rows && r < g.R && column < g.S) deliver(r * g.S + column, sum[i][s]);
      }
  }
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
