"""jvp, taylor, pullbacks of pullbacks, hvp and gnvp against torch.func and JAX in float64: random networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_derivatives import FUNCTIONS, NETWORKS, QUICK, random_network

import gpuback

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch.func's own

LIMIT = 4e-13
"""Of an error relative to the largest number of a result, or to 1; 2·10⁻¹⁴ was seen."""

JAX_NETWORKS = 8
"""Each takes JAX some seconds to compile."""


def numbered(count: int) -> pytest.MarkDecorator:
    marks = pytest.mark.thorough
    return pytest.mark.parametrize("number", [n if n < QUICK else pytest.param(n, marks=marks) for n in range(count)])


def close(mine: Any, theirs: Any) -> None:
    theirs = np.asarray(theirs)
    largest = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(np.asarray(mine), theirs, rtol=0, atol=LIMIT * largest)


class Case:
    """A network, and a batch with directions and adjoints of everything."""

    def __init__(self, number: int) -> None:
        self.net = net = random_network(number)
        rng = np.random.default_rng(number)
        n_in, n_out = net.sizes[0], net.sizes[-1]
        rows = int(rng.integers(1, 9))
        draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
        self.x, self.dx, self.v = draw(rows, n_in), draw(rows, n_in), draw(2, rows, n_in)
        self.theta, self.dtheta = net.theta.copy(), draw(net.n_parameters)
        self.y_bar, self.first_bar, self.second_bar = draw(rows, n_out), draw(2, rows, n_out), draw(1, rows, n_out)
        self.weights = draw(1, 2)
        targets: dict[str, Callable[[], NDArray[Any]]] = {
            "cross_entropy": lambda: rng.integers(0, n_out, rows),
            "binary_cross_entropy": lambda: rng.random((rows, n_out)),
            "poisson": lambda: rng.integers(0, 5, (rows, n_out)).astype(float),
        }
        self.targets = targets.get(net.architecture.loss, lambda: draw(rows, n_out))()


def torch_network(net: gpuback.MLP, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    names = (*net.architecture.activations, net.architecture.output)
    for W, b, name in zip(*net.architecture.layout.split(theta), names, strict=True):
        x = FUNCTIONS[name](x @ W.mT + b)
    return x


def torch_losses(loss: str, y_hat: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if loss == "cross_entropy":
        return -torch.log(y_hat[torch.arange(len(y)), y])
    if loss == "binary_cross_entropy":
        return -(y * torch.log(y_hat) + (1 - y) * torch.log(1 - y_hat)).sum(1)
    if loss == "poisson":
        return (y_hat - y * torch.log(y_hat)).sum(1)
    return 0.5 * ((y_hat - y) ** 2).sum(1)


@numbered(NETWORKS)
def test_a_random_network_has_pytorchs_second_derivatives(number: int) -> None:
    case = Case(number)
    net = case.net
    theta, x, dtheta, dx = (torch.from_numpy(a) for a in (case.theta, case.x, case.dtheta, case.dx))
    F = lambda theta, x: torch_network(net, theta, x)  # noqa: E731
    func = torch.func

    y, dy = func.jvp(F, (theta, x), (dtheta, dx))
    mine = net.jvp(case.x, case.dx, case.dtheta)
    close(mine[0], y)
    close(mine[1], dy)

    c = torch.from_numpy(case.y_bar)

    def gradients(theta: torch.Tensor, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        by_theta, by_x = func.vjp(F, theta, x)[1](c)
        return (by_theta * dtheta).sum() + (by_x * dx).sum() + (F(theta, x) * c).sum()

    expected = func.grad(gradients, argnums=(0, 1))(theta, x, c)
    result = net.vjp(case.x)[1].vjp(case.y_bar)[1](
        inputs=case.dx, theta=case.dtheta, outputs=case.y_bar, need_input_grad=True
    )
    close(result.theta, expected[0])
    close(result.inputs, expected[1])
    close(result.outputs, dy)

    loss, targets = net.architecture.loss, torch.from_numpy(case.targets)
    mean = lambda theta, x: torch_losses(loss, F(theta, x), targets).mean()  # noqa: E731
    expected = func.jvp(func.grad(mean, argnums=(0, 1)), (theta, x), (dtheta, dx))[1]
    product = net.hvp(case.x, case.targets, case.dtheta, case.dx)
    close(product.theta, expected[0])
    close(product.inputs, expected[1])
    if net.architecture.output == "softmax":
        return

    def along(theta: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        once = lambda x: func.jvp(lambda x: F(theta, x), (x,), (v,))[1]  # noqa: E731
        return func.jvp(once, (x,), (v,))

    v = torch.from_numpy(case.v)

    def sums(theta: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        first, second = zip(*(along(theta, x, one) for one in v), strict=True)
        weighted = sum(w * one for w, one in zip(case.weights[0], second, strict=True))
        by_first = sum((torch.from_numpy(bar) * one).sum() for bar, one in zip(case.first_bar, first, strict=True))
        return (F(theta, x) * c).sum() + by_first + (torch.from_numpy(case.second_bar[0]) * weighted).sum()

    t = net.taylor(case.x, case.v, second=case.weights)
    for d in range(2):
        close(t.first[d], along(theta, x, v[d])[0])
    close(t.second[0], sum(w * along(theta, x, one)[1] for w, one in zip(case.weights[0], v, strict=True)))
    expected = func.grad(sums, argnums=(0, 1, 2))(theta, x, v)
    back = t.pullback(case.y_bar, case.first_bar, case.second_bar, need_input_grad=True)
    for found, right in zip((back.theta, back.inputs, back.directions), expected, strict=True):
        close(found, right)


JAX_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda a: a,
    "relu": jax.nn.relu,
    "leaky_relu": lambda a: jax.nn.leaky_relu(a, 0.01),
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jax.numpy.tanh,
    "softplus": jax.nn.softplus,
    "log_sigmoid": jax.nn.log_sigmoid,
    "exponential": jax.numpy.exp,
    "softsign": jax.nn.soft_sign,
    "squareplus": lambda a: jax.nn.squareplus(a, 4),
    "hard_tanh": jax.nn.hard_tanh,
    "relu6": jax.nn.relu6,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "gelu": lambda a: jax.nn.gelu(a, approximate=True),
    "silu": jax.nn.silu,
    "gelu_erf": lambda a: jax.nn.gelu(a, approximate=False),
    "sine": jax.numpy.sin,
    "mish": jax.nn.mish,
    "hard_swish": jax.nn.hard_swish,
    "softmax": jax.nn.softmax,
}


@numbered(JAX_NETWORKS)
def test_a_random_network_has_jaxs_second_derivatives(number: int) -> None:
    case = Case(number)
    net, names = case.net, (*case.net.architecture.activations, case.net.architecture.output)

    def F(theta: Any, x: Any) -> Any:
        for W, b, name in zip(*net.architecture.layout.split(theta), names, strict=True):
            x = JAX_FUNCTIONS[name](x @ W.T + b)
        return x

    def everything(theta: Any, x: Any, dtheta: Any, dx: Any, c: Any) -> tuple[Any, ...]:
        hessians = jax.vmap(jax.hessian(lambda one: F(theta, one)))(x)
        through = lambda theta, x: jax.vjp(F, theta, x)[1](c)  # noqa: E731
        return (
            jax.jvp(F, (theta, x), (dtheta, dx))[1],
            jax.vmap(jax.jacrev(lambda one: F(theta, one)))(x),
            jax.numpy.trace(hessians, axis1=2, axis2=3),
            *jax.vjp(through, theta, x)[1]((dtheta, dx)),
        )

    with jax.enable_x64(True):
        arrays = map(jax.numpy.asarray, (case.theta, case.x, case.dtheta, case.dx, case.y_bar))
        moved, jacobian, laplacian, by_theta, by_x = jax.jit(everything)(*arrays)
    close(net.jvp(case.x, case.dx, case.dtheta)[1], moved)
    close(net.jacobian(case.x), jacobian)
    if net.architecture.output != "softmax":
        close(net.laplacian(case.x).second[0], laplacian)
    result = net.vjp(case.x)[1].vjp(case.y_bar)[1](inputs=case.dx, theta=case.dtheta, need_input_grad=True)
    close(result.theta, by_theta)
    close(result.inputs, by_x)
