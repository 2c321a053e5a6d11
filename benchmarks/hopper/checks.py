"""Layers and networks through the public API, held to float64 and to the same bits the second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

import gpuback
from benchmarks.cases import CheckFailedError
from gpuback.testing import check_gradients, random_batch, random_layer, tolerance

ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "identity", "leaky_relu")
DTYPES = ("bfloat16", "bfloat16", "bfloat16", "float16")
KINDS = ("mixed", "positive")
STEEPEST = 1.2
"""Above any |g'| of these activations."""

SLOPE_ERROR = 116 * 2.0**-24
"""Of g' on CUDA; see docs/numerics.md."""


def backward(shape: Sequence[int], seeds: int) -> dict[str, Any]:
    """Check fused_backward of a shape (B, nO, nI), with activations, formats and kinds of data in turn."""
    B, n_out, n_in = shape
    worst = 0.0
    for seed in range(seeds):
        activation, dtype, kind = (of[seed % len(of)] for of in (ACTIVATIONS, DTYPES, KINDS))
        if kind == "positive" and activation != "relu":
            kind = "mixed"
        scale = 0.1 if dtype == "float16" else 1.0
        rng = np.random.default_rng([seed, *shape])
        case = random_layer(rng, B, n_out, n_in, activation_prev=activation, kind=kind, scale=scale, dtype=dtype)
        options: dict[str, Any] = {"activation_prev": activation}
        arrays = [cupy.asarray(x) for x in (case.da, case.h_prev, case.W)]
        if activation in ("gelu", "silu"):
            options["a_prev"] = cupy.asarray(case.a_prev)
        first, again = ([cupy.asnumpy(x) for x in gpuback.fused_backward(*arrays, **options)] for _ in range(2))
        what = f"seed {seed}, {activation}, {dtype}, {kind}"
        _require_same(first, again, what)
        exact, magnitudes = _exact(case, activation)
        for name, result, true, magnitude in zip(("dW", "db", "da_prev"), first, exact, magnitudes, strict=True):
            if name == "da_prev":
                allowed = tolerance(STEEPEST * magnitude, n_out, dtype, exact=true, stored=True)
                allowed = allowed + SLOPE_ERROR * magnitude
            else:
                allowed = tolerance(magnitude, B, dtype)
            worst = max(worst, _share(result, true, allowed, f"{name}, {what}"))
    return {"worst": worst, "said": f"{seeds} seeds, at most {worst:.2f} of the allowed error"}


def _exact(case: Any, activation: str) -> tuple[list[Any], list[Any]]:
    """Compute the results in float64, and those of absolute values without g'."""
    da, h, W, a = (x.astype(np.float64) for x in (case.da, case.h_prev, case.W, case.a_prev))
    a_prev = {"a_prev": a} if activation in ("gelu", "silu") else {}
    exact = gpuback.fused_backward(da, h, W, activation_prev=activation, **a_prev)
    magnitudes = gpuback.fused_backward(abs(da), abs(h), abs(W), activation_prev="identity")
    return list(exact), list(magnitudes)


def forward(shape: Sequence[int], seeds: int) -> dict[str, Any]:
    """Check h = g(x Wᵀ + b) of a network's first layer, from its trace."""
    B, n_out, n_in = shape
    worst = 0.0
    for seed in range(seeds):
        dtype = DTYPES[seed % len(DTYPES)]
        net = gpuback.MLP((n_in, n_out, 3), activation="relu", dtype=dtype, backend="cupy", seed=seed)
        x, y = random_batch(net, B, seed)
        first, again = (net.trace(x, y) for _ in range(2))
        result = cupy.asnumpy(first.h[1])
        _require_same([result], [cupy.asnumpy(again.h[1])], f"seed {seed}, {dtype}")
        operand = random_layer(np.random.default_rng(0), 1, 1, 1, dtype=dtype).W.dtype
        h, W = (cupy.asnumpy(part).astype(operand).astype(np.float64) for part in (first.h[0], net.weights[0]))
        b = cupy.asnumpy(net.biases[0]).astype(np.float64)
        true = np.maximum(h @ W.T + b, 0)
        allowed = tolerance(abs(h) @ abs(W).T + abs(b), n_in + 1, dtype, exact=true, stored=True)
        worst = max(worst, _share(result, true, allowed, f"h, seed {seed}, {dtype}"))
    return {"worst": worst, "said": f"{seeds} seeds, at most {worst:.2f} of the allowed error"}


def network(sizes: Sequence[int], batch: int, seeds: int) -> dict[str, Any]:
    """Check gradients beside finite differences in float64, and the bits of gradients and of three steps twice."""
    for seed in range(seeds):
        activation = ("relu", "tanh", "gelu")[seed % 3]

        def made(activation: str = activation, seed: int = seed) -> gpuback.MLP:
            return gpuback.MLP(sizes, activation=activation, dtype="bfloat16", backend="cupy", seed=seed)

        net, what = made(), f"seed {seed}, {activation}"
        x, y = random_batch(net, batch, seed)
        report = check_gradients(net, x, y)
        if not report.passed:
            raise CheckFailedError(f"check failed: {what}: {report}")
        _require_same(*([_bits(net.value_and_grad(x, y)[1].theta)] for _ in range(2)), what)
        _require_same(*([_bits(_trained(made(), x, y).theta)] for _ in range(2)), f"{what}, steps")
    return {"said": f"{seeds} seeds: finite differences, gradients and steps twice"}


def _trained(net: gpuback.MLP, x: Any, y: Any) -> gpuback.MLP:
    step = gpuback.TrainStep(net, gpuback.Adam(1e-3))
    for _ in range(3):
        step(x, y)
    return net


def _bits(array: Any) -> Any:
    return cupy.asnumpy(array)


def _require_same(first: Sequence[Any], again: Sequence[Any], what: str) -> None:
    for one, other in zip(first, again, strict=True):
        if one.tobytes() != other.tobytes():
            raise CheckFailedError(f"check failed: other bits at the second time, {what}")


def _share(result: Any, exact: Any, allowed: Any, what: str) -> float:
    """Return the largest error over what is allowed.

    Raises:
        CheckFailedError: it is above 1, or no number.
    """
    error = abs(result.astype(np.float64) - exact)
    share = float(np.max(error / np.maximum(allowed, 1e-300)))
    if not share <= 1:
        wrong = np.argwhere(~(error <= allowed))
        raise CheckFailedError(
            f"check failed: {what}: off by {share:.3g} times what is allowed; {len(wrong)} of {error.size} numbers, "
            f"the first at {wrong[0].tolist()}, the last at {wrong[-1].tolist()}"
        )
    return share
