"""The numeric contract of whole networks: each operation against float64 on the operands that it received, as `trace`
shows them; the same numbers from `value_and_grad`; nothing lost in float16; and what `tolerance` lets through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.dtypes import DTYPES, OPERAND
from support.integer_networks import check_integer_network
from support.oracle import (
    FROM_A,
    SLOPE,
    STEEPEST,
    G,
    exponent_roundings,
    loss_gradient,
    outputs,
    rows_of,
    sample_losses,
    steepest,
    to_tf32,
)

import gpuback
from gpuback._backends.numpy.ops import NumpyOps
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import initial_parameters
from gpuback._core.threads import ThreadPool
from gpuback.testing import tolerance

pytestmark = pytest.mark.on_each_backend(layers=True, hopper=True)

STORED = {"bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}
"""The relative and absolute error of one store: subnormal numbers are a fixed step apart."""
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
R = 12
"""Roundings of an elementary function and what little surrounds it."""

# --- networks to try


def made(sizes: Sequence[int], seed: int, options: dict[str, Any]) -> gpuback.MLP:
    """MLP itself refuses one output behind softmax, which can learn nothing; a file may hold such a network."""
    architecture = Architecture.create(sizes, **{name: value for name, value in options.items() if name != "seed"})
    names = (*architecture.activations, architecture.output)
    theta = initial_parameters(architecture.layout, names, options.get("seed", seed))
    return gpuback.MLP._of(architecture, "auto", theta)


class Case:
    """A network with random θ (biases too) and a batch, and how its products read their operands."""

    def __init__(self, dtype: str, sizes: Sequence[int], batch_size: int, seed: int = 0, **options: Any) -> None:
        self.dtype = dtype
        self.net = made(sizes, seed, DTYPES[dtype] | options)
        rng = np.random.default_rng(seed)
        for b in self.net.biases:
            b[...] = 0.3 * rng.standard_normal(b.shape)
        self.x = rng.standard_normal((batch_size, sizes[0]))
        architecture = self.net.architecture
        self.loss, self.output, self.activations = architecture.loss, architecture.output, architecture.activations
        shape = (batch_size, sizes[-1])
        self.y = {
            "cross_entropy": lambda: rng.integers(sizes[-1], size=batch_size),
            "binary_cross_entropy": lambda: rng.random(shape),
            "squared_error": lambda: rng.standard_normal(shape),
        }[self.loss]()
        self.sample_weight = 2 * rng.random(batch_size)
        self.operand = OPERAND[self.net.dtype.name]
        self.total = np.float64 if dtype == "float64" else np.float32
        self.wide = np.longdouble if dtype == "float64" else np.float64
        self.u = 2.0**-53 if dtype == "float64" else 2.0**-24

    def read(self, array: NDArray) -> NDArray:
        """An array as a product reads it, in wider arithmetic."""
        if self.dtype == "tf32":
            return to_tf32(array)
        return array.astype(self.total).astype(self.operand).astype(self.wide)

    def store(self, exact: NDArray, scale: float = 1.0) -> NDArray[Any] | float:
        """How far off storing a number in the operands' dtype may put it."""
        relative, absolute = STORED.get(self.dtype, (0.0, 0.0))
        return relative * np.abs(exact) + absolute / scale


def assert_close(name: str, result: NDArray, exact: NDArray, limit: NDArray | float) -> None:
    assert result.shape == exact.shape, name
    ratio = np.abs(result - exact) / np.maximum(limit, 1e-300)
    assert np.all(ratio <= 1), f"{name} is off by {ratio.max():.3g} times its limit"


