// Sums over everything that a launch reads, e.g. losses over a batch or squares over a gradient; and the largest
// likewise.
//
// Sums are in double, in an order that depends on the number of blocks alone. Launch plans take that number from the
// shape.
#pragma once
#include "types.cuh"

// Calls body(i) for this block's part of the numbers of a vector that count. A block has 256 threads, which take
// neighbouring numbers.
//   spans  n_spans pairs: the first number that counts, and the one after the last; null: all n count
template <typename Body>
DEVICE void each_number(int64 n, const int64* spans, int n_spans, Body body) {
  const int64 first = (int64)blockIdx.x * 256 + threadIdx.x;
  if (!spans) {
    for (int64 i = first; i < n; i += (int64)gridDim.x * 256) body(i);
    return;
  }
#pragma unroll 1
  for (const int64* span = spans; span != spans + 2 * n_spans; span += 2)
#pragma unroll 1
    for (int64 i = span[0] + first; i < span[1]; i += (int64)gridDim.x * 256) body(i);
}

struct Add {
  template <typename Real>
  DEVICE Real operator()(Real a, Real b) const { return a + b; }
};

struct Larger {
  template <typename Real>
  DEVICE Real operator()(Real a, Real b) const { return b > a || b != b ? b : a; }  // NaN wins
};

// Combines the values of a warp's lanes. Every lane gets the result.
template <typename Real, typename Combine>
DEVICE Real warp_combined(Real value, Combine combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

template <typename Real>
DEVICE Real warp_sum(Real value) { return warp_combined(value, Add()); }

template <typename Real>
DEVICE Real warp_max(Real value) { return warp_combined(value, Larger()); }

// Combines `values` over a block of 256 threads, beginning with 0. Thread 0 gets the results. `shared` holds 8 N
// doubles.
template <int N, typename Combine>
DEVICE void block_combine(double (&values)[N], double* shared, Combine combine) {
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = warp_combined(values[n], combine);
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) shared[n * 8 + threadIdx.x / 32] = values[n];
  __syncthreads();  // every warp's result is in shared memory
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = 0;
      for (int warp = 0; warp < 8; ++warp) values[n] = combine(values[n], shared[n * 8 + warp]);
    }
  __syncthreads();  // shared memory is free again
}

// Combines `values` over all blocks of the launch. True in thread 0 of the last block to arrive, which gets the
// results.
//   partials  N numbers for each block; arrivals: one counter, 0
template <int N, typename Combine>
DEVICE bool grid_combine(double (&values)[N], double* shared, double* partials, unsigned* arrivals, Combine combine) {
  block_combine(values, shared, combine);
  if (gridDim.x == 1) return threadIdx.x == 0;
  int* last = (int*)shared;
  if (threadIdx.x == 0) {
    for (int n = 0; n < N; ++n) partials[blockIdx.x * N + n] = values[n];
    __threadfence();  // the partial results come before the arrival
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
    for (int n = 0; n < N; ++n) values[n] = combine(values[n], load_cg(partials + block * N + n));
  block_combine(values, shared, combine);
  return threadIdx.x == 0;
}

template <int N>
DEVICE bool grid_sum(double (&values)[N], double* shared, double* partials, unsigned* arrivals) {
  return grid_combine(values, shared, partials, arrivals, Add());
}

// Of numbers that are not negative; NaN wins.
DEVICE bool grid_max(double (&value)[1], double* shared, double* partials, unsigned* arrivals) {
  return grid_combine(value, shared, partials, arrivals, Larger());
}
