"""Output functions with constants and of a user's own: ŷ and da_L on every backend and in the reproducible mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuback import MLP
from gpuback._backends.registry import ops_for
from gpuback._core.activation_names import activation_named
from gpuback._core.precision import Precision
from gpuback._core.scratch import Scratch
from gpuback.errors import OptionError

pytestmark = pytest.mark.on_each_backend

ROWS, WIDTH, DIVISOR = 9, 5, 8.0


def through(ops: Any, name: str, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Return ŷ and da of random a, dy and weights."""
    rng = np.random.default_rng(3)
    given, dy = (2 * rng.standard_normal((ROWS, WIDTH)).astype(np.float32) for _ in range(2))
    weight = rng.random(ROWS).astype(np.float32)
    workspace = ops.workspace(ROWS, (WIDTH, WIDTH), precision)
    a, da = workspace.output(WIDTH), workspace.hidden(WIDTH)
    a[...] = given
    out = ops.empty((ROWS, WIDTH), np.dtype(np.float32))
    ops.bind_output(name, a, workspace)(out)
    a[...] = given
    source = a if activation_named(name).derivative_from == "a" else out
    ops.bind_output_delta(name, source, da, DIVISOR, workspace)(dy, weight)
    return np.array(out), np.array(da)


def exact(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a, dy = (2 * rng.standard_normal((ROWS, WIDTH)).astype(np.float32).astype(np.float64) for _ in range(2))
    weight = rng.random(ROWS).astype(np.float32).astype(np.float64)
    row, out = activation_named(name), np.empty_like(a)
    row.forward(a, out, Scratch(a))
    row.backward(dy, a if row.derivative_from == "a" else out, Scratch(a))
    return out, dy * weight[:, None] / DIVISOR


@pytest.mark.parametrize("name", ["silu(beta=2)", pytest.param("softplus(beta=5)", marks=pytest.mark.thorough)])
def test_outputs_and_what_goes_back_through_them(name: str) -> None:
    found = through(MLP([1, 1], loss="squared_error").ops, name, Precision.of("float32"))
    for mine, right in zip(found, exact(name), strict=True):
        np.testing.assert_allclose(mine, right, rtol=2e-6, atol=1e-6)


def test_the_bits_of_the_reproducible_mode() -> None:
    precision = Precision.of("float32", reproducible=True)
    found = through(MLP([1, 1], loss="squared_error", reproducible=True).ops, "silu(beta=2)", precision)
    expected = through(ops_for("numpy", reproducible=True), "silu(beta=2)", precision)
    for mine, right, close in zip(found, expected, exact("silu(beta=2)"), strict=True):
        assert mine.tobytes() == right.tobytes()
        np.testing.assert_allclose(right, close, rtol=1e-6, atol=1e-7)


def test_outputs_without_a_reproducible_form_are_refused() -> None:
    with pytest.raises(OptionError, match=r"activation 'sine\(w0=3\)' has no reproducible form"):
        ops = MLP([1, 1], loss="squared_error", reproducible=True).ops
        through(ops, "sine(w0=3)", Precision.of("float32", reproducible=True))
