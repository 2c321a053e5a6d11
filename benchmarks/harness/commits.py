"""Two commits as contestants of one run: every round times both, with the same BLAS kernels and threads."""

from __future__ import annotations

import dataclasses
import io
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.cases import Case
from benchmarks.cases.selection import Job
from benchmarks.harness import cold_start, cpu_measure, environment, run
from benchmarks.harness.budget import Budget
from benchmarks.harness.contestants import Contestants
from benchmarks.harness.processes import ROOT
from benchmarks.harness.rounds import Effort, Say, one_for_all
from benchmarks.peers import OURS, Entry
from benchmarks.reports.changes import Noise
from benchmarks.reports.compare import judge
from benchmarks.reports.live_table import LiveTable
from benchmarks.reports.results import Figures, Results, Row

FAMILIES = ("layer", "step", "fit", "startup", "memory")
"""Families that run with public calls alone, which earlier commits have too."""

ROUNDS = 15

WORKING_TREE = "."

REPOSITORY = ROOT


class CommitError(ValueError):
    """There is no such commit, or it has no `gpuback`."""


def compare_commits(
    commits: tuple[str, str], planned: Sequence[Job], rounds: int, path: Path | None, console: Console
) -> int:
    """Time two commits side by side, and print what got slower or faster from the first to the second.

    Args:
        commits: names that git understands; "." is the working tree as it is.
        planned: jobs to measure.
        rounds: turns of each commit in a row.
        path: file for every round's figures, if any.

    Returns:
        1 if something got slower, needs more memory or no longer runs, else 0.

    Raises:
        CommitError: there is no such commit, or it has no `gpuback`.
        ResultsError: nothing could be measured.
    """
    signal.signal(signal.SIGTERM, run.stop)
    with tempfile.TemporaryDirectory(prefix="gpuback-commits-") as folder:
        entries = [_entry(commit, Path(folder) / str(k)) for k, commit in enumerate(commits)]
        first, second = _told_apart(entries)
        results = measure((first, second), planned, rounds, path or Path(folder) / "results.json", console)
    before, after = as_two_runs(results, first.name, second.name)
    names = first.name.removeprefix(f"{OURS} "), second.name.removeprefix(f"{OURS} ")
    return judge(before, after, Noise.of_one_run("cpu"), names=names)


def _entry(commit: str, folder: Path) -> Entry:
    """Make a contestant with `gpuback` of a commit."""
    if commit == WORKING_TREE:
        name, checkout = "working tree", ROOT
    else:
        name, checkout = _git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}").decode().strip(), folder
        with tarfile.open(fileobj=io.BytesIO(_git("archive", name, "gpuback", "kernels"))) as archive:
            archive.extractall(folder, filter="data")
    adapter = "benchmarks.peers.gpuback_library"
    return Entry(f"{OURS} {name}", "ours", adapter, "gpuback", FAMILIES, checkout=str(checkout))


def _git(*arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, check=False)
    except FileNotFoundError:
        raise CommitError("git is not installed; without it only '.', the working tree, can be run") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise CommitError(f"git {' '.join(arguments)}: {lines[-1] if lines else 'failed'}")
    return done.stdout


def _told_apart(entries: list[Entry]) -> tuple[Entry, Entry]:
    first, second = entries
    if first.name == second.name:
        second = dataclasses.replace(second, name=f"{second.name} again")
    return first, second


def measure(entries: Sequence[Entry], planned: Sequence[Job], rounds: int, path: Path, console: Console) -> Results:
    """Measure a row for each case, with a column for each commit."""
    variables = environment.numpy_variables()
    results = Results(environment.of_cpu(variables), {}, [])
    console.print(f"{results.environment.device}; {results.environment.blas}", soft_wrap=True)
    with Contestants(entries, variables) as contestants:

        def fill(cases: Sequence[Case], rows: Sequence[Row], say: Say) -> None:
            if cases[0].family in cold_start.FAMILIES:
                cold_start.measure(cases, rows, contestants, rounds, say)
                return
            for case, row in zip(cases, rows, strict=True):
                cpu_measure.in_turns(case, row, contestants, Effort(rounds), say, one_for_all)

        run.measure(
            planned, fill, Budget(float("inf")), results, path, lambda family: LiveTable(console, family, results)
        )
    return results


def as_two_runs(results: Results, first: str, second: str) -> tuple[Results, Results]:
    """Split the figures into two runs, the first commit's and the second's.

    In both runs, the first commit also stands beside, so that quotients of times of one round are compared.
    """

    def seen(name: str) -> Results:
        rows = []
        for row in results.rows:
            contestants: dict[str, Figures] = {}
            if name in row.contestants:
                contestants[OURS] = row.contestants[name]
            if first in row.contestants:
                contestants[f"{first}, in the same round"] = dataclasses.replace(row.contestants[first], role="peer")
            absent = {OURS: row.absent[name]} if name in row.absent else {}
            rows.append(dataclasses.replace(row, contestants=contestants, absent=absent))
        return dataclasses.replace(results, rows=rows)

    return seen(first), seen(second)
