// Depthwise convolution, gradients of the weights and the bias, channels-last (NHWC in memory), rows of x and dy staged
// in shared memory.
//
// A block takes strips of columns of dy of a few images, all at the same rows, of some neighbouring channels; a thread
// one strip of a vector of channels, of which it keeps R x S sums in registers through a whole slab. In one turn the
// block takes one row of dy and the rows of x, a stride of them, that come new with it: they pass through a ring in
// shared memory, copied there several turns ahead, each element once a block, with zeros for the columns that do not
// exist. A thread brings the rows of its strip into registers, where rows of x meet the rows of dy of the last turns,
// which are a ring there. Behind its last row the block goes on to the next images. In the end the sums of threads that
// share channels are added in a fixed order; depthwise_wgrad_reduce does so with the partial sums of all slabs, where
// there are several.
//
// Rows of x in the padding are passed over; columns too, where a strip is as wide as dy. Padding is a zero that takes
// part all the same, and the zeros for missing columns of dy are not to: if a sum is not finite, the thread makes its
// sums once more, plainly. That every other sum is what it should be follows from dbias, which is summed in any case
// and tells whether all of dy was finite.
//
// Compile-time values: T; R, S; BIAS (whether dbias is wanted); FINAL (there is no need for another launch); CLUSTER
// (see slabs.cuh: slabs are then along x of the grid, and a block has all columns; else they are along y); THREADS;
// BLOCKS (that a multiprocessor is to hold, which bounds the registers); VECTOR (channels of a thread: they divide K);
// GROUPS (vectors of a block); COLUMNS (of a strip); STAGES (turns of the ring); COPY (bytes of a copy: they divide a
// pixel's and a block's channels, and arrays start at multiples of them); X_COPIES, DY_COPIES (of a thread and row);
// STRIDE_H, STRIDE_W (of the strip, see below); DILATED; RUNS (see below); WIDTH (of x, where a strip is as wide as dy
// and this is known, or 0) and LEFT (then the padding before it).
//
// Pixels that are no whole copies: a block of all channels may copy what its columns are of a row, which is one run of
// memory. The run is copied from the last multiple of 16 bytes before it on, so that every row has a phase of its own
// in shared memory, and zeros follow it. Before the first column of x are a few elements of the row above, which the
// thread that reads them leaves out.
//
// Dilation: rows of dy dilation / gcd(stride, dilation) apart need rows of x whole dilations apart. A strip of rows so
// far apart is one of an undilated convolution of stride / gcd, in units of `dilation` rows of x. Columns likewise; a
// block then has all columns of an image.
#include "channels_last.cuh"
#include "numbers.cuh"
#include "row_walk.cuh"
#include "slabs.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kVector = CUCONV_VECTOR;
constexpr int kGroups = CUCONV_GROUPS;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kCopy = CUCONV_COPY;
constexpr int kXCopies = CUCONV_X_COPIES;
constexpr int kDyCopies = CUCONV_DY_COPIES;
constexpr int kStrideH = CUCONV_STRIDE_H;
constexpr int kStrideW = CUCONV_STRIDE_W;
constexpr bool kDilated = CUCONV_DILATED;
constexpr bool kRuns = CUCONV_RUNS;
constexpr int kWidth = CUCONV_WIDTH;
constexpr int kLeft = CUCONV_LEFT;

constexpr int kTaps = kR * kS;
// What a channel has of partial sums: its weights' and its bias's.
constexpr int kEntries = kTaps + kBias;
constexpr int kChannels = kGroups * kVector;
// Columns of x that a strip needs, in units of the dilation.
constexpr int kSpan = (kColumns - 1) * kStrideW + kS;
// Rows of dy that one row of x meets: a ring of them is in registers, and as many turns are unrolled, so that these are
// known at compile time.
constexpr int kRing = (kR + kStrideH - 1) / kStrideH;
// Turns on their way.
constexpr int kAhead = kStages - 1;
constexpr int kPiece = kCopy / static_cast<int>(sizeof(T));
constexpr int kPieces = kRuns ? 1 : kChannels / kPiece;
// What a stage ends with: a word of what the turn brings and one of phases.
constexpr int kWords = 2 * sizeof(uint32) / sizeof(T);

