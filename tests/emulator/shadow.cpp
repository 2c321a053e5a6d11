#include "shadow.h"

namespace emulator {
namespace checker {

Cell* Shadow::find(uintptr_t page) {
  std::unique_ptr<Cell[]>& cells = pages_[page];
  if (!cells) cells = std::make_unique<Cell[]>(page_bytes / cell_bytes);
  return cells.get();
}

void Shadow::tidy() {
  if (pages_.size() < most_pages) return;
  pages_.clear();
  for (Recent& recent : recent_) recent = Recent{};
}

}  // namespace checker
}  // namespace emulator
