// Finds races, accesses outside arrays and reads of shared memory that nobody wrote; counts bytes.
//
// A checked kernel is compiled with -fsanitize=thread, which makes every load and store call a function. Here those
// functions are our own (instrumentation.cpp): the threads are CUDA's, which the compiler's sanitizer knows nothing of.
#include "checker.h"

#include <cstdio>

#include "bank_conflicts.h"
#include "clocks.h"
#include "failures.h"
#include "shadow.h"

namespace emulator {
namespace checker {

static Clocks clocks;
static Shadow shadow;
static BankConflicts conflicts;

namespace {

enum class Kind { read, write, atomic };

// An access under examination.
struct Request {
  Thread* thread;
  Actor actor;  // the thread, or an asynchronous copy that it issues
  Time now;
  Kind kind;
  uintptr_t address;
  size_t size;
  const void* code;
  size_t offset;  // in shared memory, if it lies there
  bool is_shared;

  Request(Thread* thread, bool is_copy, Kind kind, const void* address, size_t size, const void* code)
      : thread(thread), actor(*thread, is_copy), now(clocks.now(*thread, is_copy)), kind(kind),
        address((uintptr_t)address), size(size), code(code),
        offset((const unsigned char*)address - thread->block->shared_memory) {
    const size_t bytes = launch->shared_bytes;
    is_shared = offset < bytes && size <= bytes - offset;
  }

