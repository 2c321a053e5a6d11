// The products of a network's layers: which rows of a batch tile and which columns of a layer a warp computes, and c +=
// A B.
//
// A batch tile has up to 16 WARPS rows, a multiple of 32, of which `valid` belong to the split; the rest of the last 32
// is zero. A warp takes 16 of its rows through a layer. So in a full batch tile warps need not wait for each other on
// the way up. With half as many rows or fewer, several warps compute columns of the same rows.
//
// Fragments lie as mma_fragments.cuh says. A warp holds several pairs of them at a time, 16 columns a pair. To stay
// within its registers, code is instantiated for each number of pairs: a register that is written conditionally is live
// on every path.
#pragma once
#include "../common/activations.cuh"
#include "network_memory.cuh"

const int WARPS_LOG2 = WARPS == 8 ? 3 : 4;

// Steps of K that are unrolled: as many as registers last for (checked by gpuback._gates).
constexpr int unrolled_steps() {
  const bool float32 = sizeof(Element) == 4;
#ifdef MAX_WIDTH
  if (float32) return MAX_WIDTH < 128 ? 2 : 1;
  return WARPS > 8 && MAX_WIDTH > 64 ? 2 : 4;
#else
  return float32 ? 1 : 2;
#endif
}
const int UNROLLED = unrolled_steps();

// With 16 warps a thread has half the registers of one of 8 warps.
const int PAIRS = WIDEST < 64 || WARPS > 8 ? 2 : 4;  // of fragments that a warp takes at a time
const int FRAGMENTS = 2 * PAIRS;
const int SMOOTH_PAIRS = WARPS > 8 ? 1 : PAIRS;  // where a smooth activation follows, which takes registers of its own
const int AT_ONCE = WARPS > 8 ? 1 : 2;           // fragments that such an activation takes at a time

typedef float Tile[FRAGMENTS][4];  // 16 rows of a layer

// The rows of a batch tile that are this warp's, and its columns of a layer. Strips of 16 rows are numbered up to a
// power of two: some warps may be left over.
struct WarpRows {
  int warp, strips_log2;

  explicit DEVICE WarpRows(int valid) : warp(__shfl_sync(0xffffffffu, warp_index(), 0)), strips_log2(1) {
    while (16 << strips_log2 < used_rows(valid)) ++strips_log2;
  }
  DEVICE int row() const { return (warp & (1 << strips_log2) - 1) * 16; }
  DEVICE int warps_per_row_log2() const { return WARPS_LOG2 - strips_log2; }
  DEVICE int columns_per_warp(int columns) const { return ((columns / 16 - 1 >> warps_per_row_log2()) + 1) * 16; }
  DEVICE int first(int columns) const { return (warp >> strips_log2) * columns_per_warp(columns); }
  DEVICE int last(int columns) const { return min(columns, first(columns) + columns_per_warp(columns)); }

  // Waits for the warps that compute other columns of the same rows: then the rows are complete.
  DEVICE void wait() const {
    if (warps_per_row_log2())
      bar_sync(1 + row() / 16, 32 << warps_per_row_log2());
    else
      __syncwarp();
  }
};

template <int VALUE> struct Constant { static constexpr int value = VALUE; };

// How many pairs a warp takes at a time of the `columns` that are left, a multiple of 16: the most, or half as many, or
// ...
DEVICE int pairs_of(int columns, int activation) {
  int pairs = piecewise_linear(activation) ? PAIRS : SMOOTH_PAIRS;
  while (pairs * 16 > columns) pairs /= 2;
  return pairs;
}

// Calls body(pairs, as a constant): a runtime count would keep registers for all fragments live.
template <int COUNT = PAIRS, typename Body>
DEVICE void with_pairs(int pairs, Body body) {
  if constexpr (COUNT > 1)
    if (pairs < COUNT) return with_pairs<COUNT / 2>(pairs, body);
  body(Constant<COUNT>());
}

// c += A B for 16 rows of A, stored [m][k], and COUNT times 16 columns of B, stored [k][n] or, transposed, [n][k]: one
// step of K, at k.
template <bool TRANSPOSED_B, int COUNT>
DEVICE void add_step(Tile& c, const Element* a_tile, int a_pitch, const Element* b_tile, int b_pitch, int k) {
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

// All steps of K up to k1, if k1 and the width of the rows are WIDTH: then the compiler knows every address. Else does
// nothing and returns false.
template <bool TRANSPOSED_B, int WIDTH, int COUNT>
DEVICE bool add_full_width_product(Tile& c, const Element* a_tile, int a_pitch, const Element* b_tile, int b_pitch,
                                   int k1) {
  const int pitch = WIDTH + Unit::PAD;
  if (k1 != WIDTH || a_pitch != pitch || b_pitch != pitch) return false;
#pragma unroll UNROLLED
  for (int k = 0; k < WIDTH; k += Unit::K) add_step<TRANSPOSED_B, COUNT>(c, a_tile, pitch, b_tile, pitch, k);
  return true;
}

// All steps of K up to k1, a multiple of 16.
template <bool TRANSPOSED_B, int COUNT>
DEVICE void add_product(Tile& c, const Element* a_tile, int a_pitch, const Element* b_tile, int b_pitch, int k1) {
  if (COUNT == PAIRS || WARPS > 8) {
    if (add_full_width_product<TRANSPOSED_B, WIDEST, COUNT>(c, a_tile, a_pitch, b_tile, b_pitch, k1)) return;
#ifndef MAX_WIDTH
    if (add_full_width_product<TRANSPOSED_B, WIDEST / 2, COUNT>(c, a_tile, a_pitch, b_tile, b_pitch, k1)) return;
#endif
  }
#pragma unroll 1
  for (int k = 0; k < k1; k += Unit::K) {
    add_step<TRANSPOSED_B, COUNT>(c, a_tile, a_pitch, b_tile, b_pitch, 0);
    a_tile += Unit::K, b_tile += TRANSPOSED_B ? Unit::K : Unit::K * b_pitch;
  }
}
