// What the runtime tells the checker in a checked launch.
#pragma once
#include "scheduler.h"

namespace emulator {
namespace checker {

// Loads and stores of the current thread, as the compiler's instrumentation reports them.
void accessed(const void* address, size_t size, bool is_write, const void* code);

void atomic(Thread* thread, const void* address, size_t size, const void* code);

// What a lane names for ldmatrix or stmatrix: 16 bytes of shared memory; then the rows of all lanes.
void access_row(Thread* thread, const void* row, bool is_write, const void* code);
void matrix_rows(const void* const* rows, bool is_write, const void* code);

void copy_issued(Thread* thread, const Copy& copy, const void* code);
void copies_waited_for(Thread* thread, int before_group);

void fence(Thread* thread);

// All of these threads have met at a barrier: what each did before is now known to all.
void barrier(Thread* const* threads, size_t count);

// Lanes have met at an operation that orders nothing.
void warp_met(Thread* const* threads, size_t count);

// ---- sm_90a

void mbarrier_initialized(Thread* thread, uint32_t address, const void* code);
void mbarriers_fenced(Thread* thread);
void mbarrier_used(Thread* thread, uint32_t address, const void* code);  // by an arrival or a wait
void arrived_at_mbarrier(Thread* thread, uint32_t address);
void phase_ended(const Block& block, uint32_t address);
void phase_awaited(Thread* thread, uint32_t address, const void* code);

void load_issued(const BoxLoad& load);
void store_issued(Thread* thread, const BoxStore& store, const void* code);
void stores_waited_for(Thread* thread, int before_group, bool only_reads);
void proxies_fenced(Thread* thread);

// What a thread's warp reads of shared memory for a product.
void product_issued(Thread* thread, const WarpgroupProduct& product, const void* code);
void products_waited_for(Thread* thread, int before_group);

// A thread has arrived at a barrier of some warps and gone on; those who are let go learn what it knew.
void went_on(Thread* thread, int barrier);
void let_go(Thread* const* threads, size_t count, int barrier);

void arrived_at_cluster_barrier(Thread* thread);
void cluster_phase_ended(const Cluster& cluster);
void cluster_barrier_passed(Thread* thread);
void read_other_block(Thread* thread, const Block& block, uint32_t offset, const void* code);

// ---- The life of a launch

void launch_begins(size_t resident_blocks);
void block_begins(Block& block);
void block_ends(Block& block);

}  // namespace checker
}  // namespace emulator
