// Depthwise convolution, channels-last (NHWC in memory): forward, and the gradient of the input. For the gradient the
// names keep their places and change their meaning: x is dy and y is dx, that is, what is read and what is written.
//
// A thread makes a patch of the output: some rows by some columns of a vector of neighbouring channels. Neighbouring
// threads have neighbouring channels, and behind the last channel the next columns, so that a warp loads and stores
// whole runs of memory whatever the number of channels. A thread goes down the rows of x that its patch needs; every
// row is loaded once, DEPTH rows before its turn, and meets all outputs that need it, whose sums are a ring in
// registers; a row of outputs is stored as soon as its last row of x has been there. What neighbouring patches share
// comes out of the caches.
//
// Few outputs are done before the device is full, and then what counts is how often a thread waits for memory: it may
// load all rows of a patch at once, whose number is then known at compile time.
//
// Compile-time values: T; R, S; TRANSPOSED (the gradient); MULTIPLIED (several output channels an input channel);
// THREADS; VECTOR (channels of a thread: they divide C and K, and arrays start at multiples of them); COLUMNS (of a
// patch); DEPTH; ROWS (of a patch that loads all rows at once, which are DEPTH; 0 elsewhere); STRIDE_H, STRIDE_W (of
// the patch, see below); DILATED.
//
// Dilation: output rows dilation / gcd(stride, dilation) apart need input rows whole dilations apart. A patch of rows
// so far apart is a patch of an undilated convolution of stride / gcd, in units of `dilation` input rows. Columns
// likewise.
//
// The gradient: row i of dy and kernel row r meet row i * stride + r - top of dx. A patch starts where that is i *
// stride for kernel row 0, so that which rows meet is known at compile time; for this it takes strides without
// dilation, and dilations without stride.
#include "channels_last.cuh"
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kTransposed = CUCONV_TRANSPOSED;
constexpr bool kMultiplied = CUCONV_MULTIPLIED;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kVector = CUCONV_VECTOR;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kDepth = CUCONV_DEPTH;
constexpr int kRows = CUCONV_ROWS;
constexpr int kStrideH = CUCONV_STRIDE_H;
constexpr int kStrideW = CUCONV_STRIDE_W;
constexpr bool kDilated = CUCONV_DILATED;

// Left to itself the compiler aims at 128 registers and spills, but in float64; 384 threads may have 168.
constexpr int kMinBlocks = sizeof(T) < 8 ? 384 / kThreads : 1;
constexpr int kTaps = kR * kS;
// Rows and columns of dy before the one that kernel row and column 0 bring to the patch's first row and column.
constexpr int kBackH = kTransposed ? (kR - 1) / kStrideH : 0;
constexpr int kBackW = kTransposed ? (kS - 1) / kStrideW : 0;
// Columns of x that a patch needs, in units of the dilation.
constexpr int kSpanW = kTransposed ? kBackW + (kColumns - 1) / kStrideW + 1 : (kColumns - 1) * kStrideW + kS;
// Rows of outputs that one row of x meets, and after how many rows of x the ring of their sums comes around.
constexpr int kRing = kTransposed ? (kBackH + 1) * kStrideH : (kR + kStrideH - 1) / kStrideH;
constexpr int kPeriod = kTransposed ? kBackH + 1 : kRing * kStrideH;

// So that registers are known at compile time, as many rows are unrolled as bring sums and loads around together.
constexpr int kUnrolled = least_common_multiple(kPeriod, kDepth);

static_assert(kDepth >= 1, "a row is loaded before it is needed");
static_assert(!kRows || kDepth == (kTransposed ? kBackH + (kRows - 1) / kStrideH + 1 : (kRows - 1) * kStrideH + kR),
              "all rows at once are those that the patch needs");
static_assert(!kMultiplied || (kVector == 1 && !kTransposed),
              "output channels of one input channel are no vector of it");
static_assert(!kTransposed || kColumns % kStrideW == 0, "patches start at whole strides");

struct Parameters {
  int multiplier;               // output channels for each input channel
  int K;                        // output channels
  int H, W, P, Q;
  int top, left;                // padding of the forward convolution
  int stride_h, stride_w;       // of the convolution
  int dilation_h, dilation_w;
  int spacing_h, spacing_w;     // rows and columns from one output of a patch to the next
  int rows;                     // outputs of a patch, one below the other; of the gradient a multiple of the stride
  int groups;                   // vectors of output channels
  int column_items, row_items;  // patches of an image and a group
  int items;                    // patches altogether
  uint32 groups_magic, column_items_magic, row_items_magic;  // see divide
  int groups_shift, column_items_shift, row_items_shift;
};

