// Depthwise convolution, forward, one output a thread: every geometry and layout, on every architecture from sm_75 up.
//
// Compile-time values: T; INDEX, the integer that counts elements: int where every tensor is below 2^31 of them;
// CHANNELS_LAST (x and y lie in memory as NHWC, and not as NCHW).
#include "direct.cuh"
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;
using Index = CUCONV_INDEX;

constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;

struct Parameters {
  int multiplier;  // output planes for each input plane
  int K;           // output channels
  int R, S;
  int H, W, P, Q;
  int top, left;   // padding
  int stride_h, stride_w, dilation_h, dilation_w;
  int64 total_outputs;
};

extern "C" __global__ void __launch_bounds__(256)
    depthwise_forward_direct(const T* x, const T* w, const T* bias, T* y, const __grid_constant__ Parameters g) {
  const int64 position = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (position >= g.total_outputs) return;
  const Element<Index, kChannelsLast> output(static_cast<Index>(position), g.K, g.P, g.Q);
  const Plane<T, kChannelsLast> plane(x, output.image, output.channel / g.multiplier, g.K / g.multiplier,
                                      static_cast<int64>(g.H) * g.W);
  const T* weight = w + static_cast<int64>(output.channel) * g.R * g.S;
  Sum sum = bias == nullptr ? Sum(0) : widen(bias[output.channel]);
  for (int r = 0; r < g.R; ++r) {
    const int row = output.row * g.stride_h - g.top + r * g.dilation_h;
    const bool row_within = row >= 0 && row < g.H;
    for (int s = 0; s < g.S; ++s) {
      const int column = output.column * g.stride_w - g.left + s * g.dilation_w;
      const bool tap_within = row_within && column >= 0 && column < g.W;
      const Sum value = tap_within ? widen(plane[static_cast<int64>(row) * g.W + column]) : Sum(0);
      sum = fma(value, widen(*weight++), sum);
    }
  }
  y[position] = narrow<T>(sum);
}
