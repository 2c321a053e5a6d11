// The output layer with the same bits on every backend, row by row, in float64:
//
//     exact_loss_rows           da_bj = w_b dl/da_bj / divisor, losses_b = w_b l_b
//     exact_output_rows         out_bj = O(a_bj)
//     exact_output_delta_rows   da_bj = w_b / divisor sum_i dy_bi dO(a)_bi/da_bj, O' computed from source: y^ or a
//
// Follows the fixed sequences of gpuback/_backends/exact/losses.py and rounds where da is stored. losses.cu has the
// equations.
//
// Shapes: a, dy and source (B, n) floats, da (B, n) of elements, row by row with a pitch each; labels (B) or targets
// (B, n); weight (B) or null; losses (B), which `exact_sum` adds up. A label outside 0 ... n - 1 is never used as an
// index: its loss and its row of da become NaN.
//
// A warp takes a row, its lanes every 32nd column; a block has 8 warps. Rows are independent, so there is no barrier.
// With B = 1024: 128 blocks, a row a warp.
//
// Variants: Element of da, and the coefficients of elementary.cuh. 256 threads.
#include "../common/block_sum.cuh"
#include "../common/canonical_nan.cuh"
#include "elementary.cuh"

enum Loss {  // as in common/loss_formulas.cuh
  CROSS_ENTROPY = 0, BINARY_CROSS_ENTROPY = 1, SQUARED_ERROR = 2, ABSOLUTE_ERROR = 3, HUBER = 4, QUANTILE = 5,
  POISSON = 6, WEIGHTED_CROSS_ENTROPY = 7
};
enum Output { OUTPUT_SOFTMAX = -1 };  // else an Activation

// The sum of term(column) over a row, in every lane: each lane adds its columns from +0 on, then lanes i and i + 16 are
// added, then i + 8, ..., i + 1.
template <typename Term>
DEVICE Double row_sum(int n, Term term) {
  Double sum = 0.0;
  for (int j = threadIdx.x % 32; j < n; j += 32) sum = sum + term(j);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum = sum + __shfl_xor_sync(0xffffffffu, sum.value, step);
  return sum;
}

DEVICE Double row_max(const float* a, int n) {
  float most = a[threadIdx.x % 32 < n ? threadIdx.x % 32 : 0];
  for (int j = threadIdx.x % 32; j < n; j += 32) most = Larger()(most, a[j]);
  return warp_max(most);
}

// y^ = e^z / total, z = a - max a, total = sum e^z.
struct Softmax {
  Double highest, total;

  DEVICE Softmax(const float* a, int n) {
    const Double shift = row_max(a, n);
    highest = shift;
    total = row_sum(n, [=](int j) { return exp(Double(a[j]) - shift); });
  }
  DEVICE Double shifted(float a) const { return Double(a) - highest; }
  DEVICE Double operator()(float a) const { return exp(shifted(a)) / total; }
};

// A row of da: weighted, scaled, rounded.
struct Row {
  Element* da;
  Double weight, divisor;

  DEVICE void store(int j, Double gradient) const {
    to_element_canonical(round_to_float(gradient * weight / divisor), da[j]);
  }
};

// With rest = sum of e^z_j over the other classes: nothing cancels, however sure the prediction is.
DEVICE Double label_row(const float* a, int label, int n, const Row& row) {
  const Double highest = row_max(a, n), z = Double(a[label]) - highest;
  const Double rest = row_sum(n, [=](int j) { return j == label ? Double(0.0) : exp(Double(a[j]) - highest); });
  const Double total = rest + exp(z);
  for (int j = threadIdx.x % 32; j < n; j += 32) {
    const Double power = exp(Double(a[j]) - highest);
    row.store(j, (j == label ? -rest : power) / total);
  }
  return z.value == 0.0 ? log1p(rest) : log(total) - z;
}

// Of targets that are rows y or, if there are parameters, p y + m. `own`: a label, whose row is e(own), or -1.
DEVICE Double probability_row(const float* a, int own, const float* y, const double* parameters, int n,
                              const Row& row) {
  const auto target = [=](int j) {
    const Double given = own < 0 ? (double)y[j] : j == own ? 1.0 : 0.0;
    return parameters ? Double(parameters[j]) * given + parameters[n + j] : given;
  };
  const Softmax softmax(a, n);
  const Double mass = row_sum(n, target), log_total = log(softmax.total);
  return row_sum(n, [=](int j) {
    const Double t = target(j);
    row.store(j, mass * softmax(a[j]) - t);
    Double distance = log_total - softmax.shifted(a[j]);
    if (t.value == 0.0) distance = 0.0;  // 0 times an infinite one would be NaN
    return t * distance;
  });
}

// `label` is null or points to the sample's label.
DEVICE Double class_row(const float* a, const int64* label, const float* y, const double* parameters, int n,
                        const Row& row) {
  if (label && (*label < 0 || *label >= n)) {
    const Double nan = __longlong_as_double(0x7ff8000000000000);
    for (int j = threadIdx.x % 32; j < n; j += 32) row.store(j, nan);
    return nan;
  }
  const int own = label ? (int)*label : -1;
  return label && !parameters ? label_row(a, own, n, row) : probability_row(a, own, y, parameters, n, row);
}

