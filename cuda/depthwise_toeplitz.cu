// Depthwise convolution, NCHW, 16-bit, on tensor cores (sm_90 and newer): forward, and at stride 1 the gradient of the
// input, which is the convolution of dy with the kernel turned around. The names are the forward pass's.
//
// A segment is kSegment neighbouring outputs of a row. Its inputs of one kernel row lie in a window of k-steps of kStep
// columns, and its outputs are that window times a band: a matrix of kernel row r whose element (k, n) is w[r][s] where
// k = n * stride_w + s * dilation_w, and zero elsewhere (a Toeplitz matrix). A unit is a segment in each of kRows rows
// of the output, a patch. The 16 rows of a tensor-core product are 16 units of one channel, of whatever columns, rows
// and images: every input row that they need is loaded once, for all output rows of the patch.
//
// A block owns a run of the output in each of several images: some rows of a plane, or some whole neighbouring planes.
// Bulk copies bring the runs of the input that these need. From there the rows are laid out so that every window starts
// at 16 bytes and meets zeros where there is padding; while products and stores go on, the runs of the next images are
// under way. A warp makes 16 units at a time.
//
// The zeros of a band make NaN of an infinity or NaN anywhere in the window. Nothing else can make a sum both wrong and
// not NaN, so that where a sum is NaN all 16 units are made again, tap by tap.
//
// Compile-time values: T; R (kernel rows, whose bands then stay in registers; 0: any number, and the rows of x that a
// kernel row meets stay there instead); TURNED (the kernel, both ways); MULTIPLIED (several output channels an input
// channel); THREADS; ROWS; STRIDE_H (of the patch, see below); VECTOR (elements laid out at once: it divides W and
// lead); PAIRS (neighbouring results are stored together: Q is even, and y starts at a word).
//
// Dilation: output rows dilation / gcd(stride, dilation) apart need input rows whole dilations apart. A patch of rows
// so far apart is a patch of an undilated convolution of stride / gcd, in units of `dilation` input rows.
#include "indices.cuh"
#include "numbers.cuh"
#include "products.cuh"
#include "runs.cuh"

using T = CUCONV_T;

constexpr int kR = CUCONV_R;
constexpr bool kTurned = CUCONV_TURNED;
constexpr bool kMultiplied = CUCONV_MULTIPLIED;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kRows = CUCONV_ROWS;
constexpr int kStrideH = CUCONV_STRIDE_H;
constexpr int kVector = CUCONV_VECTOR;
constexpr bool kPairs = CUCONV_PAIRS;

constexpr int kWarps = kThreads / kWarp;
constexpr int kHeldRows = kR > 0 ? kR : 1;
// 128 registers a thread, 168 for the tallest patch. Left to itself the compiler aims at more blocks a multiprocessor
// and spills.
constexpr int kMinBlocks = (kRows > 14 ? 384 : 512) / kThreads;
// The shape of a tensor-core product: units, columns of a window, outputs of a segment.
constexpr int kUnits = 16;
constexpr int kStep = 16;
constexpr int kSegment = 8;
// Of one k-step's band every lane has two words.
constexpr int kBandWords = 2 * kWarp;
constexpr uint32 kAllLanes = 0xffffffff;
// Elements laid out at once, as integers, since the compiler stores a structure of halves half by half.
template <int kElements>
struct PieceOf;
template <>
struct PieceOf<1> {
  using type = uint16;
};
template <>
struct PieceOf<2> {
  using type = uint32;
};
template <>
struct PieceOf<4> {
  using type = uint64;
};
template <>
struct PieceOf<8> {
  using type = Vector<uint64, 2>;
};
using Piece = typename PieceOf<kVector>::type;
// Rows that a thread loads before it stores them.
constexpr int kBatch = 4;

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements");

