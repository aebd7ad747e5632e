// Depthwise convolution, gradients of the weights and the bias, channels-last (NHWC in memory), by runs (sm_90 and
// newer), at stride 1 and without dilation.
//
// Some neighbouring columns of a row are one run of memory, all their channels included, which may start at any
// element. A block owns some columns of a slab, of neighbouring rows of dy of one image or several, and marches down
// the rows. Its first two warps have the copy engine bring rows of x and of dy to a ring in shared memory, ahead of
// those who read them. The threads of all other warps have a channel of a strip of columns each, so that the lanes of a
// warp read neighbouring elements, whatever the number of channels; each keeps its R x S sums in registers through the
// whole slab.
//
// In one turn there come a row of x and the row of dy that its first kernel row meets; the rows of dy before are a ring
// in registers. A stage of the ring in shared memory is so many turns that what is where is known at compile time; a
// barrier says that its rows are there, and another that the strips are done with them. Where rows are is told by a
// word: one of zeros takes the place of rows that do not exist or are not the slab's. Zeros for columns in the padding
// lie before every row. The last strip of a block is as wide as the others, and has zeros for columns of dy that its
// neighbour has.
//
// Padding is a zero that takes part, but zeros in place of dy are not to: if a sum is not finite, the thread makes its
// sums once more, plainly. In the end the sums of threads that share channels are added in a fixed order;
// depthwise_wgrad_reduce does so with the partial sums of all slabs, where there are several.
//
// Compile-time values: T; R, S; BIAS (whether dbias is wanted); FINAL (there is one slab, and no need for another
// launch); THREADS; BLOCKS (that a multiprocessor is to hold, which bounds the registers); CHANNELS (or 0, where they
// are many); COLUMNS (of a strip); LEFT, RIGHT (of the columns of x that a strip needs, the first and the last ones
// that may be padding); REPEATED (the first columns of dy of the last strip, which its neighbour has); TURNS (of a
// stage, a multiple of R); STAGES.
#include "indices.cuh"
#include "numbers.cuh"
#include "runs.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kChannels = CUCONV_CHANNELS;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kLeft = CUCONV_LEFT;
constexpr int kRight = CUCONV_RIGHT;
constexpr int kRepeated = CUCONV_REPEATED;
constexpr int kTurns = CUCONV_TURNS;
constexpr int kStages = CUCONV_STAGES;

constexpr int kService = 2 * kWarp;  // threads that compute nothing
constexpr int kTaps = kR * kS;
// What a channel has of partial sums: its weights' and its bias's.
constexpr int kEntries = kTaps + kBias;
// Columns of x that a strip needs.
constexpr int kSpan = kColumns + kS - 1;

static_assert(kStages >= 2, "a stage is brought while another is read");
static_assert(kTurns % kR == 0, "a stage is whole turns of the ring in registers");

struct Parameters {
  int K;
  int H, W, P, Q;
  int top, left;              // padding
  int strips;                 // of a block, side by side
  int x_bytes, dy_bytes;      // of a row in shared memory, with zeros before it
  int rows;                   // of dy, of all images
  int slab_rows;              // of those, a block's
  uint32 K_magic;             // see divide
  int64 total_x, total_dy;    // elements of x and dy
};

