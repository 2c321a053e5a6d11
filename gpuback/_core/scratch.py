"""Memory that functions over whole arrays write to between their operands and their results; functions bound to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuback._core.typing import Array

CACHE_LINE = 64
"""Products and vector operations that write whole cache lines were seen 2 to 4% faster than those that do not."""


def aligned_empty(shape: int | tuple[int, ...], dtype: np.dtype[Any], order: Literal["C", "F"] = "C") -> NDArray[Any]:
    """`np.empty`, at the start of a cache line."""
    n_bytes = math.prod((shape,) if isinstance(shape, int) else shape) * dtype.itemsize
    raw = np.empty(n_bytes + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + n_bytes].view(dtype).reshape(shape, order=order)


class Room:
    """Memory for the scratch of several arrays that are worked on one after the other; made when first used.

    Args:
        size: numbers in the largest of them.
    """

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self._size, self._dtype = size, dtype

    @cached_property
    def one(self) -> Array:
        return aligned_empty(self._size, self._dtype)

    @cached_property
    def other(self) -> Array:
        return aligned_empty(self._size, self._dtype)

    @cached_property
    def mask(self) -> Array:
        return aligned_empty(self._size, np.dtype(bool))

    @cached_property
    def zeros(self) -> Array:
        zeros = aligned_empty(self._size, self._dtype)
        zeros.fill(0)
        zeros.setflags(write=False)
        return zeros


class Scratch:
    """What functions of an array need beside it, each of its shape and memory order.

    Attributes:
        one, other: to write to.
        mask: of booleans, to write to.
        zeros: read only. NumPy's maximum of two arrays is two to three times as fast as that of an array and a number.
    """

    def __init__(self, like: Array, room: Room | None = None) -> None:
        self._shape, self._size = like.shape, like.size
        self._order: Literal["C", "F"] = "C" if like.flags.c_contiguous else "F"
        self._room = room or Room(like.size, like.dtype)

    @cached_property
    def one(self) -> Array:
        return self._shaped(self._room.one)

    @cached_property
    def other(self) -> Array:
        return self._shaped(self._room.other)

    @cached_property
    def mask(self) -> Array:
        return self._shaped(self._room.mask)

    @cached_property
    def zeros(self) -> Array:
        return self._shaped(self._room.zeros)

    def _shaped(self, flat: Array) -> Array:
        return flat[: self._size].reshape(self._shape, order=self._order)


def bind(ufunc: np.ufunc, *operands: Array, out: Array) -> Callable[[], object]:
    """ufunc(*operands, out=out), as a function of nothing.

    With small arrays a ufunc takes more time to start than to compute: bound ahead, with `out` by position, it starts
    in 0.22 instead of 0.30 µs. (NumPy's maximum and minimum want `out` by name.)
    """
    return partial(ufunc, *operands, out)
