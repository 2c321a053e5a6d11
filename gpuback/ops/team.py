"""Work on several cores: blocks of a batch side by side on threads of our own, with BLAS on one thread in each.

Matrix products of narrow layers are too small for BLAS to share well, and everything between them runs on one core.
Shared out by rows instead, products and all the rest use every core, and no thread waits for another until the end.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
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
        if count > 1:
            return _side_by_side(work, count)
        with _one_blas_thread():
            return [work(0)]


def _side_by_side(work: Callable[[int], Result], count: int) -> list[Result]:
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def task(index: int) -> None:
        try:
            with np.errstate(all="ignore"), _one_blas_thread():  # each thread has an errstate of its own
                results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    # Threads made anew cost some 50 µs, little beside the work; a pool would not survive a fork.
    threads = [threading.Thread(target=task, args=(index,), daemon=True) for index in range(1, count)]
    for thread in threads:
        thread.start()
    task(0)
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:  # the buffers stay in use until the thread has ended
                errors.append(error)
    if errors:
        raise errors[0]
    return [results[index] for index in range(count)]


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
