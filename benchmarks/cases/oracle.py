"""Exact results of every case, in float64 by the textbook, and how far contestants' results may lie from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import BETAS, CHECKED_STEPS, EPS, LEARNING_RATES, STEPS, Case, CheckFailedError, data
from gpuback.testing import tolerance

F64 = NDArray[np.float64]

CLOSE, CLOSE_AFTER_EPOCH = {"float32": 1e-3, "float64": 1e-9}, 5
"""Largest error of an update, a loss or da by dtype, relative to its length, and the factor on it after an epoch.

Rounding to float32 alone stays below 10⁻⁴. But among millions of pre-activations it puts a few on the other side of
relu's kink in every step. A sample that is left out shows as 1/√B or more.
"""

NEEDED = {"layer": ("dW", "db", "da_prev"), "loss": ("loss", "da"), "fit": ("theta",), "product": ("product",)}
"""Results that a contestant must show. In other families: θ after some steps, and the last step's loss."""


class Pass(NamedTuple):
    """A batch's way through a network and back. hs[k] is h_k, das[k] is da_k, and das[0] is empty."""

    loss: float
    hs: list[F64]
    das: list[F64]
    dWs: list[F64]
    dbs: list[F64]


def softmax_cross_entropy(a: F64, y: NDArray[np.int64]) -> tuple[float, F64]:
    """Compute the mean of log Σ_j e^a_j − a_y, and its derivative (ŷ − e(y))/B."""
    z = a - a.max(axis=1, keepdims=True)
    e = np.exp(z)
    s = e.sum(axis=1, keepdims=True)
    rows = np.arange(len(a))
    da = e / s
    da[rows, y] -= 1
    return float(np.mean(np.log(s[:, 0]) - z[rows, y])), da / len(a)


def forward_backward(weights: Sequence[F64], biases: Sequence[F64], x: F64, y: NDArray[np.int64]) -> Pass:
    hs = [x]
    for W, b in zip(weights[:-1], biases[:-1], strict=True):
        hs.append(np.maximum(hs[-1] @ W.T + b, 0))
    loss, da = softmax_cross_entropy(hs[-1] @ weights[-1].T + biases[-1], y)
    das = [da]
    for k in range(len(weights) - 1, 0, -1):
        das.insert(0, (das[0] @ weights[k]) * (hs[k] > 0))
    dWs = [da.T @ h for da, h in zip(das, hs, strict=True)]
    return Pass(loss, hs, [np.empty(0), *das], dWs, [da.sum(axis=0) for da in das])


class Trained(NamedTuple):
    """θ after some steps, and the last step's loss."""

    theta: F64
    loss: float


def train(case: Case, start: data.Training, *, corrects_epsilon: bool = True) -> Trained:
    """Train on each batch of a check.

    Args:
        corrects_epsilon: Adam divides by √(v/(1 − β₂ᵗ)) + ε, or else by (√v + ε)/√(1 − β₂ᵗ), the paper's second form.
    """
    weights, biases = ([part.astype(np.float64) for part in parts] for parts in (start.weights, start.biases))
    theta = [part for pair in zip(weights, biases, strict=True) for part in pair]
    first, second = ([np.zeros_like(part) for part in theta] for _ in range(2))
    rate, (beta_1, beta_2) = LEARNING_RATES[case.optimizer], BETAS
    loss = np.nan
    for step, rows in enumerate(batches(case), 1):
        seen = forward_backward(weights, biases, start.x[rows].astype(np.float64), start.y[rows])
        loss = seen.loss
        gradient = [part for pair in zip(seen.dWs, seen.dbs, strict=True) for part in pair]
        for part, g, m, v in zip(theta, gradient, first, second, strict=True):
            if case.optimizer == "SGD":
                part -= rate * g
                continue
            m[...] = beta_1 * m + (1 - beta_1) * g
            v[...] = beta_2 * v + (1 - beta_2) * g * g
            correction = np.sqrt(1 - beta_2**step)
            epsilon = EPS if corrects_epsilon else EPS / correction
            part -= rate * (m / (1 - beta_1**step)) / (np.sqrt(v) / correction + epsilon)
    return Trained(data.flat(weights, biases), loss)


