"""What a table's target is: classes or a quantity, and why; labels as numbers from 0, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._text import quoted
from gpuback.datasets import columns
from gpuback.errors import DataError, LabelError, OptionError

CLASSIFICATION, REGRESSION = "classification", "regression"

MAX_CLASSES = 100_000
"""Each is an output of the network. ImageNet-21k, the largest set in common use, has 21,841; far more are a quantity
or an identifier."""

FEW_CLASSES = 20
"""So many different whole numbers are classes in a small table too, if there are two rows of each on average."""


@dataclass(frozen=True)
class Target:
    """The target's column.

    Attributes:
        name: in the table.
        task: "classification" or "regression".
        classes: of a classification, in the order of the outputs: texts, whole numbers or truth values.
        width: of a regression, how many numbers a row has.
        reason: why it is this task, for people.
    """

    name: str
    task: str
    classes: tuple[str | int | bool, ...] = ()
    width: int = 1
    reason: str = field(default="", compare=False)

    def encode(self, cells: Any, where: str) -> NDArray[Any]:
        """Return labels from 0, (N,) int64, or numbers (N, width) float64.

        Raises:
            LabelError: a label is none of the classes.
            DataError: a cell is missing or no number.
        """
        if absent := int(columns.missing(cells).sum()):
            raise DataError(
                f"{where}, target {quoted(self.name)}: {absent:,} of {len(cells):,} cells are missing. Remedy:"
                " missing='drop' leaves out their rows"
            )
        if self.task == REGRESSION:
            return self._quantities(cells, where)
        codes, found = _distinct(cells)
        places = {value: place for place, value in enumerate(self.classes)}
        try:
            ends = [places[self._class_of(value)] for value in found]
        except (KeyError, ValueError):
            unknown = [value for value in found if not self._knows(value)]
            raise LabelError(
                f"{where}, target {quoted(self.name)}: expected one of {len(self.classes)} classes"
                f" ({_listed(self.classes)}), found {_listed(unknown)}"
            ) from None
        return np.array(ends, np.int64)[codes]

    def _quantities(self, cells: Any, where: str) -> NDArray[np.float64]:
        try:
            values = cells.astype(np.float64) if getattr(cells, "ndim", 1) == 2 else columns.numbers(cells)
        except ValueError as error:
            raise DataError(f"{where}, target {quoted(self.name)}: expected numbers: {error}") from None
        if not np.isfinite(values).all():
            raise DataError(f"{where}, target {quoted(self.name)}: expected finite numbers")
        values = np.asarray(values).reshape(len(values), -1)
        if values.shape[1] != self.width:
            raise DataError(
                f"{where}, target {quoted(self.name)}: expected {self.width} numbers a row, found {values.shape[1]}"
            )
        return values

    def _class_of(self, value: Any) -> str | int | bool:
        """Return a cell's value as classes are stored."""
        kind = type(self.classes[0])
        if kind is str:
            return columns.text_of(value)
        if kind is bool:
            return columns.truth_of(value) == 1.0
        number = float(value)
        return int(value) if number.is_integer() else str(value)

    def _knows(self, value: Any) -> bool:
        try:
            return self._class_of(value) in self.classes
        except ValueError:
            return False


