"""The optimizers' updates on CUDA: two launches, and a few numbers that stay on the device; and the loss scale.

`begin_step` decides whether to make the step and counts it, `sgd` or `adam` makes it: elementwise/optimizers.cu. Where
not all of θ is treated alike, `sgd_in_ranges` or `adam_in_ranges` does.
The host waits for neither: it reads the numbers when it is asked. Hyper-parameters lie on the device as well, written
when they change, so that the two launches are the same for every step, and can be repeated by a CUDA graph.

Sums whose bits are NumPy's are two more launches: `largest` and `exact_sum` of kernels/exact/exact_sums.cu.
"""

from __future__ import annotations

import struct
from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from gpuback._backends.cuda import row_plans
from gpuback._backends.cuda.arguments import ints
from gpuback._backends.cuda.arrays import CudaArrays
from gpuback._backends.cuda.formats import Accum, accum_of
from gpuback._backends.numpy.updates import beta_powers
from gpuback._core.parameters import ParameterRange, spans
from gpuback._core.typing import Array
from gpuback._cuda.launch import Launch, Launcher, Slot

STATE = ("steps", "diverged_at", "apply", "prescales", "factor", "beta_power_1", "beta_power_2")
"""The numbers on the device, in the order of kernels/common/optimizer_formulas.cuh; float64."""

HYPER_PARAMETERS = (
    *("learning_rate", "weight_decay", "momentum", "nesterov"),
    *("beta_1", "beta_2", "eps", "decoupled", "clip_norm", "stop_after_nonfinite"),
)
"""The numbers that the host writes there, in this order; float64. Those that an optimizer
lacks are 0, and so is no clipping."""

NEVER = -1.0

FROZEN = -1.0
"""The multiplier of a range that is left as it is."""


def bind_exact_sum(xp: Any, launcher: Launcher, length: int) -> Callable[[Array, Array, float], None]:
    """Bind out = Σ values / divisor, a function of `values` (length,), float64, `out` (), float32, and the divisor.

    The sum is `exact_sums.exact_sum`'s, the quotient is rounded to float64 and then to float32; of all NaN
    it is the one with bits 0x7fc00000. Nothing waits for it.
    """
    find_largest, add = _bind_exact(xp, launcher, "double", length, result=None, squares=False)

    def write_sum(values: Array, out: Array, divisor: float) -> None:
        find_largest(values)
        add(values, divisor, out)

    return write_sum


def bind_exact_norm(
    xp: Any, launcher: Launcher, length: int, accum: Accum, result: Array, parts: Array | None = None
) -> Callable[..., None]:
    """Bind a function of a vector that writes its `gpuback._core.exact_sums.norm` to `result` (), float64.

    parts: those that count, (n, 2) int64, as a first index and the one after the last; None: the whole vector.
    """
    find_largest, add = _bind_exact(xp, launcher, accum, length, result=result, squares=True, parts=parts)

    def write_norm(vector: Array) -> None:
        find_largest(vector)
        add(vector, 1.0, None)

    return write_norm


def _bind_exact(
    xp: Any,
    launcher: Launcher,
    accum: Accum,
    length: int,
    *,
    result: Array | None,
    squares: bool,
    parts: Array | None = None,
) -> tuple[Launch, Launch]:
    """Bind the two launches: functions of the vector, and of the vector, a divisor and where the quotient goes."""
    first, second = (row_plans.vector_plan(entry, length, accum) for entry in ("largest", "exact_sum"))
    greatest, numbers = xp.empty((), np.float64), _numbers_that_count(length, parts)
    workspace = {"partials": xp.empty(3 * second.grid, np.float64), "arrivals": xp.zeros(1, np.uint32)}
    find_largest = launcher.bind(first, x=Slot(), **numbers, result=greatest, **workspace)
    add = launcher.bind(
        second,
        x=Slot(),
        **numbers,
        greatest=greatest,
        **ints(squares=squares),
        divisor=Slot(np.float64),
        result=result,
        quotient=Slot(),
        **workspace,
    )
    return find_largest, add


