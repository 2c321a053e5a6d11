"""Rows that are measured together: in its turn, a contestant makes a figure for each of them, one after the other.

So their quotients are of times a second apart: a step in quiet and beside busy processes, or with one thread and two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.cases import Case
from benchmarks.harness.contestants import Contestants
from benchmarks.harness.neighbours import busy
from benchmarks.harness.rounds import Effort, Rounds, Say
from benchmarks.peers import Entry, LeftOutError
from benchmarks.reports.results import Figures, Row

FAMILIES = ("busy", "threads")

ROUNDS = 5
"""Most rounds in "busy": a turn takes a second."""

QUIET, BUSY = (0.06, 0.2, 5), (0.1, 0.6, 5)
"""Seconds before calls count, seconds in which they do, and the fewest that do. Beside busy processes, a thread waits
for some milliseconds at times until it is its turn."""

WARM_UP, SECONDS = 0.06, 0.025
"""As in all other families, for "threads"."""

COUNTS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NPROC")
"""Variables that libraries take their number of threads from; JAX the last one."""


@dataclass
class Turn:
    """A contestant's turn with one of its settings.

    Attributes:
        settings: for each row, all that it runs with, in words.
        take: returns a figure for each row.
        figures: what it has returned so far.
    """

    settings: Sequence[str]
    take: Callable[[], Sequence[float]]
    figures: list[Sequence[float]] = field(default_factory=list)

    def __call__(self) -> float:
        """Return the first row's figure, which is the one that `Rounds` sees."""
        self.figures.append(self.take())
        return self.figures[-1][0]


def measure(cases: Sequence[Case], rows: Sequence[Row], contestants: Contestants, effort: Effort, say: Say) -> None:
    """Fill the rows of one network."""
    family = cases[0].family
    taking_part = [one for one in contestants.entries if family in one.families]
    processes = {one.name: [one] if family == "busy" else _by_threads(one, cases) for one in taking_part}
    every = [one for group in processes.values() for one in group]
    say(f"{rows[0].label}: contestants are made ready and checked")
    found = contestants.prepare(every, cases[0])
    turns: dict[tuple[str, str], Turn] = {}
    rounds = Rounds(rows[0], say=say)
    for one in taking_part:

        def make(one: Entry = one) -> dict[str, Turn]:
            ready = [(process, _settings(found[process.name])) for process in processes[one.name]]
            made = _beside(contestants, ready, cases) if family == "busy" else _all_threads(contestants, ready)
            turns.update({(one.name, turn.settings[0]): turn for turn in made})
            return {turn.settings[0]: turn for turn in made}

        rounds.enter(one.name, one.role, make)
    rounds.run(Effort(min(effort.rounds, ROUNDS) if family == "busy" else effort.rounds, effort.seconds))
    for index, row in enumerate(rows[1:], 1):
        row.absent |= rows[0].absent
        for name, one in rows[0].contestants.items():
            turn = turns[name, one.setting]
            row.contestants[name] = Figures(
                [figures[index] for figures in turn.figures], turn.settings[index], one.role
            )
    for one in every:
        if isinstance(found[one.name], dict):
            contestants.drop(one)


Ready = Sequence[tuple[Entry, dict[str, str]]]
"""A contestant's processes, each with its settings: name → in words."""


def _settings(found: dict[str, str] | str) -> dict[str, str]:
    if isinstance(found, str):
        raise LeftOutError(found)
    return found


def _beside(contestants: Contestants, ready: Ready, cases: Sequence[Case]) -> list[Turn]:
    """Make turns in quiet and then beside busy processes. Of a contestant's settings, the fastest in quiet is used."""
    ((one, settings),) = ready

    def take(choice: str) -> list[float]:
        quiet = contestants.percentiles(one, choice, *QUIET)
        with busy(cases[-1].beside):
            return quiet + contestants.percentiles(one, choice, *BUSY)

    return [Turn([text] * len(cases), partial(take, choice)) for choice, text in settings.items()]


def _by_threads(one: Entry, cases: Sequence[Case]) -> list[Entry]:
    """Make an entry for each number of threads: a process of its own, whose libraries all take their number from it."""
    return [
        dataclasses.replace(
            one,
            name=f"{one.name}, {case.threads}",
            environment={**one.environment, **dict.fromkeys(COUNTS, str(case.threads))},
        )
        for case in cases
    ]


def _all_threads(contestants: Contestants, ready: Ready) -> list[Turn]:
    """Make a turn in which all processes work one after the other. A process's first setting has all of its threads."""
    first = [(one, *next(iter(settings.items()))) for one, settings in ready]

    def take() -> list[float]:
        return [contestants.turn(one, choice, WARM_UP, SECONDS) for one, choice, _ in first]

    return [Turn([text for *_, text in first], take)]
