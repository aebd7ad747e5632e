// Depthwise-separable convolution in one kernel (sm_90), at stride 1 without dilation, of (N, C, H, W) with few channels:
// what is in between never leaves the registers.
//
// In y (K, pixels) = w (K, C) middle (C, pixels) a lane of a tensor-core product holds a few channels of one column of
// the middle, and which pixel is which column is free to choose. So a lane takes four neighbouring pixels in kLaneRows
// rows as its columns of as many products, makes all channels of the middle that it holds there from rows of x in shared
// memory, and is left with fragments; the sums that come out are eight or twice four neighbours of a row, which are
// stored as they are. Warps meet nowhere: each takes tiles of eight groups of such pixels, all channels, and goes down
// the rows with a ring of them, which one more warp keeps filled.
//
// A block takes tasks, each some rows of a strip of columns of an image, and counts the rows of x of all its tasks
// through; row n is in slot n % kSlots of the ring.
//
// Compile-time values: T; R, S, LEFT (padding before a row, at most a piece), VECTOR, STRIP (elements of a piece, of 16
// bytes) and DEPTHWISE_ACTIVATION, as in middle.cuh; LANE_ROWS; DEPTH_BLOCKS (of channels, as many as a product takes
// of the depth); PITCH (elements from a channel to the next in a slot: an odd number of pieces); SLOTS; WARPS (that
// compute); TERMS (of an element of float32: 1 or 2, see matrices.cuh); ACTIVATION.
#include "activations.cuh"
#include "matrices.cuh"

using T = CUCONV_T;
constexpr bool kChannelsLast = false;

#include "middle.cuh"

constexpr int kLaneRows = CUCONV_LANE_ROWS;
constexpr int kDepthBlocks = CUCONV_DEPTH_BLOCKS;
constexpr int kPitch = CUCONV_PITCH;
constexpr int kSlots = CUCONV_SLOTS;
constexpr int kWarps = CUCONV_WARPS;
constexpr int kTerms = CUCONV_TERMS;

constexpr int kThreads = (kWarps + 1) * kWarp;
constexpr int kPiece = kVector;
constexpr bool kHalves = sizeof(T) == 2;
constexpr int kDepth = kDepthBlocks * kProductDepth<T>;
constexpr int kSlot = kDepth * kPitch;
constexpr int kWeightPitch = kDepth + pad_of<T>(false);
constexpr int kColumns = 4;                      // of a lane
constexpr int kGroups = kProductColumns;         // of pixels, in a tile
constexpr int kProducts = kLaneRows * kColumns;  // that a tile is the columns of
constexpr int kRowsOfX = kLaneRows + kR - 1;
constexpr int kTapPitch = (kTaps + 1 + 3) / 4 * 4;  // with the bias behind the taps
// Rows of w that are multiplied at a time, in products: taking the middle's terms apart is shared by them.
constexpr int kTogether = kTerms == 2 ? 2 : 1;
constexpr int kRowsTogether = kTogether * kProductRows;

static_assert(kPiece * sizeof(T) == 16 && kPitch % (2 * kPiece) == kPiece);
static_assert(kLeft < kPiece);

struct Parameters {
  int K, P, Q;
  int strips, strip;  // of an image, and columns of one
  int chunks, chunk;  // of a strip, and rows of one
  int tasks;
  Middle middle;
};

// Some rows of a strip of an image.
struct Task {
  int image;
  int p, rows;
  int q, groups;  // of kColumns columns
  int units;      // of kLaneRows rows

  __device__ __forceinline__ Task(const Parameters& g, int task) {
    const int upper = task / g.strips;
    q = (task - upper * g.strips) * g.strip;
    image = upper / g.chunks;
    p = (upper - image * g.chunks) * g.chunk;
    rows = min(g.chunk, g.P - p);
    groups = min(g.strip, g.Q - q) / kColumns;
    units = (rows + kLaneRows - 1) / kLaneRows;
  }

  __device__ __forceinline__ int rows_of_x() const { return units * kLaneRows + kR - 1; }
};