def check_trace(case: Case, sample_weight: NDArray | None = None) -> None:
    """Every array of the trace, from those that its operation received."""
    net, trace = case.net, case.net.trace(case.x, case.y, sample_weight=sample_weight)
    wide, u, depth, B = case.wide, case.u, len(case.net.sizes) - 1, len(case.x)
    scale = 2.0 ** math.ceil(math.log2(B)) if case.dtype == "float16" else 1.0
    W = [None, *(case.read(weight) for weight in net.weights)]
    b = [None, *(bias.astype(wide) for bias in net.biases)]
    assert trace.a[0] is trace.da[0] is trace.h[depth] is trace.dh[depth] is trace.dW[0] is trace.db[0] is None
    stored = case.x.astype(case.total).astype(case.operand).astype(case.total)
    np.testing.assert_array_equal(trace.h[0], stored)

    for k in range(1, depth + 1):
        h, n_in = case.read(trace.h[k - 1]), net.sizes[k - 1]
        a, magnitude = h @ W[k].T + b[k], np.abs(h) @ np.abs(W[k]).T + np.abs(b[k])
        limit = tolerance(magnitude, n_in + 1, case.operand)
        assert_close(f"a_{k}", trace.a[k], a, limit + (case.store(a) if k < depth else 0))
        if k < depth:
            # Where g' is computed from a, g reads a as it was stored; elsewhere it reads the sum, which is not kept
            if case.activations[k - 1] in FROM_A:
                a, limit = trace.a[k].astype(wide), 0.0 * limit
            name, exact = case.activations[k - 1], G[case.activations[k - 1]](a)
            few = u * (R + exponent_roundings(name, a)) * np.abs(exact) + np.finfo(case.total).smallest_subnormal
            assert_close(f"h_{k}", trace.h[k], exact, steepest(name, a) * limit + few + case.store(exact))
            for kept in [trace.h[k], trace.a[k]] if case.activations[k - 1] in FROM_A else [trace.h[k]]:
                np.testing.assert_array_equal(kept, kept.astype(case.operand).astype(case.total))

    a_L = trace.a[depth].astype(wide)
    y, weight = rows_of(case.y, a_L), np.ones(B) if sample_weight is None else sample_weight
    weight = weight.astype(case.total).astype(wide)
    y = y.astype(case.total).astype(wide)
    # What follows passes through a handful of roundings of numbers up to |a|, |ŷ| and |y|; test_losses.py is finer
    size = 1 + np.abs(a_L).max(axis=1) + np.abs(y).max(axis=1) + 4 * math.sqrt(net.sizes[-1])
    exact = outputs(case.output, a_L)
    assert_close("ŷ", trace.output, exact, u * (R + size[:, None]) * np.abs(exact))
    losses = sample_losses(case.loss, case.output, a_L, y)
    summed = losses + (1 if case.output == "softmax" else (1 + np.abs(a_L)).sum(axis=1))
    limit = u * np.mean(weight * (R + 4 * size) * summed)
    assert_close("loss", np.array(trace.loss), np.array(np.mean(weight * losses)), limit)
    exact = loss_gradient(case.loss, case.output, a_L, y) * weight[:, None] / B
    residual = np.abs(outputs(case.output, a_L) - y).max(axis=1)
    limit = u * ((R + 4 * size) * residual + R + 4 * math.sqrt(net.sizes[-1])) * weight / B
    assert_close("da_L", trace.da[depth], exact, limit[:, None] + case.store(exact, scale))

    for k in range(depth, 0, -1):
        # db multiplies nothing, so that it reads da as it stands also where products read TF32
        da, h, terms = case.read(trace.da[k] * scale) / scale, case.read(trace.h[k - 1]), trace.da[k].astype(wide)
        limit = tolerance(np.abs(da).T @ np.abs(h), B, case.operand)
        assert_close(f"dW_{k}", trace.dW[k], da.T @ h, limit)
        limit = tolerance(np.abs(terms).sum(axis=0), B, case.operand)
        assert_close(f"db_{k}", trace.db[k], terms.sum(axis=0), limit)
        dh, magnitude = da @ W[k], np.abs(da) @ np.abs(W[k])
        limit = tolerance(magnitude, net.sizes[k], case.operand)
        assert_close(f"dh_{k - 1}", trace.dh[k - 1], dh, limit)
        if k > 1:
            name = case.activations[k - 2]
            slope = SLOPE[name]((trace.a if name in FROM_A else trace.h)[k - 1].astype(wide))
            few = u * (100 if name in FROM_A else 8) * magnitude  # gelu and silu round 1 − s, and multiply it up
            few = few * np.maximum(np.abs(slope), 1)
            exact, few = dh * slope, 0 if name == "identity" else few
            limit = limit * np.abs(slope) + few + case.store(exact, scale)
            assert_close(f"da_{k - 1}", trace.da[k - 1], exact, limit)


