"""MLP: options, θ and its views, files, and the errors that say what was expected and what came."""

import copy
import pickle
import re

import numpy as np
import pytest

import gpuback
from gpuback.testing import random_batch

pytestmark = pytest.mark.on_each_backend(layers=True)


def test_theta_is_one_buffer_and_weights_and_biases_are_views_of_it():
    net = gpuback.MLP([3, 5, 2], seed=0)
    assert net.n_parameters == net.theta.size == 5 * 3 + 5 + 2 * 5 + 2
    assert [W.shape for W in net.weights] == [(5, 3), (2, 5)]
    net.theta[:] = np.arange(net.n_parameters)
    np.testing.assert_array_equal(net.weights[0], np.arange(15).reshape(5, 3))
    np.testing.assert_array_equal(net.biases[0], [15, 16, 17, 18, 19])
    net.biases[1][...] = -1
    np.testing.assert_array_equal(net.theta[-2:], [-1, -1])


def test_a_hand_worked_network():
    # h = relu([1·2 − 1·1, 1·2 + 0·1 − 3]) = relu([1, −1]) = [1, 0]; ŷ = 2·1 + 5·0 + 1 = 3; loss = ½(3 − 1)² = 2
    net = gpuback.MLP([2, 2, 1], loss="squared_error", dtype="float64")
    net.theta[:] = [1, -1, 1, 0, 0, -3, 2, 5, 1]
    loss, gradients = net.value_and_grad([[2, 1]], [1], need_input_grad=True)
    assert loss == 2
    np.testing.assert_array_equal(gradients.weights[1], [[2, 0]])  # da₂ = 2, times h = [1, 0]
    np.testing.assert_array_equal(gradients.biases[1], [2])
    np.testing.assert_array_equal(gradients.weights[0], [[8, 4], [0, 0]])  # da₁ = 2·[2, 5] ⊙ [1, 0] = [4, 0], times x
    np.testing.assert_array_equal(gradients.biases[0], [4, 0])
    np.testing.assert_array_equal(gradients.inputs, [[4, -4]])


def test_initial_weights_are_he_or_glorot_uniform_by_activation():
    net = gpuback.MLP([100, 200, 300, 50], activation=["relu", "tanh"], seed=1, dtype="float64")
    limits = [np.sqrt(6 / 100), np.sqrt(6 / (200 + 300)), np.sqrt(6 / (300 + 50))]
    for W, b, limit in zip(net.weights, net.biases, limits, strict=True):
        assert abs(W).max() <= limit
        assert abs(W).max() > 0.999 * limit
        assert abs(W.mean()) < 4 * limit / np.sqrt(3 * W.size)
        np.testing.assert_allclose(W.var(), limit**2 / 3, rtol=0.03)
        assert not b.any()


def test_a_seed_means_the_same_weights_whatever_the_dtype_and_numpy_version():
    net = gpuback.MLP([2, 2], seed=42, dtype="float64")
    raw = np.random.PCG64(42).random_raw(4)
    expected = [np.sqrt(6 / 4) * (2 * (int(r) >> 11) * 2.0**-53 - 1) for r in raw]
    np.testing.assert_array_equal(net.weights[0].ravel(), expected)
    # What PCG64 gave when this was written; NumPy keeps that stream.
    assert [int(r) for r in raw[:2]] == [14276969152011380360, 8095878257575067585]
    np.testing.assert_array_equal(gpuback.MLP([2, 2], seed=42).theta, net.theta.astype(np.float32))
    assert (gpuback.MLP([2, 2]).theta != gpuback.MLP([2, 2]).theta).any()


