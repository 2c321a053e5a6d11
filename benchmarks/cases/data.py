"""Random numbers of a case. Each contestant makes the same ones from one seed, and only reads them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import Case

Floats = NDArray[Any]

SEED = 0


@dataclass
class Training:
    """Samples and a network's initial parameters.

    Attributes:
        x, y: (B, n_0) and labels (B,); for `fit` all samples instead of a batch.
        weights, biases: W_k (nO, nI) and b_k (nO,).
    """

    x: Floats
    y: NDArray[np.int64]
    weights: list[Floats]
    biases: list[Floats]


@dataclass
class Layer:
    """Operands of a layer's backward pass; h = max(a, 0) of a random a."""

    da: Floats
    h: Floats
    W: Floats


@dataclass
class Logits:
    """a (B, n) and labels (B,)."""

    a: Floats
    y: NDArray[np.int64]


@functools.lru_cache(1)
def training(case: Case) -> Training:
    """Draw He's uniform weights, and biases up to ±0.1, so that a missing bias shows. `fit` has samples like digits."""
    rng = np.random.default_rng(SEED)
    count = case.samples or case.batch_size
    if case.family == "fit":
        y = rng.integers(case.sizes[-1], size=count)
        centres = rng.integers(0, 17, (case.sizes[-1], case.sizes[0]))
        x = np.clip(centres[y] + rng.integers(-6, 7, (count, case.sizes[0])), 0, 16) / 16
    else:
        x = rng.standard_normal((count, case.sizes[0]), dtype=np.float32)
        y = rng.integers(case.sizes[-1], size=count)
    weights = [rng.uniform(-1, 1, (n_out, n_in)) * np.sqrt(6 / n_in) for n_in, n_out in case.layers]
    biases = [rng.uniform(-0.1, 0.1, n_out) for _, n_out in case.layers]
    dtype = parameter_dtype(case)
    return Training(x.astype(dtype), y, [W.astype(dtype) for W in weights], [b.astype(dtype) for b in biases])


def layer(case: Case) -> Layer:
    rng = np.random.default_rng(SEED)
    n_in, n_out = case.sizes
    da, a, W = (
        rng.standard_normal(shape, dtype=np.float32).astype(parameter_dtype(case))
        for shape in ((case.batch_size, n_out), (case.batch_size, n_in), (n_out, n_in))
    )
    return Layer(da, np.maximum(a, 0), W)


def logits(case: Case) -> Logits:
    rng = np.random.default_rng(SEED)
    a = 3 * rng.standard_normal((case.batch_size, case.sizes[0]), dtype=np.float32)
    return Logits(a.astype(parameter_dtype(case)), rng.integers(case.sizes[0], size=case.batch_size))


def factors(case: Case) -> tuple[Floats, Floats]:
    """Draw two square matrices."""
    rng = np.random.default_rng(SEED)
    a, b = (rng.standard_normal(2 * case.sizes, dtype=np.float32).astype(parameter_dtype(case)) for _ in range(2))
    return a, b


def parameter_dtype(case: Case) -> np.dtype[Any]:
    return np.dtype(np.float64 if case.dtype == "float64" else np.float32)


def flat(weights: Sequence[Floats], biases: Sequence[Floats]) -> Floats:
    """Flatten parameters into θ = (W_1, b_1, …, W_L, b_L)."""
    return np.concatenate([part.ravel() for pair in zip(weights, biases, strict=True) for part in pair])