// The column of a patch that column j of its input meets through kernel column s, or one outside of the patch.
__device__ __forceinline__ constexpr int column_met(int j, int s) {
  if (kTransposed) return (j - kBackW) * kStrideW + s;
  return j < s || (j - s) % kStrideW != 0 ? -1 : (j - s) / kStrideW;
}

// Likewise the row of the patch that row i meets through kernel row r.
__device__ __forceinline__ constexpr int row_of_patch_met(int i, int r) {
  if (kTransposed) return (i - kBackH) * kStrideH + r;
  return i < r || (i - r) % kStrideH != 0 ? -1 : (i - r) / kStrideH;
}

// The place in the ring of the row that row i of a patch's input meets through kernel row r, or -1 where there is none.
__device__ __forceinline__ constexpr int row_met(int i, int r) {
  if (kTransposed) return ((i + 1) % kPeriod * kStrideH + r) % kRing;
  const int first = (i - r + kPeriod * kR) % kPeriod;
  return first % kStrideH == 0 ? first / kStrideH : -1;
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    depthwise_channels_last(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                            T* __restrict__ y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int first_item = static_cast<int>(blockIdx.x) * kThreads;

  // Threads behind the last patch look at that, and store nothing.
  const int item = min(first_item + thread, g.items - 1);
  const int column_item = divide(item, g.groups_magic, g.groups_shift);
  const int row_item = divide(column_item, g.column_items_magic, g.column_items_shift);
  const int n = divide(row_item, g.row_items_magic, g.row_items_shift);
  const int group = item - column_item * g.groups;
  const int k = group * kVector;
  const int C = kMultiplied ? g.K / g.multiplier : g.K;
  const int c = kMultiplied ? k / g.multiplier : k;

  // The patch begins at (p, q) of y; its first tap is at (row, column) of x, which need not exist.
  int p = patch_start<kDilated>(row_item - n * g.row_items, g.rows, g.spacing_h);
  int q = patch_start<kDilated>(column_item - row_item * g.column_items, kColumns, g.spacing_w);
  const int unit_h = kDilated ? g.dilation_h : 1;
  const int unit_w = kDilated ? g.dilation_w : 1;
  int row = p * g.stride_h - g.top;
  int column = q * g.stride_w - g.left;
  if constexpr (kTransposed) {
    p -= g.top % kStrideH;
    q -= g.left % kStrideW;
    row = (p + g.top) / kStrideH - kBackH * unit_h;
    column = (q + g.left) / kStrideW - kBackW * unit_w;
  }
  // Of the rows of y from p on those within [low, high) are stored; they need so many rows of x.
  const int spacing_h = kDilated ? g.spacing_h : 1;
  const int spacing_w = kDilated ? g.spacing_w : 1;
  const int low = max(p, 0);
  const int high = min(p + g.rows * spacing_h, g.P);
  const int last = (high - 1 - p) / spacing_h;
  const int inputs = kTransposed ? last / kStrideH + kBackH + 1 : last * kStrideH + kR;
  const int row_end = max(0, min(g.H, row + inputs * unit_h));

  const int pixel = unit_w * C;
  const int64 line = static_cast<int64>(unit_h) * g.W * C;
  const T* source = x + ((static_cast<int64>(n) * g.H + row) * g.W + column) * C + c;
  bool column_within[kSpanW];
#pragma unroll
  for (int j = 0; j < kSpanW; ++j) column_within[j] = within(column + j * unit_w, g.W);

  Packed<T, kVector> loaded[kDepth][kSpanW];
  const auto load = [&](Packed<T, kVector> (&destination)[kSpanW]) {
    const bool row_within = within(row, row_end);
    source = ptx::as_it_is(source);
#pragma unroll
    for (int j = 0; j < kSpanW; ++j)
      destination[j] = load_packed<kVector>(source + j * pixel, row_within && column_within[j]);
    source += line;
    row += unit_h;
  };
#pragma unroll
  for (int i = 0; i < kDepth; ++i) load(loaded[i]);
  Sum start[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) start[e] = bias == nullptr ? Sum(0) : widen(bias[k + e]);

  // The block's weights as they lie in memory, while the first rows are on their way: those of the groups from its
  // first thread's on, around the end to the first group again.
  T* const staged = reinterpret_cast<T*>(shared);
  const int first_group = first_item - divide(first_item, g.groups_magic, g.groups_shift) * g.groups;
  const int all = g.K * kTaps;
  const int count = min(g.groups, kThreads) * (kVector * kTaps);
  if constexpr (kRows > 0) {
    // All on their way before the first is waited for: without a branch for each, some are loaded twice instead.
    T part[kVector * kTaps];
#pragma unroll
    for (int n = 0; n < kVector * kTaps; ++n) {
      const int from = first_group * (kVector * kTaps) + min(thread + n * kThreads, count - 1);
      part[n] = w[from < all ? from : from - all];
    }
#pragma unroll
    for (int n = 0; n < kVector * kTaps; ++n) staged[min(thread + n * kThreads, count - 1)] = part[n];
  } else {
#pragma unroll 8
    for (int i = thread; i < count; i += kThreads) {
      const int from = first_group * (kVector * kTaps) + i;
      staged[i] = w[from < all ? from : from - all];
    }
  }
  __syncthreads();
  if (first_item + thread >= g.items) return;

  const int slot = group < first_group ? group - first_group + g.groups : group - first_group;
  Sum weight[kR][kS][kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e)
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int s = 0; s < kS; ++s) weight[r][s][e] = widen(staged[(slot * kVector + e) * kTaps + r * kS + s]);

  if constexpr (kRows > 0) {
    Sum sum[kRows > 0 ? kRows : 1][kColumns][kVector];
#pragma unroll
    for (int t = 0; t < kRows; ++t)
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[t][v][e] = start[e];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      Sum value[kSpanW][kVector];
#pragma unroll
      for (int j = 0; j < kSpanW; ++j) widen_packed<T>(loaded[i][j], value[j]);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const int t = row_of_patch_met(i, r);
        if (t < 0 || t >= kRows) continue;
#pragma unroll
        for (int s = 0; s < kS; ++s)
#pragma unroll
          for (int j = 0; j < kSpanW; ++j) {
            const int v = column_met(j, s);
            if (v < 0 || v >= kColumns) continue;
#pragma unroll
            for (int e = 0; e < kVector; ++e) sum[t][v][e] = fma(value[j][e], weight[r][s][e], sum[t][v][e]);
          }
      }
    }
    T* row_of_y = y + ((static_cast<int64>(n) * g.P + p) * g.Q + q) * g.K + k;
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (within(p + t * spacing_h - low, high - low) && within(q + v * spacing_w, g.Q))
          store_narrowed<kVector>(row_of_y + v * spacing_w * g.K, sum[t][v]);
      row_of_y += static_cast<int64>(spacing_h) * g.Q * g.K;
    }
    return;
  }

  // The first rows of x also meet rows of y above the patch, and the last ones below: their sums are thrown away.
  Sum sum[kRing][kColumns][kVector];
  const auto restart = [&](int place) {
#pragma unroll
    for (int v = 0; v < kColumns; ++v)
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[place][v][e] = start[e];
  };
