// One gradient of a weight or the bias, element by element, as the reference sums it: what kernels on tensor cores fall
// back to for data that are not all finite.
#pragma once
#include "indices.cuh"
#include "numbers.cuh"
#include "runs.cuh"

// By all lanes of a warp, of one channel and so many images; dbias has the number behind the last tap's.
template <class T, class Parameters>
__device__ __forceinline__ float sum_plainly(const Parameters& g, const T* dy, const T* x, int images, int64 x_image,
                                             int64 dy_image, int tap, int lane) {
  const int r = tap / g.S;
  const int s = tap - r * g.S;
  float sum = 0;
  for (int image = 0; image < images; ++image, dy += dy_image, x += x_image) {
    for (int element = lane; element < g.P * g.Q; element += kWarp) {
      const int p = element / g.Q;
      const int h = p * g.stride_h + r * g.dilation_h - g.top;
      const int w = element - p * g.Q + s * g.dilation_w - g.left;
      const bool exists = within(h, g.H) && within(w, g.W);
      const float value = r == g.R ? 1.0f : exists ? widen(x[h * g.W + w]) : 0.0f;
      sum = fma(value, widen(dy[element]), sum);
    }
  }
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffff, sum, apart);
  return sum;
}
