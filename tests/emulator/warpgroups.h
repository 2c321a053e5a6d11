// State of a warpgroup's matrix products (wgmma) and of its registers.
#pragma once
#include <cstdint>
#include <deque>
#include <list>
#include <vector>

#include "asynchronous.h"
#include "runtime.h"

namespace emulator {

struct Block;
struct Thread;

constexpr unsigned warpgroup_size = 128;

// Registers of all threads of a warpgroup that products under way add to. The threads' own hold NaN meanwhile.
struct Accumulator {
  float* registers[warpgroup_size] = {};  // of each thread that has issued a product and not waited for it
  int holders = 0;                        // of those threads
  int count;                              // of a thread's registers
  std::vector<float> sums;                // 64 x columns()
  int latest_group;                       // of the latest product

  int columns() const { return 2 * count; }
};

// A product that some or all threads of the warpgroup have issued.
struct IssuedProduct {
  WarpgroupProduct what;  // as its first issuer gave it
  Accumulator* accumulator;
  const uint32_t* a_registers[warpgroup_size];
  uint32_t a_at_issue[warpgroup_size][4];
  unsigned issuers;  // threads that have issued it
  unsigned waiters;  // threads that have waited for it
  int group;
  const void* code;
  bool is_done;
};

// Every thread issues products at its own pace. A product is complete, and may be carried out at any time, once all
// have issued it; products are carried out in order. Its sums appear in a thread's registers when that thread waits.
struct WarpGroup {
  std::deque<IssuedProduct> products;  // that not all have waited for
  unsigned first_product;              // the number of the first of them
  std::list<Accumulator> accumulators;
  std::vector<Thread*> waiting;  // for a product that others have not issued yet

  int registers;  // of a thread
  bool has_set_registers;
  int wanted_registers;  // what threads in set_registers ask for
  std::vector<Thread*> setting;
};

void begin_warpgroups(Block& block);

// At a thread's end none of its products may be under way.
void require_products_were_waited_for(Thread* thread);

// Carries out a product whose sums lie in its accumulator. 
void carry_out(const IssuedProduct& product, const unsigned char* memory);

// Calls visit(byte of shared memory, row, k) for each 16 bytes of an operand of `rows` (of A, or columns of B) times
// 16. They hold 8 neighbours: along k, or of rows if the operand is transposed.
template <class Visit>
void for_each_chunk(uint64_t descriptor, int rows, bool transposed, Visit visit) {
  constexpr uint32_t window = 0x3ffff;
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const int swizzle = descriptor >> 62 == 1 ? 128 : 64, chunks = swizzle / 16;
  if (!transposed) {
    for (int row = 0; row < rows; ++row)
      for (int k = 0; k < 16; k += 8) {
        const uint32_t address = start + row % 8 * swizzle + row / 8 * stride + k * 2;
        visit(swizzled(address & window, swizzle), row, k);
      }
    return;
  }
  for (int k = 0; k < 16; ++k)
    for (int row = 0; row < rows; row += 8) {
      const uint32_t chunk = row / 8;
      const uint32_t of_row = chunk % chunks * 16 + chunk / chunks * leading;
      const uint32_t address = start + of_row + k % 8 * swizzle + k / 8 * stride;
      visit(swizzled(address & window, swizzle), row, k);
    }
}

}  // namespace emulator