def decide(name: str, cells: Any, where: str, task: str | None = None) -> Target:
    """Decide what a target is.

    Texts and truth values are classes. Whole numbers, be they written 1 or 1.0, are classes if few of them differ: two,
    or up to √N, or up to 20 with two rows of each on average. All other numbers are a quantity.

    Args:
        name: of the target.
        cells: (N,), or (N, k) for several quantities.
        where: the table, for messages.
        task: "classification" or "regression" if it is not to be found out.

    Raises:
        DataError: it cannot be learnt: there is one class, or what should be a number is none.
        OptionError: an unknown task.
    """
    if task not in (None, CLASSIFICATION, REGRESSION):
        raise OptionError(f"task: expected 'classification' or 'regression', got {task!r}")
    where = f"{where}, target {quoted(name)}"
    if getattr(cells, "ndim", 1) == 2:
        if task == CLASSIFICATION:
            raise DataError(f"{where}: expected one label a row for a classification, found {cells.shape[1]} numbers")
        return Target(name, REGRESSION, width=cells.shape[1], reason=f"{cells.shape[1]} numbers a row")
    cells = cells[~columns.missing(cells)]
    if not len(cells):
        raise DataError(f"{where}: every cell is missing")
    if not columns.is_numeric(cells) or cells.dtype.kind == "b" or str(cells.dtype) == "boolean":
        return _words(name, cells, where, task)
    values = columns.numbers(cells)
    if not np.isfinite(values).all():
        raise DataError(f"{where}: expected finite numbers")
    if not (values == np.rint(values)).all():
        if task == CLASSIFICATION:
            raise DataError(
                f"{where}: expected texts or whole numbers for a classification, found numbers such as"
                f" {values[values != np.rint(values)][0]}"
            )
        return Target(name, REGRESSION, reason="its numbers are not whole")
    different = _distinct(cells)[1]
    found = f"{len(different):,} different whole numbers in {len(values):,} rows"
    if task == REGRESSION or (task is None and not _few(len(different), len(values))):
        return Target(name, REGRESSION, reason="as asked for" if task else f"{found}, too many for classes")
    classes = tuple(sorted(int(value) for value in different))
    return _checked(Target(name, CLASSIFICATION, classes, reason="as asked for" if task else found), where)


def _few(different: int, rows: int) -> bool:
    return different <= 2 or different <= math.sqrt(rows) or different <= min(FEW_CLASSES, rows / 2)


def _words(name: str, cells: Any, where: str, task: str | None) -> Target:
    if isinstance(cells, np.ndarray) and cells.dtype.kind in "bU":
        reason = "truth values" if cells.dtype.kind == "b" else "texts"
        if task == REGRESSION:
            raise DataError(f"{where}: expected numbers for a regression, found {reason}")
        return _checked(Target(name, CLASSIFICATION, tuple(_distinct(cells)[1]), reason=reason), where)
    try:
        column = columns.describe(name, cells, MAX_CLASSES)
    except ValueError as error:
        raise DataError(f"{where}: {error}; another target=…?") from None
    if column.kind == columns.NUMBER:  # Decimals and the like
        return decide(name, columns.numbers(cells), where.removesuffix(f", target {quoted(name)}"), task)
    if task == REGRESSION:
        what = "truth values" if column.kind == columns.BOOLEAN else f"texts such as {quoted(column.values[0])}"
        raise DataError(f"{where}: expected numbers for a regression, found {what}")
    if column.kind == columns.BOOLEAN:
        truths = sorted({columns.truth_of(value) == 1.0 for value in columns.factorize(cells)[1]})
        return _checked(Target(name, CLASSIFICATION, tuple(truths), reason="truth values"), where)
    return _checked(Target(name, CLASSIFICATION, column.values, reason="texts"), where)


def _checked(target: Target, where: str) -> Target:
    if len(target.classes) < 2:
        raise DataError(
            f"{where}: expected two classes or more, found {target.classes[0]!r} in every row: nothing to tell apart"
        )
    if len(target.classes) > MAX_CLASSES:
        raise LabelError(
            f"{where}: expected up to {MAX_CLASSES:,} classes, found {len(target.classes):,}; task='regression' takes"
            " numbers as quantities"
        )
    return target


def _distinct(cells: Any) -> tuple[NDArray[np.intp], list[Any]]:
    if isinstance(cells, np.ndarray) and cells.dtype != object:
        found, codes = np.unique(cells, return_inverse=True)
        return codes, found.tolist()
    return columns.factorize(cells)


def _listed(values: Any, most: int = 6) -> str:
    words = [quoted(value) for value in values[:most]]
    return ", ".join(words) + (", …" if len(values) > most else "")
