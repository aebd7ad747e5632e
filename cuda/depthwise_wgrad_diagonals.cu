// Depthwise convolution, gradients of the weights and the bias, NCHW, 16-bit, on tensor cores (sm_90 and newer), of
// stride 1 along rows.
//
// Rows of dy and x are cut into chunks of 8 columns. A product m16n8k16 multiplies 16 rows (k) of a chunk of dy by as
// many rows of x that lie a kernel row below, once for each of two kernel rows (m: 8 columns of x of either): of every
// pair of columns, one of dy and one of x, it makes a sum over rows. dw[r][s] is the sum of those pairs whose columns
// lie a tap apart, a diagonal. Which column of its chunk a pair's are matters, and which chunk of its row does not, so
// that few sums in a thread's registers go through all chunks, rows and images. The diagonals are added in the end.
//
// A block owns some planes, and a slab of the batch, through which it goes some images at a time. One bulk copy an
// image brings its planes of x, one those of dy. From there rows are laid out in chunks, with zeros beside them and,
// for x, between the planes; while products go on, the next images are under way. A warp takes one plane, a group of
// kernel rows and a part of the rows of dy; parts, and slabs, are added in a fixed order.
//
// The zeros beside rows, and columns of x that dy's last columns do not reach, make NaN of infinities that no tap
// meets, and products of chunks that are padding are left out. Whatever of dy is not finite, and whatever of x any tap
// meets, makes sums that are not finite: where there is one the block does it over, plainly.
//
// Compile-time values: T; BIAS (whether dbias is summed too); FINAL (there is no need for another launch); CLUSTER (see
// slabs.cuh); THREADS; BLOCKS (that a multiprocessor is to hold, which bounds the registers); VECTOR (elements laid out
// at once: it divides W, Q and shift); DOWN (neighbouring threads lay out neighbouring rows, which lie in different
// banks); DENSE (planes arrive one behind the other, without elements between them); GROUPED (there are several groups
// of kernel rows); DILATED (dilation_h is above 1); PAIRS (of kernel rows in a group); X_CHUNKS, DY_CHUNKS (of a row);
// FIRST, APART (chunk d of dy meets chunk d + FIRST + t of x for every bit t of APART).
#include "indices.cuh"
#include "numbers.cuh"
#include "products.cuh"
#include "runs.cuh"
#include "slabs.cuh"
#include "wgrad_plainly.cuh"

using T = CUCONV_T;

constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kVector = CUCONV_VECTOR;
constexpr bool kDown = CUCONV_DOWN;
constexpr bool kDense = CUCONV_DENSE;
constexpr bool kGrouped = CUCONV_GROUPED;
constexpr bool kDilated = CUCONV_DILATED;
constexpr int kPairs = CUCONV_PAIRS;
constexpr int kXChunks = CUCONV_X_CHUNKS;
constexpr int kDyChunks = CUCONV_DY_CHUNKS;
constexpr int kFirst = CUCONV_FIRST;
constexpr uint32 kApart = CUCONV_APART;

__device__ constexpr int bits_of(uint32 mask) { return mask == 0 ? 0 : 1 + bits_of(mask >> 1); }

constexpr int kWarps = kThreads / kWarp;
constexpr uint32 kAllLanes = 0xffffffff;
// Columns of a chunk, and rows of a product.
constexpr int kChunk = 8;
constexpr int kStep = 16;
// Odd numbers of 16 bytes from row to row: eight rows of a chunk lie in different banks.
constexpr int kXPitch = (kXChunks | 1) * kChunk;
constexpr int kDyPitch = (kDyChunks | 1) * kChunk;
// Chunks that a thread loads before it stores them.
constexpr int kBatch = 2 * kPairs * bits_of(kApart) + kDyChunks > 20 ? 2 : 4;

constexpr int kOffsets = bits_of(kApart);
// Sums of a lane: four a product of a pair and an offset, and those of dbias.
constexpr int kLaneSums = 4 * (kPairs * kOffsets + kBias);

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements");