// Keeps the ring filled, by the lanes of one warp; what is outside x is zero.
__device__ __forceinline__ void bring_rows(const Parameters& g, const T* x, T* ring, uint64* full, uint64* empty,
                                           int lane) {
  constexpr int kPieces = kPitch / kPiece;
  const int H = g.middle.H;
  const int W = g.middle.W;
  const int64 plane = static_cast<int64>(H) * W;
  int row = 0;
#pragma unroll 1
  for (int task = static_cast<int>(blockIdx.x); task < g.tasks; task += static_cast<int>(gridDim.x)) {
    const Task at(g, task);
    const T* const image = x + at.image * g.middle.channels * plane;
    const int first = at.q - kPiece;
    const int pieces = at.groups * kColumns / kPiece + 2;
    const int rows = at.rows_of_x();
#pragma unroll 1
    for (int r = 0; r < rows; ++r, ++row) {
      const int slot = row % kSlots;
      const int h = at.p - g.middle.top + r;
      const bool row_exists = within(h, H);
      const T* const source = image + static_cast<int64>(h) * W + first;
      T* const to = ring + slot * kSlot;
      if (row >= kSlots) ptx::barrier_wait(&empty[slot], (row / kSlots - 1) % 2);
#pragma unroll 8
      for (int item = lane; item < kDepth * kPieces; item += kWarp) {
        const int c = item / kPieces;
        const int piece = item - c * kPieces;
        const bool exists = row_exists && c < g.middle.channels && within(first + piece * kPiece, W);
        const T* const from = exists ? source + c * plane + piece * kPiece : x;
        if (piece < pieces) ptx::copy_async_part(to + c * kPitch + piece * kPiece, from, exists ? 16 : 0);
      }
      ptx::copy_async_arrive(&full[slot]);
    }
  }
}

// The columns of x that a lane's columns of one row meet; `source` is a multiple of kColumns elements.
constexpr int kSpan = kColumns + kS - 1;
constexpr int kPhase = (kPiece - kLeft) % kColumns;

__device__ __forceinline__ void load_span(const T* source, float (&value)[kSpan]) {
#pragma unroll
  for (int v = 0; v < (kPhase + kSpan + kColumns - 1) / kColumns; ++v) {
    const int from = v * kColumns - kPhase;
    const int first = max(0, -from);
    const int last = min(kColumns, kSpan - from) - 1;
    float four[kColumns];
    if (first / 2 != last / 2) {
      load_widened<kColumns>(source + v * kColumns, true, four);
    } else if (first < last || kHalves) {
      float two[2];
      load_widened<2>(source + v * kColumns + first / 2 * 2, true, two);
      four[first / 2 * 2] = two[0];
      four[first / 2 * 2 + 1] = two[1];
    } else {
      four[first] = widen(source[v * kColumns + first]);
    }
#pragma unroll
    for (int e = 0; e < kColumns; ++e)
      if (first <= e && e <= last) value[from + e] = four[e];
  }
}

// A lane's values of one channel of the middle.
__device__ __forceinline__ void make_channel(const T* const (&rows)[kRowsOfX], int offset, const float* taps,
                                             float (&sum)[kLaneRows][kColumns]) {
  float tap[kTapPitch];
#pragma unroll
  for (int i = 0; i < kTapPitch; i += 4) {
    float four[4];
    load_widened<4>(taps + i, true, four);
#pragma unroll
    for (int e = 0; e < 4; ++e) tap[i + e] = four[e];
  }
#pragma unroll
  for (int p = 0; p < kLaneRows; ++p)
#pragma unroll
    for (int q = 0; q < kColumns; ++q) sum[p][q] = tap[kTaps];
#pragma unroll
  for (int h = 0; h < kRowsOfX; ++h) {
    float value[kSpan];
    load_span(rows[h] + offset, value);
#pragma unroll
    for (int p = 0; p < kLaneRows; ++p) {
      const int r = h - p;
      if (r < 0 || r >= kR) continue;
#pragma unroll
      for (int q = 0; q < kColumns; ++q)
#pragma unroll
        for (int s = 0; s < kS; ++s) sum[p][q] = fma(value[q + s], tap[r * kS + s], sum[p][q]);
    }
  }
#pragma unroll
  for (int p = 0; p < kLaneRows; ++p)
#pragma unroll
    for (int q = 0; q < kColumns; ++q) sum[p][q] = activation::CUCONV_DEPTHWISE_ACTIVATION(sum[p][q]);
}

// All that a lane has of a tile of the middle, as the columns of products: 16-bit two channels in a word.
struct Fragments {
  uint32 word[kDepthBlocks][kProducts][2];
};

// Values of the middle as a product takes them, or as its terms are made of.
template <class U, int kCount>
__device__ __forceinline__ uint32 word_of(const float (&value)[kCount]) {
  if constexpr (kCount == 2) {
    return narrow_pair(U{}, value[0], value[1]);
  } else {
    return kTerms == 2 ? __float_as_uint(value[0]) : ptx::float_to_tf32(value[0]);
  }
}

