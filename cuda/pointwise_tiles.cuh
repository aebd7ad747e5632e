// Tiles of a pointwise convolution on tensor cores: outputs (channels, pixels) = weights (channels, depth) images
// (depth, pixels), where depth counts the channels of what is read; channels-last, where memory runs along the
// channels, the other way around: outputs (pixels, channels) = images (pixels, depth) weights (depth, channels). Pixels
// of all images are counted through.
//
// Compile-time values: T; CHANNELS_LAST; TURNED (whether the depth counts rows of w, as in dgrad, or its columns);
// CHANNELS, PIXELS (of a block's tile); DEPTH (of a stage); CHANNEL_WARPS, PIXEL_WARPS (that share a tile); BLOCKS
// (that a multiprocessor is to hold, which bounds the registers); STAGES; RESIDENT (whether all weights of a block stay
// in shared memory); WEIGHT_COPY (elements of a copy of weights: their rows and start are multiples of it); STORE (of a
// store of results, likewise); STRIDED_OUTPUT (whether only some pixels of the result are counted); TERMS (of an
// element of float32: 1 or 2, see matrices.cuh); ACTIVATION.
#pragma once
#include "activations.cuh"
#include "matrices.cuh"
#include "pixels.cuh"

using T = CUCONV_T;

constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;
constexpr bool kTurned = CUCONV_TURNED;
constexpr int kChannels = CUCONV_CHANNELS;
constexpr int kPixels = CUCONV_PIXELS;
constexpr int kDepth = CUCONV_DEPTH;
constexpr int kChannelWarps = CUCONV_CHANNEL_WARPS;
constexpr int kPixelWarps = CUCONV_PIXEL_WARPS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kStages = CUCONV_STAGES;
constexpr bool kResident = CUCONV_RESIDENT;
constexpr int kWeightCopy = CUCONV_WEIGHT_COPY;
constexpr int kStore = CUCONV_STORE;
constexpr bool kStridedOutput = CUCONV_STRIDED_OUTPUT;
constexpr int kTerms = CUCONV_TERMS;

constexpr int kWarps = kChannelWarps * kPixelWarps;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = kChannelsLast ? kPixels : kChannels;
constexpr int kColumns = kChannelsLast ? kChannels : kPixels;
constexpr int kRowWarps = kChannelsLast ? kPixelWarps : kChannelWarps;
constexpr int kColumnWarps = kChannelsLast ? kChannelWarps : kPixelWarps;
constexpr int kRowProducts = kRows / kRowWarps / kProductRows;
constexpr int kColumnProducts = kColumns / kColumnWarps / kProductColumns;

// Of a tile in shared memory: how many rows it has, how many elements they have, and how many lie from one to the next.
constexpr int kWeightRows = kTurned ? kDepth : kChannels;
constexpr int kWeightRow = kTurned ? kChannels : kDepth;
constexpr int kWeightPitch = kWeightRow + pad_of<T>(kTurned);
constexpr int kImageRows = kChannelsLast ? kPixels : kDepth;
constexpr int kImageRow = kChannelsLast ? kDepth : kPixels;
constexpr int kImagePitch = kImageRow + pad_of<T>(!kChannelsLast);
constexpr int kResultPitch = kColumns + 8;
constexpr int kWeightTile = kWeightRows * kWeightPitch;
constexpr int kImageTile = kImageRows * kImagePitch;

static_assert(sizeof(T) == 2 || sizeof(T) == 4);
static_assert(kRowProducts * kRowWarps * kProductRows == kRows);
static_assert(kColumnProducts * kColumnWarps * kProductColumns == kColumns && kColumnProducts % 2 == 0);
static_assert(kDepth % kProductDepth<T> == 0);
static_assert(kStages >= 2, "a stage is copied while another is read");

using WeightTile = Tile<T, kWeightPitch, kTurned>;
using ImageTile = Tile<T, kImagePitch, !kChannelsLast>;
using Output = Pixels<kChannelsLast, kStridedOutput>;

using Sums = float[kRowProducts][kColumnProducts][4];

