"""Exact products on NumPy as `products.py` writes them down: slices are integers, one operation a line, no threads.

What `gpuback._backends.exact.numpy_products` and the CUDA kernels compute is held to this, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpuback._backends.exact import products
from gpuback._backends.exact.layers import Multiply
from gpuback._backends.exact.numpy_ops import ReproducibleNumpyOps
from gpuback._backends.exact.products import BLOCK, Scales, SliceBuffers, Sums
from gpuback._backends.numpy.workspace import NumpyWorkspace
from gpuback._core.activations import Activation
from gpuback._core.elementary import SCRATCH, store
from gpuback._core.precision import Precision
from gpuback._core.reproducible_forms import functions_of
from gpuback._core.scratch import aligned_empty
from gpuback._core.typing import Array

ELEMENTS_AT_ONCE = 1 << 14
"""Elements that elementwise operations process at a time."""


class ReferenceWorkspace(NumpyWorkspace):
    """Every array C-ordered."""

    def __init__(self, rows: int, sizes: tuple[int, ...], precision: Precision, multiply: Multiply) -> None:
        super().__init__(rows, sizes, precision)
        self.slices = SliceBuffers(NumpyExactBackend(max(sizes), precision, multiply), rows, sizes)

    def output(self, width: int) -> Array:
        return self.hidden(width)


class ReferenceOps(ReproducibleNumpyOps):
    """Layer by layer over the whole batch, by `products.py`'s functions."""

    _products = products

    def workspace(self, rows: int, sizes: tuple[int, ...], precision: Precision) -> Any:
        return ReferenceWorkspace(rows, sizes, precision, self._multiply)


