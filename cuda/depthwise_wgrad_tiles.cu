// Depthwise convolution, gradients of the weights and the bias, NCHW, stride 1, of kernels too large for
// depthwise_wgrad_runs. From sm_75 up.
//
// A warp owns a tile of taps, some of each of kRows kernel rows, and every lane of it all of these for pixels of its own,
// kStep columns of rows one below the other: an element of x meets kStep pixels of kRows rows of dy, which stay in
// registers for as many rows of x. Rows of x that are padding are passed over. In the end the lanes of a warp are added.
//
// A block has some tiles, those of its warps and then further ones, and a slab of the batch: it goes through units, each
// some images, or some rows of dy of one. A unit is laid out in shared memory as sums are made, with zeros to the left
// and right of x, and above and below dy.
//
// A row of shared memory has its even pieces of 16 bytes first, then the odd ones: lanes, two pieces apart, meet
// different banks.
//
// Compile-time values: T; BIAS (whether dbias is summed too); FINAL (there is one slab, and no need for another
// launch); ROWS, CHUNK (of a tile: kernel rows, and taps of each); PHASE (columns by which x's first one lies further to
// the right than its padding takes, so as to be a piece's first); IN_VECTOR (elements of one load: they divide a piece,
// W and Q); THREADS, BLOCKS (that a multiprocessor is to hold).
#include "indices.cuh"
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kRows = CUCONV_ROWS;
constexpr int kChunk = CUCONV_CHUNK;
constexpr int kPhase = CUCONV_PHASE;
constexpr int kIn = CUCONV_IN_VECTOR;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kTaps = kRows * kChunk;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Values of the widest load of shared memory, and of two of them.
constexpr int kPiece = 16 / static_cast<int>(sizeof(Sum));
constexpr int kStep = 2 * kPiece;
// Of a row of x, what a step of dy and a row of taps meet, in whole pieces.
constexpr int kWindow = (kPhase + kStep + kChunk - 1 + kPiece - 1) / kPiece * kPiece;
// Pieces that a thread loads before it stores the first.
constexpr int kAhead = 4;
// The taps of a tile, in the end shared out by its lanes.
constexpr int kLaneTaps = kTaps <= 16 ? 16 : kTaps <= 32 ? 32 : 64;
static_assert(kTaps <= kLaneTaps);

struct Parameters {
  int multiplier;  // planes of dy for each plane of x
  int K;           // output channels
  int R, S;
  int H, W, P, Q;
  int top, left;   // padding
  int stride_h, stride_w, dilation_h, dilation_w;  // 1
  int N;
  int chunks;      // tiles beside each other in a kernel row: their starts are whole steps apart
  int rounds;      // tiles of a warp, one after the other
  int strips;      // steps of a row of dy
  int parts;       // into which the rows that a tile meets are cut
  int items;       // of a unit: images times parts times strips
  uint32 strips_magic, parts_magic;
  int unit_images;
  int unit_rows;   // of dy
  int row_units;   // units of an image
  int units;       // of all images
  int block_units; // that a block goes through
  int x_pieces, dy_pieces;  // of a row that are laid out
  uint32 x_pieces_magic, dy_pieces_magic;
  int lead;                 // pieces of zeros before x
  int x_half, x_pitch, x_image;     // values of half a row, from row to row, from image to image
  int dy_half, dy_pitch, dy_image;
};

// How the threads of a block share rows: a thread has a piece of every `rows`-th one, from `row` on.
struct Spread {
  int pieces, lead, rows, row, piece;
};

__device__ __forceinline__ Spread spread_over(int pieces, uint32 pieces_magic, int lead) {
  const int thread = static_cast<int>(threadIdx.x);
  if (pieces >= kThreads) return {pieces, lead, 1, 0, thread};
  const int row = divide(thread, pieces_magic);
  return {pieces, lead, divide(kThreads, pieces_magic), row, thread - row * pieces};
}

