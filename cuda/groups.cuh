// Products of warp groups (sm_90a), as pointwise_groups.cu and pointwise_wgrad_groups.cu make them: the left factor, of
// 64 rows a product, passes through registers, where float32 is taken apart, every element once for all columns; the
// right one lies in shared memory: 16-bit elements as they are, in columns or in rows, float32 in columns, turned around
// and taken apart by those who bring it there.
//
// Compile-time values: T; TERMS (of an element of float32: 1 or 2, as in matrices.cuh); PRODUCTS (one below the other,
// of a warp group); COLUMNS (of all products); RIGHT_ALONG_COLUMNS (whether memory runs along the columns of the right
// factor, and not along its depth); RAGGED (whether rows of shared memory start behind a boundary: see
// `Shifts`).
#pragma once
#include "numbers.cuh"
#include "pixels.cuh"

using T = CUCONV_T;

constexpr int kTerms = CUCONV_TERMS;
constexpr int kProducts = CUCONV_PRODUCTS;
constexpr bool kRightAlongColumns = CUCONV_RIGHT_ALONG_COLUMNS;
constexpr bool kRagged = CUCONV_RAGGED;

constexpr int kWarp = 32;
constexpr int kGroupThreads = 128;
constexpr int kSize = sizeof(T);
constexpr int kVector = 16 / kSize;
// A stage is as deep as rows of 128 bytes, and a product takes 32 bytes of them.
constexpr int kRowBytes = 128;
constexpr int kDepth = kRowBytes / kSize;
constexpr int kSteps = 4;
constexpr int kStepDepth = kDepth / kSteps;
constexpr int kColumns = CUCONV_COLUMNS;
// Of one product.
constexpr int kPartColumns = kColumns < 128 ? kColumns : 128;
constexpr int kParts = kColumns / kPartColumns;
constexpr int kRows = kProducts * 64;
// Rows of a lane that lie side by side in memory, where memory runs along the rows.
constexpr int kStrip = 2 * kProducts;
// Then what is one step deeper lies so far behind that what a warp reads at once is in different banks.
constexpr int kPitch = kRows + 8;
// The right factor starts at a multiple of so many bytes.
constexpr int kRightAlignment = 1024;
constexpr int kRightTile = kColumns * kDepth;
// Whether the right factor is copied as it is, and whether in rows: of 64 columns, further ones behind all of the depth.
constexpr bool kRightAsItIs = kSize == 2;
constexpr bool kRightInRows = kRightAsItIs && kRightAlongColumns;
constexpr int kRowColumns = 64;

static_assert(kSize == 2 || kSize == 4);
static_assert(kProducts == 1 || kProducts == 2);
static_assert(kPartColumns == 64 || kPartColumns == 128);
static_assert(kParts * kPartColumns == kColumns);
static_assert(!kRightInRows || kDepth == kRowColumns, "rows of both kinds are as long");

using Sums = float[kProducts][kParts][kPartColumns / 2];

__device__ __forceinline__ void multiply(f16, float (&sum)[kPartColumns / 2], const uint32 (&a)[4], uint64 b) {
  if (kRightInRows) return ptx::group_multiply_halves_by_rows(sum, a, b);
  ptx::group_multiply_halves(sum, a, b);
}
__device__ __forceinline__ void multiply(bf16, float (&sum)[kPartColumns / 2], const uint32 (&a)[4], uint64 b) {
  if (kRightInRows) return ptx::group_multiply_bfloat16s_by_rows(sum, a, b);
  ptx::group_multiply_bfloat16s(sum, a, b);
}
__device__ __forceinline__ void multiply(f32, float (&sum)[kPartColumns / 2], const uint32 (&a)[4], uint64 b) {
  ptx::group_multiply_tf32s(sum, a, b);
}

// Where 16 bytes of a row of 128 lie: in different banks for neighbouring rows.
__device__ __forceinline__ int swizzled(int row, int sixteenth) {
  return row * kDepth + (sixteenth ^ row % 8) * kVector;
}

// Shared memory from the first boundary on that suits the right factor.
__device__ __forceinline__ unsigned char* aligned_for_right(unsigned char* shared) {
  const int beyond = static_cast<int>(reinterpret_cast<uint64>(shared) % kRightAlignment);
  return shared + (kRightAlignment - beyond) % kRightAlignment;
}

