"""An estimator's samples: dense or sparse X held against the network's dtype, and mini-batches with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse

from gpuback._core.typing import Array
from gpuback._network.inputs import as_sample_weight, as_targets
from gpuback._network.mlp import MLP
from gpuback._training.batches import Batches, Samples, largest_finite, require_finite
from gpuback.errors import DataError

MOST_NUMBERS = 2**24
"""How many numbers of a sparse X are made dense at a time: 128 MiB of float64's."""


def require_range(X: Any, dtype: np.dtype[Any]) -> None:
    """Raise DataError unless `dtype` can hold every number of X, dense or in CSR format, as a finite one."""
    limit = largest_finite(dtype)
    if -limit <= float(X.min()) and float(X.max()) <= limit:  # with NaN neither holds
        return
    rows = abs(X).max(axis=1)
    largest = rows.toarray().ravel() if issparse(X) else rows
    row = int(np.argmin(largest.astype(np.float64) <= limit))
    raise DataError(
        f"X: expected finite numbers that {dtype} can hold, up to ±{limit:.4g}; "
        f"got NaN, infinity or a larger number in row {row}"
    )


def dense_parts(X: Any) -> Iterator[NDArray[Any]]:
    """Yield X as dense arrays of some rows each, in their order; a dense X as it is."""
    if not issparse(X):
        yield X
        return
    height = rows_at_a_time(X)
    for start in range(0, X.shape[0], height):
        yield X[start : start + height].toarray()


def rows_at_a_time(X: Any) -> int:
    """Return how many rows of X are worked on at a time: all of a dense one, so many of a sparse one as fit densely."""
    return max(1, MOST_NUMBERS // X.shape[1]) if issparse(X) else len(X)


class TrainingSet:
    """Samples in mini-batches, each with the sum of its weights.

    gpuback divides a batch's loss by its size B, scikit-learn by Σw: weights go to the network as shares, w_b B/Σw.

    Args:
        net: the network.
        X: (n_samples, n_features), dense or in CSR format.
        y: targets, as the network's loss wants them.
        weight: (n_samples,) or None.
        size: of a batch.
        one_loss: the batches' losses add up to the loss of all samples: Σw is that of all, in every batch.
    """

    def __init__(
        self, net: MLP, X: Any, y: Array, weight: NDArray[Any] | None, size: int, *, one_loss: bool = False
    ) -> None:
        self._net, self._size, self._n_samples, self._one_loss = net, size, X.shape[0], one_loss
        if one_loss and weight is None and size < self._n_samples:
            weight = np.ones(self._n_samples)
        self._weight = None if weight is None else np.asarray(weight, np.float64)
        self._shares = None if weight is None else net.ops.empty(len(weight), net.theta.dtype)
        self._batches: Batches | SparseBatches
        if issparse(X):
            self._batches = SparseBatches(net, X, y, weight, self._shares, size)
        else:
            samples = Samples.checked(net, X, y, weight)
            self._batches = Batches(net, Samples(samples.x, samples.y, self._shares), size)

    def each(self, order: NDArray[np.intp] | None = None) -> Iterator[tuple[Samples, float]]:
        """(batch, Σw), in that order of the samples (None: as they stand)."""
        starts = np.arange(0, self._n_samples, self._size)
        counts = np.diff(starts, append=self._n_samples)
        sums = counts.astype(np.float64)
        if self._weight is not None and self._shares is not None:
            rows = slice(None) if order is None else order
            weight = self._weight[rows]
            sums = self._weight_sums(weight, starts, counts)
            shares = np.empty_like(weight)
            shares[rows] = weight * np.repeat(counts / sums, counts)
            self._shares[...] = self._net.ops.asarray(shares, self._net.theta.dtype, "sample_weight")
        return zip(self._batches.each(order), sums.tolist(), strict=True)

    def _weight_sums(
        self, weight: NDArray[Any], starts: NDArray[np.intp], counts: NDArray[np.intp]
    ) -> NDArray[np.float64]:
        """Σw of each batch."""
        sums = np.full(len(starts), weight.sum()) if self._one_loss else np.add.reduceat(weight, starts)
        if not sums.all():
            batch = int(np.argmin(sums != 0))
            where = "all samples" if self._one_loss else f"the {counts[batch]} samples of batch {batch}"
            raise DataError(
                f"sample_weight: expected weights whose sum over each batch is not zero, got 0 over {where}; "
                "leave out samples of weight zero or enlarge batch_size"
            )
        return sums


class SparseBatches:
    """Mini-batches of a sparse X, made dense one at a time; `gpuback._training.batches.Batches` has those of a dense X.

    Args:
        net, X, y, weight, size: as `TrainingSet`'s; weight is checked only.
        shares: (n_samples,) the weights that batches get, on the network's backend, or None.
    """

    def __init__(
        self, net: MLP, X: Any, y: Array, weight: NDArray[Any] | None, shares: Array | None, size: int
    ) -> None:
        self._ops, self._dtype, self._X, self._shares, self._size = net.ops, net.theta.dtype, X, shares, size
        self._y = as_targets(y, net.architecture, X.shape[0], net.ops)
        checked = {"y": self._y}
        if weight is not None:
            checked["sample_weight"] = as_sample_weight(weight, net.architecture, X.shape[0], net.ops)
        for name, array in checked.items():
            if array.dtype.kind == "f":
                require_finite(net.ops, name, array, array.dtype)

    def each(self, order: NDArray[np.intp] | None) -> Iterator[Samples]:
        """Yield the samples in that order (None: as they stand), `size` at a time; the last batch may be shorter."""
        places = None if order is None else self._ops.indices(order)
        for start in range(0, self._X.shape[0], self._size):
            rows = slice(start, start + self._size)
            x = self._X[rows if order is None else order[rows]].toarray()
            chosen = rows if places is None else places[rows]
            weight = None if self._shares is None else self._shares[chosen]
            yield Samples(self._ops.asarray(x, self._dtype, "X"), self._y[chosen], weight)
