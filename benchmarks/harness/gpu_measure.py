"""Rows on a GPU, family by family: contestants are checked, timed in turns or asked for their memory.

All but starts share one process, so that they work on the same buffers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import cupy

from benchmarks.cases import Case, gpu_data, gpu_oracle
from benchmarks.cases.selection import HOST_CALLS
from benchmarks.harness import cold_start, environment, gpu_timing
from benchmarks.harness.budget import COMPILING, Budget, start_of
from benchmarks.harness.contestants import Contestants
from benchmarks.harness.processes import reason
from benchmarks.harness.rounds import Effort, Ready, Rounds, Say
from benchmarks.peers import GPU, OURS, Contestant, Entry, LeftOutError, made_ready
from benchmarks.reports.results import Figures, Results, Row

COMPILING_SHARE = 0.35
"""Share of a run that PyTorch may take to compile."""

START_LIMIT = 90.0
"""Seconds for a fresh process's first steps."""

HOST_CALLS_A_TURN = 50
"""Calls in a turn. A step is 13 launches or more, and the driver's queue holds 1024."""

Check = gpu_oracle.Check


@dataclass(frozen=True)
class Run:
    """State that all rows of a run share.

    Attributes:
        entries: the contestants that take part.
    """

    entries: Sequence[Entry]
    budget: Budget
    effort: Effort
    say: Say = lambda _: None

    def of_family(self, family: str) -> list[Entry]:
        return [one for one in self.entries if family in one.families]

    def rounds(self, row: Row) -> Rounds:
        return Rounds(row, recover=gpu_timing.synchronize, say=self.say)


@contextlib.contextmanager
def opened(entries: Sequence[Entry], effort: Effort, budget: Budget) -> Iterator[tuple[Results, Callable[..., None]]]:
    """Yield results without rows, and the function that fills rows."""
    run = Run(entries, budget, effort)

    def fill(cases: Sequence[Case], rows: Sequence[Row], say: Say) -> None:
        measure(cases, rows, dataclasses.replace(run, say=say))

    yield Results(environment.of_gpu(), gpu_timing.ceilings(), []), fill


def measure(cases: Sequence[Case], rows: Sequence[Row], run: Run) -> None:
    """Fill the rows of cases that are measured together, then free their memory on the GPU.

    If the exact results do not fit into memory, there are no figures.
    """
    try:
        if cases[0].family == "startup":
            starts(cases, rows, run)
            return
        fill = {"device-memory": memory, "host": host}.get(cases[0].family, timed)
        for case, row in zip(cases, rows, strict=True):
            fill(case, row, run)
    except Exception as error:
        gpu_timing.synchronize()  # raises if nothing more can run
        for row in rows:
            row.contestants.clear()
            row.absent[OURS] = reason(error)
    finally:
        free_memory()


def free_memory() -> None:
    """Free what a case took on the GPU."""
    gpu_data.layer.cache_clear()
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if gpu_timing.torch is not None:
        gpu_timing.torch.cuda.empty_cache()


# ---- In turns


def timed(case: Case, row: Row, run: Run) -> None:
    """Time layers, losses and steps."""
    rounds, check = run.rounds(row), gpu_oracle.check_of(case)
    with gpu_timing.tf32(case.dtype == "tf32"):
        for one in run.of_family(case.family):
            rounds.enter(one.name, one.role, partial(ready, one, case, check, run.budget))
        rounds.run(run.effort)


def ready(one: Entry, case: Case, check: Check, budget: Budget) -> Ready:
    """Check a contestant's results, and make its stopwatch."""
    with _time_to_compile(one, budget):
        return clocked(checked(one, case, check))


def checked(one: Entry, case: Case, check: Check) -> Contestant:
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


def clocked(made: Contestant) -> Ready:
    if made.graph:
        capture = gpu_timing.cupy_graph if made.graph == "cupy" else gpu_timing.torch_graph
        stopwatch, how = capture(made.call, made.sets), "CUDA graph"
    else:
        stopwatch, how = gpu_timing.wall_clock(made.call, made.wait), "call after call"
    return {", ".join(filter(None, (how, made.setting))): stopwatch}


@contextlib.contextmanager
def _time_to_compile(one: Entry, budget: Budget) -> Iterator[None]:
    if "compiled" not in one.variant or one.missing():
        yield
        return
    if not budget.fits(COMPILING, COMPILING_SHARE):
        raise LeftOutError("left out for lack of time to compile")
    with budget.spending(COMPILING):
        yield


# ---- Calls on the host


def host(case: Case, row: Row, run: Run) -> None:
    """Time calls on the host without waiting for the GPU. Peers have a layer's call and a step's."""
    variant = HOST_CALLS[case.name]
    timed_case = dataclasses.replace(case, family="layer" if variant else "step")
    rounds, check = run.rounds(row), gpu_oracle.check_of(timed_case)
    ours = next(one for one in GPU if one.name == OURS and timed_case.family in one.families)
    entries = [dataclasses.replace(ours, variant=variant)] if any(one.name == OURS for one in run.entries) else []
    if variant in ("", "call, outputs fresh"):
        entries += [one for one in run.of_family(timed_case.family) if one.role == "peer" and not one.variant]

    def enqueued(one: Entry) -> Ready:
        made = checked(one, timed_case, check)
        return {made.setting: gpu_timing.enqueueing(made.call, HOST_CALLS_A_TURN, made.wait)}

    for one in entries:
        rounds.enter(one.name, one.role, partial(enqueued, one))
    rounds.run(run.effort)


# ---- Memory


def memory(case: Case, row: Row, run: Run) -> None:
    """Measure memory once for each contestant, since allocators repeat what they did."""
    check = gpu_oracle.check_of(case)
    figures: dict[str, Figures] = {}

    def needed(one: Entry) -> Ready:
        checked(one, case, check)
        gc.collect()
        size = importlib.import_module(one.adapter).memory(case, one.variant)
        return {HOW_COUNTED[one.package]: lambda: size}

    for one in run.of_family(case.family):
        rounds = run.rounds(row)
        rounds.enter(one.name, one.role, partial(needed, one))
        rounds.run(Effort(1))
        figures |= row.contestants
    row.contestants = figures


HOW_COUNTED = {
    "gpuback": "a memory pool of its own",
    "torch": "the most that its tensors took at once",
    "jax": "as its compilation says",
}


# ---- Starts


def starts(cases: Sequence[Case], rows: Sequence[Row], run: Run) -> None:
    """Time fresh processes, in rounds: one that compiles, and one that finds the first one's files."""
    for number in range(min(run.effort.rounds, cold_start.ROUNDS["startup"])):
        for one in run.of_family("startup"):
            if number and one.name not in rows[0].contestants:
                continue
            if not run.budget.fits(start_of(one.name)):
                if number == 0:
                    for row in rows:
                        row.absent[one.name] = "left out for lack of time"
                continue
            run.say(f"{rows[0].label}: round {number + 1}, {one.name}")
            with run.budget.spending(start_of(one.name)), Contestants([one], limit=START_LIMIT) as contestants:
                cold_start.one_round(cases, rows, contestants, [one])
