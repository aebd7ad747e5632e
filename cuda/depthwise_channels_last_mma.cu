// Depthwise convolution, channels-last (NHWC in memory), 16-bit, stride and dilation 1, on tensor cores (sm_80 and
// newer): forward, and the gradient of the input, which is the convolution of dy with the kernel turned around.
//
// A quad is 4 neighbouring columns of outputs. The 16 rows of a product are 16 quads, any of a block; its k are columns
// of x from a quad's first tap on, each in two channels, and its columns the quad's outputs in these two. So b has the
// weight of a tap where column, output and channel fit together, and zeros elsewhere. Nothing is transposed: lane 4 i +
// j of a warp holds two channels of column j of the windows of quads i and i + 8, as they lie in memory, and gets two
// channels of output j of both; of two products for neighbouring channels it loads and writes one vector.
//
// A block makes quads of a few images, all at the same rows, of some neighbouring channels; a warp 16 quads of 4 of
// them. The rows of x that they need pass through a ring in shared memory, a batch of rows at a time, copied there
// ahead, each element once a block, and with zeros for the columns that x does not have; behind the last row of some
// images come, without a pause, those of the images that the block makes next. A warp meets a row with all rows of
// outputs that need it; their sums are in the order in which they need the row, and each moves on by one place a row,
// which its first product does without a move. Rows of y leave through shared memory too, a batch later, so that all
// channels of a block leave together.
//
// Rows of x in the padding are passed over, where a weight that is not finite would have made NaN; and the zeros of b
// make NaN of an infinity or NaN in another channel or beside the taps. Nothing else can make a sum both wrong and not
// NaN: where a sum of the block is NaN, those that are are made again in the end, tap by tap; where a weight of the
// block is not finite, all are.
//
// Compile-time values: T; R, S; TURNED (the kernel, around); THREADS; BLOCKS (that a multiprocessor is to hold); GROUPS
// (of 4 channels, of a block); BATCH (rows of x between barriers); STAGES (batches of the ring); COPIES (of a thread
// and row, 16 bytes each: they divide a pixel's and a block's channels, and x and y start at multiples of them); TURNS
// (whether a block makes images in several turns).
#include "indices.cuh"
#include "numbers.cuh"
#include "products.cuh"

using T = CUCONV_T;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kTurned = CUCONV_TURNED;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kGroups = CUCONV_GROUPS;
constexpr int kBatch = CUCONV_BATCH;
constexpr int kStages = CUCONV_STAGES;
constexpr int kCopies = CUCONV_COPIES;
constexpr bool kTurns = CUCONV_TURNS;

constexpr int kTaps = kR * kS;
// Channels of a warp: of twice as many, sums and weights of 7x7 taps do not fit registers.
constexpr int kVector = 4;
constexpr int kChannels = kGroups * kVector;
constexpr int kPairs = kVector / 2;
constexpr int kWarp = 32;
constexpr int kQuad = 4;
constexpr int kQuads = 16;
// Of the columns that a quad needs, pieces of 4: two of them in two channels are the k of one product.
constexpr int kSteps = (kQuad + kS - 1 + kQuad - 1) / kQuad;
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
constexpr int kPieces = kChannels / kPiece;
// From one column to the next in the ring: an odd number of pieces, so that neighbours lie in different banks.
constexpr int kPitch = (kPieces | 1) * kPiece;
constexpr int kCopiedColumns = kThreads / kPieces;
// Outputs of a row, idle quads included, and what a thread stores of them.
constexpr int kOutputs = kThreads / kWarp / kGroups * kQuads * kQuad;
constexpr int kStores = kOutputs / kCopiedColumns;

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements");
static_assert(kStages >= 2, "a row is copied while another is read");
static_assert(kChannels % kPiece == 0, "a column of a block is whole copies");
static_assert(kThreads % kPieces == 0, "a thread's copies are of the same channels");

struct Parameters {
  int N, K;
  int H, W, P, Q;
  int top, left;      // padding
  int rows;           // of outputs, of a block
  int quads;          // side by side in a block
  int images;         // of a block at a time
  int turns;          // of a block, one after the other
  int column_blocks;  // blocks side by side
  int pixels;         // columns of x that a block's quads need
  uint32 quads_magic, pixels_magic;  // see divide
};

