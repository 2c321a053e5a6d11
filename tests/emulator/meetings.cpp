// Barriers, and what the lanes of a warp do together.
#include "checker.h"
#include "failures.h"

namespace emulator {

// ---- The block's barriers

static void let_go(std::vector<Thread*>& present) {
  if (settings->checked) checker::barrier(present.data(), present.size());
  for (Thread* thread : present)
    if (thread != current) make_ready(thread);
  present.clear();
}

static void open_barrier(Block& block) {
  ++settings->counters.barriers;
  let_go(block.at_barrier);
}

void block_barrier() {
  Block& block = *current->block;
  block.at_barrier.push_back(current);
  if (block.at_barrier.size() < block.live_threads) {
    wait_at("__syncthreads", __builtin_return_address(0));
    return;
  }
  open_barrier(block);
  maybe_step_aside();
}

// Threads that have returned are not waited for.
void leave_barrier(Thread* thread) {
  Block& block = *thread->block;
  if (!block.at_barrier.empty() && block.at_barrier.size() == block.live_threads) open_barrier(block);
}

static NumberedBarrier& find_barrier(int number, int threads, const char* instruction, const void* code) {
  if (number < 1 || number >= Block::barriers)
    fail(code, "%s: barrier %d; a block has 1 to %d besides __syncthreads's", instruction, number, Block::barriers - 1);
  if (threads < 1 || threads % warp_size || threads > (int)launch->block)
    fail(code, "%s: expects %d threads; a block of %u has whole warps of %u", instruction, threads,
         (unsigned)launch->block, warp_size);
  NumberedBarrier& barrier = current->block->numbered[number];
  if (barrier.is_new()) barrier.expected = threads;
  if (barrier.expected != threads)
    fail(code, "%s: expects %d threads at barrier %d, where others expect %d", instruction, threads, number,
         barrier.expected);
  return barrier;
}

static void open_if_complete(NumberedBarrier& barrier, int number) {
  if (!barrier.is_complete()) return;
  const std::vector<Thread*> present = barrier.present;
  if (!present.empty()) let_go(barrier.present);
  if (settings->checked && barrier.gone_on) checker::let_go(present.data(), present.size(), number);
  barrier.gone_on = 0;
}

void numbered_barrier(int number, int threads) {
  const void* code = __builtin_return_address(0);
  NumberedBarrier& barrier = find_barrier(number, threads, "bar.sync", code);
  barrier.present.push_back(current);
  if (!barrier.is_complete()) {
    wait_at("bar.sync", code);
    return;
  }
  open_if_complete(barrier, number);
  maybe_step_aside();
}

void arrive_at_numbered_barrier(int number, int threads) {
  NumberedBarrier& barrier = find_barrier(number, threads, "bar.arrive", __builtin_return_address(0));
  ++barrier.gone_on;
  if (settings->checked) checker::went_on(current, number);
  open_if_complete(barrier, number);
  maybe_step_aside();
}

// ---- Meetings of a warp

static void hold(Meeting& meeting, unsigned lanes) {
  const WarpOperation& operation = *meeting.operation;
  if (operation.perform) operation.perform(meeting.threads, meeting.arguments, lanes);
  if (settings->checked) {
    Thread* present[warp_size];
    size_t count = 0;
    for (unsigned lane = 0; lane < warp_size; ++lane)
      if (lanes >> lane & 1) present[count++] = meeting.threads[lane];
    if (operation.orders_memory) checker::barrier(present, count);
    else checker::warp_met(present, count);
  }
  meeting.mask = 0;
  for (unsigned lane = 0; lane < warp_size; ++lane)
    if ((lanes >> lane & 1) && meeting.threads[lane] != current) make_ready(meeting.threads[lane]);
}

static Meeting& find_meeting(Warp& warp, unsigned mask, const WarpOperation& operation, const void* code) {
  Meeting* unused = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.mask == mask) return meeting;
    if (!meeting.mask && !unused) unused = &meeting;
  }
  if (!unused) fail(code, "%s: lanes of this warp wait with %d other masks", operation.name, Warp::most_meetings);
  unused->mask = mask;
  unused->arrived = 0;
  unused->operation = &operation;
  return *unused;
}

