"""What a column of a table holds, and how a network takes it: numbers, booleans, or texts as one-hot columns."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._text import quoted
from gpuback.datasets.frames import DECIMAL_COMMA, UNNAMED, require_pandas

NUMBER, BOOLEAN, CATEGORY = "number", "boolean", "category"

KINDS = {NUMBER: "numbers", BOOLEAN: "truth values", CATEGORY: "texts"}
"""What the cells of each kind are, in words."""

MAX_CATEGORIES = 100
"""Each becomes an input of the network. Columns with more texts hold names, sentences or codes."""

FEW_TEXTS = 20
"""So many different texts are categories in a small table too, where they are more than half of the rows."""

_DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ]\d{1,2}:\d{2}.*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}([T ]\d{1,2}:\d{2}.*)?"
)
_IDENTIFIER = re.compile(r"(?:.*[ _-])?(?:id|uuid|guid|index|key)|.*[a-z]I[dD]", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """A feature's column.

    Attributes:
        name: in the table.
        kind: "number", "boolean" (0 and 1), or "category": one column for each of `values`, and one for all others.
        values: of a category, in order.
    """

    name: str
    kind: str = NUMBER
    values: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many inputs of the network it becomes."""
        return len(self.values) + 1 if self.kind == CATEGORY else 1

    @property
    def input_names(self) -> tuple[str, ...]:
        """A name for each of these inputs."""
        if self.kind != CATEGORY:
            return (self.name,)
        return (*(f"{self.name}={value}" for value in self.values), f"{self.name}=(other)")

    def encode(self, cells: Any) -> NDArray[np.float64]:
        """Return a column's cells as (N, width) float64, NaN where a cell is missing.

        Raises:
            ValueError: a cell is no number, or neither true nor false.
        """
        if self.kind == CATEGORY:
            codes, found = factorize(cells)
            places = {value: place for place, value in enumerate(self.values)}
            ends = np.array([places.get(text_of(value), len(places)) for value in found], np.intp)
            encoded = np.zeros((len(codes), self.width))
            rows = np.flatnonzero(codes >= 0)
            encoded[rows, ends[codes[rows]]] = 1.0
            encoded[codes < 0] = math.nan
            return encoded
        if self.kind == BOOLEAN and not is_numeric(cells):
            codes, found = factorize(cells)
            truths = np.array([*map(truth_of, found), math.nan])
            return truths[codes][:, None]
        return numbers(cells)[:, None]


def describe(name: str, cells: Any, most_texts: int = MAX_CATEGORIES) -> Column:
    """Tell what a column holds.

    Args:
        name: of the column.
        cells: (N,).
        most_texts: how many different texts are categories.

    Raises:
        ValueError: it cannot be a feature; the message says why, in a few words.
    """
    api = require_pandas().api.types
    dtype = cells.dtype
    if name.startswith(UNNAMED):
        raise ValueError("has no name (an index?)")
    if api.is_bool_dtype(dtype):
        return Column(name, BOOLEAN)
    if api.is_complex_dtype(dtype):
        raise ValueError("holds complex numbers")
    if api.is_datetime64_any_dtype(dtype) or api.is_timedelta64_dtype(dtype):
        raise ValueError("holds dates or times")
    if is_numeric(cells):
        values = numbers(cells)
        infinite = int(np.isinf(values).sum())
        if infinite:
            raise ValueError(f"holds {infinite:,} infinite {'number' if infinite == 1 else 'numbers'}")
        if np.isnan(values).all():
            raise ValueError("is empty")
        return Column(name)
    codes, found = factorize(cells)
    if not len(found):
        raise ValueError("is empty")
    if all(isinstance(value, (bool, np.bool_)) for value in found):
        return Column(name, BOOLEAN)
    if not any(isinstance(value, str) for value in found) and all(map(_is_number, found)):
        return Column(name)
    return Column(name, CATEGORY, _categories([text_of(value) for value in found], codes, most_texts))


