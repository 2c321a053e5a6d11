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
from gpuback._core.integers import round_up
from gpuback._core.typing import Array

WIDENED_AT_ONCE = 1 << 15
"""Numbers that are widened to float64 at a time, and stay in cache."""

MOST_SCALED = 1000
"""Rows are scaled by 2⁻¹⁰⁰⁰ … 2¹⁰⁰⁰: both are float64s, and squares of what is larger or smaller yet still are."""


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
        for rows, wide in _in_float64(x, x.shape[1]):
            np.copyto(wide, x[rows])
            np.matmul(wide[:, None, :], wide[:, :, None], out=squares[rows, None, None])
        return _root(squares, more)

    def bind_clip(self, da: Array, norms: Array, factor: float, workspace: NumpyWorkspace) -> Callable[[float], None]:
        round_da = workspace.bind_round(da)

        def clip(max_norm: float) -> None:
            by = np.where(norms > max_norm, max_norm / norms, 1.0)
            by[~np.isfinite(norms)] = np.nan
            by *= factor
            np.multiply(da, by.astype(da.dtype)[:, None], out=da)
            if round_da is not None:
                round_da()

        return clip

    def bind_outer(self, da: Array, workspace: NumpyWorkspace) -> Callable[[Array, Array, Array], None]:
        def outer(h_prev: Array, dW: Array, db: Array) -> None:
            np.multiply(da[:, :, None], h_prev[:, None, :], out=dW)
            np.copyto(db, da)

        return outer


LANES, LANE_CHAIN = 32, 64
"""In a fixed order a row's squares are added as a warp of the GPU does: 32 sums of every 32nd, 64 terms at a time."""


class ReproducibleNumpyPerSample(NumpyPerSample):
    """The same with sums in the order of the CUDA kernels, to the bit."""

    def _row_norms(self, x: Array, more: float) -> Array:
        squares = np.empty(len(x))
        width = round_up(x.shape[1], LANES)
        for rows, wide in _in_float64(x, width):
            wide[:, x.shape[1] :] = 0.0
            np.copyto(wide[:, : x.shape[1]], x[rows])
            np.multiply(wide, wide, out=wide)  # exact, so that whether it is contracted to an fma makes no difference
            total = np.zeros((len(wide), LANES))
            for first in range(0, width, LANES * LANE_CHAIN):
                chain = np.zeros_like(total)
                for start in range(first, min(width, first + LANES * LANE_CHAIN), LANES):
                    chain += wide[:, start : start + LANES]
                total += chain
            while total.shape[1] > 1:
                half = total.shape[1] // 2
                total = total[:, :half] + total[:, half:]
            squares[rows] = total[:, 0]
        return _root(squares, more)

    def bind_outer(self, da: Array, workspace: NumpyWorkspace) -> Callable[[Array, Array, Array], None]:
        """Return the plain function, followed by one that leaves one zero, +0, and one NaN, as products do."""
        plain = super().bind_outer(da, workspace)

        def outer(h_prev: Array, dW: Array, db: Array) -> None:
            plain(h_prev, dW, db)
            for out in (dW, db):
                np.add(out, 0.0, out=out)
                np.copyto(out, CANONICAL_NAN, where=np.isnan(out))

        return outer


def _in_float64(x: Array, width: int) -> Iterator[tuple[slice, Array]]:
    """Yield a few rows of x at a time, and a float64 buffer of as many rows and `width` columns."""
    at_once = max(1, WIDENED_AT_ONCE // width)
    wide = np.empty((min(at_once, len(x)), width))
    for start in range(0, len(x), at_once):
        rows = slice(start, min(start + at_once, len(x)))
        yield rows, wide[: rows.stop - start]


def _root(squares: Array, more: float) -> Array:
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
