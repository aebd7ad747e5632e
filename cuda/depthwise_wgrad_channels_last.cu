// Depthwise convolution, gradients of the weights and the bias, channels-last (NHWC in memory), on every architecture
// from sm_75 up.
//
// A thread owns a vector of neighbouring channels and R x S sums of each in registers, through a whole slab of dy.
// Neighbouring threads have neighbouring channels, and behind the last channel of the block the next strip: some
// columns of dy in one image. A thread goes down its strip, then down the next. In one turn it takes one row of dy and
// the rows of x, a stride of them, that come new with it; both were loaded DEPTH turns before, across the ends of
// strips. Rows of x meet the rows of dy of the last turns, which are a ring in registers, so that every row is loaded
// once. All strips of a block are at the same row. In the end the sums of threads that share channels are added in a
// fixed order; depthwise_wgrad_reduce does so with the partial sums of all slabs, where there are several.
//
// Compile-time values: T; R, S; BIAS (whether dbias is summed too); FINAL (there is one slab, and no need for another
// launch); MULTIPLIED (several channels of dy a channel of x); CHECKED (a strip may need columns that x does not have);
// EXACT (all columns of every strip exist); THREADS; BLOCKS (that a multiprocessor is to hold, which bounds the
// registers); VECTOR (channels of a thread: they divide C and K, and arrays start at multiples of them); COLUMNS (of a
// strip); DEPTH; STRIDE_H, STRIDE_W (of the strip, see below); DILATED.
//
// Dilation: rows of dy dilation / gcd(stride, dilation) apart need rows of x whole dilations apart. A strip of rows so
// far apart is one of an undilated convolution of stride / gcd, in units of `dilation` rows of x. Columns likewise.
#include "channels_last.cuh"
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr bool kMultiplied = CUCONV_MULTIPLIED;
constexpr bool kChecked = CUCONV_CHECKED;
constexpr bool kExact = CUCONV_EXACT;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kVector = CUCONV_VECTOR;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kDepth = CUCONV_DEPTH;
constexpr int kStrideH = CUCONV_STRIDE_H;
constexpr int kStrideW = CUCONV_STRIDE_W;
constexpr bool kDilated = CUCONV_DILATED;

constexpr int kTaps = kR * kS;
// What a channel has of partial sums: its weights' and its bias's.
constexpr int kEntries = kTaps + kBias;
// Columns of x that a strip needs, in units of the dilation.
constexpr int kSpan = (kColumns - 1) * kStrideW + kS;
// Rows of dy that one row of x meets.
constexpr int kRing = (kR + kStrideH - 1) / kStrideH;
// Turns in registers as they were loaded. Narrow elements are widened into other registers before the next turn is
// loaded; wide ones stay where they are until theirs is over.
constexpr int kLoaded = kDepth + (sizeof(T) >= 4);
// Registers are known at compile time: as many turns are unrolled as bring the ring and the loads around together. Any
// other number would move registers that are still waiting for memory.
constexpr int kUnrolled = least_common_multiple(kRing, kLoaded);

static_assert(kDepth >= 1, "a row is loaded before it is needed");
static_assert(kStrideH <= kR, "of a longer stride only the first kernel's worth of rows meets dy");
static_assert(!kMultiplied || kVector == 1, "channels of dy of one channel of x are no vector of it");
static_assert(kExact || kChecked, "columns of x that only missing columns of dy meet need not exist");

struct Parameters {
  int multiplier;             // channels of dy for each channel of x
  int K;                      // channels of dy
  int H, W, P, Q;
  int top, left;              // padding
  int stride_h, stride_w;     // of the convolution
  int dilation_h, dilation_w;
  int spacing_h, spacing_w;   // rows and columns from one element of a strip to the next
  int groups;                 // vectors of channels
  int block_groups;           // of a block
  int block_strips;           // side by side in a block
  int column_items;           // strips of an image
  int strips;                 // of all images
  int strip_rows;             // rows of dy in a strip; the last may lie beyond P where rows are apart
  int rows;                   // of all strips that a block's threads go down together, one after the other
  int slab_rows;              // of those, a block's
  uint32 column_items_magic;  // see divide
  int column_items_shift;
};

