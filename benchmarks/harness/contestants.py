"""The contestants of a run, each in a process of its own that starts when it is first needed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.cases import Case, CheckFailedError
from benchmarks.cases.oracle import Oracle
from benchmarks.harness.processes import LIMIT, ROOT, Worker, WorkerError
from benchmarks.peers import Entry

ON_NUMPY = ("gpuback", "numpy", "sklearn")
"""Packages whose products are NumPy's."""


class Contestants:
    """A context that ends the contestants' processes with it.

    Args:
        entries: contestants that take part.
        numpy_variables: environment variables of contestants whose products are NumPy's.
        limit: seconds for the first steps of a fresh process.
    """

    def __init__(
        self, entries: Sequence[Entry], numpy_variables: Mapping[str, str] | None = None, *, limit: float = LIMIT
    ) -> None:
        self.entries = tuple(entries)
        self._limit = limit
        self._workers: dict[str, Worker] = {}
        self._fresh: dict[str, Worker] = {}
        self._numpy_variables = dict(numpy_variables or {})
        self._folder = tempfile.TemporaryDirectory(prefix="gpuback-benchmark-")
        self._oracles: dict[tuple[Case, bool], Oracle] = {}

    def __enter__(self) -> Contestants:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        patience = 2.0 if kind is None else 0.0
        for worker in (*self._workers.values(), *self._fresh.values()):
            worker.end(patience)
        self._folder.cleanup()

    def new_cache(self) -> str:
        """Make an empty folder for compiled files."""
        return tempfile.mkdtemp(dir=self._folder.name)

    def variables(self, one: Entry, cache: str | None = None) -> dict[str, str]:
        """Return the variables of a contestant's process. Compiled files go into `cache`, by default the run's."""
        cache = cache or f"{self._folder.name}/compiled"
        numpy = self._numpy_variables if one.package.startswith(ON_NUMPY) else {}
        folders = {"TORCHINDUCTOR": "torch", "GPUBACK": "kernels", "CUPY": "cupy"}
        compiled = {f"{library}_CACHE_DIR": f"{cache}/{folder}" for library, folder in folders.items()}
        return {**numpy, **compiled, **one.environment}

    def prepare(self, entries: Sequence[Entry], case: Case) -> dict[str, dict[str, str] | str]:
        """Make contestants ready, side by side, and hold their results to the oracle.

        Returns:
            Contestant → its settings to take turns with (name → all that it runs with, in words), or why it cannot
            take part: it is not installed, it fails, or its results are wrong.
        """
        found: dict[str, dict[str, str] | str] = {}
        for one in entries:
            missing = one.missing()
            if missing:
                found[one.name] = missing
            else:
                self._worker(one).tell("prepare", case=case.to_json(), results=str(self._file(one)))
        told = [one for one in entries if one.name not in found]
        for one in told:
            try:
                settings = self._worker(one).answer()
                self._check(one, case)
                found[one.name] = settings
            except (WorkerError, CheckFailedError) as error:
                found[one.name] = str(error)
        return found

    def turn(self, one: Entry, choice: str, warm_up: float, seconds: float) -> float:
        """Measure a contestant's seconds a call in this round, with one of its settings.

        Raises:
            WorkerError: the contestant fails.
        """
        return float(self._worker(one).ask("turn", choice=choice, warm_up=warm_up, seconds=seconds))

    def percentiles(self, one: Entry, choice: str, warm_up: float, seconds: float, least: int) -> list[float]:
        """Measure the median and the 95th percentile of a contestant's seconds a call.

        Raises:
            WorkerError: the contestant fails.
        """
        answer = self._worker(one).ask("percentiles", choice=choice, warm_up=warm_up, seconds=seconds, least=least)
        return [float(figure) for figure in answer]

    def drop(self, one: Entry) -> None:
        """Free a case's memory, or end the process if it is in no state to do so."""
        try:
            self._worker(one).ask("drop")
        except WorkerError:
            self._workers.pop(one.name).end(0)

    def start(self, entries: Sequence[Entry], case: Case, cache: str | None = None) -> dict[str, dict[str, Any] | str]:
        """Start fresh processes, side by side.

        Returns:
            Contestant → figures of its first steps (see `cold_start_worker`), or why it cannot take part.
        """
        found: dict[str, dict[str, Any] | str] = {}
        for one in entries:
            missing = one.missing()
            if missing:
                found[one.name] = missing
            else:
                worker = self._started(one, ["cold_start_worker", one.package, *one.arguments], cache)
                self._fresh[one.name] = worker
                worker.tell("start", case=case.to_json(), results=str(self._file(one)))
        for one in entries:
            if one.name in found:
                continue
            try:
                answer = self._fresh[one.name].answer(limit=self._limit)
                self._check(one, case)
                found[one.name] = answer
            except (WorkerError, CheckFailedError) as error:
                found[one.name] = str(error)
            self._fresh.pop(one.name).end(0)
        return found

    def _check(self, one: Entry, case: Case) -> None:
        key = case, one.corrects_epsilon
        if key not in self._oracles:
            self._oracles = {known: oracle for known, oracle in self._oracles.items() if known[0] == case}
            self._oracles[key] = Oracle(case, corrects_epsilon=one.corrects_epsilon)
        with np.load(self._file(one)) as arrays:
            self._oracles[key].check(arrays, one.role)
        self._file(one).unlink()

    def _worker(self, one: Entry) -> Worker:
        if one.name in self._workers and not self._workers[one.name].alive:
            self._workers.pop(one.name).end(0)
        if one.name not in self._workers:
            self._workers[one.name] = self._started(one, ["worker", *one.arguments])
        return self._workers[one.name]

    def _started(self, one: Entry, arguments: Sequence[str], cache: str | None = None) -> Worker:
        """Start a contestant's process. With a checkout, `gpuback` comes from there and all else from this tree."""
        command, variables = [f"benchmarks.harness.{arguments[0]}", *arguments[1:]], self.variables(one, cache)
        if not one.checkout:
            return Worker(command, variables)
        empty, harness = (Path(self._folder.name) / name for name in ("empty", "harness"))
        if not harness.exists():
            empty.mkdir()
            harness.mkdir()
            os.symlink(ROOT / "benchmarks", harness / "benchmarks", target_is_directory=True)
        return Worker(command, variables, [one.checkout, str(harness)], str(empty))

    def _file(self, one: Entry) -> Path:
        """Return the path for a contestant's results, on their way to the oracle."""
        return Path(self._folder.name) / f"{one.name}.npz"
