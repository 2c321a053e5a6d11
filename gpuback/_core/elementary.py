"""exp, log, tanh and functions made of them, as fixed sequences of IEEE 754 operations.

Why: no library specifies the last bits of `exp`. They vary with the CPU (AVX2, AVX-512, NEON), NumPy, the C library and
CUDA. IEEE 754 does fix + − × ÷ √ in float64. So only these, comparisons and bit operations are used here and in
`elementary_activations.py`, which has the activations and their slopes. `kernels/exact/elementary.cuh` is the same
sequences in CUDA, none of them contracted to fma, with the same coefficients (`gpuback/_cuda/coefficients.py`). Another
operation, order or coefficient gives other bits.

Accuracy: the relative error is below 2·10⁻¹² for all x of which the result, in float32, is neither 0 nor infinite. A
result that is rounded once (`store`) is within 0.5001 ulp of float32, for tiny and for subnormal x, too, and where
results underflow. Slopes are off by less than 2·10⁻¹² (gelu's and silu's cross zero, so that error is absolute).

Calls: a function takes (x, out, scratch), writes g(x) to `out`, and uses `scratch`: `SCRATCH` arrays like x. All are
float64 and of one shape, and those of `scratch` contiguous. `out` may be x. Allocations do not grow with x. Every line
is one pass, over arrays that should be small enough to stay in cache. NaN gives NaN, ±∞ the limit. Infinities raise
NumPy's floating-point warnings; callers silence them with `np.errstate`.

The exponential behind most of them: with k the integer next to x/ln 2 and r = x − k ln 2, so that |r| ≤ ½ ln 2,

    e^x = 2^k e^r,    e^r = (C + r)/(C − r),    C = r coth(r/2) = 2 + r²/6 − r⁴/360 + …

C is even in r and hardly varies: three coefficients beside the 2 give it to 1.6·10⁻¹². With N = 2^k (C + r) and
D = C − r, e^x is N/D, and what is made of it by + − × ÷ needs one division in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gpuback._core.typing import Array

SCRATCH = 4
"""The number of scratch arrays that a function works in, beside `out`."""

ELEMENTS_AT_ONCE = 1 << 14
"""Elements that `apply` goes over at a time."""

Buffers = tuple[Array, ...]
Function = Callable[[Array, Array, Buffers], None]

# Polynomial coefficients, the lowest first. The lowest is exact, as tiny x need it. The others are minimax: they give
# the smallest possible relative error.

EXP_COEFFICIENTS = (2.0, 0.16666666614581813, -0.0027777514063286905, 6.57579210687783e-05)
"""r coth(r/2) by powers of r², for |r| ≤ ½ ln 2, to 1.6·10⁻¹²."""

LOG_COEFFICIENTS = (
    *(2.0, 0.6666666667576872, 0.39999995632819313, 0.2857210799830112, 0.2217623688618363, 0.19583462497433277),
)
"""2 artanh(f)/f by powers of f², for |f| ≤ (√2 − 1)/(√2 + 1), to 3·10⁻¹⁴."""

SOFTPLUS_COEFFICIENTS = (
    *(2.0, 0.6666666667685708, 0.3999999768227019, 0.2857160640508304, 0.2221578115166581, 0.18305629728814835),
    *(0.14096834552050286, 0.20006458139874916),
)
"""The same for |f| ≤ ⅓, to 8·10⁻¹⁴."""

EXP_LIMIT = 700.0
"""Arguments of exponentials are limited to ± this: results are then far outside float32, and 2^k is still normal."""

LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453

EXPONENT_SHIFT = 52
"""Bits of a float64 below its exponent."""

EXP_MAGIC = 1.5 * 2.0**EXPONENT_SHIFT + 1023
"""A number plus this is rounded to an integer k, and the sum's last bits are k + 1023: the exponent of 2^k."""

EXPONENT_MASK = -(1 << EXPONENT_SHIFT)
"""Sign and exponent."""

SQRT_2_BITS = 0x3FF6A09E667F3BCD
"""√2 in float64."""

MINUS_LN_2_SCALED = -LN_2 * 2.0**-EXPONENT_SHIFT


# --- what several functions need


def _polynomial(x: Array, coefficients: tuple[float, ...], out: Array) -> None:
    """out = c_0 + c_1 x + c_2 x² + …, as (… (c_n x + c_n−1) x + …) x + c_0."""
    first, *middle, last = coefficients
    np.multiply(x, last, out=out)
    for coefficient in reversed(middle):
        np.add(out, coefficient, out=out)
        np.multiply(out, x, out=out)
    np.add(out, first, out=out)


