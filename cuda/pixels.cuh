// Pixels of a batch of images, counted through, and where they lie in a tensor.
#pragma once
#include "ptx.cuh"

// n / d for n below 2^31, by a multiplication: magic is 2^(31 + shift) / d, rounded up, with 2^shift the first power
// that is no less than d (T. Granlund, P. Montgomery, "Division by invariant integers using multiplication", 1994).
__device__ __forceinline__ int divide_by(int n, uint32 magic, int shift) {
  return static_cast<int>(static_cast<uint64>(static_cast<uint32>(n)) * magic >> (31 + shift));
}

// A tensor of images (N, channels, rows, columns), of which every step_h-th row and step_w-th column are counted, or
// all.
template <bool kChannelsLast, bool kStrided>
struct Pixels {
  int channels;
  int plane;    // elements of an image's channel
  int columns;  // of the tensor
  int step_h, step_w;
  int counted;  // pixels of an image
  uint32 counted_magic, row_magic;
  int counted_shift, row_shift;
  int row;      // counted pixels of a row

  // The element of a pixel's first channel.
  __device__ __forceinline__ int64 element(int pixel) const {
    if (kChannelsLast && !kStrided) return static_cast<int64>(pixel) * channels;
    const int image = divide_by(pixel, counted_magic, counted_shift);
    int of_image = pixel - image * counted;
    if (kStrided) {
      const int p = divide_by(of_image, row_magic, row_shift);
      of_image = p * step_h * columns + (of_image - p * row) * step_w;
    }
    const int64 start = static_cast<int64>(image) * plane;
    return kChannelsLast ? (start + of_image) * channels : start * channels + of_image;
  }

  // From one channel of a pixel to the next.
  __device__ __forceinline__ int64 apart() const { return kChannelsLast ? 1 : plane; }
};
