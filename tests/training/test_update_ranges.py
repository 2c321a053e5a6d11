"""An optimizer that does not treat all of θ alike: each range is updated as if it were alone, the rest is frozen."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from emulator import EmulatorLauncher, GuardedNumpy
from support.optimizer_runs import ALGORITHMS, Run, mixed
from support.planted import planted
from support.requirements import require_emulator

from gpuback._backends.cuda.updates import AdamUpdate
from gpuback._backends.numpy.updates import PARAMETERS_AT_ONCE
from gpuback._core.exact_sums import norm
from gpuback._core.parameters import ParameterRange, spans

require_emulator()

RANGES = [
    ParameterRange(3, 6, 0.1, True),  # 0 … 2 are frozen
    ParameterRange(6, 7, 0.1, False),
    ParameterRange(7, 20, 0.0, True),  # not frozen: its state goes on
    ParameterRange(20, 21, 3.0, True),
    ParameterRange(30, 270, 1.0, True),
    ParameterRange(270, 271, 1.0, False),
]
LENGTH = 273
TRAINED = np.concatenate([np.arange(part.start, part.end) for part in RANGES])
FROZEN = np.setdiff1d(np.arange(LENGTH), TRAINED)


def backends(*, checked: bool = False) -> list[dict[str, Any]]:
    """Arguments of `Run`: NumPy, and the emulator."""
    return [{}, {"launcher": EmulatorLauncher(order="random", resident_blocks=3, checked=checked)}]


def gradients(length: int, dtype: str, steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(length)
    return [mixed(rng, length, dtype, 1e3) for _ in range(steps)]


def in_range(options: dict[str, Any], part: ParameterRange) -> dict[str, Any]:
    """The same algorithm with the learning rate and the weight decay of a range."""
    decay = options["weight_decay"] if part.decays else 0.0
    return options | {"learning_rate": options["learning_rate"] * part.multiplier, "weight_decay": decay}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_range_is_updated_as_if_it_were_alone(name: str, dtype: str) -> None:
    options, theta = ALGORITHMS[name], mixed(np.random.default_rng(0), LENGTH, dtype, 100.0)
    whole = [Run(theta, options, ranges=RANGES, **backend) for backend in backends()]
    before = [array.copy() for array in (whole[0].theta, *whole[0].state)]
    alone = [Run(theta, in_range(options, part)) for part in RANGES]
    for gradient in gradients(LENGTH, dtype, 5):
        for run in alone:
            run.step(gradient)
        gradient[FROZEN] = np.nan
        for run in whole:
            run.step(gradient)
    for run in whole:
        assert (run.update.steps, run.update.diverged_at) == (5, None)
        for k, array in enumerate((run.theta, *run.state)):
            for part, single in zip(RANGES, alone, strict=True):
                expected = (single.theta, *single.state)[k][part.start : part.end]
                assert array[part.start : part.end].tobytes() == expected.tobytes(), part
            assert array[FROZEN].tobytes() == before[k][FROZEN].tobytes()


@pytest.mark.parametrize("name", ["sgd, decay", "nesterov", "adam, decay", "adamw"])
def test_the_norm_that_clips_is_that_of_the_ranges(name: str) -> None:
    """Numbers of frozen parameters change nothing: with others, or 0, in their place come the same bits."""
    options, theta = ALGORITHMS[name], np.linspace(-1, 1, LENGTH, dtype=np.float32)
    results = set()
    for frozen in (0.0, 7.0, -math.inf):
        for backend in backends():
            exact = {"exact_norm": True} if backend else {}
            run = Run(theta, options, ranges=RANGES, **backend, **exact)
            for gradient in gradients(LENGTH, "float32", 4):
                length = norm(gradient[TRAINED])
                gradient[FROZEN] = frozen
                run.step(gradient, length / 3)
            results.add(run.bits())
    assert len(results) == 1


def test_a_norm_that_is_not_exact_is_that_of_the_ranges_too() -> None:
    gradient = np.full(LENGTH, 2.0**70, np.float32)
    gradient[TRAINED] = 3.0
    run = Run(np.zeros(LENGTH, np.float32), ALGORITHMS["sgd"], EmulatorLauncher(), ranges=RANGES)
    run.step(gradient, 1.0)
    expected = 0.03 / math.sqrt(len(TRAINED))
    np.testing.assert_allclose(run.theta[30:271], -expected, rtol=1e-6)


@pytest.mark.parametrize("place", [6, 100, 270])
def test_a_gradient_that_is_not_finite_in_a_range_makes_no_update(place: int) -> None:
    for backend in backends():
        run = Run(np.ones(LENGTH, np.float32), ALGORITHMS["momentum"], ranges=RANGES, **backend)
        before, gradient = run.bits(), np.ones(LENGTH, np.float32)
        gradient[place] = np.inf
        run.step(gradient)
        assert (run.bits(), run.update.steps, run.update.diverged_at) == (before, 0, 0)


def test_minus_zero_stays_where_nothing_decays() -> None:
    """−0 + 0·θ would be 0, which later steps could tell."""
    options = ALGORITHMS["momentum"] | {"weight_decay": 0.5, "momentum": 0.5}
    ranges = [ParameterRange(0, 4, 1.0, True), ParameterRange(4, 8, 1.0, False)]
    results = set()
    for backend in backends():
        run = Run(np.full(8, -0.0, np.float32), options, ranges=ranges, **backend)
        run.step(np.full(8, -0.0, np.float32))
        assert np.signbit(run.state[0][4:]).all()
        results.add(run.bits())
    assert len(results) == 1


def test_what_is_infinite_and_does_not_decay_is_left_to_its_gradient() -> None:
    ranges = [ParameterRange(0, 2, 1.0, True), ParameterRange(2, 4, 1.0, False)]
    for backend in backends():
        run = Run(np.full(4, np.inf, np.float32), ALGORITHMS["sgd, decay"], ranges=ranges, **backend)
        run.step(np.ones(4, np.float32))
        np.testing.assert_array_equal(run.theta, np.float32([np.nan, np.nan, np.inf, np.inf]))


@pytest.mark.parametrize("name", ["nesterov, decay", "adamw"])
def test_long_ranges_are_cut_where_numpy_cuts_theta(name: str) -> None:
    length = 2 * PARAMETERS_AT_ONCE + 50
    ranges = [
        ParameterRange(5, PARAMETERS_AT_ONCE - 1, 0.5, True),
        ParameterRange(PARAMETERS_AT_ONCE - 1, PARAMETERS_AT_ONCE + 7, 0.5, False),
        ParameterRange(PARAMETERS_AT_ONCE + 9, length, 2.0, True),
    ]
    theta = np.linspace(-1, 1, length, dtype=np.float32)
    whole = Run(theta, ALGORITHMS[name], ranges=ranges)
    alone = [Run(theta, in_range(ALGORITHMS[name], part)) for part in ranges]
    for gradient in gradients(length, "float32", 2):
        for run in (whole, *alone):
            run.step(gradient)
    for part, single in zip(ranges, alone, strict=True):
        np.testing.assert_array_equal(whole.theta[part.start : part.end], single.theta[part.start : part.end])
    frozen = [*range(5), PARAMETERS_AT_ONCE + 7, PARAMETERS_AT_ONCE + 8]
    np.testing.assert_array_equal(whole.theta[frozen], theta[frozen])


@pytest.mark.parametrize("name", ["momentum, decay", "adamw"])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_ranges_have_numpys_bits_on_cuda(name: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 1100))
    inner = st.lists(st.integers(1, length - 1), unique=True, max_size=6) if length > 1 else st.just([])
    cuts = [0, *sorted(data.draw(inner)), length]
    kinds = st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 1.0, 2.5]), st.booleans())
    drawn = [(start, end, *data.draw(kinds)) for start, end in itertools.pairwise(cuts)]
    ranges = [ParameterRange(start, end, *factors) for start, end, trained, *factors in drawn if trained]
    hypothesis.assume(ranges)
    twins = [
        Run(np.linspace(-1, 1, length, dtype=np.float32), ALGORITHMS[name], ranges=ranges, **backend)
        for backend in backends(checked=True)
    ]
    for gradient in gradients(length, "float32", 2):
        for twin in twins:
            twin.step(gradient)
    assert twins[0].bits() == twins[1].bits()


def test_one_range_with_the_whole_of_theta_changes_no_bit() -> None:
    theta = np.linspace(-1, 1, 1025, dtype=np.float32)
    for options in ALGORITHMS.values():
        for backend in backends():
            results = set()
            for ranges in (None, [ParameterRange(0, 1025, 1.0, True)]):
                run = Run(theta, options, ranges=ranges, **backend)
                for gradient in gradients(1025, "float32", 2):
                    run.step(gradient, 100.0)
                results.add(run.bits())
            assert len(results) == 1


def test_launches_are_as_many_as_without_ranges() -> None:
    launcher = EmulatorLauncher()
    for exact_norm in (False, True):
        run = Run(np.ones(LENGTH, np.float32), ALGORITHMS["adam"], launcher, ranges=RANGES, exact_norm=exact_norm)
        run.step(np.ones(LENGTH, np.float32), 1.0)
    once = ["begin_step", "adam_in_ranges"]
    assert launcher.launches == ["set_hyper_parameters", *once, "set_hyper_parameters", "largest", "exact_sum", *once]


def test_the_checker_finds_nothing_in_memory_with_guards() -> None:
    xp = GuardedNumpy()

    def guarded(array: np.ndarray) -> np.ndarray:
        copy = xp.empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    theta, first, second, gradient = (guarded(np.ones(LENGTH, np.float32)) for _ in range(4))
    launcher = EmulatorLauncher(order="random", resident_blocks=2, checked=True)
    update = AdamUpdate(xp, launcher, theta, first, second, 0, RANGES, exact_norm=True)
    update(gradient, loss=guarded(np.ones((), np.float32)), clip_norm=1.0, **ALGORITHMS["adamw"])
    assert update.steps == 1 and (theta[FROZEN] == 1).all() and (theta[30:270] != 1).all()


MISTAKES = {
    "a range is passed over": ("        do end = ends[++range];", "        do end = ends[range += 2];"),
    "a thread moves on by one range only": ("        while (at >= end);", "        while (false);"),
    "a group across ranges takes the first one's step": ("at == i && after <= end", "at == i"),
    "a multiplier of 0 freezes": ("      if (multiplier >= 0) {", "      if (multiplier > 0) {"),
    "the step of before is kept": ("        step = make_step(multiplier, factors[2 * range + 1]);", ""),
    "Adam's rate is that of all": (
        "Adam<Accum>((multiplier * hyper[LEARNING_RATE]).value,",
        "Adam<Accum>(hyper[LEARNING_RATE],",
    ),
    "everything decays": ("(decay * hyper[WEIGHT_DECAY]).value, hyper[DEC", "hyper[WEIGHT_DECAY], hyper[DEC"),
    "frozen numbers count": ("gradient, n, spans, n_spans);", "gradient, n, nullptr, 0);"),
}


def adamw_has_numpys_bits(**launcher: Any) -> bool:
    options, theta = ALGORITHMS["adamw"], np.linspace(-1, 1, LENGTH, dtype=np.float32)
    twins = [Run(theta, options, ranges=RANGES), Run(theta, options, EmulatorLauncher(**launcher), ranges=RANGES)]
    for gradient in gradients(LENGTH, "float32", 2):
        gradient[FROZEN] = np.nan
        for twin in twins:
            twin.step(gradient)
    return twins[0].bits() == twins[1].bits()


@pytest.mark.thorough
@pytest.mark.parametrize("mistake", MISTAKES)
def test_bits_tell_a_mistake(mistake: str, tmp_path: Path) -> None:
    folder = planted({"elementwise/optimizers.cu": [MISTAKES[mistake]]}, tmp_path)
    assert adamw_has_numpys_bits()
    assert not adamw_has_numpys_bits(folder=folder)


def test_spans_join_ranges_that_touch() -> None:
    assert spans(RANGES) == [slice(3, 21), slice(30, 271)]
    assert spans([]) == []
