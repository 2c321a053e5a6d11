"""A process of one contestant, with its own library and threads: commands come in and answers go out as lines of JSON.

    python -m benchmarks.harness.worker ADAPTER VARIANT

    {"do": "prepare", "case": {…}, "results": PATH}     makes it ready and saves what it computes, as .npz
                                                        → its settings, name → all that it runs with, in words
    {"do": "turn", "choice": …, "warm_up": s, "seconds": s}     → seconds a call, with that setting
    {"do": "percentiles", …, "least": n}    → the median and the 95th percentile of calls, at least so many
    {"do": "drop"}                                      frees the case's memory

A command that fails answers {"error": …}. The process ends when its input ends.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import warnings
from typing import Any, TextIO

from benchmarks.cases import Case
from benchmarks.harness.processes import reason
from benchmarks.peers import Contestant, made_ready


class Session:
    """The contestant at work, and the case that it has at hand."""

    def __init__(self, adapter: str, variant: str) -> None:
        self._adapter, self._variant = adapter, variant
        self._contestant: Contestant | None = None

    def prepare(self, case: dict[str, Any], results: str) -> dict[str, str]:
        import numpy as np

        self.drop()
        self._contestant = made_ready(self._adapter, self._variant, Case.from_json(case))
        np.savez(results, **self._contestant.check())
        names = self._contestant.choices or [""]
        return {name: ", ".join(filter(None, (name, self._contestant.setting))) for name in names}

    def turn(self, choice: str, warm_up: float, seconds: float) -> float:
        from benchmarks.harness.timing import turn

        return turn(self._ready(choice), warm_up, seconds)

    def percentiles(self, choice: str, warm_up: float, seconds: float, least: int) -> list[float]:
        from benchmarks.harness.timing import percentiles

        return percentiles(self._ready(choice), warm_up, seconds, least)

    def drop(self) -> None:
        self._contestant = None
        gc.collect()

    def _ready(self, choice: str) -> Contestant:
        assert self._contestant is not None, "prepare comes first"
        if choice:
            self._contestant.choices[choice]()
        return self._contestant


def answers() -> TextIO:
    """Return the stream for answers, and send what libraries print to stderr."""
    channel = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(channel, "w", encoding="utf-8", buffering=1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that gives the commands ends this one
    out = answers()
    warnings.simplefilter("ignore")
    session = Session(*sys.argv[1:])
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"value": getattr(session, command.pop("do"))(**command)}
        except Exception as error:
            answer = {"error": reason(error)}
        out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
