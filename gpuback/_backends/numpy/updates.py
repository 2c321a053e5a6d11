"""The optimizers' updates on NumPy, in place: one pass over θ, its gradient and the optimizer's state.

Each update is a fixed sequence of + − × ÷ √, rounded one by one in θ's dtype. Hyper-parameters, and what is computed
from them in float64, are rounded to that dtype first. kernels/elementwise/optimizers.cu runs the same sequence and so
gets the same bits. The dynamic loss scale stands here too: it follows each update.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from gpuback._backends.numpy.scope import bind_scope
from gpuback._backends.protocol import LARGEST_SCALE, SMALLEST_SCALE
from gpuback._core.chained_sums import BLAS_ONE_THREAD
from gpuback._core.exact_sums import norm
from gpuback._core.interrupts import Deferred
from gpuback._core.parameters import ParameterRange, spans
from gpuback._core.scratch import aligned_empty, bind
from gpuback._core.threads import BlasAlone
from gpuback._core.typing import Array

PARAMETERS_AT_ONCE = 1 << 16
"""How many parameters an optimizer updates at a time, so that θ, ∇θ and its state pass through the cache once."""

SMALLEST_FACTOR = 2.0**-100
"""A smaller factor might not be a normal number in float32; it is applied in several parts."""


def all_finite(array: Array) -> bool:
    """Tell whether no element is infinite or NaN.

    The sum of squares tells at the speed of memory, unless it overflows. BLAS's threads would spin, and gain nothing.
    """
    if array.size <= BLAS_ONE_THREAD:
        squares = array.dot(array)
    else:
        with Deferred(), BlasAlone():
            squares = array.dot(array)
    return math.isfinite(squares) or bool(np.isfinite(array).all())


Parts = Sequence[tuple[slice, Callable[[Array, float], None]]]
"""Slices of θ, each with a function of its gradient and of a factor of that, which updates it."""


def _update_parts(parts: Parts, gradient: Array) -> None:
    for part, update in parts:
        update(gradient[part], 1.0)


class NumpyUpdate(ABC):
    """One optimizer's update; see `gpuback._backends.protocol.Update`.

    θ is updated part by part: by the thread that calls or, in a `NumpyPhases.step`, by several, each as soon as it has
    a part's gradient. The numbers are the same, as no parameter's update depends on another's. A part within one range
    reads its numbers as arrays without axes; a part across ranges has an array of its length for each number that they
    differ in. Ctrl-C waits until the whole update is made.

    Args:
        steps: how many updates were made before.
        ranges: see `gpuback._backends.protocol.Ops.bind_sgd`.
        theta, state: θ, and what is kept for each parameter; updated in place.

    Attributes:
        applied: whether the last call made an update.
    """

    _Numbers: type[Any]
    """A named tuple of the numbers in the formulas. The update reads them in θ's dtype."""

    _depends_on: ClassVar[dict[str, tuple[str, ...]]]
    """The numbers that may differ from range to range, and the attributes of a range that they depend on."""

    def __init__(self, steps: int, ranges: Sequence[ParameterRange] | None, theta: Array, *state: Array | None) -> None:
        self.steps = steps
        self.diverged_at: int | None = None
        self.applied = False
        self._arrays = [array for array in (theta, *state) if array is not None]
        self._invalid = False
        self._grouped = ranges is not None
        ranges = ranges or (ParameterRange(0, len(theta), 1.0, True),)
        self._spans = spans(ranges)
        self._all_trained = self._spans == [slice(0, len(theta))]
        self._groups = list(dict.fromkeys((part.multiplier, part.decays) for part in ranges))
        self._last_numbers: tuple[float, ...] | None = None
        self._number_values = np.zeros(len(self._groups) * len(self._Numbers._fields), theta.dtype)
        self._vector_parts: list[tuple[int, Array]] = []
        self._ranges, self._all_arrays = ranges, (theta, *state)
        self._scratch: dict[int, list[Array]] = {}
        self._scopes: dict[int, Callable[..., Any]] = {}
        self._bound: dict[tuple[int, int, int], Parts] = {}
        self._parts = self._bind_parts(slice(0, len(theta)), 0)
        self._request: dict[str, Any] = {}

    def _bind_parts(self, of: slice, worker: int) -> Parts:
        """Bind the updates of all that is trained in a slice of θ, with scratch of the worker's."""
        theta = self._all_arrays[0]
        assert theta is not None
        if worker not in self._scratch:
            self._scratch[worker] = [aligned_empty(min(PARAMETERS_AT_ONCE, len(theta)), theta.dtype) for _ in range(2)]
        parts = []
        for span in self._spans:
            end = min(span.stop, of.stop)
            for start in range(max(span.start, of.start), end, PARAMETERS_AT_ONCE):
                part = slice(start, min(start + PARAMETERS_AT_ONCE, end))
                views = [None if array is None else array[part] for array in self._all_arrays]
                within = [
                    ParameterRange(max(r.start, start) - start, min(r.end, part.stop) - start, r.multiplier, r.decays)
                    for r in self._ranges
                    if r.start < part.stop and r.end > start
                ]
                numbers, decay = self._numbers_of(within), Decay.of(within)
                buffers = (array[: part.stop - start] for array in self._scratch[worker])
                parts.append((part, self._bind(*views, *buffers, numbers, decay)))
        return parts

    def _numbers_of(self, ranges: Sequence[ParameterRange]) -> Any:
        """Return the numbers that the update of a part reads, which such ranges make up."""
        count = len(self._Numbers._fields)
        firsts = [count * self._groups.index((part.multiplier, part.decays)) for part in ranges]
        numbers = []
        for i, name in enumerate(self._Numbers._fields):
            if len({tuple(getattr(part, what) for what in self._depends_on.get(name, ())) for part in ranges}) == 1:
                # Ufuncs start sooner on views without axes than on NumPy's or Python's scalars.
                numbers.append(self._number_values[firsts[0] + i, ...])
                continue
            vector = aligned_empty(ranges[-1].end, self._number_values.dtype)
            for part, first in zip(ranges, firsts, strict=True):
                self._vector_parts.append((first + i, vector[part.start : part.end]))
            numbers.append(vector)
        return self._Numbers(*numbers)

    def __call__(
        self,
        gradient: Array,
        *,
        loss: float | None = None,
        clip_norm: float | None = None,
        stop_after_nonfinite: bool = False,
        launches: Callable[[], None] | None = None,
        **hyper_parameters: Any,
    ) -> None:
        self.applied = False
        if launches is not None:
            self._request = {
                "clip_norm": clip_norm,
                "stop_after_nonfinite": stop_after_nonfinite,
                **hyper_parameters,
            }
            launches()
            return
        trained = [gradient] if self._all_trained else [gradient[span] for span in self._spans]
        if loss is not None:
            if not (math.isfinite(loss) and all(map(all_finite, trained))):
                if self.diverged_at is None:
                    self.diverged_at = self.steps
                return
            if stop_after_nonfinite and self.diverged_at is not None:
                return
        factor = 1.0 if clip_norm is None else clip(trained, clip_norm)
        with Deferred():
            self._count_step(hyper_parameters)
            for part, update in self._parts:
                update(gradient[part], factor)
            self.end()

    def begin(self) -> bool:
        """Begin the step that was asked for with `launches`, whose loss and gradient are finite.

        Returns:
            Whether it is to be made. If so, `part` follows for each part of θ, from any thread, and then `end`.
        """
        request = self._request
        if request["stop_after_nonfinite"] and self.diverged_at is not None:
            return False
        self._count_step({k: v for k, v in request.items() if k not in ("clip_norm", "stop_after_nonfinite")})
        return True

    def part(self, gradient: Array, of: slice, worker: int) -> None:
        """Update a slice of θ; at a time, each worker has a number of its own."""
        key = of.start, of.stop, worker
        parts = self._bound.get(key)
        if parts is None:
            parts = self._bound[key] = self._bind_parts(of, worker)
            self._fill_vectors(self._last_numbers)
        if worker not in self._scopes:
            self._scopes[worker] = bind_scope(self.on_invalid)
        self._scopes[worker](_update_parts, parts, gradient)

    def end(self) -> None:
        """Finish an update."""
        if self._invalid:
            self._canonicalise_nan()

    def complete(self, gradient: Array, loss: float) -> None:
        """Make the step that was asked for with `launches` of a gradient that may not be finite, or that is clipped."""
        self(gradient, loss=loss, **self._request)

    def _count_step(self, hyper_parameters: dict[str, Any]) -> None:
        """Count one update more and compute its numbers."""
        self.steps += 1
        self.applied = True
        self._invalid = False
        now = self._numbers_of_groups if self._grouped else self._numbers_now
        numbers = now(**hyper_parameters)
        before = self._last_numbers
        if numbers != before:
            self._number_values[:] = self._last_numbers = numbers
            self._fill_vectors(numbers, before)

    def _fill_vectors(self, numbers: Any, before: Any = None) -> None:
        for i, part in self._vector_parts:
            if before is None or numbers[i] != before[i]:
                part.fill(numbers[i])

    def on_invalid(self, *what: Any) -> None:
        self._invalid = True

    def poll_diverged(self) -> int | None:
        return self.diverged_at

    def _canonicalise_nan(self) -> None:
        """Replace every NaN by the one that other backends store: ∞ − ∞ leaves the processor's own bits."""
        for array in self._arrays:
            for span in self._spans:
                part = array[span]
                part[np.isnan(part)] = np.nan

    def _numbers_of_groups(self, *, learning_rate: float, weight_decay: float, **others: Any) -> tuple[float, ...]:
        """Compute the numbers of all groups, one group after the other: η times its multiplier, λ or 0."""
        return tuple(
            number
            for multiplier, decays in self._groups
            for number in self._numbers_now(
                learning_rate=learning_rate * multiplier, weight_decay=weight_decay * decays, **others
            )
        )

    @abstractmethod
    def _numbers_now(self, **hyper_parameters: Any) -> tuple[float, ...]:
        """Compute this step's numbers in float64, in the order of `_Numbers`."""

    @abstractmethod
    def _bind(self, theta: Array, *state_scratch_numbers: Any) -> Callable[[Array, float], None]:
        """Bind the update of one part of θ.

        Args:
            theta: the part, (n,).
            state_scratch_numbers: the same part of each array of the optimizer's state; two arrays (n,) to write to;
                the numbers; where they decay.

        Returns:
            A function of the part's gradient g (n,), which is read only, and of a factor c: it updates by c g.
        """


