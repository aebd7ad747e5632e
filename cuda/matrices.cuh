// Products of matrices on tensor cores (sm_80 and newer), of tiles in shared memory, by the lanes of a warp.
//
// 16-bit elements are multiplied as they are, float32 as TF32, which keeps 11 bits of it: in one product, or in three
// of the elements' upper and lower halves, that miss some 2^-23 of each product.
#pragma once
#include "products.cuh"

// A part of a matrix in shared memory. `outer` counts its rows of the result, or its columns, and `depth` what is
// summed over; kAlong says which of the two memory runs along.
template <class T, int kPitch, bool kAlongOuter>
struct Tile {
  const T* first;

  __device__ __forceinline__ const T* at(int outer, int depth) const {
    return first + (kAlongOuter ? depth * kPitch + outer : outer * kPitch + depth);
  }
};

// What one product takes of the depth, and of rows and columns of the result.
template <class T>
constexpr int kProductDepth = sizeof(T) == 2 ? 16 : 8;
constexpr int kProductRows = 16;
constexpr int kProductColumns = 8;
constexpr int kWarp = 32;

// How many elements are between the rows of a tile, so that what the lanes of a product read at once lies in different
// banks: 16 bytes of 8 rows, or single floats of 8 rows or of 4.
template <class T>
__device__ constexpr int pad_of(bool along_outer) {
  return sizeof(T) == 2 || along_outer ? 8 : 4;
}

// One lane's part of an operand: for three products its upper and its lower halves.
template <int kTerms>
struct Left {
  uint32 term[kTerms][4];
};
template <int kTerms>
struct Right {
  uint32 term[kTerms][2];
};

// The value in as many terms of 11 bits; what is not finite, and what is rounded to infinity, becomes NaN in the
// second.
template <int kTerms, int kCount>
__device__ __forceinline__ void set_terms(uint32 (&term)[kTerms][kCount], int i, float value) {
  term[0][i] = ptx::float_to_tf32(value);
  if constexpr (kTerms == 2) term[1][i] = ptx::float_to_tf32(value - __uint_as_float(term[0][i]));
}

// Rows `outer` to outer + 15.
template <int kTerms, class T, int kPitch, bool kAlongOuter>
__device__ __forceinline__ void load_left(Left<kTerms>& left, const Tile<T, kPitch, kAlongOuter>& tile, int outer,
                                          int depth, int lane) {
  if constexpr (sizeof(T) == 2) {
    static_assert(kTerms == 1);
    const int second = lane / 8 % 2 * 8;
    const int last = lane / 16 * 8;
    if (kAlongOuter) {
      ptx::load_matrices_transposed(tile.at(outer + second, depth + lane % 8 + last), left.term[0]);
    } else {
      ptx::load_matrices(tile.at(outer + lane % 8 + second, depth + last), left.term[0]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      set_terms(left.term, i, *tile.at(outer + lane / 4 + i % 2 * 8, depth + lane % 4 + i / 2 * 4));
  }
}

// Columns `outer` to outer + 15, of two products.
template <int kTerms, class T, int kPitch, bool kAlongOuter>
__device__ __forceinline__ void load_rights(Right<kTerms>* right, const Tile<T, kPitch, kAlongOuter>& tile, int outer,
                                            int depth, int lane) {
  if constexpr (sizeof(T) == 2) {
    static_assert(kTerms == 1);
    const int second = lane / 8 % 2 * 8;
    const int last = lane / 16 * 8;
    uint32 piece[4];
    if (kAlongOuter) {
      ptx::load_matrices_transposed(tile.at(outer + last, depth + lane % 8 + second), piece);
    } else {
      ptx::load_matrices(tile.at(outer + lane % 8 + last, depth + second), piece);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) right[i / 2].term[0][i % 2] = piece[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      set_terms(right[i / 2].term, i % 2, *tile.at(outer + i / 2 * 8 + lane / 4, depth + lane % 4 + i % 2 * 4));
  }
}

// 16 rows, of which the first is ones and the rest zeros.
template <class T, int kTerms>
__device__ __forceinline__ Left<kTerms> row_of_ones(int lane) {
  Left<kTerms> ones = {};
  if (lane / 4 == 0) {
    uint32 one;
    if constexpr (sizeof(T) == 2) {
      one = narrow_pair(T{}, 1.0f, 1.0f);
    } else {
      one = __float_as_uint(1.0f);
    }
    ones.term[0][0] = ones.term[0][2] = one;
  }
  return ones;
}

// sum += left right, as ptx::multiply_halves has it.
template <class T, int kTerms>
__device__ __forceinline__ void multiply_terms(float (&sum)[4], const Left<kTerms>& left, const Right<kTerms>& right) {
  if constexpr (sizeof(T) == 2) {
    multiply(T{}, sum, left.term[0], right.term[0]);
  } else {
    // The small ones first.
    if constexpr (kTerms == 2) {
      ptx::multiply_tf32s(sum, left.term[1], right.term[0]);
      ptx::multiply_tf32s(sum, left.term[0], right.term[1]);
    }
    ptx::multiply_tf32s(sum, left.term[0], right.term[0]);
  }
}

// Begins to copy kRows rows of kRow elements to shared memory, kPitch apart, with zeros for what does not exist.
// source(row, column) is where kPiece elements begin, or null.
template <int kThreads, int kRows, int kRow, int kPitch, int kPiece, class T, class Source>
__device__ __forceinline__ void copy_tile(T* tile, int thread, Source source) {
  constexpr int kPieces = kRow / kPiece;
  constexpr int kItems = kRows * kPieces;
  static_assert(kPieces * kPiece == kRow);
#pragma unroll
  for (int i = 0; i < (kItems + kThreads - 1) / kThreads; ++i) {
    const int item = i * kThreads + thread;
    if (kItems % kThreads > 0 && item >= kItems) break;
    const int row = item / kPieces;
    const int column = (item - row * kPieces) * kPiece;
    T* const to = tile + row * kPitch + column;
    const T* const from = source(row, column);
    if constexpr (kPiece * sizeof(T) >= 4) {
      if (from != nullptr) {
        ptx::copy_async<kPiece * sizeof(T)>(to, from);
      } else {
        *reinterpret_cast<Vector<T, kPiece>*>(to) = {};
      }
    } else {
      *to = from != nullptr ? *from : T{};
    }
  }
}
