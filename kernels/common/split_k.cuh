// Split-K: adds partial results of many blocks in an order that depends on their number alone. No float atomics, and no
// block waits for another.
//
// A sum over the batch (the K of dW) is cut into splits, with one partial result each. Splits form groups of about the
// root of their number. The last warp to write its partial result in a group adds the group's, in order of their index.
// The last warp to finish a group adds the groups' sums, in order. Both read what the others wrote through the level-2
// cache.
//
//     splits 0 1 2 | 3 4 5 | 6 7        8 splits, groups of 3
//            \ | /   \ | /   \ /        first level: the last of each group to arrive
//              s0      s1     s2        second level: the last group to arrive
//                \     |     /
//                    total
//
// A warp is the unit: its lanes hold Count numbers each, and a partial result is stored as the lanes hold it, 16 bytes
// a lane at a time, so that every access is one contiguous row of 512 bytes.
#pragma once
#include "types.cuh"

struct Splits {
  int count;       // how many partial results there are
  int group_size;  // ceil(sqrt(count))
};

DEVICE int split_groups(Splits splits) { return ceil_div(splits.count, splits.group_size); }

// Orders what this warp has written before its arrivals from here on.
DEVICE void publish() {
  __syncwarp();  // the lanes' writes come before lane 0's fence
  if (threadIdx.x % 32 == 0) __threadfence();
}

// Counts this warp in. True for the last of `expected` warps, which then sees what all of them have published.
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

// Adds `count` partial results, `stride` numbers apart, in this order, and calls take(i, pack) with pack i (0 ... packs
// - 1) of this lane's sum. The way to the level-2 cache is long and there is nothing else to do, so PREFETCH packs are
// on their way at a time: asynchronous copies into `buffer`, a circular buffer of 512 PREFETCH bytes of shared memory
// that is this warp's own. Each lane reads only what it copied, so no barrier is needed. Copies form four groups; a
// group holds neighbours in one pack's sum.
template <int PREFETCH, typename Real, typename Take>
DEVICE void add_partials(const Real* partials, int64 stride, int count, int packs, Pack<Real>* buffer, Take take) {
  const int width = Pack<Real>::count, GROUPS = 4, SIZE = PREFETCH / GROUPS;
  static_assert(SIZE > 0, "a group holds something");
  const Pack<Real>* source = (const Pack<Real>*)partials + threadIdx.x % 32;
  const int64 step = stride / width;
  buffer += threadIdx.x % 32;

  int next_pack = 0, next_member = 0;
  const auto request = [&](int group) {
    if (next_pack < packs) {
      const Pack<Real>* from = source + next_pack * 32 + next_member * step;
#pragma unroll
      for (int k = 0; k < SIZE; ++k)
        if (next_member + k < count) cp_async_16(buffer + (group * SIZE + k) * 32, from + k * step, 16);
      next_member += SIZE;
      if (next_member >= count) next_member = 0, ++next_pack;
    }
    cp_async_commit();  // empty ones too, so that the count is the count of groups
  };
#pragma unroll 1
  for (int group = 0; group < GROUPS; ++group) request(group);

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
          const Pack<Real> one = buffer[(group * SIZE + k) * 32];
#pragma unroll
          for (int j = 0; j < width; ++j) total.at[j] += one.at[j];
        }
      request(group);
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

// The partial results that are left to add for the totals: `count` of them, `stride` numbers apart.
template <typename Real>
struct LastSum {
  Real* from;
  int64 stride;
  int count;  // 0: another warp adds them
};

// Joins one split: called by one warp for each, once its partial result is published at partials + split * stride. Adds
// the group's partial results if it is the last of its group. Tells the last of all what is left to add.
//   arrivals  split_groups + 1 counters of this tile, all 0
//   buffer    512 PREFETCH bytes of shared memory for this warp
template <int PREFETCH, typename Real>
DEVICE LastSum<Real> join_splits(Real* partials, int64 stride, int packs, unsigned* arrivals, Splits splits, int split,
                                 Pack<Real>* buffer) {
  const int group = split / splits.group_size, first = group * splits.group_size, groups = split_groups(splits);
  const int members = min(splits.group_size, splits.count - first);
  Real* group_sum = partials + first * stride;  // nobody else reads this group's partial results
  if (!arrive_last(arrivals + group, members)) return {nullptr, 0, 0};
  if (groups == 1) return {group_sum, stride, members};
  add_partials<PREFETCH>(group_sum, stride, members, packs, buffer, [&](int i, const Pack<Real>& pack) {
    ((Pack<Real>*)group_sum)[i * 32 + threadIdx.x % 32] = pack;
  });
  publish();
  if (!arrive_last(arrivals + groups, groups)) return {nullptr, 0, 0};
  return {partials, splits.group_size * stride, groups};
}

