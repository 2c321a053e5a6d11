"""Samples to train on and to test on, made of a source by a schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpuback._cli.tasks import class_weights, standardizes_targets, task_for
from gpuback._core.parameters import permutation
from gpuback._core.typing import Array
from gpuback._text import quoted
from gpuback._training.batches import VALIDATION_SPLIT
from gpuback.datasets import sources
from gpuback.datasets.columns import looks_like_identifier, numbers
from gpuback.datasets.schema import Schema, target_name
from gpuback.datasets.tables import Table
from gpuback.datasets.targets import CLASSIFICATION
from gpuback.errors import DataError, OptionError, require_known

HELD_OUT_SPLIT = VALIDATION_SPLIT + 1
"""Differs from VALIDATION_SPLIT, so that the test samples depend on no other shuffle."""


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Batch:
    """Samples of one purpose.

    Attributes:
        x: (N, n_inputs).
        y: as the schema makes them.
        weight: (N,), or None.
    """

    x: Array
    y: Array
    weight: Array | None

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, rows: Array) -> Batch:
        """Return some of the samples."""
        return Batch(self.x[rows], self.y[rows], None if self.weight is None else self.weight[rows])


@dataclass(frozen=True)
class Samples:
    """Samples to train on and to test on.

    Attributes:
        name: of the source.
        test: None if there are none.
        tested_on: what these are, in words: `HELD_OUT_WORDS` for a part of the source.
        notes: what was decided about the data, for people.
        warnings: what the user should know.
    """

    name: str
    schema: Schema
    training: Batch
    test: Batch | None
    tested_on: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class DataOptions:
    """The options that say how to read a source."""

    target: str | None = None
    labels: str | None = None
    task: str | None = None
    drop: Sequence[str] = ()
    missing: str | None = None
    separator: str | None = None
    decimal: str | None = None
    max_bytes: int | None = None
    test: str | None = None
    held_out: float | None = None
    sample_weight: str | None = None
    class_weight: str | None = None
    standardize: bool = True
    seed: int = 0

    def tests_elsewhere(self, table: Table) -> bool:
        """Tell whether other samples are there to test on, unless the user wants some of these."""
        if self.test is not None and self.held_out is not None:
            raise OptionError("test= and held_out= exclude each other")
        return self.test is not None or (table.test is not None and self.held_out is None)


HELD_OUT_WORDS = "held out"

HELD_OUT = 0.2
"""The fraction of the data to test on where no other data are given."""


def load_samples(
    source: str, options: DataOptions, *, loss: str | None, output: str | None, dtype: str | None, schema: Schema | None
) -> Samples:
    """Read a source, make its schema, and divide it into samples to train on and to test on.

    Args:
        source: as `datasets.load` takes it.
        options: of the command.
        loss, output, dtype: of the network, as far as the user named them.
        schema: of an earlier training that goes on; None makes a new one.
    """
    if options.class_weight is not None:
        require_known("class weight", options.class_weight, ["balanced"])
    table = _read(source, options, () if schema is None else schema.texts)
    unused = [*options.drop, *([] if options.sample_weight is None else [options.sample_weight])]
    if schema is None:
        target_name(
            table, options.target, unused
        )  # an error if it is among these, before anything is made of the table
    table.require(unused)
    if schema is not None:
        schema.require_columns(table)
        if options.sample_weight in [column.name for column in schema.columns]:
            raise OptionError(
                f"sample_weight: expected a column that the model does not take as a feature, "
                f"got {quoted(options.sample_weight)}"
            )
        schema = replace(schema, missing=options.missing or schema.missing)
    missing = options.missing if schema is None else schema.missing
    notes: list[str] = []
    if missing == "drop":
        used = [column for column in table.names if column not in options.drop]
        table, left_out = table.without_missing(used if schema is None else _used(schema, table))
        notes += [f"{len(left_out):,} rows with missing cells left out"] if len(left_out) else []
    test, part = (None, None) if options.tests_elsewhere(table) else _split(len(table), options)
    if schema is None:
        schema = Schema.fit(
            table,
            target=options.target,
            task=task_for(loss, options.task),
            drop=unused,
            missing=missing,
            standardize=options.standardize,
            standardize_target=options.standardize and standardizes_targets(loss, output),
            rows=part,
        )
    else:
        schema.require_complete(table)
    filled = sum(schema.missing_cells(table).values())
    notes += [f"{filled:,} missing {'cell' if filled == 1 else 'cells'} filled in"] if filled else []
    warnings = tuple(
        f"the column {quoted(column.name)} looks like an identifier, which cannot be learnt from: --drop {column.name}"
        for column in schema.columns
        if schema.named and not table.is_array and looks_like_identifier(column.name, table.column(column.name))
    )
    everything = _batch(table, schema, options, dtype)
    training = everything if part is None else everything.rows(part)
    held_out, tested_on = None, ""
    if test is not None:
        held_out, tested_on = everything.rows(test), HELD_OUT_WORDS
    elif options.test is not None:
        other = replace(options, labels=None)
        held_out, tested_on = _batch(_read(options.test, other, schema.texts), schema, options, dtype), options.test
    elif table.test is not None and options.held_out is None:
        held_out, tested_on = _batch(table.test, schema, options, dtype), "x_test of the file"
    if options.class_weight is not None:
        training = _balanced(training, schema)
    return Samples(table.name, schema, training, held_out, tested_on, tuple(notes), warnings)


def _read(source: str, options: DataOptions, texts: Sequence[str]) -> Table:
    table = sources.read(
        source,
        labels=options.labels,
        separator=options.separator,
        decimal=options.decimal,
        max_bytes=options.max_bytes,
        texts=texts,
    )
    if table.is_array and table.y is None:
        if table.target_name == "label":
            raise OptionError(sources.no_labels(source))
        raise DataError(f"{table.name}: expected targets to learn, found none")
    return table


def _used(schema: Schema, table: Table) -> list[str]:
    """Return the columns of features and, if there is one, of the target."""
    target = [schema.target.name] if schema.target.name in table.names else []
    return [*schema.columns_of(table), *target]


def _batch(table: Table, schema: Schema, options: DataOptions, dtype: str | None) -> Batch:
    """Make inputs, targets and weights of a table."""
    schema.require_columns(table)
    if schema.missing == "drop":
        table, _ = table.without_missing(_used(schema, table))
    schema.require_complete(table)
    y = schema.targets(table)
    if y is None:
        raise DataError(f"{table.name}: expected a target {quoted(schema.target.name)}, found none")
    weight = None
    if options.sample_weight is not None:
        table.require([options.sample_weight])
        weight = _weights(table, options.sample_weight)
    return Batch(schema.encode(table, np.float64 if dtype == "float64" else np.float32), y, weight)


def _weights(table: Table, name: str) -> Array:
    where = f"{table.name}, column {quoted(name)}"
    try:
        weight = numbers(table.column(name))
    except ValueError as error:
        raise DataError(f"{where}: expected sample weights: {error}") from None
    wrong = ~((weight >= 0) & np.isfinite(weight))
    if wrong.any() or not weight.any():
        found = f"{int(wrong.sum()):,} that are not, such as {weight[wrong][0]}" if wrong.any() else "nothing but 0"
        raise DataError(f"{where}: expected sample weights, finite numbers from 0 up, found {found}")
    return weight


def _balanced(batch: Batch, schema: Schema) -> Batch:
    if schema.task != CLASSIFICATION:
        raise OptionError(
            f"class_weight='balanced' is for classes; the target {quoted(schema.target.name)} is a quantity"
        )
    weight = class_weights(batch.y, schema.n_outputs)
    return replace(batch, weight=weight if batch.weight is None else weight * batch.weight)


def _split(count: int, options: DataOptions) -> tuple[Array | None, Array | None]:
    """(rows to test on, rows to train on); None and None for no test."""
    held_out = HELD_OUT if options.held_out is None else options.held_out
    if held_out == 0:
        return None, None
    n_test = max(1, round(held_out * count)) if 0 < held_out < 1 else count
    if n_test >= count:
        raise OptionError(
            f"held_out: expected a fraction from 0 to 1 that leaves some to train on, got {held_out:g} of {count}"
        )
    order = permutation(count, options.seed, HELD_OUT_SPLIT)
    return np.sort(order[:n_test]), np.sort(order[n_test:])
