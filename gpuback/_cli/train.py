"""Train a network on samples, and test it on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import gpuback
from gpuback._cli.samples import Samples
from gpuback._cli.tasks import Score, forward, mean_loss, require_range, score_of, task_of
from gpuback._core.output_files import require_distinct, require_writable
from gpuback._core.typing import Array
from gpuback._training.history import Callback
from gpuback._training.optimizers import Optimizer
from gpuback.datasets.targets import CLASSIFICATION
from gpuback.errors import DivergedError, OptionError

VALIDATION_FRACTION = 0.2
"""The part of the training samples whose loss `patience` watches."""


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


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Result:
    """A trained network and what its training showed.

    Attributes:
        test_curve: the loss on the test samples after each epoch of this run; empty without any.
        epochs: those of this run; a resumed run had others before.
        training_loss, test_loss: of the network as it is saved, of quantities in their own units.
        score: on the test samples, or on the training samples where there are none.
        seconds_per_step: None if no step was left to do.
        interrupted: the epochs were not all trained.
    """

    samples: Samples
    net: gpuback.MLP
    history: gpuback.History
    test_curve: list[float]
    training_loss: float
    test_loss: float | None
    score: Score
    epochs: int
    seconds_per_step: float | None
    interrupted: bool = False


def train_network(
    samples: Samples,
    net: gpuback.MLP,
    *,
    optimizer: Optimizer,
    seed: int,
    patience: int | None,
    callbacks: Sequence[Callback],
    fit: Mapping[str, Any],
) -> Result:
    """Train a network on samples and test it on others.

    Ctrl-C ends the training: the network is that of the last whole epoch.

    Args:
        samples: the inputs and targets of a schema.
        net: the network, new or trained before.
        optimizer, seed: as `gpuback.fit`'s.
        patience: as `gpuback.fit`'s, on a part of the training data.
        callbacks: further ones.
        fit: further keyword arguments of `gpuback.fit`.

    Raises:
        KeyboardInterrupt: before an epoch was done.
        DivergedError: a loss or gradient was not finite.
    """
    schema, training, test = samples.schema, samples.training, samples.test
    for batch in (training, test):
        if batch is not None:
            require_range(batch.x, net.dtype, schema, samples.name)
    loss = net.architecture.loss
    y = task_of(schema, training.y, loss).y
    y_test = None if test is None else task_of(schema, test.y, loss).y
    curve: list[float] = []
    last: list[tuple[gpuback.History, Array]] = []
    epochs = 0

    def watch(net: gpuback.MLP, history: gpuback.History) -> None:
        nonlocal epochs
        epochs += 1
        last[:] = [(history, net.theta.copy())]
        if test is not None:
            curve.append(float(net.loss(test.x, y_test, sample_weight=test.weight)))

    interrupted = False
    try:
        history = gpuback.fit(
            net,
            training.x,
            y,
            sample_weight=training.weight,
            optimizer=optimizer,
            seed=seed,
            validation=None if patience is None else VALIDATION_FRACTION,
            patience=patience,
            callbacks=[watch, *callbacks],
            **fit,
        )
    except DivergedError as error:
        raise DivergedError(
            f"training diverged: a loss or gradient was not finite at step {error.step} (epoch {error.epoch + 1}). No"
            " model was written. Remedies: a smaller --learning-rate, --clip-norm 1, --standardize",
            step=error.step,
            epoch=error.epoch,
        ) from error
    except KeyboardInterrupt:
        if not last:
            raise
        (history, net.theta), interrupted = last[0], True

    steps = history.steps // max(1, history.epochs) * epochs
    scored = training if test is None else test
    frequent = None
    if schema.task == CLASSIFICATION:
        frequent = int(np.bincount(training.y, minlength=schema.n_outputs).argmax())
    return Result(
        samples=samples,
        net=net,
        history=history,
        test_curve=curve,
        training_loss=mean_loss(net, schema, training.x, y, training.weight),
        test_loss=None if test is None else mean_loss(net, schema, test.x, y_test, test.weight),
        score=score_of(schema, forward(net, scored.x), scored.y, frequent),
        epochs=epochs,
        seconds_per_step=history.seconds / steps if steps else None,
        interrupted=interrupted,
    )


def network_for(samples: Samples, hidden: Sequence[int], *, seed: int, **network: Any) -> gpuback.MLP:
    """Make the network of a schema: its inputs, the hidden layers, its outputs."""
    width = task_of(samples.schema, samples.training.y[:1], network["loss"]).width
    return gpuback.MLP((samples.schema.n_inputs, *hidden, width), seed=seed, **network)


def training_rows(samples: Samples, patience: int | None) -> int:
    """Return how many samples an epoch goes through: `patience` sets some aside."""
    count = len(samples.training)
    return count if patience is None else count - max(1, round(VALIDATION_FRACTION * count))


def require_fitting(net: gpuback.MLP, samples: Samples) -> None:
    """Raise OptionError if a network does not go with its schema."""
    schema = samples.schema
    wanted = schema.n_inputs, task_of(schema, samples.training.y[:1], net.architecture.loss).width
    if wanted != (net.sizes[0], net.sizes[-1]):
        raise OptionError(f"expected a network of {wanted[0]} inputs and {wanted[1]} outputs, got sizes {net.sizes}")