struct Parameters {
  int K, R, S;
  int H, W, P, Q;
  int top, left;                   // padding
  int stride_h, stride_w;          // of the convolution; stride_w is 1
  int dilation_h, dilation_w;
  int shift;                       // zeros before a row of x
  int gap;                         // rows of zeros before a plane of x
  int x_unit, dy_unit;             // elements from one plane to the next, as they arrive
  int layout_bytes;                // of x, dy and a row of zeros
  int x_layout_bytes;
  int zeros;                       // elements from dy's layout to the row of zeros
  int x_arrival_bytes;
  uint32 H_magic, P_magic;         // see divide
  int images;                      // at a time
  int all_images;
  int block_images;                // of a slab
  int block_planes;
  int row_groups;                  // of kernel rows
  int parts;                       // warps that share the rows of dy
};

using Words = Vector<uint32, kChunk / 2>;

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// A chunk of a row that starts at a multiple of kElements elements. At any element, it is shifted out of whole words.
template <int kElements>
__device__ __forceinline__ Words load_chunk(const T* source) {
  Words words;
  if constexpr (kElements == 1) {
    const uint32 odd = static_cast<uint32>(reinterpret_cast<uint64>(source) / sizeof(T) % 2);
    const uint32* const from = reinterpret_cast<const uint32*>(source - odd);
    uint32 low = from[0];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const uint32 high = from[i + 1];
      words.piece[i] = __funnelshift_r(low, high, 16 * odd);
      low = high;
    }
  } else {
#pragma unroll
    for (int e = 0; e < kChunk; e += kElements) {
      const auto packed = load_packed<kElements>(source + e, true);
#pragma unroll
      for (int i = 0; i < kElements / 2; ++i) words.piece[e / 2 + i] = packed.piece[i];
    }
  }
  return words;
}

// The rows of so many planes, which arrived `unit` elements apart, to chunks of a layout where planes are `slot`
// elements apart, kGaps if there are other rows between them. Threads keep to one place of a row; neighbours are at the
// next place, or, kDown, in the next row. What lies beside a row is loaded too, wherever it belongs, and made zero.
template <int kChunks, int kPitch, bool kGaps>
__device__ __forceinline__ void lay_out(const T* source, T* layout, int planes, int unit, int rows, int width, int slot,
                                        uint32 rows_magic, int shift, int thread) {
  constexpr int kRowsAtOnce = kThreads / kChunks;
  if (thread >= kRowsAtOnce * kChunks) return;
  const int column = (kDown ? thread / kRowsAtOnce : thread % kChunks) * kChunk - shift;
  Words present;
#pragma unroll
  for (int e = 0; e < kChunk; e += 2)
    present.piece[e / 2] =
        (within(column + e, width) ? 0xffffu : 0) | (within(column + e + 1, width) ? 0xffff0000u : 0);
  const int all_rows = planes * rows;
  const int source_gap = kDense ? 0 : unit - rows * width;
  const int layout_gap = kGaps ? slot - rows * kPitch : 0;
  int row = kDown ? thread % kRowsAtOnce : thread / kChunks;
  const int plane = divide(row, rows_magic);
  int plane_row = row - plane * rows;
  source += row * width + plane * source_gap + column;
  layout += row * kPitch + plane * layout_gap + column + shift;
  const int next_plane = divide(kRowsAtOnce, rows_magic);
  const int next_row = kRowsAtOnce - next_plane * rows;
  const int source_next = kRowsAtOnce * width + next_plane * source_gap;
  const int layout_next = kRowsAtOnce * kPitch + next_plane * layout_gap;
  const auto move = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    Words words[kCount];
    T* place[kCount];
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      words[b] = load_chunk<kVector>(source);
      place[b] = layout;
      source += source_next;
      layout += layout_next;
      if (kGaps || !kDense) {
        plane_row += next_row;
        if (plane_row >= rows) {
          plane_row -= rows;
          source += source_gap;
          layout += layout_gap;
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) words[b].piece[i] &= present.piece[i];
      *reinterpret_cast<Words*>(place[b]) = words[b];
    }
    row += kCount * kRowsAtOnce;
  };
