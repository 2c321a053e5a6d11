"""Real data sets as NumPy arrays: tables (.csv, .tsv, Parquet), .npz and IDX (MNIST's) files, scikit-learn's sets.

`load` makes arrays of a source at once. A `Schema` does the same again for other data, standardizes, turns outputs into
class names or quantities, and is saved with the network. Errors name the line and column, the byte or the row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpuback._core.typing import PathLike
from gpuback.datasets import sources
from gpuback.datasets.idx import read_idx, write_idx
from gpuback.datasets.schema import Schema
from gpuback.datasets.sources import BUILT_IN
from gpuback.errors import DataError, OptionError

__all__ = ["BUILT_IN", "Dataset", "Schema", "load", "read_idx", "write_idx"]


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Dataset:
    """Samples and their targets.

    Attributes:
        name: the built-in name, or the file's.
        x: (N, n_features) float32 or float64, C-contiguous, finite.
        y: classification: (N,) int64, labels from 0 on. Regression: (N,) or (N, outputs), float32 or float64, finite.
        feature_names: one for each column of x, or empty.
        target_names: of the classes or outputs, or empty.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """The task: "classification" if y holds integers, else "regression"."""
        return "classification" if self.y.dtype.kind in "iu" else "regression"

    @property
    def n_classes(self) -> int:
        """The largest label + 1.

        Raises:
            DataError: the data are for regression.
        """
        if self.task == "regression":
            raise DataError(
                f"{self.name}: expected labels to count classes, found a regression target ({self.y.dtype})"
            )
        return int(self.y.max()) + 1


def load(
    source: PathLike,
    *,
    target: str | None = None,
    labels: PathLike | None = None,
    task: str | None = None,
    drop: Sequence[str] = (),
    missing: str | None = None,
    separator: str | None = None,
    decimal: str | None = None,
    max_bytes: int | None = None,
) -> Dataset:
    """Load a data set.

    Args:
        source: a name (breast_cancer, diabetes, digits, iris, wine), or the path of
            a table with a header row (.csv, .tsv, .txt; UTF-8), gzipped or not, or "-" for stdin;
            a Parquet file, if pyarrow is installed;
            an .npz file with arrays x (N, …) and y, or Keras's x_train and y_train;
            an IDX file of images, gzipped or not, under any name.
        target: tables only: the name of the target's column; the last by default.
        labels: IDX only: the file of labels; by default it is looked for beside the images under MNIST's naming.
        task, drop, missing: as `Schema.fit`'s.
        separator, decimal: delimited text only: what divides cells, and the decimal mark, "." or ",". None finds them
            in the first lines.
        max_bytes: how much a compressed file (.npz, gzipped text or IDX) may unpack to. None: 256 MiB or, if that is
            more, 20 times the file's size.

    Returns:
        The data set. Values are as stored, but for digits (divided by 16) and IDX images of unsigned bytes (divided
        by 255, float32). Texts are one-hot columns. x with more than two axes is flattened to (N, n_features).

    Raises:
        UnknownSourceError: no such name and no such file.
        OptionError: an option cannot apply, or names no column or file; max_bytes is no integer ≥ 1.
        FileFormatError: the file is malformed.
        DataError: the data cannot be trained on: a column of dates or identifiers, missing cells, infinite numbers, no
            rows, lengths that differ, one class only, more than max_bytes, or more than there is memory for.
        LabelError: there are absurdly many classes.
        MissingExtraError: a table without pandas, a Parquet file without pyarrow, a built-in set without scikit-learn.
    """
    table = sources.read(source, labels=labels, separator=separator, decimal=decimal, max_bytes=max_bytes)
    if table.is_array and table.y is None and table.target_name == "label":
        raise OptionError(sources.no_labels(os.fspath(source)))
    if missing == "mean":
        fill = Schema.fit(table, target=target, task=task, drop=drop, missing=missing).fill
    schema, table, y = Schema.plan(table, target=target, task=task, drop=drop, missing=missing)
    schema = replace(schema, fill=fill) if missing == "mean" else schema
    x = schema.encode(table, table.data.dtype if table.is_array else np.float64)
    if schema.task == "regression":
        names: tuple[str, ...] = () if table.is_array else (schema.target.name,)
        y = y.astype(table.y.dtype, copy=False) if table.y is not None else y
        y = y if table.y is not None and table.y.ndim == 2 else y[:, 0]
    else:
        names = tuple(map(str, schema.classes))
    return Dataset(table.name, x, y, schema.input_names, names)
