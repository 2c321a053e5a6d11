"""Changes of gpuback from one run to another, beyond their noise.

Machines speed up and slow down between runs and within them, for all contestants alike. So gpuback's time is divided,
round by round, by the geometric mean of the times beside it in that round: other libraries and bare products that both
runs have. These are divided by each other in the same way. gpuback cannot change those quotients, so their change from
run to run is noise, and gpuback's must exceed it. `significance.py` has the statistic, `tests/benchmarks` its rates of
false alarms and misses: where quotients scatter by 5 %, 15 rounds are enough to see 20 %, and 8 are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from benchmarks.reports.markdown import described
from benchmarks.reports.results import OURS, Figures, Results, Row, median
from benchmarks.reports.significance import (
    FEWEST_ROUNDS,
    Logs,
    RunToRun,
    Shift,
    run_to_run,
    shift,
    shift_and_margin_of_ranges,
    trimmed,
)  # fmt: skip

LEVEL, LEVEL_TOGETHER = 0.02, 0.005
"""Probability that a table of unchanged rows shows a change, slower or faster, and that the mean of its rows does."""

RUN_TO_RUN = {"cpu": 0.015, "gpu": 0.01}
"""Least standard deviation of a contestant between runs of one commit, beyond what its rounds show."""

UNKNOWN = {"cpu": 0.04, "gpu": 0.02}
"""Standard deviation where too little was measured to learn it."""

ALONE = {"cpu": 0.1, "gpu": 0.02}
"""Standard deviation of times with nothing beside them, which includes the machine's own drift."""

BUSY = 1.6
"""Factor on the times beside gpuback, from one run to the other, above which there is no verdict. The machine was busy,
and threads that wait for each other suffer more than one thread does."""

SMALLEST_OF_RANGES = {"s": 0.25, "bytes": 0.1}
"""Least change that counts where ranges are compared: three figures exceed three others once in ten times."""

NAMED_BY = " by OPENBLAS_CORETYPE"
"""Part of an environment's BLAS where the variable chose the kernels."""

Verdict = Literal["slower", "faster", "same", "unknown"]


@dataclass(frozen=True)
class Change:
    """The change of one of gpuback's contestants, in a row or in all rows.

    Attributes:
        before, after: medians, in the row's unit.
        shift: logarithm of how many times as long (or as many bytes) it takes.
        margin: the least |shift| that would have counted.
        pace: logarithm of how many times as long everything beside it took; NaN if nothing ran beside it.
        beside: contestants that it was measured against, or why there is no verdict.
    """

    title: str
    name: str
    unit: str
    before: float
    after: float
    shift: float
    margin: float
    pace: float
    verdict: Verdict
    beside: str


def changes_between(before: Results, after: Results, noise: Noise | None = None) -> list[Change]:
    """List the changes of gpuback's contestants in rows of both runs, in the order of `after`; at last of all together.

    Args:
        before, after: the two runs.
        noise: noise between them; by default it is learnt from the contestants beside gpuback.
    """
    pairs = pairs_of(before, after)
    noise = noise or Noise.of(before, after)
    changes = []
    for old, new, name in pairs:
        change = _change(old, new, name, noise, LEVEL / 2 / len(pairs))
        other_blas = _other_blas(before, after, old, new, name)
        changes.append(replace(change, verdict="unknown", beside=other_blas) if other_blas else change)
    return changes + _together(changes)


def _other_blas(before: Results, after: Results, old: Row, new: Row, name: str) -> str:
    """Describe how BLAS differs between two times on a CPU, which then say nothing about gpuback; "" if it does not."""
    if after.environment.kind != "cpu" or new.unit != "s":
        return ""
    first, second = old.contestants[name].setting, new.contestants[name].setting
    if _without_variables(first) != _without_variables(second):
        return f"another BLAS: {first} and {second}"
    kernels = [run.environment.blas.partition(", ")[2] for run in (before, after)]
    if kernels[0].replace(NAMED_BY, "") != kernels[1].replace(NAMED_BY, ""):
        return f"another BLAS: {kernels[0]} and {kernels[1]}"
    return ""


def _without_variables(setting: str) -> list[str]:
    """List a setting's parts without environment variables, whose effect the other parts show."""
    return [part for part in setting.split(", ") if "=" not in part]


def _change(old: Row, new: Row, name: str, noise: Noise, tail: float) -> Change:
    names = _beside(old, new) if new.unit == "s" else []
    (q_old, pace_old), (q_new, pace_new) = (_quotients(row, name, names) for row in (old, new))
    rounds, pace = min(len(q_old), len(q_new)), pace_new - pace_old if names else math.nan
    if rounds == 0:
        value, margin = math.nan, math.nan
    elif rounds < FEWEST_ROUNDS or new.unit == "bytes":
        value, margin = shift_and_margin_of_ranges(q_old, q_new, SMALLEST_OF_RANGES[new.unit])
    else:
        found = shift(q_old, q_new)
        value, margin = found.value, found.margin(noise.of_quotients(len(names)), tail)
    verdict, beside = _verdict(value, margin), ", ".join(names) if len(names) < 3 else f"{len(names)} others"
    if rounds == 0:
        verdict, beside = "unknown", "some figures are 0"
    elif abs(pace) > math.log(BUSY):
        verdict, beside = "unknown", f"busy: what ran beside took {math.exp(pace):.2f} × as long"
    elif not beside:
        beside = "the clock alone" if new.unit == "s" else "bytes counted"
    medians = median(old.contestants[name]), median(new.contestants[name])
    return Change(title_of(new), name, new.unit, *medians, value, margin, pace, verdict, beside)


