"""A buffer that grows to the largest array that was ever put into it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuback._core.typing import Array


class GrowingBuffer:
    """Memory that holds one array after another.

    Args:
        make: from a number of bytes to an array of as many `uint8`, on any device.
    """

    def __init__(self, make: Callable[[int], Array]) -> None:
        self._make = make
        self._memory: Array = None
        self._view: Array = None

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return a C-contiguous array with any contents; it shares its memory with all those before it."""
        view = self._view
        if view is None or view.shape != shape or view.dtype != dtype:
            n_bytes = math.prod(shape) * dtype.itemsize
            if self._memory is None or self._memory.nbytes < n_bytes:
                self._memory = self._make(n_bytes)
            view = self._view = self._memory[:n_bytes].view(dtype).reshape(shape)
        return view
