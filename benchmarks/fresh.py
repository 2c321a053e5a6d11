"""Rows whose figures come from fresh processes, one after the other: how a start goes, and what memory it takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from benchmarks.cases import CACHED_START, Case
from benchmarks.field import Field
from benchmarks.peers import Entry
from benchmarks.results import Contestant, Row, row_of

ROUNDS = {"startup": 2, "memory": 1}
"""At most: each process costs seconds."""

SIDE_BY_SIDE = {"startup": 1, "memory": 2}
"""Processes at a time. How much memory one takes does not depend on the others."""

LONG = 10.0
"""Seconds: whoever needs longer for a first step has one round."""


class Board(Protocol):
    """Where rows are shown; see `benchmarks.board`."""

    def add(self, *rows: Row) -> None: ...

    def say(self, doing: str) -> None: ...


def fresh(cases: Sequence[Case], field: Field, rounds: int, board: Board) -> Iterator[list[Row]]:
    """Rows of one network together: all parts of its start come from the same processes."""
    family = cases[0].family
    for _, group in itertools.groupby(cases, lambda case: (case.sizes, case.batch_size)):
        parts = list(group)
        rows = [row_of(case) for case in parts]
        board.add(*rows)
        ready = [one for one in field.entries if family in one.families]
        for number in range(min(rounds, ROUNDS[family])):
            for first in range(0, len(ready), SIDE_BY_SIDE[family]):
                batch = ready[first : first + SIDE_BY_SIDE[family]]
                board.say(f"{parts[0].label}: round {number + 1}, {', '.join(one.name for one in batch)}")
                for name, answer in _start(batch, parts, field).items():
                    _note(rows, next(one for one in batch if one.name == name), answer)
            ready = [one for one in ready if one.name in rows[0].contestants and not _long(rows, one)]
        yield rows


def _start(batch: Sequence[Entry], parts: Sequence[Case], field: Field) -> dict[str, dict[str, Any] | str]:
    """For a start, with nothing compiled before; then again, if that is asked for, with what the first left."""
    cache = field.new_cache() if parts[0].family == "startup" else None
    answers = field.start(batch, parts[0], cache)
    if any(case.name == CACHED_START for case in parts):
        for name, again in field.start(batch, parts[0], cache).items():
            answer = answers[name]
            if isinstance(answer, str) or isinstance(again, str):
                answers[name] = answer if isinstance(answer, str) else again
            else:
                answer[CACHED_START] = again["first step"]
    return answers


def _note(rows: Sequence[Row], one: Entry, answer: dict[str, Any] | str) -> None:
    for row in rows:
        if isinstance(answer, str):
            row.contestants.pop(one.name, None)
            row.absent[one.name] = answer
        else:
            contestant = row.contestants.setdefault(one.name, Contestant([], answer["setting"], one.role))
            contestant.rounds.append(answer["memory" if row.unit == "bytes" else row.case])


def _long(rows: Sequence[Row], one: Entry) -> bool:
    return any(row.unit == "s" and row.contestants[one.name].rounds[0] > LONG for row in rows)
