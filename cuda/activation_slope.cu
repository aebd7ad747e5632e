// The gradient before an activation from the one behind it, element by element, in place of what the activation was of.
//
// Compile-time values: T; ACTIVATION.
#include "numbers.cuh"
#include "slopes.cuh"

using T = CUCONV_T;

constexpr int kThreads = 256;

struct Parameters {
  int64 total_elements;
};

extern "C" __global__ void __launch_bounds__(kThreads)
    activation_slope(const T* gradient, T* z, const __grid_constant__ Parameters g) {
  const int64 apart = static_cast<int64>(gridDim.x) * kThreads;
  for (int64 i = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x; i < g.total_elements; i += apart)
    z[i] = narrow<T>(widen(gradient[i]) * slope::CUCONV_ACTIVATION(Accumulator<T>(widen(z[i]))));
}
