"""The activations and their slopes as fixed sequences of IEEE 754 operations, and which activations have them.

How the functions are called, and how accurate they are, is said in `gpuback._core.elementary`. A slope is g' from h =
g(a), or from a where h does not determine it. At a kink it is what `gpuback._core.activations` says. gelu_erf and sine
have no such sequences.

Which zero np.maximum(−0, +0) gives depends on the CPU. Where that could be seen, +0 is added: −0 + 0 = +0.
"""

from __future__ import annotations

import math

import numpy as np

from gpuback._core.activations_from_a import MISH_LIMIT
from gpuback._core.activations_from_h import SELU_DEPTH, SELU_SCALE
from gpuback._core.activations_piecewise import LEAKY_SLOPE
from gpuback._core.elementary import (
    EXP_LIMIT,
    Buffers,
    Function,
    as_mask,
    exp,
    expm1,
    exponential_parts,
    fraction,
    fraction_less_1,
    sigmoid,
    softplus,
    tanh,
)
from gpuback._core.typing import Array

GELU_LINEAR, GELU_CUBIC, GELU_CUBIC_SLOPE = 1.5957691216057308, 0.07135481627260025, 0.21406444881780073
"""2√(2/π), 0.044715 times that, three times that again: u = a (linear + cubic a²), u' = linear + cubic slope a²."""

GELU_LIMIT = 20.0
"""Past this |a|, gelu's sigmoid is 0 or 1, to e^−603. u stays within `EXP_LIMIT`."""

SOFTSIGN_LIMIT = 1e30
"""Past this |a|, softsign is ±1. An infinity would give NaN."""


# --- what several functions need


def _times_sigmoid(x: Array, least: float, out: Array, scratch: Buffers) -> None:
    """Compute out = max(x, least) N/(D + N) after `exponential_parts`. A product with `least` is 0 in float32."""
    numerator, denominator = fraction(scratch)
    np.add(denominator, numerator, out=denominator)
    np.divide(numerator, denominator, out=numerator)
    np.clip(x, least, math.inf, out=denominator)
    np.multiply(denominator, numerator, out=out)


def _sigmoids(scratch: Buffers) -> tuple[Array, Array, Array, Array]:
    """Compute s = N/(D + N) and 1 − s = D/(D + N) after `exponential_parts`; return these and two free arrays."""
    numerator, denominator = fraction(scratch)
    free, inverse, *_ = scratch
    np.add(denominator, numerator, out=inverse)
    np.divide(1.0, inverse, out=inverse)
    np.multiply(numerator, inverse, out=numerator)
    np.multiply(denominator, inverse, out=denominator)
    return numerator, denominator, free, inverse


# --- g


def identity(a: Array, out: Array, scratch: Buffers) -> None:
    """out = a."""
    if out is not a:
        np.copyto(out, a)


def relu(a: Array, out: Array, scratch: Buffers) -> None:
    """out = max(a, 0), never −0."""
    np.clip(a, 0.0, math.inf, out=out)
    np.add(out, 0.0, out=out)


def leaky_relu(a: Array, out: Array, scratch: Buffers) -> None:
    """out = max(a, 0.01 a)."""
    np.multiply(a, LEAKY_SLOPE, out=scratch[0])
    np.maximum(a, scratch[0], out=out)


def elu(a: Array, out: Array, scratch: Buffers) -> None:
    """out = max(a, expm1(min(a, 0))), never −0."""
    np.clip(a, -EXP_LIMIT, 0.0, out=scratch[0])
    exponential_parts(scratch)
    numerator, denominator = fraction_less_1(scratch)
    np.divide(numerator, denominator, out=numerator)
    np.maximum(a, numerator, out=out)
    np.add(out, 0.0, out=out)


def gelu(a: Array, out: Array, scratch: Buffers) -> None:
    """out = a sigmoid(u), u = 2√(2/π)(a + 0.044715 a³); for u, a is limited to ± `GELU_LIMIT`."""
    _gelu_argument(a, scratch)
    exponential_parts(scratch)
    _times_sigmoid(a, -GELU_LIMIT, out, scratch)


