"""Rows whose figures come from fresh processes: the times of a start, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import Case
from benchmarks.cases.selection import CACHED_START
from benchmarks.harness.contestants import Contestants
from benchmarks.harness.rounds import Say
from benchmarks.peers import Entry
from benchmarks.reports.results import Figures, Row

FAMILIES = ("startup", "memory")

ROUNDS = {"startup": 2, "memory": 1}
"""Most rounds. Each process costs seconds."""

SIDE_BY_SIDE = {"startup": 1, "memory": 2}
"""Processes at a time. The memory of one does not depend on the others."""

LONG = 10.0
"""Seconds. A contestant that needs longer for a first step has one round."""


def measure(cases: Sequence[Case], rows: Sequence[Row], contestants: Contestants, rounds: int, say: Say) -> None:
    """Fill the rows of one network. All parts of its start come from the same processes."""
    family = cases[0].family
    ready = [one for one in contestants.entries if family in one.families]
    for number in range(min(rounds, ROUNDS[family])):
        for first in range(0, len(ready), SIDE_BY_SIDE[family]):
            batch = ready[first : first + SIDE_BY_SIDE[family]]
            say(f"{cases[0].label}: round {number + 1}, {', '.join(one.name for one in batch)}")
            one_round(cases, rows, contestants, batch)
        ready = [one for one in ready if one.name in rows[0].contestants and not _takes_long(rows, one)]


def one_round(cases: Sequence[Case], rows: Sequence[Row], contestants: Contestants, batch: Sequence[Entry]) -> None:
    """Add a figure to each row, from processes side by side."""
    answers = _start(batch, cases, contestants)
    for one in batch:
        answer = answers[one.name]
        for row in rows:
            if isinstance(answer, str):
                row.contestants.pop(one.name, None)
                row.absent[one.name] = answer
            else:
                figures = row.contestants.setdefault(one.name, Figures([], answer["setting"], one.role))
                figures.rounds.append(answer["memory" if row.unit == "bytes" else row.case])


def _start(batch: Sequence[Entry], cases: Sequence[Case], contestants: Contestants) -> dict[str, dict[str, Any] | str]:
    """Start processes, for a start with an empty cache; if asked for, again with the cache that they leave."""
    cache = contestants.new_cache() if cases[0].family == "startup" else None
    answers = contestants.start(batch, cases[0], cache)
    if any(case.name == CACHED_START for case in cases):
        for name, again in contestants.start(batch, cases[0], cache).items():
            answer = answers[name]
            if isinstance(answer, str) or isinstance(again, str):
                answers[name] = answer if isinstance(answer, str) else again
            else:
                answer[CACHED_START] = again["first step"]
    return answers


def _takes_long(rows: Sequence[Row], one: Entry) -> bool:
    return any(row.unit == "s" and row.contestants[one.name].rounds[0] > LONG for row in rows)
