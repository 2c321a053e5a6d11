"""Users' arrays (samples, targets, weights, gradients): checked against a network, brought to its backend and dtype."""

from __future__ import annotations

import math

import numpy as np

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.losses import OwnLoss, Quantile
from gpuback._core.own_loss import require_function
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array, ArrayLike
from gpuback._network.backprop import empty_gradients
from gpuback._network.reserved import Reserved
from gpuback.errors import DtypeError, LabelError, OptionError, ShapeError

LABELS = np.dtype(np.intp)
"""The dtype in which losses read class labels."""

MOST_COUNTS = 2**63 - 1
"""The largest integer of the dtype in which `Ops.any_outside` compares integers."""


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
    """Return y as the loss reads it: integer labels (B,), rows (B, n_L), or B rows of anything for a function.

    Raises:
        ShapeError: none of these shapes, or another number of samples than x has.
        DtypeError: class labels that are not integers.
        LabelError: a label outside 0 … n_L − 1, a probability outside [0, 1], or a count below 0.
        OptionError: the loss was a function, which the network was loaded without.
    """
    width, row = architecture.sizes[-1], architecture.loss_row
    kind = row.targets
    targets = ops.to_array(y, "y")
    if isinstance(row, OwnLoss):
        return _as_own(targets, row, architecture, batch_size, ops)
    if kind == "classes" and targets.ndim == 1:
        return _as_labels(targets, width, batch_size, ops)
    one = width == 1 or (isinstance(row, Quantile) and len(row.q) > 1)
    if kind != "classes" and one and targets.ndim == 1:
        targets = targets[:, None]
    if one and targets.shape == (batch_size, 1):
        targets = np.broadcast_to(targets, (batch_size, width))
    if targets.shape != (batch_size, width):
        shapes = f"({batch_size}, {width})"
        if kind == "classes":
            shapes = f"({batch_size},) of integer labels or {shapes} of probabilities"
        elif one:
            shapes = f"({batch_size},) or {shapes}"
        raise ShapeError(f"y: expected shape {shapes} for loss {architecture.loss!r}, got {targets.shape}")
    if kind == "counts" and ops.any_outside(targets, MOST_COUNTS if targets.dtype.kind in "iu" else math.inf):
        raise LabelError(f"y: expected numbers ≥ 0 for loss {architecture.loss!r}, got {targets.min()}")
    if kind in ("classes", "probabilities") and ops.any_outside(targets, 1):
        raise LabelError(
            f"y: expected probabilities in [0, 1] for loss {architecture.loss!r}, "
            f"got {targets.min()} to {targets.max()}"
        )
    return ops.asarray(targets, architecture.precision.accumulator, "y")


def _as_own(y: Array, loss: OwnLoss, architecture: Architecture, batch_size: int, ops: Ops) -> Array:
    """Return B rows of whatever a function reads: floats in θ's dtype, other numbers in their own."""
    require_function(loss.function, loss.name)
    if y.ndim == 0 or len(y) != batch_size:
        raise ShapeError(f"y: expected {batch_size} rows, one per sample of x, got shape {y.shape}")
    return ops.asarray(y, y.dtype if y.dtype.kind in "biu" else architecture.precision.accumulator, "y")


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


def as_gradients(
    out: Gradients | None,
    architecture: Architecture,
    ops: Ops,
    reserved: Reserved,
    *inputs: tuple[str, ArrayLike | None, Array | None],
) -> Gradients:
    """Return gradients to write to: the caller's, checked, their parts as views into their `theta`; or fresh ones.

    Args:
        out: the caller's.
        architecture, ops: the network.
        reserved, inputs: its arrays and the call's, with which `out` may share no memory; see `Reserved`.

    Raises:
        ShapeError: they are no `Gradients`, or their `theta` has another shape or dtype than θ.
        OptionError: their `theta` is not contiguous, aligned and writeable, or overlaps another array.
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
    reserved.require_apart("out", theta, *inputs)
    out._split_by(layout)
    return out


def as_direction(value: ArrayLike, samples: Array, ops: Ops, name: str) -> Array:
    """Return how x moves, of x's shape, as one direction (1, B, n_0)."""
    direction = ops.asarray(value, samples.dtype, name)
    if direction.shape != samples.shape:
        raise ShapeError(f"{name}: expected shape {samples.shape}, as x has, got {direction.shape}")
    return direction[None]


def as_theta(value: ArrayLike | Gradients, theta: Array, ops: Ops, name: str) -> Array:
    """Return an array like θ, (n_parameters,), also of `Gradients` that hold it."""
    flat = ops.asarray(value.theta if isinstance(value, Gradients) else value, theta.dtype, name)
    if flat.shape != theta.shape:
        raise ShapeError(f"{name}: expected shape {theta.shape}, as θ has, got {flat.shape}")
    return flat