#pragma unroll
  for (int place = 0; place < kRing; ++place) restart(place);
  p -= (kTransposed ? kBackH * kStrideH : (kR - 1) / kStrideH) * spacing_h;
  T* result = y + ((static_cast<int64>(n) * g.P + p) * g.Q + q) * g.K + k;

  for (int first = 0; first < inputs; first += kUnrolled) {
#pragma unroll
    for (int i = 0; i < kUnrolled; ++i) {
      if (i > 0 && first + i >= inputs) return;
      Sum value[kSpanW][kVector];
#pragma unroll
      for (int j = 0; j < kSpanW; ++j) widen_packed<T>(loaded[i % kDepth][j], value[j]);
      load(loaded[i % kDepth]);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const int place = row_met(i, r);
        if (place < 0) continue;
#pragma unroll
        for (int s = 0; s < kS; ++s)
#pragma unroll
          for (int j = 0; j < kSpanW; ++j) {
            const int v = column_met(j, s);
            if (v < 0 || v >= kColumns) continue;
#pragma unroll
            for (int e = 0; e < kVector; ++e) sum[place][v][e] = fma(value[j][e], weight[r][s][e], sum[place][v][e]);
          }
      }
      // Rows of y that no later row of x meets: one at its last kernel row, of the gradient a stride of them.
#pragma unroll
      for (int done = 0; done < (kTransposed ? kStrideH : 1); ++done) {
        const int place = kTransposed ? ((i + 1) % kPeriod * kStrideH + done) % kRing : row_met(i, kR - 1);
        if (place < 0) continue;
        result = ptx::as_it_is(result);
        const bool row_within = within(p - low, high - low);
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
          if (row_within && within(q + v * spacing_w, g.Q))
            store_narrowed<kVector>(result + v * spacing_w * g.K, sum[place][v]);
        restart(place);
        p += spacing_h;
        result += static_cast<int64>(spacing_h) * g.Q * g.K;
      }
    }
  }
}
