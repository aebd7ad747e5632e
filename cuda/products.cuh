// Tensor-core products of 16-bit elements (sm_80 and newer): 16 rows and 16 or 8 columns, times as many rows and 8
// columns.
#pragma once
#include "numbers.cuh"

__device__ __forceinline__ void multiply(f16, float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  ptx::multiply_halves(sum, a, b);
}
__device__ __forceinline__ void multiply(bf16, float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  ptx::multiply_bfloat16s(sum, a, b);
}
__device__ __forceinline__ void multiply(f16, float (&sum)[4], const uint32 (&a)[2], uint32 b) {
  ptx::multiply_halves(sum, a, b);
}
__device__ __forceinline__ void multiply(bf16, float (&sum)[4], const uint32 (&a)[2], uint32 b) {
  ptx::multiply_bfloat16s(sum, a, b);
}

// A word of two ones.
__device__ constexpr uint32 two_ones(f16) { return 0x3c003c00; }
__device__ constexpr uint32 two_ones(bf16) { return 0x3f803f80; }
