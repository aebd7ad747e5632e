// Depthwise convolution of dilated kernels by phases, gradients of the weights and the bias, NCHW (sm_90 and newer). dy is
// as large as x, and the padding is a number of whole dilations.
//
// A block owns the planes of one channel in a slab of the batch, a few images at a time. Bulk copies bring x and dy, and a
// thread goes down the rows of phases (see phases.cuh): every element is loaded and widened once, and meets what it has
// to meet in the registers of one thread, which keeps R x S sums through all rows, phases and images. Threads, and slabs,
// are added in a fixed order.
//
// Zeros stand for columns of x and dy that do not exist, and most products with the padding are passed over: whatever is
// not finite makes sums that are not finite, and where there is one the block does it over, plainly.
//
// Compile-time values: T; R, S; BIAS (whether dbias is summed too); FINAL (there is no need for another launch); CLUSTER
// (see slabs.cuh); BEFORE_H, BEFORE_W (the padding above and left of x, in dilations); THREADS; BLOCKS (that a
// multiprocessor is to hold, which bounds the registers); PLANES (at a time); STAGES (of so many planes: those that are
// on their way or worked on); DILATION_W; PLACES (words of a phase in a row).
#include "phases.cuh"
#include "slabs.cuh"
#include "wgrad_plainly.cuh"

using T = CUCONV_T;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kBeforeH = CUCONV_BEFORE_H;
constexpr int kBeforeW = CUCONV_BEFORE_W;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kPlanes = CUCONV_PLANES;
constexpr int kStages = CUCONV_STAGES;
constexpr int kPlaces = CUCONV_PLACES;
constexpr int kDilation = CUCONV_DILATION_W;

constexpr int kWarps = kThreads / kWarp;
constexpr int kTaps = kR * kS;
constexpr int kEntries = kTaps + kBias;
constexpr int kColumns = kPlaces * kPerWord<T>;
// Words of a row that begin phases.
constexpr int kWords = kDilation / kPerWord<T>;
// Rows of a phase from one of dy to the last row of x that it meets.
constexpr int kAfterH = kR - 1 - kBeforeH;

static_assert(sizeof(T) <= 4, "a word has an element or two");

struct Parameters {
  int K, R, S;
  int H, W, P, Q;
  int top, left;  // padding
  int stride_h, stride_w;  // 1
  int dilation_h, dilation_w;
  int images;
  int block_images;        // of a slab
  int plane_bytes;         // of shared memory
};

