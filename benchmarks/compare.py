"""What of gpuback got slower or faster between two files of results, beyond their noise.

Machines speed up and slow down between runs and within them, for all contestants alike. So compared is not gpuback's
time but its quotient, round by round, by the geometric mean of what was measured beside it in that round: other
libraries and bare products that both files have. How far those lie apart from each other in two runs, which cannot be
gpuback's doing, says how far gpuback may. `benchmarks/shifts.py` has the statistic, `tests/test_benchmark_reports.py`
its rates of false alarms and misses: where quotients scatter by 5 %, 15 rounds are enough to see 20 %, and 8 are not
(`python -m benchmarks --families step --rounds 15`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.markdown import described, quantity
from benchmarks.results import OURS, Contestant, Results, ResultsError, Row, load, median
from benchmarks.shifts import (
    FEWEST_ROUNDS,
    Logs,
    RunToRun,
    Shift,
    run_to_run,
    shift,
    shift_and_margin_of_ranges,
    trimmed,
)  # fmt: skip
from gpuback.errors import missing_extra

LEVEL, LEVEL_TOGETHER = 0.02, 0.005
"""How often a table of unchanged rows may hold a change, one way or the other; and their mean may be one."""

RUN_TO_RUN = {"cpu": 0.015, "gpu": 0.01}
"""The least standard deviation taken for a contestant between runs of one commit, beyond what its rounds show."""

UNKNOWN = {"cpu": 0.04, "gpu": 0.02}
"""The same where too little was measured to learn it."""

ALONE = {"cpu": 0.1, "gpu": 0.02}
"""The same for times with nothing beside them: the machine's own drift is in it."""

BUSY = 1.6
"""Where what stands beside gpuback took so many times as long in one run as in the other, the machine was another one,
and quotients say nothing: threads that wait for each other suffer more than one thread does."""

SMALLEST_OF_RANGES = {"s": 0.25, "bytes": 0.1}
"""The least change that counts where it is told by ranges: three figures exceed three others once in ten times."""

Verdict = Literal["slower", "faster", "same", "unknown"]


@dataclass(frozen=True)
class Change:
    """What became of one of gpuback's contestants in a row, or in all.

    Attributes:
        before, after: medians, in the row's unit.
        shift: logarithm of how many times as long (or as many bytes) it takes.
        margin: the least |shift| that would have counted.
        pace: logarithm of how many times as long everything beside it took.
        beside: what it was measured against; or, where there is no verdict, why.
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


def compare(a: Path, b: Path) -> int:
    """Prints what changed from `a` to `b`.

    Returns:
        1 if something of gpuback got slower, needs more memory or no longer runs, else 0; 2 if the files cannot be
        compared.
    """
    try:
        before, after = load(a), load(b)
        _require_same_machine(before, after)
        changes = changes_between(before, after)
        if not changes:
            raise ResultsError(f"{a} and {b} have no row of gpuback's in common")
    except (OSError, ResultsError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    lost = list(_lost(before, after))
    print_changes(changes)
    for line in (*lost, *_differences(before, after)):
        print(line)
    return int(bool(lost) or any(change.verdict == "slower" for change in changes))


# ---- Changes


def changes_between(before: Results, after: Results) -> list[Change]:
    """Of each of gpuback's contestants in a row that both have, in the order of `after`; at last of all together."""
    pairs = _pairs(before, after)
    noise = Noise.of(before, after)
    changes = [_change(old, new, name, noise, LEVEL / 2 / len(pairs)) for old, new, name in pairs]
    return changes + _together(changes)


def _change(old: Row, new: Row, name: str, noise: Noise, tail: float) -> Change:
    names = _beside(old, new) if new.unit == "s" else []
    (q_old, pace_old), (q_new, pace_new) = (_quotients(row, name, names) for row in (old, new))
    rounds, pace = min(len(q_old), len(q_new)), pace_new - pace_old
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
    return Change(_title(new), name, new.unit, *medians, value, margin, pace, verdict, beside)


