// Fragments for tensor cores: from tiles in shared memory to what a warp multiplies (ptx.cuh says which lane holds
// what).
//
// A tile's rows are stored PITCH elements apart, such that no access below meets itself in a bank:
//
//     16-bit   columns + 8      rows start 16 bytes further on in the 128 bytes of all banks, for ldmatrix
//     TF32     columns + 8      8 (or 24) banks further on; for B of da = da W, columns + 4: see below
//
// A step of K is 16 for 16-bit operands and 8 for TF32. Which number of a TF32 step stands where is ours to choose, as
// long as A and B agree. Where A is stored [m][k], a lane takes the neighbours k = 2t and 2t + 1 in one 8-byte access
// and B follows; where A is stored [k][m], k = t and t + 4.
#pragma once
#include "../common/types.cuh"

// Where element e (0 ... 3) of this lane's fragment of C lies in it.
DEVICE int fragment_row(int e) { return (int)(threadIdx.x % 32 / 4) + e / 2 * 8; }
DEVICE int fragment_column(int e) { return (int)(threadIdx.x % 4) * 2 + e % 2; }

template <typename T> struct Mma16Bit {
  static constexpr int K = 16, PAD = 8, PAD_PAIRS = 8;
  typedef uint32 FragmentA[4];
  typedef uint32 FragmentB[2];

  // A's rows m0 ... m0 + 15, of a tile stored [m][k] or, transposed, [k][m].
  template <bool TRANSPOSED>
  static DEVICE void load_a(uint32 (&a)[4], const T* tile, int pitch, int m0, int k0) {
    const int lane = threadIdx.x % 32;
    if (TRANSPOSED)
      ldmatrix_x4_trans(a, tile + (k0 + lane / 16 * 8 + lane % 8) * pitch + m0 + lane / 8 % 2 * 8);
    else
      ldmatrix_x4(a, tile + (m0 + lane % 16) * pitch + k0 + lane / 16 * 8);
  }

  // B's columns n0 ... n0 + 15 as two fragments, of a tile stored [k][n] or, transposed, [n][k].
  template <bool TRANSPOSED_A, bool TRANSPOSED_B>
  static DEVICE void load_b(uint32 (&first)[2], uint32 (&second)[2], const T* tile, int pitch, int n0, int k0) {
    const int lane = threadIdx.x % 32;
    uint32 b[4];
    if (TRANSPOSED_B)
      ldmatrix_x4(b, tile + (n0 + lane / 16 * 8 + lane % 8) * pitch + k0 + lane / 8 % 2 * 8);
    else
      ldmatrix_x4_trans(b, tile + (k0 + lane % 16) * pitch + n0 + lane / 16 * 8);
    first[0] = b[0], first[1] = b[1], second[0] = b[2], second[1] = b[3];
  }

  // The first 8 columns of B for two steps of K, of a tile stored [k][n].
  static DEVICE void load_b_steps(uint32 (&first)[2], uint32 (&second)[2], const T* tile, int pitch, int k0) {
    uint32 b[4];
    ldmatrix_x4_trans(b, tile + (k0 + (int)(threadIdx.x % 32)) * pitch);
    first[0] = b[0], first[1] = b[1], second[0] = b[2], second[1] = b[3];
  }

  static DEVICE void finish_row_sums(float (&)[4]) {}
};

// Products of a warp, by the operands' type. `add_row_sums` adds what a step of K brings to the sums of A's rows:
// 16-bit operands are multiplied by ones. After the last step `finish_row_sums` leaves row r's sum in element 0 or 2 of
// the lanes of row r.
template <typename T> struct Mma;

template <> struct Mma<bfloat16> : Mma16Bit<bfloat16> {
  static DEVICE void multiply(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) { mma_m16n8k16_bf16(c, a, b); }

  template <bool TRANSPOSED>
  static DEVICE void add_row_sums(float (&sums)[4], const uint32 (&a)[4], const bfloat16*, int, int, int) {
    const uint32 ones[2] = {0x3f803f80u, 0x3f803f80u};
    multiply(sums, a, ones);
  }
};