def _numbers_that_count(length: int, parts: Array | None) -> dict[str, Any]:
    """Describe the numbers of a vector that a sum is over, as `each_number` in kernels/common/block_sum.cuh reads."""
    return {"n": np.int64(length), "spans": parts, **ints(n_spans=0 if parts is None else len(parts))}


class CudaUpdate(ABC):
    """The base class of updates; see `gpuback._backends.protocol.Update`.

    Args:
        xp, launcher: the array module, and what runs kernels.
        theta: θ, updated in place.
        steps: how many were made before.
        ranges: see `gpuback._backends.protocol.Ops.bind_sgd`.
        exact_norm: the gradient's norm, which clipping needs, has the bits of `gpuback._core.exact_sums.norm`.

    Attributes:
        hyper: the hyper-parameters on the device, as `write_hyper` left them.
        state: what stays there from step to step; see STATE.
        kernel_id: the kernels' number for this kind of optimizer, in kernels/network/reduce_and_step.cuh.
        moments: what it keeps for each parameter: a first and a second array, or None.
        uniform: whether all of θ is updated in the same way.
    """

    kernel_id: int
    moments: tuple[Array | None, Array | None]

    _step: Callable[[Array], None]

    def __init__(
        self,
        xp: Any,
        launcher: Launcher,
        theta: Array,
        steps: int,
        ranges: Sequence[ParameterRange] | None,
        exact_norm: bool,
    ) -> None:
        self._xp, self._launcher, self._theta, self._ranges = xp, launcher, theta, ranges
        self.uniform = ranges is None
        self._accum = accum_of(theta.dtype)
        self.state = xp.zeros(len(STATE), np.float64)
        for name, value in (("steps", steps), ("diverged_at", NEVER), ("beta_power_1", 1.0), ("beta_power_2", 1.0)):
            self._put(name, value)
        self._poll_state: Callable[[], Any] = launcher.async_reader(self.state)
        self.hyper = xp.zeros(len(HYPER_PARAMETERS), np.float64)
        self._written: bytes | None = None
        self._overwritten = False  # by a graph of the user's, which writes whenever it runs
        self._write = launcher.bind(
            row_plans.vector_plan("set_hyper_parameters", 1, self._accum),
            **{name: Slot(np.float64) for name in HYPER_PARAMETERS},
            hyper=self.hyper,
        )
        trained = [[part.start, part.stop] for part in spans(ranges or ())]
        parts = xp.asarray(trained, np.int64) if ranges and trained != [[0, theta.size]] else None
        norm = xp.empty((), np.float64) if exact_norm else None
        self._write_norm = None if norm is None else bind_exact_norm(xp, launcher, theta.size, self._accum, norm, parts)
        plan = row_plans.vector_plan("begin_step", theta.size, self._accum)
        self._begin = launcher.bind(  # a function of the gradient and the loss
            plan,
            gradient=Slot(),
            **_numbers_that_count(theta.size, parts),
            loss=Slot(),
            norm=norm,
            hyper=self.hyper,
            state=self.state,
            partials=xp.empty(3 * plan.grid, np.float64),
            arrivals=xp.zeros(1, np.uint32),
        )

    def _bind(self, entry: Literal["sgd", "adam"], **moments: Array | None) -> Launch:
        """Bind the update as a function of the gradient."""
        n, by_range = self._theta.size, {}
        kernel: row_plans.VectorEntry = entry
        if self._ranges is not None:
            kernel = "sgd_in_ranges" if entry == "sgd" else "adam_in_ranges"
            by_range = _range_table(self._xp, self._ranges, n)
        return self._launcher.bind(
            row_plans.vector_plan(kernel, n, self._accum),
            theta=self._theta,
            **moments,
            gradient=Slot(),
            n=np.int64(n),
            hyper=self.hyper,
            state=self.state,
            **by_range,
        )

    def _put(self, name: str, value: float) -> None:
        self.state[STATE.index(name)] = value

    def _get(self, name: str) -> float:
        return float(self.state[STATE.index(name)])

    @property
    def steps(self) -> int:
        return int(self._get("steps"))

    @property
    def diverged_at(self) -> int | None:
        return _count(self._get("diverged_at"))

    @diverged_at.setter
    def diverged_at(self, value: int | None) -> None:
        self._put("diverged_at", NEVER if value is None else value)

    def on_invalid(self, *what: Any) -> None:
        return  # the kernels see NaN themselves

    def poll_diverged(self) -> int | None:
        state = self._poll_state()
        return None if state is None else _count(state[STATE.index("diverged_at")])

    def __call__(
        self,
        gradient: Array,
        *,
        loss: Array | None = None,
        clip_norm: float | None = None,
        stop_after_nonfinite: bool = False,
        launches: Callable[[], None] | None = None,
        **hyper_parameters: Any,
    ) -> None:
        """See `gpuback._backends.protocol.Update`.

        Args:
            launches: what to run in place of the update's own launches, which it contains.
        """
        self.write_hyper(clip_norm=clip_norm, stop_after_nonfinite=stop_after_nonfinite, **hyper_parameters)
        if launches is not None:
            launches()
            return
        if clip_norm is not None and self._write_norm is not None:
            self._write_norm(gradient)
        self.launch(gradient, loss)

    def launch(self, gradient: Array, loss: Array | None) -> None:
        """Make one update by the hyper-parameters on the device. It only launches."""
        self._begin(gradient, loss)
        self.launch_step(gradient)

    def launch_step(self, gradient: Array) -> None:
        """Make the second half of an update, as `state` has decided."""
        self._step(gradient)

    def write_hyper(
        self,
        *,
        learning_rate: float,
        weight_decay: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.0, 0.0),
        eps: float = 0.0,
        decoupled: bool = False,
        clip_norm: float | None = None,
        stop_after_nonfinite: bool = False,
    ) -> None:
        """Bring the hyper-parameters on the device up to date: one launch if something has changed, else none."""
        first = learning_rate, weight_decay, momentum, nesterov
        numbers = *first, *betas, eps, decoupled, clip_norm or 0.0, stop_after_nonfinite
        packed = _PACKED(*numbers)
        if packed != self._written:
            self._write(*numbers)
            self._overwritten |= self._launcher.capturing()
            self._written = None if self._overwritten else packed


