// Runs a launch: every CUDA thread on a stack of its own, all within the calling thread of the operating system.
// Threads change only where CUDA threads could tell the order: at barriers, at what a warp does together, at their end.
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>

#include "checker.h"
#include "failures.h"

namespace emulator {

Thread* current = nullptr;
Launch* launch = nullptr;
Settings* settings = nullptr;

static void* scheduler_stack_pointer;
static StackPool stacks;
static bool abandoned_launch;
std::vector<SharedMemory> shared_memories;

std::vector<Block> blocks;
std::vector<Cluster> clusters;
static std::vector<unsigned> upcoming;  // indices of clusters that have not begun, the next one last

// ---- Built-in variables

unsigned thread_index() noexcept { return current->index; }
unsigned block_index() noexcept { return current->block->index; }
unsigned block_size() noexcept { return launch->block; }
unsigned grid_size() noexcept { return launch->grid; }
unsigned char* shared_memory() noexcept { return current->block->shared_memory; }

uint64_t random_number() {
  uint64_t& state = settings->random_state;  // xorshift64, never zero
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state * 0x2545F4914F6CDD1Dull >> 16;
}

// ---- Threads that could run

namespace {

// A ring, since threads join at one end and leave at either.
class ReadyThreads {
 public:
  void reserve(size_t count) {
    size_t capacity = 64;
    while (capacity <= count) capacity *= 2;
    if (ring_.size() < capacity) ring_.resize(capacity);
    head_ = tail_ = 0;
  }
  bool empty() const { return head_ == tail_; }
  void join(Thread* thread) { place(tail_++) = thread; }
  Thread* take(Order order) {
    if (order == Order::lifo) return place(--tail_);
    if (order == Order::random) std::swap(place(head_), place(head_ + random_number() % (tail_ - head_)));
    return place(head_++);
  }

 private:
  Thread*& place(size_t position) { return ring_[position & (ring_.size() - 1)]; }

