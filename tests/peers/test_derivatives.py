"""`MLP.vjp` against PyTorch's automatic differentiation in float64: random networks of every activation and output."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import gpuback
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.losses import LOSSES

torch = pytest.importorskip("torch")
functional = torch.nn.functional

NETWORKS, QUICK = 300, 12
OUTPUTS = sorted({output for loss in LOSSES.values() for output in loss.outputs})
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda a: 1 * a,
    "relu": torch.relu,
    "leaky_relu": lambda a: functional.leaky_relu(a, 0.01),
    "elu": functional.elu,
    "selu": functional.selu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": lambda a: torch.logaddexp(a, torch.zeros_like(a)),
    "log_sigmoid": functional.logsigmoid,
    "exponential": torch.exp,
    "softsign": functional.softsign,
    "squareplus": lambda a: (a + torch.sqrt(a * a + 4)) / 2,
    "hard_tanh": functional.hardtanh,
    "relu6": functional.relu6,
    "hard_sigmoid": lambda a: torch.clamp(a + 3, 0, 6) / 6,  # PyTorch's own multiplies by float32's 1/6
    "gelu": lambda a: functional.gelu(a, approximate="tanh"),
    "silu": functional.silu,
    "gelu_erf": functional.gelu,
    "sine": torch.sin,
    "mish": functional.mish,
    "hard_swish": lambda a: a * torch.clamp(a + 3, 0, 6) / 6,
    "softmax": lambda a: torch.softmax(a, -1),
}


def random_network(number: int) -> gpuback.MLP:
    """Of depth 1 to 4. All activations and outputs come in turn, so that a few networks have each."""
    rng = np.random.default_rng(number)
    depth = 1 + number % 4
    names = list(ACTIVATIONS)
    activations = [names[(5 * number + k) % len(names)] for k in range(depth - 1)]
    output = OUTPUTS[number // 4 % len(OUTPUTS)]
    loss = next(name for name, row in LOSSES.items() if output in row.outputs)
    sizes = rng.integers(1, 12, size=depth + 1).tolist()
    if output == "softmax":  # of one output there is none
        sizes[-1] = max(sizes[-1], 2)
    net = gpuback.MLP(
        sizes, activation=activations, output=output, loss=loss, dtype="float64", backend="numpy", seed=number
    )
    net.theta[:] += 0.3 * rng.standard_normal(net.n_parameters)
    return net


@pytest.mark.parametrize(
    "number", [n if n < QUICK else pytest.param(n, marks=pytest.mark.thorough) for n in range(NETWORKS)]
)
def test_a_random_network_has_pytorchs_derivatives(number: int) -> None:
    net = random_network(number)
    rng = np.random.default_rng(number)
    rows = int(rng.integers(1, 20))
    x, dy = rng.standard_normal((rows, net.sizes[0])), rng.standard_normal((rows, net.sizes[-1]))
    y, pullback = net.vjp(x)
    gradients = pullback(dy, need_input_grad=True)

    theta, inputs = (torch.from_numpy(array.copy()).requires_grad_() for array in (net.theta, x))
    h = inputs
    names = (*net.architecture.activations, net.architecture.output)
    for W, b, name in zip(*net.architecture.layout.split(theta), names, strict=True):
        h = FUNCTIONS[name](h @ W.mT + b)
    by_theta, by_x = torch.autograd.grad(h, (theta, inputs), torch.from_numpy(dy))

    for mine, theirs in ((y, h.detach()), (gradients.theta, by_theta), (gradients.inputs, by_x)):
        largest = max(1.0, float(theirs.abs().max()))  # x, dy and θ are of order 1
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=1e-13 * largest)


def test_every_activation_and_output_is_among_them() -> None:
    networks = [random_network(number).architecture for number in range(NETWORKS)]
    assert {name for one in networks for name in one.activations} == set(ACTIVATIONS)
    assert {one.output for one in networks} == set(OUTPUTS)
    assert {len(one.sizes) for one in networks} == {2, 3, 4, 5}