// Begins to copy a chunk of the right factor as it is, in pieces of kPiece elements. from(column, depth) is where the
// piece that begins there does, or null; `anywhere` is any address.
template <int kPiece, int kThreads, class From>
__device__ __forceinline__ void copy_right(T* tile, const T* anywhere, int thread, From from) {
  constexpr int kPlaces = (kRightInRows ? kColumns : kDepth) / kPiece;
  constexpr int kItems = kPlaces * (kRightInRows ? kDepth : kColumns);
#pragma unroll
  for (int i = 0; i < (kItems + kThreads - 1) / kThreads; ++i) {
    const int item = i * kThreads + thread;
    if (kItems % kThreads != 0 && item >= kItems) break;
    const int across = item / kPlaces;
    const int along = item % kPlaces * kPiece;
    const T* const source = kRightInRows ? from(along, across) : from(across, along);
    const int block = kRightInRows ? along / kRowColumns * kRowColumns * kDepth : 0;
    T* const to = tile + block + swizzled(across, along % kDepth / kVector) + along % kVector;
    ptx::copy_async_or_zeros<kPiece * kSize>(to, source != nullptr ? source : anywhere, source != nullptr);
  }
}

// Where a product of one step and one part of the columns finds its right factor.
__device__ __forceinline__ uint64 right_of(const T* tile, int part, int step) {
  const T* const first = tile + part * kPartColumns * kDepth;
  if (kRightInRows)
    return ptx::swizzled_rows(first + step * kStepDepth * kRowColumns, kRowColumns * kDepth * kSize);
  return ptx::swizzled_columns(first + step * kStepDepth);
}

// A float32 as its terms, each a tile of the right factor behind the other. Of the second one products look at the 11
// uppermost bits alone.
template <int kCount>
__device__ __forceinline__ void put_right(T* to, const Vector<T, kCount>& elements) {
  if constexpr (kSize == 2) {
    *reinterpret_cast<Vector<T, kCount>*>(to) = elements;
  } else {
    Vector<T, kCount> upper, lower;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const float value = widen(elements.piece[e]);
      const float rounded = __uint_as_float(ptx::float_to_tf32(value));
      upper.piece[e] = narrow<T>(rounded);
      lower.piece[e] = narrow<T>(value - rounded);
    }
    *reinterpret_cast<Vector<T, kCount>*>(to) = upper;
    if (kTerms == 2) *reinterpret_cast<Vector<T, kCount>*>(to + kRightTile) = lower;
  }
}

// Begins to copy kTileRows rows of kRow elements, kPitch apart, of 16 bits at any address: each from the boundary of 16
// bytes before its first element on. Rows of the tensor, of `all` elements, are a plane apart; of the tile the first
// `rows` exist, `count` elements of each, and others become zeros.
template <int kThreads, int kTileRows, int kRow, int kPitch>
__device__ __forceinline__ void copy_ragged(T* to, const T* tensor, int64 start, int plane, int rows, int count,
                                            int64 all, int thread) {
  constexpr int kPieces = kRow / kVector + 1;
  constexpr int kItems = kTileRows * kPieces;
#pragma unroll
  for (int i = 0; i < (kItems + kThreads - 1) / kThreads; ++i) {
    const int item = i * kThreads + thread;
    if (kItems % kThreads != 0 && item >= kItems) break;
    const int row = item / kPieces;
    const int piece = item - row * kPieces;
    const int64 row_start = start + static_cast<int64>(row) * plane;
    const int64 from = row_start / kVector * kVector + piece * kVector;
    const bool exists = row < rows && from < row_start + count;
    const int elements = exists ? static_cast<int>(min(static_cast<int64>(kVector), all - from)) : 0;
    ptx::copy_async_part(to + row * kPitch + piece * kVector, exists ? tensor + from : tensor, elements * kSize);
  }
}

// A word of a ragged row, of which `row` is the first boundary and the element `at` the word's first.
__device__ __forceinline__ uint32 ragged_word(const T* row, int at) {
  const uint32* const words = reinterpret_cast<const uint32*>(row) + at / 2;
  return __funnelshift_r(words[0], words[1], at % 2 * 16);
}

