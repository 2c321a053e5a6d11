"""Exact results of cases on a GPU, in float64, and how far contestants' results may lie from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import cupy
import numpy as np

from benchmarks.cases import Case, CheckFailedError, gpu_data
from benchmarks.cases.gpu_data import wide
from benchmarks.cases.oracle import CLOSE, NEEDED, Oracle
from gpuback._core.precision import UNIT_ROUNDOFF
from gpuback.testing import tolerance

CLOSE_TRAINING = {"float32": CLOSE["float32"], "tf32": 0.06, "bfloat16": 0.17}
"""Largest error of an update or a loss, relative to its length: three times the error of gpuback's NumPy backend with
16 bits and TF32 in the usual networks. Most of that error comes from units on the other side of relu's kink."""

CLOSE_LAYER = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 2e-2}
"""Largest error of another library's layer, relative to its length. Rounding to TF32 alone exceeds float32's limit."""

Check = Callable[[Mapping[str, Any], str], None]


def check_of(case: Case) -> Check:
    """Make the function that holds a contestant's results to the exact ones. It raises CheckFailedError."""
    if case.family == "layer":
        return LayerOracle(case).check
    if case.family == "loss":
        return _exact(case).check
    # All dtypes of a network start from the same float32 numbers.
    exact = _exact(dataclasses.replace(case, family="reproducible", name="", dtype="float32"))
    return functools.partial(exact.check, slack=CLOSE_TRAINING[case.dtype] / CLOSE["float32"])


_exact = functools.lru_cache(1)(Oracle)


class LayerOracle:
    """A layer's exact results on its first set of buffers, computed on the GPU."""

    def __init__(self, case: Case) -> None:
        precision, operands = gpu_data.precision_of(case), gpu_data.layer(case)[0]
        da, h, W = (wide(part) for part in operands[:3])

        def relative(terms: int, allow_tf32: bool = precision.tf32) -> float:
            return float(tolerance(1.0, terms, precision.operand, allow_tf32=allow_tf32))

        self._close = CLOSE_LAYER[case.dtype]
        self._exact = {"dW": da.T @ h, "db": da.sum(axis=0), "da_prev": (da @ W) * (h > 0)}
        self._allowed = {
            "dW": abs(da).T @ abs(h) * relative(case.batch_size),
            "db": abs(da).sum(axis=0) * relative(case.batch_size, False),
            "da_prev": abs(da) @ abs(W) * relative(case.sizes[1]),
        }
        if precision.sixteen_bit:
            self._allowed["da_prev"] += abs(self._exact["da_prev"]) * UNIT_ROUNDOFF[precision.name]

    def check(self, results: Mapping[str, Any], role: str) -> None:
        """Hold gpuback's results to the numeric contract element by element, and those of others by their norm.

        Raises:
            CheckFailedError: a result is missing, has another shape, or is too far off.
        """
        for name in NEEDED["layer"]:
            if name not in results:
                raise CheckFailedError(f"check failed: {name} is missing")
            result, exact = wide(results[name]), self._exact[name]
            if result.shape != exact.shape:
                raise CheckFailedError(f"check failed: {name} has shape {result.shape} instead of {exact.shape}")
            if role in ("peer", "floor"):
                error = float(cupy.linalg.norm(result - exact)) / (self._close * float(cupy.linalg.norm(exact)))
            else:
                error = float((abs(result - exact) / self._allowed[name].clip(1e-300)).max())
            if not error <= 1 or not np.isfinite(error):
                raise CheckFailedError(f"check failed: {name} is off by {error:.3g} times what is allowed")
