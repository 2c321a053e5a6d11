"""Training steps of narrow networks taken as a whole, in the emulator: the update is the optimizer's, and whether it is
made is decided as it is layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from emulator import EmulatorLauncher
from numpy.typing import NDArray
from support.kernel_layers import H200
from support.kernel_networks import Network, network_on
from support.requirements import require_emulator

from gpuback import MLP, SGD, Adam, AdamW, TrainStep
from gpuback._backends.cuda import network_plans, split_k

require_emulator()

FORMS = ["fused_step", "fused_passes"]
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.1, 0.9),
    "Nesterov": lambda: SGD(0.1, 0.9, nesterov=True, weight_decay=0.01),
    "weight decay": lambda: SGD(0.1, weight_decay=0.1),
    "Adam": lambda: Adam(0.01),
    "Adam with weight decay": lambda: Adam(0.01, weight_decay=0.1),
    "AdamW": lambda: AdamW(0.01),
    "rates by layer": lambda: SGD(0.1, 0.9, multipliers=[0.1, 0, (1, 2)]),
    "weights decay": lambda: AdamW(0.01, weight_decay=0.1, decay_biases=False),
}
NETWORK = Network((17, 64, 40, 3), 150, activation=("gelu", "relu"))


def bits(net: MLP, optimizer: Any) -> tuple[bytes, ...]:
    return net.theta.tobytes(), *(m.tobytes() for m in moments(optimizer))


def moments(optimizer: Any) -> list[NDArray]:
    return [moment for moment in optimizer._update.moments if moment is not None]


def counters_are_zero(net: MLP) -> bool:
    return not any(passes._counters.any() for passes in net._pool._free)


# ---- The update


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    "form, dtype",
    [("fused_step", "float32"), ("fused_passes", "tf32"), ("fused_step", "bfloat16"), ("fused_passes", "float16")],
)
def test_a_step_is_the_optimizers_with_the_gradient_of_value_and_grad(form, dtype, make):
    """To the bit: both add up the same sums, and the same operations make the update."""
    network = Network(NETWORK.sizes, NETWORK.batch_size, dtype, NETWORK.activation)
    batch = network.batch()
    at_once, apart = (network.on(EmulatorLauncher("random", copies="random"), form) for _ in range(2))
    optimizers = make(), make()
    step = TrainStep(at_once, optimizers[0])
    for _ in range(3):
        loss, gradients = apart.value_and_grad(*batch[:2])
        optimizers[1].step(apart, gradients)
        assert step(*batch).tobytes() == loss.tobytes()
        assert bits(at_once, optimizers[0]) == bits(apart, optimizers[1])
    assert optimizers[0].step_count == optimizers[1].step_count == 3
    assert optimizers[0]._update.state.tobytes() == optimizers[1]._update.state.tobytes()


def test_unequal_rates_take_a_launch_more_and_frozen_layers_leave_the_kernel():
    network = Network(NETWORK.sizes, 20, "float32", NETWORK.activation)
    for groups, launches in (
        ({}, ["set_hyper_parameters", "fused_step"]),
        ({"decay_biases": False}, ["set_hyper_parameters", "fused_step", "adam_in_ranges"]),
        (
            {"trainable": [False, False, True]},
            [*["forward_simt"] * 3, "loss_rows", "layer_simt", "set_hyper_parameters", "begin_step", "adam_in_ranges"],
        ),
    ):
        launcher = EmulatorLauncher()
        TrainStep(network.on(launcher, "fused_step"), Adam(**groups))(*network.batch())
        assert launcher.launches == launches


@pytest.mark.parametrize(
    "make",
    [OPTIMIZERS["Nesterov"], OPTIMIZERS["AdamW"], OPTIMIZERS["rates by layer"]],
    ids=["SGD", "AdamW", "rates by layer"],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip_norm", [0.01, 1e6])
def test_a_clipped_step(form, make, clip_norm):
    batch = NETWORK.batch()
    at_once, apart = (NETWORK.on(EmulatorLauncher("lifo", checked=True), form) for _ in range(2))
    optimizers = make(), make()
    step = TrainStep(at_once, optimizers[0], clip_norm=clip_norm)
    for _ in range(2):
        _, gradients = apart.value_and_grad(*batch[:2])
        norm = math.sqrt(np.sum(np.square(gradients.theta.astype(np.float64))))
        factor = min(1.0, clip_norm / (norm + 1e-6))
        assert (factor < 1) == (clip_norm < 1)
        gradients.theta[...] *= np.float32(factor)
        optimizers[1].step(apart, gradients)
        step(*batch)
        np.testing.assert_allclose(at_once.theta, apart.theta, rtol=0, atol=2e-7 if clip_norm < 1 else 0)
    assert optimizers[0].step_count == 2


def test_batch_sizes_and_optimizers_may_take_turns():
    """What is bound for one is not used for another."""
    net = NETWORK.on(EmulatorLauncher())
    x, y, _ = NETWORK.batch()
    steps = [TrainStep(net, SGD(0.1, 0.5)), TrainStep(net, Adam(), clip_norm=1.0)]
    losses = [float(steps[i % 2](x[:n], y[:n])) for i, n in enumerate((150, 150, 70, 70, 150, 1, 70, 150))]
    assert losses[-1] < losses[0] and [step.optimizer.step_count for step in steps] == [4, 4]
    assert counters_are_zero(net)


# ---- What is not finite


class Case(NamedTuple):
    """What is wrong with the second of three steps, whether it is made all the same, whether its loss is finite."""

    spoil: Callable[[MLP, NDArray, NDArray, NDArray], None]
    made: bool = False
    finite_loss: bool = False


def put(index: int, value: float) -> Callable[[MLP, NDArray, NDArray, NDArray], None]:
    """Into x, y, or the weights of samples."""
    return lambda net, *batch: batch[index].__setitem__((17,) + (1,) * (batch[index].ndim - 1), value)


def only_the_gradient_overflows(net: MLP, x: NDArray, y: NDArray, weight: NDArray) -> None:
    net.weights[0][:, 1] = 0
    x[:, 1], y[...] = 1e25, -1e18


CASES = {
    "NaN in x": Case(put(0, math.nan)),
    "infinite x": Case(put(0, math.inf), finite_loss=True),  # sigmoid saturates, and its slope of 0 meets infinity
    "NaN in y": Case(put(1, math.nan)),
    "infinite y": Case(put(1, -math.inf)),
    "NaN in sample_weight": Case(put(2, math.nan)),
    "infinite sample_weight": Case(put(2, math.inf)),
    "NaN in theta": Case(lambda net, *batch: net.weights[1].__setitem__((2, 3), math.nan)),
    "NaN in a bias": Case(lambda net, *batch: net.biases[0].__setitem__(0, math.nan)),
    "infinite theta": Case(lambda net, *batch: net.weights[1].__setitem__((2, 3), math.inf), finite_loss=True),
    "loss overflows": Case(put(1, 1e30)),
    "only the gradient overflows": Case(only_the_gradient_overflows, finite_loss=True),
    "an infinite weight that saturates": Case(
        lambda net, x, *_: (x.__setitem__((slice(None), 0), 1), net.weights[0].__setitem__((0, 0), -math.inf)),
        made=True,
        finite_loss=True,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("stop_after_nonfinite", [False, True])
@pytest.mark.parametrize("form, make, clip_norm", [
    ("fused_step", lambda: SGD(0.01, 0.9), None),
    ("fused_step", lambda: Adam(), None),
    ("fused_step", lambda: SGD(0.01), 1.0),
    ("fused_passes", lambda: SGD(0.01), None),
    ("fused_passes", lambda: AdamW(), None),
    ("fused_passes", lambda: Adam(), 1.0),
])  # fmt: skip
def test_a_step_is_made_where_numpy_makes_it(form, make, clip_norm, stop_after_nonfinite, case):
    sizes, options = (3, 5, 40, 2), {"activation": "sigmoid", "loss": "squared_error"}
    rng = np.random.default_rng(0)
    x, y, weight = (rng.random(shape).astype(np.float32) for shape in ((150, 3), (150, 2), 150))
    with np.errstate(all="ignore"):
        nets = network_on(EmulatorLauncher("random"), sizes, form, **options), MLP(sizes, backend="numpy", **options)
        nets[1].theta[...] = nets[0].theta
        steps = [TrainStep(net, make(), clip_norm=clip_norm) for net in nets]
        for step in steps:
            step._step(x, y, weight, stop_after_nonfinite=stop_after_nonfinite)
        theta = nets[0].theta.copy()
        for net, step in zip(nets, steps, strict=True):
            spoilt = x.copy(), y.copy(), weight.copy()
            case.spoil(net, *spoilt)
            before = bits(nets[0], steps[0].optimizer)
            loss = float(step._step(*spoilt, stop_after_nonfinite=stop_after_nonfinite))
            assert math.isfinite(loss) == case.finite_loss
            assert (step.optimizer.step_count, step.diverged_at) == ((2, None) if case.made else (1, 1))
            if step is steps[0]:
                assert (bits(net, step.optimizer) == before) == (not case.made)
                assert counters_are_zero(net)
        for net, step in zip(nets, steps, strict=True):
            net.theta[...] = theta
            step._step(x, y, weight, stop_after_nonfinite=stop_after_nonfinite)
            assert step.optimizer.step_count == (3 if case.made else 1 if stop_after_nonfinite else 2)
    assert np.isfinite(nets[0].theta).all()
    np.testing.assert_allclose(nets[0].theta, nets[1].theta, rtol=1e-5, atol=1e-5)
    assert counters_are_zero(nets[0])


# ---- Totals that may be infinite though nothing that is added up is


def near_the_end(signs: tuple[float, float, float]) -> tuple[NDArray, NDArray, NDArray]:
    """A batch of three splits whose sums of dW, in column 1, are about 2e38 times `signs`, at θ = 0."""
    split = split_k.narrow_split(300)
    assert (split.splits, split.rows_per_split) == (3, 128)
    x = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
    x[:, 1] = 1.17e38 * np.repeat(signs, (128, 128, 44))
    return x, np.full((300, 40), -1, np.float32), np.full(300, 4, np.float32)


@pytest.mark.parametrize("form", [*FORMS, "layers"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("make", [lambda: SGD(1e-3, 0.5), lambda: Adam(1e-3)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("signs, finite", [((1, -1, 1e-38), True), ((1, 1, 0), False), ((-1, -1, 0.5), False)])
def test_partial_results_near_the_end_of_float32(signs, finite, make, clip_norm, form):
    net = network_on(EmulatorLauncher("random"), (3, 40), form, loss="squared_error")
    net.theta[...] = 0
    optimizer = make()
    step = TrainStep(net, optimizer, clip_norm=clip_norm)
    x, y, weight = near_the_end(signs)
    before = bits(net, optimizer)
    loss = step(x, y, weight)
    np.testing.assert_allclose(loss, 80, rtol=1e-6)
    assert (optimizer.step_count, step.diverged_at) == ((1, None) if finite else (0, 0))
    assert (bits(net, optimizer) == before) == (not finite)
    assert np.isfinite(net.theta).all() and all(np.isfinite(moment).all() for moment in moments(optimizer))
    if finite and clip_norm is None and isinstance(optimizer, SGD):
        exact = -1e-3 * 4 * np.mean(x[:, 0].astype(np.float64))
        np.testing.assert_allclose(net.weights[0][:, 0], exact, rtol=1e-5)
        np.testing.assert_allclose(net.biases[0], -4e-3, rtol=1e-6)

    x[:, 1] = 1
    step(x, y, weight)
    assert optimizer.step_count == 1 + finite and np.isfinite(net.theta).all()
    if form != "layers":
        assert counters_are_zero(net)


@pytest.mark.parametrize("form", FORMS)
def test_losses_near_the_end_of_float32(form):
    """Their mean is finite, though that many of the largest would not be."""
    net = network_on(EmulatorLauncher("random"), (3, 2), form, loss="squared_error")
    step = TrainStep(net, SGD(1e-20))
    x, y, _ = near_the_end((0, 0, 0))
    y = np.repeat(np.float32([1.7e19, 1e10, 0]), (128, 128, 44))[:, None] * np.float32([1, 0])
    loss = step(x, y)
    np.testing.assert_allclose(loss, 128 / 300 * 1.445e38, rtol=1e-5)
    assert step.optimizer.step_count == 1
    assert float(step(x, y * np.float32(1.5))) == math.inf
    assert (step.optimizer.step_count, step.diverged_at) == (1, 1)
    step(x, np.ones((300, 2)))
    assert step.optimizer.step_count == 2 and counters_are_zero(net)


@pytest.mark.parametrize("form", [*FORMS, "layers"])
@pytest.mark.parametrize("what", ["x", "h", "da", "nothing"])
def test_operands_beyond_float16(form, what):
    """x, h or da becomes infinite as it is rounded to float16."""
    net = network_on(EmulatorLauncher(), (3, 40, 2), form, loss="squared_error", activation="softplus", dtype="float16")
    step = TrainStep(net, Adam(), clip_norm=None)
    x, y = np.ones((6, 3), np.float32), np.ones((6, 2), np.float32)
    if what == "x":
        x[3, 1] = 7e4
    elif what == "h":
        net.biases[0][5] = 7e4
    elif what == "da":
        y[2, 1] = 7e4
    before = bits(net, step.optimizer)
    step(x, y)
    made = what == "nothing"
    assert (step.optimizer.step_count, step.diverged_at) == ((1, None) if made else (0, 0))
    assert (bits(net, step.optimizer) != before) == made
    net.biases[0][5] = 0
    step(np.ones((6, 3)), np.ones((6, 2)))
    assert step.optimizer.step_count == 1 + made and np.isfinite(net.theta).all()


@pytest.mark.parametrize("form", [*FORMS, "layers"])
def test_an_input_that_becomes_infinite_as_it_is_rounded_to_tf32(form):
    """Behind relu it does not show in the loss, and no da is large: dW_1 is 0 times infinity."""
    net = network_on(EmulatorLauncher(), (1, 3, 2), form, loss="squared_error", allow_tf32=True)
    net.weights[0][...] = -1e-3
    x = np.full((5, 1), np.finfo(np.float32).max)
    y = np.tile(net.biases[1] + np.float32(0.01), (5, 1))
    step, before = TrainStep(net, SGD(0.1)), net.theta.copy()
    assert math.isfinite(step(x, y))
    assert (step.optimizer.step_count, step.diverged_at) == (0, 0)
    np.testing.assert_array_equal(net.theta, before)


# ---- What the rows of a batch tile do not change


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_of_a_split_are_added_one_by_one_whatever_its_batch_tiles(form, monkeypatch):
    monkeypatch.setattr(split_k, "WORK_TILES_WANTED", 1)  # one split of several batch tiles
    weight = np.zeros(256, np.float32)
    weight[[0, 64, 128, 192]] = 2.0**60, 1, -(2.0**60), 1  # of one thread's rows; only from left to right is the sum 1
    clear_plans()
    results, rows = set(), set()
    for limits in (H200, replace(H200, shared_bytes=66_000)):
        net = network_on(EmulatorLauncher(limits=limits), (64,) * 4, form, dtype="bfloat16")
        loss, _ = net.value_and_grad(np.ones((256, 64)), np.zeros(256, int), sample_weight=weight)
        (passes,) = net._pool._free
        rows.add((passes._plan if form == "fused_step" else passes._plan.passes).tile_b)
        results.add(loss.tobytes())
        assert loss > 0
    clear_plans()
    assert len(results) == 1 and len(rows) == 2


def clear_plans() -> None:
    for plan in (network_plans.step_plan, network_plans.passes_plan, network_plans.weight_gradients_plan):
        plan.cache_clear()
