// ldmatrix, stmatrix and mma. The layouts of fragments are described in kernels/common/ptx.cuh.
#include <cstring>

#include "checker.h"
#include "failures.h"
#include "products.h"

namespace emulator {

// The 16 bytes of a matrix's row that a lane names.
static void require_row(const char* instruction, const void* row, const void* code) {
  const ptrdiff_t offset = (const unsigned char*)row - current->block->shared_memory;
  if (offset % 16)
    fail(code, "%s: the row's address, byte %td of shared memory, is no multiple of 16", instruction, offset);
  if (offset < 0 || offset + 16 > launch->shared_bytes)
    fail(code, "%s: the row, byte %td of shared memory, is outside (%lld bytes)", instruction, offset,
         (long long)launch->shared_bytes);
}

template <class Argument>
static void check_rows(Thread* const* threads, void* const* arguments, bool is_write) {
  const void* rows[warp_size];
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const Argument& argument = *(Argument*)arguments[lane];
    rows[lane] = argument.row;
    checker::access_row(threads[lane], argument.row, is_write, argument.code);
  }
  checker::matrix_rows(rows, is_write, ((Argument*)arguments[0])->code);
}

// ---- ldmatrix

namespace {

struct LoadArgument {
  uint32_t* fragment;
  const unsigned char* row;
  const void* code;
};

}  // namespace

template <bool transposed>
static void perform_load(Thread* const* threads, void* const* arguments, unsigned) {
  ++settings->counters.matrix_loads;
  uint16_t matrices[4][8][8];
  for (unsigned lane = 0; lane < warp_size; ++lane)
    memcpy(matrices[lane / 8][lane % 8], ((LoadArgument*)arguments[lane])->row, 16);
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = transposed ? matrices[i][pair][group] : matrices[i][group][pair];
      const uint32_t second = transposed ? matrices[i][pair + 1][group] : matrices[i][group][pair + 1];
      ((LoadArgument*)arguments[lane])->fragment[i] = first | second << 16;
    }
  }
  if (settings->checked) check_rows<LoadArgument>(threads, arguments, false);
}

void load_matrices(uint32_t* fragment, const void* row, bool transposed) {
  static constexpr WarpOperation plain{"ldmatrix", perform_load<false>, true, false};
  static constexpr WarpOperation with_transposition{"ldmatrix.trans", perform_load<true>, true, false};
  const void* code = __builtin_return_address(0);
  require_row("ldmatrix", row, code);
  LoadArgument argument{fragment, (const unsigned char*)row, code};
  meet(whole_warp, transposed ? with_transposition : plain, &argument, code);
}

// ---- stmatrix

namespace {

struct StoreArgument {
  const uint32_t* fragment;
  unsigned char* row;
  const void* code;
};

}  // namespace

static void perform_store(Thread* const* threads, void* const* arguments, unsigned) {
  for (unsigned matrix = 0; matrix < 4; ++matrix)
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      const StoreArgument& row = *(StoreArgument*)arguments[matrix * 8 + lane / 4];
      memcpy(row.row + lane % 4 * 4, &((StoreArgument*)arguments[lane])->fragment[matrix], 4);
    }
  if (settings->checked) check_rows<StoreArgument>(threads, arguments, true);
}

void store_matrices(void* row, const uint32_t* fragment) {
  static constexpr WarpOperation operation{"stmatrix", perform_store, true, false};
  const void* code = __builtin_return_address(0);
  require_row("stmatrix", row, code);
  StoreArgument argument{fragment, (unsigned char*)row, code};
  meet(whole_warp, operation, &argument, code);
}

// ---- mma

namespace {

struct ProductArgument {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

}  // namespace

template <class Operand>
static void put_operands(Tile<Operand::depth>& tile, const ProductArgument& lane, unsigned group, unsigned position) {
  for (unsigned i = 0; i < 4; ++i) {
    float* const pair = &tile.a[group + i % 2 * 8][position * 2 + i / 2 * 8];
    pair[0] = Operand::value((uint16_t)lane.a[i]);
    pair[1] = Operand::value((uint16_t)(lane.a[i] >> 16));
  }
  for (unsigned i = 0; i < 2; ++i) {
    const unsigned row = position * 2 + i * 8;
    tile.b[row][group] = Operand::value((uint16_t)lane.b[i]);
    tile.b[row + 1][group] = Operand::value((uint16_t)(lane.b[i] >> 16));
  }
}

template <>
void put_operands<Tf32>(Tile<Tf32::depth>& tile, const ProductArgument& lane, unsigned group, unsigned position) {
  for (unsigned i = 0; i < 4; ++i) tile.a[group + i % 2 * 8][position + i / 2 * 4] = Tf32::value(lane.a[i]);
  for (unsigned i = 0; i < 2; ++i) tile.b[position + i * 4][group] = Tf32::value(lane.b[i]);
}

template <class Operand>
static void perform_product(Thread* const*, void* const* arguments, unsigned) {
  ++settings->counters.matrix_products;
  Tile<Operand::depth> tile;
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const ProductArgument& argument = *(ProductArgument*)arguments[lane];
    const unsigned group = lane / 4, position = lane % 4;
    put_operands<Operand>(tile, argument, group, position);
    memcpy((float*)&tile.c[group] + position * 2, argument.c, 8);
    memcpy((float*)&tile.c[group + 8] + position * 2, argument.c + 2, 8);
  }
  if (settings->truncate) add_products_truncating(tile);
  else add_products(tile);
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const ProductArgument& argument = *(ProductArgument*)arguments[lane];
    const unsigned group = lane / 4, position = lane % 4;
    memcpy(argument.c, (float*)&tile.c[group] + position * 2, 8);
    memcpy(argument.c + 2, (float*)&tile.c[group + 8] + position * 2, 8);
  }
}

void multiply_bf16(float* c, const uint32_t* a, const uint32_t* b) {
  static constexpr WarpOperation operation{"mma.m16n8k16.bf16", perform_product<Bf16>, true, false};
  ProductArgument argument{c, a, b};
  meet(whole_warp, operation, &argument, __builtin_return_address(0));
}

void multiply_f16(float* c, const uint32_t* a, const uint32_t* b) {
  static constexpr WarpOperation operation{"mma.m16n8k16.f16", perform_product<F16>, true, false};
  ProductArgument argument{c, a, b};
  meet(whole_warp, operation, &argument, __builtin_return_address(0));
}

void multiply_tf32(float* c, const uint32_t* a, const uint32_t* b) {
  static constexpr WarpOperation operation{"mma.m16n8k8.tf32", perform_product<Tf32>, true, false};
  ProductArgument argument{c, a, b};
  meet(whole_warp, operation, &argument, __builtin_return_address(0));
}

}  // namespace emulator