// One output, tap by tap; zeros outside the plane take part.
__device__ __noinline__ float convolve_one(const Parameters& g, const T* __restrict__ plane, const T* weights, int h,
                                           int column, float sum) {
#pragma unroll 1
  for (int tap = 0; tap < kTaps; ++tap) {
    const int r = tap / kS;
    const int s = tap - r * kS;
    const bool exists = within(h + r, g.H) && within(column + s, g.W);
    const float value = exists ? widen(plane[(static_cast<int64>(h + r) * g.W + column + s) * g.K]) : 0.0f;
    sum = fma(value, widen(weights[kTurned ? kTaps - 1 - tap : tap]), sum);
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(kThreads, CUCONV_BLOCKS)
    depthwise_channels_last_mma(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                                T* __restrict__ y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int channel_block = static_cast<int>(blockIdx.x) / g.column_blocks;
  const int column_block = static_cast<int>(blockIdx.x) - channel_block * g.column_blocks;
  const int first_channel = channel_block * kChannels;
  const int first_image = static_cast<int>(blockIdx.z) * (kTurns ? g.turns * g.images : g.images);
  const int turns = kTurns ? min(g.turns, g.N / g.images - static_cast<int>(blockIdx.z) * g.turns) : 1;

  // The block's rows of y from p on need `inputs` rows of x from `first_row` on, of which it passes over those before x
  // and behind it.
  const int p = static_cast<int>(blockIdx.y) * g.rows;
  const int inputs = min(g.rows, g.P - p) + kR - 1;
  const int first_row = p - g.top;
  const int before = min(inputs, max(0, -first_row));
  const int row = first_row + before;
  const int rows_of_x = max(0, min(inputs - before, g.H - row));
  const int first_column = column_block * g.quads * kQuad - g.left;

  // What the thread copies of every row: where it is in x, from the first column of the first image on, or -1.
  T* const ring = reinterpret_cast<T*>(shared);
  const int row_size = g.images * g.pixels * kPitch;
  const int stage_size = kBatch * row_size;
  const int own_pixel = thread / kPieces;
  const int own_channel = (thread - own_pixel * kPieces) * kPiece;
  T* const own_pieces = ring + own_pixel * kPitch + own_channel;
  int copied[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int pixel = i * kCopiedColumns + own_pixel;
    const int image = divide(pixel, g.pixels_magic);
    const int column = first_column + pixel - image * g.pixels;
    const int channel = first_channel + own_channel;
    const bool exists = image < g.images && first_image + image < g.N && within(column, g.W) && channel < g.K;
    copied[i] = exists ? (image * g.H * g.W + column) * g.K + channel : -1;
    if (!exists && image < g.images) {
#pragma unroll 1
      for (int i_row = 0; i_row < kStages * kBatch; ++i_row)
        *reinterpret_cast<Vector<uint32, 4>*>(own_pieces + i_row * row_size + i * (kCopiedColumns * kPitch)) = {};
    }
  }

  // Some rows of x on their way into the ring's stage at `to`, where the thread's pieces begin.
  const int line = g.W * g.K;
  const int64 next_images = static_cast<int64>(g.images) * g.H * line - static_cast<int64>(rows_of_x) * line;
  const T* source = x + (static_cast<int64>(first_image) * g.H + row) * line;
  int left_to_copy = rows_of_x;
  int turns_to_copy = turns;
  const auto copy = [&](T* to) {
    const int count = min(kBatch, left_to_copy);
#pragma unroll 1
    for (int i_row = 0; i_row < count; ++i_row) {
      source = ptx::as_it_is(source);
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        if (copied[i] >= 0) ptx::copy_async<16>(to + i * (kCopiedColumns * kPitch), source + copied[i]);
      source += line;
      to += row_size;
    }
    ptx::copy_async_commit();
    left_to_copy -= count;
    if (kTurns && count > 0 && left_to_copy == 0 && --turns_to_copy > 0) {
      source += next_images;
      left_to_copy = rows_of_x;
    }
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(own_pieces + i * stage_size);

  // The block's weights as they lie in memory, while the first rows are on their way.
  T* const staged = ring + kStages * stage_size;
  const int count = min(g.K - first_channel, kChannels) * kTaps;
  bool finite = true;
#pragma unroll 4
  for (int i = thread; i < count; i += kThreads) {
    const T value = w[static_cast<int64>(first_channel) * kTaps + i];
    finite = finite && widen(value) * 0.0f == 0.0f;
    staged[i] = value;
  }
  const bool careful = __syncthreads_or(!finite);

  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int group = warp % kGroups;
  const T* const weights = staged + group * kVector * kTaps;

  // Of the lane's two quads its column: where its window starts in a stage. Quads that the block does not have are
  // zeros.
  const int first_unit = warp / kGroups * kQuads + lane / kQuad;
  int window[2];
  uint32 present[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int unit = first_unit + half * (kQuads / 2);
    const int image = divide(unit, g.quads_magic);
    const int column = (unit - image * g.quads) * kQuad + lane % kQuad;
    const bool exists = image < g.images;
    window[half] = (exists ? image * g.pixels + column : 0) * kPitch + group * kVector;
    // Anded with what is loaded, it also brings the words of a into neighbouring registers; the compiler would do so
    // anew, by moves, for every product.
    present[half] = exists ? 0xffffffffu : 0;
  }

  // What the thread stores of every row: where it is in y, from the first column of the first image on, or -1.
  int output[kStores];
#pragma unroll
  for (int i = 0; i < kStores; ++i) {
    const int pixel = i * kCopiedColumns + own_pixel;
    const int image = divide(pixel / kQuad, g.quads_magic);
    const int q = column_block * g.quads * kQuad + pixel - image * g.quads * kQuad;
    const int channel = first_channel + own_channel;
    const bool exists = image < g.images && first_image + image < g.N && q < g.Q && channel < g.K;
    output[i] = exists ? (image * g.P * g.Q + q) * g.K + channel : -1;
  }

  // What the lane has of b: columns 4 step + j of the window (j = lane % 4), in both channels of a pair, for the output
  // and the channel of column lane / 4 of the product.
  uint32 b[kR][kPairs][kSteps];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int channel = lane / 4 % 2;
      const int s = step * kQuad + lane % 4 - lane / 8;
      const int tap = (pair * 2 + channel) * kTaps + (kTurned ? kTaps - 1 - s : s);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint32 bits = within(s, kS) ? weights[tap + (kTurned ? -r : r) * kS].bits : 0;
        b[r][pair][step] = bits << 16 * channel;
      }
    }

  T* result = y + (static_cast<int64>(first_image) * g.P + p) * g.Q * g.K;
  const int output_line = g.Q * g.K;
  const int lines = inputs - kR + 1;
  const int64 next_results = (static_cast<int64>(g.images) * g.P - lines) * output_line;
  // Rows of y on their way out, in a ring: those that warps write come behind those that they have written since they
  // last met, which are stored when they meet again.
  constexpr int kLine = kOutputs * kPitch;
  T* const lines_out = staged + kChannels * kTaps;
  int written_end = 0;
  int stored_end = 0;
  int written = 0;
  int left_to_store = lines;
  T* const own_outputs = lines_out + (warp / kGroups * kQuads * kQuad + lane) * kPitch + group * kVector;
  // NaN if any sum was.
  float probe[4] = {};
  // The stage that is read, and the one before, which is free for the next row.
  int stage = 0;
  int free_stage = (kStages - 1) * stage_size;

  // Stores the rows of y that all warps have written.
  const auto store = [&] {
#pragma unroll 1
    for (; written > 0; --written) {
      result = ptx::as_it_is(result);
      const T* const from = lines_out + stored_end + own_pixel * kPitch + own_channel;
#pragma unroll
      for (int i = 0; i < kStores; ++i)
        if (output[i] >= 0)
          *reinterpret_cast<Vector<uint32, 4>*>(result + output[i]) =
              *reinterpret_cast<const Vector<uint32, 4>*>(from + i * (kCopiedColumns * kPitch));
      result += output_line;
      stored_end = stored_end + kLine < 2 * kBatch * kLine ? stored_end + kLine : 0;
      if (kTurns && --left_to_store == 0) {
        result += next_results;
        left_to_store = lines;
      }
    }
  };

  float start[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const int channel = first_channel + group * kVector + e;
    start[e] = bias == nullptr || channel >= g.K ? 0.0f : widen(bias[channel]);
  }

  const auto go = [&] {
    float sum[kR][kPairs][4];
    // A place takes over the sums of the one before it, and place 0 begins a row of outputs.
    const auto take_over = [&](int place, int pair) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum[place][pair][e] = place > 0 ? sum[max(place - 1, 0)][pair][e] : start[pair * 2 + e % 2];
    };
    const auto write = [&] {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<uint32, kPairs> words;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const float* const of_pair = &sum[kR - 1][pair][half * 2];
          words.piece[pair] = narrow_pair(T{}, of_pair[0], of_pair[1]);
          probe[half * 2] += of_pair[0];
          probe[half * 2 + 1] += of_pair[1];
        }
        *reinterpret_cast<Vector<uint32, kPairs>*>(own_outputs + written_end + half * (kQuads / 2 * kQuad * kPitch)) =
            words;
      }
      written_end = written_end + kLine < 2 * kBatch * kLine ? written_end + kLine : 0;
      ++written;
    };
    // The same where there is no row of x to wait for.
    const auto make_room_and_write = [&] {
      if (written == kBatch) {
        __syncthreads();
        store();
      }
      write();
    };
