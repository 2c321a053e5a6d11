"""A user's function as a loss, wherever a loss is computed: against gpuback's own losses written as such functions."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback import MLP, losses
from gpuback._core.activations import ACTIVATIONS
from gpuback.errors import DeviceError, DtypeError, GpubackError, OptionError, ShapeError

pytestmark = pytest.mark.on_each_backend

SIZES = [4, 7, 3]


def squared(y_hat: Any, y: Any) -> tuple[Any, Any]:
    return 0.5 * ((y_hat - y) ** 2).sum(axis=1), y_hat - y


def cross_entropy(y_hat: Any, y: Any) -> tuple[Any, Any]:
    """−log ŷ_y of a label, behind softmax."""
    rows = np.arange(len(y))
    gradient = np.zeros_like(y_hat)
    gradient[rows, y] = -1 / y_hat[rows, y]
    return -np.log(y_hat[rows, y]), gradient


def network(loss: Any, **options: Any) -> MLP:
    return MLP(SIZES, loss=loss, **{"activation": "tanh", "dtype": "float64", "seed": 0} | options)


def batch(size: int = 9) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(size)
    return rng.standard_normal((size, 4)), rng.standard_normal((size, 3)), rng.random(size)


def arrays(net: MLP, x: Any, y: Any, weight: Any) -> list[Any]:
    """All that a loss has part in."""
    loss, gradients = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
    clipped = net.value_and_clipped_grad(x, y, 0.1, sample_weight=weight)[1].theta
    norms, each = net.gradient_norms(x, y, sample_weight=weight), net.per_sample_grad(x, y, sample_weight=weight).theta
    trace = net.trace(x, y, sample_weight=weight)
    alone = net.loss(x, y, sample_weight=weight)
    return [loss, gradients.theta, gradients.inputs, clipped, norms, each, trace.loss, trace.da[-1], alone]


@pytest.mark.parametrize("output", ["identity", "sigmoid", "tanh", "softmax"])
@pytest.mark.parametrize(
    ("dtype", "off"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.02), ("float16", 2e-3)]
)
def test_a_function_is_as_good_as_gpubacks_own(output: str, dtype: str, off: float) -> None:
    x, y, weight = batch()
    ours, theirs = (network(loss, output=output, dtype=dtype) for loss in ("squared_error", squared))
    for expected, found in zip(arrays(ours, x, y, weight), arrays(theirs, x, y, weight), strict=True):
        scale = np.abs(np.asarray(expected, np.float64)).max()
        np.testing.assert_allclose(
            np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=0, atol=off * scale
        )


def test_labels_stay_integers() -> None:
    x, _, weight = batch()
    labels = np.arange(9, dtype=np.uint8) % 3
    ours, theirs = network("cross_entropy"), network(cross_entropy, output="softmax")
    for expected, found in zip(arrays(ours, x, labels, weight), arrays(theirs, x, labels, weight), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("output", ["softmax", *ACTIVATIONS])
def test_any_output_function(output: str, quick: bool) -> None:
    def tilted(y_hat: Any, y: Any) -> tuple[Any, Any]:
        return (np.sin(y_hat) * y).sum(axis=1), np.cos(y_hat) * y

    x, y, weight = batch(12)
    net = network(tilted, output=output)
    direction = np.random.default_rng(1).standard_normal(net.n_parameters)
    slope = float(net.value_and_grad(x, y, sample_weight=weight)[1].theta @ direction)
    theta, ends = np.array(net.theta), []
    for step in (1e-6, -1e-6):
        net.theta = theta + step * direction
        ends.append(float(net.loss(x, y, sample_weight=weight)))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


@pytest.mark.numpy_only
def test_the_gradient_check_takes_a_function() -> None:
    x, y, weight = batch(30)
    for dtype in ("float32", "bfloat16"):
        assert gpuback.check_gradients(network(squared, output="gelu", dtype=dtype), x, y, sample_weight=weight).passed

    def wrong(y_hat: Any, y: Any) -> tuple[Any, Any]:
        losses_of_rows, gradient = squared(y_hat, y)
        return losses_of_rows, 1.001 * gradient

    assert not gpuback.check_gradients(network(wrong), x, y).passed


@pytest.mark.parametrize(
    ("y", "seen"),
    [
        (np.zeros((9, 2, 5, 3)), ("float32", (2, 5, 3))),
        (np.zeros(9, np.float16), ("float32", ())),
        (np.zeros((9, 4), np.int8), ("int8", (4,))),
        (np.zeros((9, 1), np.uint64), ("uint64", (1,))),
        (np.zeros(9, bool), ("bool", ())),
        ([0.5] * 9, ("float32", ())),
        (np.zeros((3, 9, 2)).swapaxes(0, 1), ("float32", (3, 2))),
    ],
)
def test_targets_are_rows_of_anything(y: Any, seen: tuple[str, tuple[int, ...]]) -> None:
    shown = []

    def loss(y_hat: Any, y: Any) -> tuple[Any, Any]:
        shown.append((y.dtype.name, y.shape[1:]))
        assert len(y) == len(y_hat)
        return y_hat.sum(axis=1), np.ones_like(y_hat)

    net = network(loss, dtype="float32")
    net.loss(batch()[0], y)
    gpuback.fit(net, batch()[0], y, batch_size=4, epochs=1, seed=0, validation=0.3)
    assert set(shown) == {seen}


@pytest.mark.parametrize("y", [np.zeros(8), np.zeros((10, 3)), 0.0])
def test_there_is_a_target_for_each_sample(y: Any) -> None:
    with pytest.raises(ShapeError, match="y: expected 9 rows, one per sample of x, got shape"):
        network(squared).loss(batch()[0], y)


def test_training_with_a_function() -> None:
    """fit, with validation and weights, and steps in micro-batches, clipped."""
    x, y, weight = batch(40)
    histories, parameters = [], []
    for loss in ("squared_error", squared):
        net = network(loss)
        histories.append(
            gpuback.fit(net, x, y, sample_weight=weight, epochs=3, batch_size=16, validation=0.2, clip_norm=1.0, seed=0)
        )
        step = gpuback.TrainStep(net, gpuback.SGD(0.1, momentum=0.9), micro_batch_size=16)
        for _ in range(3):
            step(x, y, sample_weight=weight)
        parameters.append(np.array(net.theta))
    np.testing.assert_allclose(histories[0].loss, histories[1].loss, rtol=1e-12)
    np.testing.assert_allclose(histories[0].validation_loss, histories[1].validation_loss, rtol=1e-12)
    np.testing.assert_allclose(*parameters, rtol=1e-10, atol=1e-13)


def test_streamed_batches_with_targets_of_several_axes() -> None:
    def sums(y_hat: Any, y: Any) -> tuple[Any, Any]:
        return squared(y_hat, y.sum(axis=1))

    x, y, _ = batch(20)
    y = np.stack([y, 2 * y], axis=1)
    nets = network(sums), network(sums)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    gpuback.fit(nets[0], batches=batches, epochs=2)
    step = gpuback.TrainStep(nets[1], gpuback.Adam())
    for _ in range(2):
        for part in batches:
            step(*part)
    np.testing.assert_array_equal(nets[0].theta, nets[1].theta)


def test_float16_with_a_loss_scale() -> None:
    x, y, _ = batch(16)
    steps = [
        gpuback.TrainStep(network(loss, dtype="float16"), gpuback.SGD(0.1), loss_scaling=gpuback.LossScaling())
        for loss in ("squared_error", squared)
    ]
    for _ in range(4):
        ours, theirs = (float(step(x, y)) for step in steps)
    assert steps[1].skipped_steps == steps[0].skipped_steps
    assert theirs == pytest.approx(ours, rel=2e-3)


def test_targets_may_be_missing() -> None:
    """NaN among the targets is the function's business; among the samples it is an error."""

    def masked(y_hat: Any, y: Any) -> tuple[Any, Any]:
        residual = np.where(np.isnan(y), 0, y_hat - y)
        return 0.5 * (residual**2).sum(axis=1), residual

    x, y, _ = batch(20)
    y[::3, 1] = np.nan
    history = gpuback.fit(network(masked), x, y, epochs=2, seed=0)
    assert np.isfinite(history.loss).all()
    x[1, 1] = np.nan
    with pytest.raises(gpuback.errors.DataError, match="^x: expected finite"):
        gpuback.fit(network(masked), x, y)


