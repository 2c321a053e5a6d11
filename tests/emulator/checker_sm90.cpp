// The checker of sm_90a's instructions. TMA and wgmma are actors of their own: they begin after what their issuer
// knows, and others know of them through whoever has waited for their phase or group.
#include <cstdio>

#include "checker.h"
#include "examination.h"
#include "failures.h"

namespace emulator {
namespace checker {

namespace {

// What a resident block's barriers pass on, and what others have read of its shared memory.
struct BlockState {
  std::map<uint32_t, Channel> mbarriers;  // by their place
  Channel numbered[Block::barriers];
  std::map<uint32_t, Time> latest_loads;  // by the place of their barrier
  std::map<unsigned, std::map<unsigned, Time>> remote_reads;  // by block and thread
};

}  // namespace

static std::vector<BlockState> states;  // by residence
static std::vector<Channel> cluster_channels;

void begin_channels(const Block& block) {
  states.resize(blocks.size());
  cluster_channels.resize(clusters.size());
  states[block.residence] = BlockState{};
  if (block.residence % launch->cluster == 0) cluster_channels[block.residence / launch->cluster] = Channel{};
}

static BlockState& state(const Block& block) { return states[block.residence]; }

// ---- Barriers in shared memory

static Actor phases_of(const Block& block, uint32_t address) {
  return Actor(block, ActorKind::loads, block.mbarriers.at(address).number);
}

void mbarrier_initialized(Thread* thread, uint32_t address, const void* code) {
  examine_shared({thread, Kind::write, thread->block->shared_memory + address, 8, code});
  clocks.issued(phases_of(*thread->block, address), clocks.time_of_group(0));
}

void mbarriers_fenced(Thread* thread) { clocks.fence_proxies(*thread, Clocks::Fence::mbarriers); }

void mbarrier_used(Thread* thread, uint32_t address, const void* code) {
  require_known({thread, Kind::atomic, thread->block->shared_memory + address, 8, code});
}

void arrived_at_mbarrier(Thread* thread, uint32_t address) {
  clocks.pass_on(*thread, state(*thread->block).mbarriers[address]);
}

void phase_ended(const Block& block, uint32_t address) {
  const Mbarrier& barrier = block.mbarriers.at(address);
  const int phase = barrier.phase - 1;
  clocks.issued(phases_of(block, address), clocks.time_of_group(phase));
  clocks.phase_ended(block, barrier.number, phase, state(block).mbarriers[address]);
}

// A wait tells only the latest phase from the one before. So whoever waits must know already that the phase before has
// ended; else the same wait, a little earlier, would be over at once.
void phase_awaited(Thread* thread, uint32_t address, const void* code) {
  const int phase = thread->block->mbarriers.at(address).phase - 1;
  if (phase > 0 && !clocks.knows(*thread, phases_of(*thread->block, address), clocks.time_of_group(phase - 1))) {
    char what[200];
    snprintf(what, sizeof what,
             "mbarrier: waits for phase %d of the barrier at byte %u and has never heard of the end of phase %d", phase,
             address, phase - 1);
    fail_at(thread, nullptr, code, what);
  }
  clocks.receive(*thread, state(*thread->block).mbarriers[address]);
}

// ---- Copies of boxes

static void require_barrier_known_to_copies(Thread* thread, uint32_t address, const void* code) {
  const Request request{thread, Kind::atomic, thread->block->shared_memory + address, 8, code};
  require_known(request);
  const Access& write = shadow.cell(request.address).write;
  const Thread& writer = thread->block->threads[write.actor.number()];
  for (const Clocks::Fence fence : {Clocks::Fence::mbarriers, Clocks::Fence::proxies})
    if (clocks.knows_fence(*thread, writer, write.time, fence)) return;
  fail_with_place(request, request.address,
                  "a copy for a barrier that no fence_mbarrier_init has made known to copies");
}

void load_issued(const BoxLoad& load) {
  Thread* const thread = load.issuer;
  const Block& block = *thread->block;
  require_barrier_known_to_copies(thread, load.barrier, load.code);
  const Actor actor = phases_of(block, load.barrier);
  const Time time = clocks.time_of_group(load.phase);
  clocks.issued(actor, time);
  state(block).latest_loads[load.barrier] = time;
  for_each_chunk(load.map, load.destination, load.column, load.row,
                 [&](uint32_t chunk, const unsigned char* source, int, int valid) {
                   if (valid)
                     examine_array({thread, actor, time, Kind::read, source, (size_t)valid * 2, load.code},
                                   load.map.parameter);
                   examine_shared({thread, actor, time, Kind::write, block.shared_memory + chunk, 16, load.code});
                 });
}

void store_issued(Thread* thread, const BoxStore& store, const void* code) {
  const Block& block = *thread->block;
  const Actor reader(block, ActorKind::store_reads, thread->index);
  const Actor writer(block, ActorKind::store_writes, thread->index);
  const Time time = clocks.time_of_group(store.group);
  clocks.issued(reader, time);
  clocks.issued(writer, time);
  for_each_chunk(store.map, store.source, store.column, store.row,
                 [&](uint32_t chunk, const unsigned char* target, int, int valid) {
                   examine_shared({thread, reader, time, Kind::read, block.shared_memory + chunk, 16, code});
                   if (valid)
                     examine_array({thread, writer, time, Kind::write, target, (size_t)valid * 2, code},
                                   store.map.parameter);
                 });
}

void stores_waited_for(Thread* thread, int before_group, bool only_reads) {
  clocks.ended(*thread, ActorKind::store_reads, before_group);
  if (!only_reads) clocks.ended(*thread, ActorKind::store_writes, before_group);
}

void proxies_fenced(Thread* thread) { clocks.fence_proxies(*thread, Clocks::Fence::proxies); }

// ---- Products

// Each warp has to know who wrote any of the operands, and whoever writes there later, that all four have waited.
void product_issued(Thread* thread, const WarpgroupProduct& product, const void* code) {
  const Block& block = *thread->block;
  const Actor actor(block, ActorKind::products, thread->index / warpgroup_size);
  const Time time = clocks.time_of_group(thread->open_product_group);
  clocks.issued(actor, time);
  const auto read = [&](uint32_t chunk, int, int) {
    examine_shared({thread, actor, time, Kind::read, block.shared_memory + chunk, 16, code});
  };
  if (!product.a_registers) for_each_chunk(product.a, 64, product.transpose_a, read);
  for_each_chunk(product.b, 2 * product.registers, product.transpose_b, read);
}

void products_waited_for(Thread* thread, int before_group) {
  clocks.ended(*thread, ActorKind::products, before_group);
}

// ---- Barriers of some warps

void went_on(Thread* thread, int barrier) { clocks.pass_on(*thread, state(*thread->block).numbered[barrier]); }

void let_go(Thread* const* threads, size_t count, int barrier) {
  Channel& channel = states[current->block->residence].numbered[barrier];
  clocks.release(channel);
  for (size_t i = 0; i < count; ++i) clocks.receive(*threads[i], channel);
  channel = Channel{};
}

// ---- Clusters

static Channel& cluster_channel(const Block& block) { return cluster_channels[block.residence / launch->cluster]; }

void arrived_at_cluster_barrier(Thread* thread) { clocks.pass_on(*thread, cluster_channel(*thread->block)); }

void cluster_phase_ended(const Cluster& cluster) {
  clocks.release(cluster_channels[cluster.first_residence / launch->cluster]);
}

void cluster_barrier_passed(Thread* thread) { clocks.receive(*thread, cluster_channel(*thread->block)); }

void read_other_block(Thread* thread, const Block& block, uint32_t offset, const void* code) {
  Request request{thread, Kind::read, block.shared_memory + offset, 16, code};
  request.memory = &block;
  request.offset = offset;
  examine_shared(request);
  if (&block != thread->block) state(block).remote_reads[thread->block->index][thread->index] = request.now;
}

// ---- The end of a block, whose shared memory is gone then

static bool somebody_knows(const Block& block, Actor actor, Time time) {
  for (const Thread& thread : block.threads)
    if (clocks.knows(thread, actor, time)) return true;
  return false;
}

void require_nothing_under_way(const Block& block) {
  for (const auto& [address, time] : state(block).latest_loads) {
    if (somebody_knows(block, phases_of(block, address), time)) continue;
    fail(nullptr, "the block ends, and nobody has waited for a copy of a box for the barrier at byte %u", address);
  }
  for (const auto& [other, threads] : state(block).remote_reads)
    for (const auto& [thread, time] : threads) {
      const Block& reader = blocks[cluster_of(block).first_residence + other % launch->cluster];
      if (somebody_knows(block, Actor(reader.threads[thread]), time)) continue;
      fail(nullptr, "the block ends although block %u, thread %u, reads its shared memory, and nothing orders the two",
           other, thread);
    }
}

}  // namespace checker
}  // namespace emulator
