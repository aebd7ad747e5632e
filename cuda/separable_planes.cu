// Depthwise-separable convolution, the depthwise part of its gradients in one pass, in place (sm_80 and newer): dx lies
// where the gradient of the depthwise result lay, and the gradients of the depthwise weights and bias are summed on the
// way. Stride 1, and results as large as the input.
//
// A block takes some planes of neighbouring channels, of one image after the other, as a sequence of chunks: all rows
// of all its planes, or some rows at a time of its one plane or, channels-last, of its group of channels. Chunks of the
// gradient pass through a ring in shared memory, some ahead; whatever a chunk of dx is written over is there by then,
// so that no block has to wait for another. A chunk of x lies beside it, is replaced by dx element by element, and
// leaves as one run. A thread owns a column and slides down the rows: what it has of the gradient serves dx, where the
// other factor is a weight, and the gradient of that weight, where it is x.
//
// Compile-time values: T; CHANNELS_LAST; GROUP (channels of a block, channels-last, which are one copy: pixels start at
// multiples of it; else 1); R, S; WHOLE (whether a chunk is all rows); RING (chunks of the gradient in shared memory:
// those before, at and behind that of x and one that is under way, or with whole planes two); VECTOR (elements of a
// copy: the arrays start at multiples of it, and so do chunks within a plane); SLIDES (whether neighbouring kernel rows
// meet neighbouring rows); OWN (the tap that meets an element's own place, or -1); BIAS (whether there is a dbias);
// ACTIVE, ACTIVATION (whether the depthwise part has one, and which); THREADS; BLOCKS (that a multiprocessor is to
// hold, which bounds the registers).
#include "indices.cuh"
#include "numbers.cuh"
#include "slopes.cuh"

using T = CUCONV_T;
using Sum = Accumulator<T>;

constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;
constexpr int kGroup = CUCONV_GROUP;
constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr int kTaps = kR * kS;
constexpr bool kWhole = CUCONV_WHOLE;
constexpr int kRing = CUCONV_RING;
constexpr int kVector = CUCONV_VECTOR;
constexpr bool kSlides = CUCONV_SLIDES;
constexpr int kOwn = CUCONV_OWN;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kActive = CUCONV_ACTIVE;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kWarp = 32;
constexpr int kGroupBytes = kChannelsLast ? kGroup * sizeof(T) : 16;
// Rows after which a window that slides has its registers where they were.
constexpr int kTurn = kSlides ? kR : 1;
// Chunks of the gradient beyond that of x which dx is made from.
constexpr int kAhead = kWhole ? 0 : 1;

static_assert(kRing == (kWhole ? 2 : 4));
static_assert(kChannelsLast ? kThreads % kGroup == 0 : kGroup == 1);

struct Parameters {
  int N, C, H, W;
  int top, left;
  int dilation_h, dilation_w;
  int planes;      // of a block
  int rows;        // of a chunk
  int chunks;      // of an image
  int slab_images;
  int slot;        // elements from one chunk of the ring to the next
  int x_slot;      // likewise of x
};

// Begins to copy a run of elements to shared memory, where it starts as far from a multiple of kVector as it does here.
__device__ __forceinline__ void copy_run(T* shared, const T* run, int count, int shift, int thread) {
  const int head = min(count, shift > 0 ? kVector - shift : 0);
  const int vectors = (count - head) / kVector;
  const int tail = head + vectors * kVector;
  if constexpr (kVector > 1) {
    for (int i = thread; i < vectors; i += kThreads) {
      const int at = head + i * kVector;
      ptx::copy_async<kVector * sizeof(T)>(shared + at, run + at);
    }
    if (thread < kVector) {
      if (thread < head) shared[thread] = run[thread];
      if (thread < count - tail) shared[tail + thread] = run[tail + thread];
    }
  } else if constexpr (sizeof(T) >= 4) {
    for (int i = thread; i < count; i += kThreads) ptx::copy_async<sizeof(T)>(shared + i, run + i);
  } else {
    for (int i = thread; i < count; i += kThreads) shared[i] = run[i];
  }
}

