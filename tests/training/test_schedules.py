"""gpuback.schedules: the rates by hand, the same bits everywhere; what fit makes of them."""

from __future__ import annotations

import ast
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

import gpuback
from gpuback import MLP, SGD, Adam, TrainStep, schedules
from gpuback.errors import OptionError
from gpuback.schedules import constant, cosine, step_decay, warmup
from gpuback.testing import fingerprint


def data(n: int = 21) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 3)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(int)


def network(**options: Any) -> MLP:
    return MLP([3, 5, 2], activation="tanh", seed=0, **options)


# --- the rates


def test_a_constant_rate_is_constant() -> None:
    assert {constant(0.3)(step) for step in (0, 1, 10**9)} == {0.3}


def test_step_decay_multiplies_once_in_so_many_steps() -> None:
    schedule = step_decay(0.5, every=3, factor=0.5)
    assert [schedule(step) for step in range(8)] == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]
    assert step_decay(0.1, every=1, factor=0.9)(500) == pytest.approx(0.1 * 0.9**500, rel=1e-13)
    assert step_decay(0.1, every=1)(10**12) == 0.0


@pytest.mark.parametrize("steps", [1, 2, 7, 1000, 12345])
@pytest.mark.parametrize("final", [0.0, 0.02])
def test_cosine_is_half_a_wave_down(steps: int, final: float) -> None:
    schedule = cosine(0.3, steps, final)
    mpmath.mp.dps = 40
    for step in {*range(min(steps + 1, 60)), steps // 2, steps - 1, steps}:
        exact = final + (mpmath.mpf(0.3) - final) * (1 + mpmath.cos(mpmath.pi * step / steps)) / 2
        assert abs(schedule(step) - exact) <= 4 * 2.0**-53 * exact, step
    assert (schedule(0), schedule(steps), schedule(steps + 1), schedule(10**9)) == (0.3, final, final, final)
    rates = [schedule(step) for step in range(steps + 1)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_may_rise() -> None:
    assert cosine(0.0, 10, final=1.0)(5) == pytest.approx(0.5)
    assert cosine(0.0, 10, final=1.0)(10) == 1.0


def test_warmup_leads_in_a_straight_line_to_where_a_schedule_begins() -> None:
    schedule = warmup(step_decay(0.8, every=2, factor=0.5), steps=4)
    assert [schedule(step) for step in range(8)] == [0.2, 0.4, 0.6000000000000001, 0.8, 0.8, 0.8, 0.4, 0.4]
    assert warmup(lambda step: 3.0 + step, steps=1)(5) == 7.0


def test_rates_have_the_same_bits_everywhere() -> None:
    """As they are where this was written; they are made of IEEE operations alone."""
    schedule = warmup(cosine(0.1, steps=1000, final=0.001), steps=50)
    assert [schedule(step).hex() for step in (0, 17, 111, 550, 801, 1003)] == [
        "0x1.0624dd2f1a9fcp-9",
        "0x1.26e978d4fdf3cp-5",
        "0x1.95e36c0288a11p-4",
        "0x1.9db22d0e56044p-5",
        "0x1.f83f78f58205bp-7",
        "0x1.9356f52796b2ep-10",
    ]
    assert [step_decay(0.1, 3, 0.7)(step).hex() for step in (3, 11, 100)] == [
        "0x1.1eb851eb851ebp-4",
        "0x1.18fc504816effp-5",
        "0x1.9f0df7f70e3bfp-21",
    ]


def test_nothing_but_ieee_operations_makes_them() -> None:
    """No function of `math` but the factorials of integers, and no power but of an integer."""
    tree = ast.parse(Path(schedules.__file__).read_text(encoding="utf-8"))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert {node.attr for node in attributes if ast.unparse(node.value) == "math"} == {"factorial"}
    powers = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)]
    assert [ast.unparse(power) for power in powers] == ["(-1) ** k"]


@pytest.mark.parametrize(
    "schedule",
    [constant(0.1), step_decay(0.1, every=10), cosine(0.1, 9, 0.01), warmup(cosine(0.1, 9), 3), warmup(float, 10**6)],
    ids=repr,
)
def test_a_step_is_a_count(schedule: Any) -> None:
    for step in (-1, -(10**30), 2.5, 3.0, np.float64(3), math.nan, math.inf, True, "3", None, 2**63, 10**400, [1]):
        with pytest.raises(OptionError, match="step: expected an integer"):
            schedule(step)
    for step in (np.int8(3), np.uint64(3), 3):
        assert schedule(step) == schedule(3) >= 0
    assert math.isfinite(schedule(2**63 - 1))


