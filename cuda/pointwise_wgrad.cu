// Pointwise convolution, gradients of the weights and the bias, on tensor cores (sm_80 and newer).
//
// A product of matrices: dw (c, k) = x (c, pixels) dy (pixels, k), with the pixels of all images counted through. A
// block makes a tile of dw from a slab of the pixels, which pass through a ring of stages in shared memory, copied
// there some stages ahead. dbias is one more row: the product of ones and dy.
//
// Compile-time values: T; CHANNELS_LAST; BIAS (whether dbias is summed too); ROWS, COLUMNS (of a block's tile: input
// and output channels); DEPTH (pixels of a stage); ROW_WARPS, COLUMN_WARPS (that share a tile); BLOCKS (that a
// multiprocessor is to hold, which bounds the registers); STAGES; X_COPY, DY_COPY (elements of a copy: rows of the
// tensors and their starts are multiples of them); STRIDED (whether only some pixels of x are counted); TERMS (of an
// element of float32: 1 or 2, see matrices.cuh).
#include "matrices.cuh"
#include "pixels.cuh"

using T = CUCONV_T;

constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;
constexpr bool kBias = CUCONV_BIAS;
constexpr int kRows = CUCONV_ROWS;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kDepth = CUCONV_DEPTH;
constexpr int kRowWarps = CUCONV_ROW_WARPS;
constexpr int kColumnWarps = CUCONV_COLUMN_WARPS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kXCopy = CUCONV_X_COPY;
constexpr int kDyCopy = CUCONV_DY_COPY;
constexpr bool kStrided = CUCONV_STRIDED;
constexpr int kTerms = CUCONV_TERMS;

constexpr int kThreads = kRowWarps * kColumnWarps * kWarp;
constexpr int kRowProducts = kRows / kRowWarps / kProductRows;
constexpr int kColumnProducts = kColumns / kColumnWarps / kProductColumns;

// Of a tile in shared memory: how many rows it has, how many elements they have, and how many lie from one to the next.
constexpr int kPad = pad_of<T>(kChannelsLast);
constexpr int kXRows = kChannelsLast ? kDepth : kRows;
constexpr int kXRow = kChannelsLast ? kRows : kDepth;
constexpr int kDyRows = kChannelsLast ? kDepth : kColumns;
constexpr int kDyRow = kChannelsLast ? kColumns : kDepth;
constexpr int kXTile = kXRows * (kXRow + kPad);
constexpr int kDyTile = kDyRows * (kDyRow + kPad);

static_assert(kRowProducts * kRowWarps * kProductRows == kRows);
static_assert(kColumnProducts * kColumnWarps * kProductColumns == kColumns && kColumnProducts % 2 == 0);
static_assert(kDepth % kProductDepth<T> == 0);
static_assert(kStages >= 2, "a stage is copied while another is read");

using XTile = Tile<T, kXRow + kPad, kChannelsLast>;
using DyTile = Tile<T, kDyRow + kPad, kChannelsLast>;

struct Parameters {
  int pixels;       // counted, of all images
  int slab_pixels;  // a multiple of DEPTH
  int C, K;
  int row_tiles;
  Pixels<kChannelsLast, kStrided> x;
  Pixels<kChannelsLast, false> dy;
};

// partials (slabs, C, K), with one row more where there is a dbias.
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
      copy_tile<kThreads, kDyRows, kDyRow, kDyRow + kPad, kDyCopy>(
          dy_tiles + stage * kDyTile, thread, [&](int row, int column) -> const T* {
            const int pixel = next + (kChannelsLast ? row : column);
            const int k = k0 + (kChannelsLast ? column : row);
            return pixel < end && k < g.K ? dy + g.dy.element(pixel) + k * g.dy.apart() : nullptr;
          });
      next += kDepth;
    }
    ptx::copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);

  const int first_row = warp % kRowWarps * (kRows / kRowWarps);
  const int first_column = warp / kRowWarps * (kColumns / kColumnWarps);
  const bool sums_bias = kBias && c0 == 0 && first_row == 0;
  float sum[kRowProducts][kColumnProducts][4] = {};
  float bias_sum[kColumnProducts][4] = {};
  const Left<kTerms> ones = row_of_ones<T, kTerms>(lane);

  int stage = 0;
  int free_stage = kStages - 1;
#pragma unroll 1
  for (int first = begin; first < end; first += kDepth) {
    ptx::copy_async_wait<kStages - 2>();
    __syncthreads();
    copy(free_stage);
    const XTile x_tile = {x_tiles + stage * kXTile};
    const DyTile dy_tile = {dy_tiles + stage * kDyTile};
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += kProductDepth<T>) {
      Left<kTerms> left[kRowProducts];
      Right<kTerms> right[kColumnProducts];
#pragma unroll
      for (int i = 0; i < kRowProducts; ++i) load_left(left[i], x_tile, first_row + i * kProductRows, depth, lane);
#pragma unroll
      for (int j = 0; j < kColumnProducts; j += 2)
        load_rights(&right[j], dy_tile, first_column + j * kProductColumns, depth, lane);
#pragma unroll
      for (int i = 0; i < kRowProducts; ++i)
#pragma unroll
        for (int j = 0; j < kColumnProducts; ++j) multiply_terms<T>(sum[i][j], left[i], right[j]);
      if (sums_bias) {
#pragma unroll
        for (int j = 0; j < kColumnProducts; ++j) multiply_terms<T>(bias_sum[j], ones, right[j]);
      }
    }
    free_stage = stage;
    if (++stage == kStages) stage = 0;
  }
  ptx::copy_async_wait<0>();

  // What is not finite is summed again, element by element: halves of an infinity are not.
  const auto checked = [&](float value, int c, int k) {
    if (kTerms == 1 || fabsf(value) <= 3.4e38f) return value;
    const T* const x_channel = x + c * g.x.apart();
    const T* const dy_channel = dy + k * g.dy.apart();
    float plain = 0;
    for (int pixel = begin; pixel < end; ++pixel) {
      const float factor = c < g.C ? float(widen(x_channel[g.x.element(pixel)])) : 1.0f;
      plain = fma(factor, float(widen(dy_channel[g.dy.element(pixel)])), plain);
    }
    return plain;
  };
  const int64 rows = g.C + kBias;
  float* const own = partials + blockIdx.y * rows * g.K;
#pragma unroll
  for (int j = 0; j < kColumnProducts; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int k = k0 + first_column + j * kProductColumns + lane % 4 * 2 + e;
      if (k >= g.K) continue;
#pragma unroll
      for (int i = 0; i < kRowProducts; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = c0 + first_row + i * kProductRows + half * 8 + lane / 4;
          if (c < g.C) own[static_cast<int64>(c) * g.K + k] = checked(sum[i][j][half * 2 + e], c, k);
        }
      if (sums_bias && lane / 4 == 0) own[static_cast<int64>(g.C) * g.K + k] = checked(bias_sum[j][e], g.C, k);
    }
}
