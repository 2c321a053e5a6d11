"""The optimizers' updates on NumPy: one pass over θ, its gradient and the optimizer's state, in place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from gpuback._typing import Array
from gpuback.ops.numpy_workspace import aligned_empty

CHUNK = 1 << 16
"""How many parameters an optimizer updates at a time, so that θ, ∇θ and its state pass through the cache once."""

SMALLEST_FACTOR = 2.0**-100
"""A smaller factor might not be a normal number in float32; it is applied in two parts."""


def all_finite(array: Array) -> bool:
    """Whether no element is infinite or NaN: the squares' sum tells at the speed of memory, unless it overflows."""
    return math.isfinite(np.dot(array, array)) or bool(np.isfinite(array).all())


def norm(array: Array) -> float:
    """√Σ x², without overflow or underflow on the way."""
    largest = float(max(np.max(array), -np.min(array)))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    total = 0.0
    for start in range(0, len(array), CHUNK):
        scaled = array[start : start + CHUNK] / array.dtype.type(largest)
        total += float(np.add.reduce(np.multiply(scaled, scaled, out=scaled), dtype=np.float64))
    return largest * math.sqrt(total)


class NumpyUpdate(ABC):
    """What the updates share: whether to make one, how many were made, by what the gradient is multiplied."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.diverged_at: int | None = None

    def __call__(
        self,
        gradient: Array,
        *,
        loss: Array | float | None = None,
        clip_norm: float | None = None,
        halt: bool = False,
        **hyper_parameters: Any,
    ) -> None:
        factor = 1.0
        if loss is not None:
            if not (np.isfinite(loss) and all_finite(gradient)):
                if self.diverged_at is None:
                    self.diverged_at = self.steps
                return
            if halt and self.diverged_at is not None:
                return
            if clip_norm is not None:
                factor = clip(gradient, clip_norm)
        self.steps += 1
        self.apply(gradient, factor, **hyper_parameters)

    def glance(self) -> int | None:
        return self.diverged_at

    @abstractmethod
    def apply(self, gradient: Array, factor: float, **hyper_parameters: Any) -> None:
        """The update itself, with `factor` times the gradient."""


def clip(gradient: Array, clip_norm: float) -> float:
    """The factor that brings the gradient down to a norm of clip_norm.

    Where float32 cannot hold that factor, the gradient is scaled by a part of it here.
    """
    length = norm(gradient)
    unscaled = 1.0
    if math.isinf(length):
        gradient *= SMALLEST_FACTOR
        unscaled /= SMALLEST_FACTOR
        length = norm(gradient)
    factor = min(unscaled, clip_norm / (length + 1e-6))
    while 0 < factor < SMALLEST_FACTOR:
        gradient *= SMALLEST_FACTOR
        factor /= SMALLEST_FACTOR
    return factor


class SGDUpdate(NumpyUpdate):
    """θ ← θ − η (v, or g + μv with Nesterov, or g without momentum), v ← μv + g, g = c ∇θ + λθ, with learning_rate η,
    momentum μ, nesterov, weight_decay λ.
    """

    def __init__(self, theta: Array, velocity: Array | None, steps: int) -> None:
        super().__init__(steps)
        self._parts = _parts(theta, velocity)

    def apply(  # type: ignore[override]
        self,
        gradient: Array,
        factor: float,
        *,
        learning_rate: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
    ) -> None:
        for where, t, v, g, spare in self._parts:
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


class AdamUpdate(NumpyUpdate):
    """m ← m + (1 − β₁)(g − m), v ← β₂v + (1 − β₂)g², θ ← θ − (η/c₁) m / (√v/√c₂ + ε), c = 1 − βᵗ, g = c ∇θ, with
    learning_rate η, betas, eps ε, weight_decay λ, decoupled.

    Weight decay adds λθ to g, or (decoupled: AdamW) first shrinks θ by 1 − ηλ. βᵗ is by multiplication, which IEEE
    fixes to the bit; a library's pow may vary.
    """

    def __init__(self, theta: Array, first_moment: Array, second_moment: Array, steps: int) -> None:
        super().__init__(steps)
        self._parts = _parts(theta, first_moment, second_moment)
        self._beta_powers: tuple[float, float] | None = None

    def apply(  # type: ignore[override]
        self,
        gradient: Array,
        factor: float,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
    ) -> None:
        first, second = self._beta_powers or beta_powers(betas, self.steps - 1)
        self._beta_powers = first * betas[0], second * betas[1]
        correction_1, root_correction_2 = 1.0 - self._beta_powers[0], math.sqrt(1.0 - self._beta_powers[1])
        for where, t, m, v, g, spare in self._parts:
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


def beta_powers(betas: tuple[float, float], steps: int) -> tuple[float, float]:
    """(β₁ᵗ, β₂ᵗ) after so many steps."""
    first, second = 1.0, 1.0
    for _ in range(steps):
        first, second = first * betas[0], second * betas[1]
    return first, second


def _parts(theta: Array, *state: Array | None) -> list[list[Any]]:
    """θ and an optimizer's state in parts of up to CHUNK: for each where it lies, its views, and two scratch arrays."""
    scratch = [aligned_empty(min(CHUNK, len(theta)), theta.dtype) for _ in range(2)]
    parts = []
    for start in range(0, len(theta), CHUNK):
        where = slice(start, min(start + CHUNK, len(theta)))
        views = [None if array is None else array[where] for array in (theta, *state)]
        parts.append([where, *views, *(array[: where.stop - start] for array in scratch)])
    return parts
