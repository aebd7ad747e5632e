// Depthwise-separable convolution in one kernel (sm_80 and newer): depthwise with its bias and activation, rounded as a
// layer's output would be, then pointwise with its own. What is in between stays in shared memory.
//
// As in pointwise.cu a block makes some channels of one tile of pixels after the other. The tile of images that a stage
// multiplies is not copied but made: while the block multiplies one stage its threads make the next from x, each some
// neighbours of a row (channels-last, neighbouring channels of a pixel) at a time, straight from memory and its caches.
//
// Compile-time values: those of pointwise_tiles.cuh, two stages; R, S; VECTOR (elements of a load of x: rows of x, and
// x itself, start at multiples of it); STRIP (outputs of a thread along a row: 1, or VECTOR where stride and dilation
// along rows are 1; they divide the rows of the result; channels-last VECTOR, and 1 with a multiplier); LEFT (padding
// before a row, modulo VECTOR); DEPTHWISE_ACTIVATION.
#include "patches.cuh"
#include "pointwise_tiles.cuh"

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr int kVector = CUCONV_VECTOR;
constexpr int kStrip = CUCONV_STRIP;
constexpr int kLeft = CUCONV_LEFT;
constexpr int kTaps = kR * kS;

static_assert(kStages == 2, "one is multiplied while the other is made");
static_assert(!kTurned && !CUCONV_STRIDED_OUTPUT);
static_assert(kImageRow % kStrip == 0);

struct Parameters {
  int pixels;    // of all images, of the result
  int channels;  // of the result
  int depth;     // of the depthwise result
  int tiles;     // of pixels
  int multiplier;
  int H, W;
  int top, left;
  int stride_h, stride_w, dilation_h, dilation_w;
  Output output;
};

// Where a pixel of the result lies.
struct Place {
  int image, p, q;

  __device__ __forceinline__ Place(const Parameters& g, int pixel) {
    image = divide_by(pixel, g.output.counted_magic, g.output.counted_shift);
    const int of_image = pixel - image * g.output.counted;
    p = divide_by(of_image, g.output.row_magic, g.output.row_shift);
    q = of_image - p * g.output.row;
  }
};

// A value in between, by itself: what `make_strip` makes.
__device__ __noinline__ float middle_plainly(const Parameters& g, const T* x, const T* w, const T* bias, int channel,
                                             int pixel) {
  const Place at(g, pixel);
  const int C = g.depth / g.multiplier;
  const int c = channel / g.multiplier;
  float sum = 0;
  for (int tap = 0; tap < kTaps; ++tap) {
    const int h = at.p * g.stride_h - g.top + tap / kS * g.dilation_h;
    const int v = at.q * g.stride_w - g.left + tap % kS * g.dilation_w;
    float value = 0;
    if (within(h, g.H) && within(v, g.W)) {
      const int64 row = static_cast<int64>(at.image) * g.H + h;
      value = kChannelsLast ? widen(x[(row * g.W + v) * C + c])
                            : widen(x[((static_cast<int64>(at.image) * C + c) * g.H + h) * g.W + v]);
    }
    sum = fma(value, float(widen(w[channel * kTaps + tap])), sum);
  }
  if (bias != nullptr) sum += widen(bias[channel]);
  return widen(narrow<T>(activation::CUCONV_DEPTHWISE_ACTIVATION(sum)));
}

// kStrip neighbours along memory of the values in between: columns of a channel, or channels-last channels of a pixel.
// `weights` are those of all channels, as make_weights lays them out.
__device__ __forceinline__ void make_strip(const Parameters& g, const T* x, const float* weights, const T* bias,
                                           int channel, int pixel, float (&sum)[kStrip]) {
  const Place at(g, pixel);
  const int C = g.depth / g.multiplier;
  const int c = channel / g.multiplier;
  const int h0 = at.p * g.stride_h - g.top;
  const int v0 = at.q * g.stride_w - g.left;
#pragma unroll
  for (int e = 0; e < kStrip; ++e) sum[e] = 0;
  if constexpr (kChannelsLast) {
    const T* const source = x + ((static_cast<int64>(at.image) * g.H + h0) * g.W + v0) * C + c;
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        const bool exists = within(h0 + r * g.dilation_h, g.H) && within(v0 + s * g.dilation_w, g.W);
        float value[kStrip];
        const int64 offset = (static_cast<int64>(r * g.dilation_h) * g.W + s * g.dilation_w) * C;
        load_widened<kStrip>(source + offset, exists, value);
        const float* const weight = weights + (r * kS + s) * g.depth + channel;
#pragma unroll
        for (int e = 0; e < kStrip; ++e) sum[e] = fma(value[e], weight[e], sum[e]);
      }
  } else {
    constexpr int kSpan = kStrip + kS - 1;
    const T* const source = x + ((static_cast<int64>(at.image) * C + c) * g.H + h0) * g.W + v0;
    const int unit = kStrip > 1 ? 1 : g.dilation_w;
    RowOfPatch<T, kSpan, kVector, kLeft, 0> row;
    row.template place<true>(v0, unit, g.W);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      float value[kSpan];
      row.load(source + static_cast<int64>(r * g.dilation_h) * g.W, within(h0 + r * g.dilation_h, g.H), unit, value);
      const float* const weight = weights + channel * kTaps + r * kS;
#pragma unroll
      for (int e = 0; e < kStrip; ++e)
#pragma unroll
        for (int s = 0; s < kS; ++s) sum[e] = fma(value[e + s], weight[s], sum[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < kStrip; ++e) {
    if (bias != nullptr) sum[e] += widen(bias[channel + (kChannelsLast ? e : 0)]);
    sum[e] = activation::CUCONV_DEPTHWISE_ACTIVATION(sum[e]);
  }
}

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
  const int chunks = (g.depth + kDepth - 1) / kDepth;

  T* const weights = reinterpret_cast<T*>(shared);
  T* const images = weights + (kResident ? chunks : kStages) * kWeightTile;
  T* const results = images + kStages * kImageTile;
  // Of every channel its taps or, channels-last, of every tap its channels.
  float* const taps = reinterpret_cast<float*>(results + kRows * kResultPitch);

  const auto weights_to = [&](int stage, int chunk) {
    copy_weights(weights + stage * kWeightTile, w, first_channel, g.channels, chunk * kDepth, g.depth, thread);
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
      if (pixel < g.pixels && channel < g.depth) make_strip(g, x, taps, depthwise_bias, channel, pixel, value);
      store_narrowed<kStrip>(images + stage * kImageTile + row * kImagePitch + column, value);
    }
    if (++next_chunk == chunks) {
      next_chunk = 0;
      next_tile += tiles_apart;
    }
  };

  if (kResident)
    for (int chunk = 0; chunk < chunks; ++chunk) weights_to(chunk, chunk);
  for (int i = thread; i < g.depth * kTaps; i += kThreads) {
    const int channel = i / kTaps;
    taps[kChannelsLast ? (i - channel * kTaps) * g.depth + channel : i] = widen(depthwise_w[i]);
  }
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
                   float total = 0;
                   for (int d = 0; d < g.depth; ++d)
                     total = fma(middle_plainly(g, x, depthwise_w, depthwise_bias, d, pixel),
                                 float(widen(w[static_cast<int64>(channel) * g.depth + d])), total);
                   return total;
                 });
  }
}
