"""One layer's backward pass on arrays that are given at each call, of which shapes and layouts are known ahead."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from gpuback._core.activations import Activation
from gpuback._core.chained_sums import plan_sum_columns
from gpuback._core.precision import Precision, round_to_tf32
from gpuback._core.scratch import Scratch, aligned_empty
from gpuback._core.typing import Array

FINISHED_AT_ONCE = 1 << 17
"""Numbers of da_prev to which g' is applied at a time: they stay in cache."""


LARGE_PRODUCT = 1 << 16
"""`ndarray.dot` first fills its result with zeros. From about this many numbers on `np.matmul`, which does not, is
quicker, up to an eighth for few terms; it starts later, and is slow on strided or very thin factors."""

THIN = 4
"""Factors up to this wide are thin."""


class LayerBackward:
    """The function that `NumpyOps.bind_layer_backward` returns; `gpuback.fused_backward` says what it computes.

    On small layers a step of Python takes as long as a product: what depends on shapes and layouts alone is made here,
    and operands that need no conversion go to the products as they are.
    """

    def __init__(self, da: Array, n_in: int, activation_prev: Activation, precision: Precision) -> None:
        rows, n_out = da.shape
        self._precision = precision
        self._as_they_are = not (precision.sixteen_bit or precision.tf32) and _is_walkable(da)
        self._gradient_shape = n_out, n_in
        self._views_of, self._sum_da = plan_sum_columns(_carrier(da, precision))
        self._times_slope: Callable[[Array, Array], None] | None = None
        if activation_prev.name != "identity":
            self._times_slope = _bind_slope(rows, n_in, activation_prev, precision.accumulator)

    def __call__(
        self,
        da: Array,
        h_prev: Array,
        W: Array,
        source: Array | None,
        dW: Array,
        db: Array,
        da_prev: Array | None,
        accumulate: bool,
    ) -> None:
        product_da, product_h = da, h_prev
        if not self._as_they_are:
            da, h_prev, W = (_carrier(array, self._precision) for array in (da, h_prev, W))
            source = None if source is None else _carrier(source, self._precision)
            product_da, product_h, W = map(self._rounded, (da, h_prev, W))
        # BLAS writes aligned float32 or float64 only; whatever else was given gets the result copied in.
        if accumulate or not (dW.flags.aligned and db.flags.aligned):
            dW_sum, db_sum = self._gradient, np.empty(db.shape, db.dtype)
            _multiply(product_da.T, product_h, dW_sum)
            self._sum_da(*self._views_of(da), db_sum)
            np.add(dW if accumulate else 0, dW_sum, out=dW)
            np.add(db if accumulate else 0, db_sum, out=db)
        else:
            _multiply(product_da.T, product_h, dW)
            self._sum_da(*self._views_of(da), db)
        if da_prev is None:
            return
        dh = da_prev
        if not (self._as_they_are and da_prev.flags.aligned):
            dh = np.empty(da_prev.shape, self._precision.accumulator)
        _multiply(product_da, W, dh)
        if self._times_slope is not None:
            self._times_slope(dh, source)
        if dh is not da_prev:
            np.copyto(da_prev, dh, casting="unsafe")

    @cached_property
    def _gradient(self) -> Array:
        return aligned_empty(self._gradient_shape, self._precision.accumulator)

    def _rounded(self, carrier: Array) -> Array:
        """Return an operand as products read it."""
        return round_to_tf32(carrier, np.empty_like(carrier)) if self._precision.tf32 else carrier


def _bind_slope(
    rows: int, width: int, activation: Activation, dtype: np.dtype[Any]
) -> Callable[[Array, Array | None], None]:
    """Return a function (dh, source): dh ← dh ⊙ g', both (rows, width), in parts that stay in cache."""
    backward: Callable[..., None] = activation.backward
    at_once = max(1, FINISHED_AT_ONCE // width)
    first, last = (Scratch(np.empty((n, width), dtype)) for n in (min(rows, at_once), rows % at_once))
    if rows <= at_once:
        return lambda dh, source: backward(dh, source, first)

    def in_parts(dh: Array, source: Array) -> None:
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            backward(dh[part], source[part], first if start + at_once <= rows else last)

    return in_parts


def _multiply(a: Array, b: Array, out: Array) -> None:
    """out = a b, of float32 or float64."""
    if out.size < LARGE_PRODUCT or min(*a.shape, *b.shape) <= THIN or not (_is_walkable(a) and _is_walkable(b)):
        a.dot(b, out)
    else:
        np.matmul(a, b, out)


def _is_walkable(array: Array) -> bool:
    return bool(array.flags.c_contiguous or array.flags.f_contiguous)


def _carrier(array: Array, precision: Precision) -> Array:
    """Widen 16-bit values to float32, which holds them exactly, and copy an array whose strides sums cannot walk."""
    array = array.astype(precision.accumulator, copy=False)
    return array if _is_walkable(array) else np.ascontiguousarray(array)
