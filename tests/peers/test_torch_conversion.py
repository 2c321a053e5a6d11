"""Chains of PyTorch's modules as networks, and the reverse: the same outputs, and refusals that name the layer."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import gpuback._core.activations
from gpuback import MLP, SGD, TrainStep
from gpuback._torch.conversion import NAMES
from gpuback.errors import ConversionError, DtypeError, OptionError, ShapeError
from gpuback.testing import random_batch
from gpuback.torch import FusedMLP, from_torch, to_torch

ACTIVATIONS = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "selu": nn.SELU(),
    "softsign": nn.Softsign(),
    "log_sigmoid": nn.LogSigmoid(),
    "hard_tanh": nn.Hardtanh(),
    "relu6": nn.ReLU6(),
    "hard_sigmoid": nn.Hardsigmoid(),
    "gelu": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "gelu_erf": nn.GELU(),
    "mish": nn.Mish(),
    "hard_swish": nn.Hardswish(),
}
WITHOUT_A_MODULE = ["exponential", "squareplus", "sine"]
ENDS: list[tuple[nn.Module | None, str, str]] = [
    (None, "identity", "squared_error"),
    (nn.Softmax(dim=1), "softmax", "cross_entropy"),
    (nn.Softmax(dim=-1), "softmax", "cross_entropy"),
    (nn.Sigmoid(), "sigmoid", "binary_cross_entropy"),
    (nn.Tanh(), "tanh", "squared_error"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def chain(*between: nn.Module, end: nn.Module | None = None, dtype: Any = torch.float64) -> nn.Sequential:
    parts = [nn.Linear(6, 9), *between, nn.Linear(9, 5), *([] if end is None else [end])]
    return nn.Sequential(*parts).to(dtype)


def assert_close(actual: Any, expected: torch.Tensor, relative: float = 1e-13) -> None:
    expected = expected.detach().double().numpy()
    assert np.abs(actual - expected).max() <= relative * np.abs(expected).max()


# --- from PyTorch


def test_every_activation_has_its_module() -> None:
    assert {*ACTIVATIONS, *WITHOUT_A_MODULE} == set(gpuback._core.activations.ACTIVATIONS)
    assert {type(module) for module in ACTIVATIONS.values()} <= set(NAMES)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("end, output, loss", ENDS)
def test_a_chain_becomes_a_network(activation: str, end: nn.Module | None, output: str, loss: str) -> None:
    module, x = chain(ACTIVATIONS[activation], end=end), torch.randn(11, 6, dtype=torch.float64)
    net = from_torch(module, backend="numpy")
    assert (net.sizes, net.dtype) == ((6, 9, 5), "float64")
    assert (net.architecture.activations, net.architecture.output, net.architecture.loss) == (
        (activation,),
        output,
        loss,
    )
    assert_close(net.forward(x), module(x))


WITH_CONSTANTS: dict[str, nn.Module] = {
    "leaky_relu(slope=0.2)": nn.LeakyReLU(0.2),
    "leaky_relu(slope=-0.5)": nn.LeakyReLU(-0.5),
    "elu(alpha=0.5)": nn.ELU(0.5),
    "celu(alpha=2)": nn.CELU(2),
    "softplus(beta=100)": nn.Softplus(beta=100),
    "softplus(beta=0.5)": nn.Softplus(0.5, threshold=30),
    "hard_tanh(low=-2, high=2)": nn.Hardtanh(-2, 2),
    "leaky_relu(slope=0.25)": nn.PReLU(init=0.25).requires_grad_(False),
    "elu": nn.CELU(),
    "relu": nn.LeakyReLU(0),
    "hard_tanh": nn.Hardtanh(),
}


@pytest.mark.parametrize("activation", WITH_CONSTANTS)
def test_modules_with_constants_become_families_and_back(activation: str) -> None:
    module, x = chain(WITH_CONSTANTS[activation]), 3 * torch.randn(50, 6, dtype=torch.float64)
    net = from_torch(module, backend="numpy")
    assert net.architecture.activations == (activation,)
    assert_close(net.forward(x), module(x), 1e-9 if "softplus" in activation else 1e-13)  # beyond the threshold
    back = to_torch(net)
    assert_close(back(x).detach().numpy(), module(x), 1e-9)
    assert from_torch(back, backend="numpy").architecture == net.architecture


def test_softplus_beyond_its_threshold_is_within_the_rounding_of_float32() -> None:
    """PyTorch's is a itself there; the other one is more by e^-20/20 of it at most."""
    a = torch.linspace(15, 60, 1001, dtype=torch.float64)[:, None] / 7
    exact = from_torch(nn.Sequential(one(), nn.Softplus(7), one()), backend="numpy").forward(a)
    assert np.abs(exact / nn.Softplus(7)(a).numpy() - 1).max() < 1.1e-10 < 2.0**-24