// Of a word of 16-bit elements those of which there are `left`.
__device__ __forceinline__ uint32 first_of_word(uint32 word, int left) {
  return left >= 2 ? word : left == 1 ? word & 0xffff : 0;
}

// A chunk of the right factor on its way from memory to shared memory, in pieces of kPiece elements. Where memory runs
// along the depth a thread has rows of columns; where it runs along the columns it has some columns of as much
// of the depth as fills a word. Either way all that is a thread's lies at one place of the depth.
template <int kPiece, int kThreads>
struct RightPieces {
  static constexpr bool kTurned = kRightAlongColumns;
  static constexpr int kPair = kTurned ? 4 / kSize : 1;
  static constexpr int kPlaces = kTurned ? kDepth / kPair : kDepth / kPiece;
  static constexpr int kItems = kPlaces * (kTurned ? kColumns / kPiece : kColumns);
  static constexpr int kOwn = (kItems + kThreads - 1) / kThreads;
  static_assert(kThreads % kPlaces == 0);

  Vector<T, kPiece> piece[kOwn][kPair];

  // The first place in the depth that is a thread's.
  __device__ __forceinline__ static int depth_of(int thread) {
    return thread % kPlaces * (kTurned ? kPair : kPiece);
  }

  // from(column, e) is where the piece from this column on and at depth_of + e begins, or null.
  template <class From>
  __device__ __forceinline__ void load(int thread, From from) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int item = i * kThreads + thread;
      const int column = item / kPlaces * (kTurned ? kPiece : 1);
#pragma unroll
      for (int e = 0; e < kPair; ++e) {
        piece[i][e] = {};
        const T* const source = kItems % kThreads == 0 || item < kItems ? from(column, e) : nullptr;
        if (source != nullptr) piece[i][e] = *reinterpret_cast<const Vector<T, kPiece>*>(source);
      }
    }
  }

  // column_of(column) is the column of the products that it shall be.
  template <class ColumnOf>
  __device__ __forceinline__ void put(T* tile, int thread, ColumnOf column_of) const {
    const int depth = depth_of(thread);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int item = i * kThreads + thread;
      if (kItems % kThreads != 0 && item >= kItems) break;
      const int column = item / kPlaces * (kTurned ? kPiece : 1);
#pragma unroll
      for (int e = 0; e < (kTurned ? kPiece : 1); ++e) {
        T* const to = tile + swizzled(column_of(column + e), depth / kVector) + depth % kVector;
        if constexpr (!kTurned) {
          put_right(to, piece[i][0]);
        } else if constexpr (kSize == 2) {
          put_right(to, Vector<T, 2>{piece[i][0].piece[e], piece[i][1].piece[e]});
        } else {
          put_right(to, Vector<T, 1>{piece[i][0].piece[e]});
        }
      }
    }
  }
};

// What a lane has of the left factor for one step of the depth: of every product a fragment, in terms.
using Left = uint32[kProducts][kTerms][4];

__device__ __forceinline__ void set_terms(Left& left, int product, int i, float value) {
  left[product][0][i] = ptx::float_to_tf32(value);
  // The products look at its 11 uppermost bits alone.
  if constexpr (kTerms == 2) left[product][1][i] = __float_as_uint(value - __uint_as_float(left[product][0][i]));
}

// Of ragged tiles: how many elements behind a boundary the lane's rows start, of which it has two kinds.
using Shifts = int[2];

// kProducts words from `first` on.
__device__ __forceinline__ Vector<uint32, kProducts> strip_of(const T* row, int first, int shift) {
  Vector<uint32, kProducts> strip;
  if constexpr (kRagged) {
    const uint32* const words = reinterpret_cast<const uint32*>(row) + (first + shift) / 2;
    uint32 word[kProducts + 1];
#pragma unroll
    for (int i = 0; i <= kProducts; ++i) word[i] = words[i];
#pragma unroll
    for (int i = 0; i < kProducts; ++i)
      strip.piece[i] = __funnelshift_r(word[i], word[i + 1], shift % 2 * 16);
  } else {
    strip = *reinterpret_cast<const Vector<uint32, kProducts>*>(row + first);
  }
  return strip;
}

