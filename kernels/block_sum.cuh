// A few sums over everything that a launch reads: losses over a batch, squares over a gradient. In double, in an order that
// depends on the number of blocks alone; whoever launches takes that number from the shape.
#pragma once
#include "types.cuh"

// `values` summed over the lanes of a warp, in every lane.
template <typename Real>
DEVICE Real warp_sum(Real value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <typename Real>
DEVICE Real warp_max(Real value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Real other = __shfl_xor_sync(0xffffffffu, value, step);
    value = other > value || other != other ? other : value;  // NaN wins
  }
  return value;
}

// `values` summed over a block of 256 threads, in thread 0. `shared` holds 8 N doubles.
template <int N>
DEVICE void block_sum(double (&values)[N], double* shared) {
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = warp_sum(values[n]);
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) shared[n * 8 + threadIdx.x / 32] = values[n];
  __syncthreads();  // every warp's sum is there
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = 0;
      for (int warp = 0; warp < 8; ++warp) values[n] += shared[n * 8 + warp];
    }
  __syncthreads();  // shared memory is free again
}

// `values` summed over all blocks of the launch. True in thread 0 of the last block to arrive, which has the sums.
//   partials  N numbers for each block; arrivals: one counter, 0
template <int N>
DEVICE bool grid_sum(double (&values)[N], double* shared, double* partials, unsigned* arrivals) {
  block_sum(values, shared);
  if (gridDim.x == 1) return threadIdx.x == 0;
  int* last = (int*)shared;
  if (threadIdx.x == 0) {
    for (int n = 0; n < N; ++n) partials[blockIdx.x * N + n] = values[n];
    __threadfence();  // the partial sums come before the arrival
    *last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
    __threadfence();
    if (*last) atomicExch(arrivals, 0u);  // ready for the next launch
  }
  __syncthreads();  // everyone sees whether this block is the last, and if so what the others wrote
  const bool here = *last;
  __syncthreads();  // `last` is read; its place is used again
  if (!here) return false;
  for (int n = 0; n < N; ++n) values[n] = 0;
  for (int block = threadIdx.x; block < gridDim.x; block += 256)
    for (int n = 0; n < N; ++n) values[n] += load_cg(partials + block * N + n);
  block_sum(values, shared);
  return threadIdx.x == 0;
}