def one() -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    return layer


@pytest.mark.parametrize("name", ["sine(w0=30)", "silu(beta=1.702)"])
def test_activations_without_a_module_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConversionError, match=re.escape(f"activation {name!r}: expected one that PyTorch has")):
        to_torch(MLP([6, 9, 5], activation=name))


@pytest.mark.parametrize("dtype, step", [("float32", 2e-6), ("bfloat16", 2**-6), ("float16", 2**-9)])
def test_the_dtype_is_the_parameters(dtype: str, step: float) -> None:
    module, x = chain(nn.Tanh(), dtype=getattr(torch, dtype)), torch.randn(11, 6)
    net = from_torch(module, backend="numpy")
    assert net.dtype.name == dtype
    assert net.theta.dtype == np.float32
    assert_close(net.forward(x), module(x.to(getattr(torch, dtype))), step)
    assert_close(net.weights[1], module[2].weight, 0)


def test_parameters_can_get_another_dtype_and_more() -> None:
    net = from_torch(chain(nn.ReLU(), dtype=torch.float32), dtype="bfloat16", reproducible=True, backend="numpy")
    assert (net.dtype.name, net.reproducible, net.backend) == ("bfloat16", True, "numpy")
    assert from_torch(chain(nn.ReLU(), dtype=torch.float32), allow_tf32=True).architecture.precision.tf32


def test_nested_chains_and_modules_that_do_nothing_to_rows() -> None:
    module = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(6, 9), nn.Identity(), nn.SiLU(), nn.Dropout(0.5)),
        nn.Linear(9, 8, bias=False),
        nn.Linear(8, 5),
    ).eval()
    net, x = from_torch(module, backend="numpy"), torch.randn(11, 6)
    assert net.architecture.activations == ("silu", "identity")
    assert not net.biases[1].any()
    assert_close(net.forward(x), module(x), 2e-6)


def test_modules_that_stand_in_a_chain_twice() -> None:
    function, layer, x = nn.ReLU(), nn.Linear(6, 6), torch.randn(11, 6)
    module = nn.Sequential(layer, function, layer, function, nn.Linear(6, 5))
    net = from_torch(module, backend="numpy")
    assert net.architecture.activations == ("relu", "relu")
    assert_close(net.forward(x), module(x), 2e-6)


def test_one_layer() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(11, 6)
    assert_close(from_torch(layer, backend="numpy").forward(x), layer(x), 2e-6)


def test_raw_scores_with_a_loss_that_takes_them() -> None:
    module, x = chain(nn.ReLU()), torch.randn(11, 6, dtype=torch.float64)
    y = torch.arange(11) % 5
    net = from_torch(module, loss="cross_entropy", backend="numpy")
    assert_close(net.forward(x), torch.softmax(module(x), 1))
    assert float(net.loss(x, y)) == pytest.approx(nn.functional.cross_entropy(module(x), y).item(), rel=1e-13)
    targets = torch.rand(11, 5, dtype=torch.float64)
    net = from_torch(module, loss="binary_cross_entropy", backend="numpy")
    expected = nn.functional.binary_cross_entropy_with_logits(module(x), targets, reduction="sum") / 11
    assert float(net.loss(x, targets)) == pytest.approx(expected.item(), rel=1e-13)


def test_a_copy_is_made() -> None:
    module = chain(nn.ReLU())
    before, net = module[0].weight.detach().clone(), from_torch(module, backend="numpy")
    net.theta[...] = 0
    assert torch.equal(module[0].weight, before)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_fused_module_becomes_the_network_that_it_is(dtype: str) -> None:
    module, x = FusedMLP([6, 9, 5], activation="gelu", output="softmax", dtype=dtype), torch.randn(11, 6)
    net = from_torch(module, backend="numpy")
    assert net.dtype.name == dtype
    assert_close(net.forward(x), module(x), 1e-15 if dtype == "float64" else 5e-7)
    assert from_torch(module, dtype="float32", backend="numpy").dtype.name == "float32"
    assert from_torch(module.bfloat16(), backend="numpy").dtype.name == "bfloat16"


