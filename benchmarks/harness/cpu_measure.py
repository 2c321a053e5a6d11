"""Rows on the CPU: contestants, each in a process of its own, are checked and take turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from benchmarks.cases import Case
from benchmarks.harness import cold_start, environment
from benchmarks.harness.contestants import Contestants
from benchmarks.harness.roofline import ceilings
from benchmarks.harness.rounds import Candidates, Effort, Ready, Rounds, Say
from benchmarks.peers import Entry, LeftOutError
from benchmarks.reports.results import Results, Row

WARM_UP, SECONDS = 0.06, 0.025
"""Seconds of a contestant's turn before the clock starts, and while it runs."""

FEWER_ROUNDS = 7
"""Most rounds of all families but training steps, which most readers come for."""


@contextlib.contextmanager
def opened(entries: Sequence[Entry], effort: Effort) -> Iterator[tuple[Results, Callable[..., None]]]:
    """Yield results without rows, and the function that fills rows. All processes end with the context."""
    variables = environment.numpy_variables()
    where = environment.of_cpu(variables)
    with Contestants(entries, variables) as contestants:
        yield Results(where, ceilings(contestants, where.cores), []), partial(measure, contestants, effort)


def measure(contestants: Contestants, effort: Effort, cases: Sequence[Case], rows: Sequence[Row], say: Say) -> None:
    """Fill the rows of cases that are measured together."""
    family = cases[0].family
    if family in cold_start.FAMILIES:
        cold_start.measure(cases, rows, contestants, effort.rounds, say)
        return
    rounds = effort.rounds if family == "step" else min(effort.rounds, FEWER_ROUNDS)
    for case, row in zip(cases, rows, strict=True):
        in_turns(case, row, contestants, Effort(rounds, effort.seconds), say)


def in_turns(
    case: Case,
    row: Row,
    contestants: Contestants,
    effort: Effort,
    say: Say,
    choose: Callable[[Candidates], Candidates] | None = None,
) -> None:
    """Make all contestants of a case ready, side by side, and run the rounds."""
    rounds = Rounds(row, choose=choose, say=say)
    say(f"{case.label}: contestants are made ready and checked")
    taking_part = [one for one in contestants.entries if case.family in one.families]
    found = contestants.prepare(taking_part, case)
    row.absent |= {one.name: "has no call for this" for one in contestants.entries if case.family in one.has_no}
    for one in taking_part:
        rounds.enter(one.name, one.role, partial(_ready, contestants, one, found[one.name]))
    rounds.run(effort)
    for one in taking_part:
        if one.name in row.contestants:
            contestants.drop(one)


def _ready(contestants: Contestants, one: Entry, settings: dict[str, str] | str) -> Ready:
    if isinstance(settings, str):
        raise LeftOutError(settings)
    return {text: partial(contestants.turn, one, choice, WARM_UP, SECONDS) for choice, text in settings.items()}
