// What the checker remembers of memory: for every two bytes, who accessed them last.
#pragma once
#include <memory>
#include <unordered_map>

#include "clocks.h"

namespace emulator {
namespace checker {

struct Access {
  Actor actor;
  Time time = 0;  // 0: never
};

// Two bytes, since 16-bit numbers side by side belong to different threads.
struct Cell {
  Access write;
  bool written_by_atomic = false;
  // The latest reads since. More are rarely needed: those that the newest one knows may be forgotten.
  Access reads[4];
};

class Shadow {
 public:
  static constexpr uintptr_t cell_bytes = 2;

  Cell& cell(uintptr_t address) {
    const uintptr_t page = address / page_bytes;
    Recent& recent = recent_[page % recent_pages];
    if (recent.page != page) recent = {page, find(page)};
    return recent.cells[address % page_bytes / cell_bytes];
  }

  // Forgets everything if it has grown too large. Between launches only.
  void tidy();

 private:
  static constexpr uintptr_t page_bytes = 4096;
  static constexpr size_t recent_pages = 256;
  static constexpr size_t most_pages = 4096;

  struct Recent {
    uintptr_t page = 0;
    Cell* cells = nullptr;
  };

  Cell* find(uintptr_t page);

  std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages_;
  Recent recent_[recent_pages];
};

}  // namespace checker
}  // namespace emulator
