"""One step of training, and what MLP promises about its arrays: whose they are, what is fresh, what may be passed."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import sys
import threading
import tracemalloc
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpuback import MLP, SGD, Adam, AdamW, TrainStep
from gpuback.errors import DtypeError, LabelError, OptionError, ShapeError
from gpuback.testing import random_batch

pytestmark = pytest.mark.on_each_backend(layers=True)

PRECISIONS = [
    {"dtype": "float64"},
    {"dtype": "float32"},
    {"dtype": "float32", "allow_tf32": True},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
]
each_precision = pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(map(str, p.values())))
LOSSES = ["cross_entropy", "binary_cross_entropy", "squared_error"]


def network(sizes: Any = (5, 8, 6, 3), **options: Any) -> MLP:
    return MLP(sizes, **({"activation": "gelu", "loss": "cross_entropy", "seed": 1} | options))


def batch(net: MLP, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = random_batch(net, size, seed)
    return x, y, np.random.default_rng(seed).uniform(0.1, 2.0, size)


def kind_of(make_optimizer: Any) -> str:
    return repr(make_optimizer())


def state_of(net: MLP, optimizer: Any) -> tuple[Any, ...]:
    """θ and all that the optimizer holds, as something to compare."""
    arrays = {name: array.tobytes() for name, array in optimizer.state.items()}
    return net.theta.tobytes(), arrays, optimizer.step_count, optimizer._options()


# --- a step is value_and_grad, then optimizer.step


@each_precision
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_theta_are_those_of_value_and_grad_and_an_optimizer(precision: Any, loss: str, weighted: bool) -> None:
    net, twin = network(loss=loss, **precision), network(loss=loss, **precision)
    optimizer, twins = Adam(0.01), Adam(0.01)
    step = TrainStep(net, optimizer)
    for size in (1, 7, 300, 7):
        x, y, w = batch(net, size, seed=size)
        w = w if weighted else None
        value = step(x, y, w)
        expected, gradients = twin.value_and_grad(x, y, sample_weight=w)
        twins.step(twin, gradients)
        assert value.tobytes() == expected.tobytes()
        assert state_of(net, optimizer) == state_of(twin, twins)


@pytest.mark.parametrize("make", [lambda: SGD(0.1), lambda: SGD(0.1, 0.9, True, 0.01), Adam, AdamW], ids=kind_of)
@pytest.mark.numpy_only
def test_every_optimizer_over_batches_of_several_blocks(make: Any) -> None:
    net, twin, optimizer, twins = network(), network(), make(), make()
    step = TrainStep(net, optimizer)
    x, y, w = batch(net, 60_000)  # NumPy works on some 24,000 rows of such a network at a time
    for _ in range(3):
        step(x, y, w)
        twins.step(twin, twin.value_and_grad(x, y, sample_weight=w)[1])
    assert state_of(net, optimizer) == state_of(twin, twins)


def test_batch_sizes_may_take_turns() -> None:
    """More sizes than buffers are kept for, each coming back."""
    net, twin, optimizer, twins = network(), network(), Adam(), Adam()
    step = TrainStep(net, optimizer)
    for turn, size in enumerate([3, 64, 3, 1, 9, 17, 3, 64, 33, 3, 65, 64, 1]):
        x, y, _ = batch(net, size, turn)
        step(x, y)
        fresh = MLP(twin.sizes, activation="gelu")  # without a buffer that an earlier batch has touched
        fresh.theta[:] = twin.theta
        twins.step(twin, fresh.value_and_grad(x, y)[1])
        assert state_of(net, optimizer) == state_of(twin, twins)


def test_steps_lower_the_loss() -> None:
    net = network()
    x, y, _ = batch(net, 50)
    step = TrainStep(net, Adam(0.01))
    losses = [float(step(x, y)) for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_is_the_one_before_the_update() -> None:
    net = network()
    x, y, w = batch(net, 20)
    before = net.loss(x, y, sample_weight=w)
    assert TrainStep(net, SGD(0.1))(x, y, w) == before
    assert net.loss(x, y, sample_weight=w) < before


@each_precision
def test_the_loss_is_fresh_and_zero_dimensional(precision: Any) -> None:
    net = network(**precision)
    step = TrainStep(net, SGD(0.1))
    first = step(*batch(net, 20))
    assert isinstance(first, np.ndarray)
    assert (first.shape, first.dtype) == ((), net.theta.dtype)
    kept = float(first)
    second = step(*batch(net, 20, seed=1))
    assert second is not first and float(second) != kept
    assert float(first) == kept


def test_the_batch_is_only_read() -> None:
    net = network()
    x, y, w = (np.ascontiguousarray(part) for part in batch(net, 20))
    x, w = x.astype(np.float32), w.astype(np.float32)  # the network's own dtype: used where they lie
    before = [part.tobytes() for part in (x, y, w)]
    for part in (x, y, w):
        part.flags.writeable = False
    TrainStep(net, Adam())(x, y, w)
    net.value_and_grad(x, y, sample_weight=w, need_input_grad=True)
    assert [part.tobytes() for part in (x, y, w)] == before


# --- clipping


def gradient_and_step(clip_norm: float | None, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """∇θ, and how far a step of learning rate 1 goes against it, from θ = 0; `factor` is on every sample's loss."""
    net = MLP([4, 3], loss="squared_error")
    net.theta[:] = 0
    rng = np.random.default_rng(0)
    x, y, w = rng.standard_normal((9, 4)), rng.standard_normal((9, 3)), np.full(9, factor)
    _, gradients = net.value_and_grad(x, y, sample_weight=w)
    TrainStep(net, SGD(1.0), clip_norm=clip_norm)(x, y, w)
    return gradients.theta.astype(np.float64), -net.theta.astype(np.float64)


