// Depthwise convolution, gradients of the weights and the bias, channels-last (NHWC in memory), 16-bit, on tensor cores
// (sm_80 and newer), of stride 1.
//
// A product m16n8k16 multiplies x of 8 channels at two taps (m) by dy of the same 8 channels (n), both at 16 pixels
// (k). Of every pair of channels it makes a sum over pixels, and those of a channel with itself, the diagonals of both
// halves, are what two taps get; all others are thrown away. That wastes seven products of eight, and nothing else: 8
// channels of a pixel are 16 bytes that lie together, a row of the 8x8 matrices that are loaded transposed, from any 16
// pixels, as both operands want them.
//
// A block takes some columns of dy of a few images, all at the same rows, of some neighbouring channels. Its pixels of
// one row, one image behind the other, are cut into units of 16. A warp takes a few units of 8 channels, whose sums it
// keeps in registers through a whole slab. In one turn a few rows of dy and as many of x arrive: they pass through a
// ring in shared memory, copied there several turns ahead, each element once a block, with zeros for what does not
// exist. A row of x meets the last rows of dy, which are kept in registers; columns of taps are taken two at a time. Of
// an odd number of columns, the last one's taps are taken in pairs of rows: two rows of x then meet one row of dy. A
// single tap that remains shares its product with ones, which sum dbias. In the end warps of the same channels are
// added in a fixed order; depthwise_wgrad_reduce does so with all slabs, where there are several.
//
// Rows of x in the padding are passed over, and zeros in place of dy meet what may be no number. Whatever of x or dy is
// not finite makes a sum that is not finite, be it that of dbias, which is made in any case: where there is one, the
// block does it over, plainly.
//
// Compile-time values: T; R, S; BIAS (whether dbias is wanted); FINAL (there is one slab, and no need for another
// launch); GROUPS (of 8 channels a block); WARPS (of each); UNITS (of a warp); BLOCKS (that a multiprocessor is to
// hold, which bounds the registers); ROWS (of x and of dy in a turn); STAGES (turns of the ring); X_COPIES, DY_COPIES
// (of a thread and row); DILATED.
#include "channels_last.cuh"
#include "products.cuh"
#include "row_walk.cuh"

using T = CUCONV_T;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kGroups = CUCONV_GROUPS;
constexpr int kWarps = CUCONV_WARPS;
constexpr int kUnits = CUCONV_UNITS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kRows = CUCONV_ROWS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kXCopies = CUCONV_X_COPIES;
constexpr int kDyCopies = CUCONV_DY_COPIES;
constexpr bool kDilated = CUCONV_DILATED;

constexpr int kWarp = 32;
constexpr int kThreads = kWarp * kGroups * kWarps;
// Channels of a group: 16 bytes, which are a copy too.
constexpr int kGroup = 8;
constexpr int kChannels = kGroups * kGroup;
// Elements from pixel to pixel: an odd number of 16 bytes, so that eight neighbours lie in different banks.
constexpr int kPitch = (kGroups | 1) * kGroup;
// Pixels of a unit, and of each matrix.
constexpr int kUnit = 16;
constexpr int kOctet = 8;
constexpr int kTaps = kR * kS;
constexpr int kEntries = kTaps + kBias;
// Turns on their way.
constexpr int kAhead = kStages - 1;

// Products of a row of x, in this order: pairs of columns of every kernel row; pairs of rows of the last column, if it
// is left over; ones with, where one is left over, the first row's tap of that column.
constexpr int kColumnPairs = kS / 2;
constexpr bool kLastColumn = kS % 2 == 1;
constexpr bool kSingle = kLastColumn && kR % 2 == 1;
constexpr int kRowPairs = kLastColumn ? kR / 2 : 0;
constexpr int kOfRowPairs = kR * kColumnPairs;
constexpr int kOfOnes = kOfRowPairs + kRowPairs;
constexpr int kProducts = kOfOnes + 1;

// What a stage ends with, in elements: a word that tells whether there is a turn, whether it begins a step, and for
// every row whether it is one of x. It is 0 behind the last turn.
constexpr int kWords = 16 / sizeof(T);
constexpr uint32 kTurn = 1, kBegins = 2, kBringsX = 4;

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements");
static_assert(kAhead >= 1, "a turn is copied while another is read");

