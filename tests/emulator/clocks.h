// Who knows of whose accesses: vector clocks.
//
// Every thread counts a time of its own, which moves on when it tells others what it has done. A thread knows another's
// access if the latest time that it has heard of from the other is not before the access. Two accesses to the same
// memory race if one of them writes and the later one's thread does not know the earlier one.
//
// Asynchronous operations are actors of their own, whose time is the number of their group or phase. Others know of them
// through whoever has waited for that group or phase.
#pragma once
#include <map>
#include <memory>
#include <vector>

#include "scheduler.h"

namespace emulator {
namespace checker {

using Time = uint32_t;

enum class ActorKind : unsigned {
  thread,
  copies,        // cp.async, of a thread
  loads,         // of boxes, for a barrier in shared memory; and the end of its phases
  store_reads,   // of shared memory, of a thread
  store_writes,  // of global memory, of a thread
  products,      // of a warpgroup; each warp waits for its own part
};

// Who accesses memory. Never used twice in a launch.
class Actor {
 public:
  static constexpr unsigned most_blocks = 1u << 18;

  Actor() = default;
  Actor(const Block& block, ActorKind kind, unsigned number)
      : bits_(block.index << 14 | (unsigned)kind << 11 | number) {}
  explicit Actor(const Thread& thread) : Actor(*thread.block, ActorKind::thread, thread.index) {}
  unsigned block() const { return bits_ >> 14; }
  ActorKind kind() const { return (ActorKind)(bits_ >> 11 & 7); }
  unsigned number() const { return bits_ & 2047; }  // of the thread, barrier or warpgroup
  bool operator==(Actor other) const { return bits_ == other.bits_; }

 private:
  uint32_t bits_ = 0;
};

// Of each actor of one block the latest known time; see Clocks::place. Threads that have met share it.
using Times = std::vector<Time>;
using BlockTimes = std::shared_ptr<const Times>;
using GridTimes = std::map<unsigned, BlockTimes>;  // by the index of the block

// What arrivals pass on to those who wait: at a barrier in shared memory, of some warps, or of a cluster.
struct Channel {
  std::map<unsigned, Times> gathered;  // by the index of the block
  GridTimes released;
};

class Clocks {
 public:
  void begin_launch(size_t resident_threads);
  void begin_thread(const Thread& thread);

  Time now(const Thread& thread) const { return clock(thread).now; }

  // The time of asynchronous operations of a group or phase.
  Time time_of_group(int group) const { return launch_start_ + group; }

  // Whether it was in an earlier launch, which this one knows all about.
  bool is_past(Time time) const { return time < launch_start_; }

  bool knows(const Thread& thread, Actor actor, Time time) const;

  // Each learns all that any of them knows and has done.
  void meet(Thread* const* threads, size_t count);

  // ---- Channels

  void pass_on(const Thread& thread, Channel& channel);
  void release(Channel& channel);
  void receive(const Thread& thread, const Channel& channel);
  void phase_ended(const Block& block, unsigned barrier, int phase, Channel& channel);

  // ---- Asynchronous operations

  // A time that no later launch may use again, also if nobody ever waits for the operation.
  void issued(Actor actor, Time time);

  // This thread's groups of operations of a kind before this one are over.
  void ended(const Thread& thread, ActorKind kind, int before_group);

  // ---- Atomics and fences
  //
  // An atomic by itself orders nothing. It passes on what its thread had done and known at its latest fence; what it
  // receives becomes known at the thread's next fence.

  void fence(const Thread& thread);
  void atomic(const Thread& thread, const void* address);

  // ---- Fences between proxies: what a thread wrote before may be accessed asynchronously

  enum class Fence { proxies, mbarriers };
  void fence_proxies(const Thread& thread, Fence which);

  // Whether the writer of something has fenced it since, and the thread knows of that fence.
  bool knows_fence(const Thread& thread, const Thread& writer, Time time, Fence which) const;

 private:
  struct Clock {
    Time now;
    Time copies, store_reads, store_writes, products;  // operations before this time have been waited for
    BlockTimes own_block;
    GridTimes other_blocks;
    GridTimes fenced;
    GridTimes received;
    std::vector<Time> proxy_fences[2];
  };

  const Clock& clock(const Thread& thread) const { return clocks_[thread.slot]; }
  Clock& clock(const Thread& thread) { return clocks_[thread.slot]; }
  size_t place(Actor actor) const;
  size_t place_of_products(unsigned warp) const;
  size_t place_of_loads(unsigned barrier) const;
  void tick(Clock& clock);
  void add_own(Times& times, const Thread& thread) const;

  std::vector<Clock> clocks_;  // by the thread's slot
  std::map<const void*, GridTimes> atomics_;
  size_t block_threads_ = 0;
  size_t length_ = 0;  // of Times, as far as actors have turned up
  Time launch_start_ = 1;
  Time latest_ = 1;
};

}  // namespace checker
}  // namespace emulator