struct Parameters {
  int multiplier;                  // output planes for each input plane
  int K, R, S;
  int H, W, P, Q;
  int top, left;                   // padding
  int stride_h, stride_w;          // of the convolution
  int dilation_h, dilation_w;
  int spacing_h;                   // rows from one output of a patch to the next
  int steps;                       // k-steps of a window
  int phase;                       // columns of a window before its first tap
  int lead;                        // zeros before a row of x: phase + left; negative: columns that are left out
  int pitch;                       // elements from one row of the layout to the next
  int plane_pitch;                 // elements from one plane of the layout to the next
  int layout_bytes, bands_bytes;
  int input_bytes, output_bytes;   // of the run of one image
  int row_items;                   // patches of a block in one plane, one below the other or between
  int segments;                    // of a row
  uint32 image_units_magic, segments_magic, spacing_h_magic, steps_magic, R_magic, dilation_w_magic;  // see divide
  int tiles;                       // products of 16 units for one plane of all images
  uint32 tiles_magic;
  int row_shift;                   // 2^row_shift lanes lay out a row
  int images;
  int block_planes;                // output planes of a block in one image; 1 unless they are whole
  int block_inputs;                // input planes of a block in one image, at most
  int block_rows;                  // output rows of a block
  int block_images;                // images whose units are mixed
  int block_turns;                 // so many images, so many times
};

__device__ __forceinline__ uint32 magic_of(int divisor) {
  return ((1u << 31) + static_cast<uint32>(divisor) - 1) / static_cast<uint32>(divisor);
}

// The input plane of an output plane.
__device__ __forceinline__ int input_plane_of(int output_plane, const Parameters& g) {
  return kMultiplied ? output_plane / g.multiplier : output_plane;
}

// The bands of `planes` output planes from k0 on: for every kernel row and k-step what the lanes of a warp hold of it.
__device__ __forceinline__ void make_bands(const Parameters& g, const T* w, int k0, int planes, uint32* bands,
                                           int thread) {
#pragma unroll 1
  for (int i = thread; i < planes * g.R * g.steps * kBandWords; i += kThreads) {
    const int lane = i % kBandWords / 2;
    const int band = i / kBandWords;
    const int plane_row = divide(band, g.steps_magic);
    const int step = band - plane_row * g.steps;
    const int plane = divide(plane_row, g.R_magic);
    const int r = plane_row - plane * g.R;
    const T* const row = w + (static_cast<int64>(k0 + plane) * g.R + (kTurned ? g.R - 1 - r : r)) * g.S;
    const int column = lane / 4;
    uint32 word = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int offset = step * kStep + i % 2 * 8 + lane % 4 * 2 + e - g.phase - column * g.stride_w;
      if (offset < 0) continue;
      const int s = divide(offset, g.dilation_w_magic);
      if (s >= g.S || s * g.dilation_w != offset) continue;
      word |= static_cast<uint32>(row[kTurned ? g.S - 1 - s : s].bits) << (16 * e);
    }
    bands[i] = word;
  }
}

__device__ __forceinline__ void load_band(const uint32* bands, int band, int lane, uint32 (&b)[2]) {
  const auto words = reinterpret_cast<const Vector<uint32, 2>*>(bands)[band * kWarp + lane];
  b[0] = words.piece[0];
  b[1] = words.piece[1];
}

__device__ __forceinline__ uint32 low_bits(const T* pointer) {
  return static_cast<uint32>(reinterpret_cast<uint64>(pointer));
}

// How far behind a boundary of 16 bytes the run of this image starts, and its copy: `first` is where the run of the
// first image starts, the others follow `apart` bytes apart. Only the lowest bits matter.
__device__ __forceinline__ int run_shift(uint32 first, uint32 apart, int image) {
  return static_cast<int>((first + static_cast<uint32>(image) * apart) % kBulkAlignment);
}