class NumpyExactBackend:
    """`gpuback._backends.exact.products.ExactBackend` on NumPy.

    Args:
        widest: the largest number of columns.
        precision: of the network.
        multiply: (left, right, out) → None.
    """

    def __init__(self, widest: int, precision: Precision, multiply: Multiply) -> None:
        self._multiply = multiply
        self._precision = precision
        size = max(ELEMENTS_AT_ONCE, widest)
        self._double = [np.empty(size) for _ in range(1 + SCRATCH)]
        self._slope = np.empty(size)
        self._single = np.empty(size, np.float32)
        self._rounded = np.empty(size if precision.sixteen_bit else 0, precision.operand)

    def rows_at_once(self, widest: int) -> int:
        return min(BLOCK, max(1024, (1 << 18) // widest))

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return aligned_empty(shape, dtype)

    def largest_of_rows(self, x: Array, largest: Array) -> None:
        np.maximum.reduce(x, axis=1, out=largest)
        np.maximum(largest, -np.minimum.reduce(x, axis=1), out=largest)

    def largest_of_columns(self, x: Array, largest: Array) -> None:
        np.maximum.reduce(x, axis=0, out=largest)
        np.maximum(largest, -np.minimum.reduce(x, axis=0), out=largest)

    def split_rows(self, x: Array, largest: Array, bits: int, first: Array, second: Array) -> None:
        factors = _power_of_two(largest, bits, inverse=True)[:, None]
        for rows in _row_chunks(*x.shape):
            _split(x[rows], factors[rows], bits, first[rows], second[rows])

    def split_columns(self, x: Array, largest: Array, bits: int, first: Array, second: Array) -> None:
        factors = _power_of_two(largest, bits, inverse=True)
        for rows in _row_chunks(*x.shape):
            _split(x[rows], factors, bits, first[rows], second[rows])

    def multiply(self, left: Array, right: Array, out: Array) -> None:
        self._multiply(left, right, out)

    def accumulate(self, addend: Array, total: Array) -> None:
        np.add(total, addend, out=total)

    def add(self, sums: Sums, totals: Sums, *, first: bool) -> None:
        for part, total in zip(sums, totals, strict=True):
            if first:
                np.copyto(total, part, casting="unsafe")
            else:
                np.add(total, part, out=total, dtype=np.int64, casting="unsafe")

    def finish_forward(
        self, sums: Sums, scales: Scales, b: Array, a: Array | None, h: Array, g: Activation | None
    ) -> None:
        bias, pre_activation = b.astype(np.float64), h if a is None else a
        functions = None if g is None else functions_of(g)
        for rows, values in self._combined(sums, scales):
            np.add(values, bias, out=values)
            pre = self._round_into(values, pre_activation[rows], sixteen_bit=g is not None and g.derivative_from == "a")
            if functions is not None:
                np.copyto(values, pre)
                functions[0](values, values, self._scratch(values))
                self._round_into(values, h[rows], sixteen_bit=True)

    def finish_delta(
        self, sums: Sums, scales: Scales, source: Array | None, g: Activation | None, factor: float, da_prev: Array
    ) -> None:
        functions = None if g is None else functions_of(g)
        for rows, values in self._combined(sums, scales):
            if factor != 1.0:
                np.multiply(values, factor, out=values)
            delta = self._round_into(values, da_prev[rows], sixteen_bit=False)
            if functions is not None and source is not None:
                slope = self._slope[: values.size].reshape(values.shape)
                np.copyto(slope, source[rows])
                functions[1](slope, slope, self._scratch(values))
                np.multiply(slope, delta, out=values)
                self._round_into(values, delta, sixteen_bit=True)

    def finish_gradient(self, sums: Sums, scales: Scales, factor: float, out: Array, accumulate: bool) -> None:
        for rows, values in self._combined(sums, scales):
            if factor != 1.0:
                np.multiply(values, factor, out=values)
            if accumulate:
                addend = self._single[: values.size].reshape(values.shape)
                np.add(self._round_into(values, addend, sixteen_bit=False), out[rows], out=values)
                store(values, out[rows])
            else:
                self._round_into(values, out[rows], sixteen_bit=False)

    def _combined(self, sums: Sums, scales: Scales) -> Iterator[tuple[slice, Array]]:
        """Compute C = σ_i τ_j 2⁻²ˢ (P + 2⁻ˢ Q) in float64, a few rows at a time."""
        height, width = sums.p.shape
        sigma = _power_of_two(scales.rows, -scales.bits)[:, None]
        tau = _power_of_two(scales.columns, -scales.bits)
        for rows in _row_chunks(height, width):
            values = self._double[0][: (rows.stop - rows.start) * width].reshape(-1, width)
            np.multiply(sums.q[rows], 2.0**-scales.bits, out=values)
            np.add(values, sums.p[rows], out=values)
            np.multiply(values, tau, out=values)
            np.multiply(values, sigma[rows], out=values)
            yield rows, values

    def _scratch(self, like: Array) -> tuple[Array, ...]:
        return tuple(flat[: like.size].reshape(like.shape) for flat in self._double[1:])

    def _round_into(self, values: Array, out: Array, *, sixteen_bit: bool) -> Array:
        """Round `values` to float32, add +0 and, if `sixteen_bit`, round to a 16-bit operands' dtype; return `out`."""
        store(values, out)
        np.add(out, 0.0, out=out)
        if sixteen_bit and self._precision.sixteen_bit:
            rounded = self._rounded[: out.size].reshape(out.shape)
            np.copyto(rounded, out, casting="unsafe")
            np.copyto(out, rounded)
        return out


def _row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Cut rows into slices of up to `ELEMENTS_AT_ONCE` elements."""
    at_once = max(1, ELEMENTS_AT_ONCE // width)
    return (slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once))


def _power_of_two(largest: Array, exponent: int, *, inverse: bool = False) -> Array:
    """Return 2^exponent σ or 2^exponent / σ, σ the power of two just above `largest`; NaN where that is not finite."""
    powers = np.frexp(largest)[1]
    result: Array = np.ldexp(1.0, (-powers if inverse else powers) + exponent)
    result[~np.isfinite(largest)] = math.nan
    return result


def _split(x: Array, factor: Array, bits: int, first: Array, second: Array) -> None:
    np.copyto(second, x)
    np.multiply(second, factor, out=second)
    np.rint(second, out=first)
    np.subtract(second, first, out=second)
    np.multiply(second, 2.0**bits, out=second)
    np.rint(second, out=second)
