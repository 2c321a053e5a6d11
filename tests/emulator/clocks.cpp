#include "clocks.h"

#include <algorithm>

namespace emulator {
namespace checker {

static void join(Times& times, const Times& more) {
  if (times.size() < more.size()) times.resize(more.size());
  for (size_t i = 0; i < more.size(); ++i) times[i] = std::max(times[i], more[i]);
}

static void join(BlockTimes& times, const BlockTimes& more) {
  if (times == more || !more) return;
  if (!times) {
    times = more;
    return;
  }
  // Neighbours that have met before learn the same from the same.
  static BlockTimes latest[3];
  if (times != latest[0] || more != latest[1]) {
    auto joined = std::make_shared<Times>(*times);
    join(*joined, *more);
    latest[0] = times, latest[1] = more, latest[2] = joined;
  }
  times = latest[2];
}

static void join(GridTimes& times, const GridTimes& more) {
  for (const auto& [block, block_times] : more) join(times[block], block_times);
}

void Clocks::begin_launch(size_t resident_threads) {
  launch_start_ = latest_ + 1;
  latest_ = launch_start_;
  block_threads_ = launch->block;
  length_ = 2 * block_threads_;
  clocks_.assign(resident_threads, Clock{});
  atomics_.clear();
}

void Clocks::begin_thread(const Thread& thread) {
  Clock& own = clock(thread);
  own = Clock{};
  own.now = own.copies = own.store_reads = own.store_writes = own.products = launch_start_;
}

// ---- Who knows

// Threads come first, then their cp.async, then all that only kernels for sm_90a have.

size_t Clocks::place_of_products(unsigned warp) const { return 4 * block_threads_ + warp; }

size_t Clocks::place_of_loads(unsigned barrier) const {
  constexpr unsigned most_warps = 32;
  return place_of_products(most_warps) + barrier;
}

size_t Clocks::place(Actor actor) const {
  switch (actor.kind()) {
    case ActorKind::copies:
      return block_threads_ + actor.number();
    case ActorKind::store_reads:
      return 2 * block_threads_ + actor.number();
    case ActorKind::store_writes:
      return 3 * block_threads_ + actor.number();
    case ActorKind::products:
      return place_of_products(4 * actor.number());
    case ActorKind::loads:
      return place_of_loads(actor.number());
    default:
      return actor.number();
  }
}

static bool has_heard(const Times* times, size_t place, Time time) {
  return times && place < times->size() && (*times)[place] >= time;
}

bool Clocks::knows(const Thread& thread, Actor actor, Time time) const {
  const Clock& mine = clock(thread);
  if (actor.block() != thread.block->index) {
    const auto found = mine.other_blocks.find(actor.block());
    return found != mine.other_blocks.end() && has_heard(found->second.get(), place(actor), time);
  }
  const bool is_own = actor.number() == thread.index;
  switch (actor.kind()) {
    case ActorKind::thread:
      if (is_own) return true;
      break;
    case ActorKind::copies:
      if (is_own) return time < mine.copies;
      break;
    case ActorKind::store_reads:
      if (is_own) return time < mine.store_reads;
      break;
    case ActorKind::store_writes:
      if (is_own) return time < mine.store_writes;
      break;
    case ActorKind::products:
      for (unsigned warp = 4 * actor.number(); warp < 4 * actor.number() + 4; ++warp) {
        const bool is_part_of_own = warp == thread.warp && time < mine.products;
        if (!is_part_of_own && !has_heard(mine.own_block.get(), place_of_products(warp), time)) return false;
      }
      return true;
    case ActorKind::loads:
      break;
  }
  return has_heard(mine.own_block.get(), place(actor), time);
}

void Clocks::tick(Clock& clock) {
  ++clock.now;
  latest_ = std::max(latest_, clock.now);
}

// What the thread itself has done, which its clock keeps apart from what it shares with others.
void Clocks::add_own(Times& times, const Thread& thread) const {
  const Clock& own = clock(thread);
  if (times.size() < length_) times.resize(length_);
  times[thread.index] = own.now;
  times[block_threads_ + thread.index] = own.copies - 1;
  if (length_ == 2 * block_threads_) return;
  times[2 * block_threads_ + thread.index] = own.store_reads - 1;
  times[3 * block_threads_ + thread.index] = own.store_writes - 1;
  Time& products = times[place_of_products(thread.warp)];
  products = std::max(products, own.products - 1);
}

void Clocks::meet(Thread* const* threads, size_t count) {
  auto own_block = std::make_shared<Times>(length_);
  GridTimes other_blocks;
  const Times* latest_joined = nullptr;
  for (size_t i = 0; i < count; ++i) {
    const Clock& theirs = clock(*threads[i]);
    // Neighbours have mostly met before and share what they know.
    if (theirs.own_block && theirs.own_block.get() != latest_joined) join(*own_block, *theirs.own_block);
    latest_joined = theirs.own_block.get();
    join(other_blocks, theirs.other_blocks);
  }
  for (size_t i = 0; i < count; ++i) add_own(*own_block, *threads[i]);
  for (size_t i = 0; i < count; ++i) {
    Clock& theirs = clock(*threads[i]);
    theirs.own_block = own_block;
    theirs.other_blocks = other_blocks;
    tick(theirs);
  }
}

// ---- Channels

void Clocks::pass_on(const Thread& thread, Channel& channel) {
  Clock& own = clock(thread);
  Times& times = channel.gathered[thread.block->index];
  if (own.own_block) join(times, *own.own_block);
  add_own(times, thread);
  for (const auto& [block, block_times] : own.other_blocks)
    if (block_times) join(channel.gathered[block], *block_times);
  tick(own);
}

void Clocks::release(Channel& channel) {
  for (const auto& [block, times] : channel.gathered) channel.released[block] = std::make_shared<Times>(times);
}

void Clocks::receive(const Thread& thread, const Channel& channel) {
  Clock& own = clock(thread);
  for (const auto& [block, times] : channel.released)
    join(block == thread.block->index ? own.own_block : own.other_blocks[block], times);
}

void Clocks::phase_ended(const Block& block, unsigned barrier, int phase, Channel& channel) {
  Times& times = channel.gathered[block.index];
  if (times.size() < length_) times.resize(length_);
  times[place_of_loads(barrier)] = time_of_group(phase);
  release(channel);
}

// ---- Asynchronous operations

void Clocks::issued(Actor actor, Time time) {
  latest_ = std::max(latest_, time);
  if (actor.kind() == ActorKind::copies) return;
  // From now on there is room for all that belongs to threads and warps, and for this.
  length_ = std::max({length_, place(actor) + 1, place_of_loads(0)});
}

void Clocks::ended(const Thread& thread, ActorKind kind, int before_group) {
  if (before_group <= 0) return;
  Clock& own = clock(thread);
  Time& mine = kind == ActorKind::copies         ? own.copies
               : kind == ActorKind::store_reads  ? own.store_reads
               : kind == ActorKind::store_writes ? own.store_writes
                                                 : own.products;
  mine = std::max(mine, time_of_group(before_group));
  latest_ = std::max(latest_, mine);
}

// ---- Atomics and fences

void Clocks::fence(const Thread& thread) {
  Clock& own = clock(thread);
  for (const auto& [block, times] : own.received)
    join(block == thread.block->index ? own.own_block : own.other_blocks[block], times);
  own.received.clear();
  auto own_block = own.own_block ? std::make_shared<Times>(*own.own_block) : std::make_shared<Times>();
  add_own(*own_block, thread);
  own.fenced = own.other_blocks;
  own.fenced[thread.block->index] = own_block;
  tick(own);
}

void Clocks::atomic(const Thread& thread, const void* address) {
  Clock& own = clock(thread);
  GridTimes& passed_on = atomics_[address];
  join(own.received, passed_on);
  join(passed_on, own.fenced);
}

// ---- Fences between proxies

void Clocks::fence_proxies(const Thread& thread, Fence which) {
  Clock& own = clock(thread);
  own.proxy_fences[(int)which].push_back(own.now);
  tick(own);
}

bool Clocks::knows_fence(const Thread& thread, const Thread& writer, Time time, Fence which) const {
  const std::vector<Time>& fences = clock(writer).proxy_fences[(int)which];
  const auto first = std::lower_bound(fences.begin(), fences.end(), time);
  // The fence stands before what the writer did at the next time.
  return first != fences.end() && knows(thread, Actor(writer), *first + 1);
}

}  // namespace checker
}  // namespace emulator