extern "C" __global__ void CUCONV_SLABS __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_phases(const T* dy, const T* x, float* partials, T* dw, T* dbias,
                           const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 full[kStages];
  __shared__ float sums[kWarps][kEntries];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int channel = static_cast<int>(blockIdx.y);
  const int first_image = static_cast<int>(blockIdx.x) * g.block_images;
  const int images = min(g.block_images, g.images - first_image);
  const int turns = (images + kPlanes - 1) / kPlanes;
  const int plane_size = g.H * g.W;
  const int64 image_size = static_cast<int64>(g.K) * plane_size;
  const int64 first = first_image * image_size + static_cast<int64>(channel) * plane_size;
  const int64 size = g.images * image_size;

  const auto buffer_of = [&](int turn, int plane) {
    return shared + (turn % kStages * 2 * kPlanes + plane) * g.plane_bytes;
  };
  const auto planes_of = [&](int turn) { return min(kPlanes, images - turn * kPlanes); };
  // x and, behind them all, dy; a plane by a warp.
  const auto load = [&](int turn) {
    uint64* const barrier = &full[turn % kStages];
    if (lane > 0) return;
    for (int plane = warp; plane < kPlanes; plane += kWarps) {
      if (plane >= planes_of(turn)) {
        ptx::barrier_arrive(barrier);
        ptx::barrier_arrive(barrier);
        continue;
      }
      const int64 start = first + (turn * kPlanes + plane) * image_size;
      const T* const x_run = x + start;
      const T* const dy_run = dy + start;
      load_run_alone(x_run, plane_size, run_in_shared(x_run, buffer_of(turn, plane)), x, x + size, barrier);
      load_run_alone(dy_run, plane_size, run_in_shared(dy_run, buffer_of(turn, kPlanes + plane)), dy, dy + size, barrier);
    }
  };

  if (thread == 0)
    for (int stage = 0; stage < kStages; ++stage) ptx::barrier_init(&full[stage], 2 * kPlanes);
  __syncthreads();
  for (int turn = 0; turn < min(kStages, turns); ++turn) load(turn);

  float sum[kR][kS] = {};
  float bias_sum = 0;
  const int items = kPlanes * g.dilation_h * kWords;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    ptx::barrier_wait(&full[turn % kStages], turn / kStages % 2);
#pragma unroll 1
    for (int item = thread; item < items; item += kThreads) {
      const int plane = item % kPlanes;
      const int first_row = item / kPlanes / kWords;
      if (plane >= planes_of(turn) || first_row >= g.H) continue;
      const uint32 start = static_cast<uint32>(first) + (turn * kPlanes + plane) * static_cast<uint32>(image_size);
      const int place = first_row * g.W;
      const int column = (item / kPlanes - first_row * kWords) * kPerWord<T> - into_word<T>(start + place);
      const T* x_row = plane_in_shared<T>(buffer_of(turn, plane), start) + place + column;
      const T* dy_row = plane_in_shared<T>(buffer_of(turn, kPlanes + plane), start) + place + column;
      const Phase<T, kPlaces, kDilation> phase(column, g.W);

      // Row t of the phase is value[t % kR].
      float value[kR][kColumns];
      const int step = g.dilation_h * g.W;
      int row = first_row;
#pragma unroll
      for (int t = 0; t < kAfterH; ++t, x_row += step)
        if (row + t * g.dilation_h < g.H) phase.load(x_row, value[t]);
#pragma unroll 1
      while (row < g.H) {
#pragma unroll
        for (int t = 0; t < kR; ++t) {
          if (row >= g.H) break;
          if (row + kAfterH * g.dilation_h < g.H) phase.load(x_row, value[(t + kAfterH) % kR]);
          x_row += step;
          float gradient[kColumns];
          phase.load(dy_row, gradient);
          dy_row += step;
#pragma unroll
          for (int r = 0; r < kR; ++r) {
            // Rows in the padding are passed over.
            if (r != kBeforeH && !within(row + (r - kBeforeH) * g.dilation_h, g.H)) continue;
#pragma unroll
            for (int v = 0; v < kColumns; ++v)
#pragma unroll
              for (int s = 0; s < kS; ++s) {
                const int j = v + (s - kBeforeW) * kPerWord<T>;
                if (j < 0 || j >= kColumns) continue;
                sum[r][s] = fma(value[(t + r + kR - kBeforeH) % kR][j], gradient[v], sum[r][s]);
              }
          }
          if (kBias)
#pragma unroll
            for (int v = 0; v < kColumns; ++v) bias_sum += gradient[v];
          row += g.dilation_h;
        }
      }
    }
    if (turn + kStages < turns) {
      __syncthreads();
      load(turn + kStages);
    }
  }

  // All loads have landed and been read when this is written to.
  float* const totals = reinterpret_cast<float*>(shared);
  const auto store = [&](int entry, float total) {
    if (entry < kTaps) {
      dw[static_cast<int64>(channel) * kTaps + entry] = narrow<T>(total);
    } else {
      dbias[channel] = narrow<T>(total);
    }
  };
  const auto deliver = [&](int entry, float total) {
    if (kCluster > 1) {
      totals[entry] = total;
    } else if (kFinal) {
      store(entry, total);
    } else {
      partials[(static_cast<int64>(blockIdx.x) * kEntries + entry) * g.K + channel] = total;
    }
  };

  float seen = fma(bias_sum, 0.0f, 0.0f);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) seen = fma(sum[tap / kS][tap % kS], 0.0f, seen);
  if (__syncthreads_or(seen != seen)) {
    for (int entry = warp; entry < kEntries; entry += kWarps) {
      const float total = sum_plainly(g, dy + first, x + first, images, image_size, image_size, entry, lane);
      if (lane == 0) deliver(entry, total);
    }
  } else {
#pragma unroll
    for (int entry = 0; entry < kEntries; ++entry) {
      float total = entry < kTaps ? sum[entry / kS % kR][entry % kS] : bias_sum;
#pragma unroll
      for (int apart = kWarp / 2; apart > 0; apart /= 2) total += __shfl_xor_sync(0xffffffff, total, apart);
      if (lane == 0) sums[warp][entry] = total;
    }
    __syncthreads();
    for (int entry = thread; entry < kEntries; entry += kThreads) {
      float total = 0;
#pragma unroll
      for (int of_warp = 0; of_warp < kWarps; ++of_warp) total += sums[of_warp][entry];
      deliver(entry, total);
    }
  }
  if constexpr (kCluster > 1) add_of_cluster<kThreads>(totals, kEntries, thread, store);
}
