"""Times of one contestant in one case: checked first, then medians of graph replays on buffers beyond the cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cupy
import numpy as np

import gpuback
from benchmarks.cases import Case, CheckFailedError, selection
from benchmarks.harness import gpu_measure
from benchmarks.peers import GPU, OURS, Contestant, Entry, made_ready
from gpuback._backends.cuda import layer_plans, wgmma_plans

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
    said = f"{np.median(rounds) * 1e6:.1f} µs"
    return {"case": case.to_json(), "name": name, "role": one.role, "setting": setting, "rounds": rounds, "said": said}


def tuned(shape: Sequence[int], constants: Mapping[str, int]) -> dict[str, Any]:
    """Check and time gpuback's layer with other constants of `wgmma_plans`, for whoever chooses them."""
    case = _case("layer", shape)
    ours = next(entry for entry in GPU if entry.name == OURS and "layer" in entry.families)
    try:
        with _plans_with(constants):
            setting, rounds = _rounds(ours, case)
    finally:
        gpu_measure.free_memory()
    seconds = float(np.median(rounds))
    return {"seconds": seconds, "constants": dict(constants), "said": f"{seconds * 1e6:.1f} µs ({setting})"}


@contextlib.contextmanager
def _plans_with(constants: Mapping[str, int]) -> Iterator[None]:
    """Change constants of the plans for Hopper, for what is bound meanwhile."""
    before = {name: getattr(wgmma_plans, name) for name in constants}
    try:
        _set(constants)
        yield
    finally:
        _set(before)


def _set(constants: Mapping[str, int]) -> None:
    for name, value in constants.items():
        setattr(wgmma_plans, name, value)
    for plan in (layer_plans.layer_plan, layer_plans.delta_plan, layer_plans.forward_plan):
        plan.cache_clear()


def _rounds(one: Entry, case: Case) -> tuple[str, list[float]]:
    """Return the contestant's setting, and seconds for one call in each round."""
    ((setting, stopwatch),) = gpu_measure.clocked(_checked(one, case)).items()
    return setting, rounds_of(stopwatch)


def rounds_of(stopwatch: Callable[[], float]) -> list[float]:
    """Return seconds of each round, after one that does not count."""
    stopwatch()
    rounds: list[float] = []
    started = time.perf_counter()
    while len(rounds) < ROUNDS and (not rounds or time.perf_counter() - started < SECONDS):
        rounds.append(stopwatch())
    return rounds


def median_of(stopwatch: Callable[[], float]) -> float:
    return float(np.median(rounds_of(stopwatch)))


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
        made.setting = made.setting or _kernels_of(case)
    return made


def _kernels_of(case: Case) -> str:
    """Name the kernel of a step, or count its operations where they are several."""
    steps = gpuback.MLP(case.sizes, dtype=case.dtype, backend="cupy", seed=0).explain(case.batch_size).steps
    return steps[0].operation.partition(",")[0] if len(steps) == 1 else f"{len(steps)} operations"


def _bits(results: Mapping[str, Any]) -> list[bytes]:
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