__device__ __forceinline__ void make_fragments(Fragments& middle, const T* const (&rows)[kRowsOfX], const float* taps) {
  constexpr int kEach = kHalves ? 2 : 1;  // channels of a word
#pragma unroll
  for (int block = 0; block < kDepthBlocks; ++block)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum[kEach][kLaneRows][kColumns];
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int channel = block * kProductDepth<T> + half * (kProductDepth<T> / 2) + e;
        make_channel(rows, channel * kPitch, taps + channel * kTapPitch, sum[e]);
      }
#pragma unroll
      for (int p = 0; p < kLaneRows; ++p)
#pragma unroll
        for (int q = 0; q < kColumns; ++q) {
          float value[kEach];
#pragma unroll
          for (int e = 0; e < kEach; ++e) value[e] = sum[e][p][q];
          middle.word[block][p * kColumns + q][half] = word_of<T>(value);
        }
    }
}

using Sums = float[kTogether][kProducts][4];

// Products of some rows of w with the middle, added to the sums; `weights` is where those rows begin.
__device__ __forceinline__ void multiply_middle(Sums& sum, const T* weights, const Fragments& middle, int lane) {
  const T* const row = weights + lane % 16 * kWeightPitch + lane / 16 * (kProductDepth<T> / 2);
#pragma unroll
  for (int block = 0; block < kDepthBlocks; ++block) {
    Left<kTerms> left[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      uint32 piece[4];
      ptx::load_matrices(row + t * kProductRows * kWeightPitch + block * kProductDepth<T>, piece);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kTerms == 2) {
          set_terms(left[t].term, i, __uint_as_float(piece[i]));
        } else {
          left[t].term[0][i] = piece[i];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      Right<kTerms> right;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kTerms == 2) {
          set_terms(right.term, i, __uint_as_float(middle.word[block][n][i]));
        } else {
          right.term[0][i] = middle.word[block][n][i];
        }
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) multiply_terms<T>(sum[t][n], left[t], right);
    }
  }
}

