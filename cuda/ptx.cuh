// Every PTX instruction that the kernels use, each behind a function of its own.
//
// A kernel source that reaches hardware only through these functions also compiles as plain C++: the host-run
// tests define CUCONV_HOST and supply functions of the same names (tests/hostcuda/).
#pragma once

using int64 = long long;
using uint64 = unsigned long long;
using uint32 = unsigned int;
using uint16 = unsigned short;

static_assert(sizeof(int64) == 8 && sizeof(uint64) == 8 && sizeof(uint32) == 4 && sizeof(uint16) == 2);

#ifndef CUCONV_HOST

// All of a block's dynamic shared memory, aligned for the copy engine and for 16-byte vectors.
#define CUCONV_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// So many blocks along x of the grid are a cluster.
#define CUCONV_BLOCKS_OF_CLUSTER(count) __cluster_dims__(count, 1, 1)

namespace ptx {

__device__ __forceinline__ float half_to_float(uint16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ uint16 float_to_half(float value) {
  uint16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float bfloat16_to_float(uint16 bits) {
  return __uint_as_float(static_cast<uint32>(bits) << 16);
}

__device__ __forceinline__ uint16 float_to_bfloat16(float value) {
#if __CUDA_ARCH__ >= 800
  uint16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  // sm_75 has no conversion: round to nearest even on the bits, and keep a NaN a NaN.
  const uint32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// The address in global memory, of which the compiler now knows no more than that: it would otherwise take the sum
// apart, and put every address that is made from this one together again from more parts.
template <class T>
__device__ __forceinline__ T* as_it_is(T* address) {
  size_t global = __cvta_generic_to_global(address);
  asm("" : "+l"(global));
  return static_cast<T*>(__cvta_global_to_generic(global));
}

// The number, likewise: the compiler would otherwise make it anew in every turn of a loop that uses it.
__device__ __forceinline__ int as_it_is(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Asks for the cache line of an address in global memory, which must exist, to be brought to L2.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
}

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// Two halves of a word, the lower one first; one conversion each, without taking the word apart.
__device__ __forceinline__ void half_pair_to_floats(uint32 pair, float& lower, float& upper) {
  asm("{\n"
      ".reg .f16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n"
      "}"
      : "=f"(lower), "=f"(upper)
      : "r"(pair));
}

__device__ __forceinline__ void bfloat16_pair_to_floats(uint32 pair, float& lower, float& upper) {
  lower = __uint_as_float(pair << 16);
  upper = __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ uint32 floats_to_half_pair(float lower, float upper) {
#if __CUDA_ARCH__ >= 800
  uint32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
#else
  return float_to_half(lower) | static_cast<uint32>(float_to_half(upper)) << 16;
#endif
}

__device__ __forceinline__ uint32 floats_to_bfloat16_pair(float lower, float upper) {
#if __CUDA_ARCH__ >= 800
  uint32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
#else
  return float_to_bfloat16(lower) | static_cast<uint32>(float_to_bfloat16(upper)) << 16;
#endif
}

#if __CUDA_ARCH__ >= 800

// Global to shared, kBytes bytes (4, 8 or 16) to which both ends are aligned; they have landed when a wait of the
// calling thread says so.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "n"(kBytes)
                 : "memory");
}

// The first `bytes` of 16 bytes, with zeros behind them.
__device__ __forceinline__ void copy_async_part(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// copy_async where `exists`, and zeros where not, for which an address is needed all the same.
template <int kBytes>
__device__ __forceinline__ void copy_async_or_zeros(void* shared, const void* global, bool exists) {
  if constexpr (kBytes == 16)
    copy_async_part(shared, global, exists ? 16 : 0);
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "n"(kBytes), "r"(exists ? kBytes : 0)
                 : "memory");
}

// Closes the calling thread's group of such copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all of the calling thread's groups but the newest kGroups have landed.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory, by all lanes of a warp. Lanes 8m to 8m + 7 give the
// addresses of the rows of matrix m, 16 bytes each and aligned to as many; lane l gets elements 2 (l % 4) and the next
// of row l / 4 of matrix m in piece[m].
__device__ __forceinline__ void load_matrices(const void* row, uint32 (&piece)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece[0]), "=r"(piece[1]), "=r"(piece[2]), "=r"(piece[3])
               : "r"(shared_address(row))
               : "memory");
}

// Likewise of two matrices, whose rows lanes 0 to 15 give.
__device__ __forceinline__ void load_matrices(const void* row, uint32 (&piece)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(piece[0]), "=r"(piece[1])
               : "r"(shared_address(row))
               : "memory");
}

