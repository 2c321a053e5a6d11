"""A fresh process that makes a contestant's first three steps, timed one by one, and reports how its memory grew.

python -m benchmarks.harness.cold_start_worker PACKAGES ADAPTER VARIANT

{"do": "start", "case": {…}, "results": PATH}
    → {"import": s, "network": s, "first step": s, "memory": bytes, "setting": …}
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import CHECKED_STEPS, Case
from benchmarks.peers import made_ready

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """Growth of this process's resident memory since this was made."""

    def __init__(self) -> None:
        self._from_proc = STATUS.exists() and CLEAR.exists()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # otherwise reused memory would not show as growth
        if self._from_proc:
            CLEAR.write_text("5")  # resets the peak
        self._before = self._read("VmRSS")

    def growth(self) -> int:
        return max(0, self._read("VmHWM") - self._before)

    def _read(self, field: str) -> int:
        """Read a field in bytes. Outside Linux, return the process's highest peak, imports included."""
        if not self._from_proc:
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


def start(package: str, adapter: str, variant: str, case: Case, results: str) -> dict[str, Any]:
    """Time the first steps. Before this call, only Python's standard library may be imported."""
    before = time.perf_counter()
    for name in package.split():
        importlib.import_module(name)
    imported = time.perf_counter()

    import numpy as np

    from benchmarks.cases import data

    importlib.import_module(adapter)
    data.training(case)  # cached: the contestant finds it
    memory, prepared = Memory(), time.perf_counter()
    contestant = made_ready(adapter, variant, case)
    made = time.perf_counter()
    contestant.call()
    contestant.wait()
    stepped = time.perf_counter()
    for _ in range(CHECKED_STEPS - 1):
        contestant.call()
    contestant.wait()
    growth = memory.growth()
    np.savez(results, **contestant.check())
    return {
        "import": imported - before,
        "network": made - prepared,
        "first step": stepped - made,
        "memory": growth,
        "setting": ", ".join(filter(None, (next(iter(contestant.choices), ""), contestant.setting))),
    }


def main() -> None:
    from benchmarks.harness.processes import reason
    from benchmarks.harness.worker import answers

    out = answers()
    command = json.loads(sys.stdin.readline())
    package, adapter, variant = sys.argv[1:]
    answer: dict[str, Any]
    try:
        answer = {"value": start(package, adapter, variant, Case.from_json(command["case"]), command["results"])}
    except Exception as error:
        answer = {"error": reason(error)}
    out.write(json.dumps(answer) + "\n")
    out.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
