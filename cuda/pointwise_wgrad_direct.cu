// Pointwise convolution, gradients of the weights and the bias, any dtype and device: a block takes one of them, its
// threads some pixels each, added in a fixed order.
//
// Compile-time values: T; CHANNELS_LAST; STRIDED (whether only some pixels of x are counted).
#include "numbers.cuh"
#include "pixels.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;
constexpr int kThreads = 256;

struct Parameters {
  int pixels;  // counted, of all images
  int C;
  Pixels<kChannelsLast, CUCONV_STRIDED> x;
  Pixels<kChannelsLast, false> dy;
};

// Block (c, k), and where there is a dbias block (C, k).
extern "C" __global__ void __launch_bounds__(kThreads)
    pointwise_wgrad_direct(const T* __restrict__ dy, const T* __restrict__ x, const Sum*, T* __restrict__ dw,
                           T* __restrict__ dbias, const __grid_constant__ Parameters g) {
  __shared__ Sum sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int c = static_cast<int>(blockIdx.x);
  const int64 k = blockIdx.y;
  Sum sum = 0;
  for (int64 pixel = thread; pixel < g.pixels; pixel += kThreads) {
    const Sum gradient = widen(dy[g.dy.element(static_cast<int>(pixel)) + k * g.dy.apart()]);
    const Sum value = c < g.C ? Sum(widen(x[g.x.element(static_cast<int>(pixel)) + c * g.x.apart()])) : Sum(1);
    sum = fma(gradient, value, sum);
  }
  sums[thread] = sum;
#pragma unroll
  for (int apart = kThreads / 2; apart > 0; apart /= 2) {
    __syncthreads();
    if (thread < apart) sums[thread] += sums[thread + apart];
  }
  if (thread > 0) return;
  if (c < g.C) {
    dw[k * g.C + c] = narrow<T>(sums[0]);
  } else {
    dbias[k] = narrow<T>(sums[0]);
  }
}
