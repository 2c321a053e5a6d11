// Finds races, accesses outside arrays and reads of shared memory that nobody wrote; counts bytes.
//
// A checked kernel is compiled with -fsanitize=thread, which makes every load and store call a function. Here those
// functions are our own (instrumentation.cpp): the threads are CUDA's, which the compiler's sanitizer knows nothing of.
#include "checker.h"

#include "examination.h"
#include "failures.h"

namespace emulator {
namespace checker {

void accessed(const void* address, size_t size, bool is_write, const void* code) {
  // A thread's stack is its registers.
  if (current->stack->holds(address)) return;
  examine({current, is_write ? Kind::write : Kind::read, address, size, code});
}

void atomic(Thread* thread, const void* address, size_t size, const void* code) {
  examine({thread, Kind::atomic, address, size, code});
  clocks.atomic(*thread, address);
}

void access_row(Thread* thread, const void* row, bool is_write, const void* code) {
  examine_shared({thread, is_write ? Kind::write : Kind::read, row, 16, code});
}

void matrix_rows(const void* const* rows, bool is_write, const void* code) {
  uint32_t offsets[warp_size];
  for (unsigned lane = 0; lane < warp_size; ++lane)
    offsets[lane] = (const unsigned char*)rows[lane] - current->block->shared_memory;
  conflicts.note_warp(code, offsets, 16, is_write);
}

void copy_issued(Thread* thread, const Copy& copy, const void* code) {
  const Actor actor(*thread->block, ActorKind::copies, thread->index);
  const Time time = clocks.time_of_group(copy.group);
  clocks.issued(actor, time);
  if (copy.valid > 0) examine({thread, actor, time, Kind::read, copy.source, (size_t)copy.valid, code});
  examine({thread, actor, time, Kind::write, copy.destination, 16, code});
}

// ---- Order

static void end_intervals(Thread* const* threads, size_t count) {
  unsigned lanes[1024 / warp_size] = {};
  for (size_t i = 0; i < count; ++i) lanes[threads[i]->warp] |= 1u << threads[i]->lane;
  const Block& block = *threads[0]->block;
  for (size_t warp = 0; warp < block.warps.size(); ++warp)
    if (lanes[warp] && lanes[warp] == block.warps[warp].live_lanes) conflicts.end_interval(block, warp);
}

void barrier(Thread* const* threads, size_t count) {
  clocks.meet(threads, count);
  end_intervals(threads, count);
}

void warp_met(Thread* const* threads, size_t count) { end_intervals(threads, count); }

void fence(Thread* thread) { clocks.fence(*thread); }

void copies_waited_for(Thread* thread, int before_group) { clocks.ended(*thread, ActorKind::copies, before_group); }

// ---- The life of a launch

void launch_begins(size_t resident_blocks) {
  if ((unsigned)launch->grid > Actor::most_blocks)
    fail(nullptr, "the checker knows grids of up to %u blocks", Actor::most_blocks);
  shadow.tidy();
  clocks.begin_launch(resident_blocks * launch->block);
  conflicts.begin_launch(resident_blocks * ((launch->block + warp_size - 1) / warp_size));
}

void block_begins(Block& block) {
  for (const Thread& thread : block.threads) clocks.begin_thread(thread);
  begin_channels(block);
}

void block_ends(Block& block) {
  for (size_t warp = 0; warp < block.warps.size(); ++warp) conflicts.end_interval(block, warp);
  require_nothing_under_way(block);
}

}  // namespace checker
}  // namespace emulator

int64_t emulator_conflict_sites(const emulator::ConflictSite** sites) {
  const std::vector<emulator::ConflictSite>& found = emulator::checker::conflicts.end_launch();
  *sites = found.data();
  return found.size();
}
