"""Busy processes beside a measurement, which end with it: each loads a core and computes nothing."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

LOOP = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print(flush=True)
while True:
    pass
"""
"""The pipe that the thread reads from ends with the harness, however that ends. The line says that the loop begins."""


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run so many busy processes while the block runs."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            processes.append(  # noqa: PERF401 - one by one, so that an interruption ends those that run
                subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", LOOP],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for the harness, which ends this process
                )
            )
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
