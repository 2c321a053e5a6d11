"""Steps in micro-batches and with a dynamic loss scale on a real GPU beside NumPy's, and fit with a schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.requirements import require_gpu

import gpuback
from gpuback import MLP, SGD, Adam, LossScaling, TrainStep
from gpuback.schedules import cosine, warmup
from gpuback.testing import fingerprint, random_batch

pytestmark = pytest.mark.gpu

CLOSE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 3e-2, "float16": 6e-3}
"""Between two backends' results for a small network, relative to the norm."""


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    require_gpu()


def network(backend: str, sizes: Any = (40, 150, 9), **options: Any) -> MLP:
    return MLP(sizes, backend=backend, **({"activation": "tanh", "seed": 1} | options))


def moved(net: MLP, step: TrainStep, sizes: tuple[int, ...] = (1000, 130, 1000)) -> tuple[list[float], np.ndarray]:
    before = net.ops.to_numpy(net.theta).copy()
    losses = [float(step(*random_batch(net, size, turn))) for turn, size in enumerate(sizes)]
    return losses, net.ops.to_numpy(net.theta) - before


@pytest.mark.parametrize("sizes", [(40, 150, 9), (40, 64, 9)], ids=["wide", "narrow"])
@pytest.mark.parametrize("micro_batch_size", [None, 96])
@pytest.mark.parametrize("dtype", CLOSE)
def test_steps_are_numpys(dtype: str, micro_batch_size: int | None, sizes: Any) -> None:
    runs = []
    for backend in ("numpy", "cupy"):
        net = network(backend, sizes, dtype=dtype)
        scaling = LossScaling(64.0, growth_interval=1) if dtype == "float16" else None
        runs.append(moved(net, TrainStep(net, SGD(0.1, 0.9), micro_batch_size=micro_batch_size, loss_scaling=scaling)))
    (losses, theta), (expected, exact) = runs[1], runs[0]
    assert losses == pytest.approx(expected, rel=CLOSE[dtype])
    assert np.linalg.norm(theta - exact) <= CLOSE[dtype] * np.linalg.norm(exact)


GROUPS: dict[str, dict[str, Any]] = {
    "frozen": {"trainable": [False, (False, True), True]},
    "unequal": {"multipliers": [0.1, 1, (1, 2)], "decay_biases": False},
}


@pytest.mark.parametrize("sizes", [(40, 150, 30, 9), (40, 64, 30, 9)], ids=["wide", "narrow"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", CLOSE)
def test_steps_with_groups_are_numpys(dtype: str, groups: str, sizes: Any) -> None:
    runs = []
    for backend in ("numpy", "cupy"):
        net = network(backend, sizes, dtype=dtype)
        step = TrainStep(net, SGD(0.1, 0.9, weight_decay=0.1, **GROUPS[groups]), clip_norm=0.5)
        runs.append(moved(net, step, (1000, 130, 1000, 1000, 1000)))  # the last one is a graph's on a GPU
    (losses, theta), (expected, exact) = runs[1], runs[0]
    assert losses == pytest.approx(expected, rel=CLOSE[dtype])
    assert np.linalg.norm(theta - exact) <= CLOSE[dtype] * np.linalg.norm(exact)
    if groups == "frozen":
        biases = (41 + 30) * sizes[1]  # b_2 is the first that is trained
        assert not theta[:biases].any() and theta[biases : biases + 30].all()


def test_the_scale_is_settled_as_numpy_does() -> None:
    states = []
    for backend in ("numpy", "cupy"):
        net = network(backend, dtype="float16")
        step = TrainStep(net, Adam(0.01), loss_scaling=LossScaling(2.0**20, growth_interval=2))
        moved(net, step, (33,) * 12)
        states.append(step._loss_scale.state)
    assert states[0] == states[1]
    assert states[0][2] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reproducible_bits_are_numpys(dtype: str) -> None:
    prints = set()
    for backend in ("numpy", "cupy"):
        net = network(backend, dtype=dtype, reproducible=True)
        scaling = LossScaling(2.0**20, growth_interval=3) if dtype == "float16" else None
        x, y = random_batch(net, 200)
        schedule = warmup(cosine(0.02, steps=20), 4)
        options = {"micro_batch_size": 24, "loss_scaling": scaling, "batch_size": 64, "epochs": 6, "seed": 0}
        history = gpuback.fit(net, x, y, optimizer=Adam(), schedule=schedule, clip_norm=1.0, **options)
        prints.add((fingerprint(net), tuple(history.loss)))
    assert len(prints) == 1
