"""`MLP.vjp` on a real GPU beside NumPy: the same gradients, nothing waits, leases on streams of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.gpu_networks import each_dtype, twins
from support.requirements import require_gpu

from gpuback import MLP, Adam

pytestmark = pytest.mark.gpu

CLOSE = {"float64": 1e-12, "float32": 2e-5, "tf32": 3e-3, "bfloat16": 3e-2, "float16": 6e-3}
"""Between two backends' results for a small network, relative to the norm."""


@pytest.fixture(scope="module", autouse=True)
def cupy() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_TF32", "1")
        require_gpu()
        import cupy

        yield cupy


def numbers(net: MLP, rows: int, size: float = 1.0) -> tuple[NDArray, NDArray]:
    """x and dy in θ's dtype."""
    rng = np.random.default_rng(rows)
    x, dy = rng.standard_normal((rows, net.sizes[0])), size * rng.standard_normal((rows, net.sizes[-1]))
    return x.astype(net.theta.dtype), dy.astype(net.theta.dtype)


def assert_close(dtype: str, found: Any, expected: NDArray) -> None:
    off = np.linalg.norm(found.get().astype(np.float64) - expected) / np.linalg.norm(expected)
    assert off <= CLOSE[dtype], f"off by {off:.2e}"


@each_dtype
@pytest.mark.parametrize("size", [1.0, 1e-8])
@pytest.mark.parametrize("output", ["identity", "sigmoid", "tanh", "softmax"])
@pytest.mark.parametrize("sizes, rows", [((7, 33, 64, 5), 37), ((5, 1), 9), ((20, 200, 90, 3), 3000)])
def test_gradients(sizes: tuple[int, ...], rows: int, output: str, size: float, dtype: str) -> None:
    if output == "softmax" and sizes[-1] == 1:
        return  # 1, whatever x; MLP refuses it
    cpu, gpu = twins(sizes, dtype, activation="tanh", loss="squared_error", output=output)
    x, dy = numbers(cpu, rows, size)
    (y, pullback), (expected, exact) = (net.vjp(x) for net in (gpu, cpu))
    assert_close(dtype, y, expected)
    for _ in range(2):
        found, right = (back(dy, need_input_grad=True) for back in (pullback, exact))
        assert_close(dtype, found.theta, right.theta)
        assert_close(dtype, found.inputs, right.inputs)
    for back, gradients in ((pullback, found), (exact, right)):
        back(dy[::-1], out=gradients, accumulate=True)
    assert_close(dtype, found.theta, right.theta)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("output", ["identity", "sigmoid", "tanh", "softmax"])
def test_reproducible_bits_are_numpys(output: str, dtype: str) -> None:
    nets = [
        MLP([9, 40, 5], activation="gelu", output=output, loss="squared_error", dtype=dtype, reproducible=True, seed=1,
            backend=name)
        for name in ("cupy", "numpy")
    ]  # fmt: skip
    x, dy = numbers(nets[0], 50, 1e-6)
    found = []
    for net in nets:
        y, pullback = net.vjp(x)
        gradients = pullback(dy, need_input_grad=True)
        pullback(dy, out=gradients, accumulate=True, need_input_grad=True)
        found.append([net.ops.to_numpy(part).tobytes() for part in (y, gradients.theta, gradients.inputs)])
    assert found[0] == found[1]


@each_dtype
def test_pullbacks_side_by_side_on_a_stream_of_ones_own(dtype: str, cupy: Any) -> None:
    _, net = twins((64, 128, 64, 10), dtype, loss="squared_error")
    batches = [tuple(map(cupy.asarray, numbers(net, rows))) for rows in (4000, 4000, 300)]
    expected = [net.vjp(x)[1](dy).theta.get() for x, dy in batches]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        pullbacks = [net.vjp(x)[1] for x, _ in batches]
        found = [(turn, pullbacks[turn](batches[turn][1]).theta) for turn in (0, 1, 0, 2, 1)]
        stream.synchronize()
    assert all(theta.get().tobytes() == expected[turn].tobytes() for turn, theta in found)


@each_dtype
def test_training_takes_no_more_memory_step_by_step(dtype: str, cupy: Any) -> None:
    _, net = twins((64, 128, 64, 10), dtype, loss="squared_error")
    x, target = map(cupy.asarray, numbers(net, 4000))
    optimizer, gradients, used = Adam(1e-3), None, []
    for _ in range(40):
        y, pullback = net.vjp(x)
        gradients = pullback((y - target) / len(x), out=gradients)
        optimizer.step(net, gradients, clip_norm=1.0)
        used.append(cupy.get_default_memory_pool().used_bytes())
    assert max(used[5:]) == used[4]
