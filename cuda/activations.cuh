// What follows a convolution, element by element, in its accumulator's type.
#pragma once
#include "ptx.cuh"

namespace activation {

template <class Sum>
__device__ __forceinline__ Sum none(Sum z) {
  return z;
}

// A NaN stays one, which fmax would not have.
template <class Sum>
__device__ __forceinline__ Sum relu(Sum z) {
  return z < Sum(0) ? Sum(0) : z;
}

template <class Sum>
__device__ __forceinline__ Sum relu6(Sum z) {
  return z > Sum(6) ? Sum(6) : relu(z);
}

template <class Sum>
__device__ __forceinline__ Sum silu(Sum z) {
  return z / (Sum(1) + exp(-z));
}

template <class Sum>
__device__ __forceinline__ Sum hardswish(Sum z) {
  return z * relu6(z + Sum(3)) / Sum(6);
}

template <class Sum>
__device__ __forceinline__ Sum gelu(Sum z) {
  return z * (Sum(0.5) * erfc(z * Sum(-0.70710678118654752440)));
}

}  // namespace activation
