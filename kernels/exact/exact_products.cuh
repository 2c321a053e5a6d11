// Scales of exact products (gpuback/_backends/exact/products.py proves that they are exact), and which warp takes which
// element.
#pragma once
#include "../common/rounded.cuh"

// e of the power of two just above a magnitude, 2^(e-1) <= largest < 2^e, subnormal ones too; 0 for 0.
DEVICE int exponent_above(float largest) {
  const uint32 bits = __float_as_uint(largest);
  return bits >= 0x00800000u ? (int)(bits >> 23) - 126 : bits ? -117 - __clz((int)bits) : 0;
}

// 2^exponent sigma, with sigma the power of two just above `largest`; NaN where that is not finite.
DEVICE Double scale(float largest, int exponent) {
  return is_finite(largest) ? power_of_two(exponent + exponent_above(largest))
                            : __longlong_as_double(0x7ff8000000000000);
}

// 2^exponent / sigma.
DEVICE Double inverse_scale(float largest, int exponent) {
  return is_finite(largest) ? power_of_two(exponent - exponent_above(largest))
                            : __longlong_as_double(0x7ff8000000000000);
}

// Runs body(row, column) for every element of a matrix. A warp takes up to 256 columns of a row at a time.
template <typename Body>
DEVICE void each_element(int rows, int columns, Body body) {
  const int parts = ceil_div(columns, 256);
  for (int index = blockIdx.x * 8 + threadIdx.x / 32; index < rows * parts; index += gridDim.x * 8) {
    const int row = index / parts, first = index % parts * 256;
    for (int column = first + threadIdx.x % 32; column < min(columns, first + 256); column += 32) body(row, column);
  }
}
