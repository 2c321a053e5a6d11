"""Division of whole numbers that rounds up."""

from __future__ import annotations


def ceil_div(number: int, divisor: int) -> int:
    """Return ⌈number / divisor⌉."""
    return -(-number // divisor)


def round_up(number: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is no smaller than `number`."""
    return ceil_div(number, unit) * unit
