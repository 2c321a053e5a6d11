// The activation functions g and their derivatives g', by the numbers in gpuback/_core/activations.py.
//
// g' is computed from h = g(a) or, where bit 5 of the number is set, from a. At a kink it is what
// gpuback/_core/activations.py says. A number without a function makes NaN.
#pragma once
#include "sine.cuh"
#include "types.cuh"

enum Activation {
  IDENTITY = 0, RELU = 1, LEAKY_RELU = 2, ELU = 3, SIGMOID = 4, TANH = 5, SOFTPLUS = 6, EXPONENTIAL = 7,
  SQUAREPLUS = 8, SELU = 9, SOFTSIGN = 10, LOG_SIGMOID = 11, HARD_TANH = 12, RELU6 = 13, HARD_SIGMOID = 14,
  GELU = 32, SILU = 33, GELU_ERF = 34, SINE = 35, MISH = 36, HARD_SWISH = 37
};

DEVICE bool derivative_from_a(int activation) { return activation & 32; }

// What comes of a number without a function.
template <typename Real>
DEVICE Real no_function() { return Real(__uint_as_float(0x7fc00000u)); }

// Single and double precision under one name.
DEVICE float exp_of(float x) { return expf(x); }
DEVICE double exp_of(double x) { return exp(x); }
DEVICE float expm1_of(float x) { return expm1f(x); }
DEVICE double expm1_of(double x) { return expm1(x); }
DEVICE float log_of(float x) { return logf(x); }
DEVICE double log_of(double x) { return log(x); }
DEVICE float log1p_of(float x) { return log1pf(x); }
DEVICE double log1p_of(double x) { return log1p(x); }
DEVICE float tanh_of(float x) { return tanhf(x); }
DEVICE double tanh_of(double x) { return tanh(x); }
DEVICE float abs_of(float x) { return fabsf(x); }
DEVICE double abs_of(double x) { return fabs(x); }
DEVICE float sqrt_of(float x) { return sqrtf(x); }
DEVICE double sqrt_of(double x) { return sqrt(x); }

// 1 / (1 + e^-a) as e^min(a,0) / (1 + e^-|a|), which neither overflows nor cancels.
template <typename Real>
DEVICE Real sigmoid(Real a) {
  const Real e = exp_of(-abs_of(a));
  return (a < 0 ? e : Real(1)) / (1 + e);
}

// log(1 + e^a) as max(a, 0) + log1p(e^-|a|).
template <typename Real>
DEVICE Real softplus(Real a) {
  return (a < 0 ? Real(0) : a) + log1p_of(exp_of(-abs_of(a)));
}

// (a + sqrt(a^2 + 4)) / 2 as max(a, 0) + 1 / (q + sqrt(q^2 + 1)) with q = |a| / 2, which neither overflows nor cancels.
template <typename Real>
DEVICE Real squareplus(Real a) {
  const Real q = Real(0.5) * abs_of(a), large = Real(1e10), below = q > large ? large : q;
  const Real root = sqrt_of(below * below + 1);
  return (a < 0 ? Real(0) : a) + 1 / (q + (root < q ? q : root));
}

// h^2 / (1 + h^2), of h = squareplus(a)
template <typename Real>
DEVICE Real squareplus_slope(Real h) {
  const Real large = Real(1e10), limited = h > large ? large : h;
  return limited * limited / (1 + limited * limited);
}

template <typename Real> struct Selu {
  static DEVICE Real scale() { return Real(1.0507009873554805); }
  static DEVICE Real depth() { return Real(1.7580993408473769); }  // times alpha
};

// a / (1 + |a|)
template <typename Real>
DEVICE Real softsign(Real a) {
  const Real large = Real(1e30);
  return a > large ? Real(1) : a < -large ? Real(-1) : a / (1 + abs_of(a));
}

template <typename Real> struct Gelu {
  static DEVICE Real scale() { return Real(1.5957691216057308); }  // 2 sqrt(2 / pi)
  static DEVICE Real cubic() { return Real(0.044715); }
  // u = 2 sqrt(2 / pi) (a + 0.044715 a^3)
  static DEVICE Real argument(Real a) { return scale() * a * (1 + cubic() * a * a); }
  static DEVICE Real argument_slope(Real a) { return scale() * (1 + 3 * cubic() * a * a); }
};

// a s, where s is the sigmoid of something that grows with a. Past |a| = 10^4 s is 0 or 1 in every format, and a stands
// still where it meets that 0: it may have overflowed.
template <typename Real>
DEVICE Real limited(Real a, Real saturated = Real(1e4)) {
  return a > saturated ? saturated : a < -saturated ? -saturated : a;
}