// What a turn needs: new rows of x, one row of dy or none, and whether some of the strip's columns of dy are missing.
struct Turn {
  Packed<T, kVector> x[kStrideH][kSpan];
  Packed<T, kVector> dy[kColumns];
  bool has_dy, part;
};

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_channels_last(const T* __restrict__ dy, const T* __restrict__ x, Sum* partials, T* dw, T* dbias,
                                  const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int own_strip = thread / g.block_groups;
  const int own_group = thread - own_strip * g.block_groups;
  const int group = static_cast<int>(blockIdx.x) * g.block_groups + own_group;
  const bool idle = own_strip >= g.block_strips || group >= g.groups;
  const int k = group * kVector;
  const int c = kMultiplied ? k / g.multiplier : k;
  const int C = kMultiplied ? g.K / g.multiplier : g.K;
  const int unit_h = kDilated ? g.dilation_h : 1;
  const int unit_w = kDilated ? g.dilation_w : 1;
  const int spacing_h = kDilated ? g.spacing_h : 1;
  const int spacing_w = kDilated ? g.spacing_w : 1;

  const int first_row = static_cast<int>(blockIdx.y) * g.slab_rows;
  const int first_item = first_row / g.strip_rows;
  const int rows = min(g.slab_rows, g.rows - first_row);
  // Behind the last row of every strip the rows of x go on, until all that meet it have been there.
  const int items = (first_row + rows - 1) / g.strip_rows - first_item + 1;
  const int turns = rows + items * (kRing - 1);

  // Where the thread is: in row t of a strip, which is row p of dy, and whose first tap is at (row, column) of x, which
  // need not exist. The block leaves the strip behind row t_end - 1, and has `rows_left` to go then.
  int item, t, t_end, rows_left;
  int p, row, column, columns;
  const T *x_source, *dy_source;
  bool column_within[kSpan];

  const auto start_slab = [&] {
    item = first_item;
    t = first_row - item * g.strip_rows;
    rows_left = rows;
  };
  const auto start_strip = [&] {
    const int step = kDilated ? item / spacing_h : item;
    const int strip = step * g.block_strips + own_strip;
    const int n = divide(strip, g.column_items_magic, g.column_items_shift);
    const int q = patch_start<kDilated>(strip - n * g.column_items, kColumns, spacing_w);
    columns = !idle && strip < g.strips && rows_left > 0 ? g.Q - q : 0;  // that exist from the first on
    t_end = min(g.strip_rows, t + rows_left);
    rows_left -= t_end - t;
    p = item - step * spacing_h + t * spacing_h;
    row = p * g.stride_h - g.top;
    column = columns > 0 ? q * g.stride_w - g.left : g.W;
    dy_source = dy + ((static_cast<int64>(n) * g.P + p) * g.Q + q) * g.K + k;
    x_source = x + ((static_cast<int64>(n) * g.H + row) * g.W + column) * C + c;
#pragma unroll
    for (int j = 0; j < kSpan; ++j)
      column_within[j] = kChecked ? within(column + j * unit_w, g.W) : columns > 0;
  };
  const auto next_row = [&] {
    ++t;
    p += spacing_h;
    row += spacing_h * g.stride_h;
    dy_source += static_cast<int64>(spacing_h) * g.Q * g.K;
    x_source += static_cast<int64>(spacing_h * g.stride_h) * g.W * C;
  };
  const auto dy_exists = [&](int v) { return (kExact ? 0 : v) * spacing_w < columns; };
  const auto load = [&](Turn& turn) {
    if (t == t_end + kRing - 1) {
      ++item;
      t = 0;
      start_strip();
    }
    turn.has_dy = t < t_end && (!kDilated || p < g.P);
    turn.part = !kExact && columns > 0 && !dy_exists(kColumns - 1);
    dy_source = ptx::as_it_is(dy_source);
    x_source = ptx::as_it_is(x_source);
#pragma unroll
    for (int v = 0; v < kColumns; ++v)
      turn.dy[v] = load_packed<kVector>(dy_source + v * spacing_w * g.K, turn.has_dy && dy_exists(v));
    const T* source = x_source;
#pragma unroll
    for (int a = 0; a < kStrideH; ++a) {
      const bool row_within = within(row + a * unit_h, g.H);
#pragma unroll
      for (int j = 0; j < kSpan; ++j)
        turn.x[a][j] = load_packed<kVector>(source + j * unit_w * C, row_within && column_within[j]);
      source += static_cast<int64>(unit_h) * g.W * C;
    }
    next_row();
  };

  Turn loaded[kLoaded];
  start_slab();
  start_strip();
#pragma unroll
  for (int i = 0; i < kDepth; ++i) load(loaded[i]);

  Sum sum[kR][kS][kVector] = {};
  Sum bias_sum[kVector] = {};
  // For speed, missing columns of dy count as zeros, which is wrong where they meet an x that is not finite: whether
  // one was seen there, a NaN that stays one, or zero.
  Sum seen[kVector] = {};
  Sum gradient[kRing][kColumns][kVector] = {};
  bool has_dy[kRing] = {};
  const auto go = [&] {
    for (int first = 0; first < turns; first += kUnrolled) {
#pragma unroll
      for (int i = 0; i < kUnrolled; ++i) {
        if (i > 0 && first + i >= turns) return;
        const Turn& turn = loaded[i % kLoaded];
        Sum value[kStrideH][kSpan][kVector];
#pragma unroll
        for (int a = 0; a < kStrideH; ++a)
#pragma unroll
          for (int j = 0; j < kSpan; ++j) widen_packed<T>(turn.x[a][j], value[a][j]);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) widen_packed<T>(turn.dy[v], gradient[i % kRing][v]);
        has_dy[i % kRing] = turn.has_dy;
        const bool part = turn.part;
        load(loaded[(i + kDepth) % kLoaded]);

        if (kBias) {
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
#pragma unroll
            for (int e = 0; e < kVector; ++e) bias_sum[e] += gradient[i % kRing][v][e];
        }
        if (!kExact && part) {
#pragma unroll
          for (int a = 0; a < kStrideH; ++a)
#pragma unroll
            for (int j = 0; j < kSpan; ++j)
#pragma unroll
              for (int e = 0; e < kVector; ++e) seen[e] = fma(value[a][j][e], Sum(0), seen[e]);
        }
#pragma unroll
        for (int before = 0; before < kRing; ++before) {
          const int place = (i + kRing - before) % kRing;
          if (!has_dy[place]) continue;
#pragma unroll
          for (int a = 0; a < kStrideH; ++a) {
            const int r = a + before * kStrideH;
            if (r >= kR) continue;
#pragma unroll
            for (int v = 0; v < kColumns; ++v)
#pragma unroll
              for (int s = 0; s < kS; ++s)
#pragma unroll
                for (int e = 0; e < kVector; ++e)
                  sum[r][s][e] = fma(value[a][v * kStrideW + s][e], gradient[place][v][e], sum[r][s][e]);
          }
        }
      }
    }
  };
  go();

  // sums (entries, strips, channels) of the block.
  Sum* const sums = reinterpret_cast<Sum*>(shared);
  const int channels = g.block_groups * kVector;
  Sum* const own_sums = sums + own_strip * channels + own_group * kVector;
  const int pitch = g.block_strips * channels;
  if (own_strip < g.block_strips) {
    Sum all_seen = 0;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) own_sums[tap * pitch + e] = sum[tap / kS][tap % kS][e];
      if (kBias) own_sums[kTaps * pitch + e] = bias_sum[e];
      all_seen += seen[e];
    }
    if (!kExact && all_seen != all_seen) {
      // Once more for data that are not all finite, tap by tap and element by element.
      for (int i = 0; i < kTaps * kVector; ++i) {
        const int tap = i / kVector;
        const int e = i % kVector;
        const int r = tap / kS;
        const int s = tap - r * kS;
        Sum total = 0;
        for (start_slab(); rows_left > 0; ++item, t = 0) {
          for (start_strip(); t < t_end; next_row()) {
            for (int v = 0; v < kColumns && p < g.P && v * spacing_w < columns; ++v) {
              const int h = r * unit_h;
              const int w = v * spacing_w * g.stride_w + s * unit_w;
              const bool exists = within(row + h, g.H) && within(column + w, g.W);
              const T* const source = x_source + (static_cast<int64>(h) * g.W + w) * C + e;
              total = fma(exists ? widen(*source) : Sum(0), widen(dy_source[v * spacing_w * g.K + e]), total);
            }
          }
        }
        own_sums[tap * pitch + e] = total;
      }
    }
  }
  __syncthreads();
  for (int entry = thread; entry < kEntries * channels; entry += kThreads) {
    const int tap = entry / channels;
    const int of_block = entry - tap * channels;
    const int64 of_all = static_cast<int64>(blockIdx.x) * channels + of_block;
    if (of_all >= g.K) continue;
    Sum total = 0;
    for (int strip = 0; strip < g.block_strips; ++strip) total += sums[tap * pitch + strip * channels + of_block];
    if (!kFinal) {
      partials[(static_cast<int64>(blockIdx.y) * kEntries + tap) * g.K + of_all] = total;
    } else if (tap < kTaps) {
      dw[of_all * kTaps + tap] = narrow<T>(total);
    } else {
      dbias[of_all] = narrow<T>(total);
    }
  }
}