def _together(changes: Sequence[Change]) -> list[Change]:
    """Judge all rows that had something beside gpuback together, since each may change too little to tell."""
    told = [
        c for c in changes if c.name == OURS and c.unit == "s" and not math.isnan(c.pace) and c.verdict != "unknown"
    ]
    if len(told) < FEWEST_ROUNDS:
        return []
    every = Shift(*trimmed(np.array([change.shift for change in told])))
    margin = every.margin(RunToRun(min(RUN_TO_RUN.values()), math.inf), LEVEL_TOGETHER / 2)
    pace = float(np.median([change.pace for change in told]))
    verdict, beside = _verdict(every.value, margin), f"{len(told)} rows"
    return [Change("all together", OURS, "", math.nan, math.nan, every.value, margin, pace, verdict, beside)]


def _verdict(value: float, margin: float) -> Verdict:
    return "slower" if value > margin else "faster" if value < -margin else "same"


@dataclass(frozen=True)
class Noise:
    """Standard deviations between runs of one commit, beyond what their rounds show.

    Attributes:
        contestant: deviation of the logarithm of one contestant's time, without the machine's pace.
        alone: the same with the machine's pace.
    """

    contestant: RunToRun
    alone: RunToRun

    @classmethod
    def of(cls, before: Results, after: Results) -> Noise:
        """Learn from other libraries against each other, and by the clock."""
        beside, alone = [], []
        for old, new in common_rows(before, after):
            names = _beside(old, new) if new.unit == "s" else []
            for index, name in enumerate(names):
                others = [other for other in names if other != name]
                alone += _control(old, new, name, [])
                if len(others) > 1 or (others and index == 0):  # two have only one quotient
                    beside += [control.over(_spread(len(others))) for control in _control(old, new, name, others)]
        kind = after.environment.kind
        return cls(run_to_run(beside, RUN_TO_RUN[kind], UNKNOWN[kind]), run_to_run(alone, ALONE[kind], ALONE[kind]))

    @classmethod
    def of_one_run(cls, kind: Literal["cpu", "gpu"]) -> Noise:
        """Assume the noise of contestants that took turns within one run."""
        return cls(RunToRun(RUN_TO_RUN[kind], math.inf), RunToRun(ALONE[kind], math.inf))

    def of_quotients(self, beside: int) -> RunToRun:
        """Scale to quotients by the geometric mean of `beside` contestants."""
        return self.contestant.times(_spread(beside)) if beside else self.alone


def _spread(beside: int) -> float:
    """Compute the deviation of a quotient, where that of each contestant is 1."""
    return math.sqrt(1 + 1 / beside)


def _control(old: Row, new: Row, name: str, others: Sequence[str]) -> list[Shift]:
    """Compute a shift that ought to be 0, if there are enough rounds."""
    (q_old, _), (q_new, _) = (_quotients(row, name, others) for row in (old, new))
    return [shift(q_old, q_new)] if min(len(q_old), len(q_new)) >= FEWEST_ROUNDS else []


def _quotients(row: Row, name: str, beside: Sequence[str]) -> tuple[Logs, float]:
    """Divide a contestant by the geometric mean beside it: logarithms by round, and the median of that mean's.

    If nothing ran beside the contestant, return its own logarithms, and 0.
    """
    everyone: list[Figures] = [row.contestants[one] for one in (name, *beside)]
    rounds = min(len(one.rounds) for one in everyone)
    figures = np.array([one.rounds[:rounds] for one in everyone])
    logs = np.log(figures[:, (figures > 0).all(axis=0)])
    if not beside or not logs.size:
        return logs[0], 0.0
    others = logs[1:].mean(axis=0)
    return logs[0] - others, float(np.median(others))


# ---- Rows of two runs


def key_of(row: Row) -> tuple[str, ...]:
    return row.family, row.case, row.label, row.dtype, row.unit


def common_rows(before: Results, after: Results) -> list[tuple[Row, Row]]:
    old = {key_of(row): row for row in before.rows}
    return [(old[key_of(row)], row) for row in after.rows if key_of(row) in old]


def pairs_of(before: Results, after: Results) -> list[tuple[Row, Row, str]]:
    """List the rows of both files, with each of gpuback's contestants that both have."""
    return [
        (old, new, name)
        for old, new in common_rows(before, after)
        for name, contestant in new.contestants.items()
        if contestant.role in ("ours", "mode") and name in old.contestants
    ]


def _beside(old: Row, new: Row) -> list[str]:
    """List other libraries and bare products of both rows, unless they ran with other threads or flags."""
    return [
        name for name, contestant in new.contestants.items()
        if contestant.role in ("peer", "floor")
        and name in old.contestants and old.contestants[name].setting == contestant.setting
    ]  # fmt: skip


def title_of(row: Row) -> str:
    return f"{row.family} {described(row)}, {row.dtype}"
