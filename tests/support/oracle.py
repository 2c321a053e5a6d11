"""The formulas of activations, losses and their derivatives, in float64, or in long double for float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
from numpy.typing import NDArray


def logistic(x: NDArray) -> NDArray:
    with np.errstate(over="ignore"):  # 1/∞ is 0
        return 1 / (1 + np.exp(-x))


def softmax(a: NDArray) -> NDArray:
    powers = np.exp(a - a.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def gelu_argument(a: NDArray) -> NDArray:
    return np.sqrt(8 / (4 * np.arctan(a.dtype.type(1)))) * (a + 0.044715 * a**3)


def gelu_slope(a: NDArray) -> NDArray:
    s = logistic(gelu_argument(a))
    return s + np.sqrt(8 / (4 * np.arctan(a.dtype.type(1)))) * a * (1 + 0.134145 * a**2) * s * (1 - s)


SELU_SCALE = np.longdouble("1.0507009873554804934193349852946")
SELU_DEPTH = SELU_SCALE * np.longdouble("1.6732632423543772848170429916717")


def normal_tail(a: NDArray) -> NDArray:
    """Φ(a), to relative error however small it is."""
    if a.dtype == np.float64:
        return np.vectorize(math.erfc, otypes=[np.float64])(-a * math.sqrt(0.5)) / 2
    with mpmath.workdps(30):
        exact = [mpmath.nstr(mpmath.erfc(-mpmath.mpf(float(x)) / mpmath.sqrt(2)) / 2, 25) for x in a.flat]
    return np.array(exact).astype(a.dtype).reshape(a.shape)


def normal_density(a: NDArray) -> NDArray:
    return np.exp(-(a**2) / 2) / np.sqrt(8 * np.arctan(a.dtype.type(1)))


def mish_slope(a: NDArray) -> NDArray:
    e = np.exp(np.minimum(a, 30))
    return (e * (e + 2) + 4 * a * e * (e + 1) / (e * (e + 2) + 2)) / (e * (e + 2) + 2)


G: dict[str, Callable[[NDArray], NDArray]] = {
    "identity": lambda a: a,
    "relu": lambda a: np.maximum(a, 0),
    "leaky_relu": lambda a: np.where(a > 0, a, a / 100),
    "elu": lambda a: np.where(a > 0, a, np.expm1(np.minimum(a, 0))),
    "sigmoid": logistic,
    "tanh": np.tanh,
    "softplus": lambda a: np.logaddexp(a, 0),
    "gelu": lambda a: a * logistic(gelu_argument(a)),
    "exponential": np.exp,
    "squareplus": lambda a: np.maximum(a, 0) + 2 / (np.abs(a) + np.hypot(a, 2)),
    "selu": lambda a: np.where(
        a > 0, SELU_SCALE.astype(a.dtype) * a, SELU_DEPTH.astype(a.dtype) * np.expm1(np.minimum(a, 0))
    ),
    "softsign": lambda a: a / (1 + np.abs(a)),
    "log_sigmoid": lambda a: -np.logaddexp(-a, 0),
    "hard_tanh": lambda a: np.clip(a, -1, 1),
    "relu6": lambda a: np.clip(a, 0, 6),
    "hard_sigmoid": lambda a: np.clip(a + 3, 0, 6) / 6,
    "silu": lambda a: a * logistic(a),
    "gelu_erf": lambda a: a * normal_tail(a),
    "sine": np.sin,
    "mish": lambda a: a * np.tanh(np.logaddexp(a, 0)),
    "hard_swish": lambda a: a * (np.clip(a + 3, 0, 6) / 6),
}
SLOPE: dict[str, Callable[[NDArray], NDArray]] = {  # from h or, of those in FROM_A, from a
    "identity": np.ones_like,
    "relu": lambda h: np.where(h > 0, 1, 0 * h),
    "leaky_relu": lambda h: np.where(h > 0, 1, np.full_like(h, 1) / 100),
    "elu": lambda h: np.where(h > 0, 1, h + 1),
    "sigmoid": lambda h: h * (1 - h),
    "tanh": lambda h: (1 - h) * (1 + h),
    "softplus": lambda h: -np.expm1(-h),
    "gelu": gelu_slope,
    "exponential": lambda h: h,
    "squareplus": lambda h: h * h / (1 + h * h),
    "selu": lambda h: np.where(h > 0, SELU_SCALE.astype(h.dtype), h + SELU_DEPTH.astype(h.dtype)),
    "softsign": lambda h: (1 - np.abs(h)) ** 2,
    "log_sigmoid": lambda h: -np.expm1(h),
    "hard_tanh": lambda h: np.where(np.abs(h) < 1, 1, 0 * h),
    "relu6": lambda h: np.where((h > 0) & (h < 6), 1, 0 * h),
    "hard_sigmoid": lambda h: np.where((h > 0) & (h < 1), np.full_like(h, 1) / 6, 0 * h),
    "silu": lambda a: logistic(a) * (1 + a * logistic(-a)),
    "gelu_erf": lambda a: normal_tail(a) + a * normal_density(a),
    "sine": np.cos,
    "mish": mish_slope,
    "hard_swish": lambda a: np.where(np.abs(a) < 3, (a + 1.5) / 3, np.where(a > 0, 1, 0 * a)),
}
FROM_A = ["gelu", "silu", "gelu_erf", "sine", "mish", "hard_swish"]
STEEPEST = 1.76
"""No g but the exponential is steeper: selu's g' reaches 1.758."""


def steepest(name: str, a: NDArray) -> NDArray | float:
    """No less than g' is at a and a little beyond. gelu's reaches 1.129, and others' less."""
    if name == "exponential":
        return np.maximum(1.1 * np.exp(a), 1)
    return {"selu": STEEPEST, "hard_swish": 1.5}.get(name, 1.13)


