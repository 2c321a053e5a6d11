// Number formats of elements (what products read) and of sums, and 16 bytes of either at a time.
//
// Kernels are compiled with `Element` and `Accum` as macros: the type of their operands, and the type of their sums.
#pragma once
#include "ptx.cuh"

struct bfloat16 { uint16 bits; };
struct float16 { uint16 bits; };

// The type that products of such elements are summed in.
DEVICE float to_accum(bfloat16 value) { return cvt_f32_bf16(value.bits); }
DEVICE float to_accum(float16 value) { return cvt_f32_f16(value.bits); }
DEVICE float to_accum(float value) { return value; }
DEVICE double to_accum(double value) { return value; }

// Rounds a sum to an element's format.
DEVICE void to_element(float sum, bfloat16& value) { value.bits = cvt_rn_bf16(sum); }
DEVICE void to_element(float sum, float16& value) { value.bits = cvt_rn_f16(sum); }
DEVICE void to_element(float sum, float& value) { value = sum; }
DEVICE void to_element(double sum, double& value) { value = sum; }

DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
DEVICE bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

constexpr int round_up_4(int n) { return (n + 3) / 4 * 4; }

DEVICE int ceil_div(int numerator, int denominator) { return (numerator + denominator - 1) / denominator; }

// Neighbouring numbers that one thread moves at a time.
template <typename T, int N>
struct __align__(N * sizeof(T)) Group {
  T at[N];
};

// Sixteen bytes of them.
template <typename T>
struct Pack : Group<T, 16 / sizeof(T)> {
  static constexpr int count = 16 / sizeof(T);
};

// Row-major, as it is stored.
template <typename T>
struct Matrix {
  const T* at;
  int pitch;  // elements from one row to the next
  int rows, columns;
};

// Whether 16-byte accesses to rows of a matrix are possible: its first element and its row length allow them.
template <typename T>
DEVICE bool aligned_rows(const T* matrix, int pitch) {
  return ((uint64)matrix % 16 == 0) && (pitch * sizeof(T) % 16 == 0);
}

// The `valid` (0 ... N) first numbers at an address, zeros for the rest.
template <int N, typename T>
DEVICE Group<T, N> load_group(const T* address, int valid, bool aligned) {
  if (aligned && valid >= N) return *(const Group<T, N>*)address;
  Group<T, N> group;
#pragma unroll
  for (int j = 0; j < N; ++j) group.at[j] = j < valid ? address[j] : T();
  return group;
}

template <typename T, int N>
DEVICE void store_group(T* address, const Group<T, N>& group, int valid, bool aligned) {
  if (aligned && valid >= N) {
    *(Group<T, N>*)address = group;
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (j < valid) address[j] = group.at[j];
}