@pytest.mark.numpy_only
def test_a_long_batch_comes_in_blocks_from_several_threads() -> None:
    seen, threads = [], set()

    def loss(y_hat: Any, y: Any) -> tuple[Any, Any]:
        seen.append(len(y))
        threads.add(threading.get_ident())
        return squared(y_hat, y)

    x, y, weight = batch(20_000)
    wide = {"activation": "relu", "backend": "numpy"}
    found = MLP([4, 256, 3], loss=loss, seed=0, **wide).value_and_grad(x, y, sample_weight=weight)
    expected = MLP([4, 256, 3], loss="squared_error", seed=0, **wide).value_and_grad(x, y, sample_weight=weight)
    assert sum(seen) == 20_000 and len(seen) > 1
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1].theta, expected[1].theta, rtol=1e-4, atol=1e-5)


def test_what_a_function_raises_comes_out_unchanged() -> None:
    class MineError(Exception):
        pass

    fails = [True]

    def loss(y_hat: Any, y: Any) -> tuple[Any, Any]:
        if fails[0]:
            raise MineError("my own")
        return squared(y_hat, y)

    x, y, _ = batch(30)
    net = network(loss)
    step = gpuback.TrainStep(net, gpuback.Adam())
    before = np.array(net.theta)
    for call in (lambda: net.loss(x, y), lambda: net.value_and_grad(x, y), lambda: step(x, y), lambda: net.trace(x, y)):
        with pytest.raises(MineError, match="^my own$"):
            call()
    np.testing.assert_array_equal(net.theta, before)
    fails[0] = False
    np.testing.assert_allclose(net.loss(x, y), network("squared_error").loss(x, y), rtol=1e-12)
    step(x, y)
    assert not np.array_equal(net.theta, before)