def test_a_fused_module_that_may_use_tf32_becomes_a_network_that_may() -> None:
    module, x = FusedMLP([6, 9, 5], allow_tf32=True, seed=0), torch.randn(11, 6)
    net = from_torch(module, backend="numpy")
    assert net.architecture.precision.tf32
    assert_close(net.forward(x), module(x), 5e-7)
    assert not torch.equal(module(x), FusedMLP([6, 9, 5], seed=0)(x))
    assert not from_torch(FusedMLP([6, 5]), backend="numpy").architecture.precision.tf32


# --- what has no equal


class Residual(nn.Module):
    pass


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module, message",
    [
        (chain(nn.ELU(-1)), r"layer 1 \(ELU\) activation elu: expected alpha to be a number from"),
        (chain(nn.Hardtanh(-math.inf, 1)), r"layer 1 \(Hardtanh\) activation hard_tanh: expected low to be"),
        (chain(nn.PReLU()), r"layer 1 \(PReLU\) trains its slope.*requires_grad_\(False\) first"),
        (chain(nn.PReLU(9)), r"layer 1 \(PReLU\) has 9 slopes; expected one"),
        (chain(nn.Softplus(threshold=3)), r"layer 1 \(Softplus\) has .*threshold=3"),
        (chain(nn.ReLU(), end=nn.Softmax(dim=0)), r"layer 3 \(Softmax\) has dim=0; expected 1 or -1"),
        (chain(nn.ReLU(), end=nn.LogSoftmax(dim=1)), r"layer 3 \(LogSoftmax\) .*loss='cross_entropy'"),
        (chain(nn.ReLU(), end=nn.ReLU()), r"layer 3 \(ReLU\): expected Linear, Softmax"),
        (chain(nn.Softmax(dim=1)), r"layer 1 \(Softmax\): gpuback has softmax as the output only"),
        (chain(nn.ReLU(), nn.Tanh()), r"layer 2 \(Tanh\) follows another function, relu"),
        (chain(nn.Dropout(0.1)), r"layer 1 \(Dropout\) drops numbers in training mode; module.eval\(\) first"),
        (chain(nn.Flatten(0)), r"layer 1 \(Flatten\) flattens other axes"),
        (chain(nn.BatchNorm1d(9)), r"layer 1 \(BatchNorm1d\) is none of Linear, .*ReLU, .*SiLU"),
        (chain(Residual()), r"layer 1 \(Residual\) is none of"),
        (nn.Sequential(OwnLinear(6, 5)), r"layer 0 \(OwnLinear\) is none of"),
        (nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.GLU())), r"layer 1.1 \(GLU\)"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 5)), r"layer 0 \(ReLU\) comes before the first Linear"),
        (nn.Sequential(), "expected a chain of nn.Linear and activations, got none in Sequential"),
        (nn.Conv2d(1, 2, 3), r"layer 0 \(Conv2d\) is none of"),
    ],
)
def test_what_has_no_equal_is_refused_by_place_and_class(module: nn.Module, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        from_torch(module, backend="numpy")


def test_parameters_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"layer 1 \(Linear\): expected 9 inputs.*got 8"):
        from_torch(nn.Sequential(nn.Linear(6, 9), nn.Linear(8, 5)))
    with pytest.raises(DtypeError, match=r"layer 1 \(Linear\): expected torch.float32.*got torch.float16"):
        from_torch(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5).half()))
    with pytest.raises(OptionError, match="loss 'cross_entropy' goes with output"):
        from_torch(chain(nn.ReLU(), end=nn.Sigmoid()), loss="cross_entropy")


