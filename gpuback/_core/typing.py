"""Names for the types that several modules share."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

Array: TypeAlias = Any
"""An array of a backend: `numpy.ndarray` or `cupy.ndarray`. Which one is known only at run time."""

ArrayLike: TypeAlias = Any
"""Anything that users may pass as numbers: arrays, nested sequences of numbers, anything with `__dlpack__`."""

PathLike: TypeAlias = str | os.PathLike[str]
