"""Seconds that a run may take, and whether another row fits into them."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from benchmarks.peers import GPU_STARTS

REMEMBERED = 2
"""Rows of a kind from which the next is estimated. Neighbouring rows take about as long."""


COMPILING = "compiling"
"""Kind of PyTorch's compilation, which takes ten times as long as all else in a row."""


def start_of(name: str) -> str:
    """Name the start of a contestant as a kind."""
    return f"start of {name}"


GUESSES = {
    **{"layer": 8.0, "step": 15.0, "host": 6.0, "loss": 8.0, "device-memory": 15.0, "reproducible": 8.0},
    **{"startup": 25.0, "fit": 15.0, "memory": 15.0, "busy": 60.0, "threads": 15.0, COMPILING: 15.0},
    **{start_of(one.name): 90.0 if "compiled" in one.variant else 25.0 for one in GPU_STARTS},
}
"""Seconds for a row of a family, or for a part of it, before any was measured."""


class Budget:
    """Seconds of a run, counted from when this is made.

    Args:
        seconds: seconds of the whole run.
        guesses: seconds for one of a kind, before any was measured.
        clock: returns the time in seconds.
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
        """Estimate the seconds for the next of a kind."""
        recent = self._recent[kind]
        return sum(recent) / len(recent) if recent else self._guesses[kind]

    def fits(self, kind: str, share: float = 1.0) -> bool:
        """Tell whether there is time for one more of a kind, and the kind has not taken its share of the seconds."""
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
