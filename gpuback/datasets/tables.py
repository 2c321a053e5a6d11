"""Samples as they come: a table with named columns, or an array with targets beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._core.typing import Array
from gpuback._text import quoted
from gpuback.datasets import columns
from gpuback.errors import OptionError, unknown_name


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Table:
    """Samples before they are made into a network's inputs.

    Attributes:
        name: of the source, for messages.
        data: a pandas DataFrame, whose columns include the target; or an array (N, n) of real numbers.
        names: of the columns; empty for an array without names.
        y: an array's targets, (N,) or (N, k); None without any, and for a DataFrame.
        target_name: what an array's targets are called.
        classes: the labels in the order of the outputs; empty for any.
        layout: what is unusual about the file, for people.
        test: samples to test on that came with these.
    """

    name: str
    data: Any
    names: tuple[str, ...] = ()
    y: Array | None = None
    target_name: str = "y"
    classes: tuple[str, ...] = ()
    layout: str = ""
    test: Table | None = None

    def __len__(self) -> int:
        return len(self.data)

    @property
    def is_array(self) -> bool:
        """Whether the samples are an array with targets beside it."""
        return isinstance(self.data, np.ndarray)

    @property
    def width(self) -> int:
        """The number of columns."""
        return int(self.data.shape[1])

    def column(self, name: str) -> Any:
        """Return a column's cells, (N,): a Series, or an array."""
        return self.data[:, self.names.index(name)] if self.is_array else self.data[name]

    def target(self, name: str) -> Any:
        """Return the target's cells, or None where there are none."""
        if self.is_array:
            return self.y
        return self.data[name] if name in self.names else None

    def require(self, names: Iterable[str]) -> None:
        """Raise OptionError if there is no column of such a name."""
        for name in names:
            if name not in self.names:
                raise unknown_name(f"column of {self.name}", name, self.names)

    def take(self, rows: Array) -> Table:
        """Return some of the rows."""
        data = self.data[rows] if self.is_array else self.data.iloc[rows]
        return replace(self, data=data, y=None if self.y is None else self.y[rows], test=None)

    def without_missing(self, names: Collection[str]) -> tuple[Table, NDArray[np.intp]]:
        """Leave out the rows in which one of these columns (of an array: any number) is missing.

        Returns:
            (the rest, the rows that were left out).
        """
        absent = np.zeros(len(self), bool)
        if self.is_array:
            absent |= np.isnan(self.data).any(axis=1)
            if self.y is not None and self.y.dtype.kind == "f":
                absent |= np.isnan(self.y.reshape(len(self), -1)).any(axis=1)
        for name in () if self.is_array else names:
            absent |= columns.missing(self.data[name])
        left_out = np.flatnonzero(absent)
        return (self.take(np.flatnonzero(~absent)) if len(left_out) else self), left_out


def table_of(data: Any, name: str = "the data") -> Table:
    """Make a table of a DataFrame, of an array (N, n), or of a pair (x, y).

    Raises:
        OptionError: it is something else, or two columns have one name.
    """
    if isinstance(data, Table):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], str):
        x, y = data
        table = table_of(x, name)
        if not table.is_array:
            raise OptionError("data: expected a DataFrame with its target among its columns, got one beside another")
        return replace(table, y=np.asarray(y))
    if isinstance(data, np.ndarray):
        if data.ndim != 2 or data.dtype.kind not in "biuf":
            raise OptionError(f"data: expected an array (N, n) of real numbers, got {data.shape} of {data.dtype}")
        return Table(name, data if data.dtype.kind == "f" else data.astype(np.float64))
    if hasattr(data, "columns") and hasattr(data, "iloc"):
        names = tuple(str(column).strip() for column in data.columns)
        if len(set(names)) != len(names):
            raise OptionError("data: expected a DataFrame whose columns have names of their own")
        return Table(name, data.set_axis(list(names), axis=1), names)
    raise OptionError(f"data: expected a path, a DataFrame, an array or (x, y), got {type(data).__name__}")


def names_listed(names: Sequence[str], most: int = 10) -> str:
    """List names for a message."""
    return ", ".join(map(quoted, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
