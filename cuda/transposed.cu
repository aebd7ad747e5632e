// Matrices (rows, columns), one behind the other in memory, to (columns, rows): an array channels-last, whose images have
// H*W rows of C elements, to (N, C, H, W), and back. Elements are moved as the bits that they are. From sm_75 up.
//
// A block turns a square tile around in shared memory: 128 bytes of rows come in, 128 bytes of columns go out. There the
// elements of a column lie side by side, in units of 16 bytes. Each column begins at another unit, so that threads store
// elements of neighbouring columns, or of columns a vector apart, to different banks.
//
// Compile-time values: T (uint16, uint32 or uint64); IN_VECTOR, OUT_VECTOR (elements of one load and one store: they
// divide columns and rows); THREADS.
#include "numbers.cuh"

using T = CUCONV_T;

constexpr int kIn = CUCONV_IN_VECTOR;
constexpr int kOut = CUCONV_OUT_VECTOR;
constexpr int kThreads = CUCONV_THREADS;

constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
// Units of a row or a column of the tile: all banks of shared memory once.
constexpr int kUnits = 8;
constexpr int kSide = kUnits * kUnit;

// What one instruction stores to shared memory: an element, or those of two rows where two fit a word.
template <class Element>
struct WordOf {
  using type = Element;
};
template <>
struct WordOf<uint16> {
  using type = uint32;
};
using Word = typename WordOf<T>::type;
constexpr int kPair = static_cast<int>(sizeof(Word) / sizeof(T));

// Vectors of a tile that every thread brings, of kPair rows each, and takes.
constexpr int kRowVectors = kSide / kIn;
constexpr int kColumnVectors = kSide / kOut;
constexpr int kBrought = kSide / kPair * kRowVectors / kThreads;
constexpr int kTaken = kSide * kColumnVectors / kThreads;
// Addresses that a thread has at once.
constexpr int kTakenAtOnce = kTaken < 4 ? kTaken : 4;
static_assert(kBrought * kThreads == kSide / kPair * kRowVectors && kTaken * kThreads == kSide * kColumnVectors);

struct Parameters {
  int rows, columns;
  int column_tiles;
  int matrices;
  int64 total_elements;  // of one matrix
};

// Where in shared memory an element of the tile is.
__device__ __forceinline__ int place(int row, int column) {
  const int turned = column / kUnit ^ column % kUnit * (kUnits / kUnit);
  return column * kSide + (row / kUnit ^ turned) * kUnit + row % kUnit;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    transposed(const T* source, T* result, const __grid_constant__ Parameters g) {
  __shared__ __align__(128) T shared[kSide * kSide];
  const int thread = static_cast<int>(threadIdx.x);
  const int row_tile = static_cast<int>(blockIdx.x) / g.column_tiles;
  const int first_row = row_tile * kSide;
  const int first_column = (static_cast<int>(blockIdx.x) - row_tile * g.column_tiles) * kSide;
  for (int matrix = static_cast<int>(blockIdx.y); matrix < g.matrices; matrix += static_cast<int>(gridDim.y)) {
    const T* const from = source + matrix * g.total_elements;
    T* const to = result + matrix * g.total_elements;

    // Neighbouring threads bring neighbouring vectors of a row, all before the first is waited for.
    Vector<T, kIn> brought[kBrought][kPair] = {};
#pragma unroll
    for (int i = 0; i < kBrought; ++i) {
      const int item = i * kThreads + thread;
      const int row = first_row + item / kRowVectors * kPair;
      const int column = first_column + item % kRowVectors * kIn;
      const T* const at = from + static_cast<int64>(row) * g.columns + column;
#pragma unroll
      for (int r = 0; r < kPair; ++r)
        if (row + r < g.rows && column < g.columns)
          brought[i][r] = *reinterpret_cast<const Vector<T, kIn>*>(at + static_cast<int64>(r) * g.columns);
    }
#pragma unroll
    for (int i = 0; i < kBrought; ++i) {
      const int item = i * kThreads + thread;
#pragma unroll
      for (int e = 0; e < kIn; ++e) {
        Word word = brought[i][0].piece[e];
        if constexpr (kPair == 2) word |= static_cast<Word>(brought[i][1].piece[e]) << 16;
        T* const at = shared + place(item / kRowVectors * kPair, item % kRowVectors * kIn + e);
        *reinterpret_cast<Word*>(at) = word;
      }
    }
    __syncthreads();

    // Neighbouring threads take neighbouring vectors of a column.
#pragma unroll kTakenAtOnce
    for (int i = 0; i < kTaken; ++i) {
      const int item = i * kThreads + thread;
      const int row = item % kColumnVectors * kOut;
      const int column = item / kColumnVectors;
      if (first_row + row >= g.rows || first_column + column >= g.columns) continue;
      *reinterpret_cast<Vector<T, kOut>*>(to + static_cast<int64>(first_column + column) * g.rows + first_row + row) =
          *reinterpret_cast<const Vector<T, kOut>*>(shared + place(row, column));
    }
    // The next matrix's elements take the place of these.
    __syncthreads();
  }
}
