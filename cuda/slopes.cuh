// The derivatives of activations.cuh, with PyTorch's where there is none.
#pragma once
#include "ptx.cuh"

namespace slope {

template <class Sum>
__device__ __forceinline__ Sum none(Sum) {
  return Sum(1);
}

template <class Sum>
__device__ __forceinline__ Sum relu(Sum z) {
  return z > Sum(0) ? Sum(1) : Sum(0);
}

template <class Sum>
__device__ __forceinline__ Sum relu6(Sum z) {
  return z > Sum(0) && z < Sum(6) ? Sum(1) : Sum(0);
}

template <class Sum>
__device__ __forceinline__ Sum silu(Sum z) {
  const Sum sigmoid = Sum(1) / (Sum(1) + exp(-z));
  return sigmoid * (Sum(1) + z * (Sum(1) - sigmoid));
}

template <class Sum>
__device__ __forceinline__ Sum hardswish(Sum z) {
  if (z <= Sum(-3)) return Sum(0);
  return z >= Sum(3) ? Sum(1) : (Sum(2) * z + Sum(3)) / Sum(6);
}

template <class Sum>
__device__ __forceinline__ Sum gelu(Sum z) {
  const Sum cdf = Sum(0.5) * erfc(z * Sum(-0.70710678118654752440));
  return cdf + z * (exp(Sum(-0.5) * z * z) * Sum(0.39894228040143267794));
}

}  // namespace slope