struct Parameters {
  int N, K;
  int H, W, P, Q;
  int top, left;                // padding
  int stride_h, stride_w;       // 1, as what follows is of
  int dilation_h, dilation_w;
  int spacing_h;                // rows from one of a strip to the next: the dilation
  int images;                   // of a block at a time
  int columns, column_blocks;   // of dy in a block, and blocks side by side
  int x_slot;                   // pixels from one image to the next in a row of x in shared memory
  int x_pixels;                 // of those, what columns of dy meet
  int x_row_pixels;             // of a row of x of all images
  int dy_row_pixels;            // of dy: whole units
  int stage_size;               // elements of a stage, with its word
  int x_plane, dy_plane;        // elements of an image
  int x_down, dy_down;          // elements from one turn's row to the next
  int down;                     // rows of x, likewise
  int strip_rows;               // see Walk
  int rows;                     // of all strips
  int slab_rows;                // of those, a block's
  uint32 x_slot_magic, columns_magic;  // see divide
};

// What the thread copies of a row: where it is in memory, from the block's first channel in column 0 of the first image
// on, or -1 where there is none, and zeros are copied.
template <int kCopies>
__device__ __forceinline__ void find_copies(int (&copied)[kCopies], int slot, uint32 slot_magic, int images, int pixels,
                                            int first_column, int width, int plane, int channels_left, int K) {
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int item = i * kThreads + static_cast<int>(threadIdx.x);
    const int pixel = item / kGroups;
    const int image = divide(pixel, slot_magic);
    const int of_image = pixel - image * slot;
    const int channel = (item - pixel * kGroups) * kGroup;
    const int column = first_column + of_image;
    const bool exists = image < images && of_image < pixels && within(column, width) && channel < channels_left;
    copied[i] = exists ? image * plane + column * K + channel : -1;
  }
}

