"""Per-sample gradients beside torch.func: vmap(grad) of each sample's own loss.

Not part of the ordinary tests: `make test-peers`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuback import MLP
from gpuback.testing import random_batch

torch = pytest.importorskip("torch")
functional = torch.nn.functional

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "softplus": functional.softplus, "silu": functional.silu}
LOSSES = {
    "cross_entropy": lambda a, y: functional.cross_entropy(a, y, reduction="none"),
    "binary_cross_entropy": lambda a, y: functional.binary_cross_entropy_with_logits(a, y, reduction="none").sum(),
    "squared_error": lambda a, y: ((a - y) ** 2).sum() / 2,
}
DTYPES = {"float64": (torch.float64, 1e-13), "float32": (torch.float32, 2e-5)}


def torch_gradients(net: MLP, x: Any, y: Any, weight: Any) -> np.ndarray:
    """∂(w_b ℓ_b)/∂θ of each sample, (B, n_parameters), by vmap(grad)."""
    dtype, _ = DTYPES[net.dtype.name]
    parameters = [
        torch.tensor(part, dtype=dtype) for pair in zip(net.weights, net.biases, strict=True) for part in pair
    ]
    names, loss = net.architecture.activations, LOSSES[net.architecture.loss]

    def of_one(parameters: list[Any], x: Any, y: Any, w: Any) -> Any:
        h = x
        for k, name in enumerate([*names, None]):
            h = functional.linear(h, parameters[2 * k], parameters[2 * k + 1])
            h = h if name is None else ACTIVATIONS[name](h)
        return w * loss(h, y)

    targets = torch.tensor(y) if y.dtype.kind == "i" else torch.tensor(y, dtype=dtype)
    batch = torch.tensor(x, dtype=dtype), targets, torch.tensor(weight, dtype=dtype)
    each = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0, 0))(parameters, *batch)
    return np.hstack([part.reshape(len(x), -1).numpy() for part in each]).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norms_gradients_and_clipped_means(activation: str, loss: str, dtype: str) -> None:
    net = MLP([7, 13, 9, 4], activation=activation, loss=loss, dtype=dtype, backend="numpy", seed=5)
    x, y = random_batch(net, 23)
    weight = np.random.default_rng(1).uniform(0.5, 2, 23)
    expected, (_, rtol) = torch_gradients(net, x, y, weight), DTYPES[dtype]
    norms = np.linalg.norm(expected, axis=1)

    each = net.per_sample_grad(x, y, sample_weight=weight).theta
    assert (np.abs(each - expected) <= rtol * norms[:, None]).all()
    np.testing.assert_allclose(net.gradient_norms(x, y, sample_weight=weight), norms, rtol=rtol)

    max_norm = float(np.median(norms))
    _, clipped = net.value_and_clipped_grad(x, y, max_norm, sample_weight=weight)
    mean = (np.minimum(1, max_norm / norms)[:, None] * expected).mean(axis=0)
    assert (np.abs(clipped.theta - mean) <= rtol * max_norm).all()