template <typename Real>
DEVICE Real gated(Real a, Real s) { return (a < -Real(1e4) ? -Real(1e4) : a) * s; }

// The normal distribution's density phi and, for y >= 0, its tail Phi(-y): in single precision as phi(y) times Mills'
// ratio, t P(2t - 1) with t = 1 / (1 + 0.3 y), as erfcf takes registers that some kernels have not.
template <typename Real>
DEVICE Real normal_density(Real y) { return Real(0.39894228040143268) * exp_of(Real(-0.5) * y * y); }

DEVICE float normal_tail(float y) {
  const float t = 1 / (1 + 0.3f * y), s = 2 * t - 1;
  const float coefficients[] = {
      0.55639781430036f, 0.4125395933751854f, 0.21694798466129947f, 0.06958480718455237f, 0.004551811739642448f,
      -0.006074534487936626f, -0.0014271518181127828f, 0.0007026468770872586f, 0.0001914896394804087f,
      -0.00010032763477272697f};
  float polynomial = coefficients[9];
#pragma unroll
  for (int j = 8; j >= 0; --j) polynomial = polynomial * s + coefficients[j];
  return normal_density(y) * (t * polynomial);
}
DEVICE double normal_tail(double y) { return 0.5 * erfc(0.70710678118654752 * y); }

// a Phi(a) as max(a, 0) - y Phi(-y), and Phi(a) + a phi(a), with y = |a|. Past y = 40 phi(y) is 0.
template <typename Real>
DEVICE Real gelu_erf(Real a) {
  const Real y = abs_of(limited(a, Real(40)));
  return (a < 0 ? Real(0) : a) - y * normal_tail(y);
}

template <typename Real>
DEVICE Real gelu_erf_slope(Real a) {
  const Real y = abs_of(limited(a, Real(40))), below = normal_tail(y) - y * normal_density(y);
  return a > 0 ? 1 - below : below;
}

// tanh(softplus(a)) = n r, with n = e (e + 2), r = 1 / (n + 2) and e = e^a: nothing cancels. Past a = 22 it is 1.
template <typename Real>
struct Mish {
  Real a, e, n;

  explicit DEVICE Mish(Real x) : a(x > 22 ? Real(22) : limited(x)), e(exp_of(a)), n(e * (e + 2)) {}
  DEVICE Real gate() const { return n / (n + 2); }
  // n r + 4 a e (e + 1) r^2
  DEVICE Real slope() const {
    const Real r = 1 / (n + 2);
    return e * r * ((e + 1) * (1 + 4 * a * r) + 1);
  }
};

// hard_sigmoid(a) = min(max(a + 3, 0), 6) / 6
template <typename Real>
DEVICE Real hard_sigmoid(Real a) {
  return a < -3 ? Real(0) : a > 3 ? Real(1) : (a + 3) * Real(1.0 / 6);
}

// For users' expressions.
template <typename Real>
DEVICE Real sin_of(Real x) { return sine_of(x, 0); }
template <typename Real>
DEVICE Real cos_of(Real x) { return sine_of(x, 1); }

// Cases that this variant alone has, from number 64 on: USER_CASE(number, expression in x) for each. They stand in the
// switches below and in exact/elementary.cuh.
#ifndef USER_FORWARD
#define USER_FORWARD
#define USER_SLOPE
#endif

// The commonest activations, which need no more than a comparison: kernels have code for each of them. The others share
// a switch, as most of them call functions that take much code for each number.
DEVICE bool piecewise_linear(int activation) { return (unsigned)activation <= LEAKY_RELU; }

#define USER_CASE(number, expression) case number: EACH(expression);
#define EACH(expression)                                                                                 \
  _Pragma("unroll") for (int j = 0; j < N; ++j) { const Real x = a[j]; a[j] = (expression); }       \
  break
template <typename Real, int N>
DEVICE void activate_linear(int activation, Real (&a)[N]) {
  switch (activation) {
    case IDENTITY: break;
    case RELU: EACH(x > 0 || x != x ? x : Real(0));
    case LEAKY_RELU: EACH(x > 0 ? x : Real(0.01) * x);
  }
}

