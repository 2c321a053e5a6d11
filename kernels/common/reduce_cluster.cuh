// Adds the sums of a cluster's blocks, through each other's shared memory and in order of their rank. A cluster of one
// is a block by itself, compiled without a cluster.
//
//     each block   writes its sums, at the same place in shared memory
//                  cluster_sync: all sums are there
//     each block   adds its part of everyone's: sum_of_cluster
//                  cluster_sync: the memory may be used for something else, and blocks may end
#pragma once
#include "ptx_sm90.cuh"
#include "split_k.cuh"

const int CLUSTER_BARRIER = 15;  // what a block alone uses

#if CLUSTER > 1
#define CLUSTER_OF(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define CLUSTER_OF(blocks)
#endif

DEVICE float4 operator+(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <int Blocks>
DEVICE int rank_in_cluster() { return Blocks > 1 ? cluster_rank() : 0; }

// All threads of the cluster, of `threads` a block, wait for each other.
template <int Blocks>
DEVICE void cluster_sync(int threads) {
  if (Blocks > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    bar_sync(CLUSTER_BARRIER, threads);
  }
}

// The sum, over the cluster's blocks, of what lies at this address of their shared memory.
template <int Blocks>
DEVICE float4 sum_of_cluster(const float4* address) {
  if (Blocks == 1) return *address;
  float4 sum = ld_shared_cluster(mapa(shared_address(address), 0));
#pragma unroll
  for (int rank = 1; rank < Blocks; ++rank) sum = sum + ld_shared_cluster(mapa(shared_address(address), rank));
  return sum;
}