class Decay(NamedTuple):
    """Where a part's parameters decay.

    Attributes:
        most: the index of one that decays no less than any other; 0 if none does.
        without: those that do not, beside others that do.
    """

    most: int
    without: Sequence[slice]

    @classmethod
    def of(cls, ranges: Sequence[ParameterRange]) -> Decay:
        """Find out from the ranges that make up the part."""
        decaying = [part for part in ranges if part.decays]
        if not decaying:
            return cls(0, ())
        most = max(decaying, key=lambda part: part.multiplier)
        return cls(most.start, [slice(part.start, part.end) for part in ranges if not part.decays])

    def bind_read(self, numbers: Array) -> Callable[[], float]:
        """Bind a function that returns the number of the parameter that decays most."""
        return partial(numbers.item, self.most) if numbers.ndim else numbers.item


def bind_decay(theta: Array, weight_decay: Array, term: Array, without: Sequence[slice]) -> Callable[[], object]:
    """Bind term = λθ, and −0 where a parameter does not decay: then adding it changes no bit."""
    multiply = bind(np.multiply, theta, weight_decay, out=term)
    if not without:
        return multiply
    undecayed = [term[part] for part in without]

    def multiply_some() -> None:
        multiply()
        for part in undecayed:
            part.fill(-0.0)

    return multiply_some


