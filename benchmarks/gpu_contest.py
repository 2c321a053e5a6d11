"""A row's contestants on a GPU: each is made ready and checked, then they take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.results import Contestant, Role, Row
from benchmarks.worker import reason

FEWEST_ROUNDS = 3

Ready = tuple[Callable[[], float], str]
"""What takes a turn and gives its seconds; what it runs with, in words."""


@dataclass(frozen=True)
class Effort:
    """How long a row may be measured.

    Attributes:
        rounds: at most.
        seconds: after which there are no more, once there were `FEWEST_ROUNDS`.
    """

    rounds: int
    seconds: float


class Contest:
    """Fills a row. Whoever raises is absent from it, with the reason.

    Args:
        row: of the case.
        recover: called after an exception; raises if nothing more can run.
    """

    def __init__(self, row: Row, recover: Callable[[], object]) -> None:
        self.row = row
        self._recover = recover
        self._turns: dict[str, Callable[[], float]] = {}

    def enter(self, name: str, role: Role, make: Callable[[], Ready]) -> None:
        """Takes part, if what makes it ready does not raise."""
        try:
            self._turns[name], setting = make()
        except Exception as error:
            self._lose(name, error)
        else:
            self.row.contestants[name] = Contestant([], setting, role)

    def run(self, effort: Effort) -> None:
        """Each once to warm up, then round by round, in an order of its own in each."""
        rng, started = np.random.default_rng(0), time.perf_counter()
        for number in range(effort.rounds + 1):
            if number > FEWEST_ROUNDS and time.perf_counter() - started > effort.seconds:
                break
            names = list(self._turns)
            for index in rng.permutation(len(names)):
                name = names[index]
                try:
                    seconds = self._turns[name]()
                except Exception as error:
                    self._lose(name, error)
                    continue
                if number:
                    self.row.contestants[name].rounds.append(seconds)

    def _lose(self, name: str, error: Exception) -> None:
        self._turns.pop(name, None)
        self.row.contestants.pop(name, None)
        self.row.absent[name] = reason(error)
        self._recover()
