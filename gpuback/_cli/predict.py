"""A saved network's answers for a data set, as CSV or JSON."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback import MLP
from gpuback._cli.tasks import BLOCK_ROWS, Score, require_range, score_of
from gpuback._core.typing import Array
from gpuback._text import quoted
from gpuback.datasets import columns
from gpuback.datasets.schema import Schema
from gpuback.datasets.standardization import Standardization
from gpuback.datasets.tables import Table
from gpuback.datasets.targets import CLASSIFICATION, REGRESSION, Target
from gpuback.errors import DataError, OptionError


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Prediction:
    """A network's answers for a data set.

    Attributes:
        target: what is answered.
        answers: (N,) classes, or (N, width) quantities.
        outputs: (N, width) of the network, a column for each class where `answers` are classes; None if not wanted.
        probabilities: whether these are probabilities.
        left_out: rows of the data, from 1, without an answer.
        score: against the data's targets, if that was asked for.
    """

    target: Target
    answers: NDArray[Any]
    outputs: Array | None
    probabilities: bool
    left_out: tuple[int, ...]
    score: Score | None

    def as_csv(self) -> str:
        """Write a header row, then a row for each sample; numbers have all digits that tell neighbours apart."""
        names, cells = self._columns()
        rows = cells[0] if len(cells) == 1 else map(",".join, zip(*cells, strict=True))
        return "\n".join([",".join(map(_cell, names)), *rows, ""])

    def as_document(self) -> dict[str, Any]:
        """Return the answers for JSON."""
        document: dict[str, Any] = {"target": self.target.name}
        if self.target.task == REGRESSION:
            document["outputs"] = self.answers.tolist()
        else:
            document["labels"] = self.answers.tolist()
            if self.outputs is not None:
                document["classes"] = list(self.target.classes)
                document["probabilities" if self.probabilities else "outputs"] = self.outputs.tolist()
        if self.left_out:
            document["rows_left_out"] = list(self.left_out)
        if self.score is not None:
            document["score"] = self.score.as_document()
        return document

    def _columns(self) -> tuple[list[str], list[list[str]]]:
        """(names, the cells of each column)."""
        if self.target.task == REGRESSION:
            several = self.answers.shape[1] > 1
            names = [f"{self.target.name}{j}" if several else self.target.name for j in range(self.answers.shape[1])]
            return names, [_numbers(column) for column in self.answers.T]
        # Each class is written once, not each row.
        written = {value: _cell(str(value)) for value in self.target.classes}
        names, cells = [self.target.name], [[written[value] for value in self.answers.tolist()]]
        if self.outputs is not None:
            mark = "p" if self.probabilities else "output"
            names += [f"{mark}_{value}" for value in self.target.classes]
            cells += [_numbers(column) for column in self.outputs.T]
        return names, cells


def schema_for(net: MLP, schema: Schema | None, table: Table, target: str | None, no_target: bool) -> Schema:
    """Return the schema that a network was trained with, or one that takes a table's columns by position.

    Raises:
        OptionError: an option that does not apply to a network with a schema.
    """
    if schema is not None:
        if target is not None and target != schema.target.name:
            raise OptionError(f"target={target!r}: the model's target is {quoted(schema.target.name)}")
        return schema
    width, classes = net.sizes[0], net.sizes[-1]
    names = table.names
    # Where every column is a feature, none is the target.
    name = "output" if no_target or (target is None and table.width == width) else target or names[-1]
    if table.is_array:
        name = table.target_name
    kind = Target(name, REGRESSION, width=classes)
    if net.architecture.loss == "cross_entropy":
        labels = table.classes if len(table.classes) == classes else tuple(range(classes))
        kind = Target(name if name != "output" else "label", CLASSIFICATION, labels)
    as_it_is = Standardization(np.zeros(width), np.ones(width))
    found = tuple(columns.Column(str(j)) for j in range(width))
    return Schema(found, False, kind, as_it_is, np.zeros(width), None)


def predict_for(
    net: MLP, schema: Schema, table: Table, *, missing: str | None, probabilities: bool, score: bool
) -> Prediction:
    """Compute the network's answers for a table, scored against its targets if wanted.

    Args:
        net, schema: of one file.
        table: with the schema's columns; others are left out.
        missing: what to do about missing cells; None as the schema says, but no row is left out unasked.
        probabilities: also return the outputs of each class.
        score: compare with the table's target.

    Raises:
        ShapeError, DataError: the columns do not fit the schema.
    """
    schema = replace(schema, missing=missing or (schema.missing if schema.missing == "mean" else None))
    schema.require_columns(table)
    left_out: tuple[int, ...] = ()
    if schema.missing == "drop":
        table, rows = table.without_missing(schema.columns_of(table))
        left_out = tuple((rows + 1).tolist())
        if not len(table):
            raise DataError(f"{table.name}: every row has a missing cell")
    schema.require_complete(table)
    outputs = _outputs(net, schema, table)
    scored = None
    if score:
        y = schema.targets(table)
        if y is None:
            raise DataError(f"{table.name}: expected a target {quoted(schema.target.name)} to compare with, found none")
        scored = score_of(schema, outputs, y)
    answers, of_classes = schema.answers(outputs), None
    if schema.task == CLASSIFICATION and probabilities:
        of_classes = np.column_stack((1 - outputs, outputs)) if outputs.shape[1] == 1 else outputs
    elif schema.task == REGRESSION and schema.outputs is None:
        answers = outputs  # in the network's dtype, whose digits are fewer
    is_probability = net.architecture.output in ("softmax", "sigmoid")
    return Prediction(schema.target, answers, of_classes, is_probability, left_out, scored)


def _outputs(net: MLP, schema: Schema, table: Table) -> Array:
    """Compute the network's outputs, some rows at a time: all inputs at once would be a second copy of the table."""
    fill_in, parts = schema.encoder(table), []
    for start in range(0, len(table), BLOCK_ROWS):
        x = np.empty((min(BLOCK_ROWS, len(table) - start), schema.n_inputs), net.theta.dtype)
        fill_in(start, x)
        require_range(x, net.dtype, schema, table.name)
        parts.append(net.ops.to_numpy(net.forward(x)))
    return np.concatenate(parts)


def _numbers(column: Array) -> list[str]:
    return list(map(repr, column.tolist())) if column.dtype == np.float64 else column.astype(str).tolist()


def _cell(text: str) -> str:
    """Quote a cell where CSV needs it."""
    line = io.StringIO()
    csv.writer(line).writerow([text])  # which quotes line breaks, as they would end the row
    return line.getvalue().removesuffix("\r\n")
