"""Networks with activations of a user's own and with constants, on NumPy and in the emulator."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpuback
from gpuback import MLP, Adam, CudaForms, TrainStep
from gpuback._core import activation_names
from gpuback.errors import FileFormatError, OptionError, UnknownActivationError
from gpuback.testing import random_batch

pytestmark = pytest.mark.on_each_backend

layer_by_layer_too = pytest.mark.on_each_backend(layers=True)

HIDDEN = ("test_bump", "softplus(beta=3)")
FAMILIES = (
    *("leaky_relu(slope=0.2)", "leaky_relu(slope=-0.5)", "elu(alpha=0.5)", "celu(alpha=2)", "softplus(beta=100)"),
    *("silu(beta=1.702)", "hard_tanh(low=-0.5, high=0.7)", "sine(w0=3)"),
)


def bump(a: np.ndarray) -> np.ndarray:
    return np.exp(-a * a)


def bump_slope(a: np.ndarray) -> np.ndarray:
    return -2 * a * np.exp(-a * a)


@pytest.fixture(autouse=True)
def _registered() -> None:
    forms = CudaForms(forward="exp_of(-x * x)", slope="-2 * x * exp_of(-x * x)")
    gpuback.register_activation("test_bump", forward=bump, slope=bump_slope, cuda=forms)


def network(activation: object = HIDDEN, **options: object) -> MLP:
    return MLP([5, 8, 7, 3], activation=activation, **({"seed": 1} | options))  # type: ignore[arg-type]


def on_numpy(net: MLP) -> MLP:
    return net.to("numpy")


def assert_close_to_numpy(net: MLP, rtol: float) -> None:
    x, y = random_batch(net, 37)
    plain = on_numpy(net)
    (loss, found), (right_loss, expected) = (n.value_and_grad(x, y, need_input_grad=True) for n in (net, plain))
    assert float(loss) == pytest.approx(float(right_loss), rel=rtol)
    scale = float(np.abs(expected.theta).max())
    np.testing.assert_allclose(net.ops.to_numpy(found.theta), expected.theta, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(net.ops.to_numpy(found.inputs), expected.inputs, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(net.ops.to_numpy(net.forward(x)), plain.forward(x), rtol=rtol, atol=rtol)


def test_gradients_are_those_of_differences_and_numpys() -> None:
    net = network()
    report = gpuback.check_gradients(net, *random_batch(net, 30))
    assert report.passed, str(report)
    assert_close_to_numpy(net, 1e-5)


@pytest.mark.thorough
@layer_by_layer_too
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_other_formats(dtype: str) -> None:
    net = network(dtype=dtype)
    report = gpuback.check_gradients(net, *random_batch(net, 30))
    assert report.passed, str(report)


@pytest.mark.thorough
@layer_by_layer_too
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family(name: str) -> None:
    net = network(name)
    report = gpuback.check_gradients(net, *random_batch(net, 60))
    assert report.passed, str(report)
    assert_close_to_numpy(net, 1e-5)


def test_training_saving_loading_and_copying(tmp_path: Path) -> None:
    net = network()
    x, y = random_batch(net, 37)
    step = TrainStep(net, Adam(0.02))
    losses = [float(step(x, y)) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    net.save(tmp_path / "net")
    for other in (MLP.load(tmp_path / "net"), copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.to("auto")):
        assert other.architecture == net.architecture
        assert other.architecture.activations == HIDDEN
        np.testing.assert_array_equal(other.forward(x), net.forward(x))


def test_the_bits_of_the_reproducible_mode() -> None:
    net = network("test_bump", reproducible=True)
    x, y = random_batch(net, 37)
    plain = on_numpy(net)
    for mine, right in zip(net.value_and_grad(x, y), plain.value_and_grad(x, y), strict=True):
        assert (
            np.asarray(getattr(mine, "theta", mine)).tobytes() == np.asarray(getattr(right, "theta", right)).tobytes()
        )
    close = MLP(**net.architecture.as_options() | {"reproducible": False}, backend="numpy", seed=1)
    np.testing.assert_allclose(plain.forward(x), close.forward(x), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("sine")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_of_families_in_the_reproducible_mode(name: str, dtype: str) -> None:
    net = network(name, reproducible=True, dtype=dtype)
    x, y = random_batch(net, 37)
    found, expected = (n.value_and_grad(x, y, need_input_grad=True)[1] for n in (net, on_numpy(net)))
    assert np.asarray(found.theta).tobytes() == expected.theta.tobytes()
    assert np.asarray(found.inputs).tobytes() == expected.inputs.tobytes()
    close = MLP(**net.architecture.as_options() | {"reproducible": False}, backend="numpy", seed=1)
    gradient = close.value_and_grad(x, y)[1].theta
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(expected.theta, gradient, rtol=tolerance, atol=tolerance * np.abs(gradient).max())


@pytest.mark.numpy_only
def test_as_the_output_of_a_loss_that_is_a_function() -> None:
    def squares(y_hat: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return ((y_hat - y) ** 2).sum(axis=1), 2 * (y_hat - y)

    net = MLP([5, 3], output="test_bump", loss=squares, dtype="float64", seed=1)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 5)), rng.standard_normal((9, 3))
    assert gpuback.check_gradients(net, x, y).passed
    np.testing.assert_allclose(net.forward(x), bump(x @ net.weights[0].T), rtol=1e-12)


def test_one_layer_on_arrays_of_the_users_own() -> None:
    rng = np.random.default_rng(0)
    da, a, W = (rng.standard_normal(shape) for shape in ((9, 3), (9, 4), (3, 4)))
    da_prev = gpuback.fused_backward(da, bump(a), W, activation_prev="test_bump", a_prev=a)[2]
    np.testing.assert_allclose(da_prev, da @ W * bump_slope(a), rtol=1e-12, atol=1e-14)


# --- What is refused


def test_without_forms_cuda_and_the_reproducible_mode_refuse_by_name() -> None:
    gpuback.register_activation("test_plain_bump", forward=bump, slope=bump_slope)
    net, x = network("test_plain_bump"), np.ones((4, 5))
    if net.backend == "numpy":
        assert gpuback.check_gradients(net, *random_batch(net, 30)).passed
    else:
        with pytest.raises(OptionError, match="activation 'test_plain_bump' has no CUDA form: expected one with cuda="):
            net.forward(x)
    with pytest.raises(OptionError, match="activation 'test_plain_bump' has no reproducible form: expected one of"):
        network("test_plain_bump", reproducible=True)


@pytest.mark.numpy_only
def test_what_has_no_reproducible_form_is_refused_by_name() -> None:
    forms = CudaForms("sin_of(x)", "cos_of(x)")
    gpuback.register_activation("test_wave", forward=np.sin, slope=np.cos, cuda=forms)
    for name in ("sine", "sine(w0=3)", "test_wave"):
        with pytest.raises(OptionError, match=f"activation {re.escape(repr(name))} has no reproducible form"):
            network(["tanh", name], reproducible=True)


@pytest.mark.numpy_only
def test_a_reproducible_network_is_not_loaded_without_the_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(reproducible=True, backend="numpy")
    net.save(tmp_path / "net")
    pickled = pickle.dumps(net)
    table = activation_names.REGISTERED
    monkeypatch.setitem(table, "test_bump", dataclasses.replace(table["test_bump"], forms=None))
    message = "activation 'test_bump' has no reproducible form"
    for read in (lambda: pickle.loads(pickled), lambda: copy.deepcopy(net)):
        with pytest.raises(OptionError, match=message):
            read()
    with pytest.raises(FileFormatError, match=message):
        MLP.load(tmp_path / "net")


def test_a_process_that_has_not_registered_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    net.save(tmp_path / "net")
    pickled = pickle.dumps(net)
    monkeypatch.setattr(activation_names, "REGISTERED", {})
    message = r"unknown activation 'test_bump'.*register_activation\('test_bump', …\) before MLP or MLP.load"
    with pytest.raises(UnknownActivationError, match=f"net: {message}"):
        MLP.load(tmp_path / "net")
    with pytest.raises(UnknownActivationError, match=message):
        pickle.loads(pickled)


@pytest.mark.numpy_only
def test_a_new_process_loads_it_once_it_is_registered(tmp_path: Path) -> None:
    net = network(backend="numpy")
    net.save(tmp_path / "net")
    script = (
        "import numpy as np, gpuback\n"
        "gpuback.register_activation('test_bump', forward=lambda a: np.exp(-a * a),\n"
        "    slope=lambda a: -2 * a * np.exp(-a * a))\n"
        "print(gpuback.MLP.load('net', 'numpy').forward(np.ones((1, 5))).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(net.forward(np.ones((1, 5))).tolist())
