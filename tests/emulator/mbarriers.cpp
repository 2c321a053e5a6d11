// Barriers in shared memory (mbarrier): arrivals, announced bytes, phases.
#include <cstdio>
#include <cstring>

#include "checker.h"
#include "failures.h"

namespace emulator {

const char* const waits_at_mbarrier = "mbarrier.try_wait";

static constexpr int most_arrivals = (1 << 20) - 1;
static constexpr int most_bytes = (1 << 20) - 1;

// ---- The barrier's 8 bytes

static uint64_t image(const Mbarrier& barrier) {
  return (uint64_t)(barrier.count & 0xffff) | (uint64_t)(barrier.pending & 0xffff) << 16 |
         (uint64_t)(barrier.announced & 0x7fffffff) << 32 | (uint64_t)(barrier.phase & 1) << 63;
}

static void show(const Block& block, uint32_t address, const Mbarrier& barrier) {
  const uint64_t bytes = image(barrier);
  memcpy(block.shared_memory + address, &bytes, sizeof bytes);
}

static void require_place(uint32_t address, const void* code) {
  if (address % 8) fail(code, "mbarrier: byte %u of shared memory is no multiple of 8", address);
  if ((int64_t)address + 8 > launch->shared_bytes)
    fail(code, "mbarrier: byte %u of shared memory is outside (%lld bytes)", address, (long long)launch->shared_bytes);
}

Mbarrier& find_mbarrier(Block& block, uint32_t address, const void* code) {
  require_place(address, code);
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end())
    fail(code, "mbarrier: nobody has initialised a barrier at byte %u of shared memory", address);
  const uint64_t expected = image(found->second);
  if (memcmp(block.shared_memory + address, &expected, sizeof expected))
    fail(code, "mbarrier: something else was written over the barrier at byte %u of shared memory", address);
  return found->second;
}

void initialize_mbarrier(uint32_t address, int arrivals) {
  const void* code = __builtin_return_address(0);
  require_place(address, code);
  if (arrivals < 1 || arrivals > most_arrivals)
    fail(code, "mbarrier.init: %d arrivals, expected 1 to %d", arrivals, most_arrivals);
  Block& block = *current->block;
  const bool is_new = !block.mbarriers.count(address);
  Mbarrier& barrier = block.mbarriers[address];
  if (!barrier.waiting.empty()) fail(code, "mbarrier.init: threads wait for the barrier at byte %u", address);
  if (is_new) barrier.number = block.mbarriers.size() - 1;
  barrier.count = barrier.pending = arrivals;
  barrier.announced = 0;
  barrier.phase = 0;
  show(block, address, barrier);
  if (settings->checked) checker::mbarrier_initialized(current, address, code);
}

void fence_mbarriers() {
  if (settings->checked) checker::mbarriers_fenced(current);
}

// ---- Phases

static void end_phase_if_complete(Block& block, uint32_t address, Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.announced == 0) {
    ++barrier.phase;
    barrier.pending = barrier.count;
    if (settings->checked) checker::phase_ended(block, address);
    for (Thread* thread : barrier.waiting) {
      if (settings->checked) checker::phase_awaited(thread, address, thread->waiting_code);
      make_ready(thread);
    }
    barrier.waiting.clear();
  }
  show(block, address, barrier);
}

void arrive_at_mbarrier(uint32_t address, int announced_bytes) {
  const void* code = __builtin_return_address(0);
  Block& block = *current->block;
  Mbarrier& barrier = find_mbarrier(block, address, code);
  if (announced_bytes < 0 || announced_bytes > most_bytes)
    fail(code, "mbarrier.arrive.expect_tx: %d bytes, expected 0 to %d", announced_bytes, most_bytes);
  if (barrier.pending == 0)
    fail(code, "mbarrier.arrive: more than %d arrivals in phase %u of the barrier at byte %u", barrier.count,
         barrier.phase, address);
  if (settings->checked) {
    checker::mbarrier_used(current, address, code);
    checker::arrived_at_mbarrier(current, address);
  }
  barrier.announced += announced_bytes;
  --barrier.pending;
  end_phase_if_complete(block, address, barrier);
  maybe_step_aside();
}

void count_landed_bytes(const BoxLoad& load) {
  Block& block = *load.issuer->block;
  Mbarrier& barrier = find_mbarrier(block, load.barrier, load.code);
  const int bytes = load.map.bytes();
  if (barrier.phase != load.phase || barrier.announced < bytes)
    fail(load.code,
         "mbarrier: %d bytes come for phase %u of the barrier at byte %u; it is in phase %u and expects %d bytes more",
         bytes, load.phase, load.barrier, barrier.phase, barrier.announced);
  barrier.announced -= bytes;
  end_phase_if_complete(block, load.barrier, barrier);
}

void wait_for_phase(uint32_t address, int parity) {
  const void* code = __builtin_return_address(0);
  Block& block = *current->block;
  Mbarrier& barrier = find_mbarrier(block, address, code);
  if (parity != 0 && parity != 1) fail(code, "mbarrier.try_wait.parity: parity %d, expected 0 or 1", parity);
  if (settings->checked) checker::mbarrier_used(current, address, code);
  if ((int)(barrier.phase % 2) == parity) {
    current->awaited_barrier = address;
    current->awaited_parity = parity;
    barrier.waiting.push_back(current);
    wait_at(waits_at_mbarrier, code);
  } else {
    if (settings->checked) checker::phase_awaited(current, address, code);
    maybe_step_aside();
  }
}

void describe_mbarrier(const Thread& waiting, char* text, size_t room) {
  const Mbarrier& barrier = waiting.block->mbarriers.at(waiting.awaited_barrier);
  snprintf(text, room,
           " for parity %d of the barrier at byte %u (phase %u: %d of %d arrivals and %d bytes are missing)",
           waiting.awaited_parity, waiting.awaited_barrier, barrier.phase, barrier.pending, barrier.count,
           barrier.announced);
}

}  // namespace emulator