def _gelu_argument(a: Array, scratch: Buffers) -> None:
    """u in scratch[0]."""
    u, square, *_ = scratch
    np.clip(a, -GELU_LIMIT, GELU_LIMIT, out=u)
    np.multiply(u, u, out=square)
    np.multiply(square, GELU_CUBIC, out=square)
    np.add(square, GELU_LINEAR, out=square)
    np.multiply(u, square, out=u)


def silu(a: Array, out: Array, scratch: Buffers) -> None:
    """out = a sigmoid(a)."""
    np.clip(a, -EXP_LIMIT, EXP_LIMIT, out=scratch[0])
    exponential_parts(scratch)
    _times_sigmoid(a, -EXP_LIMIT, out, scratch)


def squareplus(a: Array, out: Array, scratch: Buffers) -> None:
    """out = max(a, 0) + 1/(q + √(q² + 1)), q = |a|/2. No square of a float32 overflows."""
    q, root, *_ = scratch
    np.abs(a, out=q)
    np.multiply(q, 0.5, out=q)
    np.multiply(q, q, out=root)
    np.add(root, 1.0, out=root)
    np.sqrt(root, out=root)
    np.add(root, q, out=root)
    np.divide(1.0, root, out=root)
    np.clip(a, 0.0, math.inf, out=out)
    np.add(out, root, out=out)


def selu(a: Array, out: Array, scratch: Buffers) -> None:
    """out = λ max(a, 0) + λα expm1(min(a, 0)), never −0."""
    np.clip(a, -EXP_LIMIT, 0.0, out=scratch[0])
    exponential_parts(scratch)
    numerator, denominator = fraction_less_1(scratch)
    np.divide(numerator, denominator, out=numerator)
    np.multiply(numerator, SELU_DEPTH, out=numerator)
    np.clip(a, 0.0, math.inf, out=out)
    np.multiply(out, SELU_SCALE, out=out)
    np.add(out, numerator, out=out)
    np.add(out, 0.0, out=out)


def softsign(a: Array, out: Array, scratch: Buffers) -> None:
    """out = a/(1 + |a|), of an a within ± `SOFTSIGN_LIMIT`."""
    np.clip(a, -SOFTSIGN_LIMIT, SOFTSIGN_LIMIT, out=out)
    np.abs(out, out=scratch[0])
    np.add(scratch[0], 1.0, out=scratch[0])
    np.divide(out, scratch[0], out=out)


def log_sigmoid(a: Array, out: Array, scratch: Buffers) -> None:
    """out = −softplus(−a)."""
    np.negative(a, out=out)
    softplus(out, out, scratch)
    np.negative(out, out=out)


def hard_tanh(a: Array, out: Array, scratch: Buffers) -> None:
    """out = min(max(a, −1), 1)."""
    np.clip(a, -1.0, 1.0, out=out)


def relu6(a: Array, out: Array, scratch: Buffers) -> None:
    """out = min(max(a, 0), 6), never −0."""
    np.clip(a, 0.0, 6.0, out=out)
    np.add(out, 0.0, out=out)


def hard_sigmoid(a: Array, out: Array, scratch: Buffers) -> None:
    """out = min(max(a + 3, 0), 6)/6."""
    np.add(a, 3.0, out=out)
    np.clip(out, 0.0, 6.0, out=out)
    np.divide(out, 6.0, out=out)


def mish(a: Array, out: Array, scratch: Buffers) -> None:
    """out = a P/(P + 2D²), P = N (N + 2D), with N and D of e^a; for these a is limited to `MISH_LIMIT`."""
    np.clip(a, -EXP_LIMIT, MISH_LIMIT, out=scratch[0])
    exponential_parts(scratch)
    p, q, _, _ = _mish_fraction(scratch)
    np.divide(p, q, out=p)
    np.clip(a, -EXP_LIMIT, math.inf, out=out)
    np.multiply(out, p, out=out)


