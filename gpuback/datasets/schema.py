"""A schema: how a table becomes a network's inputs and targets, and its outputs become answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpuback._core import persistence
from gpuback._core.fields import Fields
from gpuback._core.typing import Array, PathLike
from gpuback._text import quoted
from gpuback.datasets import columns, sources, stored
from gpuback.datasets.columns import Column
from gpuback.datasets.standardization import Standardization
from gpuback.datasets.tables import Table, names_listed, table_of
from gpuback.datasets.targets import CLASSIFICATION, REGRESSION, Target, decide
from gpuback.errors import DataError, OptionError, ShapeError

Result = TypeVar("Result")

MISSING = ("mean", "drop")
_MOST_THREADS = 4
_LARGE = 1 << 16
"""Rows; in smaller tables, threads gain nothing."""

_BLOCK_ROWS = 1 << 14
"""Rows that a thread encodes at a time: few enough for the cache, and so many that NumPy takes longer than Python."""


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Schema:
    """How a table becomes a network's inputs and targets, and how the network's outputs become answers.

    Make one with `Schema.fit`, save it with `net.save(path, schema=schema)`, and read it with `Schema.load`.

    Attributes:
        columns: the features' columns in the order of the network's inputs.
        named: whether they are found by name; an array's columns without names are found by position.
        target: the target's column.
        features: z = (x − μ)/σ of each input; μ = 0 and σ = 1 where nothing is standardized.
        fill: (n_inputs,) what stands for a missing cell: the mean of the input.
        outputs: of a regression's targets likewise; None where they are not standardized.
        missing: what `transform` does about missing cells: None raises, "mean" fills them in, "drop" leaves out rows.
        layout: what was unusual about the file, for people; a model's file does not hold it.
    """

    columns: tuple[Column, ...]
    named: bool
    target: Target
    features: Standardization
    fill: NDArray[np.float64]
    outputs: Standardization | None
    missing: str | None = None
    layout: str = ""

    @classmethod
    def fit(
        cls,
        data: Any,
        *,
        target: str | None = None,
        task: str | None = None,
        drop: Sequence[str] = (),
        missing: str | None = None,
        standardize: bool = True,
        standardize_target: bool | None = None,
        rows: Array | None = None,
    ) -> Schema:
        """Find out what the columns hold, and measure means and standard deviations.

        Columns of numbers and booleans become one input each. Texts become one-hot inputs, and one more for texts that
        these data do not have. A column that never varies is 0 for the network, whatever comes later.

        Args:
            data: a file or a built-in set, as `datasets.load` takes it, a pandas DataFrame, or a pair of arrays (x, y).
            target: the name of the target's column; the last by default.
            task: "classification" or "regression". None: texts, truth values and few different whole numbers are
                classes, other numbers a quantity.
            drop: names of columns to leave out.
            missing: None raises where a cell is missing. "mean" fills in the mean of the input, for texts too: then
                each one-hot input is how often its text occurs. "drop" leaves out the row.
            standardize: bring the inputs of numbers and booleans to mean 0 and standard deviation 1.
            standardize_target: the same for a regression's targets, in float64; `standardize` by default. For a loss
                or an output function that needs quantities as they are, such as poisson, pass False.
            rows: measure these rows only, e.g. those to train on. Classes are looked for in all rows. With "drop",
                numbers of rows are those of the table that is left.

        Raises:
            DataError: a column cannot be used, or cells are missing: the message counts, names them and says what to
                do.
            OptionError: an unknown column or option.
            FileFormatError, UnknownSourceError, MissingExtraError: as `datasets.load`.
        """
        schema, table, y = cls.plan(_read(data), target=target, task=task, drop=drop, missing=missing)
        part = slice(None) if rows is None else rows
        features, fill = _measured(table, schema.columns, part, standardize)
        outputs = None
        if schema.task == REGRESSION and (standardize if standardize_target is None else standardize_target):
            outputs = Standardization.of_targets(y[part])
        return replace(schema, features=features, fill=fill, outputs=outputs)

    @classmethod
    def plan(
        cls, table: Table, *, target: str | None, task: str | None, drop: Sequence[str], missing: str | None
    ) -> tuple[Schema, Table, Array]:
        """Find out what the columns hold, and measure nothing. Arguments and errors as `fit`'s.

        Returns:
            The schema, the table without rows that are to be left out, and its targets.
        """
        if missing not in (None, *MISSING):
            raise OptionError(f"missing: expected 'mean' or 'drop', got {missing!r}")
        name = target_name(table, target, drop)
        not_features = {*drop, *([] if table.is_array else [name])}
        table.require(sorted(not_features))
        kept = [column for column in table.names if column not in not_features]
        if missing == "drop":
            table, _ = table.without_missing([*kept, name])
            if not len(table):
                raise DataError(f"{table.name}: every row has a missing cell, so that missing='drop' leaves none")
        cells = table.target(name)
        if cells is None:
            raise DataError(f"{table.name}: expected targets to learn, found none")
        found = _described(table, kept)
        fitted_target = _ordered(decide(name, cells, table.name, task), table)
        if missing is None and (absent := _missing_by_column(table, kept)):
            columns_too = f", drop={list(absent)[:20]!r} the columns" if table.names else ""
            raise DataError(missing_message(table, absent) + columns_too)
        width = sum(column.width for column in found)
        nothing = Standardization(np.zeros(width), np.ones(width))
        schema = cls(found, bool(table.names), fitted_target, nothing, np.zeros(width), None, missing, table.layout)
        return schema, table, fitted_target.encode(cells, table.name)

    # What it is

    @property
    def n_inputs(self) -> int:
        """How many inputs the network has."""
        return sum(column.width for column in self.columns)

    @property
    def n_outputs(self) -> int:
        """How many outputs the network has: one for each class, or each quantity."""
        return len(self.target.classes) if self.task == CLASSIFICATION else self.target.width

    @property
    def task(self) -> str:
        """The task: "classification" or "regression"."""
        return self.target.task

    @property
    def classes(self) -> tuple[str | int | bool, ...]:
        """What labels 0, 1, 2, … stand for."""
        return self.target.classes

    @property
    def input_names(self) -> tuple[str, ...]:
        """A name for each input, such as "age" or "colour=red"; empty for an array without names."""
        return tuple(name for column in self.columns for name in column.input_names) if self.named else ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the columns that delimited text is not to be made numbers of: categories and classes of texts."""
        names = [column.name for column in self.columns if column.kind == columns.CATEGORY]
        return (*names, *([self.target.name] if self.classes and isinstance(self.classes[0], str) else []))

    # What it does

    def transform(self, data: Any, *, dtype: Any = np.float32) -> tuple[Array, Array]:
        """Make a network's inputs and targets of a table that has the target.

        Args:
            data: as `fit` takes it. Columns are found by name, in any order; others are left out.
            dtype: of the inputs.

        Returns:
            x (N, n_inputs) of `dtype`, and y: labels (N,) int64 from 0, or standardized quantities (N, n_outputs)
            float64.

        Raises:
            DataError: a column is missing or holds something else than it did; a cell is missing.
            LabelError: a label is none of the classes.
        """
        table = self._complete(self.read(data), with_target=True)
        y = self.targets(table)
        if y is None:
            raise DataError(f"{table.name}: expected a target {quoted(self.target.name)}, found none")
        return self.encode(table, dtype), y

    def inputs(self, data: Any, *, dtype: Any = np.float32) -> Array:
        """Make a network's inputs of a table, with or without the target.

        Arguments and errors as `transform`'s.

        Returns:
            (N, n_inputs) of `dtype`.
        """
        return self.encode(self._complete(self.read(data), with_target=False), dtype)

    def answers(self, outputs: Array) -> NDArray[Any]:
        """Turn a network's outputs into classes, or quantities in their own units.

        Args:
            outputs: (N, n_outputs), or (N, 1) probabilities of the second of two classes.

        Returns:
            (N,) classes as the table had them, or (N, n_outputs) float64.
        """
        outputs = np.asarray(outputs)
        if self.task == REGRESSION:
            values = outputs.astype(np.float64)
            return values if self.outputs is None else self.outputs.invert(values)
        return np.array(self.classes, object if isinstance(self.classes[0], str) else None)[labels_of(outputs)]

    # For gpuback's own use: steps of these

    def read(self, data: Any, **options: Any) -> Table:
        """Return the table, read with this schema's columns of texts as they are written."""
        return _read(data, texts=self.texts, **options)

    def encode(self, table: Table, dtype: Any) -> Array:
        """Return the inputs of a table; missing cells are filled in."""
        x = np.empty((len(table), self.n_inputs), dtype)
        fill_in = self.encoder(table)
        starts = range(0, len(x), _BLOCK_ROWS)
        side_by_side(lambda start: fill_in(start, x[start : start + _BLOCK_ROWS]), starts, len(x))
        return x

    def encoder(self, table: Table) -> Callable[[int, Array], None]:
        """Return a function that writes the inputs of a table's rows from one on to an array (rows, n_inputs)."""
        matrix = self._matrix(table)
        parts = self._parts(table) if matrix is None else [(slice(None), matrix)]
        steps = [(place, values, self.features.part(place)) for place, values in parts]
        as_it_is = [features.is_identity for _, _, features in steps]

        def fill_in(start: int, out: Array) -> None:
            rows = slice(start, start + len(out))
            for (place, values, features), identity in zip(steps, as_it_is, strict=True):
                scaled = values[rows] if identity else features.apply(values[rows])
                if np.isnan(scaled).any():
                    scaled = features.apply(np.where(np.isnan(values[rows]), self.fill[place], values[rows]))
                out[:, place] = scaled

        return fill_in

    def _parts(self, table: Table) -> list[tuple[slice, NDArray[np.float64]]]:
        """Return (the inputs of a column, its values), column by column."""
        parts, start = [], 0
        for column in self.columns:
            place = slice(start, start + column.width)
            try:
                parts.append((place, column.encode(table.column(column.name))))
            except ValueError as error:
                kind = columns.KINDS[column.kind]
                raise DataError(
                    f"{table.name}, column {quoted(column.name)}: expected {kind}, as in the training data: {error}"
                ) from None
            start = place.stop
        return parts

    def targets(self, table: Table) -> Array | None:
        """Return labels or standardized quantities; None where the table has no target."""
        cells = table.target(self.target.name)
        if cells is None:
            return None
        y = self.target.encode(cells, table.name)
        return y if self.outputs is None else self.outputs.apply(y)

    def require_columns(self, table: Table) -> None:
        """Raise DataError where a table lacks columns that the network needs."""
        wanted = [column.name for column in self.columns]
        if self._by_name(table):
            absent = [name for name in wanted if name not in table.names]
            if absent:
                raise DataError(
                    f"{table.name}: expected {len(wanted)} columns by name, found none called {names_listed(absent)};"
                    f" there are {names_listed(table.names)}"
                )
        elif len(self._by_position(table)) != len(wanted):
            raise ShapeError(
                f"{table.name}: expected {len(wanted)} features, which the model takes, found"
                f" {len(self._by_position(table))}"
            )

    def columns_of(self, table: Table) -> list[str]:
        """Return the names of the columns that the inputs are made of."""
        return [column.name for column in self.columns] if self._by_name(table) else self._by_position(table)

    def missing_cells(self, table: Table) -> dict[str, int]:
        """Count the missing cells of the features' columns, where there are any."""
        return _missing_by_column(table, self.columns_of(table))

    def require_complete(self, table: Table) -> None:
        """Raise DataError where cells are missing that are not to be filled in."""
        if self.missing != "mean" and (absent := self.missing_cells(table)):
            raise DataError(missing_message(table, absent))

    def _complete(self, table: Table, with_target: bool) -> Table:
        self.require_columns(table)
        if self.missing == "drop":
            target = [self.target.name] if with_target and self.target.name in table.names else []
            table, _ = table.without_missing([*self.columns_of(table), *target])
        self.require_complete(table)
        return table

    def _by_name(self, table: Table) -> bool:
        return self.named and bool(table.names)

    def _by_position(self, table: Table) -> list[str]:
        names = table.names or tuple(map(str, range(table.width)))
        return list(names) if table.is_array else [name for name in names if name != self.target.name]

    def _matrix(self, table: Table) -> Any:
        """Return the features as one array where they are; None where columns are to be taken one by one."""
        if self._by_name(table):
            same = table.is_array and table.names == tuple(column.name for column in self.columns)
            return table.data if same else None
        if any(column.kind == columns.CATEGORY for column in self.columns):
            raise DataError(f"{table.name}: expected columns with names, as some hold texts, found an array")
        if table.is_array:
            return table.data
        return np.column_stack([columns.numbers(table.column(name)) for name in self._by_position(table)])

    # Files

    def as_fields(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return arrays and metadata of which `load` makes this schema again."""
        arrays = {stored.MEAN: self.features.mean, stored.SCALE: self.features.scale, stored.FILL: self.fill}
        if self.outputs is not None:
            arrays |= {stored.TARGET_MEAN: self.outputs.mean, stored.TARGET_SCALE: self.outputs.scale}
        metadata = {
            "columns": [[column.name, column.kind, list(column.values)] for column in self.columns],
            "named": self.named,
            "target": self.target.name,
            "task": self.task,
            "classes": list(self.classes),
            "width": self.target.width,
            "missing": self.missing,
            "standardized_target": self.outputs is not None,
        }
        return arrays, metadata

    @classmethod
    def load(cls, path: PathLike) -> Schema | None:
        """Read the schema in a model's file; None where it has none.

        Raises:
            FileFormatError: the file is damaged, or a field of the schema does not fit.
        """
        path, what = os.fspath(path), "a model with a schema"
        arrays, metadata = persistence.read(path, kind="model")
        if "schema" not in metadata:
            return None
        fields = Fields(path, what, arrays, Fields(path, what, arrays, metadata).mapping("schema"))
        found, target = stored.restored_columns(fields), stored.restored_target(fields)
        missing = fields.value("missing")
        if missing is not None and missing not in MISSING:
            fields.refuse("missing", f"None or one of {', '.join(MISSING)}", missing)
        width = sum(column.width for column in found)
        features = stored.restored_scaling(fields, stored.MEAN, stored.SCALE, width)
        fill = stored.restored_numbers(fields, stored.FILL, width)
        outputs = None
        if fields.flag("standardized_target"):
            if target.task == CLASSIFICATION:
                fields.refuse("standardized_target", "False for a classification", True)
            outputs = stored.restored_scaling(fields, stored.TARGET_MEAN, stored.TARGET_SCALE, target.width)
        return cls(found, fields.flag("named"), target, features, fill, outputs, missing)


def labels_of(outputs: Array) -> Array:
    """Return the most probable class of each row of outputs (N, width); a single output is that of class 1."""
    return (outputs[:, 0] > 0.5).astype(np.intp) if outputs.shape[1] == 1 else outputs.argmax(axis=1)


def target_name(table: Table, target: str | None, drop: Collection[str] = ()) -> str:
    """Return the target's name: of a DataFrame the given one, or that of the last column that is not left out.

    Raises:
        OptionError: the target is left out, or an array's targets are to be found by name.
    """
    if not table.is_array:
        if target is not None and target in drop:
            raise OptionError(f"drop={[target]!r} leaves out the target")
        kept = [name for name in table.names if name not in drop]
        return (kept or table.names)[-1] if target is None else target
    if target is not None:
        raise OptionError(
            f"{table.name}: target={target!r} applies to tables, and these samples have targets beside them"
        )
    return table.target_name


def missing_message(table: Table, absent: Mapping[str, int]) -> str:
    """Count missing cells by column, and say what to do."""
    counted = [f"{quoted(name)} {count:,}" for name, count in absent.items()]
    listed = ", ".join(counted[:20]) + (f" and {len(counted) - 20} columns more" if len(counted) > 20 else "")
    return (
        f"{table.name}: cells are missing, of {len(table):,} rows: {listed}. Remedies: missing='mean' fills in means,"
        " missing='drop' leaves out the rows"
    )


def side_by_side(work: Callable[[int], Result], items: Sequence[int], rows: int) -> list[Result]:
    """Return work(item) of each item, in order, of a large table from a few threads: most of it is NumPy's."""
    workers = min(len(items), _MOST_THREADS, os.cpu_count() or 1)
    if workers < 2 or rows < _LARGE:
        return list(map(work, items))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))


