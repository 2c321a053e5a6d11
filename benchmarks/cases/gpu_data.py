"""A layer's operands on a GPU, in sets that together exceed the level-2 cache. All contestants share them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import cupy
import numpy as np

from benchmarks.cases import Case
from gpuback._core.precision import Precision

MOST_SETS = 200
MOST_BATCHES = 40
"""Copies of a training step's batch. A CUDA graph of as many steps, a millisecond each, is long enough."""


class Buffers(NamedTuple):
    """Buffers that one call reads and writes."""

    da: Any
    h: Any
    W: Any
    dW: Any
    db: Any
    da_prev: Any


class Numbers:
    """Random numbers of one format on the device. Operands are copied from them."""

    SIZE = 1 << 25

    def __init__(self, dtype: np.dtype[Any]) -> None:
        host = np.random.default_rng(0).standard_normal(self.SIZE + 4096, dtype=np.float32)
        self._numbers = cupy.asarray(host.astype(dtype))
        self._drawn = 0

    def draw(self, *shape: int) -> Any:
        out = cupy.empty(shape, self._numbers.dtype)
        self._drawn = (self._drawn + 1) % 256
        source = self._numbers.data + self._drawn * 16 * out.itemsize
        for start in range(0, out.nbytes, self.SIZE * out.itemsize):
            (out.data + start).copy_from_device(source, min(self.SIZE * out.itemsize, out.nbytes - start))
        return out


numbers = functools.lru_cache(1)(Numbers)


@functools.lru_cache(1)
def layer(case: Case) -> list[Buffers]:
    """Make as many sets of buffers as fill the level-2 cache twice."""
    source, precision = numbers(precision_of(case).operand), precision_of(case)
    B, (n_in, n_out), total = case.batch_size, case.sizes, precision.accumulator
    return [
        Buffers(
            *(source.draw(B, n_out), source.draw(B, n_in), source.draw(n_out, n_in)),
            *(cupy.empty((n_out, n_in), total), cupy.empty(n_out, total), source.draw(B, n_in)),
        )
        for _ in range(copies(case.bytes, MOST_SETS))
    ]


def copies(size: int, most: int) -> int:
    """Count the buffers of `size` bytes that fill the level-2 cache twice; at most `most`."""
    return min(math.ceil(2 * level_2_cache() / size) + 1, most)


def level_2_cache() -> int:
    runtime = cupy.cuda.runtime
    return int(runtime.getDeviceProperties(runtime.getDevice())["l2CacheSize"])


def precision_of(case: Case) -> Precision:
    return Precision.of(case.dtype.replace("tf32", "float32"), allow_tf32=case.dtype == "tf32")


def wide(x: Any) -> Any:
    """Convert a CuPy array to float64. bfloat16 goes by way of its bits."""
    if x.dtype.name == "bfloat16":
        x = (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)
