"""An optimizer's step has the same bits on NumPy and on CUDA, and so have the sums that it and the loss need."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from emulator import EmulatorLauncher, GuardedNumpy
from support.optimizer_runs import ADAM, ALGORITHMS, SGD, Run, mixed
from support.planted import planted
from support.requirements import require_emulator

from gpuback._backends.cuda import row_plans
from gpuback._backends.cuda import updates as cuda_updates
from gpuback._backends.cuda.formats import accum_of
from gpuback._core.exact_sums import TERMS_AT_ONCE, exact_sum, norm
from gpuback.errors import ShapeError

require_emulator()

LENGTHS = (1, 3, 255, 1025, 70001)
SCHEDULES = (("fifo", 1), ("lifo", 3), ("random", 5))
CLIPPINGS = ("none", "factor 1", "ordinary", "below 2^-100")
NAN_BITS = 0x7FC00000


def run_together(
    options: dict[str, Any], clipping: str, length: int, dtype: str = "float32", steps: int = 20, **launcher: Any
) -> bool:
    """Whether NumPy and the emulator have the same bits after 1, 2 and `steps` updates."""
    rng = np.random.default_rng(length)
    theta = mixed(rng, length, dtype, 100.0)
    exact = clipping in ("ordinary", "below 2^-100")
    twins = Run(theta, options), Run(theta, options, EmulatorLauncher(**launcher), exact_norm=exact)
    largest = 1e3 if clipping == "ordinary" else {"float32": 3.4e38, "float64": 1e300}[dtype]
    same = True
    for turn in range(steps):
        gradient = mixed(rng, length, dtype, largest)
        size = norm(gradient) or 1.0
        clip_norm = {"none": None, "factor 1": 1e308, "ordinary": size / 3, "below 2^-100": size * 1e-40}
        for twin in twins:
            twin.step(gradient, clip_norm[clipping])
        if turn in (0, 1, steps - 1):
            same = same and twins[0].bits() == twins[1].bits()
    assert twins[1].update.steps == twins[0].update.steps == steps
    assert twins[0].theta.tobytes() != theta.tobytes() or length < 4
    return same


CASES = [
    (name, clipping, LENGTHS[(i + j) % len(LENGTHS)])
    for (i, name), (j, clipping) in itertools.product(enumerate(ALGORITHMS), enumerate(CLIPPINGS))
]


@pytest.mark.parametrize("name, clipping, length", CASES)
def test_numpy_and_cuda_have_the_same_bits(name: str, clipping: str, length: int) -> None:
    assert run_together(ALGORITHMS[name], clipping, length, steps=20 if length < 70001 else 4)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("name", ["sgd, decay", "nesterov", "adam, decay", "adamw"])
def test_in_float64_too(name: str, clipping: str) -> None:
    assert run_together(ALGORITHMS[name], clipping, 1025, "float64", order="random", resident_blocks=3)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_powers_of_beta_are_taken_up_after_steps_made_elsewhere(name: str) -> None:
    theta = np.linspace(-1, 1, 300, dtype=np.float32)
    twins = Run(theta, ALGORITHMS[name], steps=7), Run(theta, ALGORITHMS[name], EmulatorLauncher(), steps=7)
    for twin in twins:
        for turn in range(3):
            twin.step(np.cos(theta + turn))
    assert twins[0].bits() == twins[1].bits()
    assert twins[0].update.steps == twins[1].update.steps == 10


def test_a_nan_that_arises_has_one_form() -> None:
    """∞ − ∞: x86 makes it negative, CUDA fills it with ones."""
    theta = np.float32([np.inf, 1.0, 2.0, -np.inf])
    for name in ("sgd, decay", "momentum, decay", "adam, decay"):
        twins = Run(theta, ALGORITHMS[name]), Run(theta, ALGORITHMS[name], EmulatorLauncher())
        for _ in range(3):
            for twin in twins:
                twin.step(np.ones(4, np.float32))
        assert twins[0].bits() == twins[1].bits()
        for array in (twins[0].theta, *twins[0].state[:1]):
            assert set(array[np.isnan(array)].view(np.uint32)) == {NAN_BITS}
        assert np.isnan(twins[0].theta).tolist() == [True, False, False, True]


def test_the_norms_launches_come_only_where_it_is_needed() -> None:
    launcher = EmulatorLauncher()
    exact = Run(np.ones(3, np.float32), SGD, launcher, exact_norm=True)
    plain = Run(np.ones(3, np.float32), SGD, launcher)
    exact.step(np.ones(3, np.float32))
    plain.step(np.ones(3, np.float32), 1.0)
    assert launcher.launches == ["set_hyper_parameters", "begin_step", "sgd"] * 2
    exact.step(np.ones(3, np.float32), 1.0)
    assert launcher.launches[6:] == ["set_hyper_parameters", "largest", "exact_sum", "begin_step", "sgd"]


def test_hyper_parameters_are_written_when_they_change() -> None:
    launcher = EmulatorLauncher()
    run = Run(np.ones(3, np.float32), ADAM, launcher)
    for options in (ADAM, ADAM, ADAM | {"learning_rate": 0.1}, ADAM | {"learning_rate": 0.1}, ADAM):
        run.options = options
        run.step(np.ones(3, np.float32))
    assert [i for i, entry in enumerate(launcher.launches) if entry == "set_hyper_parameters"] == [0, 5, 10]
    hyper = dict(zip(cuda_updates.HYPER_PARAMETERS, run.update.hyper, strict=True))
    given = {"learning_rate": 1e-3, "beta_1": 0.9, "beta_2": 0.999, "eps": 1e-8}
    assert hyper == dict.fromkeys(cuda_updates.HYPER_PARAMETERS, 0.0) | given


def test_what_a_graph_of_the_users_writes_is_not_relied_on() -> None:
    """It writes when it runs, and again whenever it does."""
    launcher = EmulatorLauncher()
    run = Run(np.ones(3, np.float32), SGD, launcher)
    gradient = np.ones(3, np.float32)
    graph = launcher.capture(lambda: run.update(gradient, **SGD | {"learning_rate": 0.5}))
    for turn, rate in enumerate((0.25, 0.25)):
        run.update(gradient, **SGD | {"learning_rate": rate})
        assert run.update.hyper[0] == rate
        np.testing.assert_array_equal(run.theta, np.float32(1 - 0.25 - 0.75 * turn))
        graph()
        assert run.update.hyper[0] == 0.5


@pytest.mark.parametrize("exact_norm", [False, True])
def test_a_norm_that_float64_cannot_hold_still_clips(exact_norm: bool) -> None:
    twins = Run(np.zeros(2), SGD), Run(np.zeros(2), SGD, EmulatorLauncher(), exact_norm=exact_norm)
    for twin in twins:
        twin.step(np.float64([1.65e308, -1.65e308]), 10.0)
        np.testing.assert_allclose(twin.theta, 0.03 * 10 * 0.5**0.5 * np.array([-1, 1]), rtol=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_left_with_an_exact_norm_too(bad: float) -> None:
    cuda = Run(np.ones(2000, np.float32), SGD, EmulatorLauncher(), exact_norm=True)
    gradient = np.ones(2000, np.float32)
    gradient[1500] = bad
    cuda.step(gradient, 1.0)
    assert (cuda.update.steps, cuda.update.diverged_at) == (0, 0)
    assert (cuda.theta == 1).all()


# --- the sums


def cuda_norm(x: np.ndarray, *, xp: Any = np, **launcher: Any) -> np.ndarray:
    result = xp.empty((), np.float64)
    real = accum_of(x.dtype)
    cuda_updates.bind_exact_norm(xp, EmulatorLauncher(**launcher), len(x), real, result)(x)
    return result


def cuda_sum(x: np.ndarray, divisor: float = 1.0, *, xp: Any = np, **launcher: Any) -> np.ndarray:
    out = xp.empty((), np.float32)
    cuda_updates.bind_exact_sum(xp, EmulatorLauncher(**launcher), len(x))(x, out, divisor)
    return out


def raw_sum(x: np.ndarray, **launcher: Any) -> float:
    """The sum in float64."""
    raw = np.empty(())
    device = EmulatorLauncher(**launcher)
    find_largest, add = cuda_updates._bind_exact(np, device, "double", len(x), result=raw, squares=False)
    find_largest(x)
    add(x, 1.0, None)
    return float(raw)


def rounded(value: float) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(value)


def wide_range(length: int, dtype: str, decades: float) -> np.ndarray:
    rng = np.random.default_rng(length)
    return (rng.standard_normal(length) * 10.0 ** rng.uniform(-decades, decades, length)).astype(dtype)


def exact(x: np.ndarray, power: int) -> Fraction:
    """Σ xᵖ."""
    return sum((Fraction(float(value)) ** power for value in x), Fraction(0))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype, decades", [("float32", 1), ("float32", 35), ("float64", 1), ("float64", 300)])
def test_no_order_and_no_schedule_changes_a_bit(dtype: str, decades: float, length: int) -> None:
    x = wide_range(length, dtype, decades)
    shuffled = np.random.default_rng(1).permutation(x)
    norms = {norm(x), norm(shuffled), norm(-x[::-1])}
    sums = {float(rounded(exact_sum(array.astype(np.float64)) / 7.0)) for array in (x, shuffled, x[::-1])}
    assert len(norms) == len(sums) == 1
    order, resident = SCHEDULES[LENGTHS.index(length) % 3]
    for array in (x, shuffled):
        norms.add(float(cuda_norm(array, order=order, resident_blocks=resident)))
        sums.add(float(cuda_sum(array.astype(np.float64), 7.0, order=order, resident_blocks=resident)))
    assert len(norms) == len(sums) == 1


@pytest.mark.parametrize("grid", [1, 2, 37, 256])
def test_no_number_of_blocks_changes_a_bit(grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = wide_range(3001, "float64", 5)
    plan = row_plans.vector_plan
    monkeypatch.setattr(row_plans, "vector_plan", lambda *which: plan(*which)._replace(grid=grid))
    for order, resident in SCHEDULES:
        choices = {"order": order, "resident_blocks": resident}
        assert cuda_norm(x, **choices) == norm(x)
        assert cuda_sum(x, 7.0, **choices) == np.float32(exact_sum(x) / 7.0)


@pytest.mark.parametrize("length", [1, 3, 255, 2000])
@pytest.mark.parametrize("dtype, decades", [("float32", 1), ("float32", 35), ("float64", 1), ("float64", 150)])
def test_errors_are_within_the_stated_bounds(dtype: str, decades: float, length: int) -> None:
    x = wide_range(length, dtype, decades)
    result, wanted = Fraction(exact_sum(x)), exact(x, 1)
    bound = length * Fraction(float(np.abs(x).max())) / 2**63
    assert abs(result - wanted) <= bound + (abs(wanted) + bound) / 2**53
    relative = Fraction(length, 2**63) + Fraction(2 if dtype == "float32" else 3, 2**53)
    assert (1 - relative) ** 2 <= Fraction(norm(x)) ** 2 / exact(x, 2) <= (1 + relative) ** 2


def halfway() -> np.ndarray:
    """A sum a little above the middle of two float64 numbers: limbs' sums that are not carried round it down."""
    return np.array([*[2.0**-3 + 2.0**-23] * 2**14, 2.0**-42, 2.0**-63, 0.75, -0.75])


