"""Ctrl-C while arrays are half written: it waits until they are whole."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_signal: Any = importlib.import_module("_signal")
"""The functions of `signal` without its enumerations, which take four times as long."""

SIGINT = int(signal.SIGINT)

_main = threading.main_thread().ident

_deferring: list[tuple[Callable[..., Any], int]] = []
"""The handlers that will be put back, the outermost first, each with the thread that will do so."""


class Deferred:
    """A context that SIGINT does not interrupt: its handler is called at the end instead, and may raise there.

    Python runs handlers in the main thread alone, so in other threads there is nothing to do. Nor is there where SIGINT
    is ignored or ends the process at once.

    Attributes:
        ends_work: whether one has come whose handler will raise KeyboardInterrupt, so that no result will be used.
    """

    __slots__ = ("_came", "_handler", "ends_work")

    def __enter__(self) -> Deferred:
        self._handler: Callable[..., Any] | None = None
        self._came = self.ends_work = False
        thread = threading.get_ident()
        if thread == _main:
            handler = _signal.getsignal(SIGINT)
            if callable(handler):
                try:
                    _signal.signal(SIGINT, self._note)
                except ValueError:  # in a subinterpreter, which has no handlers of its own
                    return self
                self._handler = handler
                _deferring.append((handler, thread))
        return self

    def _note(self, *_: object) -> None:
        self._came, self.ends_work = True, self._handler is signal.default_int_handler

    def __exit__(self, *error: object) -> None:
        handler = self._handler
        if handler is not None:
            _deferring.pop()
            _signal.signal(SIGINT, handler)
            if self._came:
                handler(SIGINT, sys._getframe(1))


def _after_fork() -> None:
    """Put the handler back in a child that another thread than the deferring one has forked."""
    global _main
    _main = threading.main_thread().ident
    if _deferring and _deferring[0][1] != threading.get_ident():
        _signal.signal(SIGINT, _deferring[0][0])
        _deferring.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
