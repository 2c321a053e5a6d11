"""Learning rates as functions of the step number t = 0, 1, 2, …: constant, step decay, cosine, each with a warm-up.

`fit(..., schedule=cosine(0.01, steps=1000))` sets the optimizer's learning rate before every step; by hand it is
`optimizer.learning_rate = schedule(t)`. Any function of t will do as well.

Rates have the same bits on every machine: they come from + − × ÷ of Python's floats, which are IEEE float64, and from
nothing else, for how `math.cos` and `**` come to their last bit is nobody's promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from gpuback._core.validation import count, in_range
from gpuback.errors import OptionError

LAST_STEP = (1 << 63) - 1
"""No run makes more steps."""

Rate: TypeAlias = Callable[[int], float]
"""A schedule as optimizers call it: a function from the step number t to the learning rate."""


@dataclass(frozen=True, repr=False)
class Schedule:
    """A schedule that says what it is: `repr` gives the call that makes it (a user's function by its name), and equal
    ones are the same call.

    Attributes:
        name: of the function that made it.
        options: its arguments.
        rule: the learning rate from the options and t.
    """

    name: str
    options: tuple[tuple[str, Any], ...]
    rule: Callable[..., float]

    def __call__(self, step: int) -> float:
        """η of step t, an integer from 0 to 2⁶³ − 1; anything else is an OptionError."""
        step = count("step", step, 0)
        if step > LAST_STEP:
            raise OptionError(f"step: expected an integer < 2⁶³, got one of {step.bit_length()} bits")
        return self.rule(step, **dict(self.options))

    def __repr__(self) -> str:
        shown = [f"{name}={identity(value) if callable(value) else repr(value)}" for name, value in self.options]
        return f"{self.name}({', '.join(shown)})"


def constant(learning_rate: float) -> Schedule:
    """η(t) = η₀; worth it behind a warm-up.

    Args:
        learning_rate: η₀ ≥ 0.

    Raises:
        OptionError: an argument is out of range.
    """
    return _schedule(constant, _constant, learning_rate=_rate("learning_rate", learning_rate))


def step_decay(learning_rate: float, every: int, factor: float = 0.1) -> Schedule:
    """η(t) = η₀ γ^⌊t / every⌋: times γ once in so many steps.

    Args:
        learning_rate: η₀ ≥ 0.
        every: steps between two decays, ≥ 1.
        factor: γ in (0, 1].

    Raises:
        OptionError: an argument is out of range.

    Source: torch.optim.lr_scheduler.StepLR.

    Example:
        >>> [step_decay(1.0, every=2, factor=0.5)(t) for t in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    factor = in_range("factor", factor, 0.0)
    if not 0.0 < factor <= 1.0:
        raise OptionError(f"factor: expected a number > 0 and ≤ 1, got {factor!r}")
    learning_rate, every = _rate("learning_rate", learning_rate), count("every", every)
    return _schedule(step_decay, _step_decay, learning_rate=learning_rate, every=every, factor=factor)


def cosine(learning_rate: float, steps: int, final: float = 0.0) -> Schedule:
    """η(t) = η₁ + (η₀ − η₁) ½ (1 + cos(π t/T)) up to t = T, then η₁: half a wave down.

    Args:
        learning_rate: η₀ ≥ 0.
        steps: T ≥ 1; for all of a `fit`, epochs × ⌈N / batch_size⌉.
        final: η₁ ≥ 0.

    Raises:
        OptionError: an argument is out of range.

    Source: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017, without restarts.

    Example:
        >>> [round(cosine(1.0, steps=4)(t), 3) for t in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    learning_rate, steps, final = _rate("learning_rate", learning_rate), count("steps", steps), _rate("final", final)
    return _schedule(cosine, _cosine, learning_rate=learning_rate, steps=steps, final=final)


def warmup(schedule: Rate, steps: int) -> Schedule:
    """η(t) = s(0) (t + 1)/n for the first n steps, then s(t − n): a straight line up to where the schedule s begins.

    Args:
        schedule: s, one of these or any function of the step number.
        steps: n ≥ 1.

    Raises:
        OptionError: an argument is out of range.

    Source: Goyal et al., "Accurate, large minibatch SGD", 2017.

    Example:
        >>> [warmup(constant(1.0), steps=4)(t) for t in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return _schedule(warmup, _warmup, schedule=checked(schedule), steps=count("steps", steps))


def checked(schedule: Rate) -> Rate:
    """Return the schedule itself.

    Raises:
        OptionError: it is no function.
    """
    if not callable(schedule):
        raise OptionError(
            f"schedule: expected a function of the step number such as schedules.cosine(0.01, steps=1000), "
            f"got {schedule!r}"
        )
    return schedule


def identity(schedule: Rate | None) -> str | None:
    """Name a schedule, for checkpoints: by the call that makes it, or by the name of a user's function."""
    if schedule is None or isinstance(schedule, Schedule):
        return None if schedule is None else repr(schedule)
    if isinstance(schedule, partial):
        return identity(schedule.func)
    named: Any = schedule if hasattr(schedule, "__qualname__") else type(schedule)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"  # a method of an array has no module


def _schedule(made_by: Callable[..., Schedule], rule: Callable[..., float], **options: Any) -> Schedule:
    return Schedule(made_by.__name__, tuple(options.items()), rule)


def _constant(step: int, *, learning_rate: float) -> float:
    return learning_rate


def _step_decay(step: int, *, learning_rate: float, every: int, factor: float) -> float:
    return learning_rate * _power(factor, step // every)


def _power(base: float, exponent: int) -> float:
    """base^exponent by squaring: b⁶ = (b²)² · b²."""
    power = 1.0
    while exponent:
        if exponent & 1:
            power *= base
        base *= base
        exponent >>= 1
    return power


def _cosine(step: int, *, learning_rate: float, steps: int, final: float) -> float:
    """½ (1 + cos(π t/T)) is sin²(½π (T − t)/T), and 1 − sin²(½π t/T): whichever argument is ≤ ¼π."""
    left = max(steps - step, 0)
    if left < steps - left:
        share = _sine_of_quarters(left / steps)
        share *= share
    else:
        sine = _sine_of_quarters((steps - left) / steps)
        share = 1.0 - sine * sine
    return learning_rate * share + final * (1.0 - share)


HALF_PI = 1.5707963267948966

SINE_COEFFICIENTS = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8))
"""1, −1/3!, 1/5!, …: of (sin x)/x by powers of x². What is cut off is below 10⁻¹⁶ up to ¼π."""


def _sine_of_quarters(x: float) -> float:
    """sin(½π x) for 0 ≤ x ≤ ½."""
    angle = HALF_PI * x
    square = angle * angle
    sine = 0.0
    for coefficient in reversed(SINE_COEFFICIENTS):
        sine = sine * square + coefficient
    return sine * angle


def _warmup(step: int, *, schedule: Rate, steps: int) -> float:
    return schedule(0) * (step + 1) / steps if step < steps else schedule(step - steps)


def _rate(name: str, value: float) -> float:
    return in_range(name, value, 0.0)
