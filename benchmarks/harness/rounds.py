"""Rounds of a row. Its contestants take turns, in a new order in each round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness.processes import reason
from benchmarks.peers import Role, nothing
from benchmarks.reports.results import Figures, Row, p20

FEWEST_ROUNDS = 3

TRIALS = 3
"""Rounds after which a contestant goes on with its fastest setting alone. They lie seconds apart, so that a moment in
which others use the cores does not decide."""

CLEARLY = 0.95
"""Share of the first setting's time. Another setting must take less than that to replace it."""

Ready = Mapping[str, Callable[[], float]]
"""Setting, in words → takes a turn with it and returns its figure: seconds a call, or bytes."""

Say = Callable[[str], object]
"""Reports progress."""


@dataclass(frozen=True)
class Effort:
    """Limits on the measurement of a row.

    Attributes:
        rounds: most rounds.
        seconds: time after which no round starts, once there were `FEWEST_ROUNDS`.
        warm_up: rounds before the others, without figures.
    """

    rounds: int
    seconds: float = math.inf
    warm_up: int = 0


@dataclass
class Candidate:
    """A contestant with one of its settings."""

    name: str
    turn: Callable[[], float]
    figures: Figures


Candidates = dict[str, list[Candidate]]
"""Contestant → its settings."""


class Rounds:
    """Fills a row. A contestant that raises is absent from it, with the reason.

    Args:
        row: row of the case.
        recover: called after an exception; raises if nothing more can run.
        choose: keeps one setting of each contestant after the trials.
        say: called with a description of each turn.
    """

    def __init__(
        self,
        row: Row,
        recover: Callable[[], object] = nothing,
        choose: Callable[[Candidates], Candidates] | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self.row = row
        self._recover, self._choose, self._say = recover, choose or each_fastest, say
        self._candidates: Candidates = {}

    def enter(self, name: str, role: Role, make: Callable[[], Ready]) -> None:
        """Let a contestant take part, unless making it ready raises."""
        try:
            ready = make()
        except Exception as error:
            self._lose(name, error)
        else:
            self._candidates[name] = [
                Candidate(name, turn, Figures([], setting, role)) for setting, turn in ready.items()
            ]

    def run(self, effort: Effort) -> None:
        rng, started = np.random.default_rng(0), time.perf_counter()
        for number in range(-effort.warm_up, effort.rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() - started > effort.seconds:
                break
            self._round(rng, number, effort.rounds)
            if number >= 0:
                self.row.contestants = {name: fastest(group).figures for name, group in self._candidates.items()}
            if number + 1 == min(TRIALS, effort.rounds):
                self._candidates = self._choose(self._candidates)
                self.row.contestants = {name: candidate.figures for name, (candidate,) in self._candidates.items()}

    def _round(self, rng: np.random.Generator, number: int, count: int) -> None:
        turns = [candidate for group in self._candidates.values() for candidate in group]
        for index in rng.permutation(len(turns)):
            candidate = turns[index]
            if candidate.name not in self._candidates:
                continue
            self._say(f"{self.row.label}: round {max(number + 1, 1)} of {count}, {candidate.name}")
            try:
                figure = candidate.turn()
            except Exception as error:
                self._lose(candidate.name, error)
                continue
            if number >= 0:
                candidate.figures.rounds.append(figure)

    def _lose(self, name: str, error: Exception) -> None:
        self._candidates.pop(name, None)
        self.row.contestants.pop(name, None)
        self.row.absent[name] = reason(error)
        self._recover()


def fastest(candidates: Sequence[Candidate]) -> Candidate:
    """Pick the setting that is fastest in quiet moments, or the first unless another is clearly faster."""
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda one: p20(one.figures) * (CLEARLY if one is candidates[0] else 1.0))


def each_fastest(candidates: Candidates) -> Candidates:
    return {name: [fastest(group)] for name, group in candidates.items()}


def one_for_all(candidates: Candidates) -> Candidates:
    """Pick the same setting for every contestant: the one with which they take the least time together."""
    by_setting = [{one.figures.setting: one for one in group} for group in candidates.values()]
    common = [setting for setting in by_setting[0] if all(setting in one for one in by_setting)] if by_setting else []
    if not common:
        return each_fastest(candidates)

    def together(setting: str) -> float:
        product = math.prod(p20(one[setting].figures) for one in by_setting)
        return product * (CLEARLY if setting == common[0] else 1.0)

    best = min(common, key=together)
    return {name: [one[best]] for name, one in zip(candidates, by_setting, strict=True)}