@pytest.mark.parametrize("factor", [1.0, 1e19, 1e30, 1e-15], ids="factor {:.0e}".format)
def test_a_longer_gradient_is_scaled_to_clip_norm(factor: float) -> None:
    gradient, _ = gradient_and_step(None, factor)
    norm = np.linalg.norm(gradient)  # of all of θ; its square, 10⁶⁰, would overflow in float32
    clip_norm = norm / 4
    _, moved = gradient_and_step(clip_norm, factor)
    expected = gradient * (clip_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_
    np.testing.assert_allclose(moved, expected, rtol=3 * 2**-24)
    if factor >= 1:
        assert np.linalg.norm(moved) == pytest.approx(clip_norm, rel=1e-5)


def test_a_huge_gradient_is_scaled_to_an_ordinary_length() -> None:
    gradient, moved = gradient_and_step(1.0, 1e30)
    np.testing.assert_allclose(moved, gradient / np.linalg.norm(gradient), rtol=3 * 2**-24)


@pytest.mark.parametrize("clip_norm", [1e-3, 1e-9])
def test_a_gradient_near_the_end_of_float32_is_scaled_to_a_small_length(clip_norm: float) -> None:
    gradient, moved = gradient_and_step(clip_norm, 1e38)
    np.testing.assert_allclose(moved, gradient * (clip_norm / np.linalg.norm(gradient)), rtol=3 * 2**-24)


@pytest.mark.parametrize("clip_norm", [1e-9, 1.0, 1e9])
def test_a_gradient_whose_norm_overflows_float64_is_scaled(clip_norm: float) -> None:
    net = MLP([2, 1], loss="squared_error", dtype="float64")
    net.theta[:] = 0
    TrainStep(net, SGD(1.0), clip_norm=clip_norm)([[1.5e154, 1.5e154]], [[1.1e154]])  # ∂/∂W = −1.65e308, twice
    np.testing.assert_allclose(net.theta, clip_norm * 0.5**0.5 * np.array([1, 1, 1 / 1.5e154]), rtol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 1e30, 1e-15, 1e-30, 1e-42], ids="factor {:.0e}".format)
def test_a_shorter_gradient_is_left_to_the_bit(factor: float) -> None:
    gradient, moved = gradient_and_step(None, factor)
    _, clipped = gradient_and_step(2 * np.linalg.norm(gradient) + 1e-5, factor)
    np.testing.assert_array_equal(clipped, moved)
    np.testing.assert_array_equal(moved, gradient)


