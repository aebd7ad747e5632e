// Depthwise convolution, forward, NCHW, by runs (sm_90 and newer).
//
// A block owns a run of the output: some rows of one plane, or some whole neighbouring planes. The input rows that it
// needs, halo included and full width, are a run too. One bulk copy brings it, lanes take columns and slide down the
// rows, one bulk copy takes the results back. A block may do so for the same planes of several images in turn: its
// weights then stay in registers, and the next image is on its way while this one is worked on.
//
// Compile-time values: T; R, S; PADDED (a tap may fall outside x); THREADS; ROWS, COLUMNS (outputs of a thread); SLIDE
// (dilation 1 and the strides below, so that one loaded value serves several outputs; otherwise stride and dilation
// are run-time values and every tap is loaded by itself); STRIDE_H, STRIDE_W.
#include "numbers.cuh"
#include "runs.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kPadded = CUCONV_PADDED;
constexpr int kRows = CUCONV_ROWS;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr bool kSlide = CUCONV_SLIDE;
constexpr int kStrideH = CUCONV_STRIDE_H;
constexpr int kStrideW = CUCONV_STRIDE_W;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kMaxStages = 2;

static_assert(kSlide || kColumns == 1, "columns are shared only where the stride between them is known");

struct Parameters {
  int multiplier;            // output planes for each input plane
  int K;                     // output channels; weights repeat after so many output planes
  int H, W, P, Q;
  int top, left;             // padding
  int stride_h, stride_w, dilation_h, dilation_w;
  int image_planes;          // output planes from one image to the next: a multiple of K
  int images;
  int block_planes;          // output planes of a block in one image; 1 unless they are whole
  int block_rows;            // output rows of a block
  int block_images;          // images that a block works on in turn
  int plane_groups, row_groups;
  int stages;                // images under way at once, 1 only where block_images is 1
  int input_bytes, output_bytes;  // shared bytes of one image's runs
  int64 total_planes;
};

// One thread's part of a plane: kRows x kColumns outputs. `source` is the element of the first output's first tap,
// at (row, column) of x; neither need exist.
struct Taps {
  const T* source;
  int row, column;
};

__device__ __forceinline__ bool within(int index, int extent) {
  return static_cast<uint32>(index) < static_cast<uint32>(extent);
}

// Every row of x that the outputs need is loaded once and meets all the outputs that need it.
__device__ __forceinline__ void slide(const Parameters& g, const Taps& taps, const Sum (&weight)[kR][kS],
                                      Sum (&sum)[kRows][kColumns]) {
  constexpr int kSpanH = (kRows - 1) * kStrideH + kR;
  constexpr int kSpanW = (kColumns - 1) * kStrideW + kS;
  bool column_within[kSpanW];
#pragma unroll
  for (int j = 0; j < kSpanW; ++j) column_within[j] = !kPadded || within(taps.column + j, g.W);
#pragma unroll
  for (int i = 0; i < kSpanH; ++i) {
    const bool row_within = !kPadded || within(taps.row + i, g.H);
    Sum value[kSpanW];
#pragma unroll
    for (int j = 0; j < kSpanW; ++j)
      value[j] = row_within && column_within[j] ? widen(taps.source[i * g.W + j]) : Sum(0);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      if (i < r || (i - r) % kStrideH != 0 || (i - r) / kStrideH >= kRows) continue;
      const int t = (i - r) / kStrideH;
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
#pragma unroll
        for (int s = 0; s < kS; ++s) sum[t][v] = fma(value[v * kStrideW + s], weight[r][s], sum[t][v]);
    }
  }
}