@pytest.mark.parametrize("dtype", ["float64", np.float32, "bfloat16", "float16"])
def test_results_have_the_dtype_of_theta(dtype):
    net = gpuback.MLP([4, 3, 2], dtype=dtype, seed=0)
    total = np.float64 if dtype == "float64" else np.float32
    x, y = random_batch(net, 5)
    loss, gradients = net.value_and_grad(x, y, need_input_grad=True)
    arrays = [net.theta, net.forward(x), loss, gradients.theta, gradients.inputs, net.loss(x, y)]
    assert {array.dtype for array in arrays} == {np.dtype(total)}
    assert loss.shape == ()
    assert net.dtype.name == np.dtype(net.dtype).name == (dtype if isinstance(dtype, str) else "float32")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": ["gelu", "tanh"], "loss": "squared_error", "output": "softmax", "dtype": "float64"},
        {"dtype": "bfloat16"},
        {"allow_tf32": True, "loss": "binary_cross_entropy"},
    ],
)
def test_save_and_load_give_the_same_network(tmp_path, options):
    net = gpuback.MLP([4, 6, 5, 3], seed=3, **options)
    net.save(tmp_path / "net.safetensors")
    loaded = gpuback.MLP.load(tmp_path / "net.safetensors")
    assert loaded.architecture == net.architecture
    assert repr(loaded) == repr(net)
    x, _ = random_batch(net, 7)
    np.testing.assert_array_equal(loaded.forward(x), net.forward(x))


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path):
    path = tmp_path / "net.safetensors"
    gpuback.MLP([4, 3], seed=0).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(gpuback.GpubackError, match="net.safetensors"):
        gpuback.MLP.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(gpuback.GpubackError, match="net.safetensors"):
        gpuback.MLP.load(path)
    with pytest.raises(FileNotFoundError):
        gpuback.MLP.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: net.to("numpy")]
)
def test_copies_are_independent(duplicate):
    net = gpuback.MLP([3, 4, 2], seed=0)
    x, y = random_batch(net, 6)
    net.value_and_grad(x, y)  # leaves buffers behind, which must not be shared
    before = net.forward(x)
    twin = duplicate(net)
    twin.theta[:] = 0
    assert not np.array_equal(twin.forward(x), before)
    np.testing.assert_array_equal(net.forward(x), before)


@pytest.mark.parametrize("batch_size", [0, 2.5, "a"])
def test_explain_wants_a_batch(batch_size):
    with pytest.raises(gpuback.GpubackError, match="batch_size: expected an integer ≥ 1"):
        NET.explain(batch_size)


def test_out_of_another_make_is_written_through_its_theta():
    net = gpuback.MLP([3, 1], loss="squared_error", seed=0)
    _, other = gpuback.MLP([1, 2], seed=0).value_and_grad([[0]], [0])  # as many parameters, in other shapes
    _, expected = net.value_and_grad(X, np.zeros(5))
    net.value_and_grad(X, np.zeros(5), out=other)
    np.testing.assert_array_equal(other.theta, expected.theta)
    assert [W.shape for W in other.weights] == [(1, 3)]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda out: pickle.loads(pickle.dumps(out))])
def test_out_is_written_through_its_theta_when_its_parts_are_no_views(duplicate):
    net = gpuback.MLP([3, 1], loss="squared_error", seed=0)
    _, out = net.value_and_grad(X, np.zeros(5))
    expected = net.ops.to_numpy(out.theta).copy()
    net.value_and_grad(X, np.zeros(5), out=out)  # known by now to have views
    twin = duplicate(out)
    for other in (twin, out):
        other.theta[...] = 0
        net.value_and_grad(X, np.zeros(5), out=other)
        np.testing.assert_array_equal(net.ops.to_numpy(other.theta), expected)
        np.testing.assert_array_equal(net.ops.to_numpy(other.weights[0]).ravel(), expected[:3])
    out.weights = tuple(np.zeros_like(W) for W in out.weights)
    net.value_and_grad(X, np.ones(5), out=out)
    np.testing.assert_array_equal(net.ops.to_numpy(out.weights[0]).ravel(), net.ops.to_numpy(out.theta)[:3])


