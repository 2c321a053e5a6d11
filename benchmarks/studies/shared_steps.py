"""When threads are worth sharing a step, and how: the sweep behind `gpuback/_backends/numpy/plans.py`.

python -m benchmarks.studies.shared_steps [SECONDS] [FILE.json]

Times training steps with SGD of networks and batch sizes on one thread, in blocks with sums of their own, and in two
phases. The three take turns. "Plan" is what gpuback chooses. Run it on an otherwise idle machine. Figures are in
benchmarks/results/shared_steps.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

import gpuback
from gpuback._backends.numpy import plans
from gpuback._core.threads import blas_cores, blas_threads

NETWORKS = (
    ((32, 32, 10), (256, 1024, 4096, 16384)),
    ((64, 64, 64, 10), (64, 256, 512, 1024, 2048, 4096, 16384)),
    ((64, *[64] * 6, 10), (256, 1024, 4096, 16384)),
    ((128, 128, 128, 10), (64, 128, 256, 512, 1024, 4096)),
    ((256, 256, 256, 10), (64, 128, 256, 512, 1024, 4096)),
    ((784, 128, 10), (64, 128, 256, 1024)),
    ((784, 256, 128, 10), (32, 64, 128, 256, 1024, 4096)),
    ((300, 500, 250, 7), (64, 333)),
    ((784, 1024, 1024, 1024, 10), (32, 64, 128, 256, 1024)),
)
ROUND_SECONDS = 0.05


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    rows = [measure(sizes, batch_size, seconds) for sizes, batches in NETWORKS for batch_size in batches]
    if len(sys.argv) > 2:
        setting = {"threads": blas_threads(), "kernels": sorted(blas_cores()), "numpy": np.__version__}
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            json.dump({"setting": setting, "milliseconds": rows}, file, indent=1)
            file.write("\n")


def measure(sizes: tuple[int, ...], batch_size: int, seconds: float) -> dict[str, Any]:
    """Return and print the median time of a step each way, in milliseconds."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((batch_size, sizes[0]), np.float32), rng.integers(0, sizes[-1], batch_size)
    steps = {name: bound(sizes, x, y, way) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["one thread"]) < 3:
        for name, step in steps.items():
            step()
            started = time.perf_counter()
            while True:
                before = time.perf_counter()
                step()
                after = time.perf_counter()
                times[name].append(after - before)
                if after - started > ROUND_SECONDS:
                    break
    medians = {name: round(1e3 * statistics.median(one), 4) for name, one in times.items()}
    net = gpuback.MLP(sizes, backend="numpy", seed=0)
    plan = net.explain(batch_size).header.split(": ", 1)[1].split("\n")[0]
    million = 6 * batch_size * sum(a * b for a, b in pairwise(sizes)) / 1e6
    print(f"{'-'.join(map(str, sizes)):32} B {batch_size:6} {million:9.1f} MFLOP", medians, plan, flush=True)
    return {"sizes": sizes, "batch": batch_size, "megaflop": million, "plan": plan, **medians}


def bound(sizes: tuple[int, ...], x: Any, y: Any, way: Callable[..., dict[str, Any]]) -> Callable[[], object]:
    """Return a function that makes a step in a certain way, by plans as they are now."""
    step = gpuback.TrainStep(gpuback.MLP(sizes, backend="numpy", seed=0), gpuback.SGD(1e-3))
    before = {name: getattr(plans, name) for name in ("WORTH_THREADS", "goes_in_blocks")}
    for name, value in way().items():
        setattr(plans, name, value)
    try:
        step(x, y)
    finally:
        for name, value in before.items():
            setattr(plans, name, value)
    return lambda: step(x, y)


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "one thread": lambda: {"WORTH_THREADS": float("inf")},
    "blocks": lambda: {"WORTH_THREADS": 0.0, "goes_in_blocks": lambda *_: True},
    "phases": lambda: {"WORTH_THREADS": 0.0, "goes_in_blocks": lambda *_: False},
}

if __name__ == "__main__":
    main()
