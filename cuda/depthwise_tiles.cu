// Depthwise convolution of large kernels at stride 1, NCHW: forward, and the gradient of the input, which is the
// convolution of dy with the kernel turned around. The names are the forward pass's. From sm_75 up.
//
// Arithmetic is what these kernels are bound by, so everything else is kept small beside it. A block brings the rows of
// x that it needs to shared memory, widened and with the zeros of the padding to their left and right, and the weights
// of their channels. A thread owns a tile of kRows x kColumns outputs, its sums in registers. In the inner loop it
// takes a piece of one row of x, and the weights of kChunk taps for every row of the tile: each value of x meets the
// weights of up to kRows rows of the kernel, each weight kColumns outputs. All lanes of one plane read the same weights
// at once.
//
// Every existing tap of every output takes part, those in the padding with a zero, and no others: a row of x outside of
// the kernel's reach, or a tap behind the last column of the kernel, is passed over, and not multiplied by a zero.
//
// Planes are counted channel by channel, the images of one after the other, so that those of a block share weights.
//
// Compile-time values: T; ROWS, COLUMNS (outputs of a thread, its tile); CHUNK (taps of a row at a time), WHOLE
// (whether a row has that many) and TAIL (those left at its end: S % CHUNK); VECTOR (values of one load of a row of x;
// every tile starts at a multiple of them); IN_VECTOR, OUT_VECTOR (elements of one load of x and one store of y: they
// divide W and Q); TURNED (the kernel, both ways); THREADS.
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kRows = CUCONV_ROWS;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kChunk = CUCONV_CHUNK;
constexpr int kTail = CUCONV_TAIL;
constexpr bool kWhole = CUCONV_WHOLE;
constexpr int kVector = CUCONV_VECTOR;
constexpr int kInVector = CUCONV_IN_VECTOR;
constexpr int kOutVector = CUCONV_OUT_VECTOR;
constexpr bool kTurned = CUCONV_TURNED;
constexpr int kThreads = CUCONV_THREADS;

// Vectors of x that a thread has on their way at once.
constexpr int kBatch = 8;
constexpr int kNowhere = -1;
// Values of the widest load of shared memory.
constexpr int kWidest = 16 / static_cast<int>(sizeof(Sum));

static_assert(kChunk % kVector == 0 && kChunk % kWidest == 0, "every chunk starts at a whole vector of x and of w");
static_assert(kTail < kChunk && kColumns % kOutVector == 0);

struct Parameters {
  int multiplier;                 // output planes for each input plane
  int N, K;                       // images and output channels
  int R, S;
  int H, W, P, Q;
  int top, left;                  // padding
  int stride_h, stride_w, dilation_h, dilation_w;  // 1
  int planes;                     // output planes: N * K
  int block_planes;               // those of a block,
  int block_channels;             // and the most channels that they belong to
  int row_items, column_items;    // tiles of a block in one plane
  int block_rows;                 // rows of x that a block has room for, of every plane
  int pitch;                      // values from one of them to the next: a multiple of 16 bytes
  int channel_pitch;              // values from one channel's weights to the next: likewise
};

__device__ __forceinline__ bool within(int index, int extent) {
  return static_cast<uint32>(index) < static_cast<uint32>(extent);
}

// Adds to the sums of a tile what kTaps taps of kernel row i - t make of one row of x, for every row t of the tile. The
// first of them meets source[0] in the first column; `weight` is that of kernel row i. Where kEdge, some of these rows
// are none of the kernel.
template <int kTaps, bool kEdge>
__device__ __forceinline__ void multiply(const Sum* source, const Sum* weight, int i, int R,
                                         Sum (&sum)[kRows][kColumns]) {
  constexpr int kVectors = (kColumns + kTaps - 1 + kVector - 1) / kVector;
  Sum value[kVectors * kVector];
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    Sum vector[kVector];
    load_widened<kVector>(source + n * kVector, true, vector);
#pragma unroll
    for (int e = 0; e < kVector; ++e) value[n * kVector + e] = vector[e];
  }
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    if (kEdge && !within(i - t, R)) continue;
#pragma unroll
    for (int first = 0; first < kTaps; first += kWidest) {
      Sum taps[kWidest];
      load_widened<kWidest>(weight + first - t * kChunk, true, taps);
#pragma unroll
      for (int s = first; s < kTaps && s < first + kWidest; ++s)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) sum[t][v] = fma(value[v + s], taps[s - first], sum[t][v]);
    }
  }
}

