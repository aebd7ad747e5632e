// Depthwise convolution, gradients of the weights and the bias, NCHW, 16-bit, on tensor cores (sm_90 and newer), of
// small planes: stride 1, no dilation, and a dy as large as x.
//
// The planes are cut into chunks of 8 pixels, rows one after the other. A product m16n8k16 multiplies a chunk of dy in
// 16 images (k) by two chunks of x in the same images (m): of every pair of pixels, one of dy and one of x, it makes a
// sum over images. dw[r][s] is the sum of those pairs that lie a tap apart, and are added in the end. No other pair is
// looked at, be it of pixels in different rows, or of elements beside the plane: these need not be zeros, and planes
// may start at any element.
//
// A block owns some planes, and a slab of the batch, through which it goes some images at a time. One bulk copy an
// image brings its planes of x, one those of dy, while the images before them are worked on; a product's operands are
// loaded from where these arrive. A warp takes some chunks of one plane of dy and all chunks of x that they meet.
//
// Whatever is not finite makes a sum that is not finite: where there is one the block does it over, plainly, with the
// zeros of the padding.
//
// Compile-time values: T; R, S; BIAS (whether dbias is summed too); FINAL (there is one slab, and no need for another
// launch); THREADS; BLOCKS (that a multiprocessor is to hold, which bounds the registers); STAGES (of images under
// way); PLANE_CHUNKS (that a plane reaches into); CHUNKS (of dy that a warp takes); FIRST, OFFSETS (chunk d of dy meets
// the chunks d + FIRST + t of x for t below OFFSETS).
#include "indices.cuh"
#include "numbers.cuh"
#include "products.cuh"
#include "runs.cuh"
#include "wgrad_plainly.cuh"

using T = CUCONV_T;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr bool kBias = CUCONV_BIAS;
constexpr bool kFinal = CUCONV_FINAL;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kBlocks = CUCONV_BLOCKS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kPlaneChunks = CUCONV_PLANE_CHUNKS;
constexpr int kChunks = CUCONV_CHUNKS;
constexpr int kFirst = CUCONV_FIRST;
constexpr int kOffsets = CUCONV_OFFSETS;

constexpr int kWarps = kThreads / kWarp;
// Pixels of a chunk, and images of a product.
constexpr int kChunk = 8;
constexpr int kStep = 16;
constexpr int kTaps = kR * kS;
constexpr int kEntries = kTaps + kBias;
// Of the chunks of x that a warp's chunks of dy meet, two a product: chunk i of dy meets the pairs i / 2 to
// (i + kOffsets - 1) / 2.
constexpr int kPairs = (kChunks + kOffsets) / 2;
constexpr int kPairsOfChunk = kOffsets / 2 + 1;
// In the end the sums of some chunks of dy at a time go through shared memory, of every pixel those with all pixels of
// x.
constexpr int kChunksAtOnce = kChunks < 4 ? kChunks : 4;
constexpr int kPixelPitch = kOffsets * kChunk + 1;
constexpr int kTotalPitch = kWarp + 1;
constexpr int kSumsOfWarp = kChunksAtOnce * kChunk * kPixelPitch > kEntries * kTotalPitch
                                ? kChunksAtOnce * kChunk * kPixelPitch
                                : kEntries * kTotalPitch;

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements");
static_assert(kChunks <= 8, "the sums of dbias have eight rows");

struct Parameters {
  int K, R, S;
  int H, W, P, Q;
  int top, left;                   // padding
  int stride_h, stride_w;          // 1, as are
  int dilation_h, dilation_w;
  uint32 W_magic;                  // see divide
  int pitch;                       // elements from one image to the next in shared memory
  int margin;                      // elements before the first stage
  int images;                      // of a stage: a multiple of kStep
  int all_images;
  int block_images;                // of a slab
  int block_planes;
  int plane_warps;                 // that share a plane
};

