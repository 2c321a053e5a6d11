"""check_gradients passes what is right, for every combination, and finds what is wrong."""

import dataclasses

import numpy as np
import pytest
from support.combinations import in_turn

import gpuback
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.losses import LOSSES
from gpuback.testing import random_batch

pytestmark = pytest.mark.on_each_backend

PAIRS = [(loss, output) for loss, row in LOSSES.items() for output in row.outputs]


@pytest.mark.parametrize("activation, choice", in_turn(list(ACTIVATIONS), PAIRS))
def test_every_activation_output_and_loss_against_finite_differences(activation, choice):
    loss, output = choice
    net = gpuback.MLP([5, 7, 6, 3], activation=activation, loss=loss, output=output, dtype="float64", seed=1)
    net.theta[:] += 0.1 * np.random.default_rng(2).standard_normal(net.n_parameters)  # biases too
    report = gpuback.check_gradients(net, *random_batch(net, 19, seed=3))
    assert report.passed, f"\n{report}"
    assert [row.block for row in report.rows] == ["W1", "b1", "W2", "b2", "W3", "b3", "inputs"]
    assert report.samples > 15


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize(("loss", "output"), PAIRS)
def test_every_dtype_against_its_float64_twin(loss, output, dtype):
    options = {"allow_tf32": True} if dtype == "tf32" else {"dtype": dtype}
    net = gpuback.MLP([5, 7, 6, 3], activation=["silu", "leaky_relu"], loss=loss, output=output, seed=1, **options)
    report = gpuback.check_gradients(net, *random_batch(net, 19, seed=3), sample_weight=np.linspace(-1, 2, 19))
    assert report.passed, f"\n{report}"


def test_probability_labels():
    net = gpuback.MLP([5, 7, 4], activation="softplus", dtype="float64", seed=0)
    x, _ = random_batch(net, 11)
    y = np.random.default_rng(0).dirichlet(np.ones(4), 11)
    assert gpuback.check_gradients(net, x, y).passed


@pytest.mark.parametrize("name", ["relu", "elu", "sigmoid", "gelu"])
@pytest.mark.parametrize("factor", [0.999, 1.001, -2])
def test_a_wrong_derivative_is_found(monkeypatch, name, factor):
    row = ACTIVATIONS[name]

    def wrong(dh, source, scratch):
        row.backward(dh, source, scratch)
        dh *= factor

    monkeypatch.setitem(ACTIVATIONS, name, dataclasses.replace(row, backward=wrong))
    net = gpuback.MLP([5, 7, 6, 3], activation=name, dtype="float64", seed=1)
    report = gpuback.check_gradients(net, *random_batch(net, 19, seed=3))
    assert not report.passed
    failed = {row.block for row in report.rows if not row.passed}
    assert failed == {"W1", "b1", "W2", "b2", "inputs"}  # all that lies below a hidden layer, and nothing else
    assert "FAILED" in str(report)


def test_gradients_too_small_for_differences_to_see_are_not_called_wrong():
    chain = gpuback.MLP([1] * 51, activation="sigmoid", loss="squared_error", dtype="float64", seed=0)
    assert gpuback.check_gradients(chain, *random_batch(chain, 5)).passed
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 3))
    y = rng.standard_normal(30)
    line = gpuback.MLP([3, 1], loss="squared_error", dtype="float64", seed=0)
    augmented = np.column_stack([x, np.ones(30)])
    line.theta[:] = np.linalg.lstsq(augmented, y, rcond=None)[0]  # the optimum: every gradient is 0
    assert gpuback.check_gradients(line, x, y).passed


def test_unscaled_inputs_are_not_called_wrong():
    net = gpuback.MLP([3, 8, 2], activation="tanh", seed=0)
    x, y = random_batch(net, 20)
    assert gpuback.check_gradients(net, 1e3 * x, y).passed


def test_samples_next_to_a_kink_are_left_out():
    net = gpuback.MLP([2, 3, 2], dtype="float64", seed=0)
    x, y = random_batch(net, 10)
    x[3] = 0  # every pre-activation is 0: relu's kink
    report = gpuback.check_gradients(net, x, y)
    assert report.passed
    assert report.samples == 9
    with pytest.raises(gpuback.GpubackError, match="next to a kink"):
        gpuback.check_gradients(net, np.zeros((4, 2)), [0, 1, 0, 1])


def test_the_network_is_left_as_it_was():
    net = gpuback.MLP([5, 7, 3], seed=1)
    before = net.theta.copy()
    x, y = random_batch(net, 9)
    x_before = x.copy()
    gpuback.check_gradients(net, x, y)
    np.testing.assert_array_equal(net.theta, before)
    np.testing.assert_array_equal(x, x_before)
