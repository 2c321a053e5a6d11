"""Each activation's g and g' against the formulas in wider arithmetic: float64 for float32, long double for float64.

g is held to relative error, in units of u = 2⁻²⁴ (float32) or 2⁻⁵³ (float64), plus a few of the smallest subnormals; g'
to absolute error in the same unit, exponential's to relative error. The limits below are about twice what was seen on
the grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.oracle import normal_density, normal_tail

from gpuback._core.activations import ACTIVATIONS
from gpuback._core.scratch import Scratch

FROM_H = [
    *("identity", "relu", "leaky_relu", "elu", "sigmoid", "tanh", "softplus", "exponential", "squareplus", "selu"),
    *("softsign", "log_sigmoid", "hard_tanh", "relu6", "hard_sigmoid"),
]
FROM_A = ["gelu", "silu", "gelu_erf", "sine", "mish", "hard_swish"]
NAMES = FROM_H + FROM_A
WIDER = {"float32": np.dtype(np.float64), "float64": np.dtype(np.longdouble)}
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}
long_double = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="long double is no wider than double here")
each_dtype = pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=long_double)])
each_name = pytest.mark.parametrize("name", NAMES)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities and NaN are meant; networks silence them

# --- the formulas, in the dtype of a


def logistic(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


def gelu_argument(a: NDArray) -> tuple[NDArray, NDArray]:
    """u = 2√(2/π)(a + 0.044715 a³) and du/da, for a within ±10⁴: beyond, the sigmoid is 0 or 1 for good."""
    one = a.dtype.type(1)
    scale, cubic = np.sqrt(8 / (4 * np.arctan(one))), one * 44_715 / 1_000_000
    a = np.clip(a, -10_000, 10_000)
    return scale * (a + cubic * a**3), scale * (1 + 3 * cubic * a**2)


def smaller_than(x: NDArray, at_minus_infinity: NDArray) -> NDArray:
    """x, with 0 where an infinity met a zero that vanishes faster than any power grows."""
    return np.where(np.isneginf(at_minus_infinity), 0, x)


def gelu_slope(a: NDArray) -> NDArray:
    u, du = gelu_argument(a)
    return logistic(u) + np.clip(a, -10_000, 10_000) * du * logistic(u) * logistic(-u)


def silu_slope(a: NDArray) -> NDArray:
    return logistic(a) + np.clip(a, -100_000, 100_000) * logistic(a) * logistic(-a)


SELU_SCALE = np.longdouble("1.0507009873554804934193349852946")
SELU_ALPHA = np.longdouble("1.6732632423543772848170429916717")


def mish_gate(a: NDArray) -> NDArray:
    """tanh(log(1 + e^a)), with e^a or e^−a, whichever is at most 1."""
    e = np.exp(-np.abs(a))
    return np.where(a <= 0, e * (e + 2) / (e * (e + 2) + 2), (1 + 2 * e) / (1 + 2 * e + 2 * e * e))


def mish_slope(a: NDArray) -> NDArray:
    """ω + a (1 − ω²) sigmoid(a), with 1 − ω² = (1 − ω)(1 + ω) and 1 − ω = 2/(n + 2)."""
    e, limited = np.exp(-np.abs(a)), np.clip(a, -100_000, 100_000)
    less = np.where(a <= 0, 2 / (e * (e + 2) + 2), 2 * e * e / (1 + 2 * e + 2 * e * e))
    return mish_gate(a) + limited * less * (1 + mish_gate(a)) * logistic(a)


G: dict[str, Callable[[NDArray], NDArray]] = {
    "identity": lambda a: a,
    "relu": lambda a: np.where(a <= 0, 0, a),
    "leaky_relu": lambda a: np.where(a <= 0, a / 100, a),
    "elu": lambda a: np.where(a <= 0, np.expm1(a), a),
    "sigmoid": logistic,
    "tanh": np.tanh,
    "softplus": lambda a: np.where(a <= 0, np.log1p(np.exp(a)), a + np.log1p(np.exp(-a))),
    "gelu": lambda a: smaller_than(a * logistic(gelu_argument(a)[0]), a),
    "silu": lambda a: smaller_than(a * logistic(a), a),
    "exponential": np.exp,
    "squareplus": lambda a: np.where(a <= 0, 2 / (np.hypot(a, 2) - a), (a + np.hypot(a, 2)) / 2),
    "selu": lambda a: SELU_SCALE.astype(a.dtype) * np.where(a <= 0, SELU_ALPHA.astype(a.dtype) * np.expm1(a), a),
    "softsign": lambda a: a / (1 + np.abs(a)),
    "log_sigmoid": lambda a: np.where(a <= 0, a - np.log1p(np.exp(a)), -np.log1p(np.exp(-a))),
    "hard_tanh": lambda a: np.where(a > 1, 1, np.where(a < -1, -1, a)),
    "relu6": lambda a: np.where(a > 6, 6, np.where(a < 0, 0, a)),
    "hard_sigmoid": lambda a: np.where(a > 3, 1, np.where(a < -3, 0, (a + 3) / 6)),
    "gelu_erf": lambda a: smaller_than(a * normal_tail(a), a),
    "sine": np.sin,
    "mish": lambda a: smaller_than(a * mish_gate(a), a),
    "hard_swish": lambda a: np.where(a > 3, a, np.where(a < -3, 0, a * (a + 3) / 6)),
}
SLOPE: dict[str, Callable[[NDArray], NDArray]] = {
    "identity": np.ones_like,
    "relu": lambda a: np.where(a > 0, 1, 0 * a),
    "leaky_relu": lambda a: np.where(a > 0, 1, np.full_like(a, 1) / 100),
    "elu": lambda a: np.where(a > 0, 1, np.exp(a)),
    "sigmoid": lambda a: logistic(a) * logistic(-a),
    "tanh": lambda a: 1 / np.cosh(a) ** 2,
    "softplus": logistic,
    "gelu": gelu_slope,
    "silu": silu_slope,
    "exponential": np.exp,
    "squareplus": lambda a: (1 + a / np.hypot(a, 2)) / 2,
    "selu": lambda a: SELU_SCALE.astype(a.dtype) * np.where(a <= 0, SELU_ALPHA.astype(a.dtype) * np.exp(a), 1),
    "softsign": lambda a: 1 / (1 + np.abs(a)) ** 2,
    "log_sigmoid": lambda a: logistic(-a),
    "hard_tanh": lambda a: np.where(np.abs(a) < 1, 1, 0 * a),
    "relu6": lambda a: np.where((a > 0) & (a < 6), 1, 0 * a),
    "hard_sigmoid": lambda a: np.where(np.abs(a) < 3, np.full_like(a, 1) / 6, 0),
    "gelu_erf": lambda a: normal_tail(a) + a * normal_density(a),
    "sine": np.cos,
    "mish": mish_slope,
    "hard_swish": lambda a: np.where(np.abs(a) < 3, (a + a.dtype.type(1.5)) / 3, np.where(a > 0, 1, 0 * a)),
}

# --- how far off they may be

G_LIMIT = {
    **{"identity": 0, "relu": 0, "leaky_relu": 2, "elu": 8, "sigmoid": 8, "tanh": 4, "softplus": 10, "silu": 10},
    **{"exponential": 6, "squareplus": 5, "selu": 8, "softsign": 4, "log_sigmoid": 7, "hard_tanh": 0, "relu6": 0},
    **{"hard_sigmoid": 3, "sine": 3, "mish": 8, "hard_swish": 4},
}
SLOPE_LIMIT = {
    **{"identity": 0, "relu": 0, "leaky_relu": 0.01, "elu": 3, "sigmoid": 3, "tanh": 5, "softplus": 4},
    **{"gelu": 8, "silu": 8, "exponential": 6, "squareplus": 4, "selu": 4, "softsign": 4, "log_sigmoid": 3},
    **{"hard_tanh": 0, "relu6": 0, "hard_sigmoid": 0.2, "gelu_erf": 7, "sine": 2, "mish": 8, "hard_swish": 3},
}


def g_limit(name: str, a: NDArray, dtype: str) -> NDArray:
    """In u of |g|. gelu: its argument u has a relative error of some 5u, which the exponential multiplies by |u|.

    gelu_erf: that of a²/2 is u, where a is below 0.
    """
    if name == "gelu":
        return 8 + 5 * np.abs(gelu_argument(a)[0])
    if name == "gelu_erf":
        return 14 + np.minimum(a, 0) ** 2 / 2
    return np.full_like(a, G_LIMIT[name])


# --- running the table's functions


def filled_scratch(a: NDArray) -> Scratch:
    scratch = Scratch(a)
    scratch.a.fill(45)
    scratch.b.fill(67)
    return scratch


def g(name: str, a: NDArray) -> NDArray:
    h = np.full_like(a, 123)
    ACTIVATIONS[name].forward(a, h, filled_scratch(a))
    return h


def slope(name: str, a: NDArray) -> NDArray:
    """g', as what the backward pass makes of ∂loss/∂h = 1."""
    dh = np.ones_like(a)
    source = a if name in FROM_A else g(name, a)
    ACTIVATIONS[name].backward(dh, source, filled_scratch(a))
    return dh