// Whether chunk i of a warp's dy meets a pair of chunks of x. Where a warp has the whole plane, some pairs are beside
// it.
__device__ constexpr bool meets(int i, int pair) {
  const int chunk = kFirst + 2 * pair;
  const bool beside = kChunks >= kPlaneChunks && (chunk + 1 < 0 || chunk >= kPlaneChunks || i >= kPlaneChunks);
  return pair >= i / 2 && pair <= (i + kOffsets - 1) / 2 && !beside;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_wgrad_pairs(const T* dy, const T* x, float* partials, T* dw, T* dbias,
                          const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  __shared__ uint64 full[kStages];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;

  const int k0 = static_cast<int>(blockIdx.y) * g.block_planes;
  const int planes = min(g.block_planes, g.K - k0);
  const int first_image = static_cast<int>(blockIdx.x) * g.block_images;
  const int all_images = min(g.block_images, g.all_images - first_image);
  const int turns = (all_images + g.images - 1) / g.images;
  const int pixels = g.H * g.W;
  const int64 apart = static_cast<int64>(g.K) * pixels;
  const int64 start = first_image * apart + static_cast<int64>(k0) * pixels;
  // Images start at multiples of 16 bytes, so that the elements between these and the planes, which are brought too,
  // are the image's own.
  const int phase = static_cast<int>(static_cast<uint32>(k0) * static_cast<uint32>(pixels) % kChunk);
  const uint32 bytes = static_cast<uint32>((phase + planes * pixels + kChunk - 1) / kChunk * kBulkAlignment);
  T* const stages = reinterpret_cast<T*>(shared) + g.margin;
  const int dy_offset = g.images * g.pitch;
  const auto images_of = [&](int turn) { return min(g.images, all_images - turn * g.images); };

  const auto load = [&](int turn) {
    const int images = images_of(turn);
    uint64* const barrier = &full[turn % kStages];
    if (thread == 0) ptx::barrier_arrive_expect(barrier, 2 * static_cast<uint32>(images) * bytes);
#pragma unroll 1
    for (int copy = lane * kWarps + warp; copy < 2 * images; copy += kThreads) {
      const int image = copy / 2;
      const bool of_dy = copy % 2;
      T* const to = stages + turn % kStages * 2 * dy_offset + of_dy * dy_offset + image * g.pitch;
      ptx::bulk_load(to, (of_dy ? dy : x) + start - phase + (turn * g.images + image) * apart, bytes, barrier);
    }
  };

  if (thread == 0)
    for (int stage = 0; stage < kStages; ++stage) ptx::barrier_init(&full[stage], 1);
  __syncthreads();
  for (int turn = 0; turn < kStages; ++turn)
    if (turn < turns) load(turn);

  const int plane = warp / g.plane_warps;
  const int first_chunk = kChunks >= kPlaneChunks ? 0 : (warp - plane * g.plane_warps) * kChunks;
  const int plane_start = phase + plane * pixels;
  const int plane_phase = plane_start % kChunk;
  // Of the 8x8 matrices of a fragment a lane gives a row, that is an image. Of x, lanes 8 to 15 and 24 to 31 that of
  // the second chunk, and 16 to 31 those of the last eight images; of dy, those and these the other way around.
  const int second = lane / 8 % 2;
  const int last = lane / 16;
  const int own_start = plane_start - plane_phase + first_chunk * kChunk;
  const int own_chunks = (plane_phase + pixels + kChunk - 1) / kChunk - first_chunk;
  const T* const x_lane = stages + (lane % 8 + last * 8) * g.pitch + own_start + (kFirst + second) * kChunk;
  const T* const dy_lane = stages + dy_offset + (lane % 8 + second * 8) * g.pitch + own_start;

  float sum[kChunks][kPairsOfChunk][4] = {};
  // Row i of the first eight is chunk i's.
  float bias_sum[4] = {};

#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int images = images_of(turn);
    const int stage_offset = turn % kStages * 2 * dy_offset;
    ptx::barrier_wait(&full[turn % kStages], turn / kStages % 2);
    if (images % kStep > 0) {
      // The last images of all: those that are missing are zero.
      const int missing = kStep - images % kStep;
      for (int i = thread; i < missing * g.pitch; i += kThreads)
        stages[stage_offset + images * g.pitch + i] = stages[stage_offset + dy_offset + images * g.pitch + i] = T{};
      __syncthreads();
    }
    const T* x_step = x_lane + stage_offset;
    const T* dy_step = dy_lane + stage_offset;
    if (plane < planes) {
#pragma unroll 1
      for (int first = 0; first < images; first += kStep, x_step += kStep * g.pitch, dy_step += kStep * g.pitch) {
        uint32 gradient[kChunks][2];
#pragma unroll
        for (int i = 0; i < kChunks; i += 2) {
          uint32 piece[4];
          const bool both = i + 1 < kChunks;
          ptx::load_matrices_transposed(dy_step + (i + (both ? last : 0)) * kChunk, piece);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            gradient[i][half] = piece[half];
            if (both) gradient[i + 1][half] = piece[2 + half];
          }
        }
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          uint32 value[4];
          ptx::load_matrices_transposed(x_step + 2 * pair * kChunk, value);
#pragma unroll
          for (int i = 0; i < kChunks; ++i)
            if (meets(i, pair)) multiply(T{}, sum[i][pair - i / 2], value, gradient[i]);
        }
        if (kBias) {
#pragma unroll
          for (int i = 0; i < kChunks; ++i) {
            // Behind the plane there may be nothing at all, and even zeros would make NaN of that.
            if (i >= own_chunks) continue;
            const uint32 own = lane / 4 == i ? two_ones(T{}) : 0;
            const uint32 row_of_ones[4] = {own, 0, own, 0};
            multiply(T{}, bias_sum, row_of_ones, gradient[i]);
          }
        }
      }
    }
    __syncthreads();
    if (turn + kStages < turns) load(turn + kStages);
  }

  // All loads have landed and been read: their memory is free. Each lane takes a pixel of dy, and adds what it has for
  // every tap.
  float* const own_sums = reinterpret_cast<float*>(shared) + warp * kSumsOfWarp;
  float total[kEntries] = {};
