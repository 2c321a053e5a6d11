"""Times of one contestant in one case: checked first, then medians of graph replays on buffers beyond the cache."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from benchmarks.cases import Case, CheckFailedError, selection
from benchmarks.harness import gpu_measure
from benchmarks.peers import GPU, OURS, Contestant, Entry, made_ready

ROUNDS, SECONDS = 15, 1.5
MOST_CHECKED = 1 << 16
"""Samples of a step that are checked against float64, which the CPU computes. A longer batch is only run twice."""

PRODUCTS = Entry(
    "cuBLAS products", "floor", "benchmarks.peers.gpu_pytorch", "torch", ("layer",), "captured products"
)  # fmt: skip


def timed(family: str, size: Any, name: str) -> dict[str, Any]:
    """Check and time a contestant.

    Args:
        family: "layer", whose size is (B, nO, nI), or "step", whose size is a batch size of seven layers of 64.
        size: of the case.
        name: of the contestant.
    """
    case = _case(family, size)
    one = next(entry for entry in (*GPU, PRODUCTS) if entry.name == name and family in entry.families)
    try:
        setting, rounds = _rounds(one, case)
    finally:
        gpu_measure.free_memory()
    said = f"{sorted(rounds)[len(rounds) // 2] * 1e6:.1f} µs"
    return {"case": case.to_json(), "name": name, "role": one.role, "setting": setting, "rounds": rounds, "said": said}


def _rounds(one: Entry, case: Case) -> tuple[str, list[float]]:
    """Return the contestant's setting, and seconds for one call in each round."""
    ((setting, stopwatch),) = gpu_measure.clocked(_checked(one, case)).items()
    stopwatch()
    rounds: list[float] = []
    started = time.perf_counter()
    while len(rounds) < ROUNDS and (not rounds or time.perf_counter() - started < SECONDS):
        rounds.append(stopwatch())
    return setting, rounds


def _case(family: str, size: Any) -> Case:
    if family == "layer":
        return selection.layer(tuple(size), "bfloat16")
    return selection.training(selection.narrow(64, size), "step", dtype="bfloat16")


def _checked(one: Entry, case: Case) -> Contestant:
    """Make the contestant. Where it is gpuback, its bits are the same the second time."""
    long = case.family == "step" and case.batch_size > MOST_CHECKED
    check = _nothing if long else gpu_measure.gpu_oracle.check_of(case)
    made = gpu_measure.checked(one, case, check)
    if one.name.startswith(OURS):
        first, again = (_bits(made.check()) for _ in range(2))
        if first != again:
            raise CheckFailedError("check failed: other bits at the second time")
    return made


def _bits(results: Mapping[str, Any]) -> list[bytes]:
    import cupy
    import numpy as np

    return [np.asarray(cupy.asnumpy(result)).tobytes() for result in results.values()]


def _nothing(results: Mapping[str, Any], role: str) -> None:
    """Hold results to nothing."""


def called(family: str, size: Any) -> None:
    """Make a few calls of gpuback in a case, for a profiler."""
    made = made_ready("benchmarks.peers.gpu_gpuback", "launch" if family == "layer" else "", _case(family, size))
    made.restart()
    for _ in range(3):
        made.call()
    made.wait()