def assert_g(name: str, a: NDArray) -> None:
    a = seldom(name, a)
    dtype, wide = a.dtype.name, a.astype(WIDER[a.dtype.name])
    exact = in_range(G[name](wide), dtype)
    subnormal = np.finfo(dtype).smallest_subnormal * np.clip(np.abs(wide), 2, 1000)  # a·s, with s rounded to one
    limit = g_limit(name, wide, dtype) * UNIT_ROUNDOFF[dtype] * np.abs(exact) + subnormal
    error = distance(g(name, a), exact)
    assert np.all(error <= limit), f"{name}({a.flat[np.argmax(error - limit)]!r})"


def assert_slope(name: str, a: NDArray) -> None:
    a = seldom(name, a)
    exact = in_range(SLOPE[name](a.astype(WIDER[a.dtype.name])), a.dtype.name)
    error = distance(slope(name, a), exact)
    size = exact + 1e-30 if name == "exponential" else 1
    assert np.all(error <= SLOPE_LIMIT[name] * UNIT_ROUNDOFF[a.dtype.name] * size), (
        f"{name}'({a.flat[np.argmax(error)]!r}) is {error.max() / UNIT_ROUNDOFF[a.dtype.name]:.1f} u off"
    )


def in_range(exact: NDArray, dtype: str) -> NDArray:
    """Infinite where it is too large for the dtype."""
    return np.where(np.abs(exact) > np.finfo(dtype).max, np.copysign(np.inf, exact), exact)


