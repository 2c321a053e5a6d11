"""_core/elementary.py against mpmath, and kernels/exact/elementary.cuh against it: the latter to the bit."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import mpmath
import numpy as np
import pytest
from emulator import EmulatorLauncher
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf
from numpy.typing import NDArray
from support.requirements import require_emulator, require_gpu

from gpuback._core import elementary, elementary_activations
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.elementary import SCRATCH, Function, apply, store
from gpuback._core.elementary_activations import FORWARD, SLOPE
from gpuback._core.scratch import Scratch
from gpuback._cuda.coefficients import COEFFICIENTS
from gpuback._cuda.compiler import title
from gpuback._cuda.launch import Launcher, LaunchPlan, Variant

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities and NaN are meant; networks silence them

KERNELS = Path(__file__).resolve().parents[1] / "gpu" / "kernels"
RELATIVE_ERROR = {
    **dict.fromkeys(("exp", "sigmoid", "softplus", "exponential", "log_sigmoid", "gelu", "silu"), 6e-13),
    **dict.fromkeys(("expm1", "tanh", "elu", "selu", "mish"), 1.9e-12),
    **dict.fromkeys(("softplus'", "log_sigmoid'", "gelu'", "silu'", "mish'"), 1.9e-12),
    **dict.fromkeys(("squareplus", "squareplus'", "softsign", "hard_swish", "selu'"), 6e-16),
    **dict.fromkeys(("log", "log1p"), 3.1e-14),
}
ULP = 2.0**-52
"""Of float64: the error of the other functions."""
ULPS = 0.5001
"""Of float32, as stored."""

FUNCTIONS: dict[str, Function] = {
    **{name: getattr(elementary, name) for name in ("exp", "expm1", "log", "log1p")},
    **FORWARD,
    **{f"{name}'": function for name, function in SLOPE.items()},
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)

# --- the formulas, in mpmath

SCALE = 2 * mpmath.sqrt(2 / mpmath.pi)


def logistic(x: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-x))


def gelu_argument(a: mpf) -> mpf:
    return SCALE * (a + mpf("0.044715") * a**3)


SELU_SCALE = mpf("1.0507009873554804934193349852946")
SELU_DEPTH = SELU_SCALE * mpf("1.6732632423543772848170429916717")


def between(least: float, a: mpf, most: float) -> mpf:
    return min(max(a, mpf(least)), mpf(most))


def mish_gate(a: mpf) -> mpf:
    return mpmath.tanh(mpmath.log1p(mpmath.exp(a)) if a < 50 else a)


def mish_slope(a: mpf) -> mpf:
    return mish_gate(a) + a * logistic(a) / mpmath.cosh(mpmath.log1p(mpmath.exp(between(-1e4, a, 1e3)))) ** 2


def gelu_slope(a: mpf) -> mpf:
    u = gelu_argument(a)
    return logistic(u) * (1 + a * SCALE * (1 + 3 * mpf("0.044715") * a**2) * logistic(-u))


EXACT: dict[str, Callable[[mpf], mpf]] = {
    "exp": mpmath.exp,
    "expm1": mpmath.expm1,
    "log": lambda x: mpmath.log(x) if x else mpf("-inf"),
    "log1p": lambda x: mpmath.log1p(x) if x != -1 else mpf("-inf"),
    "identity": lambda a: a,
    "relu": lambda a: max(a, mpf(0)),
    "leaky_relu": lambda a: a if a > 0 else a / 100,
    "elu": lambda a: a if a > 0 else mpmath.expm1(a),
    "sigmoid": logistic,
    "tanh": mpmath.tanh,
    "softplus": lambda a: a + mpmath.log1p(mpmath.exp(-a)) if a > 0 else mpmath.log1p(mpmath.exp(a)),
    "gelu": lambda a: a * logistic(gelu_argument(a)),
    "silu": lambda a: a * logistic(a),
    "exponential": mpmath.exp,
    "squareplus": lambda a: (a + mpmath.hypot(a, 2)) / 2 if a > 0 else 2 / (mpmath.hypot(a, 2) - a),
    "selu": lambda a: SELU_SCALE * a if a > 0 else SELU_DEPTH * mpmath.expm1(a),
    "softsign": lambda a: a / (1 + abs(a)),
    "log_sigmoid": lambda a: -mpmath.log1p(mpmath.exp(-a)) if a > 0 else a - mpmath.log1p(mpmath.exp(a)),
    "hard_tanh": lambda a: between(-1, a, 1),
    "relu6": lambda a: between(0, a, 6),
    "hard_sigmoid": lambda a: between(0, a + 3, 6) / 6,
    "mish": lambda a: a * mish_gate(a),
    "hard_swish": lambda a: a * between(0, a + 3, 6) / 6,
    "identity'": lambda h: mpf(1),
    "relu'": lambda h: mpf(h > 0),
    "leaky_relu'": lambda h: mpf(1) if h > 0 else mpf(1) / 100,
    "elu'": lambda h: mpf(1) if h > 0 else h + 1,
    "sigmoid'": lambda h: h * (1 - h),
    "tanh'": lambda h: 1 - h * h,
    "softplus'": lambda h: -mpmath.expm1(-h),
    "gelu'": gelu_slope,
    "silu'": lambda a: logistic(a) * (1 + a * logistic(-a)),
    "exponential'": lambda h: h,
    "squareplus'": lambda h: h * h / (1 + h * h),
    "selu'": lambda h: SELU_SCALE if h > 0 else h + SELU_DEPTH,
    "softsign'": lambda h: (1 - abs(h)) ** 2,
    "log_sigmoid'": lambda h: -mpmath.expm1(h),
    "hard_tanh'": lambda h: mpf(abs(h) < 1),
    "relu6'": lambda h: mpf(0 < h < 6),
    "hard_sigmoid'": lambda h: mpf(0 < h < 1) / 6,
    "mish'": mish_slope,
    "hard_swish'": lambda a: mpf(a > 0) if abs(a) >= 3 else (a + mpf(1.5)) / 3,
}
LEAST = {"log": 0, "log1p": -1}
CROSSING_ZERO = ("selu'", "gelu'", "silu'", "mish'")


def exact(name: str, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rounded to float64: 2·10⁻¹⁶ of what the tests allow."""
    with mpmath.workdps(30):
        return np.array([float(EXACT[name](mpf(float(number)))) for number in x])


