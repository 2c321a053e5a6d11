// Stacks for CUDA threads, and the switch from one to another.
#pragma once
#include <cstddef>
#include <vector>

namespace emulator {

struct Stack {
  static constexpr size_t size = 128 << 10;
  static constexpr size_t guard = 4096;  // bytes below that are inaccessible

  char* begin;      // the lowest byte
  void* first_top;  // the stack pointer of one on which nothing runs

  bool holds(const void* address) const { return (size_t)((const char*)address - begin) < size; }
};

class StackPool {
 public:
  // One on which nothing runs. The one returned last comes first, for its memory is still in the cache.
  Stack* take();
  void give_back(Stack* stack) { free_.push_back(stack); }
  void give_back_all() { free_ = all_; }

 private:
  void map_more();

  std::vector<Stack*> all_, free_;
};

// The stack pointer with which switch_stacks calls `start`, which must never return.
void* fresh_stack_pointer(const Stack& stack, void (*start)());

}  // namespace emulator

// Keeps the running stack's pointer in `*save` and goes on with the stack whose pointer is `load`.
extern "C" void emulator_switch_stacks(void** save, void* load);