// Rows [low, low + rows) of so many planes and images, from their runs to the layout, whose first row is row `top_row`.
// The rows of an image's planes count as one sequence.
__device__ __forceinline__ void lay_out(const Parameters& g, const unsigned char* runs, uint32 first_run, uint32 apart,
                                        T* layout, int images, int planes, int top_row, int low, int rows, int thread) {
  const int lanes = 1 << g.row_shift;
  const int lane_row = thread % kWarp >> g.row_shift;
  const int lane_vector = thread & (lanes - 1);
  const int skipped = max(0, -g.lead);
  const int vectors = (g.W - skipped) / kVector;
  const int image_rows = planes * rows;
  if (image_rows == 0) return;
  const int pass_rows = kWarp >> g.row_shift;
  const int parts = (image_rows + kBatch * pass_rows - 1) / (kBatch * pass_rows);
  const uint32 parts_magic = magic_of(parts);
  const uint32 rows_magic = magic_of(rows);
  // From the last row of a plane to the first of the next one there are so many elements more than from row to row. One
  // plane alone may have more elements than an int counts.
  const int plane_gap = planes > 1 ? (g.H - rows) * g.W : 0;
  const int layout_plane_gap = g.block_images * g.plane_pitch - rows * g.pitch;
  const int first_column = (low - top_row) * g.pitch + g.lead + skipped;
#pragma unroll 1
  for (int part = thread / kWarp; part < images * parts; part += kWarps) {
    const int image = divide(part, parts_magic);
    const int first = (part - image * parts) * kBatch * pass_rows + lane_row;
    const T* const run = reinterpret_cast<const T*>(runs + image * g.input_bytes + run_shift(first_run, apart, image));
    T* const image_layout = layout + image * g.plane_pitch;
    int source[kBatch], destination[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      // A row behind the last is the last one, stored again.
      const int row = min(first + b * pass_rows, image_rows - 1);
      const int plane = divide(row, rows_magic);
      source[b] = row * g.W + plane * plane_gap + skipped;
      destination[b] = row * g.pitch + plane * layout_plane_gap + first_column;
    }
#pragma unroll 1
    for (int column = lane_vector * kVector; column < vectors * kVector; column += lanes * kVector) {
      Piece piece[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) piece[b] = *reinterpret_cast<const Piece*>(run + source[b] + column);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) *reinterpret_cast<Piece*>(image_layout + destination[b] + column) = piece[b];
    }
  }
}

// The sums of 16 units. `window` is where this lane's part of the window of the patch's first row starts.
__device__ __forceinline__ void convolve(const Parameters& g, const T* window, const uint32* bands, int lane,
                                         float (&sum)[kRows][4]) {
  const int row_pitch = g.dilation_h * g.pitch;
#pragma unroll 1
  for (int step = 0; step < g.steps; ++step, window += kStep) {
    if constexpr (kR > 0) {
      uint32 band[kHeldRows][2];
#pragma unroll
      for (int r = 0; r < kR; ++r) load_band(bands, r * g.steps + step, lane, band[r]);
      const T* row = window;
#pragma unroll
      for (int i = 0; i < (kRows - 1) * kStrideH + kR; ++i, row += row_pitch) {
        // With a stride above kR some rows are nobody's.
        if (i % kStrideH >= kR) continue;
        uint32 a[4];
        ptx::load_matrices(row, a);
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          if (i < r || (i - r) % kStrideH != 0 || (i - r) / kStrideH >= kRows) continue;
          multiply(T{}, sum[(i - r) / kStrideH], a, band[r]);
        }
      }
    } else {
      // Kernel rows r, r + kStrideH, ... meet rows of x that overlap: each meets kRows of them, all but one of which
      // the next one meets again. They are kept in a ring.
#pragma unroll 1
      for (int phase = 0; phase < min(kStrideH, g.R); ++phase) {
        const int count = (g.R - phase + kStrideH - 1) / kStrideH;
        const T* row = window + phase * row_pitch;
        uint32 a[kRows][4];
        uint32 next[2];
        load_band(bands, phase * g.steps + step, lane, next);
#pragma unroll
        for (int t = 0; t < kRows - 1; ++t, row += kStrideH * row_pitch) ptx::load_matrices(row, a[t]);
#pragma unroll 1
        for (int first = 0; first < count; first += kRows) {
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            const int u = first + j;
            if (u >= count) break;
            ptx::load_matrices(row, a[(j + kRows - 1) % kRows]);
            row += kStrideH * row_pitch;
            const uint32 band[2] = {next[0], next[1]};
            load_band(bands, (phase + min(u + 1, count - 1) * kStrideH) * g.steps + step, lane, next);
#pragma unroll
            for (int t = 0; t < kRows; ++t) multiply(T{}, sum[t], a[(j + t) % kRows], band);
          }
        }
      }
    }
  }
}