// That word has a bit for each of the last kRing rows of dy, the newest first, whether it exists and belongs to this
// step; for each new row of x; and the images from the step's first on, at most so many as a block takes.
// It is 0 behind the last turn.
constexpr int kXBit = kRing;
constexpr int kImagesBit = kXBit + kStrideH;
static_assert(kImagesBit <= 20, "up to 2^11 images");
// The other has so many bits for the phase of dy and of each new row of x, in elements.
constexpr int kPhaseBits = 3;
static_assert(!kRuns || (kCopy == 16 && !kDilated && kPhaseBits * (kStrideH + 1) <= 32));

static_assert(kAhead >= 1, "a turn is copied while another is read");
static_assert(kRuns || kChannels % kPiece == 0, "a pixel of a block is whole copies");
static_assert(kStrideH <= kR, "of a longer stride only the first kernel's worth of rows meets dy");

// Whether column j of what a strip needs is copied, or else known to be padding.
__device__ __forceinline__ constexpr bool column_copied(int j) {
  return kWidth == 0 || (kLeft <= j && j < kLeft + kWidth);
}

struct Parameters {
  int N, K;
  int H, W, P, Q;
  int top, left;               // padding
  int stride_h, stride_w;      // of the convolution
  int dilation_h, dilation_w;
  int spacing_h, spacing_w;    // rows and columns from one element of a strip to the next
  int strips;                  // side by side in a block
  int images;                  // of a block at a time; they and their strips have kGroups threads each
  int column_blocks;           // blocks side by side
  int x_pixels, dy_pixels;     // columns of x and dy that a block's strips need
  int x_size, dy_size;         // elements of a row in shared memory
  int stage_size;              // of a stage, with its words
  int x_plane, dy_plane;       // elements of an image
  int x_line, x_down, dy_down; // elements from one row of x to the next of a turn, and from a turn's to the next turn's
  int down;                    // rows of x, likewise
  int strip_rows;              // rows of dy in a strip; the last may lie beyond P where rows are apart
  int rows;                    // of all strips that a block's threads go down together, one after the other
  int slab_rows;               // of those, a block's
  uint32 strips_magic, x_pixels_magic, dy_pixels_magic;  // see divide
};

// What the thread copies of a row: where it is in memory, from the block's first channel in column 0 of the first image
// on, or -1. In all stages zeros take the place of what does not exist.
template <int kCopies>
__device__ __forceinline__ void find_copies(int (&copied)[kCopies], T* stage, int rows, int stage_size, int images,
                                            int pixels, uint32 pixels_magic, int first_column, int width, int plane,
                                            int channels_left, int K) {
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int item = i * kThreads + static_cast<int>(threadIdx.x);
    const int pixel = item / kPieces;
    const int image = divide(pixel, pixels_magic);
    const int column = first_column + pixel - image * pixels;
    const int channel = (item - pixel * kPieces) * kPiece;
    const bool exists = image < images && within(column, width) && channel < channels_left;
    copied[i] = exists ? image * plane + column * K + channel : -1;
    if (!exists && image < images) {
      for (int s = 0; s < kStages; ++s)
        for (int row = 0; row < rows; ++row)
          *reinterpret_cast<Vector<unsigned char, kCopy>*>(stage + s * stage_size +
                                                          (row * images * pixels * kPieces + item) * kPiece) = {};
    }
  }
}

// Copies a run of `count` elements to somewhere in the first 16 bytes at `to`, where `size` elements have room, and
// zeros behind it: where is what it returns.
template <int kCopies>
__device__ __forceinline__ int copy_run(T* to, const T* from, int count, int size) {
  const int phase = static_cast<int>(reinterpret_cast<uint64>(from) % 16 / sizeof(T));
  const T* const source = from - phase;
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int first = (i * kThreads + static_cast<int>(threadIdx.x)) * kPiece;
    const int left = phase + count - first;
    // Hardly any are copied in part, which takes many more instructions.
    if (left >= kPiece)
      ptx::copy_async<16>(to + first, source + first);
    else if (first < size)
      ptx::copy_async_part(to + first, source + first, max(left, 0) * static_cast<int>(sizeof(T)));
  }
  return phase;
}

