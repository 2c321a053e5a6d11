"""gpuback itself. The number of BLAS's threads is chosen as for the other libraries.

All families but the loss use public calls alone, so that `compare --commits` can time earlier commits.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np

import gpuback
from benchmarks.cases import BETAS, CHECKED_STEPS, EPS, LEARNING_RATES, Case, data
from benchmarks.peers import Contestant, blas_threads


def contestant(case: Case, variant: str) -> Contestant:
    """Make a contestant.

    Args:
        case: its case.
        variant: for a step "", "reproducible", "vjp" with a loss of its own, or "cupy" for the GPU; for a layer "",
            "fresh" outputs at each call, or "bound".
    """
    if variant == "cupy":
        return step(case, backend="cupy")
    if variant == "vjp":
        made = own_loss(case)
        made.setting, made.choices = blas_threads.setting(), blas_threads.choices()
        return made
    if case.family == "layer":
        made = layer_backward(case, variant)
    else:
        make = {"loss": loss, "fit": fit}.get(case.family)
        made = step(case, reproducible=variant == "reproducible") if make is None else make(case)
    made.setting, made.choices = blas_threads.setting(), blas_threads.choices()
    return made


def layer_backward(case: Case, variant: str) -> Contestant:
    layer = data.layer(case)
    outs = {"dW": np.empty_like(layer.W), "db": np.empty_like(layer.da[0]), "da_prev": np.empty_like(layer.h)}
    given = {} if variant == "fresh" else outs
    if variant == "bound":
        call = gpuback.bind_fused_backward(layer.da, layer.h, layer.W, activation_prev="relu", **given)
    else:

        def call() -> Any:
            return gpuback.fused_backward(layer.da, layer.h, layer.W, activation_prev="relu", **given)

    return Contestant(call, lambda: dict(zip(outs, call(), strict=True)))


def loss(case: Case) -> Contestant:
    """Compute the loss as a step does. That overwrites the logits, so they are copied first."""
    from gpuback._backends.registry import ops_for
    from gpuback._core.losses import LOSSES

    logits = data.logits(case)
    net = gpuback.MLP((1, *case.sizes), dtype=case.dtype, backend="numpy", seed=0)
    ops, rows = ops_for("numpy"), case.batch_size
    workspace = ops.workspace(rows, net.sizes, net.architecture.precision)
    a = workspace.output(case.sizes[0])
    da = workspace.output_delta(a)
    value_and_delta = ops.bind_loss(net.architecture.loss_row, net.architecture.output, a, da, rows, workspace)
    assert net.architecture.loss_row is LOSSES["cross_entropy"]
    value = 0.0

    def call() -> None:
        nonlocal value
        np.copyto(a, logits.a)
        value = value_and_delta(logits.y, None) / rows

    def check() -> dict[str, Any]:
        call()
        return {"loss": value, "da": da}

    return Contestant(call, check)


def optimizer(case: Case) -> gpuback.SGD | gpuback.Adam:
    rate = LEARNING_RATES[case.optimizer]
    return gpuback.SGD(rate) if case.optimizer == "SGD" else gpuback.Adam(rate, BETAS, EPS)


def network(case: Case, theta: Any, **options: Any) -> gpuback.MLP:
    net = gpuback.MLP(case.sizes, seed=0, **{"dtype": case.dtype, "backend": "numpy", **options})
    net.theta = theta
    return net


def step(case: Case, **options: Any) -> Contestant:
    """Train a new network in each turn, since the number of threads is fixed when buffers are made."""
    start = data.training(case)
    theta = data.flat(start.weights, start.biases)
    takes, value = trainer(case, theta, **options), None
    x, y = (on_device(part, takes.net.backend) for part in (start.x, start.y))

    def call() -> None:
        nonlocal value
        value = takes(x, y)

    def restart() -> None:
        nonlocal takes
        takes = trainer(case, theta, **options)

    def wait() -> None:
        """Wait for a GPU, where losses stay until they are asked for."""
        if takes.net.backend != "numpy" and value is not None:
            float(value)

    def check() -> dict[str, Any]:
        restart()
        for _ in range(CHECKED_STEPS):
            call()
        theta = takes.net.theta
        return {"theta": theta if isinstance(theta, np.ndarray) else theta.get(), "loss": float(value)}

    return Contestant(call, check, wait=wait, restart=restart)


def own_loss(case: Case) -> Contestant:
    """Train with `vjp` and `optimizer.step`; softmax and cross-entropy are this function's own, in plain NumPy."""
    start = data.training(case)
    theta = data.flat(start.weights, start.biases)
    targets = np.eye(case.sizes[-1], dtype=theta.dtype)[start.y]
    net = adam_or_sgd = gradients = None
    value = 0.0

    def cross_entropy(z: Any) -> float:
        """Turn the scores into the mean loss's gradient for them, in place; return the loss."""
        z -= z.max(axis=1, keepdims=True)
        right = np.vdot(z, targets)
        np.exp(z, out=z)
        total = z.sum(axis=1, keepdims=True)
        z /= total
        z -= targets
        z /= len(z)
        return float(np.log(total).sum() - right) / len(z)

    def call() -> None:
        nonlocal value, gradients
        z, pullback = net.vjp(start.x)
        value = cross_entropy(z)
        gradients = pullback(z, out=gradients)
        adam_or_sgd.step(net, gradients)

    def restart() -> None:
        nonlocal net, adam_or_sgd, gradients
        net, adam_or_sgd = network(case, theta, loss="squared_error"), optimizer(case)
        gradients = None

    def check() -> dict[str, Any]:
        restart()
        for _ in range(CHECKED_STEPS):
            call()
        return {"theta": net.theta, "loss": value}

    restart()
    return Contestant(call, check, restart=restart)


def on_device(array: Any, backend: str) -> Any:
    if backend == "numpy":
        return array
    import cupy

    return cupy.asarray(array)


def trainer(case: Case, theta: Any, **options: Any) -> gpuback.TrainStep:
    return gpuback.TrainStep(network(case, theta, **options), optimizer(case))


def fit(case: Case) -> Contestant:
    start = data.training(case)
    theta = data.flat(start.weights, start.biases)
    seeds = cycle(range(100))

    def run(epochs: int, **options: Any) -> gpuback.MLP:
        net = network(case, theta)
        adam = optimizer(case)
        gpuback.fit(net, start.x, start.y, optimizer=adam, epochs=epochs, batch_size=case.batch_size, **options)
        return net

    def call() -> None:
        run(case.epochs, seed=next(seeds))

    return Contestant(call, lambda: {"theta": run(1, shuffle=False).theta})
