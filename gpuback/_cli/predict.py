"""A saved network's answers for a data set, as CSV or JSON."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuback import MLP, datasets
from gpuback._cli.tasks import Score, predicted_labels, require_range, score_of
from gpuback._core.typing import Array
from gpuback.datasets import Dataset
from gpuback.datasets.tables import read_csv
from gpuback.errors import OptionError, ShapeError


def load(
    source: str, *, target: str | None, labels: str | None, no_target: bool, max_bytes: int | None = None
) -> Dataset:
    """Load the data to predict for; with `no_target`, all columns of a .csv file are features, and y is empty."""
    if not no_target:
        return datasets.load(source, target=target, labels=labels, max_bytes=max_bytes)
    if target is not None or labels is not None:
        raise OptionError("--no-target excludes --target and --labels")
    if not source.lower().endswith(".csv"):
        raise OptionError(f"{source}: --no-target applies to .csv files")
    table = read_csv(source, None)
    x = np.column_stack((table.x, table.y))  # the reader takes the last column for the target
    return Dataset(source, x, np.empty(0), (*table.feature_names, table.target_name))


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Prediction:
    """A network's answers for a data set.

    Attributes:
        outputs: (N, n_L).
        labels: (N,) the most probable classes of a cross_entropy network; None for others.
        score: against the data's targets, if that was asked for.
    """

    outputs: Array
    labels: Array | None
    score: Score | None

    def as_csv(self) -> str:
        """Write a header row, then a row for each sample; numbers have all digits that tell neighbours apart."""
        columns = [f"{'output' if self.labels is None else 'p'}{j}" for j in range(self.outputs.shape[1])]
        rows = self.outputs.astype(str)
        if self.labels is not None:
            columns.insert(0, "label")
            rows = np.column_stack((self.labels.astype(str), rows))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows.tolist()])
        return text.getvalue()

    def as_document(self) -> dict[str, Any]:
        """Return the answers for JSON."""
        document: dict[str, Any] = {}
        if self.labels is None:
            document["outputs"] = self.outputs.tolist()
        else:
            document |= {"labels": self.labels.tolist(), "probabilities": self.outputs.tolist()}
        if self.score is not None:
            document["score"] = self.score.as_document()
        return document


def predict_for(net: MLP, data: Dataset, *, score: bool) -> Prediction:
    """Compute the network's answers for a data set, scored against its targets if wanted.

    Raises:
        ShapeError: the data have another number of features than the network takes.
        DataError: a feature is beyond the range of the network's dtype.
    """
    found, expected = data.x.shape[1], net.sizes[0]
    if found != expected:
        remedy = ""
        if found == expected - 1 and data.y.size:
            remedy = "; is every column a feature? Then add --no-target"
        elif found == expected + 1 and not data.y.size:
            remedy = "; is one of them the target? Then leave out --no-target"
        raise ShapeError(f"{data.name}: expected {expected} features, which the model takes, found {found}{remedy}")
    require_range(data.x, net.dtype, data)
    outputs = net.ops.to_numpy(net.forward(data.x))
    return Prediction(
        outputs,
        predicted_labels(outputs) if net.architecture.loss == "cross_entropy" else None,
        score_of(net.architecture.loss_row, outputs, data.y) if score else None,
    )
