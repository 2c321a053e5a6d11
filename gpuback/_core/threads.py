"""Several cores: tasks of one batch run side by side on our own threads, with BLAS on one thread in each.

Matrix products of narrow layers are too small for BLAS to divide well, and everything between them runs on one core.
BLAS's own threads also spin while they wait for each other: beside other programs, a product then takes many times as
long. Here whoever waits sleeps, and no one waits for a thread that has no task.
"""

from __future__ import annotations

import functools
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from gpuback._core.interrupts import Deferred

Result = TypeVar("Result")

Work = Callable[[int, int], object]
"""A function of a task's number and of the number of the worker that runs it."""


class ThreadPool:
    """Runs tasks side by side.

    Args:
        size: the most workers, each of which runs one task at a time.
        blas_alone: whether BLAS keeps to one thread even with a single worker; with several it always does. If it does
            not, `run` only calls the work, task by task.
        is_shared: whether a batch is cut into tasks for it even with a single worker, so that sums are the same with
            several; with several it always is.
    """

    def __init__(self, size: int, blas_alone: bool, is_shared: bool = False) -> None:
        self.size = size
        self.blas_alone = blas_alone or size > 1
        self.is_shared = is_shared or size > 1

    def run(self, work: Callable[[int, int], Result], count: int) -> list[Result]:
        """Return [work(0, w), …, work(count − 1, w)], where w is the number of the worker that ran the task.

        A worker that is done takes the next task. If a task raises, no further ones are begun, and `run` raises the
        error when all workers have ended. Ctrl-C acts as such an error.
        """
        if not self.blas_alone:
            return [work(index, 0) for index in range(count)]
        results: dict[int, Result] = {}

        def task(index: int, worker: int) -> None:
            results[index] = work(index, worker)

        self.run_phases(Phase(task, count))
        return [results[index] for index in range(count)]

    def run_phases(self, *phases: Phase) -> None:
        """Run the tasks of each phase side by side; a phase begins when all tasks of the one before have ended.

        Errors are raised as by `run`. Once the last of several phases has begun, Ctrl-C waits for its end.
        """
        workers = min(self.size, max(phase.count for phase in phases))
        job = _Job(phases, workers)
        with Deferred() as interrupt, BlasAlone():
            job.interrupt = interrupt
            helpers = _helpers(workers - 1)
            try:
                for worker, helper in enumerate(helpers, 1):
                    helper.start(job, worker)
                job.take_part(0)
            finally:
                job.close()
                _idle.extend(helpers)
        if job.error is not None:
            raise job.error


class Phase:
    """Tasks that may run side by side.

    Args:
        work: runs one of them.
        count: how many there are.
        then: what is done once, by some worker, after the last has ended and before the next phase begins.
    """

    def __init__(self, work: Work, count: int, then: Callable[[], object] | None = None) -> None:
        self.work, self.count, self.then = work, count, then
        self.left = count
        self.over = count == 0


class _Job:
    """Phases that the caller and helpers work on.

    The caller waits for tasks that others have begun, never for others as such: a helper that comes late, because
    other programs keep the cores busy, finds nothing left and goes.

    Attributes:
        error: what a task raised first.
        interrupt: the caller's.
    """

    error: BaseException | None = None
    interrupt: Deferred

    def __init__(self, phases: tuple[Phase, ...], workers: int) -> None:
        self._phases, self._workers = phases, range(workers)
        self._tasks = [[iter(range(first, phase.count, workers)) for first in self._workers] for phase in phases]
        self._lock = threading.Lock()
        self._sleepers: list[threading.Lock] = []
        self._helpers, self._closed = 0, False

    def help(self, worker: int) -> None:
        """Take part as a helper."""
        with self._lock:
            if self._closed:
                return
            self._helpers += 1
        try:
            self.take_part(worker)
        finally:
            with self._lock:
                self._helpers -= 1

    def take_part(self, worker: int) -> None:
        """Run tasks until none is left. The caller, worker 0, also waits for those of others."""
        last = self._phases[-1]
        with _OwnBlasAlone():
            for phase, tasks in zip(self._phases, self._tasks, strict=True):
                may_stop = phase is not last or len(self._phases) == 1
                taken = 0
                # Its own tasks first, the same at every run, of which it may have something in cache. Then others'.
                # Each comes out of its iterator once, whichever thread asks.
                for index in itertools.chain(*tasks[worker:], *tasks[:worker]):
                    taken += 1
                    if may_stop and self.interrupt.ends_work and self.error is None:
                        self.error = KeyboardInterrupt()
                    if self.error is None:
                        self._run(phase.work, index, worker)
                if not self._meet(phase, taken, worker == 0 or phase is not last):
                    return

    def _run(self, function: Callable[..., object], *arguments: int) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            if self.error is None:
                self.error = error

    def _meet(self, phase: Phase, taken: int, wait: bool) -> bool:
        """Note that so many of the phase's tasks have ended; if told to, wait until all have, and say so."""
        with self._lock:
            phase.left -= taken
            is_last = taken > 0 and phase.left == 0
            if not is_last and not phase.over:
                if not wait or self._closed:
                    return False
                gate = threading.Lock()
                gate.acquire()
                self._sleepers.append(gate)
        if is_last:
            if phase.then is not None and self.error is None:
                self._run(phase.then)
            with self._lock:
                phase.over = True
            self._wake()
        elif not phase.over:
            gate.acquire()
        return not self._closed

    def _wake(self) -> None:
        with self._lock:
            sleepers, self._sleepers = self._sleepers, []
        for gate in sleepers:
            gate.release()

    def close(self) -> None:
        """Let no helper in any more and wait until those inside have left.

        There are some only if the caller's own part was cut short, e.g. by an error that a signal's handler raised.
        Otherwise all tasks have ended, and a helper that is still inside touches none of their arrays.
        """
        if all(phase.over for phase in self._phases):
            self._closed = True
            return
        if self.error is None:
            self.error = RuntimeError("the work was cut short")  # helpers begin no further task
        self._closed = True
        while self._helpers:
            self._wake()
            time.sleep(1e-3)