NETWORKS: dict[str, tuple[Sequence[int], int, dict[str, Any]]] = {
    "classifier": ([7, 9, 5], 33, {}),
    "one layer": ([6, 4], 21, {"loss": "binary_cross_entropy"}),
    "regression": ([3, 11, 6, 2], 50, {"loss": "squared_error", "activation": ["tanh", "gelu"]}),
    "squared softmax": ([5, 8, 4], 16, {"loss": "squared_error", "output": "softmax", "activation": "silu"}),
    "squared sigmoid": ([5, 8, 4], 17, {"loss": "squared_error", "output": "sigmoid", "activation": "elu"}),
    "squared tanh": ([5, 8, 40], 18, {"loss": "squared_error", "output": "tanh", "activation": "leaky_relu"}),
    "four layers": ([9, 12, 7, 10, 3], 65, {"activation": ["softplus", "sigmoid", "identity"]}),
    "four more": ([2, 33, 35, 34, 36], 40, {"activation": ["gelu", "relu", "silu"]}),
    "wide": ([130, 257, 129], 64, {"activation": "gelu"}),
    "large batch": ([4, 6, 3], 5000, {"activation": "tanh"}),
    "one sample": ([5, 6, 4], 1, {}),
}


@each_dtype
@pytest.mark.parametrize("network", NETWORKS)
def test_each_operation_of_a_network(network: str, dtype: str) -> None:
    sizes, batch_size, options = NETWORKS[network]
    if dtype == "float64" and network == "wide":
        sizes = [33, 65, 40]  # long double has no BLAS
    case = Case(dtype, sizes, batch_size, **options)
    check_trace(case)
    check_trace(case, case.sample_weight)


@each_dtype
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_each_operation_of_any_network(dtype: str, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=5))
    loss, output = data.draw(
        st.sampled_from(
            [
                ("cross_entropy", "softmax"),
                ("binary_cross_entropy", "sigmoid"),
                *(("squared_error", name) for name in ("identity", "softmax", "sigmoid", "tanh")),
            ]
        )
    )
    tame = sorted(set(G) - {"exponential"})  # of an exponential it soon overflows
    names = data.draw(st.lists(st.sampled_from(tame), min_size=len(sizes) - 2, max_size=len(sizes) - 2))
    if names and data.draw(st.booleans()):
        names[0] = "exponential"
    batch_size, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 2**32 - 1))
    check_trace(Case(dtype, sizes, batch_size, seed, activation=names, loss=loss, output=output))


# --- value_and_grad, forward and loss against the trace