// As of four, but lane l gets elements l / 4 of rows 2 (l % 4) and the next: of each matrix the transposed one.
__device__ __forceinline__ void load_matrices_transposed(const void* row, uint32 (&piece)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece[0]), "=r"(piece[1]), "=r"(piece[2]), "=r"(piece[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum += a b by all lanes of a warp, a of 16 rows and 16 columns, b of 16 and 8; sums in float32. Lane l = 4 i + j has
//   of a    rows i and i + 8 of columns 2j, 2j + 1 in a[0] and a[1], of columns 2j + 8, 2j + 9 in a[2] and a[3],
//   of b    rows 2j, 2j + 1 of column i in b[0], rows 2j + 8, 2j + 9 in b[1],
//   of sum  columns 2j, 2j + 1 of row i in sum[0] and sum[1], of row i + 8 in sum[2] and sum[3].
__device__ __forceinline__ void multiply_halves(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_bfloat16s(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Likewise with the first 8 columns of a and rows of b alone.
__device__ __forceinline__ void multiply_halves(float (&sum)[4], const uint32 (&a)[2], uint32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

__device__ __forceinline__ void multiply_bfloat16s(float (&sum)[4], const uint32 (&a)[2], uint32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// float32 as TF32, rounded to nearest: a float32 whose 13 lowest bits are zero.
__device__ __forceinline__ uint32 float_to_tf32(float value) {
  uint32 bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// As multiply_halves, a of 16 rows and 8 columns, b of 8 rows and 8 columns, of TF32. Lane l = 4 i + j has
//   of a    rows i and i + 8 of column j in a[0] and a[1], of column j + 4 in a[2] and a[3],
//   of b    row j of column i in b[0], row j + 4 in b[1].
__device__ __forceinline__ void multiply_tf32s(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif  // sm_80

#if __CUDA_ARCH__ >= 900

// Makes a barrier that completes a phase after `arrivals` arrivals and the bytes that they announced, and shows it to
// the copy engine.
__device__ __forceinline__ void barrier_init(uint64* barrier, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces that `bytes` bytes of bulk copies are to land before the phase completes.
__device__ __forceinline__ void barrier_arrive_expect(uint64* barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives without announcing bytes; what this thread wrote before is seen by those who wait.
__device__ __forceinline__ void barrier_arrive(uint64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives once all of the calling thread's copy_async so far have landed.
__device__ __forceinline__ void copy_async_arrive(uint64* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits for the phase of this parity: 0 for the first, 1 for the second, 0 for the third and so on.
__device__ __forceinline__ void barrier_wait(uint64* barrier, uint32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Global to shared, `bytes` bytes, by the copy engine: both ends aligned to 16 bytes, the size a multiple of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32 bytes, uint64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Shared to global, likewise. The shared bytes must stay as they are until bulk_store_wait_read says so.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// Closes the calling thread's group of bulk stores.
__device__ __forceinline__ void bulk_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all of the calling thread's groups but the newest kGroups have read their shared memory.
template <int kGroups>
__device__ __forceinline__ void bulk_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// Shows this thread's ordinary writes to shared memory to the copy engine; a block barrier must follow.
__device__ __forceinline__ void fence_shared_for_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for all threads of the cluster, and shows each what the others wrote to shared memory before.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// What the block of this rank in the cluster has at an address of shared memory.
__device__ __forceinline__ float load_of_cluster(const float* shared, uint32 rank) {
  float value;
  asm volatile(
      "{\n"
      ".reg .b32 place;\n"
      "mapa.shared::cluster.u32 place, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [place];\n"
      "}"
      : "=f"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
}

__device__ __forceinline__ double load_of_cluster(const double* shared, uint32 rank) {
  double value;
  asm volatile(
      "{\n"
      ".reg .b32 place;\n"
      "mapa.shared::cluster.u32 place, %1, %2;\n"
      "ld.shared::cluster.f64 %0, [place];\n"
      "}"
      : "=d"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
}

#endif  // sm_90

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Products of warp groups: four warps, of which the first one's number is a multiple of four, multiply 64 rows by so
// many columns at once, while they do other things: between products_begin and products_wait neither sums nor a may be
// touched.

// Makes what these threads wrote to registers before visible to the products that follow.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products begun so far.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all groups of products but the newest kGroups are done.
template <int kGroups>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Waits for the 128 threads of a warp group, and shows each what the others wrote to shared memory before; the number,
// from 1 to 15, is the group's own.
__device__ __forceinline__ void group_sync(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
}

// b as the products below take it: columns of 128 bytes in shared memory, one behind the other, in groups of eight that
// are aligned to 1024 bytes, of which the sixteenths i of column n lie at i ^ n % 8. A product reads 32 bytes of each
// from `first` on.
__device__ __forceinline__ uint64 swizzled_columns(const void* first) {
  constexpr uint64 kSwizzle128 = 1ull << 62;
  constexpr uint64 kGroupsApart = static_cast<uint64>(1024 / 16) << 32;
  return kSwizzle128 | kGroupsApart | 1ull << 16 | (shared_address(first) & 0x3ffff) >> 4;
}

// Likewise of 16-bit elements where memory runs along the columns: rows of 64 columns, of which the sixteenths i of row n
// lie at i ^ n % 8; further columns lie `apart` bytes behind. A product reads 16 rows.
__device__ __forceinline__ uint64 swizzled_rows(const void* first, int apart) {
  return swizzled_columns(first) & ~(0x3fffull << 16) | static_cast<uint64>(apart / 16) << 16;
}

// sum += a b, a of 64 rows, of which each warp has 16, laid out as for multiply_halves; of sum each lane has four
// elements, as there, for every eight columns.
#define CUCONV_SUMS_8(i) \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define CUCONV_SUMS_32(i) CUCONV_SUMS_8(i), CUCONV_SUMS_8(i + 8), CUCONV_SUMS_8(i + 16), CUCONV_SUMS_8(i + 24)
#define CUCONV_GROUP_MULTIPLY(name, kinds, depth, last)                                                             \
  __device__ __forceinline__ void name(float (&sum)[32], const uint32 (&a)[4], uint64 b) {                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64" depth ".f32." kinds " {"                                    \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1" last ";"\
                 : CUCONV_SUMS_32(0)                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
  }                                                                                                                \
  __device__ __forceinline__ void name(float (&sum)[64], const uint32 (&a)[4], uint64 b) {                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128" depth ".f32." kinds " {"                                   \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1" last ";"                                                  \
                 : CUCONV_SUMS_32(0), CUCONV_SUMS_32(32)                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
  }
CUCONV_GROUP_MULTIPLY(group_multiply_halves, "f16.f16", "k16", ", 0")
CUCONV_GROUP_MULTIPLY(group_multiply_bfloat16s, "bf16.bf16", "k16", ", 0")
CUCONV_GROUP_MULTIPLY(group_multiply_tf32s, "tf32.tf32", "k8", "")
// With b as swizzled_rows has it.
CUCONV_GROUP_MULTIPLY(group_multiply_halves_by_rows, "f16.f16", "k16", ", 1")
CUCONV_GROUP_MULTIPLY(group_multiply_bfloat16s_by_rows, "bf16.bf16", "k16", ", 1")
#undef CUCONV_GROUP_MULTIPLY
#undef CUCONV_SUMS_32
#undef CUCONV_SUMS_8

#endif  // sm_90a

}  // namespace ptx

#endif  // CUCONV_HOST
