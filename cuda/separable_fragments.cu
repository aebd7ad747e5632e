// Depthwise-separable convolution in one kernel (sm_90), at stride 1 without dilation, of (N, C, H, W) with few channels:
// what is in between never leaves the registers. See fragments.cuh.
//
// y (K, pixels) = w (K, C) middle (C, pixels): the middle is the right operand, a lane's pixels are one column of as many
// products, and of the sums a lane has neighbours of a row: of 16 bits eight, of 32 bits twice four.
#include "fragments.cuh"

static_assert(!kChannelsLast);

constexpr int kPitch = kWidest + 3 * kPiece;  // from a channel to the next, an odd number of pieces
constexpr int kSlot = kDepth * kPitch;
constexpr int kTapPitch = (kTaps + 1 + 3) / 4 * 4;  // of a channel's taps, with its bias behind them
// Rows of w that are multiplied at a time, in products: taking the middle's terms apart is shared by them.
constexpr int kTogether = kTerms == 2 ? 2 : 1;
constexpr int kRowsTogether = kTogether * kProductRows;

static_assert(kGroups == kProductColumns && kWidest % (2 * kPiece) == 0 && kLeft < kPiece);

// Copies a piece of each channel of a row, of those that are a lane's: from `first` on, kApart apart. Zeros where there is
// nothing to copy.
template <int kApart>
__device__ __forceinline__ void copy_channels(T* to, const T* x, const T* from, bool exists, int first, int channels, int64 plane) {
  const int64 step = exists ? kApart * plane : 0;
  const int count = exists ? channels - first : 0;
#pragma unroll
  for (int c = 0; c < kDepth; c += kApart) {
    if (kDepth % kApart > 0 && first + c >= kDepth) break;
    ptx::copy_async_part(to + c * kPitch, c < count ? from : x, c < count ? 16 : 0);
    from += step;
  }
}

