"""Each loss with each output function: ℓ and ∂ℓ/∂a against the formulas in wider arithmetic (float64 for float32, long
double for float64), with limits that follow the roundings step by step.

Below, R stands for the roundings of an exponential, logarithm or hyperbolic function and what little surrounds it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuback._backends import registry as backends
from gpuback._core.losses import LOSSES, CrossEntropy, Huber, Loss, Quantile
from gpuback._core.precision import Precision
from gpuback._core.scratch import Scratch

PAIRS = [
    ("cross_entropy", "softmax"),
    ("binary_cross_entropy", "sigmoid"),
    ("squared_error", "identity"),
    ("squared_error", "softmax"),
    ("squared_error", "sigmoid"),
    ("squared_error", "tanh"),
    *((loss, output) for loss in ("absolute_error", "huber", "quantile") for output in ("identity", "sigmoid", "tanh")),
    ("poisson", "exponential"),
    ("weighted", "softmax"),
]
"""`weighted` is cross_entropy with label smoothing and class weights."""
WIDER = {"float32": np.dtype(np.float64), "float64": np.dtype(np.longdouble)}
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}
R = 12
"""NumPy's vectorised functions are within 4 units in the last place, that is 8 roundings; a few follow."""

SMOOTHING, DELTA, Q = 0.125, 0.75, 0.8
"""Options of losses: ε, δ and q."""

each_pair = pytest.mark.parametrize(("loss", "output"), PAIRS)
each_order = pytest.mark.parametrize("order", ["C", "F"])
each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "float64",
            marks=pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="long double is no wider here"),
        ),
    ],
)
pytestmark = [
    pytest.mark.on_each_backend(layers=True),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # networks silence them
]


class Expected(NamedTuple):
    """ℓ (B,) and ∂ℓ/∂a (B, n), with how far off each may be."""

    loss: NDArray
    loss_limit: NDArray
    gradient: NDArray
    gradient_limit: NDArray


