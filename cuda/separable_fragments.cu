// Depthwise-separable convolution in one kernel (sm_90), at stride 1 without dilation, of (N, C, H, W) with few
// channels: what is in between never leaves the registers. See fragments.cuh.
//
// y (K, pixels) = w (K, C) middle (C, pixels): the middle is the right operand, a lane's pixels are one column of as
// many products, and of the sums a lane has neighbours of a row: of 16 bits eight, of 32 bits twice four.
//
// Compile-time values: those of fragments.cuh, and WHOLE (whether rows of x and y are whole pieces). Where they are
// not, pieces of x come as they lie in memory, from boundary to boundary, and are shifted into place once they have
// landed; and results go through shared memory, where the lanes of a warp take neighbours.
#include "fragments.cuh"

constexpr bool kWhole = CUCONV_WHOLE;

constexpr int kPitch = kWidest + 3 * kPiece;  // from a channel to the next, an odd number of pieces
constexpr int kSlot = kDepth * kPitch;
constexpr int kTapPitch = (kTaps + 1 + 3) / 4 * 4;  // of a channel's taps, with its bias behind them
// Rows of w that are multiplied at a time, in products: taking the middle's terms apart is shared by them.
constexpr int kTogether = kTerms == 2 ? 2 : 1;
constexpr int kRowsTogether = kTogether * kProductRows;

// Of results on their way, a row of w after the other.
constexpr int kPagePitch = kLaneRows * kGroups * kColumns + kPiece;
constexpr int kPage = kWhole ? 0 : kProductRows * kPagePitch;

static_assert(!kChannelsLast && (kWhole ? kBringers == 1 : kDepth % kBringers == 0));
static_assert(kGroups == kProductColumns && kWidest % (2 * kPiece) == 0 && kLeft < kPiece);

// Copies a piece of each channel of a row, of those that are a lane's: from `first` on, kApart apart. Zeros where there
// is nothing to copy.
template <int kApart>
__device__ __forceinline__ void copy_channels(T* to, const T* x, const T* from, bool exists, int first, int channels,
                                              int64 plane) {
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
  static_assert(kWarp % kAbreast == 0);
  const int H = g.middle.H;
  const int W = g.middle.W;
  const int64 plane = static_cast<int64>(H) * W;
  const int piece = lane % kAbreast * kPiece;
  const int channel = lane / kAbreast;
  int row = 0;
#pragma unroll 1
  for (int task = static_cast<int>(blockIdx.x); task < g.tasks; task += static_cast<int>(gridDim.x)) {
    const Task at(g, task);
    const T* const image = x + static_cast<int64>(at.image) * g.middle.channels * plane;
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
      ring.announce_copies(row);
    }
  }
}

// A row of x on its way to the ring.
struct Arrival {
  int64 start;  // the element of the first channel that is the slot's first column, which need not exist
  int v;        // its column
  int columns;  // of the slot
  bool exists;
};

constexpr int kOwnChannels = kDepth / kBringers;  // of a warp that fills the ring

// Where a channel's first column is among the pieces of its slot.
__device__ __forceinline__ int phase_of(int64 start) { return static_cast<int>(start & (kPiece - 1)); }

// Begins to copy a row of some channels to the slot's, `to`, piece by piece as they lie in memory.
__device__ __forceinline__ void copy_pieces(const Parameters& g, const T* x, T* to, const Arrival& row, int first,
                                            int lane) {
  constexpr int kPieces = kPitch / kPiece;
  const int64 plane = static_cast<int64>(g.middle.H) * g.middle.W;
  const int64 elements = g.N * plane * g.middle.channels;
#pragma unroll 4
  for (int item = lane; item < kOwnChannels * kPieces; item += kWarp) {
    const int c = item / kPieces;
    const int piece = item - c * kPieces;
    const int64 start = row.start + (first + c) * plane;
    const int64 element = start - phase_of(start) + piece * kPiece;
    if (row.exists && first + c < g.middle.channels && piece * kPiece < phase_of(start) + row.columns && element >= 0 &&
        element < elements)
      ptx::copy_async_part(to + c * kPitch + piece * kPiece, x + element,
                           static_cast<int>(min(elements - element, static_cast<int64>(kPiece)) * sizeof(T)));
  }
}