def _read(data: Any, **options: Any) -> Table:
    if isinstance(data, (str, os.PathLike)):
        return sources.read(data, **options)
    return table_of(data)


def _described(table: Table, names: Sequence[str]) -> tuple[Column, ...]:
    """Describe the columns, or raise one error for all that cannot be used."""
    if table.is_array:
        if not table.names:
            return tuple(Column(str(j)) for j in range(table.width))
        return tuple(map(Column, names))
    found, unusable = [], {}
    for name in names:
        try:
            found.append(columns.describe(name, table.column(name)))
        except ValueError as error:
            unusable[name] = str(error)
    if unusable:
        why = "; ".join(f"column {quoted(name)} {reason}" for name, reason in list(unusable.items())[:10])
        more = f"; and {len(unusable) - 10} columns more" if len(unusable) > 10 else ""
        raise DataError(f"{table.name}: {why}{more}. Remedy: drop={list(unusable)!r}")
    if not found:
        raise DataError(f"{table.name}: expected a feature and a target, found {names_listed(table.names)}")
    return tuple(found)


def _ordered(target: Target, table: Table) -> Target:
    """Give classes that came in an order of their own that order."""
    return replace(target, classes=table.classes) if set(target.classes) == set(table.classes) else target


def _missing_by_column(table: Table, names: Sequence[str]) -> dict[str, int]:
    if table.is_array:
        counts = np.isnan(table.data).sum(axis=0) if np.isnan(table.data).any() else np.zeros(table.width, int)
        labels = table.names or tuple(map(str, range(table.width)))
        return {name: int(count) for name, count in zip(labels, counts, strict=True) if count}
    counted = {name: int(columns.missing(table.column(name)).sum()) for name in names}
    return {name: count for name, count in counted.items() if count}


def _measured(
    table: Table, found: Sequence[Column], part: Any, standardize: bool
) -> tuple[Standardization, NDArray[np.float64]]:
    """Measure mean and standard deviation of each input, and what stands for a missing cell."""
    by_name = not table.is_array or bool(table.names)

    def measure(place: int) -> tuple[NDArray[np.float64], ...]:
        column = found[place]
        encoded = column.encode(table.column(column.name) if by_name else table.data[:, place])[part]
        absent = np.isnan(encoded[:, 0])
        if absent.all():
            raise DataError(f"{table.name}, column {quoted(column.name)}: no cell of the rows to train on is there")
        measured = Standardization.of_features(encoded[~absent] if absent.any() else encoded)
        fill = measured.mean
        if absent.any():
            measured = Standardization.of_features(np.where(absent[:, None], fill, encoded))
        used = np.isinf(measured.scale) | (standardize and column.kind != columns.CATEGORY)
        return np.where(used, measured.mean, 0.0), np.where(used, measured.scale, 1.0), fill

    means, scales, fills = (
        np.concatenate(parts) for parts in zip(*side_by_side(measure, range(len(found)), len(table)), strict=True)
    )
    return Standardization(means, scales), fills
