// Tiles of the gradient of pointwise weights on tensor cores: dw (c, k) = x (c, pixels) dy (pixels, k), with the pixels
// of all images counted through, some of them in a slab. dbias is one more row: the product of ones and dy.
//
// Compile-time values: T; CHANNELS_LAST; BIAS (whether dbias is summed too); ROWS, COLUMNS (of a block's tile: input
// and output channels); DEPTH (pixels of a stage); ROW_WARPS, COLUMN_WARPS (that share a tile); BLOCKS (that a
// multiprocessor is to hold, which bounds the registers); STAGES; DY_COPY (elements of a copy: rows of dy and its start
// are multiples of it); TERMS (of an element of float32: 1 or 2, see matrices.cuh).
#pragma once
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
constexpr int kDyCopy = CUCONV_DY_COPY;
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

using Dy = Pixels<kChannelsLast, false>;

// Sums of a warp: its part of a tile of dw and, in blocks of the first row of tiles, of dbias.
struct WgradSums {
  float of_weights[kRowProducts][kColumnProducts][4];
  float of_bias[kColumnProducts][4];
};

// Where a warp's part of a tile begins.
__device__ __forceinline__ int first_row_of(int warp) { return warp % kRowWarps * (kRows / kRowWarps); }
__device__ __forceinline__ int first_column_of(int warp) { return warp / kRowWarps * (kColumns / kColumnWarps); }

// Begins to copy a stage of dy: DEPTH pixels from `first` on, of which those from `end` on are zeros.
__device__ __forceinline__ void copy_dy(T* tile, const T* dy, const Dy& of, int k0, int K, int first, int end,
                                        int thread) {
  copy_tile<kThreads, kDyRows, kDyRow, kDyRow + kPad, kDyCopy>(tile, thread, [&](int row, int column) -> const T* {
    const int pixel = first + (kChannelsLast ? row : column);
    const int k = k0 + (kChannelsLast ? column : row);
    return pixel < end && k < K ? dy + of.element(pixel) + k * of.apart() : nullptr;
  });
}

// Adds the products of a stage's tiles.
__device__ __forceinline__ void multiply_stage(WgradSums& sum, const T* x, const T* dy, bool sums_bias, int warp,
                                               int lane) {
  const XTile x_tile = {x};
  const DyTile dy_tile = {dy};
  const Left<kTerms> ones = row_of_ones<T, kTerms>(lane);
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += kProductDepth<T>) {
    Left<kTerms> left[kRowProducts];
    Right<kTerms> right[kColumnProducts];
#pragma unroll
    for (int i = 0; i < kRowProducts; ++i)
      load_left(left[i], x_tile, first_row_of(warp) + i * kProductRows, depth, lane);
#pragma unroll
    for (int j = 0; j < kColumnProducts; j += 2)
      load_rights(&right[j], dy_tile, first_column_of(warp) + j * kProductColumns, depth, lane);
#pragma unroll
    for (int i = 0; i < kRowProducts; ++i)
#pragma unroll
      for (int j = 0; j < kColumnProducts; ++j) multiply_terms<T>(sum.of_weights[i][j], left[i], right[j]);
    if (sums_bias) {
#pragma unroll
      for (int j = 0; j < kColumnProducts; ++j) multiply_terms<T>(sum.of_bias[j], ones, right[j]);
    }
  }
}

// Writes the sums of a slab: partials (C, K), with one row more where there is a dbias. again(c, k), with c = C for
// dbias, is the sum made plainly, for what is not finite: halves of an infinity are not.
template <class Again>
__device__ __forceinline__ void deliver_partials(const WgradSums& sum, float* partials, int c0, int C, int k0, int K,
                                                 bool sums_bias, int warp, int lane, Again again) {
  const auto checked = [&](float value, int c, int k) {
    return kTerms == 1 || fabsf(value) <= 3.4e38f ? value : again(c, k);
  };
#pragma unroll
  for (int j = 0; j < kColumnProducts; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int k = k0 + first_column_of(warp) + j * kProductColumns + lane % 4 * 2 + e;
      if (k >= K) continue;
#pragma unroll
      for (int i = 0; i < kRowProducts; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = c0 + first_row_of(warp) + i * kProductRows + half * 8 + lane / 4;
          if (c < C) partials[static_cast<int64>(c) * K + k] = checked(sum.of_weights[i][j][half * 2 + e], c, k);
        }
      if (sums_bias && lane / 4 == 0) partials[static_cast<int64>(C) * K + k] = checked(sum.of_bias[j][e], C, k);
    }
}
