"""Times of a layer's forward pass, h = max(x Wᵀ + b, 0): gpuback's launch, and PyTorch's in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import cupy
import numpy as np

from benchmarks.cases import CheckFailedError, LeftOutError, gpu_data, selection
from benchmarks.cases.gpu_data import Buffers, wide
from benchmarks.harness import gpu_measure, gpu_timing
from benchmarks.hopper.gpu_times import median_of
from benchmarks.peers.gpu_arrays import as_array, as_tensor
from gpuback._backends.registry import ops_for
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.precision import UNIT_ROUNDOFF
from gpuback.testing import tolerance

Calls = list[Callable[[], Any]]
"""One for each set of buffers. A call returns h, or None where it wrote into the set's `da_prev`."""


def timed(shape: Sequence[int], name: str) -> dict[str, Any]:
    """Check and time a contestant: "gpuback" or "PyTorch graph". The shape is (B, nO, nI)."""
    B, n_out, n_in = shape
    # The set's da_prev (B, nI of the backward pass) is h, and its da (B, nO of the backward pass) is x.
    case = selection.layer((B, n_in, n_out), "bfloat16")
    try:
        sets = [one._replace(W=one.W.reshape(n_out, n_in)) for one in gpu_data.layer(case)]
        bias = cupy.asarray(np.linspace(-1, 1, n_out, dtype=np.float32))
        calls = (_of_gpuback if name == "gpuback" else _of_pytorch)(sets, bias)
        _check(sets[0], bias, calls[0], name)
        turn = cycle(calls)
        capture = gpu_timing.cupy_graph if name == "gpuback" else gpu_timing.torch_graph
        seconds = median_of(capture(lambda: next(turn)(), len(calls)))
    finally:
        gpu_measure.free_memory()
    n_bytes, flops = 2 * (B * (n_in + n_out) + n_in * n_out), 2 * B * n_in * n_out
    said = f"{seconds * 1e6:.1f} µs, {n_bytes / seconds / 1e12:.2f} TB/s, {flops / seconds / 1e12:.0f} TFLOP/s"
    return {"seconds": seconds, "bytes": n_bytes, "flops": flops, "said": said}


def _of_gpuback(sets: Sequence[Buffers], bias: Any) -> Calls:
    (B, n_in), n_out = sets[0].da.shape, len(bias)
    ops, precision = ops_for("cupy"), gpu_data.precision_of(selection.layer((B, n_out, n_in), "bfloat16"))
    workspace, relu = ops.workspace(B, (n_in, n_out), precision), ACTIVATIONS["relu"]

    def call(one: Buffers) -> Callable[[], None]:
        launch = ops.bind_forward(one.W, bias, one.da_prev, None, relu, workspace)
        return lambda: launch(one.da)

    return [call(one) for one in sets]


def _of_pytorch(sets: Sequence[Buffers], bias: Any) -> Calls:
    if gpu_timing.torch is None:
        raise LeftOutError("not installed")
    torch, b = gpu_timing.torch, as_tensor(bias).bfloat16()

    def call(one: Buffers) -> Callable[[], Any]:
        x, W = as_tensor(one.da), as_tensor(one.W)
        return lambda: torch.relu(torch.nn.functional.linear(x, W, b))

    return [call(one) for one in sets]


def _check(one: Buffers, bias: Any, call: Callable[[], Any], name: str) -> None:
    one.da_prev.data.memset(0xFF, one.da_prev.nbytes)  # NaN shows values that are not written
    returned = call()
    result = wide(one.da_prev if returned is None else as_array(returned))
    x, W, b = wide(one.da), wide(one.W), wide(bias)
    exact = (x @ W.T + b).clip(0, None)
    if name == "gpuback":
        magnitude = abs(x) @ abs(W).T + abs(b)
        allowed = magnitude * float(tolerance(1.0, W.shape[1] + 1, "bfloat16")) + exact * UNIT_ROUNDOFF["bfloat16"]
        error = float((abs(result - exact) / allowed.clip(1e-300, None)).max())
    else:
        error = float(cupy.linalg.norm(result - exact)) / (0.02 * float(cupy.linalg.norm(exact)))
    if not error <= 1:
        raise CheckFailedError(f"check failed: h is off by {error:.3g} times what is allowed")