DEVICE Double binary_row(const float* a, const float* y, int n, const Row& row) {
  for (int j = threadIdx.x % 32; j < n; j += 32) {
    const Double x = a[j], target = y[j];
    row.store(j, (Double(1.0) - target) * sigmoid(x) - target * sigmoid(-x));
  }
  return row_sum(n, [=](int j) {
    const Double x = a[j];
    Double distance = Double(x < 0.0 ? 0.0 : x.value) - x * y[j];
    if ((x - x).value != 0.0) distance = fabs(x.value);  // infinity less infinity would be NaN
    if (y[j] == (x > 0.0 ? 1.0f : 0.0f)) distance = 0.0;
    return distance + log1p(exp(Double(-fabs(x.value))));
  });
}

DEVICE Double squared_row(const float* a, const float* y, int n, int output, const Row& row) {
  const Double sum = row_sum(n, [=](int j) {
    const Double predicted = activation_of(output, Double(a[j])), residual = predicted - y[j];
    row.store(j, residual * slope_of(output, predicted));
    return residual * residual;
  });
  return Double(0.5) * sum;
}

DEVICE Double squared_softmax_row(const float* a, const float* y, int n, const Row& row) {
  const Softmax softmax(a, n);
  const Double dot = row_sum(n, [=](int j) {
    const Double predicted = softmax(a[j]);
    return (predicted - y[j]) * predicted;
  });
  const Double sum = row_sum(n, [=](int j) {
    const Double predicted = softmax(a[j]), residual = predicted - y[j];
    row.store(j, predicted * (residual - dot));
    return residual * residual;
  });
  return Double(0.5) * sum;
}

DEVICE Double residual_row(const float* a, const float* y, int n, int loss, int output, const double* parameters,
                           const Row& row) {
  return row_sum(n, [=](int j) {
    const Double predicted = activation_of(output, Double(a[j])), r = predicted - y[j];
    Double slope = r, factor = r;
    if (loss == HUBER) {
      const Double delta = parameters[j];
      slope = r > delta ? delta : r < -delta ? -delta : r;
      factor = r - Double(0.5) * slope;
    } else {
      const Double above = loss == QUANTILE ? parameters[j] : 1.0, below = loss == QUANTILE ? parameters[n + j] : 1.0;
      slope = r > 0.0 ? above : r < 0.0 ? -below : r;
    }
    row.store(j, slope * slope_of(output, predicted));
    return slope * factor;
  });
}

DEVICE Double poisson_row(const float* a, const float* y, int n, const Row& row) {
  return row_sum(n, [=](int j) {
    const Double x = a[j], target = y[j], predicted = exp(x), d = x - log(target);
    row.store(j, predicted - target);
    // Past 10^4 the first is larger by far, and an infinite second would be left.
    return target.value == 0.0 ? predicted : target * (expm1(d) - (d > 1e4 ? Double(1e4) : d));
  });
}

KERNEL __launch_bounds__(256, 4) exact_loss_rows(
    const float* a_bj, int a_pitch, const int64* labels_b, const float* targets_bj, const float* weight_b,
    Element* da_bj, int da_pitch, double* losses_b, int n_batch, int n, int loss, int output,
    const double* parameters, double divisor) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const float *a = a_bj + (int64)b * a_pitch, *y = targets_bj + (int64)b * n;
    const Row row = {da_bj + (int64)b * da_pitch, weight_b ? weight_b[b] : 1.0f, divisor};
    Double value;
    if (loss == CROSS_ENTROPY || loss == WEIGHTED_CROSS_ENTROPY)
      value = class_row(a, labels_b ? labels_b + b : nullptr, y, parameters, n, row);
    else if (loss == BINARY_CROSS_ENTROPY)
      value = binary_row(a, y, n, row);
    else if (loss == POISSON)
      value = poisson_row(a, y, n, row);
    else if (loss != SQUARED_ERROR)
      value = residual_row(a, y, n, loss, output, parameters, row);
    else
      value = output == OUTPUT_SOFTMAX ? squared_softmax_row(a, y, n, row) : squared_row(a, y, n, output, row);
    if (threadIdx.x % 32 == 0) losses_b[b] = (value * row.weight).value;
  }
}

KERNEL __launch_bounds__(256, 4) exact_output_rows(
    const float* a_bj, int a_pitch, float* out_bj, int out_pitch, int n_batch, int n, int output) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const float* a = a_bj + (int64)b * a_pitch;
    float* out = out_bj + (int64)b * out_pitch;
    if (output == OUTPUT_SOFTMAX) {
      const Softmax softmax(a, n);
      for (int j = threadIdx.x % 32; j < n; j += 32) out[j] = round_to_float(softmax(a[j]));
    } else {
      for (int j = threadIdx.x % 32; j < n; j += 32) out[j] = round_to_float(activation_of(output, Double(a[j])));
    }
  }
}

KERNEL __launch_bounds__(256, 4) exact_output_delta_rows(
    const float* dy_bj, int dy_pitch, const float* source_bj, int source_pitch, const float* weight_b, Element* da_bj,
    int da_pitch, int n_batch, int n, int output, double divisor) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const float* dy = dy_bj + (int64)b * dy_pitch;
    const float* source = source_bj ? source_bj + (int64)b * source_pitch : dy;
    const Row row = {da_bj + (int64)b * da_pitch, weight_b ? weight_b[b] : 1.0f, divisor};
    if (output == OUTPUT_SOFTMAX) {
      const Double dot = row_sum(n, [=](int j) { return Double(dy[j]) * source[j]; });
      for (int j = threadIdx.x % 32; j < n; j += 32) row.store(j, Double(source[j]) * (Double(dy[j]) - dot));
    } else {
      for (int j = threadIdx.x % 32; j < n; j += 32) row.store(j, Double(dy[j]) * slope_of(output, Double(source[j])));
    }
  }
}
