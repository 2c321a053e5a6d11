"""How a contestant is timed within a round, and which of its settings is the fastest."""

from __future__ import annotations

import time

from benchmarks.peers import Contestant

CHOICE_SETTLE, CHOICE_SECONDS, CHOICE_TURNS = 0.04, 0.015, 3
CLOSE = 1.2
"""Times the best setting's time, up to which another may turn out to be the better one."""


def turn(contestant: Contestant, settle: float, seconds: float) -> float:
    """Seconds a call, over calls that together take about `seconds`.

    It starts from the case's beginning and runs for at least `settle` before the clock starts: threads of those who ran
    before go on spinning for a tenth of a second and take a core from whoever comes next; caches and clock rates are
    theirs. Between calls nothing waits, so that a library may run ahead; after the last all work is done.
    """
    contestant.restart()
    contestant.wait()
    started, calls = time.perf_counter(), 1
    while True:
        each = timed(contestant, calls)
        if time.perf_counter() - started >= settle:
            break
        calls = max(1, min(2 * calls, round(seconds / each)))
    return timed(contestant, max(1, round(seconds / each)))


def timed(contestant: Contestant, calls: int) -> float:
    call = contestant.call
    started = time.perf_counter()
    for _ in range(calls):
        call()
    contestant.wait()
    return max(time.perf_counter() - started, 1e-9) / calls


def choose(contestant: Contestant) -> dict[str, str]:
    """The settings of a contestant that may be its fastest, tried in turns: name → all that it runs with, in words.

    Those that come within `CLOSE` of the best: which of them wins is for the rounds to say.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestant.choices}
    for _ in range(CHOICE_TURNS if len(seconds) > 1 else 0):
        for name, take_up in contestant.choices.items():
            take_up()
            contestant.restart()
            each = timed(contestant, 1)
            if each < CHOICE_SETTLE:
                each = turn(contestant, CHOICE_SETTLE, CHOICE_SECONDS)
            seconds[name].append(each)
    best = min((min(figures) for figures in seconds.values() if figures), default=0.0)
    likely = [name for name, figures in seconds.items() if not figures or min(figures) <= CLOSE * best]
    return {name: ", ".join(filter(None, (name, contestant.setting))) for name in likely or [""]}
