"""Layers and networks through the public API, held to float64 and to the same bits the second time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import cupy
import numpy as np

import gpuback
from benchmarks.cases import CheckFailedError
from gpuback._backends.cuda import network_plans
from gpuback.testing import check_gradients, random_batch, random_layer, tolerance

ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "identity", "leaky_relu")
DTYPES = ("bfloat16", "bfloat16", "bfloat16", "float16")
KINDS = ("mixed", "positive")
STEEPEST = 1.2
"""Above any |g'| of these activations."""

FEW = 64
"""Samples for finite differences."""

CLOSE, OF_A_SAMPLE = 0.01, 0.5
"""Distance of gradients and updates of two backends, relative to their length. Sums in another order change a rounding
to 16 bits now and then, and through it the side of ReLU's kink. A missing sample shows as 1/√B: half of it counts."""

SLOPE_ERROR = 116 * 2.0**-24
"""Of g' on CUDA; see docs/numerics.md."""


def backward(shape: Sequence[int], seeds: int) -> dict[str, Any]:
    """Check fused_backward of a shape (B, nO, nI), with activations, formats and kinds of data in turn."""
    B, n_out, n_in = shape
    worst = 0.0
    for seed in range(seeds):
        rng = np.random.default_rng([seed, *shape])
        activation, dtype, kind = ACTIVATIONS[seed % len(ACTIVATIONS)], str(rng.choice(DTYPES)), rng.choice(KINDS)
        scale = 0.1 if dtype == "float16" else 1.0
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
    """Check gradients and three steps beside the NumPy backend's, which rounds in the same places; and bits twice."""
    worst = 0.0
    for seed in range(seeds):
        activation = ("relu", "tanh", "gelu")[seed % 3]
        what = f"seed {seed}, {activation}"
        options: dict[str, Any] = {"activation": activation, "dtype": "bfloat16", "seed": seed}
        on_gpu, on_cpu = (partial(gpuback.MLP, sizes, backend=backend, **options) for backend in ("cupy", "numpy"))
        net, x_and_y = on_gpu(), random_batch(on_cpu(), batch, seed)
        distance = partial(_distance, allowed=min(CLOSE, OF_A_SAMPLE / batch**0.5))
        if seed == 0:
            report = check_gradients(net, *(part[:FEW] for part in x_and_y))
            if not report.passed:
                raise CheckFailedError(f"check failed: {what}: {report}")
        first, again = (net.value_and_grad(*x_and_y)[1] for _ in range(2))
        _require_same([cupy.asnumpy(first.theta)], [cupy.asnumpy(again.theta)], what)
        true = on_cpu().value_and_grad(*x_and_y)[1]
        for kind in ("weights", "biases"):
            for k, (own, exact) in enumerate(zip(getattr(first, kind), getattr(true, kind), strict=True), 1):
                worst = max(worst, distance(cupy.asnumpy(own), exact, f"layer {k}'s {kind}, {what}"))
        trained, again_trained, exact = (_trained(made(), seed, *x_and_y) for made in (on_gpu, on_gpu, on_cpu))
        _require_same([trained], [again_trained], f"{what}, steps")
        start = on_cpu().theta
        worst = max(worst, distance(trained - start, exact - start, f"θ after steps, {what}"))
    return {"worst": worst, "said": f"{seeds} seeds, at most {worst:.1e} of the norm off"}


def network_with_db_apart(sizes: Sequence[int], batch: int, seeds: int) -> dict[str, Any]:
    """Check the same where db comes by products of its own, which helps if columns from another panel fail."""
    try:
        _set_db_apart(True)
        return network(sizes, batch, seeds)
    finally:
        _set_db_apart(False)


def _set_db_apart(apart: bool) -> None:
    network_plans.DB_APART = apart
    network_plans.step_plan.cache_clear()


def _trained(net: gpuback.MLP, seed: int, x: Any, y: Any) -> Any:
    step = gpuback.TrainStep(net, gpuback.SGD(0.1) if seed % 2 else gpuback.Adam(1e-3, eps=1e-3))
    for _ in range(3):
        step(x, y)
    return cupy.asnumpy(net.theta)


def _distance(result: Any, exact: Any, what: str, allowed: float) -> float:
    """Return the distance of two arrays, relative to the length of the second.

    Raises:
        CheckFailedError: it is above what is allowed, or no number.
    """
    off = float(np.linalg.norm(result - exact) / np.linalg.norm(exact))
    if not off <= allowed:
        raise CheckFailedError(f"check failed: {what}: off by {off:.2g} of the norm, allowed is {allowed:.2g}")
    return off


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
