"""Calls of gpuback.fused_backward, and what float64 (long double for float64) says of their results.

The oracle takes the operands as the call received them. Products are held to the contract's tolerance; what g' adds on
top (its own error, the roundings of the element-wise product) is derived from the formulas here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import gpuback
from gpuback._core import activations
from gpuback.testing import tolerance
from support.dtypes import HAS_LONG_DOUBLE
from support.oracle import FROM_A, SLOPE, G, to_tf32

WIDER = np.longdouble
DTYPES: dict[str, Any] = {
    **({"float64": np.float64} if HAS_LONG_DOUBLE else {}),
    "float32": np.float32,
    "tf32": np.float32,  # float32 with allow_tf32
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
SCALES = {"float16": [1e-6, 1e-3, 1.0, 4.0]}  # the others hold 1e-6 … 1e6
ACTIVATIONS = list(activations.ACTIVATIONS)
LAYOUTS = ["C", "F", "every other", "reversed", "transposed slice", "broadcast", "unaligned"]


def slope_error(name: str, u: float) -> float:
    """The absolute error of g', in u: one or two roundings of numbers up to 1; gelu and silu multiply the rounding of
    1 − s by up to 34 and 17 (float64: 88 and 37) before s gets to 1. exponential's is exact."""
    few = {"identity": 0, "relu": 0, "leaky_relu": 0.01, "elu": 1, "sigmoid": 1, "tanh": 2, "softplus": 8}
    few |= {"exponential": 0, "squareplus": 3, "selu": 4, "softsign": 2, "log_sigmoid": 8, "hard_tanh": 0, "relu6": 0}
    few |= {"hard_sigmoid": 0.2, "gelu_erf": 8, "sine": 4, "mish": 8, "hard_swish": 4}
    late = {"gelu": (38, 92), "silu": (21, 41)}
    return late[name][u < 2.0**-50] if name in late else few[name]


@dataclass(frozen=True)
class Layer:
    """One layer's operands; h_prev = g(a_prev) up to rounding."""

    dtype: str
    activation: str
    kind: str
    da: NDArray
    h_prev: NDArray
    a_prev: NDArray
    W: NDArray

    def backward(self, **options: Any) -> tuple[NDArray, NDArray, NDArray | None]:
        options = {"activation_prev": self.activation, "allow_tf32": self.dtype == "tf32"} | options
        if self.activation in FROM_A:
            options.setdefault("a_prev", self.a_prev)
        return gpuback.fused_backward(self.da, self.h_prev, self.W, **options)


def array(rng: np.random.Generator, shape: tuple[int, int], kind: str, scale: float, dtype: str) -> NDArray:
    values = {
        "mixed": lambda: scale * rng.standard_normal(shape),
        "positive": lambda: scale * (1 - rng.random(shape)),
        "constant": lambda: np.full(shape, scale * rng.uniform(0.5, 1)),
        "integers": lambda: rng.integers(-3, 4, shape),
    }[kind]()
    return values.astype(DTYPES[dtype])


def layer(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    dtype: str,
    *,
    activation: str = "identity",
    kind: str = "mixed",
    scale: float = 1.0,
) -> Layer:
    """da (B, nO) and W (nO, nI) times scale, a_prev (B, nI) of order 1, for shape (B, nO, nI)."""
    B, n_out, n_in = shape
    a_prev = array(rng, (B, n_in), kind, 1.0, dtype)
    h_prev = G[activation](a_prev.astype(np.float64)).astype(a_prev.dtype)
    da, W = array(rng, (B, n_out), kind, scale, dtype), array(rng, (n_out, n_in), kind, scale, dtype)
    return Layer(dtype, activation, kind, da, h_prev, a_prev, W)


def relaid(x: NDArray, layout: str) -> NDArray:
    """The same numbers, laid out otherwise; "broadcast" repeats the first row by a stride of 0."""
    if layout == "every other":
        room = np.full((2 * x.shape[0], 3 * x.shape[1]), np.nan, x.dtype)
        room[1::2, ::3] = x
        return room[1::2, ::3]
    if layout == "reversed":
        return x[::-1, ::-1].copy()[::-1, ::-1]
    if layout == "transposed slice":
        room = np.full((x.shape[1] + 2, x.shape[0] + 3), np.nan, x.dtype)
        room[1:-1, 2:-1] = x.T
        return room[1:-1, 2:-1].T
    if layout == "broadcast":
        return np.broadcast_to(x[:1], x.shape)
    if layout == "unaligned":
        room = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        room[...] = x
        return room
    return np.array(x, order=layout)


def assert_close(result: NDArray, exact: NDArray, limit: NDArray) -> None:
    assert result.shape == exact.shape
    error = np.abs(result.astype(WIDER) - exact)
    assert np.all(error <= limit), f"{(error / np.where(limit > 0, limit, 1e-300)).max():.3g} times its limit"


def assert_right(
    case: Layer,
    dW: NDArray,
    db: NDArray,
    da_prev: NDArray | None,
    *,
    dW_before: NDArray | float = 0.0,
    db_before: NDArray | float = 0.0,
) -> None:
    operand = case.da.dtype
    total = np.float64 if operand == np.float64 else np.float32
    u = 2.0**-53 if operand == np.float64 else 2.0**-24
    wide = WIDER if operand == np.float64 else np.float64
    read = to_tf32 if case.dtype == "tf32" else np.asarray  # with TF32 rounded here, what remains is float32's bound
    da, h_prev, W = (read(x).astype(wide) for x in (case.da, case.h_prev, case.W))
    any_data = case.kind == "constant"
    same_samples = len(da) > 1 and case.da.strides[0] == case.h_prev.strides[0] == 0  # Σ_b of equal terms

    assert dW.dtype == db.dtype == total
    exact = da.T @ h_prev + dW_before
    limit = tolerance(np.abs(da).T @ np.abs(h_prev), len(da), operand, any_data=any_data or same_samples)
    assert_close(dW, exact, limit + np.any(dW_before) * u * np.abs(exact))

    terms = case.da.astype(wide)  # db multiplies nothing, so TF32 does not come in; its chains are short for any data
    exact = terms.sum(axis=0) + db_before
    limit = tolerance(np.abs(terms).sum(axis=0), len(terms), operand)
    assert_close(db, exact, limit + np.any(db_before) * u * np.abs(exact))

    if da_prev is None:
        return
    assert da_prev.dtype == operand
    slope = SLOPE[case.activation]((case.a_prev if case.activation in FROM_A else case.h_prev).astype(wide))
    exact, magnitude = (da @ W) * slope, np.abs(da) @ np.abs(W)
    few = u * (slope_error(case.activation, u) * magnitude + 2 * np.abs(exact))
    limit = tolerance(magnitude * np.abs(slope), len(W), operand, exact=exact, stored=True, any_data=any_data)
    assert_close(da_prev, exact, limit + (few if case.activation != "identity" else 0))