// Copies what was found of a row of `pixels` pixels to shared memory; it exists up to `end`.
template <int kCopies>
__device__ __forceinline__ void copy_row(T* to, const T* source, const int (&copied)[kCopies], uint32 end, int pixels) {
  const int thread = static_cast<int>(threadIdx.x);
  const int pixel = thread / kGroups;
  T* const first = to + pixel * kPitch + (thread - pixel * kGroups) * kGroup;
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    constexpr int kPixels = kThreads / kGroups;
    const bool exists = static_cast<uint32>(copied[i]) < end;
    if (i + 1 < kCopies || pixel + i * kPixels < pixels)
      ptx::copy_async_part(first + i * kPixels * kPitch, source + (exists ? copied[i] : 0), exists ? 16 : 0);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_channels_last_mma(const T* __restrict__ dy, const T* __restrict__ x, float* partials, T* dw,
                                      T* dbias, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int channel_block = static_cast<int>(blockIdx.x) / g.column_blocks;
  const int column_block = static_cast<int>(blockIdx.x) - channel_block * g.column_blocks;
  const int first_channel = channel_block * kChannels;
  const int first_q = column_block * g.columns;
  const int first_column = first_q - g.left;
  const int first_row = static_cast<int>(blockIdx.y) * g.slab_rows;
  const int unit_h = kDilated ? g.dilation_h : 1;
  const int unit_w = kDilated ? g.dilation_w : 1;

  // The last row of x once more behind it, for its taps in pairs of rows.
  constexpr int kBehind = kRowPairs > 0;
  const auto enter = [&](Walk& walk) { return enter_step<kDilated, kR, kBehind>(g, walk, 0); };
  const auto begin = [&](Walk& walk) { return begin_slab<kDilated, kR, kBehind>(g, walk, first_row); };

  // What is copied.
  T* const ring = reinterpret_cast<T*>(shared);
  const int x_row_size = g.x_row_pixels * kPitch;
  const int dy_row_size = g.dy_row_pixels * kPitch;
  const auto word_of = [&](int stage) -> uint32& {
    return *reinterpret_cast<uint32*>(ring + stage + g.stage_size - kWords);
  };
  int copied_x[kXCopies], copied_dy[kDyCopies];
  find_copies(copied_x, g.x_slot, g.x_slot_magic, g.images, g.x_pixels, first_column, g.W, g.x_plane,
              g.K - first_channel, g.K);
  find_copies(copied_dy, g.columns, g.columns_magic, g.images, g.columns, first_q, g.Q, g.dy_plane,
              g.K - first_channel, g.K);
  Walk ahead;
  const T *x_source, *dy_source;
  const auto find_sources = [&](int p) {
    const int64 image = ahead.first_image;
    x_source = x + (image * g.H + ahead.row) * g.W * g.K + first_channel;
    dy_source = dy + (image * g.P + p) * g.Q * g.K + first_channel;
  };
  find_sources(begin(ahead));
  // A turn on its way into a stage.
  const auto copy = [&](int stage) {
    uint32 turn = 0;
    if (ahead.t < ahead.turns) {
      turn = kTurn | (ahead.t == 0 ? kBegins : 0);
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
        if (ahead.t < ahead.turns && within(ahead.row, g.H)) {
          turn |= kBringsX << a;
          copy_row(ring + stage + a * x_row_size, x_source, copied_x, ahead.images * g.x_plane, g.x_row_pixels);
        }
        const uint32 dy_end = ahead.t < ahead.count ? ahead.images * g.dy_plane : 0;
        copy_row(ring + stage + kRows * x_row_size + a * dy_row_size, dy_end > 0 ? dy_source : dy, copied_dy, dy_end,
                 g.dy_row_pixels);
        ++ahead.t;
        ahead.row += g.down;
        x_source += g.x_down;
        dy_source += g.dy_down;
      }
      if (ahead.t >= ahead.turns && ahead.rows_left > 0) {
        ++ahead.step;
        find_sources(enter(ahead));
      }
    }
    if (thread == 0) word_of(stage) = turn;
    ptx::copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) copy(i * g.stage_size);

  const int beside = warp / kGroups;
  const int group = warp - beside * kGroups;
  // Of the 8x8 matrices of a fragment a lane gives a row, that is a pixel. Of a pair of columns, lanes 8 to 15 and 24
  // to 31 that of the second one, and 16 to 31 those of the second octet; else lanes 0 to 15 those of the last column,
  // and 16 to 31 those of dy.
  int own_pair[kUnits], own_last[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int unit = (beside * kUnits + u) * kUnit;
    const auto place_of_x = [&](int pixel) {
      const int image = divide(pixel, g.columns_magic);
      // Where units are more than pixels, dy is zero and x anything.
      return image < g.images ? pixel + image * (g.x_slot - g.columns) : 0;
    };
    const int pair_pixel = place_of_x(unit + lane / 16 * kOctet + lane % kOctet) + lane / kOctet % 2 * unit_w;
    const int last_pixel =
        lane < 16 ? place_of_x(unit + lane) + (kS - 1) * unit_w : kRows * g.x_row_pixels + unit + lane - 16;
    own_pair[u] = pair_pixel * kPitch + group * kGroup;
    own_last[u] = last_pixel * kPitch + group * kGroup;
  }
  const int next_last = lane < 16 ? x_row_size : dy_row_size;

  float sum[kProducts][4] = {};
  // The last rows of dy, the newest first, with room for those of a turn.
  uint32 gradient[kUnits][kR + kRows - 1][2] = {};
  // Of the last column, the row before.
  uint32 before[kUnits][2] = {};
  // The stage that is read, and the one that is free for the next turn.
  int stage = 0;
  int free_stage = kAhead * g.stage_size;
  const auto next_turn = [&] {
    ptx::copy_async_wait<kAhead - 1>();
    __syncthreads();
    return word_of(stage);
  };
  uint32 turn = next_turn();
#pragma unroll 1
  while (turn != 0) {
    copy(free_stage);
    if (turn & kBegins) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kR - 1; ++i) gradient[u][i][0] = gradient[u][i][1] = 0;
        before[u][0] = before[u][1] = 0;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = kR + kRows - 2; i >= kRows; --i)