def distance(found: NDArray, exact: NDArray) -> NDArray:
    return np.where(found == exact, 0, np.abs(found - exact))


def seldom(name: str, a: NDArray) -> NDArray:
    """Some of many numbers, where mpmath is asked for each."""
    return a[::37] if name == "gelu_erf" and a.dtype == np.float64 and a.size > 1000 else a


def grid(dtype: str) -> NDArray:
    """Where functions bend, where exponentials under- and overflow, every order of magnitude, the smallest steps."""
    magnitudes = np.concatenate([np.geomspace(1e-44, 1e6, 3001), np.finfo(dtype).smallest_subnormal * np.arange(1, 50)])
    bends = [np.linspace(-20, 20, 40_001), np.linspace(-110, 110, 10_001), np.linspace(-760, 760, 10_001)]
    return np.concatenate([*bends, magnitudes, -magnitudes, [0.0, -0.0]]).astype(dtype)[:, None]


# --- values


@each_name
@each_dtype
def test_g_on_a_dense_grid(name: str, dtype: str) -> None:
    assert_g(name, grid(dtype))


@each_name
@each_dtype
def test_slope_on_a_dense_grid(name: str, dtype: str) -> None:
    assert_slope(name, grid(dtype))


@each_dtype
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_any_numbers_up_to_a_million(dtype: str, data: st.DataObject) -> None:
    floats = st.floats(-1e6, 1e6, width=32 if dtype == "float32" else 64)
    a = np.array(data.draw(st.lists(floats, min_size=1, max_size=20)), dtype)[:, None]
    for name in NAMES:
        assert_g(name, a)
        assert_slope(name, a)


@each_name
def test_slope_is_the_limit_of_difference_quotients(name: str) -> None:
    """Independent of the formulas for g' above: g itself, in float64, on both sides of points away from the kinks."""
    a, step = np.linspace(-6.5, 6.5, 1001)[:, None] + 2e-3, 1e-5
    assert all(np.abs(a - kink).min() > step for kink in ACTIVATIONS[name].kinks)
    quotient = (g(name, a + step) - g(name, a - step)) / (2 * step)
    np.testing.assert_allclose(slope(name, a), quotient, rtol=1e-9 if name == "exponential" else 0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if ACTIVATIONS[name].kinks])
