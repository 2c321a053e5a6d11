"""The dynamic loss scale on NumPy: what a step's loss and gradients are multiplied by on their way through the network.

S is a power of two, in the samples' weights on the way in, and out of loss and gradient before the update: both are
exact. A step without an update, since something overflowed, halves S; so many steps with one, in a row, double it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuback._backends.numpy.updates import NumpyUpdate
from gpuback._core.typing import Array

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 2.0**24
"""Where S stays: what overflows at the smallest is not finite itself, what vanishes at the largest is as good as 0."""


class NumpyLossScale:
    """See `gpuback._backends.protocol.LossScale`."""

    def __init__(self, initial: float, growth_interval: int, dtype: np.dtype[Any]) -> None:
        self.state = initial, 0, 0
        self._growth_interval, self._type = growth_interval, dtype.type
        self._weights = np.empty(0, dtype)

    @property
    def state(self) -> tuple[float, int, int]:
        """S, how many steps in a row have made an update since it last changed, and how many in all have made none."""
        return self._scale, self._good_steps, self._skipped

    @state.setter
    def state(self, value: tuple[float, int, int]) -> None:
        self._scale, self._good_steps, self._skipped = value

    def scale_weights(self, weight: Array | None, batch_size: int) -> Array:
        """S w_b, or S without weights; good until the next call."""
        if len(self._weights) < batch_size:
            self._weights = np.empty(batch_size, self._weights.dtype)
        weights = self._weights[:batch_size]
        if weight is None:
            weights.fill(self._scale)
            return weights
        return np.multiply(weight, self._type(self._scale), out=weights)

    def unscale(self, gradient: Array, loss: float) -> float:
        """Takes S out of the gradient, in place; the loss without it."""
        np.multiply(gradient, self._type(1.0 / self._scale), out=gradient)
        return float(self._type(loss) * self._type(1.0 / self._scale))

    def update(self, update: NumpyUpdate) -> None:
        """Draws the conclusion, after an update or none."""
        if not update.applied:
            self.state = max(self._scale * 0.5, SMALLEST_SCALE), 0, self._skipped + 1
        elif self._good_steps + 1 < self._growth_interval:
            self._good_steps += 1
        else:
            self.state = min(self._scale * 2.0, LARGEST_SCALE), 0, self._skipped
