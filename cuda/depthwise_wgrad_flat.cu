// Depthwise convolution, gradients of the weights and the bias, NCHW, 16-bit, on tensor cores, of planes as they lie in
// memory (sm_90 and newer). See flat.cuh.
//
// A unit is a chunk of dy. A product multiplies 16 pairs (k) of neighbouring units (m) by a chunk of x that lies as far
// from each of them (n): of every two places, one in dy's pair and one in the chunk, it makes a sum over pairs. dw[r][s]
// is the sum of those that lie a tap apart, and are added in the end; no others are looked at.
//
// A row's first and last elements of dy, where a tap falls beyond x, are multiplied one by one, and then zeros for the
// products.
//
// A block owns a channel and a slab of the batch: it goes through units of work, each some rows of one image.
//
// Whatever is not finite makes a sum that is not finite: where there is one the block does it over, plainly, with the
// zeros of the padding.
//
// Compile-time values: as in depthwise_flat.cu; BIAS (whether dbias is summed too); FINAL (there is no need for another
// launch); CLUSTER (see slabs.cuh).
#include "flat.cuh"
#include "numbers.cuh"
#include "products.cuh"
#include "slabs.cuh"

using T = CUCONV_T;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr int kLeft = CUCONV_LEFT;
constexpr int kWide = CUCONV_WIDE;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kStages = CUCONV_STAGES;

constexpr int kWarps = kThreads / kWarp;
constexpr int kTaps = kR * kS;
// What a channel has of sums: its weights' and its bias's.
constexpr int kEntries = kTaps + kBias;
constexpr int kRight = kS - 1 - kLeft;
// A row's first elements of dy, and its last, meet so many columns of x.
constexpr int kEdge = kS - 1;

// How many of the kernel rows before this one are wide. No loop: the compiler would not see through it in time.
__device__ constexpr int wide_before(int r) {
  const int rows = kWide & ((1 << r) - 1);
  const int pairs = rows - (rows >> 1 & 0x55);
  const int quads = (pairs & 0x33) + (pairs >> 2 & 0x33);
  return (quads + (quads >> 4)) & 0x0f;
}
// A product for each chunk of x that a kernel row meets in a pair of units: one more than a window has. For dbias there
// is one with ones.
__device__ constexpr int products_before(int r) { return 3 * r + wide_before(r); }
constexpr int kProducts = products_before(kR) + kBias;
constexpr int kLaneSums = 4 * kProducts;
// 128 registers a thread, and more where there are many sums. Left to itself the compiler aims at more blocks and spills.
constexpr int kSums = kLaneSums + kTaps;
constexpr int kBlocks = (kSums > 110 ? 256 : kSums > 60 ? 384 : 512) / kThreads;

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements");
static_assert(kR <= 8 && kS <= kChunk + 2, "WIDE has eight bits, and a window three chunks at most");
static_assert(0 <= kLeft && kLeft <= kEdge, "a row of dy is as long as one of x");

struct Parameters {
  int K;
  int H, W;
  int top;              // padding
  int block_rows;       // of a unit of work
  int row_units;        // units of work of a plane
  int units;            // of all images
  int block_units;      // that a block goes through
  int x_bytes, dy_bytes;  // shared bytes of one of them
  int64 total_elements;          // elements of x, and of dy
};

// Adds the products of a row's elements of dy at an edge, which are zeros from then on. `source` is the first of the
// columns of x that they meet, in the row of the first tap.
template <bool kLast>
__device__ __forceinline__ void add_edge(const T* source, int W, T* dy, float (&sum)[kR][kS], float& bias_sum) {
  constexpr int kCount = kLast ? kRight : kLeft;
  constexpr int kFirst = kLast ? 0 : kLeft;
  float gradient[kCount > 0 ? kCount : 1];
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
    gradient[t] = widen(dy[t]);
    dy[t] = T{};
    bias_sum += gradient[t];
  }
#pragma unroll
  for (int r = 0; r < kR; ++r, source += W) {
#pragma unroll
    for (int j = 0; j < kEdge; ++j) {
      const float value = widen(source[j]);
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        const int s = j - t + kFirst;
        if (0 <= s && s < kS) sum[r][s] = fma(value, gradient[t], sum[r][s]);
      }
    }
  }
}

// The sum of a number of every lane of a warp.
__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffff, value, apart);
  return value;
}