  std::vector<Thread*> ring_;
  size_t head_ = 0, tail_ = 0;
};

}  // namespace

static ReadyThreads ready;

void make_ready(Thread* thread) { ready.join(thread); }

static void thread_main();

// When nobody can go on, what is under way to shared memory lands, and may let someone.
static Thread* take_ready() {
  maybe_land_a_box();
  while (ready.empty())
    if (!land_a_box()) return nullptr;
  return ready.take(settings->order);
}

// Keeps the running stack's pointer in `*save` and goes on with `next`; without one, with the scheduler, who finds out
// why.
static void switch_to(Thread* next, void** save) {
  current = next;
  if (next && !next->stack) {
    next->stack = stacks.take();
    next->stack_pointer = fresh_stack_pointer(*next->stack, thread_main);
  }
  emulator_switch_stacks(save, next ? next->stack_pointer : scheduler_stack_pointer);
}

void wait_at(const char* place, const void* code) {
  Thread* self = current;
  self->waits_at = place;
  self->waiting_code = code;
  Thread* next = take_ready();
  if (next != self) switch_to(next, &self->stack_pointer);
}

void maybe_step_aside() {
  if (settings->order != Order::random || ready.empty() || random_number() % 2) return;
  make_ready(current);
  wait_at("nothing", nullptr);
}

// ---- The life of blocks and threads

SharedMemory::SharedMemory() {
  unsigned char* memory = (unsigned char*)mmap(nullptr, guard + largest + guard, PROT_NONE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  mprotect(memory + guard, largest, PROT_READ | PROT_WRITE);
  end = memory + guard + largest;
}

static void begin_block(Block& block, unsigned index) {
  constexpr size_t alignment = 128;
  block.index = index;
  block.live_threads = launch->block;
  const size_t bytes = (launch->shared_bytes + alignment - 1) / alignment * alignment;
  block.shared_memory = shared_memories[block.residence].end - bytes;
  memset(block.shared_memory, 0xff, bytes);  // NaN in every format: reading before writing shows in the results
  const unsigned lanes_of_last_warp = (launch->block - 1) % warp_size + 1;
  for (Warp& warp : block.warps) warp.live_lanes = whole_warp;
  block.warps.back().live_lanes = whole_warp >> (warp_size - lanes_of_last_warp);
  for (Thread& thread : block.threads) {
    thread.stack = nullptr;
    thread.waits_at = "its start";
    thread.waiting_code = nullptr;
    thread.copies.waiting.clear();
    thread.copies.open_group = 0;
    thread.stores.under_way.clear();
    thread.stores.open_group = 0;
    thread.has_arrived_at_cluster = false;
    make_ready(&thread);
  }
  block.mbarriers.clear();
  begin_warpgroups(block);
  if (settings->checked) checker::block_begins(block);
}

Cluster& cluster_of(const Block& block) { return clusters[block.residence / launch->cluster]; }

static void begin_next_cluster(Cluster& cluster) {
  if (upcoming.empty()) return;
  const unsigned index = upcoming.back();
  upcoming.pop_back();
  cluster.live_blocks = launch->cluster;
  cluster.live_threads = launch->cluster * launch->block;
  cluster.arrived = cluster.phase = 0;
  for (int rank = 0; rank < launch->cluster; ++rank)
    begin_block(blocks[cluster.first_residence + rank], index * launch->cluster + rank);
}

static void end_thread(Thread* thread) {
  land_copies(thread, thread->copies.open_group + 1);
  require_stores_have_read(thread);
  require_products_were_waited_for(thread);
  Block& block = *thread->block;
  --block.live_threads;
  thread->waits_at = nullptr;
  thread->waiting_code = nullptr;
  leave_meetings(thread);
  leave_barrier(thread);
  leave_cluster_barrier(thread);
  if (block.live_threads > 0) return;
  require_no_boxes_under_way(block);
  if (settings->checked) checker::block_ends(block);
  Cluster& cluster = cluster_of(block);
  if (--cluster.live_blocks == 0) begin_next_cluster(cluster);
}

// What runs on a stack: a thread, and then, while the next in line has not begun either, that one on the same stack.
// Kernels without barriers never switch stacks at all.
static void thread_main() {
  for (;;) {
    launch->entry->call(launch->arguments);
    Stack* stack = current->stack;
    end_thread(current);
    Thread* next = take_ready();
    if (next && !next->stack) {
      next->stack = stack;
      current = next;
      continue;
    }
    stacks.give_back(stack);
    void* abandoned;
    switch_to(next, &abandoned);
  }
}

void abandon_launch() {
  abandoned_launch = true;
  void* abandoned;
  emulator_switch_stacks(&abandoned, scheduler_stack_pointer);
  __builtin_unreachable();
}

// ---- A launch

// The order in which clusters begin: programs must not rely on any.
static void line_up_clusters() {
  upcoming.resize(launch->grid / launch->cluster);
  std::iota(upcoming.begin(), upcoming.end(), 0u);
  if (settings->order == Order::fifo) std::reverse(upcoming.begin(), upcoming.end());
  if (settings->order != Order::random) return;
  for (size_t i = upcoming.size(); i > 1; --i) std::swap(upcoming[i - 1], upcoming[random_number() % i]);
}

static void make_room() {
  const size_t cluster = launch->cluster, threads = launch->block;
  const size_t resident_clusters = std::min(settings->resident_blocks + cluster - 1, (size_t)launch->grid) / cluster;
  const size_t resident = resident_clusters * cluster;
  if (shared_memories.size() < resident) shared_memories.resize(resident);
  ready.reserve(resident * threads);
  // Blocks keep their memory from launch to launch; only a larger launch adds to it.
  blocks.resize(resident);
  clusters.resize(resident_clusters);
  for (size_t i = 0; i < resident_clusters; ++i) {
    clusters[i].first_residence = i * cluster;
    clusters[i].live_blocks = 0;
    clusters[i].waiting.clear();
  }
  for (size_t residence = 0; residence < resident; ++residence) {
    Block& block = blocks[residence];
    block.residence = residence;
    block.live_threads = 0;
    block.at_barrier.clear();
    for (NumberedBarrier& barrier : block.numbered) barrier = NumberedBarrier{};
    block.warps.resize((threads + warp_size - 1) / warp_size);
    for (Warp& warp : block.warps)
      for (Meeting& meeting : warp.meetings) meeting.mask = 0;
    block.warpgroups.resize(threads / warpgroup_size);
    block.threads.resize(threads);
    for (size_t i = 0; i < threads; ++i) {
      Thread& thread = block.threads[i];
      thread.block = &block;
      thread.slot = residence * threads + i;
      thread.index = i;
      thread.lane = i % warp_size;
      thread.warp = i / warp_size;
    }
  }
}

static bool somebody_waits() {
  for (const Block& block : blocks)
    if (block.live_threads > 0) return true;
  return false;
}

static int run() {
  abandoned_launch = false;
  make_room();
  forget_boxes();
  line_up_clusters();
  if (settings->checked) checker::launch_begins(blocks.size());
  for (Cluster& cluster : clusters) begin_next_cluster(cluster);
  {
    SignalHandlers handlers;
    switch_to(take_ready(), &scheduler_stack_pointer);
  }
  current = nullptr;
  if (!abandoned_launch && !somebody_waits()) return 0;
  if (!abandoned_launch) record_deadlock();
  stacks.give_back_all();
  return 1;
}

}  // namespace emulator

int emulator_launch(emulator::Launch* launch) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  emulator::launch = launch;
  emulator::settings = launch->settings;
  return emulator::run();
}