// A result without its bias, for what is not finite: its terms are no numbers.
__device__ __noinline__ float sum_plainly(const Middle& g, const T* x, const T* depthwise_w, const T* depthwise_bias,
                                          const T* w, int channel, const Place& at) {
  float total = 0;
  for (int d = 0; d < g.channels; ++d)
    total = fma(middle_plainly(g, x, depthwise_w, depthwise_bias, d, at),
                float(widen(w[static_cast<int64>(channel) * g.channels + d])), total);
  return total;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    separable_fragments(const T* __restrict__ x, const T* __restrict__ depthwise_w,
                        const T* __restrict__ depthwise_bias, const T* __restrict__ w, const T* __restrict__ bias,
                        T* __restrict__ y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int padded_K = (g.K + kRowsTogether - 1) / kRowsTogether * kRowsTogether;

  T* const ring = reinterpret_cast<T*>(shared);
  T* const weights = ring + kSlots * kSlot;
  float* const taps = reinterpret_cast<float*>(weights + padded_K * kWeightPitch);
  float* const biases = taps + kDepth * kTapPitch;
  uint64* const full = reinterpret_cast<uint64*>(biases + padded_K);
  uint64* const empty = full + kSlots;

  for (int i = thread; i < padded_K * kDepth; i += kThreads) {
    const int k = i / kDepth;
    const int c = i - k * kDepth;
    T value = k < g.K && c < g.middle.channels ? w[static_cast<int64>(k) * g.middle.channels + c] : T{};
    if (!kHalves && kTerms == 1) value = narrow<T>(__uint_as_float(ptx::float_to_tf32(widen(value))));
    weights[k * kWeightPitch + c] = value;
  }
  for (int i = thread; i < kDepth * kTapPitch; i += kThreads) {
    const int c = i / kTapPitch;
    const int tap = i - c * kTapPitch;
    float value = 0;
    if (c < g.middle.channels) {
      if (tap < kTaps) value = widen(depthwise_w[c * kTaps + tap]);
      if (tap == kTaps && depthwise_bias != nullptr) value = widen(depthwise_bias[c]);
    }
    taps[i] = value;
  }
  for (int k = thread; k < padded_K; k += kThreads) biases[k] = bias != nullptr && k < g.K ? float(widen(bias[k])) : 0.0f;
  if (thread < kSlots) {
    ptx::barrier_init(&full[thread], kWarp);
    ptx::barrier_init(&empty[thread], kWarps);
  }
  __syncthreads();
  if (warp == kWarps) return bring_rows(g, x, ring, full, empty, lane);

  const int64 plane = static_cast<int64>(g.P) * g.Q;
  // The lane's column of products, as a group of pixels; sums are then neighbours: of 16 bits 8 of a lane, of 32 bits 4
  // of each of four lanes.
  const int column = lane / 4;
  const int own_group = kHalves ? column : column % 2 * 4 + column / 2;
  const int channel = lane % 4 * (kHalves ? 2 : 1);
  const int offset = channel * kPitch + kPiece - kLeft - kPhase;

  int rows_before = 0;  // of x, of earlier tasks
  int landed = 0;       // rows that this warp has waited for
  int released = 0;     // and those that it will not read again
  const auto await = [&](int row) {
    for (; landed < row; ++landed) ptx::barrier_wait(&full[landed % kSlots], landed / kSlots % 2);
  };
  const auto release = [&](int row) {
    __syncwarp();
    for (; released < row; ++released)
      if (lane == 0) ptx::barrier_arrive(&empty[released % kSlots]);
  };

  int tile = warp;
#pragma unroll 1
  for (int task = static_cast<int>(blockIdx.x); task < g.tasks; task += static_cast<int>(gridDim.x)) {
    const Task at(g, task);
    const int groups = at.units * at.groups;
    T* const result = y + at.image * g.K * plane + static_cast<int64>(at.p) * g.Q + at.q;
#pragma unroll 1
    for (; tile * kGroups < groups; tile += kWarps) {
      const int last = min(tile * kGroups + kGroups, groups) - 1;
      const int lowest = rows_before + tile * kGroups / at.groups * kLaneRows;
      await(rows_before + last / at.groups * kLaneRows + kRowsOfX);
      release(lowest);

      const int group = min(tile * kGroups + own_group, last);
      const int unit = group / at.groups;
      const int first_column = (group - unit * at.groups) * kColumns;
      const T* rows[kRowsOfX];
#pragma unroll
      for (int h = 0; h < kRowsOfX; ++h)
        rows[h] = ring + (rows_before + unit * kLaneRows + h) % kSlots * kSlot + first_column + offset;
      Fragments middle;
      make_fragments(middle, rows, taps + channel * kTapPitch);
      const int next = tile + kWarps;
      const int lowest_of_next = next * kGroups < groups ? next * kGroups / at.groups * kLaneRows : at.rows_of_x();
      release(min(landed, rows_before + lowest_of_next));

      // Where the groups lie whose sums are this lane's, and how many rows of them exist.
      const int own_first = unit * kLaneRows * g.Q + first_column;
      const int own_rows = tile * kGroups + own_group <= last ? at.rows - unit * kLaneRows : 0;
      int place[2];
      int rows_of[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        place[e] = __shfl_sync(0xffffffffu, own_first, lane % 4 * 8 + e * 4);
        rows_of[e] = __shfl_sync(0xffffffffu, own_rows, lane % 4 * 8 + e * 4);
      }
#pragma unroll 1
      for (int first = 0; first < g.K; first += kRowsTogether) {
        Sums sum;
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
          const float* const of_row = biases + first + t * kProductRows + lane / 4;
#pragma unroll
          for (int n = 0; n < kProducts; ++n) {
            sum[t][n][0] = sum[t][n][1] = of_row[0];
            sum[t][n][2] = sum[t][n][3] = of_row[8];
          }
        }
        multiply_middle(sum, weights + first * kWeightPitch, middle, lane);
#pragma unroll
        for (int t = 0; t < kTogether; ++t)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int k = first + t * kProductRows + half * 8 + lane / 4;
            T* const to = result + k * plane;
            if (k >= g.K) continue;
#pragma unroll
            for (int p = 0; p < kLaneRows; ++p) {
              float value[2][kColumns];
#pragma unroll
              for (int e = 0; e < 2; ++e)
#pragma unroll
                for (int q = 0; q < kColumns; ++q) {
                  float& z = value[e][q];
                  z = sum[t][p * kColumns + q][half * 2 + e];
                  if constexpr (kTerms == 2) {
                    if (!(fabsf(z) <= 3.4e38f) && p < rows_of[e]) {
                      const int pixel = place[e] + p * g.Q + q;
                      const int row = pixel / g.Q;
                      z = sum_plainly(g.middle, x, depthwise_w, depthwise_bias, w, k,
                                      Place(at.image, at.p + row, at.q + pixel - row * g.Q));
                      z += biases[k];
                    }
                  }
                  z = activation::CUCONV_ACTIVATION(z);
                }
              if constexpr (kHalves) {
                if (p < rows_of[0]) store_narrowed<2 * kColumns>(to + place[0] + p * g.Q, value[0]);
              } else {
#pragma unroll
                for (int e = 0; e < 2; ++e)
                  if (p < rows_of[e]) store_narrowed<kColumns>(to + place[e] + p * g.Q, value[e]);
              }
            }
          }
      }
    }
    tile -= (groups + kGroups - 1) / kGroups;
    rows_before += at.rows_of_x();
  }
  await(rows_before);
  release(rows_before);
}
