"""Arrays on the host: how they are made, converted, looked at and gathered, and the scope that computations run in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._backends.inputs import as_host_array
from gpuback._backends.numpy.prefetch import NumpyPrefetch
from gpuback._backends.numpy.scope import bind_scope
from gpuback._backends.numpy.updates import all_finite
from gpuback._core.exact_sums import norm
from gpuback._core.scratch import aligned_empty
from gpuback._core.typing import Array, ArrayLike

SMALL = 1024
"""An array of fewer numbers is small."""

SIGNED, UNSIGNED = np.dtype(np.intp), np.dtype(np.uintp)


class NumpyArrays:
    """The operations of a backend that compute no network; see `gpuback._backends.protocol.Ops`."""

    def scope(self, on_invalid: Callable[..., object] | None = None) -> AbstractContextManager[object]:
        if on_invalid is None:
            return np.errstate(all="ignore")
        return np.errstate(all="ignore", invalid="call", call=on_invalid)

    def bind_scope(self, on_invalid: Callable[..., object] | None = None) -> Callable[..., Any]:
        return bind_scope(on_invalid)

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Make an array; a large one starts at a cache line. To find one takes longer than a small one gains."""
        size = shape if isinstance(shape, int) else math.prod(shape)
        return np.empty(shape, dtype) if size < SMALL else aligned_empty(shape, dtype)

    def asarray(self, value: ArrayLike, dtype: np.dtype[Any] | None, what: str) -> Array:
        return as_host_array(value, dtype, what)

    def to_array(self, value: ArrayLike, what: str) -> Array:
        return as_host_array(value, None, what)

    def to_numpy(self, array: Array) -> NDArray[Any]:
        return np.asarray(array)

    def to_floats(self, values: Sequence[Array | float]) -> list[float]:
        return [float(value) for value in values]

    def scalar(self, value: Array | float, dtype: np.dtype[Any]) -> Array:
        return np.array(value, dtype)

    def copy_for_display(self, array: Array, dtype: np.dtype[Any], factor: float = 1.0) -> Array:
        copy = np.array(array, dtype, order="C")
        if factor != 1.0:
            copy *= factor
        return copy

    def indices(self, order: NDArray[np.intp]) -> Array:
        return order

    def take_rows(self, array: Array, indices: Array, out: Array) -> None:
        """out = array[indices]. With mode "raise", NumPy would buffer the output."""
        np.take(array, indices, axis=0, out=out, mode="clip")

    def prefetch(self, slots: int) -> NumpyPrefetch:
        return NumpyPrefetch(slots)

    def may_overlap(self, array: Array, other: Array) -> bool:
        return np.may_share_memory(array, other)

    def any_outside(self, array: Array, highest: float) -> bool:
        if array.dtype is SIGNED:  # as an unsigned number a negative one is huge: one maximum finds both kinds
            unsigned = array.view(UNSIGNED)
            return bool(unsigned.item(unsigned.argmax()) > highest)  # argmax is quicker to start than maximum.reduce
        return bool(array.min() < 0 or array.max() > highest)

    def all_finite(self, array: Array) -> bool:
        return all_finite(array)

    def norm(self, array: Array) -> float:
        return norm(array)
