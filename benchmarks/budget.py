"""Seconds that a run may take, and what still fits into them."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

REMEMBERED = 2
"""How many of a kind are looked back on: they come in an order in which neighbours take about as long."""


class Budget:
    """Counts from when it is made.

    Args:
        seconds: in all.
        guesses: seconds for one of a kind, before there was any.
        clock: seconds from some moment on.
    """

    def __init__(self, seconds: float, guesses: dict[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._guesses, self._clock = guesses, clock
        self._began = clock()
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._spent: dict[str, float] = defaultdict(float)

    @property
    def left(self) -> float:
        return self.seconds - (self._clock() - self._began)

    def expected(self, kind: str) -> float:
        """Seconds for the next of a kind."""
        recent = self._recent[kind]
        return sum(recent) / len(recent) if recent else self._guesses[kind]

    def fits(self, kind: str, share: float = 1.0) -> bool:
        """Whether there is time for one more of a kind, while all of them have not taken their share of the seconds."""
        return self.expected(kind) <= self.left and self._spent[kind] < share * self.seconds

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        started = self._clock()
        try:
            yield
        finally:
            took = self._clock() - started
            self._recent[kind].append(took)
            self._spent[kind] += took
