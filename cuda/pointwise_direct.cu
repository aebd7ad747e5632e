// Pointwise convolution, any dtype and device: forward, and the gradient of the input. A thread makes some channels of
// one pixel, and reads that pixel once for all of them.
//
// Compile-time values: T; CHANNELS_LAST; TURNED (whether the depth counts rows of w, as in dgrad, or its columns);
// STRIDED_INPUT, STRIDED_OUTPUT (whether only some pixels of these are counted); ACTIVATION.
#include "activations.cuh"
#include "numbers.cuh"
#include "pixels.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;
constexpr bool kTurned = CUCONV_TURNED;
constexpr int kThreads = 256;
constexpr int kChannels = 8;

using Input = Pixels<kChannelsLast, CUCONV_STRIDED_INPUT>;
using Output = Pixels<kChannelsLast, CUCONV_STRIDED_OUTPUT>;

struct Parameters {
  int pixels;    // counted, of all images
  int channels;  // of the result
  int depth;     // channels of what is read
  Input input;
  Output output;
};

extern "C" __global__ void __launch_bounds__(kThreads)
    pointwise_direct(const T* __restrict__ image, const T* __restrict__ w, const T* __restrict__ bias,
                     T* __restrict__ result, const __grid_constant__ Parameters g) {
  const int64 counted = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x;
  if (counted >= g.pixels) return;
  const int pixel = static_cast<int>(counted);
  const int first = static_cast<int>(blockIdx.y) * kChannels;
  const int channels = min(kChannels, g.channels - first);
  const T* const from = image + g.input.element(pixel);
  const int64 w_row = kTurned ? g.channels : g.depth;
  const T* const weights = w + first * (kTurned ? 1 : w_row);

  Sum sum[kChannels] = {};
  for (int d = 0; d < g.depth; ++d) {
    const Sum value = widen(from[d * g.input.apart()]);
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (i < channels) sum[i] = fma(value, Sum(widen(weights[kTurned ? d * w_row + i : i * w_row + d])), sum[i]);
  }
  T* const to = result + g.output.element(pixel);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (i >= channels) continue;
    const int channel = first + i;
    const Sum biased = bias != nullptr ? sum[i] + widen(bias[channel]) : sum[i];
    to[channel * g.output.apart()] = narrow<T>(activation::CUCONV_ACTIVATION(biased));
  }
}
