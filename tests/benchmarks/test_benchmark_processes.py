"""Contestants that fail, die, hang or compute something else cost their place in a row, and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import cases
from benchmarks.cases import selection
from benchmarks.cases.selection import training
from benchmarks.harness import cpu_measure, neighbours, together
from benchmarks.harness.contestants import Contestants
from benchmarks.harness.processes import ROOT, Worker, WorkerError
from benchmarks.harness.rounds import Effort
from benchmarks.peers import Entry, named
from benchmarks.reports.results import Row, row_of

ADAPTER = """
import os, sys, time
import numpy as np
from benchmarks.peers import Contestant, plain_numpy

calls = 0


def contestant(case, variant):
    if variant == "cannot":
        raise ImportError("libfancy.so: no such file")
    made = plain_numpy.contestant(case, "")
    honest, check = made.call, made.check

    def call():
        global calls
        calls += 1
        if variant == "dies" and calls > 20:
            print("something is very wrong", file=sys.stderr, flush=True)
            os.abort()
        if variant == "raises" and calls > 20:
            raise ArithmeticError("no more")
        honest()

    def results():
        found = check()
        if variant == "wrong":
            found["theta"] = found["theta"] + 1
        if variant == "not a number":
            found["theta"] = found["theta"] * np.nan
        if variant == "too little":
            del found["theta"]
        return found

    made.call, made.check, made.choices = call, results, {}
    return made
