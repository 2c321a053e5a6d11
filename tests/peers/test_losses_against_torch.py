"""Losses with options, and functions as losses, against PyTorch's: losses and gradients in float64 and float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gpuback
from gpuback import MLP, losses
from gpuback.errors import ConversionError, DeviceError
from gpuback.onnx import to_onnx
from gpuback.torch import from_torch, to_torch

SIZES, B = [6, 9, 4], 33
RNG = np.random.default_rng(0)
X, VALUES, WEIGHT = RNG.standard_normal((B, 6)), RNG.standard_normal((B, 4)), RNG.random(B)
LABELS, ROWS, COUNTS = RNG.integers(4, size=B), RNG.random((B, 4)), RNG.poisson(1.5, (B, 4)).astype(np.float64)
C = [1.0, 0.25, 0.0, 3.0]
Q = [0.1, 0.3, 0.5, 0.9]

TorchLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pinball(a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    q, r = torch.tensor(Q, dtype=a.dtype), y - a
    return torch.maximum(q * r, (q - 1) * r).sum(1)


def deviance(a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Half of it: PoissonNLLLoss, less what it is for ŷ = y."""
    least = torch.xlogy(y, y) - y
    return (functional.poisson_nll_loss(a, y, log_input=True, reduction="none") + least).sum(1)


def smoothed(a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    weight = torch.tensor(C, dtype=a.dtype)
    return functional.cross_entropy(a, y, weight, reduction="none", label_smoothing=0.1)


def focal(a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    own = torch.softmax(a, 1)[torch.arange(B), y]
    return -((1 - own) ** 2) * own.log()


def own_focal(p: Any, y: Any) -> tuple[Any, Any]:
    rows = np.arange(len(y))
    own, gradient = p[rows, y], np.zeros_like(p)
    gradient[rows, y] = 2 * (1 - own) * np.log(own) - (1 - own) ** 2 / own
    return -((1 - own) ** 2) * np.log(own), gradient


def own_log_cosh(y_hat: Any, y: Any) -> tuple[Any, Any]:
    r = y_hat - y
    return (np.logaddexp(r, -r) - np.log(2)).sum(axis=1), np.tanh(r)


CASES: dict[str, tuple[Any, str | None, Any, TorchLoss]] = {
    "absolute": ("absolute_error", None, VALUES, lambda a, y: (a - y).abs().sum(1)),
    "absolute, tanh": (
        "absolute_error", "tanh", VALUES, lambda a, y: functional.l1_loss(a.tanh(), y, reduction="none").sum(1),
    ),
    "Huber": (
        losses.Huber(0.5), None, VALUES, lambda a, y: functional.huber_loss(a, y, reduction="none", delta=0.5).sum(1),
    ),
    "Huber, sigmoid": (
        losses.Huber(0.5), "sigmoid", VALUES,
        lambda a, y: functional.huber_loss(a.sigmoid(), y, reduction="none", delta=0.5).sum(1),
    ),
    "quantile": (losses.Quantile(Q), None, VALUES, pinball),
    "Poisson": ("poisson", None, COUNTS, deviance),
    "labels": (losses.CrossEntropy(label_smoothing=0.1, class_weight=C), None, LABELS, smoothed),
    "rows": (losses.CrossEntropy(label_smoothing=0.1, class_weight=C), None, ROWS, smoothed),
    "class weights": (
        losses.CrossEntropy(class_weight=C), None, LABELS,
        lambda a, y: functional.cross_entropy(a, y, torch.tensor(C, dtype=a.dtype), reduction="none"),
    ),
    "smoothing": (
        losses.CrossEntropy(label_smoothing=0.3), None, LABELS,
        lambda a, y: functional.cross_entropy(a, y, reduction="none", label_smoothing=0.3),
    ),
    "a function": (own_focal, "softmax", LABELS, focal),
    "a function, softplus": (
        own_log_cosh, "softplus", VALUES, lambda a, y: torch.log(torch.cosh(functional.softplus(a) - y)).sum(1),
    ),
}  # fmt: skip


def scores(net: MLP) -> tuple[nn.Sequential, list[torch.Tensor]]:
    """The network up to a_L, in float64, and its parameters."""
    plain = MLP(SIZES, activation="tanh", loss="squared_error", dtype=net.dtype, backend="numpy")
    plain.theta = net.theta
    module = to_torch(plain).double()
    return module, list(module.parameters())


@pytest.mark.on_each_backend
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "off"), [("float64", 1e-12), ("float32", 2e-5)])
def test_losses_and_gradients(case: str, dtype: str, off: float) -> None:
    loss, output, y, theirs = CASES[case]
    net = MLP(SIZES, activation="tanh", loss=loss, output=output, dtype=dtype, seed=0)
    module, parameters = scores(net)
    x = torch.tensor(X, requires_grad=True)
    expected = (torch.tensor(WEIGHT) * theirs(module(x), torch.tensor(y))).sum() / B
    gradients = torch.autograd.grad(expected, [x, *parameters])
    value, found = net.value_and_grad(X, y, sample_weight=WEIGHT, need_input_grad=True)
    assert float(value) == pytest.approx(expected.item(), rel=off)
    ours = [found.inputs, *(part for pair in zip(found.weights, found.biases, strict=True) for part in pair)]
    for mine, right in zip(ours, gradients, strict=True):
        scale = right.abs().max().item()
        np.testing.assert_allclose(np.asarray(mine, np.float64), right.numpy(), rtol=0, atol=off * scale)


