"""Combinations of parameters, where all of them would be too many."""

from collections.abc import Sequence
from typing import TypeVar

First = TypeVar("First")
Second = TypeVar("Second")

PARTNERS = 3


def in_turn(first: Sequence[First], second: Sequence[Second]) -> list[tuple[First, Second]]:
    """Pair each of the first with `PARTNERS` of the second, so that each of the second comes too."""
    apart = max(1, len(second) // PARTNERS)
    pairs = [(one, second[(i + k * apart) % len(second)]) for i, one in enumerate(first) for k in range(PARTNERS)]
    assert {other for _, other in pairs} == set(second)
    return list(dict.fromkeys(pairs))
