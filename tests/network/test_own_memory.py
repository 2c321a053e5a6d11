"""Outputs share memory with nothing that is read, with θ, or with the state of an optimizer: refused by name."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuback import MLP, SGD, Adam, Gradients
from gpuback.errors import OptionError

pytestmark = pytest.mark.on_each_backend

N = 4 * 6 + 6 + 6 * 3 + 3


def network(**options: Any) -> MLP:
    return MLP([4, 6, 3], **{"seed": 0, "loss": "squared_error"} | options)


def over(theta: Any) -> Gradients:
    return Gradients(theta, (), ())


def batch(rows: int = 10) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, 4), np.float32), rng.standard_normal((rows, 3), np.float32)


CALLS = {
    "value_and_grad": lambda net, x, y, out: net.value_and_grad(x, y, out=out),
    "value_and_clipped_grad": lambda net, x, y, out: net.value_and_clipped_grad(x, y, 1.0, out=out),
    "no clipping": lambda net, x, y, out: net.value_and_clipped_grad(x, y, np.inf, out=out),
    "vjp": lambda net, x, y, out: net.vjp(x)[1](y, out=out),
}
each_call = pytest.mark.parametrize("call", CALLS)


@each_call
def test_theta_and_state_are_left_alone(call: str) -> None:
    net = network()
    x, y = batch()
    optimizers = SGD(0.1, 0.9), Adam()
    gradients = net.value_and_grad(x, y)[1]
    for optimizer in optimizers:
        optimizer.step(net, gradients)
    arrays = {"θ": net.theta} | {name: array for each in optimizers for name, array in each.state.items()}
    before = {name: array.copy() for name, array in arrays.items()}
    for name, array in arrays.items():
        for _ in range(2):
            with pytest.raises(OptionError, match=f"out: expected gradients in memory of their own.*overlaps.*{name}"):
                CALLS[call](net, x, y, over(array))
        np.testing.assert_array_equal(array, before[name])
    CALLS[call](net, x, y, gradients)  # what does not overlap is taken


@each_call
def test_part_of_an_array_is_enough(call: str) -> None:
    whole = np.zeros(3 * N, np.float32)
    net = network(backend="numpy")
    x, y = batch()
    x_inside, y_inside = whole[:40].reshape(10, 4), whole[2 * N : 2 * N + 30].reshape(10, 3)
    x_inside[...], y_inside[...] = x, y
    for out, name in ((whole[39 : 39 + N], "x"), (whole[N + 1 : 2 * N + 1], "d?y")):
        with pytest.raises(OptionError, match=rf"overlaps {name}$"):
            CALLS[call](net, x_inside, y_inside, over(out))
    np.testing.assert_array_equal(x_inside, x)
    CALLS[call](net, x_inside, y_inside, over(whole[40 : 40 + N]))  # beside them
    np.testing.assert_array_equal(y_inside, y)


@pytest.mark.numpy_only
@pytest.mark.parametrize("call", ["value_and_grad", "value_and_clipped_grad"])
def test_weights_and_arrays_that_are_converted_count_too(call: str) -> None:
    net = network(backend="numpy")
    x, y = batch()
    memory = np.zeros(8 * N, np.uint8)
    out = over(memory[: 4 * N].view(np.float32))
    weight = out.theta[:10]
    weight[...] = 1
    compute = getattr(net, call)
    more = (1.0,) if call == "value_and_clipped_grad" else ()
    with pytest.raises(OptionError, match=r"overlaps sample_weight$"):
        compute(x, y, *more, sample_weight=weight, out=out)
    double = memory[: 8 * 40].view(np.float64).reshape(10, 4)
    with pytest.raises(OptionError, match=r"overlaps x$"):
        compute(double, y, *more, out=out)


def test_labels_count_too() -> None:
    net = network(backend="numpy", loss="cross_entropy")
    memory = np.zeros(N + N % 2, np.float32)
    labels = memory[:20].view(np.int64)
    with pytest.raises(OptionError, match=r"overlaps y$"):
        net.value_and_grad(batch()[0], labels, out=over(memory[:N]))


def test_an_optimizer_does_not_step_by_its_own_memory() -> None:
    net = network()
    optimizer = SGD(0.1, 0.9)
    optimizer.step(net, net.value_and_grad(*batch())[1])
    before = net.theta.copy()
    for array, name in ((net.theta, "θ"), (optimizer.state["velocity"], "velocity")):
        with pytest.raises(OptionError, match=f"gradients: expected gradients in memory of their own.*{name}"):
            optimizer.step(net, SimpleNamespace(theta=array))
    np.testing.assert_array_equal(net.theta, before)
    assert optimizer.step_count == 1


def test_state_that_comes_later_counts() -> None:
    net, optimizer = network(), SGD(0.1)
    x, y = batch()
    gradients = net.value_and_grad(x, y)[1]
    optimizer.step(net, gradients)
    optimizer.momentum = 0.5
    twin, its = copy.deepcopy((net, optimizer))
    for each, state in ((net, optimizer.state), (twin, its.state)):
        with pytest.raises(OptionError, match="velocity"):
            each.value_and_grad(x, y, out=over(state["velocity"]))


@pytest.mark.numpy_only
def test_what_is_gone_is_forgotten() -> None:
    """An optimizer's arrays are not kept alive, and their memory may be used again."""
    net = network()
    x, y = batch()
    gradients = net.value_and_grad(x, y)[1]
    for _ in range(5):
        optimizer = Adam()
        optimizer.step(net, gradients)
        array = optimizer.state["first_moment"]
        del optimizer
        assert len(net._reserved._arrays) <= 1 + 2 * 2
    with pytest.raises(OptionError):
        net.value_and_grad(x, y, out=over(array))
