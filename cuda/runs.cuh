// Runs: contiguous pieces of a tensor that a block brings to shared memory and takes back by the copy engine (sm_90).
//
// The engine moves multiples of 16 bytes between 16-byte boundaries, and a run starts and ends at any element. So its
// copy in shared memory lies as far from a boundary as the run itself does: everything between the boundaries goes in
// one bulk copy, and the few elements before the first and behind the last one by one, by the lanes of one warp.
#pragma once
#include "ptx.cuh"

constexpr int kBulkAlignment = 16;
constexpr int kWarp = 32;

template <class T>
struct MutableOf {
  using type = T;
};
template <class T>
struct MutableOf<const T> {
  using type = T;
};

// Where the copy of a run that starts at `global` starts in a shared buffer.
template <class T>
__device__ __forceinline__ typename MutableOf<T>::type* run_in_shared(T* global, unsigned char* buffer) {
  return reinterpret_cast<typename MutableOf<T>::type*>(buffer + reinterpret_cast<uint64>(global) % kBulkAlignment);
}

// A run at `global`, and its copy: in a shared buffer, which needs kBulkAlignment bytes more than the run, or at a
// place that lies as far from a boundary as the run.
template <class T>
struct Run {
  static constexpr int kPerVector = kBulkAlignment / static_cast<int>(sizeof(T));
  // One lane for each element before or behind the bulk copy: two halves of a warp, of which lane 0 has none.
  static_assert(2 * kPerVector <= kWarp);

  using Element = typename MutableOf<T>::type;

  T* global;
  Element* shared;
  int count;
  int first;   // where the bulk copy begins, counted from the run's start: before it, if that is negative
  int middle;  // elements of the bulk copy

  __device__ __forceinline__ Run(T* start, int elements, unsigned char* buffer)
      : Run(start, elements, run_in_shared(start, buffer)) {}

  __device__ __forceinline__ Run(T* start, int elements, Element* copy)
      : global(start), shared(copy), count(elements) {
    const int offset = static_cast<int>(reinterpret_cast<uint64>(start) % kBulkAlignment);
    first = min(count, (kBulkAlignment - offset) % kBulkAlignment / static_cast<int>(sizeof(T)));
    middle = (count - first) / kPerVector * kPerVector;
  }

  // The same with what lies between the run and the boundaries around it, where that belongs to the array from `begin`
  // to `end`.
  __device__ __forceinline__ Run(T* start, int elements, Element* copy, const T* begin, const T* end)
      : Run(start, elements, copy) {
    const int before = static_cast<int>(reinterpret_cast<uint64>(start) % kBulkAlignment / sizeof(T));
    if (start - begin >= before) {
      first = -before;
      middle = (count - first) / kPerVector * kPerVector;
    }
    if (first + middle < count && end - start >= first + middle + kPerVector) middle += kPerVector;
  }

  // The element before the bulk copy (lanes 1 to 15) or behind it (16 to 31) that is this lane's to copy; `count` where
  // none is.
  __device__ __forceinline__ int single(int lane) const {
    if (lane < kWarp / 2) return 0 < lane && lane <= first ? lane - 1 : count;
    return min(count, first + middle + lane - kWarp / 2);
  }
};

// Starts bringing a run; called by all lanes of one warp. The barrier, made for kWarp arrivals, completes a phase when
// the whole run is in shared memory.
template <class T>
__device__ __forceinline__ void load_run(const Run<T>& run, uint64* barrier, int lane) {
  // Lane 0, which has no single element to wait for, starts the bulk copy at once.
  if (lane == 0) {
    const uint32 bytes = run.middle * static_cast<uint32>(sizeof(T));
    ptx::barrier_arrive_expect(barrier, bytes);
    if (bytes > 0) ptx::bulk_load(run.shared + run.first, run.global + run.first, bytes, barrier);
  } else {
    const int single = run.single(lane);
    if (single < run.count) run.shared[single] = run.global[single];
    ptx::barrier_arrive(barrier);
  }
}

// The same by one thread alone, of an array from `begin` to `end`; the barrier is made for one arrival a run.
template <class T>
__device__ __forceinline__ void load_run_alone(const T* start, int count, T* copy, const T* begin, const T* end,
                                               uint64* barrier) {
  constexpr int kPerVector = Run<const T>::kPerVector;
  constexpr uint32 kSize = sizeof(T);
  const int before = static_cast<int>(reinterpret_cast<uint64>(start) % kBulkAlignment / kSize);
  const int whole = (before + count + kPerVector - 1) / kPerVector * kPerVector;
  if (start - begin >= before && end - start >= whole - before) {
    ptx::barrier_arrive_expect(barrier, whole * kSize);
    if (whole > 0) ptx::bulk_load(copy - before, start - before, whole * kSize, barrier);
    return;
  }
  const Run<const T> run(start, count, copy);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (i == run.first) i += run.middle;
    if (i < count) copy[i] = start[i];
  }
  ptx::barrier_arrive_expect(barrier, run.middle * kSize);
  if (run.middle > 0) ptx::bulk_load(copy + run.first, start + run.first, run.middle * kSize, barrier);
}

// Starts taking a run back; called by all lanes of one warp, after every thread that wrote to it has passed
// ptx::fence_shared_for_bulk and then a block barrier. Lane 0 must wait by ptx::bulk_store_wait_read before the shared
// copy is overwritten or the block ends.
template <class T>
__device__ __forceinline__ void store_run(const Run<T>& run, int lane) {
  const int single = run.single(lane);
  if (single < run.count) run.global[single] = run.shared[single];
  if (lane == 0) {
    const uint32 bytes = run.middle * static_cast<uint32>(sizeof(T));
    if (bytes > 0) ptx::bulk_store(run.global + run.first, run.shared + run.first, bytes);
    ptx::bulk_store_commit();
  }
}
