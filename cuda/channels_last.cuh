// What the channels-last kernels share: a thread owns a few neighbouring columns of a vector of channels.
#pragma once
#include "indices.cuh"

// n / d for all n, by a multiplication: magic is 2^shift / d, rounded up, and below 2^32, with 2^(shift - 31) >= d.
__device__ __forceinline__ int divide(int n, uint32 magic, int shift) {
  return static_cast<int>(static_cast<uint64>(static_cast<uint32>(n)) * magic >> shift);
}

__device__ __forceinline__ constexpr int least_common_multiple(int a, int b) {
  int multiple = a;
  while (multiple % b != 0) multiple += a;
  return multiple;
}

// The first column of a patch, of those that `spacing` and `count` make; rows likewise.
template <bool kDilated>
__device__ __forceinline__ int patch_start(int item, int count, int spacing) {
  return kDilated ? item + item / spacing * (count - 1) * spacing : item * count;
}
