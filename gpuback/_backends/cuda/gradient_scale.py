"""The scale of float16 gradients that start from a given ∂loss/∂ŷ, on CUDA. It stays on the device."""

from __future__ import annotations

import numpy as np

from gpuback._backends.cuda import row_plans
from gpuback._backends.cuda.arrays import CudaArrays
from gpuback._backends.cuda.formats import accum_of
from gpuback._core.precision import Precision
from gpuback._core.typing import Array
from gpuback._cuda.launch import Launch, Slot


class CudaGradientScale:
    """A power of two; see `gpuback._backends.protocol.GradientScale`. Two launches to choose it."""

    def __init__(self, arrays: CudaArrays, rows: int, width: int, precision: Precision) -> None:
        xp, launcher = arrays.xp, arrays.launcher
        accum, size = accum_of(precision.accumulator), rows * width
        self._launcher, self._accum = launcher, accum
        self._unscale: dict[int, Launch] = {}  # by size: θ's and x's
        largest, self._scale = xp.empty((), np.float64), xp.empty((), np.float64)
        self._weights = arrays.empty(rows, precision.accumulator)
        plan = row_plans.vector_plan("largest", size, accum)
        self._find_largest = launcher.bind(
            plan,
            x=Slot(),
            n=np.int64(size),
            spans=None,
            n_spans=np.int32(0),
            result=largest,
            partials=xp.empty(3 * plan.grid, np.float64),
            arrivals=xp.zeros(1, np.uint32),
        )
        self._choose = launcher.bind(
            row_plans.vector_plan("choose_scale", rows, accum),
            largest=largest,
            n_batch=np.int64(rows),
            scale=self._scale,
            weight_b=self._weights,
        )

    def fit(self, dy: Array) -> Array:
        self._find_largest(dy)
        self._choose()
        return self._weights

    def unscale(self, values: Array, out: Array, accumulate: bool) -> None:
        launch = self._unscale.get(values.size)
        if launch is None:
            launch = self._unscale[values.size] = self._launcher.bind(
                row_plans.vector_plan("add_unscaled", values.size, self._accum),
                values=Slot(),
                n=np.int64(values.size),
                scale=self._scale,
                accumulate=Slot(np.int32),
                out=Slot(),
            )
        launch(values, accumulate, out)