def exponential_parts(scratch: Buffers) -> None:
    """Reduce x, in scratch[0] and within ± `EXP_LIMIT`: leave r, 2^k, an array that is free, and C in scratch.

    k and 2^k by the magic number; k ln 2 is rounded, which costs e^x at most 1.5·10⁻¹⁶ |x|, and nothing where k = 0.
    """
    r, power, square, c = scratch
    np.multiply(r, LOG2_E, out=power)
    np.add(power, EXP_MAGIC, out=power)
    np.subtract(power, EXP_MAGIC, out=square)
    bits = power.view(np.uint64)
    np.left_shift(bits, EXPONENT_SHIFT, out=bits)
    np.multiply(square, LN_2, out=square)
    np.subtract(r, square, out=r)
    np.multiply(r, r, out=square)
    _polynomial(square, EXP_COEFFICIENTS, c)


def fraction(scratch: Buffers) -> tuple[Array, Array]:
    """Compute N = 2^k (C + r) and D = C − r after `exponential_parts`, in the places of the free array and of C."""
    r, power, numerator, denominator = scratch
    np.add(denominator, r, out=numerator)
    np.multiply(numerator, power, out=numerator)
    np.subtract(denominator, r, out=denominator)
    return numerator, denominator


def fraction_less_1(scratch: Buffers) -> tuple[Array, Array]:
    """Compute N − D, as (2^k + 1) r − (1 − 2^k) C, and D after `exponential_parts`."""
    r, power, rest, c = scratch
    np.subtract(1.0, power, out=rest)
    np.multiply(rest, c, out=rest)
    np.add(power, 1.0, out=power)
    np.multiply(power, r, out=power)
    np.subtract(power, rest, out=power)
    np.subtract(c, r, out=c)
    return power, c


# --- exponentials


def exp(x: Array, out: Array, scratch: Buffers) -> None:
    """e^x = N/D."""
    np.clip(x, -EXP_LIMIT, EXP_LIMIT, out=scratch[0])
    exponential_parts(scratch)
    numerator, denominator = fraction(scratch)
    np.divide(numerator, denominator, out=out)


def expm1(x: Array, out: Array, scratch: Buffers) -> None:
    """e^x − 1 = ((2^k + 1) r − (1 − 2^k) C)/(C − r): where k = 0 this is 2r/(C − r), with all digits of a tiny r."""
    np.clip(x, -EXP_LIMIT, EXP_LIMIT, out=scratch[0])
    exponential_parts(scratch)
    numerator, denominator = fraction_less_1(scratch)
    np.divide(numerator, denominator, out=out)


def tanh(x: Array, out: Array, scratch: Buffers) -> None:
    """(e^2x − 1)/(e^2x + 1) = ((2^k + 1) r − (1 − 2^k) C)/((2^k + 1) C − (1 − 2^k) r), with k, r and C of 2x."""
    r, power, rest, c = scratch
    np.add(x, x, out=r)
    np.clip(r, -EXP_LIMIT, EXP_LIMIT, out=r)
    exponential_parts(scratch)
    np.subtract(1.0, power, out=rest)
    np.add(power, 1.0, out=power)
    np.multiply(power, c, out=out)
    np.multiply(power, r, out=power)
    np.multiply(r, rest, out=r)
    np.subtract(out, r, out=r)
    np.multiply(c, rest, out=c)
    np.subtract(power, c, out=c)
    np.divide(c, r, out=out)


def sigmoid(x: Array, out: Array, scratch: Buffers) -> None:
    """1/(1 + e^−x) = N/(D + N): on neither side of 0 does anything cancel."""
    np.clip(x, -EXP_LIMIT, EXP_LIMIT, out=scratch[0])
    exponential_parts(scratch)
    numerator, denominator = fraction(scratch)
    np.add(denominator, numerator, out=denominator)
    np.divide(numerator, denominator, out=out)


def softplus(x: Array, out: Array, scratch: Buffers) -> None:
    """log(1 + e^x) = max(x, 0) + log(1 + e), e = e^−|x|, and log(1 + e) = 2 artanh f, f = e/(2 + e) ≤ ⅓.

    With N and D of e^|x|, f = D/(2N + D).
    """
    free, square, _, _ = scratch
    np.clip(x, -EXP_LIMIT, EXP_LIMIT, out=scratch[0])
    np.abs(scratch[0], out=scratch[0])
    exponential_parts(scratch)
    numerator, f = fraction(scratch)
    np.add(numerator, numerator, out=numerator)
    np.add(numerator, f, out=numerator)
    np.divide(f, numerator, out=f)
    np.multiply(f, f, out=square)
    _polynomial(square, SOFTPLUS_COEFFICIENTS, free)
    np.multiply(f, free, out=f)
    np.clip(x, 0.0, math.inf, out=out)
    np.add(out, f, out=out)