#pragma unroll 1
  while (row + (kBatch - 1) * kRowsAtOnce < all_rows) move(Count<kBatch>{});
#pragma unroll 1
  while (row < all_rows) move(Count<1>{});
}

extern "C" __global__ void CUCONV_SLABS __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_diagonals(const T* dy, const T* x, float* partials, T* dw, T* dbias,
                              const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 full;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;

  T* const x_layout = reinterpret_cast<T*>(shared);
  T* const dy_layout = reinterpret_cast<T*>(shared + g.x_layout_bytes);
  T* const x_arrival = reinterpret_cast<T*>(shared + g.layout_bytes);
  T* const dy_arrival = reinterpret_cast<T*>(shared + g.layout_bytes + g.x_arrival_bytes);

  const int k0 = static_cast<int>(blockIdx.y) * g.block_planes;
  const int planes = min(g.block_planes, g.K - k0);
  const int first_image = static_cast<int>(blockIdx.x) * g.block_images;
  const int all_images = min(g.block_images, g.all_images - first_image);
  const int turns = (all_images + g.images - 1) / g.images;
  const int x_plane = g.H * g.W;
  const int dy_plane = g.P * g.Q;
  const int64 x_image = static_cast<int64>(g.K) * x_plane;
  const int64 dy_image = static_cast<int64>(g.K) * dy_plane;
  const T* const x_first = x + first_image * x_image + static_cast<int64>(k0) * x_plane;
  const T* const dy_first = dy + first_image * dy_image + static_cast<int64>(k0) * dy_plane;
  // Images start at multiples of 16 bytes, so that the elements between these and the planes, which are brought too,
  // are the image's own.
  const int x_phase = static_cast<int>(static_cast<uint32>(k0) * static_cast<uint32>(x_plane) % kChunk);
  const int dy_phase = static_cast<int>(static_cast<uint32>(k0) * static_cast<uint32>(dy_plane) % kChunk);
  const auto images_of = [&](int turn) { return min(g.images, all_images - turn * g.images); };
  const auto whole_bytes = [](int elements) {
    return static_cast<uint32>((elements + kChunk - 1) / kChunk * kBulkAlignment);
  };

  const auto load = [&](int turn) {
    const int images = images_of(turn);
    const uint32 x_bytes = whole_bytes(x_phase + planes * x_plane);
    const uint32 dy_bytes = whole_bytes(dy_phase + planes * dy_plane);
    if (thread == 0) ptx::barrier_arrive_expect(&full, static_cast<uint32>(images) * (x_bytes + dy_bytes));
    if (lane > 0) return;
#pragma unroll 1
    for (int image = warp; image < images; image += kWarps) {
      const int64 n = turn * g.images + image;
      ptx::bulk_load(x_arrival + image * planes * g.x_unit, x_first + n * x_image - x_phase, x_bytes, &full);
      ptx::bulk_load(dy_arrival + image * planes * g.dy_unit, dy_first + n * dy_image - dy_phase, dy_bytes, &full);
    }
  };

  if (thread == 0) ptx::barrier_init(&full, 1);
  __syncthreads();
  load(0);
  // Rows come and go, the zeros between them stay.
#pragma unroll 1
  for (int i = thread; i < g.layout_bytes / static_cast<int>(sizeof(Words)); i += kThreads)
    reinterpret_cast<Words*>(shared)[i] = Words{};

  const int plane_warps = g.row_groups * g.parts;
  const int plane = warp / plane_warps;
  const int group = (warp - plane * plane_warps) / g.parts;
  const int part = warp - plane * plane_warps - group * g.parts;
  // Of the 8x8 matrices of a fragment a lane gives a row. Of x, lanes 8 to 15 and 24 to 31 that of the second kernel
  // row, and 16 to 31 those of the last eight rows of k; of dy, those and these the other way around, for two chunks.
  const int lane_row = lane % 8 + lane / 16 * 8;
  const int second = lane / 8 % 2;
  const int other_lane = lane % 8 + second * 16 + lane / 16 * 8;
  const int x_slot = (g.gap + g.H) * kXPitch;
  const int x_pitch = g.stride_h * kXPitch;
  const int tap_pitch = (kDilated ? g.dilation_h : 1) * kXPitch;
  const T* const x_warp = x_layout + (g.gap - g.top) * kXPitch + (2 * kPairs * group + second) * tap_pitch;

  float sum[kPairs][kOffsets][4] = {};
  float bias_sum[4] = {};
  __syncthreads();

#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int images = images_of(turn);
    ptx::barrier_wait(&full, turn % 2);
    lay_out<kXChunks, kXPitch, true>(x_arrival + x_phase, x_layout + g.gap * kXPitch, images * planes, g.x_unit, g.H,
                                     g.W, x_slot, g.H_magic, g.shift, thread);
    lay_out<kDyChunks, kDyPitch, false>(dy_arrival + dy_phase, dy_layout, images * planes, g.dy_unit, g.P, g.Q,
                                        g.P * kDyPitch, g.P_magic, 0, thread);
    __syncthreads();
    if (turn + 1 < turns) load(turn + 1);

    const int rows = plane < planes ? images * g.P : 0;
    int row = part * kStep + lane_row;
    const int image = divide(row, g.P_magic);
    int p = row - image * g.P;
    int x_place = (image * planes + plane) * x_slot + p * x_pitch;
    int dy_place = ((image * planes + plane) * g.P + p) * kDyPitch;
    const int rows_next = g.parts * kStep;
    const int images_next = divide(rows_next, g.P_magic);
    const int p_next = rows_next - images_next * g.P;
    const int x_next = images_next * planes * x_slot + p_next * x_pitch;
    const int dy_next = (images_next * planes * g.P + p_next) * kDyPitch;
#pragma unroll 1
    for (int first = part * kStep; first < rows; first += rows_next) {
      // Behind the last row dy is zero, and x any row.
      const bool exists = row < rows;
      const T* const x_row = x_warp + (exists ? x_place : 0);
      const T* const dy_row = dy_layout + __shfl_sync(kAllLanes, exists ? dy_place : g.zeros, other_lane);
      row += rows_next;
      p += p_next;
      x_place += x_next;
      dy_place += dy_next;
      if (p >= g.P) {
        p -= g.P;
        x_place += planes * x_slot - g.P * x_pitch;
        dy_place += (planes - 1) * g.P * kDyPitch;
      }
      uint32 gradient[kDyChunks][2];
#pragma unroll
      for (int d = 0; d < kDyChunks; d += 2) {
        uint32 piece[4];
        const bool both = d + 1 < kDyChunks;
        ptx::load_matrices_transposed(dy_row + (d + (both ? lane / 16 : 0)) * kChunk, piece);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          gradient[d][half] = piece[half];
          if (both) gradient[d + 1][half] = piece[2 + half];
        }
      }
      if (kBias && (!kGrouped || group == 0)) {
        const uint32 ones[4] = {two_ones(T{}), two_ones(T{}), two_ones(T{}), two_ones(T{})};
#pragma unroll
        for (int d = 0; d < kDyChunks; ++d) multiply(T{}, bias_sum, ones, gradient[d]);
      }
#pragma unroll
      for (int c = 0; c < kXChunks; ++c) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          uint32 value[4];
          ptx::load_matrices_transposed(x_row + 2 * pair * tap_pitch + c * kChunk, value);
#pragma unroll
          for (int t = 0; t < kOffsets; ++t) {
            const int d = c - kFirst - t;
            if (d < 0 || d >= kDyChunks || !(kApart >> t & 1)) continue;
            multiply(T{}, sum[pair][t], value, gradient[d]);
          }
        }
      }
    }
    __syncthreads();
  }

  const int taps = g.R * g.S;
  const int entries = taps + kBias;
  // Of shared memory, behind the sums of every thread.
  float* const totals = reinterpret_cast<float*>(shared) + kWarps * kLaneSums * kWarp;
  const auto store = [&](int of_plane, int tap, float total) {
    const int64 k = k0 + of_plane;
    (tap < taps ? dw[k * taps + tap] : dbias[k]) = narrow<T>(total);
  };
  const auto deliver = [&](int of_plane, int tap, float total) {
    if (kCluster > 1) {
      totals[of_plane * entries + tap] = total;
    } else if (kFinal) {
      store(of_plane, tap, total);
    } else {
      partials[(static_cast<int64>(blockIdx.x) * entries + tap) * g.K + k0 + of_plane] = total;
    }
  };
  const auto add_slabs = [&] {
    if (kCluster > 1)
      add_of_cluster<kThreads>(totals, planes * entries, thread, [&](int entry, float total) {
        const int of_plane = entry / entries;
        store(of_plane, entry - of_plane * entries, total);
      });
  };

  float seen = 0;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
    for (int t = 0; t < kOffsets; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) seen = fma(sum[pair][t][e], 0.0f, seen);
