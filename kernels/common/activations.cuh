// The activation functions g and their derivatives g', by the numbers in gpuback/_core/activations.py.
//
// g' is computed from h = g(a) or, where bit 5 of the number is set, from a. At a kink it is the derivative from the
// left. A number without a function makes NaN.
#pragma once
#include "sine.cuh"
#include "types.cuh"

enum Activation {
  IDENTITY = 0, RELU = 1, LEAKY_RELU = 2, ELU = 3, SIGMOID = 4, TANH = 5, SOFTPLUS = 6,
  GELU = 32, SILU = 33
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
DEVICE Real limited(Real a) {
  const Real saturated = Real(1e4);
  return a > saturated ? saturated : a < -saturated ? -saturated : a;
}

template <typename Real>
DEVICE Real gated(Real a, Real s) { return (a < -Real(1e4) ? -Real(1e4) : a) * s; }

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

// Activations that need no more than a comparison. The others call functions that take much code for each number.
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
    case GELU: EACH(gated(x, sigmoid(Gelu<Real>::argument(x))));
    case SILU: EACH(gated(x, sigmoid(x)));
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
    // s (1 + a u' (1 - s)), with 1 - s as the sigmoid of -u, whose rounding error stays small beside it
    case GELU:
      EACH(sigmoid(Gelu<Real>::argument(x)) *
           (1 + limited(x) * Gelu<Real>::argument_slope(limited(x)) * sigmoid(-Gelu<Real>::argument(x))));
    case SILU: EACH(sigmoid(x) * (1 + limited(x) * sigmoid(-x)));
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
