"""Every kernel that launch plans can ask for: for gates, which compile all of them, and for tests, which run them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

from gpuback._backends.cuda import network_plans, plans
from gpuback._core.precision import Precision
from gpuback._cuda.launch import Variant

MOST_SHARED_BYTES, HALF_OF_SHARED_BYTES = 99 * 1024, 49 * 1024
"""What a block of a whole network's kernels takes follows from the network. These stand for it: the most that a block
may have on every GPU with tensor cores, and what leaves room for two."""


class CompiledKernel(NamedTuple):
    """A variant, with what its launches have in common."""

    variant: Variant
    block: int
    shared_bytes: int
    tensor_cores: bool


def every_kernel() -> list[CompiledKernel]:
    """Every kernel that the plans above can ask for."""
    return list(dict.fromkeys(_each()))


def _each() -> Iterator[CompiledKernel]:
    for operand in ("bfloat16", "float16", "float"):
        for max_out in (64, 128):
            for max_in in (64, 128):
                for slabs in plans.slab_choices(operand, max_out, max_in):
                    yield CompiledKernel(
                        slabs.variant(operand), 32 * plans.NARROW_WARPS, slabs.shared_bytes(operand), True
                    )
        for entry in ("layer_mma", "forward_mma"):
            for tile in (128, 64):
                variant = Variant("layer/layer_mma.cu", entry, (f"Element={operand}", f"TILE={tile}"))
                yield CompiledKernel(variant, plans.MMA_THREADS, plans.mma_shared(operand, tile), True)
    for real in ("float", "double"):
        for entry in ("layer_simt", "forward_simt"):
            for tile in plans.simt_tiles(real):
                yield CompiledKernel(
                    plans.simt_variant(entry, real, tile), plans.THREADS, plans.simt_shared(real, tile), False
                )
    for name in ("bfloat16", "float16", "float32", "float64"):
        precision = Precision.of(name)
        chosen = [plans.loss_plan(1, precision), plans.output_plan(1, precision)]
        chosen += [plans.per_sample_plan(entry, 1, precision) for entry in get_args(plans.PerSampleEntry)]
        if name != "float64":
            chosen.append(plans.copy_plan("copy_weights", 1, precision))
        if precision.sixteen_bit:
            chosen.append(plans.copy_plan("copy_rows", 1, precision))
        for plan in chosen:
            yield CompiledKernel(plan.variant, plan.block, plan.shared_bytes, False)
    for name in ("bfloat16", "float16", "float32"):
        precision = Precision.of(name)
        chosen = [plans.exact_plan(entry, 1, 1, precision) for entry in get_args(plans.ExactEntry)]
        chosen += [plans.exact_row_plan(entry, 1, precision) for entry in ("exact_loss_rows", "exact_output_rows")]
        for plan in chosen:
            yield CompiledKernel(plan.variant, plan.block, plan.shared_bytes, False)
    for real in get_args(plans.Real):
        for entry in get_args(plans.VectorEntry):
            plan = plans.vector_plan(entry, 1, real)
            yield CompiledKernel(plan.variant, plan.block, plan.shared_bytes, False)
    for name, tf32 in (("bfloat16", False), ("float16", False), ("float32", True), ("float32", False)):
        precision = Precision.of(name, allow_tf32=tf32)
        tensor_cores = plans.uses_tensor_cores(precision)
        for shape in network_plans.SHAPES:
            variant = network_plans.step_variant(shape, precision)
            threads = 32 * network_plans.step_warps(precision)
            yield CompiledKernel(variant, threads, MOST_SHARED_BYTES, tensor_cores)
        for entry in get_args(network_plans.ChainEntry):
            variant = network_plans.chain_variant(entry, precision)
            yield CompiledKernel(variant, 32 * network_plans.CHAIN_WARPS, HALF_OF_SHARED_BYTES, tensor_cores)
