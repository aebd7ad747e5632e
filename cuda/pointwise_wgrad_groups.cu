// Pointwise convolution, gradients of the weights and the bias, by products of warp groups (sm_90a).
//
// dw (k, c) = dy (k, pixels) x (pixels, c), with the pixels of all images counted through or, ragged, with as many more
// of each that stages are of one image. A block makes a tile of dw
// from a slab of the pixels, every warp group some rows of it. Stages of dy, the left factor, pass through a ring in
// shared memory, copied there some stages ahead. So does x, the right one, of 16 bits; of float32 it passes through
// registers on its way there, and is taken apart and turned around one stage ahead. dbias sums the left factor's
// elements as they pass.
//
// Compile-time values: those of groups.cuh, of which COLUMNS are input channels, and RAGGED says whether rows are
// copied from boundary to boundary; CHANNELS_LAST; BIAS (whether dbias is summed too); GROUPS (of warps); BLOCKS (that a
// multiprocessor is to hold, which bounds the registers); STAGES; DY_COPY, X_COPY (elements of a copy, where they are
// not ragged: their rows and start are multiples of it).
#include "groups.cuh"

constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;
constexpr bool kBias = CUCONV_BIAS;
constexpr int kGroups = CUCONV_GROUPS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kDyCopy = CUCONV_DY_COPY;
constexpr int kXCopy = CUCONV_X_COPY;

constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kRaggedPitch = kDepth + kVector;
constexpr int kDyTile = kChannelsLast ? kDepth * kPitch : kRows * (kRagged ? kRaggedPitch : kDepth);
constexpr int kRaggedXTile = kRagged ? kColumns * kRaggedPitch : 0;
// Whether x is copied to where products find it.
constexpr bool kCopiedX = kRightAsItIs && !kRagged;
constexpr int kXTiles = kCopiedX ? kStages : 2;
// Stages that have landed when one is multiplied: ragged, x of the next one is turned into columns then.
constexpr int kLanded = kRagged ? 2 : 1;

static_assert(kStages > kLanded, "a stage is copied while another is read");
static_assert(kRagged || kDyCopy * kSize >= 4);
static_assert(!kRagged || (kSize == 2 && !kChannelsLast));

using Of = Pixels<kChannelsLast, false>;

struct Parameters {
  int pixels;       // of all images; ragged, of each so many that stages are of one
  int slab_pixels;  // a multiple of what a stage is deep
  int C, K;
  int row_tiles;
  // Stages of an image, where they are ragged.
  int image_stages;
  uint32 image_stages_magic;
  int image_stages_shift;
  Of x;
  Of dy;
};

// The row of a group's tile that is row `half` * 8 + lane / 4 of a warp's 16 rows of a product.
__device__ __forceinline__ int row_of(int product, int half, int warp, int lane) {
  if (!kChannelsLast) return product * 64 + warp * 16 + half * 8 + lane / 4;
  return strip_offset(warp, lane) + product * 2 + half;
}

// Of ragged stages: the image of one, its first pixel there, and how many there are from it on.
struct Place {
  int image, first, count;

  __device__ __forceinline__ Place(const Parameters& g, int pixel) {
    const int stage = pixel / kDepth;
    image = divide_by(stage, g.image_stages_magic, g.image_stages_shift);
    first = (stage - image * g.image_stages) * kDepth;
    count = min(kDepth, g.x.plane - first);
  }

  __device__ __forceinline__ int64 element(const Of& of, int channel) const {
    return (static_cast<int64>(image) * of.channels + channel) * of.plane + first;
  }
};

// Adds a lane's elements of a step to the sums of its rows.
template <class Element>
__device__ __forceinline__ void add_rows(Element, float (&sum)[kProducts][2], const Left& left) {
#pragma unroll
  for (int product = 0; product < kProducts; ++product)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        const uint32 bits = left[product][term][i];
        if constexpr (sizeof(Element) == 2) {
          float lower, upper;
          widen_pair(Element{}, bits, lower, upper);
          sum[product][i % 2] += lower + upper;
        } else {
          sum[product][i % 2] += __uint_as_float(bits);
        }
      }
}