// Values of shared memory from a whole step of columns on.
template <int kCount>
__device__ __forceinline__ void load_pieces(const Sum* source, int half, Sum (&value)[kCount]) {
  static_assert(kCount % kPiece == 0);
#pragma unroll
  for (int i = 0; i < kCount / kPiece; ++i) {
    const auto piece = *reinterpret_cast<const Vector<Sum, kPiece>*>(source + i / 2 * kPiece + (i % 2 ? half : 0));
#pragma unroll
    for (int e = 0; e < kPiece; ++e) value[i * kPiece + e] = piece.piece[e];
  }
}

// Adds up, over all lanes and always in the same order, each of kCount values: a lane ends with those of its number, when
// all are counted out to the lanes in order.
template <int kCount, int kApart, int kSize>
__device__ __forceinline__ void add_lanes(Sum (&value)[kSize], int lane) {
  if constexpr (kApart > 0) {
    constexpr int kKept = kCount > 1 ? kCount / 2 : 1;
    const bool upper = (lane & kApart) != 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const Sum other = kCount > 1 ? value[i + kCount - kKept] : value[i];
      const Sum given = upper ? value[i] : other;
      value[i] = (upper ? other : value[i]) + __shfl_xor_sync(0xffffffff, given, kApart);
    }
    add_lanes<kKept, kApart / 2>(value, lane);
  }
}

