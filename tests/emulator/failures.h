// How a launch ends that cannot go on.
#pragma once
#include <csignal>

#include "scheduler.h"

namespace emulator {

// Ends the launch with a message about the current thread. `code` is where in the kernel it happened.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const void* code, const char* format, ...);

// The same about any thread, and with the address of memory that it must not touch.
[[noreturn]] void fail_at(const Thread* thread, const void* address, const void* code, const char* message);

// Says where everyone waits.
void record_deadlock();

// While it lives, a kernel's access to inaccessible memory ends the launch and not the process.
class SignalHandlers {
 public:
  SignalHandlers();
  ~SignalHandlers();

 private:
  static constexpr int count = 3;

  struct sigaction old_actions_[count];
  stack_t old_stack_;
};

}  // namespace emulator
