"""The optimizers' updates on CUDA: two launches, and a few numbers that stay on the device.

`begin_step` decides whether to make the step and counts it, `sgd` or `adam` makes it; kernels/optimizers.cu says how.
The host waits for neither: it reads the numbers when it is asked.

Sums whose bits are NumPy's are two more launches: `largest` and `exact_sum` of kernels/exact_sums.cu.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from gpuback._typing import Array
from gpuback.cuda import plans
from gpuback.cuda.launch import Argument, Launch, Launcher, Slot
from gpuback.ops.numpy_updates import beta_powers

STATE = ("steps", "diverged_at", "apply", "prescales", "factor", "beta_power_1", "beta_power_2")
"""The numbers on the device, in the order of kernels/optimizers.cu; float64."""

NEVER = -1.0


def bind_exact_sum(xp: Any, launcher: Launcher, length: int) -> Callable[[Array, Array, float], None]:
    """A function of `values` (length,), float64, `out` (), float32, and a divisor: out = Σ values / divisor.

    The sum is `gpuback.ops.exact_sums.exact_sum`'s, the quotient is rounded to float64 and then to float32; of all NaN
    it is the one with bits 0x7fc00000. Nothing waits for it.
    """
    find_largest, add = _bind_exact(xp, launcher, "double", length, result=None, squares=False)

    def write_sum(values: Array, out: Array, divisor: float) -> None:
        find_largest(values)
        add(values, divisor, out)

    return write_sum


def bind_exact_norm(xp: Any, launcher: Launcher, length: int, real: plans.Real, result: Array) -> Callable[..., None]:
    """A function of a vector that writes `gpuback.ops.exact_sums.norm` of it to `result` (), float64."""
    find_largest, add = _bind_exact(xp, launcher, real, length, result=result, squares=True)

    def write_norm(vector: Array) -> None:
        find_largest(vector)
        add(vector, 1.0, None)

    return write_norm


def _bind_exact(
    xp: Any, launcher: Launcher, real: plans.Real, length: int, *, result: Array | None, squares: bool
) -> tuple[Launch, Launch]:
    """The two launches, as functions of the vector, and of the vector, a divisor and where the quotient goes."""
    first, second = (plans.vector_plan(entry, length, real) for entry in ("largest", "exact_sum"))
    greatest, partials, arrivals = (
        xp.empty((), np.float64),
        xp.empty(3 * second.grid, np.float64),
        xp.zeros(1, np.uint32),
    )
    n = np.int64(length)
    find_largest = launcher.bind(first, [Slot(), n, greatest, partials, arrivals])
    options = [np.int32(squares), Slot(np.float64), result, Slot()]
    return find_largest, launcher.bind(second, [Slot(), n, greatest, *options, partials, arrivals])


class CudaUpdate(ABC):
    """What the updates share; see `gpuback.ops.Update`.

    Args:
        xp, launcher: the array module, and what runs kernels.
        theta: θ, updated in place.
        steps: how many were made before.
        exact_norm: the gradient's norm, which clipping needs, has the bits of `gpuback.ops.exact_sums.norm`.
    """

    _step: Callable[..., None]

    def __init__(self, xp: Any, launcher: Launcher, theta: Array, steps: int, exact_norm: bool) -> None:
        self._xp, self._launcher, self._theta = xp, launcher, theta
        self._real = plans.real_of(theta.dtype)
        self._state = xp.zeros(len(STATE), np.float64)
        for name, value in (("steps", steps), ("diverged_at", NEVER), ("beta_power_1", 1.0), ("beta_power_2", 1.0)):
            self._put(name, value)
        self._glance: Callable[[], Any] = launcher.watch(self._state)
        norm = xp.empty((), np.float64) if exact_norm else None
        self._write_norm = None if norm is None else bind_exact_norm(xp, launcher, theta.size, self._real, norm)
        plan = plans.vector_plan("begin_step", theta.size, self._real)
        self._begin = launcher.bind(
            plan,
            [
                *(Slot(), np.int64(theta.size), Slot(), Slot(np.float64)),  # gradient, its length, loss, clip_norm
                norm,
                *(Slot(np.float64), Slot(np.float64), Slot(np.int32)),  # betas, halt
                *(self._state, xp.empty(3 * plan.grid, np.float64), xp.zeros(1, np.uint32)),
            ],
        )

    def _bind(self, entry: Literal["sgd", "adam"], arguments: list[Argument]) -> Callable[..., None]:
        return self._launcher.bind(plans.vector_plan(entry, self._theta.size, self._real), [*arguments, self._state])

    def _put(self, name: str, value: float) -> None:
        self._state[STATE.index(name)] = value

    def _get(self, name: str) -> float:
        return float(self._state[STATE.index(name)])

    @property
    def steps(self) -> int:
        return int(self._get("steps"))

    @property
    def diverged_at(self) -> int | None:
        return _count(self._get("diverged_at"))

    @diverged_at.setter
    def diverged_at(self, value: int | None) -> None:
        self._put("diverged_at", NEVER if value is None else value)

    def note_invalid(self, *what: Any) -> None:
        return  # the kernels settle NaN themselves

    def glance(self) -> int | None:
        state = self._glance()
        return None if state is None else _count(state[STATE.index("diverged_at")])

    def __call__(
        self,
        gradient: Array,
        *,
        loss: Array | None = None,
        clip_norm: float | None = None,
        halt: bool = False,
        **hyper_parameters: Any,
    ) -> None:
        betas = self._prepared(hyper_parameters)
        if clip_norm is not None and self._write_norm is not None:
            self._write_norm(gradient)
        self._begin(gradient, loss, clip_norm or 0.0, *betas, halt)
        self._step(gradient, *self._ordered(**hyper_parameters))

    def _prepared(self, hyper_parameters: dict[str, Any]) -> tuple[float, float]:
        """(β₁, β₂), where there are any."""
        return 0.0, 0.0

    @abstractmethod
    def _ordered(self, **hyper_parameters: Any) -> tuple[Any, ...]:
        """The hyper-parameters as the kernel takes them."""


class SGDUpdate(CudaUpdate):
    """See `gpuback.ops.numpy_updates.SGDUpdate`."""

    def __init__(
        self,
        xp: Any,
        launcher: Launcher,
        theta: Array,
        velocity: Array | None,
        steps: int,
        *,
        exact_norm: bool = False,
    ) -> None:
        super().__init__(xp, launcher, theta, steps, exact_norm)
        options = [Slot(np.float64), Slot(np.float64), Slot(np.int32), Slot(np.float64)]
        self._step = self._bind("sgd", [theta, velocity, Slot(), np.int64(theta.size), *options])

    def _ordered(  # type: ignore[override]
        self, *, learning_rate: float, momentum: float, nesterov: bool, weight_decay: float
    ) -> tuple[Any, ...]:
        return learning_rate, momentum, nesterov, weight_decay


class AdamUpdate(CudaUpdate):
    """See `gpuback.ops.numpy_updates.AdamUpdate`."""

    def __init__(
        self,
        xp: Any,
        launcher: Launcher,
        theta: Array,
        first_moment: Array,
        second_moment: Array,
        steps: int,
        *,
        exact_norm: bool = False,
    ) -> None:
        super().__init__(xp, launcher, theta, steps, exact_norm)
        options = [*[Slot(np.float64)] * 5, Slot(np.int32)]
        self._steps_before = steps
        arguments = [theta, first_moment, second_moment, Slot(), np.int64(theta.size), *options]
        self._step = self._bind("adam", arguments)

    def _prepared(self, hyper_parameters: dict[str, Any]) -> tuple[float, float]:
        betas: tuple[float, float] = hyper_parameters["betas"]
        if self._steps_before:  # the powers of βs that steps made elsewhere have left
            first, second = beta_powers(betas, self._steps_before)
            self._put("beta_power_1", first)
            self._put("beta_power_2", second)
            self._steps_before = 0
        return betas

    def _ordered(  # type: ignore[override]
        self,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
    ) -> tuple[Any, ...]:
        return learning_rate, *betas, eps, weight_decay, decoupled


def _count(value: float) -> int | None:
    return None if value == NEVER else int(value)