def exponent_roundings(name: str, a: NDArray) -> NDArray | float:
    """How many roundings the argument of g's exponential makes of one of its own, in parts of g."""
    return {"gelu": lambda: 5 * np.abs(gelu_argument(a)), "gelu_erf": lambda: a * a / 2}.get(name, lambda: 0.0)()


def outputs(name: str, a: NDArray) -> NDArray:
    return softmax(a) if name == "softmax" else {"identity": a, "sigmoid": logistic(a), "tanh": np.tanh(a)}[name]


def rows_of(y: NDArray, a: NDArray) -> NDArray:
    """Targets as rows (B, n_L); labels become one-hot."""
    return np.eye(a.shape[1], dtype=a.dtype)[y] if y.dtype.kind in "iu" else y.reshape(a.shape).astype(a.dtype)


def sample_losses(loss: str, output: str, a: NDArray, y: NDArray) -> NDArray:
    if loss == "cross_entropy":
        z = a - a.max(axis=1, keepdims=True)
        return (y * (np.log(np.exp(z).sum(axis=1, keepdims=True)) - z)).sum(axis=1)
    if loss == "binary_cross_entropy":
        return (np.logaddexp(a, 0) - a * y).sum(axis=1)
    return ((outputs(output, a) - y) ** 2).sum(axis=1) / 2


def loss_gradient(loss: str, output: str, a: NDArray, y: NDArray) -> NDArray:
    """∂ℓ_b/∂a_b."""
    p = outputs(output, a)
    if loss == "cross_entropy":
        return p * y.sum(axis=1, keepdims=True) - y
    if loss == "binary_cross_entropy" or output == "identity":
        return p - y
    r = p - y
    if output == "softmax":
        return p * (r - (r * p).sum(axis=1, keepdims=True))
    return r * (p * logistic(-a) if output == "sigmoid" else 1 / np.cosh(a) ** 2)


def to_tf32(x: NDArray) -> NDArray[np.float64]:
    """Finite numbers to 11 significant bits, ties away from zero."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.sign(mantissa) * np.floor(np.abs(mantissa) * 2048 + 0.5), exponent - 11)