void meet(unsigned mask, const WarpOperation& operation, void* argument, const void* code) {
  Thread* self = current;
  Warp& warp = self->block->warps[self->warp];
  if (!(mask >> self->lane & 1)) fail(code, "%s: the mask 0x%08x leaves out the calling lane", operation.name, mask);
  if (operation.needs_whole_warp && warp.live_lanes != whole_warp)
    fail(code, "%s: lanes of this warp have returned or do not exist (live lanes: 0x%08x)", operation.name,
         warp.live_lanes);
  Meeting& meeting = find_meeting(warp, mask, operation, code);
  if (meeting.operation != &operation)
    fail(code, "divergence: this lane comes to %s while others of its warp wait at %s", operation.name,
         meeting.operation->name);
  meeting.arguments[self->lane] = argument;
  meeting.threads[self->lane] = self;
  meeting.arrived |= 1u << self->lane;
  if (meeting.arrived != (mask & warp.live_lanes)) {
    wait_at(operation.name, code);
    return;
  }
  hold(meeting, meeting.arrived);
  maybe_step_aside();
}

// Lanes that have returned are not waited for.
void leave_meetings(Thread* thread) {
  Warp& warp = thread->block->warps[thread->warp];
  warp.live_lanes &= ~(1u << thread->lane);
  for (Meeting& meeting : warp.meetings) {
    if (!meeting.mask) continue;
    if (meeting.operation->needs_whole_warp)
      fail(nullptr, "this lane returns while others of its warp wait for it at %s", meeting.operation->name);
    if (meeting.arrived == (meeting.mask & warp.live_lanes)) hold(meeting, meeting.arrived);
  }
}

void warp_barrier(unsigned lanes) {
  static constexpr WarpOperation operation{"__syncwarp", nullptr, false, true};
  meet(lanes, operation, nullptr, __builtin_return_address(0));
}

// ---- Shuffles and votes

namespace {

struct ShuffleArgument {
  uint64_t value;
  unsigned source_lane;
  uint64_t received;
  const void* code;
};

}  // namespace

static void perform_shuffle(Thread* const* threads, void* const* arguments, unsigned lanes) {
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    ShuffleArgument& argument = *(ShuffleArgument*)arguments[lane];
    if (!(lanes >> argument.source_lane & 1)) {
      current = threads[lane];  // the one to blame
      fail(argument.code, "shuffle: reads lane %u, which does not take part (lanes 0x%08x)", argument.source_lane,
           lanes);
    }
    argument.received = ((ShuffleArgument*)arguments[argument.source_lane])->value;
  }
}

uint64_t shuffle(unsigned lanes, uint64_t value, unsigned source_lane, Shuffle operation) {
  static constexpr WarpOperation operations[] = {{"__shfl_sync", perform_shuffle, false, false},
                                                 {"__shfl_xor_sync", perform_shuffle, false, false},
                                                 {"__shfl_down_sync", perform_shuffle, false, false},
                                                 {"__shfl_up_sync", perform_shuffle, false, false}};
  const void* code = __builtin_return_address(0);
  ShuffleArgument argument{value, source_lane, 0, code};
  meet(lanes, operations[(int)operation], &argument, code);
  return argument.received;
}

namespace {

struct BallotArgument {
  bool predicate;
  unsigned votes;
};

}  // namespace

static void perform_ballot(Thread* const*, void* const* arguments, unsigned lanes) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < warp_size; ++lane)
    if ((lanes >> lane & 1) && ((BallotArgument*)arguments[lane])->predicate) votes |= 1u << lane;
  for (unsigned lane = 0; lane < warp_size; ++lane)
    if (lanes >> lane & 1) ((BallotArgument*)arguments[lane])->votes = votes;
}

unsigned ballot(unsigned lanes, bool predicate) {
  static constexpr WarpOperation operation{"__ballot_sync, __any_sync or __all_sync", perform_ballot, false, false};
  BallotArgument argument{predicate, 0};
  meet(lanes, operation, &argument, __builtin_return_address(0));
  return argument.votes;
}

// True for the lowest lane: any would do.
bool elect() {
  static constexpr WarpOperation operation{"elect.sync", nullptr, true, false};
  meet(whole_warp, operation, nullptr, __builtin_return_address(0));
  return current->lane == 0;
}

}  // namespace emulator
