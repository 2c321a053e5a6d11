"""Rows whose figures come from fresh processes, one after the other: how a start goes, and what memory it takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.board import Board
from benchmarks.cases import CACHED_START, Case
from benchmarks.field import Field, NotTakingPartError
from benchmarks.peers import Entry
from benchmarks.results import Contestant, Row, row_of

ROUNDS = 3
"""At most: each process costs seconds."""


def fresh(cases: Sequence[Case], field: Field, rounds: int, board: Board) -> Iterator[list[Row]]:
    """Rows of one network together: all parts of its start come from the same processes."""
    for _, group in itertools.groupby(cases, lambda case: (case.sizes, case.batch_size)):
        parts = list(group)
        rows = [row_of(case) for case in parts]
        board.add(*rows)
        ready = [one for one in field.entries if parts[0].family in one.families]
        for number in range(min(rounds, ROUNDS)):
            for one in ready:
                if one.name in rows[0].absent:
                    continue
                board.say(f"{parts[0].label}: round {number + 1}, {one.name}")
                try:
                    answer = _start(one, parts, field)
                except NotTakingPartError as reason:
                    for row in rows:
                        row.contestants.pop(one.name, None)
                        row.absent[one.name] = str(reason)
                    continue
                for row, case in zip(rows, parts, strict=True):
                    contestant = row.contestants.setdefault(one.name, Contestant([], answer["setting"], one.role))
                    contestant.rounds.append(answer["memory" if case.unit == "bytes" else case.name])
        yield rows


def _start(one: Entry, parts: Sequence[Case], field: Field) -> dict[str, Any]:
    """For a start, with nothing compiled before; then again, if that is asked for, with what the first left."""
    cache = field.new_cache() if parts[0].family == "startup" else None
    answer = field.start(one, parts[0], cache)
    if any(case.name == CACHED_START for case in parts):
        answer[CACHED_START] = field.start(one, parts[0], cache)["first step"]
    return answer
