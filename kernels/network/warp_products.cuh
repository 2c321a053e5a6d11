// What a block does with a slab of samples on their way through a narrow network: forward pass, loss, backward pass, layer by layer, in
// shared memory. fused_step.cu has the kernels.
//
// A slab has up to 16 WARPS rows, a multiple of 32, of which `valid` belong to the chain; the rest of the last 32 is zero. A warp takes 16
// of its rows through a layer, so that in a full slab warps need not wait for each other on the way up; where there are half as many
// rows or fewer, warps share a layer's columns. Fragments lie as mma_fragments.cuh says.
#pragma once
#include "../common/activations.cuh"
#include "network_memory.cuh"

// How far products are unrolled: as far as registers last.
#ifdef MAX_WIDTH
const int WIDEST = MAX_WIDTH, UNROLLED = sizeof(OPERAND) == 4 ? (MAX_WIDTH < 128 ? 2 : 1) : WARPS > 8 && MAX_WIDTH > 64 ? 2 : 4;
#else
const int WIDEST = 128, UNROLLED = sizeof(OPERAND) == 2 ? 2 : 1;
#endif
const int PAIRS = WIDEST < 64 || WARPS > 8 ? 2 : 4;  // of fragments, 16 columns each, that a warp takes at a time
const int FRAGMENTS = 2 * PAIRS;
const int SMOOTH_PAIRS = WARPS > 8 ? 1 : PAIRS;  // where a smooth activation follows, which takes registers of its own
const int TOGETHER = WARPS > 8 ? 1 : 2;          // fragments that it takes at a time: more warps need less at once

typedef float Tile[FRAGMENTS][4];  // 16 rows of a layer

// Which rows of a slab are this warp's, and which share of their columns. Strips of 16 rows are taken for a power of two of them: some
// warps may be left over.
struct Place {
  int warp, strips_log2;

  explicit DEVICE Place(int valid) : warp(__shfl_sync(0xffffffffu, warp_index(), 0)), strips_log2(1) {
    while (16 << strips_log2 < used_rows(valid)) ++strips_log2;
  }
  DEVICE int row() const { return (warp & (1 << strips_log2) - 1) * 16; }
  DEVICE int sharing_log2() const { return WARPS_LOG2 - strips_log2; }
  DEVICE int share(int columns) const { return ((columns / 16 - 1 >> sharing_log2()) + 1) * 16; }
  DEVICE int first(int columns) const { return (warp >> strips_log2) * share(columns); }
  DEVICE int last(int columns) const { return min(columns, first(columns) + share(columns)); }

  // Behind it, the rows are complete.
  DEVICE void wait() const {
    if (sharing_log2())
      bar_sync(1 + row() / 16, 32 << sharing_log2());
    else
      __syncwarp();
  }
};

template <int VALUE> struct Constant { static constexpr int value = VALUE; };

// So many pairs are taken of `columns` that are left, a whole number of 16: all that can be taken at a time, or half as many, or ...
DEVICE int pairs_of(int columns, int activation) {
  int pairs = piecewise_linear(activation) ? PAIRS : SMOOTH_PAIRS;
  while (pairs * 16 > columns) pairs /= 2;
  return pairs;
}

// Calls body(`pairs`, known to the compiler): what is done with some fragments and not with others would take registers of all.
template <int COUNT = PAIRS, typename Body>
DEVICE void with_pairs(int pairs, Body body) {
  if constexpr (COUNT > 1)
    if (pairs < COUNT) return with_pairs<COUNT / 2>(pairs, body);
  body(Constant<COUNT>());
}

// c += A B for 16 rows of A, stored [m][k], and COUNT times 16 columns of B, stored [k][n] or, transposed, [n][k]: the step of K at k.
template <bool TRANSPOSED_B, int COUNT>
DEVICE void add_step(Tile& c, const OPERAND* a_tile, int a_pitch, const OPERAND* b_tile, int b_pitch, int k) {
  typename Unit::FragmentA a;
  Unit::template load_a<false>(a, a_tile, a_pitch, 0, k);
#pragma unroll
  for (int p = 0; p < COUNT; ++p) {
    typename Unit::FragmentB b[2];
    Unit::template load_b<false, TRANSPOSED_B>(b[0], b[1], b_tile, b_pitch, p * 16, k);
    Unit::multiply(c[2 * p], a, b[0]);
    Unit::multiply(c[2 * p + 1], a, b[1]);
  }
}

// All steps up to k1, where k1 and the rows' numbers are WIDTH, so that the compiler knows every address; else none, and false.
template <bool TRANSPOSED_B, int WIDTH, int COUNT>
DEVICE bool add_whole_product(Tile& c, const OPERAND* a_tile, int a_pitch, const OPERAND* b_tile, int b_pitch, int k1) {
  const int pitch = WIDTH + Unit::PAD;
  if (k1 != WIDTH || a_pitch != pitch || b_pitch != pitch) return false;
#pragma unroll UNROLLED
  for (int k = 0; k < WIDTH; k += Unit::K) add_step<TRANSPOSED_B, COUNT>(c, a_tile, pitch, b_tile, pitch, k);
  return true;
}

// All steps up to k1, a whole number of 16.
template <bool TRANSPOSED_B, int COUNT>
DEVICE void add_product(Tile& c, const OPERAND* a_tile, int a_pitch, const OPERAND* b_tile, int b_pitch, int k1) {
  if (COUNT == PAIRS || WARPS > 8) {
    if (add_whole_product<TRANSPOSED_B, WIDEST, COUNT>(c, a_tile, a_pitch, b_tile, b_pitch, k1)) return;
#ifndef MAX_WIDTH
    if (add_whole_product<TRANSPOSED_B, WIDEST / 2, COUNT>(c, a_tile, a_pitch, b_tile, b_pitch, k1)) return;
#endif
  }
#pragma unroll 1
  for (int k = 0; k < k1; k += Unit::K) {
    add_step<TRANSPOSED_B, COUNT>(c, a_tile, a_pitch, b_tile, b_pitch, 0);
    a_tile += Unit::K, b_tile += TRANSPOSED_B ? Unit::K : Unit::K * b_pitch;
  }
}
