// Depthwise convolution of small planes, NCHW, 16-bit, on tensor cores (sm_90 and newer): forward, and at stride 1 the
// gradient of the input, which is the convolution of dy with the kernel turned around. The names are the forward
// pass's.
//
// The 16 rows of a product are 16 images, its k are pixels of one plane of x and its columns outputs of that plane,
// both in raster order: y(image, n) = sum over k of x(image, k) * t(k, n), where t(k, n) is the weight of the tap by
// which output n meets pixel k, and zero where there is none. So images lie in shared memory as they come, one below
// the other, and fragments of a are read from there directly. Stride, padding and dilation only decide where in t the
// weights are.
//
// Of t only a band is not zero. A tile is 8 outputs, a group some neighbouring tiles of a plane. What a group needs of
// t stays in the registers of one warp, which goes with it through the images: of the group's window of k-steps, every
// tile meets those that MASKS names. A plane may begin at any element: windows and tiles start at grains, multiples of
// 8 elements of a run, and what t has for elements of other planes is zero.
//
// A unit is 16 images of some neighbouring planes: a run for each image, which one warp brings and takes back. A block
// makes neighbouring units, the images of the same planes one after the other, while the next ones are under way. It
// makes t anew where the planes change.
//
// The zeros of t make NaN of an infinity or NaN anywhere in the window, other planes included, and a weight that is not
// finite makes no NaN where its tap meets padding. Nothing else can make a sum both wrong and not NaN: where a sum is
// NaN, or a weight is not finite, all sums of the warp are made again, tap by tap.
//
// Where a group is some whole rows and x as wide as y, the same t serves all groups, if only x is zero above and below
// its plane. A unit is then one plane, with zeros between images, and a warp makes every kWarps-th group.
//
// Compile-time values: T; TURNED (the kernel, both ways); THREADS; BLOCKS (of a multiprocessor); STAGES (of units,
// those under way included); IN_VECTORS, OUT_VECTORS (of a run, by one warp); STEPS (of a window); MASKS (of every tile
// of a group: bit i is set where it meets k-step i); EDGES (bit i is set where tile i may have outputs that are not its
// plane's); PAIRS (planes of y have an even number of elements); PERIODIC (all groups have the same t).
#include "indices.cuh"
#include "numbers.cuh"
#include "products.cuh"
#include "runs.cuh"

using T = CUCONV_T;

constexpr bool kTurned = CUCONV_TURNED;
constexpr int kThreads = CUCONV_THREADS;
constexpr int kStages = CUCONV_STAGES;
constexpr int kSteps = CUCONV_STEPS;
constexpr bool kPairs = CUCONV_PAIRS;
constexpr uint32 kEdges = CUCONV_EDGES;
constexpr bool kPeriodic = CUCONV_PERIODIC;

constexpr int kWarps = kThreads / kWarp;
constexpr int kInVectors = CUCONV_IN_VECTORS;
constexpr int kOutVectors = CUCONV_OUT_VECTORS;
// The shape of a product: images, pixels, outputs.
constexpr int kImages = 16;
constexpr int kStep = 16;
constexpr int kTile = 8;
// Where windows and tiles may start: every so many elements.
constexpr int kGrain = kBulkAlignment / static_cast<int>(sizeof(T));
constexpr uint32 kAllLanes = 0xffffffff;
// What a warp copies at once, and the images of a unit that it copies.
constexpr int kWarpBytes = kWarp * kBulkAlignment;
constexpr int kOwnImages = (kImages + kWarps - 1) / kWarps;
// Elements of a line of the cache.
constexpr int kLine = 128 / static_cast<int>(sizeof(T));
// Behind every index of a table, whatever is added to or subtracted from it.
constexpr int kNowhere = 1 << 28;

__device__ constexpr int count_tiles() {
  constexpr uint32 masks[] = {CUCONV_MASKS};
  return static_cast<int>(sizeof(masks) / sizeof(uint32));
}
constexpr int kTiles = count_tiles();

