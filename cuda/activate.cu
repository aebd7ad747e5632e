// An activation of every element of an array, in place: what a depthwise convolution that is launched by itself leaves
// to do before the pointwise one of a separable convolution.
//
// Compile-time values: T; ACTIVATION.
#include "activations.cuh"
#include "numbers.cuh"

using T = CUCONV_T;

constexpr int kThreads = 256;

struct Parameters {
  int64 total_elements;
};

extern "C" __global__ void __launch_bounds__(kThreads) activate(T* array, const __grid_constant__ Parameters g) {
  const int64 apart = static_cast<int64>(gridDim.x) * kThreads;
  for (int64 i = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x; i < g.total_elements; i += apart)
    array[i] = narrow<T>(activation::CUCONV_ACTIVATION(Accumulator<T>(widen(array[i]))));
}