def clip(gradient: Sequence[Array], clip_norm: float) -> float:
    """Return the factor that brings the gradient, given in parts, down to a norm of clip_norm.

    Where float32 cannot hold that factor, the gradient is scaled by a part of it here.
    """

    def prescale() -> None:
        for part in gradient:
            part *= SMALLEST_FACTOR

    length = norm(*gradient)
    unscaled = 1.0
    if math.isinf(length):
        prescale()
        unscaled /= SMALLEST_FACTOR
        length = norm(*gradient)
    factor = min(unscaled, clip_norm / (length + 1e-6))
    while 0 < factor < SMALLEST_FACTOR:
        prescale()
        factor /= SMALLEST_FACTOR
    return factor


class SGDNumbers(NamedTuple):
    """η, μ, whether Nesterov's form is used (0 or 1), and λ."""

    learning_rate: Any
    momentum: Any
    nesterov: Any
    weight_decay: Any


class SGDUpdate(NumpyUpdate):
    """θ ← θ − η d with g = c ∇θ + λθ and v ← μv + g.

    The direction d is g without momentum, v with it, g + μv with Nesterov's. The hyper-parameters are learning_rate η,
    momentum μ, nesterov and weight_decay λ. Without weight decay nothing is added to c ∇θ, not even 0.
    """

    _Numbers = SGDNumbers
    _depends_on: ClassVar = {"learning_rate": ("multiplier",), "weight_decay": ("decays",)}

    def __init__(
        self,
        theta: Array,
        velocity: Array | None,
        steps: int,
        ranges: Sequence[ParameterRange] | None = None,
    ) -> None:
        super().__init__(steps, ranges, theta, velocity)

    def _numbers_now(  # type: ignore[override]
        self, *, learning_rate: float, momentum: float, nesterov: bool, weight_decay: float
    ) -> tuple[float, ...]:
        return learning_rate, momentum, nesterov, weight_decay

    def _bind(
        self, theta: Array, v: Array | None, step: Array, term: Array, n: SGDNumbers, decay: Decay
    ) -> Callable[[Array, float], None]:
        learning_rate, momentum, nesterov, weight_decay = n
        most_decay = decay.bind_read(weight_decay)
        multiply_theta = bind_decay(theta, weight_decay, term, decay.without)

        def update(g: Array, factor: float) -> None:
            if factor != 1.0:
                g = np.multiply(g, factor, out=step)
            if most_decay():
                multiply_theta()
                g = np.add(g, term, out=step)
            if v is not None:
                np.multiply(v, momentum, out=v)
                np.add(v, g, out=v)
                if nesterov.item():
                    np.multiply(v, momentum, out=term)
                    g = np.add(g, term, out=step)
                else:
                    g = v
            np.multiply(g, learning_rate, out=step)
            np.subtract(theta, step, out=theta)

        return update


