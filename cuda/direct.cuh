// What the direct kernels share: an element of the result is one thread's.
#pragma once
#include "ptx.cuh"

// Which element of an array (images, channels, rows, columns) lies at `position` in memory; kChannelsLast says whether
// it lies there as (images, rows, columns, channels). Index counts the array's elements.
template <class Index, bool kChannelsLast>
struct Element {
  Index image;
  int channel, row, column;

  __device__ __forceinline__ Element(Index position, int channels, int rows, int columns) : image(position) {
    if (kChannelsLast) channel = split(channels);
    column = split(columns);
    row = split(rows);
    if (!kChannelsLast) channel = split(channels);
  }

 private:
  __device__ __forceinline__ int split(int extent) {
    const int index = static_cast<int>(image % extent);
    image /= extent;
    return index;
  }
};

// One plane of such an array: the pixel (row, column) is `step` times row * columns + column elements from its start.
template <class T, bool kChannelsLast>
struct Plane {
  const T* start;
  int step;

  __device__ __forceinline__ Plane(const T* array, int64 image, int channel, int channels, int64 pixels)
      : start(array + image * channels * pixels + (kChannelsLast ? channel : channel * pixels)),
        step(kChannelsLast ? channels : 1) {}

  __device__ __forceinline__ T operator[](int64 pixel) const { return start[pixel * step]; }
};
