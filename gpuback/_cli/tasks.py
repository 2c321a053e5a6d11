"""A network's targets for a schema and a loss, and how good its outputs are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gpuback._core.losses import LOSSES
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array
from gpuback._network.mlp import MLP
from gpuback._text import quoted
from gpuback.datasets.schema import Schema, labels_of
from gpuback.datasets.targets import CLASSIFICATION, REGRESSION
from gpuback.errors import DataError, OptionError, require_known

BLOCK_ROWS = 65536


class Task(NamedTuple):
    """What a network is trained on.

    Attributes:
        y: (N,) labels or (N, width) numbers, as the loss takes them.
        width: of the output layer.
    """

    y: Array
    width: int


def default_loss(task: str) -> str:
    """Choose the loss where the user names none."""
    return "cross_entropy" if task == CLASSIFICATION else "squared_error"


def task_for(loss: str | None, task: str | None) -> str | None:
    """Return the task that options ask for: counts are no classes."""
    if loss is not None:
        require_known("loss", loss, LOSSES)
        if LOSSES[loss].targets == "counts" and task is None:
            return REGRESSION
    return task


def standardizes_targets(loss: str | None, output: str | None) -> bool:
    """Tell whether a regression's targets can be standardized: not for counts, nor behind a bounded output."""
    return (output or LOSSES[loss or "squared_error"].default_output) == "identity"


def task_of(schema: Schema, y: Array, loss: str) -> Task:
    """Make what a loss takes of a schema's targets.

    Labels stay labels for cross_entropy. For binary_cross_entropy two classes are one output, the probability of class
    1, and more are one-hot rows. For losses of quantities they are one-hot rows.

    Raises:
        OptionError: a loss for classes where the targets are quantities.
    """
    quantities = LOSSES[loss].targets in ("values", "counts")
    if schema.task == REGRESSION:
        if not quantities:
            raise OptionError(
                f"loss={loss!r} needs classes, but the target {quoted(schema.target.name)} is a quantity, as"
                f" {schema.target.reason}. Remedies: loss='squared_error', or task='classification' for whole numbers"
            )
        return Task(y, schema.n_outputs)
    classes = schema.n_outputs
    if loss == "cross_entropy":
        return Task(y, classes)
    if loss == "binary_cross_entropy" and classes == 2:
        return Task(y[:, None].astype(np.float32), 1)
    one_hot = np.zeros((len(y), classes), np.float32)
    one_hot[np.arange(len(y)), y] = 1.0
    return Task(one_hot, classes)


def require_range(x: Array, dtype: np.dtype[Any], schema: Schema, name: str) -> None:
    """Refuse inputs that overflow in the network's dtype.

    Raises:
        DataError: naming the input.
    """
    largest = np.maximum(x.max(axis=0), -x.min(axis=0))
    column = int(largest.argmax())
    limit = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    if not largest[column] <= limit:
        named = schema.input_names[column] if schema.input_names else column
        raise DataError(
            f"{name}: expected features that {dtype} can hold, up to ±{limit:.3g}, found ±{largest[column]:.3g} in"
            f" feature {named}: use a wider dtype or scale the data"
        )


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Score:
    """How good outputs are, beside the best answer that is the same for every sample.

    Attributes:
        value: accuracy, or R² averaged over the outputs; None where R² is not defined.
        constant: the accuracy of the most frequent class of the training data; of a regression, None.
        error: of a regression, √ of the mean squared error in the targets' units, and that of their mean.
        confusion: (classes, classes) how many samples of the class of the row were given that of the column.
    """

    name: str
    value: float | None
    constant: float | None = None
    error: tuple[float, float] | None = None
    confusion: NDArray[np.int64] | None = None

    def as_document(self) -> dict[str, Any]:
        """Return the score for JSON, under ASCII keys."""
        if self.error is None:
            return {"accuracy": self.value, "constant": self.constant}
        return {"r2": self.value, "rmse": self.error[0], "constant_rmse": self.error[1]}


def score_of(schema: Schema, outputs: Array, y: Array, frequent: int | None = None) -> Score:
    """Compute the accuracy of a classification, or R² of a regression.

    Args:
        schema: of the network.
        outputs: (N, width), on the CPU.
        y: labels, or quantities as the schema makes them.
        frequent: the most frequent class of the training data; None: of these.
    """
    if schema.task == CLASSIFICATION:
        labels, n = labels_of(outputs), schema.n_outputs
        confusion = np.bincount(n * y + labels, minlength=n * n).reshape(n, n)
        of_class = confusion.sum(axis=1)
        frequent = int(of_class.argmax()) if frequent is None else frequent
        return Score(
            *("accuracy", float(np.trace(confusion) / len(y)), float(of_class[frequent] / len(y))), confusion=confusion
        )
    residual = np.square(outputs.astype(np.float64) - y).sum(axis=0)
    total = np.square(y - y.mean(axis=0)).sum(axis=0)
    scale = 1.0 if schema.outputs is None else schema.outputs.scale
    error, spread = (float(np.sqrt(np.mean(sums * np.square(scale)) / len(y))) for sums in (residual, total))
    return Score("R²", float(np.mean(1.0 - residual / total)) if total.all() else None, error=(error, spread))


def mean_loss(net: MLP, schema: Schema, x: Array, y: Array, weight: Array | None = None) -> float:
    """Compute the mean loss of samples, for quantities in their own units.

    Squared errors and huber, whose δ is one standard deviation, grow with σ²; absolute errors and quantile with σ. Each
    output has its own σ: the losses of the others are 0 where ŷ = y.
    """
    if schema.outputs is None:
        return float(net.loss(x, y, sample_weight=weight))
    loss, outputs = net.architecture.loss_row, forward(net, x).astype(np.float64)
    weights = np.ones(len(y)) if weight is None else weight
    total = 0.0
    for j, scale in enumerate(schema.outputs.scale):
        a, losses = y.copy(), np.empty(len(y))
        a[:, j] = outputs[:, j]
        loss.bind("identity", a, losses, Scratch(a), 1.0)(y)
        total += float(scale) ** (2 if loss.name in ("squared_error", "huber") else 1) * float(weights @ losses)
    return total / len(y)


def forward(net: MLP, x: Array) -> Array:
    """Compute a network's outputs on the CPU, some rows at a time."""
    parts = [x[first : first + BLOCK_ROWS] for first in range(0, len(x), BLOCK_ROWS)]
    return np.concatenate([net.ops.to_numpy(net.forward(part)) for part in parts])


def class_weights(y: Array, classes: int) -> NDArray[np.float64]:
    """Weigh samples by N / (classes · samples of their class), so that all classes count alike; the mean is 1."""
    counts = np.bincount(y, minlength=classes)
    present = np.count_nonzero(counts)
    return (len(y) / (present * np.maximum(counts, 1)))[y]


def risen_since(curve: list[float]) -> int | None:
    """Return the epoch (from 0) of the lowest loss if the loss has risen for long since; else None.

    Long is a fifth of the epochs and at least 10, and risen is by a twentieth.
    """
    best = min(range(len(curve)), key=curve.__getitem__, default=0)
    long = max(10, len(curve) // 5)
    finite = bool(curve) and math.isfinite(curve[-1])
    return best if finite and len(curve) - 1 - best >= long and curve[-1] > 1.05 * curve[best] else None
