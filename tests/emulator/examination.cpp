#include "examination.h"

#include <cstdio>

#include "failures.h"

namespace emulator {
namespace checker {

Clocks clocks;
Shadow shadow;
BankConflicts conflicts;

// ---- Failures

void fail_with_place(const Request& request, uintptr_t address, const char* what) {
  if (!request.memory) fail_at(request.thread, (const void*)address, request.code, what);
  const bool is_own = request.memory == request.thread->block;
  char message[400], of_block[40] = "";
  if (!is_own) snprintf(of_block, sizeof of_block, " of block %u", request.memory->index);
  snprintf(message, sizeof message, "%s: shared memory%s, byte %zu", what, of_block,
           request.offset + (address - request.address));
  fail_at(request.thread, nullptr, request.code, message);
}

static const char* name_of(ActorKind kind) {
  switch (kind) {
    case ActorKind::copies:
      return "an asynchronous copy";
    case ActorKind::loads:
      return "a copy of a box";
    case ActorKind::store_reads:
    case ActorKind::store_writes:
      return "a copy of a box to global memory";
    case ActorKind::products:
      return "wgmma";
    default:
      return "";
  }
}

// ", by an asynchronous copy" and the like; empty for a thread.
struct ByWhom {
  char text[60] = "";

  ByWhom(const Request& request, const char* before) {
    if (request.is_asynchronous()) snprintf(text, sizeof text, "%s%s", before, name_of(request.actor.kind()));
  }
};

[[noreturn]] static void fail_out_of_bounds(const Request& request) {
  char what[200];
  const char* verb = request.kind == Kind::read ? "read" : request.kind == Kind::write ? "write" : "atomic operation";
  if (shared_memories[request.thread->block->residence].surrounds((const void*)request.address))
    fail(request.code, "out of bounds: %s of %zu bytes at byte %td of shared memory (%lld bytes)", verb, request.size,
         (ptrdiff_t)request.offset, (long long)launch->shared_bytes);
  snprintf(what, sizeof what, "out of bounds: %s of %zu bytes%s", verb, request.size, ByWhom(request, " by ").text);
  fail_at(request.thread, (const void*)request.address, request.code, what);
}

static void describe(Actor actor, char* text, size_t room) {
  const char* const name = name_of(actor.kind());
  const char* const of = actor.kind() == ActorKind::thread ? "" : " of ";
  switch (actor.kind()) {
    case ActorKind::loads:
      snprintf(text, room, "%s of block %u", name, actor.block());
      return;
    case ActorKind::products:
      snprintf(text, room, "%s of block %u, warpgroup %u", name, actor.block(), actor.number());
      return;
    default:
      snprintf(text, room, "%s%sblock %u, thread %u", name, of, actor.block(), actor.number());
  }
}

[[noreturn]] static void fail_for_race(const Request& request, uintptr_t address, const Access& earlier,
                                       bool earlier_wrote) {
  char what[300], who[100];
  const char* kind = !request.writes() ? "read after write" : earlier_wrote ? "write after write" : "write after read";
  describe(earlier.actor, who, sizeof who);
  const bool own_copy = earlier.actor == Actor(*request.thread->block, ActorKind::copies, request.thread->index);
  snprintf(what, sizeof what, "race (%s%s): %s by %s, and %s", kind, ByWhom(request, ", by ").text,
           earlier_wrote ? "written" : "read", who,
           own_copy ? "the copy has not been waited for" : "nothing orders the two");
  fail_with_place(request, address, what);
}

// ---- One access

static bool knows(const Request& request, const Access& earlier) {
  return !earlier.time || clocks.is_past(earlier.time) || clocks.knows(*request.thread, earlier.actor, earlier.time);
}

// What a thread has written is seen by asynchronous operations only behind a fence of that thread.
static void require_fence(const Request& request, uintptr_t address, const Access& write) {
  if (!write.time || clocks.is_past(write.time) || write.actor.kind() != ActorKind::thread) return;
  const Thread& writer = request.memory->threads[write.actor.number()];
  if (clocks.knows_fence(*request.thread, writer, write.time, Clocks::Fence::proxies)) return;
  char what[300];
  snprintf(what, sizeof what,
           "proxies: %s by %s what block %u, thread %u, has written without a fence.proxy.async of its own since",
           request.writes() ? "overwritten" : "read", name_of(request.actor.kind()), write.actor.block(),
           write.actor.number());
  fail_with_place(request, address, what);
}

static bool is_written(const Request& request, const Access& write) {
  return write.time && !clocks.is_past(write.time) && write.actor.block() == request.memory->index;
}

// Whether an earlier read may be forgotten: whoever knows of this one knows of that one too.
static bool is_implied(const Request& request, const Access& earlier) {
  return earlier.actor == request.actor || clocks.is_past(earlier.time) ||
         (!request.is_of_async_proxy() && knows(request, earlier));
}

static void examine_read(const Request& request, uintptr_t address, Cell& cell) {
  // Nothing has happened to this cell since the same read before, unless each of several warps is to be looked at.
  const bool is_repeated = cell.reads[0].actor == request.actor && cell.reads[0].time == request.now;
  if (is_repeated && request.actor.kind() != ActorKind::products) return;
  if (request.memory && !is_written(request, cell.write))
    fail_with_place(request, address, "reads what nobody has written");
  if (!knows(request, cell.write)) fail_for_race(request, address, cell.write, true);
  if (request.memory && request.is_of_async_proxy()) require_fence(request, address, cell.write);
  if (is_repeated) return;
  Access moved = cell.reads[0];
  for (Access* read = cell.reads + 1; read != std::end(cell.reads) && !is_implied(request, moved); ++read)
    std::swap(*read, moved);
  cell.reads[0] = {request.actor, request.now};
}

static void note_write(const Request& request, Cell& cell) {
  cell.write = {request.actor, request.now};
  cell.written_by_atomic = request.kind == Kind::atomic;
  for (Access& read : cell.reads) read = Access{};
}

static void examine_write(const Request& request, uintptr_t address, Cell& cell) {
  const auto races = [&](const Access& earlier) {
    // Of an earlier cluster in the same place of shared memory nothing is left.
    if (request.memory && earlier.actor.block() / launch->cluster != request.actor.block() / launch->cluster)
      return false;
    return !knows(request, earlier);
  };
  const bool both_atomic = request.kind == Kind::atomic && cell.written_by_atomic;
  if (!both_atomic && races(cell.write)) fail_for_race(request, address, cell.write, true);
  for (const Access& read : cell.reads)
    if (races(read)) fail_for_race(request, address, read, false);
  if (request.memory && request.is_of_async_proxy() && is_written(request, cell.write))
    require_fence(request, address, cell.write);
  note_write(request, cell);
}

static void examine_cells(const Request& request) {
  const uintptr_t end = request.address + request.size;
  const uintptr_t first = request.address / Shadow::cell_bytes * Shadow::cell_bytes;
  for (uintptr_t address = first; address < end; address += Shadow::cell_bytes) {
    // Bytes that share a cell may belong to different threads: of single bytes only what was written is remembered.
    if (request.size < Shadow::cell_bytes) {
      if (request.writes()) note_write(request, shadow.cell(address));
    } else if (request.writes()) examine_write(request, address, shadow.cell(address));
    else examine_read(request, address, shadow.cell(address));
  }
}

// ---- Where it lies

static bool holds(const Array& array, const Request& request) {
  return request.address >= (uintptr_t)array.begin && request.address + request.size <= (uintptr_t)array.end;
}

// The first array, in the order of parameters, that permits the access. Arrays may overlap: the network's parameters
// and one layer's weights among them.
static Array* find_array(const Request& request) {
  bool is_read_only = false;
  for (int i = 0; i < launch->array_count; ++i) {
    Array& array = launch->arrays[i];
    if (!holds(array, request)) continue;
    if (array.writable || !request.writes()) return &array;
    is_read_only = true;
  }
  if (is_read_only) fail_with_place(request, request.address, "writes to an array that the kernel takes as const");
  return nullptr;
}

static void count(const Request& request, Array& array) {
  if (request.kind == Kind::atomic) ++array.atomics;
  else (request.writes() ? array.bytes_written : array.bytes_read) += request.size;
}

static bool is_constant_of_kernel(const Request& request) {
  const uintptr_t begin = (uintptr_t)launch->entry->library_begin, end = (uintptr_t)launch->entry->library_end;
  return !request.writes() && request.address >= begin && request.address < end;
}

void examine(const Request& request) {
  if (request.memory) {
    if (request.kind != Kind::atomic && !request.is_asynchronous() && request.size <= 16)
      conflicts.note(*request.thread, request.code, request.offset, request.size, request.writes());
  } else if (Array* array = find_array(request)) {
    count(request, *array);
  } else if (is_constant_of_kernel(request)) {
    return;
  } else {
    fail_out_of_bounds(request);
  }
  if (request.size <= 16 && request.address % request.size && !request.is_asynchronous())
    fail_with_place(request, request.address, "misaligned access");
  examine_cells(request);
}

void examine_array(const Request& request, int parameter) {
  Array& array = launch->arrays[parameter];
  if (!holds(array, request)) fail_out_of_bounds(request);
  if (request.writes() && !array.writable)
    fail_with_place(request, request.address, "writes to an array that may only be read");
  count(request, array);
  examine_cells(request);
}

void examine_shared(const Request& request) { examine_cells(request); }

void require_known(const Request& request) {
  const Cell& cell = shadow.cell(request.address);
  if (!knows(request, cell.write)) fail_for_race(request, request.address, cell.write, true);
}

}  // namespace checker
}  // namespace emulator
