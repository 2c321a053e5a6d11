"""A worker of benchmarks.hopper whose rows pass, fail, hang or die: `python -m support.trial_rows`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks.cases import CheckFailedError, LeftOutError
from benchmarks.hopper import worker


def passes(number: int) -> dict[str, Any]:
    return {"said": f"number {number}"}


def tells() -> dict[str, Any]:
    return {"said": "", "process": os.getpid(), "switch": os.environ["GPUBACK_HOPPER"]}


def raises() -> dict[str, Any]:
    raise ZeroDivisionError("no luck")


def hangs() -> dict[str, Any]:
    time.sleep(60)
    return {}


def dies() -> dict[str, Any]:
    os._exit(7)


def is_wrong() -> dict[str, Any]:
    raise CheckFailedError("check failed: off by 2")


def takes_no_part() -> dict[str, Any]:
    raise LeftOutError("not installed")


if __name__ == "__main__":
    sys.modules["benchmarks.hopper.trials"] = sys.modules["__main__"]
    worker.main()
