// Depthwise-separable convolution in one kernel (sm_90), at stride 1 without dilation, channels-last with few channels:
// what is in between never leaves the registers. See fragments.cuh.
//
// y (pixels, K) = middle (pixels, C) w' (C, K): the middle is the left operand, a lane's pixels are rows of products,
// and which channel is which of the depth, and which column of the sums, is chosen such that a lane reads and stores
// neighbours, 16 bytes of them.
#include "fragments.cuh"

static_assert(kChannelsLast && kBringers == 1);

constexpr int kChannels = kPiece;      // that a lane makes at a time, of two blocks of the depth
constexpr int kChunk = 4 * kChannels;  // and that its group does
// From a column to the next: four columns are an odd number of halves of all banks.
constexpr int kPitch = kDepth + kPiece;
constexpr int kSlotColumns = kWidest + kS - 1;
constexpr int kSlot = kSlotColumns * kPitch;
constexpr int kAbreast = 32;  // channels of the result that are made at a time
constexpr int kRowBlocks = kPixels / 2;
constexpr int kColumnBlocks = kAbreast / kProductColumns;
constexpr int kPartsOfColumn = kDepth / kPiece;

static_assert(kDepthBlocks % 2 == 0 && kDepth % kChunk == 0);
static_assert(kColumns % 2 == 0, "a lane has two rows of a product");

// Which of the depth a channel is: of a lane's channels the first half is of one block and the second of the next.
__device__ __forceinline__ int depth_of(int channel) {
  constexpr int kEach = kHalves ? 2 : 1;  // channels of a word
  const int chunk = channel / kChunk;
  const int owner = channel % kChunk / kChannels;
  const int i = channel % kChannels;
  const int block = 2 * chunk + i / (2 * kEach);
  const int word = i / kEach % 2;
  return block * kProductDepth<T> + word * (kProductDepth<T> / 2) + owner * kEach + i % kEach;
}

// Which channel of the result, of kAbreast, a column of the sums is: a lane has pairs of columns of every block.
__device__ __forceinline__ int channel_of(int column) {
  const int block = column / kProductColumns;
  const int owner = column % kProductColumns / 2;
  const int i = 2 * block + column % 2;  // of the owner's
  return i / kPiece * (4 * kPiece) + owner * kPiece + i % kPiece;
}

// Keeps the ring filled, by the lanes of one warp; what is outside x is zero.
__device__ __forceinline__ void bring_rows(const Parameters& g, const T* x, T* slots, const Ring& ring, int lane) {
  // A power of two, so that all lanes take as many columns.
  constexpr int kPartsAbreast = kPartsOfColumn > 16 ? 32 : kPartsOfColumn > 8 ? 16 : kPartsOfColumn > 4 ? 8 : 4;
  constexpr int kColumnsAbreast = kWarp / kPartsAbreast;
  const int H = g.middle.H;
  const int W = g.middle.W;
  const int C = g.middle.channels;
  int row = 0;
#pragma unroll 1
  for (int task = static_cast<int>(blockIdx.x); task < g.tasks; task += static_cast<int>(gridDim.x)) {
    const Task at(g, task);
    const int rows = at.rows_of_x();
    const int columns = at.groups * kColumns + kS - 1;
#pragma unroll 1
    for (int r = 0; r < rows; ++r, ++row) {
      const int h = at.p - g.middle.top + r;
      const int v = at.q - kLeft;
      const bool row_exists = within(h, H);
      const T* const source = x + ((static_cast<int64>(at.image) * H + h) * W + v) * C;
      T* const to = slots + row % kSlots * kSlot;
      ring.await_slot(row);
#pragma unroll 1
      for (int part = lane % kPartsAbreast; part < kPartsOfColumn; part += kPartsAbreast) {
        const int channel = part * kPiece;
        const bool exist = row_exists && channel < C;
#pragma unroll 4
        for (int column = lane / kPartsAbreast; column < columns; column += kColumnsAbreast) {
          const bool exists = exist && within(v + column, W);
          const T* const from = exists ? source + column * C + channel : x;
          ptx::copy_async_part(to + column * kPitch + channel, from, exists ? 16 : 0);
        }
      }
      ring.announce_copies(row);
    }
  }
}