// Of rows of 128 bytes: row `half` * 8 + lane / 4 of a warp's 16 rows of a product is the same of its tile.
__device__ __forceinline__ void load_left_of_rows(Left& left, const T* tile, int step, int warp, int lane) {
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
    const int first = product * 64 + warp * 16;
    if constexpr (kSize == 2) {
      ptx::load_matrices(tile + swizzled(first + lane % 16, step * 2 + lane / 16), left[product][0]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        set_terms(left, product, i,
                  widen(tile[swizzled(first + lane / 4 + i % 2 * 8, step * 2 + i / 2) + lane % 4]));
    }
  }
}

// Likewise of ragged rows of 16-bit elements, kDepth + kVector apart, of which `count` exist; others become zeros.
__device__ __forceinline__ void load_left_of_ragged_rows(Left& left, const T* tile, int step, int shift, int count,
                                                         int warp, int lane) {
#pragma unroll
  for (int last = 0; last < 2; ++last) {
    const int depth = step * kStepDepth + last * 8 + lane % 4 * 2;
#pragma unroll
    for (int product = 0; product < kProducts; ++product)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = product * 64 + warp * 16 + half * 8 + lane / 4;
        const uint32 word = ragged_word(tile + row * (kDepth + kVector), shift + depth);
        left[product][0][last * 2 + half] = first_of_word(word, count - depth);
      }
  }
}

// Where memory runs along the rows of the product: the lane's rows of all products are neighbours. In ragged tiles its
// two kinds are those of even and odd depth.
__device__ __forceinline__ int strip_offset(int warp, int lane) { return (warp * 8 + lane / 4) * kStrip; }
__device__ __forceinline__ void load_left_of_strips(Left& left, const T* tile, int step, const Shifts& shift, int warp,
                                                    int lane) {
  const int first = strip_offset(warp, lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kSize == 2) {
      const T* const row = tile + (step * kStepDepth + half * 8 + lane % 4 * 2) * kPitch;
      const Vector<uint32, kProducts> even = strip_of(row, first, shift[0]);
      const Vector<uint32, kProducts> odd = strip_of(row + kPitch, first, shift[1]);
#pragma unroll
      for (int product = 0; product < kProducts; ++product) {
        left[product][0][half * 2] = __byte_perm(even.piece[product], odd.piece[product], 0x5410);
        left[product][0][half * 2 + 1] = __byte_perm(even.piece[product], odd.piece[product], 0x7632);
      }
    } else {
      const T* const row = tile + (step * kStepDepth + half * 4 + lane % 4) * kPitch;
      const Vector<T, kStrip> strip = *reinterpret_cast<const Vector<T, kStrip>*>(row + first);
#pragma unroll
      for (int e = 0; e < kStrip; ++e) set_terms(left, e / 2, half * 2 + e % 2, widen(strip.piece[e]));
    }
  }
}

// Adds the products of a stage. load_left(left, step) makes what a lane has of the left factor; meanwhile() is done while
// the first products are under way.
template <class LoadLeft, class Meanwhile>
__device__ __forceinline__ void multiply_stage(Sums& sum, const T* right, LoadLeft load_left, Meanwhile meanwhile) {
  // A step's fragments are made while the products of the one before are under way.
  Left left[2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    load_left(left[step % 2], step);
    ptx::products_begin();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint64 upper = right_of(right, part, step);
#pragma unroll
      for (int product = 0; product < kProducts; ++product) {
        // The small ones first.
        if constexpr (kTerms == 2) {
          multiply(T{}, sum[product][part], left[step % 2][product][1], upper);
          multiply(T{}, sum[product][part], left[step % 2][product][0], right_of(right + kRightTile, part, step));
        }
        multiply(T{}, sum[product][part], left[step % 2][product][0], upper);
      }
    }
    ptx::products_commit();
    if (step == 0) meanwhile();
    if (step < kSteps - 1) {
      ptx::products_wait<1>();
    } else {
      ptx::products_wait<0>();
    }
  }
}

// Whether all of a lane's sums are numbers, for what float32 in two terms is not: of an infinity the second is NaN.
__device__ __forceinline__ bool all_finite(const Sums& sum) {
  float zero = 0;
  if (kTerms == 2) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product)
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int i = 0; i < kPartColumns / 2; ++i) zero = fma(sum[product][part][i], 0.0f, zero);
  }
  return zero == 0;
}