def test_the_norm_is_over_all_of_theta_however_long(quick: bool) -> None:
    """Only the last parameter's gradient is not 0."""
    net = MLP([30_000 if quick else 300_000, 1], loss="squared_error")
    net.theta[:] = 0
    x = np.zeros((1, net.sizes[0]))
    TrainStep(net, SGD(1.0), clip_norm=0.5)(x, [[8.0]])
    assert net.biases[0][0] == pytest.approx(0.5, rel=1e-6)
    assert not net.weights[0].any()


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_clip_norm_out_of_range(clip_norm: float) -> None:
    with pytest.raises(OptionError, match="^clip_norm: expected a finite number > 0, got"):
        TrainStep(network(), Adam(), clip_norm=clip_norm)


def test_clip_norm_that_is_no_number() -> None:
    with pytest.raises(OptionError, match="^clip_norm"):
        TrainStep(network(), Adam(), clip_norm="1")


# --- memory: after the first call with a batch size, a step allocates nothing that grows with the batch


def peak_of_a_step(step: TrainStep, size: int) -> int:
    """The most bytes that a step holds above what was held before it, from its third call on."""
    net = step.net
    x, y, w = batch(net, size)
    x, w = x.astype(net.theta.dtype), w.astype(net.theta.dtype)
    y = y if y.dtype.kind == "i" else y.astype(net.theta.dtype)
    step(x, y, w)
    step(x, y, w)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        step(x, y, w)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


# NumPy walks operands of mixed dtype or order in pieces of 8192 elements; two such operands, and small change.
CASTING_BUFFERS = 2 * 8192 * 8 + 20_000


@pytest.mark.thorough(first=1)
@each_precision
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu", "loss": "cross_entropy", "sizes": (1, 1, 2)},
        {"activation": "gelu", "loss": "cross_entropy", "sizes": (1, 1, 2)},
        {"activation": "relu", "loss": "squared_error", "sizes": (1, 1, 2)},
        {"activation": "relu", "loss": "squared_error", "sizes": (1, 1, 2), "output": "sigmoid"},
        {"activation": "gelu", "loss": "binary_cross_entropy", "sizes": (1, 1, 2)},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.numpy_only
def test_a_narrow_network_allocates_less_than_a_number_per_row(precision: Any, options: Any) -> None:
    """Of so narrow a network some 100,000 rows are worked on at a time: 400 KB for a float32 of each."""
    step = TrainStep(network(**options, **precision), Adam(), clip_norm=1.0)
    assert peak_of_a_step(step, 400_000) < CASTING_BUFFERS


@pytest.mark.thorough(first=1)
@each_precision
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.numpy_only
def test_what_a_step_allocates_does_not_depend_on_the_batch(precision: Any, activation: str, loss: str) -> None:
    net = network((10, 20, 8), activation=activation, loss=loss, **precision)
    step = TrainStep(net, SGD(1e-3))
    peaks = [peak_of_a_step(step, size) for size in (256, 4096, 20_000)]
    assert max(peaks) < CASTING_BUFFERS


@pytest.mark.numpy_only
def test_several_threads_allocate_no_more_than_each_its_buffers() -> None:
    """A hidden layer's activations in one of the four and eight blocks of these batches take 768 KB."""
    step = TrainStep(network((64, 256, 256, 10), activation="relu"), SGD(1e-3))
    for size in (3000, 6000):
        assert peak_of_a_step(step, size) < 2 * CASTING_BUFFERS


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", [AdamW(), Adam(weight_decay=0.1), SGD(0.1, 0.9, True, 0.1), SGD(0.1)], ids=repr)
@pytest.mark.numpy_only
def test_what_an_update_allocates_does_not_depend_on_the_network(optimizer: Any, dtype: str) -> None:
    net = MLP([1_000_000, 1], loss="squared_error", dtype=dtype)
    step = TrainStep(net, copy.copy(optimizer), clip_norm=1.0)
    assert peak_of_a_step(step, 1) < net.theta.nbytes / 3  # θ is worked through in pieces


# --- what is not finite


def not_finite() -> list[Any]:
    ones = np.ones((4, 3))
    nan = ones.copy()
    nan[2, 1] = math.nan
    huge = ones * 1e25
    return [
        pytest.param(nan, ones[:, :2], None, False, id="NaN in x"),
        pytest.param(ones * math.inf, ones[:, :2], None, False, id="infinite x"),
        pytest.param(ones, ones[:, :2] * math.nan, None, False, id="NaN in y"),
        pytest.param(ones, ones[:, :2], [1, math.nan, 1, 1], False, id="NaN in sample_weight"),
        pytest.param(ones, ones[:, :2] * 1e30, None, False, id="loss overflows"),
        pytest.param(huge, ones[:, :2] * 1e15, None, True, id="only the gradient overflows"),
    ]


