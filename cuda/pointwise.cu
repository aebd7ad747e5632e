// Pointwise convolution on tensor cores (sm_80 and newer): forward, and the gradient of the input, which is the same
// with the weights turned around.
//
// A product of matrices: outputs (channels, pixels) = weights (channels, depth) images (depth, pixels), where depth
// counts the channels of what is read; channels-last, where memory runs along the channels, the other way around:
// outputs (pixels, channels) = images (pixels, depth) weights (depth, channels). Pixels of all images are counted
// through.
//
// A block makes some channels of one tile of pixels after the other. What it reads passes through a ring of stages in
// shared memory, copied there some stages ahead, across the ends of tiles: of the images always, of the weights only
// where they do not stay in shared memory from the beginning. Results leave through shared memory too, where neighbours
// come together.
//
// Compile-time values: T; CHANNELS_LAST; TURNED (whether the depth counts rows of w, as in dgrad, or its columns);
// CHANNELS, PIXELS (of a block's tile); DEPTH (of a stage); CHANNEL_WARPS, PIXEL_WARPS (that share a tile); BLOCKS
// (that a multiprocessor is to hold, which bounds the registers); STAGES; RESIDENT (whether all weights of a block stay
// in shared memory); COPY, WEIGHT_COPY (elements of a copy: rows of the tensors and their starts are multiples of
// them); STORE (of a store, likewise); STRIDED_INPUT, STRIDED_OUTPUT (whether only some pixels of these are counted);
// TERMS (of an element of float32: 1 or 2, see matrices.cuh); ACTIVATION.
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
constexpr int kCopy = CUCONV_COPY;
constexpr int kWeightCopy = CUCONV_WEIGHT_COPY;
constexpr int kStore = CUCONV_STORE;
constexpr bool kStridedInput = CUCONV_STRIDED_INPUT;
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
using Input = Pixels<kChannelsLast, kStridedInput>;
using Output = Pixels<kChannelsLast, kStridedOutput>;

struct Parameters {
  int pixels;    // counted, of all images
  int channels;  // of the result
  int depth;     // channels of what is read
  int tiles;     // of pixels
  Input input;
  Output output;
};

// One result, element by element, for what is not finite.
__device__ __noinline__ float sum_plainly(const T* image, int64 image_apart, const T* w, int64 w_apart, int depth) {
  float sum = 0;
  for (int d = 0; d < depth; ++d) sum = fma(widen(image[d * image_apart]), widen(w[d * w_apart]), sum);
  return sum;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    pointwise(const T* __restrict__ image, const T* __restrict__ w, const T* __restrict__ bias, T* __restrict__ result,
              const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int first_channel = static_cast<int>(blockIdx.y) * kChannels;
  const int first_tile = static_cast<int>(blockIdx.x);
  const int tiles_apart = static_cast<int>(gridDim.x);
  const int chunks = (g.depth + kDepth - 1) / kDepth;
  const int w_row = kTurned ? g.channels : g.depth;

  T* const weights = reinterpret_cast<T*>(shared);
  T* const images = weights + (kResident ? chunks : kStages) * kWeightTile;
  T* const results = images + kStages * kImageTile;

  const auto copy_weights = [&](int stage, int chunk) {
    copy_tile<kThreads, kWeightRows, kWeightRow, kWeightPitch, kWeightCopy>(
        weights + stage * kWeightTile, thread, [&](int row, int column) -> const T* {
          const int channel = first_channel + (kTurned ? column : row);
          const int depth = chunk * kDepth + (kTurned ? row : column);
          if (channel >= g.channels || depth >= g.depth) return nullptr;
          return w + static_cast<int64>(kTurned ? depth : channel) * w_row + (kTurned ? channel : depth);
        });
  };
  int tile_to_copy = first_tile;
  int chunk_to_copy = 0;
  const auto copy = [&](int stage) {
    if (tile_to_copy < g.tiles) {
      copy_tile<kThreads, kImageRows, kImageRow, kImagePitch, kCopy>(
          images + stage * kImageTile, thread, [&](int row, int column) -> const T* {
            const int pixel = tile_to_copy * kPixels + (kChannelsLast ? row : column);
            const int depth = chunk_to_copy * kDepth + (kChannelsLast ? column : row);
            if (pixel >= g.pixels || depth >= g.depth) return nullptr;
            return image + g.input.element(pixel) + depth * g.input.apart();
          });
      if (!kResident) copy_weights(stage, chunk_to_copy);
      if (++chunk_to_copy == chunks) {
        chunk_to_copy = 0;
        tile_to_copy += tiles_apart;
      }
    }
    ptx::copy_async_commit();
  };

  if (kResident)
    for (int chunk = 0; chunk < chunks; ++chunk) copy_weights(chunk, chunk);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);

  const int first_row = warp % kRowWarps * (kRows / kRowWarps);
  const int first_column = warp / kRowWarps * (kColumns / kColumnWarps);
  int stage = 0;
  int free_stage = kStages - 1;
#pragma unroll 1
  for (int tile = first_tile; tile < g.tiles; tile += tiles_apart) {
    float sum[kRowProducts][kColumnProducts][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ptx::copy_async_wait<kStages - 2>();
      __syncthreads();
      copy(free_stage);
      const WeightTile weight_tile = {weights + (kResident ? chunk : stage) * kWeightTile};
      const ImageTile image_tile = {images + stage * kImageTile};
#pragma unroll
      for (int depth = 0; depth < kDepth; depth += kProductDepth<T>) {
        Left<kTerms> left[kRowProducts];
        Right<kTerms> right[kColumnProducts];
#pragma unroll
        for (int i = 0; i < kRowProducts; ++i) {
          const int row = first_row + i * kProductRows;
          if constexpr (kChannelsLast) {
            load_left(left[i], image_tile, row, depth, lane);
          } else {
            load_left(left[i], weight_tile, row, depth, lane);
          }
        }
#pragma unroll
        for (int i = 0; i < kColumnProducts; i += 2) {
          const int column = first_column + i * kProductColumns;
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
      free_stage = stage;
      if (++stage == kStages) stage = 0;
    }

    // Two neighbours of a row are a lane's.
#pragma unroll
    for (int i = 0; i < kRowProducts; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + i * kProductRows + half * 8 + lane / 4;
#pragma unroll
        for (int j = 0; j < kColumnProducts; ++j) {
          const int column = first_column + j * kProductColumns + lane % 4 * 2;
          float value[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            value[e] = sum[i][j][half * 2 + e];
            const int channel = first_channel + (kChannelsLast ? column + e : row);
            const int pixel = tile * kPixels + (kChannelsLast ? row : column + e);
            if (kTerms == 2 && !(fabsf(value[e]) <= 3.4e38f) && channel < g.channels && pixel < g.pixels)
              value[e] = sum_plainly(image + g.input.element(pixel), g.input.apart(),
                                     w + static_cast<int64>(channel) * (kTurned ? 1 : w_row), kTurned ? w_row : 1,
                                     g.depth);
            if (bias != nullptr && channel < g.channels) value[e] += widen(bias[channel]);
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
      const int pixel = tile * kPixels + (kChannelsLast ? row : column);
      if (channel < g.channels && pixel < g.pixels) {
        T* const to = result + g.output.element(pixel) + channel * g.output.apart();
        *reinterpret_cast<Vector<T, kStore>*>(to) =
            *reinterpret_cast<const Vector<T, kStore>*>(results + row * kResultPitch + column);
      }
    }
  }
  ptx::copy_async_wait<0>();
}
