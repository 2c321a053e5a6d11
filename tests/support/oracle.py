"""The formulas of activations, losses and their derivatives, in float64, or in long double for float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def logistic(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


def softmax(a: NDArray) -> NDArray:
    powers = np.exp(a - a.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def gelu_argument(a: NDArray) -> NDArray:
    return np.sqrt(8 / (4 * np.arctan(a.dtype.type(1)))) * (a + 0.044715 * a**3)


def gelu_slope(a: NDArray) -> NDArray:
    s = logistic(gelu_argument(a))
    return s + np.sqrt(8 / (4 * np.arctan(a.dtype.type(1)))) * a * (1 + 0.134145 * a**2) * s * (1 - s)


G: dict[str, Callable[[NDArray], NDArray]] = {
    "identity": lambda a: a,
    "relu": lambda a: np.maximum(a, 0),
    "leaky_relu": lambda a: np.where(a > 0, a, a / 100),
    "elu": lambda a: np.where(a > 0, a, np.expm1(np.minimum(a, 0))),
    "sigmoid": logistic,
    "tanh": np.tanh,
    "softplus": lambda a: np.logaddexp(a, 0),
    "gelu": lambda a: a * logistic(gelu_argument(a)),
    "silu": lambda a: a * logistic(a),
}
SLOPE: dict[str, Callable[[NDArray], NDArray]] = {  # from h, but the last two: from a
    "identity": np.ones_like,
    "relu": lambda h: np.where(h > 0, 1, 0 * h),
    "leaky_relu": lambda h: np.where(h > 0, 1, np.full_like(h, 1) / 100),
    "elu": lambda h: np.where(h > 0, 1, h + 1),
    "sigmoid": lambda h: h * (1 - h),
    "tanh": lambda h: (1 - h) * (1 + h),
    "softplus": lambda h: -np.expm1(-h),
    "gelu": gelu_slope,
    "silu": lambda a: logistic(a) * (1 + a * logistic(-a)),
}
FROM_A = ["gelu", "silu"]
STEEPEST = 1.13
"""No g is steeper: gelu's g' reaches 1.129."""


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
