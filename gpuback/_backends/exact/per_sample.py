"""Per-sample gradients with `reproducible=True` on NumPy: sums in the order of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpuback._backends.exact.losses import LANES, sum_of_lanes
from gpuback._backends.numpy.per_sample import NumpyPerSample, in_float64, root_of_sum
from gpuback._backends.numpy.workspace import NumpyWorkspace
from gpuback._core.elementary import CANONICAL_NAN
from gpuback._core.integers import round_up
from gpuback._core.typing import Array

LANE_TERMS = 64
"""A row's squares are added as a warp of the GPU does: each of 32 lanes takes every 32nd, 64 terms at a time."""


class ReproducibleNumpyPerSample(NumpyPerSample):
    """The same with sums in the order of the CUDA kernels, to the bit."""

    def _row_norms(self, x: Array, more: float) -> Array:
        squares = np.empty(len(x))
        width = round_up(x.shape[1], LANES)
        for rows, wide in in_float64(x, width):
            wide[:, x.shape[1] :] = 0.0
            np.copyto(wide[:, : x.shape[1]], x[rows])
            np.multiply(wide, wide, out=wide)  # exact, so that whether it is contracted to an fma makes no difference
            total = np.zeros((len(wide), LANES))
            for first in range(0, width, LANES * LANE_TERMS):
                chain = np.zeros_like(total)
                for start in range(first, min(width, first + LANES * LANE_TERMS), LANES):
                    chain += wide[:, start : start + LANES]
                total += chain
            squares[rows] = sum_of_lanes(total)
        return root_of_sum(squares, more)

    def bind_outer(self, da: Array, workspace: NumpyWorkspace) -> Callable[[Array, Array, Array], None]:
        """Return the plain function, followed by one that leaves one zero, +0, and one NaN, as products do."""
        plain = super().bind_outer(da, workspace)

        def outer(h_prev: Array, dW: Array, db: Array) -> None:
            plain(h_prev, dW, db)
            for out in (dW, db):
                np.add(out, 0.0, out=out)
                np.copyto(out, CANONICAL_NAN, where=np.isnan(out))

        return outer
