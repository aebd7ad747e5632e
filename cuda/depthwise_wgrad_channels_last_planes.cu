// Depthwise convolution of small planes, channels-last (NHWC in memory; sm_80 and newer; 16-bit and float32): gradients of
// the weights and the bias. Stride and dilation are 1, and dy is as large as x.
//
// A block owns kWarp neighbouring channels in a slab of the batch, each warp some images of it, one after the other. A
// lane goes down the rows of its channel's planes of x and dy in shared memory, where asynchronous copies bring them some
// images ahead, and keeps R x S sums. All of a plane is unrolled, and taps in the padding are no instructions. Warps, and
// slabs, are added in a fixed order.
//
// Taps in the padding are passed over: dy that is not finite would make NaN there. It makes a sum that is not finite,
// too, where it meets x; what has such a sum is done over, plainly.
//
// Compile-time values: those of small_planes.cuh; BIAS (whether dbias is summed too); FINAL (there is no need for another
// launch); CLUSTER (see slabs.cuh); THREADS; BLOCKS (that a multiprocessor is to hold, which bounds the registers); STAGES
// (images of a warp that are on their way or worked on).
#include "small_planes.cuh"
#include "slabs.cuh"

constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kStages = CUCONV_STAGES;

constexpr int kWarps = kThreads / kWarp;
constexpr int kEntries = kTaps + kBias;
// Rows of x below a row of dy that it meets.
constexpr int kBelow = kR - 1 - kTop;

struct Parameters {
  int K;
  int images;
  int block_images;  // of a slab
};

extern "C" __global__ void CUCONV_SLABS __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_channels_last_planes(const T* dy, const T* x, float* partials, T* dw, T* dbias,
                                         const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  T* const planes = reinterpret_cast<T*>(shared) + warp * kStages * 2 * kPlane;

  const int k0 = static_cast<int>(blockIdx.y) * kWarp;
  const int channels = min(kWarp, g.K - k0);
  const int64 image_size = static_cast<int64>(g.K) * kPixels;
  const int first_image = static_cast<int>(blockIdx.x) * g.block_images;
  const int64 first = first_image * image_size + k0;
  const int images = min(g.block_images, g.images - first_image);

  // The warp's images are every kWarps-th.
  const int turns = (images - warp + kWarps - 1) / kWarps;
  const auto load = [&](int turn) {
    const int image = turn * kWarps + warp;
    T* const plane = planes + turn % kStages * 2 * kPlane;
    const int64 start = first + image * image_size;
    if (image < images)
      for_pieces(channels, g.K, lane, [&](int to, int64 from) {
        ptx::copy_async<16>(plane + to, x + start + from);
        ptx::copy_async<16>(plane + kPlane + to, dy + start + from);
      });
    ptx::copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) load(stage);

  float sum[kR][kS] = {};
  float bias_sum = 0;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const T* const plane = planes + turn % kStages * 2 * kPlane;
    ptx::copy_async_wait<kStages - 1>();
    __syncwarp();
    // Row h of x is value[h % kR] from the first row of dy that it meets to the last.
    float value[kR][kW];
#pragma unroll
    for (int p = 0; p < kH; ++p) {
#pragma unroll
      for (int h = p == 0 ? 0 : p + kBelow; h <= p + kBelow && h < kH; ++h) load_row(plane, h, lane, value[h % kR]);
      float gradient[kW];
      load_row(plane + kPlane, p, lane, gradient);
#pragma unroll
      for (int q = 0; q < kW; ++q) {
#pragma unroll
        for (int r = 0; r < kR; ++r)
#pragma unroll
          for (int s = 0; s < kS; ++s)
            if (meets(p, q, r, s))
              sum[r][s] = fma(value[(p + r + kR - kTop) % kR][q + s - kLeft], gradient[q], sum[r][s]);
        if (kBias) bias_sum += gradient[q];
      }
    }
    __syncwarp();
    load(turn + kStages);
  }

  // Only what is not finite in dy makes a difference in the padding.
  float seen = fma(bias_sum, 0.0f, 0.0f);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) seen = fma(sum[tap / kS][tap % kS], 0.0f, seen);
  if (seen != seen && lane < channels) {
#pragma unroll 1
    for (int image = warp; image < images; image += kWarps)
#pragma unroll 1
      for (int pixel = 0; pixel < kPixels; ++pixel) {
        const float nan_or_zero = widen(dy[first + image * image_size + static_cast<int64>(pixel) * g.K + lane]) * 0.0f;
#pragma unroll
        for (int r = 0; r < kR; ++r)
#pragma unroll
          for (int s = 0; s < kS; ++s)
            if (!meets(pixel / kW, pixel % kW, r, s)) sum[r][s] += nan_or_zero;
      }
  }

  // The planes have been read: their memory is free for the sums of every warp, and those of the block behind them.
  ptx::copy_async_wait<0>();
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(shared);
  float* const totals = sums + kWarps * kEntries * kWarp;
#pragma unroll
  for (int entry = 0; entry < kEntries; ++entry)
    sums[(warp * kEntries + entry) * kWarp + lane] = entry < kTaps ? sum[entry / kS % kR][entry % kS] : bias_sum;
  __syncthreads();
  const auto store = [&](int i, float total) {
    const int entry = i / kWarp;
    const int64 k = k0 + i % kWarp;
    if (i % kWarp < channels) (entry < kTaps ? dw[k * kTaps + entry] : dbias[k]) = narrow<T>(total);
  };
  for (int i = static_cast<int>(threadIdx.x); i < kEntries * kWarp; i += kThreads) {
    float total = 0;
#pragma unroll
    for (int of_warp = 0; of_warp < kWarps; ++of_warp) total += sums[of_warp * kEntries * kWarp + i];
    if (kCluster > 1) {
      totals[i] = total;
    } else if (kFinal) {
      store(i, total);
    } else if (i % kWarp < channels) {
      partials[(static_cast<int64>(blockIdx.x) * kEntries + i / kWarp) * g.K + k0 + i % kWarp] = total;
    }
  }
#if CUCONV_CLUSTER > 1
  add_of_cluster<kThreads>(totals, kEntries * kWarp, static_cast<int>(threadIdx.x), store);
#endif
}
