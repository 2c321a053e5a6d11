"""A run: rows one after the other, the most important first, each shown and saved as soon as it is measured."""

from __future__ import annotations

import faulthandler
import itertools
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases.selection import Device, Job
from benchmarks.harness.budget import Budget
from benchmarks.harness.rounds import Effort, Say
from benchmarks.peers import CPU, GPU, GPU_STARTS, Entry, chosen
from benchmarks.reports.live_table import LiveTable
from benchmarks.reports.markdown import described, heading, page
from benchmarks.reports.report import write
from benchmarks.reports.results import Results, Row, row_of, save
from benchmarks.reports.summary import in_short

Fill = Callable[[Sequence[Any], Sequence[Row], Say], None]
"""Measures cases together, and puts their figures into the rows."""

EFFORT = {"cpu": Effort(12), "cuda": Effort(15, 4.0, warm_up=1)}
QUICK = {"cpu": Effort(5), "cuda": Effort(5, 1.0, warm_up=1)}

SECONDS = {"cpu": float("inf"), "cuda": 500.0}
"""Seconds that a run may take."""

ENTRIES: dict[Device, tuple[Entry, ...]] = {"cpu": CPU, "cuda": (*GPU, *GPU_STARTS)}


@dataclass(frozen=True)
class Options:
    """Options of a run beside its jobs.

    Attributes:
        names: contestants that take part; None for all.
        without: contestants that do not take part.
        outside: contestants from other modules.
        rounds: number in place of `EFFORT`'s or `QUICK`'s.
        seconds: limit in place of `SECONDS`.
        quick: whether to make few rounds, without contestants that PyTorch compiles.
    """

    device: Device = "cpu"
    names: Sequence[str] | None = None
    without: Sequence[str] = ()
    outside: Sequence[Entry] = field(default_factory=tuple)
    rounds: int | None = None
    seconds: float | None = None
    quick: bool = False

    def entries(self) -> tuple[Entry, ...]:
        known = chosen(ENTRIES[self.device], self.names, self.without, quick=self.quick)
        return (*known, *self.outside)

    def effort(self) -> Effort:
        usual = (QUICK if self.quick else EFFORT)[self.device]
        # Rounds that were asked for are made, however long they take.
        return usual if self.rounds is None else Effort(self.rounds, warm_up=usual.warm_up)


class Stopped(SystemExit):
    """The run was asked to end. Its figures so far stay."""


def run(planned: Sequence[Job], options: Options, path: Path, console: Console) -> int:
    """Measure, show and save rows. At the end, and when stopped, write the page beside `path`.

    Returns:
        1 if gpuback failed in a row, else 0; 2 if there is no such device.
    """
    seconds = SECONDS[options.device] if options.seconds is None else options.seconds
    budget = Budget(seconds)
    missing = why_not(options.device)
    if missing:
        print(missing, file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, stop)
    with _opened(options, budget) as (results, fill):
        console.print(heading(results), soft_wrap=True)
        save(path, results)
        try:
            left_out = measure(planned, fill, budget, results, path, lambda family: LiveTable(console, family, results))
            for job in left_out:
                console.print(f"left out for lack of time: {title(job)}", soft_wrap=True)
        finally:
            write(path.with_suffix(".md"), page(results))
    failed = failures(results, options)
    for failure in failed:
        console.print(f"FAILED: {failure}", soft_wrap=True)
    console.print(in_short(results), soft_wrap=True)
    return 1 if failed else 0


def why_not(device: Device) -> str | None:
    """Explain why there can be no run on a device."""
    if device == "cpu":
        return None
    import gpuback

    status = gpuback.backends()["cupy"]
    return None if status.available else status.reason


def _opened(options: Options, budget: Budget) -> AbstractContextManager[tuple[Results, Fill]]:
    if options.device == "cpu":
        from benchmarks.harness import cpu_measure

        return cpu_measure.opened(options.entries(), options.effort())
    faulthandler.enable()
    from benchmarks.harness import gpu_measure  # needs CuPy

    return gpu_measure.opened(options.entries(), options.effort(), budget)


def measure(
    planned: Sequence[Job],
    fill: Fill,
    budget: Budget,
    results: Results,
    path: Path,
    table_of: Callable[[str], AbstractContextManager[LiveTable]],
) -> list[Job]:
    """Measure one job after the other, and save all rows after each.

    Returns:
        Jobs for which there was no time.
    """
    left_out = []
    for family, group in itertools.groupby(planned, key=lambda job: job.family):
        with table_of(family) as table:
            for job in group:
                if not budget.fits(family):
                    left_out.append(job)
                    continue
                rows = [row_of(case) for case in job.cases]
                table.add(*rows)
                with budget.spending(family):
                    fill(job.cases, rows, table.say)
                results.rows += rows
                save(path, results)
                table.finish(*rows)
    return left_out


def title(job: Job) -> str:
    case = job.cases[0]
    return f"{case.family} {case.label}, {case.dtype}"


def failures(results: Results, options: Options) -> list[str]:
    """List the rows in which gpuback, or gpuback with an option, should have been measured and was not."""
    ours = {one.name for one in options.entries() if one.role in ("ours", "mode")}
    return [
        f"{row.family} {described(row)}, {row.dtype}: {name}: {why}"
        for row in results.rows
        for name, why in row.absent.items()
        if name in ours and not why.startswith("left out")
    ]


def stop(*_: Any) -> None:
    """Handle SIGTERM."""
    raise Stopped("stopped")
