"""register_activation: what it checks, and what a registered activation does."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback import MLP, CudaForms
from gpuback._core.activation_names import activation_named
from gpuback._core.scratch import Scratch
from gpuback.errors import DtypeError, OptionError, ShapeError, UnknownActivationError
from gpuback.testing import random_batch

Function = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test registers in a table of its own."""
    table: dict[str, object] = {}
    monkeypatch.setattr("gpuback._core.activation_names.REGISTERED", table)
    monkeypatch.setattr("gpuback._core.own_activations.REGISTERED", table)


def bump(a: np.ndarray) -> np.ndarray:
    return np.exp(-a * a)


def bump_slope(a: np.ndarray) -> np.ndarray:
    return -2 * a * np.exp(-a * a)


FORMS = CudaForms(forward="exp_of(-x * x)", slope="-2 * x * exp_of(-x * x)")


def register(name: Any = "bump", **options: Any) -> None:
    gpuback.register_activation(name, **({"forward": bump, "slope": bump_slope, "cuda": FORMS} | options))


def test_a_registered_activation_is_one_like_others() -> None:
    register()
    row = activation_named("bump")
    assert (row.name, row.kernel_id, row.derivative_from, row.initialisation, row.kinks) == (
        *("bump", None, "a", "glorot", ()),
    )
    a = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    h, dh = np.empty_like(a), np.full_like(a, 2)
    row.forward(a, h, Scratch(a))
    row.backward(dh, a, Scratch(a))
    np.testing.assert_array_equal(h, bump(a))
    np.testing.assert_array_equal(dh, 2 * bump_slope(a))


def test_from_h_with_kinks_and_he() -> None:
    """What relu would be as a user's own."""
    register(
        "ramp",
        forward=lambda a: np.maximum(a, 0),
        slope=lambda h: (h > 0).astype(h.dtype),
        derivative_from="h",
        initialisation="he",
        kinks=[0],
        cuda=CudaForms("x > 0 ? x : 0", "x > 0 ? 1 : 0"),
    )
    ours, relu = (MLP([5, 7, 6, 2], activation=name, seed=0, backend="numpy") for name in ("ramp", "relu"))
    x, y = random_batch(ours, 20)
    np.testing.assert_array_equal(ours.theta, relu.theta)
    np.testing.assert_array_equal(ours.value_and_grad(x, y)[1].theta, relu.value_and_grad(x, y)[1].theta)
    assert gpuback.check_gradients(ours, x, y).passed


def bump_curvature(a: np.ndarray) -> np.ndarray:
    return (4 * a * a - 2) * np.exp(-a * a)


def bump_third(a: np.ndarray) -> np.ndarray:
    return (12 * a - 8 * a**3) * np.exp(-a * a)


def test_second_derivatives_come_with_curvature_and_third() -> None:
    register("whole", curvature=bump_curvature, third=bump_third)
    register("half", curvature=bump_curvature)
    register()
    options: dict[str, Any] = {"loss": "squared_error", "dtype": "float64", "backend": "numpy", "seed": 0}
    whole, half, plain = (MLP([2, 6, 5, 1], activation=name, **options) for name in ("whole", "half", "bump"))
    rng = np.random.default_rng(0)
    x, dx, y, c = rng.standard_normal((3, 2)), rng.standard_normal((3, 2)), np.zeros((3, 1)), np.ones((3, 1))
    t, step = whole.laplacian(x), 1e-4
    units = step * np.eye(2)
    f = whole.forward
    differences = sum((f(x + u) - 2 * f(x) + f(x - u)) / step**2 for u in units)
    np.testing.assert_allclose(t.second[0], differences, atol=1e-6)
    gradient, theta = t.pullback(second=[c]).theta, whole.theta.copy()
    along = rng.standard_normal(len(theta))
    sums = []
    for sign in (1, -1):
        whole.theta = theta + sign * step * along
        sums.append(whole.laplacian(x).second.sum())
    np.testing.assert_allclose(gradient @ along, (sums[0] - sums[1]) / (2 * step), rtol=1e-6)

    np.testing.assert_array_equal(
        half.hvp(x, y, dx=dx).theta, MLP([2, 6, 5, 1], activation="whole", **options).hvp(x, y, dx=dx).theta
    )
    with pytest.raises(OptionError, match=r"'half' was registered without third=: register_activation\('half', third"):
        half.taylor(x)
    plain.jvp(x, dx)
    with pytest.raises(OptionError, match="'bump' was registered without curvature="):
        plain.hvp(x, y, dx=dx)


# --- What is refused


