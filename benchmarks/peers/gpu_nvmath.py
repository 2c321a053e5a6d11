"""cuBLASLt by way of nvmath: dW with db from the same product's epilog, and da_prev with ReLU's mask in another's."""

from __future__ import annotations

import importlib.util
from itertools import cycle
from typing import Any

import cupy
import numpy as np
from nvmath.linalg.advanced import Matmul, MatmulComputeType, MatmulEpilog, MatmulOptions, matmul

from benchmarks.cases import Case, gpu_data
from benchmarks.peers import Contestant, LeftOutError, gpu_arrays


def contestant(case: Case, variant: str) -> Contestant:
    with_torch = importlib.util.find_spec("torch") is not None
    if case.dtype == "bfloat16" and not with_torch:
        raise LeftOutError("takes bfloat16 as PyTorch's tensors only, and PyTorch is not installed")
    convert, back = (gpu_arrays.as_tensor, gpu_arrays.as_array) if with_torch else (cupy.asarray, cupy.asarray)
    planned = [plan(case, *map(convert, buffers[:3]), convert) for buffers in gpu_data.layer(case)]
    turn = cycle(planned)

    def run(weights: Any, below: Any) -> tuple[Any, Any, Any]:
        dW, auxiliary = weights.execute()
        return dW, auxiliary["bgrada"], below.execute().T

    def check() -> dict[str, Any]:
        dW, db, da_prev = map(back, run(*planned[0]))
        return {"dW": dW, "db": db.reshape(-1), "da_prev": da_prev}

    return Contestant(lambda: run(*next(turn)), check, "planned once", wait=gpu_arrays.synchronize, sets=len(planned))


def plan(case: Case, da: Any, h: Any, W: Any, convert: Any) -> tuple[Matmul, Matmul]:
    """Plan the two products of a set of buffers. cuBLASLt masks products by columns, so the second is da_prevᵀ."""
    fast = case.dtype == "tf32"
    options = MatmulOptions(
        compute_type=MatmulComputeType.COMPUTE_32F_FAST_TF32 if fast else MatmulComputeType.COMPUTE_32F
    )
    # ReLU's mask comes from a product with 1, whose result is hᵀ.
    one = convert(cupy.asarray(np.eye(case.sizes[0], dtype=gpu_data.precision_of(case).operand)))
    _, mask = matmul(one, h.T, epilog=MatmulEpilog.RELU_AUX, options=options)
    weights = Matmul(da.T, h, options=options)
    weights.plan(epilog=MatmulEpilog.BGRADA)
    below = Matmul(W.T, da.T, options=options)
    below.plan(epilog=MatmulEpilog.DRELU, epilog_inputs=mask)
    return weights, below