@pytest.mark.numpy_only
def test_blocks_of_rows_are_what_the_next_tests_think(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks ask their backend for the size of a block, and work on one block after the other."""
    asked = []

    def plan_blocks(
        self: NumpyOps, sizes: tuple[int, ...], batch_size: int, precision: object, **options: bool
    ) -> tuple[int, ThreadPool]:
        asked.append(batch_size)
        return 7, ThreadPool(1, blas_alone=False)

    monkeypatch.setattr(NumpyOps, "plan_blocks", plan_blocks)
    gpuback.MLP([2, 3, 2], seed=0).value_and_grad(np.ones((20, 2)), np.zeros(20, int))
    assert asked == [20]


@pytest.fixture(params=["its own blocks", "blocks of 7 rows"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "its own blocks":
        alone = ThreadPool(1, blas_alone=False)
        monkeypatch.setattr(
            NumpyOps, "plan_blocks", lambda self, sizes, batch_size, precision, **_: (min(7, batch_size), alone)
        )


INTEGER_NETWORKS = [([3, 1], 32), ([4, 3, 2], 64), ([5, 7, 6, 4], 32), ([2, 9, 8, 9, 35], 16), ([1, 1, 1], 1)]


@each_dtype
@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("sizes", "batch_size"), INTEGER_NETWORKS)
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_networks_of_small_integers_are_exact(activation: str, sizes: list[int], batch_size: int, dtype: str) -> None:
    check_integer_network(activation, sizes, batch_size, dtype)


@pytest.mark.thorough(first=1)
@each_dtype
@pytest.mark.parametrize("batch_size", [2048, pytest.param(32_768, marks=pytest.mark.numpy_only)])
def test_a_large_batch_of_small_integers_is_exact(batch_size: int, dtype: str) -> None:
    """So much that it is worked on in several blocks, and by several threads where a backend has them."""
    check_integer_network("relu", [16, 48, 8], batch_size, dtype)


def magnitudes(case: Case) -> list[NDArray[np.float64]]:
    """Back-propagation of absolute values, for each array of the gradients: what roundings are measured against."""
    trace, depth = case.net.trace(case.x, case.y), len(case.net.sizes) - 1
    da = (np.abs(trace.output) + np.abs(rows_of(case.y, trace.output.astype(float)))) / len(case.x)
    parts: list[NDArray[np.float64]] = []
    for k in range(depth, 0, -1):
        parts = [da.T @ np.abs(trace.h[k - 1]), da.sum(axis=0), *parts]
        da = da @ np.abs(case.net.weights[k - 1]) * STEEPEST
    return [*parts, da]


@each_dtype
@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("network", [name for name in NETWORKS if name not in ("wide", "large batch")])
def test_value_and_grad_agrees_with_the_trace(network: str, dtype: str) -> None:
    """Rounded anew in each layer and direction: 2L times what a store or a sum may be off, in Euclidean norm."""
    sizes, batch_size, options = NETWORKS[network]
    case = Case(dtype, sizes, batch_size, **options)
    trace = case.net.trace(case.x, case.y)
    value, gradients = case.net.value_and_grad(case.x, case.y, need_input_grad=True)
    store = STORED.get(case.dtype, (2.0**-11 if dtype == "tf32" else 0.0,))[0]
    sums = tolerance(1.0, max(*sizes, batch_size), case.operand)
    limit = 2 * (len(sizes) - 1) * (store + float(sums))

    traced = [part for pair in zip(trace.dW[1:], trace.db[1:], strict=True) for part in pair] + [trace.dh[0]]
    own = [part for pair in zip(gradients.weights, gradients.biases, strict=True) for part in pair]
    for mine, shown, magnitude in zip([*own, gradients.inputs], traced, magnitudes(case), strict=True):
        assert np.linalg.norm(mine - shown) <= limit * np.linalg.norm(magnitude)
    size = np.abs(trace.a[-1]).max() + 1
    np.testing.assert_allclose(case.net.forward(case.x), trace.output, rtol=0, atol=limit * size)
    np.testing.assert_allclose(value, trace.loss, rtol=limit * size * 4)
    np.testing.assert_allclose(case.net.loss(case.x, case.y), trace.loss, rtol=limit * size * 4)


@pytest.mark.thorough
@pytest.mark.numpy_only
def test_a_batch_of_many_blocks_by_its_natural_size() -> None:
    """36 865 rows of a narrow network are several blocks."""
    case = Case("float32", [16, 40, 8], 36_865, activation="tanh")
    exact = gpuback.MLP([16, 40, 8], activation="tanh", dtype="float64")
    exact.theta[...] = case.net.theta
    trace = exact.trace(case.x, case.y)
    value, gradients = case.net.value_and_grad(case.x, case.y)
    limit = 4 * float(tolerance(1.0, 36_865, "float32"))
    own = [part for pair in zip(gradients.weights, gradients.biases, strict=True) for part in pair]
    traced = [part for pair in zip(trace.dW[1:], trace.db[1:], strict=True) for part in pair]
    for mine, shown, magnitude in zip(own, traced, magnitudes(case)[:-1], strict=True):
        assert np.all(np.abs(mine - shown) <= limit * magnitude)
    assert value == pytest.approx(trace.loss, rel=1e-6)


# --- float16


LARGE = [pytest.param(size, marks=pytest.mark.numpy_only) for size in (65_535, 65_536, 65_537)]


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("batch_size", [8191, *LARGE])
def test_float16_loses_nothing_in_a_large_batch(batch_size: int) -> None:
    """A sample's da_L is some 1e-3/65536 here, below half of float16's smallest step of 6e-8: unscaled, it were 0."""
    rng = np.random.default_rng(0)
    net = gpuback.MLP([3, 4, 2], activation="tanh", loss="squared_error", dtype="float16", seed=1)
    x = rng.standard_normal((batch_size, 3)).astype(np.float16)
    residual = 1e-3 * (1 + rng.random((batch_size, 2)))
    y = net.forward(x) - residual
    trace, (_, gradients) = net.trace(x, y), net.value_and_grad(x, y)

    h, W_2 = trace.h[1].astype(float), net.weights[1].astype(np.float16).astype(float)
    da_2 = residual / batch_size
    da_1 = (da_2 @ W_2) * (1 - h**2)
    for k, exact in ((1, da_1), (2, da_2)):
        assert np.linalg.norm(trace.da[k] - exact) <= 2.0**-10 * np.linalg.norm(exact)
        assert np.count_nonzero(trace.da[k]) >= 0.9999 * np.count_nonzero(exact)
    expected = [da_1.T @ x.astype(float), da_2.T @ h, da_1.sum(axis=0), da_2.sum(axis=0)]
    for mine, exact in zip([*gradients.weights, *gradients.biases], expected, strict=True):
        assert np.linalg.norm(mine - exact) <= 2.0**-10 * np.linalg.norm(exact)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 9, 1000, 1025])
def test_float16_gives_its_factor_back(batch_size: int) -> None:
    """B copies of one sample have the gradient of that sample, whatever power of two went through the pass."""
    net = gpuback.MLP([1, 1], loss="squared_error", dtype="float16")
    net.theta[...] = [2.0, 0.5]
    value, gradients = net.value_and_grad(
        np.full((batch_size, 1), 3.0), np.full((batch_size, 1), 4.0), need_input_grad=True
    )
    assert value == 2.5**2 / 2
    np.testing.assert_allclose(gradients.theta, [7.5, 2.5], rtol=2.0**-10)
    np.testing.assert_allclose(gradients.inputs, np.full((batch_size, 1), 5.0 / batch_size), rtol=2.0**-10)
    trace = net.trace(np.full((batch_size, 1), 3.0), np.full((batch_size, 1), 4.0))
    np.testing.assert_allclose(trace.da[1], np.full((batch_size, 1), 2.5 / batch_size), rtol=2.0**-10)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_pre_activation_beyond_float16_has_a_slope_of_zero(activation: str) -> None:
    """a = −300·300 is kept as −∞ for the backward pass: h, g' and with them the first layer's gradient are 0."""
    net = gpuback.MLP([1, 1, 1], activation=activation, loss="squared_error", dtype="float16")
    net.theta[...] = [-300.0, 0.0, 2.0, 1.0]
    value, gradients = net.value_and_grad([[300.0]], [[0.0]], need_input_grad=True)
    assert value == 0.5
    assert gradients.theta.tolist() == [0, 0, 0, 1]
    assert gradients.inputs.tolist() == [[0]]


# --- the tolerance itself


@each_dtype
@pytest.mark.parametrize("any_data", [False, True])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("terms", [1, 2, 7, 100, 10_000])
def test_tolerance_is_the_contracts_formula(terms: int, stored: bool, any_data: bool, dtype: str) -> None:
    """4 u √K (|A||B|) + u_out |C|; 2 K u (|A||B|) for any data; 2⁻¹¹ on each operand of a TF32 product."""
    magnitude, exact = np.array([[1.0, 3.0], [0.25, 1e6]]), np.array([[-1.0, 2.0], [0.0, 1e6]])
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    expected = magnitude * u * (2 * terms if any_data else 4 * math.sqrt(terms))
    if dtype == "tf32":
        expected = expected + magnitude * ((1 + 2.0**-11) ** 2 - 1)
    if stored:
        relative, absolute = STORED.get(dtype, (0.0, 0.0))
        expected = expected + relative * np.abs(exact) + absolute
    options = {"allow_tf32": True} if dtype == "tf32" else {}
    limit = tolerance(
        magnitude, terms, DTYPES[dtype]["dtype"], exact=exact, stored=stored, any_data=any_data, **options
    )
    assert limit.shape == magnitude.shape
    np.testing.assert_allclose(limit, expected, rtol=1e-12)


@each_dtype
@pytest.mark.parametrize("kind", ["mixed", "positive"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (6, 40, 5), (32, 64, 32), (8, 100, 9)])
def test_tolerance_rejects_zeros_and_what_was_left_out(shape: tuple[int, int, int], kind: str, dtype: str) -> None:
    """C = A B for A (M, K), B (K, N). A result with a term, row or column left out, or transposed, does not pass."""
    M, K, N = shape
    rng, name = np.random.default_rng(0), DTYPES[dtype]["dtype"]
    draw = rng.standard_normal if kind == "mixed" else rng.random
    A, B = (draw(shape).astype(OPERAND[name]).astype(float) for shape in ((M, K), (K, N)))
    exact, magnitude = A @ B, np.abs(A) @ np.abs(B)
    for stored in (False, True):
        limit = tolerance(magnitude, K, name, exact=exact, stored=stored, allow_tf32=dtype == "tf32")
        passes = lambda result, limit=limit: np.all(np.abs(result - exact) <= limit)  # noqa: E731
        assert passes(exact) and passes(exact.astype(np.float32 if dtype != "float64" else np.float64))
        assert not passes(np.zeros_like(exact))
        assert not passes(-exact)
        for k in (0, K // 2, K - 1):
            assert not passes(exact - np.outer(A[:, k], B[k])), "a term of every sum left out"
        for missing in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
            result = exact.copy()
            result[missing] = 0
            assert not passes(result), "a row or column left out"
        if K > 1:
            assert not passes(A @ np.roll(B, 1, axis=0)), "rows out of step"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("terms", [1, 100, 10_000, 10**6, 10**8])
def test_tolerance_of_a_long_sum_is_still_far_below_the_sum(terms: int, dtype: str) -> None:
    assert tolerance(1.0, terms, dtype) < 2.0**-8
    assert tolerance(1.0, terms, "float64") < 2.0**-37


# --- strange but legal


@each_dtype
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "squared_error"])
@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1, 1], [3, 1], [1, 5, 1]])
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_one_of_everything(batch_size: int, sizes: list[int], loss: str, dtype: str) -> None:
    case = Case(dtype, sizes, batch_size, loss=loss, activation="tanh")
    check_trace(case)
    if loss == "cross_entropy":  # the only class is certain
        value, gradients = case.net.value_and_grad(case.x, case.y)
        assert value == 0 and not gradients.theta.any()


@pytest.mark.parametrize("activation", sorted(set(G) - {"exponential"}))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_fifty_layers_of_one_neuron(dtype: str, activation: str) -> None:
    """Against the chain rule in Python floats, one number after the other."""
    net = gpuback.MLP([1] * 51, activation=activation, loss="squared_error", dtype=dtype)
    W, b = (np.tile(pattern, 25) for pattern in ([1.25, 0.75], [0.25, -0.125]))
    net.theta[...] = np.column_stack([W, b]).ravel()
    x, y = 0.75, 0.5
    h, a = [x], []
    for k in range(50):
        a.append(np.array(W[k] * h[-1] + b[k]))
        h.append(float(G[activation](a[-1])) if k < 49 else float(a[-1]))
    da, expected = h[-1] - y, np.empty((50, 2))
    for k in range(49, -1, -1):
        expected[k] = da * h[k], da
        slope = float(SLOPE[activation](a[k - 1] if activation in FROM_A else np.array(h[k]))) if k else 1
        da *= W[k] * slope
    value, gradients = net.value_and_grad([[x]], [y], need_input_grad=True)
    rtol = 1e-12 if dtype == "float64" else 5e-4
    assert value == pytest.approx((h[-1] - y) ** 2 / 2, rel=rtol)
    np.testing.assert_allclose(gradients.theta, expected.ravel(), rtol=rtol, atol=0)
    np.testing.assert_allclose(gradients.inputs, [[da]], rtol=rtol, atol=0)


@each_dtype
def test_three_hundred_classes(dtype: str) -> None:
    check_trace(Case(dtype, [5, 300], 20))
    check_trace(Case(dtype, [5, 300], 20, loss="binary_cross_entropy"))


@pytest.mark.parametrize(
    "kind", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "bool", "list", "tuple"]
)
def test_labels_of_any_integer_kind(kind: str) -> None:
    net = gpuback.MLP([3, 4, 2], seed=0)
    x, labels = np.random.default_rng(0).standard_normal((6, 3)), [0, 1, 1, 0, 1, 0]
    y = {"list": list, "tuple": tuple}.get(kind, lambda labels: np.array(labels, kind))(labels)
    value, gradients = net.value_and_grad(x, y)
    expected, wanted = net.value_and_grad(x, np.eye(2)[labels])
    assert value == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(gradients.theta, wanted.theta, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("loss", ["squared_error", "binary_cross_entropy"])
def test_targets_of_one_output_as_a_vector_or_a_column(loss: str, dtype: str) -> None:
    net = gpuback.MLP([3, 4, 1], loss=loss, dtype=dtype, seed=0)
    x, y = np.random.default_rng(0).standard_normal((6, 3)), np.linspace(0, 1, 6)
    results = [net.value_and_grad(x, targets) for targets in (y, y[:, None], y.tolist(), y[:, None].tolist())]
    for value, gradients in results:
        assert value == results[0][0]
        assert np.array_equal(gradients.theta, results[0][1].theta)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_what_is_not_finite_reaches_the_gradients(dtype: str) -> None:
    net = gpuback.MLP([2, 3, 2], activation="tanh", dtype=dtype, seed=0)
    value, gradients = net.value_and_grad([[1.0, np.nan], [0.0, 1.0]], [0, 1])
    assert np.isnan(value) and np.isnan(gradients.theta).all()


INF = np.inf


@pytest.mark.parametrize(
    ("loss", "a", "y", "expected", "db"),
    [
        ("cross_entropy", [3e38, -3e38], [1, 0], 0, [0, 0]),
        ("cross_entropy", [3e38, -3e38], [0, 1], INF, [1, -1]),  # 6·10³⁸
        ("cross_entropy", [0, -INF], [1, 0], 0, [0, 0]),
        ("cross_entropy", [0, -INF], [0, 1], INF, [1, -1]),
        (gpuback.losses.CrossEntropy(class_weight=[2, 4]), [0, -INF], [1, 0], 0, [0, 0]),
        (gpuback.losses.CrossEntropy(class_weight=[2, 0]), [0, -INF], 1, 0, [0, 0]),
        ("binary_cross_entropy", [INF, -INF], [1, 0], 0, [0, 0]),
        ("binary_cross_entropy", [INF, -INF], [0, 1], INF, [1, -1]),
        ("binary_cross_entropy", [INF, -INF], [0.25, 0.25], INF, [0.75, -0.25]),
        ("poisson", [INF, 0], [1, 1], INF, [INF, 0]),
        ("poisson", [-INF, 0], [0, 1], 0, [0, 0]),
    ],
)
@pytest.mark.parametrize("reproducible", [False, True])
def test_losses_have_their_limits_at_infinity(
    loss: Any, a: list[float], y: Any, expected: Any, db: Any, reproducible: bool
) -> None:
    """Where the formulas say ∞ − ∞ or 0 · ∞. In the reproducible mode sums of what is infinite are NaN."""
    net = gpuback.MLP([1, 2], loss=loss, reproducible=reproducible, seed=0)
    net.theta[...] = net.ops.asarray([0, 0, *a], net.theta.dtype, "theta")
    value, gradients = net.value_and_grad([[1.0]] * 4, [y] * 4)
    for found, exact in ((value, expected), (gradients.biases[0], db)):
        found, exact = net.ops.to_numpy(found), np.asarray(exact)
        either = reproducible & np.isinf(exact) & ~np.isfinite(found)
        np.testing.assert_array_equal(np.where(either, exact, found), exact)
