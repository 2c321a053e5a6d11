"""NumPy as people write it, where every expression allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import BETAS, CHECKED_STEPS, EPS, LEARNING_RATES, Case, data
from benchmarks.peers import Contestant, blas_threads

Floats = NDArray[Any]
Labels = NDArray[np.int64]
Update = Callable[[list[Floats], list[Floats]], None]
Loss = Callable[[Floats, Labels], tuple[Any, Floats]]


def contestant(case: Case, variant: str) -> Contestant:
    made = {"layer": layer_backward, "loss": loss, "fit": fit}.get(case.family, step)(case)
    made.setting, made.choices = blas_threads.setting(), blas_threads.choices()
    return made


def layer_backward(case: Case) -> Contestant:
    layer = data.layer(case)
    da, h, W = layer.da, layer.h, layer.W

    def call() -> tuple[Floats, Floats, Floats]:
        return da.T @ h, da.sum(axis=0), (da @ W) * (h > 0)

    return Contestant(call, lambda: dict(zip(("dW", "db", "da_prev"), call(), strict=True)))


def cross_entropy(a: Floats, y: Labels) -> tuple[float, Floats]:
    """Compute the mean cross-entropy behind a softmax, and da."""
    z = a - a.max(axis=1, keepdims=True)
    e = np.exp(z)
    s = e.sum(axis=1, keepdims=True)
    rows = np.arange(len(a))
    da = e / s
    da[rows, y] -= 1
    return float(np.mean(np.log(s[:, 0]) - z[rows, y])), da / len(a)


def loss(case: Case) -> Contestant:
    logits = data.logits(case)

    def call() -> tuple[float, Floats]:
        return cross_entropy(logits.a, logits.y)

    return Contestant(call, lambda: dict(zip(("loss", "da"), call(), strict=True)))


def sgd(learning_rate: float) -> Update:
    def update(parameters: list[Floats], gradients: list[Floats]) -> None:
        for parameter, g in zip(parameters, gradients, strict=True):
            parameter -= learning_rate * g

    return update


def adam(learning_rate: float, parameters: list[Floats]) -> Update:
    beta_1, beta_2 = BETAS
    ms, vs = ([np.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    t = 0

    def update(parameters: list[Floats], gradients: list[Floats]) -> None:
        nonlocal t
        t += 1
        for k, g in enumerate(gradients):
            ms[k] = beta_1 * ms[k] + (1 - beta_1) * g
            vs[k] = beta_2 * vs[k] + (1 - beta_2) * g**2
            m, v = ms[k] / (1 - beta_1**t), vs[k] / (1 - beta_2**t)
            parameters[k] -= learning_rate * m / (np.sqrt(v) + EPS)

    return update


def plain_step(
    weights: list[Floats], biases: list[Floats], update: Update, value_and_delta: Loss = cross_entropy
) -> Callable[[Floats, Labels], float]:
    """Make a step on a loss behind relu layers: a function of x (B, n_0) and labels (B,)."""

    def step(x: Floats, y: Labels) -> float:
        hs = [x]
        for W, b in zip(weights[:-1], biases[:-1], strict=True):
            hs.append(np.maximum(hs[-1] @ W.T + b, 0))
        loss, da = value_and_delta(hs[-1] @ weights[-1].T + biases[-1], y)
        gradients: list[Floats] = []
        for k in range(len(weights) - 1, -1, -1):
            gradients = [da.T @ hs[k], da.sum(axis=0), *gradients]
            if k > 0:
                da = (da @ weights[k]) * (hs[k] > 0)
        update([part for pair in zip(weights, biases, strict=True) for part in pair], gradients)
        return loss

    return step


class Trainer:
    """A network, and steps that train it.

    Args:
        case: case whose optimizer is used.
        start: NumPy's arrays, or another library's that NumPy's functions work on.
        value_and_delta: the loss and da_L, as a function of a_L and labels.
    """

    def __init__(self, case: Case, start: data.Training, value_and_delta: Loss = cross_entropy) -> None:
        self.weights, self.biases = ([part.copy() for part in parts] for parts in (start.weights, start.biases))
        rate, parameters = LEARNING_RATES[case.optimizer], [*zip(self.weights, self.biases, strict=True)]
        update = sgd(rate) if case.optimizer == "SGD" else adam(rate, [part for pair in parameters for part in pair])
        self.step = plain_step(self.weights, self.biases, update, value_and_delta)

    @property
    def theta(self) -> Floats:
        return data.flat(self.weights, self.biases)


def step(case: Case) -> Contestant:
    start = data.training(case)
    trainer = Trainer(case, start)

    def restart() -> None:
        nonlocal trainer
        trainer = Trainer(case, start)

    def call() -> float:
        return trainer.step(start.x, start.y)

    def check() -> dict[str, Any]:
        restart()
        losses = [call() for _ in range(CHECKED_STEPS)]
        return {"theta": trainer.theta, "loss": losses[-1]}

    return Contestant(call, check, restart=restart)


def fit(case: Case) -> Contestant:
    start = data.training(case)
    rng = np.random.default_rng(1)

    def run(epochs: int, shuffle: bool) -> Floats:
        trainer = Trainer(case, start)
        order = np.arange(case.samples)
        for _ in range(epochs):
            if shuffle:
                rng.shuffle(order)
            for first in range(0, case.samples, case.batch_size):
                rows = order[first : first + case.batch_size]
                trainer.step(start.x[rows], start.y[rows])
        return trainer.theta

    return Contestant(lambda: run(case.epochs, True), lambda: {"theta": run(1, False)})
