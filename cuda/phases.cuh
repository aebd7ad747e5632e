// Phases of a dilated convolution: rows whole dilations apart, and of those the columns whole dilations apart, meet each
// other and nothing else.
//
// A thread owns a phase of a plane, or two where a word has two elements: the columns of a word, and all that lie whole
// dilations from them, kPlaces words a row. Rows of an odd number of 16-bit elements start in the midst of a word every
// other time. As the dilation is even all rows of a phase do so or none; those that do have their words begin one
// column before the row.
#pragma once
#include "patches.cuh"

// Elements of a word.
template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

// Where a thread's words are in a row, and which of their elements are the row's: of all but the first and the last all.
template <class T, int kPlaces>
struct Phase {
  static constexpr int kPer = kPerWord<T>;
  static constexpr int kColumns = kPlaces * kPer;

  uint32 first_mask, last_mask;

  // `column` is the first word's first one.
  __device__ __forceinline__ void place(int column, int dilation, int W) {
    first_mask = mask_of_columns<T>(column, W);
    last_mask = mask_of_columns<T>(column + (kPlaces - 1) * dilation, W);
  }

  __device__ __forceinline__ uint32 mask(int place) const {
    return place == 0 ? first_mask : place == kPlaces - 1 ? last_mask : 0xffffffffu;
  }

  // A row's elements, and zeros for those that do not exist, from the word of `source` on.
  __device__ __forceinline__ void load(const T* source, int dilation, Accumulator<T> (&value)[kColumns]) const {
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      uint32 word = *reinterpret_cast<const uint32*>(source + j * dilation);
      if (j == 0 || j == kPlaces - 1) word &= mask(j);
      if constexpr (kPer == 2) {
        widen_pair(T{}, word, value[2 * j], value[2 * j + 1]);
      } else {
        value[j] = __uint_as_float(word);
      }
    }
  }

  // The same way back.
  __device__ __forceinline__ void store(T* destination, int dilation, const Accumulator<T> (&value)[kColumns]) const {
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      T* const place = destination + j * dilation;
      uint32 word;
      if constexpr (kPer == 2) {
        word = narrow_pair(T{}, value[2 * j], value[2 * j + 1]);
      } else {
        word = __float_as_uint(value[j]);
      }
      if ((j > 0 && j < kPlaces - 1) || mask(j) == 0xffffffffu) {
        *reinterpret_cast<uint32*>(place) = word;
      } else if constexpr (kPer == 2) {
        uint16* const half = reinterpret_cast<uint16*>(place);
        if (mask(j) == 0x0000ffffu) half[0] = static_cast<uint16>(word);
        if (mask(j) == 0xffff0000u) half[1] = static_cast<uint16>(word >> 16);
      }
    }
  }
};

// The elements before a multiple of a word.
template <class T>
__device__ __forceinline__ int into_word(const T* address) {
  return static_cast<int>(reinterpret_cast<uint64>(address) / sizeof(T) % kPerWord<T>);
}