__device__ constexpr bool meets(int tile, int step) {
  constexpr uint32 masks[] = {CUCONV_MASKS};
  return (masks[tile] >> step & 1) != 0;
}

static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements");
static_assert(kGrain == kTile, "tiles of y start where windows of x may");

struct Parameters {
  int K, R, S;
  int H, W, P, Q;
  int top, left;                   // padding
  int stride_h, stride_w;
  int dilation_h, dilation_w;
  uint32 W_magic, Q_magic, S_magic, groups_magic;  // see divide
  int table_pitch, table_size;     // see fill_table
  int rows_before;                 // rows above the plane that t tells apart
  int first_grain, group_grains;   // where the first group's window starts, and from each group's to the next one's
  int groups;                      // of a plane
  int images;
  int image_units;                 // units of the same planes
  int block_planes;
  int block_units, extra_units;    // units of a block; so many blocks, the first ones, have one more
  int own_bytes;                   // shared bytes of a warp's own
  int guard_bytes;                 // zeros before and behind every stage
  int input_pitch, output_pitch;   // shared bytes from one image of a unit to the next
};

// A unit's place among all.
struct Unit {
  int part;  // planes [part * block_planes, ...)
  int rank;  // images [rank * kImages, ...)

  __device__ __forceinline__ Unit(int index, const Parameters& g)
      : part(index / g.image_units), rank(index - part * g.image_units) {}

  // Whether the next unit is of other planes.
  __device__ __forceinline__ bool advance(const Parameters& g) {
    const bool last = ++rank == g.image_units;
    if (last) {
      rank = 0;
      ++part;
    }
    return last;
  }
  __device__ __forceinline__ int first_plane(const Parameters& g) const { return part * g.block_planes; }
  __device__ __forceinline__ int planes(const Parameters& g) const {
    return min(g.block_planes, g.K - part * g.block_planes);
  }
  __device__ __forceinline__ int images(const Parameters& g) const { return min(kImages, g.images - rank * kImages); }
};

// A unit, and where in an array of planes of so many elements a lane starts to copy it; the next one follows.
struct Cursor : Unit {
  int64 image_size;
  int64 place;
  bool first = true;  // of the block's units

  __device__ __forceinline__ Cursor(const Unit& unit, int plane_size, int warp, int lane, const Parameters& g)
      : Unit(unit), image_size(static_cast<int64>(g.K) * plane_size) {
    start(plane_size, warp, lane, g);
  }
  __device__ __forceinline__ void start(int plane_size, int warp, int lane, const Parameters& g) {
    place = (rank * kImages + warp) * image_size + static_cast<int64>(first_plane(g)) * plane_size + lane * kGrain;
  }
  __device__ __forceinline__ void follow(int plane_size, int warp, int lane, const Parameters& g) {
    if (advance(g)) {
      start(plane_size, warp, lane, g);
    } else {
      place += kImages * image_size;
    }
    first = false;
  }
};

// A table of a plane's weights, with zeros around: at (row, column) that of the tap which lies so many rows and columns
// of x behind the first, where column 0 is left of everything that any output can meet. Returns whether all are finite.
__device__ __forceinline__ bool fill_table(const Parameters& g, const T* weights, uint16* table, int lane) {
  bool finite = true;
#pragma unroll 1
  for (int tap = lane; tap < g.R * g.S; tap += kWarp) {
    const int r = divide(tap, g.S_magic);
    const int column = (tap - r * g.S) * g.dilation_w - g.left + (g.Q - 1) * g.stride_w;
    const T weight = weights[kTurned ? g.R * g.S - 1 - tap : tap];
    if (within(column, g.table_pitch)) table[r * g.dilation_h * g.table_pitch + column] = weight.bits;
    const float value = widen(weight);
    finite = finite && value - value == 0.0f;
  }
  return __all_sync(kAllLanes, finite);
}