// Keeps the ring filled, by the lanes of one warp; what is outside x is zero.
__device__ __forceinline__ void bring_rows(const Parameters& g, const T* x, T* slots, const Ring& ring,
                                           int lane) {
  // A row's pieces, but for one before and one behind: so many neighbours of as many channels as there are lanes for.
  constexpr int kAbreast = kWidest / kPiece;
  constexpr int kChannelsAbreast = kWarp / kAbreast;
  const int H = g.middle.H;
  const int W = g.middle.W;
  const int64 plane = static_cast<int64>(H) * W;
  const int piece = lane % kAbreast * kPiece;
  const int channel = lane / kAbreast;
  int row = 0;
#pragma unroll 1
  for (int task = static_cast<int>(blockIdx.x); task < g.tasks; task += static_cast<int>(gridDim.x)) {
    const Task at(g, task);
    const T* const image = x + at.image * g.middle.channels * plane;
    // The lane's columns, counted from that of the slot's first.
    const int inner = kPiece + piece;
    const int outer = lane % 2 * (at.groups * kColumns + kPiece);
    const bool has_inner = piece < at.groups * kColumns;
    const int rows = at.rows_of_x();
#pragma unroll 1
    for (int r = 0; r < rows; ++r, ++row) {
      const int h = at.p - g.middle.top + r;
      const bool row_exists = within(h, H);
      const int64 offset = static_cast<int64>(h) * W + at.q - kPiece;
      T* const to = slots + row % kSlots * kSlot;
      ring.await_slot(row);
      if (has_inner)
        copy_channels<kChannelsAbreast>(to + channel * kPitch + inner, x, image + offset + channel * plane + inner,
                                        row_exists && within(at.q - kPiece + inner, W), channel, g.middle.channels,
                                        plane);
      copy_channels<kWarp / 2>(to + lane / 2 * kPitch + outer, x, image + offset + lane / 2 * plane + outer,
                               row_exists && within(at.q - kPiece + outer, W), lane / 2, g.middle.channels, plane);
      ring.announce(row);
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

// A lane's tile of the middle.
__device__ __forceinline__ void make_fragments(Fragments& middle, const T* const (&rows)[kRowsOfX], const float* taps) {
  constexpr int kEach = kHalves ? 2 : 1;  // channels of a word
#pragma unroll
  for (int block = 0; block < kDepthBlocks; ++block)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The compiler would have more loads under way than there are registers for.
      if (block > 0 || half > 0) __syncwarp();
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

using Sums = float[kTogether][kPixels][4];

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
      for (int i = 0; i < 4; ++i) set_words(left[t].term, i, piece[i]);
    }
#pragma unroll
    for (int n = 0; n < kPixels; ++n) {
      Right<kTerms> right;
#pragma unroll
      for (int i = 0; i < 2; ++i) set_words(right.term, i, middle.word[block][n][i]);
#pragma unroll
      for (int t = 0; t < kTogether; ++t) multiply_terms<T>(sum[t][n], left[t], right);
    }
  }
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

  T* const slots = reinterpret_cast<T*>(shared);
  T* const weights = slots + kSlots * kSlot;
  float* const taps = reinterpret_cast<float*>(weights + padded_K * kWeightPitch);
  float* const biases = taps + kDepth * kTapPitch;
  uint64* const barriers = reinterpret_cast<uint64*>(biases + padded_K);
  Ring ring = {barriers, barriers + kSlots};

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
  ring.init(thread);
  __syncthreads();
  if (warp == kWarps) return bring_rows(g, x, slots, ring, lane);

  const int64 plane = static_cast<int64>(g.P) * g.Q;
  // The lane's column of products, as a group of pixels; sums are then neighbours: of 16 bits 8 of a lane, of 32 bits 4
  // of each of four lanes.
  const int column = lane / 4;
  const int own_group = kHalves ? column : column % 2 * 4 + column / 2;
  const int channel = lane % 4 * (kHalves ? 2 : 1);
  const int offset = channel * kPitch + kPiece - kLeft - kPhase;

  int rows_before = 0;  // of x, of earlier tasks
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
      ring.await(rows_before + last / at.groups * kLaneRows + kRowsOfX);
      ring.release(lowest, lane);

      const int group = min(tile * kGroups + own_group, last);
      const int unit = group / at.groups;
      const int first_column = (group - unit * at.groups) * kColumns;
      const T* rows[kRowsOfX];
#pragma unroll
      for (int h = 0; h < kRowsOfX; ++h)
        rows[h] = slots + (rows_before + unit * kLaneRows + h) % kSlots * kSlot + first_column + offset;
      Fragments middle;
      make_fragments(middle, rows, taps + channel * kTapPitch);
      const int next = tile + kWarps;
      const int lowest_of_next = next * kGroups < groups ? next * kGroups / at.groups * kLaneRows : at.rows_of_x();
      ring.release(min(ring.landed, rows_before + lowest_of_next), lane);

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
      float probe = 0;  // NaN once a sum is not finite
#pragma unroll 1
      for (int first = 0; first < g.K; first += kRowsTogether) {
        Sums sum;
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
          const float* const of_row = biases + first + t * kProductRows + lane / 4;
#pragma unroll
          for (int n = 0; n < kPixels; ++n) {
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
                  const float z = sum[t][p * kColumns + q][half * 2 + e];
                  if (kTerms == 2) probe = fma(z, 0.0f, probe);
                  value[e][q] = activation::CUCONV_ACTIVATION(z);
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
      if (kTerms == 2 && probe != 0)
        for (int e = 0; e < 2; ++e) {
          const int row = place[e] / g.Q;
          mend(g, x, depthwise_w, depthwise_bias, w, biases, y, at.image, at.p + row, at.q + place[e] - row * g.Q,
               min(rows_of[e], kLaneRows), kColumns, lane / 4, kProductRows / 2);
        }
    }
    tile -= (groups + kGroups - 1) / kGroups;
    rows_before += at.rows_of_x();
  }
  ring.await(rows_before);
  ring.release(rows_before, lane);
}