// Copies a chunk of the depth of the weights of a block's channels, w (channels, depth) or, turned, (depth, channels).
__device__ __forceinline__ void copy_weights(T* tile, const T* w, int first_channel, int channels, int first_depth,
                                             int depths, int thread) {
  copy_tile<kThreads, kWeightRows, kWeightRow, kWeightPitch, kWeightCopy>(
      tile, thread, [&](int row, int column) -> const T* {
        const int channel = first_channel + (kTurned ? column : row);
        const int depth = first_depth + (kTurned ? row : column);
        if (channel >= channels || depth >= depths) return nullptr;
        return w + static_cast<int64>(kTurned ? depth : channel) * (kTurned ? channels : depths) +
               (kTurned ? channel : depth);
      });
}

// Where a warp's part of a tile begins.
__device__ __forceinline__ int first_row_of(int warp) { return warp % kRowWarps * (kRows / kRowWarps); }
__device__ __forceinline__ int first_column_of(int warp) { return warp / kRowWarps * (kColumns / kColumnWarps); }

// Adds the products of a stage's tiles to a warp's sums.
__device__ __forceinline__ void multiply_stage(Sums& sum, const T* weights, const T* images, int warp, int lane) {
  const WeightTile weight_tile = {weights};
  const ImageTile image_tile = {images};
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += kProductDepth<T>) {
    Left<kTerms> left[kRowProducts];
    Right<kTerms> right[kColumnProducts];
#pragma unroll
    for (int i = 0; i < kRowProducts; ++i) {
      const int row = first_row_of(warp) + i * kProductRows;
      if constexpr (kChannelsLast) {
        load_left(left[i], image_tile, row, depth, lane);
      } else {
        load_left(left[i], weight_tile, row, depth, lane);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumnProducts; i += 2) {
      const int column = first_column_of(warp) + i * kProductColumns;
      if constexpr (kChannelsLast) {
        load_rights(&right[i], weight_tile, column, depth, lane);
      } else {
        load_rights(&right[i], image_tile, column, depth, lane);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowProducts; ++i)
#pragma unroll
      for (int j = 0; j < kColumnProducts; ++j) multiply_terms<T>(sum[i][j], left[i], right[j]);
  }
}

// Brings a tile's sums, with their bias and activation, to the result, through shared memory, where neighbours come
// together. again(channel, pixel) is the sum made plainly, for what is not finite.
template <class Again>
__device__ __forceinline__ void deliver_tile(const Sums& sum, const T* bias, T* results, T* result,
                                             const Output& output, int first_channel, int channels, int first_pixel,
                                             int pixels, int warp, int lane, Again again) {
  const int thread = warp * kWarp + lane;
  // Two neighbours of a row are a lane's.
#pragma unroll
  for (int i = 0; i < kRowProducts; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row_of(warp) + i * kProductRows + half * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < kColumnProducts; ++j) {
        const int column = first_column_of(warp) + j * kProductColumns + lane % 4 * 2;
        float value[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          value[e] = sum[i][j][half * 2 + e];
          const int channel = first_channel + (kChannelsLast ? column + e : row);
          const int pixel = first_pixel + (kChannelsLast ? row : column + e);
          if (kTerms == 2 && !(fabsf(value[e]) <= 3.4e38f) && channel < channels && pixel < pixels)
            value[e] = again(channel, pixel);
          if (bias != nullptr && channel < channels) value[e] += widen(bias[channel]);
          value[e] = activation::CUCONV_ACTIVATION(value[e]);
        }
        store_narrowed<2>(results + row * kResultPitch + column, value);
      }
    }
  __syncthreads();
  constexpr int kPieces = kColumns / kStore;
#pragma unroll 4
  for (int item = thread; item < kRows * kPieces; item += kThreads) {
    const int row = item / kPieces;
    const int column = (item - row * kPieces) * kStore;
    const int channel = first_channel + (kChannelsLast ? column : row);
    const int pixel = first_pixel + (kChannelsLast ? row : column);
    if (channel < channels && pixel < pixels) {
      T* const to = result + output.element(pixel) + channel * output.apart();
      *reinterpret_cast<Vector<T, kStore>*>(to) =
          *reinterpret_cast<const Vector<T, kStore>*>(results + row * kResultPitch + column);
    }
  }
}