@pytest.mark.parametrize("x, y, weight, finite_loss", not_finite())
@pytest.mark.parametrize(
    "make", [lambda: SGD(0.1), lambda: SGD(0.1, 0.9), lambda: Adam(1e-12), lambda: AdamW(1e-12)], ids=kind_of
)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_nothing_is_updated_by_what_is_not_finite(
    x: Any, y: Any, weight: Any, finite_loss: bool, make: Any, clip_norm: float | None
) -> None:
    net, optimizer = MLP([3, 2], loss="squared_error", seed=0), make()
    net.theta[:] *= 1e-12  # so that a huge x alone does not make the loss overflow
    step = TrainStep(net, optimizer, clip_norm=clip_norm)
    for _ in range(3):
        step(np.ones((4, 3)), np.ones((4, 2)) * 1e-12)
    assert step.diverged_at is None
    before = state_of(net, optimizer)

    loss = step(x, y, weight)
    assert math.isfinite(loss) == finite_loss
    assert step.diverged_at == 3
    assert state_of(net, optimizer) == before

    step(np.ones((4, 3)), np.ones((4, 2)))  # what is finite goes on; diverged_at remembers the first
    assert optimizer.step_count == 4
    step(x, y, weight)
    assert (step.diverged_at, optimizer.step_count) == (3, 4)


@each_precision
@pytest.mark.numpy_only
def test_overflow_in_a_large_batch_is_as_silent(precision: Any) -> None:
    """On every thread that gpuback starts; pytest makes errors of NumPy's warnings."""
    net = network((64, 256, 256, 10), **precision)
    x, y, _ = batch(net, 3000)
    x[:, 0] = 1e37 if precision["dtype"] != "float64" else 1e307
    net.weights[0][:, 0] = 1e3
    step, before = TrainStep(net, Adam()), net.theta.tobytes()
    step(x, y)
    assert step.diverged_at == 0
    assert net.theta.tobytes() == before
    net.forward(x)


def test_diverged_at_may_be_zero() -> None:
    step = TrainStep(MLP([3, 2], loss="squared_error"), Adam())
    step(np.full((1, 3), math.nan), np.ones((1, 2)))
    assert step.diverged_at == 0


def test_a_large_finite_gradient_is_no_divergence() -> None:
    """Its square overflows; it does not."""
    net = MLP([3, 2], loss="squared_error", seed=0)
    step = TrainStep(net, SGD(1e-30))
    before = net.theta.copy()
    step(np.full((1, 3), 1e10), np.full((1, 2), 1e15))
    assert step.diverged_at is None
    assert (net.theta != before).all()


@pytest.mark.parametrize("way", ["TrainStep", "optimizer.step"])
def test_an_update_that_makes_nan_stores_the_canonical_one(way: str) -> None:
    """b = −∞ switches a unit off, so loss and gradient are finite; weight decay then computes −∞ + ∞."""
    net, optimizer = MLP([1, 1, 1], loss="squared_error", seed=0), SGD(0.5, weight_decay=0.1)
    net.biases[0][:] = -math.inf
    x, y = np.ones((1, 1)), np.ones((1, 1))
    if way == "TrainStep":
        step = TrainStep(net, optimizer)
        step(x, y)
        assert step.diverged_at is None
    else:
        optimizer.step(net, net.value_and_grad(x, y)[1])
    bits = np.asarray(net.biases[0]).view(np.uint32)
    assert bits == 0x7FC00000
    assert np.isnan(net.theta).sum() == 1


def test_numpys_error_settings_stay_the_callers() -> None:
    net = network()
    x, y, _ = batch(net, 4)
    with np.errstate(over="raise", under="warn", divide="print", invalid="raise"):
        before = np.geterr()
        step = TrainStep(net, Adam())
        for samples in (x, np.full_like(x, 1e38)):  # whose products overflow
            step(samples, y)
            assert np.geterr() == before
    assert step.diverged_at == 1


