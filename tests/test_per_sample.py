"""Each sample's gradient: norms, clipped means, all of them; against float64, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import gpuback.ops.numpy_ops
from gpuback import MLP
from gpuback.activations import ACTIVATIONS
from gpuback.errors import DtypeError, LabelError, OptionError, ShapeError
from gpuback.precision import UNIT_ROUNDOFF, Precision
from gpuback.testing import random_batch, tolerance

pytestmark = pytest.mark.on_each_backend

DTYPES: dict[str, dict[str, Any]] = {
    "float64": {"dtype": "float64"},
    "float32": {"dtype": "float32"},
    "tf32": {"dtype": "float32", "allow_tf32": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}
DIGITS = {"float64": 1e-13, "float32": 5e-6, "tf32": 4e-3, "bfloat16": 4e-2, "float16": 4e-3}
"""Of a whole network's gradient, beside its norm: a handful of roundings of each operand."""

LOSSES = [
    ("cross_entropy", "softmax"),
    ("binary_cross_entropy", "sigmoid"),
    ("squared_error", "identity"),
    ("squared_error", "softmax"),
    ("squared_error", "sigmoid"),
    ("squared_error", "tanh"),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def exact_gradients(net: MLP, x: Any, y: Any, weight: Any = None) -> NDArray[np.float64]:
    """∂(w_b ℓ_b)/∂θ, (B, n_parameters): float64, one sample after the other."""
    architecture = net.architecture
    exact = MLP(
        net.sizes,
        activation=architecture.activations,
        output=architecture.output,
        loss=architecture.loss,
        dtype="float64",
        backend="numpy",
    )
    exact.theta = net.ops.to_numpy(net.theta)
    rows = [slice(b, b + 1) for b in range(len(x))]
    return np.stack(
        [
            exact.value_and_grad(x[b], y[b], sample_weight=None if weight is None else weight[b])[1].theta
            for b in rows
        ]
    )


def as_seen(net: MLP, x: Any, y: Any) -> tuple[Any, Any]:
    """Samples and targets rounded to θ's dtype, as the network takes them."""
    return x.astype(net.theta.dtype), y if y.dtype.kind == "i" else y.astype(net.theta.dtype)


def host(net: MLP, array: Any) -> NDArray[np.float64]:
    return net.ops.to_numpy(array).astype(np.float64)


def check(net: MLP, x: Any, y: Any, weight: Any, dtype: str) -> None:
    """All three against the float64 oracle, and the norms against the gradients that they are norms of."""
    x, y = as_seen(net, x, y)
    expected = exact_gradients(net, x, y, weight)
    norms = np.linalg.norm(expected, axis=1)

    each = net.per_sample_grad(x, y, sample_weight=weight)
    assert each.theta.shape == expected.shape
    assert each.theta.dtype == net.theta.dtype
    error = np.linalg.norm(host(net, each.theta) - expected, axis=1)
    assert (error <= DIGITS[dtype] * norms).all()

    found = net.gradient_norms(x, y, sample_weight=weight)
    assert found.shape == (len(x),)
    assert found.dtype == net.theta.dtype
    u = UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"]
    np.testing.assert_allclose(host(net, found), np.linalg.norm(host(net, each.theta), axis=1), rtol=20 * u)

    clip_norm = float(np.median(norms)) or 1.0
    loss, clipped = net.value_and_clipped_grad(x, y, clip_norm, sample_weight=weight)
    check_clipped(net, clipped.theta, host(net, each.theta), clip_norm)
    rtol = 4 * u if not DTYPES[dtype].get("allow_tf32") and dtype in ("float32", "float64") else DIGITS[dtype]
    np.testing.assert_allclose(float(loss), float(net.loss(x, y, sample_weight=weight)), rtol=rtol, atol=u)


def check_clipped(net: MLP, clipped: Any, each: NDArray[np.float64], clip_norm: float) -> None:
    """The mean of what each sample's gradient, as it was computed, has left after clipping."""
    norms = np.linalg.norm(each, axis=1)
    factors = np.minimum(1, np.divide(clip_norm, norms, out=np.ones_like(norms), where=norms > 0))
    terms = factors[:, None] * each / len(each)
    magnitude, name = np.abs(terms).sum(axis=0), net.dtype.name
    bound = tolerance(magnitude, len(each), name, allow_tf32=net.architecture.precision.tf32)
    bound += 4 * UNIT_ROUNDOFF[name] * magnitude  # da is rounded once more where it is scaled
    if name == "float16":
        bound += 2.0**-24 * np.abs(each / norms[:, None]).max()
    assert (np.abs(host(net, clipped) - terms.sum(axis=0)) <= bound).all()


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype):
    net = MLP([5, 9, 7, 3], activation=activation, seed=1, **DTYPES[dtype])
    x, y = random_batch(net, 11)
    check(net, x, y, None, dtype)


@each_dtype
@pytest.mark.parametrize("loss, output", LOSSES)
def test_every_loss_with_weights(loss, output, dtype):
    net = MLP([4, 8, 3], activation="tanh", loss=loss, output=output, seed=2, **DTYPES[dtype])
    x, y = random_batch(net, 13)
    check(net, x, y, np.random.default_rng(0).uniform(-1, 3, 13).astype(np.float32), dtype)
