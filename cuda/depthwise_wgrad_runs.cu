// Depthwise convolution, gradients of the weights and the bias, NCHW, by runs (sm_90 and newer).
//
// A block owns a plane, or some neighbouring planes, of dy's channels, and a slab of the batch: it goes through units,
// each some rows of these planes in one image. Two bulk copies bring a unit's runs of dy and, halo included, of x,
// while the units before it are worked on. Threads take patches of dy, as depthwise_runs takes patches of y: every
// element of dy and of x is loaded once a patch, and R x S sums stay in a thread's registers through all units. In the
// end they are added in a fixed order, thread by thread; the blocks of a cluster, or depthwise_wgrad_reduce, do so with
// the partial sums of all slabs, where there are several.
//
// Compile-time values: as in depthwise_runs.cu, of which VECTOR is x's and OUT_VECTOR dy's; BIAS (whether dbias is
// summed too); FINAL (there is no need for another launch); CLUSTER (see slabs.cuh); EXACT (no patch reaches beyond its
// unit's dy); BLOCKS (that a multiprocessor is to hold, which bounds the registers); INSIDE_FROM, INSIDE_TO, EXISTING
// (of single columns without dilation, those of x from and to which, and those of dy to which, exist whatever the
// patch).
#include "patches.cuh"
#include "runs.cuh"
#include "slabs.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr bool kPadded = CUCONV_PADDED;
constexpr bool kMultiplied = CUCONV_MULTIPLIED;
constexpr bool kExact = CUCONV_EXACT;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kRows = CUCONV_ROWS;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kStrideH = CUCONV_STRIDE_H;
constexpr int kStrideW = CUCONV_STRIDE_W;
constexpr bool kDilated = CUCONV_DILATED;
constexpr int kVector = CUCONV_VECTOR;
constexpr int kOutVector = CUCONV_OUT_VECTOR;
constexpr int kLeft = CUCONV_LEFT;
constexpr int kWidth = CUCONV_WIDTH;
constexpr int kInsideFrom = CUCONV_INSIDE_FROM;
constexpr int kInsideTo = CUCONV_INSIDE_TO;
constexpr int kExisting = CUCONV_EXISTING;

// What a channel has of partial sums: its weights' and its bias's.
constexpr int kEntries = kR * kS + kBias;

constexpr int kSpanH = (kRows - 1) * kStrideH + kR;
constexpr int kSpanW = (kColumns - 1) * kStrideW + kS;
using Row = RowOfPatch<T, kSpanW, kVector, kLeft, kWidth, true>;

static_assert(!kDilated || (kVector == 1 && kOutVector == 1 && kWidth == 0), "dilated columns are no vectors");
static_assert(kWidth || kColumns * kStrideW % kVector == 0, "every patch starts at the same place of a vector");
static_assert(kColumns % kOutVector == 0, "patches are whole vectors");

struct Parameters {
  int multiplier;                  // planes of dy for each plane of x
  int K;                           // output channels
  int H, W, P, Q;
  int top, left;                   // padding
  int stride_h, stride_w;          // of the convolution
  int dilation_h, dilation_w;
  int spacing_h, spacing_w;        // rows and columns from one element of a patch to the next
  int row_items, column_items;     // patches of a unit in one plane
  uint32 items_magic, column_items_magic, spacing_h_magic, spacing_w_magic;  // see divide
  int block_planes;                // planes of dy of a block; 1 unless they are whole
  uint32 block_planes_magic;
  int block_rows;                  // rows of dy of a unit
  int row_units;                   // units of a plane
  int units;                       // of all images
  int block_units;                 // that a block goes through
  int x_bytes, dy_bytes;           // shared bytes of one unit's runs
};

// Some rows of the block's planes in one image: of dy [p0, p0 + rows), of x [low, high).
struct Unit {
  int image, p0, rows, top_row, low, high;

