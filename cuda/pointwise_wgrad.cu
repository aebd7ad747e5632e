// Pointwise convolution, gradients of the weights and the bias, on tensor cores (sm_80 and newer).
//
// A block makes a tile of dw from a slab of the pixels, which pass through a ring of stages in shared memory, copied
// there some stages ahead.
//
// Compile-time values: those of pointwise_wgrad_tiles.cuh; X_COPY (elements of a copy: rows of x and its start are
// multiples of it); STRIDED (whether only some pixels of x are counted).
#include "pointwise_wgrad_tiles.cuh"

constexpr int kXCopy = CUCONV_X_COPY;
constexpr bool kStrided = CUCONV_STRIDED;

struct Parameters {
  int pixels;       // counted, of all images
  int slab_pixels;  // a multiple of DEPTH
  int C, K;
  int row_tiles;
  Pixels<kChannelsLast, kStrided> x;
  Dy dy;
};

// partials (slabs, C, K), with one row more in each where there is a dbias.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    pointwise_wgrad(const T* __restrict__ dy, const T* __restrict__ x, float* __restrict__ partials, T*, T*,
                    const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int column_tile = static_cast<int>(blockIdx.x) / g.row_tiles;
  const int c0 = (static_cast<int>(blockIdx.x) - column_tile * g.row_tiles) * kRows;
  const int k0 = column_tile * kColumns;
  const int begin = static_cast<int>(blockIdx.y) * g.slab_pixels;
  const int end = min(g.pixels, begin + g.slab_pixels);

  T* const x_tiles = reinterpret_cast<T*>(shared);
  T* const dy_tiles = x_tiles + kStages * kXTile;
  int next = begin;
  const auto copy = [&](int stage) {
    if (next < end) {
      copy_tile<kThreads, kXRows, kXRow, kXRow + kPad, kXCopy>(
          x_tiles + stage * kXTile, thread, [&](int row, int column) -> const T* {
            const int pixel = next + (kChannelsLast ? row : column);
            const int c = c0 + (kChannelsLast ? column : row);
            return pixel < end && c < g.C ? x + g.x.element(pixel) + c * g.x.apart() : nullptr;
          });
      copy_dy(dy_tiles + stage * kDyTile, dy, g.dy, k0, g.K, next, end, thread);
      next += kDepth;
    }
    ptx::copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);

  const bool sums_bias = kBias && c0 == 0 && first_row_of(warp) == 0;
  WgradSums sum = {};
  int stage = 0;
  int free_stage = kStages - 1;
#pragma unroll 1
  for (int first = begin; first < end; first += kDepth) {
    ptx::copy_async_wait<kStages - 2>();
    __syncthreads();
    copy(free_stage);
    multiply_stage(sum, x_tiles + stage * kXTile, dy_tiles + stage * kDyTile, sums_bias, warp, lane);
    free_stage = stage;
    if (++stage == kStages) stage = 0;
  }
  ptx::copy_async_wait<0>();

  float* const own = partials + blockIdx.y * static_cast<int64>(g.C + kBias) * g.K;
  deliver_partials(sum, own, c0, g.C, k0, g.K, sums_bias, warp, lane, [&](int c, int k) {
    const T* const x_channel = x + c * g.x.apart();
    const T* const dy_channel = dy + k * g.dy.apart();
    float plain = 0;
    for (int pixel = begin; pixel < end; ++pixel) {
      const float factor = c < g.C ? float(widen(x_channel[g.x.element(pixel)])) : 1.0f;
      plain = fma(factor, float(widen(dy_channel[g.dy.element(pixel)])), plain);
    }
    return plain;
  });
}