class Tensor:
    """An array of another library."""

    def __dlpack__(self) -> None: ...


@pytest.mark.parametrize(
    ("returns", "error", "says"),
    [
        (lambda y_hat, y: y_hat, ShapeError, "expected it to return two arrays, the losses and ∂ℓ/∂ŷ, got ndarray"),
        (lambda y_hat, y: (y_hat, y, y), ShapeError, "the losses and ∂ℓ/∂ŷ, got 3 values"),
        (lambda y_hat, y: (y_hat.mean(), y_hat), ShapeError, "expected losses of shape (9,), got ()"),
        (lambda y_hat, y: (0.0, y_hat), ShapeError, "expected losses of shape (9,), got ()"),
        (lambda y_hat, y: (y_hat[:, :1], y_hat), ShapeError, "expected losses of shape (9,), got (9, 1)"),
        (lambda y_hat, y: (y_hat[:, 0], y_hat[:, 0]), ShapeError, "expected ∂ℓ/∂ŷ of shape (9, 3), got (9,)"),
        (lambda y_hat, y: (y_hat[:, 0], 1j * y_hat), DtypeError, "expected ∂ℓ/∂ŷ of real numbers, got complex128"),
        (lambda y_hat, y: (y_hat[:, 0] > 0, y_hat), DtypeError, "expected losses of real numbers, got bool"),
        (lambda y_hat, y: ([1.0] * 9, y_hat), DtypeError, "expected losses as an array of the"),
        (lambda y_hat, y: (y_hat[:, 0], None), DtypeError, "expected ∂ℓ/∂ŷ as an array of the"),
        (lambda y_hat, y: (y_hat[:, 0], Tensor()), DeviceError, "backend, got a network.test_own_losses.Tensor"),
    ],
)
def test_what_a_function_may_not_return(returns: Any, error: type[GpubackError], says: str) -> None:
    def mine(y_hat: Any, y: Any) -> Any:
        return returns(y_hat, y)

    x, y, _ = batch()
    with pytest.raises(error, match=r"^loss 'mine': .*" + re.escape(says).replace("network\\.", r"\S*")):
        network(mine).value_and_grad(x, y)


