// Sums over partial results of many blocks, in an order that depends on their number alone, without float atomics and
// without a block that waits for another.
//
// A long sum over the batch is cut into `chains`, one partial result each. Chains form groups of about the root of their
// number. Whoever writes its partial result last in a group adds the group's, in order of their index; whoever finishes
// the last group adds the groups' sums, in order. Both read what the others wrote through the level-2 cache.
//
//     chains 0 1 2 | 3 4 5 | 6 7        8 chains, groups of 3
//            \ | /   \ | /   \ /        first level: the last of each group to arrive
//              s0      s1     s2        second level: the last group to arrive
//                \     |     /
//                    total
//
// A warp is the unit: its lanes hold Count numbers each, and a partial result is stored as the lanes hold it, 16 bytes a
// lane at a time, so every access is one contiguous row of 512 bytes.
#pragma once
#include "types.cuh"

struct Chains {
  int count;       // how many partial results there are
  int group_size;  // ceil(sqrt(count))
};

DEVICE int chain_groups(Chains chains) { return ceil_div(chains.count, chains.group_size); }

// Counts this warp in; true for the last of `expected` warps, which then sees what all of them wrote before.
DEVICE bool arrive_last(unsigned* arrivals, int expected) {
  __syncwarp();  // the lanes' writes come before lane 0's fence
  unsigned last = 0;
  if (threadIdx.x % 32 == 0) {
    __threadfence();  // and those before its arrival
    last = atomicAdd(arrivals, 1u) == (unsigned)expected - 1;
    __threadfence();
    if (last) atomicExch(arrivals, 0u);  // ready for the next launch
  }
  last = __shfl_sync(0xffffffffu, last, 0);
  __syncwarp();
  return last != 0;
}

template <typename Real, int Count>
DEVICE void store_partial(Real* partial, const Real (&sums)[Count]) {
  const int width = Pack<Real>::count, lane = threadIdx.x % 32;
  static_assert(Count % width == 0, "lanes store 16 bytes at a time");
#pragma unroll
  for (int i = 0; i < Count / width; ++i) {
    Pack<Real> pack;
#pragma unroll
    for (int j = 0; j < width; ++j) pack.at[j] = sums[i * width + j];
    ((Pack<Real>*)partial)[i * 32 + lane] = pack;
  }
}

template <typename Real, int Count>
DEVICE void load_partial(const Real* partial, Real (&sums)[Count], bool add) {
  const int width = Pack<Real>::count, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Count / width; ++i) {
    const Pack<Real> pack = load_cg_pack((const Pack<Real>*)partial + i * 32 + lane);
#pragma unroll
    for (int j = 0; j < width; ++j) sums[i * width + j] = (add ? sums[i * width + j] : Real(0)) + pack.at[j];
  }
}

// Called by one warp for each chain with that chain's sums. True for the one warp that ends with the total in `sums`.
//   partials  room for `chains.count` partial results of this tile, `stride` numbers apart
//   arrivals  chain_groups + 1 counters of this tile, all 0
template <typename Real, int Count>
DEVICE bool reduce_chains(Real (&sums)[Count], Real* partials, int64 stride, unsigned* arrivals, Chains chains, int chain) {
  if (chains.count == 1) return true;
  const int group = chain / chains.group_size, first = group * chains.group_size, groups = chain_groups(chains);
  const int members = min(chains.group_size, chains.count - first);

  store_partial(partials + chain * stride, sums);
  if (!arrive_last(arrivals + group, members)) return false;
  for (int i = 0; i < members; ++i) load_partial(partials + (first + i) * stride, sums, i > 0);
  if (groups == 1) return true;

  store_partial(partials + first * stride, sums);  // nobody else reads this group's partial results
  if (!arrive_last(arrivals + groups, groups)) return false;
  for (int i = 0; i < groups; ++i) load_partial(partials + i * chains.group_size * stride, sums, i > 0);
  return true;
}
