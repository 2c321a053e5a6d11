// The arithmetic of wgmma: 64 x N += (64 x 16) (16 x N), to the bits of as many mma as it takes.
#include <cstring>

#include "launch.h"
#include "products.h"
#include "scheduler.h"

namespace emulator {

namespace {

constexpr int depth = 16;
constexpr int rows = 64;

// Operands as float32. Rows of B are as long as the widest product's.
struct Operands {
  float a[rows][depth];
  alignas(32) float b[depth][256];
};

}  // namespace

template <class Format>
static void read_chunk(const unsigned char* chunk, float (&values)[8]) {
  uint16_t bits[8];
  memcpy(bits, chunk, sizeof bits);
  for (int i = 0; i < 8; ++i) values[i] = Format::value(bits[i]);
}

// As kernels/common/ptx.cuh describes A's fragments, for each of the four warps.
template <class Format>
static void read_a_registers(Operands& operands, const IssuedProduct& product) {
  for (unsigned thread = 0; thread < warpgroup_size; ++thread) {
    const unsigned row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) {
      const uint32_t pair = product.a_registers[thread][i];
      float* const place = &operands.a[row + i % 2 * 8][column + i / 2 * 8];
      place[0] = Format::value((uint16_t)pair);
      place[1] = Format::value((uint16_t)(pair >> 16));
    }
  }
}

template <class Format>
static void read_operands(Operands& operands, const IssuedProduct& product, const unsigned char* memory) {
  const WarpgroupProduct& what = product.what;
  float values[8];
  if (what.a_registers) read_a_registers<Format>(operands, product);
  else
    for_each_chunk(what.a, rows, what.transpose_a, [&](uint32_t chunk, int row, int k) {
      read_chunk<Format>(memory + chunk, values);
      for (int i = 0; i < 8; ++i)
        operands.a[what.transpose_a ? row + i : row][what.transpose_a ? k : k + i] = values[i];
    });
  for_each_chunk(what.b, product.accumulator->columns(), what.transpose_b, [&](uint32_t chunk, int column, int k) {
    read_chunk<Format>(memory + chunk, values);
    if (what.transpose_b) memcpy(&operands.b[k][column], values, sizeof values);
    else
      for (int i = 0; i < 8; ++i) operands.b[k + i][column] = values[i];
  });
}

// Every product is exact in float32; every addition rounds. Eight rows at once keep the adders busy.
static void add_rounding(const Operands& operands, float* sums, int columns) {
  constexpr int at_once = 8;
  for (int row = 0; row < rows; row += at_once)
    for (int column = 0; column < columns; column += 8) {
      Floats sum[at_once];
      for (int i = 0; i < at_once; ++i) memcpy(&sum[i], sums + (row + i) * columns + column, sizeof sum[i]);
      for (int k = 0; k < depth; ++k) {
        const Floats b = *(const Floats*)&operands.b[k][column];
        for (int i = 0; i < at_once; ++i) sum[i] += operands.a[row + i][k] * b;
      }
      for (int i = 0; i < at_once; ++i) memcpy(sums + (row + i) * columns + column, &sum[i], sizeof sum[i]);
    }
}

static void add_truncating(const Operands& operands, float* sums, int columns) {
  for (int row = 0; row < rows; row += 16)
    for (int column = 0; column < columns; column += 8) {
      Tile<depth> tile;
      memcpy(tile.a, operands.a[row], sizeof tile.a);
      for (int k = 0; k < depth; ++k) tile.b[k] = *(const Floats*)&operands.b[k][column];
      for (int i = 0; i < 16; ++i) memcpy(&tile.c[i], sums + (row + i) * columns + column, sizeof tile.c[i]);
      add_products_truncating(tile);
      for (int i = 0; i < 16; ++i) memcpy(sums + (row + i) * columns + column, &tile.c[i], sizeof tile.c[i]);
    }
}

void carry_out(const IssuedProduct& product, const unsigned char* memory) {
  static Operands operands;
  if (product.what.is_f16) read_operands<F16>(operands, product, memory);
  else read_operands<Bf16>(operands, product, memory);
  std::vector<float>& sums = product.accumulator->sums;
  if (!product.what.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
  if (settings->truncate) add_truncating(operands, sums.data(), product.accumulator->columns());
  else add_rounding(operands, sums.data(), product.accumulator->columns());
}

}  // namespace emulator
