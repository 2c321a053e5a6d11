#include "failures.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace emulator {

static Failure failure;

static void record(const Thread* thread, const void* address, const void* code, const char* message) {
  snprintf(failure.message, sizeof failure.message, "%s", message);
  failure.block = thread ? (int)thread->block->index : -1;
  failure.thread = thread ? (int)thread->index : -1;
  failure.address = address;
  failure.code = code;
}

void fail_at(const Thread* thread, const void* address, const void* code, const char* message) {
  record(thread, address, code, message);
  abandon_launch();
}

void fail(const void* code, const char* format, ...) {
  char message[sizeof failure.message];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  fail_at(current, nullptr, code, message);
}

// ---- Deadlocks

static bool waits_alike(const Thread& one, const Thread& other) {
  if (one.waits_at != other.waits_at || one.waiting_code != other.waiting_code) return false;
  return one.waits_at != waits_at_mbarrier ||
         (one.awaited_barrier == other.awaited_barrier && one.awaited_parity == other.awaited_parity);
}

// One phrase for neighbours that wait at the same place. Returns the first thread that waits elsewhere.
static size_t describe_neighbours(const Block& block, size_t first, char* text, size_t room) {
  const char* place = block.threads[first].waits_at;
  const void* code = block.threads[first].waiting_code;
  size_t end = first + 1;
  while (end < block.threads.size() && waits_alike(block.threads[first], block.threads[end])) ++end;
  int used = snprintf(text, room, " Block %u, threads %zu to %zu %s%s", block.index, first, end - 1,
                      place ? "wait at " : "have returned", place ? place : "");
  if (place == waits_at_mbarrier && used < (int)room) {
    describe_mbarrier(block.threads[first], text + used, room - used);
    used += strlen(text + used);
  }
  // Python puts the line of source in place of the address.
  if (code && used < (int)room) used += snprintf(text + used, room - used, " (code %p)", code);
  if (used < (int)room) snprintf(text + used, room - used, ".");
  return end;
}

void record_deadlock() {
  char message[sizeof failure.message] = "deadlock: no thread can go on.";
  for (const Block& block : blocks) {
    if (block.live_threads == 0) continue;
    for (size_t i = 0; i < block.threads.size();) {
      const size_t used = strlen(message);
      i = describe_neighbours(block, i, message + used, sizeof message - used);
    }
  }
  record(nullptr, nullptr, nullptr, message);
}

// ---- Signals

static constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE};

static void on_signal(int signal_number, siginfo_t* info, void*) {
  if (!current) {
    signal(signal_number, SIG_DFL);  // not a kernel's fault: happens again, and ends the process
    return;
  }
  if (signal_number == SIGFPE) fail(nullptr, "integer division by zero");
  const char* address = (const char*)info->si_addr;
  if (shared_memories[current->block->residence].surrounds(address))
    fail(nullptr, "out of bounds: access to byte %td of shared memory (%lld bytes)",
         address - (const char*)current->block->shared_memory, (long long)launch->shared_bytes);
  if ((size_t)(current->stack->begin - address) <= Stack::guard) fail(nullptr, "stack overflow");
  fail_at(current, address, nullptr, "out of bounds: access to inaccessible memory");
}

SignalHandlers::SignalHandlers() {
  // A stack of their own, for it may be the thread's stack that is full.
  static char memory[64 << 10];
  stack_t stack{};
  stack.ss_sp = memory;
  stack.ss_size = sizeof memory;
  sigaltstack(&stack, &old_stack_);
  struct sigaction action {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  for (int i = 0; i < count; ++i) sigaction(signals[i], &action, &old_actions_[i]);
}

SignalHandlers::~SignalHandlers() {
  for (int i = 0; i < count; ++i) sigaction(signals[i], &old_actions_[i], nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace emulator

const emulator::Failure* emulator_failure() { return &emulator::failure; }
