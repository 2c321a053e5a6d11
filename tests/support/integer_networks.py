"""Networks of small integers, whose sums are exact."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import gpuback
from support.dtypes import DTYPES, OPERAND
from support.oracle import to_tf32


def rounded(dtype: str, numbers: NDArray[np.float64], scale: float = 1.0) -> NDArray[np.float64]:
    """Stored once in the operands' dtype, scaled as da is in float16."""
    stored = (numbers * scale).astype(np.float32 if dtype != "float64" else np.float64)
    return stored.astype(OPERAND[DTYPES[dtype]["dtype"]]).astype(np.float64) / scale


def check_integer_network(activation: str, sizes: list[int], batch_size: int, dtype: str) -> None:
    """Weights of −1, 0 and 1, B a power of two: sums are exact, whatever their order, and each store rounds once."""
    rng, depth = np.random.default_rng(len(sizes)), len(sizes) - 1
    net = gpuback.MLP(sizes, activation=activation, loss="squared_error", **DTYPES[dtype])
    net.theta[...] = rng.integers(-1, 2, net.n_parameters)
    x, y = rng.integers(-2, 3, (batch_size, sizes[0])), rng.integers(-2, 3, (batch_size, sizes[-1]))
    weight = rng.integers(0, 3, batch_size)
    W, b = ([None, *(array.astype(float) for array in arrays)] for arrays in (net.weights, net.biases))
    g = (lambda a: np.maximum(a, 0)) if activation == "relu" else (lambda a: a)

    h = [x.astype(float)]
    for k in range(1, depth):
        h.append(rounded(dtype, g(h[-1] @ W[k].T + b[k])))  # below 2¹¹, which TF32 holds
    output = h[-1] @ W[depth].T + b[depth]
    residual = output - y
    loss = np.mean(weight * (residual**2).sum(axis=1) / 2)
    scale = float(batch_size) if dtype == "float16" else 1.0
    read = to_tf32 if dtype == "tf32" else np.asarray
    da = rounded(dtype, weight[:, None] * residual / batch_size, scale)
    gradients = []
    for k in range(depth, 0, -1):
        gradients = [(read(da).T @ read(h[k - 1])).ravel(), da.sum(axis=0), *gradients]
        dh = read(da) @ W[k]
        da = rounded(dtype, dh * (h[k - 1] > 0 if activation == "relu" else 1), scale)
    theta = np.concatenate(gradients)

    value, result = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
    assert np.array_equal(net.forward(x), output)
    assert value == net.loss(x, y, sample_weight=weight) == loss.astype(value.dtype)
    assert np.array_equal(result.theta, theta)
    assert np.array_equal(result.inputs, dh)
    _, again = net.value_and_grad(x, y, sample_weight=weight, out=result, accumulate=True)
    assert np.array_equal(again.theta, 2 * theta)
    trace = net.trace(x, y, sample_weight=weight)
    assert (
        np.array_equal(trace.output, output)
        and value.dtype.type(trace.loss) == value
        and np.array_equal(trace.dh[0], dh)
    )
    pairs = zip(trace.dW[1:], trace.db[1:], strict=True)
    assert np.array_equal(np.concatenate([part.ravel() for pair in pairs for part in pair]), theta)