def _categories(texts: Sequence[str], codes: Any, most: int) -> tuple[str, ...]:
    example, rows = quoted(texts[0]), int((codes >= 0).sum())
    if all(map(_DATE.fullmatch, texts)):
        raise ValueError(f"holds dates, such as {example}")
    if sum(DECIMAL_COMMA.fullmatch(text) is not None for text in texts) > len(texts) / 2:
        raise ValueError(f"holds numbers with decimal commas, such as {example} (decimal=',')")
    others = [text for text in texts if not _is_number(text)]
    if len(others) < len(texts) / 2 and len(texts) > FEW_TEXTS:
        counted = np.bincount(codes[codes >= 0], minlength=len(texts))
        wrong = [code for code, text in enumerate(texts) if not _is_number(text)]
        raise ValueError(
            f"holds numbers, but also {int(counted[wrong].sum()):,} {'cell' if len(wrong) == 1 else 'cells'} such as"
            f" {quoted(texts[wrong[0]])}: empty them"
        )
    if len(texts) > FEW_TEXTS and len(texts) > rows / 2:
        raise ValueError(f"holds {len(texts):,} different texts in {rows:,} rows, such as {example} (an identifier?)")
    if len(texts) > most:
        raise ValueError(f"holds {len(texts):,} different texts, such as {example}, and {most:,} can be categories")
    return tuple(sorted(set(texts)))


def looks_like_identifier(name: str, cells: Any) -> bool:
    """Tell whether a column of numbers is called like an identifier, and all its cells differ."""
    if not _IDENTIFIER.fullmatch(name):
        return False
    values = numbers(cells)
    return bool((values == np.rint(values)).all() and len(np.unique(values)) == len(values) > 2)


def is_numeric(cells: Any) -> bool:
    """Tell whether cells are real numbers, by their dtype."""
    if isinstance(cells, np.ndarray):
        return cells.dtype.kind in "biuf"
    api = require_pandas().api.types
    return bool(api.is_numeric_dtype(cells.dtype) and not api.is_complex_dtype(cells.dtype))


def numbers(cells: Any) -> NDArray[np.float64]:
    """Return cells as (N,) float64, NaN where one is missing.

    Raises:
        ValueError: a cell is no number.
    """
    if isinstance(cells, np.ndarray):
        return np.asarray(cells, np.float64)
    if isinstance(cells.dtype, np.dtype) and cells.dtype.kind in "biuf":
        return np.asarray(cells.to_numpy(), np.float64)
    if is_numeric(cells):
        return np.asarray(cells.to_numpy(dtype=np.float64, na_value=math.nan))
    codes, found = factorize(cells)
    return np.array([*map(_as_number, found), math.nan])[codes]


def missing(cells: Any) -> NDArray[np.bool_]:
    """Tell which cells are missing, (N,)."""
    if isinstance(cells, np.ndarray):
        return np.isnan(cells) if cells.dtype.kind == "f" else np.zeros(len(cells), bool)
    return np.asarray(cells.isna().to_numpy())


def factorize(cells: Any) -> tuple[NDArray[np.intp], list[Any]]:
    """Return (for each cell, which of the different values it holds, −1 where it is missing; these values).

    Raises:
        ValueError: cells are lists or the like.
    """
    try:
        codes, found = require_pandas().factorize(cells)
    except TypeError:
        raise ValueError("holds cells that are neither numbers nor texts") from None
    return codes, list(found)


def text_of(value: object) -> str:
    """Return a value as a CSV file has it."""
    if isinstance(value, (float, np.floating)) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def truth_of(value: object) -> float:
    """Return 1.0 for what a table means by true, 0.0 for false."""
    text = text_of(value).lower()
    if text not in ("true", "false", "1", "0"):
        raise ValueError(f"{quoted(value)} is neither true nor false")
    return float(text in ("true", "1"))


def _as_number(value: Any) -> float:
    if isinstance(value, str) and "_" in value:  # Python reads 1_000; in a table it is a code
        raise ValueError(f"{quoted(value)} is no number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{quoted(value)} is no number") from None


def _is_number(value: Any) -> bool:
    try:
        _as_number(value)
    except ValueError:
        return False
    return True
