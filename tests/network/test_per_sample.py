"""Each sample's gradient: norms, clipped means, all of them; against float64, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import gpuback._backends.numpy.ops
from gpuback import MLP
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.precision import UNIT_ROUNDOFF, Precision
from gpuback.errors import DtypeError, LabelError, OptionError, ShapeError
from gpuback.testing import random_batch, tolerance

pytestmark = pytest.mark.on_each_backend(hopper=True)

DTYPES: dict[str, dict[str, Any]] = {
    "float64": {"dtype": "float64"},
    "float32": {"dtype": "float32"},
    "tf32": {"dtype": "float32", "allow_tf32": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}
DIGITS = {"float64": 1e-13, "float32": 5e-6, "tf32": 4e-3, "bfloat16": 4e-2, "float16": 4e-3}
"""Of a whole network's gradient, beside its norm: a handful of roundings of each operand."""

LOSSES = [
    ("cross_entropy", "softmax"),
    ("binary_cross_entropy", "sigmoid"),
    ("squared_error", "identity"),
    ("squared_error", "softmax"),
    ("squared_error", "sigmoid"),
    ("squared_error", "tanh"),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def exact_gradients(net: MLP, x: Any, y: Any, weight: Any = None) -> NDArray[np.float64]:
    """∂(w_b ℓ_b)/∂θ, (B, n_parameters): float64, one sample after the other."""
    architecture = net.architecture
    exact = MLP(
        net.sizes,
        activation=architecture.activations,
        output=architecture.output,
        loss=architecture.loss,
        dtype="float64",
        backend="numpy",
    )
    exact.theta = net.ops.to_numpy(net.theta)
    rows = [slice(b, b + 1) for b in range(len(x))]
    return np.stack(
        [exact.value_and_grad(x[b], y[b], sample_weight=None if weight is None else weight[b])[1].theta for b in rows]
    )


def as_seen(net: MLP, x: Any, y: Any) -> tuple[Any, Any]:
    """Samples and targets rounded to θ's dtype, as the network takes them."""
    return x.astype(net.theta.dtype), y if y.dtype.kind == "i" else y.astype(net.theta.dtype)


def host(net: MLP, array: Any) -> NDArray[np.float64]:
    return net.ops.to_numpy(array).astype(np.float64)


def check(net: MLP, x: Any, y: Any, weight: Any, dtype: str) -> None:
    """All three against the float64 oracle, and the norms against the gradients that they are norms of."""
    x, y = as_seen(net, x, y)
    expected = exact_gradients(net, x, y, weight)
    norms = np.linalg.norm(expected, axis=1)

    each = net.per_sample_grad(x, y, sample_weight=weight)
    assert each.theta.shape == expected.shape
    assert each.theta.dtype == net.theta.dtype
    error = np.linalg.norm(host(net, each.theta) - expected, axis=1)
    assert (error <= DIGITS[dtype] * norms).all()

    found = net.gradient_norms(x, y, sample_weight=weight)
    assert found.shape == (len(x),)
    assert found.dtype == net.theta.dtype
    u = UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"]
    np.testing.assert_allclose(host(net, found), np.linalg.norm(host(net, each.theta), axis=1), rtol=20 * u)

    clip_norm = float(np.median(norms)) or 1.0
    loss, clipped = net.value_and_clipped_grad(x, y, clip_norm, sample_weight=weight)
    check_clipped(net, clipped.theta, host(net, each.theta), clip_norm)
    rtol = 4 * u if not DTYPES[dtype].get("allow_tf32") and dtype in ("float32", "float64") else DIGITS[dtype]
    np.testing.assert_allclose(float(loss), float(net.loss(x, y, sample_weight=weight)), rtol=rtol, atol=u)


def check_clipped(net: MLP, clipped: Any, each: NDArray[np.float64], clip_norm: float) -> None:
    """The mean of what each sample's gradient, as it was computed, has left after clipping."""
    norms = np.linalg.norm(each, axis=1)
    factors = np.minimum(1, np.divide(clip_norm, norms, out=np.ones_like(norms), where=norms > 0))
    terms = factors[:, None] * each / len(each)
    magnitude, name = np.abs(terms).sum(axis=0), net.dtype.name
    bound = tolerance(magnitude, len(each), name, allow_tf32=net.architecture.precision.tf32)
    bound += 4 * UNIT_ROUNDOFF[name] * magnitude  # da is rounded once more where it is scaled
    assert (np.abs(host(net, clipped) - terms.sum(axis=0)) <= bound).all()


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype):
    net = MLP([5, 9, 7, 3], activation=activation, seed=1, **DTYPES[dtype])
    if activation == "exponential":
        net.theta[:] *= 0.5  # so that no prediction comes so near its label that ŷ − y cancels
    x, y = random_batch(net, 11)
    check(net, x, y, None, dtype)