def test_slopes_or_their_changes_jump_at_the_kinks_and_nowhere_else(name: str) -> None:
    """Second differences of g' are far from 0 at a kink, and within 0.1 of it elsewhere."""
    step = 1e-4
    a = (np.arange(-70_000, 70_000) * step)[:, None]
    slopes = slope(name, a + step / 3)
    bends = np.abs(np.diff(slopes, 2, axis=0))[:, 0] / step
    found = a[1:-1, 0][bends > 0.1]
    for kink in ACTIVATIONS[name].kinks:
        assert np.abs(found - kink).min() < 2 * step, kink
    assert all(np.abs(np.array(ACTIVATIONS[name].kinks) - place).min() < 3 * step for place in found)


@each_dtype
@pytest.mark.parametrize("name", ["sigmoid", "softplus", "elu"])
def test_small_results_are_not_flushed_to_zero(name: str, dtype: str) -> None:
    """e^a keeps what it can of its digits down to the smallest subnormal; elu and tanh near 0 keep theirs."""
    a = np.linspace(*((-103, -80) if dtype == "float32" else (-744, -700)), 500).astype(dtype)[:, None]
    if name == "elu":
        a = -np.finfo(dtype).smallest_subnormal * np.arange(1, 100).astype(dtype)[:, None]
    assert np.all(g(name, a) != 0)
    assert_g(name, a)


@each_dtype
def test_gelu_is_its_usual_tanh_form(dtype: str) -> None:
    """½a(1 + tanh √(2/π)(a + 0.044715 a³)), whose own cancellation in wider arithmetic is far below u·|a|."""
    a = grid(dtype)
    a = a[np.abs(a[:, 0]) < 20]
    wide = a.astype(WIDER[dtype])
    usual = wide * (1 + np.tanh(np.sqrt(1 / (2 * np.arctan(wide.dtype.type(1)))) * (wide + 0.044715 * wide**3))) / 2
    u, argument = UNIT_ROUNDOFF[dtype], np.abs(gelu_argument(wide)[0])
    limit = u * ((8 + 5 * argument) * np.abs(usual) + 2.0**-9 * np.abs(wide)) + np.finfo(dtype).smallest_subnormal
    assert np.all(np.abs(g("gelu", a) - usual) <= limit)


def test_gelu_and_its_slope_are_close_to_the_true_ones() -> None:
    """a Φ(a) and Φ(a) + a φ(a) with the normal distribution: the tanh form is known to stay within 5e-4 and 1e-3."""
    a = np.linspace(-8, 8, 2001)[:, None]
    phi = np.array([[math.erfc(-x / math.sqrt(2)) / 2] for x in a[:, 0]])
    density = np.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(g("gelu", a), a * phi, rtol=0, atol=5e-4)
    np.testing.assert_allclose(slope("gelu", a), phi + a * density, rtol=0, atol=1e-3)


# --- the ends, the kinks, the zeros

LEFT_AND_RIGHT_LIMIT = {
    "identity": (-np.inf, np.inf),
    "relu": (0, np.inf),
    "leaky_relu": (-np.inf, np.inf),
    "elu": (-1, np.inf),
    "sigmoid": (0, 1),
    "tanh": (-1, 1),
    "softplus": (0, np.inf),
    "gelu": (0, np.inf),
    "silu": (0, np.inf),
    "exponential": (0, np.inf),
    "squareplus": (0, np.inf),
    "selu": (-SELU_SCALE * SELU_ALPHA, np.inf),
    "softsign": (-1, 1),
    "log_sigmoid": (-np.inf, 0),
    "hard_tanh": (-1, 1),
    "relu6": (0, 6),
    "hard_sigmoid": (0, 1),
    "gelu_erf": (0, np.inf),
    "sine": (np.nan, np.nan),
    "mish": (0, np.inf),
    "hard_swish": (0, np.inf),
}
SLOPES_AT_THE_ENDS = {
    "identity": (1, 1),
    "leaky_relu": (0.01, 1),
    **dict.fromkeys(("sigmoid", "tanh", "softsign", "hard_tanh", "relu6", "hard_sigmoid"), (0, 0)),
    "exponential": (0, np.inf),
    "selu": (0, SELU_SCALE),
    "log_sigmoid": (1, 0),
    "sine": (np.nan, np.nan),
}


