"""JAX on a GPU: each case one jitted function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import cupy
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import CHECKED_STEPS, Case, data, gpu_data
from benchmarks.peers import Contestant, jax_jit

PRECISIONS = {"float32": "float32", "tf32": "tensorfloat32"}
"""Precision of products of float32 operands, by a case's dtype. JAX's own default on GPUs is TF32."""


def contestant(case: Case, variant: str) -> Contestant:
    jax_jit.require_gpu()
    return {"layer": layer_backward, "loss": loss}.get(case.family, step)(case)


def exactly(case: Case, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its products are traced with the case's precision."""
    precision = PRECISIONS.get(case.dtype)

    def traced(*arguments: Any) -> Any:
        with jax.default_matmul_precision(precision) if precision else nullcontext():
            return function(*arguments)

    return traced


def layer_backward(case: Case) -> Contestant:
    total = jnp.float32

    def backward(da: Any, h: Any, W: Any) -> tuple[Any, ...]:
        dW = jnp.matmul(da.T, h, preferred_element_type=total)
        return dW, da.sum(0, dtype=total), jnp.where(h > 0, da @ W, jnp.zeros((), da.dtype))

    jitted = jax.jit(exactly(case, backward))
    sets = [tuple(map(as_jax, buffers[:3])) for buffers in gpu_data.layer(case)]
    turn, latest = cycle(sets), None

    def call() -> None:
        nonlocal latest
        latest = jitted(*next(turn))

    def check() -> dict[str, Any]:
        results = [np.asarray(part.astype(jnp.float32)) for part in jitted(*sets[0])]
        return dict(zip(("dW", "db", "da_prev"), map(cupy.asarray, results), strict=True))

    return Contestant(call, check, "jitted", wait=lambda: jax.block_until_ready(latest), sets=len(sets))


def as_jax(array: Any) -> Any:
    """Share a CuPy array's memory with JAX. bfloat16 goes by way of its bits, which are copied."""
    if array.dtype.name == "bfloat16":
        return jax.lax.bitcast_convert_type(jnp.from_dlpack(array.view(np.int16)), jnp.bfloat16)
    return jnp.from_dlpack(array)


def loss(case: Case) -> Contestant:
    logits = data.logits(case)
    y = jnp.asarray(logits.y)
    sets = [jnp.array(logits.a) for _ in range(gpu_data.copies(case.bytes, gpu_data.MOST_SETS))]
    value_and_grad = jax.jit(jax.value_and_grad(jax_jit.cross_entropy))
    turn, latest = cycle(sets), None

    def call() -> None:
        nonlocal latest
        latest = value_and_grad(next(turn), y)

    def check() -> dict[str, Any]:
        return dict(zip(("loss", "da"), map(np.asarray, value_and_grad(sets[0], y)), strict=True))

    return Contestant(call, check, "jitted", wait=lambda: jax.block_until_ready(latest), sets=len(sets))


def product(case: Case) -> jax_jit.Product:
    """Make the product of 16-bit operands, with sums in float32 as gpuback's."""
    if case.dtype != "bfloat16":
        return jnp.matmul
    return lambda h, W: jnp.matmul(h.astype(jnp.bfloat16), W.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def jitted_step(case: Case) -> Any:
    def take(state: Any, x: Any, y: Any) -> Any:
        return jax_jit.train_step(case.optimizer, state, x, y, product(case))

    return jax.jit(exactly(case, take), donate_argnums=0)


def step(case: Case) -> Contestant:
    """Train on batches at several addresses."""
    start, take = data.training(case), jitted_step(case)
    batches = [
        (jnp.array(start.x), jnp.array(start.y)) for _ in range(gpu_data.copies(start.x.nbytes, gpu_data.MOST_BATCHES))
    ]
    turn = cycle(batches)
    state = value = None

    def restart() -> None:
        nonlocal state
        state = jax_jit.first_state(case, start)

    def call() -> None:
        nonlocal state, value
        state, value = take(state, *next(turn))

    def check() -> dict[str, Any]:
        restart()
        for _ in range(CHECKED_STEPS):
            call()
        return {"theta": jax_jit.flat(state), "loss": np.asarray(value)}

    def wait() -> None:
        jax.block_until_ready((state, value))

    return Contestant(call, check, "jitted, state donated", wait=wait, restart=restart, sets=len(batches))


def memory(case: Case, variant: str) -> int:
    """Return the bytes of a batch, the state and what a step needs beside them, as its compilation reports."""
    start = data.training(case)
    state = jax_jit.first_state(case, start)
    stats = jitted_step(case).lower(state, jnp.array(start.x), jnp.array(start.y)).compile().memory_analysis()
    needed = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return int(needed - stats.alias_size_in_bytes)
