"""A process that makes rows: commands come in and answers go out as lines of JSON.

    {"do": "make", "function": "gpu_checks.backward", "arguments": {…}}    → {"value": what the function returns}

The value is {"failed": …} where a result is wrong, and {"left out": …} where a contestant cannot take part. After any
other exception, which may leave the GPU in no state to go on, the process answers {"error": …} and ends.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import warnings
from typing import Any

from benchmarks.cases import CheckFailedError, LeftOutError
from benchmarks.harness.processes import reason
from benchmarks.harness.worker import answers


def make(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, name = function.partition(".")
    try:
        return dict(getattr(importlib.import_module(f"benchmarks.hopper.{module}"), name)(**arguments))
    except CheckFailedError as error:
        return {"failed": str(error)}
    except LeftOutError as error:
        return {"left out": str(error)}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that gives the commands ends this one
    out = answers()
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer: dict[str, Any] = {"value": make(command["function"], command["arguments"])}
        except Exception as error:
            answer = {"error": reason(error)}
        out.write(json.dumps(answer) + "\n")
        if "error" in answer:
            break


if __name__ == "__main__":
    main()
