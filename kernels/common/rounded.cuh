// Numbers whose every operation rounds by itself: the compiler may not contract a * b + c to one fma. Results have the
// bits that IEEE 754 fixes, on every GPU and with NumPy.
#pragma once
#include "types.cuh"

template <typename T>
struct Rounded {
  T value;

  Rounded() = default;
  DEVICE Rounded(T number) : value(number) {}
};

typedef Rounded<double> Double;

#define GPUBACK_OPERATIONS(T, add, subtract, multiply, divide, square_root)                             \
  DEVICE Rounded<T> operator+(Rounded<T> a, Rounded<T> b) { return add(a.value, b.value); }             \
  DEVICE Rounded<T> operator-(Rounded<T> a, Rounded<T> b) { return subtract(a.value, b.value); }        \
  DEVICE Rounded<T> operator*(Rounded<T> a, Rounded<T> b) { return multiply(a.value, b.value); }        \
  DEVICE Rounded<T> operator/(Rounded<T> a, Rounded<T> b) { return divide(a.value, b.value); }          \
  DEVICE Rounded<T> operator-(Rounded<T> a) { return -a.value; }                                        \
  DEVICE Rounded<T> root(Rounded<T> a) { return square_root(a.value); }                                 \
  DEVICE bool operator<(Rounded<T> a, Rounded<T> b) { return a.value < b.value; }                       \
  DEVICE bool operator>(Rounded<T> a, Rounded<T> b) { return a.value > b.value; }                       \
  DEVICE bool operator<=(Rounded<T> a, Rounded<T> b) { return a.value <= b.value; }                     \
  DEVICE bool operator>=(Rounded<T> a, Rounded<T> b) { return a.value >= b.value; }                     \
  DEVICE bool operator==(Rounded<T> a, Rounded<T> b) { return a.value == b.value; }                     \
  DEVICE bool operator!=(Rounded<T> a, Rounded<T> b) { return a.value != b.value; }                     \
  DEVICE bool is_nan(Rounded<T> a) { return a.value != a.value; }

GPUBACK_OPERATIONS(float, __fadd_rn, __fsub_rn, __fmul_rn, __fdiv_rn, __fsqrt_rn)
GPUBACK_OPERATIONS(double, __dadd_rn, __dsub_rn, __dmul_rn, __ddiv_rn, __dsqrt_rn)
#undef GPUBACK_OPERATIONS

// 2^exponent, for what doubles hold as normal numbers.
DEVICE double power_of_two(int exponent) { return __longlong_as_double((int64)(exponent + 1023) << 52); }
