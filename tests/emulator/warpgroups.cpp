// What a warpgroup does: issuing matrix products and waiting for them, setting its number of registers.
#include "warpgroups.h"

#include <algorithm>
#include <cstring>

#include "checker.h"
#include "failures.h"

namespace emulator {

static WarpGroup& find_warpgroup(const char* instruction, const void* code) {
  Block& block = *current->block;
  const size_t number = current->index / warpgroup_size;
  if (number >= block.warpgroups.size())
    fail(code, "%s: a block of %d threads has %zu whole warpgroups", instruction, launch->block,
         block.warpgroups.size());
  return block.warpgroups[number];
}

// Registers of products under way hold this, a NaN.
static constexpr uint32_t poisoned = 0xffffffffu;

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- Fences of registers. A thread's stack is its registers: a fence keeps what it holds, to be compared later.

void fence_registers() {
  current->has_fenced_registers = true;
  if (!settings->checked) return;
  current->fenced_from = (const char*)__builtin_frame_address(0);
  current->fenced_registers.assign(current->fenced_from, (const char*)current->stack->begin + Stack::size);
}

// Where the fence kept these registers; null if they came into being later.
static char* find_fenced(const void* registers) {
  const char* const place = (const char*)registers;
  return place < current->fenced_from ? nullptr : &current->fenced_registers[place - current->fenced_from];
}

static void require_fenced(const void* registers, size_t size, const char* name, const void* code) {
  const char* const fenced = find_fenced(registers);
  if (!fenced || memcmp(fenced, registers, size))
    fail(code, "wgmma: %s's registers were written after the latest wgmma.fence", name);
}

// ---- Issuing products

// The thread's part of the sums, as kernels/common/ptx_sm90.cuh describes it.
static float* sums_of(Accumulator& accumulator, unsigned thread) {
  return &accumulator.sums[(size_t)(thread / 32 * 16 + thread % 32 / 4) * accumulator.columns() + thread % 4 * 2];
}

// Takes the thread's registers of d into the accumulator, unless earlier products have.
static void take_registers(Accumulator& accumulator, const WarpgroupProduct& product, const void* code) {
  const unsigned thread = current->index % warpgroup_size;
  float*& registers = accumulator.registers[thread];
  if (registers == product.d) return;
  if (registers) fail(code, "wgmma: threads of this warpgroup add to different accumulators");
  registers = product.d;
  ++accumulator.holders;
  if (settings->checked && product.accumulate)
    require_fenced(product.d, accumulator.count * sizeof(float), "d", code);
  float* const sums = sums_of(accumulator, thread);
  for (int i = 0; i < accumulator.count; i += 4) {
    memcpy(sums + i * 2, product.d + i, 8);
    memcpy(sums + 8 * accumulator.columns() + i * 2, product.d + i + 2, 8);
  }
  memset(product.d, 0xff, accumulator.count * sizeof(float));
}

static void give_registers_back(Accumulator& accumulator, const void* code) {
  const unsigned thread = current->index % warpgroup_size;
  float* const registers = accumulator.registers[thread];
  for (int i = 0; i < accumulator.count; ++i)
    if (bits_of(registers[i]) != poisoned)
      fail(code, "wgmma: accumulator register %d was written while a product was under way", i);
  const float* const sums = sums_of(accumulator, thread);
  for (int i = 0; i < accumulator.count; i += 4) {
    memcpy(registers + i, sums + i * 2, 8);
    memcpy(registers + i + 2, sums + 8 * accumulator.columns() + i * 2, 8);
  }
  accumulator.registers[thread] = nullptr;
  --accumulator.holders;
  if (!settings->checked) return;
  char* const fenced = find_fenced(registers);
  if (fenced) memcpy(fenced, registers, accumulator.count * sizeof(float));  // what products write needs no fence
}

// The one that this thread's registers belong to: products under way add to them, or this one is the first.
static Accumulator& find_accumulator(WarpGroup& warpgroup, const WarpgroupProduct& product, const void* code) {
  const unsigned thread = current->index % warpgroup_size;
  for (Accumulator& accumulator : warpgroup.accumulators) {
    float* const registers = accumulator.registers[thread];
    if (!registers || registers + accumulator.count <= product.d || product.d + product.registers <= registers)
      continue;
    if (registers != product.d || accumulator.count != product.registers)
      fail(code, "wgmma: d overlaps %d registers that a product under way adds to", accumulator.count);
    return accumulator;
  }
  Accumulator& accumulator = warpgroup.accumulators.emplace_back();
  accumulator.count = product.registers;
  accumulator.sums.resize((size_t)64 * accumulator.columns());
  return accumulator;
}

static void require_descriptor(uint64_t descriptor, int rows, bool transposed, char operand, const void* code) {
  const int layout = descriptor >> 62;
  if (layout != 1 && layout != 2)
    fail(code, "wgmma: the descriptor of %c has layout %d, expected 1 (128-byte swizzle) or 2 (64)", operand, layout);
  if (descriptor >> 49 & 7) fail(code, "wgmma: the descriptor of %c has base offset %d, expected 0", operand,
                                 (int)(descriptor >> 49 & 7));
  for_each_chunk(descriptor, rows, transposed, [&](uint32_t chunk, int row, int k) {
    if (chunk + 16 > launch->shared_bytes)
      fail(code, "wgmma: the descriptor of %c leads outside shared memory: row %d, k %d lies at byte %u (%lld bytes)",
           operand, row, k, chunk, (long long)launch->shared_bytes);
  });
}

static bool is_same(const WarpgroupProduct& one, const WarpgroupProduct& other) {
  return one.registers == other.registers && !one.a_registers == !other.a_registers && one.a == other.a &&
         one.b == other.b && one.is_f16 == other.is_f16 && one.transpose_a == other.transpose_a &&
         one.transpose_b == other.transpose_b && one.accumulate == other.accumulate;
}

static IssuedProduct& begin_product(WarpGroup& warpgroup, const WarpgroupProduct& product, const void* code) {
  if (!product.a_registers) require_descriptor(product.a, 64, product.transpose_a, 'A', code);
  require_descriptor(product.b, 2 * product.registers, product.transpose_b, 'B', code);
  ++settings->counters.warpgroup_products;
  warpgroup.products.emplace_back();
  IssuedProduct& issued = warpgroup.products.back();
  issued.what = product;
  issued.accumulator = &find_accumulator(warpgroup, product, code);
  issued.accumulator->latest_group = issued.group = current->open_product_group;
  issued.issuers = issued.waiters = 0;
  issued.code = code;
  issued.is_done = false;
  return issued;
}

static void carry_out_before(WarpGroup& warpgroup, const Block& block, int group) {
  for (IssuedProduct& product : warpgroup.products) {
    if (product.group >= group || product.issuers < warpgroup_size) return;
    if (!product.is_done) carry_out(product, block.shared_memory);
    product.is_done = true;
  }
}

// Those that wait for the product of this number, which all threads have issued now.
static void wake_waiting(WarpGroup& warpgroup, unsigned number) {
  std::vector<Thread*>& waiting = warpgroup.waiting;
  const auto others = std::partition(waiting.begin(), waiting.end(),
                                     [&](const Thread* thread) { return thread->awaited_product == number; });
  for (auto thread = waiting.begin(); thread != others; ++thread) make_ready(*thread);
  waiting.erase(waiting.begin(), others);
}

void multiply_warpgroup(const WarpgroupProduct& product) {
  const void* code = __builtin_return_address(0);
  WarpGroup& warpgroup = find_warpgroup("wgmma", code);
  if (!current->has_fenced_registers) fail(code, "wgmma: no wgmma.fence stands before this warpgroup's first product");
  const unsigned position = current->products_issued++ - warpgroup.first_product;
  const unsigned thread = current->index % warpgroup_size;
  if (position == warpgroup.products.size()) begin_product(warpgroup, product, code);
  IssuedProduct& issued = warpgroup.products[position];
  if (!is_same(issued.what, product) || issued.group != current->open_product_group)
    fail(code, "wgmma: threads of this warpgroup issue different products, or in different groups");
  if (settings->checked && current->lane == 0) checker::product_issued(current, product, code);
  take_registers(*issued.accumulator, product, code);
  issued.a_registers[thread] = product.a_registers;
  if (product.a_registers) {
    if (settings->checked) require_fenced(product.a_registers, sizeof issued.a_at_issue[thread], "A", code);
    memcpy(issued.a_at_issue[thread], product.a_registers, sizeof issued.a_at_issue[thread]);
  }
  if (++issued.issuers < warpgroup_size) return;
  wake_waiting(warpgroup, current->products_issued - 1);
  if (lands_at_once()) carry_out_before(warpgroup, *current->block, current->open_product_group + 1);
}

void close_product_group() { ++current->open_product_group; }

// ---- Waiting for them. A thread waits for its own; that takes all threads to have issued them.

static IssuedProduct& product_number(WarpGroup& warpgroup, unsigned number) {
  return warpgroup.products[number - warpgroup.first_product];
}

// The thread's registers belong to it again. A's must be as they were.
static void end_product(WarpGroup& warpgroup, IssuedProduct& product) {
  const unsigned thread = current->index % warpgroup_size;
  const uint32_t* const a = product.a_registers[thread];
  if (a && memcmp(a, product.a_at_issue[thread], sizeof product.a_at_issue[thread]))
    fail(product.code, "wgmma: A's registers were written while the product was under way");
  ++product.waiters;
  while (!warpgroup.products.empty() && warpgroup.products.front().waiters == warpgroup_size) {
    warpgroup.products.pop_front();
    ++warpgroup.first_product;
  }
}

void wait_for_products(int groups_under_way) {
  const void* code = __builtin_return_address(0);
  WarpGroup& warpgroup = find_warpgroup("wgmma.wait_group", code);
  const int group = current->open_product_group - groups_under_way;
  unsigned end = current->products_ended;
  while (end < current->products_issued && product_number(warpgroup, end).group < group) ++end;
  if (end > current->products_ended && product_number(warpgroup, end - 1).issuers < warpgroup_size) {
    current->awaited_product = end - 1;
    warpgroup.waiting.push_back(current);
    wait_at("wgmma.wait_group", code);
  }
  carry_out_before(warpgroup, *current->block, group);
  for (; current->products_ended < end; ++current->products_ended)
    end_product(warpgroup, product_number(warpgroup, current->products_ended));
  for (Accumulator& accumulator : warpgroup.accumulators)
    if (accumulator.registers[current->index % warpgroup_size] && accumulator.latest_group < group)
      give_registers_back(accumulator, code);
  warpgroup.accumulators.remove_if([](const Accumulator& accumulator) { return accumulator.holders == 0; });
  if (settings->checked) checker::products_waited_for(current, group);
  maybe_step_aside();
}

void require_products_were_waited_for(Thread* thread) {
  if (thread->products_ended == thread->products_issued) return;
  WarpGroup& warpgroup = thread->block->warpgroups[thread->index / warpgroup_size];
  fail(product_number(warpgroup, thread->products_ended).code,
       "returns while this product of its warpgroup is under way");
}

// ---- Numbers of registers

static constexpr int registers_of_block = 65536;

// The most that a kernel for blocks of this size can be compiled for; with how many it was is not known here.
static int registers_at_launch() { return std::min(registers_of_block / launch->block / 8 * 8, 256); }

void begin_warpgroups(Block& block) {
  for (WarpGroup& warpgroup : block.warpgroups) {
    warpgroup = WarpGroup{};
    warpgroup.registers = registers_at_launch();
  }
  for (Thread& thread : block.threads) {
    thread.products_issued = thread.products_ended = 0;
    thread.open_product_group = 0;
    thread.has_fenced_registers = false;
  }
}

// Lets warpgroups go on that all of whose threads have come, if there are registers for them.
static void grant_registers(Block& block) {
  const int rest = launch->block % warpgroup_size;
  int available = registers_at_launch() * (launch->block - rest);
  for (const WarpGroup& warpgroup : block.warpgroups) available -= warpgroup.registers * (int)warpgroup_size;
  for (bool granted = true; granted;) {  // what one gives back, another may have waited for
    granted = false;
    for (WarpGroup& warpgroup : block.warpgroups) {
      if (warpgroup.setting.size() < warpgroup_size) continue;
      const int more = (warpgroup.wanted_registers - warpgroup.registers) * (int)warpgroup_size;
      if (more > available) continue;
      available -= more;
      granted = true;
      warpgroup.registers = warpgroup.wanted_registers;
      warpgroup.has_set_registers = true;
      for (Thread* thread : warpgroup.setting)
        if (thread != current) make_ready(thread);
      warpgroup.setting.clear();
    }
  }
}

void set_registers(int count, bool increase) {
  const void* code = __builtin_return_address(0);
  const char* const instruction = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  WarpGroup& warpgroup = find_warpgroup(instruction, code);
  if (count % 8 || count < 24 || count > 256)
    fail(code, "%s: %d registers, expected a multiple of 8 from 24 to 256", instruction, count);
  if (warpgroup.setting.empty()) warpgroup.wanted_registers = count;
  if (warpgroup.wanted_registers != count)
    fail(code, "%s: %d registers, where others of this warpgroup want %d", instruction, count,
         warpgroup.wanted_registers);
  if (warpgroup.has_set_registers && (increase ? count < warpgroup.registers : count > warpgroup.registers))
    fail(code, "%s: to %d registers from %d", instruction, count, warpgroup.registers);
  warpgroup.setting.push_back(current);
  if (warpgroup.setting.size() == warpgroup_size) grant_registers(*current->block);
  if (!warpgroup.setting.empty()) wait_at(instruction, code);
  else maybe_step_aside();
}

}  // namespace emulator