#pragma unroll
  for (int e = 0; e < 4; ++e) seen = fma(bias_sum[e], 0.0f, seen);
  if (__syncthreads_or(seen != seen)) {
    for (int entry = warp; entry < planes * entries; entry += kWarps) {
      const int tap = entry / planes;
      const int of_plane = entry - tap * planes;
      const float total = sum_plainly(g, dy_first + of_plane * dy_plane, x_first + of_plane * x_plane, all_images,
                                      x_image, dy_image, tap, lane);
      if (lane == 0) deliver(of_plane, tap, total);
    }
    add_slabs();
    return;
  }

  // All loads have landed and been read: their memory is free for the sums of every thread.
  float* const sums = reinterpret_cast<float*>(shared);
  float* const own = sums + warp * kLaneSums * kWarp + lane;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
    for (int t = 0; t < kOffsets; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) own[((pair * kOffsets + t) * 4 + e) * kWarp] = sum[pair][t][e];
  if (kBias)
#pragma unroll
    for (int e = 0; e < 4; ++e) own[(kPairs * kOffsets * 4 + e) * kWarp] = bias_sum[e];
  __syncthreads();
  for (int entry = thread; entry < planes * entries; entry += kThreads) {
    const int tap = entry / planes;
    const int of_plane = entry - tap * planes;
    const int r = tap / g.S;
    const int of_group = r / (2 * kPairs);
    const int pair = r / 2 - of_group * kPairs;
    const int offset = (tap - r * g.S) * g.dilation_w - g.left + g.shift - kFirst * kChunk;
    const bool of_bias = tap == taps;
    const float* terms = sums + (of_plane * plane_warps + (of_bias ? 0 : of_group * g.parts)) * kLaneSums * kWarp;
    float total = 0;
#pragma unroll 1
    for (int other = 0; other < g.parts; ++other, terms += kLaneSums * kWarp) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        // Column i of dy meets column j of a chunk of x: see ptx::multiply_halves. Chunks that none meets are padding.
        const int j = of_bias ? 0 : (offset + i) & (kChunk - 1);
        const int t = (offset + i) >> 3;
        if (!of_bias && !within(t, kOffsets)) continue;
        const int product = of_bias ? kPairs * kOffsets : pair * kOffsets + t;
        total += terms[(product * 4 + (of_bias ? 0 : r % 2 * 2) + i % 2) * kWarp + j * 4 + i / 2];
      }
    }
    deliver(of_plane, tap, total);
  }
  add_slabs();
}
