// The output layer of one sample: y^ = O(a), the loss l(y^, y), and dl/da.
//
//     cross entropy, softmax            l = sum_j y_j (log s - z_j)                dl/da = (sum_j y_j) y^ - y
//                                       of a label y: log s - z_y                  y^ - e(y)
//                                       with z = a - max a, s = sum_j e^z_j, y^ = e^z / s
//     binary cross entropy, sigmoid     l = sum_j max(a, 0) - a y + log1p(e^-|a|)  y^ - y
//       weighted                        of targets t_j = p_j y_j + m_j
//     squared error                     l = 1/2 sum_j (y^ - y)^2                   r = y^ - y
//       identity, sigmoid, tanh                                                    r g'(a)
//       softmax                                                                    y^ (r - sum_j r_j y^_j)
//     absolute error                    l = sum_j |r_j|                            sign(r) g'(a), sign(0) = 0
//     Huber                             l = sum_j c (r - c/2)                      c g'(a)
//                                       with c = r clipped to +-delta
//     quantile                          l = sum_j (1 - q) r or -q r                (1 - q or -q, 0 at 0) g'(a)
//     Poisson, exponential              l = sum_j y log(y / y^) - y + y^           y^ - y
//
// The parameters of a loss, rows of n numbers one after the other: p and m; delta; 1 - q and q.
//
// A label outside 0 ... n - 1 is never used as an index: its loss and its dl/da become NaN.
#pragma once
#include "activations.cuh"
#include "block_sum.cuh"

enum Loss {
  CROSS_ENTROPY = 0, BINARY_CROSS_ENTROPY = 1, SQUARED_ERROR = 2, ABSOLUTE_ERROR = 3, HUBER = 4, QUANTILE = 5,
  POISSON = 6, WEIGHTED_CROSS_ENTROPY = 7
};
enum OutputFunction { OUTPUT_SOFTMAX = -1 };  // else an Activation

// A row of pre-activations in memory, worked on by LANES neighbouring lanes of a warp: each takes every LANES-th
// column. All lanes of the warp work on such rows at a time.
template <int LANES, typename Real>
struct Row {
  const Real* a;
  int n;

  static DEVICE int lane() { return threadIdx.x % LANES; }

  // These lanes' values, combined in each of them.
  template <typename Combine>
  static DEVICE Real combined(Real value, Combine combine) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
  }

  // body(j, a_j) for each of this lane's columns.
  template <typename Body>
  DEVICE void each(Body body) const {
    for (int j = lane(); j < n; j += LANES) body(j, a[j]);
  }

  // The sum of term(j, a_j) over the row. A lane adds 64 of its columns at a time. Rolled, the loop takes fewer
  // registers.
  template <bool ROLLED = false, typename Term>
  DEVICE Real sum(Term term) const {
    Real total = 0;
    for (int first = lane(); first < n; first += LANES * 64) {
      const int end = min(n, first + LANES * 64);
      Real sum = 0;
      if (ROLLED) {
#pragma unroll 1
        for (int j = first; j < end; j += LANES) sum += term(j, a[j]);
      } else {
        for (int j = first; j < end; j += LANES) sum += term(j, a[j]);
      }
      total += sum;
    }
    return combined(total, Add());
  }

  // NaN wins.
  DEVICE Real largest() const {
    Real most = Real(__uint_as_float(0xff800000u));  // no lane reads another's columns
    for (int j = lane(); j < n; j += LANES) most = a[j] > most || a[j] != a[j] ? a[j] : most;
    return combined(most, Larger());
  }
};

template <typename Real>
struct Softmax {
  Real highest, total, inverse;  // max a, sum e^(a - max a), and 1 over it

  template <int LANES>
  explicit DEVICE Softmax(const Row<LANES, Real>& row) : highest(row.largest()) {
    const Real shift = highest;
    total = row.sum([=](int, Real a) { return exp_of(a - shift); });
    inverse = 1 / total;
  }
  DEVICE Real operator()(Real a) const { return exp_of(a - highest) * inverse; }
};

// The output functions of sums over outputs: identity, sigmoid and tanh.
template <typename Real>
DEVICE Real apply_output(int output, Real a) {
  switch (output) {
    case IDENTITY: return a;
    case SIGMOID: return sigmoid(a);
    case TANH: return tanh_of(a);
    default: return no_function<Real>();
  }
}

// Their derivative, from y^.
template <typename Real>
DEVICE Real output_derivative(int output, Real predicted) {
  switch (output) {
    case IDENTITY: return 1;
    case SIGMOID: return predicted * (1 - predicted);
    case TANH: return 1 - predicted * predicted;
    default: return no_function<Real>();
  }
}