__device__ __forceinline__ void store_run(T* run, const T* shared, int count, int shift, int thread) {
  const int head = min(count, shift > 0 ? kVector - shift : 0);
  const int vectors = (count - head) / kVector;
  const int tail = head + vectors * kVector;
  if constexpr (kVector > 1) {
    using Piece = Vector<T, kVector>;
    for (int i = thread; i < vectors; i += kThreads) {
      const int at = head + i * kVector;
      *reinterpret_cast<Piece*>(run + at) = *reinterpret_cast<const Piece*>(shared + at);
    }
    if (thread < kVector) {
      if (thread < head) run[thread] = shared[thread];
      if (thread < count - tail) run[tail + thread] = shared[tail + thread];
    }
  } else {
    for (int i = thread; i < count; i += kThreads) run[i] = shared[i];
  }
}

// Likewise of a group of channels, of which the pixels are `apart`.
__device__ __forceinline__ void copy_pixels(T* shared, const T* pixels, int count, int apart, int thread) {
  for (int i = thread; i < count; i += kThreads)
    ptx::copy_async<kGroupBytes>(shared + i * kGroup, pixels + static_cast<int64>(i) * apart);
}

__device__ __forceinline__ void store_pixels(T* pixels, const T* shared, int count, int apart, int thread) {
  using Piece = Vector<T, kGroup>;
  for (int i = thread; i < count; i += kThreads)
    *reinterpret_cast<Piece*>(pixels + static_cast<int64>(i) * apart) =
        *reinterpret_cast<const Piece*>(shared + i * kGroup);
}

__device__ __forceinline__ bool finite(Sum value) { return value - value == Sum(0); }

// The depthwise result at an element, before its activation; `plane` is where the channel of its image starts.
__device__ __forceinline__ Sum result_at(const Parameters& g, const T* plane, const T* w, const T* bias, int channel,
                                         int p, int q) {
  Sum sum = bias != nullptr ? Sum(widen(bias[channel])) : Sum(0);
  for (int r = 0; r < kR; ++r) {
    const int h = p - g.top + r * g.dilation_h;
#pragma unroll
    for (int s = 0; s < kS; ++s) {
      const int v = q - g.left + s * g.dilation_w;
      const bool exists = within(h, g.H) && within(v, g.W);
      const int64 pixel = static_cast<int64>(h) * g.W + v;
      const Sum value = exists ? Sum(widen(plane[kChannelsLast ? pixel * g.C : pixel])) : Sum(0);
      sum = fma(value, Sum(widen(w[channel * kTaps + r * kS + s])), sum);
    }
  }
  return sum;
}

// What an element of x and of the gradient that is not finite adds: x meets those taps only whose gradient exists, and
// padding is a zero that takes part.
__device__ __noinline__ void add_plainly(const Parameters& g, Sum x, Sum own, const Sum* gradient, int h, int v,
                                         Sum* sum) {
  for (int tap = 0; tap < kTaps; ++tap) {
    const int down = tap / kS * g.dilation_h - g.top, right = tap % kS * g.dilation_w - g.left;
    if (within(h - down, g.H) && within(v - right, g.W)) sum[tap] = fma(gradient[tap], x, sum[tap]);
    if (!within(h + down, g.H) || !within(v + right, g.W)) sum[tap] = fma(own, Sum(0), sum[tap]);
  }
}