def batches(case: Case) -> Iterator[slice]:
    """Yield the batches of a check: the same batch again and again, or for `fit` one epoch in the samples' order."""
    if case.family == "fit":
        return (slice(first, first + case.batch_size) for first in range(0, case.samples, case.batch_size))
    return iter([slice(None)] * CHECKED_STEPS)


class Oracle:
    """A case's exact results."""

    def __init__(self, case: Case, *, corrects_epsilon: bool = True) -> None:
        self._case, self._corrects_epsilon = case, corrects_epsilon
        self._limit = CLOSE[case.dtype] * (CLOSE_AFTER_EPOCH if case.family == "fit" else 1)
        self._exact: dict[str, Any] = {}
        self._allowed: dict[str, Any] = {}
        if case.family == "layer":
            self._add_layer(data.layer(case))
        elif case.family == "loss":
            self._add_loss(data.logits(case))
        elif case.family == "product":
            a, b = (part.astype(np.float64) for part in data.factors(case))
            self._add_product("product", a, b, case.sizes[0])
        elif case.family != "copy":
            self._add_training(data.training(case))

    def check(self, results: Mapping[str, NDArray[Any]], role: str = "peer", slack: float = 1.0) -> None:
        """Hold results to the exact ones. A floor makes products only, so each result that it has is checked.

        Args:
            results: arrays by name.
            role: the contestant's role.
            slack: factor on the allowed error.

        Raises:
            CheckFailedError: a result is missing, has another shape, or is too far off.
        """
        needed = NEEDED.get(self._case.family, ("theta", "loss"))
        for name in results if role == "floor" else needed:
            if name not in results or name not in self._exact:
                raise CheckFailedError(f"check failed: {name} is missing")
            exact, result = self._exact[name], np.asarray(results[name], dtype=np.float64)
            if result.shape != exact.shape:
                raise CheckFailedError(f"check failed: {name} has shape {result.shape} instead of {exact.shape}")
            error = float(np.max(self._error(name, result - exact))) / slack
            if not error <= 1:
                raise CheckFailedError(f"check failed: {name} is off by {error:.3g} times what is allowed")

    def _error(self, name: str, difference: F64) -> Any:
        """Divide a difference by the allowed error: element by element, or by its norm where one number is allowed."""
        allowed = self._allowed[name]
        if np.ndim(allowed):
            return np.abs(difference) / np.maximum(allowed, 1e-300)
        return np.linalg.norm(difference) / allowed

    def _add_layer(self, layer: data.Layer) -> None:
        da, h, W = (part.astype(np.float64) for part in (layer.da, layer.h, layer.W))
        B, n_out = da.shape
        self._add_product("dW", da.T, h, B)
        self._add_product("db", da.T, np.ones((B, 1)), B)
        self._add_product("da W", da, W, n_out)
        self._exact["db"], self._allowed["db"] = self._exact["db"][:, 0], self._allowed["db"][:, 0]
        self._exact["da_prev"] = self._exact["da W"] * (h > 0)
        self._allowed["da_prev"] = self._allowed["da W"]

    def _add_product(self, name: str, left: F64, right: F64, terms: int) -> None:
        """Add a product, held to the numeric contract element by element."""
        self._exact[name] = left @ right
        self._allowed[name] = tolerance(np.abs(left) @ np.abs(right), terms, self._case.dtype)

    def _add_loss(self, logits: data.Logits) -> None:
        loss, da = softmax_cross_entropy(logits.a.astype(np.float64), logits.y)
        self._add_whole("loss", np.array(loss), abs(loss))
        self._add_whole("da", da, float(np.linalg.norm(da)))

    def _add_training(self, start: data.Training) -> None:
        trained = train(self._case, start, corrects_epsilon=self._corrects_epsilon)
        theta = data.flat(start.weights, start.biases)
        self._add_whole("theta", trained.theta, float(np.linalg.norm(trained.theta - theta)))
        self._add_whole("loss", np.array(trained.loss), abs(trained.loss))
        if self._case.family in STEPS:
            rows = start.x.astype(np.float64)
            weights, biases = ([part.astype(np.float64) for part in parts] for parts in (start.weights, start.biases))
            dW = np.concatenate([one.ravel() for one in forward_backward(weights, biases, rows, start.y).dWs])
            self._add_whole("dW", dW, float(np.linalg.norm(dW)))

    def _add_whole(self, name: str, exact: F64, length: float) -> None:
        self._exact[name], self._allowed[name] = exact, self._limit * length
