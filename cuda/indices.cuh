// Arithmetic on indices of rows, columns and planes.
#pragma once
#include "ptx.cuh"

// n / d for n and d below 2^15, by a multiplication: magic is 2^31 / d, rounded up.
__device__ __forceinline__ int divide(int n, uint32 magic) {
  return static_cast<int>(static_cast<uint64>(static_cast<uint32>(n)) * magic >> 31);
}

__device__ __forceinline__ bool within(int index, int extent) {
  return static_cast<uint32>(index) < static_cast<uint32>(extent);
}