// gradient, as it lies, becomes dx; partials (slabs, taps and one for dbias, C).
extern "C" __global__ void __launch_bounds__(kThreads, CUCONV_BLOCKS)
    separable_planes(T* gradient, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                     Sum* __restrict__ partials, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int c0 = static_cast<int>(blockIdx.x) * g.planes;
  const int planes = min(g.planes, g.C - c0);
  const int first_image = static_cast<int>(blockIdx.y) * g.slab_images;
  const int steps = (min(g.N, first_image + g.slab_images) - first_image) * g.chunks;
  const int plane_size = g.H * g.W;
  const int ring_rows = kWhole ? 0 : kRing * g.rows;

  T* const ring = reinterpret_cast<T*>(shared);
  T* const x_slots = ring + kRing * g.slot + kVector;

  // Where a step's chunk starts, as do its planes, and its elements.
  struct Chunk {
    int64 start, plane;
    int count, shift, first_row, rows;
  };
  const auto chunk_of = [&](int step) {
    const int image = step / g.chunks;
    const int of_image = step - image * g.chunks;
    const int64 images = first_image + image;
    Chunk chunk;
    chunk.plane = images * g.C * plane_size + (kChannelsLast ? c0 : static_cast<int64>(c0) * plane_size);
    chunk.first_row = of_image * g.rows;
    chunk.rows = min(g.rows, g.H - chunk.first_row);
    chunk.start = chunk.plane + static_cast<int64>(chunk.first_row) * g.W * (kChannelsLast ? g.C : 1);
    chunk.count = kWhole ? planes * plane_size : chunk.rows * g.W * kGroup;
    chunk.shift = kChannelsLast ? 0 : static_cast<int>(chunk.plane % kVector);
    return chunk;
  };
  const auto copy_chunk = [&](T* slot, const T* from, int step) {
    const Chunk chunk = chunk_of(step);
    if constexpr (kChannelsLast) {
      copy_pixels(slot, from + chunk.start, chunk.count / kGroup, g.C, thread);
    } else {
      copy_run(slot + chunk.shift, from + chunk.start, chunk.count, chunk.shift, thread);
    }
  };
  const auto copy = [&](int gradient_step, int x_step) {
    if (gradient_step < steps) copy_chunk(ring + gradient_step % kRing * g.slot, gradient, gradient_step);
    if (x_step >= 0 && x_step < steps) copy_chunk(x_slots + x_step % 2 * g.x_slot, x, x_step);
    ptx::copy_async_commit();
  };

  // A thread's plane and, where that is its only one, its column.
  const int own_plane = kChannelsLast ? thread % kGroup : kWhole ? thread / g.W : 0;
  const bool works = own_plane < planes;
  const int channel = c0 + own_plane;
  Sum weight[kTaps], sum[kTaps] = {}, sum_of_bias = 0;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) weight[tap] = works ? Sum(widen(w[channel * kTaps + tap])) : Sum(0);

  // Multiplies a chunk of the gradient by the slope of the activation.
  const auto apply_slope = [&](int step) {
    const Chunk chunk = chunk_of(step);
    T* const slot = ring + step % kRing * g.slot + chunk.shift;
    for (int i = thread; i < chunk.count; i += kThreads) {
      const int plane = kChannelsLast ? i % kGroup : kWhole ? i / plane_size : 0;
      const int in_plane = kChannelsLast ? i / kGroup : i - plane * plane_size;
      const int row = in_plane / g.W;
      const T* const start = x + chunk.plane + (kChannelsLast ? plane : static_cast<int64>(plane) * plane_size);
      const Sum z = result_at(g, start, w, bias, c0 + plane, chunk.first_row + row, in_plane - row * g.W);
      slot[i] = narrow<T>(Sum(widen(slot[i])) * slope::CUCONV_ACTIVATION(z));
    }
  };

  if constexpr (kAhead > 0) copy(0, -1);
  copy(kAhead, 0);
  if (kActive && kAhead > 0 && steps > 0) {
    ptx::copy_async_wait<1>();
    __syncthreads();
    apply_slope(0);
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<0>();
    __syncthreads();
    copy(step + 1 + kAhead, step + 1);
    if (kActive && step + kAhead < steps) {
      apply_slope(step + kAhead);
      __syncthreads();
    }

    const Chunk chunk = chunk_of(step);
    T* const x_slot = x_slots + step % 2 * g.x_slot + chunk.shift;
    // The ring's row of the image's row 0.
    const int row_0 = kWhole ? 0 : (step % kRing * g.rows - chunk.first_row % ring_rows + ring_rows) % ring_rows;
    const int start_of_plane = kChannelsLast ? own_plane : kWhole ? own_plane * plane_size : 0;
    const T* const rows_of_ring = ring + chunk.shift + (kWhole ? step % kRing * g.slot : 0) + start_of_plane;
    T* const rows_of_x = x_slot + start_of_plane;
    const auto ring_row = [&](int row) { return kWhole ? row : (row + row_0 + ring_rows) % ring_rows; };
    if (works) {
#pragma unroll 1
      for (int v = kChannelsLast ? thread / kGroup : kWhole ? thread - own_plane * g.W : thread; v < g.W;
           v += kThreads / kGroup) {
        int column[kS];
        bool exists[kS];
#pragma unroll
        for (int s = 0; s < kS; ++s) {
          column[s] = v + g.left - s * g.dilation_w;
          exists[s] = within(column[s], g.W);
          if (!exists[s]) column[s] = 0;
        }
        Sum window[kR][kS];
        const auto load = [&](int r, int row, int row_of_ring) {
          const bool row_exists = within(row, g.H);
          const T* const from = rows_of_ring + row_of_ring * g.W * kGroup;
#pragma unroll
          for (int s = 0; s < kS; ++s) {
            window[r][s] = row_exists && exists[s] ? Sum(widen(from[column[s] * kGroup])) : Sum(0);
          }
        };
        if constexpr (kSlides) {
#pragma unroll
          for (int r = 1; r < kR; ++r) {
            const int row = chunk.first_row + g.top - r;
            load(r - 1, row, within(row, g.H) ? ring_row(row) : 0);
          }
        }
        int newest = ring_row(chunk.first_row + g.top);
        int own_row = ring_row(chunk.first_row);
        // Unrolled by hand, so that rows of the window change their names alone: NVRTC 13, told to unroll this loop,
        // leaves out the test for what remains of the rows.
#pragma unroll 1
        for (int turn = 0; turn < chunk.rows; turn += kTurn) {
#pragma unroll
          for (int of_turn = 0; of_turn < kTurn; ++of_turn) {
            const int i = turn + of_turn;
            if (i >= chunk.rows) break;
            const int h = chunk.first_row + i;
            if constexpr (kSlides) {
#pragma unroll
              for (int r = kR - 1; r > 0; --r)
#pragma unroll
                for (int s = 0; s < kS; ++s) window[r][s] = window[r - 1][s];
              load(0, h + g.top, newest);
              if (++newest == ring_rows) newest = 0;
            } else {
#pragma unroll
              for (int r = 0; r < kR; ++r) {
                const int row = h + g.top - r * g.dilation_h;
                load(r, row, within(row, g.H) ? ring_row(row) : 0);
              }
            }
            T* const at = rows_of_x + (i * g.W + v) * kGroup;
            const Sum value = widen(*at);
            Sum own;
            if constexpr (kOwn >= 0) {
              own = window[kOwn / kS][kOwn % kS];
            } else {
              own = widen(rows_of_ring[(own_row * g.W + v) * kGroup]);
              if (++own_row == ring_rows) own_row = 0;
            }
            if (kBias) sum_of_bias += own;
            Sum total = 0;
#pragma unroll
            for (int r = 0; r < kR; ++r)
#pragma unroll
              for (int s = 0; s < kS; ++s) total = fma(window[r][s], weight[r * kS + s], total);
            *at = narrow<T>(total);
            if (finite(value) && finite(own)) {
#pragma unroll
              for (int r = 0; r < kR; ++r)
#pragma unroll
                for (int s = 0; s < kS; ++s) sum[r * kS + s] = fma(window[r][s], value, sum[r * kS + s]);
            } else {
              Sum factor[kTaps], added[kTaps];
#pragma unroll
              for (int tap = 0; tap < kTaps; ++tap) {
                factor[tap] = window[tap / kS][tap % kS];
                added[tap] = sum[tap];
              }
              add_plainly(g, value, own, factor, h, v, added);
#pragma unroll
              for (int tap = 0; tap < kTaps; ++tap) sum[tap] = added[tap];
            }
          }
        }
      }
    }
    __syncthreads();
    if constexpr (kChannelsLast) {
      store_pixels(gradient + chunk.start, x_slot, chunk.count / kGroup, g.C, thread);
    } else {
      store_run(gradient + chunk.start, x_slot, chunk.count, chunk.shift, thread);
    }
  }
  ptx::copy_async_wait<0>();
  __syncthreads();

  // The sums of a plane's threads: a warp adds those of one tap, always in one order.
  Sum* const sums = reinterpret_cast<Sum*>(shared);
  constexpr int kEntries = kTaps + kBias;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) sums[tap * kThreads + thread] = sum[tap];
  if (kBias) sums[kTaps * kThreads + thread] = sum_of_bias;
  __syncthreads();
  const int lane = thread % kWarp;
  const int of_plane = kChannelsLast ? kThreads / kGroup : kWhole ? g.W : kThreads;
  Sum* const own = partials + static_cast<int64>(blockIdx.y) * kEntries * g.C;
#pragma unroll 1
  for (int item = thread / kWarp; item < kEntries * planes; item += kThreads / kWarp) {
    const int plane = item / kEntries;
    const int entry = item - plane * kEntries;
    Sum total = 0;
    for (int i = lane; i < of_plane; i += kWarp)
      total += sums[entry * kThreads + (kChannelsLast ? i * kGroup + plane : plane * of_plane + i)];
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) total += __shfl_xor_sync(0xffffffffu, total, apart);
    if (lane == 0) own[static_cast<int64>(entry) * g.C + c0 + plane] = total;
  }
}
