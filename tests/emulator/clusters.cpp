// Clusters: their barrier, and shared memory of other blocks.
#include <cstring>

#include "checker.h"
#include "failures.h"

namespace emulator {

// An address that read_cluster_memory understands: the rank plus one, and the byte of that block's shared memory.
static constexpr int rank_shift = 24;

int cluster_rank() noexcept { return current->block->index % launch->cluster; }

// ---- The barrier of all threads that have not returned

static void end_phase_if_complete(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live_threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  if (settings->checked) checker::cluster_phase_ended(cluster);
  for (Thread* thread : cluster.waiting) make_ready(thread);
  cluster.waiting.clear();
}

void arrive_at_cluster_barrier() {
  const void* code = __builtin_return_address(0);
  if (current->has_arrived_at_cluster) fail(code, "barrier.cluster.arrive: this thread has arrived and not waited");
  Cluster& cluster = cluster_of(*current->block);
  current->has_arrived_at_cluster = true;
  current->cluster_phase = cluster.phase;
  ++cluster.arrived;
  if (settings->checked) checker::arrived_at_cluster_barrier(current);
  end_phase_if_complete(cluster);
  maybe_step_aside();
}

void wait_at_cluster_barrier() {
  const void* code = __builtin_return_address(0);
  if (!current->has_arrived_at_cluster) fail(code, "barrier.cluster.wait: this thread has not arrived");
  Cluster& cluster = cluster_of(*current->block);
  if (current->cluster_phase == cluster.phase) {
    cluster.waiting.push_back(current);
    wait_at("barrier.cluster.wait", code);
  }
  current->has_arrived_at_cluster = false;
  if (settings->checked) checker::cluster_barrier_passed(current);
}

// Whoever returns is not waited for, and what it has arrived for stays counted until it does.
void leave_cluster_barrier(Thread* thread) {
  Cluster& cluster = cluster_of(*thread->block);
  if (thread->has_arrived_at_cluster && thread->cluster_phase == cluster.phase) --cluster.arrived;
  --cluster.live_threads;
  end_phase_if_complete(cluster);
}

// ---- Shared memory of other blocks

uint32_t cluster_address(uint32_t address, int rank) {
  if (rank < 0 || rank >= launch->cluster)
    fail(__builtin_return_address(0), "mapa: rank %d in a cluster of %d blocks", rank, launch->cluster);
  return address | (uint32_t)(rank + 1) << rank_shift;
}

void read_cluster_memory(void* value, uint32_t address) {
  const void* code = __builtin_return_address(0);
  const uint32_t offset = address & ((1u << rank_shift) - 1);
  const int rank = address >> rank_shift ? (int)(address >> rank_shift) - 1 : cluster_rank();
  if (rank >= launch->cluster) fail(code, "ld.shared::cluster: 0x%x is no address of the cluster", address);
  if (offset % 16) fail(code, "ld.shared::cluster: byte %u of shared memory is no multiple of 16", offset);
  if ((int64_t)offset + 16 > launch->shared_bytes)
    fail(code, "ld.shared::cluster: byte %u of shared memory is outside (%lld bytes)", offset,
         (long long)launch->shared_bytes);
  maybe_step_aside();
  const Block& block = blocks[cluster_of(*current->block).first_residence + rank];
  if (block.live_threads == 0)
    fail(code, "ld.shared::cluster: block %u, whose shared memory this reads, has ended", block.index);
  if (settings->checked) checker::read_other_block(current, block, offset, code);
  memcpy(value, block.shared_memory + offset, 16);
}

}  // namespace emulator
