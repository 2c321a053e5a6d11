// exp, log, tanh, the activations and their slopes as fixed sequences of IEEE operations in float64.
//
// They follow gpuback/_core/elementary.py operation by operation, which says why and how, and whose DEFINES are the
// coefficients. Results have NumPy's bits. A NaN has them once it is stored.
#pragma once
#include "../common/activations.cuh"
#include "../common/rounded.cuh"

// c_0 + c_1 x + c_2 x^2 + ...
template <int N>
DEVICE Double polynomial(Double x, const double (&c)[N]) {
  Double sum = x * c[N - 1];
#pragma unroll
  for (int j = N - 2; j > 0; --j) sum = (sum + c[j]) * x;
  return sum + c[0];
}

DEVICE Double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }

DEVICE Double absolute(Double x) { return fabs(x.value); }

DEVICE Double clipped(Double x, double least, double most) { return x < least ? least : x > most ? most : x; }

// e^x = 2^k (C + r) / (C - r), with k the integer next to x / ln 2, r = x - k ln 2 and C = r coth(r / 2).
struct Exponential {
  Double power;  // 2^k
  Double r, c;

  // |x| <= EXP_LIMIT
  DEVICE explicit Exponential(Double x) {
    const double coefficients[] = {EXP_COEFFICIENTS};
    const Double shifted = x * LOG2_E + EXP_MAGIC;
    power = __longlong_as_double((int64)((uint64)__double_as_longlong(shifted.value) << EXPONENT_SHIFT));
    r = x - (shifted - EXP_MAGIC) * LN_2;
    c = polynomial(r * r, coefficients);
  }

  DEVICE Double numerator() const { return (c + r) * power; }
  DEVICE Double denominator() const { return c - r; }
  DEVICE Double numerator_less_denominator() const { return (power + 1.0) * r - (Double(1.0) - power) * c; }
};

DEVICE Exponential exponential(Double x) { return Exponential(clipped(x, -EXP_LIMIT, EXP_LIMIT)); }

DEVICE Double exp(Double x) {
  const Exponential e = exponential(x);
  return e.numerator() / e.denominator();
}

DEVICE Double expm1(Double x) {
  const Exponential e = exponential(x);
  return e.numerator_less_denominator() / e.denominator();
}

DEVICE Double tanh(Double x) {
  const Exponential e = exponential(x + x);
  return e.numerator_less_denominator() / ((e.power + 1.0) * e.c - (Double(1.0) - e.power) * e.r);
}

// 1 / (1 + e^-x)
DEVICE Double sigmoid(const Exponential& e) {
  const Double numerator = e.numerator();
  return numerator / (e.denominator() + numerator);
}

DEVICE Double sigmoid(Double x) { return sigmoid(exponential(x)); }

// log(1 + e^x)
DEVICE Double softplus(Double x) {
  const double coefficients[] = {SOFTPLUS_COEFFICIENTS};
  const Exponential e(absolute(clipped(x, -EXP_LIMIT, EXP_LIMIT)));
  const Double numerator = e.numerator(), f = e.denominator() / (numerator + numerator + e.denominator());
  return (x < 0.0 ? Double(0.0) : x) + f * polynomial(f * f, coefficients);
}

// -2^52 k, with x = 2^k m, sqrt(1/2) < m <= sqrt(2).
DEVICE int64 minus_exponent(Double x) { return (SQRT_2_BITS - __double_as_longlong(x.value)) & EXPONENT_MASK; }

DEVICE Double mantissa(Double x, int64 minus_k) {
  return __longlong_as_double(__double_as_longlong(x.value) + minus_k);
}

// k ln 2 + 2 artanh(f); minus infinity where x is the pole, NaN below it, infinity where x is.
DEVICE Double finished_log(Double x, double pole, int64 minus_k, Double f) {
  const double coefficients[] = {LOG_COEFFICIENTS};
  if (!(x > pole)) return x.value == pole ? -infinity() : infinity() - infinity();
  if (!(x < infinity())) return x;
  return f * polynomial(f * f, coefficients) + Double(__ll2double_rn(minus_k)) * MINUS_LN_2_SCALED;
}

// x is 0 or a normal number.
DEVICE Double log(Double x) {
  const int64 minus_k = minus_exponent(x);
  const Double m = mantissa(x, minus_k);
  return finished_log(x, 0.0, minus_k, (m - 1.0) / (m + 1.0));
}

DEVICE Double log1p(Double x) {
  const Double sum = x + 1.0;
  const int64 minus_k = minus_exponent(sum);
  const Double d = minus_k == 0 ? x : mantissa(sum, minus_k) - 1.0;
  return finished_log(x, -1.0, minus_k, d / (d + 2.0));
}

// ---- Activations. +0 is added where NumPy cannot say which zero comes of -0 and +0.

// u = 2 sqrt(2 / pi) (a + 0.044715 a^3)
DEVICE Exponential gelu_exponential(Double a) {
  const Double limited = clipped(a, -GELU_LIMIT, GELU_LIMIT);
  return Exponential(limited * (limited * limited * GELU_CUBIC + GELU_LINEAR));
}

// max(x, least) s; a product with `least` is 0 in float32.
DEVICE Double times_sigmoid(Double x, double least, const Exponential& e) {
  return (x < least ? least : x) * sigmoid(e);
}

// s (1 + term (1 - s)), with s the sigmoid.
DEVICE Double gated_slope(Double term, const Exponential& e) {
  const Double numerator = e.numerator(), denominator = e.denominator();
  const Double inverse = Double(1.0) / (denominator + numerator);
  return (term * (denominator * inverse) + 1.0) * (numerator * inverse);
}