// Where the rows of a turn are, in bytes of shared memory.
struct alignas(8) Turn {
  int x, dy;
};

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_channels_last_runs(const T* __restrict__ dy, const T* __restrict__ x, Sum* partials, T* dw,
                                       T* dbias, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 ready[kStages];
  __shared__ uint64 done[kStages];
  __shared__ Turn turn_of[kStages * kTurns];

  const int K = kChannels > 0 ? kChannels : g.K;
  const int thread = static_cast<int>(threadIdx.x);
  // The same in all lanes, and known to be so: what hangs on it alone then needs no register of every lane.
  const int warp = __shfl_sync(0xffffffff, thread / kWarp, 0);
  const int q = static_cast<int>(blockIdx.x) * g.strips * kColumns;
  const int columns = min(g.strips * kColumns, g.Q - q);
  const int lanes = (columns + kColumns - 1) / kColumns * K;
  const int warps = (lanes + kWarp - 1) / kWarp;
  // Columns of x that the block needs are `low` to `high`.
  const int first_column = q - g.left;
  const int low = min(max(first_column, 0), g.W);
  const int high = max(low, min(first_column + columns + kS - 1, g.W));

  // Behind the rows of dy of an image come as many rows of x as meet them still.
  const int first_row = static_cast<int>(blockIdx.y) * g.slab_rows;
  const int rows = min(g.slab_rows, g.rows - first_row);
  const int first_image = first_row / g.P;
  const int images = (first_row + rows - 1) / g.P - first_image + 1;
  const int turns = rows + images * (kR - 1);
  const int steps = (turns + kTurns - 1) / kTurns;

  const int zeros = max(g.x_bytes, g.dy_bytes);
  unsigned char* const x_ring = shared + zeros;
  unsigned char* const dy_ring = x_ring + kStages * kTurns * g.x_bytes;
  using Zeros = Vector<unsigned char, kBulkAlignment>;
  if (thread < kStages) {
    ptx::barrier_init(&ready[thread], 2 * kTurns);
    ptx::barrier_init(&done[thread], warps);
  }
  for (int byte = thread * kBulkAlignment; byte < zeros; byte += kThreads * kBulkAlignment)
    *reinterpret_cast<Zeros*>(shared + byte) = {};
  for (int i = thread; i < kStages * kTurns; i += kThreads) {
    *reinterpret_cast<Zeros*>(x_ring + i * g.x_bytes) = {};
    *reinterpret_cast<Zeros*>(dy_ring + i * g.dy_bytes) = {};
  }
  __syncthreads();

  Sum sum[kR][kS] = {};
  Sum bias_sum = 0;
  // Lanes without any columns do as the last one that has some.
  const int item = min(max(0, thread - kService), lanes - 1);
  const int strip = divide(item, g.K_magic);
  const int k = item - strip * K;
  // The strip's first column of dy, counted from the block's, and of its own columns.
  const int own_column = min(strip * kColumns, columns - kColumns);
  const int first_own = strip * kColumns - own_column;

  int stage = 0;
  uint32 parity = 0;
  const auto next_stage = [&] {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  };
  if (warp < 2) {
    // The turn's image and row of dy; behind the image's last row of the slab; the rows that the slab has behind that.
    int image = first_image;
    int p = first_row - first_image * g.P;
    int end = min(g.P, p + rows);
    int rows_left = rows - (end - p);
    const bool of_x = warp == 0;
    const T* const array = of_x ? x : dy;
    const T* const array_end = array + (of_x ? g.total_x : g.total_dy);
    const int count = (of_x ? high - low : columns) * K;
    const int64 pitch = static_cast<int64>(of_x ? g.W : g.Q) * K;
    const auto find_row = [&] {
      return of_x ? x + ((static_cast<int64>(image) * g.H + p - g.top) * g.W + low) * K
                  : dy + ((static_cast<int64>(image) * g.P + p) * g.Q + q) * K;
    };
    const T* from = find_row();
#pragma unroll 1
    for (int step = 0; thread % kWarp == 0 && step < steps; ++step, next_stage()) {
      if (step >= kStages) ptx::barrier_wait(&done[stage], parity ^ 1);
#pragma unroll 1
      for (int i = 0; i < kTurns; ++i) {
        const int place = stage * kTurns + i;
        const bool exists = step * kTurns + i < turns && (of_x ? within(p - g.top, g.H) : p < end);
        unsigned char* const buffer = of_x ? x_ring + place * g.x_bytes : dy_ring + place * g.dy_bytes;
        T* const copy = run_in_shared(from, buffer + kBulkAlignment);
        const int offset = exists ? static_cast<int>(reinterpret_cast<unsigned char*>(copy) - shared) : kBulkAlignment;
        (of_x ? turn_of[place].x : turn_of[place].dy) = offset;
        if (exists) {
          load_run_alone(from, count, copy, array, array_end, &ready[stage]);
        } else {
          ptx::barrier_arrive(&ready[stage]);
        }
        from += pitch;
        if (++p == end + kR - 1) {
          ++image;
          p = 0;
          end = min(g.P, rows_left);
          rows_left -= end;
          from = find_row();
        }
      }
    }
  } else if (warp <= warps + 1) {
    // In bytes from where a row of x or dy begins; of columns that may be zeros one by one.
    constexpr int kSize = static_cast<int>(sizeof(T));
    const int pitch = K * kSize;
    const int x_offset = ptx::as_it_is((first_column - low + own_column) * pitch + k * kSize);
    const int dy_offset = ptx::as_it_is(own_column * pitch + k * kSize);
    int x_edge[kSpan], dy_edge[kColumns];
#pragma unroll
    for (int j = 0; j < kSpan; ++j)
      x_edge[j] = ptx::as_it_is(within(first_column + own_column + j, g.W) ? x_offset + j * pitch : -kBulkAlignment);
#pragma unroll
    for (int v = 0; v < kColumns; ++v)
      dy_edge[v] = ptx::as_it_is(v >= first_own ? dy_offset + v * pitch : -kBulkAlignment);

    Sum gradient[kR][kColumns] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step, next_stage()) {
      ptx::barrier_wait(&ready[stage], parity);
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        const Turn turn = turn_of[stage * kTurns + i];
        const unsigned char* const x_row = shared + turn.x;
        const unsigned char* const dy_row = shared + turn.dy;
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          const int offset = v < kRepeated ? dy_edge[v] : dy_offset + v * pitch;
          gradient[i % kR][v] = widen(*reinterpret_cast<const T*>(dy_row + offset));
          if (kBias) bias_sum += gradient[i % kR][v];
        }
        Sum value[kSpan];
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
          const bool may_be_padding = j < kLeft || j >= kSpan - kRight;
          value[j] = widen(*reinterpret_cast<const T*>(x_row + (may_be_padding ? x_edge[j] : x_offset + j * pitch)));
        }
