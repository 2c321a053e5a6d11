"""A dynamic loss scale for float16: what overflows is skipped and scaled down, what vanishes is scaled up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support.emulated import emulated_ops

import gpuback
from gpuback import MLP, SGD, Adam, DivergedError, LossScaling, TrainStep
from gpuback._backends.registry import Backend, BackendStatus
from gpuback._training import checkpoint
from gpuback.errors import OptionError
from gpuback.testing import fingerprint, random_batch

pytestmark = pytest.mark.on_each_backend


def network(sizes: Any = (5, 8, 3), **options: Any) -> MLP:
    return MLP(sizes, **({"dtype": "float16", "activation": "tanh", "seed": 1} | options))


def line(w: float = 0.0) -> MLP:
    """ŷ = w x + b, whose da = ŷ − y is as large as one likes."""
    net = MLP((1, 1), loss="squared_error", dtype="float16")
    net.theta = [w, 0.0]
    return net


def overflowing(net: MLP, times: float) -> tuple[np.ndarray, np.ndarray]:
    """One sample whose da is so many times float16's largest number, at a loss scale of 1."""
    return np.ones((1, 1)), np.full((1, 1), -times * 65504)


# --- the scale


def test_a_step_that_overflows_is_left_out_and_halves_the_scale() -> None:
    net = line()
    step = TrainStep(net, SGD(1e-6), loss_scaling=LossScaling(initial=4.0))
    seen = []
    for _ in range(4):
        loss = step(*overflowing(net, 0.9))
        seen.append((step.loss_scale, step.skipped_steps, step.optimizer.step_count, float(net.theta[0]) != 0))
        assert math.isfinite(float(loss))
    assert seen == [(2.0, 1, 0, False), (1.0, 2, 0, False), (1.0, 2, 1, True), (1.0, 2, 2, True)]


def test_so_many_steps_in_a_row_double_it() -> None:
    net = line()
    step = TrainStep(net, SGD(0.0), loss_scaling=LossScaling(initial=1.0, growth_interval=3))
    fine, too_large = ([[1.0]], [[1.0]]), overflowing(net, 1.5)
    scales = []
    for batch in [fine, fine, too_large, fine, fine, fine, fine, fine, fine, too_large]:
        step(*batch)
        scales.append(step.loss_scale)
    assert scales == [1.0, 1.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 1.0]
    assert step.skipped_steps == 2


def test_what_would_vanish_in_float16_comes_through() -> None:
    """da = 2⁻³⁰ is nothing to float16, and 2⁻¹⁴ is; the gradient is exactly what it should be, without the scale."""
    target = -(2.0**-30)
    for scaling, gradient in ((None, 0.0), (LossScaling(initial=2.0**16), 2.0**-30)):
        net = line()
        TrainStep(net, SGD(1.0), loss_scaling=scaling)([[1.0]], [[target]])
        np.testing.assert_array_equal(net.ops.to_numpy(net.theta), [-gradient, -gradient])


def test_it_stays_within_its_limits() -> None:
    step = TrainStep(line(), SGD(0.0), loss_scaling=LossScaling(initial=2.0**23, growth_interval=1))
    for _ in range(3):
        step([[0.0]], [[0.0]])
    assert step.loss_scale == 2.0**24
    step = TrainStep(line(), SGD(0.0), loss_scaling=LossScaling(initial=2.0**-23))
    for _ in range(3):
        step([[math.nan]], [[0.0]])
    assert (step.loss_scale, step.skipped_steps) == (2.0**-24, 3)


# --- a step


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.01])
@pytest.mark.parametrize("micro_batch_size", [None, 8])
@pytest.mark.parametrize("initial", [0.25, 1.0, 64.0])
def test_steps_are_those_without_it(
    weighted: bool, clip_norm: float | None, micro_batch_size: int | None, initial: float
) -> None:
    """Where float16 has room for both: losses, and updates of a θ that moves by far more than the tolerance."""
    runs = []
    for scaling in (None, LossScaling(initial=initial, growth_interval=1)):
        net = network(loss="squared_error", activation="identity")
        options = {"clip_norm": clip_norm, "micro_batch_size": micro_batch_size, "loss_scaling": scaling}
        step, before = TrainStep(net, SGD(0.1, 0.9), **options), net.ops.to_numpy(net.theta).copy()
        losses = []
        for turn, size in enumerate((21, 5, 21)):
            x, y = random_batch(net, size, turn)
            losses.append(float(step(x, y, np.random.default_rng(turn).uniform(0.5, 2.0, size) if weighted else None)))
        runs.append((losses, net.ops.to_numpy(net.theta) - before))
    (losses, moved), (plain_losses, plain_moved) = runs
    assert losses == pytest.approx(plain_losses, rel=1e-3)
    np.testing.assert_allclose(moved, plain_moved, rtol=0, atol=2e-3 * abs(plain_moved).max())


