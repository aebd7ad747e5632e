// What the kernels of separable convolution whose middle stays in registers have in common (sm_90).
//
// In the products of the pointwise part a lane holds a few channels of one pixel of the middle, and which pixel is
// which row or column of a product is free to choose. So a lane takes a group of pixels, kColumns neighbours in
// kLaneRows rows, makes all channels of the middle that it holds there from rows of x in shared memory, and is left with
// fragments; a group belongs to four lanes, which share its channels, and eight groups are a tile. Warps meet nowhere:
// each takes tiles, all channels, and goes down the rows with a ring of them, which other warps keep filled.
//
// A block takes tasks, each some rows of a strip of columns of an image, and counts the rows of x of all its tasks
// through; row n is in slot n % kSlots of the ring.
//
// Compile-time values: T; CHANNELS_LAST; R, S, LEFT (padding before a row, less than a piece), VECTOR, STRIP (elements
// of a piece, of 16 bytes) and DEPTHWISE_ACTIVATION, as in middle.cuh; LANE_ROWS; DEPTH_BLOCKS (of channels, as many as
// a product takes of the depth); WIDEST (columns of a strip, at most); SLOTS; WARPS (that compute); BRINGERS (warps
// that fill the ring); TERMS (of an element of float32: 1 or 2, see matrices.cuh); ACTIVATION.
#pragma once
#include "activations.cuh"
#include "matrices.cuh"

using T = CUCONV_T;
constexpr bool kChannelsLast = CUCONV_CHANNELS_LAST;

#include "middle.cuh"

constexpr int kLaneRows = CUCONV_LANE_ROWS;
constexpr int kDepthBlocks = CUCONV_DEPTH_BLOCKS;
constexpr int kWidest = CUCONV_WIDEST;
constexpr int kSlots = CUCONV_SLOTS;
constexpr int kWarps = CUCONV_WARPS;
constexpr int kTerms = CUCONV_TERMS;

constexpr int kBringers = CUCONV_BRINGERS;
constexpr int kThreads = (kWarps + kBringers) * kWarp;
constexpr int kPiece = kVector;
constexpr bool kHalves = sizeof(T) == 2;
constexpr int kDepth = kDepthBlocks * kProductDepth<T>;
constexpr int kWeightPitch = kDepth + pad_of<T>(false);
constexpr int kColumns = 4;
constexpr int kGroups = 8;
constexpr int kPixels = kLaneRows * kColumns;  // of a lane
constexpr int kRowsOfX = kLaneRows + kR - 1;

static_assert(kPiece * sizeof(T) == 16);

struct Parameters {
  int N, K, P, Q;
  int strips, strip;  // of an image, and columns of one
  int chunks, chunk;  // of a strip, and rows of one
  int tasks;
  Middle middle;
};

// Some rows of a strip of an image.
struct Task {
  int image;
  int p, rows;
  int q, columns;
  int groups;  // of kColumns columns, the last one of those that are left
  int units;   // of kLaneRows rows

  __device__ __forceinline__ Task(const Parameters& g, int task) {
    const int upper = task / g.strips;
    q = (task - upper * g.strips) * g.strip;
    image = upper / g.chunks;
    p = (upper - image * g.chunks) * g.chunk;
    rows = min(g.chunk, g.P - p);
    columns = min(g.strip, g.Q - q);
    groups = (columns + kColumns - 1) / kColumns;
    units = (rows + kLaneRows - 1) / kLaneRows;
  }

  __device__ __forceinline__ int rows_of_x() const { return units * kLaneRows + kR - 1; }
};

// What a block's threads go by: which rows of x are in the ring.
struct Ring {
  uint64* full;
  uint64* empty;
  int landed = 0;    // rows that this warp has waited for
  int released = 0;  // and those that it will not read again

  __device__ __forceinline__ void init(int thread) const {
    if (thread < kSlots) {
      ptx::barrier_init(&full[thread], kBringers * kWarp);
      ptx::barrier_init(&empty[thread], kWarps);
    }
  }