// Each of these returns a row's loss and calls write(j, dl/da_j) for each of the lane's columns, when a_j has been read
// for the last time: the gradient may take its place.

template <int LANES, typename Real, typename Write>
DEVICE Real label_loss(const Row<LANES, Real>& row, int64 label, Write write) {
  if (label < 0 || label >= row.n) {
    const Real nan = Real(__uint_as_float(0x7fc00000u));
    row.each([&](int j, Real) { write(j, nan); });
    return nan;
  }
  const Softmax<Real> softmax(row);
  const Real of_label = row.combined(label % LANES == row.lane() ? row.a[label] : Real(0), Add());
  const Real loss = log_of(softmax.total) - (of_label - softmax.highest);
  row.each([&](int j, Real a) { write(j, j == label ? softmax(a) - 1 : softmax(a)); });
  return loss;
}

// The same bits for rows of up to PER_LANE numbers a lane, which are read once, into registers.
template <int PER_LANE, int LANES, typename Real, typename Write>
DEVICE Real label_loss_in_registers(const Row<LANES, Real>& row, int64 label, Write write) {
  const bool known = label >= 0 && label < row.n;
  const int column = known ? (int)label : -1;
  const Real nan = Real(__uint_as_float(0x7fc00000u));
  Real values[PER_LANE], highest = Real(__uint_as_float(0xff800000u)), total = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int j = row.lane() + i * LANES;
    values[i] = j < row.n ? row.a[j] : Real(__uint_as_float(0xff800000u));
    highest = Larger()(highest, values[i]);
  }
  highest = row.combined(highest, Larger());
  const Real of_label = row.combined(known && column % LANES == row.lane() ? row.a[column] : Real(0), Add());
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    values[i] = exp_of(values[i] - highest);
    total += values[i];  // 0, of what is no column
  }
  total = row.combined(total, Add());
  const Real inverse = known ? 1 / total : nan;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int j = row.lane() + i * LANES;
    if (j < row.n) write(j, j == column ? values[i] * inverse - 1 : values[i] * inverse);
  }
  return known ? log_of(total) - (of_label - highest) : nan;
}

// Of targets that are rows y or, if WEIGHTED, p y + m. `own`: -1, or a label, whose row is e(own), or n for
// one that is out of range: it makes NaN, by a way that rows of a warp can go together.
template <bool WEIGHTED = false, int LANES, typename Real, typename Write>
DEVICE Real probability_loss(const Row<LANES, Real>& row, int own, const Real* y, const Real* parameters,
                             Write write) {
  const auto target = [=](int j) {
    const Real no_label = own < row.n ? Real(0) : Real(__uint_as_float(0x7fc00000u));
    const Real given = own < 0 ? y[j] : j == own ? Real(1) : no_label;
    return WEIGHTED ? parameters[j] * given + parameters[row.n + j] : given;
  };
  const bool rolled = WEIGHTED && LANES < 32;  // kernels of a whole network have no registers to spare
  const Softmax<Real> softmax(row);
  const Real mass = row.template sum<rolled>([=](int j, Real) { return target(j); });
  const Real log_total = log_of(softmax.total);
  const Real loss = row.template sum<rolled>([=](int j, Real a) {
    const Real t = target(j);  // 0 times an infinite distance would be NaN
    return t == 0 ? Real(0) : t * (log_total - (a - softmax.highest));
  });
  row.each([&](int j, Real a) { write(j, mass * softmax(a) - target(j)); });
  return loss;
}

template <int LANES, typename Real, typename Write>
DEVICE Real binary_loss(const Row<LANES, Real>& row, const Real* y, Write write) {
  return row.sum([&](int j, Real a) {
    const Real target = y[j];
    write(j, sigmoid(a) - target);
    const Real finite = (a > 0 || a != a ? a : Real(0)) - a * target;  // not of an infinite a, which a - a tells
    const Real distance = target == (a > 0 ? 1 : 0) ? Real(0) : a - a != 0 ? abs_of(a) : finite;
    return distance + log1p_of(exp_of(-abs_of(a)));
  });
}

template <int LANES, typename Real, typename Write>
DEVICE Real squared_softmax_loss(const Row<LANES, Real>& row, const Real* y, Write write) {
  const Softmax<Real> softmax(row);
  const Real dot = row.sum([=](int j, Real a) { return (softmax(a) - y[j]) * softmax(a); });
  const Real twice = row.sum([=](int j, Real a) { return (softmax(a) - y[j]) * (softmax(a) - y[j]); });
  row.each([&](int j, Real a) { write(j, softmax(a) * (softmax(a) - y[j] - dot)); });
  return Real(0.5) * twice;
}