def test_a_step_that_was_interrupted_can_be_made_again() -> None:
    class InterruptionError(Exception): ...

    class Interrupted(SGD):
        def _step_if_finite(self, *arguments: Any, **options: Any) -> None:
            if not self.seen:
                self.seen = True
                raise InterruptionError
            super()._step_if_finite(*arguments, **options)

        seen = False

    net, twin = network(), network()
    x, y, _ = batch(net, 4)
    step, expected = TrainStep(net, Interrupted(0.1)), TrainStep(twin, SGD(0.1))
    with pytest.raises(InterruptionError):
        step(x, y)
    assert float(step(x, y)) == float(expected(x, y))
    assert net.theta.tobytes() == twin.theta.tobytes()


# --- errors leave everything as it was


@pytest.mark.parametrize(
    "x, y, weight, error",
    [
        (np.ones((4, 6)), [0, 1, 2, 0], None, ShapeError),
        (np.ones(5), [0], None, ShapeError),
        (np.ones((0, 5)), np.ones(0, int), None, ShapeError),
        (np.ones((4, 5)), [0, 1, 2], None, ShapeError),
        (np.ones((4, 5)), np.ones((4, 2)), None, ShapeError),
        (np.ones((4, 5)), [0, 1, 2, 3], None, LabelError),
        (np.ones((4, 5)), [0, 1, 2, -1], None, LabelError),
        (np.ones((4, 5)), np.full((4, 3), 1.5), None, LabelError),
        (np.ones((4, 5)), [0.0, 1.0, 2.0, 0.0], None, DtypeError),
        (np.ones((4, 5)), [0, 1, 2, 0], [1.0, 1.0], ShapeError),
        (np.ones((4, 5)), [0, 1, 2, 0], np.ones((4, 1)), ShapeError),
        (np.ones((4, 5)) * 1j, [0, 1, 2, 0], None, DtypeError),
        ([["a"] * 5], [0], None, DtypeError),
        ([[1, 2, 3, 4, 5], [1, 2]], [0, 1], None, DtypeError),
        (np.full((1, 5), None), [0], None, DtypeError),
    ],
)
def test_a_batch_that_does_not_fit(x: Any, y: Any, weight: Any, error: type[Exception]) -> None:
    net, optimizer = network(), Adam()
    step = TrainStep(net, optimizer)
    step(*batch(net, 4))
    before = state_of(net, optimizer)
    with pytest.raises(error):
        step(x, y, weight)
    assert state_of(net, optimizer) == before
    assert step.diverged_at is None


def test_an_optimizer_of_another_network_is_refused_at_once() -> None:
    optimizer = Adam()
    TrainStep(network(), optimizer)
    with pytest.raises(OptionError, match="another network"):
        TrainStep(network(), optimizer)


# --- value_and_grad: fresh results, out=, accumulate=


def test_results_are_fresh() -> None:
    net = network()
    first = batch(net, 20)
    outputs = net.forward(first[0])
    loss, gradients = net.value_and_grad(first[0], first[1], need_input_grad=True)
    results = [outputs, loss, gradients.theta, gradients.inputs]
    before = [array.tobytes() for array in results]
    second = batch(net, 20, seed=1)
    net.forward(second[0])
    net.value_and_grad(second[0], second[1], need_input_grad=True)
    TrainStep(net, Adam())(*second)
    assert [array.tobytes() for array in results] == before
    for array in (outputs, gradients.inputs):
        assert not any(np.shares_memory(array, other) for other in (net.forward(first[0]), net.theta))


def test_gradients_are_views_of_theta_gradients() -> None:
    net = network()
    _, gradients = net.value_and_grad(*batch(net, 5)[:2])
    assert gradients.inputs is None
    for mine, theirs in zip([*gradients.weights, *gradients.biases], [*net.weights, *net.biases], strict=True):
        assert mine.shape == theirs.shape
        assert np.shares_memory(mine, gradients.theta)
    parts = [part.ravel() for pair in zip(gradients.weights, gradients.biases, strict=True) for part in pair]
    np.testing.assert_array_equal(gradients.theta, np.concatenate(parts))


