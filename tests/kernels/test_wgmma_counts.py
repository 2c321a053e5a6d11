"""What a layer's kernels for Hopper move, counted by the emulator on the plan for an H200: nothing is moved twice."""

from __future__ import annotations

import pytest
from emulator import EmulatorLauncher
from emulator.counts import Counts
from support.kernel_layers import HOPPER, PRECISIONS, Layer
from support.requirements import require_emulator

from gpuback._backends.cuda import layer_plans, wgmma_plans
from gpuback._core.integers import ceil_div

require_emulator()
pytestmark = pytest.mark.thorough

BYTES = 2
"""Of a bfloat16."""


def counts_of(layer: Layer, which: str) -> Counts:
    launcher = EmulatorLauncher(checked=True, limits=HOPPER)
    getattr(layer, which)(launcher)
    assert len(launcher.launches) == 1
    return launcher.counts


def moved(numbers: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in numbers.items() if count}


@pytest.mark.parametrize(
    "batch_size, n_out, n_in, activation",
    [
        (65536, 64, 64, "relu"),
        (16384, 128, 128, "gelu"),
        (8192, 256, 256, "relu"),
        (1000, 72, 136, "tanh"),
    ],
)
def test_a_backward_pass_reads_and_writes_everything_once(batch_size, n_out, n_in, activation):
    """da once for each column of blocks, W once for each block that has rows; partial results of clusters."""
    plan = layer_plans.layer_plan(batch_size, n_out, n_in, PRECISIONS["bfloat16"], HOPPER)
    panels, split = wgmma_plans.narrow_panels(n_out, n_in), plan.split
    columns = ceil_div(n_in, panels.columns)
    chains = ceil_div(batch_size, split.rows_per_split // wgmma_plans.CLUSTER)
    partial = 4 * (columns * panels.max_out * panels.columns + 128 * ceil_div(panels.max_out, 128))
    groups = ceil_div(split.splits, split.group_size)
    results = split.splits + (groups if groups > 1 else 0)  # one for each cluster and, at the second level, each group
    below = BYTES * batch_size * n_in
    count = counts_of(Layer(batch_size, n_out, n_in, "bfloat16", activation), "backward")
    assert moved(count.bytes_read) == {
        "da_map": columns * BYTES * batch_size * n_out,
        "h_map": below,
        **({"source_map": below} if activation == "gelu" else {}),
        "w_map": chains * BYTES * n_out * n_in,
        "partials": results * partial,
    }
    assert moved(count.bytes_written) == {
        "da_prev_map": below,
        "dw_oi": 4 * n_out * n_in,
        "db_o": 4 * n_out,
        "partials": results * partial,
    }
    assert set(moved(count.atomics)) == {"arrivals"}


@pytest.mark.parametrize("batch_size, n_out, n_in", [(16384, 64, 64), (8192, 128, 128), (4096, 256, 256)])
def test_a_forward_pass_reads_and_writes_everything_once(batch_size, n_out, n_in):
    plan = layer_plans.forward_plan(batch_size, n_out, n_in, PRECISIONS["bfloat16"], HOPPER)
    steps = ceil_div(batch_size, 64)
    blocks = ceil_div(steps, ceil_div(steps, plan.launch.grid))  # those that have rows
    count = counts_of(Layer(batch_size, n_out, n_in, "bfloat16", "tanh"), "forward")
    assert moved(count.bytes_read) == {
        "h_map": BYTES * batch_size * n_in,
        "w_map": blocks * BYTES * n_out * n_in,
        "bias_o": plan.launch.grid * 4 * n_out,
    }
    assert moved(count.bytes_written) == {"out_map": BYTES * batch_size * n_out}


@pytest.mark.parametrize(
    "which, layer",
    [
        ("backward", Layer(1024, 64, 64, "bfloat16", "relu")),
        ("backward", Layer(1024, 128, 128, "bfloat16", "gelu")),
        ("backward", Layer(1024, 256, 256, "bfloat16", "tanh")),
        ("forward", Layer(1024, 256, 256, "bfloat16", "tanh")),
    ],
    ids=str,
)
def test_shared_memory_is_free_of_bank_conflicts(which, layer):
    count = counts_of(layer, which)
    assert count.conflicts_by_line == {}
    assert count.extra_wavefronts_read == count.extra_wavefronts_written == 0
