// Stores with one NaN: whatever bits a NaN has, every backend writes the same (0x7fc00000 in float32).
#pragma once
#include "rounded.cuh"

DEVICE float canonical_nan(float x) { return x != x ? __uint_as_float(0x7fc00000u) : x; }
DEVICE double canonical_nan(double x) { return x != x ? __longlong_as_double(0x7ff8000000000000) : x; }

DEVICE float canonical_nan(Rounded<float> x) { return is_nan(x) ? __uint_as_float(0x7fc00000u) : x.value; }
DEVICE double canonical_nan(Rounded<double> x) {
  return is_nan(x) ? __longlong_as_double(0x7ff8000000000000) : x.value;
}

// Rounds to float.
DEVICE float round_to_float(Double x) { return is_nan(x) ? __uint_as_float(0x7fc00000u) : __double2float_rn(x.value); }

// Rounds to float and adds +0, which makes -0 and 0 one.
DEVICE float round_to_float_with_one_zero(Double x) {
  return canonical_nan(__fadd_rn(__double2float_rn(x.value), 0.0f));
}

// Rounds a float to an element's format.
DEVICE void to_element_canonical(float x, bfloat16& value) {
  to_element(x, value);
  if (x != x) value.bits = 0x7fc0;
}
DEVICE void to_element_canonical(float x, float16& value) {
  to_element(x, value);
  if (x != x) value.bits = 0x7e00;
}
DEVICE void to_element_canonical(float x, float& value) { value = x; }
DEVICE void to_element_canonical(double x, double& value) { value = x; }