def defined(name: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The finite numbers of x that the function is defined for."""
    return x[np.isfinite(x) & (x >= LEAST.get(name, -np.inf))]


# --- numbers


def bit_patterns(count: int, seed: int) -> NDArray[np.float32]:
    """Any float32: as often subnormal, infinite or NaN as patterns of bits are."""
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


def grid() -> NDArray[np.float32]:
    """Where functions bend, where k changes, where results under- and overflow; every magnitude, the smallest steps."""
    tiny, largest = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    switches = np.arange(-20, 21)[:, None] / 2 * np.log(2) + np.array([-1e-6, 0, 1e-6])
    ends = np.array([87.33, 88.0, 88.72, 103.28, 103.97, 110.0, 350.0, 700.0, 20.0, 10.6, 1e30, largest])
    near_one = 1 + np.concatenate([np.arange(-4, 5) * 2.0**-24, np.linspace(-0.5, 1.5, 101)])
    magnitudes = np.concatenate([np.geomspace(1e-44, 1e4, 201), tiny * np.arange(1, 5)])
    one_sided = np.concatenate([ends, near_one, magnitudes])
    parts = [np.linspace(-110, 110, 801), np.linspace(-3, 3, 801), switches.ravel(), one_sided, -one_sided, [0.0, -0.0]]
    return np.concatenate(parts).astype(np.float32)


def special() -> NDArray[np.float32]:
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC12345], np.uint32).view(np.float32)
    return np.concatenate([nans, np.array([np.inf, -np.inf, 0, -0.0, 1, -1, 3e38, -3e38, 1e-45, -1e-45], np.float32)])


def many_numbers(seed: int) -> NDArray[np.float32]:
    """For comparisons of bits."""
    usual = np.random.default_rng(seed).standard_normal(50_000).astype(np.float32)
    return np.concatenate([bit_patterns(50_000, seed), usual * 30, usual, special(), grid()])


# --- running


def wide(name: str, x: NDArray[np.float32], shape: tuple[int, ...] | None = None) -> NDArray[np.float64]:
    """The function's own float64 results, in place."""
    values = x.astype(np.float64).reshape(x.shape if shape is None else shape)
    FUNCTIONS[name](values, values, tuple(np.full_like(values, 1e300) for _ in range(SCRATCH)))
    return values


def same_bits(x: NDArray, y: NDArray) -> bool:
    """NaN has many bits, and any will do before it is stored."""
    bits = np.dtype(f"u{x.itemsize}")
    return x.shape == y.shape and bool(np.all((x.view(bits) == y.view(bits)) | (np.isnan(x) & np.isnan(y))))


# --- accuracy


def assert_accurate(name: str, x: NDArray[np.float32]) -> None:
    x = defined(name, x)
    truth, values = exact(name, x), wide(name, x)
    rounded = apply(FUNCTIONS[name], x)
    with np.errstate(over="ignore"):
        expected = truth.astype(np.float32)
    relevant = (expected != 0) & np.isfinite(expected)
    size = np.abs(truth)
    if name in CROSSING_ZERO:
        size = np.where(x < -3, size, np.maximum(size, 1))
    error = np.abs(values - truth)[relevant] / size[relevant]
    assert np.all(error <= RELATIVE_ERROR.get(name, ULP)), (
        f"{name}({x[relevant][np.argmax(error)]!r}) is {error.max():.1e} off"
    )

    at_an_end = ~relevant & (rounded != expected)
    ulps = np.abs(rounded - truth) / np.spacing(np.abs(expected))
    if name in CROSSING_ZERO:
        relevant &= np.abs(truth) > 1e-3
    assert np.all(ulps[relevant] <= ULPS), f"{name}({x[relevant][np.argmax(ulps[relevant])]!r})"
    assert not at_an_end.any(), f"{name}({x[at_an_end]})"


@each_function
def test_results_are_exact_to_2e_12_and_stored_within_half_an_ulp(name: str) -> None:
    assert_accurate(name, grid())


@pytest.mark.thorough(first=8)
@each_function
def test_any_bit_patterns(name: str) -> None:
    assert_accurate(name, bit_patterns(3000, seed=1))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_whatever_numbers(numbers: list[float]) -> None:
    for name in FUNCTIONS:
        assert_accurate(name, np.array(numbers, np.float32))


INF, NAN = np.inf, np.nan
AT_SPECIAL = {
    # of −∞, ∞, −0, 0, −1
    "exp": (0, INF, 1, 1, np.exp(-1)),
    "expm1": (-1, INF, -0.0, 0, np.expm1(-1)),
    "log": (NAN, INF, -INF, -INF, NAN),
    "log1p": (NAN, INF, -0.0, 0, -INF),
    "identity": (-INF, INF, -0.0, 0, -1),
    "relu": (0, INF, 0, 0, 0),
    "leaky_relu": (-INF, INF, -0.0, 0, -0.01),
    "elu": (-1, INF, 0, 0, np.expm1(-1)),
    "sigmoid": (0, 1, 0.5, 0.5, 1 / (1 + np.e)),
    "tanh": (-1, 1, -0.0, 0, np.tanh(-1)),
    "softplus": (0, INF, np.log(2), np.log(2), np.log1p(np.exp(-1))),
    "gelu": (-0.0, INF, -0.0, 0, float(EXACT["gelu"](mpf(-1)))),
    "silu": (-0.0, INF, -0.0, 0, -1 / (1 + np.e)),
    "exponential": (0, INF, 1, 1, np.exp(-1)),
    "squareplus": (0, INF, 1, 1, (np.sqrt(5) - 1) / 2),
    "selu": (-float(SELU_DEPTH), INF, 0, 0, float(EXACT["selu"](mpf(-1)))),
    "softsign": (-1, 1, -0.0, 0, -0.5),
    "log_sigmoid": (-INF, -0.0, -np.log(2), -np.log(2), -1 - np.log1p(np.exp(-1))),
    "hard_tanh": (-1, 1, -0.0, 0, -1),
    "relu6": (0, 6, 0, 0, 0),
    "hard_sigmoid": (0, 1, 0.5, 0.5, 1 / 3),
    "mish": (-0.0, INF, -0.0, 0, float(EXACT["mish"](mpf(-1)))),
    "hard_swish": (-0.0, INF, -0.0, 0, -1 / 3),
    "identity'": (1, 1, 1, 1, 1),
    "relu'": (0, 1, 0, 0, 0),
    "leaky_relu'": (0.01, 1, 0.01, 0.01, 0.01),
    "elu'": (-INF, 1, 1, 1, 0),
    "sigmoid'": (-INF, -INF, -0.0, 0, -2),
    "tanh'": (-INF, -INF, 1, 1, 0),
    "softplus'": (-INF, 1, -0.0, 0, 1 - np.e),
    "gelu'": (-0.0, 1, 0.5, 0.5, float(EXACT["gelu'"](mpf(-1)))),
    "silu'": (-0.0, 1, 0.5, 0.5, float(EXACT["silu'"](mpf(-1)))),
    "exponential'": (-INF, INF, -0.0, 0, -1),
    "squareplus'": (1, 1, 0, 0, 0.5),
    "selu'": (-INF, float(SELU_SCALE), float(SELU_DEPTH), float(SELU_DEPTH), float(SELU_DEPTH) - 1),
    "softsign'": (INF, INF, 1, 1, 0),
    "log_sigmoid'": (1, -INF, 0, -0.0, 1 - np.exp(-1)),
    "hard_tanh'": (0, 0, 1, 1, 0),
    "relu6'": (0, 0, 0, 0, 0),
    "hard_sigmoid'": (0, 0, 0, 0, 0),
    "mish'": (-0.0, 1, 0.6, 0.6, float(EXACT["mish'"](mpf(-1)))),
    "hard_swish'": (0, 1, 0.5, 0.5, 1 / 6),
}


@each_function
def test_limits_and_zeros(name: str) -> None:
    result = apply(FUNCTIONS[name], np.array([-INF, INF, -0.0, 0.0, -1.0], np.float32))
    expected = np.array(AT_SPECIAL[name], np.float32)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(np.signbit(result[result == 0]), np.signbit(expected[result == 0]))


@each_function
def test_nan_stays_nan(name: str) -> None:
    """Except for slopes that are constant on either side of 0: those take it for a number that is not above 0."""
    nans = special()[:5]
    at_nan = {"identity'": 1, "leaky_relu'": 0.01} | dict.fromkeys(
        ("relu'", "hard_tanh'", "relu6'", "hard_sigmoid'"), 0
    )
    at_nan = at_nan.get(name, NAN)
    np.testing.assert_array_equal(wide(name, nans), np.full(5, at_nan))
    mixed = np.concatenate([np.float32([0.5, 2]), nans, np.float32([0.5, 2])])
    np.testing.assert_array_equal(wide(name, mixed)[[0, 1, 7, 8]], wide(name, mixed[:2])[[0, 1, 0, 1]])


def test_the_tables_cover_every_activation_but_those_without_such_sequences() -> None:
    assert list(FORWARD) == list(SLOPE) == [name for name in ACTIVATIONS if name not in ("gelu_erf", "sine")]


@pytest.mark.parametrize("name", FORWARD)
def test_g_and_its_slope_are_those_of_the_other_modes(name: str) -> None:
    a = np.concatenate([np.linspace(-30, 30, 2001), [0.0]])[:, None]
    row, h, dh = ACTIVATIONS[name], np.empty_like(a), np.ones_like(a)
    row.forward(a, h, Scratch(a))
    ours, slope = np.empty_like(a), np.empty_like(a)
    scratch = tuple(np.empty_like(a) for _ in range(SCRATCH))
    FORWARD[name](a, ours, scratch)
    np.testing.assert_allclose(ours, h, rtol=1e-11, atol=1e-60)
    SLOPE[name](a if row.derivative_from == "a" else h, slope, scratch)
    row.backward(dh, a if row.derivative_from == "a" else h, Scratch(a))
    np.testing.assert_allclose(slope, dh, rtol=0, atol=1e-11)


# --- the same bits, whatever the machine and the arrays

BITS = {
    **{"exp": "f128bbb1beae", "expm1": "1af6296f3e10", "log": "fe378432d491"},
    **{"log1p": "5fcb33a93c61", "identity": "1f1890da6e6e", "relu": "12ae253ff4fe"},
    **{"leaky_relu": "68c7671e551a", "elu": "981a260bedde", "sigmoid": "b3a9f64bddee"},
    **{"tanh": "586a4fcc6f89", "softplus": "067522c02b5b", "gelu": "46ddc8ca9419"},
    **{"silu": "5c0e3fc85618", "identity'": "ae3c131e13a6", "relu'": "985c798cb072"},
    **{"leaky_relu'": "35045290da15", "elu'": "6c5d92c805ce", "sigmoid'": "7933447f4481"},
    **{"tanh'": "84759e68052b", "softplus'": "1c6090086ae2", "gelu'": "c8aeb2f96690"},
    **{"silu'": "dc2740882a27"},
    **{"exponential": "f128bbb1beae", "squareplus": "ab46c1dc3bac", "selu": "eb96587a6d9c"},
    **{"softsign": "3e5c12c6d26c", "log_sigmoid": "e23828ce42bd", "hard_tanh": "c3914e445cb5"},
    **{"relu6": "cdb32f9c2746", "hard_sigmoid": "f83ea7077cfb", "mish": "684493daedee"},
    **{"hard_swish": "2329c3875305", "exponential'": "1f1890da6e6e", "squareplus'": "b479cfbb72cb"},
    **{"selu'": "3727bacd5253", "softsign'": "728e004722a7", "log_sigmoid'": "970821f07ddc"},
    **{"hard_tanh'": "452d80c2f349", "relu6'": "05504a256036", "hard_sigmoid'": "19f4b8112868"},
    **{"mish'": "cbe2c2bb821e", "hard_swish'": "4a5742c0a578"},
}


def spread() -> NDArray[np.float32]:
    """Every 104729th pattern of bits, and steps of 3/256 from −110 to 110."""
    patterns = np.arange(0, 2**32, 104_729, dtype=np.uint32).view(np.float32)
    return np.concatenate([patterns, np.arange(-110 * 256, 110 * 256, 3, dtype=np.float32) / np.float32(256)])


def digest(name: str) -> str:
    values = wide(name, spread())
    values[np.isnan(values)] = np.nan
    return hashlib.sha1(values.tobytes()).hexdigest()[:12]


def test_the_coefficients_are_these() -> None:
    """The last bit of a small coefficient is seen in one result of thousands only."""
    assert hashlib.sha1(" ".join(COEFFICIENTS).encode()).hexdigest()[:12] == "a7366d0a60e5"


@each_function
def test_the_bits_are_these(name: str) -> None:
    """Of results in float64: whatever changes the last bit of one of them changes what `reproducible=True` gives."""
    assert digest(name) == BITS[name]


def test_the_bits_do_not_depend_on_the_instructions_that_numpy_uses() -> None:
    """As on an older CPU: NumPy without all that it uses here beyond its baseline."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_elementary as t; t.print_digests()"
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(found)}
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == [BITS[name] for name in FUNCTIONS]


def print_digests() -> None:
    print(*(digest(name) for name in FUNCTIONS))


def test_nothing_but_ieee_operations_is_used() -> None:
    """Of NumPy: + − × ÷ √, comparisons, bits and copies. What a CPU may do its own way is not among them."""
    files = (Path(module.__file__) for module in (elementary, elementary_activations))
    tree = ast.parse("\n".join(file.read_text(encoding="utf-8").partition("import annotations")[2] for file in files))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "np"}
    arithmetic = {"add", "subtract", "multiply", "divide", "sqrt", "negative", "abs", "clip", "maximum", "minimum"}
    comparisons = {"greater", "greater_equal", "less", "less_equal", "equal", "isnan", "logical_not"}
    bits = {"left_shift", "bitwise_and"}
    types = {"uint32", "int64", "uint64", "float32", "bool_"}
    assert used <= arithmetic | comparisons | bits | types | {
        "copyto",
        "empty",
        "shape",
        "ascontiguousarray",
        "errstate",
    }


@pytest.mark.thorough(first=8)
@each_function
def test_results_do_not_depend_on_how_numbers_lie(name: str) -> None:
    x = np.concatenate([spread()[::41], special()])
    whole = wide(name, x)
    for start, stop, step in (
        (0, 1, 1),
        (1, 2, 1),
        (3, 20, 1),
        (1, x.size, 1),
        (2, x.size, 3),
        (x.size - 9, x.size, 1),
    ):
        assert same_bits(wide(name, x[start:stop:step]), whole[start:stop:step])
    part, buffer = x[:1000], np.zeros((1000, 5))
    buffer[:, 2] = part
    column, out = buffer[:, 2], np.full((1000, 3), 7.0)
    FUNCTIONS[name](column, out[:, 1], tuple(np.empty(1000) for _ in range(SCRATCH)))
    assert same_bits(out[:, 1].copy(), whole[:1000])
    assert same_bits(column.copy(), part.astype(np.float64)), "x is read only, where it is not out"
    assert np.all(out[:, ::2] == 7) and np.all(buffer[:, [0, 1, 3, 4]] == 0)
    assert same_bits(wide(name, part, shape=(25, 40)).reshape(-1), whole[:1000])


@pytest.mark.thorough(first=8)
@each_function
def test_apply_takes_any_shape_and_goes_over_it_in_chunks(name: str) -> None:
    x = many_numbers(seed=3)[: 2 * elementary.ELEMENTS_AT_ONCE + 5]
    values = wide(name, x)
    stored = np.empty_like(x)
    store(values, stored)
    assert apply(FUNCTIONS[name], x).tobytes() == stored.tobytes()
    for shape in ((), (0,), (3, 0), (2, 3, 4)):
        part = x[: int(np.prod(shape))].reshape(shape)
        result = apply(FUNCTIONS[name], part)
        assert (result.shape, result.dtype) == (shape, np.float32)
        assert result.tobytes() == stored[: part.size].tobytes()
    assert apply(FUNCTIONS[name], x[:60].reshape(5, 12).T).tobytes() == stored[:60].reshape(5, 12).T.tobytes()


@pytest.mark.thorough(first=8)
@each_function
@pytest.mark.parametrize("in_place", [False, True])
def test_nothing_that_grows_is_allocated(name: str, in_place: bool) -> None:
    x = np.linspace(-5, 200, 400_000)
    out = x if in_place else np.empty_like(x)
    scratch = tuple(np.empty_like(x) for _ in range(SCRATCH))
    single = np.empty(x.shape, np.float32)
    tracemalloc.start()
    FUNCTIONS[name](x, out, scratch)
    if name not in ("log", "log1p"):  # whose NaN would need an array of booleans
        store(out, single)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000, "a tenth of a float64 array"


# --- storing


def test_store_rounds_once_to_nearest_even() -> None:
    x = np.array(
        [1 + 2.0**-24, 1 + 3 * 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 2.0**-150, 1.5 * 2.0**-149, 3.5e38, -1e300, -0.0]
    )
    expected = np.array([1, 1 + 2.0**-22, 1 + 2.0**-23, 0, 2.0**-148, INF, -INF, -0.0], np.float32)
    out = np.empty(x.shape, np.float32)
    store(x, out)
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("where", [0, 7, 40])
def test_store_makes_every_nan_the_same(where: int) -> None:
    nans = np.array([0x7FF8000000000000, 0xFFF8000000000000, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF], np.uint64)
    x = np.full((6, 7), -INF)
    x.flat[where] = 0.5
    x.flat[[where, *range(where + 1, min(where + 4, 42))]] = nans.view(np.float64)[: min(4, 42 - where)]
    out = np.empty((6, 14), np.float32)[:, ::2]
    store(x, out)
    assert np.array_equal(np.isnan(out), np.isnan(x))
    assert set(out[np.isnan(out)].view(np.uint32).tolist()) == {0x7FC00000}
    assert np.all(out[~np.isnan(x)] == -INF)


def test_storing_nothing() -> None:
    store(np.empty((0, 3)), np.empty((0, 3), np.float32))


# --- CUDA

BY_NUMBER = ("exp", "expm1", "log", "log1p")


def assert_kernel_has_these_bits(launcher: Launcher, name: str, given: Callable, taken: Callable) -> None:
    """`given` makes an array the launcher's, `taken` makes it NumPy's again."""
    x = many_numbers(seed=2)
    if name in BY_NUMBER:
        function, activation = BY_NUMBER.index(name), 0
    else:
        function, activation = (5 if name.endswith("'") else 4), ACTIVATIONS[name.rstrip("'")].kernel_id
    doubles, singles = given(np.full(x.size, 7.0)), given(np.full(x.size, 7, np.float32))
    which = {"function": np.int32(function), "activation": np.int32(activation), "n": np.int32(x.size)}
    plan = LaunchPlan(Variant("elementary.cu", "elementary", COEFFICIENTS), 64, 64)
    launcher.bind(plan, wide=doubles, narrow=singles, x=given(x), **which)()
    expected = wide(name, x)
    assert same_bits(taken(doubles), expected)
    stored = np.empty_like(x)
    store(expected, stored)
    assert taken(singles).tobytes() == stored.tobytes()


@each_function
def test_the_kernels_have_the_same_bits(name: str) -> None:
    require_emulator()
    assert_kernel_has_these_bits(EmulatorLauncher(folder=KERNELS), name, lambda x: x, lambda x: x)


def test_a_number_without_a_function_makes_nan() -> None:
    require_emulator()
    launcher = EmulatorLauncher(folder=KERNELS)
    plan = LaunchPlan(Variant("elementary.cu", "elementary", COEFFICIENTS), 1, 1)
    for function in (4, 5):
        for activation in (31, 63, 64, -1):
            doubles, singles = np.zeros(1), np.zeros(1, np.float32)
            which = {"function": np.int32(function), "activation": np.int32(activation), "n": np.int32(1)}
            launcher.bind(plan, wide=doubles, narrow=singles, x=np.ones(1, np.float32), **which)()
            assert np.isnan(doubles[0]) and np.isnan(singles[0])


@pytest.mark.gpu
@each_function
def test_a_gpu_has_the_same_bits(name: str) -> None:
    require_gpu()
    import cupy

    from gpuback._cuda.device import CudaLauncher

    assert_kernel_has_these_bits(CudaLauncher(folder=KERNELS), name, cupy.asarray, cupy.asnumpy)


def test_titles_leave_the_coefficients_out() -> None:
    assert title(Variant("a.cu", "entry", ("Element=float", *COEFFICIENTS))) == "a.cu entry Element=float"