def outputs(name: str, a: NDArray) -> NDArray:
    if name == "softmax":
        powers = np.exp(a - a.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
    elementwise = {"identity": lambda: a, "sigmoid": lambda: 1 / (1 + np.exp(-a)), "tanh": lambda: np.tanh(a)}
    return (elementwise | {"exponential": lambda: np.exp(a)})[name]()


def jacobian(name: str, a: NDArray) -> NDArray:
    """∂ŷ_i/∂a_j as an explicit matrix (B, n, n) for each sample."""
    p, eye = outputs(name, a), np.eye(a.shape[1], dtype=a.dtype)
    if name == "softmax":
        return p[:, :, None] * (eye - p[:, None, :])
    slopes = {"identity": np.ones_like(a), "sigmoid": p / (1 + np.exp(a)), "tanh": 1 / np.cosh(a) ** 2}
    return slopes[name][:, :, None] * eye


def total(x: NDArray) -> NDArray:
    return x.sum(axis=1, keepdims=True)


def softmax_error(a: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """In u: the relative errors of s = Σ e^z and of ŷ = e^z / s, with z = a − max a; and z.

    z is off by |z| u, so e^z by a factor 1 ± (|z| + R) u; a sum's terms pass through 4√n additions at most.
    """
    z = a - a.max(axis=1, keepdims=True)
    e_sum = total(outputs("softmax", a) * np.abs(z)) + R + 4 * math.sqrt(a.shape[1])
    return e_sum, e_sum + np.abs(z) + R, z


def expect_cross_entropy(a: NDArray, y: NDArray, u: float) -> Expected:
    if y.ndim == 1:
        y = np.eye(a.shape[1], dtype=a.dtype)[y]
    y, chain = y.astype(a.dtype), 4 * math.sqrt(a.shape[1])
    p, mass = outputs("softmax", a), total(y)
    e_sum, e_p, z = softmax_error(a)
    log_sum = np.log(total(np.exp(z)))
    terms = y * (log_sum - z)
    e_terms = y * (e_sum + R * log_sum + 2 * np.abs(z)) + 2 * np.abs(terms)
    gradient = mass * p - y
    e_gradient = mass * p * (e_p + chain + 2) + np.abs(gradient)
    return Expected(
        terms.sum(axis=1), u * (total(e_terms) + chain * total(np.abs(terms)))[:, 0], gradient, u * e_gradient
    )


def expect_binary_cross_entropy(a: NDArray, y: NDArray, u: float) -> Expected:
    """max(a, 0) − a y + log1p(e^−|a|): the first two may cancel, so errors are relative to them."""
    y, p = y.astype(a.dtype), outputs("sigmoid", a)
    soft, hard = np.log1p(np.exp(-np.abs(a))), np.maximum(a, 0)
    terms = hard - a * y + soft
    e_terms = R * soft + 2 * hard + np.abs(a * y) + terms
    gradient = p - y
    limit = total(e_terms) + 4 * math.sqrt(a.shape[1]) * total(terms)
    return Expected(terms.sum(axis=1), u * limit[:, 0], gradient, u * (R * p + np.abs(gradient)))


def expect_squared_error(output: str, a: NDArray, y: NDArray, u: float) -> Expected:
    y, chain = y.astype(a.dtype), 4 * math.sqrt(a.shape[1])
    p = outputs(output, a)
    r = p - y
    e_p = {"identity": 0, "softmax": softmax_error(a)[1], "sigmoid": R, "tanh": R}[output] * np.abs(p)
    e_r = e_p + np.abs(r)
    loss = total(r**2) / 2
    e_loss = total(np.abs(r) * e_r) + (chain + 3) * loss
    J = jacobian(output, a)
    gradient = (J.swapaxes(1, 2) @ r[:, :, None])[:, :, 0]
    if output == "softmax":
        dot = total(r * p)
        e_dot = total(e_r * p + np.abs(r) * e_p) + (chain + 1) * total(np.abs(r * p))
        e_gradient = e_p * np.abs(r - dot) + p * (e_r + e_dot + np.abs(r - dot)) + np.abs(gradient)
    else:
        slope = np.diagonal(J, axis1=1, axis2=2)
        e_slope = {"identity": 0, "sigmoid": R / 4, "tanh": R / 2}[output]  # absolute, in u
        e_gradient = slope * e_r + np.abs(r) * e_slope + np.abs(gradient)
    return Expected(loss[:, 0], u * e_loss[:, 0], gradient, u * e_gradient)


def smoothed(y: NDArray, n: int, dtype: np.dtype[Any]) -> NDArray:
    """c_j ((1 − ε) y_j + ε/n)."""
    rows = np.eye(n, dtype=dtype)[y] if y.ndim == 1 else y.astype(dtype)
    return np.array(class_weight(n), dtype) * ((1 - dtype.type(SMOOTHING)) * rows + dtype.type(SMOOTHING) / n)


def expect_weighted(a: NDArray, y: NDArray, u: float) -> Expected:
    """Cross-entropy of the smoothed targets, each of which is off by three roundings."""
    targets = smoothed(y, a.shape[1], a.dtype)
    plain = expect_cross_entropy(a, targets, u)
    p, terms = outputs("softmax", a), 3 * u * plain.loss
    return plain._replace(
        loss_limit=plain.loss_limit + terms,
        gradient_limit=plain.gradient_limit + 3 * u * (total(targets) * p + targets),
    )


def expect_residual(loss: str, output: str, a: NDArray, y: NDArray, u: float) -> Expected:
    """A sum of p(r), r = ŷ − y. Where r is smaller than its error, the sign of p' is anything."""
    p, y = outputs(output, a), y.astype(a.dtype)
    r = p - y
    e_r = {"identity": 0, "sigmoid": R, "tanh": R}[output] * np.abs(p) + np.abs(r)
    if loss == "huber":
        delta = a.dtype.type(DELTA)
        slope = np.clip(r, -delta, delta)
        terms, e_slope = slope * (r - slope / 2), e_r
    else:
        above, below = (a.dtype.type(1 - Q), a.dtype.type(Q)) if loss == "quantile" else (1, 1)
        slope = np.where(r > 0, above, np.where(r < 0, -below, 0 * r))
        terms, e_slope = slope * r, np.where(np.abs(r) <= u * e_r, (above + below) / u, np.abs(slope))
    e_terms = np.abs(slope) * e_r + 4 * np.abs(terms) + u * e_r * e_r
    derivative = np.diagonal(jacobian(output, a), axis1=1, axis2=2)
    e_derivative = {"identity": 0, "sigmoid": R / 4, "tanh": R / 2}[output]
    gradient = slope * derivative
    e_gradient = derivative * e_slope + np.abs(slope) * e_derivative + np.abs(gradient)
    limit = total(e_terms) + 4 * math.sqrt(a.shape[1]) * total(np.abs(terms))
    return Expected(terms.sum(axis=1), u * limit[:, 0], gradient, u * e_gradient)


def expect_poisson(a: NDArray, y: NDArray, u: float) -> Expected:
    """y (e^d − 1 − d) with d = a − log y, or ŷ where y is 0."""
    y, p = y.astype(a.dtype), np.exp(a)
    log_y = np.log(np.where(y == 0, 1, y))
    d = a - log_y
    terms = np.where(y == 0, p, y * (np.expm1(d) - d))
    e_d = R * np.abs(log_y) + np.abs(d)
    e_terms = np.where(y == 0, R * p, y * (np.abs(np.expm1(d)) * (e_d + R) + np.abs(d)) + 2 * terms + u * y * e_d**2)
    gradient = p - y
    limit = total(e_terms) + 4 * math.sqrt(a.shape[1]) * total(terms)
    return Expected(terms.sum(axis=1), u * limit[:, 0], gradient, u * (R * p + np.abs(gradient)))


def expect(loss: str, output: str, a: NDArray, y: NDArray) -> Expected:
    wide, u = a.astype(WIDER[a.dtype.name]), UNIT_ROUNDOFF[a.dtype.name]
    if loss in ("absolute_error", "huber", "quantile"):
        return expect_residual(loss, output, wide, y, u)
    if loss == "poisson":
        return expect_poisson(wide, y, u)
    if loss == "weighted":
        return expect_weighted(wide, y, u)
    if loss == "squared_error":
        return expect_squared_error(output, wide, y, u)
    return (expect_cross_entropy if loss == "cross_entropy" else expect_binary_cross_entropy)(wide, y, u)


def row_of(loss: str, n: int) -> Loss:
    """The loss, with options of which no two numbers are alike."""
    if loss == "weighted":
        return CrossEntropy(label_smoothing=SMOOTHING, class_weight=class_weight(n))
    return {"huber": Huber(DELTA), "quantile": Quantile(Q)}.get(loss) or LOSSES[loss]


def class_weight(n: int) -> list[float]:
    return [0.5 + j % 7 for j in range(n)]


def run(loss: str, output: str, a: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """ℓ and ∂ℓ/∂a from the library; `a` keeps its order of memory and its values."""
    if (ops := backends.ops_for("auto")).name != "numpy":
        return run_launches(ops, loss, output, a, y)
    buffer, losses = a.copy(order="K"), np.full(len(a), np.nan, a.dtype)
    assert row_of(loss, a.shape[1]).bind(output, buffer, losses, Scratch(buffer), 1.0)(y) is None
    return losses, buffer


def run_launches(ops: Any, loss: str, output: str, a: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """From a backend that gives the mean loss only: ∂ℓ/∂a of the batch as a whole, ℓ of each sample by itself."""

    def launch(a: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
        workspace = ops.workspace(len(a), (1, a.shape[1]), Precision.of(a.dtype))
        da = workspace.output_delta(a)
        return ops.bind_loss(row_of(loss, a.shape[1]), output, a, da, 1.0, workspace)(y, None), da

    a, y = np.ascontiguousarray(a), np.ascontiguousarray(y, None if y.dtype.kind == "i" else a.dtype)
    losses = [launch(a[b : b + 1], y[b : b + 1])[0] for b in range(len(a))]
    mean, da = launch(a, y)
    if np.isfinite(losses).all():
        np.testing.assert_allclose(mean, np.mean(losses, dtype=np.float64), rtol=2.0**-20)
    return np.array(losses, a.dtype), da


def assert_right(loss: str, output: str, a: NDArray, y: NDArray) -> None:
    losses, gradient = run(loss, output, a, y)
    expected = expect(loss, output, a, y)
    tiny = 4 * np.finfo(a.dtype).smallest_subnormal * (1 + np.abs(y).max())  # a ŷ that is subnormal meets ŷ − y
    slack = 1.01  # roundings of roundings
    assert np.all(np.abs(losses - expected.loss) <= slack * expected.loss_limit + tiny)
    assert np.all(np.abs(gradient - expected.gradient) <= slack * expected.gradient_limit + tiny)


def targets(rng: np.random.Generator, loss: str, kind: str, B: int, n: int, dtype: str) -> NDArray:
    """`labels` and `one-hot` rows; `rows` in [0, 1], whose sum is anything; `values` of any sign."""
    if kind == "labels":
        return rng.integers(n, size=B)
    if kind == "one-hot":
        return np.eye(n, dtype=dtype)[rng.integers(n, size=B)]
    if kind == "counts":
        return np.maximum(rng.poisson(2.0, (B, n)) - rng.random((B, n)), 0).astype(dtype)
    return (rng.random((B, n)) if kind == "rows" else 3 * rng.standard_normal((B, n))).astype(dtype)


KINDS = {
    "cross_entropy": ["labels", "one-hot", "rows"],
    "binary_cross_entropy": ["one-hot", "rows"],
    "squared_error": ["one-hot", "values"],
    "absolute_error": ["values"],
    "huber": ["one-hot", "values"],
    "quantile": ["one-hot", "values"],
    "poisson": ["one-hot", "counts"],
    "weighted": ["labels", "rows"],
}
LARGEST = {"poisson": 80.0}
"""Larger pre-activations overflow in float32."""


@pytest.mark.thorough(first=3)
@each_pair
@each_order
@each_dtype
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 1e4])
def test_every_width(loss: str, output: str, size: float, dtype: str, order: str) -> None:
    rng = np.random.default_rng(0)
    for n, B in [*((n, 1 + n % 5) for n in range(1, 41)), (300, 9), (1, 100), (10, 257)]:
        limit = LARGEST.get(loss, 1e4)
        a = np.array(np.clip(size * rng.standard_normal((B, n)), -limit, limit), dtype, order=order)
        for kind in KINDS[loss]:
            assert_right(loss, output, a, targets(rng, loss, kind, B, n, dtype))


@each_pair
@each_dtype
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data(), B=st.integers(1, 6), n=st.integers(1, 6), order=st.sampled_from("CF"))
def test_any_logits(loss: str, output: str, dtype: str, data: st.DataObject, B: int, n: int, order: str) -> None:
    floats = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 1e4, -1e4, 88.0, -88.0, -104.0, 1e-30])
    a = np.reshape(data.draw(st.lists(floats, min_size=B * n, max_size=B * n)), (B, n))
    a = np.clip(a, -LARGEST.get(loss, 1e4), LARGEST.get(loss, 1e4))
    kind = data.draw(st.sampled_from(KINDS[loss]))
    y = targets(np.random.default_rng(data.draw(st.integers(0, 99))), loss, kind, B, n, dtype)
    assert_right(loss, output, np.array(a, dtype, order=order), y)