// Pixel and output meet at an index of the table that is the difference of two numbers, one of each. Here are those of
// a warp's window, whose first pixel is first_pixel, and of its tiles, of which the first output is first_output.
struct Places {
  Vector<int, 2> of_pixels[kSteps * kStep / 2];
  int of_outputs[kTiles * kTile];
};

__device__ __forceinline__ void find_places(const Parameters& g, int first_pixel, int first_output, Places& places,
                                            int lane) {
#pragma unroll 1
  for (int i = lane; i < kSteps * kStep; i += kWarp) {
    const int k = first_pixel + i;
    const int h = divide(max(k + g.rows_before * g.W, 0), g.W_magic) - g.rows_before;
    const bool exists = kPeriodic || within(k, g.H * g.W);
    places.of_pixels[i / 2].piece[i % 2] = exists ? k + h * (g.table_pitch - g.W) : -kNowhere;
  }
#pragma unroll 1
  for (int i = lane; i < kTiles * kTile; i += kWarp) {
    const int n = first_output + i;
    const int p = divide(max(n, 0), g.Q_magic);
    const int index = (p * g.stride_h - g.top) * g.table_pitch + (n - p * g.Q + 1 - g.Q) * g.stride_w;
    places.of_outputs[i] = kPeriodic || within(n, g.P * g.Q) ? index : kNowhere;
  }
}

// What the lane holds of t: for every tile and k-step of the window the rows 2j, 2j + 1, 2j + 8, 2j + 9 (j = lane % 4)
// of column lane / 4.
__device__ __forceinline__ void make_products(const Parameters& g, const uint16* table, const Places& places, int lane,
                                              uint32 (&t)[kTiles][kSteps][2]) {
  int of_output[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) of_output[tile] = places.of_outputs[tile * kTile + lane / 4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vector<int, 2> of_pixel = places.of_pixels[step * (kStep / 2) + half * 4 + lane % 4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (!meets(tile, step)) continue;
        uint32 bits[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // What is not in the table is the zero behind it.
          const uint32 index = static_cast<uint32>(of_pixel.piece[e] - of_output[tile]);
          bits[e] = table[min(index, static_cast<uint32>(g.table_size))];
        }
        t[tile][step][half] = bits[0] | bits[1] << 16;
      }
    }
  }
}

