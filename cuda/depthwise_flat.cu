// Depthwise convolution, NCHW, 16-bit, on tensor cores, of planes as they lie in memory (sm_90 and newer): forward, and
// the gradient of the input, which is the convolution of dy with the kernel turned around. The names are the forward
// pass's. See flat.cuh.
//
// A unit's outputs are its window times a band: a matrix of kernel row r whose element (k, n) is w[r][s] where
// k = n + s + the window's place in its first chunk, and zero elsewhere. A product takes one chunk of the windows of 16
// units; the bands stay in a warp's registers.
//
// A block owns some rows of one channel, in several images in turn. One bulk copy brings what they need, one takes the
// results back.
//
// The zeros of a band make NaN of an infinity or NaN anywhere in the window, and so does an infinite weight of the
// zeros that it meets. Where a sum is not finite, all of the block's rows are made again, tap by tap.
//
// Compile-time values: T; R, S; LEFT (padding); TURNED (the kernel, both ways); WIDE (bit r: the windows of kernel row
// r reach into a third chunk); THREADS; STAGES (images under way at once); OUTPUTS (of which results are on their way).
#include "flat.cuh"
#include "numbers.cuh"
#include "products.cuh"

using T = CUCONV_T;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr int kLeft = CUCONV_LEFT;
constexpr bool kTurned = CUCONV_TURNED;
constexpr int kWide = CUCONV_WIDE;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kOutputs = CUCONV_OUTPUTS;

constexpr int kWarps = kThreads / kWarp;
constexpr int kRight = kS - 1 - kLeft;
// A row's first outputs, and its last, need so many of its columns.
constexpr int kEdge = kS - 1;

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements");
static_assert(kR <= 8 && kS <= kChunk + 2, "WIDE has eight bits, and a window three chunks at most");
static_assert(0 <= kLeft && kLeft <= kEdge, "an output row is as long as a row of x");

struct Parameters {
  int K;
  int H, W;
  int top;                        // padding
  int shift;                      // where units start, counted from a chunk: an even number
  int images;
  int block_rows;
  int block_images;               // images that a block works on in turn
  int input_bytes, output_bytes;  // shared bytes of one image
  int64 total_x;                  // elements of x
};

// A lane's part of the band of a kernel row, for each chunk of a window.
struct Band {
  uint32 word[3];
};

__device__ __forceinline__ void load_weights(const T* w, float (&weight)[kR][kS], uint16 (&bits)[kR][kS]) {
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      const T value = w[kTurned ? kR * kS - 1 - (r * kS + s) : r * kS + s];
      weight[r][s] = widen(value);
      bits[r][s] = value.bits;
    }
}

// Rows k and k + 1 of column n of the band of a kernel row, `place` of whose windows is in their first chunk.
__device__ __forceinline__ uint32 word_of_band(const uint16 (&row)[kS], int place, int k, int n) {
  uint32 word = 0;
#pragma unroll
  for (int e = 0; e < 2; ++e)
#pragma unroll
    for (int s = 0; s < kS; ++s)
      if (k + e == place + n + s) word |= static_cast<uint32>(row[s]) << (16 * e);
  return word;
}

