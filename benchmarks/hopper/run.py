"""Rows one after the other, in processes that may hang or die, each kept as a line of JSON as soon as it is made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import Worker, WorkerError
from benchmarks.hopper.rows import Row
from benchmarks.peers import GPU_MEMORY
from gpuback._cuda.hopper import SWITCH

WORKER = "benchmarks.hopper.worker"
FEWEST_SECONDS = 3.0
"""Below which no row is begun."""


class Runner:
    """Runs rows until a time is up. One process runs gpuback with the kernels for Hopper, another all else.

    A row that raises or hangs costs its process, and the next row gets a new one. A row whose result is wrong does not.

    Args:
        log: file to which a line is appended for each row.
        seconds: how long all rows may take.
        say: prints a line.
        worker: the processes' module.
    """

    def __init__(self, log: Path, seconds: float, say: Callable[[str], object] = print, worker: str = WORKER) -> None:
        self._log, self._say, self._worker = log, say, worker
        self._end = time.monotonic() + seconds
        self._workers: dict[bool, Worker] = {}

    def run(self, part: str, rows: Iterable[Row]) -> int:
        """Run rows, and return how many failed. Whatever ends this, the processes end with it."""
        failed = 0
        try:
            for row in rows:
                started = time.monotonic()
                answer = self._answer(row)
                took = time.monotonic() - started
                failed += "failed" in answer
                self._keep({"part": part, "title": row.title, "hopper": row.hopper, "took": round(took, 2), **answer})
                self._say(f"{row.title}: {in_words(answer)} ({took:.1f} s)")
        finally:
            for worker in self._workers.values():
                worker.end(patience=0)
        return failed

    def _answer(self, row: Row) -> dict[str, Any]:
        left = self._end - time.monotonic()
        if left < FEWEST_SECONDS:
            return {"left out": "for lack of time"}
        if row.hopper not in self._workers:
            variables = {**GPU_MEMORY, SWITCH: str(int(row.hopper))}
            self._workers[row.hopper] = Worker([self._worker], variables)
        limit = min(row.seconds, left)
        try:
            answer = self._workers[row.hopper].ask("make", limit=limit, function=row.do, arguments=row.arguments)
        except WorkerError as error:
            self._workers.pop(row.hopper).end(patience=0)
            return {"failed": str(error)}
        return dict(answer)

    def _keep(self, line: dict[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def in_words(answer: dict[str, Any]) -> str:
    for verdict in ("failed", "left out"):
        if verdict in answer:
            return f"{verdict.upper()}: {answer[verdict]}"
    return str(answer.get("said", "passed"))
