// Pointwise convolution by products of warp groups (sm_90a): forward, and the gradient of the input, which is the same
// with the weights turned around.
//
// Outputs (pixels, channels) = images (pixels, depth) weights (depth, channels), where depth counts the channels of what
// is read and pixels are those of all images, counted through. A warp group makes some channels of one tile of pixels
// after the other. Its images pass through a ring of stages of its own in shared memory, copied there some stages ahead,
// and from there through registers, where float32 is taken apart, every element once for all channels; weights are laid
// out, and taken apart, in shared memory, where products find them. Which row of a product a pixel is, and which column
// a channel, is chosen such that what lies side by side in memory is one thread's: results go there straight from
// registers.
//
// Where all weights of a block stay in shared memory its warp groups know nothing of each other; where they do not, the
// groups meet at every chunk of the depth, of which one is multiplied while the next is laid out and the one after it
// fetched.
//
// Compile-time values: those of groups.cuh, of which COLUMNS are the channels of a block's tile, PRODUCTS are of 64
// pixels, and RAGGED says whether rows are copied from boundary to boundary, for which a tile is of one image; and
// RIGHT_ALONG_COLUMNS whether the depth counts rows of w, as in dgrad, or its columns; CHANNELS_LAST; GROUPS (of
// warps); BLOCKS (that a multiprocessor is to hold, which bounds the registers); STAGES; RESIDENT (whether all weights
// of a block stay in shared memory); COPY (elements of a copy of images, that are not ragged: their rows and start are
// multiples of it); WEIGHT_COPY, STORE (likewise, of loads of weights and stores of results); ACTIVATION.
#include "activations.cuh"
#include "groups.cuh"

constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;
// What products find along the columns is the channels of the result.
constexpr bool kTurned = kRightAlongColumns;
constexpr int kGroups = CUCONV_GROUPS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kStages = CUCONV_STAGES;
constexpr bool kResident = CUCONV_RESIDENT;
constexpr int kCopy = CUCONV_COPY;
constexpr int kWeightCopy = CUCONV_WEIGHT_COPY;
constexpr int kStore = CUCONV_STORE;

constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kImageTile = kChannelsLast ? kRows * kDepth : kDepth * kPitch;

static_assert(kStages >= 2, "a stage is copied while another is read");
static_assert(!kRagged || (kSize == 2 && !kChannelsLast));
static_assert(kRagged || kCopy * kSize >= 4);

using Of = Pixels<kChannelsLast, false>;

struct Parameters {
  int pixels;    // of all images
  int channels;  // of the result
  int depth;     // channels of what is read
  int tiles;     // of pixels: kGroups of them are a block's at a time
  // Tiles of an image, where they are ragged.
  int image_tiles;
  uint32 image_tiles_magic;
  int image_tiles_shift;
  Of input;
  Of output;
};

// The channel of a column of the products, within a block's tile. Channels-last a thread, that has two neighbouring
// columns of every eight, has 16 bytes of neighbouring channels then; where weights are copied in rows their order stays.
constexpr bool kPermuted = kChannelsLast && !kRightInRows;
__device__ __forceinline__ int channel_of(int column) {
  if (!kPermuted) return column;
  constexpr int kSpan = 4 * kVector;
  const int eight = column % kSpan / 8;
  return column - column % kSpan + column % 8 / 2 * kVector + eight * 2 + column % 2;
}
__device__ __forceinline__ int column_of(int channel) {
  if (!kPermuted) return channel;
  constexpr int kSpan = 4 * kVector;
  const int within = channel % kVector;
  return channel - channel % kSpan + within / 2 * 8 + channel % kSpan / kVector * 2 + within % 2;
}

// A tile of pixels of a group.
struct PixelTile {
  int first;         // pixel, of all or, ragged, of its image
  int image;         // ragged
  int end;           // behind the last pixel, counted as the first

  __device__ __forceinline__ PixelTile(const Parameters& g, int tile) {
    if (kRagged) {
      image = divide_by(tile, g.image_tiles_magic, g.image_tiles_shift);
      first = (tile - image * g.image_tiles) * kRows;
      end = tile < g.tiles ? g.input.plane : 0;
    } else {
      image = 0;
      first = tile * kRows;
      end = g.pixels;
    }
  }

  // Its pixel at `offset`, in a tensor.
  __device__ __forceinline__ bool exists(int offset) const { return first + offset < end; }
  __device__ __forceinline__ int64 element(const Of& of, int offset) const {
    return kRagged ? static_cast<int64>(image) * of.channels * of.plane + first + offset : of.element(first + offset);
  }
};

