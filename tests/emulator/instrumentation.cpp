// The functions that code compiled with -fsanitize=thread calls: one before each load and store.
#include "checker.h"

using emulator::checker::accessed;

#define HOOK extern "C" EMULATOR_API
#define CALLER __builtin_return_address(0)

#define ACCESS_HOOKS(size)                                                                         \
  HOOK void __tsan_read##size(void* address) { accessed(address, size, false, CALLER); }           \
  HOOK void __tsan_write##size(void* address) { accessed(address, size, true, CALLER); }           \
  HOOK void __tsan_unaligned_read##size(void* address) { accessed(address, size, false, CALLER); } \
  HOOK void __tsan_unaligned_write##size(void* address) { accessed(address, size, true, CALLER); }

ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)

HOOK void __tsan_read_range(void* address, size_t size) { accessed(address, size, false, CALLER); }
HOOK void __tsan_write_range(void* address, size_t size) { accessed(address, size, true, CALLER); }
HOOK void __tsan_init() {}
