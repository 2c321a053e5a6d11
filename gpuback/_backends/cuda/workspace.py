"""The buffers that the layers of one batch size share on CUDA, and how their rows are padded."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuback._backends.cuda import plans
from gpuback._core.precision import Precision
from gpuback._core.typing import Array

if TYPE_CHECKING:
    from gpuback._backends.cuda.ops import CudaOps


class CudaBuffers:
    """Room for the layers' activations and their gradients."""

    def __init__(self, ops: CudaOps, rows: int, sizes: tuple[int, ...], precision: Precision) -> None:
        self._ops = ops
        self.rows = rows
        self.precision = precision
        pitch = pitch_for(max(sizes), precision.operand)
        self._deltas = [ops.empty(rows * pitch, precision.operand) for _ in range(2)]

    def hidden(self, width: int) -> Array:
        """A buffer of its own for a hidden layer, (rows, width)."""
        return self._ops.padded(self.rows, width, self.precision.operand)

    def output(self, width: int) -> Array:
        """The output layer's pre-activations, (rows, width)."""
        return self._ops.empty((self.rows, width), self.precision.accumulator)

    def output_delta(self, output: Array) -> Array:
        """The buffer for da_L."""
        return self.hidden(output.shape[1])

    def delta(self, layer: int, width: int) -> Array:
        """The buffer for a layer's da. Layers take two in turn: da_k is done with when da_{k−1} is.

        At the network's input it is ∂loss/∂x, of the sums' dtype.
        """
        if layer == 0:
            return self._ops.empty((self.rows, width), self.precision.accumulator)
        pitch = pitch_for(width, self.precision.operand)
        return self._deltas[layer % 2][: self.rows * pitch].reshape(self.rows, pitch)[:, :width]


class CudaWorkspace(CudaBuffers):
    """Those, and what the fused kernels need to add up over blocks."""

    def __init__(self, ops: CudaOps, rows: int, sizes: tuple[int, ...], precision: Precision) -> None:
        layers = [
            plans.layer_plan(rows, n_out, n_in, precision, ops.launcher.limits, need_da_prev=needed)
            for n_in, n_out in pairwise(sizes)
            for needed in (True, False)  # without it a layer's plan may be cut into more and smaller tiles
        ]
        super().__init__(ops, rows, sizes, precision)
        self.partials = ops.empty(max(plan.partials for plan in layers), precision.accumulator)
        self.counters = ops.xp.zeros(max(plan.counters for plan in layers), np.uint32)
        self.tickets = ops.xp.zeros(1, np.uint32)


def pitch_of(matrix: Array) -> np.int32:
    """Elements from one row to the next."""
    return np.int32(matrix.strides[0] // matrix.itemsize if len(matrix) > 1 else matrix.shape[1])


def pitch_for(columns: int, dtype: np.dtype[Any]) -> int:
    """The smallest number of elements, no fewer than `columns`, that fills whole 16 bytes."""
    width = 16 // dtype.itemsize
    return -(-columns // width) * width
