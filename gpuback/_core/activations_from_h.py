"""Smooth activations whose g' is a function of h = g(a): g and g' on whole arrays.

How they are called is said in `gpuback._core.activations`.
"""

from __future__ import annotations

import numpy as np

from gpuback._core.activations_piecewise import ZERO
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array

SELU_SCALE = 1.0507009873554805
"""λ, and λα below: with these, normal pre-activations give h of mean 0 and variance 1."""

SELU_DEPTH = 1.7580993408473769

LARGE = 1e10
"""The square of this, and 1 more, are the same number in every dtype, and far below what float32 holds."""

LARGEST = 1e30
"""Numbers beyond this are taken for it, where an infinity would give NaN and the result does not depend on it."""


def elu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a where a > 0, else e^a − 1."""
    below = scratch.a
    np.minimum(a, scratch.zeros, out=below)
    np.expm1(below, out=below)
    np.maximum(a, scratch.zeros, out=h)
    np.add(h, below, out=h)


def elu_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 where h > 0, else h + 1 = e^a."""
    slope = scratch.a
    np.minimum(h, scratch.zeros, out=slope)
    np.add(slope, 1, out=slope)
    np.multiply(dh, slope, out=dh)


def sigmoid(a: Array, h: Array, scratch: Scratch) -> None:
    """h = 1/(1 + e^−a), as e^min(a,0) / (1 + e^−|a|), which neither overflows nor cancels."""
    denominator = scratch.a
    np.abs(a, out=denominator)
    np.negative(denominator, out=denominator)
    np.exp(denominator, out=denominator)
    np.add(denominator, 1, out=denominator)
    np.minimum(a, scratch.zeros, out=h)
    np.exp(h, out=h)
    np.divide(h, denominator, out=h)


def sigmoid_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = h (1 − h)."""
    slope = scratch.a
    np.subtract(1, h, out=slope)
    np.multiply(slope, h, out=slope)
    np.multiply(dh, slope, out=dh)


def tanh(a: Array, h: Array, scratch: Scratch) -> None:
    """h = tanh(a)."""
    np.tanh(a, out=h)


def tanh_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 − h²."""
    slope = scratch.a
    np.multiply(h, h, out=slope)
    np.subtract(1, slope, out=slope)
    np.multiply(dh, slope, out=dh)


def softplus(a: Array, h: Array, scratch: Scratch) -> None:
    """h = log(1 + e^a), as max(a, 0) + log1p(e^−|a|), which neither overflows nor cancels."""
    tail = scratch.a
    np.abs(a, out=tail)
    np.negative(tail, out=tail)
    np.exp(tail, out=tail)
    np.log1p(tail, out=tail)
    np.maximum(a, scratch.zeros, out=h)
    np.add(h, tail, out=h)


def softplus_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = sigmoid(a) = 1 − e^−h = −expm1(−h)."""
    slope = scratch.a
    np.negative(h, out=slope)
    np.expm1(slope, out=slope)
    np.negative(slope, out=slope)
    np.multiply(dh, slope, out=dh)


def exponential(a: Array, h: Array, scratch: Scratch) -> None:
    """h = e^a."""
    np.exp(a, out=h)


def exponential_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = h."""
    np.multiply(dh, h, out=dh)


def squareplus(a: Array, h: Array, scratch: Scratch) -> None:
    """h = (a + √(a² + 4))/2, as max(a, 0) + 1/(q + √(q² + 1)) with q = |a|/2, which neither overflows nor cancels.

    Source: Barron, "Squareplus: A Softplus-Like Algebraic Rectifier", 2021.
    """
    q, root = scratch.a, scratch.b
    np.abs(a, out=q)
    np.multiply(q, 0.5, out=q)
    np.clip(q, 0, LARGE, out=root)
    np.multiply(root, root, out=root)
    np.add(root, 1, out=root)
    np.sqrt(root, out=root)
    np.maximum(root, q, out=root)  # where q is large
    np.add(q, root, out=q)
    np.divide(1, q, out=q)
    np.maximum(a, scratch.zeros, out=h)
    np.add(h, q, out=h)


def squareplus_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = h²/(1 + h²)."""
    square, denominator = scratch.a, scratch.b
    np.clip(h, 0, LARGE, out=square)
    np.multiply(square, square, out=square)
    np.add(square, 1, out=denominator)
    np.divide(square, denominator, out=square)
    np.multiply(dh, square, out=dh)


def selu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = λa where a > 0, else λα(e^a − 1).

    Source: Klambauer et al., "Self-Normalizing Neural Networks", 2017.
    """
    below = scratch.a
    np.minimum(a, scratch.zeros, out=below)
    np.expm1(below, out=below)
    np.multiply(below, SELU_DEPTH, out=below)
    np.maximum(a, scratch.zeros, out=h)
    np.multiply(h, SELU_SCALE, out=h)
    np.add(h, below, out=h)


def selu_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = λ where h > 0, else h + λα."""
    slope, above, number = scratch.a, scratch.b, dh.dtype.type
    np.minimum(h, scratch.zeros, out=slope)
    np.add(slope, SELU_DEPTH, out=slope)
    np.greater(h, ZERO, out=scratch.mask)
    np.multiply(scratch.mask, number(SELU_DEPTH) - number(SELU_SCALE), out=above)  # exact, so that λ remains
    np.subtract(slope, above, out=slope)
    np.multiply(dh, slope, out=dh)


def softsign(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a/(1 + |a|), with an a that is not infinite: ∞/∞ is NaN."""
    np.clip(a, -LARGEST, LARGEST, out=h)
    np.abs(h, out=scratch.a)
    np.add(scratch.a, 1, out=scratch.a)
    np.divide(h, scratch.a, out=h)


def softsign_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = (1 − |h|)²."""
    slope = scratch.a
    np.abs(h, out=slope)
    np.subtract(1, slope, out=slope)
    np.multiply(slope, slope, out=slope)
    np.multiply(dh, slope, out=dh)


def log_sigmoid(a: Array, h: Array, scratch: Scratch) -> None:
    """h = log sigmoid(a) = −log(1 + e^−a), as min(a, 0) − log1p(e^−|a|), which neither overflows nor cancels."""
    tail = scratch.a
    np.abs(a, out=tail)
    np.negative(tail, out=tail)
    np.exp(tail, out=tail)
    np.log1p(tail, out=tail)
    np.minimum(a, scratch.zeros, out=h)
    np.subtract(h, tail, out=h)


def log_sigmoid_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = sigmoid(−a) = 1 − e^h = −expm1(h)."""
    slope = scratch.a
    np.expm1(h, out=slope)
    np.negative(slope, out=slope)
    np.multiply(dh, slope, out=dh)
