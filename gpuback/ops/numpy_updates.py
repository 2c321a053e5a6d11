"""The optimizers' updates on NumPy: one pass over θ, its gradient and the optimizer's state, in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuback._typing import Array
from gpuback.ops.numpy_workspace import aligned_empty

CHUNK = 1 << 16
"""How many parameters an optimizer updates at a time, so that θ, ∇θ and its state pass through the cache once."""


def bind_sgd(theta: Array, velocity: Array | None) -> Callable[..., None]:
    """θ ← θ − η (v, or g + μv with Nesterov, or g without momentum), v ← μv + g, g = c ∇θ + λθ, as a function of
    (∇θ, c, *, learning_rate η, momentum μ, nesterov, weight_decay λ).
    """
    parts = _parts(theta, velocity)

    def step(
        gradient: Array,
        factor: float,
        *,
        learning_rate: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
    ) -> None:
        for where, t, v, g, spare in parts:
            if v is None and not weight_decay:
                np.multiply(gradient[where], factor * learning_rate, out=g)
                np.subtract(t, g, out=t)
                continue
            np.multiply(gradient[where], factor, out=g)
            if weight_decay:
                np.multiply(t, weight_decay, out=spare)
                np.add(g, spare, out=g)
            if v is not None:
                np.multiply(v, momentum, out=v)
                np.add(v, g, out=v)
                if nesterov:
                    np.multiply(v, momentum, out=spare)
                    np.add(g, spare, out=g)
                else:
                    np.copyto(g, v)
            np.multiply(g, learning_rate, out=g)
            np.subtract(t, g, out=t)

    return step


def bind_adam(theta: Array, first_moment: Array, second_moment: Array) -> Callable[..., None]:
    """m ← m + (1 − β₁)(g − m), v ← β₂v + (1 − β₂)g², θ ← θ − (η/c₁) m / (√v/√c₂ + ε), g = c ∇θ, as a function of
    (∇θ, c, *, learning_rate η, betas, bias_corrections (c₁, c₂) = (1 − β₁ᵗ, 1 − β₂ᵗ), eps ε, weight_decay λ,
    decoupled).

    Weight decay adds λθ to g, or (decoupled: AdamW) first shrinks θ by 1 − ηλ.
    """
    parts = _parts(theta, first_moment, second_moment)

    def step(
        gradient: Array,
        factor: float,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        bias_corrections: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
    ) -> None:
        correction_1, root_correction_2 = bias_corrections[0], math.sqrt(bias_corrections[1])
        for where, t, m, v, g, spare in parts:
            np.multiply(gradient[where], factor, out=g)
            if weight_decay and decoupled:
                np.multiply(t, 1.0 - learning_rate * weight_decay, out=t)
            elif weight_decay:
                np.multiply(t, weight_decay, out=spare)
                np.add(g, spare, out=g)
            np.subtract(g, m, out=spare)
            np.multiply(spare, 1.0 - betas[0], out=spare)
            np.add(m, spare, out=m)
            np.multiply(v, betas[1], out=v)
            np.multiply(g, g, out=g)
            np.multiply(g, 1.0 - betas[1], out=g)
            np.add(v, g, out=v)
            np.sqrt(v, out=g)
            np.divide(g, root_correction_2, out=g)
            np.add(g, eps, out=g)
            np.divide(m, g, out=g)
            np.multiply(g, learning_rate / correction_1, out=g)
            np.subtract(t, g, out=t)

    return step


def _parts(theta: Array, *state: Array | None) -> list[list[Any]]:
    """θ and an optimizer's state in parts of up to CHUNK: for each where it lies, its views, and two scratch arrays."""
    scratch = [aligned_empty(min(CHUNK, len(theta)), theta.dtype) for _ in range(2)]
    parts = []
    for start in range(0, len(theta), CHUNK):
        where = slice(start, min(start + CHUNK, len(theta)))
        views = [None if array is None else array[where] for array in (theta, *state)]
        parts.append([where, *views, *(array[: where.stop - start] for array in scratch)])
    return parts
