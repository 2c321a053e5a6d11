"""Backward passes of some layers only: the bits of the whole pass, and nothing computed that was not asked for."""

import itertools

import numpy as np
import pytest

from gpuback import MLP
from gpuback._network.backprop import empty_gradients
from gpuback._network.layers import Block, BoundNetwork

pytestmark = pytest.mark.on_each_backend

SIZES, ROWS = (5, 9, 7, 3), 6


def backward(net: MLP, trainable: tuple[bool, ...], need_input_grad: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Return ∇θ, with −7 where nothing was written, and ∂loss/∂x."""
    rng = np.random.default_rng(4)
    x = net.ops.asarray(rng.standard_normal((ROWS, SIZES[0])), net.theta.dtype, "x")
    y = net.ops.asarray(rng.integers(SIZES[-1], size=ROWS), np.dtype(np.int64), "y")
    network = BoundNetwork.of(net.architecture, net.theta, net.ops)
    block = Block(network, ROWS, ROWS, need_gradient=False, need_input_grad=False)
    back = block.bind_backward(trainable, need_input_grad)
    gradients = empty_gradients(net.architecture, net.ops)
    gradients.theta[...] = -7.0
    with net.ops.scope():
        network.refresh()
        h_0 = block.forward(x)
        block.loss(y, None)
        back(h_0, gradients.weights, gradients.biases, False)
    dx = None if block.input_gradient is None else net.ops.to_numpy(block.input_gradient).copy()
    return net.ops.to_numpy(gradients.theta).copy(), dx


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"reproducible": True}], ids=str)
@pytest.mark.parametrize("need_input_grad", [False, True])
def test_frozen_layers_leave_the_other_gradients_as_they_are(options: dict[str, object], need_input_grad: bool) -> None:
    net = MLP(SIZES, activation=["silu", "relu"], seed=3, **options)  # type: ignore[arg-type]
    whole, dx = backward(net, (True, True, True), need_input_grad)
    for trainable in itertools.product([False, True], repeat=3):
        if not (any(trainable) or need_input_grad):
            continue
        gradient, dx_here = backward(net, trainable, need_input_grad)
        parts, expected = (net.architecture.layout.split(theta) for theta in (gradient, whole))
        for k, trains in enumerate(trainable):
            for part, full in zip((parts[0][k], parts[1][k]), (expected[0][k], expected[1][k]), strict=True):
                np.testing.assert_array_equal(part, full if trains else np.full_like(full, -7.0))
        if dx is None:
            assert dx_here is None
        else:
            np.testing.assert_array_equal(dx_here, dx)
