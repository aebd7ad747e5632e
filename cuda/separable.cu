// Depthwise-separable convolution in one kernel (sm_80 and newer): depthwise with its bias and activation, rounded as a
// layer's output would be, then pointwise with its own. What is in between stays in shared memory.
//
// As in pointwise.cu a block makes some channels of one tile of pixels after the other. The tile of images that a stage
// multiplies is not copied but made: while the block multiplies one stage its threads make the next from x, each some
// neighbours of a row (channels-last, neighbouring channels of a pixel) at a time, straight from memory and its caches.
//
// Compile-time values: those of pointwise_tiles.cuh, with two stages, and of middle.cuh.
#include "pointwise_tiles.cuh"
#include "middle.cuh"

static_assert(kStages == 2, "one is multiplied while the other is made");
static_assert(!kTurned && !CUCONV_STRIDED_OUTPUT);
static_assert(kImageRow % kStrip == 0);

struct Parameters {
  int pixels;    // of all images, of the result
  int channels;  // of the result
  int tiles;     // of pixels
  Middle middle;
  Output output;
};

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    separable(const T* __restrict__ x, const T* __restrict__ depthwise_w, const T* __restrict__ depthwise_bias,
              const T* __restrict__ w, const T* __restrict__ bias, T* __restrict__ y,
              const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int first_channel = static_cast<int>(blockIdx.y) * kChannels;
  const int first_tile = static_cast<int>(blockIdx.x);
  const int tiles_apart = static_cast<int>(gridDim.x);
  const int chunks = (g.middle.channels + kDepth - 1) / kDepth;

  T* const weights = reinterpret_cast<T*>(shared);
  T* const images = weights + (kResident ? chunks : kStages) * kWeightTile;
  T* const results = images + kStages * kImageTile;
  float* const taps = reinterpret_cast<float*>(results + kRows * kResultPitch);

  const auto weights_to = [&](int stage, int chunk) {
    T* const to = weights + stage * kWeightTile;
    copy_weights(to, w, first_channel, g.channels, chunk * kDepth, g.middle.channels, thread);
  };
  int next_tile = first_tile;
  int next_chunk = 0;
  const auto make = [&](int stage) {
    if (next_tile >= g.tiles) return;
    if (!kResident) weights_to(stage, next_chunk);
    ptx::copy_async_commit();
    constexpr int kStrips = kImageRow / kStrip;
#pragma unroll 1
    for (int item = thread; item < kImageRows * kStrips; item += kThreads) {
      const int row = item / kStrips;
      const int column = (item - row * kStrips) * kStrip;
      const int pixel = next_tile * kPixels + (kChannelsLast ? row : column);
      const int channel = next_chunk * kDepth + (kChannelsLast ? column : row);
      float value[kStrip] = {};
      if (pixel < g.pixels && channel < g.middle.channels)
        make_strip(g.middle, x, taps, depthwise_bias, channel, Place(g.output, pixel), value);
      store_narrowed<kStrip>(images + stage * kImageTile + row * kImagePitch + column, value);
    }
    if (++next_chunk == chunks) {
      next_chunk = 0;
      next_tile += tiles_apart;
    }
  };

  if (kResident)
    for (int chunk = 0; chunk < chunks; ++chunk) weights_to(chunk, chunk);
  widen_taps<kThreads>(g.middle, depthwise_w, taps, thread);
  __syncthreads();
  make(0);

  int stage = 0;
#pragma unroll 1
  for (int tile = first_tile; tile < g.tiles; tile += tiles_apart) {
    Sums sum = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ptx::copy_async_wait<0>();
      __syncthreads();
      make(1 - stage);
      multiply_stage(sum, weights + (kResident ? chunk : stage) * kWeightTile, images + stage * kImageTile, warp, lane);
      stage = 1 - stage;
    }
    deliver_tile(sum, bias, results, y, g.output, first_channel, g.channels, tile * kPixels, g.pixels, warp, lane,
                 [&](int channel, int pixel) {
                   const Place at(g.output, pixel);
                   float total = 0;
                   for (int d = 0; d < g.middle.channels; ++d)
                     total = fma(middle_plainly(g.middle, x, depthwise_w, depthwise_bias, d, at),
                                 float(widen(w[static_cast<int64>(channel) * g.middle.channels + d])), total);
                   return total;
                 });
  }
}