  // Of those that fill the ring: waits for the slot of a row, and announces that it is full, or will be once the copies
  // of the calling thread have landed.
  __device__ __forceinline__ void await_slot(int row) const {
    if (row >= kSlots) ptx::barrier_wait(&empty[row % kSlots], (row / kSlots - 1) % 2);
  }
  __device__ __forceinline__ void announce(int row) const { ptx::barrier_arrive(&full[row % kSlots]); }
  __device__ __forceinline__ void announce_copies(int row) const { ptx::copy_async_arrive(&full[row % kSlots]); }

  // Of the others: waits for the rows before `row`, and gives those back, one by one as they land: others may need the
  // slots of rows that this warp passes over before those that it reads can come.
  __device__ __forceinline__ void await(int row) {
    for (; landed < row; ++landed) ptx::barrier_wait(&full[landed % kSlots], landed / kSlots % 2);
  }
  __device__ __forceinline__ void release(int row, int lane) {
    __syncwarp();
    for (; released < row; ++released) {
      await(released + 1);
      if (lane == 0) ptx::barrier_arrive(&empty[released % kSlots]);
    }
  }
};

// All that a lane has of a tile of the middle: of each pixel two words of every block of the depth, of 16 bits each two
// channels.
struct Fragments {
  uint32 word[kDepthBlocks][kPixels][2];
};

// Values of the middle as a product takes them, or as its terms are made of.
template <class U, int kCount>
__device__ __forceinline__ uint32 word_of(const float (&value)[kCount]) {
  if constexpr (kCount == 2) {
    return narrow_pair(U{}, value[0], value[1]);
  } else {
    return kTerms == 2 ? __float_as_uint(value[0]) : ptx::float_to_tf32(value[0]);
  }
}

// A word as its terms. Those of float32 are of 11 bits, the first one rounded to nearest and the second cut off, which
// is not finite where the value is not, or where it rounds to infinity.
template <int kCount>
__device__ __forceinline__ void set_words(uint32 (&term)[kTerms][kCount], int i, uint32 word) {
  if constexpr (kTerms == 2) {
    // Terms of the middle, the same for all rows of w, would otherwise take registers all the while.
    word = ptx::as_it_is(static_cast<int>(word));
    term[0][i] = (word + 0x1000u) & 0xffffe000u;
    term[1][i] = __float_as_uint(__uint_as_float(word) - __uint_as_float(term[0][i])) & 0xffffe000u;
  } else {
    term[0][i] = word;
  }
}

// Makes those results again that three products have made not finite: of some rows of some columns, from pixel (p, q)
// on, of channels k, k + apart and so on. The calling thread must have stored them.
__device__ __noinline__ void mend(const Parameters& g, const T* x, const T* depthwise_w, const T* depthwise_bias,
                                  const T* w, const float* biases, T* y, int image, int p, int q, int rows, int columns,
                                  int k, int apart) {
  for (; k < g.K; k += apart)
    for (int i = 0; i < rows * columns; ++i) {
      const int row = i / columns;
      const Place at(image, p + row, q + i - row * columns);
      const int64 pixel = static_cast<int64>(at.p) * g.Q + at.q;
      const int64 plane = static_cast<int64>(g.P) * g.Q;
      T& result = y[kChannelsLast ? (at.image * plane + pixel) * g.K + k
                                  : (static_cast<int64>(at.image) * g.K + k) * plane + pixel];
      if (fabsf(widen(result)) <= 3.4e38f) continue;
      float total = 0;
      for (int d = 0; d < g.middle.channels; ++d)
        total = fma(middle_plainly(g.middle, x, depthwise_w, depthwise_bias, d, at),
                    float(widen(w[static_cast<int64>(k) * g.middle.channels + d])), total);
      result = narrow<T>(activation::CUCONV_ACTIVATION(total + biases[k]));
    }
}
