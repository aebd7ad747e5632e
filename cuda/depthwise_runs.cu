// Depthwise convolution, NCHW, by runs (sm_90 and newer): forward, and the gradient of the input, which is the
// convolution of dy, spread by the stride, with the kernel turned around. The names are the forward pass's.
//
// A block owns a run of the output: some rows of one plane, or some whole neighbouring planes. The input rows that it
// needs, halo included and full width, are a run too. One bulk copy brings it, lanes take columns and slide down the
// rows, one bulk copy takes the results back. A block may do so for the same planes of several images in turn: its
// weights then stay in registers, and the next image is on its way while this one is worked on.
//
// Compile-time values: T; R, S; PADDED (a tap may fall outside x); TURNED (the kernel, both ways); MULTIPLIED (several
// output channels an input channel); SUMMED (an output channel is the sum over several input channels, each with
// weights of its own); THREADS; STAGES (images under way at once); ROWS, COLUMNS (outputs of a thread, its patch);
// STRIDE_H, STRIDE_W (of the patch, see below); SPREAD_H, SPREAD_W, FIRST_H, FIRST_W (see below); DILATED; VECTOR,
// OUT_VECTOR (elements of one load and one store of shared memory: they divide W and Q, and runs start at multiples of
// them); LEFT (what padding adds to a column, modulo VECTOR); WIDTH (W where a patch spans the whole row, so that what
// falls outside is known at compile time, and LEFT is the padding itself; 0 elsewhere); HEIGHT, TOP (H and the padding
// where a patch spans the whole plane from top to bottom; 0 elsewhere); PAIRED (where columns are dilated: every two
// columns of a patch are neighbours, of which the first starts a pair of elements of x, be it a column before the row).
//
// Spread: x's rows are SPREAD_H apart, as if there were SPREAD_H - 1 rows between any two, which no tap meets. Patches
// start at multiples of SPREAD_H, so that in each of them the first row of x is met by tap FIRST_H of the first output,
// or would be if the kernel were so high, and what meets what is known at compile time. `top` counts rows of x, rounded
// down. Columns likewise. An axis is spread or has strides and dilations, not both.
//
// Dilation: output rows dilation / gcd(stride, dilation) apart need input rows whole dilations apart. A patch of rows
// so far apart is a patch of an undilated convolution of stride / gcd, in units of `dilation` input rows. Columns
// likewise.
#include "patches.cuh"
#include "runs.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kPadded = CUCONV_PADDED;
constexpr bool kTurned = CUCONV_TURNED;
constexpr bool kMultiplied = CUCONV_MULTIPLIED;
constexpr bool kSummed = CUCONV_SUMMED;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kRows = CUCONV_ROWS;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kStrideH = CUCONV_STRIDE_H;
constexpr int kStrideW = CUCONV_STRIDE_W;
constexpr int kSpreadH = CUCONV_SPREAD_H;
constexpr int kSpreadW = CUCONV_SPREAD_W;
constexpr int kFirstH = CUCONV_FIRST_H;
constexpr int kFirstW = CUCONV_FIRST_W;
constexpr bool kDilated = CUCONV_DILATED;
constexpr int kVector = CUCONV_VECTOR;
constexpr int kOutVector = CUCONV_OUT_VECTOR;
constexpr int kLeft = CUCONV_LEFT;
constexpr int kWidth = CUCONV_WIDTH;
constexpr int kTop = CUCONV_TOP;
constexpr int kHeight = CUCONV_HEIGHT;
constexpr bool kPaired = CUCONV_PAIRED;

// Rows and columns of x that a patch needs, in units of the dilation.
constexpr int kSpanH = ((kRows - 1) * kStrideH + kR - kFirstH + kSpreadH - 1) / kSpreadH;
constexpr int kSpanW = kPaired ? 2 * (kColumns / 2 - 1 + kS)
                              : ((kColumns - 1) * kStrideW + kS - kFirstW + kSpreadW - 1) / kSpreadW;

// What the padding adds to sums is a zero, unless a weight is infinite or NaN. Taps of which it is known at compile
// time that they fall into the padding are therefore passed over, and added where weights ask for it.
__device__ constexpr bool outside(int i, int j) {
  return (kHeight > 0 && (i < kTop || i >= kTop + kHeight)) || (kWidth > 0 && (j < kLeft || j >= kLeft + kWidth));
}
constexpr bool kPassedOver = kPadded && (kHeight > 0 || kWidth > 0);