#pragma unroll
        for (int v = 0; v < kColumns; ++v)
#pragma unroll
          for (int r = 0; r < kR; ++r)
#pragma unroll
            for (int s = 0; s < kS; ++s)
              sum[r][s] = fma(value[v + s], gradient[(i + kR - r) % kR][v], sum[r][s]);
      }
      __syncwarp();
      if (thread % kWarp == 0) ptx::barrier_arrive(&done[stage]);
    }
  }
  __syncthreads();

  // sums (entries, strips, channels) of the block.
  Sum* const sums = reinterpret_cast<Sum*>(shared);
  if (thread >= kService && thread - kService < lanes) {
    Sum seen = 0;  // NaN if a sum is not finite
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      sums[tap * lanes + item] = sum[tap / kS][tap % kS];
      seen = fma(sum[tap / kS][tap % kS], Sum(0), seen);
    }
    if (kBias) sums[kTaps * lanes + item] = bias_sum;
    if (seen != seen) {
      for (int tap = 0; tap < kTaps; ++tap) {
        const int s = tap % kS;
        Sum total = 0;
        for (int row = first_row; row < first_row + rows; ++row) {
          const int image = row / g.P;
          const int h = row - image * g.P - g.top + tap / kS;
          for (int v = first_own; v < kColumns; ++v) {
            const int of_dy = q + own_column + v;
            const int column = of_dy - g.left + s;
            const bool exists = within(h, g.H) && within(column, g.W);
            const T* const from = x + ((static_cast<int64>(image) * g.H + h) * g.W + column) * K + k;
            const T* const gradient = dy + (static_cast<int64>(row) * g.Q + of_dy) * K + k;
            total = fma(exists ? widen(*from) : Sum(0), widen(*gradient), total);
          }
        }
        sums[tap * lanes + item] = total;
      }
    }
  }
  __syncthreads();
  const int64 slab = static_cast<int64>(blockIdx.y) * gridDim.x + blockIdx.x;
  for (int entry = thread; entry < kEntries * K; entry += kThreads) {
    const int tap = entry / K;
    const int channel = entry - tap * K;
    Sum total = 0;
    for (int other = channel; other < lanes; other += K) total += sums[tap * lanes + other];
    if (!kFinal) {
      partials[slab * (kEntries * K) + entry] = total;
    } else if (tap < kTaps) {
      dw[channel * kTaps + tap] = narrow<T>(total);
    } else {
      dbias[channel] = narrow<T>(total);
    }
  }
}