  __device__ __forceinline__ Unit(int index, const Parameters& g) {
    image = index / g.row_units;
    p0 = (index - image * g.row_units) * g.block_rows;
    rows = min(g.block_rows, g.P - p0);
    top_row = p0 * g.stride_h - g.top;
    low = min(max(top_row, 0), g.H);
    high = max(low, min(g.H, top_row + (rows - 1) * g.stride_h + (kR - 1) * g.dilation_h + 1));
  }
};

// Whether x and dy were seen to be finite where it matters: a NaN that stays one, or zero.
//
// For speed, elements of dy that do not exist count as zeros, which is wrong where they meet an infinite x; and taps in
// the padding that are known at compile time are passed over, which is wrong where an infinite dy meets them.
constexpr bool kPassedOver = kPadded && kWidth > 0;

__device__ __forceinline__ void probe(Sum value, Sum& seen) { seen = fma(value, Sum(0), seen); }

// Adds the products of a patch of dy, every row of x meeting all the rows of dy that it has a part in. `source` is the
// element of x of the first element's first tap, `row` rows below the first of x's `rows_of_x` in shared memory, and in
// `column`; neither need exist. `rows` and `columns` of dy exist from the patch's first element on.
__device__ __forceinline__ void add_patch(const Parameters& g, const T* dy, const T* source, int row, int rows_of_x,
                                          int column, int rows, int columns, Sum (&sum)[kR][kS], Sum& bias_sum,
                                          Sum& seen) {
  const int unit_h = kDilated ? g.dilation_h : 1;
  const int unit_w = kDilated ? g.dilation_w : 1;
  const int spacing_h = kDilated ? g.spacing_h : 1;
  const int spacing_w = kDilated ? g.spacing_w : 1;
  Row x_row;
  x_row.template place<kPadded || !kExact, kInsideFrom, kInsideTo>(column, unit_w, g.W);
  bool exists[kColumns / kOutVector];
#pragma unroll
  for (int v = 0; v < kColumns; v += kOutVector)
    exists[v / kOutVector] = kExact || v + kOutVector <= kExisting || v * spacing_w < columns;
  const bool part = !kExact && (rows <= (kRows - 1) * spacing_h || columns <= (kColumns - 1) * spacing_w);
  Sum gradient[kRows][kColumns] = {};
#pragma unroll
  for (int i = 0; i < kSpanH; ++i) {
    if (i % kStrideH == 0 && i / kStrideH < kRows) {
      const int t = i / kStrideH;
#pragma unroll
      for (int v = 0; v < kColumns; v += kOutVector) {
        Sum vector[kOutVector];
        const bool present = exists[v / kOutVector] && (kExact || t * spacing_h < rows);
        load_widened<kOutVector, true>(dy + v * spacing_w, present, vector);
#pragma unroll
        for (int e = 0; e < kOutVector; ++e) {
          gradient[t][v + e] = vector[e];
          if (kBias) bias_sum += vector[e];
          if (kPassedOver) probe(vector[e], seen);
        }
      }
      dy += spacing_h * g.Q;
    }
    const bool row_within = !(kPadded || !kExact) || within(row, rows_of_x);
    if (!kPassedOver || row_within) {
      Sum value[kSpanW];
      x_row.load(source, row_within, unit_w, value);
      if (part) {
#pragma unroll
        for (int j = 0; j < kSpanW; ++j) probe(value[j], seen);
      }
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        if (i < r || (i - r) % kStrideH != 0 || (i - r) / kStrideH >= kRows) continue;
        const int t = (i - r) / kStrideH;
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
#pragma unroll
          for (int s = 0; s < kS; ++s) {
            const int j = v * kStrideW + s;
            if (kPassedOver && (j < kLeft || j >= kLeft + kWidth)) continue;
            sum[r][s] = fma(value[j], gradient[t][v], sum[r][s]);
          }
      }
    }
    source += unit_h * g.W;
    row += unit_h;
  }
}

