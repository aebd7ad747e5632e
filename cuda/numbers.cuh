// The four element types and the types that their sums are made in.
#pragma once
#include "ptx.cuh"

struct f16 {
  uint16 bits;
};

struct bf16 {
  uint16 bits;
};

using f32 = float;
using f64 = double;

static_assert(sizeof(f16) == 2 && sizeof(bf16) == 2 && sizeof(f32) == 4 && sizeof(f64) == 8);

// Sums are made in float32, in float64 for float64.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<f64> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float widen(f16 value) { return ptx::half_to_float(value.bits); }
__device__ __forceinline__ float widen(bf16 value) { return ptx::bfloat16_to_float(value.bits); }
__device__ __forceinline__ float widen(f32 value) { return value; }
__device__ __forceinline__ double widen(f64 value) { return value; }

template <class T>
__device__ __forceinline__ T narrow(Accumulator<T> value) {
  return value;
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float value) {
  return {ptx::float_to_half(value)};
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float value) {
  return {ptx::float_to_bfloat16(value)};
}

// Elements that one instruction loads or stores: 2, 4, 8 or 16 bytes, or one element.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  static_assert(kCount * sizeof(T) <= 16 && (kCount & (kCount - 1)) == 0);
  T element[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* source) {
  return *reinterpret_cast<const Vector<T, kCount>*>(source);
}

template <int kCount, class T>
__device__ __forceinline__ void store_vector(T* destination, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(destination) = vector;
}
