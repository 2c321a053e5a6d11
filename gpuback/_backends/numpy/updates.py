"""The optimizers' updates on NumPy: one pass over θ, its gradient and the optimizer's state, in place.

Each is a fixed sequence of + − × ÷ √, rounded one by one in θ's dtype; hyper-parameters, and what is computed from them
in float64, are rounded to it first. kernels/elementwise/optimizers.cu computes the same sequence: the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuback._core.exact_sums import norm as norm
from gpuback._core.scratch import aligned_empty, bind
from gpuback._core.typing import Array

CHUNK = 1 << 16
"""How many parameters an optimizer updates at a time, so that θ, ∇θ and its state pass through the cache once."""

SMALLEST_FACTOR = 2.0**-100
"""A smaller factor might not be a normal number in float32; it is applied in several parts."""


def all_finite(array: Array) -> bool:
    """Whether no element is infinite or NaN: the squares' sum tells at the speed of memory, unless it overflows."""
    return math.isfinite(array.dot(array)) or bool(np.isfinite(array).all())


class NumpyUpdate(ABC):
    """What the updates share: whether to make one, how many were made, by what the gradient is multiplied.

    One thread makes them: BLAS's, which have just finished the gradient, spin for a while, and a second one of ours was
    seen to gain nothing beside them.
    """

    _count_of_numbers: int
    """How many numbers the formulas contain."""

    def __init__(self, steps: int, theta: Array, *state: Array | None) -> None:
        self.steps = steps
        self.diverged_at: int | None = None
        self.applied = False  # whether the last call made an update
        self._arrays = [array for array in (theta, *state) if array is not None]
        self._invalid = False
        self._numbers = np.zeros(self._count_of_numbers, theta.dtype)
        self._last_numbers: tuple[float, ...] | None = None
        # Views without axes, which ufuncs take up sooner than NumPy's or Python's scalars.
        numbers = [self._numbers[i, ...] for i in range(self._count_of_numbers)]
        spare, other = (aligned_empty(min(CHUNK, len(theta)), theta.dtype) for _ in range(2))
        self._parts = []
        for start in range(0, len(theta), CHUNK):
            where = slice(start, min(start + CHUNK, len(theta)))
            views = [None if array is None else array[where] for array in (theta, *state)]
            scratch = [array[: where.stop - start] for array in (spare, other)]
            self._parts.append((where, self._bind(*views, *scratch, *numbers)))

    def __call__(
        self,
        gradient: Array,
        *,
        loss: float | None = None,
        clip_norm: float | None = None,
        stop_after_nonfinite: bool = False,
        **hyper_parameters: Any,
    ) -> None:
        factor, self.applied = 1.0, False
        if loss is not None:
            if not (math.isfinite(loss) and all_finite(gradient)):
                if self.diverged_at is None:
                    self.diverged_at = self.steps
                return
            if stop_after_nonfinite and self.diverged_at is not None:
                return
            if clip_norm is not None:
                factor = clip(gradient, clip_norm)
        self.steps += 1
        self.applied = True
        self._invalid = False
        numbers = self._numbers_now(**hyper_parameters)
        if numbers != self._last_numbers:
            self._numbers[:] = self._last_numbers = numbers
        for where, update in self._parts:
            update(gradient[where], factor)
        if self._invalid:
            self._settle_nan()

    def on_invalid(self, *what: Any) -> None:
        self._invalid = True

    def _settle_nan(self) -> None:
        """∞ − ∞ and the like leave a NaN with the processor's bits: all get the one that other backends store."""
        for array in self._arrays:
            array[np.isnan(array)] = np.nan

    def poll_diverged(self) -> int | None:
        return self.diverged_at

    @abstractmethod
    def _numbers_now(self, **hyper_parameters: Any) -> tuple[float, ...]:
        """What this step's formulas contain, computed in float64."""

    @abstractmethod
    def _bind(self, *arrays_and_numbers: Any) -> Callable[[Array, float], None]:
        """The update of some parameters, as a function of their gradient and the factor that it is multiplied by.

        Args:
            arrays_and_numbers: θ and the optimizer's state; two scratch arrays; the numbers, in θ's dtype.
        """


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
    momentum μ, nesterov, weight_decay λ. Without weight decay nothing is added to c ∇θ, not even 0.
    """

    _count_of_numbers = 4

    def __init__(self, theta: Array, velocity: Array | None, steps: int) -> None:
        super().__init__(steps, theta, velocity)

    def _numbers_now(  # type: ignore[override]
        self, *, learning_rate: float, momentum: float, nesterov: bool, weight_decay: float
    ) -> tuple[float, ...]:
        return learning_rate, momentum, nesterov, weight_decay

    def _bind(
        self, t: Array, v: Array | None, spare: Array, other: Array, rate: Any, keep: Any, nesterov: Any, decay: Any
    ) -> Callable[[Array, float], None]:
        def update(g: Array, factor: float) -> None:
            if factor != 1.0:
                g = np.multiply(g, factor, out=spare)
            if decay.item():
                np.multiply(t, decay, out=other)
                g = np.add(g, other, out=spare)
            if v is not None:
                np.multiply(v, keep, out=v)
                np.add(v, g, out=v)
                if nesterov.item():
                    np.multiply(v, keep, out=other)
                    g = np.add(g, other, out=spare)
                else:
                    g = v
            np.multiply(g, rate, out=spare)
            np.subtract(t, spare, out=t)

        return update


class AdamUpdate(NumpyUpdate):
    """m ← m + (1 − β₁)(g − m), v ← β₂v + (1 − β₂)g², θ ← θ − (η√c₂/c₁) (m / (√v + ε√c₂)), cᵢ = 1 − βᵢᵗ, g = c ∇θ, with
    learning_rate η, betas, eps ε, weight_decay λ, decoupled.

    Weight decay adds λθ to g, or (decoupled: AdamW) first shrinks θ by 1 − ηλ. βᵗ is by multiplication, which IEEE
    fixes to the bit; a library's pow may vary.
    """

    _count_of_numbers = 7

    def __init__(self, theta: Array, first_moment: Array, second_moment: Array, steps: int) -> None:
        super().__init__(steps, theta, first_moment, second_moment)
        self._beta_powers: tuple[float, float] | None = None

    def _numbers_now(  # type: ignore[override]
        self,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
    ) -> tuple[float, ...]:
        first, second = self._beta_powers or beta_powers(betas, self.steps - 1)
        self._beta_powers = first, second = first * betas[0], second * betas[1]
        root = math.sqrt(1.0 - second)
        rate = learning_rate * root / (1.0 - first)
        decay, shrink = (0.0, 1.0 - learning_rate * weight_decay) if decoupled else (weight_decay, 1.0)
        return rate, 1.0 - betas[0], betas[1], 1.0 - betas[1], eps * root, decay, shrink

    def _bind(
        self,
        t: Array,
        m: Array,
        v: Array,
        spare: Array,
        other: Array,
        rate: Any,
        gain_1: Any,
        keep_2: Any,
        gain_2: Any,
        epsilon: Any,
        decay: Any,
        shrink: Any,
    ) -> Callable[[Array, float], None]:
        square = step = spare
        operations = (
            bind(np.multiply, other, gain_1, out=other),
            bind(np.add, m, other, out=m),
            bind(np.multiply, v, keep_2, out=v),
            bind(np.multiply, square, gain_2, out=square),
            bind(np.add, v, square, out=v),
            bind(np.sqrt, v, out=step),
            bind(np.add, step, epsilon, out=step),
            bind(np.divide, m, step, out=step),
            bind(np.multiply, step, rate, out=step),
            bind(np.subtract, t, step, out=t),
        )

        def update(g: Array, factor: float) -> None:
            if factor != 1.0:
                g = np.multiply(g, factor, out=spare)
            if shrink.item() != 1.0:
                np.multiply(t, shrink, out=t)
            if decay.item():
                np.multiply(t, decay, out=other)
                g = np.add(g, other, out=spare)
            np.subtract(g, m, out=other)
            np.multiply(g, g, out=square)
            for operation in operations:
                operation()

        return update


def beta_powers(betas: tuple[float, float], steps: int) -> tuple[float, float]:
    """(β₁ᵗ, β₂ᵗ) after so many steps."""
    first, second = 1.0, 1.0
    for _ in range(steps):
        first, second = first * betas[0], second * betas[1]
    return first, second