@each_precision
def test_out_receives_the_gradients(precision: Any) -> None:
    net = network(**precision)
    x, y, w = batch(net, 20)
    loss, expected = net.value_and_grad(x, y, sample_weight=w, need_input_grad=True)
    _, out = net.value_and_grad(*batch(net, 7, seed=1)[:2], need_input_grad=True)
    theta = out.theta
    again, same = net.value_and_grad(x, y, sample_weight=w, need_input_grad=True, out=out)
    assert same is out and out.theta is theta
    assert again == loss
    assert out.theta.tobytes() == expected.theta.tobytes()
    assert out.inputs.tobytes() == expected.inputs.tobytes()


@pytest.mark.parametrize("size", [1, 6, 700, pytest.param(60_000, marks=pytest.mark.numpy_only)])
def test_accumulate_adds(size: int) -> None:
    """With integers every sum is exact, so order does not matter."""
    net = MLP([4, 3, 2], activation="identity", loss="squared_error")
    rng = np.random.default_rng(0)
    net.theta[:] = rng.integers(-1, 2, net.n_parameters)
    x, y = rng.integers(-1, 2, (size, 4)), rng.integers(-1, 2, (size, 2))
    weight = np.full(size, float(size))  # away with the mean's divisor
    _, once = net.value_and_grad(x, y, sample_weight=weight)
    _, out = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
    inputs = out.inputs.copy()
    for times in (2, 3):
        _, same = net.value_and_grad(x, y, sample_weight=weight, out=out, accumulate=True, need_input_grad=True)
        assert same is out
        np.testing.assert_array_equal(out.theta, times * once.theta)
        np.testing.assert_array_equal(out.inputs, inputs)  # no sum: these are the gradients of this call's x
    assert once.theta.any()


@each_precision
def test_a_batch_is_the_mean_of_its_halves(precision: Any) -> None:
    net = network(**precision)
    x, y, _ = batch(net, 64)
    loss, whole = net.value_and_grad(x, y)
    first, out = net.value_and_grad(x[:32], y[:32])
    second, _ = net.value_and_grad(x[32:], y[32:], out=out, accumulate=True)
    rounding = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 0.02, "float16": 2e-3}[precision["dtype"]]
    assert (first + second) / 2 == pytest.approx(loss, rel=1e-6)
    assert np.linalg.norm(out.theta / 2 - whole.theta) <= rounding * np.linalg.norm(whole.theta)


def test_accumulate_needs_out() -> None:
    with pytest.raises(OptionError, match="accumulate=True adds to out"):
        network().value_and_grad(np.ones((1, 5)), [0], accumulate=True)


def test_out_of_another_network_is_refused() -> None:
    _, other = network((5, 3)).value_and_grad(np.ones((1, 5)), [0])
    _, wide = network(dtype="float64").value_and_grad(np.ones((1, 5)), [0])
    for out in (other, wide, np.zeros(network().n_parameters, np.float32)):
        with pytest.raises(ShapeError, match="^out: expected Gradients"):
            network().value_and_grad(np.ones((1, 5)), [0], out=out)


def test_sample_weights_multiply_losses_and_leave_the_divisor() -> None:
    net = MLP([4, 2], loss="squared_error", dtype="float64", seed=0)
    x, y, _ = batch(net, 4)
    each = [net.value_and_grad(x[k : k + 1], y[k : k + 1]) for k in range(4)]
    weight = [0.0, 2.0, -1.0, 0.5]
    loss, gradients = net.value_and_grad(x, y, sample_weight=weight)
    expected = sum(w * value for w, (value, _) in zip(weight, each, strict=True)) / 4
    assert loss == pytest.approx(expected, rel=1e-14)
    expected = sum(w * g.theta for w, (_, g) in zip(weight, each, strict=True)) / 4
    np.testing.assert_allclose(gradients.theta, expected, rtol=1e-13, atol=1e-15)
    plain, ones = net.value_and_grad(x, y), net.value_and_grad(x, y, sample_weight=np.ones(4))
    assert plain[0] == ones[0] and plain[1].theta.tobytes() == ones[1].theta.tobytes()


