"""Ctrl-C while the command line imports: one line and the exit code of an interrupted process, as later on.

Most of a short command's time goes into imports. The package is imported before the command line's own code runs, so
`gpuback/__init__.py` calls this before its other imports. A program that imports gpuback keeps its own handling.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType


def guard() -> None:
    """Handle SIGINT until `end`, if this process is the command line and nobody else does."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if _is_command_line() and in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def end() -> None:
    """From now on, SIGINT raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"gpuback: interrupted\n")
    os._exit(128 + signal.SIGINT)  # as shells report a process that SIGINT has ended


def _is_command_line() -> bool:
    """Whether Python was started as `gpuback` or as `python -m gpuback`."""
    program = str((getattr(sys, "argv", None) or [""])[0])
    if program == "-m":  # while Python looks for the module
        pairs = [sys.orig_argv[i : i + 2] for i in range(len(sys.orig_argv))]
        return ["-m", "gpuback"] in pairs or "-mgpuback" in sys.orig_argv
    return os.path.splitext(os.path.basename(program))[0] == "gpuback"
