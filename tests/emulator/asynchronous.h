// State of sm_90a's barriers and copies in shared memory. Addresses there are offsets from its beginning.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

struct Thread;
struct Block;

// A barrier in shared memory (mbarrier). Its 8 bytes there hold the same numbers, so that a write over them shows.
struct Mbarrier {
  int count;       // arrivals that a phase needs
  int pending;     // those that have not come
  int announced;   // bytes of copies that have not come
  unsigned phase;  // how many phases have ended
  unsigned number; // among the block's
  std::vector<Thread*> waiting;
};

// A TensorMap's words, taken apart.
struct BoxMap {
  unsigned char* base;
  int64_t columns, rows, pitch;  // of the matrix; pitch in bytes
  int box_columns, box_rows;
  int swizzle;    // bytes
  int parameter;  // of the kernel

  int row_bytes() const { return box_columns * 2; }
  int bytes() const { return row_bytes() * box_rows; }
};

// A box on its way from global to shared memory.
struct BoxLoad {
  BoxMap map;
  uint32_t destination, barrier;
  int column, row;
  unsigned phase;  // the barrier's
  Thread* issuer;
  const void* code;
};

// A box on its way from shared to global memory.
struct BoxStore {
  BoxMap map;
  uint32_t source;
  int column, row;
  int group;
  bool was_waited_for;                 // at least until it has read shared memory
  bool is_written;
  std::vector<unsigned char> content;  // once it has been read
};

// A thread's boxes that have not been written yet, oldest first, and its groups.
struct StoreQueue {
  std::vector<BoxStore> under_way;
  int open_group;  // its number; the groups before it are closed
};

// The 16-byte chunk of shared memory that an address without swizzling means: rows of 128 or 64 bytes, in which the
// chunk's number is combined with the row's by exclusive or.
inline uint32_t swizzled(uint32_t address, int swizzle) {
  return address ^ (address >> 7 & (swizzle == 128 ? 7u : 3u)) << 4;
}

Mbarrier& find_mbarrier(Block& block, uint32_t address, const void* code);

// The bytes of a box have landed.
void count_landed_bytes(const BoxLoad& load);

// Calls visit(chunk, place in the matrix, before, valid) for each 16 bytes of a box: where they lie in shared memory,
// and which of their 8 elements lie in the matrix: `valid` from number `before` on.
template <class Visit>
void for_each_chunk(const BoxMap& map, uint32_t address, int column, int row, Visit visit) {
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < map.box_columns; c += 8) {
      const uint32_t chunk = swizzled(address + r * map.row_bytes() + c * 2, map.swizzle);
      const int64_t first = (int64_t)column + c, y = (int64_t)row + r;
      const int64_t begin = std::clamp<int64_t>(first, 0, map.columns);
      const int64_t end = std::clamp<int64_t>(first + 8, 0, map.columns);
      if (y >= 0 && y < map.rows && end > begin)
        visit(chunk, map.base + y * map.pitch + begin * 2, (int)(begin - first), (int)(end - begin));
      else visit(chunk, map.base, 0, 0);
    }
}

// Lands one of the boxes that are on their way to shared memory; false if there are none.
bool land_a_box();
void maybe_land_a_box();  // where copies land at random
void forget_boxes();

// At a thread's and a block's end nothing of theirs may be under way.
void require_stores_have_read(Thread* thread);
void require_no_boxes_under_way(const Block& block);

extern const char* const waits_at_mbarrier;

// For a thread that waits there: for which phase of which barrier, into `text`.
void describe_mbarrier(const Thread& waiting, char* text, size_t room);

}  // namespace emulator
