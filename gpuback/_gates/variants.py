"""List every kernel that launch plans can ask for. Gates compile all of them, tests run them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

from gpuback._backends.cuda import (
    layer_plans,
    network_layout,
    network_plans,
    row_plans,
    wgmma_plans,
    wgmma_wide_plans,
)
from gpuback._backends.cuda.formats import Accum
from gpuback._core.precision import Precision
from gpuback._cuda.launch import Variant

MOST_SHARED_BYTES, HALF_OF_SHARED_BYTES = 99 * 1024, 49 * 1024
"""Shared memory of fused networks' kernels depends on the network. These sizes stand for it: the most that a block may
have on every GPU with tensor cores, and a size that leaves room for two blocks."""


class CompiledKernel(NamedTuple):
    """A variant, with what its launches have in common."""

    variant: Variant
    block: int
    shared_bytes: int


def every_kernel() -> list[CompiledKernel]:
    """List every kernel that launch plans can ask for, each once."""
    return list(dict.fromkeys(_each()))


def _each() -> Iterator[CompiledKernel]:
    for operand in ("bfloat16", "float16", "float"):
        for max_out in (64, 128):
            for max_in in (64, 128):
                for narrow in layer_plans.narrow_tile_choices(operand, max_out, max_in):
                    yield CompiledKernel(
                        narrow.variant(operand), 32 * layer_plans.NARROW_WARPS, narrow.shared_bytes(operand)
                    )
        if operand != "float":
            yield from _wgmma_layers(operand)
        for entry in ("layer_mma", "forward_mma"):
            for size in (128, 64):
                variant = layer_plans.mma_variant(entry, operand, size)
                yield CompiledKernel(variant, layer_plans.MMA_THREADS, layer_plans.mma_shared(operand, size))
    for accum in ("float", "double"):
        for entry in ("layer_simt", "forward_simt"):
            for tile in layer_plans.simt_tiles(accum):
                yield CompiledKernel(
                    layer_plans.simt_variant(entry, accum, tile),
                    layer_plans.SIMT_THREADS,
                    layer_plans.simt_shared(accum, tile),
                )
    for name in ("bfloat16", "float16", "float32", "float64"):
        precision = Precision.of(name)
        of_outputs = row_plans.loss_plan, row_plans.output_plan, row_plans.output_delta_plan
        chosen = [plan(1, precision) for plan in of_outputs]
        chosen += [row_plans.per_sample_plan(entry, 1, precision) for entry in get_args(row_plans.PerSampleEntry)]
        if name != "float64":
            chosen.append(row_plans.copy_plan("copy_weights", 1, precision))
        if precision.sixteen_bit:
            chosen.append(row_plans.copy_plan("copy_rows", 1, precision))
            chosen.append(row_plans.copy_plan("copy_elements", 1, precision))
        for plan in chosen:
            yield CompiledKernel(plan.variant, plan.block, plan.shared_bytes)
    for name in ("bfloat16", "float16", "float32"):
        precision = Precision.of(name)
        chosen = [row_plans.exact_plan(entry, 1, 1, precision) for entry in get_args(row_plans.ExactEntry)]
        chosen += [row_plans.exact_row_plan(entry, 1, precision) for entry in get_args(row_plans.ExactRowEntry)]
        for plan in chosen:
            yield CompiledKernel(plan.variant, plan.block, plan.shared_bytes)
    for accum in get_args(Accum):
        for entry in get_args(row_plans.VectorEntry):
            plan = row_plans.vector_plan(entry, 1, accum)
            yield CompiledKernel(plan.variant, plan.block, plan.shared_bytes)
    for name, tf32 in (("bfloat16", False), ("float16", False), ("float32", True), ("float32", False)):
        precision = Precision.of(name, allow_tf32=tf32)
        for shape in network_plans.SHAPES:
            variant = network_plans.step_variant(shape, precision)
            threads = 32 * network_plans.step_warps(precision)
            yield CompiledKernel(variant, threads, MOST_SHARED_BYTES)
        if precision.sixteen_bit:
            for shape in network_plans.WGMMA_SHAPES:
                variant = network_plans.wgmma_step_variant(shape, precision)
                yield CompiledKernel(variant, network_plans.WGMMA_THREADS, network_layout.slab_bytes(*shape))
        for entry in get_args(network_plans.TwoLaunchEntry):
            variant = network_plans.two_launch_variant(entry, precision)
            yield CompiledKernel(variant, 32 * network_plans.TWO_LAUNCH_WARPS, HALF_OF_SHARED_BYTES)


def _wgmma_layers(operand: str) -> Iterator[CompiledKernel]:
    for panels in wgmma_plans.NARROW_PANELS:
        for from_a in (False, True):
            shared = panels.shared_bytes(from_a)
            yield CompiledKernel(panels.variant(operand, from_a), wgmma_plans.THREADS, shared)
    for forward in wgmma_plans.FORWARD_PANELS:
        yield CompiledKernel(forward.variant(operand), wgmma_plans.THREADS, forward.shared_bytes)
    for entry in ("layer_wgmma", "forward_wgmma"):
        variant = wgmma_wide_plans.variant(entry, operand)
        yield CompiledKernel(variant, wgmma_plans.THREADS, wgmma_wide_plans.SHARED_BYTES)
