"""Frozen layers, learning rates by layer, and biases that do not decay: in steps, runs, copies and checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpuback import MLP, SGD, Adam, AdamW, LossScaling, TrainStep, fit
from gpuback._backends.numpy.ops import NumpyOps
from gpuback._core.threads import ThreadPool
from gpuback.errors import OptionError, ShapeError
from gpuback.testing import random_batch

pytestmark = pytest.mark.on_each_backend(layers=True)

KINDS: dict[str, Callable[..., Any]] = {
    "sgd": lambda **groups: SGD(0.05, weight_decay=0.1, **groups),
    "nesterov": lambda **groups: SGD(0.05, 0.9, True, 0.1, **groups),
    "adam": lambda **groups: Adam(0.01, weight_decay=0.1, **groups),
    "adamw": lambda **groups: AdamW(0.01, weight_decay=0.1, **groups),
}
each_kind = pytest.mark.parametrize("kind", KINDS)

FROZEN: dict[str, dict[str, Any]] = {
    "the last layer": {"trainable": [False, False, True]},
    "the first layer": {"trainable": [True, False, False]},
    "a layer in between": {"trainable": [False, True, False], "multipliers": [1, 0.5, 1]},
    "biases": {"trainable": [(False, True)] * 3},
    "parts": {"trainable": [False, (False, True), True], "multipliers": [1, 0.1, (1, 2)], "decay_biases": False},
}
UNEQUAL: dict[str, dict[str, Any]] = {
    "rates": {"multipliers": [0.1, 0, (2, 1)]},
    "weights decay": {"decay_biases": False},
    "both": {"multipliers": [0.1, 1, 1], "decay_biases": False},
}


def network(sizes: Any = (5, 8, 6, 3), **options: Any) -> MLP:
    return MLP(sizes, **({"activation": "gelu", "seed": 1} | options))


def state_of(net: MLP, optimizer: Any) -> tuple[Any, ...]:
    arrays = {name: array.tobytes() for name, array in optimizer.state.items()}
    return net.theta.tobytes(), arrays, optimizer.step_count


def is_trained(groups: dict[str, Any], net: MLP) -> np.ndarray:
    """Whether each parameter is, read off the arguments."""
    mask = np.ones(net.n_parameters, bool)
    for W, b, trains in zip(*net.architecture.layout.split(mask), groups.get("trainable", [True] * 3), strict=True):
        W[...], b[...] = trains if isinstance(trains, tuple) else (trains, trains)
    return mask


# --- steps


@each_kind
@pytest.mark.parametrize("name", [*FROZEN, *UNEQUAL])
def test_a_step_is_value_and_grad_and_an_optimizer(kind: str, name: str) -> None:
    groups = (FROZEN | UNEQUAL)[name]
    dtype = "float64" if name in FROZEN else "float32"  # the narrow kernels of float32 take unequal rates, too
    net, twin = network(dtype=dtype), network(dtype=dtype)
    optimizer, twins = KINDS[kind](**groups), KINDS[kind](**groups)
    step, before = TrainStep(net, optimizer), net.theta.copy()
    for size in (7, 7, 7, 30, 7):  # on a GPU the third one is replayed
        x, y = random_batch(net, size, size)
        value = step(x, y)
        expected, gradients = twin.value_and_grad(x, y)
        twins.step(twin, gradients)
        assert value.tobytes() == expected.tobytes()
        assert state_of(net, optimizer) == state_of(twin, twins)
    trained = is_trained(groups, net)
    np.testing.assert_array_equal(net.theta[~trained], before[~trained])
    for array in optimizer.state.values():
        assert not array[~trained].any()
    moving = [part for part, m in zip(net.weights, groups.get("multipliers", (1, 1, 1)), strict=True) if m]
    assert (net.theta != before)[trained].mean() > (0.9 if len(moving) == 3 else 0.4)


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize(
    "precision", [{"dtype": "float16"}, {"dtype": "bfloat16"}, {"reproducible": True}, {"allow_tf32": True}], ids=str
)
def test_frozen_layers_in_every_precision(precision: Any) -> None:
    """A narrow network with frozen layers goes layer by layer, where sums have another order."""
    groups = FROZEN["parts"]
    net, twin = network(**precision), network(**precision)
    step, twins, before = TrainStep(net, SGD(0.1, 0.9, **groups)), SGD(0.1, 0.9, **groups), net.theta.copy()
    x, y = random_batch(net, 20)
    for _ in range(3):
        step(x, y)
        twins.step(twin, twin.value_and_grad(x, y)[1])
    trained = is_trained(groups, net)
    np.testing.assert_allclose(net.theta, twin.theta, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(net.theta[~trained], before[~trained])
    assert (net.theta[trained] != before[trained]).all()


def test_a_full_gradient_stays_full() -> None:
    net = network()
    x, y = random_batch(net, 9)
    before = net.value_and_grad(x, y)[1].theta.copy()
    theta = net.theta.copy()
    TrainStep(net, SGD(0.1, trainable=[False, False, True]))(x, y)
    net.theta = theta
    np.testing.assert_array_equal(net.value_and_grad(x, y)[1].theta, before)
    assert before[: net.weights[0].size].any()


def test_the_users_gradient_is_only_read() -> None:
    net, optimizer = network(), Adam(**FROZEN["parts"])
    _, gradients = net.value_and_grad(*random_batch(net, 9))
    gradients.theta[: net.weights[0].size] = np.nan  # frozen: whatever it is
    before = gradients.theta.tobytes()
    gradients.theta.flags.writeable = False
    optimizer.step(net, gradients)
    assert gradients.theta.tobytes() == before
    assert np.isfinite(net.theta).all()


@pytest.mark.parametrize("name", ["the last layer", "parts", "both"])
def test_clipping_is_to_the_norm_of_what_is_trained(name: str) -> None:
    groups = (FROZEN | UNEQUAL)[name]
    net, twin = network(dtype="float64"), network(dtype="float64")
    x, y = random_batch(net, 20)
    gradient = twin.value_and_grad(x, y)[1].theta
    trained = is_trained(groups, net)
    length = np.linalg.norm(gradient[trained])
    for clip_norm, factor in ((length / 3, 1 / 3), (length * 1.01, 1.0)):
        net.theta = twin.theta
        TrainStep(net, SGD(0.1, **groups), clip_norm=float(clip_norm))(x, y)
        TrainStep(twin, SGD(0.1 * factor, **groups))(x, y)
        np.testing.assert_allclose(net.theta, twin.theta, rtol=1e-5, atol=1e-9)  # 10⁻⁶ is added to the norm
        twin.theta = net.theta


def test_what_is_not_finite_in_a_frozen_part_is_no_divergence() -> None:
    """∂loss/∂W_1 overflows: x is large, and only the small W_1 keeps a_1 ordinary."""
    x, y = np.full((4, 5), 3e38), np.full((4, 3), 50.0)
    for groups, diverged in (({"trainable": [(False, True), True, True]}, None), ({}, 0)):
        net = network(activation="identity", loss="squared_error")
        net.weights[0][...] = 1e-39
        step = TrainStep(net, SGD(1e-3, **groups))
        with np.errstate(over="ignore"):
            assert math.isfinite(step(x, y))
        assert (step.diverged_at, step.optimizer.step_count) == (diverged, int(diverged is None))


@pytest.mark.parametrize("name", [*FROZEN, "both"])
def test_micro_batches(name: str) -> None:
    groups = (FROZEN | UNEQUAL)[name]
    results = []
    for micro_batch_size in (None, 8):
        net = network(dtype="float64")
        step = TrainStep(net, Adam(0.01, **groups), micro_batch_size=micro_batch_size)
        losses = [float(step(*random_batch(net, 20, seed))) for seed in range(3)]
        results.append((losses, net.theta))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-12)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-9)


def test_loss_scaling() -> None:
    results = []
    for scaling in (None, LossScaling(initial=64.0)):
        net = network(dtype="float16")
        step = TrainStep(net, SGD(0.1, 0.9, **FROZEN["parts"]), loss_scaling=scaling)
        for seed in range(3):
            step(*random_batch(net, 20, seed))
        assert step.optimizer.step_count == 3
        results.append(net.theta)
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)
    frozen = slice(0, results[0].size - network().biases[2].size - network().weights[2].size)
    assert (results[0][frozen] == results[1][frozen]).mean() > 0.8


@pytest.mark.numpy_only
def test_threads_add_up_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumpyOps, "plan_blocks", lambda *_, **__: (7, ThreadPool(2, blas_alone=True)))
    garbage = NumpyOps.empty

    def not_a_number(self: Any, shape: Any, dtype: Any) -> np.ndarray:
        array = garbage(self, shape, dtype)
        array.fill(np.nan)
        return array

    monkeypatch.setattr(NumpyOps, "empty", not_a_number)
    for groups in FROZEN.values():
        net, twin = network(dtype="float64"), network(dtype="float64")
        step, twins = TrainStep(net, SGD(0.1, **groups)), SGD(0.1, **groups)
        x, y = random_batch(net, 100)
        for _ in range(2):
            step(x, y)
            twins.step(twin, twin.value_and_grad(x, y)[1])
        assert step.optimizer.step_count == 2
        assert net.theta.tobytes() == twin.theta.tobytes()


def test_two_optimizers_may_take_turns_with_a_networks_buffers() -> None:
    """Buffers for a part of the layers are not those for all, and neither are captured steps."""
    net, twin = network(dtype="float64"), network(dtype="float64")
    x, y = random_batch(net, 12)
    steps = [TrainStep(net, SGD(0.1, trainable=trainable)) for trainable in ([False, False, True], [True] * 3)]
    twins = [SGD(0.1, trainable=[False, False, True]), SGD(0.1)]
    for turn in range(8):
        steps[turn % 2](x, y)
        twins[turn % 2].step(twin, twin.value_and_grad(x, y)[1])
    assert net.theta.tobytes() == twin.theta.tobytes()


# --- nothing changes where all is equal


@each_kind
def test_equal_groups_are_none(kind: str) -> None:
    equal: dict[str, Any] = {"trainable": [True, (True, True), True], "multipliers": [1, 1.0, (1, 1)]}
    nets, optimizers = (network(), network()), (KINDS[kind](), KINDS[kind](**equal))
    for net, optimizer in zip(nets, optimizers, strict=True):
        step = TrainStep(net, optimizer)
        for _ in range(2):
            step(*random_batch(net, 9))
    assert optimizers[1]._ranges is None and optimizers[1]._groups.trainable_layers is None
    assert repr(optimizers[0]) == repr(optimizers[1])
    assert optimizers[0]._options() == optimizers[1]._options()
    assert state_of(nets[0], optimizers[0]) == state_of(nets[1], optimizers[1])


def test_a_multiplier_for_all_is_a_learning_rate() -> None:
    nets = network(), network()
    steps = TrainStep(nets[0], Adam(0.02, multipliers=[0.5] * 3)), TrainStep(nets[1], Adam(0.01))
    for step in steps:
        for _ in range(3):
            step(*random_batch(step.net, 9))
    assert nets[0].theta.tobytes() == nets[1].theta.tobytes()


# --- as objects


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("name", ["parts", "both"])
def test_a_copy_goes_on_alike(make_copy: Any, name: str) -> None:
    net, optimizer = network(), Adam(0.01, weight_decay=0.1, **(FROZEN | UNEQUAL)[name])
    x, y = random_batch(net, 9)
    step = TrainStep(net, optimizer)
    step(x, y)
    twin, twins = make_copy((net, optimizer))
    twin_step = TrainStep(twin, twins)
    for _ in range(2):
        step(x, y)
        twin_step(x, y)
    assert state_of(net, optimizer) == state_of(twin, twins)


@pytest.mark.numpy_only
@pytest.mark.parametrize("name", [*FROZEN, *UNEQUAL])
def test_repr_makes_the_same_optimizer(name: str) -> None:
    for kind in (SGD(0.1, **(FROZEN | UNEQUAL)[name]), AdamW(**(FROZEN | UNEQUAL)[name])):
        again = eval(repr(kind), {"SGD": SGD, "AdamW": AdamW})
        assert again._options() == kind._options()
        assert again._groups == kind._groups


@pytest.mark.numpy_only
def test_arguments_can_be_read() -> None:
    optimizer = SGD(0.1, trainable=[False, (False, True), (True, True)], multipliers=np.array([0.5, 1, 2]))
    assert optimizer.trainable == (False, (False, True), True)
    assert optimizer.multipliers == (0.5, 1.0, 2.0)
    assert optimizer.decay_biases and not SGD(0.1, decay_biases=False).decay_biases
    assert (SGD(0.1).trainable, SGD(0.1).multipliers) == (None, None)
    with pytest.raises(AttributeError):
        optimizer.trainable = None


# --- fit and checkpoints


@pytest.mark.parametrize("name", ["the last layer", "parts", "both"])
def test_a_run_resumes_to_the_same_bits(name: str, tmp_path: Any) -> None:
    groups = (FROZEN | UNEQUAL)[name]
    x, y = random_batch(network(), 40)
    run: dict[str, Any] = {"batch_size": 16, "seed": 0, "validation": 0.2}
    whole, optimizer = network(), AdamW(0.01, **groups)
    fit(whole, x, y, optimizer=optimizer, epochs=4, **run)
    file = tmp_path / "run.safetensors"
    fit(network(), x, y, optimizer=AdamW(0.01, **groups), epochs=2, checkpoint=file, **run)
    net, again = network(), AdamW(0.01, **groups)
    fit(net, x, y, optimizer=again, epochs=4, checkpoint=file, resume=True, **run)
    assert state_of(net, again) == state_of(whole, optimizer)


@pytest.mark.parametrize(
    "first, second, name",
    [
        ({"trainable": [False, True, True]}, {"trainable": [True, False, True]}, "trainable"),
        ({"trainable": [False, True, True]}, {}, "trainable"),
        ({}, {"trainable": [False, True, True]}, "trainable"),
        ({"multipliers": [1, 2, 3]}, {"multipliers": [1, 2, (3, 2)]}, "multipliers"),
        ({"multipliers": [1, 2, 3]}, {}, "multipliers"),
        ({"decay_biases": False}, {}, "decay_biases"),
        ({}, {"decay_biases": False}, "decay_biases"),
    ],
    ids=str,
)
@pytest.mark.numpy_only
def test_a_run_with_other_groups_is_refused(first: Any, second: Any, name: str, tmp_path: Any) -> None:
    x, y = random_batch(network(), 20)
    run: dict[str, Any] = {"epochs": 1, "seed": 0, "checkpoint": tmp_path / "run.safetensors", "resume": True}
    fit(network(), x, y, optimizer=Adam(**first), **run)
    with pytest.raises(OptionError, match=rf"another run's: {name} is .* there and .* here"):
        fit(network(), x, y, optimizer=Adam(**second), **run)
    fit(network(), x, y, optimizer=Adam(**first), **run)


@pytest.mark.numpy_only
def test_without_groups_a_run_has_the_options_it_always_had() -> None:
    assert list(Adam()._options()) == ["optimizer", "learning_rate", "betas", "eps", "weight_decay"]
    assert list(SGD(0.1)._options()) == ["optimizer", "learning_rate", "momentum", "nesterov", "weight_decay"]


# --- what is refused


@pytest.mark.parametrize("name", ["trainable", "multipliers"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.numpy_only
def test_there_is_a_value_for_each_layer(name: str, count: int) -> None:
    optimizer, net = Adam(**{name: [True if name == "trainable" else 1.0] * count}), network()
    with pytest.raises(ShapeError, match=rf"{name}: expected 3 values \(one per layer of sizes .*\), got {count}"):
        TrainStep(net, optimizer)
    with pytest.raises(ShapeError, match=rf"{name}: expected 3 values"):
        optimizer.step(net, net.value_and_grad(*random_batch(net, 3))[1])
    assert optimizer.state == {} and optimizer.step_count == 0


@pytest.mark.parametrize("trainable", [[False] * 3, [(False, False), False], []], ids=str)
@pytest.mark.numpy_only
def test_something_is_trained(trainable: Any) -> None:
    with pytest.raises(OptionError, match=r"^trainable: expected at least one True, got .*: nothing would be trained"):
        SGD(0.1, trainable=trainable)


@pytest.mark.parametrize("trainable", [True, False, 1, "last", {0: False}, {True}], ids=str)
@pytest.mark.numpy_only
def test_trainable_is_a_sequence(trainable: Any) -> None:
    with pytest.raises(OptionError, match=r"^trainable: expected a sequence with True or False, or a pair .*; got"):
        Adam(trainable=trainable)


@pytest.mark.parametrize("value", [0, 1, None, "yes", 1.0, (True, 1), (0, True)], ids=str)
@pytest.mark.numpy_only
def test_trainable_holds_booleans(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^trainable\[1\](\[[01]\])?: expected True or False, or a pair .* got"):
        Adam(trainable=[True, value])


@pytest.mark.parametrize("multipliers", [0.5, "half", {0: 1.0}], ids=str)
@pytest.mark.numpy_only
def test_multipliers_are_a_sequence(multipliers: Any) -> None:
    with pytest.raises(OptionError, match=r"^multipliers: expected a sequence with a number, or a pair .*; got"):
        Adam(multipliers=multipliers)


@pytest.mark.parametrize(
    "value", [-1e-9, math.nan, math.inf, "fast", None, 1j, True, (1.0, -1.0), (None, 1.0)], ids=str
)
@pytest.mark.numpy_only
def test_multipliers_are_finite_numbers_from_0_on(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^multipliers\[2\](\[[01]\])?: expected a finite number ≥ 0, got"):
        SGD(0.1, multipliers=[1.0, 1.0, value])


@pytest.mark.parametrize("name, value", [("trainable", True), ("multipliers", 1.0)])
@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.numpy_only
def test_a_pair_has_two_values(name: str, value: Any, length: int) -> None:
    with pytest.raises(OptionError, match=rf"^{name}\[0\]: expected .* or a pair \(weights, biases\), got"):
        SGD(0.1, **{name: [(value,) * length, value]})


@pytest.mark.parametrize("value", [0, 1, None, "no", [True, False]], ids=str)
@pytest.mark.numpy_only
def test_decay_biases_is_a_boolean(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^decay_biases: expected True or False, got"):
        AdamW(decay_biases=value)
