"""Hyper-parameters that are set after construction: used from the next step on, checked, and kept in copies."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback import MLP, SGD, Adam, AdamW, LossScaling, TrainStep
from gpuback.errors import OptionError
from gpuback.testing import random_batch

pytestmark = pytest.mark.on_each_backend(layers=True)


def textbook(
    optimizer: Any, theta: np.ndarray, gradients: np.ndarray, changes: dict[int, dict[str, Any]]
) -> np.ndarray:
    """θ after a step on each gradient, in float64, with hyper-parameters that change before some of them.

    The velocity begins at 0 when there is momentum for the first time, as PyTorch's does.
    """
    h = {name: getattr(optimizer, name) for name in ("learning_rate", "weight_decay")}
    names = ("momentum", "nesterov") if isinstance(optimizer, SGD) else ("betas", "eps")
    h |= {name: getattr(optimizer, name) for name in names}
    m = v = 0.0 * theta
    powers, moves = np.ones(2), False
    for t, gradient in enumerate(gradients):
        h |= changes.get(t, {})
        rate, decay = h["learning_rate"], h["weight_decay"]
        if isinstance(optimizer, AdamW):
            theta, g = (1 - rate * decay) * theta, gradient
        else:
            g = gradient + decay * theta
        if isinstance(optimizer, SGD):
            moves = moves or h["momentum"] > 0
            m = h["momentum"] * m + g if moves else m
            theta = theta - rate * (g if not moves else g + h["momentum"] * m if h["nesterov"] else m)
            continue
        powers = powers * h["betas"]
        m = h["betas"][0] * m + (1 - h["betas"][0]) * g
        v = h["betas"][1] * v + (1 - h["betas"][1]) * g * g
        theta = theta - rate * (m / (1 - powers[0])) / (np.sqrt(v / (1 - powers[1])) + h["eps"])
    return theta


CHANGES = [
    (lambda: SGD(0.1), {3: {"momentum": 0.9}}),
    (lambda: SGD(0.1), {2: {"momentum": 0.9}, 3: {"nesterov": True}, 5: {"nesterov": False}, 6: {"momentum": 0.0}}),
    (lambda: SGD(0.1, 0.5, nesterov=True), {0: {"momentum": 0.25}, 4: {"weight_decay": 0.5, "learning_rate": 0.01}}),
    (lambda: SGD(0.1, 0.5), {3: {"momentum": 0.0}, 5: {"momentum": 0.75}}),
    (lambda: Adam(0.1), {3: {"betas": (0.5, 0.75)}, 6: {"betas": [0.0, 0.9]}}),
    (lambda: Adam(0.1), {0: {"eps": 0.5}, 4: {"weight_decay": 0.5}}),
    (lambda: AdamW(0.1), {2: {"weight_decay": 0.5, "eps": 1.0}, 3: {"betas": (0.8, 0.9)}}),
]
each_change = pytest.mark.parametrize("make, changes", CHANGES)


def assign(optimizer: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        setattr(optimizer, name, value)
        assert getattr(optimizer, name) == (tuple(value) if name == "betas" else value)


@each_change
@pytest.mark.parametrize("copied_at", [None, 3, 4])
def test_they_count_from_the_next_step_on(make: Any, changes: Any, copied_at: int | None) -> None:
    net, optimizer = MLP([4, 3, 2], seed=0, dtype="float64"), make()
    gradients = np.random.default_rng(0).standard_normal((9, net.n_parameters))
    expected = textbook(optimizer, net.theta.copy(), gradients, changes)
    for t, gradient in enumerate(gradients):
        if t == copied_at:
            net, optimizer = pickle.loads(pickle.dumps((net, optimizer)))
        assign(optimizer, changes.get(t, {}))
        optimizer.step(net, SimpleNamespace(theta=gradient))
    np.testing.assert_allclose(net.theta, expected, rtol=1e-12, atol=1e-13)


@each_change
def test_a_train_step_uses_them_too(make: Any, changes: Any) -> None:
    """As steps by hand do: on one backend in fused launches, on another layer by layer."""
    nets, optimizers = [MLP([4, 6, 3], seed=0, dtype="float64") for _ in range(2)], [make(), make()]
    step = TrainStep(nets[0], optimizers[0])
    for t in range(8):
        for optimizer in optimizers:
            assign(optimizer, changes.get(t, {}))
        x, y = random_batch(nets[0], 12, t)
        step(x, y)
        optimizers[1].step(nets[1], nets[1].value_and_grad(x, y)[1])
    np.testing.assert_allclose(nets[0].theta, nets[1].theta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [["momentum", "trainable"], ["trainable", "momentum"]])
def test_the_velocity_of_frozen_layers_stays_zero(order: list[str]) -> None:
    net = MLP([4, 6, 3], seed=0)
    optimizer = SGD(0.1, trainable=[False, True])
    step = TrainStep(net, optimizer)
    batch = random_batch(net, 12)
    step(*batch)
    before = net.weights[0].tobytes()
    optimizer.momentum = 0.9
    for _ in range(2):
        step(*batch)
    assert net.weights[0].tobytes() == before
    velocity = optimizer.state["velocity"]
    assert not velocity[: 4 * 6 + 6].any() and velocity[4 * 6 + 6 :].any()


# --- out of range: refused, and everything stays as it was

OUT_OF_RANGE = [
    (SGD, "momentum", (7, 1.0, -0.1, math.nan, math.inf, "0.9", None)),
    (SGD, "nesterov", (True, 1, "yes", None)),  # True: there is no momentum
    *[(kind, "weight_decay", (-1, math.nan, math.inf, "0.1", None)) for kind in (SGD, Adam, AdamW)],
    *[(kind, "learning_rate", (-1, math.nan, math.inf, "0.1", None)) for kind in (SGD, Adam, AdamW)],
    *[(kind, "betas", ((1.0, 0.9), (0.9, -1), 0.9, (0.9,), (0.9, 0.9, 0.9), None)) for kind in (Adam, AdamW)],
    *[(kind, "eps", (0, -1, math.nan, math.inf, "1", None)) for kind in (Adam, AdamW)],
]


@pytest.mark.numpy_only
@pytest.mark.parametrize("kind, name, values", OUT_OF_RANGE)
def test_out_of_range(kind: Any, name: str, values: tuple[Any, ...]) -> None:
    optimizer = kind(0.1)
    shown = repr(optimizer)
    for value in values:
        with pytest.raises(OptionError, match=name):
            setattr(optimizer, name, value)
        assert repr(optimizer) == shown


@pytest.mark.numpy_only
def test_nesterov_keeps_its_momentum() -> None:
    optimizer = SGD(0.1, 0.9, nesterov=True)
    with pytest.raises(OptionError, match="nesterov=True needs momentum > 0"):
        optimizer.momentum = 0
    assert optimizer.momentum == 0.9


@pytest.mark.numpy_only
def test_arrays_are_written_to_and_not_replaced() -> None:
    net, optimizer = MLP([2, 2], seed=0), Adam()
    step = TrainStep(net, optimizer)
    for owner, name in ((optimizer, "state"), (optimizer, "step_count"), (optimizer, "trainable"), (step, "net")):
        with pytest.raises(AttributeError):
            setattr(owner, name, None)
    with pytest.raises(AttributeError):
        step.optimizer = Adam()  # type: ignore[misc]
    with pytest.raises(TypeError):
        optimizer.state["first_moment"] = np.zeros(6)  # type: ignore[index]


# --- TrainStep


def test_clip_norm_and_micro_batches() -> None:
    steps = [TrainStep(MLP([4, 6, 3], seed=0, dtype="float64"), SGD(0.1)) for _ in range(2)]
    x, y = random_batch(steps[0].net, 12)
    for t, (clip_norm, size) in enumerate([(None, None), (0.01, None), (0.01, 5), (None, 5), (1e9, 12), (None, None)]):
        steps[0].clip_norm, steps[0].micro_batch_size = clip_norm, size
        steps[0](x, y)
        fresh = TrainStep(steps[1].net, steps[1].optimizer, clip_norm=clip_norm, micro_batch_size=size)
        fresh(x, y)
        assert steps[0].net.theta.tobytes() == fresh.net.theta.tobytes(), t


def test_a_loss_scale_may_come_go_and_begin_anew() -> None:
    step = TrainStep(MLP([4, 6, 3], seed=0, dtype="float16"), SGD(0.1))
    batch = random_batch(step.net, 12)
    step.loss_scaling = LossScaling(2.0**24)
    assert (step.loss_scale, step.skipped_steps) == (2.0**24, 0)
    for _ in range(3):
        step(*batch)
    assert step.loss_scale < 2.0**24 and step.skipped_steps > 0
    step.loss_scaling = LossScaling(8.0)
    step(*batch)
    assert (step.loss_scale, step.skipped_steps) == (8.0, 0)
    step.loss_scaling = None
    assert step.loss_scale == 1


@pytest.mark.numpy_only
@pytest.mark.parametrize(
    "name, value",
    [
        *[("clip_norm", value) for value in (0, -1, math.nan, math.inf, "1")],
        *[("micro_batch_size", value) for value in (0, 1.5, True, "1")],
        *[("loss_scaling", value) for value in (256.0, True, LossScaling())],  # the last one: not with float32
    ],
)
def test_options_of_a_step_out_of_range(name: str, value: Any) -> None:
    step = TrainStep(MLP([2, 2], seed=0), SGD(0.1), clip_norm=3.0, micro_batch_size=7)
    before = step.clip_norm, step.micro_batch_size, step.loss_scaling
    with pytest.raises(OptionError, match=name):
        setattr(step, name, value)
    assert (step.clip_norm, step.micro_batch_size, step.loss_scaling) == before
    step([[1.0, 2.0]], [1])


@pytest.mark.numpy_only
def test_a_schedule_may_bring_momentum_within_an_epoch() -> None:
    """`fit` notices divergence by the update that is in use."""
    net, optimizer = MLP([2, 2], loss="squared_error", seed=0), SGD(1e-3)

    def schedule(step: int) -> float:
        if step == 3:
            optimizer.momentum = 0.9
        return 1e-3 if step < 20 else 1e30

    with pytest.raises(gpuback.DivergedError):
        gpuback.fit(net, np.ones((200, 2)), np.ones((200, 2)), optimizer=optimizer, schedule=schedule, batch_size=1)
    assert optimizer.step_count < 40
    assert copy.deepcopy(optimizer)._update.diverged_at == optimizer._update.diverged_at is not None
