"""Runs every kernel on small ragged layers, and says which it ran: for compute-sanitizer.

compute-sanitizer --tool memcheck python tests/gpu/kernels/every_kernel.py
"""

from __future__ import annotations

import sys
from dataclasses import replace

import cupy
import numpy as np

import gpuback
from gpuback import SGD, Adam, TrainStep
from gpuback._backends.cuda import layer_plans, split_k
from gpuback._backends.exact import products as exact_products
from gpuback._backends.registry import ops_for
from gpuback._gates.variants import every_kernel
from gpuback._training.optimizers import Optimizer
from gpuback.testing import random_batch, random_layer

DTYPES = {
    "bfloat16": ("bfloat16", False),
    "float16": ("float16", False),
    "tf32": ("float32", True),
    "float32": ("float32", False),
    "float64": ("float64", False),
}
NARROW = [(n_out, n_in) for n_out in (61, 101) for n_in in (50, 123)]
FOR_HOPPER = [(61, 50), (101, 123), (201, 123)]
NARROW_NETWORKS = [(9, 31, 5), (20, 64, 33, 10), (100, 128, 7), (9, *[40] * 9, 5), (100, 128, 90, 128, 7)]
"""For each kernel that takes a whole network, one that goes through it."""

SHARED_BYTES = (None, 166912, 101376)
"""Of this device, of an A100 and of an A10: smaller ones get shallower circular buffers."""


def layer(rows: int, n_out: int, n_in: int, dtype: str, allow_tf32: bool, activation: str = "gelu") -> None:
    case = random_layer(np.random.default_rng(0), rows, n_out, n_in, activation_prev=activation, dtype=dtype)
    da, h_prev, W, a_prev = (cupy.asarray(x) for x in (case.da, case.h_prev, case.W, case.a_prev))
    a_prev = a_prev if activation == "gelu" else None
    gpuback.fused_backward(da, h_prev, W, activation_prev=activation, a_prev=a_prev, allow_tf32=allow_tf32)


def networks(sizes: tuple[int, ...], rows: int, dtype: str, allow_tf32: bool) -> None:
    options = {"dtype": dtype, "allow_tf32": allow_tf32, "activation": "silu", "backend": "cupy", "seed": 0}
    for optimizer in (Adam(), SGD(0.1)):
        train(gpuback.MLP(sizes, **options), optimizer, rows)
    if dtype != "float64" and not allow_tf32:
        train(gpuback.MLP(sizes, **options, reproducible=True), Adam(), rows)


def train(net: gpuback.MLP, optimizer: Optimizer, rows: int) -> None:
    x, y = random_batch(net, rows)
    TrainStep(net, optimizer, clip_norm=1.0)(x, y)
    net.forward(x)
    net.gradient_norms(x, y)
    net.per_sample_grad(x, y)
    net.value_and_clipped_grad(x, y, 0.5)
    net.ops.norm(net.theta)


def want(items: int) -> None:
    """Makes plans content with so few work tiles that small layers get large tiles and long splits; and exact
    products with so few terms in a block that there are several.
    """
    exact_products.BLOCK = 64
    split_k.WORK_TILES_WANTED = layer_plans.SIMT_WORK_TILES_WANTED = items
    layer_plans.SIMT_LARGE_TILES_WANTED = items // 2
    for plan in (layer_plans.layer_plan, layer_plans.delta_plan, layer_plans.forward_plan):
        plan.cache_clear()


def main() -> None:
    cupy.cuda.set_allocator(None)  # each array an allocation of its own, with ends that a sanitizer knows
    launcher = ops_for("cupy").launcher  # type: ignore[attr-defined]
    limits = launcher.limits
    chosen = [DTYPES[name] for name in sys.argv[1:] or DTYPES]
    for dtype, allow_tf32 in chosen:
        for shared_bytes in SHARED_BYTES:
            fewer = min(shared_bytes or limits.shared_bytes, limits.shared_bytes)
            launcher.limits = replace(limits, shared_bytes=fewer, wgmma=False)
            for n_out, n_in in NARROW:
                layer(200 + (shared_bytes or 0) % 7, n_out, n_in, dtype, allow_tf32)
        launcher.limits = limits
        for n_out, n_in in FOR_HOPPER if limits.wgmma else ():
            for activation in ("gelu", "relu"):
                layer(1207, n_out, n_in, dtype, allow_tf32, activation)
        layer(150, 150, 137, dtype, allow_tf32)
        networks((33, 150, 10), 150, dtype, allow_tf32)
        for sizes in NARROW_NETWORKS:
            networks(sizes, 301, dtype, allow_tf32)
    want(4)
    for dtype, allow_tf32 in chosen:
        layer(301, 150, 137, dtype, allow_tf32)
        networks((33, 150, 140, 10), 301, dtype, allow_tf32)
    cupy.cuda.runtime.deviceSynchronize()
    ran = {*launcher._functions, *ops_for("cupy", reproducible=True).launcher._functions}  # type: ignore[attr-defined]
    known = {kernel.variant for kernel in every_kernel()}
    print(f"ran {len(ran & known)} of {len(known)} kernels")
    if chosen == [*DTYPES.values()]:
        for variant in sorted(known - ran):
            print("not run:", variant.source, variant.entry, *variant.defines)


if __name__ == "__main__":
    main()
