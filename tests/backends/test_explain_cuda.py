"""Which way a network goes on CUDA, and the reason that `explain` gives for it."""

from __future__ import annotations

import numpy as np
import pytest
from support.kernel_layers import A10, H200, HOPPER

from gpuback._backends.cuda.ops import CudaOps
from gpuback._core.architecture import Architecture
from gpuback._cuda.launch import DeviceLimits
from gpuback._network.explain import Explanation, explain


class Nothing:
    """A launcher that only says what it would run on."""

    def __init__(self, limits: DeviceLimits) -> None:
        self.limits = limits


def explained(sizes: tuple[int, ...], batch_size: int = 4096, limits: DeviceLimits = H200, **options) -> Explanation:
    ops = CudaOps(np, Nothing(limits), name="cupy")
    return explain(Architecture.create(sizes, **options), ops, batch_size)


@pytest.mark.parametrize(
    ("sizes", "options", "launches", "reason"),
    [
        ((64,) * 8, {"dtype": "bfloat16"}, ["fused_step"], "a block has room for all weights"),
        ((30,) * 13, {"dtype": "float16"}, ["fused_step"], "registers for the sums of all gradients"),
        ((100, 128, 10), {"dtype": "float32"}, ["fused_step"], ""),
        ((64,) * 12, {"dtype": "bfloat16"}, ["fused_passes", "fused_weight_gradients_64"], "not of 11 up to 64 wide"),
        ((128,) * 8, {"dtype": "bfloat16"}, ["fused_passes", "fused_weight_gradients_128"], "not of 7 up to 128 wide"),
        (
            (64,) * 8,
            {"dtype": "bfloat16", "limits": A10},
            ["fused_passes", "fused_weight_gradients_64"],
            "bytes of shared memory of 101,376",
        ),
    ],
)
def test_a_narrow_network_goes_in_one_launch_or_in_two(sizes, options, launches, reason):
    explanation = explained(sizes, **options)
    assert [step.operation.partition(",")[0] for step in explanation.steps] == launches
    assert ("one launch" if len(launches) == 1 else "two launches") in explanation.header
    assert reason in explanation.header


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ((64, 129, 10), {}, "a layer is 129 wide, and whole networks are taken up to 128"),
        ((8, 8, 3), {"dtype": "float64"}, "float64 goes layer by layer"),
        ((128,) * 4, {"limits": A10}, "bytes of shared memory of 101,376"),
    ],
)
def test_what_goes_layer_by_layer_says_why(sizes, options, reason):
    explanation = explained(sizes, **options)
    assert f"layer by layer: {reason}" in explanation.header or reason in explanation.header
    assert [step.name for step in explanation.steps][-1] == "update"
    assert len(explanation.steps) == 2 * (len(sizes) - 1) + 2


def test_two_launches_cost_as_many_products_as_layers():
    whole, layers = explained((64,) * 12), explained((64,) * 12, dtype="float64")
    assert whole.flops == layers.flops
    assert whole.bytes < layers.bytes


@pytest.mark.parametrize(
    ("limits", "dtype", "says"),
    [
        (H200, "bfloat16", "; kernels for Hopper are off (GPUBACK_HOPPER=1 turns them on)"),
        (HOPPER, "float16", "; kernels for Hopper are on (GPUBACK_HOPPER=1)"),
        (HOPPER, "float32", None),
        (A10, "bfloat16", None),
    ],
)
def test_the_switch_is_named_where_it_could_matter(limits, dtype, says):
    header = explained((64, 129, 10), dtype=dtype, limits=limits).header
    assert header.endswith(says) if says else "Hopper" not in header
