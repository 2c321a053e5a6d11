"""`Ops.bind_output_delta`: from ∂loss/∂ŷ through the output function, on every backend and in every format."""

import numpy as np
import pytest
from numpy.typing import NDArray

from gpuback import MLP
from gpuback._backends.registry import ops_for
from gpuback._core.activations import ACTIVATIONS

pytestmark = pytest.mark.on_each_backend

FORMATS = {
    "float64": {"dtype": "float64"},
    "float32": {},
    "tf32": {"allow_tf32": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "reproducible": {"reproducible": True},
    "reproducible bfloat16": {"dtype": "bfloat16", "reproducible": True},
}
OUTPUTS = {
    "identity": lambda y, dy: dy,
    "sigmoid": lambda y, dy: dy * y * (1 - y),
    "tanh": lambda y, dy: dy * (1 - y * y),
    "softmax": lambda y, dy: y * (dy - (dy * y).sum(axis=1, keepdims=True)),
}


def output_delta(
    net: MLP, output: str, source: NDArray | None, dy: NDArray, weight: NDArray | None, divisor: float
) -> NDArray:
    ops, dtype = net.ops, net.theta.dtype
    workspace = ops.workspace(len(dy), (2, dy.shape[1]), net.architecture.precision)
    kept = workspace.output(dy.shape[1])
    if source is not None:
        kept[...] = ops.asarray(source, dtype, "source")
    da = workspace.output_delta(workspace.output(dy.shape[1]))
    run = ops.bind_output_delta(output, None if source is None else kept, da, divisor, workspace)
    with ops.scope():
        run(ops.asarray(dy, dtype, "dy"), None if weight is None else ops.asarray(weight, dtype, "w"))
    return ops.to_numpy(ops.copy_for_display(da, np.dtype(dtype))).astype(np.float64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (9, 70)])
def test_it_is_the_transposed_jacobian(form: str, output: str, shape: tuple[int, int], weighted: bool) -> None:
    net = MLP([2, 2], loss="squared_error", seed=0, **FORMATS[form])  # type: ignore[arg-type]
    rng, rows = np.random.default_rng(8), shape[0]
    dy = rng.standard_normal(shape).astype(net.theta.dtype)
    source = rng.random(shape)
    source = (source / source.sum(axis=1, keepdims=True)).astype(net.theta.dtype)
    weight = rng.random(rows).astype(net.theta.dtype) if weighted else None
    found = output_delta(net, output, None if output == "identity" else source, dy, weight, 8.0)

    expected = OUTPUTS[output](source.astype(np.float64), dy.astype(np.float64)) / 8
    expected = expected if weight is None else expected * weight[:, None]
    size = np.abs(expected) + np.abs(source * dy).sum(axis=1, keepdims=True) * (output == "softmax") + np.abs(dy) / 8
    unit = np.finfo(net.theta.dtype).eps / 2
    rounding = 0.0 if net.dtype.itemsize > 2 else (2.0**-8 if net.dtype.name == "bfloat16" else 2.0**-11)
    assert np.all(np.abs(found - expected) <= 8 * unit * size + rounding * np.abs(expected) + 2.0**-24 * (rounding > 0))


@pytest.mark.parametrize("name", ["gelu", "silu", "softplus", "elu"])
def test_any_activation_can_be_the_output_function(name: str) -> None:
    net = MLP([2, 2], loss="squared_error", dtype="float64", seed=0)
    rng, activation = np.random.default_rng(1), ACTIVATIONS[name]
    a, dy = rng.standard_normal((7, 5)), rng.standard_normal((7, 5))
    h = np.asarray(ops_for("numpy").empty(a.shape, a.dtype))
    step = 1e-6
    values = [_apply(name, a + sign * step) for sign in (1, -1)]
    h[...] = _apply(name, a)
    found = output_delta(net, name, a if activation.derivative_from == "a" else h, dy, None, 1.0)
    np.testing.assert_allclose(found, dy * (values[0] - values[1]) / (2 * step), atol=1e-8)


def _apply(name: str, a: NDArray) -> NDArray:
    ops = ops_for("numpy")
    net = MLP([5, 5], loss="squared_error", dtype="float64", backend="numpy", seed=0)
    workspace = ops.workspace(len(a), (5, 5), net.architecture.precision)
    out, copy = np.empty_like(a), workspace.output(a.shape[1])
    copy[...] = a
    ops.bind_output(name, copy, workspace)(out)
    return out


@pytest.mark.parametrize("output", [*OUTPUTS, "silu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reproducible_bits_are_those_of_numpy(output: str, dtype: str) -> None:
    nets = [MLP([2, 2], dtype=dtype, reproducible=True, seed=0, backend=name) for name in ("auto", "numpy")]
    rng = np.random.default_rng(3)
    dy = rng.standard_normal((9, 37)).astype(np.float32)
    source = rng.random((9, 37)).astype(np.float32)
    dy[2, 3], source[4, 5] = np.nan, np.inf
    here, there = (output_delta(net, output, source, dy, rng.random(9) * 0 + 0.3, 3.0) for net in nets)
    assert here.tobytes() == there.tobytes()
