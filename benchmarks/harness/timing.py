"""Timing of a contestant within a round."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.peers import Contestant


def turn(contestant: Contestant, warm_up: float, seconds: float) -> float:
    """Measure seconds a call, over calls that together take about `seconds`.

    The contestant starts from the case's beginning and runs for at least `warm_up` seconds before the clock starts.
    Until then, the previous contestant's threads go on spinning and take a core, and caches and clock rates are still
    those of its work. Calls follow each other without a wait, so that a library may run ahead. The clock stops when all
    work is done.
    """
    contestant.restart()
    contestant.wait()
    started, calls = time.perf_counter(), 1
    while True:
        each = timed(contestant, calls)
        if time.perf_counter() - started >= warm_up:
            break
        calls = max(1, min(2 * calls, round(seconds / each)))
    return timed(contestant, max(1, round(seconds / each)))


def percentiles(contestant: Contestant, warm_up: float, seconds: float, least: int) -> list[float]:
    """Measure the median and the 95th percentile of calls, each of which is waited for.

    The contestant starts as in `turn`. Calls go on for `seconds`, and until there were so many as `least`.
    """
    contestant.restart()
    contestant.wait()
    end = time.perf_counter() + warm_up
    while True:
        timed(contestant, 1)
        if time.perf_counter() >= end:
            break
    calls: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(calls) < least:
        calls.append(timed(contestant, 1))
    return [float(np.percentile(calls, percent)) for percent in (50, 95)]


def timed(contestant: Contestant, calls: int) -> float:
    call = contestant.call
    started = time.perf_counter()
    for _ in range(calls):
        call()
    contestant.wait()
    return max(time.perf_counter() - started, 1e-9) / calls
