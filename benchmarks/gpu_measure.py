"""Rows on a GPU, family by family: contestants are checked, timed in turns or asked for their memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import cupy

from benchmarks import gpu_clock, gpu_data, gpu_oracle
from benchmarks.budget import Budget
from benchmarks.cases import Case
from benchmarks.field import Field
from benchmarks.fresh import fresh
from benchmarks.gpu_cases import COMPILING, HOST_CALLS, start_of
from benchmarks.gpu_contest import Contest, Effort, Ready
from benchmarks.peers import GPU, GPU_STARTS, Contestant, Entry, LeftOutError, made_ready
from benchmarks.results import OURS, Row, row_of
from benchmarks.results import Contestant as Measured
from benchmarks.worker import reason

COMPILING_SHARE = 0.35
"""Of a run, that PyTorch may take to compile."""

START_LIMIT = 90.0
"""Seconds for a fresh process's first steps."""

HOST_CALLS_A_TURN = 50
"""A step is 13 launches or more, and the driver's queue holds 1024."""


@dataclass
class Run:
    """What all rows of a run share.

    Attributes:
        without: contestants who do not take part.
        compiled: whether PyTorch may compile.
    """

    budget: Budget
    effort: Effort
    without: Collection[str] = ()
    compiled: bool = True

    def entries(self, family: str) -> list[Entry]:
        return [one for one in GPU if family in one.families and one.name not in self.without]


def rows_of(cases: tuple[Case, ...], run: Run) -> list[Row]:
    """The rows of cases that are measured together; what they took of the GPU's memory is given back.

    Where there is no room for the exact results, there are no figures either.
    """
    measure = {"startup": starts, "device-memory": memory, "host": host}.get(cases[0].family, timed)
    try:
        return measure(cases, run)
    except Exception as error:
        gpu_clock.synchronize()  # raises if nothing more can run
        rows = [row_of(case) for case in cases]
        _leave_out(rows, OURS, reason(error))
        return rows
    finally:
        gpu_data.layer.cache_clear()
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        if gpu_clock.torch is not None:
            gpu_clock.torch.cuda.empty_cache()


# ---- In turns


def timed(cases: tuple[Case, ...], run: Run) -> list[Row]:
    """Layers, losses and steps."""
    (case,) = cases
    contest, check = Contest(row_of(case), gpu_clock.synchronize), gpu_oracle.check_of(case)
    with gpu_clock.tf32(case.dtype == "tf32"):
        for one in run.entries(case.family):
            contest.enter(one.name, one.role, functools.partial(ready, one, case, check, run))
        contest.run(run.effort)
    return [contest.row]


def ready(one: Entry, case: Case, check: gpu_oracle.Check, run: Run) -> Ready:
    """A contestant who has shown that it computes the right thing, behind a stopwatch."""
    with _compiling(one, run):
        made = checked(one, case, check)
        return clocked(one, made)


def checked(one: Entry, case: Case, check: gpu_oracle.Check) -> Contestant:
    missing = one.missing()
    if missing:
        raise LeftOutError(missing)
    for name, value in one.environment.items():
        os.environ.setdefault(name, value)
    made = made_ready(one.adapter, one.variant, case)
    results = made.check()
    if not one.checks_itself:
        check(results, one.role)
    return made


def clocked(one: Entry, made: Contestant) -> Ready:
    if one.graph:
        capture = gpu_clock.cupy_graph if one.graph == "cupy" else gpu_clock.torch_graph
        stopwatch, how = capture(made.call, made.sets), "CUDA graph"
    else:
        stopwatch, how = gpu_clock.wall_clock(made.call, made.wait), "call after call"
    return stopwatch, ", ".join(filter(None, (how, made.setting)))


@contextlib.contextmanager
def _compiling(one: Entry, run: Run) -> Iterator[None]:
    if "compiled" not in one.variant or one.missing():
        yield
        return
    if not run.compiled:
        raise LeftOutError("left out of a quick run")
    if not run.budget.fits(COMPILING, COMPILING_SHARE):
        raise LeftOutError("left out for lack of time to compile")
    with run.budget.spending(COMPILING):
        yield


# ---- What a call costs the host


def host(cases: tuple[Case, ...], run: Run) -> list[Row]:
    """The GPU is not waited for. Peers have a layer's call and a step's."""
    (case,) = cases
    variant = HOST_CALLS[case.name]
    timed_case = dataclasses.replace(case, family="layer" if variant else "step")
    contest, check = Contest(row_of(case), gpu_clock.synchronize), gpu_oracle.check_of(timed_case)
    ours = next(one for one in GPU if one.name == OURS and timed_case.family in one.families)
    entries = [dataclasses.replace(ours, variant=variant)]
    if variant in ("", "call, outputs fresh"):
        entries += [one for one in run.entries(timed_case.family) if one.role == "peer" and not one.graph]

    def enqueued(one: Entry) -> Ready:
        made = checked(one, timed_case, check)
        return gpu_clock.enqueueing(made.call, HOST_CALLS_A_TURN, made.wait), made.setting

    for one in entries:
        contest.enter(one.name, one.role, functools.partial(enqueued, one))
    contest.run(run.effort)
    return [contest.row]


# ---- Memory


def memory(cases: tuple[Case, ...], run: Run) -> list[Row]:
    """One figure each, for allocators repeat what they did."""
    (case,) = cases
    row, check = row_of(case), gpu_oracle.check_of(case)
    for one in run.entries(case.family):
        contest = Contest(row, gpu_clock.synchronize)

        def needed(one: Entry = one) -> Ready:
            checked(one, case, check)
            gc.collect()
            size = importlib.import_module(one.adapter).memory(case, one.variant)
            return lambda: size, HOW_COUNTED[one.package]

        contest.enter(one.name, one.role, needed)
        contest.run(Effort(1, 0.0))
    return [row]


HOW_COUNTED = {
    "gpuback": "a memory pool of its own",
    "torch": "the most that its tensors took at once",
    "jax": "as its compilation says",
}


# ---- Starts


def starts(cases: tuple[Case, ...], run: Run) -> list[Row]:
    """Fresh processes, in rounds: one that compiles, and one that finds what it left."""
    rows = [row_of(case) for case in cases]
    for number in range(min(run.effort.rounds, 2)):
        for one in GPU_STARTS:
            if one.name in run.without or (number and one.name not in rows[0].contestants):
                continue
            if not run.budget.fits(start_of(one.name)):
                if number == 0:
                    _leave_out(rows, one.name, "left out for lack of time")
                continue
            if "compiled" in one.variant and not run.compiled:
                _leave_out(rows, one.name, "left out of a quick run")
                continue
            with run.budget.spending(start_of(one.name)), Field([one], limit=START_LIMIT) as field:
                for found in fresh(cases, field, 1, Silent()):
                    _add(rows, found)
    return rows


def _leave_out(rows: list[Row], name: str, why: str) -> None:
    for row in rows:
        row.absent[name] = why


def _add(rows: list[Row], found: list[Row]) -> None:
    """One more round's figures."""
    for row, more in zip(rows, found, strict=True):
        for name, contestant in more.contestants.items():
            kept = row.contestants.setdefault(name, Measured([], contestant.setting, contestant.role))
            kept.rounds += contestant.rounds
        row.absent |= {name: why for name, why in more.absent.items() if name not in row.contestants}


class Silent:
    """A board that shows nothing."""

    def add(self, *rows: Row) -> None: ...

    def say(self, doing: str) -> None: ...