template <int LANES, typename Real, typename Write>
DEVICE Real squared_loss(const Row<LANES, Real>& row, const Real* y, int output, Write write) {
  return Real(0.5) * row.sum([&](int j, Real a) {
    const Real predicted = apply_output(output, a), residual = predicted - y[j];
    write(j, residual * output_derivative(output, predicted));
    return residual * residual;
  });
}

// Absolute error, Huber and quantile: sums over the outputs of a function of the residual.
template <int LANES, typename Real, typename Write>
DEVICE Real residual_loss(const Row<LANES, Real>& row, const Real* y, int loss, int output, const Real* parameters,
                          Write write) {
  return row.sum([&](int j, Real a) {
    const Real predicted = apply_output(output, a), r = predicted - y[j];
    Real slope = r, of_loss = r;  // the loss is their product
    if (loss == HUBER) {
      const Real delta = parameters[j];
      slope = r > delta ? delta : r < -delta ? -delta : r;
      of_loss = r - Real(0.5) * slope;
    } else if (r != 0) {
      const bool quantile = loss == QUANTILE;
      const Real above = quantile ? parameters[j] : Real(1), below = quantile ? parameters[row.n + j] : Real(1);
      slope = r > 0 ? above : r < 0 ? -below : r;
    }
    write(j, slope * output_derivative(output, predicted));
    return slope * of_loss;
  });
}

// With d = a - log y a term is y (e^d - 1 - d), which cancels less where y^ is near y. A target below 0 makes NaN.
template <int LANES, typename Real, typename Write>
DEVICE Real poisson_loss(const Row<LANES, Real>& row, const Real* y, Write write) {
  return row.template sum<(LANES < 32)>([&](int j, Real a) {
    const Real target = y[j], predicted = exp_of(a), d = a - log_of(target);
    write(j, predicted - target);
    const Real large = Real(1e4);  // e^large is infinite, and infinity less infinity would be NaN
    return target == 0 ? predicted : target * (expm1_of(d) - (d > large ? large : d));
  });
}

// The losses up to SQUARED_ERROR. `label` points to the sample's label, or is null: then y are its targets.
template <int LANES, typename Real, typename Write>
DEVICE Real loss_of_row(const Row<LANES, Real>& row, int loss, int output, const int64* label, const Real* y,
                        Write write) {
  if (loss == CROSS_ENTROPY)
    return label ? label_loss(row, *label, write) : probability_loss(row, -1, y, (const Real*)nullptr, write);
  if (loss == BINARY_CROSS_ENTROPY) return binary_loss(row, y, write);
  return output == OUTPUT_SOFTMAX ? squared_softmax_loss(row, y, write) : squared_loss(row, y, output, write);
}

// The others, some of which have parameters.
template <int LANES, typename Real, typename Write>
DEVICE Real further_loss_of_row(const Row<LANES, Real>& row, int loss, int output, const int64* label, const Real* y,
                                const Real* parameters, Write write) {
  if (loss == WEIGHTED_CROSS_ENTROPY) {
    const int own = !label ? -1 : *label < 0 || *label >= row.n ? row.n : (int)*label;
    return probability_loss<true>(row, own, y, parameters, write);
  }
  if (loss == POISSON) return poisson_loss(row, y, write);
  return residual_loss(row, y, loss, output, parameters, write);
}

// write(j, y^_j) for each of the lane's columns.
template <int LANES, typename Real, typename Write>
DEVICE void output_of_row(const Row<LANES, Real>& row, int output, Write write) {
  if (output == OUTPUT_SOFTMAX) {
    const Softmax<Real> softmax(row);
    row.each([&](int j, Real a) { write(j, softmax(a)); });
  } else {
    row.each([&](int j, Real a) {
      Real value[1] = {a};
      activate(output, value);
      write(j, value[0]);
    });
  }
}

// write(j, sum_i dy_i dO_i/da_j) for each of the lane's columns of a row of dy. `source`: y^, or a where O' is computed
// from it, or null for the identity.
template <int LANES, typename Real, typename Write>
DEVICE void through_output(const Row<LANES, Real>& dy, int output, const Real* source, Write write) {
  if (output == OUTPUT_SOFTMAX) {
    const Real dot = dy.sum([=](int j, Real value) { return value * source[j]; });
    dy.each([&](int j, Real value) { write(j, source[j] * (value - dot)); });
  } else {
    dy.each([&](int j, Real value) {
      Real d[1] = {value}, from[1] = {source ? source[j] : Real(0)};
      times_derivative(output, d, from);
      write(j, d[0]);
    });
  }
}