template <> struct Mma<float16> : Mma16Bit<float16> {
  static DEVICE void multiply(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) { mma_m16n8k16_f16(c, a, b); }

  template <bool TRANSPOSED>
  static DEVICE void add_row_sums(float (&sums)[4], const uint32 (&a)[4], const float16*, int, int, int) {
    const uint32 ones[2] = {0x3c003c00u, 0x3c003c00u};
    multiply(sums, a, ones);
  }
};

// float32 operands, rounded to TF32 on the way.
template <> struct Mma<float> {
  // A fused network reads W both ways and pads it by PAD: then da W takes two accesses for one.
  static constexpr int K = 8, PAD = 8, PAD_PAIRS = 4;
  typedef uint32 FragmentA[4];
  typedef uint32 FragmentB[2];

  static DEVICE void multiply(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) { mma_m16n8k8_tf32(c, a, b); }

  template <bool TRANSPOSED>
  static DEVICE void load_a(uint32 (&a)[4], const float* tile, int pitch, int m0, int k0) {
    float values[4];
    load_unrounded<TRANSPOSED>(values, tile, pitch, m0, k0);
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = cvt_rna_tf32(values[e]);
  }

  // Products may be rounded to TF32, but a sum of A's rows is no product: each lane adds its own numbers in float32.
  template <bool TRANSPOSED>
  static DEVICE void add_row_sums(float (&sums)[4], const uint32 (&)[4], const float* tile, int pitch, int m0, int k0) {
    float values[4];
    load_unrounded<TRANSPOSED>(values, tile, pitch, m0, k0);
    sums[0] += values[0] + values[2];
    sums[2] += values[1] + values[3];
  }

  static DEVICE void finish_row_sums(float (&sums)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 1);
      sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 2);
    }
  }

  template <bool TRANSPOSED_A, bool TRANSPOSED_B>
  static DEVICE void load_b(uint32 (&first)[2], uint32 (&second)[2], const float* tile, int pitch, int n0, int k0) {
    load_b<TRANSPOSED_A, TRANSPOSED_B>(first, tile, pitch, n0, k0);
    load_b<TRANSPOSED_A, TRANSPOSED_B>(second, tile, pitch, n0 + 8, k0);
  }

  static DEVICE void load_b_steps(uint32 (&first)[2], uint32 (&second)[2], const float* tile, int pitch, int k0) {
    load_b<true, false>(first, tile, pitch, 0, k0);
    load_b<true, false>(second, tile, pitch, 0, k0 + K);
  }

 private:
  template <bool TRANSPOSED>
  static DEVICE void load_unrounded(float (&a)[4], const float* tile, int pitch, int m0, int k0) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (TRANSPOSED) {
      const float* first = tile + (k0 + t) * pitch + m0 + g;
      a[0] = first[0], a[1] = first[8], a[2] = first[4 * pitch], a[3] = first[4 * pitch + 8];
    } else {
      const float* first = tile + (m0 + g) * pitch + k0 + 2 * t;
      const Group<float, 2> upper = *(const Group<float, 2>*)first;
      const Group<float, 2> lower = *(const Group<float, 2>*)(first + 8 * pitch);
      a[0] = upper.at[0], a[1] = lower.at[0], a[2] = upper.at[1], a[3] = lower.at[1];
    }
  }

  template <bool TRANSPOSED_A, bool TRANSPOSED_B>
  static DEVICE void load_b(uint32 (&b)[2], const float* tile, int pitch, int n0, int k0) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (TRANSPOSED_B) {
      const Group<float, 2> pair = *(const Group<float, 2>*)(tile + (n0 + g) * pitch + k0 + 2 * t);
      b[0] = cvt_rna_tf32(pair.at[0]), b[1] = cvt_rna_tf32(pair.at[1]);
    } else {
      const float* first = tile + (k0 + (TRANSPOSED_A ? t : 2 * t)) * pitch + n0 + g;
      b[0] = cvt_rna_tf32(first[0]), b[1] = cvt_rna_tf32(first[(TRANSPOSED_A ? 4 : 1) * pitch]);
    }
  }
};