class AdamNumbers(NamedTuple):
    """The numbers in Adam's formulas, with cᵢ = 1 − βᵢᵗ."""

    rate: Any
    """η √c₂ / c₁."""

    gain_1: Any
    """1 − β₁."""

    beta_2: Any

    gain_2: Any
    """1 − β₂."""

    eps: Any
    """ε √c₂."""

    weight_decay: Any
    """λ, to be added to the gradient as λθ; 0 for AdamW."""

    shrink: Any
    """1 − ηλ, by which AdamW multiplies θ; 1 for Adam."""


class AdamUpdate(NumpyUpdate):
    """θ ← θ − (η√c₂/c₁) (m / (√v + ε√c₂)) with m ← m + (1 − β₁)(g − m), v ← β₂v + (1 − β₂)g², g = c ∇θ, cᵢ = 1 − βᵢᵗ.

    The hyper-parameters are learning_rate η, betas, eps ε, weight_decay λ and decoupled. Weight decay adds λθ to g or,
    decoupled (AdamW), first multiplies θ by 1 − ηλ. βᵗ is computed by multiplication, which IEEE 754 fixes to the bit;
    a library's pow may vary.
    """

    _Numbers = AdamNumbers
    _depends_on: ClassVar = {"rate": ("multiplier",), "weight_decay": ("decays",), "shrink": ("multiplier", "decays")}

    def __init__(
        self,
        theta: Array,
        first_moment: Array,
        second_moment: Array,
        steps: int,
        ranges: Sequence[ParameterRange] | None = None,
    ) -> None:
        super().__init__(steps, ranges, theta, first_moment, second_moment)
        self.beta_powers: tuple[float, float] | None = None
        self._powers_of = steps

    def _numbers_now(  # type: ignore[override]
        self,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
    ) -> tuple[float, ...]:
        if self._powers_of != self.steps:  # once a step, however many groups there are
            first, second = self.beta_powers or beta_powers(betas, self.steps - 1)
            self.beta_powers, self._powers_of = (first * betas[0], second * betas[1]), self.steps
        assert self.beta_powers is not None
        first, second = self.beta_powers
        root = math.sqrt(1.0 - second)
        rate = learning_rate * root / (1.0 - first)
        decay, shrink = (0.0, 1.0 - learning_rate * weight_decay) if decoupled else (weight_decay, 1.0)
        return rate, 1.0 - betas[0], betas[1], 1.0 - betas[1], eps * root, decay, shrink

    def _bind(
        self, theta: Array, m: Array, v: Array, step: Array, term: Array, n: AdamNumbers, decay: Decay
    ) -> Callable[[Array, float], None]:
        difference, square = term, step  # the same memory: one array serves after the other
        operations = (
            bind(np.multiply, difference, n.gain_1, out=difference),
            bind(np.add, m, difference, out=m),  # m + (1 − β₁)(g − m)
            bind(np.multiply, v, n.beta_2, out=v),
            bind(np.multiply, square, n.gain_2, out=square),
            bind(np.add, v, square, out=v),  # β₂ v + (1 − β₂) g²
            bind(np.sqrt, v, out=step),
            bind(np.add, step, n.eps, out=step),
            bind(np.divide, m, step, out=step),
            bind(np.multiply, step, n.rate, out=step),
            bind(np.subtract, theta, step, out=theta),  # θ − rate m / (√v + eps)
        )
        shrink, least_shrink, most_decay = n.shrink, decay.bind_read(n.shrink), decay.bind_read(n.weight_decay)
        multiply_theta = bind_decay(theta, n.weight_decay, term, decay.without)

        def update(g: Array, factor: float) -> None:
            if factor != 1.0:
                g = np.multiply(g, factor, out=step)
            if least_shrink() != 1.0:
                np.multiply(theta, shrink, out=theta)
            if most_decay():
                multiply_theta()
                g = np.add(g, term, out=step)
            np.subtract(g, m, out=difference)
            np.multiply(g, g, out=square)
            for operation in operations:
                operation()

        return update


