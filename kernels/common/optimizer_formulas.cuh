// Optimizer updates of one number of theta, and the check that skips a step whose loss or gradient is not finite.
//
// Every operation rounds by itself, in the sequence of gpuback/_backends/numpy/updates.py: from the same gradient and
// factor come the same bits.
#pragma once
#include "canonical_nan.cuh"
#include "rounded.cuh"

// The state that stays on the device from step to step.
enum State {
  STEPS = 0,        // updates made so far
  DIVERGED_AT = 1,  // how many there were when a loss or gradient was first not finite; -1: never
  APPLY = 2,        // 1 if this step makes an update
  PRESCALES = 3,    // how many times the gradient is multiplied by 2^-100, and then by the factor,
  FACTOR = 4,       // which is not smaller: a float holds it as a normal number
  BETA_POWER_1 = 5, BETA_POWER_2 = 6  // Adam's beta^t
};

// Hyper-parameters, as doubles in the device's memory: so launches are the same whatever they are. CLIP_NORM 0: no
// clipping.
enum HyperParameter {
  LEARNING_RATE = 0, WEIGHT_DECAY = 1, MOMENTUM = 2, NESTEROV = 3, BETA_1 = 4, BETA_2 = 5, EPS = 6, DECOUPLED = 7,
  CLIP_NORM = 8, STOP_AFTER_NONFINITE = 9
};

// Squares of doubles that lie beyond 2^500 or below 2^-500 are summed apart, scaled, so that none overflows or
// vanishes.
DEVICE void add_square(double (&sums)[3], float x) { sums[0] += (double)x * x; }
DEVICE void add_square(double (&sums)[3], double x) {
  const double size = fabs(x), huge = 0x1p500, scale = 0x1p600;
  if (size > huge)
    sums[1] += (x / scale) * (x / scale);
  else if (size < 1 / huge)
    sums[2] += (x * scale) * (x * scale);
  else
    sums[0] += x * x;
}

DEVICE void set_factor(double* state, double factor, int prescales) {
  for (; 0 < factor && factor < 0x1p-100; ++prescales) factor *= 0x1p100;
  state[PRESCALES] = prescales;
  state[FACTOR] = factor;
}

// Sets the factor that brings a gradient of that norm down to clip_norm.
DEVICE void set_factor_for(double* state, double norm, double clip_norm) {
  const Double factor = Double(clip_norm) / (Double(norm) + 1e-6);
  set_factor(state, factor < 1.0 ? factor.value : 1.0, 0);
}

// The same for the norm that the three sums give, which may be larger than any double.
DEVICE void set_factor_for(double* state, const double (&sums)[3], double clip_norm) {
  const double scale = 0x1p600, scaled_norm = sqrt(sums[1] + sums[0] / scale / scale), norm = scaled_norm * scale;
  if (sums[1] == 0) {
    set_factor_for(state, sums[0] > 0 ? sqrt(sums[0]) : sqrt(sums[2]) / scale, clip_norm);
  } else if (is_finite(norm)) {
    set_factor_for(state, norm, clip_norm);
  } else {
    const double factor = clip_norm / (scaled_norm * 0x1p500);
    set_factor(state, factor < 0x1p100 ? factor : 0x1p100, 1);
  }
}

// Whether a step is made, given whether its loss and gradient are finite. Writes nothing.
DEVICE bool applies(const double* state, bool finite, int stop_after_nonfinite) {
  return finite && !(stop_after_nonfinite && state[DIVERGED_AT] >= 0);
}

// The same, and records it: counts the step if it is made, and sets its factor to 1.
DEVICE bool record_step(double* state, bool finite, int stop_after_nonfinite, double beta_1, double beta_2) {
  if (!finite && state[DIVERGED_AT] < 0) state[DIVERGED_AT] = state[STEPS];
  const bool made = applies(state, finite, stop_after_nonfinite);
  state[APPLY] = made;
  if (!made) return false;
  set_factor(state, 1, 0);
  state[STEPS] += 1;
  state[BETA_POWER_1] *= beta_1;
  state[BETA_POWER_2] *= beta_2;
  return true;
}

// Multiplies the gradient by the factor of this step.
template <typename Real>
struct Scale {
  int prescales;
  Real factor;

  explicit DEVICE Scale(const double* state) : prescales((int)state[PRESCALES]), factor((Real)state[FACTOR]) {}

  DEVICE Rounded<Real> operator()(Rounded<Real> g) const {
#pragma unroll 1  // hardly ever even once
    for (int i = 0; i < prescales; ++i) g = g * Real(0x1p-100);
    return g * factor;
  }
};

// v <- momentum v + g, theta <- theta - learning_rate (v, or g + momentum v with Nesterov, or g without momentum), with
// g = gradient + weight_decay theta. Without weight decay nothing is added, not even 0, which would turn -0 into 0.
template <typename Real>
struct Sgd {
  typedef Rounded<Real> Number;
  Number rate, momentum, decay;
  bool nesterov;

  DEVICE Sgd(double learning_rate, double momentum, int nesterov, double weight_decay)
      : rate((Real)learning_rate), momentum((Real)momentum), decay((Real)weight_decay), nesterov(nesterov) {}

  // `velocity` is null without momentum.
  DEVICE void operator()(Real& theta, Real* velocity, Number g) const {
    const Number t = theta;
    if (decay.value != 0) g = g + decay * t;
    if (velocity) {
      const Number v = momentum * Number(*velocity) + g;
      g = nesterov ? g + momentum * v : v;
      *velocity = canonical_nan(v);
    }
    theta = canonical_nan(t - rate * g);
  }
};

// m <- m + (1 - beta_1)(g - m), v <- beta_2 v + (1 - beta_2) g^2, theta <- theta - (learning_rate / c_1) m / (sqrt(v /
// c_2) + eps), with c = 1 - beta^t and g = gradient + weight_decay theta; decoupled, theta is first multiplied by 1 -
// learning_rate weight_decay instead. Numerator and denominator of that quotient are both multiplied by sqrt(c_2).
template <typename Real>
struct Adam {
  typedef Rounded<Real> Number;
  Number rate, gain_1, gain_2, beta_2, epsilon, decay, shrink;
  bool decoupled;

  // beta_power_1 and beta_power_2: beta^t, this step counted.
  DEVICE Adam(double learning_rate, double beta_1, double beta_2, double eps, double weight_decay, int decoupled,
              double beta_power_1, double beta_power_2)
      : decoupled(decoupled) {
    const Double one = 1.0, root_2 = root(one - beta_power_2);
    rate = (Real)(learning_rate * root_2 / (one - beta_power_1)).value;
    gain_1 = (Real)(one - beta_1).value, gain_2 = (Real)(one - beta_2).value;
    this->beta_2 = (Real)beta_2, epsilon = (Real)(eps * root_2).value;
    decay = (Real)weight_decay, shrink = (Real)(one - Double(learning_rate) * weight_decay).value;
  }

  DEVICE void operator()(Real& theta, Real& first_moment, Real& second_moment, Number g) const {
    Number t = theta, m = first_moment, v = second_moment;
    const bool decays = decay.value != 0;
    if (decays && decoupled) t = t * shrink;
    if (decays && !decoupled) g = g + decay * t;
    m = m + gain_1 * (g - m);
    v = beta_2 * v + gain_2 * (g * g);
    theta = canonical_nan(t - rate * (m / (root(v) + epsilon)));
    first_moment = canonical_nan(m);
    second_moment = canonical_nan(v);
  }
};