def _range_table(xp: Any, ranges: Sequence[ParameterRange], length: int) -> dict[str, Array]:
    """Put on the device where ranges end, frozen ones too, and the factors of their learning rate and weight decay."""
    rows: list[tuple[int, float, float]] = []
    at = 0
    for part in ranges:
        if at < part.start:
            rows.append((part.start, FROZEN, 0.0))
        rows.append((part.end, part.multiplier, float(part.decays)))
        at = part.end
    if at < length:
        rows.append((length, FROZEN, 0.0))
    return {
        "ends": xp.asarray([end for end, *_ in rows], np.int64),
        "factors": xp.asarray([factors for _, *factors in rows], np.float64),
    }


_PACKED = struct.Struct(f"{len(HYPER_PARAMETERS)}d").pack
"""Numbers by their bits: a NaN is the same as itself."""


class SGDUpdate(CudaUpdate):
    """See `gpuback._backends.numpy.updates.SGDUpdate`."""

    kernel_id = 2

    def __init__(
        self,
        xp: Any,
        launcher: Launcher,
        theta: Array,
        velocity: Array | None,
        steps: int,
        ranges: Sequence[ParameterRange] | None = None,
        *,
        exact_norm: bool = False,
    ) -> None:
        super().__init__(xp, launcher, theta, steps, ranges, exact_norm)
        self.moments = velocity, None
        self._step = self._bind("sgd", velocity=velocity)


