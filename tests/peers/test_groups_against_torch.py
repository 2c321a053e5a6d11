"""Frozen layers, learning rates by layer and undecayed biases beside PyTorch's parameter groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuback import MLP, SGD, Adam, AdamW, TrainStep
from gpuback.torch import to_torch

torch = pytest.importorskip("torch")

STEPS, SIZES = 100, (5, 16, 8, 2)
OPTIMIZERS = [
    (SGD, torch.optim.SGD, {"lr": 0.03}),
    (SGD, torch.optim.SGD, {"lr": 0.03, "weight_decay": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (Adam, torch.optim.Adam, {"lr": 0.01}),
    (Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
]
GROUPS: dict[str, dict[str, Any]] = {
    "last layer": {"trainable": [False, False, True]},
    "biases": {"trainable": [(False, True)] * 3},
    "layer in between": {"trainable": [True, False, True]},
    "rates": {"multipliers": [0.1, 1, (1, 2)]},
    "weights decay": {"decay_biases": False},
    "all": {"trainable": [(False, True), True, True], "multipliers": [1, 0.1, (0, 2)], "decay_biases": False},
}


def pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def torch_groups(
    model: Any,
    options: dict[str, Any],
    *,
    trainable: Any = (True,) * 3,
    multipliers: Any = (1,) * 3,
    decay_biases: bool = True,
) -> list[dict[str, Any]]:
    """PyTorch's way of saying it: a parameter group for each tensor that is trained."""
    groups = []
    layers = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    for layer, trains, factors in zip(layers, map(pair, trainable), map(pair, multipliers), strict=True):
        for parameter, trained, factor in zip((layer.weight, layer.bias), trains, factors, strict=True):
            parameter.requires_grad_(trained)
            group = {"params": [parameter], "lr": options["lr"] * factor}
            if parameter is layer.bias and not decay_biases:
                group["weight_decay"] = 0.0
            if trained:
                groups.append(group)
    return groups


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("kind, peer, options", OPTIMIZERS)
def test_a_hundred_steps_in_float64(
    kind: Any, peer: Any, options: dict[str, Any], clip_norm: float | None, groups: str
) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, SIZES[0])), rng.standard_normal((64, SIZES[-1]))
    net = MLP(SIZES, activation="tanh", loss="squared_error", dtype="float64", backend="numpy", seed=0)
    start, model = net.theta.copy(), to_torch(net)
    theirs = peer(torch_groups(model, options, **GROUPS[groups]), **options)
    own = {("learning_rate" if name == "lr" else name): value for name, value in options.items()}
    step = TrainStep(net, kind(**own, **GROUPS[groups]), clip_norm=clip_norm)
    samples, targets = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(STEPS):
        step(x, y)
        theirs.zero_grad()
        (0.5 * (model(samples) - targets).square().sum(1).mean()).backward()
        if clip_norm is not None:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, clip_norm)
        theirs.step()
    expected = np.concatenate([parameter.detach().numpy().ravel() for parameter in model.parameters()])
    moved = expected != start
    assert moved.mean() > 0.05
    np.testing.assert_array_equal(net.theta != start, moved)
    assert np.abs(net.theta - expected).max() <= 1e-13