template <typename Real, int N>
DEVICE void activate_smooth(int activation, Real (&a)[N]) {
  switch (activation) {
    case ELU: EACH(x > 0 ? x : expm1_of(x));
    case SIGMOID: EACH(sigmoid(x));
    case TANH: EACH(tanh_of(x));
    case SOFTPLUS: EACH(softplus(x));
    case EXPONENTIAL: EACH(exp_of(x));
    case SQUAREPLUS: EACH(squareplus(x));
    case SELU: EACH(x > 0 ? Selu<Real>::scale() * x : Selu<Real>::depth() * expm1_of(x));
    case SOFTSIGN: EACH(softsign(x));
    case LOG_SIGMOID: EACH(-softplus(-x));
    case HARD_TANH: EACH(x > 1 ? Real(1) : x < -1 ? Real(-1) : x);
    case RELU6: EACH(x > 6 ? Real(6) : x < 0 ? Real(0) : x);
    case HARD_SIGMOID: EACH(hard_sigmoid(x));
    case GELU: EACH(gated(x, sigmoid(Gelu<Real>::argument(x))));
    case SILU: EACH(gated(x, sigmoid(x)));
    case GELU_ERF: EACH(gelu_erf(x));
    case SINE: EACH(sine_of(x, 0));
    case MISH: EACH(gated(x, Mish<Real>(x).gate()));
    case HARD_SWISH: EACH(x < -3 ? Real(0) : x * hard_sigmoid(x));
    USER_FORWARD
    default: EACH(no_function<Real>());
  }
}
#undef EACH
#undef USER_CASE

template <typename Real, int N>
DEVICE void activate(int activation, Real (&a)[N]) {
  if (piecewise_linear(activation))
    activate_linear(activation, a);
  else
    activate_smooth(activation, a);
}

// d <- d g', with g' computed from `source`: h or a.
#define USER_CASE(number, expression) case number: EACH(expression);
#define EACH(expression)                                                                                 \
  _Pragma("unroll") for (int j = 0; j < N; ++j) { const Real x = source[j]; d[j] *= (expression); }       \
  break
template <typename Real, int N>
DEVICE void times_derivative_linear(int activation, Real (&d)[N], const Real (&source)[N]) {
  switch (activation) {
    case IDENTITY: break;
    case RELU: EACH(x > 0 ? Real(1) : Real(0));
    case LEAKY_RELU: EACH(x > 0 ? Real(1) : Real(0.01));
  }
}

template <typename Real, int N>
DEVICE void times_derivative_smooth(int activation, Real (&d)[N], const Real (&source)[N]) {
  switch (activation) {
    case ELU: EACH(x > 0 ? Real(1) : x + 1);
    case SIGMOID: EACH(x * (1 - x));
    case TANH: EACH(1 - x * x);
    case SOFTPLUS: EACH(-expm1_of(-x));
    case EXPONENTIAL: EACH(x);
    case SQUAREPLUS: EACH(squareplus_slope(x));
    case SELU: EACH(x > 0 ? Selu<Real>::scale() : x + Selu<Real>::depth());
    case SOFTSIGN: EACH((1 - abs_of(x)) * (1 - abs_of(x)));
    case LOG_SIGMOID: EACH(-expm1_of(x));
    case HARD_TANH: EACH(x > -1 && x < 1 ? Real(1) : Real(0));
    case RELU6: EACH(x > 0 && x < 6 ? Real(1) : Real(0));
    case HARD_SIGMOID: EACH(x > 0 && x < 1 ? Real(1.0 / 6) : Real(0));
    // s (1 + a u' (1 - s)), with 1 - s as the sigmoid of -u, whose rounding error stays small beside it
    case GELU:
      EACH(sigmoid(Gelu<Real>::argument(x)) *
           (1 + limited(x) * Gelu<Real>::argument_slope(limited(x)) * sigmoid(-Gelu<Real>::argument(x))));
    case SILU: EACH(sigmoid(x) * (1 + limited(x) * sigmoid(-x)));
    case GELU_ERF: EACH(gelu_erf_slope(x));
    case SINE: EACH(sine_of(x, 1));
    case MISH: EACH(Mish<Real>(x).slope());
    case HARD_SWISH: EACH(x <= -3 ? Real(0) : x >= 3 ? Real(1) : (x + Real(1.5)) * Real(1.0 / 3));
    USER_SLOPE
    default: EACH(no_function<Real>());
  }
}
#undef EACH
#undef USER_CASE

template <typename Real, int N>
DEVICE void times_derivative(int activation, Real (&d)[N], const Real (&source)[N]) {
  if (piecewise_linear(activation))
    times_derivative_linear(activation, d, source);
  else
    times_derivative_smooth(activation, d, source);
}