def tanh_like(forms: CudaForms) -> dict[str, Any]:
    return {"forward": np.tanh, "slope": lambda a: 1 - np.tanh(a) ** 2, "cuda": forms}


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a name of gpuback's": ({"name": "tanh"}, OptionError, "expected one that is not taken, got 'tanh'"),
    "softmax": ({"name": "softmax"}, OptionError, "got 'softmax', which gpuback has"),
    "a family's name": ({"name": "celu"}, OptionError, "got 'celu', which gpuback has"),
    "constants": ({"name": "bump(width=1)"}, OptionError, "expected an identifier such as 'bump', got 'bump(width=1)'"),
    "no name": ({"name": 3}, OptionError, "expected an identifier such as 'bump', got 3"),
    "no function": ({"forward": 3}, OptionError, "forward: expected a function of a NumPy array, got 3"),
    "source": ({"derivative_from": "x"}, OptionError, "unknown derivative_from 'x'"),
    "initialisation": ({"initialisation": "lecun"}, OptionError, "unknown initialisation 'lecun'"),
    "kinks": ({"kinks": [0, "a"]}, OptionError, "kinks: expected a sequence of finite numbers, got [0, 'a']"),
    "kinks that are not finite": ({"kinks": (np.inf,)}, OptionError, "kinks: expected a sequence of finite numbers"),
    "forms": ({"cuda": "exp_of(x)"}, OptionError, "cuda: expected a gpuback.CudaForms or None, got 'exp_of(x)'"),
    "another slope": (
        {"slope": lambda a: 2 * a * np.exp(-a * a)},
        OptionError,
        "slope of activation 'bump': expected the derivative of forward, 0.857756",
    ),
    "another curvature": (
        {"curvature": lambda a: -bump_curvature(a)},
        OptionError,
        "curvature of activation 'bump': expected the derivative of slope",
    ),
    "another third": (
        {"curvature": bump_curvature, "third": lambda a: bump_third(a) + 1e-5},
        OptionError,
        "third of activation 'bump': expected the derivative of curvature",
    ),
    "a third alone": ({"third": bump_third}, OptionError, "third: expected curvature with it"),
    "a curvature that is none": (
        {"curvature": 3},
        OptionError,
        "curvature: expected a function of a NumPy array or None",
    ),
    "a slope that is a little off": ({"slope": lambda a: bump_slope(a) + 3e-6}, OptionError, "expected the derivative"),
    "a kink that is not named": (
        {"forward": lambda a: np.maximum(a, 0), "slope": lambda a: (a > 0).astype(a.dtype)},
        OptionError,
        "0.5 at a = 0, got 0. If g' or g'' jumps there, name the place in kinks",
    ),
    "another form": (
        {"cuda": CudaForms("exp_of(x * x)", FORMS.slope)},
        OptionError,
        "CudaForms.forward of activation 'bump': expected what forward computes",
    ),
    "another form of the slope": (
        {"cuda": CudaForms(FORMS.forward, "-2 * x * exp_of(-x)")},
        OptionError,
        "CudaForms.slope of activation 'bump': expected what slope computes",
    ),
    "another form far out": (
        tanh_like(CudaForms("x > 20 ? 0 : tanh_of(x)", "1 - tanh_of(x) * tanh_of(x)")),
        OptionError,
        "CudaForms.forward of activation 'bump': expected what forward computes, 1 at x = 30, got 0",
    ),
    "another form of the slope far out": (
        tanh_like(CudaForms("tanh_of(x)", "x < -1000 ? 1 : 1 - tanh_of(x) * tanh_of(x)")),
        OptionError,
        "CudaForms.slope of activation 'bump': expected what slope computes, 0 at x = -10000, got 1",
    ),
    "a form that overflows where the function does not": (
        tanh_like(CudaForms("(exp_of(x) - exp_of(-x)) / (exp_of(x) + exp_of(-x))", "1 - tanh_of(x) * tanh_of(x)")),
        OptionError,
        "CudaForms.forward of activation 'bump': expected what forward computes, -1 at x = -1000, got nan",
    ),
    "another slope far out": (
        {"forward": np.tanh, "slope": lambda a: np.where(a > 90, a.dtype.type(0.5), 1 - np.tanh(a) ** 2)},
        OptionError,
        "slope of activation 'bump': expected the derivative of forward, 0 at a = 100, got 0.5",
    ),
    "a maximum": (
        {"forward": lambda a: a / np.abs(a).max(), "slope": lambda a: 1 / np.full_like(a, np.abs(a).max())},
        OptionError,
        "forward of activation 'bump': expected a function of each element alone, got ",
    ),
    "a mean": (
        {"forward": lambda a: a - a.mean(), "slope": np.ones_like},
        OptionError,
        "forward of activation 'bump': expected a function of each element alone, got ",
    ),
    "a slope of the array": (
        {"slope": lambda a: bump_slope(a) + 1e-9 * np.abs(a).max()},
        OptionError,
        "slope of activation 'bump': expected a function of each element alone, got ",
    ),
    "NaN": ({"forward": np.log, "slope": np.reciprocal}, OptionError, "forward of activation 'bump': expected finite"),
    "another shape": ({"forward": lambda a: a[:1]}, ShapeError, "expected an array of shape (863, 1), got (1, 1)"),
    "a number": ({"forward": lambda a: 1.0}, ShapeError, "expected an array of shape (863, 1), got float"),
    "float64 for float32": (
        {"slope": lambda a: np.float64(-2) * a * np.exp(-a * a)},
        DtypeError,
        "slope of activation 'bump': expected dtype float32, as it was given, got float64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        register(**options)
    assert "bump" not in gpuback._core.activation_names.REGISTERED


ACCEPTED: dict[str, dict[str, Any]] = {
    "overflow": {"forward": np.exp, "slope": np.exp, "cuda": CudaForms("exp_of(x)", "exp_of(x)")},
    "overflow, from h": {
        **{"forward": np.exp, "slope": lambda h: h, "derivative_from": "h", "cuda": CudaForms("exp_of(x)", "x")},
    },
    "a form that does not overflow": {
        "forward": lambda a: np.log1p(np.exp(a)),
        "slope": lambda a: 1 / (1 + np.exp(-a)),
        "cuda": CudaForms("softplus(x)", "sigmoid(x)"),
    },
    "large numbers": {
        "forward": lambda a: a**3,
        "slope": lambda a: 3 * a * a,
        "cuda": CudaForms("x * x * x", "3 * x * x"),
    },
    "too steep for differences far out": {
        "forward": lambda a: np.sin(a * a),
        "slope": lambda a: 2 * a * np.cos(a * a),
        "cuda": CudaForms("sin_of(x * x)", "2 * x * cos_of(x * x)"),
    },
    "a kink far out": {
        "forward": lambda a: np.minimum(a, 20),
        "slope": lambda a: (a < 20).astype(a.dtype),
        "kinks": (20,),
        "cuda": CudaForms("x > 20 ? 20 : x", "x < 20 ? 1 : 0"),
    },
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_accepted_far_out(case: str) -> None:
    register(**ACCEPTED[case])
    assert activation_named("bump").forms == ACCEPTED[case]["cuda"]


def test_a_function_that_writes_to_its_argument_is_refused() -> None:
    def wrong(a: np.ndarray) -> np.ndarray:
        a *= a
        return a

    with pytest.raises(ValueError, match="read-only"):
        register(forward=wrong)


def test_a_function_that_changes_its_mind_is_refused_where_it_does() -> None:
    wide = [False]
    register(forward=lambda a: bump(a).astype(np.float64) if wide[0] else bump(a))
    net = MLP([2, 3, 1], activation="bump", loss="squared_error", backend="numpy", seed=0)
    wide[0] = True
    with pytest.raises(DtypeError, match="forward of activation 'bump': expected dtype float32"):
        net.forward(np.ones((4, 2)))


# --- The same name once more


def made(scale: float) -> dict[str, Function]:
    """Functions made anew, as by a notebook's cell that runs again."""
    return {
        "forward": lambda a: np.array([scale * np.exp(-x * x) for x in a.ravel()], a.dtype).reshape(a.shape),
        "slope": lambda a, two=-2.0: two * scale * a * np.exp(-a * a),
    }


def test_the_same_once_more_is_allowed() -> None:
    for _ in range(2):
        register()
        register("again", **made(1.5), cuda=None)
    assert activation_named("bump") is activation_named("bump")


@pytest.mark.parametrize(
    "other", [made(2.5), {"initialisation": "he"}, {"cuda": FORMS}, {"kinks": (0.5,)}, {"slope": lambda a: 1 * a}]
)
def test_something_else_under_the_same_name_is_refused(other: dict[str, Any]) -> None:
    register("again", **made(1.5), cuda=None)
    with pytest.raises(OptionError, match="'again' is registered with other functions or options"):
        register("again", **({"cuda": None} | made(1.5) | other))


def test_threads_that_register_the_same() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            register()
            MLP([2, 3, 1], activation="bump", loss="squared_error", backend="numpy").forward([[1.0, 2.0]])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# --- Where it is not registered


def test_a_name_that_nobody_registered_says_what_to_do() -> None:
    with pytest.raises(
        UnknownActivationError,
        match=r"Known: .*relu.* gpuback\.register_activation\('swell', …\) before MLP or MLP.load",
    ):
        MLP([2, 3, 1], activation="swell")
    with pytest.raises(OptionError, match="Did you mean 'relu'"):
        MLP([2, 3, 1], activation="rellu")