# --- logarithms


def log(x: Array, out: Array, scratch: Buffers) -> None:
    """log x = k ln 2 + 2 artanh f, with x = 2^k m, √½ < m ≤ √2, and f = (m − 1)/(m + 1). x is not subnormal."""
    minus_k, m, f, _ = scratch
    _split(x, minus_k, m)
    np.subtract(m, 1.0, out=f)
    np.add(m, 1.0, out=m)
    np.divide(f, m, out=f)
    _finish_log(x, 0.0, out, scratch)


def log1p(x: Array, out: Array, scratch: Buffers) -> None:
    """Compute log of 1 + x. Where k = 0, use f = x/(x + 2), since 1 + x has lost digits of x."""
    minus_k, m, f, sum_ = scratch
    np.add(x, 1.0, out=sum_)
    _split(sum_, minus_k, m)
    np.subtract(m, 1.0, out=f)
    mask = as_mask(sum_)
    np.equal(minus_k, 0.0, out=mask)
    np.copyto(f, x, where=mask)
    np.add(f, 2.0, out=m)
    np.divide(f, m, out=f)
    _finish_log(x, -1.0, out, scratch)


def _split(x: Array, minus_k: Array, m: Array) -> None:
    """x = 2^k m, √½ < m ≤ √2; k as −2⁵² k, whose product with −2⁻⁵² ln 2 is −0 where k = 0: thus log1p(−0) is −0."""
    bits, integer = x.view(np.int64), minus_k.view(np.int64)
    np.subtract(SQRT_2_BITS, bits, out=integer)
    np.bitwise_and(integer, EXPONENT_MASK, out=integer)
    np.add(bits, integer, out=m.view(np.int64))
    np.copyto(minus_k, integer, casting="unsafe")


def _finish_log(x: Array, pole: float, out: Array, scratch: Buffers) -> None:
    """k ln 2 + 2 artanh f; −∞ where x is the pole, NaN below it, ∞ where x is."""
    minus_k, polynomial, f, square = scratch
    np.multiply(f, f, out=square)
    _polynomial(square, LOG_COEFFICIENTS, polynomial)
    np.multiply(f, polynomial, out=f)
    np.multiply(minus_k, MINUS_LN_2_SCALED, out=minus_k)
    least, most = (extreme.reduce(x, axis=None, initial=1.0) for extreme in (np.minimum, np.maximum))
    if pole < least and most < math.inf:
        np.add(f, minus_k, out=out)
        return
    np.add(f, minus_k, out=f)
    mask = as_mask(square)
    np.greater(x, pole, out=mask)
    np.logical_not(mask, out=mask)
    np.copyto(f, math.nan, where=mask)
    np.equal(x, pole, out=mask)
    np.copyto(f, -math.inf, where=mask)
    np.equal(x, math.inf, out=mask)
    np.copyto(f, math.inf, where=mask)
    np.copyto(out, f)


def as_mask(scratch: Array) -> Array:
    """View the memory of a scratch array as booleans, one for each of its numbers."""
    return scratch.reshape(-1).view(np.bool_)[: scratch.size].reshape(scratch.shape)


# --- to float32


CANONICAL_NAN = np.uint32(0x7FC00000).view(np.float32)
"""The NaN that is stored: x86 makes 0xffc00000 and NVIDIA 0x7fffffff."""


def store(x: Array, out: Array) -> None:
    """x, in float64, rounded to the float32 of `out`; every NaN becomes `CANONICAL_NAN`."""
    np.copyto(out, x, casting="same_kind")
    if np.isnan(np.maximum.reduce(out, axis=None, initial=-math.inf)):
        np.copyto(out, CANONICAL_NAN, where=np.isnan(out))


def apply(function: Function, x: Array) -> Array:
    """Return the function of x, rounded once, as a fresh float32 array of x's shape.

    Args:
        function: one of this module's.
        x: float32, of any shape.
    """
    given = np.ascontiguousarray(x).reshape(-1)
    result = np.empty(np.shape(x), np.float32)
    flat = result.reshape(-1)
    buffers = np.empty((1 + SCRATCH, min(ELEMENTS_AT_ONCE, given.size)))
    with np.errstate(all="ignore"):
        for start in range(0, given.size, ELEMENTS_AT_ONCE):
            part = given[start : start + ELEMENTS_AT_ONCE]
            values, *scratch = buffers[:, : part.size]
            np.copyto(values, part)
            function(values, values, tuple(scratch))
            store(values, flat[start : start + ELEMENTS_AT_ONCE])
    return result