// One output, tap by tap; `source` is where its first tap is laid out.
__device__ __forceinline__ float convolve_one(const Parameters& g, const T* source, const T* weight, float sum) {
#pragma unroll 1
  for (int r = 0; r < g.R; ++r) {
#pragma unroll 1
    for (int s = 0; s < g.S; ++s) {
      const int tap = r * g.S + s;
      const T* const place = source + r * g.dilation_h * g.pitch + s * g.dilation_w;
      sum = fma(widen(*place), widen(weight[kTurned ? g.R * g.S - 1 - tap : tap]), sum);
    }
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    depthwise_toeplitz(const T* x, const T* w, const T* bias, T* y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 full;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;

  T* const layout = reinterpret_cast<T*>(shared);
  uint32* const bands = reinterpret_cast<uint32*>(shared + g.layout_bytes);
  unsigned char* const input = shared + g.layout_bytes + g.bands_bytes;
  unsigned char* const output = input + g.block_images * g.input_bytes;

  // The output rows [p0, p0 + rows) of planes [k0, k0 + planes) of every image need the input rows [low, high) of
  // planes [c0, c0 + inputs), where they exist.
  const int p0 = static_cast<int>(blockIdx.x) * g.block_rows;
  const int rows = min(g.block_rows, g.P - p0);
  const int k0 = static_cast<int>(blockIdx.y) * g.block_planes;
  const int planes = min(g.block_planes, g.K - k0);
  const int c0 = input_plane_of(k0, g);
  const int inputs = input_plane_of(k0 + planes - 1, g) - c0 + 1;
  const int top_row = p0 * g.stride_h - g.top;
  const int low = min(max(top_row, 0), g.H);
  const int high = max(low, min(g.H, top_row + (rows - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1));
  const int64 input_plane = static_cast<int64>(g.H) * g.W;
  const int64 output_plane = static_cast<int64>(g.P) * g.Q;
  const int64 input_image = input_plane_of(g.K, g) * input_plane;
  const int64 output_image = g.K * output_plane;
  const int input_count = static_cast<int>((inputs - 1) * input_plane) + (high - low) * g.W;
  const int output_count = static_cast<int>((planes - 1) * output_plane) + rows * g.Q;

  const int first_image = static_cast<int>(blockIdx.z) * g.block_turns * g.block_images;
  const int turns = min(g.block_turns, (g.images - first_image + g.block_images - 1) / g.block_images);
  const auto images_of = [&](int turn) { return min(g.block_images, g.images - first_image - turn * g.block_images); };
  const auto x_run = [&](int turn, int image) {
    const int64 n = first_image + turn * g.block_images + image;
    return x + n * input_image + c0 * input_plane + static_cast<int64>(low) * g.W;
  };
  const auto y_run = [&](int turn, int image) {
    const int64 n = first_image + turn * g.block_images + image;
    return y + n * output_image + k0 * output_plane + static_cast<int64>(p0) * g.Q;
  };
  // Images that do not exist are runs of no elements, since the barrier counts on all.
  const auto load = [&](int turn) {
    for (int image = warp; image < g.block_images; image += kWarps) {
      const bool exists = image < images_of(turn);
      const Run<const T> run(exists ? x_run(turn, image) : x, exists ? input_count : 0, input + image * g.input_bytes);
      load_run(run, &full, lane);
    }
  };

  if (thread == 0) ptx::barrier_init(&full, g.block_images * kWarp);
  __syncthreads();
  load(0);
  // Rows of x come and go, the zeros between them stay.
  using Zeros = Vector<uint32, 4>;
  for (int i = thread; i < g.layout_bytes / static_cast<int>(sizeof(Zeros)); i += kThreads)
    reinterpret_cast<Zeros*>(shared)[i] = Zeros{};
  make_bands(g, w, k0, planes, bands, thread);
  __syncthreads();

  for (int turn = 0; turn < turns; ++turn) {
    const int images = images_of(turn);
    ptx::barrier_wait(&full, turn % 2);
    lay_out(g, input, low_bits(x_run(turn, 0)), static_cast<uint32>(input_image) * sizeof(T), layout, images, inputs,
            top_row, low, high - low, thread);
    // The stores of the turn before have long read what they took.
    if (lane == 0) ptx::bulk_store_wait_read<0>();
    __syncthreads();
    if (turn + 1 < turns) load(turn + 1);

    const uint32 first_result = low_bits(y_run(turn, 0));
    const uint32 output_apart = static_cast<uint32>(output_image) * sizeof(T);
    const int image_units = g.row_items * g.segments;
    for (int item = warp; item < planes * g.tiles; item += kWarps) {
      const int plane = divide(item, g.tiles_magic);
      const int k = k0 + plane;
      // Of the 16 units this lane knows one; behind the last are copies of it.
      const int unit = (item - plane * g.tiles) * kUnits + lane % kUnits;
      const int some_unit = min(unit, images * image_units - 1);
      const int image = divide(some_unit, g.image_units_magic);
      const int row_item = divide(some_unit - image * image_units, g.segments_magic);
      const int segment = some_unit - image * image_units - row_item * g.segments;
      const int p = row_item + divide(row_item, g.spacing_h_magic) * (kRows - 1) * g.spacing_h;
      const int q = segment * kSegment;
      const int input_index = input_plane_of(k, g) - c0;
      const T* const window = layout + (input_index * g.block_images + image) * g.plane_pitch +
                              p * g.stride_h * g.pitch + q * g.stride_w;
      const int result = image * g.output_bytes + run_shift(first_result, output_apart, image) +
                         (plane * g.P * g.Q + p * g.Q + q) * static_cast<int>(sizeof(T));

      const float start = bias == nullptr ? 0.0f : widen(bias[k]);
      float sum[kRows][4];
#pragma unroll
      for (int t = 0; t < kRows; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[t][e] = start;
      convolve(g, window + lane / kUnits * (kStep / 2), bands + plane * g.R * g.steps * kBandWords, lane, sum);

      // Infinities of different signs make a NaN too, and are then made again in vain.
      float all[4] = {};
#pragma unroll
      for (int t = 0; t < kRows; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) all[e] += sum[t][e];
      const float total = all[0] + all[1] + (all[2] + all[3]);
      const bool again = __any_sync(kAllLanes, total != total);

      // A lane's sums belong to two units, whose places other lanes know.
      const int column = lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int owner = lane / 4 + half * (kUnits / 2);
        const int first_p = __shfl_sync(kAllLanes, unit == some_unit ? p : rows, owner);
        const int columns = g.Q - column - __shfl_sync(kAllLanes, q, owner);
        const int source = __shfl_sync(kAllLanes, static_cast<int>(window - layout), owner);
        T* place = reinterpret_cast<T*>(output + __shfl_sync(kAllLanes, result, owner)) + column;
        if (again) {
          const T* first = layout + source + g.phase + column * g.stride_w;
          const T* const weight = w + static_cast<int64>(k) * g.R * g.S;
#pragma unroll 1
          for (int row = first_p; row < min(rows, first_p + kRows * g.spacing_h); row += g.spacing_h) {
            if (0 < columns) place[0] = narrow<T>(convolve_one(g, first, weight, start));
            if (1 < columns) place[1] = narrow<T>(convolve_one(g, first + g.stride_w, weight, start));
            first += g.spacing_h * g.stride_h * g.pitch;
            place += g.spacing_h * g.Q;
          }
          continue;
        }
#pragma unroll
        for (int t = 0; t < kRows; ++t, place += g.spacing_h * g.Q) {
          if (first_p + t * g.spacing_h >= rows) break;
          if constexpr (kPairs) {
            if (0 < columns) store_narrowed<2>(place, &sum[t][2 * half]);
          } else {
            if (0 < columns) place[0] = narrow<T>(sum[t][2 * half]);
            if (1 < columns) place[1] = narrow<T>(sum[t][2 * half + 1]);
          }
        }
      }
    }

    ptx::fence_shared_for_bulk();
    __syncthreads();
    for (int image = warp; image < images; image += kWarps)
      store_run(Run<T>(y_run(turn, image), output_count, output + image * g.output_bytes), lane);
  }
  if (lane == 0) ptx::bulk_store_wait_read<0>();
}