def test_explain_counts_what_a_step_costs():
    explanation = gpuback.MLP([64, 32, 10], seed=0).explain(100)
    products = 100 * (64 * 32 * 2 + 32 * 10 * 3) * 2  # forward and dW for both layers, dh for the upper one
    assert explanation.flops == products + 2 * (65 * 32 + 33 * 10)
    text = str(explanation)
    steps = ["forward 1", "backward 2", "relu", "softmax + cross_entropy"]
    if "the whole network" in text:
        steps = ["fused_step", "one launch: a block has room"]
    for word in ("float32", "backend", *steps):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"sizes": [3]}, ValueError, "at least two widths"),
        ({"sizes": [3, 0, 2]}, ValueError, "at least 1, got 0 at position 1"),
        ({"sizes": [3, 2.5]}, ValueError, "integers"),
        ({"sizes": 3}, ValueError, "integers"),
        ({"activation": "rellu"}, ValueError, "unknown activation 'rellu'. Did you mean 'relu'?"),
        ({"activation": ["relu", "relu"]}, ValueError, "1 (one per hidden layer"),
        ({"activation": 5}, ValueError, "activation: expected a name or one for each hidden layer, got 5"),
        ({"activation": [["relu"]]}, ValueError, "unknown activation ['relu']"),
        ({"loss": ["cross_entropy"]}, ValueError, "loss: expected a name"),
        ({"output": ["softmax"]}, ValueError, "unknown output ['softmax']"),
        ({"loss": "crossentropy"}, ValueError, "Did you mean 'cross_entropy'?"),
        ({"output": "sofmax"}, ValueError, "Did you mean 'softmax'?"),
        ({"output": "sigmoid"}, ValueError, "loss 'cross_entropy' goes with output 'softmax', not with 'sigmoid'"),
        ({"dtype": "float8"}, ValueError, "unknown dtype 'float8'"),
        ({"dtype": np.int32}, TypeError, "got int32"),
        ({"dtype": None}, TypeError, "got None"),
        ({"dtype": object()}, TypeError, "expected one of float64"),
        ({"dtype": "float64", "allow_tf32": True}, ValueError, "float32 only, not with float64"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        ({"reproducible": True, "dtype": "float64"}, ValueError, "reproducible=True"),
        ({"seed": -1}, ValueError, "seed: expected an integer ≥ 0"),
        ({"seed": 1.5}, ValueError, "seed"),
    ],
)
def test_what_a_network_cannot_be(arguments, error, says):
    with pytest.raises(error, match=re.escape(says)) as caught:
        gpuback.MLP(**{"sizes": [3, 4, 2], **arguments})
    assert isinstance(caught.value, gpuback.GpubackError)


NET = gpuback.MLP([3, 4, 2], seed=0)
REGRESSION = gpuback.MLP([3, 1], loss="squared_error", seed=0)
BINARY = gpuback.MLP([3, 2], loss="binary_cross_entropy", seed=0)
X = np.ones((5, 3))


@pytest.mark.parametrize(
    ("net", "x", "y", "error", "says"),
    [
        (NET, np.ones((5, 4)), [0] * 5, ValueError, "x: expected shape (B, 3) for sizes (3, 4, 2), got (5, 4)"),
        (NET, np.ones(3), [0], ValueError, "x[None, :]"),
        (NET, np.ones((0, 3)), [], ValueError, "at least one sample"),
        (NET, np.ones((5, 3), complex), [0] * 5, TypeError, "x: expected real numbers, got dtype complex128"),
        (NET, np.ma.masked_greater(np.eye(5, 3), 0), [0] * 5, TypeError, "x: expected numbers without a mask"),
        (NET, [["a", "b", "c"]], [0], TypeError, "x: expected real numbers"),
        (NET, np.full((1, 3), None), [0], TypeError, "x: expected real numbers, got dtype object"),
        (NET, [[1, 2, 3], [1, 2]], [0, 0], TypeError, "x: expected an array of real numbers"),
        (NET, X, [0, 1, 2, 0, 0], ValueError, "labels 0 … 1 for an output layer of width 2, got labels from 0 to 2"),
        (NET, X, [0, -1, 1, 0, 0], ValueError, "got labels from -1 to 1"),
        (NET, X, [0.0] * 5, TypeError, "integer labels 0 … 1"),
        (NET, X, ["a"] * 5, TypeError, "y: expected real numbers"),
        (NET, X, [0] * 4, ValueError, "y: expected 5 labels, one per sample of x, got 4"),
        (NET, X, np.ones((5, 3)), ValueError, "(5,) of integer labels or (5, 2) of probabilities"),
        (NET, X, np.full((5, 2), 1.5), ValueError, "probabilities in [0, 1]"),
        (BINARY, X, np.full((5, 2), -0.5), ValueError, "probabilities in [0, 1]"),
        (REGRESSION, X, np.ones((5, 2)), ValueError, "y: expected shape (5,) or (5, 1)"),
        (REGRESSION, X, np.ones(4), ValueError, "(5, 1) for loss 'squared_error', got (4, 1)"),
    ],
)  # fmt: skip
def test_what_a_batch_cannot_be(net, x, y, error, says):
    for call in (net.loss, net.value_and_grad, net.trace, gpuback.TrainStep(net.to("numpy"), gpuback.SGD(0.1))):
        with pytest.raises(error, match=re.escape(says)) as caught:
            call(x, y)
        assert isinstance(caught.value, gpuback.GpubackError)


