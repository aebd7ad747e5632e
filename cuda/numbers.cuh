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

__device__ __forceinline__ void widen_pair(f16, uint32 pair, float& lower, float& upper) {
  ptx::half_pair_to_floats(pair, lower, upper);
}
__device__ __forceinline__ void widen_pair(bf16, uint32 pair, float& lower, float& upper) {
  ptx::bfloat16_pair_to_floats(pair, lower, upper);
}
__device__ __forceinline__ uint32 narrow_pair(f16, float lower, float upper) {
  return ptx::floats_to_half_pair(lower, upper);
}
__device__ __forceinline__ uint32 narrow_pair(bf16, float lower, float upper) {
  return ptx::floats_to_bfloat16_pair(lower, upper);
}

// What one instruction loads or stores: 2, 4, 8 or 16 bytes.
template <class Piece, int kCount>
struct alignas(kCount * sizeof(Piece)) Vector {
  static_assert(kCount * sizeof(Piece) <= 16 && (kCount & (kCount - 1)) == 0);
  Piece piece[kCount];
};

// 16-bit elements are moved and converted in pairs where there are two.
template <class T, int kCount>
constexpr bool kInPairs = sizeof(T) == 2 && kCount % 2 == 0;

// kCount elements as they are loaded.
template <class T, int kCount, bool kPairs = kInPairs<T, kCount>>
struct PackedOf {
  using type = Vector<T, kCount>;
};
template <class T, int kCount>
struct PackedOf<T, kCount, true> {
  using type = Vector<uint32, kCount / 2>;
};
template <class T, int kCount>
using Packed = typename PackedOf<T, kCount>::type;

// kCount elements, or zeros where `present` is false; `source` is a multiple of kCount elements.
template <int kCount, class T>
__device__ __forceinline__ Packed<T, kCount> load_packed(const T* source, bool present) {
  return present ? *reinterpret_cast<const Packed<T, kCount>*>(source) : Packed<T, kCount>{};
}

template <class T, int kCount>
__device__ __forceinline__ void widen_packed(const Packed<T, kCount>& packed, Accumulator<T> (&value)[kCount]) {
  if constexpr (kInPairs<T, kCount>) {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) widen_pair(T{}, packed.piece[e / 2], value[e], value[e + 1]);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) value[e] = widen(packed.piece[e]);
  }
}

// load_packed, widened. Not by calling it: a vector that a function returns costs the loops around it up to 50
// registers. kByWords: single 16-bit elements pass through a whole register, which loop bodies of many loads are faster
// with and others slower.
template <int kCount, bool kByWords = false, class T>
__device__ __forceinline__ void load_widened(const T* source, bool present, Accumulator<T> (&value)[kCount]) {
  if constexpr (kByWords && kCount == 1 && sizeof(T) == 2) {
    uint32 bits = 0;
    if (present) bits = source->bits;
    float none;
    widen_pair(T{}, bits, value[0], none);
  } else {
    Packed<T, kCount> packed = {};
    if (present) packed = *reinterpret_cast<const Packed<T, kCount>*>(source);
    widen_packed<T, kCount>(packed, value);
  }
}

// kCount values, narrowed; `destination` is a multiple of kCount elements.
template <int kCount, class T>
__device__ __forceinline__ void store_narrowed(T* destination, const Accumulator<T>* value) {
  if constexpr (kInPairs<T, kCount>) {
    using Words = Vector<uint32, kCount / 2>;
    Words words;
#pragma unroll
    for (int e = 0; e < kCount; e += 2) words.piece[e / 2] = narrow_pair(T{}, value[e], value[e + 1]);
    *reinterpret_cast<Words*>(destination) = words;
  } else {
    using Elements = Vector<T, kCount>;
    Elements elements;
#pragma unroll
    for (int e = 0; e < kCount; ++e) elements.piece[e] = narrow<T>(value[e]);
    *reinterpret_cast<Elements*>(destination) = elements;
  }
}
