// Depthwise convolution, channels-last (NHWC in memory), by runs (sm_90 and newer): forward, and the gradient of the
// input, which is the convolution of dy with the kernel turned around, both at stride 1 and without dilation. The names
// are the forward pass's.
//
// Some neighbouring columns of a row are one run of memory, all their channels included, which may start at any
// element. A block owns some columns of a slab, of neighbouring rows of one image or several, and marches down the
// rows. Its first two warps keep the copy engine busy: one has rows of x brought to a ring in shared memory, ahead of
// those who read them, and one has rows of y taken from another. The threads of all other warps have a channel of a
// strip of columns each, so that the lanes of a warp read and write neighbouring elements, whatever the number of
// channels; they bring a row of their strip into registers, where the weights are too, and meet it with all rows of
// outputs that need it.
//
// A stage of the rings is a few rows of x and the rows of y for which these are the last ones. One barrier says that
// the former are there and the latter may be overwritten, another that the strips are done with both, and a third that
// the latter have been taken. Where rows are is told by a word: in place of a row in the padding there is one of zeros.
// Zeros for columns in the padding lie before every row. So strips ask for nothing; they make rows of y that are not
// the block's, too, which stay in the ring. The last strip of a block is as wide as the others, and makes some columns
// once more.
//
// Sums are in the order in which they need the row. Each moves on by one place a row, which its first multiplication
// does without a move, so that few rows are all the code.
//
// Compile-time values: T; R, S; TURNED (the kernel, around); THREADS; BLOCKS (that a multiprocessor is to hold, which
// bounds the registers); CHANNELS (or 0, where they are many); COLUMNS (of a strip); LEFT, RIGHT (of the columns of x
// that a strip needs, the first and the last ones that may be padding); ROWS (of a stage); STAGES.
#include "indices.cuh"
#include "numbers.cuh"
#include "runs.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kTurned = CUCONV_TURNED;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kChannels = CUCONV_CHANNELS;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kLeft = CUCONV_LEFT;
constexpr int kRight = CUCONV_RIGHT;
constexpr int kRows = CUCONV_ROWS;
constexpr int kStages = CUCONV_STAGES;

constexpr int kService = 2 * kWarp;  // threads that compute nothing
constexpr int kTaps = kR * kS;
// Columns of x that a strip needs.
constexpr int kSpan = kColumns + kS - 1;

static_assert(kStages >= 2, "a row is brought while another is read");

struct Parameters {
  int K;
  int H, W, P, Q;
  int top, left;              // padding
  int strips;                 // of a block, side by side
  int x_bytes, y_bytes;       // of a row in shared memory, with zeros before one of x
  int rows;                   // of y, of all images
  int slab_rows;              // of those, a block's
  uint32 K_magic;             // see divide
  int64 total_x;              // elements of x
};