def test_one_output_and_targets_without_a_second_axis() -> None:
    net = MLP([4, 7, 1], loss=squared, activation="tanh", dtype="float64", seed=0)
    x, y, _ = batch(20)
    with pytest.raises(ShapeError) as caught:
        net.value_and_grad(x, y[:, 0])
    assert str(caught.value) == (
        "loss 'squared': expected ∂ℓ/∂ŷ of shape (20, 1), got (20, 20); y has shape (20,): y[:, None] has one column"
    )
    net.value_and_grad(x, y[:, :1])
    with pytest.raises(ShapeError, match=r"got \(20, 3\)$"):
        net.value_and_grad(x, y)


def test_numbers_of_any_real_dtype() -> None:
    """np.where(…, 1, −1) gives integers, and arithmetic with integer targets float64."""

    def signs(y_hat: Any, y: Any) -> tuple[Any, Any]:
        return np.abs(y_hat - y).sum(axis=1), np.where(y_hat > y, 1, -1)

    x, _, weight = batch()
    y = np.arange(27).reshape(9, 3)
    for dtype in ("float32", "float64"):
        expected = network("absolute_error", dtype=dtype).value_and_grad(x, y, sample_weight=weight)
        found = network(signs, dtype=dtype).value_and_grad(x, y, sample_weight=weight)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(found[1].theta, expected[1].theta, rtol=1e-5, atol=1e-6)


@pytest.mark.numpy_only
def test_the_arrays_that_a_function_gets_are_read_only() -> None:
    def writes(y_hat: Any, y: Any) -> tuple[Any, Any]:
        for given in (y_hat, y):
            with pytest.raises(ValueError, match="read-only"):
                given += 1
        return squared(y_hat, y)

    x, y, _ = batch()
    network(writes).value_and_grad(x, y)
    y += 1  # the user's own array is not


def test_a_function_goes_layer_by_layer_and_is_never_captured() -> None:
    calls = []

    def counted(y_hat: Any, y: Any) -> tuple[Any, Any]:
        calls.append(len(y))
        return squared(y_hat, y)

    net = MLP([4, 16, 3], loss=counted, dtype="bfloat16", seed=0)
    step = gpuback.TrainStep(net, gpuback.Adam())
    x, y, _ = batch()
    for _ in range(5):
        step(x, y)
    assert calls == [9] * 5
    explained = str(net.explain(9))
    assert "identity + counted" in explained
    assert net.backend == "numpy" or "its loss is a function" in explained


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    x, y, _ = batch(30)

    def run(epochs: int, loss: Any = squared, **options: Any) -> MLP:
        net = network(loss)
        gpuback.fit(net, x, y, epochs=epochs, batch_size=8, seed=0, **options)
        return net

    whole = run(4)
    run(2, checkpoint=tmp_path / "run")
    resumed = run(4, checkpoint=tmp_path / "run", resume=True)
    np.testing.assert_array_equal(resumed.theta, whole.theta)

    def other(y_hat: Any, y: Any) -> tuple[Any, Any]:
        return squared(y_hat, y)

    for loss in (other, losses.Huber(0.5)):
        with pytest.raises(OptionError, match="is another run's: architecture is"):
            run(5, loss, checkpoint=tmp_path / "run", resume=True)
