"""Memory that no output of a user's may share: a network's θ, its optimizers' state, and the inputs of a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from gpuback._backends.protocol import Ops
from gpuback._core.typing import Array, ArrayLike
from gpuback.errors import OptionError


class Reserved:
    """The arrays of one network, and the check that an output lies elsewhere.

    Which output was last found apart from them is remembered: a loop that writes to the same one is checked once.
    """

    def __init__(self, ops: Ops, theta: Array) -> None:
        self._may_overlap, self._kind = ops.may_overlap, type(theta)
        self._arrays: list[tuple[str, Callable[[], Any]]] = []
        self._last: Callable[[], Any] = _nothing
        self.add("θ", theta)

    def add(self, name: str, array: Array) -> None:
        """Reserve an array for as long as it is alive."""
        self._arrays = [entry for entry in self._arrays if entry[1]() is not None]
        self._arrays.append((name, weakref.ref(array)))
        self._last = _nothing

    def require_apart(self, what: str, output: Array, *inputs: tuple[str, ArrayLike | None, Array | None]) -> None:
        """Raise OptionError if an output shares memory with a reserved array or with an input.

        Args:
            what: the argument that the output came in, for the message.
            output: an array of the backend.
            inputs: what the call reads: its name, what was given, and the backend's array that was made of it.
        """
        kind, may_overlap = self._kind, self._may_overlap
        if self._last() is not output:
            for name, reference in self._arrays:
                array = reference()
                if array is not None and may_overlap(output, array):
                    raise _overlap(what, name)
            self._last = weakref.ref(output)
        for name, given, taken in inputs:
            array = given if isinstance(given, kind) else taken
            if array is not None and may_overlap(output, array):
                raise _overlap(what, name)


def _overlap(what: str, name: str) -> OptionError:
    return OptionError(f"{what}: expected gradients in memory of their own, got a theta that overlaps {name}")


def _nothing() -> None:
    """Stand in for a reference to an array where there is none."""
