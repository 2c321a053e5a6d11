"""Per-sample gradients on NumPy: their norms, clipping, and the gradients written out.

A sample's ∇W_k is the outer product of its da_k and its h_{k−1}, ∇b_k is its da_k, so that

    ‖∇W_k‖² + ‖∇b_k‖² = ‖da_k‖² (‖h_{k−1}‖² + 1)

without either being formed. Squares are added in float64. There those of float32 neither overflow nor underflow, nor do
the products of two such sums; float64's are taken of rows scaled by a power of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gpuback._backends.numpy.workspace import NumpyWorkspace
from gpuback._core.elementary import CANONICAL_NAN
from gpuback._core.typing import Array

WIDENED_AT_ONCE = 1 << 15
"""Numbers that are widened to float64 at a time, and stay in cache."""

MOST_SCALED = 1000
"""Rows are scaled by 2⁻¹⁰⁰⁰ … 2¹⁰⁰⁰: both are float64s, and squares of what is larger or smaller yet still are."""

LIFTS = {4: 2.0**100, 8: 2.0**1000}
"""By the size of a number: a factor for what scales da, where that would be subnormal, and then a divisor of da."""


class NumpyPerSample:
    """The operations of a backend on each sample by itself."""

    def bind_add_norms(
        self, da: Array, norms: Array, workspace: NumpyWorkspace
    ) -> Callable[[Array, bool, Array | None], None]:
        combine: Callable[[Array, Array], Array] = _root_of_squares
        row_norms = self._row_norms
        if da.dtype == np.float64:
            row_norms, combine = _scaled_row_norms, np.hypot

        def add_norms(h_prev: Array, first: bool, out: Array | None) -> None:
            layer = row_norms(da, 0.0)
            layer *= row_norms(h_prev, 1.0)
            if first:
                np.copyto(norms, layer)
            else:
                np.copyto(norms, combine(norms, layer))
            if out is not None:
                np.copyto(out, norms, casting="same_kind")
                np.copyto(out, CANONICAL_NAN, where=np.isnan(out))

        return add_norms

    def _row_norms(self, x: Array, more: float) -> Array:
        """Return √(Σ_j x_bj² + more), (rows,) float64, of x in float32."""
        squares = np.empty(len(x))
        for rows, wide in in_float64(x, x.shape[1]):
            np.copyto(wide, x[rows])
            np.matmul(wide[:, None, :], wide[:, :, None], out=squares[rows, None, None])
        return root_of_sum(squares, more)

    def bind_clip(self, da: Array, norms: Array, factor: float, workspace: NumpyWorkspace) -> Callable[[float], None]:
        round_da, smallest, lift = workspace.bind_round(da), np.finfo(da.dtype).tiny, LIFTS[da.dtype.itemsize]

        def clip(max_norm: float) -> None:
            by = np.where(norms > max_norm, max_norm / norms, 1.0)
            by[~np.isfinite(norms)] = np.nan
            by *= factor
            subnormal = by < smallest  # which keeps few digits, or none
            by[subnormal] = max_norm * lift / norms[subnormal] * factor
            np.multiply(da, by.astype(da.dtype)[:, None], out=da)
            if subnormal.any():
                da[subnormal] /= lift
            if round_da is not None:
                round_da()

        return clip

    def bind_outer(self, da: Array, workspace: NumpyWorkspace) -> Callable[[Array, Array, Array], None]:
        def outer(h_prev: Array, dW: Array, db: Array) -> None:
            np.multiply(da[:, :, None], h_prev[:, None, :], out=dW)
            np.copyto(db, da)

        return outer


def in_float64(x: Array, width: int) -> Iterator[tuple[slice, Array]]:
    """Yield a few rows of x at a time, and a float64 buffer of as many rows and `width` columns."""
    at_once = max(1, WIDENED_AT_ONCE // width)
    wide = np.empty((min(at_once, len(x)), width))
    for start in range(0, len(x), at_once):
        rows = slice(start, min(start + at_once, len(x)))
        yield rows, wide[: rows.stop - start]


def root_of_sum(squares: Array, more: float) -> Array:
    """Return √(squares + more), in place."""
    squares += more
    return np.sqrt(squares, out=squares)


def _root_of_squares(a: Array, b: Array) -> Array:
    return np.sqrt(a * a + b * b)


def _scaled_row_norms(x: Array, more: float) -> Array:
    """Return √(Σ_j x_bj² + more) of x in float64, more 0 or 1, without overflow or underflow on the way."""
    largest = np.maximum(np.abs(x).max(axis=1), more)
    exponents = np.clip(np.frexp(largest)[1], -MOST_SCALED, MOST_SCALED)
    scaled = x * np.ldexp(1.0, -exponents)[:, None]
    squares = np.matmul(scaled[:, None, :], scaled[:, :, None])[:, 0, 0]
    root: Array = np.ldexp(np.sqrt(squares + np.ldexp(more, -2 * exponents)), exponents)
    return root
