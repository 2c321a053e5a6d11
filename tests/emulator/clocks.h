// Who knows of whose accesses: vector clocks.
//
// Every thread counts a time of its own, which moves on when it tells others what it has done. A thread knows another's
// access if the latest time that it has heard of from the other is not before the access. Two accesses to the same
// memory race if one of them writes and the later one's thread does not know the earlier one.
#pragma once
#include <map>
#include <memory>
#include <vector>

#include "scheduler.h"

namespace emulator {
namespace checker {

using Time = uint32_t;

// Who accesses memory: a thread, or the asynchronous copies that it has issued. Never used twice in a launch.
class Actor {
 public:
  Actor() = default;
  Actor(const Thread& thread, bool is_copy)
      : bits_(thread.block->index << 11 | (is_copy ? 1u << 10 : 0u) | thread.index) {}
  unsigned block() const { return bits_ >> 11; }
  bool is_copy() const { return bits_ >> 10 & 1; }
  unsigned thread() const { return bits_ & 1023; }
  bool operator==(Actor other) const { return bits_ == other.bits_; }

 private:
  uint32_t bits_ = 0;
};

// Of each actor of one block the latest known time: first the threads', then their copies'. Threads that have met
// share it.
using BlockTimes = std::shared_ptr<const std::vector<Time>>;
using GridTimes = std::map<unsigned, BlockTimes>;  // by the index of the block

class Clocks {
 public:
  void begin_launch(size_t resident_threads);
  void begin_thread(const Thread& thread);

  // The time of what a thread does now, or of copies: of those in the group that it has not closed yet.
  Time now(const Thread& thread, bool is_copy) const {
    return is_copy ? launch_start_ + thread.copies.open_group : clock(thread).now;
  }

  // Whether it was in an earlier launch, which this one knows all about.
  bool is_past(Time time) const { return time < launch_start_; }

  bool knows(const Thread& thread, Actor actor, Time time) const {
    const Clock& mine = clock(thread);
    if (actor.block() != thread.block->index) return knows_of_other_block(mine, actor, time);
    if (actor.thread() == thread.index) return !actor.is_copy() || time < mine.landed;
    return mine.own_block && time_of(actor, *mine.own_block) >= time;
  }

  // Each learns all that any of them knows and has done.
  void meet(Thread* const* threads, size_t count);

  // A time that no later launch may use again, also if nobody ever waits for the copy.
  void copy_issued(const Thread& thread);

  // The groups of this thread's copies before this one have landed.
  void copies_landed(const Thread& thread, int before_group);

  // ---- Atomics and fences
  //
  // An atomic by itself orders nothing. It passes on what its thread had done and known at its latest fence; what it
  // receives becomes known at the thread's next fence.

  void fence(const Thread& thread);
  void atomic(const Thread& thread, const void* address);

 private:
  struct Clock {
    Time now;
    Time landed;  // copies before this time have been waited for
    BlockTimes own_block;
    GridTimes other_blocks;
    GridTimes fenced;
    GridTimes received;
  };

  const Clock& clock(const Thread& thread) const { return clocks_[thread.slot]; }
  Clock& clock(const Thread& thread) { return clocks_[thread.slot]; }
  Time time_of(Actor actor, const std::vector<Time>& times) const {
    return times[actor.thread() + (actor.is_copy() ? block_threads_ : 0)];
  }
  bool knows_of_other_block(const Clock& mine, Actor actor, Time time) const;
  void tick(Clock& clock);
  void add_own(std::vector<Time>& times, const Thread& thread) const;

  std::vector<Clock> clocks_;  // by the thread's slot
  std::map<const void*, GridTimes> atomics_;
  size_t block_threads_ = 0;
  Time launch_start_ = 1;
  Time latest_ = 1;
};

}  // namespace checker
}  // namespace emulator
