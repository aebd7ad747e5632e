// Phases of a dilated convolution: rows whole dilations apart, and of those the columns whole dilations apart, meet each
// other and nothing else.
//
// A thread owns a phase of a plane, or two where a word has two elements: the columns of a word, and all that lie whole
// dilations from them, kPlaces words a row. Rows of an odd number of 16-bit elements start in the midst of a word every
// other time. As the dilation is even all rows of a phase do so or none; those that do have their words begin one
// column before the row.
#pragma once
#include "patches.cuh"
#include "runs.cuh"

// Elements of a word.
template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

// Where a thread's words are in a row, kDilation elements apart, and which of their elements are the row's: of all but
// the first and the last word all.
template <class T, int kPlaces, int kDilation>
struct Phase {
  static constexpr int kPer = kPerWord<T>;
  static constexpr int kColumns = kPlaces * kPer;
  static constexpr uint32 kWhole = 0xffffffff, kLower = 0x0000ffff, kUpper = 0xffff0000;

  uint32 first_mask, last_mask;

  // `column` is the first word's first one.
  __device__ __forceinline__ Phase(int column, int W)
      : first_mask(mask_of_columns<T>(column, W)),
        last_mask(mask_of_columns<T>(column + (kPlaces - 1) * kDilation, W)) {}

  static __device__ constexpr bool at_edge(int place) { return place == 0 || place == kPlaces - 1; }
  __device__ __forceinline__ uint32 mask(int place) const { return place == 0 ? first_mask : last_mask; }

  // A row's elements, and zeros for those that do not exist, from the word of `source` on.
  __device__ __forceinline__ void load(const T* source, float (&value)[kColumns]) const {
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      uint32 word = *reinterpret_cast<const uint32*>(source + j * kDilation);
      if (at_edge(j)) word &= mask(j);
      if constexpr (kPer == 2) {
        widen_pair(T{}, word, value[2 * j], value[2 * j + 1]);
      } else {
        value[j] = __uint_as_float(word);
      }
    }
  }

  // The same way back.
  __device__ __forceinline__ void store(T* destination, const float (&value)[kColumns]) const {
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      T* const place = destination + j * kDilation;
      uint32 word;
      if constexpr (kPer == 2) {
        word = narrow_pair(T{}, value[2 * j], value[2 * j + 1]);
      } else {
        word = __float_as_uint(value[j]);
      }
      if (!at_edge(j) || mask(j) == kWhole) *reinterpret_cast<uint32*>(place) = word;
      if constexpr (kPer == 2) {
        uint16* const half = reinterpret_cast<uint16*>(place);
        // The first word may begin before the row, and the last end behind it.
        if (j == kPlaces - 1 && mask(j) == kLower) half[0] = static_cast<uint16>(word);
        if (j == 0 && mask(j) == kUpper) half[1] = static_cast<uint16>(word >> 16);
      }
    }
  }
};

// Where the copy of a plane is in a shared buffer (see run_in_shared) that starts so many elements behind the beginning
// of an array, which lies at a multiple of kBulkAlignment.
template <class T>
__device__ __forceinline__ T* plane_in_shared(unsigned char* buffer, uint32 elements) {
  return reinterpret_cast<T*>(buffer) + elements % (kBulkAlignment / sizeof(T));
}

// The elements before a multiple of a word.
template <class T>
__device__ __forceinline__ int into_word(uint32 elements) {
  return static_cast<int>(elements % kPerWord<T>);
}
