"""Every public function and method, once on each backend: the same numbers as NumPy's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback.testing import random_batch

pytestmark = pytest.mark.on_each_backend


def network(backend: str, **options: Any) -> gpuback.MLP:
    return gpuback.MLP([4, 6, 3], **{"activation": "tanh", "dtype": "float64", "seed": 0, "backend": backend} | options)


def batch(size: int = 9) -> Any:
    return random_batch(network("numpy"), size)


def trained(backend: str, optimizer: Any, **options: Any) -> list[Any]:
    net = network(backend, **options.pop("network", {}))
    step = gpuback.TrainStep(net, optimizer, **options)
    return [*(step(*batch()) for _ in range(4)), net.theta]


def fused_backward(backend: str) -> list[Any]:
    da, h, W = operands = layer_operands()
    if backend == "numpy":
        return [da.T @ h, da.sum(axis=0), da @ W * (1 - h**2)]
    return list(gpuback.fused_backward(*operands, activation_prev="tanh"))


def bound_backward(backend: str) -> list[Any]:
    if backend == "numpy":
        return fused_backward(backend)
    return list(gpuback.bind_fused_backward(*layer_operands(), activation_prev="tanh")())


def layer_operands() -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in ((9, 3), (9, 4), (3, 4))]


def gradients_of(result: Any) -> list[Any]:
    value, gradients = result
    return [value, gradients.theta]


def vjp(backend: str) -> list[Any]:
    y, pullback = network(backend).vjp(batch()[0])
    gradients = pullback(np.linspace(-1, 1, y.size).reshape(y.shape), need_input_grad=True)
    return [y, gradients.theta, gradients.inputs]


def saved_and_loaded(backend: str) -> list[Any]:
    path = Path("network.safetensors")
    network(backend).save(path)
    return [gpuback.MLP.load(path, backend).forward(batch()[0])]


def fitted(backend: str) -> list[Any]:
    net = network(backend)
    history = gpuback.fit(net, *batch(40), epochs=2, batch_size=16, validation=0.2, seed=0)
    assert isinstance(history, gpuback.History)
    return [history.loss, history.validation_loss, net.theta]


def diverged(backend: str) -> list[Any]:
    with pytest.raises(gpuback.DivergedError) as caught:
        net = network(backend, activation="relu", loss="squared_error")
        gpuback.fit(net, *random_batch(net, 9), optimizer=gpuback.SGD(1e200))
    assert isinstance(caught.value, gpuback.GpubackError)
    return []


def check_gradients(backend: str) -> list[Any]:
    report = gpuback.check_gradients(network(backend), *batch())
    assert isinstance(report, gpuback.GradientReport)
    return [report.passed]


def explained(backend: str) -> list[Any]:
    assert str(network(backend).explain(9))
    return []


def trace(backend: str) -> list[Any]:
    found = network(backend).trace(*batch())
    return [found.loss, found.output, *found.da[1:], *found.dW[1:], *found.db[1:], *found.dh[:-1]]


def backends(backend: str) -> list[Any]:
    status = gpuback.backends()["numpy"]
    assert isinstance(status, gpuback.BackendStatus)
    return [status.available]


def with_loss_scaling(backend: str) -> list[Any]:
    options = {"loss_scaling": gpuback.LossScaling(), "network": {"dtype": "float16"}}
    return [np.isfinite(np.asarray(array, np.float64)).all() for array in trained(backend, gpuback.SGD(0.1), **options)]


def registered(backend: str) -> list[Any]:
    gpuback.register_activation(
        "test_public_bump",
        forward=lambda a: np.exp(-a * a),
        slope=lambda a: -2 * a * np.exp(-a * a),
        cuda=gpuback.CudaForms(forward="exp_of(-x * x)", slope="-2 * x * exp_of(-x * x)"),
    )
    return gradients_of(network(backend, activation="test_public_bump").value_and_grad(*batch()))


USES: dict[str, Callable[[str], list[Any]]] = {
    "fused_backward": fused_backward,
    "bind_fused_backward": bound_backward,
    "backends": backends,
    "BackendStatus": backends,
    "check_gradients": check_gradients,
    "CudaForms": registered,
    "register_activation": registered,
    "GradientReport": check_gradients,
    "Gradients": lambda backend: gradients_of(network(backend).value_and_grad(*batch())),
    "Pullback": vjp,
    "fit": fitted,
    "History": fitted,
    "DivergedError": diverged,
    "GpubackError": diverged,
    "LossScaling": with_loss_scaling,
    "SGD": lambda backend: trained(backend, gpuback.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "Adam": lambda backend: trained(backend, gpuback.Adam(0.01)),
    "AdamW": lambda backend: trained(backend, gpuback.AdamW(0.01), clip_norm=0.1),
    "TrainStep": lambda backend: trained(backend, gpuback.Adam(), clip_norm=1.0, micro_batch_size=4),
    "MLP": lambda backend: [network(backend).theta],
    "MLP.forward": lambda backend: [network(backend).forward(batch()[0])],
    "MLP.loss": lambda backend: [network(backend).loss(*batch())],
    "MLP.value_and_grad": lambda backend: gradients_of(network(backend).value_and_grad(*batch())),
    "MLP.value_and_clipped_grad": lambda backend: gradients_of(network(backend).value_and_clipped_grad(*batch(), 0.1)),
    "MLP.gradient_norms": lambda backend: [network(backend).gradient_norms(*batch())],
    "MLP.per_sample_grad": lambda backend: [network(backend).per_sample_grad(*batch()).theta],
    "MLP.vjp": vjp,
    "MLP.trace": trace,
    "MLP.explain": explained,
    "MLP.to": lambda backend: [network(backend).to("numpy").forward(batch()[0])],
    "MLP.save": saved_and_loaded,
    "MLP.load": saved_and_loaded,
}


def public_names() -> Iterator[str]:
    for name, value in vars(gpuback).items():
        if not name.startswith("_") and not inspect.ismodule(value):
            yield name
    for name, value in vars(gpuback.MLP).items():
        if name.startswith("_"):
            continue
        if inspect.isfunction(value) or isinstance(value, classmethod):
            yield f"MLP.{name}"


@pytest.mark.parametrize("name", USES)
def test_a_public_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, expected = USES[name]("auto"), USES[name]("numpy")
    for mine, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float64), np.asarray(right, np.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.numpy_only
def test_no_public_name_is_left_out() -> None:
    assert set(public_names()) == set(USES)