# --- to PyTorch


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("output", ["identity", "softmax", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_network_becomes_a_chain(activation: str, output: str, dtype: str) -> None:
    net = MLP([6, 9, 7, 5], activation=activation, output=output, loss="squared_error", dtype=dtype, seed=0)
    net.theta[...] += np.random.default_rng(0).uniform(-0.1, 0.1, net.n_parameters)
    module, x = to_torch(net), torch.randn(11, 6, dtype=getattr(torch, dtype))
    assert len(module) == (5 if output == "identity" else 6)
    assert_close(net.forward(x), module(x), 1e-13 if dtype == "float64" else 2e-6)
    again = from_torch(module, backend="numpy")
    assert again.theta.tobytes() == net.theta.tobytes()
    assert again.architecture.activations == net.architecture.activations


@pytest.mark.parametrize("output", [*ACTIVATIONS, "softplus(beta=5)", "softmax"])
def test_any_module_ends_a_chain_whose_loss_is_a_function(output: str) -> None:
    def squared(y_hat: Any, y: Any) -> tuple[Any, Any]:
        return 0.5 * ((y_hat - y) ** 2).sum(axis=1), y_hat - y

    net = MLP([6, 9, 5], activation="tanh", output=output, loss=squared, dtype="float64", backend="numpy", seed=0)
    again = from_torch(to_torch(net), loss=squared, backend="numpy")
    assert again.architecture == net.architecture and again.theta.tobytes() == net.theta.tobytes()


@pytest.mark.parametrize("activation", WITHOUT_A_MODULE)
def test_what_pytorch_has_no_module_for_is_refused_by_name(activation: str) -> None:
    with pytest.raises(ConversionError, match=f"activation '{activation}': expected one that PyTorch has a module for"):
        to_torch(MLP([6, 9, 5], activation=activation))


@pytest.mark.parametrize("dtype, step", [("bfloat16", 2**-6), ("float16", 2**-9)])
def test_16_bit_networks_become_float32_chains(dtype: str, step: float) -> None:
    net = MLP([6, 9, 5], dtype=dtype, backend="numpy", seed=0)
    module, x = to_torch(net), torch.randn(11, 6)
    assert_close(net.forward(x), module(x), step)
    assert from_torch(module, dtype=dtype, loss="cross_entropy").theta.tobytes() == net.theta.tobytes()


def test_training_goes_on_in_pytorch() -> None:
    net = MLP([6, 9, 5], dtype="float64", backend="numpy", seed=0)
    x, y = random_batch(net, 20)
    module = to_torch(net)[:-1]
    optimizer, step = torch.optim.SGD(module.parameters(), lr=0.1), TrainStep(net, SGD(0.1))
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(torch.tensor(x)), torch.tensor(y)).backward()
        optimizer.step()
        step(x, y)
    np.testing.assert_allclose(nn.utils.parameters_to_vector(module.parameters()).detach(), net.theta, rtol=1e-10)


def test_a_fused_module_becomes_a_chain_of_its_own() -> None:
    net = FusedMLP([6, 9, 5], activation="silu", output="sigmoid").half()
    module = to_torch(net)
    assert list(module.state_dict()) == list(net.state_dict())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}
    with torch.no_grad():
        module[0].weight.zero_()
    assert net.get_parameter("0.weight").any()


def test_layers_with_hooks_are_refused() -> None:
    """What a hook makes of a layer's weights is not what lies in them."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    prune.l1_unstructured(module[2], "weight", amount=0.5)
    with pytest.raises(ConversionError, match=r"layer 2 \(Linear\) has hooks"):
        from_torch(module)
    prune.remove(module[2], "weight")
    x = np.ones((5, 3), np.float32)
    np.testing.assert_allclose(from_torch(module).forward(x), module(torch.tensor(x)).detach(), rtol=1e-5)


def test_dtypes_that_gpuback_does_not_compute_in_are_named() -> None:
    known = "expected one of float64, float32, bfloat16, float16, got torch.complex64"
    with pytest.raises(DtypeError, match=known):
        from_torch(nn.Linear(3, 2, dtype=torch.complex64))
    with pytest.raises(DtypeError, match=known):
        FusedMLP([3, 2], dtype=torch.complex64)
    layer = nn.Linear(3, 2)
    layer.weight.data = layer.weight.data.half()
    with pytest.raises(DtypeError, match=r"expected a bias of torch.float16, as its weight, got torch.float32"):
        from_torch(layer)
    assert from_torch(nn.Linear(3, 2), dtype=torch.bfloat16).architecture.precision.name == "bfloat16"


def test_only_networks_become_modules() -> None:
    with pytest.raises(ConversionError, match=r"expected an MLP or a FusedMLP, got Linear"):
        to_torch(nn.Linear(3, 2))  # type: ignore[arg-type]