// Adds what is left: calls write(index, total) for each of this lane's numbers.
template <int PREFETCH, typename Real, typename Write>
DEVICE void write_totals(const LastSum<Real>& last, int packs, Pack<Real>* buffer, Write write) {
  const int width = Pack<Real>::count;
  add_partials<PREFETCH>(last.from, last.stride, last.count, packs, buffer, [&](int i, const Pack<Real>& pack) {
#pragma unroll
    for (int j = 0; j < width; ++j) write(i * width + j, pack.at[j]);
  });
}

// All of the above: called by one warp for each split with that split's sums, of which the first `used` (a multiple of
// 16 bytes) are added. One of these warps ends with the totals.
//   partials  room for `splits.count` partial results of this tile, `stride` numbers apart
template <int PREFETCH, typename Real, int Count, typename Write>
DEVICE void reduce_splits(const Real (&sums)[Count], int used, Real* partials, int64 stride, unsigned* arrivals,
                          Splits splits, int split, Pack<Real>* buffer, Write write) {
  const int packs = used / Pack<Real>::count;
  store_partial(sums, packs, partials + split * stride);
  publish();
  const LastSum<Real> last = join_splits<PREFETCH>(partials, stride, packs, arrivals, splits, split, buffer);
  if (last.count) write_totals<PREFETCH>(last, packs, buffer, write);
}

// Adds `count` partial results, `stride` numbers apart, in this order, into registers that have room for one. Up to eight
// loads of a lane are on their way together.
template <typename Real, int Count>
DEVICE void add_in_registers(Real (&sums)[Count], const Real* partials, int64 stride, int count) {
  const int width = Pack<Real>::count, packs = Count / width, AT_ONCE = packs < 8 ? packs : 8;
  static_assert(packs % AT_ONCE == 0, "as many loads each time");
#pragma unroll
  for (int first = 0; first < packs; first += AT_ONCE) {
#pragma unroll
    for (int i = 0; i < AT_ONCE * width; ++i) sums[first * width + i] = 0;
    const Pack<Real>* from = (const Pack<Real>*)partials + first * 32 + threadIdx.x % 32;
#pragma unroll 1
    for (int member = 0; member < count; ++member, from += stride / width) {
      Pack<Real> packs_of_member[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) packs_of_member[i] = from[i * 32];
#pragma unroll
      for (int i = 0; i < AT_ONCE * width; ++i) sums[first * width + i] += packs_of_member[i / width].at[i % width];
    }
  }
}

// As reduce_splits, without a circular buffer: for warps with many numbers a lane, or no shared memory left. True for the
// warp that ends with the totals, in its `sums`. A single split needs no partial results.
template <typename Real, int Count>
DEVICE bool reduce_in_registers(Real (&sums)[Count], Real* partials, int64 stride, unsigned* arrivals, Splits splits,
                                int split) {
  if (splits.count == 1) return true;
  const int packs = Count / Pack<Real>::count, group = split / splits.group_size, groups = split_groups(splits);
  const int first = group * splits.group_size, members = min(splits.group_size, splits.count - first);
  Real* group_sum = partials + first * stride;  // nobody else reads this group's partial results
  store_partial(sums, packs, partials + split * stride);
  publish();
  if (!arrive_last(arrivals + group, members)) return false;
  add_in_registers(sums, group_sum, stride, members);
  if (groups == 1) return true;
  store_partial(sums, packs, group_sum);
  publish();
  if (!arrive_last(arrivals + groups, groups)) return false;
  add_in_registers(sums, partials, splits.group_size * stride, groups);
  return true;
}
