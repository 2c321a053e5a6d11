// An access to memory, and the examination of it: inside its array, written before, in order with what others did.
#pragma once
#include "bank_conflicts.h"
#include "clocks.h"
#include "shadow.h"

namespace emulator {
namespace checker {

extern Clocks clocks;
extern Shadow shadow;
extern BankConflicts conflicts;

enum class Kind { read, write, atomic };

// An access under examination.
struct Request {
  Thread* thread;  // that makes it, or has issued it
  Actor actor;     // the thread, or an asynchronous operation
  Time now;        // the actor's
  Kind kind;
  uintptr_t address;
  size_t size;
  const void* code;
  const Block* memory;  // the block whose shared memory this is, or null
  size_t offset;        // there

  Request(Thread* thread, Kind kind, const void* address, size_t size, const void* code)
      : Request(thread, Actor(*thread), clocks.now(*thread), kind, address, size, code) {}

  Request(Thread* thread, Actor actor, Time now, Kind kind, const void* address, size_t size, const void* code)
      : thread(thread), actor(actor), now(now), kind(kind), address((uintptr_t)address), size(size), code(code),
        memory(thread->block), offset((const unsigned char*)address - memory->shared_memory) {
    const size_t bytes = launch->shared_bytes;
    if (offset >= bytes || size > bytes - offset) memory = nullptr;
  }

  bool is_asynchronous() const { return actor.kind() != ActorKind::thread; }
  bool is_of_async_proxy() const { return is_asynchronous() && actor.kind() != ActorKind::copies; }
  bool writes() const { return kind != Kind::read; }
};

// All of it, and counts it; an access to global memory belongs to whichever array permits it.
void examine(const Request& request);

// Of an access to global memory through a map: to the array of this parameter.
void examine_array(const Request& request, int parameter);

// Of an access to shared memory that is known to lie inside: races alone, and proxies.
void examine_shared(const Request& request);

// What another thread of the block has written to one cell of shared memory is known to this one.
void require_known(const Request& request);

// Per resident block, what checker_sm90.cpp keeps; the check at its end.
void begin_channels(const Block& block);
void require_nothing_under_way(const Block& block);

[[noreturn]] void fail_with_place(const Request& request, uintptr_t address, const char* what);

}  // namespace checker
}  // namespace emulator
