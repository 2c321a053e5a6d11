"""A run on the CPU: every case's contestants are made ready and checked, then take turns, round by round."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from benchmarks import blas_kernels, environment
from benchmarks.board import Board
from benchmarks.cases import Case
from benchmarks.ceilings import ceilings
from benchmarks.field import Field
from benchmarks.fresh import fresh
from benchmarks.peers import CPU, Entry
from benchmarks.processes import WorkerError
from benchmarks.results import Contestant, Results, Row, p20, row_of, save

SETTLE, SECONDS = 0.06, 0.025
"""Of a contestant before the clock starts, and while it runs."""

TRIALS = 3
"""Rounds after which a contestant goes on with its fastest setting alone. They lie seconds apart, so that no moment in
which others use the cores decides."""

CLEARLY = 0.95
"""Times as long."""

FEWER_ROUNDS = 7
"""At most, for all families but training steps, which are what everyone comes for."""

FRESH = ("startup", "memory")
"""Families whose figures come from fresh processes."""


def run(cases: Sequence[Case], rounds: int, names: Sequence[str] | None, path: Path, console: Console) -> Results:
    """Measures, shows and keeps.

    Args:
        cases: the rows, families together.
        names: of the contestants; None for all.
        path: written after each row, so that a run that is cut short leaves what it has.
    """
    named = blas_kernels.variables()
    where = environment.of_cpu(named)
    console.print(f"{where.device}, {where.cores} cores; {where.blas}; commit {where.commit or 'unknown'}")
    with Field([one for one in CPU if names is None or one.name in names], named) as field:
        results = Results(where, ceilings(field, where.cores), [])
        for family, group in itertools.groupby(cases, lambda case: case.family):
            with Board(console, family, results.ceilings) as board:
                measure = fresh if family in FRESH else interleaved
                for rows in measure(list(group), field, rounds, board):
                    results.rows += rows
                    save(path, results)
    return results


def interleaved(cases: Sequence[Case], field: Field, rounds: int, board: Board) -> Iterator[list[Row]]:
    """A row a case. In each round everyone has a turn, in an order of its own."""
    for case in cases:
        row = row_of(case)
        board.add(row)
        lanes: dict[str, list[Lane]] = {}
        board.say(f"{case.label}: contestants are made ready and checked")
        ready = field.prepare([one for one in field.entries if case.family in one.families], case)
        for one in field.entries:
            settings = ready.get(one.name, "has no call for this" if case.family in one.has_no else None)
            if isinstance(settings, str):
                row.absent[one.name] = settings
            elif settings is not None:
                lanes[one.name] = [Lane(one, name, Contestant([], text, one.role)) for name, text in settings.items()]
        rng, count = np.random.default_rng(0), rounds if case.family == "step" else min(rounds, FEWER_ROUNDS)
        for number in range(count):
            turns = [lane for group in lanes.values() for lane in group]
            for index in rng.permutation(len(turns)):
                one, choice, contestant = turns[index]
                if one.name not in lanes:
                    continue
                board.say(f"{case.label}: round {number + 1} of {count}, {one.name}")
                try:
                    contestant.rounds.append(field.turn(one, choice, SETTLE, SECONDS))
                except WorkerError as reason:
                    del lanes[one.name]
                    row.absent[one.name] = str(reason)
            row.contestants = {name: fastest(group).contestant for name, group in lanes.items()}
            if number + 1 == TRIALS:
                lanes = {name: [fastest(group)] for name, group in lanes.items()}
        for group in lanes.values():
            field.drop(group[0].entry)
        yield [row]


class Lane(NamedTuple):
    """A contestant with one of its settings."""

    entry: Entry
    choice: str
    contestant: Contestant


def fastest(lanes: Sequence[Lane]) -> Lane:
    """That of the setting that is fastest when nobody disturbs it; the first, unless another is clearly faster."""
    return min(lanes, key=lambda lane: p20(lane.contestant) * (CLEARLY if lane is lanes[0] else 1.0))
