// Depthwise convolution, gradients of the weights and the bias, a block for each: every geometry and layout, on every
// architecture from sm_75 up.
//
// It takes the addresses that depthwise_wgrad_runs takes, the workspace among them, which it does not need.
//
// Compile-time values: T; BIAS (whether dbias is summed too); INDEX, the integer that counts elements: int where every
// tensor is below 2^31 of them; CHANNELS_LAST (dy and x lie in memory as NHWC, and not as NCHW).
#include "direct.cuh"
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;
using Index = CUCONV_INDEX;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;
constexpr int kThreads = 128;

struct Parameters {
  int multiplier;  // planes of dy for each plane of x
  int K;           // output channels
  int R, S;
  int H, W, P, Q;
  int top, left;   // padding
  int stride_h, stride_w, dilation_h, dilation_w;
  int64 total_terms;  // elements of dy in one channel
};

extern "C" __global__ void __launch_bounds__(kThreads)
    depthwise_wgrad_direct(const T* dy, const T* x, Sum*, T* dw, T* dbias, const __grid_constant__ Parameters g) {
  __shared__ Sum sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int taps = g.R * g.S;
  const int entries = taps + kBias;
  const int block = static_cast<int>(blockIdx.x);
  const int k = block / entries;
  const int tap = block - k * entries;
  const int r = tap / g.S;
  const int s = tap - r * g.S;
  const int c = k / g.multiplier;
  const int C = g.K / g.multiplier;

  Sum sum = 0;
  for (int64 term = thread; term < g.total_terms; term += kThreads) {
    const Index index = static_cast<Index>(term);
    const int q = static_cast<int>(index % g.Q);
    const int p = static_cast<int>(index / g.Q % g.P);
    const int64 n = index / g.Q / g.P;
    const Plane<T, kChannelsLast> gradients(dy, n, k, g.K, static_cast<int64>(g.P) * g.Q);
    const Sum gradient = widen(gradients[static_cast<int64>(p) * g.Q + q]);
    if (tap == taps) {
      sum += gradient;
    } else {
      const int row = p * g.stride_h - g.top + r * g.dilation_h;
      const int column = q * g.stride_w - g.left + s * g.dilation_w;
      const bool exists = row >= 0 && row < g.H && column >= 0 && column < g.W;
      const Plane<T, kChannelsLast> plane(x, n, c, C, static_cast<int64>(g.H) * g.W);
      sum = fma(exists ? widen(plane[static_cast<int64>(row) * g.W + column]) : Sum(0), gradient, sum);
    }
  }
  sums[thread] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread == 0) (tap < taps ? dw[static_cast<int64>(k) * taps + tap] : dbias[k]) = narrow<T>(sums[0]);
}
