"""Several cores: blocks of a batch run side by side on our own threads, with BLAS on one thread in each.

Matrix products of narrow layers are too small for BLAS to divide well, and everything between them runs on one core.
Divided by rows instead, products and all the rest use every core, and threads wait for each other only at the end.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

Result = TypeVar("Result")


class ThreadPool:
    """Runs tasks side by side.

    Args:
        size: the most workers, each of which runs one task at a time.
        blas_alone: whether BLAS keeps to one thread even with a single worker; with several it always does. If it does
            not, `run` only calls the work, task by task.
    """

    def __init__(self, size: int, blas_alone: bool) -> None:
        self.size = size
        self.blas_alone = blas_alone or size > 1

    def run(self, work: Callable[[int, int], Result], count: int) -> list[Result]:
        """Return [work(0, w), …, work(count − 1, w)], where w is the number of the worker that ran the task.

        A worker that is done takes the next task. If a task raises, no further ones are begun, and `run` raises the
        error when all workers have ended.
        """
        if not self.blas_alone:
            return [work(index, 0) for index in range(count)]
        results: dict[int, Result] = {}
        indices = iter(range(count))

        def take(worker: int) -> None:
            try:
                with _OneBlasThread():
                    for index in indices:  # each comes out once, whichever thread asks
                        results[index] = work(index, worker)
            except BaseException:
                list(indices)  # leaves none for the other workers
                raise

        workers = min(self.size, count)
        if workers > 1:
            side_by_side(take, workers)
        else:
            take(0)
        return [results[index] for index in range(count)]


def side_by_side(work: Callable[[int], Result], count: int) -> list[Result]:
    """Return [work(0), …, work(count − 1)], each run on a thread of its own, the first on the caller's.

    An error in one of them is raised here, once all have ended.
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def task(index: int) -> None:
        try:
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    helpers = [_helper() for _ in range(1, count)]
    for index, helper in enumerate(helpers, 1):
        helper.start(partial(task, index))
    task(0)
    for helper in helpers:
        while not helper.idle:
            try:
                helper.wait()
            except KeyboardInterrupt as error:  # the buffers stay in use until the helper has ended
                errors.append(error)
    _idle.extend(helpers)
    if errors:
        raise errors[0]
    return [results[index] for index in range(count)]


class _Helper:
    """A thread that waits for tasks: handing one over takes a third of the time that a new thread does."""

    def __init__(self) -> None:
        self.idle = True
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def start(self, task: Callable[[], None]) -> None:
        self.idle = False
        self._tasks.put(task)

    def wait(self) -> None:
        """Return when the task has ended."""
        self._ended.get()
        self.idle = True

    def _run(self) -> None:
        while True:
            task = self._tasks.get()
            with np.errstate(all="ignore"):  # each thread has an errstate of its own
                task()
            del task  # and what it holds
            self._ended.put(None)


_idle: list[_Helper] = []


def _helper() -> _Helper:
    """Take an idle helper, or make a new one."""
    try:
        return _idle.pop()
    except IndexError:
        return _Helper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # threads do not survive a fork


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


class _OneBlasThread:
    """A context in which BLAS runs on one thread, at least for the calling thread.

    With OpenMP the number belongs to the thread. Otherwise it belongs to the process: the first thread to enter sets
    it, the last to leave restores it.
    """

    def __enter__(self) -> None:
        global _inside, _before
        own, shared = _blas()
        self._own_before = [library.replace_threads(1) for library in own]
        with _lock:
            if _inside == 0:
                _before = [library.replace_threads(1) for library in shared]
            _inside += 1

    def __exit__(self, *exception: object) -> None:
        global _inside
        own, shared = _blas()
        with _lock:
            _inside -= 1
            if _inside == 0:
                for library, count in zip(shared, _before, strict=True):
                    library.set_threads(count)
        for library, count in zip(own, self._own_before, strict=True):
            library.set_threads(count)


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