// A lane's values of some channels of the middle.
__device__ __forceinline__ void make_channels(const T* const (&rows)[kRowsOfX], int channel, const float* taps,
                                              float (&sum)[kLaneRows][kColumns][kChannels]) {
  float start[kChannels];
  const auto load_taps = [&](int tap, float (&value)[kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; c += 4) {
      float four[4];
      load_widened<4>(taps + tap * kDepth + channel + c, true, four);
#pragma unroll
      for (int e = 0; e < 4; ++e) value[c + e] = four[e];
    }
  };
  load_taps(kTaps, start);
#pragma unroll
  for (int p = 0; p < kLaneRows; ++p)
#pragma unroll
    for (int q = 0; q < kColumns; ++q)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[p][q][c] = start[c];
#pragma unroll
  for (int h = 0; h < kRowsOfX; ++h) {
    float tap[kLaneRows][kS][kChannels];
#pragma unroll
    for (int p = 0; p < kLaneRows; ++p)
#pragma unroll
      for (int s = 0; s < kS; ++s)
        if (0 <= h - p && h - p < kR) load_taps((h - p) * kS + s, tap[p][s]);
#pragma unroll
    for (int v = 0; v < kColumns + kS - 1; ++v) {
      float value[kChannels];
      load_widened<kChannels>(rows[h] + v * kPitch + channel, true, value);
#pragma unroll
      for (int p = 0; p < kLaneRows; ++p)
#pragma unroll
        for (int q = 0; q < kColumns; ++q) {
          const int s = v - q;
          if (h - p < 0 || h - p >= kR || s < 0 || s >= kS) continue;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) sum[p][q][c] = fma(value[c], tap[p][s][c], sum[p][q][c]);
        }
    }
  }
}

// A lane's tile of the middle.
__device__ __forceinline__ void make_fragments(Fragments& middle, const T* const (&rows)[kRowsOfX], const float* taps) {
  constexpr int kEach = kHalves ? 2 : 1;  // channels of a word
#pragma unroll
  for (int chunk = 0; chunk < kDepth / kChunk; ++chunk) {
    // The compiler would have more loads under way than there are registers for.
    if (chunk > 0) __syncwarp();
    float sum[kLaneRows][kColumns][kChannels];
    make_channels(rows, chunk * kChunk, taps, sum);
#pragma unroll
    for (int p = 0; p < kLaneRows; ++p)
#pragma unroll
      for (int q = 0; q < kColumns; ++q)
#pragma unroll
        for (int c = 0; c < kChannels; c += kEach) {
          float value[kEach];
#pragma unroll
          for (int e = 0; e < kEach; ++e) value[e] = activation::CUCONV_DEPTHWISE_ACTIVATION(sum[p][q][c + e]);
          middle.word[2 * chunk + c / (2 * kEach)][p * kColumns + q][c / kEach % 2] = word_of<T>(value);
        }
  }
}

using Sums = float[kRowBlocks][kColumnBlocks][4];