@each_dtype
@pytest.mark.parametrize("loss, output", LOSSES)
def test_every_loss_with_weights(loss, output, dtype):
    net = MLP([4, 8, 3], activation="tanh", loss=loss, output=output, seed=2, **DTYPES[dtype])
    x, y = random_batch(net, 13)
    check(net, x, y, np.random.default_rng(0).uniform(-1, 3, 13).astype(np.float32), dtype)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    rows=st.integers(1, 70),
    dtype=st.sampled_from(["float64", "float32"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(sizes, rows, dtype, seed):
    net = MLP(sizes, activation="silu", loss="squared_error", dtype=dtype, seed=seed)
    x, y = random_batch(net, rows, seed)
    # far from the outputs, so that nothing cancels
    check(net, x, y + 8, np.random.default_rng(seed).uniform(0.5, 2, rows), dtype)


@each_dtype
def test_wide_layers_go_tile_by_tile(dtype):
    net = MLP([37, 150, 133, 5], activation=["gelu", "tanh"], seed=3, **DTYPES[dtype])
    check(net, *random_batch(net, 19), None, dtype)


@pytest.mark.numpy_only
@each_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_several_blocks_and_threads(threads, dtype, monkeypatch):
    monkeypatch.setattr(gpuback._backends.numpy.plans, "BLOCK_BYTES", 300 * 8 * 21)
    monkeypatch.setattr(gpuback._backends.numpy.plans, "WORTH_THREADS", 0 if threads > 1 else math.inf)
    monkeypatch.setattr(gpuback._backends.numpy.plans, "blas_threads", lambda: threads)
    net = MLP([7, 9, 5], activation="gelu", seed=3, **DTYPES[dtype])
    check(net, *random_batch(net, 1901), None, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reproducible_bits(dtype):
    """The same on every backend; a sample's gradient is that of a batch of it alone."""
    options = {"activation": ["gelu", "elu"], "dtype": dtype, "reproducible": True, "seed": 4}
    net, twin = (MLP([70, 33, 40, 3], **options, backend=name) for name in ("auto", "numpy"))
    x, y = random_batch(net, 9)
    x[3] = 0
    weight = np.linspace(0, 2, 9)
    for net_result, twin_result in (
        (net.gradient_norms(x, y, sample_weight=weight), twin.gradient_norms(x, y, sample_weight=weight)),
        (net.per_sample_grad(x, y, sample_weight=weight).theta, twin.per_sample_grad(x, y, sample_weight=weight).theta),
        (
            net.value_and_clipped_grad(x, y, 0.7, sample_weight=weight)[1].theta,
            twin.value_and_clipped_grad(x, y, 0.7, sample_weight=weight)[1].theta,
        ),
    ):
        assert net.ops.to_numpy(net_result).tobytes() == twin_result.tobytes()
    each = net.ops.to_numpy(net.per_sample_grad(x, y).theta)
    for b in range(9):
        alone = net.ops.to_numpy(net.value_and_grad(x[b : b + 1], y[b : b + 1])[1].theta)
        assert each[b].tobytes() == alone.tobytes()
    check(net, x, y, None, dtype)


# --- Norms of rows far out


def add_norms(da: NDArray, h: NDArray, dtype: str) -> NDArray:
    """√(‖da_b‖² (‖h_b‖² + 1)) by the backend's operation, twice: as the first layer's, and added to itself."""
    ops = MLP([2, 2]).ops
    workspace = ops.workspace(len(da), (h.shape[1], da.shape[1]), Precision.of(dtype))
    operands = workspace.hidden(da.shape[1]), workspace.hidden(h.shape[1])
    for operand, values in zip(operands, (da, h), strict=True):
        operand[...] = values
    norms = ops.empty(len(da), np.dtype(np.float64))
    out = ops.empty(len(da), np.dtype(dtype))
    add = ops.bind_add_norms(operands[0], norms, workspace)
    with ops.scope():
        add(operands[1], True, None)
        add(operands[1], False, out)
    np.testing.assert_array_equal(out, norms.astype(dtype))
    return norms / math.sqrt(2)


def exact_norms(da: NDArray, h: NDArray) -> NDArray:
    return np.array([math.hypot(*a) * math.hypot(*b, 1) for a, b in zip(da.tolist(), h.tolist(), strict=True)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_out, n_in", [(1, 1), (3, 31), (33, 2100)])
def test_norms_far_out(n_out, n_in, dtype):
    rng, info = np.random.default_rng(0), np.finfo(dtype)
    powers = np.array([float(info.smallest_subnormal) * 8, float(info.tiny), 1e-6, 1, float(info.max) ** 0.45])
    da = (rng.standard_normal((25, n_out)) * np.repeat(powers, 5)[:, None]).astype(dtype)
    h = (rng.standard_normal((25, n_in)) * np.tile(powers, 5)[:, None]).astype(dtype)
    da[7] = 0
    found, expected = add_norms(da, h, dtype), exact_norms(da.astype(np.float64), h.astype(np.float64))
    smallest = float(np.finfo(np.float64).smallest_subnormal)
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=2 * smallest)
    assert found[7] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_of_integers_are_exact(dtype):
    rng = np.random.default_rng(0)
    da, h = np.zeros((40, 35)), np.zeros((40, 61))
    da[:, :2] = [3, 4]
    h[:, [0, 60]] = [[2, 2]]  # 2² + 2² + 1 = 3²
    found = add_norms(rng.permuted(da, axis=1), rng.permuted(h, axis=1), dtype)
    np.testing.assert_allclose(found, 15, rtol=4e-16)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_flows_into_its_own_norm_only(wrong, dtype):
    rng = np.random.default_rng(0)
    da, h = rng.standard_normal((6, 40)), rng.standard_normal((6, 50))
    da[1, 33], h[4, 2] = wrong, wrong
    found = add_norms(da, h, dtype)
    assert np.isfinite(found).tolist() == [True, False, True, True, False, True]


# --- What callers see


@each_dtype
def test_a_sample_that_is_not_finite(dtype):
    net = MLP([4, 6, 3], activation="tanh", seed=0, **DTYPES[dtype])
    x, y = random_batch(net, 5)
    x[2, 1] = math.nan
    assert np.isnan(host(net, net.gradient_norms(x, y))).tolist() == [False, False, True, False, False]
    assert np.isnan(host(net, net.value_and_clipped_grad(x, y, 1.0)[1].theta)).any()
    each = host(net, net.per_sample_grad(x, y).theta)
    assert np.isnan(each[2]).any()
    assert np.isfinite(np.delete(each, 2, axis=0)).all()


def test_an_infinite_gradient_is_not_clipped_away():
    """A norm that is infinite has no factor: 0 would hide it."""
    net = MLP([2, 3, 1], activation="identity", loss="squared_error", seed=0, dtype="float32")
    x, y = np.ones((3, 2)), np.zeros((3, 1))
    x[1] = 3e38
    assert not np.isfinite(host(net, net.gradient_norms(x, y)))[1]
    assert np.isnan(host(net, net.value_and_clipped_grad(x, y, 1.0)[1].theta)).any()


@each_dtype
def test_no_clipping_is_value_and_grad(dtype):
    net = MLP([4, 6, 3], activation="tanh", seed=0, **DTYPES[dtype])
    x, y = random_batch(net, 5)
    loss, expected = net.value_and_grad(x, y)
    clipped_loss, clipped = net.value_and_clipped_grad(x, y, math.inf)
    assert host(net, clipped.theta).tobytes() == host(net, expected.theta).tobytes()
    assert float(loss) == float(clipped_loss)


@each_dtype
@pytest.mark.parametrize("max_norm", [1e-20, 1e-6, 1e-3, 1e3, 1e20])
def test_however_much_is_clipped_no_digits_are_lost(max_norm, dtype):
    net = MLP([4, 16, 3], activation="tanh", seed=0, **DTYPES[dtype])
    x, y = random_batch(net, 50)
    each = host(net, net.per_sample_grad(x, y).theta)
    check_clipped(net, net.value_and_clipped_grad(x, y, max_norm)[1].theta, each, max_norm)


def test_a_sample_without_gradient_is_left_alone():
    net = MLP([4, 6, 3], activation="tanh", seed=0)
    x, y = random_batch(net, 5)
    weight = np.array([1.0, 0.0, 2.0, 1.0, 0.0])
    norms = host(net, net.gradient_norms(x, y, sample_weight=weight))
    assert (norms == 0).tolist() == (weight == 0).tolist()
    _, clipped = net.value_and_clipped_grad(x, y, 1e-3, sample_weight=weight)
    # each of three samples of five is shortened to 0.001 beside a mean over all five
    assert 0 < np.linalg.norm(host(net, clipped.theta)) <= 3 * 1e-3 / 5 * (1 + 1e-5)


def test_gradients_are_those_of_the_samples_own_losses():
    """By hand: one unit without activation, ½ (w x − y)², at w = 2: g = (2x − y) (x, 1)."""
    net = MLP([1, 1], loss="squared_error", dtype="float64")
    net.theta[...] = [2.0, 0.0]
    x, y = np.array([[1.0], [3.0]]), np.array([[1.0], [0.0]])
    each = net.per_sample_grad(x, y)
    assert host(net, each.weights[0]).tolist() == [[[1.0]], [[18.0]]]
    assert host(net, each.biases[0]).tolist() == [[1.0], [6.0]]
    np.testing.assert_allclose(host(net, net.gradient_norms(x, y)), [math.sqrt(2), 6 * math.sqrt(10)], rtol=1e-15)
    loss, clipped = net.value_and_clipped_grad(x, y, 3.0)
    assert float(loss) == (0.5 + 18) / 2  # of the samples as they are
    half = np.array([1.0, 1.0]) / 2 + np.array([3.0, 1.0]) / math.sqrt(10) * 3 / 2
    np.testing.assert_allclose(host(net, clipped.theta), half, rtol=1e-15)


def test_views_and_given_gradients():
    net = MLP([4, 6, 3], seed=0)
    x, y = random_batch(net, 5)
    each = net.per_sample_grad(x, y)
    assert [part.shape for part in each.weights] == [(5, 6, 4), (5, 3, 6)]
    assert [part.shape for part in each.biases] == [(5, 6), (5, 3)]
    parts = [each.weights[0].reshape(5, -1), each.biases[0], each.weights[1].reshape(5, -1), each.biases[1]]
    np.testing.assert_array_equal(np.hstack([host(net, part) for part in parts]), host(net, each.theta))

    _, out = net.value_and_grad(x, y)
    _, clipped = net.value_and_clipped_grad(x, y, 0.5, out=out)
    assert clipped is out
    fresh = net.value_and_clipped_grad(x, y, 0.5)[1].theta
    assert host(net, fresh).tobytes() == host(net, out.theta).tobytes()


def test_new_weights_count_at_once_and_buffers_are_kept_for_few_batch_sizes():
    net = MLP([4, 6, 3], activation="tanh", seed=0, dtype="bfloat16")
    for rows in (1, 2, 3, 5, 6, 7):
        check(net, *random_batch(net, rows), None, "bfloat16")
        net.theta[...] = net.theta * 0.8
    x, y = random_batch(net, 3)
    before = host(net, net.gradient_norms(x, y))
    net.gradient_norms(x[::-1], y)
    assert host(net, net.gradient_norms(x, y)).tobytes() == before.tobytes()


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan, "1", None, -math.inf])
def test_a_wrong_norm_is_refused(max_norm):
    net = MLP([4, 3], seed=0)
    with pytest.raises(OptionError, match="^max_norm: expected a number > 0"):
        net.value_and_clipped_grad(*random_batch(net, 5), max_norm)


@pytest.mark.parametrize(
    "ask", [MLP.gradient_norms, MLP.per_sample_grad, lambda net, x, y, **w: net.value_and_clipped_grad(x, y, 1.0, **w)]
)
def test_errors_are_those_of_value_and_grad(ask):
    net = MLP([4, 3], seed=0)
    x, y = random_batch(net, 5)
    with pytest.raises(ShapeError, match="^x: expected shape"):
        ask(net, x[:, :3], y)
    with pytest.raises(LabelError, match="^y: expected labels"):
        ask(net, x, y + 3)
    with pytest.raises(DtypeError, match="x"):
        ask(net, x + 1j, y)
    with pytest.raises(ShapeError, match="^sample_weight: expected shape"):
        ask(net, x, y, sample_weight=np.ones(4))
    with pytest.raises(ShapeError, match="^out: expected Gradients"):
        net.value_and_clipped_grad(x, y, 1.0, out=MLP([4, 2]).value_and_grad(x, y % 2)[1])


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize(
    "dtype, size, max_norm",
    [("float32", 1e22, 1.0), ("float32", 1e20, 1.0), ("bfloat16", 1e22, 1.0), ("float64", 1e150, 1e-20)],
)
def test_a_factor_below_the_smallest_number_keeps_its_digits(dtype, size, max_norm, reproducible):
    """With ‖g‖ = 10⁴⁴, max_norm/‖g‖ is subnormal or 0 in θ's dtype. The clipped gradient is neither."""
    if reproducible and dtype == "float64":
        pytest.skip("the reproducible mode has no float64")
    x, y = np.array([[1.0, 2.0], [3.0, -1.0]]) * size, [0.0, 0.0]

    def network(dtype, **options):
        net = gpuback.MLP([2, 2, 1], activation="identity", loss="squared_error", dtype=dtype, seed=0, **options)
        net.theta[...] = net.ops.asarray([1, 2, -1, 1, 0, 0, 1, 1, 0], net.theta.dtype, "theta")
        return net

    own = network("float64", backend="numpy").per_sample_grad(x, y).theta / size**2
    expected = np.mean(own * (max_norm / np.linalg.norm(own, axis=1, keepdims=True)), axis=0)
    net = network(dtype, reproducible=reproducible)
    found = net.ops.to_numpy(net.value_and_clipped_grad(x, y, max_norm)[1].theta)
    limit = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2.0**-7}[dtype]
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit * abs(expected).max())
