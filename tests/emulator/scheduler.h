// Threads, warps and blocks of the launch under way, and who runs next. Only the runtime's own files include this.
#pragma once
#include <map>
#include <vector>

#include "asynchronous.h"
#include "launch.h"
#include "stacks.h"
#include "warpgroups.h"

namespace emulator {

constexpr unsigned warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;

// Shared memory of a resident block lies at the end of a mapping of its own, with inaccessible memory on both sides.
struct SharedMemory {
  static constexpr ptrdiff_t largest = 256 << 10;
  static constexpr ptrdiff_t guard = 64 << 10;

  unsigned char* end;

  SharedMemory();
  bool surrounds(const void* address) const {
    const ptrdiff_t past_end = (const unsigned char*)address - end;
    return past_end >= -largest - guard && past_end < guard;
  }
};

extern std::vector<SharedMemory> shared_memories;  // by residence

struct Copy {
  unsigned char* destination;
  const unsigned char* source;
  int valid;
  int group;
};

// A thread's asynchronous copies that have not landed yet, oldest first, and its groups.
struct CopyQueue {
  std::vector<Copy> waiting;
  int open_group;  // its number; the groups before it are closed
};

struct Block;

struct Thread {
  Block* block;
  Stack* stack;  // null until the thread first runs
  void* stack_pointer;
  const char* waits_at;
  const void* waiting_code;
  unsigned slot;  // its place among the threads of all resident blocks
  unsigned index;
  unsigned lane;
  unsigned warp;
  CopyQueue copies;
  StoreQueue stores;
  uint32_t awaited_barrier;  // while it waits at an mbarrier
  int awaited_parity;
  bool has_arrived_at_cluster;  // and not waited
  unsigned cluster_phase;       // in which it has arrived
  unsigned products_issued;  // to the warpgroup, and of those the first ones that it has waited for
  unsigned products_ended;
  unsigned awaited_product;
  int open_product_group;
  bool has_fenced_registers;
  const char* fenced_from;             // in checked launches: what the stack held from here on
  std::vector<char> fenced_registers;  // at the latest wgmma.fence
};

// Something that lanes of a warp do together.
struct WarpOperation {
  const char* name;
  // Runs once all lanes have come, with each lane's argument; null where meeting is all there is to do.
  void (*perform)(Thread* const* threads, void* const* arguments, unsigned lanes);
  bool needs_whole_warp;
  bool orders_memory;
};

// Lanes on their way to the same operation with the same mask.
struct Meeting {
  unsigned mask = 0;  // 0: not in use
  unsigned arrived = 0;
  const WarpOperation* operation = nullptr;
  void* arguments[warp_size];
  Thread* threads[warp_size];
};

struct Warp {
  static constexpr int most_meetings = 8;

  unsigned live_lanes;  // that exist and have not returned
  Meeting meetings[most_meetings];
};

// One of the block's barriers that some of its warps wait at.
struct NumberedBarrier {
  int expected;  // threads
  int gone_on = 0;  // threads that have arrived without waiting
  std::vector<Thread*> present;

  bool is_new() const { return present.empty() && gone_on == 0; }
  bool is_complete() const { return (int)present.size() + gone_on == expected; }
};

// Blocks that run together, in neighbouring places.
struct Cluster {
  unsigned first_residence;
  unsigned live_blocks;
  unsigned live_threads;
  unsigned arrived;  // at the cluster's barrier
  unsigned phase;
  std::vector<Thread*> waiting;
};

struct Block {
  static constexpr int barriers = 16;

  unsigned index;
  unsigned residence;  // which of the resident blocks' places it has
  unsigned live_threads;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> at_barrier;  // __syncthreads
  NumberedBarrier numbered[barriers];
  std::map<uint32_t, Mbarrier> mbarriers;  // by their place in shared memory
  std::vector<WarpGroup> warpgroups;       // of 128 threads; what is left over belongs to none
  unsigned char* shared_memory;
};

extern Thread* current;  // null: the scheduler itself runs
extern Launch* launch;
extern Settings* settings;
extern std::vector<Block> blocks;  // the resident ones
extern std::vector<Cluster> clusters;

Cluster& cluster_of(const Block& block);

// Puts a thread in line.
void make_ready(Thread* thread);

// Lets other threads run until someone makes this one ready. A deadlock's message shows what it waits at, and where in
// the kernel.
void wait_at(const char* place, const void* code);

// In random order, now and then lets others overtake: called where threads of different warps can tell who came first.
void maybe_step_aside();

uint64_t random_number();

// Leaves all stacks as they are, for good; kernels own nothing that would have to be freed.
[[noreturn]] void abandon_launch();

// Meets the other lanes of the mask.
void meet(unsigned mask, const WarpOperation& operation, void* argument, const void* code);

// What a thread's end means for those who wait for it.
void leave_meetings(Thread* thread);
void leave_barrier(Thread* thread);
void leave_cluster_barrier(Thread* thread);

void land_copies(Thread* thread, int before_group);

// Whether an asynchronous operation that is issued now is carried out now.
bool lands_at_once();

}  // namespace emulator