@pytest.mark.thorough(first=len(PAIRS))
@each_pair
def test_gradient_is_the_limit_of_difference_quotients(loss: str, output: str) -> None:
    """Independent of the Jacobians above: the loss itself, in float64, one pre-activation after the other."""
    rng, step = np.random.default_rng(3), 1e-5
    a = rng.standard_normal((20, 4))
    for kind in KINDS[loss]:
        y = targets(rng, loss, kind, 20, 4, "float64")
        _, gradient = run(loss, output, a, y)
        for j in range(4):
            shift = step * np.eye(4)[j]
            quotient = (run(loss, output, a + shift, y)[0] - run(loss, output, a - shift, y)[0]) / (2 * step)
            np.testing.assert_allclose(gradient[:, j], quotient, rtol=0, atol=1e-8)


@each_order
@pytest.mark.parametrize("n", [1, 2, 10, 40])
def test_labels_are_one_hot_rows(n: int, order: str) -> None:
    rng = np.random.default_rng(n)
    a = np.array(rng.standard_normal((30, n)) * 4, np.float32, order=order)
    labels = rng.integers(n, size=30)
    by_label = run("cross_entropy", "softmax", a, labels)
    by_row = run("cross_entropy", "softmax", a, np.eye(n, dtype=np.float32)[labels])
    for one, other in zip(by_label, by_row, strict=True):
        np.testing.assert_allclose(one, other, rtol=2.0**-22, atol=2.0**-22)