// The pixel of a tile that is row `half` * 8 + lane / 4 of a warp's 16 rows of a product.
__device__ __forceinline__ int offset_of(int product, int half, int warp, int lane) {
  if (kChannelsLast) return product * 64 + warp * 16 + half * 8 + lane / 4;
  return strip_offset(warp, lane) + product * 2 + half;
}

// Four lanes that each have two neighbours of every eight columns, of 32, exchange them: then each has all of one eight.
__device__ __forceinline__ void turn_quad(float (&value)[kVector], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      if ((i & bit) != 0) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& low = value[i * 2 + e];
        float& high = value[(i | bit) * 2 + e];
        const float received = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
        (upper ? low : high) = received;
      }
    }
  }
}

// Brings a tile's sums, with their activation, to the result.
__device__ __forceinline__ void deliver(const Sums& sum, T* result, const PixelTile& at, const Parameters& g,
                                        int first_channel, int warp, int lane) {
  if constexpr (kChannelsLast) {
    constexpr int kSpan = 4 * kVector;
#pragma unroll
    for (int product = 0; product < kProducts; ++product)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int offset = offset_of(product, half, warp, lane);
        const bool exists = at.exists(offset);
        T* const to = result + (exists ? at.element(g.output, offset) : 0);
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int span = 0; span < kPartColumns / kSpan; ++span) {
            const int first = first_channel + part * kPartColumns + span * kSpan + lane % 4 * kVector;
            float value[kVector];
#pragma unroll
            for (int e = 0; e < kVector; ++e)
              value[e] = activation::CUCONV_ACTIVATION(
                  sum[product][part][(span * kVector + e / 2 * 2) * 2 + half * 2 + e % 2]);
            if constexpr (!kPermuted) turn_quad(value, lane);
            if (exists) {
#pragma unroll
              for (int piece = 0; piece < kVector; piece += kStore)
                if (first + piece < g.channels) store_narrowed<kStore>(to + first + piece, value + piece);
            }
          }
      }
  } else {
    const int first_offset = offset_of(0, 0, warp, lane);
#pragma unroll
    for (int piece = 0; piece < kStrip; piece += kStore) {
      if (!at.exists(first_offset + piece)) break;
      T* to = ptx::as_it_is(result + at.element(g.output, first_offset + piece) +
                            static_cast<int64>(first_channel + lane % 4 * 2) * g.output.plane);
      int left = g.channels - first_channel - lane % 4 * 2;
#pragma unroll
      for (int eight = 0; eight < kColumns / 8; ++eight) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float value[kStore];
#pragma unroll
          for (int e = 0; e < kStore; ++e) {
            const int pixel = piece + e;
            value[e] = activation::CUCONV_ACTIVATION(
                sum[pixel / 2][eight * 8 / kPartColumns][eight * 8 % kPartColumns / 2 + pixel % 2 * 2 + i]);
          }
          if (i < left) store_narrowed<kStore>(to + (i > 0 ? g.output.plane : 0), value);
        }
        to = ptx::as_it_is(to + 8 * static_cast<int64>(g.output.plane));
        left -= 8;
      }
    }
  }
}