def test_a_sum_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-(2**62), 2**62, 5000) >> 10  # of 52 bits, the lowest of which is worth 2⁻⁶²
    for x in (halfway(), -halfway(), np.ldexp(integers.astype(np.float64), -62), np.full(3 * TERMS_AT_ONCE + 5, 0.1)):
        wanted = math.fsum(x)
        assert exact_sum(x) == wanted
        assert raw_sum(x) == wanted


def test_what_cancels_is_gone() -> None:
    x = wide_range(5001, "float64", 5)
    both = np.random.default_rng(0).permutation(np.concatenate([x, -x]))
    for value in (exact_sum(both), float(cuda_sum(both))):
        assert value == 0 and math.copysign(1, value) == 1
    assert exact_sum(np.zeros(3)) == norm(np.zeros(3)) == cuda_sum(-np.zeros(3)) == cuda_norm(np.zeros(3)) == 0


@pytest.mark.parametrize(
    "x, length, total",
    [
        (np.full(1000, np.finfo(np.float32).max), float(np.finfo(np.float32).max) * 1000**0.5, None),
        (np.full(100, 1e-45, np.float32), 2.0**-149 * 10, None),
        (np.float32([-1e-45]), 2.0**-149, -(2.0**-149)),
        (np.full(100, 5e-324), 10 * 5e-324, 100 * 5e-324),
        (np.float64([1.5e308, 1.5e308]), math.inf, math.inf),
        (np.float64([1.7e308, -1.7e308, 1e308]), math.inf, 1e308),
        (np.float64([1e308, 1e-308]), 1e308, 1e308),
    ],
    ids=str,
)
def test_the_ends_of_the_range(x: np.ndarray, length: float, total: float | None) -> None:
    assert norm(x) == cuda_norm(x) == pytest.approx(length, rel=1e-12)
    if total is not None:
        wide = x.astype(np.float64)
        assert exact_sum(wide) == total
        assert cuda_sum(wide) == rounded(total)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite_shows(dtype: str) -> None:
    for place, (value, length) in itertools.product(
        (0, 1500, 2999), [(math.inf, math.inf), (-math.inf, math.inf), (math.nan, math.nan), (-math.nan, math.nan)]
    ):
        x = np.ones(3000, dtype)
        x[1000] = np.inf if math.isnan(value) else 1.0  # NaN wins
        x[place] = value
        np.testing.assert_array_equal([norm(x), cuda_norm(x)], length)
        assert math.isnan(exact_sum(x))
        out = cuda_sum(x.astype(np.float64), order="random", resident_blocks=2)
        assert out.view(np.uint32) == NAN_BITS


