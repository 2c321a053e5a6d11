"""Users' arrays (samples, targets, weights, gradients): checked against a network, brought to its backend and dtype."""

from __future__ import annotations

import numpy as np

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array, ArrayLike
from gpuback._network.backprop import empty_gradients
from gpuback.errors import DtypeError, LabelError, OptionError, ShapeError

LABELS = np.dtype(np.intp)
"""The dtype in which losses read class labels."""


def as_batch(
    x: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None, architecture: Architecture, ops: Ops
) -> tuple[Array, Array, Array | None]:
    """Return a batch as a network's passes read it: samples, targets and weights (B,) or None.

    Raises:
        ShapeError, DtypeError, DeviceError, LabelError: as `MLP.value_and_grad`.
    """
    samples = as_samples(x, architecture, ops)
    targets = as_targets(y, architecture, len(samples), ops)
    if sample_weight is not None:
        sample_weight = as_sample_weight(sample_weight, architecture, len(samples), ops)
    return samples, targets, sample_weight


def as_samples(x: ArrayLike, architecture: Architecture, ops: Ops) -> Array:
    """Return x as (B, n_0), B ≥ 1, in θ's dtype."""
    samples = ops.asarray(x, architecture.precision.accumulator, "x")
    width = architecture.sizes[0]
    if samples.ndim != 2 or samples.shape[1] != width:
        hint = "; one sample is x[None, :]" if samples.shape == (width,) else ""
        raise ShapeError(f"x: expected shape (B, {width}) for sizes {architecture.sizes}, got {samples.shape}{hint}")
    if len(samples) == 0:
        raise ShapeError(f"x: expected at least one sample, got shape {samples.shape}")
    return samples


def as_targets(y: ArrayLike, architecture: Architecture, batch_size: int, ops: Ops) -> Array:
    """Return y as the loss reads it: integer labels (B,) or rows (B, n_L).

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


def as_sample_weight(weight: ArrayLike, architecture: Architecture, batch_size: int, ops: Ops) -> Array:
    """Return w as (B,)."""
    weights = ops.asarray(weight, architecture.precision.accumulator, "sample_weight")
    if weights.shape != (batch_size,):
        raise ShapeError(
            f"sample_weight: expected shape ({batch_size},), one weight per sample of x, got {weights.shape}"
        )
    return weights


def as_gradients(out: Gradients | None, architecture: Architecture, ops: Ops) -> Gradients:
    """Return gradients to write to: the caller's, checked, their parts as views into their `theta`; or fresh ones.

    Raises:
        ShapeError: they are no `Gradients`, or their `theta` has another shape or dtype than θ.
        OptionError: their `theta` is not contiguous, aligned and writeable.
    """
    if out is None:
        return empty_gradients(architecture, ops)
    layout, dtype = architecture.layout, architecture.precision.accumulator
    expected = (layout.n_parameters,)
    theta = out.theta if isinstance(out, Gradients) else None
    if theta is None or theta.shape != expected or theta.dtype != dtype:
        without = "Gradients without theta" if isinstance(out, Gradients) else type(out).__name__
        came = without if theta is None else f"theta {theta.shape} of {theta.dtype}"
        raise ShapeError(f"out: expected Gradients with theta {expected} of {dtype}, got {came}")
    flags = out.theta.flags  # CuPy's know only the first of these
    if not (flags.c_contiguous and getattr(flags, "aligned", True) and getattr(flags, "writeable", True)):
        raise OptionError(
            "out: expected Gradients over a contiguous, aligned, writeable theta, as one call returns them"
        )
    out._split_by(layout)
    return out
