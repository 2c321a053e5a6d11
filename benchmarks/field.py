"""Everyone who takes part in a run, each in a process of its own that is started when it is first needed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.environment import numpy_variables
from benchmarks.oracle import CheckFailedError, Oracle
from benchmarks.peers import Entry
from benchmarks.processes import Worker, WorkerError

ON_NUMPY = ("gpuback", "numpy", "sklearn")
"""Packages whose products are NumPy's."""


class NotTakingPartError(Exception):
    """Why a contestant is left out of a row."""


class Field:
    """The contestants of a run; a context, which no process outlives.

    Args:
        entries: those that take part.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self._workers: dict[str, Worker] = {}
        self._fresh: Worker | None = None
        self._numpy_variables = numpy_variables()
        self._folder = tempfile.TemporaryDirectory(prefix="gpuback-benchmark-")
        self._oracles: dict[tuple[Case, bool], Oracle] = {}

    def __enter__(self) -> Field:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        patience = 2.0 if kind is None else 0.0
        for worker in (*self._workers.values(), *([self._fresh] if self._fresh else [])):
            worker.end(patience)
        self._folder.cleanup()

    def new_cache(self) -> str:
        """A folder for what is compiled, in which there is nothing yet."""
        return tempfile.mkdtemp(dir=self._folder.name)

    def variables(self, one: Entry, cache: str | None = None) -> dict[str, str]:
        """Of a contestant's process; what it compiles stays in one folder for the whole run, or in `cache`."""
        cache = cache or f"{self._folder.name}/compiled"
        numpy = self._numpy_variables if one.package.startswith(ON_NUMPY) else {}
        compiled = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch", "GPUBACK_CACHE_DIR": f"{cache}/kernels"}
        return {**numpy, **compiled, **one.environment}

    def prepare(self, one: Entry, case: Case) -> dict[str, str]:
        """Makes a contestant ready, and holds what it computes to the oracle.

        Returns:
            Its settings to take turns with: name → all that it runs with, in words.

        Raises:
            NotTakingPartError: it is not there, it fails, or it computes something else.
        """
        missing = one.missing()
        if missing:
            raise NotTakingPartError(missing)
        try:
            results = self._file()
            self._worker(one).ask("prepare", case=case.to_json(), results=str(results))
            self.check(one, case, results)
            settings: dict[str, str] = self._worker(one).ask("choose")
            return settings
        except WorkerError as error:
            raise NotTakingPartError(str(error)) from error
        except CheckFailedError as error:
            raise NotTakingPartError(f"check failed: {error}") from error

    def turn(self, one: Entry, choice: str, settle: float, seconds: float) -> float:
        """Its time for a call, in this round, with one of its settings."""
        try:
            return float(self._worker(one).ask("turn", choice=choice, settle=settle, seconds=seconds))
        except WorkerError as error:
            raise NotTakingPartError(str(error)) from error

    def drop(self, one: Entry) -> None:
        """Frees what a case needed; of a process that is in no state to, all."""
        try:
            self._worker(one).ask("drop")
        except WorkerError:
            self._workers.pop(one.name).end(0)

    def start(self, one: Entry, case: Case, cache: str | None = None) -> dict[str, Any]:
        """What a fresh process took for its first steps; see `first_steps`.

        Raises:
            NotTakingPartError: as for `prepare`.
        """
        missing = one.missing()
        if missing:
            raise NotTakingPartError(missing)
        self._fresh = Worker(["benchmarks.first_steps", one.package, *one.arguments], self.variables(one, cache))
        try:
            results = self._file()
            answer: dict[str, Any] = self._fresh.ask("start", case=case.to_json(), results=str(results))
            self.check(one, case, results)
            return answer
        except WorkerError as error:
            raise NotTakingPartError(str(error)) from error
        except CheckFailedError as error:
            raise NotTakingPartError(f"check failed: {error}") from error
        finally:
            self._fresh.end(0)

    def check(self, one: Entry, case: Case, results: Path) -> None:
        key = case, one.corrects_epsilon
        if key not in self._oracles:
            self._oracles = {kept: oracle for kept, oracle in self._oracles.items() if kept[0] == case}
            self._oracles[key] = Oracle(case, corrects_epsilon=one.corrects_epsilon)
        with np.load(results) as arrays:
            self._oracles[key].check(arrays, one.role)
        results.unlink()

    def _worker(self, one: Entry) -> Worker:
        if one.name in self._workers and not self._workers[one.name].alive:
            self._workers.pop(one.name).end(0)
        if one.name not in self._workers:
            self._workers[one.name] = Worker(["benchmarks.worker", *one.arguments], self.variables(one))
        return self._workers[one.name]

    def _file(self) -> Path:
        return Path(self._folder.name) / "results.npz"