// One output, tap by tap; zeros outside the plane take part.
__device__ __forceinline__ float convolve_one(const Parameters& g, const T* plane, const T* weight, int n, float sum) {
  const int p = divide(n, g.Q_magic);
  const int row = p * g.stride_h - g.top;
  const int column = (n - p * g.Q) * g.stride_w - g.left;
#pragma unroll 1
  for (int r = 0; r < g.R; ++r) {
#pragma unroll 1
    for (int s = 0; s < g.S; ++s) {
      const int h = row + r * g.dilation_h;
      const int v = column + s * g.dilation_w;
      const int tap = r * g.S + s;
      const float value = within(h, g.H) && within(v, g.W) ? widen(plane[h * g.W + v]) : 0.0f;
      sum = fma(value, widen(weight[kTurned ? g.R * g.S - 1 - tap : tap]), sum);
    }
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(kThreads, CUCONV_BLOCKS)
    depthwise_images(const T* x, const T* w, const T* bias, T* y, const __grid_constant__ Parameters g) {
  CUCONV_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int block = static_cast<int>(blockIdx.x);

  const int stage_bytes = kImages * g.input_pitch + g.guard_bytes;
  unsigned char* const inputs = shared + g.guard_bytes;
  unsigned char* const outputs = inputs + kStages * stage_bytes;
  unsigned char* const own = outputs + 2 * kImages * g.output_pitch + warp * g.own_bytes;
  Places& places = *reinterpret_cast<Places*>(own);
  uint16* const table = reinterpret_cast<uint16*>(own + sizeof(Places));

  const int x_plane = g.H * g.W;
  const int y_plane = g.P * g.Q;
  const int units = g.block_units + (block < g.extra_units ? 1 : 0);
  Unit unit(block * g.block_units + min(block, g.extra_units), g);
  Cursor ahead(unit, x_plane, warp, lane, g), behind(unit, y_plane, warp, lane, g);

  // A warp's plane of the block's is always the same, and so are its groups.
  const int plane = kPeriodic ? 0 : divide(warp, g.groups_magic);
  const int first_group = warp - plane * g.groups;
  const int groups = kPeriodic ? g.groups : first_group + 1;

  // A warp copies whole images, vector by vector. With a part's first one it asks for the part's weights.
  const auto load = [&](int stage) {
    if (ahead.rank == 0 || ahead.first) {
      const int64 k = ahead.first_plane(g) + plane;
      if (k < g.K && lane * kLine < g.R * g.S) ptx::prefetch(w + k * (g.R * g.S) + lane * kLine);
    }
    const int images = ahead.images(g);
    const int bytes = ahead.planes(g) * x_plane * static_cast<int>(sizeof(T)) - lane * kBulkAlignment;
    unsigned char* const to = inputs + stage * stage_bytes + warp * g.input_pitch + lane * kBulkAlignment;
    const T* const from = x + ahead.place;
#pragma unroll
    for (int i = 0; i < kOwnImages; ++i)
#pragma unroll
      for (int v = 0; v < kInVectors; ++v)
        if (warp + i * kWarps < images && v * kWarpBytes < bytes)
          ptx::copy_async<16>(to + i * kWarps * g.input_pitch + v * kWarpBytes,
                          from + i * kWarps * ahead.image_size + v * kWarp * kGrain);
    ahead.follow(x_plane, warp, lane, g);
  };
  const auto store = [&](int stage) {
    using Piece = Vector<uint32, 4>;
    const int images = behind.images(g);
    const int bytes = behind.planes(g) * y_plane * static_cast<int>(sizeof(T)) - lane * kBulkAlignment;
    const unsigned char* const from =
        outputs + (stage * kImages + warp) * g.output_pitch + lane * kBulkAlignment;
    T* const to = y + behind.place;
#pragma unroll
    for (int i = 0; i < kOwnImages; ++i)
#pragma unroll
      for (int v = 0; v < kOutVectors; ++v)
        if (warp + i * kWarps < images && v * kWarpBytes < bytes)
          *reinterpret_cast<Piece*>(to + i * kWarps * behind.image_size + v * kWarp * kGrain) =
              *reinterpret_cast<const Piece*>(from + i * kWarps * g.output_pitch + v * kWarpBytes);
    behind.follow(y_plane, warp, lane, g);
  };

#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < units) load(stage);
    ptx::copy_async_commit();
  }
  // No copy writes here: around stages, and behind the runs of images.
#pragma unroll 1
  for (int stage = 0; stage <= kStages; ++stage)
#pragma unroll 1
    for (int i = thread * 4; i < g.guard_bytes; i += kThreads * 4)
      *reinterpret_cast<uint32*>(shared + stage * stage_bytes + i) = 0;
  const int run_bytes = g.block_planes * x_plane * static_cast<int>(sizeof(T));
#pragma unroll 1
  for (int row = run_bytes < g.input_pitch ? thread : kStages * kImages; row < kStages * kImages; row += kThreads)
#pragma unroll 1
    for (int i = run_bytes; i < g.input_pitch; i += 4)
      *reinterpret_cast<uint32*>(inputs + row / kImages * stage_bytes + row % kImages * g.input_pitch + i) = 0;
#pragma unroll 1
  for (int i = lane; i <= g.table_size; i += kWarp) table[i] = 0;

  const int plane_window = plane * x_plane / kGrain + g.first_grain;
  const int plane_tile = plane * y_plane / kGrain;
  const int fragment = lane % kImages * g.input_pitch + (plane_window + lane / kImages) * kBulkAlignment;
  const int column = lane % 4 * 2;

  const int t_group = kPeriodic ? 0 : first_group;
  find_places(g, (plane_window + t_group * g.group_grains) * kGrain - plane * x_plane,
              (plane_tile + t_group * kTiles) * kTile - plane * y_plane, places, lane);

  uint32 t[kTiles][kSteps][2];
  float start = 0.0f;
  bool finite = true;
  for (int turn = 0; turn < units; ++turn, unit.advance(g)) {
    const int stage = turn % kStages;
    unsigned char* const input = inputs + stage * stage_bytes;
    unsigned char* const output = outputs + turn % 2 * kImages * g.output_pitch;
    const int k = unit.first_plane(g) + plane;
    const T* const weights = w + static_cast<int64>(k) * (g.R * g.S);
    const bool busy = plane < unit.planes(g);
    if (busy && (turn == 0 || unit.rank == 0)) {
      __syncwarp();
      finite = fill_table(g, weights, table, lane);
      __syncwarp();
      make_products(g, table, places, lane, t);
      start = bias == nullptr ? 0.0f : widen(bias[k]);
    }

    // Everybody's copies have landed, and what was read or written a turn ago is no longer needed, or complete.
    ptx::copy_async_wait<kStages - 2>();
    __syncthreads();
    if (turn + kStages - 1 < units) load((turn + kStages - 1) % kStages);
    ptx::copy_async_commit();
    if (turn > 0) store((turn - 1) % 2);

#pragma unroll 1
    for (int group = busy ? first_group : groups; group < groups; group += kWarps) {
      const int first_tile = plane_tile + group * kTiles;
      const int first_output = first_tile * kTile - plane * y_plane;
      const unsigned char* const window = input + fragment + group * g.group_grains * kBulkAlignment;
      float sum[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[tile][e] = start;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32 a[4];
        ptx::load_matrices(window + step * kStep * static_cast<int>(sizeof(T)), a);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          if (meets(tile, step)) multiply(T{}, sum[tile], a, t[tile][step]);
      }

      // Infinities of different signs make a NaN too, and are then made again in vain. Images that do not exist are
      // what was there before.
      const int images = unit.images(g);
      float all[4] = {};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int e = 0; e < 4; ++e) all[e] += sum[tile][e];
      const float low = all[0] + all[1], high = all[2] + all[3];
      const bool wrong = (lane / 4 < images && low != low) || (lane / 4 + 8 < images && high != high);
      if (!finite || __any_sync(kAllLanes, wrong)) {
#pragma unroll 1
        for (int i = lane; i < images * kTiles * kTile; i += kWarp) {
          const int image = i / (kTiles * kTile);
          const int n = first_output + i % (kTiles * kTile);
          const T* const source = reinterpret_cast<const T*>(input + image * g.input_pitch) + plane * x_plane;
          T* const place = reinterpret_cast<T*>(output + image * g.output_pitch) + plane * y_plane + n;
          if (within(n, y_plane)) *place = narrow<T>(convolve_one(g, source, weights, n, start));
        }
      } else {
        unsigned char* const row = output + lane / 4 * g.output_pitch + (first_tile * kTile + column) * sizeof(T);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int n = first_output + tile * kTile + column;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            unsigned char* const place = row + half * 8 * g.output_pitch + tile * kTile * sizeof(T);
            const uint32 pair = narrow_pair(T{}, sum[tile][half * 2], sum[tile][half * 2 + 1]);
            const bool edge = (kEdges >> tile & 1) != 0;
            if (!edge || within(n, y_plane - 1)) *reinterpret_cast<uint32*>(place) = pair;
            // Planes that begin or end within a word share it with their neighbours.
            if (edge && !kPairs) {
              if (tile == 0 && n == -1) *reinterpret_cast<uint16*>(place + sizeof(T)) = static_cast<uint16>(pair >> 16);
              if (n == y_plane - 1) *reinterpret_cast<uint16*>(place) = static_cast<uint16>(pair);
            }
          }
        }
      }
    }
  }
  __syncthreads();
  store((units - 1) % 2);
}