#pragma unroll
  for (int first = 0; first < kChunks; first += kChunksAtOnce) {
    __syncwarp();
#pragma unroll
    for (int i = first; i < first + kChunksAtOnce && i < kChunks; ++i)
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        if (!meets(i, pair)) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // See ptx::multiply_halves.
          const int t = 2 * pair + e / 2 - i;
          const int pixel = (i - first) * kChunk + lane % 4 * 2 + e % 2;
          if (t >= 0 && t < kOffsets) own_sums[pixel * kPixelPitch + t * kChunk + lane / 4] = sum[i][pair - i / 2][e];
        }
      }
    __syncwarp();
    const int pixel = (first_chunk + first) * kChunk + lane - plane_phase;
    const int p = divide(max(pixel, 0), g.W_magic);
    const int q = pixel - p * g.W;
    const bool exists = lane < min(kChunksAtOnce, kChunks - first) * kChunk && pixel >= 0 && p < g.H;
    const float* row = own_sums + lane * kPixelPitch + lane % kChunk - kFirst * kChunk - g.top * g.W - g.left;
#pragma unroll
    for (int r = 0; r < kR; ++r, row += g.W) {
      const bool row_exists = exists && within(p + r - g.top, g.H);
#pragma unroll
      for (int s = 0; s < kS; ++s)
        if (row_exists && within(q + s - g.left, g.W)) total[r * kS + s] += row[s];
    }
  }
  if constexpr (kBias) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int pixel = (first_chunk + lane / 4) * kChunk + lane % 4 * 2 + e - plane_phase;
      if (lane / 4 < kChunks && within(pixel, pixels)) total[kTaps] += bias_sum[e];
    }
  }

  const auto deliver = [&](int of_plane, int tap, float result) {
    const int64 k = k0 + of_plane;
    if (!kFinal) {
      partials[(static_cast<int64>(blockIdx.x) * kEntries + tap) * g.K + k] = result;
    } else if (tap < kTaps) {
      dw[k * kTaps + tap] = narrow<T>(result);
    } else {
      dbias[k] = narrow<T>(result);
    }
  };

  float seen = 0;
#pragma unroll
  for (int entry = 0; entry < kEntries; ++entry) seen = fma(total[entry], 0.0f, seen);
  if (__syncthreads_or(plane < planes && seen != seen)) {
    for (int entry = warp; entry < planes * kEntries; entry += kWarps) {
      const int tap = entry / planes;
      const int of_plane = entry - tap * planes;
      const int64 plane_of = start + of_plane * pixels;
      const float result = sum_plainly(g, dy + plane_of, x + plane_of, all_images, apart, apart, tap, lane);
      if (lane == 0) deliver(of_plane, tap, result);
    }
    return;
  }

  // Lanes are added, then warps.
#pragma unroll
  for (int entry = 0; entry < kEntries; ++entry) own_sums[entry * kTotalPitch + lane] = total[entry];
  __syncwarp();
#pragma unroll 1
  for (int entry = lane; entry < kEntries; entry += kWarp) {
    float of_lanes = 0;
#pragma unroll 8
    for (int i = 0; i < kWarp; ++i) of_lanes += own_sums[entry * kTotalPitch + i];
    own_sums[entry * kTotalPitch] = of_lanes;
  }
  __syncthreads();
  for (int entry = thread; entry < planes * kEntries; entry += kThreads) {
    const int tap = entry / planes;
    const int of_plane = entry - tap * planes;
    const float* terms = reinterpret_cast<const float*>(shared) + of_plane * g.plane_warps * kSumsOfWarp;
    float result = 0;
    for (int i = 0; i < g.plane_warps; ++i) result += terms[i * kSumsOfWarp + tap * kTotalPitch];
    deliver(of_plane, tap, result);
  }
}
