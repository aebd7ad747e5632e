// Depthwise convolution, channels-last (NHWC in memory), rows of x staged in shared memory: forward, and the gradient
// of the input at stride 1, which is the convolution of dy with the kernel turned around.
//
// A block makes strips of columns of a few images, all at the same rows, of some neighbouring channels; a thread one
// strip of a vector of channels. The rows of x that the strips need pass one after the other through a ring in shared
// memory, copied there several rows ahead, each element once a block, and with zeros for the columns that x does not
// have; behind the last row of some images come, without a pause, those of the images that the block makes next.
//
// A thread brings a row of its strip into registers, where the weights are too, and meets it with all rows of outputs
// that need it; a row of outputs is stored as soon as its last row of x has been there. Sums are in the order in
// which they need the row. At stride 1 each moves on by one place a row, which its first multiplication does without
// a move, so that one row is all the code. (Unrolled until sums in fixed places come around, code outgrows the
// instruction cache; with branches around what no output of the block needs, the compiler adds a move for every sum.)
//
// Rows of x in the padding are passed over, and columns too where a strip is as wide as y. Padding is a zero that
// takes part all the same: where a weight of the block is not finite, outputs for which it met padding become NaN in
// the end.
//
// Compile-time values: T; R, S; TURNED (the kernel, around); THREADS; BLOCKS (that a multiprocessor is to hold, which
// bounds the registers); VECTOR (channels of a thread: they divide K, and y starts at a multiple of them); GROUPS
// (vectors of a block); COLUMNS (of a strip); STAGES (rows of the ring); COPY (bytes of a copy: they divide a pixel's
// and a block's channels, and x starts at a multiple of them); COPIES (of a thread and row); STRIDE_H, STRIDE_W (of
// the strip, see below); DILATED; EXACT (all columns of every strip exist); TURNS (whether a block makes images in
// several turns); WIDTH (of x, where a strip is as wide as y and this is known, or 0) and LEFT (then the padding
// before it).
//
// Dilation: output rows dilation / gcd(stride, dilation) apart need input rows whole dilations apart. A strip of rows
// so far apart is one of an undilated convolution of stride / gcd, in units of `dilation` input rows. Columns
// likewise; a block then has all columns of an image.
#include "channels_last.cuh"
#include "numbers.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kTurned = CUCONV_TURNED;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kVector = CUCONV_VECTOR;
constexpr int kGroups = CUCONV_GROUPS;
constexpr int kColumns = CUCONV_COLUMNS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kCopy = CUCONV_COPY;
constexpr int kCopies = CUCONV_COPIES;
constexpr int kStrideH = CUCONV_STRIDE_H;
constexpr int kStrideW = CUCONV_STRIDE_W;
constexpr bool kDilated = CUCONV_DILATED;
constexpr bool kExact = CUCONV_EXACT;
constexpr bool kTurns = CUCONV_TURNS;
constexpr int kWidth = CUCONV_WIDTH;
constexpr int kLeft = CUCONV_LEFT;

constexpr int kTaps = kR * kS;
constexpr int kChannels = kGroups * kVector;
// Columns of x that a strip needs, in units of the dilation.
constexpr int kSpan = (kColumns - 1) * kStrideW + kS;
// Rows of outputs on the way: place k is of the one whose next kernel row is k * kStrideH or one of those behind it.
constexpr int kPlaces = (kR + kStrideH - 1) / kStrideH;
// At stride 1 sums move on to the next place at every row of x, in their first multiplication.
constexpr bool kMoving = kStrideH == 1;
constexpr int kPiece = kCopy / static_cast<int>(sizeof(T));
constexpr int kPieces = kChannels / kPiece;

static_assert(kStages >= 2, "a row is copied while another is read");
static_assert(kChannels % kPiece == 0, "a pixel of a block is whole copies");

// Whether column j of what a strip needs is copied, or else known to be padding.
__device__ __forceinline__ constexpr bool column_copied(int j) {
  return kWidth == 0 || (kLeft <= j && j < kLeft + kWidth);
}

