"""The lower bound: the matrix products that every way of computing a case needs, on buffers made beforehand.

It also has the rates of the roofline: large products, and copies.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import Case, data, oracle
from benchmarks.peers import Contestant, blas_threads

Floats = NDArray[Any]


def contestant(case: Case, variant: str) -> Contestant:
    if case.family == "copy":
        return copy(case)
    made = {"layer": layer_backward, "product": product}.get(case.family, step)(case)
    made.setting, made.choices = blas_threads.setting(), blas_threads.choices()
    return made


def layer_backward(case: Case) -> Contestant:
    layer = data.layer(case)
    da, h, W = layer.da, layer.h, layer.W
    dW, below = np.empty_like(W), np.empty_like(h)

    def call() -> None:
        np.matmul(da.T, h, out=dW)
        np.matmul(da, W, out=below)

    def check() -> dict[str, Any]:
        call()
        return {"dW": dW, "da W": below}

    return Contestant(call, check)


def step(case: Case) -> Contestant:
    """Make every layer's three products, on operands such as the layers below and above would pass."""
    start = data.training(case)
    weights, biases = ([part.astype(np.float64) for part in parts] for parts in (start.weights, start.biases))
    exact = oracle.forward_backward(weights, biases, start.x.astype(np.float64), start.y)
    hs, das = ([part.astype(start.x.dtype) for part in parts] for parts in (exact.hs, exact.das))
    forward = [np.empty_like(da) for da in das[1:]]
    below = [np.empty_like(h) for h in hs]
    dWs = [np.empty_like(W) for W in start.weights]

    def call() -> None:
        for k, W in enumerate(start.weights):
            np.matmul(hs[k], W.T, out=forward[k])
        for k in range(len(dWs) - 1, -1, -1):
            np.matmul(das[k + 1].T, hs[k], out=dWs[k])
            if k > 0:
                np.matmul(das[k + 1], start.weights[k], out=below[k])

    def check() -> dict[str, Any]:
        call()
        return {"dW": np.concatenate([dW.ravel() for dW in dWs])}

    return Contestant(call, check)


def product(case: Case) -> Contestant:
    a, b = data.factors(case)
    out = np.empty_like(a)

    def check() -> dict[str, Any]:
        call()
        return {"product": out}

    def call() -> None:
        np.matmul(a, b, out=out)

    return Contestant(call, check)


def copy(case: Case) -> Contestant:
    """Copy so many bytes, so many times, by `batch_size` threads side by side."""
    n_bytes, repeats = case.sizes
    parts = [np.ones((2, n_bytes), np.uint8) for _ in range(case.batch_size)]

    def work(part: Floats) -> None:
        for _ in range(repeats):
            np.copyto(part[1], part[0])

    def call() -> None:
        threads = [threading.Thread(target=work, args=(part,)) for part in parts[1:]]
        for thread in threads:
            thread.start()
        work(parts[0])
        for thread in threads:
            thread.join()

    return Contestant(call, dict)
