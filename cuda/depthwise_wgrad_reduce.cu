// Depthwise convolution, gradients of the weights and the bias: adds the partial sums of all slabs, always in one
// order, and rounds. A warp takes a part of the slabs for 32 results, a block all of them.
//
// Compile-time values: T.
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kWarp = 32;
constexpr int kParts = 8;

struct Parameters {
  int K;
  int taps;  // of a channel
  int slabs;
  int64 total_entries;  // of a slab: K times the taps, and one more where there is a dbias
};

// partials (slabs, taps, K) with one more beside the taps for dbias; dw (K, taps), dbias (K). Of partials that lie as dw
// does, K is 1, and the sums for dbias follow.
extern "C" __global__ void __launch_bounds__(kWarp* kParts)
    depthwise_wgrad_reduce(const Sum* partials, T* dw, T* dbias, const __grid_constant__ Parameters g) {
  __shared__ Sum sums[kParts][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int part = static_cast<int>(threadIdx.x) / kWarp;
  const int64 entry = static_cast<int64>(blockIdx.x) * kWarp + lane;
  const int part_slabs = (g.slabs + kParts - 1) / kParts;
  const int end = min(g.slabs, (part + 1) * part_slabs);
  Sum sum = 0;
  if (entry < g.total_entries) {
#pragma unroll 8
    for (int slab = part * part_slabs; slab < end; ++slab) sum += partials[slab * g.total_entries + entry];
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part > 0 || entry >= g.total_entries) return;
#pragma unroll
  for (int other = 1; other < kParts; ++other) sum += sums[other][lane];
  const int64 tap = entry / g.K;
  const int64 k = entry - tap * g.K;
  const int64 weights = static_cast<int64>(g.taps) * g.K;
  (entry < weights ? dw[k * g.taps + tap] : dbias[entry - weights]) = narrow<T>(sum);
}
