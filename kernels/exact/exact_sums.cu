// Sums and norms that are exact but for one rounding, as gpuback/_core/exact_sums.py defines and proves.
//
//   sum    2^e 2^-63 V, V = sum of rint(2^63 x_i 2^-e)          with max |x_i| < 2^e
//   norm   2^e sqrt(2^-63 V), V = sum of rint(2^63 (x_i 2^-e)^2)
//
// `largest` finds max |x_i|, `exact_sum` the rest. Each term is cut into three limbs of 21 bits, integers in doubles. A
// sum of 2^31 limbs stays below 2^53, so every order of adding them gives the same sums, and no number of blocks
// changes a bit.
//
// Shapes: x (n), contiguous; the numbers that count are all of x or those of `spans` (block_sum.cuh). A thread takes
// every 256 gridDim-th number. The results of all blocks meet in `grid_max` and `grid_sum`, whose barriers are the only
// ones. With n = 2^20: 256 blocks, 16 numbers a thread.
//
// Variants: Accum (float or double). 256 threads.
#include "../common/block_sum.cuh"
#include "../common/canonical_nan.cuh"
#include "../common/rounded.cuh"

// x 2^exponent. Neither x nor the result may be far from what doubles hold, the exponent may: 2^1074 is none of them.
DEVICE Double scaled(Double x, int exponent) {
  const int half = exponent / 2;
  return x * power_of_two(half) * power_of_two(exponent - half);
}

// The largest |x_i|; NaN wins.
KERNEL __launch_bounds__(256) largest(const Accum* x, int64 n, const int64* spans, int n_spans, double* result,
                                      double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double size[1] = {0};
  each_number(n, spans, n_spans, [&](int64 i) { size[0] = Larger()(size[0], fabs((double)x[i])); });
  if (grid_max(size, (double*)memory, partials, arrivals)) *result = size[0];
}

// Adds the limbs of a term |t| < 1. Differences and products are exact.
DEVICE void add_limbs(double (&sums)[3], Double t) {
  const Double one_limb = 0x1p21;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    t = t * one_limb;
    const double limb = rint(t.value);
    sums[k] += limb;
    t = t - limb;
  }
}

// 2^-63 V, rounded once: what is more than 21 bits in a limb's sum goes to the next, and then the lower two fit into 42
// bits.
DEVICE Double total(double (&sums)[3]) {
#pragma unroll
  for (int k = 2; k > 0; --k) {
    const double carried = floor(sums[k] * 0x1p-21);
    sums[k] -= carried * 0x1p21;
    sums[k - 1] += carried;
  }
  return ((Double(sums[2]) * 0x1p-21 + sums[1]) * 0x1p-21 + sums[0]) * 0x1p-21;
}

// The sum of x, or with `squares` its norm. A sum is NaN where some x is not finite; a norm NaN or infinite.
//   greatest   what `largest` found
//   result     the sum or norm; may be null
//   quotient   result / divisor, rounded to float; may be null
KERNEL __launch_bounds__(256) exact_sum(const Accum* x, int64 n, const int64* spans, int n_spans,
                                        const double* greatest, int squares, double divisor, double* result,
                                        float* quotient, double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  const bool finite = is_finite(*greatest);
  int exponent = 0;
  if (finite) frexp(*greatest, &exponent);
  double sums[3] = {0, 0, 0};
  if (finite)
    each_number(n, spans, n_spans, [&](int64 i) {
      const Double t = scaled((double)x[i], -exponent);
      add_limbs(sums, squares ? t * t : t);
    });
  if (!grid_sum(sums, (double*)memory, partials, arrivals)) return;
  Double value = total(sums);
  if (squares) value = root(value);
  value = scaled(value, exponent);
  if (!finite) value = squares ? *greatest : __longlong_as_double(0x7ff8000000000000);
  if (result) *result = value.value;
  if (quotient) *quotient = round_to_float(value / divisor);
}