// The outputs at an edge of some rows, whose taps beyond it meet zeros. `source` is the first of the columns that these
// need, in the row of the first tap, and `result` the first output.
template <bool kLast>
__device__ __forceinline__ void convolve_edge(const T* source, int W, const float (&weight)[kR][kS], float start,
                                              T* result) {
  constexpr int kCount = kLast ? kRight : kLeft;
  constexpr int kFirst = kLast ? 0 : kLeft;
  float sum[kCount > 0 ? kCount : 1];
#pragma unroll
  for (int t = 0; t < kCount; ++t) sum[t] = start;
#pragma unroll
  for (int r = 0; r < kR; ++r, source += W) {
#pragma unroll
    for (int j = 0; j < kEdge; ++j) {
      const float value = widen(source[j]);
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        const int s = j - t + kFirst;
        if (0 <= s && s < kS) sum[t] = fma(value, weight[r][s], sum[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kCount; ++t) result[t] = narrow<T>(sum[t]);
}

// One output, tap by tap, with the zeros of the padding. `source` is where its first tap is, at (row, column) of x.
__device__ __forceinline__ float convolve_one(const Parameters& g, const T* source, int row, int column, const T* w,
                                              float sum) {
#pragma unroll 1
  for (int r = 0; r < kR; ++r)
#pragma unroll 1
    for (int s = 0; s < kS; ++s) {
      const bool exists = within(row + r, g.H) && within(column + s, g.W);
      const int tap = kTurned ? kR * kS - 1 - (r * kS + s) : r * kS + s;
      sum = fma(exists ? widen(source[r * g.W + s]) : 0.0f, widen(w[tap]), sum);
    }
  return sum;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    depthwise_flat(const T* x, const T* w, const T* bias, T* y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  unsigned char* const outputs = shared + kStages * g.input_bytes;
  __shared__ uint64 full[kStages];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int k = static_cast<int>(blockIdx.y);
  const int first_image = static_cast<int>(blockIdx.z) * g.block_images;
  const int images = min(g.block_images, g.images - first_image);
  const Rows rows(static_cast<int>(blockIdx.x) * g.block_rows, g.block_rows, g.H, g.top, kR);
  const int count = rows.rows * g.W;

  const int64 plane = static_cast<int64>(g.H) * g.W;
  const int64 image = g.K * plane;
  const int64 first = first_image * image + k * plane;
  const T* const x_run = x + first + static_cast<int64>(rows.low) * g.W;
  T* const y_run = y + first + static_cast<int64>(rows.first) * g.W;

  // In shared memory a row of x lies as far from a chunk as in x, row `top_row`, which may be one of padding, in the
  // chunk behind the margin. Neighbours in the array around the run come with it.
  const int padding = (rows.low - rows.top_row) * g.W;
  const auto input_of = [&](int turn) { return reinterpret_cast<T*>(shared + turn % kStages * g.input_bytes); };
  const auto output_of = [&](int turn) { return reinterpret_cast<T*>(outputs + turn % kOutputs * g.output_bytes); };
  // Where row `top_row` is.
  const auto top_of = [&](int turn) {
    return input_of(turn) + kMargin + beyond_chunks(place_in_chunk(x_run + turn * image) - padding);
  };
  const auto load = [&](int turn) {
    load_run(Run<const T>(x_run + turn * image, (rows.high - rows.low) * g.W, top_of(turn) + padding, x, x + g.total_x),
             &full[turn % kStages], thread);
  };
  if (thread < kWarp) {
    if (thread == 0)
      for (int stage = 0; stage < kStages; ++stage) ptx::barrier_init(&full[stage], kWarp);
    __syncwarp();
    for (int turn = 0; turn < kStages; ++turn)
      if (turn < images) load(turn);
  }
  // Windows beyond the rows meet zeros of a band, and must not be NaN.
  for (int turn = 0; turn < kStages; ++turn) {
    T* const low = top_of(turn) + padding;
    clear_around<kThreads>(input_of(turn), g.input_bytes, low, low + (rows.high - rows.low) * g.W, thread);
  }

  // Of every chunk rows 2 (lane % 4) and the next, of column lane / 4.
  float weight[kR][kS];
  Band band[kR];
  {
    uint16 bits[kR][kS];
    load_weights(w + static_cast<int64>(k) * (kR * kS), weight, bits);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int place = beyond_chunks(g.shift + (r - g.top) * g.W - kLeft);
#pragma unroll
      for (int d = 0; d < 2 + (kWide >> r & 1); ++d)
        band[r].word[d] = word_of_band(bits[r], place, d * kChunk + lane % 4 * 2, lane / 4);
    }
  }
  const float start = bias == nullptr ? 0.0f : widen(bias[k]);
  __syncthreads();

#pragma unroll 1
  for (int turn = 0; turn < images; ++turn) {
    T* const top_start = top_of(turn);
    const int y_place = place_in_chunk(y_run + turn * image);
    T* const output = output_of(turn) + kChunk + y_place;  // where the first result goes
    ptx::barrier_wait(&full[turn % kStages], turn / kStages % 2);
    surround_by_zeros<kThreads>(top_start + padding, rows, g.W, thread);
    // The store that was the last to read the buffer of this turn's results has done so.
    if (thread == 0) ptx::bulk_store_wait_read<kOutputs - 1>();
    __syncthreads();

    // The first unit starts so many elements before the first output. 16 lanes of a warp's products go through an odd
    // number of neighbouring units each, two at a time, so that what they load at once is in different banks, and what
    // two units share is loaded once. The last ones are made by two lanes where there are fewer.
    const int before = beyond_chunks(y_place - g.shift);
    const int units = (count + before + kChunk - 1) / kChunk;
    const int length = (units + kWarps * kUnits - 1) / (kWarps * kUnits) | 1;
    const auto first_of = [&](int i) { return min((warp * kUnits + i) * length, units - length) * kChunk; };
    const T* source[kR];
    uint32 last[kR][4];
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      source[r] = top_start + g.top * g.W - before - g.shift + whole_chunks(g.shift + (r - g.top) * g.W - kLeft) +
                  first_of(lane % kUnits) + (lane / kUnits + (kWide >> r & 1) - 1) * kChunk;
      ptx::load_matrices(source[r], last[r]);
    }
    T* const result = output - before + lane % 4 * 2;
    T* results[2] = {result + first_of(lane / 4), result + first_of(lane / 4 + kUnits / 2)};
    float seen[2] = {};
#pragma unroll 2
    for (int i = 0; i < length; i += 2) {
      float sum[2][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[0][e] = sum[1][e] = start;
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        uint32 next[4];
        source[r] += 2 * kChunk;
        ptx::load_matrices(source[r], next);
        // Of the chunks that the two windows have together, those that are there already.
        const int kept = 1 + (kWide >> r & 1);
#pragma unroll
        for (int unit = 0; unit < 2; ++unit)
#pragma unroll
          for (int d = 0; d < 1 + kept; ++d) {
            const int chunk = unit + d;
            const uint32* const pieces = chunk < kept ? last[r] + 2 * (2 - kept + chunk) : next + 2 * (chunk - kept);
            const uint32 a[2] = {pieces[0], pieces[1]};
            multiply(T{}, sum[unit], a, band[r].word[d]);
          }
#pragma unroll
        for (int e = 0; e < 4; ++e) last[r][e] = next[e];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int unit = 0; unit < 2; ++unit)
          *reinterpret_cast<uint32*>(results[half] + unit * kChunk) =
              narrow_pair(T{}, sum[unit][2 * half], sum[unit][2 * half + 1]);
        results[half] += 2 * kChunk;
      }
#pragma unroll
      for (int unit = 0; unit < 2; ++unit)
#pragma unroll
        for (int e = 0; e < 4; ++e) seen[unit] = fma(sum[unit][e], 0.0f, seen[unit]);
    }
    const float sum_seen = seen[0] + seen[1];
    if (__syncthreads_or(sum_seen != sum_seen)) {
      const T* const channel = w + static_cast<int64>(k) * (kR * kS);
#pragma unroll 1
      for (int i = thread; i < count; i += kThreads) {
        const int p = i / g.W;
        const int q = i - p * g.W;
        output[i] = narrow<T>(
            convolve_one(g, top_start + i - kLeft, rows.top_row + p, q - kLeft, channel, start));
      }
    } else if (kEdge > 0) {
#pragma unroll 1
      for (int item = thread; item < 2 * rows.rows; item += kThreads) {
        const bool last = item >= rows.rows;
        const int offset = (last ? item - rows.rows : item) * g.W;
        if (last) {
          convolve_edge<true>(top_start + offset + g.W - kEdge, g.W, weight, start, output + offset + g.W - kRight);
        } else {
          convolve_edge<false>(top_start + offset, g.W, weight, start, output + offset);
        }
      }
    }

    ptx::fence_shared_for_bulk();
    __syncthreads();
    if (thread < kWarp) {
      store_run(Run<T>(y_run + turn * image, count, output), thread);
      if (turn + kStages < images) load(turn + kStages);
    }
  }
  if (thread == 0) ptx::bulk_store_wait_read<0>();
}
