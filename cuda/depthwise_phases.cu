// Depthwise convolution of dilated kernels by phases, NCHW (sm_90 and newer): forward, and the gradient of the input,
// which is the convolution of dy with the kernel turned around. The names are the forward pass's; y is as large as x, and
// the padding is a number of whole dilations.
//
// A block owns the planes of one channel in some images, a few at a time. A bulk copy brings each, and a thread takes
// phases of it (see phases.cuh): it goes down the rows of a phase, whose outputs are sums of that phase alone. So they
// take the place of its elements as soon as these have been read, and no barrier comes before the one after which the
// plane is taken back. Rows are used where they are, however they lie; every element is loaded, widened and stored once.
//
// Compile-time values: T; R, S; TURNED (the kernel, both ways); BEFORE_H, BEFORE_W (the padding above and left of x, in
// dilations); THREADS; BLOCKS (that a multiprocessor is to hold, which bounds the registers); PLANES (at a time);
// STAGES (of so many planes: those that are on their way or worked on); DILATION_W; PLACES (words of a phase in a row).
#include "phases.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kTurned = CUCONV_TURNED;
constexpr int kBeforeH = CUCONV_BEFORE_H;
constexpr int kBeforeW = CUCONV_BEFORE_W;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kPlanes = CUCONV_PLANES;
constexpr int kStages = CUCONV_STAGES;
constexpr int kPlaces = CUCONV_PLACES;
constexpr int kDilation = CUCONV_DILATION_W;

constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = kPlaces * kPerWord<T>;
// Words of a row that begin phases.
constexpr int kWords = kDilation / kPerWord<T>;
// Rows of a phase from an output to the last row of x that it needs.
constexpr int kAfterH = kR - 1 - kBeforeH;

static_assert(sizeof(T) <= 4, "a word has an element or two");
static_assert(kBeforeH < kR && kBeforeW < kS, "the first tap of the last output is within x");

struct Parameters {
  int K, H, W;
  int dilation_h;
  int images;
  int block_images;
  int plane_bytes;           // of shared memory
};

// Calls `add(v, s, j)` for every product of a row of x: column j meets tap s of column v. It may not exist.
template <class Add>
__device__ __forceinline__ void for_columns(Add add) {
#pragma unroll
  for (int v = 0; v < kColumns; ++v)
#pragma unroll
    for (int s = 0; s < kS; ++s) add(v, s, v + (s - kBeforeW) * kPerWord<T>);
}

__device__ constexpr bool exists(int v) { return 0 <= v && v < kColumns; }

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_phases(const T* x, const T* w, const T* bias, T* y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 full[kStages];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int channel = static_cast<int>(blockIdx.x);
  const int first_image = static_cast<int>(blockIdx.y) * g.block_images;
  const int images = min(g.block_images, g.images - first_image);
  const int turns = (images + kPlanes - 1) / kPlanes;
  const int plane_size = g.H * g.W;
  const int64 image_size = static_cast<int64>(g.K) * plane_size;
  const int64 first = first_image * image_size + static_cast<int64>(channel) * plane_size;
  const T* const x_end = x + g.images * image_size;

  const auto buffer_of = [&](int turn, int plane) { return shared + (turn % kStages * kPlanes + plane) * g.plane_bytes; };
  const auto planes_of = [&](int turn) { return min(kPlanes, images - turn * kPlanes); };
  // A plane by a warp.
  const auto load = [&](int turn) {
    uint64* const barrier = &full[turn % kStages];
    for (int plane = warp; plane < kPlanes; plane += kWarps) {
      if (plane < planes_of(turn)) {
        const T* const start = x + first + (turn * kPlanes + plane) * image_size;
        T* const copy = run_in_shared(start, buffer_of(turn, plane));
        load_run(Run<const T>(start, plane_size, copy, x, x_end), barrier, lane);
      } else {
        ptx::barrier_arrive(barrier);
      }
    }
  };

  if (thread == 0)
    for (int stage = 0; stage < kStages; ++stage) ptx::barrier_init(&full[stage], kWarp * kPlanes);
  __syncthreads();
  for (int turn = 0; turn < min(kStages, turns); ++turn) load(turn);

  Sum weight[kR][kS];
  bool finite = true;
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      const int tap = kTurned ? kR * kS - 1 - (r * kS + s) : r * kS + s;
      weight[r][s] = widen(w[static_cast<int64>(channel) * (kR * kS) + tap]);
      finite = finite && weight[r][s] * Sum(0) == Sum(0);
    }
  const Sum start = bias == nullptr ? Sum(0) : widen(bias[channel]);

  const uint32 start_of_block = static_cast<uint32>(first);
  const int items = kPlanes * g.dilation_h * kWords;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    ptx::barrier_wait(&full[turn % kStages], turn / kStages % 2);