// Lays out some rows of a plane in each of some images: row 0 is first_row, and those before `begin` and from `end` on,
// and all of images that do not exist, are zeros. `add` is called with every value.
template <class Add>
__device__ __forceinline__ void lay_out(const T* source, int64 image_size, int images, int unit_images, int first_row,
                                        int begin, int end, int rows, int width, Spread spread, Sum* shared, int half,
                                        int pitch, int image_pitch, const Add& add) {
  if (spread.row >= spread.rows) return;
  for (int image = 0; image < unit_images; ++image, source += image_size, shared += image_pitch) {
    const int existing = image < images ? end : begin;
    for (int piece = spread.piece; piece < spread.pieces; piece += kThreads) {
      const int place = piece + spread.lead;
      const T* at = source + static_cast<int64>(first_row + spread.row) * width + piece * kPiece;
      Sum* to = shared + spread.row * pitch + place / 2 * kPiece + (place % 2 ? half : 0);
      for (int first = spread.row; first < rows; first += kAhead * spread.rows) {
        Sum value[kAhead][kPiece];
#pragma unroll
        for (int i = 0; i < kAhead; ++i, at += spread.rows * width) {
          const int row = first + i * spread.rows;
#pragma unroll
          for (int e = 0; e < kPiece; e += kIn) {
            Sum loaded[kIn];
            load_widened<kIn>(at + e, row >= begin && row < existing && piece * kPiece + e < width, loaded);
#pragma unroll
            for (int v = 0; v < kIn; ++v) value[i][e + v] = loaded[v];
          }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i, to += spread.rows * pitch) {
          if (first + i * spread.rows < rows) store_narrowed<kPiece>(to, value[i]);
#pragma unroll
          for (int e = 0; e < kPiece; ++e) add(value[i][e]);
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_tiles(const T* dy, const T* x, Sum* partials, T* dw, T* dbias,
                          const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  Sum* const x_shared = reinterpret_cast<Sum*>(shared);
  Sum* const dy_shared = x_shared + g.unit_images * g.x_image;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int k = static_cast<int>(blockIdx.y);
  const int C = g.K / g.multiplier;
  const int64 x_plane = static_cast<int64>(g.H) * g.W;
  const int64 dy_plane = static_cast<int64>(g.P) * g.Q;
  const int first_unit = static_cast<int>(blockIdx.x) * g.block_units;
  const int end_unit = min(first_unit + g.block_units, g.units);
  // The block's first tile of taps, its first kernel row, and the one behind those of its last tile.
  const int first_tile = static_cast<int>(blockIdx.z) * (kWarps * g.rounds);
  const int first_r = first_tile / g.chunks * kRows;
  const int end_r = min((first_tile + kWarps * g.rounds - 1) / g.chunks + 1, (g.R + kRows - 1) / kRows) * kRows;

  // The zeros before and behind rows stay.
  for (int i = thread * kPiece; i < g.unit_images * g.x_image; i += kThreads * kPiece) {
    const Sum nothing[kPiece] = {};
    store_narrowed<kPiece>(x_shared + i, nothing);
  }
  const Spread x_spread = spread_over(g.x_pieces, g.x_pieces_magic, g.lead);
  const Spread dy_spread = spread_over(g.dy_pieces, g.dy_pieces_magic, 0);

  Sum bias_sum = 0, seen = 0;
  bool plainly = false;
  int laid = -1;
  const auto deliver = [&](int tap, Sum total) {
    const int entries = g.R * g.S + kBias;
    if (!kFinal) {
      partials[(static_cast<int64>(blockIdx.x) * entries + tap) * g.K + k] = total;
    } else if (tap < g.R * g.S) {
      dw[static_cast<int64>(k) * (g.R * g.S) + tap] = narrow<T>(total);
    } else {
      dbias[k] = narrow<T>(total);
    }
  };
  for (int round = 0; round < g.rounds; ++round) {
    const int tile = first_tile + round * kWarps + warp;
    const int chunk = tile % g.chunks;
    const int r = tile / g.chunks * kRows;
    Sum sum[kRows][kChunk] = {};
    for (int unit = first_unit; unit < end_unit; ++unit) {
      const int first_image = unit / g.row_units * g.unit_images;
      const int p0 = unit % g.row_units * g.unit_rows;
      const int rows = min(g.unit_rows, g.P - p0);
      // The rows of x that the block's taps meet, of those that exist.
      const int x_first = max(p0 - g.top + first_r, 0);
      if (unit != laid) {
        const int images = min(g.unit_images, g.N - first_image);
        const int x_rows = max(min(p0 + rows - 1 - g.top + end_r, g.H) - x_first, 0);
        __syncthreads();
        lay_out(x + (static_cast<int64>(first_image) * C + k / g.multiplier) * x_plane, C * x_plane, images,
                g.unit_images, x_first, 0, x_rows, x_rows, g.W, x_spread, x_shared, g.x_half, g.x_pitch, g.x_image,
                [&](Sum value) { seen = fma(value, Sum(0), seen); });
        // As many rows of zeros above and below dy as a tile has rows but one.
        lay_out(dy + (static_cast<int64>(first_image) * g.K + k) * dy_plane, g.K * dy_plane, images, g.unit_images,
                p0 - (kRows - 1), kRows - 1, kRows - 1 + rows, rows + 2 * (kRows - 1), g.Q, dy_spread, dy_shared,
                g.dy_half, g.dy_pitch, g.dy_image, [&](Sum value) {
                  if (kBias && round == 0) bias_sum += value;
                  seen = fma(value, Sum(0), seen);
                });
        plainly = __syncthreads_or(seen != seen);
        laid = unit;
      }
      if (r >= g.R) continue;

      // The rows of x that the tile's taps meet.
      const int y_begin = max(p0 - g.top + r, 0);
      const int y_end = min(p0 + rows - 1 - g.top + r + kRows, g.H);
      const int part_rows = (y_end - y_begin + g.parts - 1) / g.parts;
      for (int item = lane; item < g.items; item += kWarp) {
        const int row_item = divide(item, g.strips_magic);
        const int strip = item - row_item * g.strips;
        const int image = divide(row_item, g.parts_magic);
        const int begin = y_begin + (row_item - image * g.parts) * part_rows;
        const int end = min(begin + part_rows, y_end);
        if (begin >= end) continue;
        const Sum* x_row = x_shared + image * g.x_image + (begin - x_first) * g.x_pitch +
                           (chunk * kChunk / kStep + strip) * kPiece;
        // The row of dy that the first row of taps meets; the others meet those above.
        const Sum* dy_row = dy_shared + image * g.dy_image + (begin - (p0 - g.top + r)) * g.dy_pitch + strip * kPiece;
        Sum gradient[kRows][kStep];
#pragma unroll
        for (int i = 1; i < kRows; ++i, dy_row += g.dy_pitch) load_pieces(dy_row, g.dy_half, gradient[i]);
#pragma unroll 1
        for (int y = begin; y < end; y += kRows) {
#pragma unroll
          for (int phase = 0; phase < kRows; ++phase) {
            if (y + phase >= end) break;
            Sum window[kWindow];
            load_pieces(x_row, g.x_half, window);
            load_pieces(dy_row, g.dy_half, gradient[phase]);
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
              for (int v = 0; v < kStep; ++v)
#pragma unroll
                for (int s = 0; s < kChunk; ++s)
                  sum[i][s] = fma(window[kPhase + v + s], gradient[(phase + kRows - i) % kRows][v], sum[i][s]);
            x_row += g.x_pitch;
            dy_row += g.dy_pitch;
          }
        }
      }
    }
    if (r >= g.R) continue;

    // The zeros behind a row of dy have met elements of x that are not finite, and elements of dy that are not finite
    // have not met the padding: once more, tap by tap.
    if (plainly) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int s = 0; s < kChunk; ++s) sum[i][s] = Sum(0);
      for (int unit = first_unit; unit < end_unit; ++unit) {
        const int first_image = unit / g.row_units * g.unit_images;
        const int p0 = unit % g.row_units * g.unit_rows;
        const int rows = min(g.unit_rows, g.P - p0);
        for (int n = first_image; n < min(first_image + g.unit_images, g.N); ++n) {
          const T* const x_source = x + (static_cast<int64>(n) * C + k / g.multiplier) * x_plane;
          const T* const dy_source = dy + (static_cast<int64>(n) * g.K + k) * dy_plane;
          for (int p = p0; p < p0 + rows; ++p)
            for (int q = lane; q < g.Q; q += kWarp) {
              const Sum gradient = widen(dy_source[static_cast<int64>(p) * g.Q + q]);
              const int column = q - g.left + chunk * kChunk;
#pragma unroll
              for (int i = 0; i < kRows; ++i)
#pragma unroll
                for (int s = 0; s < kChunk; ++s) {
                  const int row = p - g.top + r + i;
                  const bool exists = within(row, g.H) && within(column + s, g.W);
                  const Sum value = exists ? widen(x_source[static_cast<int64>(row) * g.W + column + s]) : Sum(0);
                  sum[i][s] = fma(value, gradient, sum[i][s]);
                }
            }
        }
      }
    }

    Sum total[kLaneTaps];
#pragma unroll
    for (int tap = 0; tap < kLaneTaps; ++tap) total[tap] = tap < kTaps ? sum[tap / kChunk % kRows][tap % kChunk] : Sum(0);
    add_lanes<kLaneTaps, kWarp / 2>(total, lane);
    const int first_tap = lane * kLaneTaps / kWarp;
#pragma unroll
    for (int i = 0; i < max(1, kLaneTaps / kWarp); ++i) {
      const int tap = first_tap + i;
      const int s = chunk * kChunk + tap % kChunk;
      const bool exists = tap < kTaps && r + tap / kChunk < g.R && s < g.S;
      // Of neighbouring lanes with the same tap one.
      if (exists && lane * kLaneTaps % kWarp == 0) deliver((r + tap / kChunk) * g.S + s, total[i]);
    }
  }
  if (kBias && blockIdx.z == 0) {
    __syncthreads();
    x_shared[thread] = bias_sum;
    __syncthreads();
    if (thread == 0) {
      Sum total = 0;
      for (int i = 0; i < kThreads; ++i) total += x_shared[i];
      deliver(g.R * g.S, total);
    }
  }
}
