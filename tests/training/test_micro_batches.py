"""Steps in micro-batches (gradient accumulation) are steps on the whole batch, at the room that a part of it needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support.emulated import emulated_ops

import gpuback
from gpuback import MLP, SGD, Adam, TrainStep
from gpuback._backends.registry import Backend, BackendStatus
from gpuback._network.backprop import Backprop, empty_gradients
from gpuback._network.inputs import as_batch
from gpuback.errors import DivergedError, OptionError
from gpuback.testing import fingerprint, random_batch

pytestmark = pytest.mark.on_each_backend

PRECISIONS = {
    "float64": ({"dtype": "float64"}, 1e-13),
    "float32": ({"dtype": "float32"}, 2e-6),
    "tf32": ({"dtype": "float32", "allow_tf32": True}, 1e-3),
    "bfloat16": ({"dtype": "bfloat16"}, 4e-3),
    "float16": ({"dtype": "float16"}, 5e-4),
}
"""Each with how far a gradient may lie from that of the whole batch, as a part of its largest element: what changes is
the order of sums, and by it now and then how an operand is rounded. A sample more or less is some 3 % of 37."""

SIZES, BATCH = (5, 70, 6, 3), 37


def network(sizes: Any = SIZES, **options: Any) -> MLP:
    return MLP(sizes, **({"activation": "gelu", "seed": 1} | options))


def weights(size: int) -> np.ndarray:
    """Of very different sizes, some 0."""
    rng = np.random.default_rng(size)
    return rng.uniform(0.1, 2.0, size) * 4.0 ** rng.integers(-2, 3, size) * (rng.random(size) > 0.1)


def gradient(net: MLP, batch: Any, micro_batch_size: int | None) -> tuple[float, np.ndarray]:
    passes = Backprop(net.architecture, net.theta, net.ops, len(batch[0]), micro_batch_size=micro_batch_size)
    gradients = empty_gradients(net.architecture, net.ops)
    with net.ops.scope():
        loss = passes.value_and_grad(*as_batch(*batch, net.architecture, net.ops), gradients)
    return float(loss), net.ops.to_numpy(gradients.theta)


# --- the gradient


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("micro", [1, 8, 36])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "squared_error"])
def test_loss_and_gradient_are_those_of_the_whole_batch(precision: str, micro: int, weighted: bool, loss: str) -> None:
    options, digits = PRECISIONS[precision]
    net = network(loss=loss, **options)
    batch = (*random_batch(net, BATCH), weights(BATCH) if weighted else None)
    value, theta = gradient(net, batch, micro)
    expected, whole = gradient(net, batch, None)
    assert value == pytest.approx(expected, rel=digits)
    split = net.architecture.layout.split
    for part, exact in zip(split(theta)[0], split(whole)[0], strict=True):
        np.testing.assert_allclose(part, exact, rtol=0, atol=digits * abs(exact).max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("micro", [1, 3, 5, 8, 16, 17])
def test_small_integers_are_exact(precision: str, micro: int) -> None:
    """Whatever the parts, and with one that is shorter: each sample counts as 1/16 of the batch."""
    net = network((4, 5, 3), activation="relu", loss="squared_error", **PRECISIONS[precision][0])
    rng = np.random.default_rng(0)
    net.theta = rng.integers(-1, 2, net.n_parameters)
    batch = rng.integers(-1, 2, (16, 4)), rng.integers(-3, 4, (16, 3)), rng.integers(0, 3, 16)
    (loss, theta), (expected, whole) = gradient(net, batch, micro), gradient(net, batch, None)
    assert loss == expected
    np.testing.assert_array_equal(theta, whole)
    assert np.count_nonzero(whole) > 20


def test_float16_carries_the_scale_of_the_whole_batch() -> None:
    """ℓ' of 2⁻¹⁸ by itself is too small for float16, by the number of samples, which every block's da carries, not."""
    net = network((1, 1), loss="squared_error", dtype="float16")
    net.theta = [0.0, 0.0]
    size = 512
    x, y = np.ones((size, 1)), np.full((size, 1), 2.0**-18)
    _, theta = gradient(net, (x, y, None), 2)
    np.testing.assert_array_equal(theta, [-(2.0**-18)] * 2)


# --- steps


@pytest.mark.parametrize("make", [lambda: SGD(0.1, 0.9), Adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("sizes", [SIZES, (5, 150, 3)], ids=["narrow", "wide"])
def test_a_step_is_one_update(make: Any, clip_norm: float | None, sizes: Any) -> None:
    """Of batches of several sizes in turn, those that fit in one piece, too."""
    net, twin = network(sizes), network(sizes)
    step = TrainStep(net, make(), clip_norm=clip_norm, micro_batch_size=8)
    whole = TrainStep(twin, make(), clip_norm=clip_norm)
    for turn, size in enumerate([BATCH, 8, 16, BATCH, 16, BATCH]):
        batch = (*random_batch(net, size, turn), weights(size))
        assert float(step(*batch)) == pytest.approx(float(whole(*batch)), rel=1e-5)
        np.testing.assert_allclose(net.ops.to_numpy(net.theta), net.ops.to_numpy(twin.theta), rtol=0, atol=2e-5)
    assert step.optimizer.step_count == 6


def test_a_smaller_batch_goes_as_ever() -> None:
    net, twin = network(), network()
    batch = random_batch(net, BATCH)
    steps = TrainStep(net, SGD(0.1), micro_batch_size=BATCH), TrainStep(twin, SGD(0.1))
    for _ in range(4):
        losses = [step(*batch) for step in steps]
        assert losses[0].tobytes() == losses[1].tobytes()
    assert net.theta.tobytes() == twin.theta.tobytes()


def test_losses_belong_to_the_caller() -> None:
    net = network()
    step = TrainStep(net, SGD(0.1), micro_batch_size=8)
    losses = [step(*random_batch(net, BATCH, turn)) for turn in range(4)]
    assert len({float(loss) for loss in losses}) == 4
    assert all(loss.shape == () and loss.dtype == np.float32 for loss in losses)


@pytest.mark.parametrize("row", [0, 20, 36])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_part_that_is_not_finite_makes_the_step_none(row: int, bad: float) -> None:
    """Whichever of the parts it is: the first, one in between, the last and shorter."""
    net = network(activation="identity", loss="squared_error")
    step = TrainStep(net, Adam(), micro_batch_size=8)
    x, y = random_batch(net, BATCH)
    step(x, y)
    before = net.theta.copy()
    broken = x.copy()
    broken[row, 2] = bad
    for _ in range(3):
        assert not math.isfinite(float(step(broken, y)))
        assert net.theta.tobytes() == before.tobytes()
    assert (step.optimizer.step_count, step.diverged_at) == (1, 1)
    assert math.isfinite(float(step(x, y)))
    assert net.theta.tobytes() != before.tobytes()


@pytest.mark.parametrize("size", [17, BATCH])
def test_no_buffer_holds_more_rows_than_a_micro_batch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    asked, plain = [], net.ops.workspace

    def workspace(rows: int, *others: Any) -> Any:
        asked.append(rows)
        return plain(rows, *others)

    monkeypatch.setattr(net.ops, "workspace", workspace)
    TrainStep(net, SGD(0.1), micro_batch_size=8)(*random_batch(net, size))
    assert asked
    assert max(asked) <= 8


@pytest.mark.parametrize("micro", [0, -1, 2.5, "8", True])
def test_what_is_no_number_of_samples_is_refused(micro: Any) -> None:
    with pytest.raises(OptionError, match=f"micro_batch_size: expected an integer ≥ 1 or None, got {micro!r}"):
        TrainStep(network(), SGD(0.1), micro_batch_size=micro)


# --- fit


def fitted(file: Any = None, epochs: int = 4, **options: Any) -> tuple[bytes, list[float]]:
    net = network()
    x, y = random_batch(net, 41)
    options = {"micro_batch_size": 7, "seed": 0, "checkpoint": file} | options
    history = gpuback.fit(net, x, y, optimizer=Adam(0.01), epochs=epochs, batch_size=16, **options)
    return net.theta.tobytes(), history.loss


def test_fit_has_the_losses_of_whole_batches() -> None:
    _, losses = fitted()
    assert losses == pytest.approx(fitted(micro_batch_size=None)[1], rel=1e-5)


def test_a_resumed_run_ends_in_the_same_bits_and_is_no_other_run(tmp_path: Any) -> None:
    file = tmp_path / "run"
    fitted(file, epochs=2)
    with pytest.raises(OptionError, match="another run's: micro_batch_size is 7 there and None here"):
        fitted(file, resume=True, micro_batch_size=None)
    assert fitted(file, resume=True) == fitted()


def test_fit_tells_the_step_that_diverged() -> None:
    net = network(activation="identity", loss="squared_error")
    x, y = random_batch(net, 41)
    with pytest.raises(DivergedError, match="not finite at step"):
        gpuback.fit(net, x, y, optimizer=SGD(1e12), epochs=9, batch_size=16, micro_batch_size=7, seed=0)


# --- reproducible=True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.numpy_only
def test_bits_are_the_same_on_cuda(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status = BackendStatus(True, "the emulator")
    monkeypatch.setitem(gpuback._backends.registry.BACKENDS, "emulated", Backend(emulated_ops, lambda: status))
    runs = []
    for backend in ("numpy", "emulated"):
        net = network(dtype=dtype, reproducible=True, backend=backend)
        step = TrainStep(net, Adam(0.01), clip_norm=1.0, micro_batch_size=8)
        losses = [step(*random_batch(net, BATCH, turn), weights(BATCH)).tobytes() for turn in range(3)]
        runs.append((losses, fingerprint(net)))
    assert runs[0] == runs[1]