extern "C" __global__ void CUCONV_SLABS __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_channels_last_staged(const T* __restrict__ dy, const T* __restrict__ x, Sum* partials, T* dw,
                                         T* dbias, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int slab = static_cast<int>(kCluster > 1 ? blockIdx.x : blockIdx.y);
  const int beside = static_cast<int>(kCluster > 1 ? blockIdx.y : blockIdx.x);
  const int channel_block = beside / g.column_blocks;
  const int column_block = beside - channel_block * g.column_blocks;
  const int first_channel = channel_block * kChannels;
  const int unit_h = kDilated ? g.dilation_h : 1;
  const int unit_w = kDilated ? g.dilation_w : 1;
  const int spacing_h = kDilated ? g.spacing_h : 1;
  const int spacing_w = kDilated ? g.spacing_w : 1;
  const int first_q = kDilated ? 0 : column_block * g.strips * kColumns;
  const int first_column = kWidth ? 0 : first_q * g.stride_w - g.left;

  const int first_row = slab * g.slab_rows;
  const auto enter = [&](Walk& walk) { return enter_step<kDilated, kRing, 0>(g, walk, 0); };
  const auto begin = [&](Walk& walk) { return begin_slab<kDilated, kRing, 0>(g, walk, first_row); };

  // What is copied.
  T* const ring = reinterpret_cast<T*>(shared);
  const int stage_size = g.stage_size;
  T* const of_x = ring;
  T* const of_dy = of_x + kStrideH * g.x_size;
  const auto word_of = [&](int stage, int word) -> uint32& {
    return reinterpret_cast<uint32*>(ring + stage + stage_size - kWords)[word];
  };
  // Of runs: columns before the first of x, and the pieces of zeros in their place.
  const int missing = kRuns ? max(0, -first_column) : 0;
  const int lead = (missing * kChannels + kPiece - 1) / kPiece * kPiece;
  const int x_run = (min(first_column + g.x_pixels, g.W) - first_column - missing) * kChannels;
  const int dy_run = (min(first_q + g.dy_pixels, g.Q) - first_q) * kChannels;
  int copied_x[kXCopies], copied_dy[kDyCopies];
  if constexpr (kRuns) {
    for (int s = 0; s < kStages; ++s)
      for (int a = 0; a < kStrideH; ++a)
        for (int i = thread; i < lead; i += kThreads) of_x[s * stage_size + a * g.x_size + i] = {};
  } else {
    find_copies(copied_x, of_x, kStrideH, stage_size, g.images, g.x_pixels, g.x_pixels_magic, first_column, g.W,
                g.x_plane, g.K - first_channel, g.K);
    find_copies(copied_dy, of_dy, 1, stage_size, g.images, g.dy_pixels, g.dy_pixels_magic, first_q, g.Q, g.dy_plane,
                g.K - first_channel, g.K);
  }
  Walk ahead;
  const T *x_source, *dy_source;
  uint32 x_end, dy_end, rows_of_dy;
  const auto find_sources = [&](int p) {
    const int64 image = ahead.first_image;
    x_source = x + ((image * g.H + ahead.row) * g.W + (kRuns ? first_column + missing : 0)) * g.K + first_channel;
    dy_source = dy + ((image * g.P + p) * g.Q + (kRuns ? first_q : 0)) * g.K + first_channel;
    x_end = ahead.images * g.x_plane;
    dy_end = ahead.images * g.dy_plane;
    rows_of_dy = 0;
  };
  find_sources(begin(ahead));
  // A turn on its way into a stage.
  const auto copy = [&](int stage) {
    uint32 turn = 0;
    uint32 phases = 0;
    if (ahead.t < ahead.turns) {
      turn = ahead.images << kImagesBit;
      const T* source = ptx::as_it_is(x_source);
#pragma unroll
      for (int a = 0; a < kStrideH; ++a) {
        const bool exists = within(ahead.row + a * unit_h, g.H);
        turn |= exists << (kXBit + a);
        T* const to = of_x + stage + a * g.x_size;
        if (kRuns && exists) {
          phases |= copy_run<kXCopies>(to + lead, source, x_run, g.x_size - lead) << kPhaseBits * (a + 1);
        } else if (!kRuns) {
#pragma unroll
          for (int i = 0; i < kXCopies; ++i)
            if (static_cast<uint32>(copied_x[i]) < (exists ? x_end : 0))
              ptx::copy_async<kCopy>(to + (i * kThreads + thread) * kPiece, source + copied_x[i]);
        }
        source += g.x_line;
      }
      source = ptx::as_it_is(dy_source);
      const bool exists = ahead.t < ahead.count;
      if (kRuns && exists) {
        phases |= copy_run<kDyCopies>(of_dy + stage, source, dy_run, g.dy_size);
      } else if (!kRuns) {
#pragma unroll
        for (int i = 0; i < kDyCopies; ++i)
          if (static_cast<uint32>(copied_dy[i]) < (exists ? dy_end : 0))
            ptx::copy_async<kCopy>(of_dy + stage + (i * kThreads + thread) * kPiece, source + copied_dy[i]);
      }
      rows_of_dy = (rows_of_dy << 1 | exists) & ((1 << kRing) - 1);
      turn |= rows_of_dy;
      ++ahead.t;
      ahead.row += g.down;
      x_source += g.x_down;
      dy_source += g.dy_down;
      if (ahead.t == ahead.turns && ahead.rows_left > 0) {
        ++ahead.step;
        find_sources(enter(ahead));
      }
    }
    if (thread == 0) {
      word_of(stage, 0) = turn;
      if (kRuns) word_of(stage, 1) = phases;
    }
    ptx::copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) copy(i * stage_size);

  const int strip = thread / kGroups;
  const int group = thread - strip * kGroups;
  const int image = divide(strip, g.strips_magic);
  const int k = first_channel + group * kVector;
  const int q = patch_start<kDilated>(column_block * g.strips + strip - image * g.strips, kColumns, spacing_w);
  // Columns that exist from q on.
  const int columns = image < g.images && k < g.K ? max(0, g.Q - q) : 0;
  const int own_column = kWidth ? 0 : q * g.stride_w - g.left - first_column;

  Sum sum[kR][kS][kVector] = {};
  Sum bias_sum[kVector] = {};
  Sum gradient[kRing][kColumns][kVector] = {};
  // The stage that is read, and the one that is free for the next turn; the thread's place in what is read, kept rather
  // than made anew.
  int stage = 0;
  int free_stage = kAhead * stage_size;
  int own_x = lead + (image * g.x_pixels + own_column - missing) * kChannels + group * kVector;
  // Of runs, the column of the strip's that is the last before the first of x.
  const int edge = missing - 1 - own_column;
  int own_dy = (image * g.dy_pixels + q - first_q) * kChannels + group * kVector;
  const auto next_turn = [&] {
    ptx::copy_async_wait<kAhead - 1>();
    __syncthreads();
    return word_of(stage, 0);
  };
  const auto go = [&] {
    uint32 turn = next_turn();
    while (turn != 0) {
#pragma unroll
      for (int u = 0; u < kRing; ++u) {
        if (u > 0 && turn == 0) return;
        copy(free_stage);
        const uint32 phases = kRuns ? word_of(stage, 1) : 0;
        const auto phase = [&](int row) {
          return static_cast<int>(phases >> kPhaseBits * row & ((1 << kPhaseBits) - 1));
        };
        if (columns > 0 && image < static_cast<int>(turn >> kImagesBit)) {
          if (turn & 1) {
#pragma unroll
            for (int v = 0; v < kColumns; ++v) {
              load_widened<kVector>(of_dy + own_dy + phase(0) + v * spacing_w * kChannels, true, gradient[u][v]);
#pragma unroll
              for (int e = 0; e < kVector; ++e) bias_sum[e] += gradient[u][v][e];
            }
          }
#pragma unroll
          for (int a = 0; a < kStrideH; ++a) {
            if (!(turn >> (kXBit + a) & 1)) continue;
            Sum value[kSpan][kVector];
            const T* const from = of_x + own_x + a * g.x_size + phase(a + 1);
#pragma unroll
            for (int j = 0; j < kSpan; ++j)
              if (column_copied(j)) load_widened<kVector>(from + (j - kLeft) * unit_w * kChannels, true, value[j]);
            if (kRuns && edge >= 0) {
#pragma unroll
              for (int j = 0; j < kSpan; ++j)
#pragma unroll
                for (int e = 0; e < kVector; ++e)
                  if (j <= edge) value[j][e] = 0;
            }
#pragma unroll
            for (int before = 0; before < kRing; ++before) {
              const int r = a + before * kStrideH;
              if (r >= kR || !(turn >> before & 1)) continue;
              const auto& row = gradient[(u + kRing - before) % kRing];
#pragma unroll
              for (int v = 0; v < kColumns; ++v)
#pragma unroll
                for (int s = 0; s < kS; ++s) {
                  if (!column_copied(v * kStrideW + s)) continue;
#pragma unroll
                  for (int e = 0; e < kVector; ++e)
                    sum[r][s][e] = fma(value[v * kStrideW + s][e], row[v][e], sum[r][s][e]);
                }
            }
          }
        }
        free_stage = free_stage == (kStages - 1) * stage_size ? 0 : free_stage + stage_size;
        const int step = stage == (kStages - 1) * stage_size ? -stage : stage_size;
        stage += step;
        own_x += step;
        own_dy += step;
        turn = next_turn();
      }
    }
  };
  go();
  ptx::copy_async_wait<0>();
  __syncthreads();

  // sums (entries, strips of all images, channels) of the block.
  Sum* const sums = reinterpret_cast<Sum*>(shared);
  const int block_strips = g.images * g.strips;
  const int pitch = block_strips * kChannels;
  Sum* const own_sums = sums + strip * kChannels + group * kVector;
  if (strip < block_strips) {
    Sum seen = 0;  // NaN if a sum is not finite
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        own_sums[tap * pitch + e] = sum[tap / kS][tap % kS][e];
        seen = fma(sum[tap / kS][tap % kS][e], Sum(0), seen);
      }
      if (kBias) own_sums[kTaps * pitch + e] = bias_sum[e];
      seen = fma(bias_sum[e], Sum(0), seen);
    }
    if (seen != seen) {
      for (int i = 0; i < kTaps * kVector; ++i) {
        const int tap = i / kVector;
        const int e = i % kVector;
        const int r = tap / kS;
        const int s = tap - r * kS;
        const int column = q * g.stride_w - g.left + s * unit_w;
        Sum total = 0;
        Walk walk;
        int p = begin(walk);
        while (true) {
          const int64 n = walk.first_image + image;
          for (int t = 0; t < walk.count && image < walk.images; ++t) {
            const int row = walk.row + t * g.down + r * unit_h;
            const T* const dy_from = dy + ((n * g.P + p + t * spacing_h) * g.Q + q) * g.K + k + e;
            const T* const x_from = x + ((n * g.H + row) * g.W + column) * g.K + k + e;
            for (int v = 0; v < kColumns && v * spacing_w < columns; ++v) {
              const int w = v * spacing_w * g.stride_w;
              const bool exists = within(row, g.H) && within(column + w, g.W);
              total = fma(exists ? widen(x_from[w * g.K]) : Sum(0), widen(dy_from[v * spacing_w * g.K]), total);
            }
          }
          if (walk.rows_left == 0) break;
          ++walk.step;
          p = enter(walk);
        }
        own_sums[tap * pitch + e] = total;
      }
    }
  }
  __syncthreads();
  const auto store = [&](int entry, Sum total) {
    const int tap = entry / kChannels;
    const int64 of_all = first_channel + (entry - tap * kChannels);
    if (of_all >= g.K) return;
    if (!kFinal) {
      partials[((static_cast<int64>(slab) * g.column_blocks + column_block) * kEntries + tap) * g.K + of_all] = total;
    } else if (tap < kTaps) {
      dw[of_all * kTaps + tap] = narrow<T>(total);
    } else {
      dbias[of_all] = narrow<T>(total);
    }
  };
  Sum* const totals = sums + kEntries * pitch;
  for (int entry = thread; entry < kEntries * kChannels; entry += kThreads) {
    const int tap = entry / kChannels;
    const int of_block = entry - tap * kChannels;
    Sum total = 0;
    for (int other = 0; other < block_strips; ++other) total += sums[tap * pitch + other * kChannels + of_block];
    if (kCluster > 1) {
      totals[entry] = total;
    } else {
      store(entry, total);
    }
  }
#if CUCONV_CLUSTER > 1
  add_of_cluster<kThreads>(totals, kEntries * kChannels, thread, store);
#endif
}
