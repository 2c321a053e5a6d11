"""Train a network on a part of a data set, test it on the rest, and make it take raw features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import gpuback
from gpuback._cli.standardization import Standardization, fold
from gpuback._cli.tasks import Score, require_range, score_of, task_of
from gpuback._core.output_files import require_distinct, require_writable
from gpuback._core.parameters import permutation
from gpuback._core.precision import TF32_ROUNDOFF, UNIT_ROUNDOFF
from gpuback._core.typing import Array
from gpuback._training.batches import VALIDATION_SPLIT
from gpuback._training.optimizers import Optimizer
from gpuback.datasets import Dataset
from gpuback.errors import DivergedError, OptionError

HELD_OUT_SPLIT = VALIDATION_SPLIT + 1
"""Differs from VALIDATION_SPLIT, so that the test samples depend on no other shuffle."""

VALIDATION_FRACTION = 0.2
"""The part of the training samples whose loss `patience` watches."""

NOTICEABLE_ROUNDING = 1e-3
"""In standard deviations of a feature; float32 usually leaves 1e-7."""


@dataclass(frozen=True)
class Files:
    """The files that a run writes."""

    model: str
    plot: str | None
    checkpoint: str | None

    def check(self, inputs: Sequence[str]) -> None:
        """Raise before training if a file could not be written after it.

        Args:
            inputs: files that must not be overwritten.

        Raises:
            OptionError: two names are the same file.
            OSError: as `require_writable`.
        """
        outputs = [path for path in (self.model, self.plot, self.checkpoint) if path is not None]
        for path in outputs:
            require_writable(path, regular=path == self.checkpoint)
        require_distinct(outputs, inputs)


@dataclass(frozen=True)
class Result:
    """A trained network, which takes raw features, and what its training showed.

    Attributes:
        standardized_targets: whether history and held_out_curve hold losses of standardized targets.
        held_out_curve: the loss on the held-out samples after each epoch of this run.
        training_loss, held_out_loss, score: of the network as it is saved, on raw data.
        seconds_per_step: None if no step was left to do.
    """

    data: Dataset
    kind: str
    net: gpuback.MLP
    history: gpuback.History
    standardized_targets: bool
    held_out_curve: list[float]
    n_training: int
    n_held_out: int
    training_loss: float
    held_out_loss: float
    score: Score
    seconds_per_step: float | None


def train_network(
    data: Dataset,
    *,
    hidden: Sequence[int],
    network: Mapping[str, Any],
    optimizer: Optimizer,
    held_out: float,
    seed: int,
    standardize: bool,
    patience: int | None,
    fit: Mapping[str, Any],
    warn: Callable[[str], None],
) -> Result:
    """Train a network on a part of the data and test it on the rest.

    Args:
        data: the whole set.
        hidden: widths of the hidden layers.
        network: further keyword arguments of `gpuback.MLP`, "loss" among them.
        held_out: the fraction to test on.
        standardize: train on standardized features (and targets, in a regression with identity output), then fold that
            into the network.
        patience: as `gpuback.fit`'s, on a part of the training data.
        fit: further keyword arguments of `gpuback.fit`.
        warn: gets one line for each thing that the user should know.
    """
    task = task_of(data, network["loss"])
    net = gpuback.MLP((data.x.shape[1], *hidden, task.width), seed=seed, **network)
    require_range(data.x, net.dtype, data)
    test, part = _split(len(data.x), held_out, seed)
    x, y = data.x[part], task.y[part]

    features = targets = None
    inputs, outputs = data.x, task.y
    if standardize:
        features = Standardization.of_features(x)
        inputs = features.apply(data.x).astype(net.theta.dtype)
        _warn_of_rounding(net, data, features, warn)
        if task.kind == "regression" and net.architecture.output == "identity":
            targets = Standardization.of_targets(y)
            outputs = targets.apply(task.y)

    curve: list[float] = []
    test_inputs, test_outputs = inputs[test], outputs[test]
    try:
        history = gpuback.fit(
            net,
            inputs[part],
            outputs[part],
            optimizer=optimizer,
            seed=seed,
            validation=None if patience is None else VALIDATION_FRACTION,
            patience=patience,
            callbacks=[lambda net, history: curve.append(float(net.loss(test_inputs, test_outputs)))],
            **fit,
        )
    except DivergedError as error:
        raise DivergedError(
            f"training diverged: a loss or gradient was not finite at step {error.step} (epoch {error.epoch + 1}). No"
            " model was written. Remedies: a smaller --learning-rate, --clip-norm 1, --standardize",
            step=error.step,
            epoch=error.epoch,
        ) from error

    if features is not None:
        fold(net, features, targets)
    steps = history.steps // history.epochs * len(curve)
    return Result(
        data=data,
        kind=task.kind,
        net=net,
        history=history,
        standardized_targets=targets is not None,
        held_out_curve=curve,
        n_training=len(part),
        n_held_out=len(test),
        training_loss=float(net.loss(x, y)),
        held_out_loss=float(net.loss(data.x[test], task.y[test])),
        score=score_of(net.architecture.loss_row, net.ops.to_numpy(net.forward(data.x[test])), data.y[test]),
        seconds_per_step=history.seconds / steps if steps else None,
    )


def _split(count: int, held_out: float, seed: int) -> tuple[Array, Array]:
    """(rows to test on, rows to train on)."""
    n_test = max(1, round(held_out * count)) if 0 < held_out < 1 else count
    if n_test >= count:
        raise OptionError(
            f"--held-out: expected a fraction from 0 to 1 that leaves some to train on, got {held_out:g} of {count}"
        )
    order = permutation(count, seed, HELD_OUT_SPLIT)
    return np.sort(order[:n_test]), np.sort(order[n_test:])


def _warn_of_rounding(net: gpuback.MLP, data: Dataset, features: Standardization, warn: Callable[[str], None]) -> None:
    precision = net.architecture.precision
    number = "TF32" if precision.tf32 else precision.name
    column, error = features.coarsest(data.x, TF32_ROUNDOFF if precision.tf32 else UNIT_ROUNDOFF[precision.name])
    if precision.sixteen_bit or error > NOTICEABLE_ROUNDING:
        name = data.feature_names[column] if data.feature_names else column
        warn(
            f"the saved network takes raw features and rounds them to {number}: feature {name} by up to {error:.2g} of"
            " its standard deviation. If that is too much: a wider --dtype, or scaled data and --no-standardize"
        )