def _mish_fraction(scratch: Buffers) -> tuple[Array, Array, Array, Array]:
    """Compute P = N (N + 2D), P + 2D², D² and N (N + D) after `exponential_parts`."""
    numerator, denominator = fraction(scratch)
    p, square, *_ = scratch
    np.add(denominator, denominator, out=p)
    np.add(p, numerator, out=p)
    np.multiply(p, numerator, out=p)
    np.multiply(denominator, denominator, out=square)
    np.add(denominator, numerator, out=denominator)
    np.multiply(denominator, numerator, out=denominator)
    np.add(square, square, out=numerator)
    np.add(numerator, p, out=numerator)
    return p, numerator, square, denominator


def hard_swish(a: Array, out: Array, scratch: Buffers) -> None:
    """out = max(a, −3) min(max(a + 3, 0), 6)/6."""
    np.add(a, 3.0, out=scratch[0])
    np.clip(scratch[0], 0.0, 6.0, out=scratch[0])
    np.clip(a, -3.0, math.inf, out=out)
    np.multiply(out, scratch[0], out=out)
    np.divide(out, 6.0, out=out)


# --- slopes g', from h or a


def identity_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """1, for NaN too."""
    out.fill(1.0)


def relu_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """1 where h > 0, else 0, for NaN too."""
    np.greater(h, 0.0, out=out)


def leaky_relu_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """1 where h > 0, else 0.01, for NaN too."""
    np.greater(h, 0.0, out=out)
    np.clip(out, LEAKY_SLOPE, 1.0, out=out)


def elu_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """1 where h > 0, else h + 1, as min(h, 0) + 1."""
    np.clip(h, -math.inf, 0.0, out=out)
    np.add(out, 1.0, out=out)


def sigmoid_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """(1 − h) h."""
    np.subtract(1.0, h, out=scratch[0])
    np.multiply(scratch[0], h, out=out)


def tanh_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """1 − h²."""
    np.multiply(h, h, out=out)
    np.subtract(1.0, out, out=out)


def softplus_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """−expm1(−h)."""
    np.negative(h, out=out)
    expm1(out, out, scratch)
    np.negative(out, out=out)


def gelu_slope(a: Array, out: Array, scratch: Buffers) -> None:
    """s (1 + a u' (1 − s)), s = sigmoid(u), u' = 2√(2/π)(1 + 3·0.044715 a²), of an a within ± `GELU_LIMIT`."""
    _gelu_argument(a, scratch)
    exponential_parts(scratch)
    s, one_less_s, limited, term = _sigmoids(scratch)
    np.clip(a, -GELU_LIMIT, GELU_LIMIT, out=limited)
    np.multiply(limited, limited, out=term)
    np.multiply(term, GELU_CUBIC_SLOPE, out=term)
    np.add(term, GELU_LINEAR, out=term)
    np.multiply(term, limited, out=term)
    _finish_slope(term, one_less_s, s, out)


def silu_slope(a: Array, out: Array, scratch: Buffers) -> None:
    """s (1 + a (1 − s)), s = sigmoid(a), of an a within ± `EXP_LIMIT`."""
    np.clip(a, -EXP_LIMIT, EXP_LIMIT, out=scratch[0])
    exponential_parts(scratch)
    s, one_less_s, limited, _ = _sigmoids(scratch)
    np.clip(a, -EXP_LIMIT, EXP_LIMIT, out=limited)
    _finish_slope(limited, one_less_s, s, out)


def _finish_slope(term: Array, one_less_s: Array, s: Array, out: Array) -> None:
    """s (1 + term (1 − s))."""
    np.multiply(term, one_less_s, out=term)
    np.add(term, 1.0, out=term)
    np.multiply(term, s, out=out)


def squareplus_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """h²/(1 + h²), as 1/(1 + 1/h²)."""
    np.multiply(h, h, out=out)
    np.divide(1.0, out, out=out)
    np.add(out, 1.0, out=out)
    np.divide(1.0, out, out=out)


def selu_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """λ where h > 0, else h + λα."""
    mask = as_mask(scratch[0])
    np.greater(h, 0.0, out=mask)
    np.add(h, SELU_DEPTH, out=out)
    np.copyto(out, SELU_SCALE, where=mask)