@each_name
@pytest.mark.parametrize("dtype", WIDER)
def test_g_at_infinity_is_its_limit(name: str, dtype: str) -> None:
    expected = np.array([LEFT_AND_RIGHT_LIMIT[name]], dtype)
    np.testing.assert_array_equal(g(name, np.array([[-np.inf, np.inf]], dtype)), expected)


@each_name
@pytest.mark.parametrize("dtype", WIDER)
def test_slope_at_infinity_is_its_limit(name: str, dtype: str) -> None:
    expected = np.array([SLOPES_AT_THE_ENDS.get(name, (0, 1))], dtype)
    np.testing.assert_allclose(
        slope(name, np.array([[-np.inf, np.inf]], dtype)), expected, rtol=2 * UNIT_ROUNDOFF[dtype]
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("exponential", "sine")])
@pytest.mark.parametrize("dtype", WIDER)
def test_the_largest_numbers_do_not_overflow_on_the_way(name: str, dtype: str) -> None:
    a = np.array([[-np.finfo(dtype).max, np.finfo(dtype).max, -1e30, 1e30]], dtype)
    left, right = (np.array(end, dtype) for end in LEFT_AND_RIGHT_LIMIT[name])
    steepness = {"leaky_relu": 0.01, "selu": np.array(SELU_SCALE, dtype)}.get(name, 1)
    with np.errstate(over="ignore"):  # selu of the largest number is infinite
        lines = a * a.dtype.type(steepness)
    atol = np.spacing(a.dtype.type(1e-30)) + 1e-30 if name == "squareplus" else 0  # 1/|a|
    far_left = a[0, ::2] if name == "log_sigmoid" else lines[0, ::2] if left == -np.inf else left
    np.testing.assert_allclose(g(name, a)[0, ::2], far_left, rtol=0, atol=atol)
    far_right = a[0, 1::2] if name == "leaky_relu" else lines[0, 1::2] if right == np.inf else right
    np.testing.assert_array_equal(g(name, a)[0, 1::2], far_right)
    expected = np.array([SLOPES_AT_THE_ENDS.get(name, (0, 1)) * 2], dtype)
    np.testing.assert_allclose(slope(name, a), expected, rtol=2 * UNIT_ROUNDOFF[dtype], atol=atol)


@each_dtype
def test_sines_of_the_largest_numbers(dtype: str) -> None:
    """Reduced by all of π that it takes: mpmath does so, too."""
    a = np.array([[1e5, 2.0**60, 1e30, np.finfo(dtype).max, -1e22, -3e38]], dtype)
    with mpmath.workdps(400):
        for function, found in ((mpmath.sin, g("sine", a)), (mpmath.cos, slope("sine", a))):
            exact = [float(function(mpmath.mpf(float(x)))) for x in a.flat]
            np.testing.assert_allclose(found[0], exact, rtol=0, atol=3 * UNIT_ROUNDOFF[dtype])


@each_dtype
def test_the_exponential_overflows_where_it_should(dtype: str) -> None:
    end = np.log(np.finfo(dtype).max)
    assert g("exponential", np.array([[-1e30, end * 0.999, end * 1.001]], dtype)).tolist()[0][::2] == [0, np.inf]
    assert np.isfinite(g("exponential", np.array([[end * 0.999]], dtype)))


@each_name
@pytest.mark.parametrize("dtype", WIDER)
def test_nan_stays_nan_and_spreads_to_nobody(name: str, dtype: str) -> None:
    a = np.array([[1.0, np.nan, -2.0]], dtype)
    assert np.isnan(g(name, a)).tolist() == [[False, True, False]]
    assert np.isfinite(slope(name, a))[0, [0, 2]].all()


