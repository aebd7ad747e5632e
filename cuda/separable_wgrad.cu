// Depthwise-separable convolution, gradients of the pointwise weights and bias, in one kernel (sm_80 and newer): what
// is in between is made again from x, in shared memory alone.
//
// As pointwise_wgrad.cu, but that the tile of x of a stage is not copied: while the block multiplies one stage its
// threads make the next, as separable.cu does.
//
// Compile-time values: those of pointwise_wgrad_tiles.cuh, with two stages, and of middle.cuh.
#include "pointwise_wgrad_tiles.cuh"
#include "middle.cuh"

static_assert(kStages == 2, "one is multiplied while the other is made");
static_assert(kXRow % kStrip == 0);

struct Parameters {
  int pixels;       // of all images, of dy
  int slab_pixels;  // a multiple of DEPTH
  int K;
  int row_tiles;
  Middle middle;
  Dy dy;
};

// dy is the gradient of the result before the pointwise activation. partials (slabs, channels of the middle, K), with
// one row more in each where there is a dbias.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    separable_wgrad(const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ depthwise_w,
                    const T* __restrict__ depthwise_bias, float* __restrict__ partials,
                    const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int column_tile = static_cast<int>(blockIdx.x) / g.row_tiles;
  const int c0 = (static_cast<int>(blockIdx.x) - column_tile * g.row_tiles) * kRows;
  const int k0 = column_tile * kColumns;
  const int begin = static_cast<int>(blockIdx.y) * g.slab_pixels;
  const int end = min(g.pixels, begin + g.slab_pixels);
  const int channels = g.middle.channels;

  T* const x_tiles = reinterpret_cast<T*>(shared);
  T* const dy_tiles = x_tiles + kStages * kXTile;
  float* const taps = reinterpret_cast<float*>(dy_tiles + kStages * kDyTile);
  const auto make = [&](int stage, int first) {
    if (first >= end) return;
    copy_dy(dy_tiles + stage * kDyTile, dy, g.dy, k0, g.K, first, end, thread);
    ptx::copy_async_commit();
    constexpr int kStrips = kXRow / kStrip;
#pragma unroll 1
    for (int item = thread; item < kXRows * kStrips; item += kThreads) {
      const int row = item / kStrips;
      const int column = (item - row * kStrips) * kStrip;
      const int pixel = first + (kChannelsLast ? row : column);
      const int channel = c0 + (kChannelsLast ? column : row);
      float value[kStrip] = {};
      if (pixel < end && channel < channels)
        make_strip(g.middle, x, taps, depthwise_bias, channel, Place(g.dy, pixel), value);
      store_narrowed<kStrip>(x_tiles + stage * kXTile + row * (kXRow + kPad) + column, value);
    }
  };
  widen_taps<kThreads>(g.middle, depthwise_w, taps, thread);
  __syncthreads();
  make(0, begin);

  const bool sums_bias = kBias && c0 == 0 && first_row_of(warp) == 0;
  WgradSums sum = {};
  int stage = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += kDepth) {
    ptx::copy_async_wait<0>();
    __syncthreads();
    make(1 - stage, first + kDepth);
    multiply_stage(sum, x_tiles + stage * kXTile, dy_tiles + stage * kDyTile, sums_bias, warp, lane);
    stage = 1 - stage;
  }

  float* const own = partials + blockIdx.y * static_cast<int64>(channels + kBias) * g.K;
  deliver_partials(sum, own, c0, channels, k0, g.K, sums_bias, warp, lane, [&](int c, int k) {
    const T* const dy_channel = dy + k * g.dy.apart();
    float plain = 0;
    for (int pixel = begin; pixel < end; ++pixel) {
      const float factor =
          c < channels ? middle_plainly(g.middle, x, depthwise_w, depthwise_bias, c, Place(g.dy, pixel)) : 1.0f;
      plain = fma(factor, float(widen(dy_channel[g.dy.element(pixel)])), plain);
    }
    return plain;
  });
}
