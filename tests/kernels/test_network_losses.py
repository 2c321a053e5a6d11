"""The losses that take a whole narrow network two launches, against NumPy's layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulator import EmulatorLauncher
from numpy.typing import NDArray
from support.kernel_networks import DTYPES, network_on
from support.requirements import require_emulator

from gpuback import MLP, losses
from gpuback.testing import random_batch

require_emulator()

SIZES, BATCH_SIZE = (17, 30, 5), 130
LOSSES: list[tuple[Any, str]] = [
    *(
        (loss, output)
        for loss in (losses.AbsoluteError(), losses.Huber(0.75), losses.Quantile([0.1, 0.3, 0.5, 0.7, 0.9]))
        for output in ("identity", "sigmoid", "tanh")
    ),
    (losses.Poisson(), "exponential"),
    (losses.CrossEntropy(label_smoothing=0.125, class_weight=[1, 0.5, 0, 3, 2]), "softmax"),
]
OTHERS = {
    "huber": losses.Huber(0.76),
    "quantile": losses.Quantile([0.1, 0.3, 0.5, 0.7, 0.91]),
    "cross_entropy": losses.CrossEntropy(label_smoothing=0.13, class_weight=[1, 0.5, 0, 3, 2.02]),
}
"""Parameters that are a little off: the difference has to show."""

CLOSE = {"float32": 1e-5, "tf32": 3e-3, "float16": 3e-3, "bfloat16": 2e-2}
"""How far off two gradients may be, relative to their Euclidean norm."""


def batch(net: MLP, rows: bool) -> tuple[NDArray, NDArray, NDArray]:
    x, y = random_batch(net, BATCH_SIZE)
    rng = np.random.default_rng(1)
    return x, rng.random((BATCH_SIZE, SIZES[-1])) if rows else y, 2 * rng.random(BATCH_SIZE)


def off(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.subtract(found, expected, dtype=np.float64)) / np.linalg.norm(expected))


def described(choice: Any) -> str:
    return f"{choice[0].name} {choice[1]}"


@pytest.mark.thorough(first=len(LOSSES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", LOSSES, ids=described)
def test_losses_and_gradients(choice: tuple[losses.Loss, str], dtype: str) -> None:
    loss, output = choice
    options = {"activation": "tanh", "loss": loss, "output": output, "seed": 3, **DTYPES[dtype]}
    net = network_on(EmulatorLauncher("random", copies="random"), SIZES, **options)
    plain = MLP(SIZES, **options, backend="numpy")
    plain.theta = net.theta
    for rows in (False, True) if loss.name == "cross_entropy" else (False,):
        x, y, weight = batch(net, rows)
        value, gradients = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
        expected, right = plain.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
        limit = CLOSE[dtype]
        assert off(value, expected) < limit
        assert off(gradients.theta, right.theta) < limit and off(gradients.inputs, right.inputs) < limit
        assert net.loss(x, y, sample_weight=weight).tobytes() == value.tobytes()
        assert off(net.forward(x), plain.forward(x)) < limit
        if dtype == "float32" and loss.name in OTHERS:
            other = MLP(SIZES, **options | {"loss": OTHERS[loss.name]}, backend="numpy")
            other.theta = net.theta
            wrong, gradients = other.value_and_grad(x, y, sample_weight=weight)
            assert off(wrong, expected) > 10 * limit and off(gradients.theta, right.theta) > 10 * limit


@pytest.mark.parametrize("loss", [losses.Huber(0.5), losses.CrossEntropy(label_smoothing=0.1)], ids=repr)
def test_a_step_of_theirs_is_two_launches(loss: losses.Loss) -> None:
    net = network_on(EmulatorLauncher(), SIZES, dtype="bfloat16", loss=loss)
    says = f"in two launches: beside the sums of all gradients, registers have no room for {loss!r}"
    assert says in str(net.explain(9))


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("form", ["fused_passes", "layers"])
@pytest.mark.parametrize("wrong", [-1, 5, 2**62])
def test_a_label_out_of_range_makes_a_weighted_loss_nan(wrong: int, form: str) -> None:
    """Labels on a GPU are not checked before."""
    loss = losses.CrossEntropy(class_weight=[1, 2, 3, 4, 5])
    net = network_on(EmulatorLauncher(checked=True), SIZES, form, loss=loss)
    x, y, _ = batch(net, rows=False)
    y[7] = wrong
    passes = net._acquire(len(x), need_gradient=False)
    assert np.isnan(passes.loss(x.astype(np.float32), y, None))
    y[7] = 0
    assert np.isfinite(passes.loss(x.astype(np.float32), y, None))
