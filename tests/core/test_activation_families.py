"""Activations with constants: names, functions, derivatives, forms and initial weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest

from gpuback import MLP, Adam, fit
from gpuback._core.activation_names import activation_named
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.scratch import Scratch
from gpuback.errors import OptionError, UnknownActivationError

Function = Callable[[np.ndarray], np.ndarray]


def logistic(a: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -a))


FORMULAS: dict[str, tuple[Function, Function]] = {
    "leaky_relu(slope=0.2)": (lambda a: np.where(a > 0, a, 0.2 * a), lambda a: np.where(a > 0, 1, 0.2)),
    "leaky_relu(slope=3)": (lambda a: np.where(a > 0, a, 3 * a), lambda a: np.where(a > 0, 1, 3)),
    "leaky_relu(slope=-0.5)": (lambda a: np.where(a > 0, a, -0.5 * a), lambda a: np.where(a > 0, 1, -0.5)),
    "elu(alpha=0.5)": (
        lambda a: np.where(a > 0, a, 0.5 * np.expm1(np.minimum(a, 0))),
        lambda a: np.where(a > 0, 1, 0.5 * np.exp(np.minimum(a, 0))),
    ),
    "celu(alpha=2)": (
        lambda a: np.where(a > 0, a, 2 * np.expm1(np.minimum(a, 0) / 2)),
        lambda a: np.where(a > 0, 1, np.exp(np.minimum(a, 0) / 2)),
    ),
    "softplus(beta=100)": (lambda a: np.logaddexp(0, 100 * a) / 100, lambda a: logistic(100 * a)),
    "softplus(beta=0.3)": (lambda a: np.logaddexp(0, 0.3 * a) / 0.3, lambda a: logistic(0.3 * a)),
    "silu(beta=1.702)": (
        lambda a: a * logistic(1.702 * a),
        lambda a: logistic(1.702 * a) * (1 + 1.702 * a * logistic(-1.702 * a)),
    ),
    "hard_tanh(low=-2, high=0.75)": (lambda a: np.clip(a, -2, 0.75), lambda a: np.where((a > -2) & (a < 0.75), 1, 0)),
    "sine(w0=30)": (lambda a: np.sin(30 * a), lambda a: 30 * np.cos(30 * a)),
}
"""g and g', of a."""

each_family = pytest.mark.parametrize("name", FORMULAS)

CANONICAL = {
    "softplus( beta = 100.0 )": "softplus(beta=100)",
    " softplus(beta=1e2)\n": "softplus(beta=100)",
    "softplus(beta=+1.E+2)": "softplus(beta=100)",
    "softplus(beta=.25)": "softplus(beta=0.25)",
    "softplus(beta=1)": "softplus",
    "softplus()": "softplus",
    "leaky_relu(slope=0.01)": "leaky_relu",
    "leaky_relu(slope=0)": "relu",
    "leaky_relu(slope=-0.0)": "relu",
    "elu(alpha=1)": "elu",
    "celu": "elu",
    "celu(alpha=1)": "elu",
    "celu(alpha=0.5)": "celu(alpha=0.5)",
    "silu(beta=1.0)": "silu",
    "sine(w0=1)": "sine",
    "hard_tanh(high=2, low=-2)": "hard_tanh(low=-2, high=2)",
    "hard_tanh(low=-1, high=2)": "hard_tanh(high=2)",
    "hard_tanh(low=-1, high=1)": "hard_tanh",
    "hard_tanh(low=0, high=6)": "relu6",
    "tanh": "tanh",
}

REFUSED = {
    "softplus(beta=0)": "activation softplus: expected beta to be a number from 1e-30 to 1e+30, got '0'",
    "softplus(beta=-1)": "expected beta to be a number from 1e-30",
    "softplus(beta=inf)": "expected beta to be a number from 1e-30",
    "softplus(beta=nan)": "expected beta to be a number from 1e-30",
    "softplus(beta=ten)": "got 'ten'",
    "softplus(beta=1_0)": "got '1_0'",
    "softplus(beta=\N{ARABIC-INDIC DIGIT THREE})": "got '\N{ARABIC-INDIC DIGIT THREE}'",
    "softplus(beta=)": "got ''",
    "softplus(100)": "activation softplus: expected beta=number, got '100' in 'softplus(100)'",
    "softplus(alpha=1)": "expected beta=number, got 'alpha=1'",
    "softplus(beta=1, beta=2)": "expected beta=number, got 'beta=2'",
    "softplus(beta=2,)": "expected beta=number, got ''",
    "sine(w0=-30)": "expected w0 to be a number from",
    "leaky_relu(slope=inf)": "expected slope to be a number within ±1e+30, got 'inf'",
    "elu(alpha=-1)": "expected alpha to be a number from",
    "hard_tanh(low=2)": "activation hard_tanh: expected low below high, got low=2, high=1",
    "hard_tanh(min=2)": "expected low=number and high=number, got 'min=2'",
}


@pytest.mark.parametrize("name", CANONICAL)
def test_names_are_canonical(name: str) -> None:
    assert activation_named(name).name == CANONICAL[name]
    net = MLP([2, 3, 1], activation=[name], loss="squared_error", seed=0, backend="numpy")
    assert net.architecture.activations == (CANONICAL[name],)
    assert CANONICAL[name] in repr(net)


@pytest.mark.parametrize("name", REFUSED)
def test_constants_that_cannot_be(name: str) -> None:
    with pytest.raises(OptionError, match=re.escape(REFUSED[name])):
        MLP([2, 3, 1], activation=name)


