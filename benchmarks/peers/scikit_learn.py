"""scikit-learn's MLPClassifier: `partial_fit` on one batch is a step; arithmetic is in the samples' dtype."""

from __future__ import annotations

import warnings
from itertools import count
from typing import Any

import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from benchmarks.cases import BETAS, CHECKED_STEPS, EPS, LEARNING_RATES, Case, data
from benchmarks.peers import Contestant, blas_threads

sklearn.set_config(assume_finite=True, skip_parameter_validation=True)


def contestant(case: Case, variant: str) -> Contestant:
    made = fit(case) if case.family == "fit" else step(case)
    made.setting = f"{blas_threads.setting()}, assume_finite"
    made.choices = blas_threads.choices()
    return made


def classifier(case: Case, **options: Any) -> Any:
    return MLPClassifier(
        hidden_layer_sizes=case.sizes[1:-1],
        solver=case.optimizer.lower(),
        alpha=0.0,
        batch_size=case.batch_size,
        learning_rate_init=LEARNING_RATES[case.optimizer],
        momentum=0.0,
        nesterovs_momentum=False,
        beta_1=BETAS[0],
        beta_2=BETAS[1],
        epsilon=EPS,
        **options,
    )


def take_up(net: Any, start: data.Training) -> None:
    """Copy the case's first θ into the network's own arrays, which the optimizer knows. W is (nI, nO) here."""
    for mine, W in zip(net.coefs_, start.weights, strict=True):
        mine[...] = W.T
    for mine, b in zip(net.intercepts_, start.biases, strict=True):
        mine[...] = b


def theta(net: Any) -> Any:
    return data.flat([W.T for W in net.coefs_], net.intercepts_)


def step(case: Case) -> Contestant:
    start = data.training(case)
    net = classifier(case)

    def call() -> None:
        net.partial_fit(start.x, start.y, classes=range(case.sizes[-1]))

    def restart() -> None:
        """Make arrays and optimizer by a first step, then set both to the beginning."""
        if not hasattr(net, "coefs_"):
            call()
        take_up(net, start)
        optimizer = net._optimizer
        optimizer.t = 0
        for moment in (*getattr(optimizer, "ms", ()), *getattr(optimizer, "vs", ())):
            moment[...] = 0

    def check() -> dict[str, Any]:
        restart()
        for _ in range(CHECKED_STEPS):
            call()
        return {"theta": theta(net), "loss": net.loss_}

    return Contestant(call, check, restart=restart)


def fit(case: Case) -> Contestant:
    """Train a fresh network. Its first weights are scikit-learn's own, and for a check the case's."""
    start = data.training(case)
    seeds = count()

    def run(epochs: int, **options: Any) -> Any:
        options = {"random_state": next(seeds) % 100, "max_iter": epochs, "n_iter_no_change": epochs + 1, **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return classifier(case, tol=0.0, **options).fit(start.x, start.y)

    def check() -> dict[str, Any]:
        net = run(1, shuffle=False, warm_start=True)
        take_up(net, start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            net.fit(start.x, start.y)
        return {"theta": theta(net)}

    return Contestant(lambda: run(case.epochs), check)
