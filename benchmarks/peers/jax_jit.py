"""JAX: each case one jitted function, whose state is donated to it. Steps run on a GPU too."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import BETAS, CHECKED_STEPS, EPS, LEARNING_RATES, Case, data
from benchmarks.peers import Contestant, LeftOutError

Product = Callable[[Any, Any], Any]


def contestant(case: Case, variant: str) -> Contestant:
    """Make a contestant. Variant "cuda" runs a step on a GPU, and turns off JAX's rounding of operands to TF32."""
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    if variant == "cuda":
        require_gpu()
        jax.config.update("jax_default_matmul_precision", "float32")
    make = {"layer": layer_backward, "loss": loss, "fit": fit}.get(case.family, step)
    made = make(case)
    made.setting = "whole function jitted" + (", state donated" if case.optimizer else "")
    return made


def require_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise LeftOutError("finds no GPU")


def layer_backward(case: Case) -> Contestant:
    layer = data.layer(case)
    da, h, W = (jnp.asarray(part) for part in (layer.da, layer.h, layer.W))
    results: Any = None

    @jax.jit
    def backward(da: Any, h: Any, W: Any) -> Any:
        return {"dW": da.T @ h, "db": da.sum(0), "da_prev": jnp.where(h > 0, da @ W, 0)}

    def call() -> None:
        nonlocal results
        results = backward(da, h, W)

    def check() -> dict[str, Any]:
        call()
        return {name: np.asarray(part) for name, part in results.items()}

    return Contestant(call, check, wait=lambda: jax.block_until_ready(results))


def cross_entropy(a: Any, y: Any) -> Any:
    own = jnp.take_along_axis(a, y[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(a, axis=1) - own)


def loss(case: Case) -> Contestant:
    logits = data.logits(case)
    a, y = jnp.asarray(logits.a), jnp.asarray(logits.y)
    value_and_grad = jax.jit(jax.value_and_grad(cross_entropy))
    results: Any = None

    def call() -> None:
        nonlocal results
        results = value_and_grad(a, y)

    def check() -> dict[str, Any]:
        call()
        return dict(zip(("loss", "da"), map(np.asarray, results), strict=True))

    return Contestant(call, check, wait=lambda: jax.block_until_ready(results))


def loss_of_network(parameters: Any, x: Any, y: Any, product: Product) -> Any:
    h = x
    for W, b in parameters[:-1]:
        h = jax.nn.relu(product(h, W.T) + b)
    W, b = parameters[-1]
    return cross_entropy(product(h, W.T) + b, y)


def train_step(optimizer: str, state: Any, x: Any, y: Any, product: Product = operator.matmul) -> tuple[Any, Any]:
    """Compute the next (parameters, moments, count of steps), and the loss."""
    parameters, (first, second), count = state
    value, gradient = jax.value_and_grad(loss_of_network)(parameters, x, y, product)
    rate, count = LEARNING_RATES[optimizer], count + 1
    if optimizer == "SGD":
        return (jax.tree.map(lambda p, g: p - rate * g, parameters, gradient), (first, second), count), value
    beta_1, beta_2 = BETAS
    first = jax.tree.map(lambda m, g: beta_1 * m + (1 - beta_1) * g, first, gradient)
    second = jax.tree.map(lambda v, g: beta_2 * v + (1 - beta_2) * g * g, second, gradient)
    c_1, c_2 = 1 - beta_1**count, 1 - beta_2**count
    parameters = jax.tree.map(
        lambda p, m, v: p - rate * (m / c_1) / (jnp.sqrt(v / c_2) + EPS), parameters, first, second
    )
    return (parameters, (first, second), count), value


def first_state(case: Case, start: data.Training) -> Any:
    # Copies: jnp.asarray may share NumPy's memory, and donated arrays are written to.
    parameters = [(jnp.array(W), jnp.array(b)) for W, b in zip(start.weights, start.biases, strict=True)]
    moments = [jax.tree.map(jnp.zeros_like, parameters if case.optimizer == "Adam" else []) for _ in range(2)]
    return parameters, tuple(moments), jnp.zeros((), start.x.dtype)


def flat(state: Any) -> Any:
    parameters = [tuple(map(np.asarray, pair)) for pair in state[0]]
    return data.flat(*zip(*parameters, strict=True))


def step(case: Case) -> Contestant:
    start = data.training(case)
    x, y = jnp.asarray(start.x), jnp.asarray(start.y)
    take = jax.jit(partial(train_step, case.optimizer), donate_argnums=0)
    state, value = first_state(case, start), None

    def restart() -> None:
        nonlocal state
        state = first_state(case, start)

    def call() -> None:
        nonlocal state, value
        state, value = take(state, x, y)

    def check() -> dict[str, Any]:
        restart()
        for _ in range(CHECKED_STEPS):
            call()
        return {"theta": flat(state), "loss": np.asarray(value)}

    return Contestant(call, check, wait=lambda: jax.block_until_ready((state, value)), restart=restart)


def fit(case: Case) -> Contestant:
    """Train an epoch by one jitted function, a scan over its batches."""
    start = data.training(case)
    x, y = jnp.asarray(start.x), jnp.asarray(start.y)

    @partial(jax.jit, donate_argnums=0)
    def epoch(state: Any, order: Any) -> Any:
        def body(state: Any, rows: Any) -> Any:
            return train_step(case.optimizer, state, x[rows], y[rows])

        return jax.lax.scan(body, state, order.reshape(-1, case.batch_size))

    rng = np.random.default_rng(1)

    def run(epochs: int, shuffle: bool) -> Any:
        state, order = first_state(case, start), np.arange(case.samples)
        for _ in range(epochs):
            if shuffle:
                rng.shuffle(order)
            state, _ = epoch(state, order)
        return flat(state)

    return Contestant(lambda: run(case.epochs, True), lambda: {"theta": run(1, False)})