// Adds one element of dy's products with the taps at (row, column) of a plane of x, those in the padding too.
__device__ __forceinline__ void add_element(const Parameters& g, Sum gradient, const T* x, int row, int column,
                                            Sum (&sum)[kR][kS]) {
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      const int h = row + r * g.dilation_h;
      const int w = column + s * g.dilation_w;
      const bool exists = within(h, g.H) && within(w, g.W);
      sum[r][s] = fma(exists ? widen(x[static_cast<int64>(h) * g.W + w]) : Sum(0), gradient, sum[r][s]);
    }
}

__device__ __forceinline__ void clear(Sum (&sum)[kR][kS]) {
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int s = 0; s < kS; ++s) sum[r][s] = Sum(0);
}

extern "C" __global__ void CUCONV_SLABS __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_runs(const T* dy, const T* x, Sum* partials, T* dw, T* dbias,
                         const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 full[kStages];
  const int thread = static_cast<int>(threadIdx.x);
  const int first_unit = static_cast<int>(blockIdx.x) * g.block_units;
  const int units = min(g.block_units, g.units - first_unit);
  const int k0 = static_cast<int>(blockIdx.y) * g.block_planes;
  const int planes = min(g.block_planes, g.K - k0);
  const int c0 = kMultiplied ? k0 / g.multiplier : k0;
  const int C = kMultiplied ? g.K / g.multiplier : g.K;
  const int64 x_plane = static_cast<int64>(g.H) * g.W;
  const int64 dy_plane = static_cast<int64>(g.P) * g.Q;
  const auto plane_of_x = [&](int plane) { return kMultiplied ? (k0 + plane) / g.multiplier - c0 : plane; };

  const auto x_run = [&](const Unit& unit) {
    return x + (static_cast<int64>(unit.image) * C + c0) * x_plane + static_cast<int64>(unit.low) * g.W;
  };
  const auto dy_run = [&](const Unit& unit) {
    return dy + (static_cast<int64>(unit.image) * g.K + k0) * dy_plane + static_cast<int64>(unit.p0) * g.Q;
  };
  const auto x_buffer = [&](int turn) { return shared + turn % kStages * (g.x_bytes + g.dy_bytes); };
  const auto load = [&](int turn) {
    const Unit unit(first_unit + turn, g);
    const int x_count = static_cast<int>(plane_of_x(planes - 1) * x_plane) + (unit.high - unit.low) * g.W;
    const int dy_count = static_cast<int>((planes - 1) * dy_plane) + unit.rows * g.Q;
    load_run(Run<const T>(x_run(unit), x_count, x_buffer(turn)), &full[turn % kStages], thread);
    load_run(Run<const T>(dy_run(unit), dy_count, x_buffer(turn) + g.x_bytes), &full[turn % kStages], thread);
  };

  if (thread < kWarp) {
    if (thread == 0)
      for (int stage = 0; stage < kStages; ++stage) ptx::barrier_init(&full[stage], 2 * kWarp);
    __syncwarp();
    for (int turn = 0; turn < kStages; ++turn)
      if (turn < units) load(turn);
  }

  // A thread's part of a unit stays the same in every unit: patches `item`, `item + step`, ... of a plane.
  const int items = g.row_items * g.column_items;
  const bool whole = g.block_planes > 1;
  const int plane = whole ? divide(thread, g.items_magic) : 0;
  const int first_item = thread - plane * items;
  const int step = whole ? items : kThreads;
  const int x_offset = static_cast<int>(plane_of_x(plane) * x_plane);
  const int dy_offset = static_cast<int>(plane * dy_plane);

  Sum sum[kR][kS];
  clear(sum);
  Sum bias_sum = 0;
  Sum seen = 0;
  __syncthreads();

  for (int turn = 0; turn < units; ++turn) {
    const Unit unit(first_unit + turn, g);
    const T* const x_shared = run_in_shared(x_run(unit), x_buffer(turn));
    const T* const dy_shared = run_in_shared(dy_run(unit), x_buffer(turn) + g.x_bytes);
    ptx::barrier_wait(&full[turn % kStages], turn / kStages % 2);

    if (plane < planes) {
      for (int item = first_item; item < items; item += step) {
        int p = divide(item, g.column_items_magic);
        int q = item - p * g.column_items;
        if constexpr (kDilated) {
          p += divide(p, g.spacing_h_magic) * (kRows - 1) * g.spacing_h;
          q += divide(q, g.spacing_w_magic) * (kColumns - 1) * g.spacing_w;
        } else {
          p *= kRows;
          q *= kColumns;
        }
        if (p >= unit.rows) continue;  // the last unit of a plane may have fewer rows
        const int row = unit.top_row + p * g.stride_h - unit.low;
        const int column = q * g.stride_w - g.left;
        add_patch(g, dy_shared + dy_offset + p * g.Q + q, x_shared + x_offset + row * g.W + column, row,
                  unit.high - unit.low, column, unit.rows - p, g.Q - q, sum, bias_sum, seen);
      }
    }
    __syncthreads();
    if (thread < kWarp && turn + kStages < units) load(turn + kStages);
  }

  const int plane_threads = whole ? items : kThreads;
  if ((kPassedOver || !kExact) && __syncthreads_or(seen != seen)) {
    // Once more for data that are not all finite, element by element and straight from global memory.
    clear(sum);
    for (int turn = 0; turn < units && plane < planes; ++turn) {
      const Unit unit(first_unit + turn, g);
      const T* const gradients = dy_run(unit) + plane * dy_plane;
      const T* const x_source = x_run(unit) - static_cast<int64>(unit.low) * g.W + x_offset;
      for (int element = first_item; element < unit.rows * g.Q; element += plane_threads) {
        const int p = element / g.Q;
        const int q = element - p * g.Q;
        add_element(g, widen(gradients[element]), x_source, unit.top_row + p * g.stride_h,
                    q * g.stride_w - g.left, sum);
      }
    }
  }

  // All loads have landed and been read: their memory is free for the sums of every thread, and behind them the
  // block's.
  Sum* const sums = reinterpret_cast<Sum*>(shared);
  Sum* const totals = sums + kEntries * kThreads;
  const auto store = [&](int of_plane, int tap, Sum total) {
    const int64 k = k0 + of_plane;
    (tap < kR * kS ? dw[k * (kR * kS) + tap] : dbias[k]) = narrow<T>(total);
  };
  const auto deliver = [&](int of_plane, int tap, Sum total) {
    if (kCluster > 1) {
      totals[of_plane * kEntries + tap] = total;
    } else if (kFinal) {
      store(of_plane, tap, total);
    } else {
      partials[(static_cast<int64>(blockIdx.x) * kEntries + tap) * g.K + k0 + of_plane] = total;
    }
  };
  if (plane_threads == 1) {
    if (plane < planes) {
#pragma unroll
      for (int r = 0; r < kR; ++r)
#pragma unroll
        for (int s = 0; s < kS; ++s) deliver(plane, r * kS + s, sum[r][s]);
      if (kBias) deliver(plane, kR * kS, bias_sum);
    }
  } else {
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int s = 0; s < kS; ++s) sums[(r * kS + s) * kThreads + thread] = sum[r][s];
    if (kBias) sums[kR * kS * kThreads + thread] = bias_sum;
    __syncthreads();
    for (int entry = thread; entry < g.block_planes * kEntries; entry += kThreads) {
      const int tap = divide(entry, g.block_planes_magic);
      const int of_plane = entry - tap * g.block_planes;
      const Sum* const terms = sums + tap * kThreads + of_plane * plane_threads;
      Sum total = 0;
      for (int i = 0; i < plane_threads; ++i) total += terms[i];
      if (of_plane < planes) deliver(of_plane, tap, total);
    }
  }
  if (kCluster > 1)
    add_of_cluster<kThreads>(totals, planes * kEntries, thread, [&](int entry, Sum total) {
      const int of_plane = entry / kEntries;
      store(of_plane, entry - of_plane * kEntries, total);
    });
}