def test_the_quotient_is_what_becomes_float32() -> None:
    assert cuda_sum(np.full(4, 1e300), 4e299) == np.float32(10)
    assert cuda_sum(np.full(4, 1e300)) == np.inf
    assert cuda_sum(np.zeros(4), 0.0).view(np.uint32) == NAN_BITS


def test_the_checker_finds_nothing() -> None:
    xp = GuardedNumpy()
    for dtype, length in (("float32", 3000), ("float64", 1), ("float64", 2047)):
        x = xp.empty(length, dtype)
        x[...] = wide_range(length, dtype, 5)
        for order, resident in SCHEDULES:
            choices = {"order": order, "resident_blocks": resident, "checked": True}
            assert cuda_norm(x, xp=xp, **choices) == norm(x)
            if dtype == "float64":
                assert cuda_sum(x, xp=xp, **choices) == np.float32(exact_sum(x))


def test_more_terms_than_add_up_exactly_are_refused() -> None:
    assert row_plans.vector_plan("exact_sum", 2**31, "double").grid == 256
    with pytest.raises(ShapeError, match="an exact sum: expected at most 2147483648 terms"):
        row_plans.vector_plan("largest", 2**31 + 1, "float")


# --- mistakes, planted into the kernels


class Mistake(NamedTuple):
    """What is planted, and in which run it shows."""

    patches: list[tuple[str, str]]
    algorithm: str
    clipping: str = "none"


