// Asynchronous copies, fences, atomics.
#include <cstring>

#include "checker.h"
#include "failures.h"

namespace emulator {

static void land(const Copy& copy) {
  memcpy(copy.destination, copy.source, copy.valid);
  memset(copy.destination + copy.valid, 0, 16 - copy.valid);
}

bool lands_at_once() {
  switch (settings->landing) {
    case Landing::early:
      return true;
    case Landing::late:
      return false;
    default:
      return random_number() % 2;
  }
}

void copy_asynchronously(void* destination, const void* source, int valid) {
  const void* code = __builtin_return_address(0);
  if ((uintptr_t)destination % 16 || (uintptr_t)source % 16)
    fail(code, "cp.async: an address is not a multiple of 16 (destination %p, source %p)", destination, source);
  if (valid < 0 || valid > 16) fail(code, "cp.async: %d valid bytes, expected 0 to 16", valid);
  const size_t offset = (unsigned char*)destination - current->block->shared_memory;
  if (offset + 16 > (size_t)launch->shared_bytes || offset > (size_t)launch->shared_bytes)
    fail(code, "cp.async: the destination, byte %td of shared memory, is outside (%lld bytes)", (ptrdiff_t)offset,
         (long long)launch->shared_bytes);
  ++settings->counters.asynchronous_copies;
  CopyQueue& queue = current->copies;
  const Copy copy{(unsigned char*)destination, (const unsigned char*)source, valid, queue.open_group};
  if (settings->checked) checker::copy_issued(current, copy, code);
  if (lands_at_once()) land(copy);
  else queue.waiting.push_back(copy);
}

void close_copy_group() { ++current->copies.open_group; }

void land_copies(Thread* thread, int before_group) {
  std::vector<Copy>& waiting = thread->copies.waiting;
  size_t count = 0;
  while (count < waiting.size() && waiting[count].group < before_group) land(waiting[count++]);
  waiting.erase(waiting.begin(), waiting.begin() + count);
}

void wait_for_copies(int groups_under_way) {
  const int before_group = current->copies.open_group - groups_under_way;
  land_copies(current, before_group);
  if (settings->checked) checker::copies_waited_for(current, before_group);
}

void memory_fence() {
  if (settings->checked) checker::fence(current);
  maybe_step_aside();
}

void before_atomic(const void* address, size_t size, const void* code) {
  if ((uintptr_t)address % size) fail_at(current, address, code, "atomic operation: the address is not aligned");
  // Before the checker notes it: whoever overtakes comes first.
  maybe_step_aside();
  if (settings->checked) checker::atomic(current, address, size, code);
}

}  // namespace emulator
