"""Time a layer's products with the kernels that OpenBLAS chose when this process loaded it.

`blas_kernels` runs this file in processes of their own. Each prints the name of its kernels as a line of JSON, then for
every line that it reads the seconds of each product, and ends with its input. It imports nothing of gpuback, so that it
starts in a tenth of a second.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_info

SHAPES = (64, 64, 64), (128, 256, 784), (512, 512, 512), (1024, 64, 64)
"""(B, nO, nI) of layers: a tiny one, one of a small network, a wide one, and a block of a narrow one's batch."""

FLOPS = [2 * rows * n_out * n_in for rows, n_out, n_in in SHAPES for _ in range(3)]

LEAST_FLOPS = 4e6
"""Products of a turn go on for at least so many operations, 0.1 ms."""

# A thread's own time does not count what other programs take of its core. On Windows it ticks in 16 ms.
clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-6 else time.perf_counter

Product = Callable[[], object]


def products(rows: int, n_out: int, n_in: int) -> list[list[Product]]:
    """Make a layer's three products, a = h Wᵀ, dW = daᵀ h and dh = da W, each in the ways in which gpuback does it."""
    rng = np.random.default_rng(0)
    h, W, da = (rng.standard_normal(shape, np.float32) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
    a, dW, dh, copy = np.empty_like(da), np.empty_like(W), np.empty_like(h), np.empty((n_in, n_out), np.float32)

    def by_copy() -> None:
        np.copyto(copy, W.T)
        np.matmul(h, copy, out=a)

    return [
        [lambda: np.matmul(h, W.T, out=a), by_copy],
        [lambda: np.matmul(da.T, h, out=dW)],
        [lambda: np.matmul(da, W, out=dh)],
    ]


def fastest(ways: list[Product], flops: int) -> float:
    """Measure the least seconds that a product takes, in the best of its ways."""
    best = float("inf")
    for _ in range(1 + max(1, round(LEAST_FLOPS / flops))):  # the first call finds none of its operands in the cache
        for way in ways:
            started = clock()
            way()
            best = min(best, clock() - started)
    return best


def main() -> None:
    every = [ways for shape in SHAPES for ways in products(*shape)]
    kernels = next((one.get("architecture") for one in threadpool_info() if one["user_api"] == "blas"), None)
    print(json.dumps(kernels), flush=True)
    for _ in sys.stdin:
        print(json.dumps([fastest(*one) for one in zip(every, FLOPS, strict=True)]), flush=True)


if __name__ == "__main__":
    main()
