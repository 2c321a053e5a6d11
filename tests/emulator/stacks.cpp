#include "stacks.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#ifndef __x86_64__
#error "the switch between stacks is written for x86-64"
#endif

// Registers that a called function must preserve are all that a switch keeps; the compiler takes care of the others.
asm(R"(
.text
.hidden emulator_switch_stacks
.globl emulator_switch_stacks
.type emulator_switch_stacks,@function
emulator_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stacks, .-emulator_switch_stacks
)");

namespace emulator {

static constexpr int stacks_a_mapping = 64;

void StackPool::map_more() {
  const size_t stride = Stack::guard + Stack::size;
  char* memory = (char*)mmap(nullptr, stacks_a_mapping * stride, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("emulator: no memory for stacks");
    abort();
  }
  for (int i = 0; i < stacks_a_mapping; ++i) {
    char* guard = memory + i * stride;
    mprotect(guard, Stack::guard, PROT_NONE);
    // Threads of a block run in step and touch the same depth of their stacks. Tops at different places within a page
    // keep those lines from falling into the same few sets of the cache.
    const size_t shift = 128 + (all_.size() * 5 % 29) * 128;
    Stack* stack = new Stack{guard + Stack::guard, guard + stride - shift};
    all_.push_back(stack);
    free_.push_back(stack);
  }
}

Stack* StackPool::take() {
  if (free_.empty()) map_more();
  Stack* stack = free_.back();
  free_.pop_back();
  return stack;
}

void* fresh_stack_pointer(const Stack& stack, void (*start)()) {
  void** top = (void**)stack.first_top;
  *--top = nullptr;       // where `start` would return to; also aligns the stack as a call does
  *--top = (void*)start;  // where the switch returns to
  for (int preserved_register = 0; preserved_register < 6; ++preserved_register) *--top = nullptr;
  return top;
}

}  // namespace emulator
