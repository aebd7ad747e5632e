// Pointwise convolution on tensor cores (sm_80 and newer): forward, and the gradient of the input, which is the same
// with the weights turned around.
//
// A block makes some channels of one tile of pixels after the other. What it reads passes through a ring of stages in
// shared memory, copied there some stages ahead, across the ends of tiles: of the images always, of the weights only
// where they do not stay in shared memory from the beginning.
//
// Compile-time values: those of pointwise_tiles.cuh; COPY (elements of a copy of images: their rows and start are
// multiples of it); STRIDED_INPUT (whether only some pixels of what is read are counted).
#include "pointwise_tiles.cuh"

constexpr int kCopy = CUCONV_COPY;
constexpr bool kStridedInput = CUCONV_STRIDED_INPUT;

using Input = Pixels<kChannelsLast, kStridedInput>;

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

  T* const weights = reinterpret_cast<T*>(shared);
  T* const images = weights + (kResident ? chunks : kStages) * kWeightTile;
  T* const results = images + kStages * kImageTile;

  const auto weights_to = [&](int stage, int chunk) {
    copy_weights(weights + stage * kWeightTile, w, first_channel, g.channels, chunk * kDepth, g.depth, thread);
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
      if (!kResident) weights_to(stage, chunk_to_copy);
      if (++chunk_to_copy == chunks) {
        chunk_to_copy = 0;
        tile_to_copy += tiles_apart;
      }
    }
    ptx::copy_async_commit();
  };

  if (kResident)
    for (int chunk = 0; chunk < chunks; ++chunk) weights_to(chunk, chunk);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);

  int stage = 0;
  int free_stage = kStages - 1;
#pragma unroll 1
  for (int tile = first_tile; tile < g.tiles; tile += tiles_apart) {
    Sums sum = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ptx::copy_async_wait<kStages - 2>();
      __syncthreads();
      copy(free_stage);
      multiply_stage(sum, weights + (kResident ? chunk : stage) * kWeightTile, images + stage * kImageTile, warp, lane);
      free_stage = stage;
      if (++stage == kStages) stage = 0;
    }

    deliver_tile(sum, bias, results, result, g.output, first_channel, g.channels, tile * kPixels, g.pixels, warp, lane,
                 [&](int channel, int pixel) {
                   const int64 w_row = kTurned ? g.channels : g.depth;
                   return sum_plainly(image + g.input.element(pixel), g.input.apart(),
                                      w + channel * (kTurned ? 1 : w_row), kTurned ? w_row : 1, g.depth);
                 });
  }
  ptx::copy_async_wait<0>();
}