#pragma unroll 1
    for (int item = thread; item < items; item += kThreads) {
      const int plane = item % kPlanes;
      const int first_row = item / kPlanes / kWords;
      if (plane >= planes_of(turn) || first_row >= g.H) continue;
      const uint32 start_of_plane = start_of_block + (turn * kPlanes + plane) * static_cast<uint32>(image_size);
      const int place = first_row * g.W;
      const int column = (item / kPlanes - first_row * kWords) * kPerWord<T> - into_word<T>(start_of_plane + place);
      T* source = plane_in_shared<T>(buffer_of(turn, plane), start_of_plane) + place + column;
      const Phase<T, kPlaces, kDilation> phase(column, g.W);

      // sum[k] is of the output that row k - kAfterH from here is, in dilations.
      Sum sum[kR][kColumns];
#pragma unroll
      for (int k = 0; k < kR; ++k)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) sum[k][v] = start;
      const int step = g.dilation_h * g.W;
      T* result = source - kAfterH * step;
      int p = first_row - kAfterH * g.dilation_h;

      // The first sums are complete.
      const auto finish_row = [&] {
        // A tap in the padding adds a zero, unless its weight is infinite or NaN.
        if (!finite) {
#pragma unroll
          for (int r = 0; r < kR; ++r) {
            const bool row_exists = within(p + (r - kBeforeH) * g.dilation_h, g.H);
            for_columns([&](int v, int s, int j) {
              if (!exists(j) || !row_exists) sum[0][v] = fma(Sum(0), weight[r][s], sum[0][v]);
            });
          }
        }
        phase.store(result, sum[0]);
      };
      // The others are one row nearer to it.
      const auto advance = [&] {
#pragma unroll
        for (int k = 0; k + 1 < kR; ++k)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) sum[k][v] = sum[k + 1][v];
#pragma unroll
        for (int v = 0; v < kColumns; ++v) sum[kR - 1][v] = start;
        result += step;
        p += g.dilation_h;
      };

#pragma unroll 1
      for (int row = first_row; row < g.H; row += g.dilation_h) {
        Sum value[kColumns];
        phase.load(source, value);
        source += step;
        const auto add_row = [&](int k) {
          for_columns([&](int v, int s, int j) {
            if (exists(j)) sum[k][v] = fma(value[j], weight[kR - 1 - k][s], sum[k][v]);
          });
        };
        // Above the plane there is no output.
        if (kAfterH == 0 || p >= 0) {
          add_row(0);
          finish_row();
        }
#pragma unroll
        for (int k = 1; k < kR; ++k) add_row(k);
        advance();
      }
#pragma unroll
      for (int k = 0; k < kAfterH; ++k) {
        if (p >= 0) finish_row();
        advance();
      }
    }

    ptx::fence_shared_for_bulk();
    __syncthreads();
    // What the turn before has left is long read, and its memory is free for a turn to come. One stage has but one turn.
    if (kStages > 1 && turn > 0 && turn - 1 + kStages < turns) {
      if (lane == 0) ptx::bulk_store_wait_read<0>();
      __syncwarp();
      load(turn - 1 + kStages);
    }
    for (int plane = warp; plane < planes_of(turn); plane += kWarps) {
      T* const run = y + first + (turn * kPlanes + plane) * image_size;
      store_run(Run<T>(run, plane_size, buffer_of(turn, plane)), lane);
    }
  }
  if (lane == 0) ptx::bulk_store_wait_read<0>();
}
