"""The buffers that the layers of one block of rows share on NumPy, and how they are rounded to the operands' format."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from gpuback._core.precision import Precision, round_to_tf32
from gpuback._core.scratch import Scratch, ScratchPool, aligned_empty
from gpuback._core.typing import Array

CLASS_FIRST = 32
"""Output layers up to this wide keep each class contiguous, so that sums over the classes are vector operations."""


class NumpyWorkspace:
    """The buffers that the layers of one block of rows share; each is made when something is first bound to it."""

    def __init__(self, rows: int, sizes: tuple[int, ...], precision: Precision) -> None:
        self.rows = rows
        self._precision = precision
        self._sizes = sizes
        self._widest = rows * max(sizes)
        self._pool = ScratchPool(self._widest, precision.accumulator)

    @cached_property
    def _rounded(self) -> Array:
        return np.empty(self._widest, self._precision.operand)

    @cached_property
    def _products(self) -> list[Array]:
        return [aligned_empty(self._widest, self._precision.accumulator) for _ in range(2)]

    @cached_property
    def _deltas(self) -> list[Array]:
        return [aligned_empty(self.rows * max(self._sizes[1:]), self._precision.accumulator) for _ in range(2)]

    @cached_property
    def gradient(self) -> Array:
        """A buffer as large as the largest layer's dW."""
        return aligned_empty(max(n_in * n_out for n_in, n_out in pairwise(self._sizes)), self._precision.accumulator)

    def hidden(self, width: int) -> Array:
        """Make a buffer of its own for a hidden layer, (rows, width)."""
        return aligned_empty((self.rows, width), self._precision.accumulator)

    def output(self, width: int) -> Array:
        """Make the output layer's buffer, for pre-activations and then ŷ or da_L."""
        order: Literal["C", "F"] = "F" if width <= CLASS_FIRST else "C"
        return aligned_empty((self.rows, width), self._precision.accumulator, order)

    def output_delta(self, output: Array) -> Array:
        """Return the buffer for da_L: the output layer's own."""
        return output

    def delta(self, layer: int, width: int) -> Array:
        """Return the buffer for a layer's da; hidden layers take two in turn."""
        if layer == 0:
            return self.hidden(width)
        return self._deltas[layer % 2][: self.rows * width].reshape(self.rows, width)

    def scratch_like(self, array: Array) -> Scratch:
        """Return scratch of an array's shape and memory order."""
        return Scratch(array, self._pool)

    def c_ordered(self, array: Array) -> Array:
        """Return where to write a product for `array`: itself, or scratch if it is Fortran-ordered, which is slow."""
        return array if array.flags.c_contiguous else self._pool.a[: array.size].reshape(array.shape)

    def bind_round(self, array: Array) -> Callable[[], object] | None:
        """Return a function that rounds `array` to the operands' dtype in place; None for 32 and 64 bits."""
        if not self._precision.sixteen_bit:
            return None
        flat = array.T.reshape(-1) if not array.flags.c_contiguous else array.reshape(-1)
        rounded = self._rounded[: flat.size]

        def round_in_place() -> None:
            np.copyto(rounded, flat, casting="unsafe")
            np.copyto(flat, rounded)

        return round_in_place

    def bind_product_operand(self, which: int, shape: tuple[int, ...]) -> Callable[[Array], Array] | None:
        """Return a function from an array to its copy rounded to TF32, which products read; None without TF32."""
        if not self._precision.tf32:
            return None
        size = shape[0] * shape[1]
        copy, nan = self._products[which][:size].reshape(shape), self._pool.mask[:size].reshape(shape)

        def rounded(array: Array) -> Array:
            np.copyto(copy, array)
            return round_to_tf32(copy, copy, nan)

        return rounded