#pragma unroll
    for (int place = 0; place < kR; ++place)
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) take_over(place, pair);
    // Row t of outputs begins, or would, in place 0; that of place r is t - r. Before x there are only zeros to meet.
    int t = 0;
    for (; t < before; ++t)
      if (t >= kR - 1) make_room_and_write();
    while (t < before + rows_of_x) {
      ptx::copy_async_wait<kStages - 2>();
      __syncthreads();
      copy(own_pieces + free_stage);
      store();
      const T* own_row = ring + stage;
      const int end = min(t + kBatch, before + rows_of_x);
#pragma unroll 1
      for (; t < end; ++t) {
        Vector<uint32, kPairs> value[kSteps][2];
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            value[step][half] = *reinterpret_cast<const Vector<uint32, kPairs>*>(own_row + window[half] +
                                                                                 step * (kQuad * kPitch));
        // A pair's part of the row is brought together for one pair after the other, and then meets all rows of
        // outputs.
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
          for (int place = kR - 1; place >= 0; --place) take_over(place, pair);
#pragma unroll
          for (int step = 0; step < kSteps; step += 2) {
            if (step + 1 < kSteps) {
              const uint32 a[4] = {value[step][0].piece[pair] & present[0], value[step][1].piece[pair] & present[1],
                                   value[step + 1][0].piece[pair] & present[0],
                                    value[step + 1][1].piece[pair] & present[1]};
#pragma unroll
              for (int place = kR - 1; place >= 0; --place) {
                const uint32 taps[2] = {b[place][pair][step], b[place][pair][step + 1]};
                multiply(T{}, sum[place][pair], a, taps);
              }
            } else {
              const uint32 a[2] = {value[step][0].piece[pair] & present[0], value[step][1].piece[pair] & present[1]};
#pragma unroll
              for (int place = kR - 1; place >= 0; --place) multiply(T{}, sum[place][pair], a, b[place][pair][step]);
            }
          }
        }
        if (t >= kR - 1) write();
        own_row += row_size;
      }
      free_stage = stage;
      stage += stage_size;
      if (stage == kStages * stage_size) stage = 0;
    }
    for (; t < inputs; ++t) {
#pragma unroll
      for (int place = kR - 1; place >= 0; --place)
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) take_over(place, pair);
      if (t >= kR - 1) make_room_and_write();
    }
  };
  for (int turn = 0; turn < turns; ++turn) go();
  // Rows that no output met may still be on their way.
  ptx::copy_async_wait<0>();
  const float all = (probe[0] + probe[1]) + (probe[2] + probe[3]);
  const bool wrong = __syncthreads_or(all != all);
  store();
  if (!careful && !wrong) return;

#pragma unroll 1
  for (int item = 0; item < turns * lines * kStores; ++item) {
    const int line_of_turns = item / kStores;
    const int i = item - line_of_turns * kStores;
    const int turn = line_of_turns / lines;
    const int t = line_of_turns - turn * lines;
    const int pixel = i * kCopiedColumns + own_pixel;
    const int image = divide(pixel / kQuad, g.quads_magic);
    const int q = column_block * g.quads * kQuad + pixel - image * g.quads * kQuad;
    const int64 n = first_image + static_cast<int64>(turn) * g.images + image;
    const int channel = first_channel + own_channel;
    if (image >= g.images || n >= g.N || q >= g.Q || channel >= g.K) continue;
    T* const place = y + ((n * g.P + p + t) * g.Q + q) * g.K + channel;
#pragma unroll 1
    for (int e = 0; e < kPiece; ++e) {
      const float found = widen(place[e]);
      if (!careful && found == found) continue;
      place[e] = narrow<T>(convolve_one(g, x + n * g.H * line + channel + e, staged + (own_channel + e) * kTaps,
                                        first_row + t, q - g.left, bias == nullptr ? 0.0f : widen(bias[channel + e])));
    }
  }
}