@each_name
@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_at_zero(name: str, zero: float, dtype: str) -> None:
    """At a kink g' is that from the left, whatever the sign of the zero."""
    values = {"sigmoid": 0.5, "softplus": math.log(2), "exponential": 1, "squareplus": 1, "log_sigmoid": -math.log(2)}
    values["hard_sigmoid"] = 0.5
    slopes = {"relu": 0, "leaky_relu": 0.01, "sigmoid": 0.25, "selu": SELU_SCALE * SELU_ALPHA, "relu6": 0}
    slopes |= {"hard_sigmoid": 1 / 6, "mish": 0.6}
    slopes |= dict.fromkeys(("softplus", "squareplus", "log_sigmoid", "gelu", "silu", "gelu_erf", "hard_swish"), 0.5)
    a = np.array([[zero]], dtype)
    np.testing.assert_allclose(g(name, a), values.get(name, 0), rtol=4 * UNIT_ROUNDOFF[dtype])
    np.testing.assert_allclose(slope(name, a), slopes.get(name, 1), rtol=4 * UNIT_ROUNDOFF[dtype])


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("relu", 0, 1),
        ("leaky_relu", 0.01, 1),
        ("elu", 1, 1),
        ("relu6", 0, 1),
        ("selu", SELU_SCALE * SELU_ALPHA, SELU_SCALE),
    ],
)
def test_beside_a_kink_at_0(name: str, left: float, right: float, dtype: str) -> None:
    """From the first number beyond 0 the slope is that from the right."""
    tiny = np.finfo(dtype).smallest_subnormal
    expected = np.array([[left, left, right, right]], dtype)
    found = slope(name, np.array([[-1e-30, -tiny, tiny, 1e-30]], dtype))
    np.testing.assert_allclose(found, expected, rtol=4 * UNIT_ROUNDOFF[dtype])


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize(
    ("name", "end", "slopes"),
    [
        ("hard_tanh", -1, (0, 0, 1)),
        ("hard_tanh", 1, (1, 0, 0)),
        ("relu6", 6, (1, 0, 0)),
        ("hard_sigmoid", -3, (0, 0, 1 / 6)),
        ("hard_sigmoid", 3, (1 / 6, 0, 0)),
        ("hard_swish", -3, (0, 0, -0.5)),
        ("hard_swish", 3, (1.5, 1, 1)),
    ],
)
def test_beside_and_at_an_end(name: str, end: float, slopes: tuple[float, ...], dtype: str) -> None:
    """Below, at and above it. At the end itself g is taken to be outside, as PyTorch does."""
    step = 1e-5
    found = slope(name, np.array([[end - step, end, end + step]], dtype))
    np.testing.assert_allclose(found, np.array([slopes], dtype), rtol=0, atol=step)


# --- which arrays are read and written


@pytest.mark.parametrize("name", FROM_H)
@pytest.mark.parametrize("order", ["C", "F"])
def test_in_place_gives_the_same_bits_where_the_slope_comes_from_h(name: str, order: str) -> None:
    a = np.array(np.random.default_rng(0).standard_normal((31, 7)) * 5, np.float32, order=order)
    h = g(name, a)
    ACTIVATIONS[name].forward(a, a, Scratch(a))
    assert a.tobytes() == h.tobytes()


@each_name
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(1, 1), (31, 7), (1, 40), (200, 3)])
def test_only_the_result_and_the_scratch_are_written(name: str, shape: tuple[int, int], order: str) -> None:
    rng = np.random.default_rng(1)
    a, dh = (np.array(rng.standard_normal(shape), np.float32, order=order) for _ in range(2))
    kept = a.copy(), g(name, a)
    h, scratch = np.full_like(a, np.nan), Scratch(a)
    assert ACTIVATIONS[name].forward(a, h, scratch) is None
    np.testing.assert_array_equal(h, kept[1])
    expected = dh * slope(name, a).astype(np.float64)
    assert ACTIVATIONS[name].backward(dh, a if name in FROM_A else h, scratch) is None
    np.testing.assert_array_equal(a, kept[0])
    np.testing.assert_array_equal(h, kept[1])
    # gelu and silu multiply by s and by 1 + a u' (1 − s) one after the other
    np.testing.assert_allclose(dh, expected, rtol=4 * 2.0**-24, atol=0)


def test_the_table_says_what_each_slope_is_computed_from() -> None:
    assert sorted(ACTIVATIONS) == sorted(NAMES)
    assert {name: row.derivative_from for name, row in ACTIVATIONS.items()} == {
        name: "a" if name in FROM_A else "h" for name in NAMES
    }
    assert len({row.kernel_id for row in ACTIVATIONS.values()}) == len(NAMES)
    assert all(row.name == name for name, row in ACTIVATIONS.items())