struct Parameters {
  int N, K;
  int H, W, P, Q;
  int top, left;               // padding
  int stride_h, stride_w;      // of the convolution
  int dilation_h, dilation_w;
  int spacing_h, spacing_w;    // rows and columns from one output of a strip to the next
  int rows;                    // outputs of a strip, one below the other
  int strips;                  // side by side in a block
  int images;                  // of a block at a time; they and their strips have kGroups threads each
  int turns;                   // of a block, one after the other
  int column_blocks;           // blocks side by side
  int pixels;                  // columns of x that a block's strips need
  uint32 strips_magic, pixels_magic;  // see divide
};

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_channels_last_staged(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                                   T* __restrict__ y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int channel_block = static_cast<int>(blockIdx.x) / g.column_blocks;
  const int column_block = static_cast<int>(blockIdx.x) - channel_block * g.column_blocks;
  const int first_channel = channel_block * kChannels;
  const int first_image = static_cast<int>(blockIdx.z) * (kTurns ? g.turns * g.images : g.images);
  const int turns = kTurns ? min(g.turns, g.N / g.images - static_cast<int>(blockIdx.z) * g.turns) : 1;
  const int unit_h = kDilated ? g.dilation_h : 1;
  const int unit_w = kDilated ? g.dilation_w : 1;
  const int spacing_h = kDilated ? g.spacing_h : 1;
  const int spacing_w = kDilated ? g.spacing_w : 1;

  // The block's rows of y from p on need `inputs` rows of x from `row` on, which need not exist.
  const int p = patch_start<kDilated>(static_cast<int>(blockIdx.y), g.rows, spacing_h);
  if (p >= g.P) return;
  const int last = (min(p + g.rows * spacing_h, g.P) - 1 - p) / spacing_h;
  const int inputs = last * kStrideH + kR;
  const int first_row = p * g.stride_h - g.top;
  // Of them those before x and behind it, which the block passes over at stride 1.
  const int before = kMoving ? min(inputs, max(0, (unit_h - 1 - first_row) / unit_h)) : 0;
  const int row = first_row + before * unit_h;
  const int rows_of_x = kMoving ? max(0, min(inputs - before, (g.H - row + unit_h - 1) / unit_h)) : inputs;
  const int first_column = kWidth ? 0 : (kDilated ? 0 : column_block * g.strips * kColumns * g.stride_w) - g.left;

  // What the thread copies of every row: where it is in x, from the first column of the first image on, or -1.
  T* const ring = reinterpret_cast<T*>(shared);
  const int stage_size = g.images * g.pixels * kChannels;
  int copied[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int item = i * kThreads + thread;
    const int pixel = item / kPieces;
    const int image = divide(pixel, g.pixels_magic);
    const int of_image = pixel - image * g.pixels;
    const int column = first_column + of_image;
    const int channel = first_channel + (item - pixel * kPieces) * kPiece;
    const bool exists = image < g.images && first_image + image < g.N && within(column, g.W) && channel < g.K;
    copied[i] = exists ? (image * g.H * g.W + column) * g.K + channel : -1;
    if (!exists && item * kPiece < stage_size) {
      for (int stage = 0; stage < kStages; ++stage)
        *reinterpret_cast<Vector<unsigned char, kCopy>*>(ring + stage * stage_size + item * kPiece) = {};
    }
  }

  // A row of x on its way into the ring's stage at `to`, where the thread's pieces begin.
  const int row_end = min(g.H, row + rows_of_x * unit_h);
  const int line = unit_h * g.W * g.K;
  const int64 next_images = static_cast<int64>(g.images) * g.H * g.W * g.K - static_cast<int64>(rows_of_x) * line;
  const T* source = x + (static_cast<int64>(first_image) * g.H + row) * g.W * g.K;
  int copied_row = row;
  int left_to_copy = rows_of_x;
  int turns_to_copy = turns;
  const auto copy = [&](T* to) {
    if (within(copied_row, row_end)) {
      source = ptx::as_it_is(source);
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        if (copied[i] >= 0) ptx::copy_async<kCopy>(to + i * (kThreads * kPiece), source + copied[i]);
    }
    ptx::copy_async_commit();
    source += line;
    copied_row += unit_h;
    if (kTurns && --left_to_copy == 0) {
      source += next_images;
      left_to_copy = rows_of_x;
      copied_row = --turns_to_copy > 0 ? row : row_end;
    }
  };
  T* const own_pieces = ring + thread * kPiece;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(own_pieces + i * stage_size);

  // The block's weights as they lie in memory, while the first rows are on their way.
  T* const staged = ring + kStages * stage_size;
  const int count = min(g.K - first_channel, kChannels) * kTaps;
  bool finite = true;
#pragma unroll 4
  for (int i = thread; i < count; i += kThreads) {
    const T value = w[static_cast<int64>(first_channel) * kTaps + i];
    finite = finite && widen(value) * Sum(0) == Sum(0);
    staged[i] = value;
  }
  const bool careful = __syncthreads_or(!finite);

  const int strip = thread / kGroups;
  const int group = thread - strip * kGroups;
  const int image = divide(strip, g.strips_magic);
  const int k = first_channel + group * kVector;
  const int q = patch_start<kDilated>(column_block * g.strips + strip - image * g.strips, kColumns, spacing_w);
  // Columns that exist from q on.
  const int columns = image < g.images && first_image + image < g.N && k < g.K ? max(0, g.Q - q) : 0;
  // Threads without any look at the first.
  const int own_column = columns > 0 && !kWidth ? q * g.stride_w - g.left - first_column : 0;
  const T* const window = ring + ((columns > 0 ? image : 0) * g.pixels + own_column) * kChannels + group * kVector;
  const int unit = unit_w * kChannels;

  Sum weight[kR][kS][kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e)
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
      weight[tap / kS][tap % kS][e] = widen(staged[(group * kVector + e) * kTaps + (kTurned ? kTaps - 1 - tap : tap)]);

  Sum start[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) start[e] = bias == nullptr || columns == 0 ? Sum(0) : widen(bias[k + e]);

  T* const first_result = y + ((static_cast<int64>(first_image + image) * g.P + p) * g.Q + q) * g.K + k;
  T* result = first_result;
  // The stage that is read, and the one before, which is free for the next row.
  int stage = 0;
  int free_stage = (kStages - 1) * stage_size;

  const auto go = [&] {
    Sum sum[kPlaces][kColumns][kVector];
    // A place takes over the sums of the one before it, and place 0 begins a row of outputs.
    const auto take_over = [&](int place) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[place][v][e] = place > 0 ? sum[max(place - 1, 0)][v][e] : start[e];
    };
    const auto move_on = [&] {
#pragma unroll
      for (int place = kPlaces - 1; place >= 0; --place) take_over(place);
    };
    const auto store = [&] {
      result = ptx::as_it_is(result);
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if ((kExact ? 0 : v * spacing_w) < columns)
          store_narrowed<kVector>(result + v * spacing_w * g.K, sum[kPlaces - 1][v]);
      result += spacing_h * g.Q * g.K;
    };
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) take_over(place);
    // Row t of outputs begins, or would, in place 0; that of place k is t - k. Before x there are only zeros to meet.
    int t = 0;
    for (; t < before; ++t)
      if (t >= kPlaces - 1) store();
    const int end = kMoving ? before + rows_of_x : last + kPlaces;
    int own_row = row;
    for (; t < end; ++t) {
#pragma unroll
      for (int phase = 0; phase < kStrideH; ++phase) {
        constexpr int kLastPhase = (kR - 1) % kStrideH;
        if (phase > kLastPhase && t == end - 1) return;
        ptx::copy_async_wait<kStages - 2>();
        if (kThreads == 32) {
          __syncwarp();
        } else {
          __syncthreads();
        }
        copy(own_pieces + free_stage);
        if (kMoving || within(own_row, g.H)) {
          Sum value[kSpan][kVector];
#pragma unroll
          for (int j = 0; j < kSpan; ++j)
            if (column_copied(j)) load_widened<kVector>(window + stage + (j - kLeft) * unit, true, value[j]);
#pragma unroll
          for (int place = kPlaces - 1; place >= 0; --place) {
            const int r = place * kStrideH + phase;
            if (r >= kR) continue;
            if (kMoving) take_over(place);
#pragma unroll
            for (int s = 0; s < kS; ++s)
#pragma unroll
              for (int v = 0; v < kColumns; ++v) {
                const int j = v * kStrideW + s;
                if (!column_copied(j)) continue;
#pragma unroll
                for (int e = 0; e < kVector; ++e)
                  sum[place][v][e] = fma(value[j][e], weight[r][s][e], sum[place][v][e]);
              }
          }
        }
        if (phase == kLastPhase && t >= kPlaces - 1) store();
        if (!kMoving && phase == kStrideH - 1) move_on();
        own_row += unit_h;
        free_stage = stage;
        stage += stage_size;
        if (stage == kStages * stage_size) stage = 0;
      }
    }
    if (kMoving) {
      for (; t < inputs; ++t) {
        move_on();
        if (t >= kPlaces - 1) store();
      }
    }
  };
  for (int turn = 0; turn < turns; ++turn) {
    go();
    result += (static_cast<int64>(g.images) * g.P - (last + 1) * spacing_h) * g.Q * g.K;
  }
  // Rows that no output met may still be on their way.
  ptx::copy_async_wait<0>();
  if (!careful) return;

  for (int i = 0; i < turns * (last + 1); ++i) {
    const int turn = i / (last + 1);
    const int t = i - turn * (last + 1);
    result = first_result + (static_cast<int64>(turn) * g.images * g.P + t * spacing_h) * g.Q * g.K;
    for (int v = 0; v < kColumns && v * spacing_w < columns; ++v) {
      for (int e = 0; e < kVector; ++e) {
        const T* const weights = staged + (group * kVector + e) * kTaps;
        Sum passed = 0;
        for (int tap = 0; tap < kTaps; ++tap) {
          const int h = first_row + t * spacing_h * g.stride_h + tap / kS * unit_h;
          const int column = (q + v * spacing_w) * g.stride_w - g.left + tap % kS * unit_w;
          if (!within(h, g.H) || !within(column, g.W))
            passed += widen(weights[kTurned ? kTaps - 1 - tap : tap]) * Sum(0);
        }
        if (passed != passed) result[v * spacing_w * g.K + e] = narrow<T>(passed);
      }
    }
  }
}
