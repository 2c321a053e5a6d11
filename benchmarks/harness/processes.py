"""Contestants' processes as the harness sees them: started, asked, and always ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import LeftOutError

ROOT = Path(__file__).resolve().parents[2]

LIMIT = 300.0
"""Seconds for one answer: PyTorch may compile for a minute on a slow machine."""


class WorkerError(LeftOutError):
    """A contestant's process answered with an error, died, or did not answer. The message says which."""


def reason(error: BaseException) -> str:
    """Format an exception in a line."""
    text = " ".join(str(error).split())
    if isinstance(error, LeftOutError):
        return text
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


class Worker:
    """A process of `benchmarks.harness.worker`, or of another module that speaks as it does.

    Args:
        arguments: command line after `python -m`.
        environment: variables added to this process's own.
        paths: where Python looks first for modules; by default this tree.
        folder: working directory, where Python looks before `paths`; by default the current one.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        paths: Sequence[str] = (str(ROOT),),
        folder: str | None = None,
    ) -> None:
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        path = os.pathsep.join(filter(None, (*paths, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=folder,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the harness, which ends this process and all that it started
        )
        self._ended = False
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Put each answer into the queue, then "" when no more can come."""
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(line)
        self._answers.put("")

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, *, limit: float = LIMIT, **arguments: Any) -> Any:
        """Give a command, and return its answer; see `answer`."""
        self.tell(do, **arguments)
        return self.answer(limit=limit)

    def tell(self, do: str, **arguments: Any) -> None:
        """Give a command. `answer` returns its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the process has died: `answer` raises
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def answer(self, *, limit: float = LIMIT) -> Any:
        """Wait for the answer to the last command.

        Raises:
            WorkerError: the command failed. The process goes on if it reported the error, and otherwise has ended.
        """
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.end(patience=0)
            raise WorkerError(f"no answer in {limit:g} s") from None
        if not line:
            self._answers.put("")  # for the next call
            raise WorkerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def _last_words(self) -> str:
        code = self._process.wait()
        self._end_group()
        how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return f"its process ended: {how}" + (f" ({lines[-1][:200]})" if lines else "")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self, patience: float = 2.0) -> None:
        """Ask the process to end. After `patience` seconds, kill it and what it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._end_group()
        self._process.wait()
        self._listener.join(1.0)
        self._complaints.close()

    def _end_group(self) -> None:
        """Kill the process and what it started, only once: later the number may be another group's."""
        if not self._ended:
            self._ended = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
