// Sums of products as tensor cores form them: the operands' formats, and c + the products of one instruction.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

// ---- Operands

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

// Eight neighbours in a row of B or C, in one register of the host.
using Floats = float __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));
using Integers = int32_t __attribute__((vector_size(32)));
using LongIntegers = int64_t __attribute__((vector_size(64)));

// C (16 x 8) += A B over as many products.
template <int depth>
struct Tile {
  float a[16][depth];
  Floats b[depth];
  Floats c[16];
};

// ---- Sums

// Every product is exact in float32; every addition rounds.
template <int depth>
static inline void add_products(Tile<depth>& tile) {
  for (int i = 0; i < 16; ++i) {
    Floats sums = tile.c[i];
    for (int k = 0; k < depth; ++k) sums += tile.a[i][k] * tile.b[k];
    tile.c[i] = sums;
  }
}

static inline float toward_zero(double value) {
  const float nearest = (float)value;
  const bool is_beyond = std::isfinite(nearest) && std::fabs((double)nearest) > std::fabs(value);
  return is_beyond ? std::nextafterf(nearest, 0.0f) : nearest;
}

// A double's exponent bits alone are the power of two at its leading one.
static inline Doubles leading_power(const Doubles& values) {
  return (Doubles)((LongIntegers)values & 0x7ff0000000000000);
}

// c + Σ a b to the bits of Hopper's tensor cores: all terms are aligned to the largest, whose power of two is that of its
// operands' leading ones, cut off 25 bits below it, summed exactly, and the sum is cut off to float32.
template <int depth>
static inline void add_products_truncating(Tile<depth>& tile) {
  constexpr int terms = depth + 1;
  for (int i = 0; i < 16; ++i) {
    Doubles term[terms], plain_sums{};
    term[depth] = __builtin_convertvector(tile.c[i], Doubles);
    Doubles largest = leading_power(term[depth]);
    for (int k = 0; k < depth; ++k) {
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

}  // namespace emulator
