// Depthwise convolution of small planes, channels-last (NHWC in memory; sm_80 and newer; 16-bit and float32): forward, and
// the gradient of the input, which is the convolution of dy with the kernel turned around. The names are the forward
// pass's. Stride and dilation are 1, and y is as large as x.
//
// A warp owns kWarp neighbouring channels in some images, one after the other; warps meet nowhere. A lane goes down the
// rows of its channel's plane in shared memory, where asynchronous copies bring it some images ahead. All of a plane is
// unrolled, and taps in the padding are no instructions. A row of y takes the place of the row of x that no output is
// left to need; from there the plane is taken back, whole pieces of pixels at a time.
//
// Compile-time values: those of small_planes.cuh; TURNED (the kernel, both ways); THREADS; BLOCKS (that a multiprocessor
// is to hold, which bounds the registers); STAGES (planes of a warp that are on their way or worked on).
#include "small_planes.cuh"

constexpr bool kTurned = CUCONV_TURNED;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kWarps = kThreads / kWarp;

struct Parameters {
  int K;
  int groups;       // of channels, kWarp each
  int images;
  int unit_images;  // of a warp
};

// What all taps in the padding add to row p.
__device__ __forceinline__ void add_padding(int p, const float (&weight)[kR][kS], float (&row)[kW]) {
#pragma unroll
  for (int q = 0; q < kW; ++q)
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int s = 0; s < kS; ++s)
        if (!meets(p, q, r, s)) row[q] = fma(0.0f, weight[r][s], row[q]);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_channels_last_planes(const T* x, const T* w, const T* bias, T* y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  T* const planes = reinterpret_cast<T*>(shared) + warp * kStages * kPlane;

  const int unit = static_cast<int>(blockIdx.x) * kWarps + warp;
  const int part = unit / g.groups;
  const int k0 = (unit - part * g.groups) * kWarp;
  const int channels = min(kWarp, g.K - k0);
  const int64 image_size = static_cast<int64>(g.K) * kPixels;
  const int64 first = static_cast<int64>(part) * g.unit_images * image_size + k0;
  const int images = min(g.unit_images, g.images - part * g.unit_images);
  if (images <= 0) return;

  const auto load = [&](int image) {
    if (image < images)
      for_pieces(channels, g.K, lane, [&](int to, int64 from) {
        ptx::copy_async<16>(planes + image % kStages * kPlane + to, x + first + image * image_size + from);
      });
    ptx::copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) load(stage);

  const int64 k = k0 + min(lane, channels - 1);
  float weight[kR][kS];
  bool finite = true;
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      const int tap = kTurned ? kTaps - 1 - (r * kS + s) : r * kS + s;
      weight[r][s] = widen(w[k * kTaps + tap]);
      finite = finite && weight[r][s] * 0.0f == 0.0f;
    }
  const float start = bias == nullptr ? 0.0f : widen(bias[k]);

#pragma unroll 1
  for (int image = 0; image < images; ++image) {
    T* const plane = planes + image % kStages * kPlane;
    ptx::copy_async_wait<kStages - 1>();
    __syncwarp();
    // Row p of y is sum[p % kR] from the first row of x that it needs to the last.
    float sum[kR][kW];
#pragma unroll
    for (int h = 0; h < kH; ++h) {
      float value[kW];
      load_row(plane, h, lane, value);
#pragma unroll
      for (int r = kR - 1; r >= 0; --r) {
        const int p = h + kTop - r;
        if (p < 0 || p >= kH) continue;
        float(&row)[kW] = sum[p % kR];
        if (h == 0 || r == 0)
#pragma unroll
          for (int q = 0; q < kW; ++q) row[q] = start;
#pragma unroll
        for (int q = 0; q < kW; ++q)
#pragma unroll
          for (int s = 0; s < kS; ++s)
            if (meets(p, q, r, s)) row[q] = fma(value[q + s - kLeft], weight[r][s], row[q]);
        if (h < kH - 1 && r < kR - 1) continue;
        // A tap in the padding adds a zero, unless its weight is infinite or NaN.
        if (!finite) add_padding(p, weight, row);
#pragma unroll
        for (int q = 0; q < kW; ++q) plane[(p * kW + q) * kWarp + lane] = narrow<T>(row[q]);
      }
    }
    __syncwarp();
    for_pieces(channels, g.K, lane, [&](int from, int64 to) {
      using Piece = Vector<uint32, 4>;
      *reinterpret_cast<Piece*>(y + first + image * image_size + to) = *reinterpret_cast<const Piece*>(plane + from);
    });
    __syncwarp();
    load(image + kStages);
  }
}
