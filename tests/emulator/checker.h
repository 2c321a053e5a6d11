// What the runtime tells the checker in a checked launch.
#pragma once
#include "scheduler.h"

namespace emulator {
namespace checker {

// Loads and stores of the current thread, as the compiler's instrumentation reports them.
void accessed(const void* address, size_t size, bool is_write, const void* code);

void atomic(Thread* thread, const void* address, size_t size, const void* code);

// What a lane reads for ldmatrix: 16 bytes of shared memory; then the rows of all lanes.
void read_row(Thread* thread, const void* row, const void* code);
void matrix_rows(const void* const* rows, const void* code);

void copy_issued(Thread* thread, const Copy& copy, const void* code);
void copies_waited_for(Thread* thread, int before_group);

void fence(Thread* thread);

// All of these threads have met at a barrier: what each did before is now known to all.
void barrier(Thread* const* threads, size_t count);

// Lanes have met at an operation that orders nothing.
void warp_met(Thread* const* threads, size_t count);

void launch_begins(size_t resident_blocks);
void block_begins(Block& block);
void block_ends(Block& block);

}  // namespace checker
}  // namespace emulator