template <bool kInPairs>
struct RowOf {
  using type = RowOfPatch<T, kSpanW, kVector, kLeft, kWidth>;
};
template <>
struct RowOf<true> {
  using type = PairsOfPatch<T, kSpanW / 2>;
};
using Row = RowOf<kPaired>::type;

static_assert(!kMultiplied || !kSummed, "channels multiply one way");
static_assert(kStages == 1 || kStages == 2, "one image, or several with two under way");
static_assert(!kDilated || (kVector == 1 && kOutVector == 1 && kWidth == 0), "dilated columns are no vectors");
static_assert(kFirstH < kSpreadH && kFirstW < kSpreadW && kSpanH > 0 && kSpanW > 0, "a patch meets some of x");
static_assert((kSpreadH == 1 || kStrideH == 1) && (kSpreadW == 1 || kStrideW == 1), "an axis has one of the two");
static_assert(kWidth || kColumns % kSpreadW == 0, "every patch starts at the same place between two columns");
static_assert(kWidth || kColumns / kSpreadW * kStrideW % kVector == 0, "every patch starts at one place of a vector");
static_assert(kColumns % kOutVector == 0, "patches are whole vectors");
static_assert(!kPaired || (kDilated && kStrideW == 1 && kSpreadW == 1 && kColumns % 2 == 0 && !kSummed),
              "pairs lie apart in rows that are not strided");

struct Parameters {
  int multiplier;                  // output planes for each input plane, or input planes for each output plane
  int K;                           // output channels; weights repeat after so many output planes
  int H, W, P, Q;
  int top, left;                   // padding
  int stride_h, stride_w;          // of the convolution
  int dilation_h, dilation_w;
  int spacing_h, spacing_w;        // rows and columns from one output of a patch to the next
  int row_items, column_items;     // patches of a block in one plane
  uint32 items_magic, column_items_magic, spacing_h_magic, spacing_w_magic, K_magic;  // see divide
  int image_planes;                // output planes from one image to the next: a multiple of K
  int last_image_planes;           // those of the last image
  int images;
  int block_planes;                // output planes of a block in one image; 1 unless they are whole
  int block_rows;                  // output rows of a block
  int block_images;                // images that a block works on in turn
  int addend;                      // shared elements from one input plane to the next of those that are summed
  int input_bytes, output_bytes;   // shared bytes of one image's runs
  int64 total_x;                   // elements of x
};

// The input plane, or the first of them, of an output plane.
__device__ __forceinline__ int input_plane_of(int output_plane, const Parameters& g) {
  if constexpr (kSummed) return output_plane * g.multiplier;
  return kMultiplied ? output_plane / g.multiplier : output_plane;
}

__device__ __forceinline__ void load_weights(const T* w, int64 channel, Sum (&weight)[kR][kS]) {
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      const int tap = kTurned ? kR * kS - 1 - (r * kS + s) : r * kS + s;
      weight[r][s] = widen(w[channel * (kR * kS) + tap]);
    }
}

// Calls `add(j, r, s, t, v)` for every product with row i of x, as the patch has it: its column j meets tap (r, s) of
// output (t, v).
template <class Add>
__device__ __forceinline__ void for_products_of_row(int i, Add add) {
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int beyond = kFirstH + i * kSpreadH - r;
    if (beyond < 0 || beyond % kStrideH != 0 || beyond / kStrideH >= kRows) continue;
#pragma unroll
    for (int v = 0; v < kColumns; ++v)
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        const int j = kPaired ? 2 * (v / 2 + s) + v % 2 : v * kStrideW + s - kFirstW;
        if (j >= 0 && j % kSpreadW == 0) add(j / kSpreadW, r, s, beyond / kStrideH, v);
      }
  }
}

// Whether no weight is infinite or NaN.
__device__ __forceinline__ bool all_finite(const Sum (&weight)[kR][kS]) {
  Sum seen = 0;
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int s = 0; s < kS; ++s) seen = fma(weight[r][s], Sum(0), seen);
  return seen == Sum(0);
}

