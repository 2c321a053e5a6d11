"""Turn a data set's targets into what a loss takes, and score a network's outputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gpuback._core.losses import LOSSES, Loss
from gpuback._core.typing import Array
from gpuback.datasets import Dataset
from gpuback.errors import DataError, OptionError, ShapeError, require_known


class Task(NamedTuple):
    """The task that a network is trained for.

    Attributes:
        kind: "classification" or "regression".
        y: (N,) labels or (N, width) numbers, as the loss takes them.
        width: of the output layer.
    """

    kind: str
    y: Array
    width: int


def default_loss(data: Dataset) -> str:
    """Choose the loss where the user names none."""
    return "cross_entropy" if data.task == "classification" else "squared_error"


def is_regression(loss: str) -> bool:
    """Tell whether a loss is one for quantities; False for an unknown name."""
    return loss in LOSSES and LOSSES[loss].targets in ("values", "counts")


def task_of(data: Dataset, loss: str) -> Task:
    """Make the task of a data set and a loss.

    Labels stay labels for cross_entropy. For binary_cross_entropy two classes are one output, the probability of class
    1, and more are one-hot rows. For losses of quantities they are one-hot rows, unless the data
    `looks_like_regression`. For poisson they are counts.

    Raises:
        OptionError: an unknown loss, or one for classes where the targets are real numbers.
        DataError: there is only one class.
    """
    require_known("loss", loss, LOSSES)
    counts = LOSSES[loss].targets == "counts"
    if data.task == "regression" or counts or (is_regression(loss) and looks_like_regression(data)):
        if not is_regression(loss):
            raise OptionError(
                f"loss {loss} needs class labels, but the targets of {data.name} are real numbers: use squared_error"
            )
        y = data.y.reshape(len(data.y), -1).astype(np.float64)
        return Task("regression", y, y.shape[1])
    classes = data.n_classes
    if classes < 2:
        raise DataError(f"{data.name}: every label is 0, there is nothing to tell apart")
    if loss == "cross_entropy":
        return Task("classification", data.y, classes)
    if loss == "binary_cross_entropy" and classes == 2:
        return Task("classification", data.y[:, None].astype(np.float32), 1)
    one_hot = np.zeros((len(data.y), classes), np.float32)
    one_hot[np.arange(len(data.y)), data.y] = 1.0
    return Task("classification", one_hot, classes)


def looks_like_regression(data: Dataset) -> bool:
    """Tell whether whole-number targets take more than √N different values: too few samples each to learn classes."""
    return data.task == "classification" and len(np.unique(data.y)) > math.sqrt(len(data.y))


def require_range(x: Array, dtype: np.dtype[Any], data: Dataset) -> None:
    """Refuse features that overflow in the network's dtype.

    Raises:
        DataError: naming the feature.
    """
    largest = np.abs(x).max(axis=0)
    column = int(largest.argmax())
    limit = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    if largest[column] > limit:
        name = data.feature_names[column] if data.feature_names else column
        raise DataError(
            f"{data.name}: expected features that {dtype} can hold, up to ±{limit:.3g}, found ±{largest[column]:.3g} in"
            f" feature {name}: use a wider dtype or scale the data"
        )


class Score(NamedTuple):
    """The quality of outputs: "accuracy" or "R²", and its value; None where it is not defined."""

    name: str
    value: float | None

    def as_document(self) -> dict[str, float | None]:
        """Return the score for JSON, under an ASCII key."""
        return {"accuracy" if self.name == "accuracy" else "r2": self.value}


def score_of(loss: Loss, outputs: Array, y: Array) -> Score:
    """Compute the accuracy of a classifier, or R² of a regression, averaged over its outputs.

    Args:
        loss: the network's.
        outputs: (N, width).
        y: a data set's targets.

    Raises:
        ShapeError: the outputs and the targets differ in number.
    """
    width = outputs.shape[1]
    if loss.targets in ("classes", "probabilities") or (y.dtype.kind in "iu" and width > 1 and y.ndim == 1):
        return Score("accuracy", float(np.mean(predicted_labels(outputs) == y)))
    targets = y.reshape(len(y), -1)
    if targets.shape[1] != width:
        raise ShapeError(
            f"expected {width} targets per sample, as many as the network has outputs, got {targets.shape[1]}"
        )
    residual = np.square(outputs.astype(np.float64) - targets).sum(axis=0)
    total = np.square(targets - targets.mean(axis=0, dtype=np.float64)).sum(axis=0)
    return Score("R²", float(np.mean(1.0 - residual / total)) if total.all() else None)


def predicted_labels(outputs: Array) -> Array:
    """Return the most probable class of each row of outputs (N, width); a single output is that of class 1."""
    return (outputs[:, 0] > 0.5).astype(np.intp) if outputs.shape[1] == 1 else outputs.argmax(axis=1)
