// CUDA's words in plain C++, so that g++ compiles an unmodified kernel source and a machine without a GPU runs it.
//
// One fiber is one CUDA thread; the blocks of a launch run in turn. The machine is an adversary within the rules:
// shared memory is 0xFF (NaN) before each block, a bulk load poisons its destination and lands only when nothing else
// can run, threads run forward, in reverse or in random order, and each misuse that is noticed ends the launch with a
// message. It does not know: the memory model (a missing __threadfence), spinning on memory, -ftz and -fmad.
#pragma once

#include <math.h>

#include "machine.h"

#define CUCONV_HOST
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#ifdef __SANITIZE_ADDRESS__  // no redzones behind a static variable that is aligned to more
#define __align__(n) __attribute__((aligned((n) > 64 ? 64 : (n))))
#else
#define __align__(n) __attribute__((aligned(n)))
#endif
#define CUCONV_DYNAMIC_SHARED(name) unsigned char* const name = hostcuda::dynamic_shared
#define CUCONV_BLOCKS_OF_CLUSTER(count)

#define HOSTCUDA_VECTORS(T, name)                                                           \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                        \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };             \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOSTCUDA_VECTORS(unsigned short, ushort)
HOSTCUDA_VECTORS(int, int)
HOSTCUDA_VECTORS(unsigned, uint)
HOSTCUDA_VECTORS(float, float)
HOSTCUDA_VECTORS(double, double)

// `line` is the line of the call: a default argument is evaluated where the call stands.
inline void __syncthreads(int line = __builtin_LINE()) {
  using namespace hostcuda;
  if (exited) fail("waits at the __syncthreads of line %d, and %d threads have exited", line, exited);
  if (at_sync && sync_line != line)
    fail("waits at the __syncthreads of line %d, and %d threads at that of line %d", line, at_sync, sync_line);
  sync_line = line;
  if (++at_sync < threads) return wait(kAtSync, line);
  at_sync = 0;
  generation++;
  for (int i = 0; i < threads; i++) fibers[i].state = kReady;
}

inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  __syncthreads(line);
  hostcuda::any_of_block = 0;
  __syncthreads(line);
  if (predicate) hostcuda::any_of_block = 1;
  __syncthreads(line);
  return hostcuda::any_of_block;
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, int line = __builtin_LINE()) {
  hostcuda::meet_lanes(mask, 0, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  hostcuda::meet_lanes(mask, predicate, line);
  unsigned ballot = 0;
  for (int i = 0; i < 32; i++)
    if ((mask >> i & 1) && hostcuda::value_of_lane<int>(i, line)) ballot |= 1u << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, int line = __builtin_LINE()) {
  hostcuda::meet_lanes(mask, value, line);
  return hostcuda::value_of_lane<T>((hostcuda::own_lane() & -width) | (from & (width - 1)), line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  hostcuda::meet_lanes(mask, value, line);
  const int lane = hostcuda::own_lane(), from = lane - int(delta);
  return hostcuda::value_of_lane<T>(from < (lane & -width) ? lane : from, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  hostcuda::meet_lanes(mask, value, line);
  const int lane = hostcuda::own_lane(), from = lane + int(delta);
  return hostcuda::value_of_lane<T>(from >= (lane & -width) + width ? lane : from, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  hostcuda::meet_lanes(mask, value, line);
  const int lane = hostcuda::own_lane(), from = lane ^ bits;
  return hostcuda::value_of_lane<T>(from >= (lane & -width) + width ? lane : from, line);
}

template <class T> T __ldg(const T* pointer) { return *pointer; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
// Bytes of the two words, low first, that the selector's four digits name.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)high << 32 | low;
  unsigned chosen = 0;
  for (int i = 0; i < 4; i++) chosen |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return chosen;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((unsigned long long)high << 32 | low) >> (shift % 32));
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// As CUDA's: of a number and a NaN the number.
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return fmin(a, b);
  else return std::common_type_t<A, B>(a) < std::common_type_t<A, B>(b) ? a : b;
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return fmax(a, b);
  else return std::common_type_t<A, B>(a) > std::common_type_t<A, B>(b) ? a : b;
}

// The twin of cuda/ptx.cuh: see there for what each function promises.
namespace ptx {

using hostcuda::fail, hostcuda::self, hostcuda::uint32, hostcuda::uint64;
using uint16 = unsigned short;

inline float half_to_float(uint16 bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}
inline uint16 float_to_half(float value) {
  if (value != value) return 0x7FFF;
  const _Float16 half = _Float16(value);
  uint16 bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline float bfloat16_to_float(uint16 bits) { return __uint_as_float(uint32(bits) << 16); }
inline uint16 float_to_bfloat16(float value) {
  if (value != value) return 0x7FFF;
  const uint32 bits = __float_as_uint(value);
  return uint16((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

template <class T>
T* as_it_is(T* address) {
  return address;
}
inline int as_it_is(int number) { return number; }

// Reads what is asked for, so that a wrong address is noticed where sanitizers watch.
inline void prefetch(const void* global) { static_cast<void>(*static_cast<const volatile unsigned char*>(global)); }

inline void half_pair_to_floats(uint32 pair, float& lower, float& upper) {
  lower = half_to_float(uint16(pair));
  upper = half_to_float(uint16(pair >> 16));
}
inline void bfloat16_pair_to_floats(uint32 pair, float& lower, float& upper) {
  lower = bfloat16_to_float(uint16(pair));
  upper = bfloat16_to_float(uint16(pair >> 16));
}
inline uint32 floats_to_half_pair(float lower, float upper) {
  return float_to_half(lower) | uint32(float_to_half(upper)) << 16;
}
inline uint32 floats_to_bfloat16_pair(float lower, float upper) {
  return float_to_bfloat16(lower) | uint32(float_to_bfloat16(upper)) << 16;
}

#if __CUDA_ARCH__ >= 800

// What is under way is poison until the copying thread waits for it.
template <int kBytes>
void copy_async(void* shared, const void* global, int line = __builtin_LINE()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (!hostcuda::in_shared(shared, kBytes)) fail("copy_async of %d bytes leaves shared memory, in line %d", kBytes, line);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % kBytes)
    fail("copy_async needs addresses of whole %d bytes: %p, %p in line %d", kBytes, shared, global, line);
  memset(shared, 0xFF, kBytes);
  self->copies.push_back({shared, global, kBytes, self->copy_groups});
}

inline void copy_async_part(void* shared, const void* global, int bytes, int line = __builtin_LINE()) {
  static const unsigned char zeros[16] = {};
  if (bytes < 0 || bytes > 16) fail("copy_async_part of %d bytes, in line %d", bytes, line);
  copy_async<16>(shared, global, line);
  self->copies.back().bytes = bytes;
  self->copies.push_back({static_cast<unsigned char*>(shared) + bytes, zeros, uint32(16 - bytes), self->copy_groups});
}

template <int kBytes>
void copy_async_or_zeros(void* shared, const void* global, bool exists, int line = __builtin_LINE()) {
  static const unsigned char zeros[16] __attribute__((aligned(16))) = {};
  copy_async<kBytes>(shared, exists ? global : zeros, line);
}

inline void copy_async_commit() { self->copy_groups++; }

// Carries out, at the last moment, all but the newest kGroups groups.
template <int kGroups>
void copy_async_wait() {
  auto& copies = self->copies;
  size_t landed = 0;
  for (; landed < copies.size() && copies[landed].group < self->copy_groups - kGroups; landed++)
    memcpy(copies[landed].to, copies[landed].from, copies[landed].bytes);
  copies.erase(copies.begin(), copies.begin() + landed);
}

// All lanes of the warp show each other a variable of theirs, which each reads through `of_lane`; none goes on before
// all have read.
template <class T, class Read>
void show_lanes(const T& own, int line, Read read) {
  hostcuda::meet_lanes(0xFFFFFFFFu, &own, line);
  read([line](int lane) -> const T& { return *hostcuda::value_of_lane<const T*>(lane, line); });
  hostcuda::meet_lanes(0xFFFFFFFFu, 0, line);
}

// Each lane's pieces of some matrices, of whose rows `of_lane` knows the addresses.
template <int kCount, class Gather>
void gather_matrices(const void* row, uint32 (&piece)[kCount], Gather gather, int line) {
  if (hostcuda::own_lane() < 8 * kCount) {
    if (!hostcuda::in_shared(row, 16)) fail("load_matrices outside shared memory, in line %d", line);
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("load_matrices needs rows aligned to 16 bytes, in line %d", line);
  }
  show_lanes(row, line, [&](auto of_lane) {
    for (int m = 0; m < kCount; m++)
      piece[m] = gather([&](int i) { return static_cast<const unsigned char*>(of_lane(8 * m + i)); });
  });
}
template <int kCount>
void load_matrices(const void* row, uint32 (&piece)[kCount], int line = __builtin_LINE()) {
  const int lane = hostcuda::own_lane();
  gather_matrices(row, piece, [lane](auto row_of) {
    uint32 pair;
    memcpy(&pair, row_of(lane / 4) + lane % 4 * 4, 4);
    return pair;
  }, line);
}
inline void load_matrices_transposed(const void* row, uint32 (&piece)[4], int line = __builtin_LINE()) {
  const int lane = hostcuda::own_lane();
  gather_matrices(row, piece, [lane](auto row_of) {
    uint16 halves[2];
    for (int e = 0; e < 2; e++) memcpy(&halves[e], row_of(lane % 4 * 2 + e) + lane / 4 * 2, 2);
    return halves[0] | uint32(halves[1]) << 16;
  }, line);
}

// Products are exact in float32. (The order of a sum is the hardware's own, and so is how it rounds.)
template <class Widen>
void multiply_matrices(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2], Widen widen, int line) {
  struct Fragments { uint32 a[4], b[2]; };
  const Fragments own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const int lane = hostcuda::own_lane();
  show_lanes(own, line, [&](auto of_lane) {
    for (int e = 0; e < 4; e++) {
      const int half = e / 2, column = lane % 4 * 2 + e % 2;
      for (int k = 0; k < 16; k++) {
        const int j = k % 8 / 2, shift = k % 2 * 16;
        const uint32 left = of_lane(lane / 4 * 4 + j).a[half + k / 8 * 2] >> shift;
        const uint32 right = of_lane(column * 4 + j).b[k / 8] >> shift;
        sum[e] += widen(uint16(left)) * widen(uint16(right));
      }
    }
  });
}
inline void multiply_halves(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2], int line = __builtin_LINE()) {
  multiply_matrices(sum, a, b, half_to_float, line);
}
inline void multiply_bfloat16s(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2],
                               int line = __builtin_LINE()) {
  multiply_matrices(sum, a, b, bfloat16_to_float, line);
}
// What is not there is zero, so that its products change no sum.
inline void multiply_halves(float (&sum)[4], const uint32 (&a)[2], uint32 b, int line = __builtin_LINE()) {
  multiply_halves(sum, {a[0], a[1], 0, 0}, {b, 0}, line);
}
inline void multiply_bfloat16s(float (&sum)[4], const uint32 (&a)[2], uint32 b, int line = __builtin_LINE()) {
  multiply_bfloat16s(sum, {a[0], a[1], 0, 0}, {b, 0}, line);
}

// To nearest, of two the one farther from zero.
inline uint32 float_to_tf32(float value) {
  const uint32 bits = __float_as_uint(value);
  if ((bits & 0x7F800000u) == 0x7F800000u) return value != value ? 0x7FFFE000u : bits;
  return (bits + 0x1000u) & 0xFFFFE000u;
}
inline void multiply_tf32s(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2], int line = __builtin_LINE()) {
  struct Fragments { uint32 a[4], b[2]; };
  const Fragments own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  for (uint32 bits : {a[0], a[1], a[2], a[3], b[0], b[1]})
    if (bits & 0x1FFFu) fail("multiply_tf32s of what is no TF32: %#x, in line %d", bits, line);
  const int lane = hostcuda::own_lane();
  show_lanes(own, line, [&](auto of_lane) {
    for (int e = 0; e < 4; e++) {
      const int half = e / 2, column = lane % 4 * 2 + e % 2;
      for (int k = 0; k < 8; k++) {
        const uint32 left = of_lane(lane / 4 * 4 + k % 4).a[half + k / 4 * 2];
        const uint32 right = of_lane(column * 4 + k % 4).b[k / 4];
        sum[e] += __uint_as_float(left) * __uint_as_float(right);
      }
    }
  });
}

#endif  // sm_80

#if __CUDA_ARCH__ >= 900

inline void barrier_init(uint64* barrier, uint32 arrivals, int line = __builtin_LINE()) {
  if (!hostcuda::in_shared(barrier, 8)) fail("barrier_init outside shared memory, in line %d", line);
  for (hostcuda::Barrier& known : hostcuda::barriers)
    if (known.address == barrier) fail("barrier_init twice on one barrier, in line %d", line);
  hostcuda::barriers.push_back({barrier, arrivals, arrivals, 0, 0});
}

inline void barrier_arrive_expect(uint64* barrier, uint32 bytes, int line = __builtin_LINE()) {
  hostcuda::Barrier& found = hostcuda::find_barrier(barrier, line);
  if (!found.pending) fail("arrives once too often in one phase of a barrier, in line %d", line);
  found.bytes += bytes;
  if (found.bytes >= 1 << 20) fail("announces more than 2^20 - 1 bytes in one phase, in line %d", line);
  found.pending--;
  complete_phase(found);
}

inline void barrier_arrive(uint64* barrier, int line = __builtin_LINE()) { barrier_arrive_expect(barrier, 0, line); }

inline void barrier_wait(uint64* barrier, uint32 parity, int line = __builtin_LINE()) {
  self->barrier = barrier;
  while ((hostcuda::find_barrier(barrier, line).phase & 1) == parity) hostcuda::wait(hostcuda::kAtBarrier, line);
}

inline void bulk_load(void* shared, const void* global, uint32 bytes, uint64* barrier, int line = __builtin_LINE()) {
  hostcuda::check_bulk("bulk_load", shared, global, bytes, line);
  hostcuda::find_barrier(barrier, line);
  memset(shared, 0xFF, bytes);
  hostcuda::loads.push_back({{{shared, global, bytes, 0}}, bytes, barrier, false});
}

// They land together, when nothing else can run.
inline void copy_async_arrive(uint64* barrier, int line = __builtin_LINE()) {
  hostcuda::find_barrier(barrier, line);
  hostcuda::loads.push_back({std::move(self->copies), 0, barrier, true});
  self->copies.clear();
}

// Of the fence this checks only that somebody called it since the last batch of stores, not that every writer did.
inline void bulk_store(void* global, const void* shared, uint32 bytes, int line = __builtin_LINE()) {
  using namespace hostcuda;
  check_bulk("bulk_store", shared, global, bytes, line);
  if (generation != store_generation && fence_generation < store_generation)
    fail("bulk_store with no fence_shared_for_bulk since the last batch of stores, in line %d", line);
  store_generation = generation;
  const auto* from = static_cast<const unsigned char*>(shared);
  self->stores.push_back({global, shared, {from, from + bytes}, self->groups});
}

inline void bulk_store_commit() { self->groups++; }

// Carries out, at the last moment, all but the newest kGroups groups.
template <int kGroups>
void bulk_store_wait_read(int line = __builtin_LINE()) {
  auto& stores = self->stores;
  while (!stores.empty() && stores.front().group < self->groups - kGroups) {
    const hostcuda::Store& store = stores.front();
    if (memcmp(store.from, store.bytes.data(), store.bytes.size()))
      fail("shared memory changed between bulk_store and bulk_store_wait_read, in line %d", line);
    memcpy(store.to, store.bytes.data(), store.bytes.size());
    stores.erase(stores.begin());
  }
}

inline void fence_shared_for_bulk() { hostcuda::fence_generation = hostcuda::generation; }

// Blocks run in turn along x, which is the cluster's: the last one finds what all had when they met it.
inline void cluster_meet(int line = __builtin_LINE()) {
  using namespace hostcuda;
  if (at_sync + 1 == threads) {
    if (blockIdx.x == 0) cluster.clear();
    for (size_t i = 0; i < cluster.size(); i++)
      if (cluster[i].block.x == blockIdx.x) cluster.erase(cluster.begin() + i);
    cluster.push_back({blockIdx, {dynamic_shared, dynamic_shared + dynamic_bytes}});
  }
  __syncthreads(line);
}

template <class T>
T load_of_cluster(const T* shared, uint32 rank, int line = __builtin_LINE()) {
  using namespace hostcuda;
  if (!in_shared(shared, sizeof(T))) fail("load_of_cluster outside shared memory, in line %d", line);
  for (const Kept& kept : cluster)
    if (kept.block.x == rank && kept.block.y == blockIdx.y && kept.block.z == blockIdx.z) {
      T value;
      memcpy(&value, kept.shared.data() + (reinterpret_cast<const unsigned char*>(shared) - dynamic_shared), sizeof value);
      return value;
    }
  fail("reads block %u of its cluster, which has not met it, in line %d", rank, line);
  return T(0);
}

// Products of warp groups, done at once, which the rules allow.
inline void products_begin() {}
inline void products_commit() {}
template <int kGroups>
void products_wait() {}

inline void group_sync(int number, int line = __builtin_LINE()) {
  static uint64 meetings[16];
  if (number < 1 || number > 15) fail("group_sync of number %d, in line %d", number, line);
  uint64* const meeting = &meetings[number];
  bool known = false;
  for (hostcuda::Barrier& barrier : hostcuda::barriers) known |= barrier.address == meeting;
  if (!known) hostcuda::barriers.push_back({meeting, 128, 128, 0, 0});
  hostcuda::Barrier& found = hostcuda::find_barrier(meeting, line);
  const uint32 phase = found.phase;
  found.pending--;
  complete_phase(found);
  self->barrier = meeting;
  while (hostcuda::find_barrier(meeting, line).phase == phase) hostcuda::wait(hostcuda::kAtBarrier, line);
}

// Offsets in dynamic shared memory take the place of addresses.
inline uint64 swizzled_columns(const void* first, int line = __builtin_LINE()) {
  if (!hostcuda::in_shared(first, 32)) fail("swizzled_columns outside shared memory, in line %d", line);
  const auto offset = static_cast<const unsigned char*>(first) - hostcuda::dynamic_shared;
  if (offset % 16) fail("swizzled_columns needs a multiple of 16 bytes, in line %d", line);
  return uint64(offset);
}

inline uint64 swizzled_rows(const void* first, int apart, int line = __builtin_LINE()) {
  return swizzled_columns(first, line) | uint64(apart) << 32;
}

// kDepth elements of 32 / kDepth bytes a row of a and a column of b; each warp makes its own 16 rows.
template <int kDepth, bool kByRows = false, int kSums, class Element>
void group_multiply(float (&sum)[kSums], const uint32 (&a)[4], uint64 b, Element element, int line) {
  constexpr int kBytes = 32 / kDepth, kPerWord = 4 / kBytes, kHalf = kDepth / 2;
  const int lane = hostcuda::own_lane();
  struct Fragment { uint32 a[4]; };
  const Fragment own = {{a[0], a[1], a[2], a[3]}};
  show_lanes(own, line, [&](auto of_lane) {
    for (int i = 0; i < kSums; i++) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2, half = i % 4 / 2;
      for (int k = 0; k < kDepth; k++) {
        const int word = k % kHalf / kPerWord, shift = k % kPerWord * kBytes * 8;
        const uint32 left = of_lane(lane / 4 * 4 + word).a[half + k / kHalf * 2] >> shift;
        auto place = reinterpret_cast<uintptr_t>(hostcuda::dynamic_shared) + uint32(b);
        place += kByRows ? column / 64 * (b >> 32) + k * 128 + column % 64 * kBytes : column * 128 + k * kBytes;
        place ^= place >> 3 & 0x70;
        const auto* right = reinterpret_cast<const unsigned char*>(place);
        if (!hostcuda::in_shared(right, kBytes)) fail("products outside shared memory, in line %d", line);
        sum[i] += element(left) * element(*reinterpret_cast<const std::conditional_t<kBytes == 2, uint16, uint32>*>(right));
      }
    }
  });
}
template <int kSums>
void group_multiply_halves(float (&sum)[kSums], const uint32 (&a)[4], uint64 b, int line = __builtin_LINE()) {
  group_multiply<16>(sum, a, b, [](uint32 bits) { return half_to_float(uint16(bits)); }, line);
}
template <int kSums>
void group_multiply_bfloat16s(float (&sum)[kSums], const uint32 (&a)[4], uint64 b, int line = __builtin_LINE()) {
  group_multiply<16>(sum, a, b, [](uint32 bits) { return bfloat16_to_float(uint16(bits)); }, line);
}
template <int kSums>
void group_multiply_halves_by_rows(float (&sum)[kSums], const uint32 (&a)[4], uint64 b, int line = __builtin_LINE()) {
  group_multiply<16, true>(sum, a, b, [](uint32 bits) { return half_to_float(uint16(bits)); }, line);
}
template <int kSums>
void group_multiply_bfloat16s_by_rows(float (&sum)[kSums], const uint32 (&a)[4], uint64 b,
                                      int line = __builtin_LINE()) {
  group_multiply<16, true>(sum, a, b, [](uint32 bits) { return bfloat16_to_float(uint16(bits)); }, line);
}
// What is below TF32's 11 bits is not looked at.
template <int kSums>
void group_multiply_tf32s(float (&sum)[kSums], const uint32 (&a)[4], uint64 b, int line = __builtin_LINE()) {
  group_multiply<8>(sum, a, b, [](uint32 bits) { return __uint_as_float(bits & 0xFFFFE000u); }, line);
}

#endif  // sm_90

}  // namespace ptx
