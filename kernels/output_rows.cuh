// The output layer of one sample: y^ = O(a), the loss l(y^, y), and da = w dl/da / divisor.
//
//     cross entropy, softmax            l = sum_j y_j (log s - z_j)                da = (sum_j y_j) y^ - y
//                                       of a label y: log s - z_y                  y^ - e(y)
//                                       with z = a - max a, s = sum_j e^z_j, y^ = e^z / s
//     binary cross entropy, sigmoid     l = sum_j max(a, 0) - a y + log1p(e^-|a|)  y^ - y
//     squared error                     l = 1/2 sum_j (y^ - y)^2                   r = y^ - y
//       identity, sigmoid, tanh                                                    r g'(a)
//       softmax                                                                    y^ (r - sum_j r_j y^_j)
//
// A label outside 0 ... n - 1 is never used as an index: its loss and its row of da become NaN.
//
// Some lanes of a warp share a row, each with columns of its own. What holds a row has
//     n           how many columns there are
//     each(f)     f(j, a_j) for this lane's columns
//     sum(f)      the sum of f(j, a_j) over the row, in each of its lanes
//     largest()   the largest a_j, in each of its lanes; NaN wins
//     at(j)       a_j, in each of its lanes
//     store(j, gradient)   da_j, scaled, weighted, rounded; nothing where only the loss is wanted
#pragma once
#include "activations.cuh"
#include "block_sum.cuh"

enum Loss { CROSS_ENTROPY = 0, BINARY_CROSS_ENTROPY = 1, SQUARED_ERROR = 2 };
enum OutputFunction { OUTPUT_SOFTMAX = -1 };  // else an Activation

template <typename Real>
struct Softmax {
  Real highest, total;  // max a, sum e^(a - max a)

  template <typename Row>
  explicit DEVICE Softmax(const Row& row) : highest(row.largest()) {
    const Real shift = highest;
    total = row.sum([=](int, Real a) { return exp_of(a - shift); });
  }
  DEVICE Real operator()(Real a) const { return exp_of(a - highest) / total; }
};

template <typename Real>
DEVICE Real apply_output(int output, Real a) {
  Real one[1] = {a};
  activate(output, one);
  return one[0];
}

template <typename Real, typename Row>
DEVICE Real label_loss(const Row& row, int64 label) {
  if (label < 0 || label >= row.n) {
    const Real nan = Real(__uint_as_float(0x7fc00000u));
    row.each([&](int j, Real) { row.store(j, nan); });
    return nan;
  }
  const Softmax<Real> softmax(row);
  row.each([&](int j, Real a) { row.store(j, j == label ? softmax(a) - 1 : softmax(a)); });
  return log_of(softmax.total) - (row.at((int)label) - softmax.highest);
}

template <typename Real, typename Row>
DEVICE Real probability_loss(const Row& row, const Real* y) {
  const Softmax<Real> softmax(row);
  const Real log_total = log_of(softmax.total), mass = row.sum([=](int j, Real) { return y[j]; });
  row.each([&](int j, Real a) { row.store(j, mass * softmax(a) - y[j]); });
  return row.sum([=](int j, Real a) { return y[j] * (log_total - (a - softmax.highest)); });
}

template <typename Real, typename Row>
DEVICE Real binary_loss(const Row& row, const Real* y) {
  row.each([&](int j, Real a) { row.store(j, sigmoid(a) - y[j]); });
  return row.sum(
      [=](int j, Real a) { return (a > 0 || a != a ? a : Real(0)) - a * y[j] + log1p_of(exp_of(-abs_of(a))); });
}

template <typename Real, typename Row>
DEVICE Real squared_loss(const Row& row, const Real* y, int output) {
  row.each([&](int j, Real a) {
    const Real predicted = apply_output(output, a), source[1] = {predicted};
    Real gradient[1] = {predicted - y[j]};
    times_derivative(output, gradient, source);
    row.store(j, gradient[0]);
  });
  return Real(0.5) * row.sum([=](int j, Real a) {
    const Real residual = apply_output(output, a) - y[j];
    return residual * residual;
  });
}

template <typename Real, typename Row>
DEVICE Real squared_softmax_loss(const Row& row, const Real* y) {
  const Softmax<Real> softmax(row);
  const Real dot = row.sum([=](int j, Real a) { return (softmax(a) - y[j]) * softmax(a); });
  row.each([&](int j, Real a) { row.store(j, softmax(a) * (softmax(a) - y[j] - dot)); });
  return Real(0.5) * row.sum([=](int j, Real a) { return (softmax(a) - y[j]) * (softmax(a) - y[j]); });
}

// The loss of a row, whose da is written on the way. `label` points to the sample's label, or is null: then y are its targets.
template <typename Real, typename Row>
DEVICE Real loss_and_delta(const Row& row, int loss, int output, const int64* label, const Real* y) {
  if (loss == CROSS_ENTROPY) return label ? label_loss<Real>(row, *label) : probability_loss(row, y);
  if (loss == BINARY_CROSS_ENTROPY) return binary_loss(row, y);
  return output == OUTPUT_SOFTMAX ? squared_softmax_loss(row, y) : squared_loss(row, y, output);
}

// out(j, y^_j) for this lane's columns of y^ = O(a).
template <typename Real, typename Row, typename Out>
DEVICE void apply_output_function(const Row& row, int output, Out out) {
  if (output == OUTPUT_SOFTMAX) {
    const Softmax<Real> softmax(row);
    row.each([&](int j, Real a) { out(j, softmax(a)); });
  } else {
    row.each([&](int j, Real a) { out(j, apply_output(output, a)); });
  }
}
