// Patches: the pieces of a convolution that one thread makes out of shared memory, row of x by row of x.
#pragma once
#include "indices.cuh"
#include "numbers.cuh"

// How a patch loads kSpan neighbouring columns of x, `unit` columns apart, in vectors of kVector elements.
//
// kLeft is the padding that precedes column 0, modulo kVector: the first vector starts kPhase columns before the span.
// Where kWidth is not 0, the span belongs to a whole row of so many columns, and kLeft is the padding itself: what
// falls outside is then known at compile time. kByWords: see load_widened.
template <class T, int kSpan, int kVector, int kLeft, int kWidth, bool kByWords = false>
struct RowOfPatch {
  using Sum = Accumulator<T>;
  static constexpr int kPhase = kWidth ? 0 : (kVector - kLeft % kVector) % kVector;
  static constexpr int kVectors = (kPhase + kSpan + kVector - 1) / kVector;
  static_assert(kWidth % kVector == 0, "rows are whole vectors");

  bool vector_within[kVectors];

  // `column` is where the span starts in x; where no tap can fall outside, kChecked is false. Single columns from
  // kInsideFrom on and before kInsideTo are in x whatever the patch.
  template <bool kChecked, int kInsideFrom = 0, int kInsideTo = 0>
  __device__ __forceinline__ void place(int column, int unit, int W) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const bool inside = kVector == 1 && kInsideFrom <= v && v < kInsideTo;
      vector_within[v] = !kChecked || inside || within(column + (v * kVector - kPhase) * unit, W);
    }
  }

  // Zeros outside; `source` is where the span starts in this row, or would.
  __device__ __forceinline__ void load(const T* source, bool row_within, int unit, Sum (&value)[kSpan]) const {
    if constexpr (kWidth) {
#pragma unroll
      for (int j = 0; j < kSpan; ++j) value[j] = Sum(0);
#pragma unroll
      for (int column = 0; column < kWidth; column += kVector) {
        Sum vector[kVector];
        load_widened<kVector, kByWords>(source + kLeft + column, row_within, vector);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const int j = column + e + kLeft;
          if (0 <= j && j < kSpan) value[j] = vector[e];
        }
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Sum vector[kVector];
        load_widened<kVector, kByWords>(source + (v * kVector - kPhase) * unit, row_within && vector_within[v], vector);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const int j = v * kVector + e - kPhase;
          if (0 <= j && j < kSpan) value[j] = vector[e];
        }
      }
    }
  }
};

// Of the elements that share a word from `column` on, those that are within a row, as a mask of bits.
template <class T>
__device__ __forceinline__ uint32 mask_of_columns(int column, int W) {
  if constexpr (sizeof(T) == 4) return within(column, W) ? 0xffffffffu : 0;
  return (within(column, W) ? 0xffffu : 0) | (within(column + 1, W) ? 0xffff0000u : 0);
}

// A pair of elements at a boundary of pairs, as many bits of them as the words of a mask have, or zeros.
template <class T>
__device__ __forceinline__ void load_masked_pair(const T* source, bool present, const uint32* mask,
                                                 Accumulator<T> (&element)[2]) {
  constexpr int kWords = 2 * static_cast<int>(sizeof(T)) / 4;
  static_assert(sizeof(T) <= 4, "a word has an element or two");
  Vector<uint32, kWords> words = {};
  if (present) words = *reinterpret_cast<const Vector<uint32, kWords>*>(source);
  if constexpr (kWords == 1) {
    widen_pair(T{}, words.piece[0] & mask[0], element[0], element[1]);
  } else {
    element[0] = __uint_as_float(words.piece[0] & mask[0]);
    element[1] = __uint_as_float(words.piece[1] & mask[1]);
  }
}

// Pairs of neighbouring columns of x, `unit` columns apart, an even number. Every pair starts at a boundary of pairs.
template <class T, int kPairs>
struct PairsOfPatch {
  using Sum = Accumulator<T>;
  static constexpr int kWords = 2 * static_cast<int>(sizeof(T)) / 4;  // of a pair

  uint32 mask[kPairs * kWords];

  template <bool kChecked>
  __device__ __forceinline__ void place(int column, int unit, int W) {
#pragma unroll
    for (int k = 0; k < kPairs * kWords; ++k)
      mask[k] = kChecked ? mask_of_columns<T>(column + k / kWords * unit + k % kWords, W) : 0xffffffffu;
  }

  // Zeros outside; `source` is where the first pair is in this row, or would be.
  __device__ __forceinline__ void load(const T* source, bool row_within, int unit, Sum (&value)[2 * kPairs]) const {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      Sum element[2];
      load_masked_pair(source + pair * unit, row_within, &mask[pair * kWords], element);
      value[2 * pair] = element[0];
      value[2 * pair + 1] = element[1];
    }
  }
};
