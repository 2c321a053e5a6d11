"""Networks on NumPy and on a real GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpuback import MLP, SGD, Adam, AdamW
from support.layer_calls import DTYPES

each_dtype = pytest.mark.parametrize("dtype", DTYPES)

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.05, 0.9, weight_decay=0.01),
    "Nesterov": lambda: SGD(0.05, 0.9, nesterov=True),
    "Adam": lambda: Adam(0.01, weight_decay=0.01),
    "AdamW": lambda: AdamW(0.01),
}


def twins(sizes: tuple[int, ...], dtype: str, **options: Any) -> tuple[MLP, MLP]:
    """The same network on NumPy and on CuPy, its biases not 0."""
    name = "float32" if dtype == "tf32" else dtype
    net = MLP(sizes, dtype=name, allow_tf32=dtype == "tf32", backend="numpy", seed=3, **options)
    net.theta[:] += np.random.default_rng(0).standard_normal(net.n_parameters) * 0.05
    return net, net.to("cupy")
