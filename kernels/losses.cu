// The output layer, row by row: y^ = O(a), each sample's loss l(y^, y), and da = w dl/da / divisor, in one pass.
//
//     cross entropy, softmax            l = sum_j y_j (log s - z_j)                da = (sum_j y_j) y^ - y
//                                       of a label y: log s - z_y                  y^ - e(y)
//                                       with z = a - max a, s = sum_j e^z_j, y^ = e^z / s
//     binary cross entropy, sigmoid     l = sum_j max(a, 0) - a y + log1p(e^-|a|)  y^ - y
//     squared error                     l = 1/2 sum_j (y^ - y)^2                   r = y^ - y
//       identity, sigmoid, tanh                                                    r g'(a)
//       softmax                                                                    y^ (r - sum_j r_j y^_j)
//
// Shapes: a (B, n) of sums, da (B, n) of operands, row by row with a pitch each; labels (B) or targets (B, n); weight (B) or null.
// A label outside 0 ... n - 1 is never used as an index: its loss and its row of da become NaN.
//
// A warp takes a row, its lanes every 32nd column; a block of 8 warps takes every gridDim-th group of 8 rows. The batch's loss is
// summed by `grid_sum`; the last block divides by B and writes it.
//
// Variants: REAL (float or double) of sums, OPERAND of da. 256 threads.
#include "activations.cuh"
#include "block_sum.cuh"

enum Loss { CROSS_ENTROPY = 0, BINARY_CROSS_ENTROPY = 1, SQUARED_ERROR = 2 };
enum Output { OUTPUT_SOFTMAX = -1 };  // else an Activation

// The sum over a row of what `term` gives for each column, in every lane. A lane adds 64 of its columns at a time.
template <typename Term>
DEVICE REAL row_sum(int n, Term term) {
  REAL total = 0;
  for (int first = threadIdx.x % 32; first < n; first += 32 * 64) {
    REAL sum = 0;
    for (int j = first; j < min(n, first + 32 * 64); j += 32) sum += term(j);
    total += sum;
  }
  return warp_sum(total);
}

struct Softmax {
  REAL highest, total;  // max a, sum e^(a - max a)

  DEVICE void of(const REAL* a, int n) {
    REAL most = a[threadIdx.x % 32 < n ? threadIdx.x % 32 : 0];
    for (int j = threadIdx.x % 32; j < n; j += 32) most = a[j] > most || a[j] != a[j] ? a[j] : most;
    highest = warp_max(most);
    const REAL shift = highest;
    total = row_sum(n, [=](int j) { return exp_of(a[j] - shift); });
  }
  DEVICE REAL operator()(REAL a) const { return exp_of(a - highest) / total; }
};

DEVICE REAL apply_output(int output, REAL a) {
  REAL one[1] = {a};
  activate(output, one);
  return one[0];
}

// Writes a row of da: scaled, weighted, rounded.
struct Row {
  OPERAND* da;  // null: only the loss is wanted
  REAL weight, divisor;

  DEVICE void store(int j, REAL gradient) const { narrow(gradient * weight / divisor, da[j]); }
};

template <typename Term>
DEVICE void write_row(const Row& row, int n, Term gradient) {
  if (row.da)
    for (int j = threadIdx.x % 32; j < n; j += 32) row.store(j, gradient(j));
}

DEVICE REAL label_row(const REAL* a, int64 label, int n, const Row& row) {
  const REAL nan = REAL(__uint_as_float(0x7fc00000u));
  if (label < 0 || label >= n) {
    write_row(row, n, [=](int) { return nan; });
    return nan;
  }
  Softmax softmax;
  softmax.of(a, n);
  write_row(row, n, [=](int j) { return j == label ? softmax(a[j]) - 1 : softmax(a[j]); });
  return log_of(softmax.total) - (a[label] - softmax.highest);
}

