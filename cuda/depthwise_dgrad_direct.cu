// Depthwise convolution, gradient of the input, one element of dx a thread: every geometry and layout, on every
// architecture from sm_75 up.
//
// It takes the addresses that depthwise_runs takes, the bias among them, which a gradient has not.
//
// Compile-time values: T; INDEX, the integer that counts elements: int where every tensor is below 2^31 of them;
// CHANNELS_LAST (dy and dx lie in memory as NHWC, and not as NCHW).
#include "direct.cuh"
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;
using Index = CUCONV_INDEX;

constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;

constexpr int kThreads = 256;
// Left to itself the compiler aims at more blocks a multiprocessor and spills.
constexpr int kMinBlocks = 4;

struct Parameters {
  int multiplier;  // output planes for each input plane
  int C;           // input channels
  int R, S;
  int H, W, P, Q;
  int top, left;   // padding
  int stride_h, stride_w, dilation_h, dilation_w;
  int64 total_outputs;  // elements of dx
};

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    depthwise_dgrad_direct(const T* dy, const T* w, const T*, T* dx, const __grid_constant__ Parameters g) {
  const int64 position = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (position >= g.total_outputs) return;
  const Element<Index, kChannelsLast> output(static_cast<Index>(position), g.C, g.H, g.W);
  Sum sum = 0;
  for (int m = 0; m < g.multiplier; ++m) {
    const int k = output.channel * g.multiplier + m;
    const Plane<T, kChannelsLast> plane(dy, output.image, k, g.C * g.multiplier, static_cast<int64>(g.P) * g.Q);
    const T* weight = w + static_cast<int64>(k) * g.R * g.S;
    for (int r = 0; r < g.R; ++r) {
      // The output row whose kernel row r falls on this row of x; a negative remainder is a remainder too.
      const int p_stride = output.row + g.top - r * g.dilation_h;
      if (p_stride % g.stride_h != 0) {
        weight += g.S;
        continue;
      }
      const int p = p_stride / g.stride_h;
      for (int s = 0; s < g.S; ++s, ++weight) {
        const int q_stride = output.column + g.left - s * g.dilation_w;
        if (q_stride % g.stride_w != 0) continue;
        const int q = q_stride / g.stride_w;
        const bool exists = p >= 0 && p < g.P && q >= 0 && q < g.Q;
        const Sum value = exists ? widen(plane[static_cast<int64>(p) * g.Q + q]) : Sum(0);
        sum = fma(value, widen(*weight), sum);
      }
    }
  }
  dx[position] = narrow<T>(sum);
}