NEGLIGIBLE_POWER = 2.0**-60
"""1 − βᵗ is 1 from here on, whatever βᵗ is."""

EXACT_STEPS = 2 * 10**7
"""So many multiplications take a fifth of a second."""


def beta_powers(betas: tuple[float, float], steps: int) -> tuple[float, float]:
    """Return (β₁ᵗ, β₂ᵗ) for t = steps, as t multiplications of steps one by one have left them.

    Once a power is negligible, later ones are as good: any may be returned. Beyond `EXACT_STEPS` it is pow's, which
    concerns β > 1 − 3 · 10⁻⁶ only: smaller ones have negligible powers by then.
    """
    return _power(betas[0], steps), _power(betas[1], steps)


def _power(beta: float, steps: int) -> float:
    power, left = 1.0, min(steps, EXACT_STEPS)
    with np.errstate(all="ignore"):
        while left and power > NEGLIGIBLE_POWER:
            factors = np.full(min(left, PARAMETERS_AT_ONCE), beta)
            factors[0] *= power
            power = float(np.multiply.accumulate(factors)[-1])
            left -= len(factors)
    return beta**steps if power > NEGLIGIBLE_POWER and steps > EXACT_STEPS else power


class NumpyLossScale:
    """A dynamic loss scale; see `gpuback._backends.protocol.LossScale`."""

    def __init__(self, initial: float, growth_interval: int, dtype: np.dtype[Any]) -> None:
        self.state = initial, 0, 0
        self._growth_interval, self._type = growth_interval, dtype.type
        self._weights = np.empty(0, dtype)

    @property
    def state(self) -> tuple[float, int, int]:
        return self._scale, self._good_steps, self._skipped

    @state.setter
    def state(self, value: tuple[float, int, int]) -> None:
        self._scale, self._good_steps, self._skipped = value

    def scale_weights(self, weight: Array | None, batch_size: int) -> Array:
        if len(self._weights) < batch_size:
            self._weights = np.empty(batch_size, self._weights.dtype)
        weights = self._weights[:batch_size]
        if weight is None:
            weights.fill(self._scale)
            return weights
        return np.multiply(weight, self._type(self._scale), out=weights)

    def unscale(self, gradient: Array, loss: float) -> float:
        np.multiply(gradient, self._type(1.0 / self._scale), out=gradient)
        return float(self._type(loss) * self._type(1.0 / self._scale))

    def update(self, update: NumpyUpdate) -> None:
        if not update.applied:
            self.state = max(self._scale * 0.5, SMALLEST_SCALE), 0, self._skipped + 1
        elif self._good_steps + 1 < self._growth_interval:
            self._good_steps += 1
        else:
            self.state = min(self._scale * 2.0, LARGEST_SCALE), 0, self._skipped