// Shifts them into place, and makes zeros of what is outside x.
__device__ __forceinline__ void shift_pieces(const Parameters& g, T* to, const Arrival& row, int first, int lane) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  constexpr int kWords = kPitch / kPerWord;  // of a channel
  constexpr int kOwnWords = (kWords + kWarp - 1) / kWarp;
  constexpr int kTogether = 4;
  const int64 plane = static_cast<int64>(g.middle.H) * g.middle.W;
#pragma unroll 1
  for (int c = 0; c < kOwnChannels; c += kTogether) {
    uint32 value[kTogether][kOwnWords];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      if (c + t >= kOwnChannels) break;
      const int phase = phase_of(row.start + (first + c + t) * plane);
      const uint32* const words = reinterpret_cast<const uint32*>(to + (c + t) * kPitch) + phase / kPerWord;
      const bool exists = row.exists && first + c + t < g.middle.channels;
#pragma unroll
      for (int i = 0; i < kOwnWords; ++i) {
        const int word = lane + i * kWarp;
        if (word * kPerWord >= row.columns) break;
        value[t][i] = words[word];
        if constexpr (kHalves) value[t][i] = __funnelshift_r(value[t][i], words[word + 1], phase % 2 * 16);
        value[t][i] = exists ? value[t][i] & mask_of_columns<T>(row.v + word * kPerWord, g.middle.W) : 0;
      }
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
#pragma unroll
      for (int i = 0; i < kOwnWords; ++i) {
        const int word = lane + i * kWarp;
        if (c + t < kOwnChannels && word * kPerWord < row.columns)
          reinterpret_cast<uint32*>(to + (c + t) * kPitch)[word] = value[t][i];
      }
  }
}

// As bring_rows, of rows that begin anywhere, by the lanes of one warp of kBringers; each has channels of its own.
__device__ __forceinline__ void bring_rows_from_anywhere(const Parameters& g, const T* x, T* slots, const Ring& ring,
                                                         int bringer, int lane) {
  constexpr int kAhead = 2;  // rows that are copied while an earlier one is shifted
  const int first = bringer * kOwnChannels;
  const int H = g.middle.H;
  const int64 plane = static_cast<int64>(H) * g.middle.W;
  T* const own = slots + first * kPitch;
  Arrival arrivals[kAhead + 1];  // the newest one last
  int row = 0;
  const auto advance = [&] {
    ptx::copy_async_commit();
    if (row >= kAhead) {
      ptx::copy_async_wait<kAhead>();
      __syncwarp();
      shift_pieces(g, own + (row - kAhead) % kSlots * kSlot, arrivals[0], first, lane);
      ring.announce(row - kAhead);
    }
    ++row;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) arrivals[i] = arrivals[i + 1];
  };