extern "C" __global__ void CUCONV_SLABS __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_flat(const T* dy, const T* x, float* partials, T* dw, T* dbias,
                         const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 full[kStages];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int k = static_cast<int>(blockIdx.y);
  const int first_unit = static_cast<int>(blockIdx.x) * g.block_units;
  const int units = min(g.block_units, g.units - first_unit);
  const int64 plane = static_cast<int64>(g.H) * g.W;

  // A chunk of zeros, then x and dy of every stage: x as in depthwise_flat, dy behind two chunks.
  T* const zeros = reinterpret_cast<T*>(shared);
  const auto x_buffer = [&](int turn) {
    return reinterpret_cast<T*>(shared + 128 + turn % kStages * (g.x_bytes + g.dy_bytes));
  };
  const auto dy_buffer = [&](int turn) { return x_buffer(turn) + g.x_bytes / static_cast<int>(sizeof(T)); };
  struct Work {
    Rows rows;
    int64 start;  // of the plane
  };
  const auto work_of = [&](int turn) {
    const int image = (first_unit + turn) / g.row_units;
    const int p0 = (first_unit + turn - image * g.row_units) * g.block_rows;
    return Work{Rows(p0, g.block_rows, g.H, g.top, kR), (static_cast<int64>(image) * g.K + k) * plane};
  };
  const auto x_run = [&](const Work& work) { return x + work.start + static_cast<int64>(work.rows.low) * g.W; };
  const auto dy_run = [&](const Work& work) { return dy + work.start + static_cast<int64>(work.rows.first) * g.W; };
  const auto padding_of = [&](const Work& work) { return (work.rows.low - work.rows.top_row) * g.W; };
  // Where row `top_row` of x is, and the first of dy.
  const auto top_of = [&](int turn, const Work& work) {
    return x_buffer(turn) + kMargin + beyond_chunks(place_in_chunk(x_run(work)) - padding_of(work));
  };
  const auto dy_of = [&](int turn, const Work& work) {
    return dy_buffer(turn) + 2 * kChunk + place_in_chunk(dy_run(work));
  };
  const auto load = [&](int turn) {
    const Work work = work_of(turn);
    const Rows& rows = work.rows;
    load_run(Run<const T>(x_run(work), (rows.high - rows.low) * g.W, top_of(turn, work) + padding_of(work), x,
                          x + g.total_elements),
             &full[turn % kStages], thread);
    load_run(Run<const T>(dy_run(work), rows.rows * g.W, dy_of(turn, work), dy, dy + g.total_elements),
             &full[turn % kStages], thread);
  };

  if (thread < kWarp) {
    if (thread == 0)
      for (int stage = 0; stage < kStages; ++stage) ptx::barrier_init(&full[stage], 2 * kWarp);
    __syncwarp();
    for (int turn = 0; turn < kStages; ++turn)
      if (turn < units) load(turn);
  }
  // Windows of zeros of dy reach beyond the rows of x, and must not be NaN there.
  for (int turn = 0; turn < min(kStages, units); ++turn) {
    const Work work = work_of(turn);
    const T* const low = top_of(turn, work) + padding_of(work);
    clear_around<kThreads>(x_buffer(turn), g.x_bytes, low, low + (work.rows.high - work.rows.low) * g.W, thread);
  }
  if (thread < kChunk) zeros[thread] = T{};

  // Of the 8x8 matrices of a fragment a lane gives a row: of dy, lanes 8 to 15 and 24 to 31 that of a pair's second unit
  // and 16 to 31 those of the last eight pairs; of x, lanes 16 to 31 those of the next chunk.
  const int second = lane / 8 % 2;
  const int dy_lane = lane % 8 + lane / 16 * 8;

  float sum[kProducts][4] = {};
  float edge_sum[kR][kS] = {};
  float bias_sum = 0;
  __syncthreads();

#pragma unroll 1
  for (int turn = 0; turn < units; ++turn) {
    const Work work = work_of(turn);
    const Rows& rows = work.rows;
    T* const top_start = top_of(turn, work);
    T* const dy_start = dy_of(turn, work);
    const int count = rows.rows * g.W;
    ptx::barrier_wait(&full[turn % kStages], turn / kStages % 2);
    surround_by_zeros<kThreads>(top_start + padding_of(work), rows, g.W, thread);
    if (thread < 2 * kChunk) dy_start[-1 - thread] = dy_start[count + thread] = T{};
    __syncthreads();
    if constexpr (kEdge > 0) {
#pragma unroll 1
      for (int item = thread; item < 2 * rows.rows; item += kThreads) {
        const bool last = item >= rows.rows;
        const int offset = (last ? item - rows.rows : item) * g.W;
        if (last) {
          add_edge<true>(top_start + offset + g.W - kEdge, g.W, dy_start + offset + g.W - kRight, edge_sum, bias_sum);
        } else {
          add_edge<false>(top_start + offset, g.W, dy_start + offset, edge_sum, bias_sum);
        }
      }
      __syncthreads();
    }

    // 16 lanes of a warp's products go through an odd number of neighbouring units each, two at a time, so that what they
    // load at once is in different banks, and what two units share is loaded once.
    const int before = place_in_chunk(dy_run(work));
    const int chunks = (count + before + kChunk - 1) / kChunk;
    const int length = (chunks + kWarps * kUnits - 1) / (kWarps * kUnits) | 1;
    const int dy_first = (warp * kUnits + dy_lane) * length;
    // Where there is no second unit, or there are none, dy is zeros.
    const int end = min(length, chunks - dy_first) - second;
    const T* dy_unit = dy_start - before + (dy_first + second) * kChunk;
    const T* source[kR];
    uint32 last[kR][4];
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      source[r] = top_start + g.top * g.W - before + whole_chunks((r - g.top) * g.W - kLeft) +
                  ((warp * kUnits + lane % kUnits) * length + lane / kUnits + (kWide >> r & 1) - 1) * kChunk;
      ptx::load_matrices_transposed(source[r], last[r]);
    }
#pragma unroll 2
    for (int i = 0; i < length; i += 2) {
      uint32 gradient[4];
      ptx::load_matrices_transposed(i < end ? dy_unit : zeros, gradient);
      dy_unit += 2 * kChunk;
      uint32 next[kR][4];
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        source[r] += 2 * kChunk;
        ptx::load_matrices_transposed(source[r], next[r]);
      }
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        constexpr int kPieces = 4;
        // Chunks that the first unit's window begins with, and those that both have, or the second.
        const int kept = 1 + (kWide >> r & 1);
#pragma unroll
        for (int d = 0; d < kept + 2; ++d) {
          const int piece = d < kept ? kPieces - 2 * (kept - d) : 2 * (d - kept);
          const uint32 b[2] = {d < kept ? last[r][piece] : next[r][piece],
                               d < kept ? last[r][piece + 1] : next[r][piece + 1]};
          multiply(T{}, sum[products_before(r) + d], gradient, b);
        }
#pragma unroll
        for (int e = 0; e < kPieces; ++e) last[r][e] = next[r][e];
      }
      if (kBias) {
        const uint32 ones[2] = {two_ones(T{}), two_ones(T{})};
        multiply(T{}, sum[kProducts - 1], gradient, ones);
      }
    }
    ptx::fence_shared_for_bulk();
    __syncthreads();
    if (thread < kWarp && turn + kStages < units) load(turn + kStages);
  }

  // All loads have landed and been read: their memory is free for the sums of every warp, and behind them the block's.
  float* const sums = reinterpret_cast<float*>(shared);
  constexpr int kWarpSums = kLaneSums * kWarp + kEntries;
  float* const totals = sums + kWarps * kWarpSums;
  const auto store = [&](int tap, float total) {
    (tap < kTaps ? dw[static_cast<int64>(k) * kTaps + tap] : dbias[k]) = narrow<T>(total);
  };
  const auto deliver = [&](int tap, float total) {
    if (kCluster > 1) {
      totals[tap] = total;
    } else if (kFinal) {
      store(tap, total);
    } else {
      partials[(static_cast<int64>(blockIdx.x) * kEntries + tap) * g.K + k] = total;
    }
  };
  float* const own = sums + warp * kWarpSums;
