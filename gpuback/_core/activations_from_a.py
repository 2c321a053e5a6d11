"""Smooth activations whose g' is a function of a, as h does not determine it: g and g' on whole arrays.

How they are called is said in `gpuback._core.activations`.
"""

from __future__ import annotations

import math

import numpy as np

from gpuback._core.activations_from_h import sigmoid
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array

GELU_SCALE = 2.0 * math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715

SATURATED = 1e4
"""Beyond this |a| the sigmoid in gelu and silu is 0 or 1 in every dtype. a is clipped before the product, as it
may be infinite, and ∞ · 0 is NaN."""

MISH_LIMIT = 22.0
"""Past this a, tanh(softplus(a)) is 1 in every dtype. (e^22)⁴ is what float32 just holds."""

NORMAL_TAIL = 40.0
"""Past this y, φ(y) is 0 in every dtype."""

MILLS_FLOAT32 = (
    0.3,
    (
        *(0.55639781430036, 0.4125395933751854, 0.21694798466129947, 0.06958480718455237, 0.004551811739642448),
        *(-0.006074534487936626, -0.0014271518181127828, 0.0007026468770872586, 0.0001914896394804087),
        *(-0.00010032763477272697,),
    ),
)
"""p, and the coefficients of P by powers of 2t − 1, with which t P, t = 1/(1 + p y), is Mills' ratio: to 5·10⁻⁹ for
y ≤ 15."""

MILLS_FLOAT64 = (
    0.2,
    (
        *(0.3856162094306316, 0.33357331903779186, 0.24830941231477252, 0.15718221510932404, 0.08272894314657253),
        *(0.034650946816936715, 0.01042510048185202, 0.0015006565716641383, -0.0003999923906247804),
        *(-0.000273171895934561, -2.9766620306258378e-05, 2.4947458489030735e-05, 8.362865408941424e-06),
        *(-1.9960111673944632e-06, -1.3885793790942299e-06, 1.693646497023803e-07, 2.1741036120756931e-07),
        *(-2.200328058768499e-08, -3.310375214950806e-08, 5.269697748340827e-09, 3.7112526967717345e-09),
        *(-1.0694596457054405e-09,),
    ),
)
"""The same to 3·10⁻¹⁷ for y ≤ 40."""


def gelu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a·sigmoid(2√(2/π)(a + 0.044715 a³)): the tanh form of gelu, written so that it does not cancel for a ≪ 0."""
    gelu_argument(a, h)
    sigmoid(h, h, scratch)
    _times_a(a, h, scratch)


def gelu_backward(dh: Array, a: Array, scratch: Scratch) -> None:
    """g' = s (1 + a u' (1 − s)), with s = sigmoid(u), u = 2√(2/π)(a + 0.044715 a³), u' = 2√(2/π)(1 + 3·0.044715 a²).

    1 − s is sigmoid(−u), whose rounding error stays small beside it when a u' multiplies it.
    """
    slope, s = scratch.a, scratch.b
    gelu_argument(a, s)
    sigmoid(s, s, scratch)
    np.multiply(dh, s, out=dh)
    gelu_argument(a, s)
    np.negative(s, out=s)
    sigmoid(s, s, scratch)
    np.clip(a, -SATURATED, SATURATED, out=slope)
    np.multiply(s, slope, out=s)
    np.multiply(slope, slope, out=slope)
    np.multiply(slope, 3 * GELU_CUBIC * GELU_SCALE, out=slope)
    np.add(slope, GELU_SCALE, out=slope)
    np.multiply(slope, s, out=slope)
    np.add(slope, 1, out=slope)
    np.multiply(dh, slope, out=dh)


def gelu_argument(a: Array, out: Array) -> None:
    """out = 2√(2/π)(a + 0.044715 a³) = 2√(2/π) a (1 + 0.044715 a²)."""
    np.multiply(a, a, out=out)
    np.multiply(out, GELU_CUBIC, out=out)
    np.add(out, 1, out=out)
    np.multiply(out, a, out=out)
    np.multiply(out, GELU_SCALE, out=out)


def silu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a·sigmoid(a)."""
    sigmoid(a, h, scratch)
    _times_a(a, h, scratch)


def silu_backward(dh: Array, a: Array, scratch: Scratch) -> None:
    """g' = s (1 + a (1 − s)), with s = sigmoid(a) and 1 − s = sigmoid(−a)."""
    slope, s = scratch.a, scratch.b
    sigmoid(a, s, scratch)
    np.multiply(dh, s, out=dh)
    np.negative(a, out=s)
    sigmoid(s, s, scratch)
    np.clip(a, -SATURATED, SATURATED, out=slope)
    np.multiply(slope, s, out=slope)
    np.add(slope, 1, out=slope)
    np.multiply(dh, slope, out=dh)