// partials (slabs, K, C), with dbias behind each where there is one.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    pointwise_wgrad_groups(const T* __restrict__ dy, const T* __restrict__ x, float* __restrict__ partials, T*, T*,
                           const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(unaligned);
  unsigned char* const shared = aligned_for_right(unaligned);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / kGroupThreads;
  const int group_thread = thread % kGroupThreads;
  const int lane = thread % kWarp;
  const int warp = group_thread / kWarp;
  const int column_tile = static_cast<int>(blockIdx.x) / g.row_tiles;
  const int k0 = ((static_cast<int>(blockIdx.x) - column_tile * g.row_tiles) * kGroups + group) * kRows;
  const int c0 = column_tile * kColumns;
  const int begin = static_cast<int>(blockIdx.y) * g.slab_pixels;
  const int end = min(g.pixels, begin + g.slab_pixels);

  T* const x_tiles = reinterpret_cast<T*>(shared);
  T* const ragged_x_tiles = x_tiles + kXTiles * kTerms * kRightTile;
  T* const dy_tiles = ragged_x_tiles + kStages * kRaggedXTile + group * kStages * kDyTile;

  int next = begin;
  const auto copy = [&](int stage) {
    if (next < end) {
      if constexpr (kCopiedX) {
        copy_right<kXCopy, kThreads>(x_tiles + stage * kRightTile, x, thread, [&](int column, int depth) -> const T* {
          const int pixel = next + depth;
          return c0 + column < g.C && pixel < end ? x + g.x.element(pixel) + (c0 + column) * g.x.apart() : nullptr;
        });
      }
      T* const to = dy_tiles + stage * kDyTile;
      if constexpr (kRagged) {
        const Place at(g, next);
        const int64 pixels = static_cast<int64>(g.pixels / kDepth / g.image_stages) * g.x.plane;
        copy_ragged<kGroupThreads, kRows, kDepth, kRaggedPitch>(to, dy, at.element(g.dy, k0), g.dy.plane, g.K - k0,
                                                                at.count, pixels * g.K, group_thread);
        copy_ragged<kThreads, kColumns, kDepth, kRaggedPitch>(ragged_x_tiles + stage * kRaggedXTile, x,
                                                              at.element(g.x, c0), g.x.plane, g.C - c0, at.count,
                                                              pixels * g.C, thread);
      } else {
        constexpr int kPieces = (kChannelsLast ? kRows : kDepth) / kDyCopy;
        constexpr int kTileRows = kChannelsLast ? kDepth : kRows;
        constexpr int kRowsApart = kGroupThreads / kPieces;
        static_assert(kRowsApart * kPieces == kGroupThreads && kTileRows % kRowsApart == 0);
        const int first_row = group_thread / kPieces;
        const int along = group_thread % kPieces * kDyCopy;
        if constexpr (kChannelsLast) {
          const bool channel_exists = k0 + along < g.K;
          const T* const source = dy + static_cast<int64>(next + first_row) * g.K + k0 + along;
#pragma unroll
          for (int i = 0; i < kTileRows / kRowsApart; ++i) {
            const int row = i * kRowsApart + first_row;
            const bool exists = channel_exists && next + row < end;
            const T* const from = source + static_cast<int64>(i * kRowsApart) * g.K;
            ptx::copy_async_or_zeros<kDyCopy * kSize>(to + row * kPitch + along, exists ? from : dy, exists);
          }
        } else {
          const bool pixel_exists = next + along < end;
          const int64 apart = static_cast<int64>(kRowsApart) * g.dy.plane;
          const T* source = dy;
          if (pixel_exists)
            source += g.dy.element(next + along) + static_cast<int64>(k0 + first_row) * g.dy.plane;
#pragma unroll
          for (int i = 0; i < kTileRows / kRowsApart; ++i) {
            const int row = i * kRowsApart + first_row;
            const bool exists = pixel_exists && k0 + row < g.K;
            T* const place = to + swizzled(row, along / kVector) + along % kVector;
            ptx::copy_async_or_zeros<kDyCopy * kSize>(place, exists ? source : dy, exists);
            if (pixel_exists) source += apart;
          }
        }
      }
      next += kDepth;
    }
    ptx::copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);

  using Pieces = RightPieces<kXCopy, kThreads>;
  Pieces pieces;
  const auto load_x = [&](int first) {
    const int pixel = first + Pieces::depth_of(thread);
    const int64 place = kChannelsLast || pixel < end ? g.x.element(pixel) : 0;
    pieces.load(thread, [&](int column, int e) -> const T* {
      if (c0 + column >= g.C || pixel + e >= end) return nullptr;
      return x + place + (c0 + column) * g.x.apart() + (kChannelsLast ? e * g.C : 0);
    });
  };
  const auto as_it_is = [](int column) { return column; };
  // Ragged, x of a stage that has landed.
  const auto turn_x = [&](int first, int from_stage, T* to) {
    constexpr int kItems = kColumns * kDepth / kVector;
    const Place at(g, first);
    const T* const from = ragged_x_tiles + from_stage * kRaggedXTile;
#pragma unroll
    for (int i = 0; i < (kItems + kThreads - 1) / kThreads; ++i) {
      const int item = i * kThreads + thread;
      if (kItems % kThreads != 0 && item >= kItems) break;
      const int column = item / (kDepth / kVector);
      const int sixteenth = item % (kDepth / kVector);
      const int shift = static_cast<int>(at.element(g.x, c0 + column) % kVector);
      Vector<uint32, 4> words;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int depth = sixteenth * kVector + 2 * e;
        words.piece[e] = first_of_word(ragged_word(from + column * kRaggedPitch, shift + depth), at.count - depth);
      }
      *reinterpret_cast<Vector<uint32, 4>*>(to + swizzled(column, sixteenth)) = words;
    }
  };
  if constexpr (kRagged) {
    ptx::copy_async_wait<kStages - 2>();
    __syncthreads();
    turn_x(begin, 0, x_tiles);
  } else if constexpr (!kCopiedX) {
    load_x(begin);
    pieces.put(x_tiles, thread, as_it_is);
    load_x(begin + kDepth);
  }
  ptx::fence_shared_for_bulk();

  const bool sums_bias = kBias && c0 == 0;
  Sums sum = {};
  float sum_of_rows[kProducts][2] = {};
  int stage = 0;
  int free_stage = kStages - 1;
  int buffer = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += kDepth) {
    ptx::copy_async_wait<kStages - 1 - kLanded>();
    if constexpr (kCopiedX) ptx::fence_shared_for_bulk();
    __syncthreads();
    const T* const dy_tile = dy_tiles + stage * kDyTile;
    int shift = 0;
    int count = 0;
    if constexpr (kRagged) {
      const Place at(g, first);
      // Eight rows of any plane start at a boundary again.
      shift = static_cast<int>(at.element(g.dy, k0 + lane / 4) % kVector);
      count = at.count;
    }
    const auto load_left = [&](Left& left, int step) {
      if constexpr (kRagged) {
        load_left_of_ragged_rows(left, dy_tile, step, shift, count, warp, lane);
      } else if constexpr (kChannelsLast) {
        const Shifts none = {0, 0};
        load_left_of_strips(left, dy_tile, step, none, warp, lane);
      } else {
        load_left_of_rows(left, dy_tile, step, warp, lane);
      }
      if (sums_bias) add_rows(T{}, sum_of_rows, left);
    };
    multiply_stage(sum, x_tiles + (kCopiedX ? stage : buffer) * kTerms * kRightTile, load_left, [&] {
      copy(free_stage);
      if constexpr (!kCopiedX) {
        buffer = 1 - buffer;
        T* const next_x_tile = x_tiles + buffer * kTerms * kRightTile;
        if constexpr (kRagged) {
          if (first + kDepth < end) turn_x(first + kDepth, stage + 1 < kStages ? stage + 1 : 0, next_x_tile);
        } else {
          pieces.put(next_x_tile, thread, as_it_is);
          load_x(first + 2 * kDepth);
        }
        ptx::fence_shared_for_bulk();
      }
    });
    free_stage = stage;
    if (++stage == kStages) stage = 0;
  }
  ptx::copy_async_wait<0>();

  float* const own = partials + blockIdx.y * static_cast<int64>(g.C + kBias) * g.K;
  // One sum, element by element, where terms of float32 are not finite.
  const auto plainly = [&](int c, int k) {
    const T* const x_channel = x + c * g.x.apart();
    const T* const dy_channel = dy + k * g.dy.apart();
    float plain = 0;
#pragma unroll 1
    for (int pixel = begin; pixel < end; ++pixel) {
      const float factor = c < g.C ? float(widen(x_channel[g.x.element(pixel)])) : 1.0f;
      plain = fma(factor, float(widen(dy_channel[g.dy.element(pixel)])), plain);
    }
    return plain;
  };
  // Of even numbers a pair starts at a multiple of it in every slab.
  const bool in_pairs = g.C % 2 == 0 && (!kBias || g.K % 2 == 0);
  if (all_finite(sum)) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = k0 + row_of(product, half, warp, lane);
        if (k >= g.K) continue;
        float* const to = own + static_cast<int64>(k) * g.C;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int i = 0; i < kPartColumns / 8; ++i) {
            const int c = c0 + part * kPartColumns + i * 8 + lane % 4 * 2;
            const float* const pair = &sum[product][part][i * 4 + half * 2];
            if (in_pairs) {
              if (c < g.C) store_narrowed<2>(to + c, pair);
            } else {
              if (c < g.C) to[c] = pair[0];
              if (c + 1 < g.C) to[c + 1] = pair[1];
            }
          }
      }
  } else {
#pragma unroll 1
    for (int row = 0; row < kStrip; ++row) {
      const int k = k0 + row_of(row / 2, row % 2, warp, lane);
#pragma unroll 1
      for (int i = 0; i < kColumns / 4; ++i) {
        const int c = c0 + i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (k < g.K && c < g.C) own[static_cast<int64>(k) * g.C + c] = plainly(c, k);
      }
    }
  }
  if (sums_bias) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = k0 + row_of(product, half, warp, lane);
        float total = sum_of_rows[product][half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (kTerms == 2 && !(fabsf(total) <= 3.4e38f) && k < g.K) total = plainly(g.C, k);
        if (lane % 4 == 0 && k < g.K) own[static_cast<int64>(g.K) * g.C + k] = total;
      }
  }
}