// All of a lane's results, element by element: where one is not finite terms of float32 may not be its terms.
__device__ __noinline__ void deliver_plainly(const T* image, const T* w, const T* bias, T* result, const PixelTile& at,
                                             const Parameters& g, int first_channel, int warp, int lane) {
  const int64 w_row = kTurned ? g.channels : g.depth;
#pragma unroll 1
  for (int i = 0; i < kStrip; ++i) {
    const int offset = offset_of(i / 2, i % 2, warp, lane);
    if (!at.exists(offset)) continue;
    const T* const pixel = image + at.element(g.input, offset);
    T* const to = result + at.element(g.output, offset);
#pragma unroll 1
    for (int j = 0; j < kColumns / 4; ++j) {
      const int channel = first_channel + channel_of(j / 2 * 8 + lane % 4 * 2 + j % 2);
      if (channel >= g.channels) continue;
      float sum = bias != nullptr ? float(widen(bias[channel])) : 0.0f;
#pragma unroll 1
      for (int d = 0; d < g.depth; ++d)
        sum = fma(widen(pixel[d * g.input.apart()]), widen(w[kTurned ? d * w_row + channel : channel * w_row + d]), sum);
      to[channel * g.output.apart()] = narrow<T>(activation::CUCONV_ACTIVATION(sum));
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    pointwise_groups(const T* __restrict__ image, const T* __restrict__ w, const T* __restrict__ bias,
                     T* __restrict__ result, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(unaligned);
  unsigned char* const shared = aligned_for_right(unaligned);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / kGroupThreads;
  const int group_thread = thread % kGroupThreads;
  const int lane = thread % kWarp;
  const int warp = group_thread / kWarp;
  const int first_channel = static_cast<int>(blockIdx.y) * kColumns;
  const int first_tile = static_cast<int>(blockIdx.x) * kGroups + group;
  const int tiles_apart = static_cast<int>(gridDim.x) * kGroups;
  const int chunks = (g.depth + kDepth - 1) / kDepth;

  T* const weights = reinterpret_cast<T*>(shared);
  T* const all_images = weights + (kResident ? chunks : kRightAsItIs ? kStages : 2) * kTerms * kRightTile;
  T* const images = all_images + group * kStages * kImageTile;
  float* const biases = reinterpret_cast<float*>(all_images + kGroups * kStages * kImageTile);

  // What is copied next: a thread has the same place in every row of a tile that is its own.
  int tile_to_copy = first_tile;
  int chunk_to_copy = 0;
  bool found = false;
  const T* source = image;
  const auto copy_weights = [&](T* to, int first_depth) {
    copy_right<kWeightCopy, kThreads>(to, w, thread, [&](int column, int along) -> const T* {
      const int channel = first_channel + channel_of(column);
      const int depth = first_depth + along;
      if (channel >= g.channels || depth >= g.depth) return nullptr;
      return kTurned ? w + static_cast<int64>(depth) * g.channels + channel
                     : w + static_cast<int64>(channel) * g.depth + depth;
    });
  };
  const auto copy = [&](int stage) {
    if constexpr (!kResident && kRightAsItIs) {
      if (tile_to_copy - group < g.tiles) copy_weights(weights + stage * kRightTile, chunk_to_copy * kDepth);
    }
    if (kResident ? tile_to_copy < g.tiles : tile_to_copy - group < g.tiles) {
      T* const to = images + stage * kImageTile;
      const PixelTile tile(g, tile_to_copy);
      const int first_depth = chunk_to_copy * kDepth;
      if constexpr (kRagged) {
        const int64 start = tile.element(g.input, 0) + static_cast<int64>(first_depth) * g.input.plane;
        copy_ragged<kGroupThreads, kDepth, kRows, kPitch>(to, image, start, g.input.plane, g.depth - first_depth,
                                                          tile.end - tile.first,
                                                          static_cast<int64>(g.pixels) * g.depth, group_thread);
      } else {
        constexpr int kPieces = (kChannelsLast ? kDepth : kRows) / kCopy;
        constexpr int kTileRows = kChannelsLast ? kRows : kDepth;
        constexpr int kRowsApart = kGroupThreads / kPieces;
        static_assert(kRowsApart * kPieces == kGroupThreads && kTileRows % kRowsApart == 0);
        const int row = group_thread / kPieces;
        const int along = group_thread % kPieces * kCopy;
        if (kChannelsLast) {
          const int depth = first_depth + along;
          source = image + static_cast<int64>(tile.first + row) * g.depth + depth;
#pragma unroll
          for (int i = 0; i < kTileRows / kRowsApart; ++i) {
            const int pixel = i * kRowsApart + row;
            const bool exists = depth < g.depth && tile.exists(pixel);
            T* const place = to + swizzled(pixel, along / kVector) + along % kVector;
            const T* const from = source + static_cast<int64>(i * kRowsApart) * g.depth;
            ptx::copy_async_or_zeros<kCopy * kSize>(place, exists ? from : image, exists);
          }
        } else {
          const bool pixel_exists = tile.exists(along);
          if (!found) {
            source = image;
            if (pixel_exists) source += tile.element(g.input, along) + static_cast<int64>(row) * g.input.plane;
            found = true;
          }
          const int64 apart = static_cast<int64>(kRowsApart) * g.input.plane;
#pragma unroll
          for (int i = 0; i < kTileRows / kRowsApart; ++i) {
            const int depth = i * kRowsApart + row;
            const bool exists = pixel_exists && first_depth + depth < g.depth;
            ptx::copy_async_or_zeros<kCopy * kSize>(to + depth * kPitch + along, exists ? source : image, exists);
            if (pixel_exists) source += apart;
          }
        }
      }
      if (++chunk_to_copy == chunks) {
        chunk_to_copy = 0;
        tile_to_copy += tiles_apart;
        found = false;
      }
    }
    ptx::copy_async_commit();
  };
  if constexpr (kResident && kRightAsItIs)
    for (int chunk = 0; chunk < chunks; ++chunk) copy_weights(weights + chunk * kRightTile, chunk * kDepth);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);

  using Pieces = RightPieces<kWeightCopy, kThreads>;
  Pieces pieces;
  const auto load_weights = [&](Pieces& pieces, int chunk) {
    const int first_depth = chunk * kDepth + Pieces::depth_of(thread);
    pieces.load(thread, [&](int column, int e) -> const T* {
      const int channel = first_channel + column;
      const int depth = first_depth + e;
      if (channel >= g.channels || depth >= g.depth) return nullptr;
      return kTurned ? w + static_cast<int64>(depth) * g.channels + channel
                     : w + static_cast<int64>(channel) * g.depth + depth;
    });
  };
  int chunk_of_pieces = 0;
  const auto next_weights = [&] {
    chunk_of_pieces = chunk_of_pieces + 1 < chunks ? chunk_of_pieces + 1 : 0;
    load_weights(pieces, chunk_of_pieces);
  };
  if constexpr (!kRightAsItIs) {
    load_weights(pieces, 0);
    for (int chunk = 0; chunk < (kResident ? chunks : 1); ++chunk) {
      Pieces next_pieces;
      if (kResident) load_weights(next_pieces, chunk + 1);
      pieces.put(weights + chunk * kTerms * kRightTile, thread, column_of);
      if (kResident) pieces = next_pieces;
    }
    if (!kResident) next_weights();
  }
  for (int column = thread; column < kColumns; column += kThreads) {
    const int channel = first_channel + channel_of(column);
    biases[column] = bias != nullptr && channel < g.channels ? float(widen(bias[channel])) : 0.0f;
  }
  if constexpr (kResident && kRightAsItIs) ptx::copy_async_wait<kStages - 2>();
  ptx::fence_shared_for_bulk();
  __syncthreads();

  int stage = 0;
  int free_stage = kStages - 1;
  int buffer = 0;  // of weights that do not stay
#pragma unroll 1
  for (int tile = first_tile; tile - group < g.tiles; tile += tiles_apart) {
    if (kResident && tile >= g.tiles) break;
    const PixelTile at(g, tile);
    Shifts shift = {0, 0};
    if constexpr (kRagged) {
      // Eight rows of any plane start at a boundary again.
#pragma unroll
      for (int i = 0; i < 2; ++i)
        shift[i] = static_cast<int>((at.element(g.input, 0) + (lane % 4 * 2 + i) * g.input.plane) % kVector);
    }
    Sums sum;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kPartColumns / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float value = biases[part * kPartColumns + i * 8 + lane % 4 * 2 + e];
#pragma unroll
          for (int product = 0; product < kProducts; ++product)
            sum[product][part][i * 4 + e] = sum[product][part][i * 4 + 2 + e] = value;
        }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ptx::copy_async_wait<kStages - 2>();
      if (!kResident && kRightAsItIs) ptx::fence_shared_for_bulk();
      if (kResident) {
        ptx::group_sync(1 + group);
      } else {
        __syncthreads();
      }
      const T* const own = weights + (kResident ? chunk : kRightAsItIs ? stage : buffer) * kTerms * kRightTile;
      const auto load_left = [&](Left& left, int step) {
        if constexpr (kChannelsLast) {
          load_left_of_rows(left, images + stage * kImageTile, step, warp, lane);
        } else {
          load_left_of_strips(left, images + stage * kImageTile, step, shift, warp, lane);
        }
      };
      multiply_stage(sum, own, load_left, [&] {
        copy(free_stage);
        if constexpr (!kResident && !kRightAsItIs) {
          buffer = 1 - buffer;
          pieces.put(weights + buffer * kTerms * kRightTile, thread, column_of);
          ptx::fence_shared_for_bulk();
          next_weights();
        }
      });
      free_stage = stage;
      if (++stage == kStages) stage = 0;
    }
    if (all_finite(sum)) {
      deliver(sum, result, at, g, first_channel, warp, lane);
    } else {
      deliver_plainly(image, w, bias, result, at, g, first_channel, warp, lane);
    }
  }
  ptx::copy_async_wait<0>();
}