#pragma unroll
        for (int half = 0; half < 2; ++half) gradient[u][i][half] = gradient[u][i - kRows][half];
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      const int newest = kRows - 1 - a;
      uint32 last[kUnits][2];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        uint32 piece[4];
        ptx::load_matrices_transposed(ring + stage + own_last[u] + a * next_last, piece);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          last[u][half] = piece[half];
          gradient[u][newest][half] = piece[2 + half];
        }
      }
      // What a row of dy has of the last column, be it with the row of x before, and of ones.
      const auto multiply_last = [&](int u) {
        const uint32 ones = two_ones(T{});
        const uint32 with_ones[4] = {kSingle ? last[u][0] : ones, ones, kSingle ? last[u][1] : ones, ones};
        multiply(T{}, sum[kOfOnes], with_ones, gradient[u][newest]);
        const uint32 two_rows[4] = {before[u][0], last[u][0], before[u][1], last[u][1]};
#pragma unroll
        for (int i = 0; i < kRowPairs; ++i)
          multiply(T{}, sum[kOfRowPairs + i], two_rows, gradient[u][newest + 2 * i + 1 + kSingle]);
        before[u][0] = last[u][0];
        before[u][1] = last[u][1];
      };
      if (turn & kBringsX << a) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
          for (int pair = 0; pair < kColumnPairs; ++pair) {
            uint32 value[4];
            ptx::load_matrices_transposed(ring + stage + a * x_row_size + own_pair[u] + 2 * pair * unit_w * kPitch,
                                          value);
#pragma unroll
            for (int r = 0; r < kR; ++r) multiply(T{}, sum[r * kColumnPairs + pair], value, gradient[u][newest + r]);
          }
          multiply_last(u);
        }
      } else {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          last[u][0] = last[u][1] = 0;
          multiply_last(u);
        }
      }
    }
    free_stage = free_stage == kAhead * g.stage_size ? 0 : free_stage + g.stage_size;
    stage = stage == kAhead * g.stage_size ? 0 : stage + g.stage_size;
    turn = next_turn();
  }
  ptx::copy_async_wait<0>();

  const auto deliver = [&](int entry, int channel, float total) {
    const int64 k = first_channel + channel;
    const int64 slab = static_cast<int64>(blockIdx.y) * g.column_blocks + column_block;
    if (!kFinal) {
      partials[(slab * kEntries + entry) * g.K + k] = total;
    } else if (entry < kTaps) {
      dw[k * kTaps + entry] = narrow<T>(total);
    } else {
      dbias[k] = narrow<T>(total);
    }
  };

  // Where a lane has a diagonal's element, it is channel lane / 4 of its group: see ptx::multiply_halves.
  const int own_channel = lane / 4;
  const bool diagonal = lane % 4 == own_channel / 2;
  const auto own_sum = [&](int product, int half) {
    return own_channel % 2 ? sum[product][2 * half + 1] : sum[product][2 * half];
  };
  float seen = 0;
#pragma unroll
  for (int product = 0; product < kProducts; ++product)
#pragma unroll
    for (int half = 0; half < 2; ++half) seen = fma(own_sum(product, half), 0.0f, seen);
  if (__syncthreads_or(diagonal && seen != seen)) {
    for (int item = thread; item < kEntries * kChannels; item += kThreads) {
      const int entry = item / kChannels;
      const int channel = item - entry * kChannels;
      const int r = entry / kS;
      const int s = entry - r * kS;
      if (first_channel + channel >= g.K) continue;
      const int end_q = min(g.Q, first_q + g.columns);
      float total = 0;
      Walk walk;
      int p = begin(walk);
      while (true) {
        for (int64 n = walk.first_image; n < walk.first_image + walk.images; ++n) {
          for (int t = 0; t < walk.count; ++t) {
            const int h = walk.row + t * g.down + r * unit_h;
            const T* const dy_row = dy + (n * g.P + p + t * g.spacing_h) * g.Q * g.K + first_channel + channel;
            const T* const x_row = x + (n * g.H + h) * g.W * g.K + first_channel + channel;
            for (int q = first_q; q < end_q; ++q) {
              const int w = q + s * unit_w - g.left;
              const bool exists = within(h, g.H) && within(w, g.W);
              const float value = r == kR ? 1.0f : exists ? widen(x_row[static_cast<int64>(w) * g.K]) : 0.0f;
              total = fma(value, widen(dy_row[static_cast<int64>(q) * g.K]), total);
            }
          }
        }
        if (walk.rows_left == 0) break;
        ++walk.step;
        p = enter(walk);
      }
      deliver(entry, channel, total);
    }
    return;
  }

  // sums (warps of a group, entries, channels) of the block.
  float* const sums = reinterpret_cast<float*>(shared);
  if (diagonal) {
    float* const own = sums + beside * kEntries * kChannels + group * kGroup + own_channel;
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        const int of_column = r - kSingle;
        const int product = s < 2 * kColumnPairs ? r * kColumnPairs + s / 2
                            : of_column < 0      ? kOfOnes
                                                 : kOfRowPairs + of_column / 2;
        const int half = s < 2 * kColumnPairs ? s % 2 : of_column < 0 ? 0 : of_column % 2;
        own[(r * kS + s) * kChannels] = own_sum(product, half);
      }
    if (kBias) own[kTaps * kChannels] = own_sum(kOfOnes, 1);
  }
  __syncthreads();
  for (int item = thread; item < kEntries * kChannels; item += kThreads) {
    const int entry = item / kChannels;
    const int channel = item - entry * kChannels;
    if (first_channel + channel >= g.K) continue;
    float total = 0;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) total += sums[other * kEntries * kChannels + item];
    deliver(entry, channel, total);
  }
}