DEVICE REAL probability_row(const REAL* a, const REAL* y, int n, const Row& row) {
  Softmax softmax;
  softmax.of(a, n);
  const REAL log_total = log_of(softmax.total), mass = row_sum(n, [=](int j) { return y[j]; });
  write_row(row, n, [=](int j) { return mass * softmax(a[j]) - y[j]; });
  return row_sum(n, [=](int j) { return y[j] * (log_total - (a[j] - softmax.highest)); });
}

DEVICE REAL binary_row(const REAL* a, const REAL* y, int n, const Row& row) {
  write_row(row, n, [=](int j) { return sigmoid(a[j]) - y[j]; });
  return row_sum(n, [=](int j) {
    return (a[j] > 0 || a[j] != a[j] ? a[j] : REAL(0)) - a[j] * y[j] + log1p_of(exp_of(-abs_of(a[j])));
  });
}

DEVICE REAL squared_row(const REAL* a, const REAL* y, int n, int output, const Row& row) {
  write_row(row, n, [=](int j) {
    const REAL predicted = apply_output(output, a[j]);
    REAL gradient[1] = {predicted - y[j]};
    const REAL source[1] = {predicted};
    times_derivative(output, gradient, source);
    return gradient[0];
  });
  return REAL(0.5) * row_sum(n, [=](int j) {
    const REAL residual = apply_output(output, a[j]) - y[j];
    return residual * residual;
  });
}

DEVICE REAL squared_softmax_row(const REAL* a, const REAL* y, int n, const Row& row) {
  Softmax softmax;
  softmax.of(a, n);
  const REAL dot = row_sum(n, [=](int j) { return (softmax(a[j]) - y[j]) * softmax(a[j]); });
  write_row(row, n, [=](int j) { return softmax(a[j]) * (softmax(a[j]) - y[j] - dot); });
  return REAL(0.5) * row_sum(n, [=](int j) { return (softmax(a[j]) - y[j]) * (softmax(a[j]) - y[j]); });
}

KERNEL __launch_bounds__(256, 2) loss_rows(const REAL* a_bj, int a_pitch, const int64* labels_b, const REAL* targets_bj,
                                        const REAL* weight_b, OPERAND* da_bj, int da_pitch, REAL* mean_loss, int n_batch,
                                        int n, int loss, int output, REAL divisor, double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[1] = {0};
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const REAL* a = a_bj + (int64)b * a_pitch;
    const REAL* y = targets_bj + (int64)b * n;
    const Row row = {da_bj ? da_bj + (int64)b * da_pitch : nullptr, weight_b ? weight_b[b] : REAL(1), divisor};
    REAL value;
    if (loss == CROSS_ENTROPY)
      value = labels_b ? label_row(a, labels_b[b], n, row) : probability_row(a, y, n, row);
    else if (loss == BINARY_CROSS_ENTROPY)
      value = binary_row(a, y, n, row);
    else
      value = output == OUTPUT_SOFTMAX ? squared_softmax_row(a, y, n, row) : squared_row(a, y, n, output, row);
    if (threadIdx.x % 32 == 0) sums[0] += (double)(value * row.weight);
  }
  if (grid_sum(sums, (double*)memory, partials, arrivals)) *mean_loss = (REAL)(sums[0] / n_batch);
}

// y^ = O(a): (B, n) of sums, row by row with a pitch each.
KERNEL __launch_bounds__(256, 2) output_rows(const REAL* a_bj, int a_pitch, REAL* out_bj, int out_pitch, int n_batch, int n,
                                          int output) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const REAL* a = a_bj + (int64)b * a_pitch;
    REAL* out = out_bj + (int64)b * out_pitch;
    Softmax softmax;
    if (output == OUTPUT_SOFTMAX) softmax.of(a, n);
    for (int j = threadIdx.x % 32; j < n; j += 32) out[j] = output == OUTPUT_SOFTMAX ? softmax(a[j]) : apply_output(output, a[j]);
  }
}