def test_sample_weights_must_fit():
    with pytest.raises(ValueError, match=re.escape("sample_weight: expected shape (5,)")):
        NET.value_and_grad(X, [0] * 5, sample_weight=[1, 2])


def test_out_must_fit_and_accumulate_needs_it():
    with pytest.raises(gpuback.GpubackError, match="accumulate=True adds to out"):
        NET.value_and_grad(X, [0] * 5, accumulate=True)
    other = gpuback.MLP([3, 2], seed=0).value_and_grad(X, [0] * 5)[1]
    with pytest.raises(gpuback.GpubackError, match="out: expected Gradients with theta"):
        NET.value_and_grad(X, [0] * 5, out=other)
    unaligned = np.zeros(NET.n_parameters * 4 + 1, np.uint8)[1:].view(np.float32)
    with pytest.raises(gpuback.GpubackError, match="out: expected Gradients over a contiguous, aligned"):
        NET.value_and_grad(X, [0] * 5, out=gpuback.Gradients(unaligned, *NET.architecture.layout.split(unaligned)))


class OnAGpu:
    """An array that says by DLPack that it lies on CUDA device 0."""

    dtype = np.dtype(np.float32)

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        raise AssertionError("must not be asked for")


def test_device_data_for_a_numpy_network_is_refused():
    with pytest.raises(gpuback.GpubackError, match=r"x: expected data in host memory .*device \(2, 0\)"):
        NET.forward(OnAGpu())
    with pytest.raises(
        gpuback.GpubackError, match=r"da: numpy\.ndarray, h_prev: test_network\.OnAGpu, another library's"
    ):
        gpuback.fused_backward(X, OnAGpu(), X)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_flows_through(value):
    x = X.copy()
    x[2, 1] = value
    loss, gradients = NET.value_and_grad(x, [0, 1, 0, 1, 0])
    assert not np.isfinite(loss)
    assert not np.isfinite(gradients.theta).all()
    outputs = NET.forward(x)
    np.testing.assert_array_equal(np.isfinite(outputs).all(axis=1), [True, True, False, True, True])


def test_integers_booleans_lists_and_strided_views_are_taken_as_they_are():
    rng = np.random.default_rng(0)
    wide = rng.integers(-2, 3, (10, 6))
    y = [0, 1, 1, 0, 1]
    expected = NET.value_and_grad(np.ascontiguousarray(wide[::2, ::2], np.float32), y)
    for x in (
        wide[::2, ::2],
        wide[::2, ::2].tolist(),
        wide.astype(np.int8)[::2, ::2],
        np.asfortranarray(wide[::2, ::2], np.float16),
    ):
        for labels in (
            y,
            tuple(y),
            np.array(y, np.uint8),
            np.array(y, bool),
            np.array([0, 9, 1, 9, 1, 9, 0, 9, 1])[::2],
        ):
            loss, gradients = NET.value_and_grad(x, labels)
            assert loss == expected[0]
            np.testing.assert_array_equal(gradients.theta, expected[1].theta)


def test_one_output_behind_softmax_is_refused() -> None:
    with pytest.raises(gpuback.errors.OptionError, match="two outputs or more behind softmax.*binary_cross_entropy"):
        gpuback.MLP([3, 4, 1])
    gpuback.MLP([3, 4, 1], loss="binary_cross_entropy", backend="numpy")
