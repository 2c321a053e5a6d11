// Copies of boxes between global and shared memory (TMA).
#include <cstring>

#include "checker.h"
#include "failures.h"

namespace emulator {

static std::vector<BoxLoad> loads_under_way;  // of all blocks, oldest first

// ---- Maps

static BoxMap read_map(const unsigned long long* words, const char* instruction, const void* code) {
  BoxMap map;
  map.base = (unsigned char*)words[0];
  map.columns = words[1];
  map.rows = words[2];
  map.pitch = words[3];
  map.box_columns = (uint32_t)words[4];
  map.box_rows = words[4] >> 32;
  map.swizzle = words[5] >> 32;
  map.parameter = -1;
  const Entry& entry = *launch->entry;
  for (int i = 0; i < entry.parameter_count && map.parameter < 0; ++i)
    if (!entry.parameters[i].is_pointer && entry.parameters[i].size == 128 && !memcmp(launch->arguments[i], words, 128))
      map.parameter = i;
  if (map.parameter < 0) fail(code, "%s: the map is no parameter of the kernel", instruction);
  if (!map.base) fail(code, "%s: the map is empty", instruction);
  if ((uintptr_t)map.base % 16 || map.pitch % 16)
    fail(code, "%s: the matrix (%p) and its pitch (%lld bytes) must be multiples of 16 bytes", instruction, map.base,
         (long long)map.pitch);
  if ((uint32_t)words[5] != 2) fail(code, "%s: elements of %u bytes, expected 2", instruction, (uint32_t)words[5]);
  if (map.swizzle != 64 && map.swizzle != 128)
    fail(code, "%s: a swizzle of %d bytes, expected 64 or 128", instruction, map.swizzle);
  if (map.box_columns < 1 || map.row_bytes() > map.swizzle || map.row_bytes() % 16 || map.box_rows < 1 ||
      map.box_rows > 256)
    fail(code, "%s: a box of %d columns and %d rows; rows have at most the swizzle's %d bytes, a multiple of 16, and "
         "there are 1 to 256", instruction, map.box_columns, map.box_rows, map.swizzle);
  return map;
}

void prefetch_map(const unsigned long long* map) { read_map(map, "prefetch.tensormap", __builtin_return_address(0)); }

static void require_place(const BoxMap& map, uint32_t address, const char* instruction, const void* code) {
  if (address % 128) fail(code, "%s: byte %u of shared memory is no multiple of 128", instruction, address);
  if ((int64_t)address + map.bytes() > launch->shared_bytes)
    fail(code, "%s: %d bytes from byte %u of shared memory are outside (%lld bytes)", instruction, map.bytes(),
         address, (long long)launch->shared_bytes);
}

// ---- To shared memory

static void land(const BoxLoad& load) {
  Thread* const was = current;
  current = load.issuer;  // the one to blame
  unsigned char* const memory = load.issuer->block->shared_memory;
  for_each_chunk(load.map, load.destination, load.column, load.row,
                 [&](uint32_t chunk, const unsigned char* source, int before, int valid) {
                   memset(memory + chunk, 0, 16);
                   if (valid) memcpy(memory + chunk + before * 2, source, valid * 2);
                 });
  count_landed_bytes(load);
  current = was;
}

bool land_a_box() {
  if (loads_under_way.empty()) return false;
  const size_t which = settings->landing == Landing::random ? random_number() % loads_under_way.size() : 0;
  const BoxLoad load = loads_under_way[which];
  loads_under_way.erase(loads_under_way.begin() + which);
  land(load);
  return true;
}

void maybe_land_a_box() {
  if (settings->landing == Landing::random && !loads_under_way.empty() && random_number() % 64 == 0) land_a_box();
}

void forget_boxes() { loads_under_way.clear(); }

void load_box(uint32_t destination, const unsigned long long* words, uint32_t barrier, int column, int row) {
  const void* code = __builtin_return_address(0);
  const BoxMap map = read_map(words, "tma_load_2d", code);
  require_place(map, destination, "tma_load_2d", code);
  const unsigned phase = find_mbarrier(*current->block, barrier, code).phase;
  ++settings->counters.bulk_loads;
  const BoxLoad load{map, destination, barrier, column, row, phase, current, code};
  if (settings->checked) checker::load_issued(load);
  if (lands_at_once()) land(load);
  else loads_under_way.push_back(load);
  maybe_step_aside();
}

void require_no_boxes_under_way(const Block& block) {
  for (const BoxLoad& load : loads_under_way)
    if (load.issuer->block == &block)
      fail(load.code, "the block ends while this copy to its shared memory is under way");
}

// ---- From shared memory

static void read(BoxStore& store, const Block& block) {
  if (!store.content.empty()) return;
  store.content.resize(store.map.bytes());
  size_t position = 0;
  for_each_chunk(store.map, store.source, store.column, store.row, [&](uint32_t chunk, void*, int, int) {
    memcpy(&store.content[position], block.shared_memory + chunk, 16);
    position += 16;
  });
}

static void write(BoxStore& store) {
  if (store.is_written) return;
  store.is_written = true;
  size_t position = 0;
  for_each_chunk(store.map, store.source, store.column, store.row,
                 [&](uint32_t, unsigned char* target, int before, int valid) {
                   if (valid) memcpy(target, &store.content[position + before * 2], valid * 2);
                   position += 16;
                 });
}

void store_box(const unsigned long long* words, uint32_t source, int column, int row) {
  const void* code = __builtin_return_address(0);
  const BoxMap map = read_map(words, "tma_store_2d", code);
  require_place(map, source, "tma_store_2d", code);
  ++settings->counters.bulk_stores;
  StoreQueue& queue = current->stores;
  queue.under_way.push_back({map, source, column, row, queue.open_group, false, false, {}});
  if (settings->checked) checker::store_issued(current, queue.under_way.back(), code);
  if (lands_at_once()) read(queue.under_way.back(), *current->block);
  maybe_step_aside();
}

void close_store_group() { ++current->stores.open_group; }

void wait_for_stores(int groups_under_way, bool only_reads) {
  StoreQueue& queue = current->stores;
  const int before_group = queue.open_group - groups_under_way;
  size_t count = 0;
  for (; count < queue.under_way.size() && queue.under_way[count].group < before_group; ++count) {
    BoxStore& store = queue.under_way[count];
    store.was_waited_for = true;
    read(store, *current->block);
    if (!only_reads || lands_at_once()) write(store);
  }
  if (!only_reads) queue.under_way.erase(queue.under_way.begin(), queue.under_way.begin() + count);
  if (settings->checked) checker::stores_waited_for(current, before_group, only_reads);
}

void require_stores_have_read(Thread* thread) {
  for (BoxStore& store : thread->stores.under_way) {
    if (!store.was_waited_for) fail(nullptr, "returns while its copies still read shared memory (bulk_wait_read)");
    write(store);
  }
  thread->stores.under_way.clear();
}

void fence_proxies() {
  if (settings->checked) checker::proxies_fenced(current);
}

}  // namespace emulator