"""

OURS = ("--contestants", "gpuback", "--json", "never.json")
STEP = training(cases.network("5-7-3:16"), "step")


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "fancy_adapter.py").write_text(ADAPTER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fancy_adapter"


def row_with(adapter: str, *variants: str) -> Row:
    """Three rounds of plain NumPy beside contestants that misbehave."""
    fancy = [Entry(variant, "peer", adapter, "numpy", ("step",), variant) for variant in variants]
    row = row_of(STEP)
    with Contestants([named("plain NumPy"), *fancy]) as contestants:
        cpu_measure.measure(contestants, Effort(3), [STEP], [row], lambda _: None)
    return row


def test_who_fails_loses_its_place_and_the_reason_is_kept(adapter: str) -> None:
    row = row_with(adapter, "honest", "cannot", "dies", "raises", "wrong", "not a number", "too little")
    assert set(row.contestants) == {"plain NumPy", "honest"}
    assert all(len(one.rounds) == 3 for one in row.contestants.values())
    assert "libfancy.so" in row.absent["cannot"]
    assert "Aborted" in row.absent["dies"]
    assert "something is very wrong" in row.absent["dies"]
    assert row.absent["raises"] == "ArithmeticError: no more"
    assert row.absent["wrong"].startswith("check failed: theta is off by")
    assert row.absent["not a number"].startswith("check failed: theta is off by nan")
    assert row.absent["too little"] == "check failed: theta is missing"


def test_a_process_that_does_not_answer_is_ended() -> None:
    worker = Worker(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"], {})
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"no answer in 0\.2 s"):
        worker.ask("anything", limit=0.2)
    assert time.monotonic() - started < 20
    assert not worker.alive


def test_a_process_that_has_died_says_so_each_time() -> None:
    worker = Worker(["no_such_module_anywhere"], {})
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"exit status 1 \(.*no_such_module_anywhere"):
            worker.ask("anything")
    worker.end()


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are looked for in /proc")
@pytest.mark.parametrize(
    "how, processes, words, command",
    [
        (signal.SIGINT, 1, "benchmarks.harness.worker", [*OURS, "--families", "step"]),
        (signal.SIGINT, 2, "benchmarks.harness.worker", ["compare", "--commits", ".", ".", "--families", "step"]),
        (signal.SIGTERM, 3, "while True", [*OURS, "--families", "busy", "--busy", "3"]),
        (signal.SIGKILL, 3, "while True", [*OURS, "--families", "busy", "--busy", "3"]),
    ],
)
def test_an_interrupted_run_leaves_nothing_behind(
    how: signal.Signals, processes: int, words: str, command: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("typer")
    mark, temporary = f"GPUBACK_TEST_MARK={tmp_path}", tmp_path / "temporary"
    temporary.mkdir()
    options = ["--sizes", "5-7-3:16", "--rounds", "100000"]
    run = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *command, *options],
        cwd=tmp_path,
        env={
            **os.environ, **dict([mark.split("=", 1)]), "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary),
            "OPENBLAS_CORETYPE": "Haswell",  # no search for the fastest kernels
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    try:
        wait_until(lambda: len(processes_with(mark, words)) >= processes)
        run.send_signal(how)
        assert run.wait(timeout=30) != 0
        wait_until(lambda: not processes_with(mark, ""))
        assert how == signal.SIGKILL or not list(temporary.iterdir())
    finally:
        for pid in (*processes_with(mark, ""), run.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.wait()


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are looked for in /proc")
def test_busy_processes_end_with_the_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPUBACK_TEST_MARK", str(tmp_path))
    mark = f"GPUBACK_TEST_MARK={tmp_path}"
    with pytest.raises(ArithmeticError), neighbours.busy(2):
        assert len(processes_with(mark, "while True")) == 2
        raise ArithmeticError
    assert processes_with(mark, "while True") == []


@pytest.mark.thorough
def test_a_step_in_quiet_and_beside_busy_processes(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one turn have as many rounds, in the same setting; who is missing in one is missing in all."""
    monkeypatch.setattr(together, "QUIET", (0.001, 0.005, 5))
    monkeypatch.setattr(together, "BUSY", (0.001, 0.005, 5))
    beside: list[int] = []
    monkeypatch.setattr(together, "busy", lambda count: beside.append(count) or contextlib.nullcontext())
    cases_of_a_row = selection.busy(cases.network("5-7-3:16"), 7)
    rows = measured_together(cases_of_a_row, "busy", adapter)
    assert [row.label.split(", ", 3)[-1] for row in rows] == [
        "quiet, median", "quiet, 95th percentile", "7 busy, median", "7 busy, 95th percentile"
    ]  # fmt: skip
    for row in rows:
        assert set(row.contestants) == {"plain NumPy", "honest"}
        assert row.absent == {"cannot": "ImportError: libfancy.so: no such file"}
        assert row.contestants["plain NumPy"].setting == rows[0].contestants["plain NumPy"].setting
        assert all(len(one.rounds) == 3 and min(one.rounds) > 0 for one in row.contestants.values())
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        pairs = zip(first.contestants["honest"].rounds, second.contestants["honest"].rounds, strict=True)
        assert all(median <= slowest for median, slowest in pairs)
    assert set(beside) == {7} and len(beside) >= 6


@pytest.mark.thorough
def test_each_number_of_threads_has_a_process(adapter: str) -> None:
    (job,) = selection.jobs("cpu", ["threads"], [cases.network("5-7-3:16")], threads=[1, 2])
    rows = measured_together(job.cases, "threads", adapter)
    assert [row.label.split(", ")[-1] for row in rows] == ["1 thread", "2 threads"]
    for row, threads in zip(rows, ("1 thread", "2 threads"), strict=True):
        assert row.contestants["plain NumPy"].setting.split(", ")[0] == threads
        assert all(len(one.rounds) == 3 for one in row.contestants.values())


def measured_together(cases_of_a_row: Sequence[cases.Case], family: str, adapter: str) -> list[Row]:
    """Three rounds of plain NumPy, an adapter that works and one that cannot be made ready."""
    fancy = [Entry(variant, "peer", adapter, "numpy", (family,), variant) for variant in ("honest", "cannot")]
    rows = [row_of(case) for case in cases_of_a_row]
    with Contestants([named("plain NumPy"), *fancy]) as contestants:
        cpu_measure.measure(contestants, Effort(3), cases_of_a_row, rows, lambda _: None)
    return rows


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def processes_with(mark: str, words: str) -> list[int]:
    """Those with that variable in their environment, and those words in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found += [int(folder.name)] if words in command else []
    return found
