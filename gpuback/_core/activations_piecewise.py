"""Activations made of straight lines, and hard_swish, a parabola between two of them: g and g' on whole arrays.

How they are called is said in `gpuback._core.activations`.
"""

from __future__ import annotations

import math

import numpy as np

from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array

LEAKY_SLOPE = 0.01

ZERO = np.zeros((), np.float32)
"""0 as a 0-d array: ufuncs start faster on it than on a Python number."""


def identity(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a."""
    if h is not a:
        np.copyto(h, a)


def identity_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1."""


def relu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = max(a, 0)."""
    np.maximum(a, scratch.zeros, out=h)


def relu_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 where h > 0, else 0."""
    np.greater(h, ZERO, out=scratch.mask)
    np.multiply(dh, scratch.mask, out=dh)


def leaky_relu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a where a > 0, else 0.01 a."""
    np.multiply(a, LEAKY_SLOPE, out=scratch.a)
    np.maximum(a, scratch.a, out=h)


def leaky_relu_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 where h > 0, else 0.01."""
    slope = scratch.a
    np.greater(h, 0, out=slope)
    np.maximum(slope, LEAKY_SLOPE, out=slope)
    np.multiply(dh, slope, out=dh)


def hard_tanh(a: Array, h: Array, scratch: Scratch) -> None:
    """h = min(max(a, −1), 1)."""
    np.clip(a, -1, 1, out=h)


def hard_tanh_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 where |h| < 1, else 0."""
    np.abs(h, out=scratch.a)
    np.less(scratch.a, 1, out=scratch.mask)
    np.multiply(dh, scratch.mask, out=dh)


def relu6(a: Array, h: Array, scratch: Scratch) -> None:
    """h = min(max(a, 0), 6)."""
    np.clip(a, 0, 6, out=h)


def relu6_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 where 0 < h < 6, else 0."""
    _keep_between(0, 6, dh, h, scratch)


def hard_sigmoid(a: Array, h: Array, scratch: Scratch) -> None:
    """h = min(max(a + 3, 0), 6)/6."""
    np.add(a, 3, out=h)
    np.clip(h, 0, 6, out=h)
    np.divide(h, 6, out=h)


def hard_sigmoid_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1/6 where 0 < h < 1, else 0."""
    _keep_between(0, 1, dh, h, scratch)
    np.divide(dh, 6, out=dh)


def _keep_between(least: float, most: float, dh: Array, h: Array, scratch: Scratch) -> None:
    """dh ← 0 where h is not strictly between the two."""
    for compare, end in ((np.greater, least), (np.less, most)):
        compare(h, end, out=scratch.mask)
        np.multiply(dh, scratch.mask, out=dh)


def hard_swish(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a·hard_sigmoid(a), with an a of at least −3 in the product: −∞ · 0 is NaN."""
    hard_sigmoid(a, h, scratch)
    np.clip(a, -3, math.inf, out=scratch.a)
    np.multiply(h, scratch.a, out=h)


def hard_swish_backward(dh: Array, a: Array, scratch: Scratch) -> None:
    """g' = (a + 1.5)/3 where |a| < 3, else 0 or 1: at −3 and beyond 0.5 more than the clipped line, at 3 0.5 less."""
    slope, half = scratch.a, scratch.b
    np.clip(a, -3, 3, out=slope)
    np.add(slope, 1.5, out=slope)
    np.divide(slope, 3, out=slope)
    for compare, end, change in ((np.less_equal, -3, 0.5), (np.greater_equal, 3, -0.5)):
        compare(a, end, out=scratch.mask)
        np.multiply(scratch.mask, slope.dtype.type(change), out=half)
        np.add(slope, half, out=slope)
    np.multiply(dh, slope, out=dh)