// Where the rows of a turn are, in bytes of shared memory.
struct alignas(8) Turn {
  int x, y;
};

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_channels_last_runs(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                                 T* __restrict__ y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 ready[kStages];
  __shared__ uint64 done[kStages];
  __shared__ uint64 taken[kStages];
  __shared__ Turn turn_of[kStages * kRows];
  __shared__ T* result_of[kStages * kRows];  // where a row of y is to go, if it is one of the block's

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

  // Before the first row of y of an image is complete, a row of x comes for each kernel row but the last.
  const int first_row = static_cast<int>(blockIdx.y) * g.slab_rows;
  const int rows = min(g.slab_rows, g.rows - first_row);
  const int first_image = first_row / g.P;
  const int images = (first_row + rows - 1) / g.P - first_image + 1;
  const int turns = rows + images * (kR - 1);
  const int steps = (turns + kRows - 1) / kRows;

  // A row of zeros, and the rings.
  using Zeros = Vector<unsigned char, kBulkAlignment>;
  unsigned char* const x_ring = shared + g.x_bytes;
  unsigned char* const y_ring = x_ring + kStages * kRows * g.x_bytes;
  if (thread < kStages) {
    ptx::barrier_init(&ready[thread], kRows);
    ptx::barrier_init(&done[thread], warps);
    ptx::barrier_init(&taken[thread], 1);
  }
  for (int byte = thread * kBulkAlignment; byte < g.x_bytes; byte += kThreads * kBulkAlignment)
    *reinterpret_cast<Zeros*>(shared + byte) = {};
  for (int i = thread; i < kStages * kRows; i += kThreads) *reinterpret_cast<Zeros*>(x_ring + i * g.x_bytes) = {};
  __syncthreads();

  int stage = 0;
  uint32 parity = 0;
  const auto next_stage = [&] {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  };

  if (warp == 0) {
    if (thread > 0) return;
    // The turn's image; its row of y whose first kernel row meets the row of x; those rows of y that are the slab's,
    // and how many it has of later images.
    int image = first_image;
    int p = first_row - first_image * g.P;
    int begin = p;
    int end = min(g.P, p + rows);
    int rows_left = rows - (end - p);
    // The row of x, and the row of y that is then complete.
    const T* x_row;
    T* y_row;
    const auto find_rows = [&] {
      x_row = x + ((static_cast<int64>(image) * g.H + p - g.top) * g.W + low) * K;
      y_row = y + ((static_cast<int64>(image) * g.P + p - (kR - 1)) * g.Q + q) * K;
    };
    find_rows();
#pragma unroll 1
    for (int step = 0; step < steps; ++step, next_stage()) {
      if (step >= kStages) ptx::barrier_wait(&taken[stage], parity ^ 1);
#pragma unroll 1
      for (int i = 0; i < kRows; ++i) {
        const int place = stage * kRows + i;
        const bool exists = step * kRows + i < turns;
        const bool x_exists = exists && within(p - g.top, g.H);
        T* const x_copy = run_in_shared(x_row, x_ring + place * g.x_bytes + kBulkAlignment);
        T* const y_copy = run_in_shared(y_row, y_ring + place * g.y_bytes);
        const auto offset = [&](T* to) { return static_cast<int>(reinterpret_cast<unsigned char*>(to) - shared); };
        turn_of[place] = {x_exists ? offset(x_copy) : kBulkAlignment, offset(y_copy)};
        result_of[place] = exists && p - (kR - 1) >= begin ? y_row : nullptr;
        if (x_exists) {
          load_run_alone(x_row, (high - low) * K, x_copy, x, x + g.total_x, &ready[stage]);
        } else {
          ptx::barrier_arrive(&ready[stage]);
        }
        x_row += static_cast<int64>(g.W) * K;
        y_row += static_cast<int64>(g.Q) * K;
        if (++p == end + kR - 1) {
          ++image;
          p = begin = 0;
          end = min(g.P, rows_left);
          rows_left -= end;
          find_rows();
        }
      }
    }
    return;
  }

  if (warp == 1) {
    int stage_before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, next_stage()) {
      ptx::barrier_wait(&done[stage], parity);
#pragma unroll 1
      for (int i = 0; i < kRows; ++i) {
        const int place = stage * kRows + i;
        T* const row = result_of[place];
        if (row != nullptr) {
          store_run(Run<T>(row, columns * K, y_ring + place * g.y_bytes), thread - kWarp);
        } else if (thread == kWarp) {
          ptx::bulk_store_commit();  // so that every step has as many groups
        }
      }
      __syncwarp();
      // Those of the step before have been read by now, or soon are.
      if (thread == kWarp) ptx::bulk_store_wait_read<kRows>();
      if (thread == kWarp && step > 0) ptx::barrier_arrive(&taken[stage_before]);
      stage_before = stage;
    }
    if (thread == kWarp) ptx::bulk_store_wait_read<0>();
    return;
  }

  if (warp > warps + 1) return;
  // Lanes without any outputs do as the last one that has some.
  const int item = min(thread - kService, lanes - 1);
  const bool stores = thread - kService < lanes;
  const int strip = divide(item, g.K_magic);
  const int k = item - strip * K;
  const int own_column = min(strip * kColumns, columns - kColumns);

  // In bytes from where a row of x or y begins; of columns that may be padding one by one.
  constexpr int kSize = static_cast<int>(sizeof(T));
  const int pitch = K * kSize;
  const int source = ptx::as_it_is((first_column - low + own_column) * pitch + k * kSize);
  const int result = ptx::as_it_is(own_column * pitch + k * kSize);
  int edge[kSpan];
#pragma unroll
  for (int j = 0; j < kSpan; ++j)
    edge[j] = ptx::as_it_is(within(first_column + own_column + j, g.W) ? source + j * pitch : -kBulkAlignment);

  Sum weight[kR][kS];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
    weight[tap / kS][tap % kS] = widen(w[k * kTaps + (kTurned ? kTaps - 1 - tap : tap)]);
  const Sum start = bias == nullptr ? Sum(0) : widen(bias[k]);

  Sum sum[kR][kColumns];
#pragma unroll
  for (int place = 0; place < kR; ++place)
#pragma unroll
    for (int v = 0; v < kColumns; ++v) sum[place][v] = start;

#pragma unroll 1
  for (int step = 0; step < steps; ++step, next_stage()) {
    ptx::barrier_wait(&ready[stage], parity);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Turn turn = turn_of[stage * kRows + i];
      const unsigned char* const x_row = shared + turn.x;
      unsigned char* const y_row = shared + turn.y + result;
      Sum value[kSpan];
#pragma unroll
      for (int j = 0; j < kSpan; ++j) {
        const bool may_be_padding = j < kLeft || j >= kSpan - kRight;
        value[j] = widen(*reinterpret_cast<const T*>(x_row + (may_be_padding ? edge[j] : source + j * pitch)));
      }
      // Place r is of the row of outputs whose kernel row r meets this row; the last one is then complete.
#pragma unroll
      for (int r = kR - 1; r >= 0; --r)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          Sum of_place = r > 0 ? sum[max(r - 1, 0)][v] : start;
#pragma unroll
          for (int s = 0; s < kS; ++s) of_place = fma(value[v + s], weight[r][s], of_place);
          sum[r][v] = of_place;
        }
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (stores) *reinterpret_cast<T*>(y_row + v * pitch) = narrow<T>(sum[kR - 1][v]);
    }
    ptx::fence_shared_for_bulk();
    __syncwarp();
    if (thread % kWarp == 0) ptx::barrier_arrive(&done[stage]);
  }
}