@each_order
@pytest.mark.parametrize("labelled", [True, False])
def test_the_only_class_is_certain(labelled: bool, order: str) -> None:
    a = np.array([[-1e4], [0.0], [3.0]], np.float32, order=order)
    losses, gradient = run("cross_entropy", "softmax", a, np.array([0, 0, 0]) if labelled else np.ones((3, 1)))
    assert losses.tolist() == [0, 0, 0]
    assert gradient.tolist() == [[0], [0], [0]]


@each_dtype
def test_losses_by_hand(dtype: str) -> None:
    """log n for n equal logits; the distance of far-off logits; log 2 at a sigmoid's 0; ½(3² + 4²)."""

    def loss(name: str, output: str, a: list[float], y: object) -> float:
        return float(run(name, output, np.array([a], dtype), np.asarray(y))[0][0])

    u = UNIT_ROUNDOFF[dtype]
    assert loss("cross_entropy", "softmax", [7.0] * 5, [3]) == pytest.approx(math.log(5), rel=8 * u)
    assert loss("cross_entropy", "softmax", [1e4, -1e4], [0]) == 0
    assert loss("cross_entropy", "softmax", [1e4, -1e4], [1]) == 20_000
    assert loss("cross_entropy", "softmax", [1e4, -1e4], [[0.25, 0.5]]) == 10_000
    assert loss("binary_cross_entropy", "sigmoid", [0.0, 0.0], [[0.0, 0.3]]) == pytest.approx(math.log(4), rel=8 * u)
    assert loss("binary_cross_entropy", "sigmoid", [1e4, -1e4], [[0.0, 1.0]]) == 20_000
    assert loss("squared_error", "identity", [3.0, -2.0], [[0.0, 2.0]]) == 12.5
    assert loss("squared_error", "softmax", [1e4, -1e4], [[0.0, 1.0]]) == 1
    assert loss("squared_error", "tanh", [-1e4], [[1.0]]) == 2
    assert loss("absolute_error", "identity", [3.0, -2.0], [[0.0, 2.0]]) == 7
    assert loss("huber", "identity", [3.0, 0.5], [[0.0, 0.0]]) == 0.75 * (3 - 0.375) + 0.125
    assert loss("quantile", "identity", [5.0, -5.0], [[0.0, 0.0]]) == pytest.approx(5 * (0.2 + 0.8), rel=8 * u)
    assert loss("poisson", "exponential", [0.0, 0.0], [[0.0, 1.0]]) == 1


