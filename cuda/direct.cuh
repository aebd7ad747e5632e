// What the direct kernels share: an element of the result is one thread's.
#pragma once
#include "ptx.cuh"

// Where the element at `position` of an array (images, channels, rows, columns) is. Index counts the array's elements.
template <class Index>
struct Element {
  Index plane;
  int channel, row, column;

  __device__ __forceinline__ Element(Index position, int channels, int rows, int columns) {
    column = static_cast<int>(position % columns);
    row = static_cast<int>(position / columns % rows);
    plane = position / columns / rows;
    channel = static_cast<int>(plane % channels);
  }
};
