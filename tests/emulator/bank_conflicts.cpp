#include "bank_conflicts.h"

#include <algorithm>

namespace emulator {
namespace checker {

static constexpr uint32_t bank_count = 32;
static constexpr uint32_t bank_bytes = 4;

// Of one phase, in which lanes want at most 128 bytes: how many different words the busiest bank must deliver.
static int wavefronts(const uint32_t* offsets, unsigned lanes, unsigned lane_count, uint32_t size) {
  uint32_t words[bank_count][bank_count];
  int count[bank_count] = {};
  int most = 0;
  for (unsigned lane = 0; lane < lane_count; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const uint32_t first = offsets[lane] / bank_bytes, last = (offsets[lane] + size - 1) / bank_bytes;
    for (uint32_t word = first; word <= last; ++word) {
      const uint32_t bank = word % bank_count;
      uint32_t* const end = words[bank] + count[bank];
      if (std::find(words[bank], end, word) != end) continue;  // delivered to all who want it
      *end = word;
      most = std::max(most, ++count[bank]);
    }
  }
  return most;
}

// 32 lanes of up to 4 bytes are served at once, of 8 bytes half of them, of 16 bytes a quarter.
static int64_t extra_wavefronts(const uint32_t* offsets, unsigned lanes, uint32_t size) {
  const unsigned lanes_a_phase = warp_size * bank_bytes / std::max(size, bank_bytes);
  int64_t extra = 0;
  for (unsigned first = 0; first < warp_size; first += lanes_a_phase)
    extra += std::max(wavefronts(offsets + first, lanes >> first, lanes_a_phase, size) - 1, 0);
  return extra;
}

void BankConflicts::begin_launch(size_t resident_warps) {
  intervals_.clear();
  intervals_.resize(resident_warps);
  sites_.clear();
  site_numbers_.clear();
}

size_t BankConflicts::find_site(const void* code, uint32_t size, bool is_write) {
  const auto [found, is_new] = site_numbers_.try_emplace((uintptr_t)code, sites_.size());
  if (is_new) sites_.push_back({code, size, is_write, 0});
  return found->second;
}

void BankConflicts::note(const Thread& thread, const void* code, uint32_t offset, uint32_t size, bool is_write) {
  Interval& current_interval = interval(*thread.block, thread.warp);
  const size_t site = find_site(code, size, is_write);
  if (site >= current_interval.by_site.size()) current_interval.by_site.resize(site + 1);
  Executions& executions = current_interval.by_site[site];
  const size_t execution = executions.executed[thread.lane]++;
  if (executions.accesses.empty()) current_interval.used_sites.push_back(site);
  if (execution >= executions.accesses.size()) executions.accesses.emplace_back();
  WarpAccess& access = executions.accesses[execution];
  access.lanes |= 1u << thread.lane;
  access.offsets[thread.lane] = offset;
}

void BankConflicts::note_warp(const void* code, const uint32_t* offsets, uint32_t size, bool is_write) {
  sites_[find_site(code, size, is_write)].extra_wavefronts += extra_wavefronts(offsets, whole_warp, size);
}

void BankConflicts::end_interval(const Block& block, size_t warp) {
  Interval& ending = interval(block, warp);
  for (size_t site : ending.used_sites) {
    Executions& executions = ending.by_site[site];
    for (const WarpAccess& access : executions.accesses)
      sites_[site].extra_wavefronts += extra_wavefronts(access.offsets, access.lanes, sites_[site].size);
    executions.accesses.clear();
    std::fill(std::begin(executions.executed), std::end(executions.executed), 0);
  }
  ending.used_sites.clear();
}

const std::vector<ConflictSite>& BankConflicts::end_launch() {
  found_.clear();
  for (const Site& site : sites_) {
    if (!site.extra_wavefronts) continue;
    const int64_t read = site.is_write ? 0 : site.extra_wavefronts, written = site.is_write ? site.extra_wavefronts : 0;
    found_.push_back({site.code, read, written});
    settings->counters.extra_wavefronts_read += read;
    settings->counters.extra_wavefronts_written += written;
  }
  return found_;
}

}  // namespace checker
}  // namespace emulator
