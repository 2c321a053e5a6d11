// What follows an exact product: from the sums P and Q of its slices to what is stored.
//
//     C_ij = sigma_i tau_j 2^-2s (P_ij + 2^-s Q_ij)
//     forward    a = C + b, h = g(a)
//     delta      da_prev = C g'(source), or factor C where there is no source
//     gradient   out (+)= factor C
//
// Each is a fixed sequence of float64 operations on every element, rounded to float where it is stored, to the operands' format
// after that; gpuback/_backends/exact/numpy_ops.py makes the same sequence.
//
// Shapes: P, Q (rows, columns) tight, doubles of one block or with `whole` int64 of several; the largest magnitude of each of the
// rows of the first operand and of the columns of the second, of which sigma and tau are made; all else row by row with a pitch
// each. What is written with `is_float32` is float, else of operands.
//
// Variants: OPERAND, and the coefficients of elementary.cuh. 256 threads.
#include "elementary.cuh"
#include "exact.cuh"

// total += addend: integers that doubles add exactly.
KERNEL __launch_bounds__(256) accumulate(const double* addend, double* total, int rows, int columns) {
  each_element(rows, columns, [=](int row, int column) {
    const int64 i = (int64)row * columns + column;
    total[i] = (Double(total[i]) + addend[i]).value;
  });
}

// total (+)= P, and the same with Q: integers that doubles hold. With `first` nothing is read of the totals.
KERNEL __launch_bounds__(256) add_block(
    const double* p, const double* q, int64* p_total, int64* q_total, int first, int rows, int columns) {
  each_element(rows, columns, [=](int row, int column) {
    const int64 i = (int64)row * columns + column;
    p_total[i] = (first ? 0 : p_total[i]) + __double2ll_rn(p[i]);
    q_total[i] = (first ? 0 : q_total[i]) + __double2ll_rn(q[i]);
  });
}

DEVICE Double number(const void* numbers, int whole, int64 index) {
  return whole ? __ll2double_rn(((const int64*)numbers)[index]) : ((const double*)numbers)[index];
}

struct Product {
  const void *p_rc, *q_rc;
  int whole;
  const float *largest_r, *largest_c;
  int bits, columns;

  DEVICE Double operator()(int row, int column) const {
    const int64 index = (int64)row * columns + column;
    const Double sum = number(q_rc, whole, index) * power_of_two(-bits) + number(p_rc, whole, index);
    return sum * scale(largest_c[column], -bits) * scale(largest_r[row], -bits);
  }
};

DEVICE void write(void* out, int64 index, int as_sums, float value) {
  if (as_sums)
    ((float*)out)[index] = value;
  else
    settle(value, ((OPERAND*)out)[index]);
}

//   a    the pre-activations as g' reads them; may be null
KERNEL __launch_bounds__(256, 4) finish_forward(
    const void* p_bo, const void* q_bo, int are_int64, const float* largest_b, const float* largest_o, int bits, const float* bias_o,
    OPERAND* a_bo, int a_pitch, void* h_bo, int h_pitch, int is_float32, int activation, int n_batch, int n_out) {
  const Product product = {p_bo, q_bo, are_int64, largest_b, largest_o, bits, n_out};
  each_element(n_batch, n_out, [=](int b, int o) {
    float pre = settled(product(b, o) + bias_o[o]);
    OPERAND kept;
    settle(pre, kept);
    if (a_bo) a_bo[(int64)b * a_pitch + o] = kept;
    if (derivative_from_a(activation)) pre = widen(kept);  // g and g' see the same a
    write(h_bo, (int64)b * h_pitch + o, is_float32, settled(activation_of(activation, pre)));
  });
}

//   source   what g' is computed from, h or a of the layer below; null: without g'
KERNEL __launch_bounds__(256, 4) finish_delta(
    const void* p_bi, const void* q_bi, int are_int64, const float* largest_b, const float* largest_i, int bits,
    const OPERAND* source_bi, int source_pitch, double factor, void* da_prev_bi, int da_prev_pitch, int is_float32, int activation,
    int n_batch, int n_in) {
  const Product product = {p_bi, q_bi, are_int64, largest_b, largest_i, bits, n_in};
  each_element(n_batch, n_in, [=](int b, int i) {
    float delta = settled(product(b, i) * factor);
    if (source_bi) delta = settled(slope_of(activation, widen(source_bi[(int64)b * source_pitch + i])) * delta);
    write(da_prev_bi, (int64)b * da_prev_pitch + i, is_float32, delta);
  });
}

KERNEL __launch_bounds__(256, 4) finish_gradient(
    const void* p_oi, const void* q_oi, int are_int64, const float* largest_o, const float* largest_i, int bits, double factor,
    float* out_oi, int out_pitch, int accumulate, int n_out, int n_in) {
  const Product product = {p_oi, q_oi, are_int64, largest_o, largest_i, bits, n_in};
  each_element(n_out, n_in, [=](int o, int i) {
    float* out = out_oi + (int64)o * out_pitch + i;
    const float addend = settled(product(o, i) * factor);
    *out = accumulate ? canonical(__fadd_rn(*out, addend)) : addend;
  });
}
