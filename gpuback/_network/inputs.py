"""What users pass to a network (samples, targets, weights), checked against it and brought to its backend and dtype."""

from __future__ import annotations

import numpy as np

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.typing import Array, ArrayLike
from gpuback.errors import DtypeError, LabelError, ShapeError

LABELS = np.dtype(np.intp)
"""What the losses read class labels in."""


def as_samples(x: ArrayLike, architecture: Architecture, ops: Ops) -> Array:
    """x as (B, n_0), B ≥ 1, in the dtype that sums are kept in."""
    samples = ops.asarray(x, architecture.precision.accumulator, "x")
    width = architecture.sizes[0]
    if samples.ndim != 2 or samples.shape[1] != width:
        hint = "; one sample is x[None, :]" if samples.shape == (width,) else ""
        raise ShapeError(f"x: expected shape (B, {width}) for sizes {architecture.sizes}, got {samples.shape}{hint}")
    if len(samples) == 0:
        raise ShapeError(f"x: expected at least one sample, got shape {samples.shape}")
    return samples


def as_targets(y: ArrayLike, architecture: Architecture, batch_size: int, ops: Ops) -> Array:
    """y as the loss reads it: integer labels (B,) or rows (B, n_L).

    Raises:
        ShapeError: neither of these shapes, or another number of samples than x has.
        DtypeError: class labels that are not integers.
        LabelError: a label outside 0 … n_L − 1, or a probability outside [0, 1].
    """
    width, kind = architecture.sizes[-1], architecture.loss_row.targets
    targets = ops.to_array(y, "y")
    if kind == "classes" and targets.ndim == 1:
        return _as_labels(targets, width, batch_size, ops)
    if kind != "classes" and width == 1 and targets.ndim == 1:
        targets = targets[:, None]
    if targets.shape != (batch_size, width):
        shapes = f"({batch_size}, {width})"
        if kind == "classes":
            shapes = f"({batch_size},) of integer labels or {shapes} of probabilities"
        elif width == 1:
            shapes = f"({batch_size},) or {shapes}"
        raise ShapeError(f"y: expected shape {shapes} for loss {architecture.loss!r}, got {targets.shape}")
    if kind != "values" and ops.any_outside(targets, 1):
        raise LabelError(
            f"y: expected probabilities in [0, 1] for loss {architecture.loss!r}, "
            f"got {targets.min()} to {targets.max()}"
        )
    return ops.asarray(targets, architecture.precision.accumulator, "y")


def _as_labels(y: Array, n_classes: int, batch_size: int, ops: Ops) -> Array:
    if len(y) and y.dtype.kind not in "biu":
        raise DtypeError(
            f"y: expected integer labels 0 … {n_classes - 1}, shape ({batch_size},), or probability rows "
            f"({batch_size}, {n_classes}); got shape ({len(y)},) of {y.dtype}"
        )
    if y.shape != (batch_size,):
        raise ShapeError(f"y: expected {batch_size} labels, one per sample of x, got {len(y)}")
    if ops.any_outside(y, n_classes - 1):
        raise LabelError(
            f"y: expected labels 0 … {n_classes - 1} for an output layer of width {n_classes}, "
            f"got labels from {y.min()} to {y.max()}"
        )
    return ops.asarray(y, LABELS, "y")


def as_sample_weight(weight: ArrayLike | None, architecture: Architecture, batch_size: int, ops: Ops) -> Array | None:
    """w as (B,), or None."""
    if weight is None:
        return None
    weights = ops.asarray(weight, architecture.precision.accumulator, "sample_weight")
    if weights.shape != (batch_size,):
        raise ShapeError(
            f"sample_weight: expected shape ({batch_size},), one weight per sample of x, got {weights.shape}"
        )
    return weights
