"""The scale of float16 gradients that start from a given ∂loss/∂ŷ, on NumPy."""

from __future__ import annotations

import math

import numpy as np

from gpuback._core.elementary import store
from gpuback._core.precision import Precision
from gpuback._core.typing import Array

LARGEST_EXPONENT = 126
"""Both 2¹²⁶ and its inverse are normal numbers of float32."""


class NumpyGradientScale:
    """A power of two; see `gpuback._backends.protocol.GradientScale`."""

    def __init__(self, rows: int, precision: Precision) -> None:
        self._weights = np.empty(rows, precision.accumulator)
        self._inverse = self._weights.dtype.type(1)

    def fit(self, dy: Array) -> Array:
        largest = float(max(dy.max(), -dy.min()))
        exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
        exponent = max(-LARGEST_EXPONENT, min(exponent, LARGEST_EXPONENT))
        self._weights.fill(2.0**-exponent)
        self._inverse = self._weights.dtype.type(2.0**exponent)
        return self._weights

    def unscale(self, values: Array, out: Array, accumulate: bool) -> None:
        if not accumulate:
            np.multiply(values, self._inverse, out=out)
            return
        np.multiply(values, self._inverse, out=values)
        np.add(out, values, out=values)
        store(values, out)