# --- one network, several threads


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("precision", [PRECISIONS[1], PRECISIONS[2], PRECISIONS[3]], ids=str)
def test_threads_may_share_a_network(precision: Any, quick: bool) -> None:
    net = network((20, 30, 10), **precision)
    batches = [batch(net, size, seed) for seed, size in enumerate([64, 64, 64, 40, 2, 3])]

    def work(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[bytes, ...]:
        loss, gradients = net.value_and_grad(x, y, sample_weight=w, need_input_grad=True)
        return tuple(a.tobytes() for a in (net.forward(x), loss, gradients.theta, gradients.inputs, net.loss(x, y)))

    expected = [work(*one) for one in batches]
    start, wrong = threading.Barrier(len(batches)), []

    def repeat(k: int) -> None:
        start.wait()
        wrong.extend(k for _ in range(10 if quick else 40) if work(*batches[k]) != expected[k])

    threads = [threading.Thread(target=repeat, args=(k,)) for k in range(len(batches))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # let them meet in the middle of a pass
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.fixture
def large_batch_gradient() -> Any:
    """A function: the bits of a fresh network's gradient on a batch large enough for threads of gpuback's own."""
    net = network((64, 256, 256, 10), activation="relu")
    x, y, _ = batch(net, 3000)
    return lambda: copy.deepcopy(net).value_and_grad(x, y)[1].theta.tobytes()


@pytest.mark.thorough
def test_bits_do_not_depend_on_which_thread_asks(large_batch_gradient: Any) -> None:
    gradients = {large_batch_gradient()}
    other = threading.Thread(target=lambda: gradients.add(large_batch_gradient()))
    other.start()
    other.join()
    assert len(gradients) == 1


@pytest.mark.numpy_only
def test_bits_do_not_depend_on_what_other_threads_do(large_batch_gradient: Any) -> None:
    gradients, done = {large_batch_gradient()}, threading.Event()

    def be_busy() -> None:
        while not done.is_set():
            gradients.add(large_batch_gradient())

    other = threading.Thread(target=be_busy)
    other.start()
    try:
        gradients.update(large_batch_gradient() for _ in range(8))
    finally:
        done.set()
        other.join()
    assert len(gradients) == 1


# --- copies, and views of θ


def pickled(net: MLP) -> MLP:
    return pickle.loads(pickle.dumps(net))


def moved(net: MLP) -> MLP:
    return net.to(net.backend)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, copy.copy, pickled, moved])
@each_precision
def test_a_copy_is_a_network_of_its_own(make_copy: Any, precision: Any) -> None:
    net = network(activation=["tanh", "silu"], loss="squared_error", output="sigmoid", **precision)
    x, y, _ = batch(net, 12)
    before = net.forward(x).tobytes()  # and buffers are made
    twin = make_copy(net)
    assert twin.architecture == net.architecture and twin.backend == net.backend
    assert not np.shares_memory(twin.theta, net.theta)
    assert all(np.shares_memory(part, twin.theta) for part in (*twin.weights, *twin.biases))
    assert twin.forward(x).tobytes() == before
    TrainStep(twin, Adam(0.1))(x, y)
    assert net.forward(x).tobytes() == before
    assert twin.forward(x).tobytes() != before
    net.theta[:] = twin.theta
    assert twin.forward(x).tobytes() == net.forward(x).tobytes()


@each_precision
def test_writing_to_theta_or_a_view_changes_the_function(precision: Any) -> None:
    net = MLP([2, 1], loss="squared_error", **precision)
    assert net.forward([[1.0, 1.0]]).shape == (1, 1)
    net.theta[:] = [2, 3, 5]
    assert net.forward([[1.0, 1.0]]).tolist() == [[10.0]]
    net.weights[0][0, 1] = 7
    assert net.forward([[1.0, 1.0]]).tolist() == [[14.0]]
    net.biases[0][...] = -1
    assert net.forward([[1.0, 1.0]]).tolist() == [[8.0]]
    net.theta[:2] *= 2
    assert net.forward([[1.0, 1.0]]).tolist() == [[17.0]]
    assert net.theta.tolist() == [4.0, 14.0, -1.0]
    TrainStep(net, SGD(1.0))([[1.0, 1.0]], [[16.0]])
    assert net.forward([[1.0, 1.0]]).tolist() == [[14.0]]  # 17 − 3·(17 − 16)


# --- what x, y and sample_weight may be