def softsign_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """(1 − |h|)²."""
    np.abs(h, out=out)
    np.subtract(1.0, out, out=out)
    np.multiply(out, out, out=out)


def log_sigmoid_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """−expm1(h)."""
    expm1(h, out, scratch)
    np.negative(out, out=out)


def hard_tanh_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """1 where |h| < 1, else 0, for NaN too."""
    np.abs(h, out=out)
    np.less(out, 1.0, out=out)


def relu6_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """1 where 0 < h < 6, else 0, for NaN too."""
    np.greater(h, 0.0, out=scratch[0])
    np.less(h, 6.0, out=out)
    np.multiply(out, scratch[0], out=out)


def hard_sigmoid_slope(h: Array, out: Array, scratch: Buffers) -> None:
    """1/6 where 0 < h < 1, else 0, for NaN too."""
    np.greater(h, 0.0, out=scratch[0])
    np.less(h, 1.0, out=out)
    np.multiply(out, scratch[0], out=out)
    np.divide(out, 6.0, out=out)


def mish_slope(a: Array, out: Array, scratch: Buffers) -> None:
    """I (P + 4a N (N + D) D² I), I = 1/(P + 2D²), of an a from −`EXP_LIMIT` to `MISH_LIMIT`."""
    np.clip(a, -EXP_LIMIT, MISH_LIMIT, out=scratch[0])
    exponential_parts(scratch)
    p, inverse, square, rest = _mish_fraction(scratch)
    np.divide(1.0, inverse, out=inverse)
    np.multiply(square, inverse, out=square)
    np.multiply(rest, 4.0, out=rest)
    np.multiply(rest, square, out=rest)
    np.clip(a, -EXP_LIMIT, MISH_LIMIT, out=out)
    np.multiply(out, rest, out=out)
    np.add(out, p, out=out)
    np.multiply(out, inverse, out=out)


def hard_swish_slope(a: Array, out: Array, scratch: Buffers) -> None:
    """0 where a ≤ −3, 1 where a ≥ 3, else (a + 1.5)/3."""
    low, high = as_mask(scratch[0]), as_mask(scratch[1])
    np.less_equal(a, -3.0, out=low)
    np.greater_equal(a, 3.0, out=high)
    np.add(a, 1.5, out=out)
    np.divide(out, 3.0, out=out)
    np.copyto(out, 0.0, where=low)
    np.copyto(out, 1.0, where=high)


FORWARD: dict[str, Function] = {
    "identity": identity,
    "relu": relu,
    "leaky_relu": leaky_relu,
    "elu": elu,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "softplus": softplus,
    "exponential": exp,
    "squareplus": squareplus,
    "selu": selu,
    "softsign": softsign,
    "log_sigmoid": log_sigmoid,
    "hard_tanh": hard_tanh,
    "relu6": relu6,
    "hard_sigmoid": hard_sigmoid,
    "gelu": gelu,
    "silu": silu,
    "mish": mish,
    "hard_swish": hard_swish,
}
"""(a, out, scratch) → None, out = g(a), by the names of `gpuback._core.activations`."""

SLOPE: dict[str, Function] = {
    "identity": identity_slope,
    "relu": relu_slope,
    "leaky_relu": leaky_relu_slope,
    "elu": elu_slope,
    "sigmoid": sigmoid_slope,
    "tanh": tanh_slope,
    "softplus": softplus_slope,
    "exponential": identity,
    "squareplus": squareplus_slope,
    "selu": selu_slope,
    "softsign": softsign_slope,
    "log_sigmoid": log_sigmoid_slope,
    "hard_tanh": hard_tanh_slope,
    "relu6": relu6_slope,
    "hard_sigmoid": hard_sigmoid_slope,
    "gelu": gelu_slope,
    "silu": silu_slope,
    "mish": mish_slope,
    "hard_swish": hard_swish_slope,
}
"""(source, out, scratch) → None, out = g', with h or a as source: `Activation.derivative_from`."""
