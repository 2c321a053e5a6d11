"""The buffers that the layers of one batch size share on CUDA, and how their rows are padded."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from gpuback._backends.cuda import layer_plans
from gpuback._backends.cuda.arrays import CudaArrays, pitch_for
from gpuback._core.precision import Precision
from gpuback._core.typing import Array


class CudaBuffers:
    """Buffers for the layers' activations and their gradients."""

    def __init__(self, arrays: CudaArrays, rows: int, sizes: tuple[int, ...], precision: Precision) -> None:
        self._arrays = arrays
        self.rows = rows
        self.precision = precision
        pitch = pitch_for(max(sizes), precision.operand)
        self._deltas = [arrays.empty(rows * pitch, precision.operand) for _ in range(2)]

    def hidden(self, width: int) -> Array:
        """Make a buffer for a hidden layer, (rows, width)."""
        return self._arrays.padded(self.rows, width, self.precision.operand)

    def output(self, width: int) -> Array:
        """Make a buffer for the output layer's pre-activations, (rows, width)."""
        return self._arrays.empty((self.rows, width), self.precision.accumulator)

    def output_delta(self, output: Array) -> Array:
        """Make a buffer for da_L."""
        return self.hidden(output.shape[1])

    def delta(self, layer: int, width: int) -> Array:
        """Return the buffer for a layer's da. Layers take two in turn: da_k is done with when da_{k−1} is.

        At the network's input it is ∂loss/∂x, of the sums' dtype.
        """
        if layer == 0:
            return self._arrays.empty((self.rows, width), self.precision.accumulator)
        pitch = pitch_for(width, self.precision.operand)
        return self._deltas[layer % 2][: self.rows * pitch].reshape(self.rows, pitch)[:, :width]


class CudaWorkspace(CudaBuffers):
    """Buffers, and workspace for sums over blocks."""

    def __init__(self, arrays: CudaArrays, rows: int, sizes: tuple[int, ...], precision: Precision) -> None:
        layers = [
            layer_plans.layer_plan(rows, n_out, n_in, precision, arrays.launcher.limits, need_da_prev=needed)
            for n_in, n_out in pairwise(sizes)
            for needed in (True, False)  # without it a layer's plan may be cut into more and smaller tiles
        ]
        super().__init__(arrays, rows, sizes, precision)
        self.partials = arrays.empty(max(plan.partials for plan in layers), precision.accumulator)
        self.counters = arrays.xp.zeros(max(plan.counters for plan in layers), np.uint32)
        self.next_tile = arrays.xp.zeros(1, np.uint32)