// max(a, 0) + 1 / (q + sqrt(q^2 + 1)), q = |a| / 2
DEVICE Double squareplus(Double a) {
  const Double q = absolute(a) * 0.5;
  return (a < 0.0 ? Double(0.0) : a) + Double(1.0) / (root(q * q + 1.0) + q);
}

// tanh(softplus(a)) = P / Q, with P = N (N + 2D), Q = P + 2D^2, and N and D of e^a. It is 1 past a = MISH_LIMIT.
struct MishFraction {
  Double a, p, square, rest, q;

  DEVICE explicit MishFraction(Double x) : a(clipped(x, -EXP_LIMIT, MISH_LIMIT)) {
    const Exponential e(a);
    const Double numerator = e.numerator(), denominator = e.denominator();
    p = (denominator + denominator + numerator) * numerator;
    square = denominator * denominator;
    rest = (denominator + numerator) * numerator;
    q = square + square + p;
  }
  DEVICE Double slope() const {
    const Double inverse = Double(1.0) / q;
    return (a * (rest * 4.0 * (square * inverse)) + p) * inverse;
  }
};

DEVICE Double hard_swish_slope(Double a) { return a.value <= -3.0 ? 0.0 : a.value >= 3.0 ? 1.0 : (a + 1.5) / 3.0; }

// What users' expressions call their functions, and the type of their numbers.
typedef Double Real;
DEVICE Double exp_of(Double x) { return exp(x); }
DEVICE Double expm1_of(Double x) { return expm1(x); }
DEVICE Double log_of(Double x) { return log(x); }
DEVICE Double log1p_of(Double x) { return log1p(x); }
DEVICE Double tanh_of(Double x) { return tanh(x); }
DEVICE Double sqrt_of(Double x) { return root(x); }
DEVICE Double abs_of(Double x) { return absolute(x); }

#define USER_CASE(number, expression) case number: { const Real x = a; return expression; }
// g(a), by the numbers of activations.cuh.
DEVICE Double activation_of(int activation, Double a) {
  switch (activation) {
    case IDENTITY: return a;
    case RELU: return (a < 0.0 ? Double(0.0) : a) + 0.0;
    case LEAKY_RELU: return a > 0.0 ? a : a * LEAKY_SLOPE;
    case ELU: {
      const Double below = expm1(a > 0.0 ? Double(0.0) : a);
      return (a > below ? a : below) + 0.0;
    }
    case SIGMOID: return sigmoid(a);
    case TANH: return tanh(a);
    case SOFTPLUS: return softplus(a);
    case EXPONENTIAL: return exp(a);
    case SQUAREPLUS: return squareplus(a);
    case SELU:
      return (a < 0.0 ? Double(0.0) : a) * SELU_SCALE + expm1(a > 0.0 ? Double(0.0) : a) * SELU_DEPTH + 0.0;
    case SOFTSIGN: {
      const Double limited = clipped(a, -SOFTSIGN_LIMIT, SOFTSIGN_LIMIT);
      return limited / (absolute(limited) + 1.0);
    }
    case LOG_SIGMOID: return -softplus(-a);
    case HARD_TANH: return clipped(a, -1.0, 1.0);
    case RELU6: return clipped(a, 0.0, 6.0) + 0.0;
    case HARD_SIGMOID: return clipped(a + 3.0, 0.0, 6.0) / 6.0;
    case GELU: return times_sigmoid(a, -GELU_LIMIT, gelu_exponential(a));
    case SILU: return times_sigmoid(a, -EXP_LIMIT, exponential(a));
    case MISH: {
      const MishFraction gate(a);
      return (a < -EXP_LIMIT ? Double(-EXP_LIMIT) : a) * (gate.p / gate.q);
    }
    case HARD_SWISH: return (a < -3.0 ? Double(-3.0) : a) * clipped(a + 3.0, 0.0, 6.0) / 6.0;
    USER_FORWARD
  }
  return no_function<double>();
}

#undef USER_CASE

#define USER_CASE(number, expression) case number: return expression;
// g' from h = g(a), or from a.
DEVICE Double slope_of(int activation, Double source) {
  const Double x = source;
  switch (activation) {
    case IDENTITY: return 1.0;
    case RELU: return x > 0.0 ? 1.0 : 0.0;
    case LEAKY_RELU: return x > 0.0 ? 1.0 : LEAKY_SLOPE;
    case ELU: return (x > 0.0 ? Double(0.0) : x) + 1.0;
    case SIGMOID: return (Double(1.0) - x) * x;
    case TANH: return Double(1.0) - x * x;
    case SOFTPLUS: return -expm1(-x);
    case EXPONENTIAL: return x;
    case SQUAREPLUS: return Double(1.0) / (Double(1.0) / (x * x) + 1.0);
    case SELU: return x > 0.0 ? Double(SELU_SCALE) : x + SELU_DEPTH;
    case SOFTSIGN: return (Double(1.0) - absolute(x)) * (Double(1.0) - absolute(x));
    case LOG_SIGMOID: return -expm1(x);
    case HARD_TANH: return absolute(x) < 1.0 ? 1.0 : 0.0;
    case RELU6: return x > 0.0 && x < 6.0 ? 1.0 : 0.0;
    case HARD_SIGMOID: return x > 0.0 && x < 1.0 ? Double(1.0) / 6.0 : Double(0.0);
    case GELU: {
      const Double limited = clipped(x, -GELU_LIMIT, GELU_LIMIT);
      return gated_slope((limited * limited * GELU_CUBIC_SLOPE + GELU_LINEAR) * limited, gelu_exponential(x));
    }
    case SILU: return gated_slope(clipped(x, -EXP_LIMIT, EXP_LIMIT), exponential(x));
    case MISH: return MishFraction(x).slope();
    case HARD_SWISH: return hard_swish_slope(x);
    USER_SLOPE
  }
  return no_function<double>();
}
#undef USER_CASE