def _times_a(a: Array, h: Array, scratch: Scratch) -> None:
    """h ← h·a where h is the sigmoid that goes to 0 faster than a to −∞."""
    np.maximum(a, -SATURATED, out=scratch.a)
    np.multiply(h, scratch.a, out=h)


def gelu_erf(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a Φ(a), with Φ of the normal distribution, as max(a, 0) − y φ(y) M(y) with y = |a|: nothing cancels.

    φ is its density and M(y) = Φ(−y)/φ(y) is Mills' ratio.
    """
    tail = scratch.b
    _finite_magnitude(a, scratch.a)
    normal_density(scratch.a, tail)
    np.multiply(tail, scratch.a, out=tail)
    _mills_ratio(scratch.a, h, scratch.c)
    np.multiply(tail, h, out=tail)
    np.clip(a, 0, math.inf, out=h)
    np.subtract(h, tail, out=h)


def gelu_erf_backward(dh: Array, a: Array, scratch: Scratch) -> None:
    """g' = Φ(a) + a φ(a) = D where a ≤ 0, else 1 − D, with D = φ(y)(M(y) − y) and y = |a|."""
    y, slope, other = scratch.a, scratch.b, scratch.c
    _finite_magnitude(a, y)
    _mills_ratio(y, slope, other)
    _finite_magnitude(a, y)
    np.subtract(slope, y, out=slope)
    normal_density(y, other)
    np.multiply(slope, other, out=slope)
    above, sign = y, other
    np.greater(a, 0, out=above)
    np.multiply(above, -2, out=sign)
    np.add(sign, 1, out=sign)
    np.multiply(slope, sign, out=slope)
    np.add(slope, above, out=slope)
    np.multiply(dh, slope, out=dh)


def _finite_magnitude(a: Array, out: Array) -> None:
    """out = |a|, or `NORMAL_TAIL` where that is less."""
    np.abs(a, out=out)
    np.clip(out, 0, NORMAL_TAIL, out=out)


def normal_density(y: Array, out: Array) -> None:
    """out = φ(y) = e^(−y²/2)/√(2π)."""
    np.multiply(y, y, out=out)
    np.multiply(out, -0.5, out=out)
    np.exp(out, out=out)
    np.multiply(out, 1 / math.sqrt(2 * math.pi), out=out)


def _mills_ratio(y: Array, out: Array, t: Array) -> None:
    """out = M(y) = t P(2t − 1), t = 1/(1 + p y), for y ≥ 0; y ← 2t − 1."""
    p, (first, *middle, last) = MILLS_FLOAT32 if y.itemsize == 4 else MILLS_FLOAT64
    np.multiply(y, p, out=t)
    np.add(t, 1, out=t)
    np.divide(1, t, out=t)
    np.multiply(t, 2, out=y)
    np.subtract(y, 1, out=y)
    np.multiply(y, last, out=out)
    for coefficient in reversed(middle):
        np.add(out, coefficient, out=out)
        np.multiply(out, y, out=out)
    np.add(out, first, out=out)
    np.multiply(out, t, out=out)


def mish(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a tanh(softplus(a)) = a n/(n + 2), with n = e (e + 2) and e = e^a: nothing cancels.

    Source: Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019.
    """
    np.clip(a, -SATURATED, MISH_LIMIT, out=h)
    np.exp(h, out=h)
    np.add(h, 2, out=scratch.a)
    np.multiply(h, scratch.a, out=h)
    np.add(h, 2, out=scratch.a)
    np.divide(h, scratch.a, out=h)
    _times_a(a, h, scratch)


def mish_backward(dh: Array, a: Array, scratch: Scratch) -> None:
    """g' = n r + 4 a e (e + 1) r² = e r ((e + 1)(1 + 4 a r) + 1), with r = 1/(n + 2), n = e (e + 2) and e = e^a."""
    slope, r, factor = scratch.a, scratch.b, scratch.c
    np.clip(a, -SATURATED, MISH_LIMIT, out=factor)
    np.exp(factor, out=slope)
    np.add(slope, 2, out=r)
    np.multiply(r, slope, out=r)
    np.add(r, 2, out=r)
    np.divide(1, r, out=r)
    np.multiply(factor, r, out=factor)
    np.multiply(factor, 4, out=factor)
    np.add(factor, 1, out=factor)
    np.multiply(r, slope, out=r)
    np.add(slope, 1, out=slope)
    np.multiply(slope, factor, out=slope)
    np.add(slope, 1, out=slope)
    np.multiply(slope, r, out=slope)
    np.multiply(dh, slope, out=dh)


def sine(a: Array, h: Array, scratch: Scratch) -> None:
    """h = sin(a); NaN where a is infinite."""
    np.sin(a, out=h)


def sine_backward(dh: Array, a: Array, scratch: Scratch) -> None:
    """g' = cos(a)."""
    np.cos(a, out=scratch.a)
    np.multiply(dh, scratch.a, out=dh)
