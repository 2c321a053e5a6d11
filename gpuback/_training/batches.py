"""Training data: checked, split into training and validation, gathered into mini-batches."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from gpuback._backends.protocol import Ops
from gpuback._core.parameters import permutation
from gpuback._core.typing import Array, ArrayLike
from gpuback._network.inputs import as_batch
from gpuback._network.mlp import MLP
from gpuback.errors import DataError, DtypeError, LabelError, OptionError, ShapeError

VALIDATION_SPLIT = 2**32
"""Stands in a shuffle's key where an epoch's number would, so that the split is independent of every epoch's order."""


@dataclass(frozen=True)
class Samples:
    """Samples, targets and weights on the network's backend, checked."""

    x: Array
    y: Array
    weight: Array | None

    @classmethod
    def checked(cls, net: MLP, x: ArrayLike, y: ArrayLike, weight: ArrayLike | None, ops: Ops | None = None) -> Samples:
        """Check a network's data and bring them to its backend, or to that of `ops`."""
        ops = net.ops if ops is None else ops
        samples, targets, weights = as_batch(x, y, weight, net.architecture, ops)
        own = net.architecture.loss_row.targets == "own"  # what NaN means there is the function's business
        for name, array in (("x", samples), ("y", None if own else targets), ("sample_weight", weights)):
            if array is not None and array.dtype.kind == "f":
                require_finite(ops, name, array, net.dtype if name == "x" else array.dtype)
        return cls(samples, targets, weights)

    def rows(self, indices: Any) -> Samples:
        return Samples(self.x[indices], self.y[indices], None if self.weight is None else self.weight[indices])

    def digest(self, ops: Ops) -> str:
        """Return a hash that tells these data from others."""
        parts = [ops.to_numpy(array) for array in (self.x, self.y, self.weight) if array is not None]
        digest = hashlib.sha256(repr([(part.shape, part.dtype.name) for part in parts]).encode())
        for part in parts:
            digest.update(part.data)
        return digest.hexdigest()[:16]


def require_finite(ops: Ops, name: str, array: Array, dtype: np.dtype[Any]) -> None:
    """Raise DataError unless every number is finite, in `dtype` too."""
    limit = largest_finite(dtype)
    flat = array.reshape(-1)
    with ops.scope():
        if ops.all_finite(flat) and (dtype == array.dtype or _bound(ops, flat) <= limit):
            return
        largest = np.abs(ops.to_numpy(array)).reshape(len(array), -1).max(axis=1)
    fits = largest <= limit
    if not fits.all():
        row = int(np.argmin(fits))
        raise DataError(
            f"{name}: expected finite numbers that {dtype} can hold, up to ±{limit:.4g}; "
            f"got NaN, infinity or a larger number in row {row}"
        )


@functools.cache
def largest_finite(dtype: np.dtype[Any]) -> float:
    """Return the largest finite number of a dtype."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def _bound(ops: Ops, array: Array) -> float:
    """Return a number that no |x| of x (n,) exceeds: by what is quick where the array is."""
    return float(max(array.max(), -array.min())) if isinstance(array, np.ndarray) else ops.norm(array)


def hold_out(net: MLP, validation: float | Sequence[ArrayLike] | None, count: int) -> Samples | int:
    """Return the samples to validate on, or how many of `count` samples to hold out for it."""
    if validation is None:
        return 0
    if isinstance(validation, (int, float, np.integer, np.floating)):
        n_held_out = max(1, round(float(validation) * count)) if 0 < validation < 1 else count
        if n_held_out >= count:
            raise OptionError(
                f"validation: expected a fraction between 0 and 1 that leaves samples to train on, "
                f"got {validation!r} of {count}"
            )
        return n_held_out
    return validation_pair(net, validation, "a fraction or (x, y)")


def validation_pair(net: MLP, validation: Any, expected: str) -> Samples:
    """Return the user's own (x, y) to validate on; `expected` says what else may be given."""
    try:
        x, y = validation
    except (TypeError, ValueError):
        raise OptionError(f"validation: expected {expected}, got {in_words(validation)}") from None
    try:
        return Samples.checked(net, x, y, None)
    except (DataError, DtypeError, LabelError, ShapeError) as error:
        raise type(error)(f"validation {error}") from None


def in_words(item: object) -> str:
    """Describe what came in place of a pair or a batch."""
    kind = type(item).__name__
    if isinstance(item, (tuple, list)):
        return f"a {kind} of {len(item)}"
    shape = getattr(item, "shape", None)
    return kind if shape is None else f"{kind} of shape {tuple(shape)}"


def split(samples: Samples, n_held_out: int, seed: int) -> tuple[Samples, Samples]:
    """Split the samples into (the rest, `n_held_out`), chosen by the seed, each part in its former order."""
    order = permutation(len(samples.x), seed, VALIDATION_SPLIT)
    return samples.rows(np.sort(order[n_held_out:])), samples.rows(np.sort(order[:n_held_out]))


class Batches:
    """Mini-batches, gathered into buffers that are used again and again."""

    def __init__(self, net: MLP, samples: Samples, size: int) -> None:
        self._ops, self._samples, self._size = net.ops, samples, size
        x, y, weight = samples.x, samples.y, samples.weight

        def buffer(array: Array) -> Array:
            return net.ops.empty((size, *array.shape[1:]), array.dtype)

        self._buffers = Samples(buffer(x), buffer(y), None if weight is None else buffer(weight))

    def each(self, order: Any) -> Iterator[Samples]:
        """Yield the samples in that order (None: as they stand), `size` at a time; the last batch may be shorter."""
        count = len(self._samples.x)
        order = None if order is None else self._ops.indices(order)
        for start in range(0, count, self._size):
            rows = slice(start, min(start + self._size, count))
            if order is None:
                yield self._samples.rows(rows)
                continue
            full = rows.stop - start == self._size
            batch = self._buffers if full else self._buffers.rows(slice(0, rows.stop - start))
            pairs = ((self._samples.x, batch.x), (self._samples.y, batch.y), (self._samples.weight, batch.weight))
            for source, target in pairs:
                if source is not None:
                    self._ops.take_rows(source, order[rows], target)
            yield batch