class _Helper:
    """A thread that waits for jobs: handing one over takes a third of the time that a new thread does."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[_Job, int]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="gpuback helper").start()

    def start(self, job: _Job, worker: int) -> None:
        self._jobs.put((job, worker))

    def _run(self) -> None:
        with np.errstate(all="ignore"):  # each thread has an errstate of its own
            while True:
                job, worker = self._jobs.get()
                job.help(worker)
                del job  # and what it holds


_idle: list[_Helper] = []


def _helpers(count: int) -> list[_Helper]:
    """Take idle helpers, or make new ones; fewer where the system allows no more threads."""
    helpers: list[_Helper] = []
    for _ in range(count):
        try:
            helpers.append(_idle.pop())
        except IndexError:
            try:
                helpers.append(_Helper())
            except RuntimeError:
                break
    return helpers


def blas_threads() -> int:
    """Count the threads that BLAS uses when no `ThreadPool` is at work; 1 if that cannot be found out."""
    own, shared = _blas()
    with _lock:
        counts = _before if _inside else [library.threads() for library in shared]
    return max([*counts, *(library.threads() for library in own)], default=1)


@functools.cache
def blas_cores() -> set[str]:
    """Return the lower-case names of the kernel sets that the loaded OpenBLAS uses, e.g. "skylakex"."""
    libraries = ThreadpoolController().lib_controllers
    return {str(library.architecture).lower() for library in libraries if library.internal_api == "openblas"}


_lock = threading.Lock()
_inside = 0
_before: list[int] = []
_forks = 0
"""How many forks lie between this process and the one that imported gpuback."""


class BlasAlone:
    """A context in which BLAS libraries whose number of threads is the process's run on one thread.

    The first thread to enter sets it, the last to leave restores it. Libraries whose number is each thread's are left
    alone: theirs is set in the threads that run tasks. Enter it within `Deferred`: an interrupt halfway would leave
    BLAS on one thread.
    """

    def __enter__(self) -> None:
        global _inside, _before
        shared = _blas()[1]
        with _lock:
            if _inside == 0:
                _before = [library.replace_threads(1) for library in shared]
            _inside += 1
            self._forks = _forks

    def __exit__(self, *exception: object) -> None:
        global _inside
        with _lock:
            if self._forks != _forks:  # the child is at rest already
                return
            _inside -= 1
            if _inside == 0:
                _restore()


def _restore() -> None:
    for library, count in zip(_blas()[1], _before, strict=True):
        library.set_threads(count)


class _OwnBlasAlone:
    """A context in which BLAS libraries whose number of threads is each thread's (OpenMP's) run on one thread."""

    def __enter__(self) -> None:
        self._before = [library.replace_threads(1) for library in _blas()[0]]

    def __exit__(self, *exception: object) -> None:
        for library, count in zip(_blas()[0], self._before, strict=True):
            library.set_threads(count)


def _after_fork() -> None:
    """Bring a child, of whose threads only the one that forked is left, to the state at rest."""
    global _lock, _inside, _forks
    _idle.clear()
    _lock = threading.Lock()
    _forks += 1
    if _inside:
        _inside = 0
        _restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_after_fork
    )


class _Library:
    """A BLAS library's number of threads."""

    def __init__(self, controller: Any) -> None:
        self._count = controller.get_num_threads
        # Newer threadpoolctl ignores `set_num_threads` from all threads but the first that called it; threads take
        # turns here.
        self.set_threads = getattr(controller, "_real_set_num_threads", controller.set_num_threads)

    def threads(self) -> int:
        return self._count() or 1

    def replace_threads(self, count: int) -> int:
        """Set the number of threads and return the previous one."""
        before = self.threads()
        self.set_threads(count)
        return before


@functools.cache
def _blas() -> tuple[list[_Library], list[_Library]]:
    """Find the BLAS libraries loaded with NumPy: those with a number of threads for each thread, and the others."""
    own: list[_Library] = []
    shared: list[_Library] = []
    for library in ThreadpoolController().lib_controllers:
        if library.user_api == "blas":
            by_thread = library.internal_api == "openblas" and getattr(library, "threading_layer", None) == "openmp"
            (own if by_thread else shared).append(_Library(library))
    return own, shared
