"""The dynamic loss scale on CUDA: three launches a step, and three numbers that stay on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpuback._backends.cuda import plans
from gpuback._backends.cuda.updates import CudaUpdate
from gpuback._core.typing import Array
from gpuback._cuda.launch import Slot

if TYPE_CHECKING:
    from gpuback._backends.cuda.ops import CudaOps


class CudaLossScale:
    """See `protocol.LossScale` and `NumpyLossScale`. The host waits for nothing but to read `state`.

    Args:
        ops: whose arrays and kernels these are.
        initial, growth_interval: S at first, and after how many steps in a row it is doubled.
        n_parameters, dtype: of the gradient.
    """

    def __init__(
        self, ops: CudaOps, initial: float, growth_interval: int, n_parameters: int, dtype: np.dtype[Any]
    ) -> None:
        self._ops, self._dtype, self._real = ops, dtype, plans.real_of(dtype)
        self._numbers = ops.xp.zeros(3, np.float64)  # in the order of `Scaling` in kernels/optimizers.cu
        self.state = initial, 0, 0
        self._weights = ops.empty(0, dtype)
        bind, plan = ops.launcher.bind, plans.vector_plan
        self._unscale = bind(
            plan("unscale", n_parameters, self._real),
            [Slot(), np.int64(n_parameters), Slot(), Slot(), self._numbers],
        )
        interval = np.float64(growth_interval)
        self._settle = bind(plan("settle_scale", 1, self._real), [Slot(), interval, self._numbers])

    @property
    def state(self) -> tuple[float, int, int]:
        scale, good_steps, skipped = self._ops.to_numpy(self._numbers).tolist()
        return scale, int(good_steps), int(skipped)

    @state.setter
    def state(self, value: tuple[float, int, int]) -> None:
        for i, number in enumerate(value):
            self._numbers[i] = number

    def scale_weights(self, weight: Array | None, batch_size: int) -> Array:
        if len(self._weights) < batch_size:
            self._weights = self._ops.empty(batch_size, self._dtype)
            plan = plans.vector_plan("scale_weights", batch_size, self._real)
            self._scale_weights = self._ops.launcher.bind(plan, [Slot(), Slot(np.int64), self._numbers, self._weights])
        self._scale_weights(weight, batch_size)
        return self._weights[:batch_size]

    def unscale(self, gradient: Array, loss: Array) -> Array:
        unscaled = self._ops.empty((), self._dtype)
        self._unscale(gradient, loss, unscaled)
        return unscaled

    def update(self, update: CudaUpdate) -> None:
        self._settle(update.state)