def _together(changes: Sequence[Change]) -> list[Change]:
    """One for gpuback in all rows that had something beside it: what is too small to tell in each may tell in all."""
    told = [c for c in changes if c.name == OURS and c.unit == "s" and c.pace and c.verdict != "unknown"]
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
        contestant: of the logarithm of one contestant's time, the machine's pace left out.
        alone: with it.
    """

    contestant: RunToRun
    alone: RunToRun

    @classmethod
    def of(cls, before: Results, after: Results) -> Noise:
        """Learnt from other libraries against each other, and by the clock."""
        beside, alone = [], []
        for old, new in _common_rows(before, after):
            names = _beside(old, new) if new.unit == "s" else []
            for index, name in enumerate(names):
                others = [other for other in names if other != name]
                alone += _control(old, new, name, [])
                if len(others) > 1 or (others and index == 0):  # of two, one against the other is all there is
                    beside += [control.over(_spread(len(others))) for control in _control(old, new, name, others)]
        kind = after.environment.kind
        return cls(run_to_run(beside, RUN_TO_RUN[kind], UNKNOWN[kind]), run_to_run(alone, ALONE[kind], ALONE[kind]))

    def of_quotients(self, beside: int) -> RunToRun:
        """The same of quotients by the geometric mean of so many."""
        return self.contestant.times(_spread(beside)) if beside else self.alone


def _spread(beside: int) -> float:
    """Of a quotient, where that of each contestant is 1."""
    return math.sqrt(1 + 1 / beside)


def _control(old: Row, new: Row, name: str, others: Sequence[str]) -> list[Shift]:
    """A shift that ought to be 0, if there are rounds enough."""
    (q_old, _), (q_new, _) = (_quotients(row, name, others) for row in (old, new))
    return [shift(q_old, q_new)] if min(len(q_old), len(q_new)) >= FEWEST_ROUNDS else []


def _quotients(row: Row, name: str, beside: Sequence[str]) -> tuple[Logs, float]:
    """By round, the logarithm of a contestant over the geometric mean of what ran beside it; and that mean's median.

    Of the contestant alone, and 0, if nothing ran beside it.
    """
    everyone: list[Contestant] = [row.contestants[one] for one in (name, *beside)]
    rounds = min(len(one.rounds) for one in everyone)
    figures = np.array([one.rounds[:rounds] for one in everyone])
    logs = np.log(figures[:, (figures > 0).all(axis=0)])
    if not beside or not logs.size:
        return logs[0], 0.0
    others = logs[1:].mean(axis=0)
    return logs[0] - others, float(np.median(others))


# ---- Rows of two files


def _key(row: Row) -> tuple[str, ...]:
    return row.family, row.case, row.label, row.dtype, row.unit


def _common_rows(before: Results, after: Results) -> list[tuple[Row, Row]]:
    old = {_key(row): row for row in before.rows}
    return [(old[_key(row)], row) for row in after.rows if _key(row) in old]


def _pairs(before: Results, after: Results) -> list[tuple[Row, Row, str]]:
    """Rows of both files, and which of gpuback's contestants both have in it."""
    return [
        (old, new, name)
        for old, new in _common_rows(before, after)
        for name, contestant in new.contestants.items()
        if contestant.role in ("ours", "mode") and name in old.contestants
    ]


def _beside(old: Row, new: Row) -> list[str]:
    """Other libraries and bare products of both, unless they ran with other threads or flags."""
    return [
        name for name, contestant in new.contestants.items()
        if contestant.role in ("peer", "floor")
        and name in old.contestants and old.contestants[name].setting == contestant.setting
    ]  # fmt: skip


def _require_same_machine(before: Results, after: Results) -> None:
    old, new = ((r.environment.device, r.environment.cores) for r in (before, after))
    if old != new:
        raise ResultsError(
            "figures of different machines cannot be compared: {} with {} cores and {} with {}".format(*old, *new)
        )


def _lost(before: Results, after: Results) -> Iterator[str]:
    """What of gpuback ran before and was tried in vain now."""
    for old, new in _common_rows(before, after):
        for name, contestant in old.contestants.items():
            if contestant.role in ("ours", "mode") and name in new.absent:
                yield f"No longer runs: {name}, {_title(new)}: {new.absent[name]}"


def _differences(before: Results, after: Results) -> Iterator[str]:
    """Rows and versions that only one of them has."""
    for which, one, other in (("first", before, after), ("second", after, before)):
        keys = {_key(row) for row in other.rows}
        missing = [_title(row) for row in one.rows if _key(row) not in keys]
        if missing:
            yield f"Only in the {which} file: {'; '.join(missing)}"
    old, new = ({**r.environment.versions, "BLAS": r.environment.blas} for r in (before, after))
    for name in sorted({*old, *new} - {"gpuback"}):
        if old.get(name) != new.get(name):
            yield f"Not the same: {name} {old.get(name, 'missing')} and {new.get(name, 'missing')}"
    pairs = [(old.contestants[n], new.contestants[n], n) for old, new, n in _pairs(before, after)]
    for first, second, name in dict.fromkeys((x.setting, y.setting, name) for x, y, name in pairs):
        if first != second:
            yield f"Not the same: {name} ran with {first or '–'} and {second or '–'}"


# ---- In words and tables


def print_changes(changes: Sequence[Change]) -> None:
    """A table on stdout, and a line that sums it up.

    Raises:
        MissingExtraError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        raise missing_extra("rich", "the table of changes", "cli") from None

    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    table = Table("row", "contestant", title="gpuback against what was measured beside it")
    for heading in ("before", "after", "change", "counts from"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    table.add_column("against")
    colours = {"slower": "bold red", "faster": "green", "unknown": "yellow", "same": None}
    for change in changes:
        figures = ("" if math.isnan(x) else quantity(x, change.unit) for x in (change.before, change.after))
        percents = _percent(change.shift), _percent(change.margin).lstrip("+")
        cells = [change.title, change.name, *figures, *percents, _word(change), change.beside]
        table.add_row(*map(Text, cells), style=colours[change.verdict])
    console.print(table)
    counts = {verdict: sum(change.verdict == verdict for change in changes if change.unit) for verdict in colours}
    pace = float(np.median([change.pace for change in changes if change.pace] or [0.0]))
    console.print(
        f"{counts['slower']} slower or larger, {counts['faster']} faster or smaller, {counts['same']} unchanged, "
        f"{counts['unknown']} without a verdict. What ran beside took {math.exp(pace):.2f} × as long."
    )


def _title(row: Row) -> str:
    return f"{row.family} {described(row)}, {row.dtype}"


def _word(change: Change) -> str:
    if change.verdict == "same":
        return ""
    if change.unit == "bytes":
        return {"slower": "larger", "faster": "smaller"}.get(change.verdict, change.verdict)
    return change.verdict


def _percent(logarithm: float) -> str:
    if math.isnan(logarithm):
        return "–"
    return f"{math.exp(logarithm):.0f} ×" if logarithm > math.log(4) else f"{100 * math.expm1(logarithm):+.0f} %"
