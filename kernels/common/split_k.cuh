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

// What this warp has written and knows comes before its arrivals from here on.
DEVICE void publish() {
  __syncwarp();  // the lanes' writes come before lane 0's fence
  if (threadIdx.x % 32 == 0) __threadfence();
}

// Counts this warp in; true for the last of `expected` warps, which then sees what all of them have published.
DEVICE bool arrive_last(unsigned* arrivals, int expected) {
  unsigned last = 0;
  if (threadIdx.x % 32 == 0) {
    last = atomicAdd(arrivals, 1u) == (unsigned)expected - 1;
    if (last) {
      __threadfence();  // reads come after the arrivals of all others
      atomicExch(arrivals, 0u);  // ready for the next launch
    }
  }
  last = __shfl_sync(0xffffffffu, last, 0);
  __syncwarp();
  return last != 0;
}

// take(i, pack): pack i (0 ... packs - 1) of this lane's sum of `count` partial results, `stride` numbers apart, added in this
// order. The way to the level-2 cache is long and there is nothing else to do, so DEPTH packs are on their way at a time, by
// asynchronous copies into `ring`, this warp's own 512 DEPTH bytes of shared memory, of which each lane uses its own part. They
// come in four groups; a group holds neighbours in one pack's sum.
template <int DEPTH, typename Real, typename Take>
DEVICE void add_partials(const Real* partials, int64 stride, int count, int packs, Pack<Real>* ring, Take take) {
  const int width = Pack<Real>::count, GROUPS = 4, SIZE = DEPTH / GROUPS;
  static_assert(SIZE > 0, "a group holds something");
  const Pack<Real>* source = (const Pack<Real>*)partials + threadIdx.x % 32;
  const int64 step = stride / width;
  ring += threadIdx.x % 32;

  int asked_pack = 0, asked_member = 0;
  const auto ask = [&](int group) {
    if (asked_pack < packs) {
      const Pack<Real>* from = source + asked_pack * 32 + asked_member * step;
#pragma unroll
      for (int k = 0; k < SIZE; ++k)
        if (asked_member + k < count) cp_async_16(ring + (group * SIZE + k) * 32, from + k * step, 16);
      asked_member += SIZE;
      if (asked_member >= count) asked_member = 0, ++asked_pack;
    }
    cp_async_commit();  // empty ones too, so that the count is the count of groups
  };
#pragma unroll 1
  for (int group = 0; group < GROUPS; ++group) ask(group);

  int group = 0;
#pragma unroll 1
  for (int pack = 0; pack < packs; ++pack) {
    Pack<Real> total;
#pragma unroll
    for (int j = 0; j < width; ++j) total.at[j] = 0;
#pragma unroll 1
    for (int member = 0; member < count; member += SIZE, group = (group + 1) % GROUPS) {
      cp_async_wait<GROUPS - 1>();
#pragma unroll
      for (int k = 0; k < SIZE; ++k)
        if (member + k < count) {
          const Pack<Real> one = ring[(group * SIZE + k) * 32];
#pragma unroll
          for (int j = 0; j < width; ++j) total.at[j] += one.at[j];
        }
      ask(group);
    }
    take(pack, total);
  }
  cp_async_wait<0>();
}

// A warp's partial result, `packs` times 16 bytes of each lane's sums.
template <typename Real, int Count>
DEVICE void store_partial(const Real (&sums)[Count], int packs, Real* own) {
  const int width = Pack<Real>::count;
  static_assert(Count % width == 0, "lanes store 16 bytes at a time");
#pragma unroll
  for (int i = 0; i < Count / width; ++i) {
    Pack<Real> pack;
#pragma unroll
    for (int j = 0; j < width; ++j) pack.at[j] = sums[i * width + j];
    if (i < packs) ((Pack<Real>*)own)[i * 32 + threadIdx.x % 32] = pack;
  }
}

// What is left to add for the totals: `count` results, `stride` numbers apart.
template <typename Real>
struct LastSum {
  Real* from;
  int64 stride;
  int count;  // 0: another warp adds them
};

// Called by one warp for each chain, once its partial result is published, at partials + chain * stride. Adds the group's if it is the
// last of its group. The last of all is told what is left to add.
//   arrivals  chain_groups + 1 counters of this tile, all 0
//   ring      512 DEPTH bytes of shared memory for this warp
template <int DEPTH, typename Real>
DEVICE LastSum<Real> join_chains(Real* partials, int64 stride, int packs, unsigned* arrivals, Chains chains, int chain,
                                 Pack<Real>* ring) {
  const int group = chain / chains.group_size, first = group * chains.group_size, groups = chain_groups(chains);
  const int members = min(chains.group_size, chains.count - first);
  Real* group_sum = partials + first * stride;  // nobody else reads this group's partial results
  if (!arrive_last(arrivals + group, members)) return {nullptr, 0, 0};
  if (groups == 1) return {group_sum, stride, members};
  add_partials<DEPTH>(group_sum, stride, members, packs, ring, [&](int i, const Pack<Real>& pack) {
    ((Pack<Real>*)group_sum)[i * 32 + threadIdx.x % 32] = pack;
  });
  publish();
  if (!arrive_last(arrivals + groups, groups)) return {nullptr, 0, 0};
  return {partials, chains.group_size * stride, groups};
}

// Adds it up: write(index, total) is called for each of this lane's numbers.
template <int DEPTH, typename Real, typename Write>
DEVICE void write_totals(const LastSum<Real>& last, int packs, Pack<Real>* ring, Write write) {
  const int width = Pack<Real>::count;
  add_partials<DEPTH>(last.from, last.stride, last.count, packs, ring, [&](int i, const Pack<Real>& pack) {
#pragma unroll
    for (int j = 0; j < width; ++j) write(i * width + j, pack.at[j]);
  });
}

// All of it, called by one warp for each chain with that chain's sums, of which the first `used` (a multiple of 16 bytes) count. One
// of these warps ends with the totals.
//   partials  room for `chains.count` partial results of this tile, `stride` numbers apart
template <int DEPTH, typename Real, int Count, typename Write>
DEVICE void reduce_chains(const Real (&sums)[Count], int used, Real* partials, int64 stride, unsigned* arrivals, Chains chains,
                          int chain, Pack<Real>* ring, Write write) {
  const int packs = used / Pack<Real>::count;
  store_partial(sums, packs, partials + chain * stride);
  publish();
  const LastSum<Real> last = join_chains<DEPTH>(partials, stride, packs, arrivals, chains, chain, ring);
  if (last.count) write_totals<DEPTH>(last, packs, ring, write);
}
