// ldmatrix and mma. The layouts of fragments are described in kernels/common/ptx.cuh.
#include <cmath>
#include <cstring>

#include "checker.h"
#include "failures.h"

namespace emulator {

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
  if (!settings->checked) return;
  const void* rows[warp_size];
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const LoadArgument& argument = *(LoadArgument*)arguments[lane];
    rows[lane] = argument.row;
    checker::read_row(threads[lane], argument.row, argument.code);
  }
  checker::matrix_rows(rows, ((LoadArgument*)arguments[0])->code);
}

void load_matrices(uint32_t* fragment, const void* row, bool transposed) {
  static constexpr WarpOperation plain{"ldmatrix", perform_load<false>, true, false};
  static constexpr WarpOperation with_transposition{"ldmatrix.trans", perform_load<true>, true, false};
  const void* code = __builtin_return_address(0);
  const ptrdiff_t offset = (const unsigned char*)row - current->block->shared_memory;
  if (offset % 16) fail(code, "ldmatrix: the row's address, byte %td of shared memory, is no multiple of 16", offset);
  if (offset < 0 || offset + 16 > launch->shared_bytes)
    fail(code, "ldmatrix: the row, byte %td of shared memory, is outside (%lld bytes)", offset,
         (long long)launch->shared_bytes);
  LoadArgument argument{fragment, (const unsigned char*)row, code};
  meet(whole_warp, transposed ? with_transposition : plain, &argument, code);
}

// ---- Operands

namespace {

struct Bf16 {
  static constexpr int depth = 16;
  static float value(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float result;
    memcpy(&result, &wide, 4);
    return result;
  }
};

struct F16 {
  static constexpr int depth = 16;
  static float value(uint16_t bits) {
    const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    float result;
    memcpy(&result, &magnitude, 4);
    result *= 0x1p112f;  // exact; makes infinity and NaN of 2^16 and above
    if (magnitude >= 0x7c00u << 13) result = magnitude == 0x7c00u << 13 ? INFINITY : NAN;
    uint32_t result_bits;
    memcpy(&result_bits, &result, 4);
    result_bits |= sign;
    memcpy(&result, &result_bits, 4);
    return result;
  }
};

struct Tf32 {
  static constexpr int depth = 8;
  static float value(uint32_t bits) {
    bits &= 0xffffe000u;  // the hardware reads no more
    float result;
    memcpy(&result, &bits, 4);
    return result;
  }
};

struct ProductArgument {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// Eight neighbours in a row of B or C, in one register of the host.
using Floats = float __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));
using Integers = int32_t __attribute__((vector_size(32)));
using LongIntegers = int64_t __attribute__((vector_size(64)));

template <class Operand>
struct Tile {
  float a[16][Operand::depth];
  Floats b[Operand::depth];
  Floats c[16];
};

}  // namespace

template <class Operand>
static void put_operands(Tile<Operand>& tile, const ProductArgument& lane, unsigned group, unsigned position) {
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
void put_operands(Tile<Tf32>& tile, const ProductArgument& lane, unsigned group, unsigned position) {
  for (unsigned i = 0; i < 4; ++i) tile.a[group + i % 2 * 8][position + i / 2 * 4] = Tf32::value(lane.a[i]);
  for (unsigned i = 0; i < 2; ++i) tile.b[position + i * 4][group] = Tf32::value(lane.b[i]);
}

// ---- Sums

// Every product is exact in float32; every addition rounds.
template <class Operand>
static void add_products(Tile<Operand>& tile) {
  for (int i = 0; i < 16; ++i) {
    Floats sums = tile.c[i];
    for (int k = 0; k < Operand::depth; ++k) sums += tile.a[i][k] * tile.b[k];
    tile.c[i] = sums;
  }
}

static float toward_zero(double value) {
  const float nearest = (float)value;
  const bool is_beyond = std::isfinite(nearest) && std::fabs((double)nearest) > std::fabs(value);
  return is_beyond ? std::nextafterf(nearest, 0.0f) : nearest;
}

// A double's exponent bits alone are the power of two at its leading one.
static Doubles leading_power(const Doubles& values) {
  return (Doubles)((LongIntegers)values & 0x7ff0000000000000);
}

// c + Σ a b to the bits of Hopper's tensor cores: all terms are aligned to the largest, whose power of two is that of its
// operands' leading ones, cut off 25 bits below it, summed exactly, and the sum is cut off to float32.
template <class Operand>
static void add_products_truncating(Tile<Operand>& tile) {
  constexpr int terms = Operand::depth + 1;
  for (int i = 0; i < 16; ++i) {
    Doubles term[terms], plain_sums{};
    term[Operand::depth] = __builtin_convertvector(tile.c[i], Doubles);
    Doubles largest = leading_power(term[Operand::depth]);
    for (int k = 0; k < Operand::depth; ++k) {
      const Doubles a = Doubles{} + (double)tile.a[i][k], b = __builtin_convertvector(tile.b[k], Doubles);
      term[k] = a * b;
      const Doubles power = leading_power(a) * leading_power(b);
      largest = power > largest ? power : largest;
    }
    for (const Doubles& values : term) plain_sums += values;
    // Terms divided by the unit stay below 2^27, for a product's leading one may stand one above its operands'.
    const Doubles unit = largest * 0x1p-25;
    LongIntegers sums{};
    for (const Doubles& values : term) sums += __builtin_convertvector(values / unit, LongIntegers);
    const Doubles results = __builtin_convertvector(sums, Doubles) * unit;
    for (int j = 0; j < 8; ++j) {
      const bool ordinary = std::isfinite(plain_sums[j]) && largest[j] > 0;
      tile.c[i][j] = ordinary ? toward_zero(results[j]) : (float)plain_sums[j];
    }
  }
}

// ---- mma

template <class Operand>
static void perform_product(Thread* const*, void* const* arguments, unsigned) {
  ++settings->counters.matrix_products;
  Tile<Operand> tile;
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const ProductArgument& argument = *(ProductArgument*)arguments[lane];
    const unsigned group = lane / 4, position = lane % 4;
    put_operands(tile, argument, group, position);
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
