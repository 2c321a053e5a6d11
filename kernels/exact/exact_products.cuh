// What the kernels of exact products and losses share: scales, stored numbers, and who takes which element.
// gpuback/_backends/exact/products.py says what is computed.
#pragma once
#include "../common/rounded.cuh"

// e of the power of two just above a magnitude, 2^(e-1) <= largest < 2^e, subnormal ones too; 0 for 0.
DEVICE int exponent_above(float largest) {
  const uint32 bits = __float_as_uint(largest);
  return bits >= 0x00800000u ? (int)(bits >> 23) - 126 : bits ? -117 - __clz((int)bits) : 0;
}

// 2^exponent sigma, with sigma the power of two just above `largest`; NaN where that is not finite.
DEVICE Double scale(float largest, int exponent) {
  return is_finite(largest) ? power_of_two(exponent + exponent_above(largest)) : __longlong_as_double(0x7ff8000000000000);
}

// 2^exponent / sigma.
DEVICE Double inverse_scale(float largest, int exponent) {
  return is_finite(largest) ? power_of_two(exponent - exponent_above(largest)) : __longlong_as_double(0x7ff8000000000000);
}

// With the one NaN that every backend stores.
DEVICE float canonical(float x) { return x != x ? __uint_as_float(0x7fc00000u) : x; }

// To float, with +0 added, which makes -0 and 0 one.
DEVICE float settled(Double x) { return canonical(__fadd_rn(__double2float_rn(x.value), 0.0f)); }

// Rounds to an operand's format, with that NaN.
DEVICE void settle(float x, bfloat16& value) {
  narrow(x, value);
  if (x != x) value.bits = 0x7fc0;
}
DEVICE void settle(float x, float16& value) {
  narrow(x, value);
  if (x != x) value.bits = 0x7e00;
}
DEVICE void settle(float x, float& value) { value = x; }
DEVICE void settle(double x, double& value) { value = x; }

// Runs body(row, column) for every element of a matrix. A warp takes up to 256 columns of a row at a time.
template <typename Body>
DEVICE void each_element(int rows, int columns, Body body) {
  const int parts = ceil_div(columns, 256);
  for (int item = blockIdx.x * 8 + threadIdx.x / 32; item < rows * parts; item += gridDim.x * 8) {
    const int row = item / parts, first = item % parts * 256;
    for (int column = first + threadIdx.x % 32; column < min(columns, first + 256); column += 32) body(row, column);
  }
}
