// sin(x + quarter pi/2) for every x, to 2.5 units of roundoff, 2^-24 or 2^-53, as an absolute error.
//
// CUDA's own functions keep an array on a stack for large x. Here x less the nearest multiple k of pi/2 is
//
//     |x| <= 10^5    x - k pi/2, with pi/2 in three parts, by fma
//     beyond         the fraction of x 2/pi, by integers (Payne and Hanek, "Radian reduction for trigonometric
//                    functions", 1983)
//
// and one of two polynomials follows: Cephes' in single, fdlibm's in double precision.
#pragma once
#include "types.cuh"

// x less a multiple of pi/2, in [-pi/4, pi/4], and that multiple modulo 4.
template <typename Real>
struct QuarterTurns {
  Real rest;
  int count;
};

// Zeros for one word, and the bits of 2/pi behind the point.
__constant__ uint32 TWO_OVER_PI_FLOAT[7] = {0x00000000u, 0xa2f9836eu, 0x4e441529u, 0xfc2757d1u,
                                            0xf534ddc0u, 0xdb629599u, 0x3c439041u};
__constant__ uint64 TWO_OVER_PI_DOUBLE[20] = {
    0x0000000000000000ull, 0xa2f9836e4e441529ull, 0xfc2757d1f534ddc0ull, 0xdb6295993c439041ull,
    0xfe5163abdebbc561ull, 0xb7246e3a424dd2e0ull, 0x06492eea09d1921cull, 0xfe1deb1cb129a73eull,
    0xe88235f52ebb4484ull, 0xe99c7026b45f7e41ull, 0x3991d639835339f4ull, 0x9c845f8bbdf9283bull,
    0x1ff897ffde05980full, 0xef2f118b5a0a6d1full, 0x6d367ecf27cb09b7ull, 0x4f463f669e5fea2dull,
    0x7527bac7ebe5f17bull, 0x3d0739f78a5292eaull, 0x6bfb5fb11f8d5d08ull, 0x56033046fc7b6babull};

// |x| >= 4, as m 2^e with an integer m of 24 bits. Bits of 2/pi whose products with it are multiples of 4 are left out.
// With the next 64 bits as P, m P modulo 2^64 has two bits before the point, and is within 2^-38 of x 2/pi modulo 4.
DEVICE QuarterTurns<float> quarter_turns_far(float x) {
  const uint32 bits = __float_as_uint(x), m = (bits & 0x7fffffu) | 0x800000u;
  const int first = (int)(bits >> 23 & 0xffu) - 150 + 30, word = first / 32, shift = first % 32;
  const uint32 w0 = TWO_OVER_PI_FLOAT[word], w1 = TWO_OVER_PI_FLOAT[word + 1], w2 = TWO_OVER_PI_FLOAT[word + 2];
  const uint32 high = w0 << shift | w1 >> 1 >> (31 - shift), low = w1 << shift | w2 >> 1 >> (31 - shift);
  const uint32 product = m * high + __umulhi(m, low);
  const int fraction = (int)(product << 2 | m * low >> 30), sign = x < 0 ? -1 : 1;
  const int count = (int)(product >> 30) + (fraction < 0);
  return {(float)sign * (float)fraction * 3.6572951e-10f, sign * count};  // pi/2 2^-32
}

// The same with an m of 53 bits and a P of 128: within 2^-73.
DEVICE QuarterTurns<double> quarter_turns_far(double x) {
  const uint64 bits = (uint64)__double_as_longlong(x), m = (bits & 0xfffffffffffffull) | 0x10000000000000ull;
  const int first = (int)(bits >> 52 & 0x7ffu) - 1075 + 62, word = first / 64, shift = first % 64;
  const uint64 w0 = TWO_OVER_PI_DOUBLE[word], w1 = TWO_OVER_PI_DOUBLE[word + 1], w2 = TWO_OVER_PI_DOUBLE[word + 2];
  const uint64 high = w0 << shift | w1 >> 1 >> (63 - shift), low = w1 << shift | w2 >> 1 >> (63 - shift);
  const uint64 product = m * high + __umul64hi(m, low);
  const int64 fraction = (int64)(product << 2 | m * low >> 62);
  const int count = (int)(product >> 62) + (fraction < 0), sign = x < 0 ? -1 : 1;
  return {sign * (double)fraction * 8.5153039502163873e-20, sign * count};  // pi/2 2^-64
}

// sin(r) or, with an odd count, cos(r), with the sign of the count.
DEVICE float sine_of_rest(float r, int count) {
  const float z = r * r;
  const float s = r + r * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float c =
      1 - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const float value = count & 1 ? c : s;
  return count & 2 ? -value : value;
}

DEVICE double sine_of_rest(double r, int count) {
  const double z = r * r;
  const double s = r + r * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 +
      z * (-1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 +
      z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const double c = 1 - 0.5 * z + z * z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 +
      z * (2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 +
      z * (2.08757232129817482790e-09 - z * 1.13596475577881948265e-11)))));
  const double value = count & 1 ? c : s;
  return count & 2 ? -value : value;
}

DEVICE QuarterTurns<float> quarter_turns(float x) {
  if (!(fabsf(x) <= 1e5f)) return quarter_turns_far(x);
  const float k = rintf(x * 0.636619772f);
  const float r = __fmaf_rn(k, -3.13916476e-07f, __fmaf_rn(k, -1.57079601287841796875f, x));
  return {__fmaf_rn(k, -5.39030253e-15f, r), (int)k};
}

DEVICE QuarterTurns<double> quarter_turns(double x) {
  if (!(fabs(x) <= 1e5)) return quarter_turns_far(x);
  const double k = rint(x * 0.63661977236758134);
  const double r = __fma_rn(k, -6.1232339957367660e-17, __fma_rn(k, -1.5707963267948966, x));
  return {__fma_rn(k, 1.4973849048591698e-33, r), (int)k};
}

// NaN where x is not finite.
template <typename Real>
DEVICE Real sine_of(Real x, int quarter) {
  const QuarterTurns<Real> turns = quarter_turns(x);
  return sine_of_rest(turns.rest + (x - x), turns.count + quarter);
}
