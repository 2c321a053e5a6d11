"""Turns, and the seconds that a run may take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.gpu_cases import TINY

from benchmarks.cases import LeftOutError
from benchmarks.harness.budget import Budget
from benchmarks.harness.rounds import Effort, Rounds, one_for_all
from benchmarks.reports.results import row_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_remembers_what_things_take() -> None:
    clock = Clock()
    budget = Budget(100.0, {"a": 30.0, "b": 60.0}, clock)
    assert budget.fits("a") and budget.fits("b") and budget.fits("a", share=0.1)
    for seconds in (50.0, 5.0, 7.0):
        with budget.spending("a"):
            clock.now += seconds
    assert budget.left == pytest.approx(38.0)
    assert budget.expected("a") == pytest.approx(6.0)  # of the last two
    assert budget.fits("a") and not budget.fits("b")
    assert budget.fits("a", share=0.63) and not budget.fits("a", share=0.62)
    clock.now += 33.0
    assert not budget.fits("a")


def rounds(**options: Any) -> tuple[Rounds, list[int]]:
    recovered: list[int] = []
    return Rounds(row_of(TINY["layer"]), lambda: recovered.append(1), **options), recovered


def ready(**settings: Iterator[float]) -> Callable[[], Any]:
    return lambda: {name: figures.__next__ for name, figures in settings.items()}


def failing() -> Any:
    raise RuntimeError("no\nluck")


def test_contestants_take_turns_after_a_warm_up() -> None:
    one, _ = rounds()
    one.enter("a", "ours", ready(fast=iter([9.0, 1.0, 2.0, 3.0])))
    one.enter("b", "peer", ready(slow=iter([9.0, 4.0, 5.0, 6.0])))
    one.run(Effort(3, warm_up=1))
    assert {name: x.rounds for name, x in one.row.contestants.items()} == {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert one.row.contestants["b"].setting == "slow"


def test_a_peer_that_raises_is_absent_and_ends_nothing() -> None:
    one, recovered = rounds()
    one.enter("a", "ours", ready(x=itertools.repeat(1.0)))
    one.enter("b", "peer", failing)
    one.enter("c", "peer", ready(x=iter([1.0, 1.0])))
    row = one.row

    def gone() -> Any:
        raise LeftOutError("not installed")

    one.enter("d", "peer", gone)
    one.run(Effort(5))
    assert row.absent == {"b": "RuntimeError: no luck", "c": "StopIteration", "d": "not installed"}
    assert {name: len(x.rounds) for name, x in row.contestants.items()} == {"a": 5} and len(recovered) == 3


def test_rounds_end_when_a_row_has_had_its_time() -> None:
    one, _ = rounds()
    one.enter("a", "ours", ready(x=itertools.repeat(1.0)))
    one.run(Effort(50, 0.0, warm_up=1))
    assert len(one.row.contestants["a"].rounds) == 3


def settings(**options: Any) -> dict[str, str]:
    """The settings that two contestants go on with: one is faster with 2 threads, the other far faster with 1."""
    one, _ = rounds(**options)
    one.enter("a", "ours", ready(two=itertools.repeat(1.0), one=itertools.repeat(1.2)))
    one.enter("b", "ours", ready(two=itertools.repeat(3.0), one=itertools.repeat(1.0)))
    one.run(Effort(5))
    assert all(len(x.rounds) == 5 for x in one.row.contestants.values())
    return {name: x.setting for name, x in one.row.contestants.items()}


def test_each_goes_on_with_its_fastest_setting() -> None:
    assert settings() == {"a": "two", "b": "one"}


def test_two_commits_go_on_with_one_setting() -> None:
    assert settings(choose=one_for_all) == {"a": "one", "b": "one"}