// Products of the middle with the weights of kAbreast channels, which begin at `weights`, added to the sums.
__device__ __forceinline__ void multiply_middle(Sums& sum, const Fragments& middle, const T* weights, int lane) {
  const T* const row =
      weights + (lane % 8 + lane / 16 * 8) * kWeightPitch + lane / 8 % 2 * (kProductDepth<T> / 2);
#pragma unroll
  for (int block = 0; block < kDepthBlocks; ++block) {
    Right<kTerms> right[kColumnBlocks];
#pragma unroll
    for (int n = 0; n < kColumnBlocks; n += 2) {
      uint32 piece[4];
      ptx::load_matrices(row + n * kProductColumns * kWeightPitch + block * kProductDepth<T>, piece);
#pragma unroll
      for (int i = 0; i < 4; ++i) set_words(right[n + i / 2].term, i % 2, piece[i]);
    }
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      Left<kTerms> left;
#pragma unroll
      for (int i = 0; i < 4; ++i) set_words(left.term, i, middle.word[block][2 * m + i % 2][i / 2]);
#pragma unroll
      for (int n = 0; n < kColumnBlocks; ++n) multiply_terms<T>(sum[m][n], left, right[n]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    separable_fragments_channels_last(const T* __restrict__ x, const T* __restrict__ depthwise_w,
                                      const T* __restrict__ depthwise_bias, const T* __restrict__ w,
                                      const T* __restrict__ bias, T* __restrict__ y,
                                      const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int padded_K = (g.K + kAbreast - 1) / kAbreast * kAbreast;

  T* const slots = reinterpret_cast<T*>(shared);
  T* const weights = slots + kSlots * kSlot;
  float* const taps = reinterpret_cast<float*>(weights + padded_K * kWeightPitch);
  float* const biases = taps + (kTaps + 1) * kDepth;
  uint64* const barriers = reinterpret_cast<uint64*>(biases + padded_K);
  Ring ring = {barriers, barriers + kSlots};

  for (int i = thread; i < padded_K * kDepth; i += kThreads) {
    const int row = i / kDepth;
    const int c = i - row * kDepth;
    const int k = row / kAbreast * kAbreast + channel_of(row % kAbreast);
    T value = k < g.K && c < g.middle.channels ? w[static_cast<int64>(k) * g.middle.channels + c] : T{};
    if (!kHalves && kTerms == 1) value = narrow<T>(__uint_as_float(ptx::float_to_tf32(widen(value))));
    weights[row * kWeightPitch + depth_of(c)] = value;
  }
  for (int i = thread; i < (kTaps + 1) * kDepth; i += kThreads) {
    const int tap = i / kDepth;
    const int c = i - tap * kDepth;
    float value = 0;
    if (c < g.middle.channels) {
      if (tap < kTaps) value = widen(depthwise_w[c * kTaps + tap]);
      if (tap == kTaps && depthwise_bias != nullptr) value = widen(depthwise_bias[c]);
    }
    taps[i] = value;
  }
  for (int k = thread; k < padded_K; k += kThreads)
    biases[k] = bias != nullptr && k < g.K ? float(widen(bias[k])) : 0.0f;
  ring.init(thread);
  __syncthreads();
  if (warp == kWarps) return bring_rows(g, x, slots, ring, lane);

  const int own_group = lane / 4;
  const int own_channel = lane % 4 * kChannels;
  int rows_before = 0;  // of x, of earlier tasks
  int tile = warp;
#pragma unroll 1
  for (int task = static_cast<int>(blockIdx.x); task < g.tasks; task += static_cast<int>(gridDim.x)) {
    const Task at(g, task);
    const int groups = at.units * at.groups;
#pragma unroll 1
    for (; tile * kGroups < groups; tile += kWarps) {
      const int last = min(tile * kGroups + kGroups, groups) - 1;
      const int lowest = rows_before + tile * kGroups / at.groups * kLaneRows;
      ring.release(lowest, lane);
      ring.await(rows_before + last / at.groups * kLaneRows + kRowsOfX);

      const int group = min(tile * kGroups + own_group, last);
      const int unit = group / at.groups;
      const int first_column = (group - unit * at.groups) * kColumns;
      const T* rows[kRowsOfX];
#pragma unroll
      for (int h = 0; h < kRowsOfX; ++h)
        rows[h] = slots + (rows_before + unit * kLaneRows + h) % kSlots * kSlot + first_column * kPitch + own_channel;
      Fragments middle;
      make_fragments(middle, rows, taps + own_channel);
      const int next = tile + kWarps;
      const int lowest_of_next = next * kGroups < groups ? next * kGroups / at.groups * kLaneRows : at.rows_of_x();
      ring.release(min(ring.landed, rows_before + lowest_of_next), lane);

      const int p = at.p + unit * kLaneRows;
      const int q = at.q + first_column;
      const int rows_here = tile * kGroups + own_group <= last ? min(kLaneRows, at.rows - unit * kLaneRows) : 0;
      const int columns_here = min(kColumns, at.columns - first_column);
      T* const result = y + ((static_cast<int64>(at.image) * g.P + p) * g.Q + q) * g.K;
      const int64 row_apart = static_cast<int64>(g.Q) * g.K;
      float probe = 0;  // NaN once a sum is not finite
#pragma unroll 1
      for (int first = 0; first < g.K; first += kAbreast) {
        Sums sum;
#pragma unroll
        for (int n = 0; n < kColumnBlocks; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float start = biases[first + channel_of(n * kProductColumns + e) + lane % 4 * kPiece];
#pragma unroll
            for (int m = 0; m < kRowBlocks; ++m) sum[m][n][e] = sum[m][n][2 + e] = start;
          }
        multiply_middle(sum, middle, weights + first * kWeightPitch, lane);
#pragma unroll
        for (int p = 0; p < kLaneRows; ++p)
#pragma unroll
          for (int q = 0; q < kColumns; ++q) {
            const int pixel = p * kColumns + q;
            float value[2 * kColumnBlocks];
#pragma unroll
            for (int i = 0; i < 2 * kColumnBlocks; ++i) {
              const float z = sum[pixel / 2][i / 2][pixel % 2 * 2 + i % 2];
              if (kTerms == 2) probe = fma(z, 0.0f, probe);
              value[i] = activation::CUCONV_ACTIVATION(z);
            }
#pragma unroll
            for (int i = 0; i < 2 * kColumnBlocks; i += kPiece) {
              const int k = first + i * 4 + lane % 4 * kPiece;
              if (p < rows_here && q < columns_here && k < g.K)
                store_narrowed<kPiece>(result + p * row_apart + q * g.K + k, value + i);
            }
          }
      }
      if (kTerms == 2 && probe != 0)
        for (int e = 0; e < kPiece; ++e)
          mend(g, x, depthwise_w, depthwise_bias, w, biases, y, at.image, p, q, rows_here, columns_here,
               lane % 4 * kPiece + e, 4 * kPiece);
    }
    tile -= (groups + kGroups - 1) / kGroups;
    rows_before += at.rows_of_x();
  }
  ring.release(rows_before, lane);
}