class AdamUpdate(CudaUpdate):
    """See `gpuback._backends.numpy.updates.AdamUpdate`."""

    kernel_id = 3

    def __init__(
        self,
        xp: Any,
        launcher: Launcher,
        theta: Array,
        first_moment: Array,
        second_moment: Array,
        steps: int,
        ranges: Sequence[ParameterRange] | None = None,
        *,
        exact_norm: bool = False,
    ) -> None:
        super().__init__(xp, launcher, theta, steps, ranges, exact_norm)
        self._steps_before = steps
        self.moments = first_moment, second_moment
        self._step = self._bind("adam", first_moment=first_moment, second_moment=second_moment)

    @property
    def beta_powers(self) -> tuple[float, float] | None:
        return None if self._steps_before else (self._get("beta_power_1"), self._get("beta_power_2"))

    @beta_powers.setter
    def beta_powers(self, value: tuple[float, float] | None) -> None:
        if value is not None:
            self._put("beta_power_1", value[0])
            self._put("beta_power_2", value[1])
            self._steps_before = 0

    def write_hyper(self, *, betas: tuple[float, float], **others: Any) -> None:  # type: ignore[override]
        super().write_hyper(betas=betas, **others)
        if self._steps_before:  # the powers of βs that steps made elsewhere have left
            self.beta_powers = beta_powers(betas, self._steps_before)


def _count(value: float) -> int | None:
    return None if value == NEVER else int(value)


class CudaLossScale:
    """A dynamic loss scale; see `protocol.LossScale`. Three launches a step; the host waits only to read `state`.

    Args:
        arrays: the device's, and what runs kernels.
        initial, growth_interval: S at first, and after how many steps in a row it is doubled.
        n_parameters, dtype: of the gradient.
    """

    def __init__(
        self, arrays: CudaArrays, initial: float, growth_interval: int, n_parameters: int, dtype: np.dtype[Any]
    ) -> None:
        self._arrays, self._dtype, self._accum = arrays, dtype, accum_of(dtype)
        # In the order of `Scaling` in kernels/elementwise/loss_scaling.cu
        self._numbers = arrays.xp.zeros(3, np.float64)
        self.state = initial, 0, 0
        self._weights = arrays.empty(0, dtype)
        bind, plan = arrays.launcher.bind, row_plans.vector_plan
        self._unscale = bind(
            plan("unscale", n_parameters, self._accum),
            gradient=Slot(),
            n=np.int64(n_parameters),
            loss=Slot(),
            unscaled_loss=Slot(),
            scaling=self._numbers,
        )
        self._update_scale = bind(
            plan("update_scale", 1, self._accum),
            state=Slot(),
            growth_interval=np.float64(growth_interval),
            scaling=self._numbers,
        )

    @property
    def state(self) -> tuple[float, int, int]:
        scale, good_steps, skipped = self._arrays.to_numpy(self._numbers).tolist()
        return scale, int(good_steps), int(skipped)

    @state.setter
    def state(self, value: tuple[float, int, int]) -> None:
        for i, number in enumerate(value):
            self._numbers[i] = number

    def scale_weights(self, weight: Array | None, batch_size: int) -> Array:
        if len(self._weights) < batch_size:
            self._weights = self._arrays.empty(batch_size, self._dtype)
            plan = row_plans.vector_plan("scale_weights", batch_size, self._accum)
            self._scale_weights = self._arrays.launcher.bind(
                plan, weight_b=Slot(), n_batch=Slot(np.int64), scaling=self._numbers, out_b=self._weights
            )
        self._scale_weights(weight, batch_size)
        return self._weights[:batch_size]

    def unscale(self, gradient: Array, loss: Array) -> Array:
        unscaled = self._arrays.empty((), self._dtype)
        self._unscale(gradient, loss, unscaled)
        return unscaled

    def update(self, update: CudaUpdate) -> None:
        self._update_scale(update.state)