#pragma unroll 1
  for (int task = static_cast<int>(blockIdx.x); task < g.tasks; task += static_cast<int>(gridDim.x)) {
    const Task at(g, task);
    const int rows = at.rows_of_x();
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const int h = at.p - g.middle.top + r;
      Arrival& newest = arrivals[kAhead];
      newest.v = at.q - kPiece;
      const int64 row_of_image = static_cast<int64>(h) * g.middle.W + newest.v;
      newest.start = static_cast<int64>(at.image) * g.middle.channels * plane + row_of_image;
      newest.columns = at.groups * kColumns + 2 * kPiece;
      newest.exists = within(h, H);
      ring.await_slot(row);
      copy_pieces(g, x, own + row % kSlots * kSlot, newest, first, lane);
      advance();
    }
  }
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) advance();
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
    if (kDepthBlocks * kPixels > 32 && block > 0 && block % 2 == 0) __syncwarp();
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
  T* const pages = reinterpret_cast<T*>(biases + padded_K);
  uint64* const barriers = reinterpret_cast<uint64*>(pages + kWarps * kPage);
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
  for (int k = thread; k < padded_K; k += kThreads)
    biases[k] = bias != nullptr && k < g.K ? float(widen(bias[k])) : 0.0f;
  ring.init(thread);
  __syncthreads();
  if (warp >= kWarps) {
    if constexpr (kWhole) {
      bring_rows(g, x, slots, ring, lane);
    } else {
      bring_rows_from_anywhere(g, x, slots, ring, warp - kWarps, lane);
    }
    return;
  }

  const int64 plane = static_cast<int64>(g.P) * g.Q;
  // The lane's column of products, as a group of pixels; sums are then neighbours: of 16 bits 8 of a lane, of 32 bits 4
  // of each of four lanes.
  T* const page = pages + warp * kPage;
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
    T* const result = y + static_cast<int64>(at.image) * g.K * plane + static_cast<int64>(at.p) * g.Q + at.q;
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
        rows[h] = slots + (rows_before + unit * kLaneRows + h) % kSlots * kSlot + first_column + offset;
      Fragments middle;
      make_fragments(middle, rows, taps + channel * kTapPitch);
      const int next = tile + kWarps;
      const int lowest_of_next = next * kGroups < groups ? next * kGroups / at.groups * kLaneRows : at.rows_of_x();
      ring.release(min(ring.landed, rows_before + lowest_of_next), lane);

      const int own_first = unit * kLaneRows * g.Q + first_column;
      const int own_rows = tile * kGroups + own_group <= last ? min(kLaneRows, at.rows - unit * kLaneRows) : 0;
      float probe = 0;  // NaN once a sum is not finite

      // Where the groups lie whose sums are this lane's, and how many rows of them exist; or the pixel of each row that
      // the lane stores.
      int place[2];
      int rows_of[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int other = kWhole ? lane % 4 * 2 + e : kHalves ? column : column % 4 * 2 + column / 4;
        place[e] = __shfl_sync(0xffffffffu, own_first, 4 * other);
        rows_of[e] = __shfl_sync(0xffffffffu, own_rows, 4 * other);
      }
      if (!kWhole) {
        const int pixel = place[0] + lane % 4;
        if (place[0] % g.Q + lane % 4 >= at.columns) rows_of[0] = 0;
        place[0] = pixel;
      }
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
        for (int t = 0; t < kTogether; ++t) {
          if (!kWhole) __syncwarp();
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + lane / 4;
            const int k = first + t * kProductRows + row;
            if (kWhole && k >= g.K) continue;
            T* const to = result + k * plane;
            T* const on_page = page + row * kPagePitch;
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
              constexpr int kAtOnce = kHalves ? 2 * kColumns : kColumns;
#pragma unroll
              for (int e = 0; e < 2 * kColumns / kAtOnce; ++e) {
                const int column = lane % 4 * kAtOnce + e * 4 * kAtOnce;
                if (!kWhole) {
                  store_narrowed<kAtOnce>(on_page + p * kGroups * kColumns + column, value[e]);
                } else if (p < rows_of[e]) {
                  store_narrowed<kAtOnce>(to + place[e] + p * g.Q, value[e]);
                }
              }
            }
          }
          if constexpr (!kWhole) {
            __syncwarp();
            const int k = first + t * kProductRows;
            T* to = result + k * plane + place[0];
#pragma unroll
            for (int row = 0; row < kProductRows; ++row) {
#pragma unroll
              for (int p = 0; p < kLaneRows; ++p)
                if (k + row < g.K && p < rows_of[0])
                  to[p * g.Q] = page[row * kPagePitch + p * kGroups * kColumns + lane];
              to += plane;
            }
          }
        }
      }
      if (kTerms == 2 && __any_sync(0xffffffffu, probe != 0)) {
        __syncwarp();
        for (int e = 0; e < (kWhole ? 2 : 1); ++e) {
          const int row = place[e] / g.Q;
          mend(g, x, depthwise_w, depthwise_bias, w, biases, y, at.image, at.p + row, at.q + place[e] - row * g.Q,
               rows_of[e], kWhole ? kColumns : 1, kWhole ? lane / 4 : 0, kWhole ? kProductRows / 2 : 1);
        }
      }
    }
    tile -= (groups + kGroups - 1) / kGroups;
    rows_before += at.rows_of_x();
  }
  ring.release(rows_before, lane);
}
