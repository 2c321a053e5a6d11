"""A training step as people write it in NumPy, where every expression allocates: the peer of `gpuback.TrainStep`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def plain_step(
    weights: list[F32], biases: list[F32], learning_rate: float
) -> Callable[[F32, NDArray[np.int64]], float]:
    """A step of SGD on softmax + cross-entropy behind relu layers, as a function of x (B, n_0) and labels (B,)."""

    def step(x: F32, y: NDArray[np.int64]) -> float:
        hs = [x]
        for W, b in zip(weights[:-1], biases[:-1], strict=True):
            hs.append(np.maximum(hs[-1] @ W.T + b, 0))
        a = hs[-1] @ weights[-1].T + biases[-1]
        z = a - a.max(axis=1, keepdims=True)
        e = np.exp(z)
        s = e.sum(axis=1, keepdims=True)
        rows = np.arange(len(x))
        loss = float(np.mean(np.log(s[:, 0]) - z[rows, y]))
        da = e / s
        da[rows, y] -= 1
        da /= len(x)
        for k in range(len(weights) - 1, -1, -1):
            dW, db = da.T @ hs[k], da.sum(axis=0)
            if k > 0:
                da = (da @ weights[k]) * (hs[k] > 0)
            weights[k] -= learning_rate * dW
            biases[k] -= learning_rate * db
        return loss

    return step
