"""Check numeric options."""

from __future__ import annotations

import math

import numpy as np

from gpuback._text import quoted
from gpuback.errors import OptionError


def number(value: object) -> float:
    """Return `value` as a Python float, NaN if it is no number. NumPy then computes in the array's own precision."""
    if not isinstance(value, (int, float, np.integer, np.floating)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer such as 10**400
        return math.inf if value > 0 else -math.inf


def in_range(name: str, value: float, lowest: float, below: float = math.inf) -> float:
    """Return `value` as a float; raise OptionError unless lowest ≤ value < below."""
    checked = number(value)
    if not lowest <= checked < below:
        upper = "" if below == math.inf else f" and < {below:g}"
        raise OptionError(f"{name}: expected a finite number ≥ {lowest:g}{upper}, got {quoted(value)}")
    return checked


def positive(name: str, value: float) -> float:
    """Return `value` as a float; raise OptionError unless 0 < value < ∞."""
    checked = number(value)
    if not 0.0 < checked < math.inf:
        raise OptionError(f"{name}: expected a finite number > 0, got {quoted(value)}")
    return checked


def count(name: str, value: object, lowest: int = 1, alternative: str = "") -> int:
    """Return `value` as an int; raise OptionError unless it is ≥ lowest. `alternative` names what else may be given."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < lowest:
        raise OptionError(f"{name}: expected an integer ≥ {lowest}{alternative}, got {quoted(value)}")
    return int(value)


def count_or_none(name: str, value: object, lowest: int = 1) -> int | None:
    """Do the same as `count`, but let None pass."""
    return None if value is None else count(name, value, lowest, " or None")