STEP_MISTAKES = {
    "momentum contracted": Mistake(
        [("momentum * Number(*velocity) + g;", "__fmaf_rn(momentum.value, *velocity, g.value);")], "momentum"
    ),
    "theta's step contracted": Mistake(
        [("canonical_nan(t - rate * g)", "canonical_nan(Number(__fmaf_rn(-rate.value, g.value, t.value)))")], "sgd"
    ),
    "the second moment contracted": Mistake(
        [("beta_2 * v + gain_2 * (g * g)", "Number(__fmaf_rn(beta_2.value, v.value, (gain_2 * (g * g)).value))")],
        "adam",
    ),
    "the first moment's correction in float": Mistake(
        [
            (
                "(Real)(learning_rate * root_2 / (one - beta_power_1)).value",
                "(Real)(learning_rate * root_2).value / (Real)(1 - beta_power_1)",
            )
        ],
        "adam",
    ),
    "theta shrinks with its step": Mistake([("(t - rate * (m", "(t - rate * shrink * (m")], "adamw"),
    "0 theta is added": Mistake([("if (decay.value != 0) g = g + decay * t;", "g = g + decay * t;")], "momentum"),
    "the factor is not rounded": Mistake(
        [
            ("  Real factor;", "  double factor;"),
            ("factor((Real)state[FACTOR])", "factor(state[FACTOR])"),
            ("return g * factor;", "return (Real)(g.value * factor);"),
        ],
        "sgd",
        "ordinary",
    ),
    "a part of a small factor is left out": Mistake([("++prescales) factor", ") factor")], "sgd", "below 2^-100"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", STEP_MISTAKES)
def test_bits_tell_a_step_that_rounds_otherwise(name: str, tmp_path: Path) -> None:
    patches, algorithm, clipping = STEP_MISTAKES[name]
    folder = planted({"common/optimizer_formulas.cuh": patches}, tmp_path)
    assert run_together(ALGORITHMS[algorithm], clipping, 1025, steps=2)
    assert not run_together(ALGORITHMS[algorithm], clipping, 1025, steps=2, folder=folder)


SUM_MISTAKES = {
    "a limb is left out": ("for (int k = 0; k < 3; ++k) {\n    t =", "for (int k = 0; k < 2; ++k) {\n    t ="),
    "nothing is carried": ("for (int k = 2; k > 0; --k)", "for (int k = 2; k > 2; --k)"),
    "only the first block's numbers are the largest": ("*result = size[0];", "*result = partials[0];"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("mistake", SUM_MISTAKES)
def test_bits_tell_a_wrong_sum(mistake: str, tmp_path: Path) -> None:
    folder = planted({"exact/exact_sums.cu": [SUM_MISTAKES[mistake]]}, tmp_path)
    vectors = [halfway(), np.array([1e-200] * 5000 + [1e200])]
    right = [raw_sum(x) for x in vectors]
    assert right == [math.fsum(x) for x in vectors]
    assert right != [raw_sum(x, folder=folder) for x in vectors]
