"""m₁, m₂ and m₃ of each activation against differences of g in 80 digits (mpmath).

Errors are absolute, in units of u = 2⁻²⁴ (float32) or 2⁻⁵³ (float64) times the largest |g'|, |g''| or |g'''|. The
limits are about twice what was seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from gpuback._core.activation_names import activation_named
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.scratch import Scratch

FAMILIES = [
    *("leaky_relu(slope=0.2)", "elu(alpha=0.5)", "celu(alpha=2)", "softplus(beta=100)", "sine(w0=30)"),
    *("silu(beta=1.702)", "hard_tanh(low=-2, high=0.5)", "leaky_relu(slope=-0.5)"),
]
NAMES = [*ACTIVATIONS, *FAMILIES]
LIMITS = (6.0, 24.0, 24.0)
each_name = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])

logistic = lambda a: 1 / (1 + mpmath.exp(-a))  # noqa: E731
softplus = lambda a: mpmath.log1p(mpmath.exp(a)) if a < 0 else a + mpmath.log1p(mpmath.exp(-a))  # noqa: E731


def gelu(a: Any) -> Any:
    return a * logistic(2 * mpmath.sqrt(2 / mpmath.pi) * (a + mpmath.mpf("0.044715") * a**3))


SELU_SCALE, SELU_ALPHA = (
    mpmath.mpf("1.0507009873554804934193349852946"),
    mpmath.mpf("1.6732632423543772848170429916717"),
)
clip = lambda a, low, high: min(max(a, mpmath.mpf(low)), mpmath.mpf(high))  # noqa: E731
G: dict[str, Callable[[Any], Any]] = {
    "identity": lambda a: a,
    "relu": lambda a: max(a, 0 * a),
    "leaky_relu": lambda a: a if a > 0 else a / 100,
    "elu": lambda a: a if a > 0 else mpmath.expm1(a),
    "selu": lambda a: SELU_SCALE * (a if a > 0 else SELU_ALPHA * mpmath.expm1(a)),
    "sigmoid": logistic,
    "tanh": mpmath.tanh,
    "softplus": softplus,
    "exponential": mpmath.exp,
    "squareplus": lambda a: (a + mpmath.sqrt(a * a + 4)) / 2,
    "softsign": lambda a: a / (1 + abs(a)),
    "log_sigmoid": lambda a: -softplus(-a),
    "hard_tanh": lambda a: clip(a, -1, 1),
    "relu6": lambda a: clip(a, 0, 6),
    "hard_sigmoid": lambda a: clip(a + 3, 0, 6) / 6,
    "gelu": gelu,
    "silu": lambda a: a * logistic(a),
    "gelu_erf": lambda a: a * mpmath.erfc(-a / mpmath.sqrt(2)) / 2,
    "sine": mpmath.sin,
    "mish": lambda a: a * mpmath.tanh(softplus(a)),
    "hard_swish": lambda a: a * clip(a + 3, 0, 6) / 6,
    "leaky_relu(slope=0.2)": lambda a: a if a > 0 else mpmath.mpf(0.2) * a,
    "leaky_relu(slope=-0.5)": lambda a: a if a > 0 else -a / 2,
    "elu(alpha=0.5)": lambda a: a if a > 0 else mpmath.expm1(a) / 2,
    "celu(alpha=2)": lambda a: a if a > 0 else 2 * mpmath.expm1(a / 2),
    "softplus(beta=100)": lambda a: softplus(100 * a) / 100,
    "sine(w0=30)": lambda a: mpmath.sin(30 * a),
    "silu(beta=1.702)": lambda a: a * logistic(mpmath.mpf(1.702) * a),
    "hard_tanh(low=-2, high=0.5)": lambda a: clip(a, -2, 0.5),
}


def grid(name: str) -> list[float]:
    """Numbers of every size, none at a kink; within the range where exponential's g''' is a number of float32."""
    rng = np.random.default_rng(0)
    spread = [*rng.normal(0, 1, 25), *rng.normal(0, 5, 15), *rng.uniform(-40, 40, 10)]
    ends = [1e-8, -1e-8, 3e-3, -3e-3, 21.5, -21.5, 23.0, 90.0, -90.0, 700.0, -700.0, 2e4, -2e4]
    values = [float(np.float32(value)) for value in (*spread, *ends)]
    if name == "exponential":
        return [value for value in values if abs(value) < 80]
    if name.startswith("sine"):  # beyond, the rounding of w0 a alone is more
        return [value for value in values if abs(value) < (0.3 if "w0" in name else 30)]
    return values


@functools.cache
def derivatives(name: str) -> NDArray[np.longdouble]:
    """g', g'', g''' on the grid, from differences of 80 digits over 10⁻²⁰."""
    with mpmath.workdps(80):
        rows = []
        for value in grid(name):
            center, step = mpmath.mpf(value), mpmath.mpf(10) ** -20
            f = [G[name](center + k * step) for k in (-2, -1, 0, 1, 2)]
            first = (8 * (f[3] - f[1]) - (f[4] - f[0])) / (12 * step)
            second = (f[3] - 2 * f[2] + f[1]) / step**2
            third = (f[4] - 2 * f[3] + 2 * f[1] - f[0]) / (2 * step**3)
            rows.append([float(first), float(second), float(third)])
        return np.array(rows).T


def multipliers(name: str, source: NDArray, count: int) -> list[NDArray]:
    """m₁ …, with 0 for those that are 0 everywhere."""
    row = activation_named(name).multipliers
    assert row is not None
    m = [np.full_like(source, np.nan) for _ in range(min(count, row.not_zero))]
    row.fill(source, m, Scratch(source))
    return [*m, *(np.zeros_like(source) for _ in range(count - len(m)))]


def as_derivatives_of_g(name: str, source: NDArray) -> list[NDArray]:
    m1, m2, m3 = multipliers(name, source, 3)
    if activation_named(name).derivative_from == "a":
        return [m1, m2, m3]
    m1, m2, m3 = (m.astype(np.float64) for m in (m1, m2, m3))
    return [m1, m1 * m2, m1 * (m2 * m2 + m1 * m3)]


def source_of(name: str, a: NDArray) -> NDArray:
    activation, h = activation_named(name), np.empty_like(a)
    with np.errstate(all="ignore"):
        activation.forward(a, h, Scratch(a))
    return h if activation.derivative_from == "h" else a


@each_dtype
@each_name
def test_they_are_the_derivatives_of_g(name: str, dtype: type) -> None:
    exact, u = derivatives(name), 2.0**-24 if dtype is np.float32 else 2.0**-53
    found = as_derivatives_of_g(name, source_of(name, np.array(grid(name), dtype)[None]))
    for order, (expected, result, limit) in enumerate(zip(exact, found, LIMITS, strict=True), 1):
        scale = np.abs(expected) if name == "exponential" else max(np.abs(expected).max(), 1e-300)
        errors = np.abs(result[0].astype(np.float64) - expected) / scale / u
        if not np.abs(expected).max() > 1e-12:  # 0 everywhere
            errors = np.abs(result[0]) / u
        assert errors.max() <= limit, (order, errors.max(), grid(name)[int(errors.argmax())])


@each_name
def test_fewer_of_them_are_the_same_numbers(name: str) -> None:
    source = source_of(name, np.linspace(-6, 6, 101)[None])
    row = activation_named(name).multipliers
    assert row is not None
    whole = multipliers(name, source, 3)
    for count in range(1, row.not_zero + 1):
        for fewer, m in zip(multipliers(name, source, count), whole, strict=False):
            np.testing.assert_array_equal(fewer, m)


@each_dtype
@each_name
def test_the_first_is_what_backward_multiplies_by(name: str, dtype: type) -> None:
    a = np.linspace(-8, 8, 200).astype(dtype)[None]
    source, slope = source_of(name, a), np.ones_like(a)
    activation_named(name).backward(slope, source, Scratch(a))
    u = 2.0**-24 if dtype is np.float32 else 2.0**-53
    np.testing.assert_allclose(multipliers(name, source, 1)[0], slope, rtol=8 * u, atol=60 * u * np.abs(slope).max())


@each_name
def test_infinities_and_nan(name: str) -> None:
    """There g is flat or a line, but for the exponential and sine."""
    if name.startswith(("sine", "exponential")):
        return
    for infinite in (-np.inf, np.inf):
        with np.errstate(all="ignore"):
            found = as_derivatives_of_g(name, source_of(name, np.full((1, 1), infinite)))
        assert np.isfinite(found[0]).all() and abs(found[1].item()) <= 1e-15, (infinite, found)


@pytest.mark.parametrize(
    ("name", "at", "m2"),
    [
        ("elu", 0.0, 1.0),
        ("selu", 0.0, 1.0),
        ("hard_swish", -3.0, 0.0),
        ("hard_swish", 3.0, 0.0),
        ("softsign", 0.0, 0.0),
    ],
)
def test_at_a_kink(name: str, at: float, m2: float) -> None:
    assert multipliers(name, np.full((1, 1), at), 2)[1].item() == m2