// Every tap of every output is loaded by itself.
__device__ __forceinline__ void gather(const Parameters& g, const Taps& taps, const Sum (&weight)[kR][kS],
                                       Sum (&sum)[kRows][kColumns]) {
#pragma unroll
  for (int s = 0; s < kS; ++s) {
    const int j = s * g.dilation_w;
    const bool column_within = !kPadded || within(taps.column + j, g.W);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int t = 0; t < kRows; ++t) {
        const int i = t * g.stride_h + r * g.dilation_h;
        const bool row_within = !kPadded || within(taps.row + i, g.H);
        const Sum value = row_within && column_within ? widen(taps.source[i * g.W + j]) : Sum(0);
        sum[t][0] = fma(value, weight[r][s], sum[t][0]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    depthwise_forward_runs(const T* x, const T* w, const T* bias, T* y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 full[kMaxStages];
  const int thread = static_cast<int>(threadIdx.x);
  const int row_group = static_cast<int>(blockIdx.x) % g.row_groups;
  const int plane_group = static_cast<int>(blockIdx.x) / g.row_groups % g.plane_groups;
  const int first_image = static_cast<int>(blockIdx.x) / g.row_groups / g.plane_groups * g.block_images;
  const int last_image = min(first_image + g.block_images, g.images);

  // The output rows [p0, p0 + rows) of planes k0 ... need the input rows [low, high), where they exist.
  const int p0 = row_group * g.block_rows;
  const int rows = min(g.block_rows, g.P - p0);
  const int k0 = plane_group * g.block_planes;
  const int top_row = p0 * g.stride_h - g.top;
  const int low = min(max(top_row, 0), g.H);
  const int high = max(low, min(g.H, top_row + (rows - 1) * g.stride_h + (kR - 1) * g.dilation_h + 1));
  const int64 input_plane = static_cast<int64>(g.H) * g.W;
  const int64 output_plane = static_cast<int64>(g.P) * g.Q;

  const auto planes_of = [&](int image) {
    const int64 left = g.total_planes - static_cast<int64>(image) * g.image_planes - k0;
    return static_cast<int>(min(static_cast<int64>(min(g.block_planes, g.image_planes - k0)), max(left, int64(0))));
  };
  const auto input_of = [&](int image) {
    const int planes = planes_of(image);
    const int64 plane = static_cast<int64>(image) * (g.image_planes / g.multiplier) + k0 / g.multiplier;
    const int64 others = (k0 + planes - 1) / g.multiplier - k0 / g.multiplier;
    const int64 count = planes == 0 ? 0 : others * input_plane + (high - low) * g.W;
    return Run<const T>(x + plane * input_plane + static_cast<int64>(low) * g.W, static_cast<int>(count),
                        shared + (image - first_image) % g.stages * g.input_bytes);
  };
  const auto output_of = [&](int image) {
    const int planes = planes_of(image);
    const int64 plane = static_cast<int64>(image) * g.image_planes + k0;
    const int64 count = planes == 0 ? 0 : (planes - 1) * output_plane + rows * g.Q;
    return Run<T>(y + plane * output_plane + static_cast<int64>(p0) * g.Q, static_cast<int>(count),
                  shared + g.stages * g.input_bytes + (image - first_image) % g.stages * g.output_bytes);
  };

  if (thread < kWarp) {
    if (thread == 0)
      for (int stage = 0; stage < g.stages; ++stage) ptx::barrier_init(&full[stage], kWarp);
    __syncwarp();
    for (int stage = 0; stage < g.stages && first_image + stage < last_image; ++stage)
      load_run(input_of(first_image + stage), &full[stage], thread);
  }

  // A thread's part of the block's output stays the same in every image: items `item`, `item + step`, ... of a plane.
  const int column_items = (g.Q + kColumns - 1) / kColumns;
  const int items = (rows + kRows - 1) / kRows * column_items;
  const bool whole = g.block_planes > 1;
  const int plane = whole ? thread / items : 0;
  const int first_item = whole ? thread % items : thread;
  const int step = whole ? items : kThreads;
  const int k = min(k0 + plane, g.image_planes - 1) % g.K;
  const int64 plane_offset = ((k0 + plane) / g.multiplier - k0 / g.multiplier) * input_plane;

  Sum weight[kR][kS];
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int s = 0; s < kS; ++s) weight[r][s] = widen(w[(static_cast<int64>(k) * kR + r) * kS + s]);
  const Sum start = bias == nullptr ? Sum(0) : widen(bias[k]);
  __syncthreads();

  for (int image = first_image; image < last_image; ++image) {
    const int turn = image - first_image;
    const Run<const T> input = input_of(image);
    const Run<T> output = output_of(image);
    ptx::barrier_wait(&full[turn % g.stages], turn / g.stages % 2);

    if (plane < planes_of(image)) {
      for (int item = first_item; item < items; item += step) {
        const int p = item / column_items * kRows;
        const int q = item % column_items * kColumns;
        const int row = top_row + p * g.stride_h;
        const int column = q * g.stride_w - g.left;
        const Taps taps{input.shared + plane_offset + (row - low) * g.W + column, row, column};
        Sum sum[kRows][kColumns];
#pragma unroll
        for (int t = 0; t < kRows; ++t)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) sum[t][v] = start;
        if constexpr (kSlide)
          slide(g, taps, weight, sum);
        else
          gather(g, taps, weight, sum);
        T* const result = output.shared + plane * output_plane + p * g.Q + q;
#pragma unroll
        for (int t = 0; t < kRows; ++t)
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
            if (p + t < rows && q + v < g.Q) result[t * g.Q + v] = narrow<T>(sum[t][v]);
      }
    }

    // The store before this one has long read its buffer; the next image's results may then go there.
    if (thread == 0) ptx::bulk_store_wait_read<0>();
    ptx::fence_shared_for_bulk();
    __syncthreads();
    if (thread < kWarp) {
      store_run(output, thread);
      if (image + g.stages < last_image) load_run(input_of(image + g.stages), &full[turn % g.stages], thread);
    }
  }
  if (thread == 0) ptx::bulk_store_wait_read<0>();
}
