#include "clocks.h"

#include <algorithm>

namespace emulator {
namespace checker {

static void join(std::vector<Time>& times, const std::vector<Time>& more) {
  for (size_t i = 0; i < times.size(); ++i) times[i] = std::max(times[i], more[i]);
}

static void join(BlockTimes& times, const BlockTimes& more) {
  if (times == more || !more) return;
  if (!times) {
    times = more;
    return;
  }
  auto joined = std::make_shared<std::vector<Time>>(*times);
  join(*joined, *more);
  times = joined;
}

static void join(GridTimes& times, const GridTimes& more) {
  for (const auto& [block, block_times] : more) join(times[block], block_times);
}

void Clocks::begin_launch(size_t resident_threads) {
  launch_start_ = latest_ + 1;
  latest_ = launch_start_;
  block_threads_ = launch->block;
  clocks_.assign(resident_threads, Clock{});
  atomics_.clear();
}

void Clocks::begin_thread(const Thread& thread) {
  clock(thread) = Clock{};
  clock(thread).now = clock(thread).landed = launch_start_;
}

bool Clocks::knows_of_other_block(const Clock& mine, Actor actor, Time time) const {
  const auto found = mine.other_blocks.find(actor.block());
  return found != mine.other_blocks.end() && found->second && time_of(actor, *found->second) >= time;
}

void Clocks::tick(Clock& clock) {
  ++clock.now;
  latest_ = std::max(latest_, clock.now);
}

// What the thread itself has done, which its clock keeps apart from what it shares with others.
void Clocks::add_own(std::vector<Time>& times, const Thread& thread) const {
  const Clock& own = clock(thread);
  times[thread.index] = own.now;
  times[block_threads_ + thread.index] = own.landed - 1;
}

void Clocks::meet(Thread* const* threads, size_t count) {
  auto own_block = std::make_shared<std::vector<Time>>(2 * block_threads_);
  GridTimes other_blocks;
  const std::vector<Time>* latest_joined = nullptr;
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

void Clocks::copy_issued(const Thread& thread) { latest_ = std::max(latest_, now(thread, true)); }

void Clocks::copies_landed(const Thread& thread, int before_group) {
  Clock& own = clock(thread);
  if (before_group > 0) own.landed = std::max(own.landed, launch_start_ + before_group);
  latest_ = std::max(latest_, own.landed);
}

void Clocks::fence(const Thread& thread) {
  Clock& own = clock(thread);
  for (const auto& [block, times] : own.received)
    join(block == thread.block->index ? own.own_block : own.other_blocks[block], times);
  own.received.clear();
  auto own_block = own.own_block ? std::make_shared<std::vector<Time>>(*own.own_block)
                                 : std::make_shared<std::vector<Time>>(2 * block_threads_);
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

}  // namespace checker
}  // namespace emulator