def test_the_divisor_is_the_number_of_samples_and_not_the_sum_of_class_weights() -> None:
    net = MLP(SIZES, loss=losses.CrossEntropy(class_weight=C), dtype="float64", activation="tanh", seed=0)
    a, y = scores(net)[0](torch.tensor(X)), torch.tensor(LABELS)
    theirs = nn.CrossEntropyLoss(torch.tensor(C, dtype=torch.float64), reduction="sum")(a, y).item()
    assert float(net.loss(X, LABELS)) == pytest.approx(theirs / B, rel=1e-12)
    mean = nn.CrossEntropyLoss(torch.tensor(C, dtype=torch.float64))(a, y).item()
    assert mean == pytest.approx(theirs / np.array(C)[LABELS].sum(), rel=1e-12)


def test_a_function_that_returns_tensors_is_told_so() -> None:
    def loss(y_hat: Any, y: Any) -> Any:
        return torch.tensor(y_hat).sum(1), torch.tensor(y_hat)

    with pytest.raises(
        DeviceError, match=r"^loss 'loss': expected losses as an array of the numpy backend, got a torch"
    ):
        MLP(SIZES, loss=loss, backend="numpy").loss(X, VALUES)


def test_conversions() -> None:
    module = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    net = from_torch(module, loss="poisson", backend="numpy")
    rate = module(torch.tensor(X)).exp().detach().numpy()
    np.testing.assert_allclose(net.forward(X), rate, rtol=1e-12)
    net = from_torch(module, loss=own_log_cosh, backend="numpy")
    expected = torch.log(torch.cosh(module(torch.tensor(X)) - torch.tensor(VALUES))).sum(1).mean().item()
    assert float(net.loss(X, VALUES)) == pytest.approx(expected, rel=1e-12)
    net = MLP(SIZES, loss=own_log_cosh, output="softplus", dtype="float64", seed=0)
    np.testing.assert_allclose(to_torch(net)(torch.tensor(X)).detach().numpy(), net.forward(X), rtol=1e-12)


def test_what_pytorch_has_no_module_of() -> None:
    with pytest.raises(ConversionError, match="activation 'exponential': expected one that PyTorch has a module"):
        to_torch(MLP(SIZES, loss="poisson"))


@pytest.mark.parametrize(("loss", "output"), [("poisson", None), (own_focal, "softmax"), (own_log_cosh, "gelu")])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_onnx_models_of_such_networks(loss: Any, output: str | None, dtype: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net = MLP(SIZES, activation="tanh", loss=loss, output=output, dtype=dtype, seed=0)
    to_onnx(net, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": X.astype(net.theta.dtype)})
    np.testing.assert_allclose(y, net.forward(X), rtol={"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-4}[dtype])


def test_a_training_run_beside_pytorchs() -> None:
    """Twenty steps of SGD with Huber's loss."""
    net = MLP(SIZES, activation="tanh", loss=losses.Huber(0.5), dtype="float64", seed=0, backend="numpy")
    module, parameters = scores(net)
    sgd, step = torch.optim.SGD(parameters, 0.1), gpuback.TrainStep(net, gpuback.SGD(0.1))
    for _ in range(20):
        sgd.zero_grad()
        loss = functional.huber_loss(module(torch.tensor(X)), torch.tensor(VALUES), reduction="sum", delta=0.5) / B
        loss.backward()
        sgd.step()
        assert float(step(X, VALUES)) == pytest.approx(loss.item(), rel=1e-11)
