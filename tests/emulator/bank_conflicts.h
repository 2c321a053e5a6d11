// How often accesses to shared memory must be repeated because lanes want different words of the same bank.
//
// A thread of the emulator executes its instructions alone, so a warp's access has to be put together again: of each
// lane the n-th execution of an instruction, counted from the last barrier or collective that the whole warp went
// through, belongs to the n-th of the others.
#pragma once
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace emulator {
namespace checker {

class BankConflicts {
 public:
  void begin_launch(size_t resident_warps);

  void note(const Thread& thread, const void* code, uint32_t offset, uint32_t size, bool is_write);

  // A whole warp at once, as ldmatrix reads and stmatrix writes: one offset for each lane.
  void note_warp(const void* code, const uint32_t* offsets, uint32_t size, bool is_write);

  // The warp has gone through a barrier or a collective, or has come to its end.
  void end_interval(const Block& block, size_t warp);

  // Those with conflicts, and their sum added to the counters.
  const std::vector<ConflictSite>& end_launch();

 private:
  struct WarpAccess {
    unsigned lanes = 0;
    uint32_t offsets[warp_size];
  };

  // An instruction, as a warp has executed it since the interval began.
  struct Executions {
    std::vector<WarpAccess> accesses;
    size_t executed[warp_size] = {};  // how often, by lane
  };

  struct Interval {
    std::vector<Executions> by_site;
    std::vector<size_t> used_sites;
  };

  struct Site {
    const void* code;
    uint32_t size;
    bool is_write;
    int64_t extra_wavefronts;
  };

  size_t find_site(const void* code, uint32_t size, bool is_write);
  Interval& interval(const Block& block, size_t warp) {
    return intervals_[block.residence * block.warps.size() + warp];
  }

  std::vector<Interval> intervals_;  // of all warps of resident blocks
  std::vector<Site> sites_;
  std::unordered_map<uintptr_t, size_t> site_numbers_;
  std::vector<ConflictSite> found_;
};

}  // namespace checker
}  // namespace emulator