@each_pair
@each_order
@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.numpy_only
def test_a_bound_loss_runs_again_on_new_values(loss: str, output: str, n: int, order: str) -> None:
    """Nothing is left over from the batch before, nor from the other kind of target."""
    rng = np.random.default_rng(5)
    a, losses = np.empty((6, n), order=order), np.empty(6)
    again = row_of(loss, n).bind(output, a, losses, Scratch(a), 1.0)
    for kind in KINDS[loss] * 2:
        fresh, y = rng.standard_normal((6, n)), targets(rng, loss, kind, 6, n, "float64")
        kept = y.copy()
        a[...] = fresh
        again(y)
        expected = run(loss, output, np.array(fresh, order=order), y)
        np.testing.assert_array_equal(losses, expected[0])
        np.testing.assert_array_equal(a, expected[1])
        np.testing.assert_array_equal(y, kept)


@each_pair
@each_order
def test_a_sample_stands_for_itself(loss: str, output: str, order: str) -> None:
    """NaN in one row leaves the others alone."""
    rng = np.random.default_rng(6)
    a = np.array(rng.standard_normal((5, 3)), order=order)
    a[2, 1] = np.nan
    for kind in KINDS[loss]:
        losses, gradient = run(loss, output, a, targets(rng, loss, kind, 5, 3, "float64"))
        assert np.isnan(losses).tolist() == [False, False, True, False, False]
        assert np.isfinite(gradient[[0, 1, 3, 4]]).all() and np.isnan(gradient[2]).any()


@pytest.mark.parametrize("loss", ["absolute_error", "huber", "quantile"])
@each_dtype
def test_a_residual_of_zero_has_no_gradient(loss: str, dtype: str) -> None:
    a = np.array([[2.5, -1.0, 1e30]], dtype)
    losses, gradient = run(loss, "identity", a, a.copy())
    assert losses.tolist() == [0] and gradient.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("loss", ["absolute_error", "huber", "quantile"])