class Exporter:
    """An array of a library that gpuback has never heard of."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def strided(array: np.ndarray) -> np.ndarray:
    wide = np.zeros((2 * len(array), *(2 * n for n in array.shape[1:])), array.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


FORMS = {
    "list": np.ndarray.tolist,
    "tuple": lambda array: tuple(map(tuple, array.tolist())) if array.ndim == 2 else tuple(array.tolist()),
    "float64": lambda array: array.astype(np.float64),
    "float16": lambda array: array.astype(np.float16),
    "bfloat16": lambda array: array.astype(ml_dtypes.bfloat16),
    "longdouble": lambda array: array.astype(np.longdouble),
    "int8": lambda array: array.astype(np.int8),
    "int64": lambda array: array.astype(np.int64),
    "big-endian": lambda array: array.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "every second": strided,
    "backwards": lambda array: array[::-1].copy()[::-1],
    "read-only": read_only,
    "__dlpack__": Exporter,
    "__array__": lambda array: SimpleNamespaceArray(array),
}


class SimpleNamespaceArray(SimpleNamespace):
    """What pandas and others offer to NumPy."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array=array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype)


def integers(shape: Any, highest: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, highest + 1, shape).astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_numbers_in_any_form_make_the_same_bits(form: str, loss: str) -> None:
    net = network(loss=loss, seed=3)
    x, y, w = integers((12, 5), 7, 0), integers((12, 3), 1, 1), integers(12, 3, 2)
    value, gradients = net.value_and_grad(x, y, sample_weight=w)
    convert = FORMS[form]
    again, same = net.value_and_grad(convert(x), convert(y), sample_weight=convert(w))
    assert (value.tobytes(), gradients.theta.tobytes()) == (again.tobytes(), same.theta.tobytes())
    assert net.forward(convert(x)).tobytes() == net.forward(x).tobytes()


LABEL_FORMS = ["list", "tuple", "int8", "int64", "every second", "backwards", "read-only", "__dlpack__", "__array__"]


@pytest.mark.parametrize("form", [*LABEL_FORMS, "uint64", "big-endian", "bool"])
def test_labels_in_any_form_make_the_same_bits(form: str) -> None:
    net = network()
    x, y = integers((12, 5), 7, 0), np.arange(12) % 2
    more = {
        "uint64": lambda array: array.astype(np.uint64),
        "big-endian": lambda array: array.astype(">i4"),
        "bool": lambda array: array.astype(bool),
    }
    value, gradients = net.value_and_grad(x, y)
    again, same = net.value_and_grad(x, (FORMS | more)[form](y))
    assert (value.tobytes(), gradients.theta.tobytes()) == (again.tobytes(), same.theta.tobytes())


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
def test_one_output_takes_y_flat_or_as_a_column(loss: str) -> None:
    net = network((5, 1), loss=loss)
    x, y = integers((12, 5), 7, 0), integers(12, 1, 1)
    flat, column = net.value_and_grad(x, y), net.value_and_grad(x, y[:, None])
    assert flat[0] == column[0]
    assert flat[1].theta.tobytes() == column[1].theta.tobytes()


def test_labels_are_probability_rows_of_ones() -> None:
    net = network(dtype="float64")
    x, y, w = batch(net, 12)
    by_label = net.value_and_grad(x, y, sample_weight=w)
    by_row = net.value_and_grad(x, np.eye(3)[y], sample_weight=w)
    assert by_row[0] == pytest.approx(by_label[0], rel=1e-14)
    np.testing.assert_allclose(by_row[1].theta, by_label[1].theta, rtol=1e-12, atol=1e-16)


def test_a_network_and_its_optimizer_are_copied_together() -> None:
    net, optimizer = network(), Adam(0.1)
    x, y, _ = batch(net, 20)
    TrainStep(net, optimizer)(x, y)
    for twin, its in (copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))):
        TrainStep(twin, its)(x, y)
        expected, own = copy.deepcopy((net, optimizer))
        TrainStep(expected, own)(x, y)
        assert twin.theta.tobytes() == expected.theta.tobytes() != net.theta.tobytes()
        assert its.step_count == 2


def test_theta_takes_assignments_in_place() -> None:
    net = network()
    theta = net.theta
    net.theta -= 1.0
    net.theta = np.arange(net.n_parameters)
    assert net.theta is theta
    np.testing.assert_array_equal(net.weights[0].ravel(), np.arange(net.weights[0].size))
    with pytest.raises(ShapeError, match="theta: expected shape"):
        net.theta = np.zeros(3)
