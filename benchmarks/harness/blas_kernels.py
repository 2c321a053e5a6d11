"""OpenBLAS's kernels: a set for each generation of processors. Timed products tell which set is the fastest here.

python -m benchmarks.harness.blas_kernels       prints the rate of this process's kernels
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import numpy as np

from benchmarks.harness.processes import ROOT
from gpuback._cli import machine

VARIABLE = "OPENBLAS_CORETYPE"
SHAPES = (1024, 1024, 1024), (64, 64, 64), (1024, 64, 64)
"""(B, nO, nI) of a wide layer, a small one and a narrow one."""

ROUNDS, SECONDS = 3, 0.06
WORTH_NAMING = 1.15
"""How many times as fast as OpenBLAS's own choice another set must be. Less may be noise, and a run cannot be compared
with one that had other kernels.
"""


def variables() -> dict[str, str]:
    """Return the variable that names the fastest set to every process whose products are NumPy's.

    The result is empty where OpenBLAS picks that set itself, where there is no choice, or where the user has chosen.
    """
    here = machine.survey()
    if VARIABLE in os.environ or "openblas" not in (here.blas.library or "") or "avx2" not in here.cpu.simd:
        return {}
    candidates = [{}, {VARIABLE: "Haswell"}, *([{VARIABLE: "SkylakeX"}] if here.cpu.has_avx512 else [])]
    rates = [0.0] * len(candidates)
    for _ in range(ROUNDS):
        rates = [max(rate, _measured(named)) for rate, named in zip(rates, candidates, strict=True)]
    best = max(range(len(candidates)), key=rates.__getitem__)
    return candidates[best] if rates[best] > WORTH_NAMING * rates[0] else {}


def forced() -> dict[str, str]:
    """Return the variable that names OpenBLAS's own choice, so that all processes of a run have the same set."""
    blas = machine.survey().blas
    if VARIABLE in os.environ or "openblas" not in (blas.library or "") or blas.kernel is None:
        return {}
    return {VARIABLE: blas.kernel}


def _measured(named: dict[str, str]) -> float:
    """Measure the rate in a fresh process; 0 if it fails."""
    command = [sys.executable, "-m", "benchmarks.harness.blas_kernels"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **named}, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else 0.0


def rate() -> float:
    """Measure operations per second in a layer's three products: the geometric mean over `SHAPES`."""
    rates = [_rate(*shape) for shape in SHAPES]
    return math.exp(sum(map(math.log, rates)) / len(rates))


def _rate(rows: int, n_out: int, n_in: int) -> float:
    rng = np.random.default_rng(0)
    h, W, da = (rng.standard_normal(shape, np.float32) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
    a, dW, dh = np.empty_like(da), np.empty_like(W), np.empty_like(h)
    best, end = math.inf, time.perf_counter() + SECONDS
    while time.perf_counter() < end or best == math.inf:
        started = time.perf_counter()
        np.dot(h, W.T, out=a)
        np.dot(da.T, h, out=dW)
        np.dot(da, W, out=dh)
        best = min(best, time.perf_counter() - started)
    return 6 * rows * n_out * n_in / best


if __name__ == "__main__":
    print(rate())