def test_far_off_predictions_have_a_finite_gradient(loss: str) -> None:
    losses, gradient = run(loss, "identity", np.array([[3e38, -3e38]], np.float32), np.zeros((1, 2), np.float32))
    above, below = {"absolute_error": (1, 1), "huber": (DELTA, DELTA), "quantile": (1 - Q, Q)}[loss]
    np.testing.assert_allclose(gradient, [[above, -below]], rtol=2.0**-23)
    assert losses == pytest.approx(3e38 * (above + below), rel=1e-6) or losses[0] == np.inf


def test_negative_counts_make_the_loss_nan() -> None:
    losses, _ = run("poisson", "exponential", np.zeros((2, 2)), np.array([[1.0, -1.0], [1.0, 0.0]]))
    assert np.isnan(losses).tolist() == [True, False]


@pytest.mark.numpy_only
def test_the_table_pairs_losses_with_outputs() -> None:
    pairs = [(loss, output) for loss, row in LOSSES.items() for output in row.outputs]
    assert sorted([*pairs, ("weighted", "softmax")]) == sorted(PAIRS)
    defaults = {loss: row.default_output for loss, row in LOSSES.items()}
    assert defaults == {
        **{"cross_entropy": "softmax", "binary_cross_entropy": "sigmoid", "squared_error": "identity"},
        **{"absolute_error": "identity", "huber": "identity", "quantile": "identity", "poisson": "exponential"},
    }


INF = math.inf
LIMITS = [
    ("cross_entropy", "softmax", [3e38, -3e38], [1, 0], 0, [0, 0]),
    ("cross_entropy", "softmax", [3e38, -3e38], [0, 1], INF, [1, -1]),
    ("cross_entropy", "softmax", [3e38, -3e38], [0.5, 0], 0, [0, 0]),
    ("cross_entropy", "softmax", [0, -INF], [1, 0], 0, [0, 0]),
    ("cross_entropy", "softmax", [0, -INF], [0, 1], INF, [1, -1]),
    ("weighted", "softmax", [0, -INF, -INF], [1, 0, 0], INF, [1 / 6, -1 / 16, -5 / 48]),
    ("binary_cross_entropy", "sigmoid", [INF, -INF], [1, 0], 0, [0, 0]),
    ("binary_cross_entropy", "sigmoid", [INF, -INF], [0, 0], INF, [1, 0]),
    ("binary_cross_entropy", "sigmoid", [INF, -INF], [1, 1], INF, [0, -1]),
    ("binary_cross_entropy", "sigmoid", [INF, -INF], [0.25, 0.25], INF, [0.75, -0.25]),
    ("squared_error", "identity", [INF, 1], [0, 0], INF, [INF, 1]),
    ("squared_error", "softmax", [0, -INF], [1, 0], 0, [0, 0]),
    ("squared_error", "sigmoid", [INF, -INF], [1, 1], 0.5, [0, 0]),
    ("squared_error", "tanh", [INF, -INF], [1, 1], 2, [0, 0]),
    ("absolute_error", "identity", [INF, -INF], [0, 0], INF, [1, -1]),
    ("huber", "identity", [INF, -INF], [0, 0], INF, [DELTA, -DELTA]),
    ("quantile", "identity", [INF, -INF], [0, 0], INF, [1 - Q, -Q]),
    ("poisson", "exponential", [-INF, -INF], [0, 0], 0, [0, 0]),
    ("poisson", "exponential", [-INF, 0], [1, 1], INF, [-1, 0]),
    ("poisson", "exponential", [INF, 0], [1, 1], INF, [INF, 0]),
    ("poisson", "exponential", [INF, 0], [0, 1], INF, [INF, 0]),
]


@each_order
@pytest.mark.parametrize(("loss", "output", "a", "y", "expected", "gradient"), LIMITS)
def test_the_limits_at_infinity(
    loss: str, output: str, a: list[float], y: list[float], expected: float, gradient: list[float], order: str
) -> None:
    """−∞ · 0 and ∞ − ∞ are NaN; a loss and its gradient are where they tend to. ±3·10³⁸ are 6·10³⁸ apart, too far."""
    rows = np.array([a, a, a], np.float32, order=order)
    losses, found = run(loss, output, rows, np.array([y, y, y], np.float32))
    assert losses.tolist() == [expected] * 3
    np.testing.assert_allclose(found, [gradient] * 3, rtol=1e-6)
