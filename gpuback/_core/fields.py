"""What a file holds, each part checked when it is taken: whoever changes a file can make its hash fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np

from gpuback._text import quoted
from gpuback.errors import FileFormatError

_MOST = 2**53
"""Counts end here: what float64 counts without a gap. Years of steps fit."""


class Fields:
    """The arrays and the metadata of a file.

    Args:
        path: the file, for messages.
        what: what the file should be, e.g. "a checkpoint of gpuback.fit".
        arrays, metadata: as `persistence.read` returned them.

    Methods raise FileFormatError, which names file and field, what was expected, and what was found.
    """

    def __init__(self, path: str, what: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
        self._path, self._what = path, what
        self._arrays, self._metadata = arrays, metadata

    def refuse(self, name: str, expected: str, found: object) -> NoReturn:
        """Raise the error for a field."""
        raise FileFormatError(f"{self._path}, {name}: expected {expected}, found {quoted(found)}")

    def value(self, name: str) -> Any:
        """Return metadata of any kind."""
        if name not in self._metadata:
            self._lacks(name)
        return self._metadata[name]

    def mapping(self, name: str) -> dict[str, Any]:
        """Return values by name."""
        value = self.value(name)
        if not isinstance(value, dict):
            self.refuse(name, "values by name", value)
        return value

    def items(self, name: str) -> list[Any]:
        """Return a list."""
        value = self.value(name)
        if not isinstance(value, list):
            self.refuse(name, "a list", value)
        return value

    def flag(self, name: str) -> bool:
        """Return True or False."""
        value = self.value(name)
        if not isinstance(value, bool):
            self.refuse(name, "True or False", value)
        return value

    def count(self, name: str, lowest: int = 0, highest: int = _MOST) -> int:
        """Return an integer in this range."""
        return self.checked_count(name, self.value(name), lowest, highest)

    def checked_count(self, name: str, value: object, lowest: int = 0, highest: int = _MOST) -> int:
        """Return `value` if it is an integer in this range."""
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            self.refuse(name, f"an integer from {lowest} to {highest}", value)
        return value

    def rate(self, name: str) -> float:
        """Return a finite number ≥ 0."""
        value = self.value(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
            self.refuse(name, "a finite number ≥ 0", value)
        return float(value)

    def array(self, name: str, shape: tuple[int, ...] | None, dtype: np.dtype[Any]) -> np.ndarray:
        """Return an array of this dtype, and of this shape; None: of one axis."""
        if name not in self._arrays:
            self._lacks(name)
        array = self._arrays[name]
        if array.dtype != dtype or (array.ndim != 1 if shape is None else array.shape != shape):
            wanted = "one axis" if shape is None else f"shape {shape}"
            raise FileFormatError(
                f"{self._path}, array {name!r}: expected {wanted} of {dtype}, found {array.shape} of {array.dtype}"
            )
        return array

    def has(self, name: str) -> bool:
        """Say whether there are such metadata."""
        return name in self._metadata

    def require_arrays(self, names: Collection[str]) -> None:
        """Refuse arrays of other names."""
        if others := sorted(set(self._arrays) - set(names)):
            raise FileFormatError(f"{self._path}: expected {self._what}, got one with an array {others[0]!r}")

    def _lacks(self, name: str) -> NoReturn:
        raise FileFormatError(f"{self._path}: expected {self._what}, got one without {name!r}")