@pytest.mark.parametrize("name", ["tanh(beta=1)", "softplus(beta=1", "softplus beta=1", "swoosh(x=1)", "", "softmax"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UnknownActivationError, match=re.escape(f"unknown activation {name!r}")) as caught:
        activation_named(name)
    assert "softplus(beta=…)" in str(caught.value) and "tanh" in str(caught.value)


def test_the_defaults_are_the_activation_without_constants() -> None:
    assert activation_named("softplus(beta=1)") is ACTIVATIONS["softplus"]
    assert activation_named("celu(alpha=2)") is activation_named("celu( alpha = 2.0)")


def test_architectures_with_equal_constants_are_equal() -> None:
    nets = [MLP([2, 3, 2], activation=name, seed=0) for name in ("softplus(beta=5)", "softplus( beta=5.0 )")]
    assert nets[0].architecture == nets[1].architecture
    assert json.loads(json.dumps(nets[0].architecture.as_options()))["activation"] == ["softplus(beta=5)"]


def points(dtype: str) -> np.ndarray:
    near = np.linspace(-3, 3, 121).reshape(11, 11)
    return np.concatenate([near, [[0, 1, -1, 0.75, -2, 80, -80, 1e-3, -1e-3, 3, -0.0]]]).astype(dtype)


def own_points(name: str, dtype: str) -> np.ndarray:
    a = points(dtype)
    return np.clip(a, -3, 3) if name.startswith("sine") else a


@each_family
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_g_and_its_derivative(name: str, dtype: str) -> None:
    row, (g, slope) = activation_named(name), FORMULAS[name]
    a = own_points(name, dtype)
    wide = a.astype(np.longdouble if dtype == "float64" else np.float64)
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    steep = 300 if "100" in name or "w0" in name else 30  # a's rounding times the constant
    h, dh = np.empty_like(a), np.full_like(a, 2)
    row.forward(a, h, Scratch(a))
    absolute = 100 * u if "w0" in name else 4 * u  # w0 a is up to 90
    np.testing.assert_allclose(h, g(wide).astype(np.float64), rtol=steep * u, atol=absolute)
    row.backward(dh, h if row.derivative_from == "h" else a, Scratch(a))
    scale = max(1.0, float(np.abs(slope(wide)).max()))
    np.testing.assert_allclose(dh / 2, slope(wide).astype(np.float64), atol=steep * scale * u)


@each_family
def test_what_comes_from_h_works_in_place(name: str) -> None:
    row, a = activation_named(name), own_points(name, "float32")
    h = np.empty_like(a)
    row.forward(a, h, Scratch(a))
    if row.derivative_from == "h":
        row.forward(a, a, Scratch(a))
        np.testing.assert_array_equal(a, h)


@each_family
def test_nan_and_infinity(name: str) -> None:
    row, (g, _) = activation_named(name), FORMULAS[name]
    a, h = np.array([math.nan, math.inf, -math.inf]), np.empty(3)
    with np.errstate(all="ignore"):
        row.forward(a, h, Scratch(a))
        expected = np.where(np.isinf(a) & (name == "silu(beta=1.702)"), np.maximum(a, 0), g(a))
    np.testing.assert_allclose(h, expected)


@each_family
def test_forms_compute_the_same(name: str) -> None:
    row = activation_named(name)
    assert row.forms is not None and row.kernel_id is None
    a = own_points(name, "float64")
    h, slope = np.empty_like(a), np.ones_like(a)
    row.forward(a, h, Scratch(a))
    source = h if row.derivative_from == "h" else a
    row.backward(slope, source, Scratch(a))
    with np.errstate(all="ignore"):
        found = [form(x) for form, x in zip(row.forms.expressions, (a, source), strict=True)]
    np.testing.assert_allclose(found[0], h, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found[1], slope, rtol=1e-11, atol=1e-13)


# --- Initial weights


@pytest.mark.parametrize("name", ["leaky_relu(slope=0.2)", "softplus(beta=100)", "silu(beta=2)", "hard_tanh(high=2)"])
def test_initial_weights_are_those_without_constants(name: str) -> None:
    plain, own = (MLP([5, 7, 6, 2], activation=g, seed=3) for g in (name.partition("(")[0], name))
    np.testing.assert_array_equal(plain.theta, own.theta)


def test_initial_weights_of_sine_networks() -> None:
    """±1/nI in the first layer, ±√(6/nI)/w0 in all others."""
    sizes, w0 = (40, 300, 200, 30), 25.0
    net = MLP(sizes, activation=f"sine(w0={w0})", loss="squared_error", seed=0)
    limits = [1 / 40, math.sqrt(6 / 300) / w0, math.sqrt(6 / 200) / w0]
    for W, limit in zip(net.weights, limits, strict=True):
        assert 0.99 * limit < np.abs(W).max() <= limit * (1 + 2.0**-24)
    he = MLP(sizes, activation="sine", loss="squared_error", seed=0)
    assert 0.99 * math.sqrt(6 / 40) < np.abs(he.weights[0]).max() <= math.sqrt(6 / 40)


def test_a_siren_fits_what_relu_cannot() -> None:
    """A signal of many waves: sine(w0=30) comes to a hundredth of relu's error."""
    x = np.linspace(-1, 1, 256)[:, None]
    y = np.sin(25 * x) * np.cos(60 * x**2) + 0.3 * np.sign(np.sin(9 * x))
    errors = {}
    for name, learning_rate in (("sine(w0=30)", 3e-4), ("relu", 1e-2)):
        net = MLP([1, 64, 64, 1], activation=name, loss="squared_error", backend="numpy", seed=0)
        fit(net, x, y, epochs=200, batch_size=64, optimizer=Adam(learning_rate), seed=0, progress=False)
        errors[name] = float(np.mean((net.forward(x) - y) ** 2))
    assert errors["sine(w0=30)"] < 0.001 < 0.1 < errors["relu"], errors
