"""Buffers between calls: taken by key, put back, and in the end replaced by newer ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Any, Protocol

KEPT_BUFFERS = 4
"""How many sets of buffers a pool keeps, e.g. for the batch sizes in use; one may be many megabytes."""


class Keyed(Protocol):
    """Buffers with a key that says what they were made for."""

    @property
    def key(self) -> Hashable: ...


class Pool:
    """The buffers that no call is using; a copy of a pool begins empty.

    A call acquires buffers or makes its own, uses them alone and releases them. If it raises in between, they are not
    released, for they may be half written. Several of one key may be alive, e.g. one for each of two threads.

    Threads share a pool without a lock, because `release` may run in a finalizer, amid a garbage collection, where
    waiting for a lock could last for ever. Each step is an atomic one of a deque; the worst outcome is that buffers are
    made anew.
    """

    def __init__(self) -> None:
        self._free: deque[Any] = deque(maxlen=KEPT_BUFFERS)  # the newest last

    def acquire(self, key: Hashable) -> Any:
        """Return buffers with this key, the most recently released; None if there are none."""
        found, others = None, []
        try:
            while (found := self._free.pop()).key != key:
                others.append(found)
        except IndexError:
            found = None
        if others:
            self._free.extend(reversed(others))
        return found

    def release(self, buffers: Keyed) -> None:
        """Keep buffers for the next call with their key. Beyond `KEPT_BUFFERS`, the oldest are dropped."""
        self._free.append(buffers)

    def clear(self) -> None:
        """Drop all buffers."""
        self._free.clear()

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        return Pool, ()