#pragma unroll
  for (int i = 0; i < kProducts; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) own[(i * 4 + e) * kWarp + lane] = sum[i][e];
#pragma unroll
  for (int tap = 0; tap < kEntries; ++tap) {
    const float total = sum_of_lanes(tap < kTaps ? edge_sum[tap / kS][tap % kS] : bias_sum);
    if (lane == 0) own[kLaneSums * kWarp + tap] = total;
  }
  __syncthreads();
  float seen = 0;
  for (int tap = thread; tap < kEntries; tap += kThreads) {
    const bool of_bias = tap == kTaps;
    const int r = tap / kS;
    const int place = beyond_chunks((r - g.top) * g.W - kLeft) + tap - r * kS;
    const int first = of_bias ? kProducts - 1 : products_before(r);
    float total = 0;
#pragma unroll 1
    for (int other = 0; other < kWarps; ++other) {
      const float* const terms = sums + other * kWarpSums;
      total += terms[kLaneSums * kWarp + tap];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        // Element i of a unit meets element j of a chunk of its window, the second one of the chunk behind: see
        // ptx::multiply_halves.
        const int j = of_bias ? 0 : beyond_chunks(place + i);
        const int product = first + (of_bias ? 0 : (place + i) / kChunk);
        const float* const term = terms + (product * 4 + j % 2) * kWarp + i * 4 + j / 2;
        total += term[0] + term[((of_bias ? 0 : 4) + 2) * kWarp];
      }
    }
    deliver(tap, total);
    seen = fma(total, 0.0f, seen);
  }
  if (__syncthreads_or(seen != seen)) {
#pragma unroll 1
    for (int tap = warp; tap < kEntries; tap += kWarps) {
      const int r = tap / kS;
      const int s = tap - r * kS;
      float total = 0;
#pragma unroll 1
      for (int turn = 0; turn < units; ++turn) {
        const Work work = work_of(turn);
        const T* const gradients = dy_run(work);
#pragma unroll 1
        for (int element = lane; element < work.rows.rows * g.W; element += kWarp) {
          const int p = element / g.W;
          const int row = work.rows.top_row + p + r;
          const int column = element - p * g.W + s - kLeft;
          const bool exists = within(row, g.H) && within(column, g.W);
          const float value = tap == kTaps ? 1.0f : exists ? widen(x[work.start + row * g.W + column]) : 0.0f;
          total = fma(value, widen(gradients[element]), total);
        }
      }
      total = sum_of_lanes(total);
      if (lane == 0) deliver(tap, total);
    }
  }
  if (kCluster > 1) add_of_cluster<kThreads>(totals, kEntries, thread, store);
}