# --- what they are


@pytest.mark.parametrize(
    "schedule", [constant(0.1), step_decay(0.1, 5, 0.5), cosine(0.1, 9, 0.01), warmup(cosine(0.1, 9), 3)], ids=repr
)
def test_a_schedule_says_what_it_is(schedule: Any) -> None:
    again = eval(repr(schedule), vars(schedules))
    assert again == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert [again(step) for step in range(12)] == [schedule(step) for step in range(12)]


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: constant(-0.1), "learning_rate"),
        (lambda: constant(math.nan), "learning_rate"),
        (lambda: constant("0.1"), "learning_rate"),
        (lambda: step_decay(0.1, 0), "every: expected an integer ≥ 1, got 0"),
        (lambda: step_decay(0.1, 2.5), "every"),
        (lambda: step_decay(0.1, 2, 0.0), "factor"),
        (lambda: step_decay(0.1, 2, 1.5), "factor"),
        (lambda: cosine(0.1, 0), "steps"),
        (lambda: cosine(0.1, True), "steps"),
        (lambda: cosine(0.1, 5, -1.0), "final"),
        (lambda: warmup(0.1, 5), "schedule: expected a function of the step number"),
        (lambda: warmup(constant(0.1), -1), "steps"),
        (lambda: gpuback.fit(network(), *data(), schedule=0.1), "schedule: expected a function"),
    ],
)
def test_what_makes_no_schedule_is_refused_by_name(make: Any, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        make()


def test_in_a_checkpoint_a_users_function_counts_by_its_name() -> None:
    class Mine:
        def __call__(self, step: int) -> float:
            return 0.1

    assert schedules.identity(None) is None
    assert schedules.identity(cosine(0.1, 9)) == "cosine(learning_rate=0.1, steps=9, final=0.0)"
    assert schedules.identity(data) == "test_schedules.data"
    assert schedules.identity(warmup(data, 3)) == "warmup(schedule=test_schedules.data, steps=3)"
    assert schedules.identity(partial(data, 3)) == "test_schedules.data"
    assert schedules.identity(Mine()).endswith("Mine")


# --- in fit


@pytest.mark.on_each_backend
@pytest.mark.parametrize("schedule", [warmup(cosine(0.2, steps=12), 3), lambda step: 0.1 / (1 + step)])
def test_fit_sets_the_rate_before_every_step(schedule: Any) -> None:
    """To the bits of steps taken by hand."""
    x, y = data()
    net, optimizer = network(), SGD(123.0, momentum=0.9)
    history = gpuback.fit(net, x, y, optimizer=optimizer, schedule=schedule, epochs=4, batch_size=8, shuffle=False)
    twin, by_hand = network(), SGD(0.5, momentum=0.9)
    step = TrainStep(twin, by_hand)
    for t in range(12):
        by_hand.learning_rate = schedule(t)
        rows = slice(t % 3 * 8, t % 3 * 8 + 8)
        step(x[rows], y[rows])
    assert net.theta.tobytes() == twin.theta.tobytes()
    assert history.learning_rate == [schedule(t) for t in (2, 5, 8, 11)]
    assert optimizer.learning_rate == schedule(11)


@pytest.mark.on_each_backend
def test_a_second_fit_begins_its_schedule_anew() -> None:
    seen, optimizer, net = [], Adam(), network()

    def schedule(step: int) -> float:
        seen.append(step)
        return 0.01

    for _ in range(2):
        gpuback.fit(net, *data(), optimizer=optimizer, schedule=schedule, epochs=1, batch_size=7)
    assert seen == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("rate", [-1.0, math.nan, None])
def test_a_rate_that_is_none_is_refused(rate: Any) -> None:
    with pytest.raises(OptionError, match="learning_rate: expected a finite number ≥ 0"):
        gpuback.fit(network(), *data(), schedule=lambda step: rate, epochs=1)


@pytest.mark.on_each_backend
def test_without_a_schedule_the_history_has_the_optimizers_rate() -> None:
    history = gpuback.fit(network(), *data(), optimizer=Adam(0.02), epochs=2, seed=0)
    assert history.learning_rate == [0.02, 0.02]


@pytest.mark.on_each_backend
def test_reproducible_training_with_a_schedule_has_its_pinned_bits() -> None:
    """On every machine and backend."""
    net = network(reproducible=True)
    gpuback.fit(net, *data(), optimizer=Adam(), schedule=warmup(cosine(0.05, 9), 3), epochs=4, batch_size=8, seed=0)
    assert fingerprint(net) == "c76b4d6f379f0222"
