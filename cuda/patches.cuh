// Patches: the pieces of a convolution that one thread makes out of shared memory, row of x by row of x.
#pragma once
#include "indices.cuh"
#include "numbers.cuh"

// How a patch loads kSpan neighbouring columns of x, `unit` columns apart, in vectors of kVector elements.
//
// kLeft is the padding that precedes column 0, modulo kVector: the first vector starts kPhase columns before the span. Where
// kWidth is not 0, the span belongs to a whole row of so many columns, and kLeft is the padding itself: what falls outside
// is then known at compile time.
template <class T, int kSpan, int kVector, int kLeft, int kWidth>
struct RowOfPatch {
  using Sum = Accumulator<T>;
  static constexpr int kPhase = kWidth ? 0 : (kVector - kLeft % kVector) % kVector;
  static constexpr int kVectors = (kPhase + kSpan + kVector - 1) / kVector;
  static_assert(kWidth % kVector == 0, "rows are whole vectors");

  bool vector_within[kVectors];

  // `column` is where the span starts in x; where no tap can fall outside, kChecked is false.
  template <bool kChecked>
  __device__ __forceinline__ void place(int column, int unit, int W) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      vector_within[v] = !kChecked || within(column + (v * kVector - kPhase) * unit, W);
  }

  // Zeros outside; `source` is where the span starts in this row, or would.
  __device__ __forceinline__ void load(const T* source, bool row_within, int unit, Sum (&value)[kSpan]) const {
    if constexpr (kWidth) {
#pragma unroll
      for (int j = 0; j < kSpan; ++j) value[j] = Sum(0);
#pragma unroll
      for (int column = 0; column < kWidth; column += kVector) {
        Sum vector[kVector];
        load_widened<kVector>(source + kLeft + column, row_within, vector);
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
        load_widened<kVector>(source + (v * kVector - kPhase) * unit, row_within && vector_within[v], vector);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const int j = v * kVector + e - kPhase;
          if (0 <= j && j < kSpan) value[j] = vector[e];
        }
      }
    }
  }
};