def test_the_callers_weights_are_only_read() -> None:
    net = network()
    weight = net.ops.asarray(np.full(7, 0.5), net.theta.dtype, "weight")
    TrainStep(net, SGD(0.1), loss_scaling=LossScaling())(*random_batch(net, 7), weight)
    assert (weight == 0.5).all()


def test_without_one_there_is_nothing_to_see() -> None:
    step = TrainStep(network(), SGD(0.1))
    step(*random_batch(step.net, 7))
    assert (step.loss_scale, step.skipped_steps) == (1.0, 0)


# --- fit


def fitted(file: Any = None, **options: Any) -> tuple[bytes, list[float]]:
    net = network()
    x, y = random_batch(net, 41)
    scaling = LossScaling(initial=2.0**24, growth_interval=4)
    options = {"epochs": 4, "loss_scaling": scaling, "seed": 0, "checkpoint": file} | options
    history = gpuback.fit(net, x, y, optimizer=Adam(0.01), batch_size=8, **options)
    return net.theta.tobytes(), history.loss


def test_fit_goes_on_after_what_overflows() -> None:
    """2²⁴ (ŷ − y) is too large; 24 steps, of which the first are left out until it is not."""
    net = network()
    x, y = random_batch(net, 41)
    optimizer = Adam(0.01)
    scaling = LossScaling(initial=2.0**24)
    history = gpuback.fit(net, x, y, optimizer=optimizer, batch_size=8, epochs=4, seed=0, loss_scaling=scaling)
    assert 12 < history.steps < 20
    assert history.loss[-1] < history.loss[0]


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_WRITES", 0)
    for epochs in (1, 3):
        fitted(tmp_path / "run", epochs=epochs, resume=True)
    with pytest.raises(OptionError, match="another run's: loss_scaling is"):
        fitted(tmp_path / "run", loss_scaling=None, resume=True)
    assert fitted(tmp_path / "run", resume=True) == fitted()


def test_a_loss_that_is_not_finite_is_divergence() -> None:
    net = line()
    x, y = np.ones((4, 1)), np.full((4, 1), 3e4)
    with pytest.raises(DivergedError, match=r"the loss of the epoch's batch \d+ was not finite"):
        gpuback.fit(net, x, y, optimizer=SGD(1e30), epochs=40, batch_size=1, seed=0, loss_scaling=LossScaling())


# --- what is refused


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: LossScaling(initial=3.0), "initial: expected a power of two from 2⁻²⁴ to 2²⁴, got 3.0"),
        (lambda: LossScaling(initial=2.0**25), "initial"),
        (lambda: LossScaling(initial=0.0), "initial"),
        (lambda: LossScaling(growth_interval=0), "growth_interval: expected an integer ≥ 1, got 0"),
        (lambda: TrainStep(network(), SGD(0.1), loss_scaling="dynamic"), r"expected a gpuback.LossScaling\(\) or None"),
        (lambda: TrainStep(network(dtype="bfloat16"), SGD(0.1), loss_scaling=LossScaling()), "bfloat16 needs none"),
    ],
)
def test_what_makes_no_scale_is_refused(make: Any, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        make()


# --- reproducible=True


@pytest.mark.numpy_only
def test_bits_are_the_same_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    status = BackendStatus(True, "the emulator")
    monkeypatch.setitem(gpuback._backends.registry.BACKENDS, "emulated", Backend(emulated_ops, lambda: status))
    runs = []
    for backend in ("numpy", "emulated"):
        net = network(reproducible=True, backend=backend)
        step = TrainStep(net, Adam(0.01), clip_norm=1.0, loss_scaling=LossScaling(2.0**17, growth_interval=2))
        losses = [step(*random_batch(net, 9, turn), np.linspace(0.5, 2, 9)).tobytes() for turn in range(7)]
        runs.append((losses, fingerprint(net), step._loss_scale.state))
    assert runs[0] == runs[1]
    assert runs[0][2][2] > 0