  bool is_copy() const { return actor.is_copy(); }
  bool writes() const { return kind != Kind::read; }
};

}  // namespace

// ---- Failures

[[noreturn]] static void fail_with_place(const Request& request, uintptr_t address, const char* what) {
  if (!request.is_shared) fail_at(request.thread, (const void*)address, request.code, what);
  char message[300];
  snprintf(message, sizeof message, "%s: shared memory, byte %zu", what, request.offset + (address - request.address));
  fail_at(request.thread, nullptr, request.code, message);
}

[[noreturn]] static void fail_out_of_bounds(const Request& request) {
  char what[200];
  const char* verb = request.kind == Kind::read ? "read" : request.kind == Kind::write ? "write" : "atomic operation";
  if (shared_memories[request.thread->block->residence].surrounds((const void*)request.address))
    fail(request.code, "out of bounds: %s of %zu bytes at byte %td of shared memory (%lld bytes)", verb, request.size,
         (ptrdiff_t)request.offset, (long long)launch->shared_bytes);
  snprintf(what, sizeof what, "out of bounds: %s of %zu bytes%s", verb, request.size,
           request.is_copy() ? " by an asynchronous copy" : "");
  fail_at(request.thread, (const void*)request.address, request.code, what);
}

[[noreturn]] static void fail_for_race(const Request& request, uintptr_t address, const Access& earlier,
                                       bool earlier_wrote) {
  char what[300];
  const char* kind = !request.writes() ? "read after write" : earlier_wrote ? "write after write" : "write after read";
  const Actor actor = earlier.actor;
  const bool own_copy = actor == Actor(*request.thread, true);
  snprintf(what, sizeof what, "race (%s%s): %s by %sblock %u, thread %u, and %s", kind,
           request.is_copy() ? ", by an asynchronous copy" : "", earlier_wrote ? "written" : "read",
           actor.is_copy() ? "an asynchronous copy of " : "", actor.block(), actor.thread(),
           own_copy ? "the copy has not been waited for" : "nothing orders the two");
  fail_with_place(request, address, what);
}

// ---- One access

static bool knows(const Request& request, const Access& earlier) {
  return !earlier.time || clocks.is_past(earlier.time) || clocks.knows(*request.thread, earlier.actor, earlier.time);
}

static void examine_read(const Request& request, uintptr_t address, Cell& cell) {
  // Nothing has happened to this cell since the same read before.
  if (cell.reads[0].actor == request.actor && cell.reads[0].time == request.now) return;
  if (request.is_shared) {
    const bool written = cell.write.time && !clocks.is_past(cell.write.time);
    if (!written || cell.write.actor.block() != request.actor.block())
      fail_with_place(request, address, "reads what nobody has written");
  }
  if (!knows(request, cell.write)) fail_for_race(request, address, cell.write, true);
  // A read that this one knows of may be forgotten: whoever knows of this one knows of that one too.
  if (!knows(request, cell.reads[0])) cell.reads[1] = cell.reads[0];
  cell.reads[0] = {request.actor, request.now};
}

static void note_write(const Request& request, Cell& cell) {
  cell.write = {request.actor, request.now};
  cell.written_by_atomic = request.kind == Kind::atomic;
  cell.reads[0] = cell.reads[1] = Access{};
}

static void examine_write(const Request& request, uintptr_t address, Cell& cell) {
  const auto races = [&](const Access& earlier) {
    // Of an earlier block in the same place of shared memory nothing is left.
    if (request.is_shared && earlier.actor.block() != request.actor.block()) return false;
    return !knows(request, earlier);
  };
  const bool both_atomic = request.kind == Kind::atomic && cell.written_by_atomic;
  if (!both_atomic && races(cell.write)) fail_for_race(request, address, cell.write, true);
  for (const Access& read : cell.reads)
    if (races(read)) fail_for_race(request, address, read, false);
  note_write(request, cell);
}

// The first array, in the order of parameters, that permits the access. Arrays may overlap: the network's parameters
// and one layer's weights among them.
static Array* find_array(const Request& request) {
  Array* read_only = nullptr;
  for (int i = 0; i < launch->array_count; ++i) {
    Array& array = launch->arrays[i];
    const uintptr_t begin = (uintptr_t)array.begin, end = (uintptr_t)array.end;
    if (request.address < begin || request.address + request.size > end) continue;
    if (array.writable || !request.writes()) return &array;
    read_only = &array;
  }
  if (read_only) fail_with_place(request, request.address, "writes to an array that the kernel takes as const");
  return nullptr;
}

static bool is_constant_of_kernel(const Request& request) {
  const uintptr_t begin = (uintptr_t)launch->entry->library_begin, end = (uintptr_t)launch->entry->library_end;
  return !request.writes() && request.address >= begin && request.address < end;
}

static void examine(const Request& request) {
  if (request.is_shared) {
    if (request.kind != Kind::atomic && !request.is_copy() && request.size <= 16)
      conflicts.note(*request.thread, request.code, request.offset, request.size, request.writes());
  } else if (Array* array = find_array(request)) {
    if (request.kind == Kind::atomic) ++array->atomics;
    else (request.writes() ? array->bytes_written : array->bytes_read) += request.size;
  } else if (is_constant_of_kernel(request)) {
    return;
  } else {
    fail_out_of_bounds(request);
  }
  if (request.size <= 16 && request.address % request.size && !request.is_copy())
    fail_with_place(request, request.address, "misaligned access");
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

void accessed(const void* address, size_t size, bool is_write, const void* code) {
  // A thread's stack is its registers.
  if (current->stack->holds(address)) return;
  examine({current, false, is_write ? Kind::write : Kind::read, address, size, code});
}

void atomic(Thread* thread, const void* address, size_t size, const void* code) {
  examine({thread, false, Kind::atomic, address, size, code});
  clocks.atomic(*thread, address);
}

void read_row(Thread* thread, const void* row, const void* code) {
  const Request request{thread, false, Kind::read, row, 16, code};
  for (uintptr_t address = request.address; address < request.address + 16; address += Shadow::cell_bytes)
    examine_read(request, address, shadow.cell(address));
}

void matrix_rows(const void* const* rows, const void* code) {
  uint32_t offsets[warp_size];
  for (unsigned lane = 0; lane < warp_size; ++lane)
    offsets[lane] = (const unsigned char*)rows[lane] - current->block->shared_memory;
  conflicts.note_warp(code, offsets, 16);
}

void copy_issued(Thread* thread, const Copy& copy, const void* code) {
  clocks.copy_issued(*thread);
  if (copy.valid > 0) examine({thread, true, Kind::read, copy.source, (size_t)copy.valid, code});
  examine({thread, true, Kind::write, copy.destination, 16, code});
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

void copies_waited_for(Thread* thread, int before_group) { clocks.copies_landed(*thread, before_group); }

// ---- The life of a launch

void launch_begins(size_t resident_blocks) {
  shadow.tidy();
  clocks.begin_launch(resident_blocks * launch->block);
  conflicts.begin_launch(resident_blocks * ((launch->block + warp_size - 1) / warp_size));
}

void block_begins(Block& block) {
  for (const Thread& thread : block.threads) clocks.begin_thread(thread);
}

void block_ends(Block& block) {
  for (size_t warp = 0; warp < block.warps.size(); ++warp) conflicts.end_interval(block, warp);
}

}  // namespace checker
}  // namespace emulator

int64_t emulator_conflict_sites(const emulator::ConflictSite** sites) {
  const std::vector<emulator::ConflictSite>& found = emulator::checker::conflicts.end_launch();
  *sites = found.data();
  return found.size();
}