// All outputs of a patch. `source` is the element of x of the first output's first tap, at (row, column); neither need
// exist. Every row of x that the patch needs is loaded once and meets all the outputs that need it.
__device__ __forceinline__ void convolve(const Parameters& g, const T* source, int row, int column,
                                         const Sum (&weight)[kR][kS], Sum (&sum)[kRows][kColumns]) {
  const int unit_h = kDilated ? g.dilation_h : 1;
  const int unit_w = kDilated ? g.dilation_w : 1;
  Row x_row;
  x_row.template place<kPadded>(column, unit_w, g.W);
#pragma unroll
  for (int i = 0; i < kSpanH; ++i) {
    if (!kHeight || (kTop <= i && i < kTop + kHeight)) {
      Sum value[kSpanW];
      x_row.load(source, !kPadded || kHeight || within(row, g.H), unit_w, value);
      for_products_of_row(i, [&](int j, int r, int s, int t, int v) {
        if (!outside(i, j)) sum[t][v] = fma(value[j], weight[r][s], sum[t][v]);
      });
    }
    source += unit_h * g.W;
    row += unit_h;
  }
}

// What convolve has passed over.
__device__ __forceinline__ void add_padding(const Sum (&weight)[kR][kS], Sum (&sum)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kSpanH; ++i)
    for_products_of_row(i, [&](int j, int r, int s, int t, int v) {
      if (outside(i, j)) sum[t][v] = fma(Sum(0), weight[r][s], sum[t][v]);
    });
}

// Stores what exists of a patch: `rows` and `columns` from its first output on.
__device__ __forceinline__ void store_patch(const Parameters& g, T* result, int rows, int columns,
                                            const Sum (&sum)[kRows][kColumns]) {
  const int spacing_h = kDilated ? g.spacing_h : 1;
  const int spacing_w = kDilated ? g.spacing_w : 1;
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
#pragma unroll
    for (int v = 0; v < kColumns; v += kOutVector) {
      const int column = kPaired ? v / 2 * spacing_w + v % 2 : v * spacing_w;
      // The first of a pair may be a column before the row.
      const bool exists = column < columns && (!kPaired || v > 0 || columns <= g.Q);
      if (t * spacing_h < rows && exists) store_narrowed<kOutVector>(result + column, &sum[t][v]);
    }
    result += spacing_h * g.Q;
  }
}

