// Planes as they lie in memory, one row behind the other, on tensor cores (sm_90 and newer, 16-bit): of convolutions at
// stride 1 without dilation whose output has the extents of their input.
//
// Output and input then have the same place, and what meets a tap lies the same number of elements away from every
// output: -left - top * W for the first tap, W more for a tap of the next kernel row. A unit is kChunk outputs anywhere
// in the plane. Of one kernel row they need a window of as many inputs and S - 1 more, which starts at one place of a
// chunk of 16 bytes in all units alike, so that windows can be read in whole chunks however long the rows are, and
// wherever the plane starts.
//
// Rows of padding above and below are zeros in shared memory. A row's first and last outputs would meet elements of the
// rows before and behind it in place of the padding: they are an affair of their own.
#pragma once
#include "indices.cuh"
#include "numbers.cuh"
#include "runs.cuh"

// Elements of 16 bytes.
constexpr int kChunk = 8;
// Units of a product on tensor cores.
constexpr int kUnits = 16;
// Elements before the first row in shared memory, which windows may reach into.
constexpr int kMargin = 32;

// The multiple of kChunk that is not above a number, which may be negative.
__device__ constexpr int whole_chunks(int elements) { return elements & -kChunk; }
__device__ constexpr int beyond_chunks(int elements) { return elements & (kChunk - 1); }

// The lowest bits of the place of an element of an array that starts at a chunk.
template <class T>
__device__ __forceinline__ int place_in_chunk(const T* element) {
  return beyond_chunks(static_cast<int>(reinterpret_cast<uint64>(element) / sizeof(T)));
}

// Of a plane of H rows, the rows [first, first + rows) of the output, and those of the input that they need: from
// `top_row` on, of which [low, high) exist.
struct Rows {
  int first, rows, top_row, low, high, end;

  __device__ __forceinline__ Rows(int p0, int at_most, int H, int top, int R) {
    first = p0;
    rows = min(at_most, H - p0);
    top_row = p0 - top;
    low = max(top_row, 0);
    end = top_row + rows + R - 1;
    high = min(end, H);
  }
};

// Zeros in place of the rows that do not exist, and of what is beside those that do: neighbours in the array that the
// copy engine has brought, or what was there before. `start` is where row `low` is. By all threads; elements up to a
// chunk and a half on both sides are overwritten.
template <int kThreads, class T>
__device__ __forceinline__ void surround_by_zeros(T* start, const Rows& rows, int W, int thread) {
  const int before = (rows.low - rows.top_row) * W + 2 * kChunk;
  const int behind = (rows.end - rows.high) * W + 2 * kChunk;
  T* const end = start + (rows.high - rows.low) * W;
#pragma unroll 1
  for (int i = thread; i < before; i += kThreads) start[-1 - i] = T{};
#pragma unroll 1
  for (int i = thread; i < behind; i += kThreads) end[i] = T{};
}

// Zeros in all chunks of so many bytes but those that hold elements of [first, last).
template <int kThreads, class T>
__device__ __forceinline__ void clear_around(T* begin, int bytes, const T* first, const T* last, int thread) {
  using Words = Vector<uint32, 4>;
  const int from = static_cast<int>(first - begin) / kChunk;
  const int to = (static_cast<int>(last - begin) + kChunk - 1) / kChunk;
#pragma unroll 1
  for (int i = thread; i < bytes / kBulkAlignment - (to - from); i += kThreads)
    reinterpret_cast<Words*>(begin)[i < from ? i : i + to - from] = Words{};
}
