// Products of a warpgroup (wgmma), by the operands' type, and what they need from and to panels in shared memory.
// ptx_sm90.cuh says what panels and descriptors are, and which lane holds what.
#pragma once
#include "../common/ptx_sm90.cuh"
#include "../common/types.cuh"

// d (+)= A B, N twice the length of d; and arithmetic on two elements at a time.
//   ss<transpose_a, transpose_b>  A and B in shared memory, by descriptor; transposed where MN-major
//   rs<transpose_b>               A in registers
//   pack, unpack                  two numbers rounded to elements, the first in the lower half, and back
//   set_gt                        1 where a > b, else 0, as elements
template <typename T> struct Wgmma;

template <> struct Wgmma<bfloat16> {
  template <int transpose_a, int transpose_b, int Count>
  static DEVICE void ss(float (&d)[Count], uint64 a, uint64 b, int accumulate) {
    wgmma_ss_bf16<transpose_a, transpose_b>(d, a, b, accumulate);
  }
  template <int transpose_b, int Count>
  static DEVICE void rs(float (&d)[Count], const uint32 (&a)[4], uint64 b, int accumulate) {
    wgmma_rs_bf16<transpose_b>(d, a, b, accumulate);
  }
  static DEVICE uint32 pack(float first, float second) { return cvt_rn_bf16x2(first, second); }
  static DEVICE void unpack(uint32 pair, float& first, float& second) {
    first = __uint_as_float(pair << 16);
    second = __uint_as_float(pair & 0xffff0000u);
  }
  static DEVICE uint32 set_gt(uint32 a, uint32 b) { return set_gt_bf16x2(a, b); }
  static DEVICE uint32 mul(uint32 a, uint32 b) { return mul_bf16x2(a, b); }
};

template <> struct Wgmma<float16> {
  template <int transpose_a, int transpose_b, int Count>
  static DEVICE void ss(float (&d)[Count], uint64 a, uint64 b, int accumulate) {
    wgmma_ss_f16<transpose_a, transpose_b>(d, a, b, accumulate);
  }
  template <int transpose_b, int Count>
  static DEVICE void rs(float (&d)[Count], const uint32 (&a)[4], uint64 b, int accumulate) {
    wgmma_rs_f16<transpose_b>(d, a, b, accumulate);
  }
  static DEVICE uint32 pack(float first, float second) { return cvt_rn_f16x2(first, second); }
  static DEVICE void unpack(uint32 pair, float& first, float& second) {
    first = cvt_f32_f16((uint16)pair);
    second = cvt_f32_f16((uint16)(pair >> 16));
  }
  static DEVICE uint32 set_gt(uint32 a, uint32 b) { return set_gt_f16x2(a, b); }
  static DEVICE uint32 mul(uint32 a, uint32 b) { return mul_f16x2(a, b); }
};

// Where this lane's row of 16 x 16 numbers lies in a panel, for ldmatrix_x4 and stmatrix_x4. They begin at (row, column),
// multiples of 16. Their register i is the pair d[column / 2 + 2 i], d[column / 2 + 2 i + 1] of sums d.
DEVICE uint32 panel_fragment(uint32 panel, int row, int column) {
  const int lane = threadIdx.x % 32;
  return panel + (row + lane % 16) * 128 + (((lane / 16 ^ lane % 8) << 4) ^ (column / 16 << 5));
}
