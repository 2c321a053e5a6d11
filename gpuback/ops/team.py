"""Work on several cores: blocks of a batch side by side on threads of our own, with BLAS on one thread in each.

Matrix products of narrow layers are too small for BLAS to share well, and everything between them runs on one core.
Shared out by rows instead, products and all the rest use every core, and no thread waits for another until the end.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

Result = TypeVar("Result")


class Team:
    """Runs tasks side by side.

    Args:
        size: how many tasks there are at a time, at most.
        blas_alone: whether BLAS keeps to one thread even while a single task runs; with several it always does.
    """

    def __init__(self, size: int, blas_alone: bool) -> None:
        self.size = size
        self._blas_alone = blas_alone or size > 1

    def run(self, work: Callable[[int], Result], count: int) -> list[Result]:
        """[work(0), …, work(count − 1)]. What one of them raises is raised here, once all have ended."""
        if not self._blas_alone:
            return [work(index) for index in range(count)]

        def alone(index: int) -> Result:
            with _one_blas_thread():
                return work(index)

        return side_by_side(alone, count)


def side_by_side(work: Callable[[int], Result], count: int) -> list[Result]:
    """[work(0), …, work(count − 1)], each on a thread of its own, the first on the caller's.

    What one of them raises is raised here, once all have ended.
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
        """Returns when the task has ended."""
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
    """One that is idle, or a new one."""
    try:
        return _idle.pop()
    except IndexError:
        return _Helper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # threads do not survive a fork


def blas_threads() -> int:
    """How many threads BLAS uses when no team is at work; 1 if that cannot be found out."""
    own, shared = _blas()
    with _lock:
        counts = _before if _inside else [library.get_num_threads() or 1 for library in shared]
    return max([*counts, *(library.get_num_threads() or 1 for library in own)], default=1)


_lock = threading.Lock()
_inside = 0
_before: list[int] = []


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """BLAS on one thread, at least for the calling one.

    With OpenMP the number belongs to the thread. Otherwise it is the process's: the first thread to enter sets it, the
    last to leave sets it back.
    """
    global _inside, _before
    own, shared = _blas()
    own_before = _replace(own, [1] * len(own))
    with _lock:
        if _inside == 0:
            _before = _replace(shared, [1] * len(shared))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _replace(shared, _before)
        _replace(own, own_before)


def _replace(libraries: list[Any], threads: list[int]) -> list[int]:
    """Sets each library's number of threads; what they were."""
    before = []
    for library, count in zip(libraries, threads, strict=True):
        before.append(library.get_num_threads() or 1)
        # Newer threadpoolctl ignores `set_num_threads` from all threads but the first that called it; threads take
        # turns here.
        getattr(library, "_real_set_num_threads", library.set_num_threads)(count)
    return before


@functools.cache
def _blas() -> tuple[list[Any], list[Any]]:
    """The BLAS libraries loaded with NumPy: those whose number of threads belongs to the thread, and the others."""
    libraries = [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]
    own = [
        library
        for library in libraries
        if library.internal_api == "openblas" and getattr(library, "threading_layer", None) == "openmp"
    ]
    return own, [library for library in libraries if library not in own]
