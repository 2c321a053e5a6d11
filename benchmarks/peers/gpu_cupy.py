"""CuPy on a GPU, unfused: cuBLAS, and a kernel for each elementwise operation."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import cupy

from benchmarks.cases import CHECKED_STEPS, Case, data, gpu_data
from benchmarks.peers import Contestant, LeftOutError
from benchmarks.peers.gpu_arrays import synchronize
from benchmarks.peers.plain_numpy import Loss, Trainer


def contestant(case: Case, variant: str) -> Contestant:
    if case.dtype == "tf32":
        raise LeftOutError("takes TF32 from the environment, for the whole process")
    if case.family == "layer":
        return layer_backward(case)
    return loss(case) if case.family == "loss" else step(case)


def unfused(da: Any, h: Any, W: Any) -> tuple[Any, ...]:
    delta = da @ W
    delta *= h > 0
    return da.T @ h, da.sum(axis=0), delta


def layer_backward(case: Case) -> Contestant:
    sets = [buffers[:3] for buffers in gpu_data.layer(case)]
    turn = cycle(sets)

    def check() -> dict[str, Any]:
        return dict(zip(("dW", "db", "da_prev"), unfused(*sets[0]), strict=True))

    return Contestant(lambda: unfused(*next(turn)), check, wait=synchronize, sets=len(sets))


def cross_entropy(rows: Any) -> Loss:
    """Make the mean cross-entropy behind a softmax, with row numbers `rows`. The mean stays on the device."""

    def value_and_delta(a: Any, y: Any) -> tuple[Any, Any]:
        z = a - a.max(axis=1, keepdims=True)
        e = cupy.exp(z)
        s = e.sum(axis=1, keepdims=True)
        da = e / s
        da[rows, y] -= 1
        return (cupy.log(s[:, 0]) - z[rows, y]).mean(), da / len(a)

    return value_and_delta


def loss(case: Case) -> Contestant:
    logits = data.logits(case)
    y, value_and_delta = cupy.asarray(logits.y), cross_entropy(cupy.arange(case.batch_size))
    sets = [cupy.asarray(logits.a) for _ in range(gpu_data.copies(case.bytes, gpu_data.MOST_SETS))]
    turn = cycle(sets)

    def check() -> dict[str, Any]:
        value, da = value_and_delta(sets[0], y)
        return {"loss": float(value), "da": cupy.asnumpy(da)}

    return Contestant(lambda: value_and_delta(next(turn), y), check, wait=synchronize, sets=len(sets))


def step(case: Case) -> Contestant:
    """Train on batches at several addresses."""
    if case.dtype != "float32":
        raise LeftOutError("trains in float32 only")
    start, rows = data.training(case), cupy.arange(case.batch_size)
    on_device = data.Training(
        *(cupy.asarray(part) for part in (start.x, start.y)),
        *([cupy.asarray(part) for part in parts] for parts in (start.weights, start.biases)),
    )
    batches = [(on_device.x.copy(), on_device.y) for _ in range(gpu_data.copies(start.x.nbytes, gpu_data.MOST_BATCHES))]
    turn = cycle(batches)
    trainer: Any = None

    def restart() -> None:
        nonlocal trainer
        trainer = Trainer(case, on_device, cross_entropy(rows))

    def call() -> Any:
        return trainer.step(*next(turn))

    def check() -> dict[str, Any]:
        restart()
        losses = [call() for _ in range(CHECKED_STEPS)]
        theta = data.flat(*([cupy.asnumpy(part) for part in parts] for parts in (trainer.weights, trainer.biases)))
        return {"theta": theta, "loss": float(losses[-1])}

    return Contestant(call, check, wait=synchronize, restart=restart, sets=len(batches))
