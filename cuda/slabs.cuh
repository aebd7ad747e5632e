// Slabs of the batch, each a block's, along x of the grid: how their sums are added.
//
// A few slabs are a cluster: the last one adds, in order, what the others have in their shared memory, and no other
// launch is needed. CUCONV_CLUSTER is how many, or 1.
#pragma once
#include "ptx.cuh"

constexpr int kCluster = CUCONV_CLUSTER;

#if CUCONV_CLUSTER > 1
#define CUCONV_SLABS CUCONV_BLOCKS_OF_CLUSTER(CUCONV_CLUSTER)
#else
#define CUCONV_SLABS
#endif

#if defined(CUCONV_HOST) || __CUDA_ARCH__ >= 900

// Called by all threads of all blocks of the cluster: calls store(i, sum) for each of `count` sums in shared memory,
// which every block has at the same place.
template <int kThreads, class Sum, class Store>
__device__ __forceinline__ void add_of_cluster(const Sum* sums, int count, int thread, const Store& store) {
  ptx::cluster_meet();
  if (static_cast<int>(blockIdx.x) == kCluster - 1) {
    for (int i = thread; i < count; i += kThreads) {
      Sum total = 0;
#pragma unroll
      for (int slab = 0; slab < kCluster; ++slab) total += ptx::load_of_cluster(sums + i, slab);
      store(i, total);
    }
  }
  // A block's shared memory is there as long as it is.
  ptx::cluster_meet();
}

#endif
