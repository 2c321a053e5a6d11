// Fragments without tensor cores: float32 products by fma, with the interface of mma_fragments.cuh.
//
// A lane holds the same numbers of C as of an m16n8 fragment. For a step of 2 of K it reads what it needs of A and B
// from shared memory; neighbouring lanes read the same.
#pragma once
#include "../common/types.cuh"

struct Fma {
  static constexpr int K = 2, PAD = 4;
  typedef float FragmentA[2][2];  // rows g and g + 8 of A
  typedef float FragmentB[2][2];  // columns 2t and 2t + 1 of B, by k

  // A's rows m0 ... m0 + 15, of a tile stored [m][k] or, transposed, [k][m].
  template <bool TRANSPOSED>
  static DEVICE void load_a(FragmentA& a, const float* tile, int pitch, int m0, int k0) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (TRANSPOSED) {
#pragma unroll
        for (int k = 0; k < 2; ++k) a[half][k] = tile[(k0 + k) * pitch + m0 + g + half * 8];
      } else {
        const Group<float, 2> row = *(const Group<float, 2>*)(tile + (m0 + g + half * 8) * pitch + k0);
#pragma unroll
        for (int k = 0; k < 2; ++k) a[half][k] = row.at[k];
      }
    }
  }

  // B's columns n0 ... n0 + 15 as two fragments, of a tile stored [k][n] or, transposed, [n][k].
  template <bool TRANSPOSED_A, bool TRANSPOSED_B>
  static DEVICE void load_b(FragmentB& first, FragmentB& second, const float* tile, int pitch, int n0, int k0) {
    load_b<TRANSPOSED_B>(first, tile, pitch, n0, k0);
    load_b<TRANSPOSED_B>(second, tile, pitch, n0 + 8, k0);
  }

  // The first 8 columns of B for two steps of K, of a tile stored [k][n].
  static DEVICE void load_b_steps(FragmentB& first, FragmentB& second, const float* tile, int pitch, int k0) {
    load_b<false>(first, tile, pitch, 0, k0);
    load_b<false>(second, tile, pitch, 0, k0 + K);
  }

  static DEVICE void multiply(float (&c)[4], const FragmentA& a, const FragmentB& b) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[e] += a[e / 2][k] * b[k][e % 2];
  }

  // The sums of A's rows: of row g in element 0, of row g + 8 in element 2, the same in all lanes of these rows.
  template <bool TRANSPOSED>
  static DEVICE void add_row_sums(float (&sums)[4], const FragmentA& a, const float*, int, int, int) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int k = 0; k < 2; ++k) sums[half * 2] += a[half][k];
  }

  static DEVICE void finish_row_sums(float (&)[4]) {}

 private:
  template <bool TRANSPOSED>
  static DEVICE void load_b(FragmentB& b, const float* tile, int pitch, int n0, int k0) {
    const int n = n0 + (int)(threadIdx.x % 4) * 2;
    if (TRANSPOSED) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Group<float, 2> row = *(const Group<float, 2>*)(tile + (n + e) * pitch + k0);
#pragma unroll
        for (int k = 0; k < 2; ++k) b[k][e] = row.at[k];
      }
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const Group<float, 2> pair = *(const Group<float, 2>*)(tile + (k0 + k) * pitch + n);
        b[k][0] = pair.at[0], b[k][1] = pair.at[1];
      }
    }
  }
};