// Whether an address is the second element's of a pair.
__device__ __forceinline__ bool in_midst_of_pair(const T* address) {
  return reinterpret_cast<uint64>(address) / sizeof(T) % 2 != 0;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    depthwise_runs(const T* x, const T* w, const T* bias, T* y, const __grid_constant__ Parameters g) {
  // Results, and then inputs: pairs are also loaded from before the first run, and masked.
  CUCONV_DYNAMIC_SHARED(shared);
  unsigned char* const inputs = shared + kStages * g.output_bytes;
  __shared__ uint64 full[kStages];
  const int thread = static_cast<int>(threadIdx.x);
  const int first_image = static_cast<int>(blockIdx.z) * g.block_images;
  const int images = min(g.block_images, g.images - first_image);

  // The output rows [p0, p0 + rows) of planes [k0, k0 + planes) of every image need the input rows [low, high) of
  // planes from c0 on, where they exist.
  const int p0 = static_cast<int>(blockIdx.x) * g.block_rows;
  const int rows = min(g.block_rows, g.P - p0);
  const int k0 = static_cast<int>(blockIdx.y) * g.block_planes;
  const int c0 = input_plane_of(k0, g);
  const int top_row = p0 / kSpreadH * g.stride_h - g.top;
  const int reach = (rows - 1) * g.stride_h + (kR - 1) * g.dilation_h;
  const int low = min(max(top_row, 0), g.H);
  const int high = max(low, min(g.H, top_row + (reach - kFirstH + kSpreadH) / kSpreadH));
  const int64 input_plane = static_cast<int64>(g.H) * g.W;
  const int64 output_plane = static_cast<int64>(g.P) * g.Q;
  const int64 input_image = input_plane_of(g.image_planes, g) * input_plane;
  const int64 output_image = g.image_planes * output_plane;
  const T* const x_run = x + first_image * input_image + c0 * input_plane + static_cast<int64>(low) * g.W;
  T* const y_run = y + first_image * output_image + k0 * output_plane + static_cast<int64>(p0) * g.Q;

  const auto planes_of = [&](int turn) {
    const int image_planes = first_image + turn == g.images - 1 ? g.last_image_planes : g.image_planes;
    return min(g.block_planes, image_planes - k0);
  };
  // Where planes are whole, those that are summed are neighbours in one run; else every one of them is a run.
  const bool whole = g.block_planes > 1;
  const int summed = kSummed ? g.multiplier : 1;
  const int runs = kSummed && !whole ? summed : 1;
  const auto load = [&](int turn) {
    const int others = input_plane_of(k0 + planes_of(turn) - 1, g) - c0 + (summed - runs);
    const T* const start = x_run + turn * input_image;
    T* const copy = run_in_shared(start, inputs + turn % kStages * g.input_bytes);
    const int count = static_cast<int>(others * input_plane) + (high - low) * g.W;
    if (runs == 1) {
      load_run(Run<const T>(start, count, copy, x, x + g.total_x), &full[turn % kStages], thread);
      return;
    }
    for (int m = 0; m < runs; ++m)
      load_run(Run<const T>(start + m * input_plane, count, copy + m * g.addend), &full[turn % kStages], thread);
  };

  if (thread < kWarp) {
    if (thread == 0)
      for (int stage = 0; stage < kStages; ++stage) ptx::barrier_init(&full[stage], kWarp * runs);
    __syncwarp();
    for (int turn = 0; turn < kStages; ++turn)
      if (turn < images) load(turn);
  }

  // A thread's part of the block's output stays the same in every image: patches `item`, `item + step`, ... of a plane.
  const int items = g.row_items * g.column_items;
  const int plane = whole ? divide(thread, g.items_magic) : 0;
  const int first_item = thread - plane * items;
  const int step = whole ? items : kThreads;
  const int k = k0 + min(plane, g.block_planes - 1);
  const int channel = min(k - divide(k, g.K_magic) * g.K, g.K - 1);
  const int plane_offset = static_cast<int>((input_plane_of(k0 + plane, g) - c0) * input_plane);

  Sum weight[kR][kS];
  bool finite = true;
  if constexpr (!kSummed) {
    load_weights(w, channel, weight);
    finite = all_finite(weight);
  }
  const Sum start = bias == nullptr ? Sum(0) : widen(bias[channel]);
  __syncthreads();

  for (int turn = 0; turn < images; ++turn) {
    const T* const input = run_in_shared(x_run + turn * input_image, inputs + turn % kStages * g.input_bytes);
    unsigned char* const buffer = shared + turn % kStages * g.output_bytes;
    T* const output = run_in_shared(y_run + turn * output_image, buffer);
    ptx::barrier_wait(&full[turn % kStages], turn / kStages % 2);

    if (plane < planes_of(turn)) {
      for (int item = first_item; item < items; item += step) {
        int p = divide(item, g.column_items_magic);
        int q = item - p * g.column_items;
        if constexpr (kDilated) {
          const int row_group = divide(p, g.spacing_h_magic);
          const int column_group = divide(q, g.spacing_w_magic);
          p += row_group * (kRows - 1) * g.spacing_h;
          q = kPaired ? 2 * q + column_group * (kColumns / 2 - 1) * g.spacing_w
                     : q + column_group * (kColumns - 1) * g.spacing_w;
        } else {
          p *= kRows;
          q *= kColumns;
        }
        const int row = top_row + p / kSpreadH * g.stride_h;
        int column = q / kSpreadW * g.stride_w - g.left;
        const T* source = input + plane_offset + (row - low) * g.W + column;
        if (kPaired && in_midst_of_pair(source)) {
          --q;
          --column;
          --source;
        }
        Sum sum[kRows][kColumns];
#pragma unroll
        for (int t = 0; t < kRows; ++t)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) sum[t][v] = start;
        const auto add_plane = [&](const T* source) {
          convolve(g, source, row, column, weight, sum);
          if (kPassedOver && !finite) add_padding(weight, sum);
        };
        if constexpr (kSummed) {
#pragma unroll 1
          for (int m = 0; m < summed; ++m) {
            load_weights(w, static_cast<int64>(channel) * summed + m, weight);
            finite = all_finite(weight);
            add_plane(source + m * g.addend);
          }
        } else {
          add_plane(source);
        }

        store_patch(g, output + plane * static_cast<int>(output_plane) + p * g.Q + q, rows - p, g.Q - q, sum);
      }
    }

    // The store before this one has long read its buffer; the next image's results may then go there.
    if (thread == 0) ptx::bulk_store_wait_read<0>();
    ptx::fence_shared_for_bulk();
    __syncthreads();
    if (thread < kWarp) {
      const int count = static_cast<int>((planes_of(turn) - 1) * output_plane) + rows * g.Q;
      store_run(Run<T>(y_run + turn * output_image, count, buffer), thread);
      // Of one stage there is but one image. That the loop ends with it is better not known when it is compiled:
      // straight code took up to 65 registers more.
      if (kStages > 1 && turn + kStages < images) load(turn + kStages);
    }
  }
  if (thread == 0) ptx::bulk_store_wait_read<0>();
}
