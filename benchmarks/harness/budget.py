"""Seconds that a run may take, and what still fits into them."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from benchmarks.peers import GPU_STARTS

REMEMBERED = 2
"""How many of a kind are looked back on: they come in an order in which neighbours take about as long."""


COMPILING = "compiling"
"""What PyTorch takes to compile: ten times as long as all else in a row."""


def start_of(name: str) -> str:
    """The start of a contestant, as a budget calls it."""
    return f"start of {name}"


GUESSES = {
    **{"layer": 8.0, "step": 15.0, "host": 6.0, "loss": 8.0, "device-memory": 15.0, "reproducible": 8.0},
    **{"startup": 25.0, "fit": 15.0, "memory": 15.0, COMPILING: 15.0},
    **{start_of(one.name): 90.0 if "compiled" in one.variant else 25.0 for one in GPU_STARTS},
}
"""Seconds for a row of a family, or for a part of it, before there was any."""


class Budget:
    """Counts from when it is made.

    Args:
        seconds: in all.
        guesses: seconds for one of a kind, before there was any.
        clock: seconds from some moment on.
    """

    def __init__(
        self, seconds: float, guesses: dict[str, float] = GUESSES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self._guesses, self._clock = guesses, clock
        self._started = clock()
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._spent: dict[str, float] = defaultdict(float)

    @property
    def left(self) -> float:
        return self.seconds - (self._clock() - self._started)

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