// The same for all rows of x that the tile needs: rows [row, row + R + kRows - 1) of the `rows` at `source`, and the
// row of zeros where they do not exist. Where kApart, those that meet every row of the tile have code of their own.
template <int kTaps, bool kApart>
__device__ __forceinline__ void multiply_rows(const Sum* source, const Sum* zeros, int row, int rows, int pitch,
                                              const Sum* weight, int R, Sum (&sum)[kRows][kColumns]) {
  source += row * pitch;
#pragma unroll 1
  for (int i = 0; i < R + kRows - 1; ++i) {
    const Sum* const values = within(row + i, rows) ? source : zeros;
    if (kApart && i >= kRows - 1 && i < R) {
      multiply<kTaps, false>(values, weight, i, R, sum);
    } else {
      multiply<kTaps, true>(values, weight, i, R, sum);
    }
    source += pitch;
    weight += kChunk;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    depthwise_tiles(const T* x, const T* w, const T* bias, T* y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int first_plane = static_cast<int>(blockIdx.x) * g.block_planes;
  const int planes = min(g.block_planes, g.planes - first_plane);
  const int first_channel = first_plane / g.N;
  // The block's first output, and the element of x that its first tap falls on; it need not exist.
  const int p0 = static_cast<int>(blockIdx.y) * g.row_items * kRows;
  const int q0 = static_cast<int>(blockIdx.z) * g.column_items * kColumns;
  const int top_row = p0 - g.top;
  const int left_column = q0 - g.left;
  const int low = min(max(top_row, 0), g.H);
  const int rows = max(0, min(g.H, top_row + g.row_items * kRows + g.R - 1) - low);

  // Shared memory: the rows of x of every plane, a row of zeros, w, and where every plane's first row is in x.
  Sum* const values = reinterpret_cast<Sum*>(shared);
  const int plane_pitch = g.block_rows * g.pitch;
  Sum* const zeros = values + g.block_planes * plane_pitch;
  Sum* const weights = zeros + g.pitch;
  int64* const sources = reinterpret_cast<int64*>(weights + g.block_channels * g.channel_pitch);
  for (int i = thread * kWidest; i < g.block_planes * plane_pitch + g.pitch; i += kThreads * kWidest) {
    const Sum nothing[kWidest] = {};
    store_narrowed<kWidest>(values + i, nothing);
  }
  const int channels = (first_plane + planes - 1) / g.N - first_channel + 1;
  const int kernel = g.R * g.S;
  for (int i = thread; i < channels * kernel; i += kThreads) {
    const int channel = i / kernel;
    const int tap = i - channel * kernel;
    const int r = tap / g.S;
    const int s = tap - r * g.S;
    const int given = kTurned ? kernel - 1 - tap : tap;
    weights[channel * g.channel_pitch + (s / kChunk * g.R + r) * kChunk + s % kChunk] =
        widen(w[static_cast<int64>(first_channel + channel) * kernel + given]);
  }
  for (int plane = thread; plane < planes; plane += kThreads) {
    const int k = (first_plane + plane) / g.N;
    const int n = first_plane + plane - k * g.N;
    sources[plane] = ((static_cast<int64>(n) * (g.K / g.multiplier) + k / g.multiplier) * g.H + low) * g.W;
  }
  __syncthreads();

  // Neighbouring threads take neighbouring vectors of a row of x, and each several before it waits for the first.
  const int first_vector = max(left_column, 0) / kInVector;
  const int row_vectors = max(0, (min(g.W, left_column + g.pitch) + kInVector - 1) / kInVector - first_vector);
  if (rows > 0 && row_vectors > 0) {
    const int step_rows = kThreads / row_vectors;
    const int step_vectors = kThreads % row_vectors;
    int plane = thread / row_vectors / rows;
    int row = thread / row_vectors % rows;
    int vector = thread % row_vectors;
    while (plane < planes) {
      Sum loaded[kBatch][kInVector];
      int place[kBatch];   // of the first value of the vector's row
      int column[kBatch];  // of the vector in that row
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool present = plane < planes;
        place[b] = present ? (plane * g.block_rows + row) * g.pitch : kNowhere;
        column[b] = (first_vector + vector) * kInVector - left_column;
        const int64 offset = static_cast<int64>(row) * g.W + (first_vector + vector) * kInVector;
        load_widened<kInVector>(x + (present ? sources[plane] + offset : 0), present, loaded[b]);
        vector += step_vectors;
        row += step_rows;
        if (vector >= row_vectors) {
          vector -= row_vectors;
          ++row;
        }
        for (; row >= rows; row -= rows) ++plane;
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int e = 0; e < kInVector; ++e)
          if (place[b] != kNowhere && within(column[b] + e, g.pitch)) values[place[b] + column[b] + e] = loaded[b][e];
    }
  }
  __syncthreads();

  const int items = g.row_items * g.column_items;
  const int plane = thread / items;
  if (plane >= planes) return;
  const int item_row = thread % items / g.column_items;
  const int item_column = thread % items % g.column_items;
  const int k = (first_plane + plane) / g.N;
  const int n = first_plane + plane - k * g.N;

  Sum sum[kRows][kColumns];
  const Sum start = bias == nullptr ? Sum(0) : widen(bias[k]);
#pragma unroll
  for (int t = 0; t < kRows; ++t)
#pragma unroll
    for (int v = 0; v < kColumns; ++v) sum[t][v] = start;

  const int row = top_row + item_row * kRows - low;
  const Sum* source = values + plane * plane_pitch + item_column * kColumns;
  const Sum* no_row = zeros + item_column * kColumns;
  const Sum* weight = weights + (k - first_channel) * g.channel_pitch;
  if constexpr (kWhole) {
    for (int s = 0; s + kChunk <= g.S; s += kChunk) {
      multiply_rows<kChunk, true>(source, no_row, row, rows, g.pitch, weight, g.R, sum);
      source += kChunk;
      no_row += kChunk;
      weight += g.R * kChunk;
    }
  }
  // Behind whole chunks a tail is the smaller part of the work: where it has much code, one copy compiles sooner.
  constexpr bool kTailApart = !kWhole || kTail <= 4;
  if constexpr (kTail > 0) multiply_rows<kTail, kTailApart>(source, no_row, row, rows, g.pitch, weight, g.R, sum);

  const int p = p0 + item_row * kRows;
  const int q = q0 + item_column * kColumns;
  T* result = y + ((static_cast<int64>(n) * g.K + k) * g.P + p) * g.Q + q;
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
#pragma unroll
    for (int v = 0; v < kColumns; v += kOutVector)
      if (p + t < g.P && q + v < g.Q) store_narrowed<kOutVector>(result + v, &sum[t][v]);
    result += g.Q;
  }
}
