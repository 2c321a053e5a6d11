"""What a layer's kernels move, counted by the emulator on the plan for an H200: nothing is read or written twice."""

from __future__ import annotations

import functools

import pytest
from emulator import EmulatorLauncher
from emulator.counts import Counts
from support.kernel_layers import H200, PRECISIONS, Layer
from support.requirements import require_emulator

from gpuback._backends.cuda import layer_plans, split_k

require_emulator()
pytestmark = pytest.mark.thorough

BYTES = 2
"""Of a bfloat16."""

DB_PARTIAL = 4 * (4 * 32 * 4)
"""Bytes of a partial db: four warps hold it, four float32 in each of 32 lanes."""


@functools.cache
def counts(batch_size: int, width: int, activation: str = "tanh") -> Counts:
    """Of the backward pass of a bfloat16 layer, width → width."""
    return counts_of(Layer(batch_size, width, width, "bfloat16", activation))


def counts_of(layer: Layer, which: str = "backward") -> Counts:
    launcher = EmulatorLauncher(checked=True, limits=H200)
    getattr(layer, which)(launcher)
    assert len(launcher.launches) == 1
    return launcher.counts


def moved(numbers: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in numbers.items() if count}


def split_of(batch_size: int, width: int) -> split_k.SplitK:
    return layer_plans.layer_plan(batch_size, width, width, PRECISIONS["bfloat16"], H200).split


@pytest.mark.parametrize(
    "batch_size, width, activation",
    [(4096, 64, "tanh"), (4096, 128, "tanh"), (65536, 64, "tanh"), (16384, 128, "gelu")],
)
def test_a_narrow_layer_reads_and_writes_everything_once(batch_size, width, activation):
    matrix = BYTES * batch_size * width  # da, h, a and da_prev alike
    cut = split_of(batch_size, width)
    partial = 4 * width * width + DB_PARTIAL
    results = cut.splits + -(-cut.splits // cut.group_size)  # one for each split and, at the second level, each group
    count = counts(batch_size, width, activation)
    assert moved(count.bytes_read) == {
        "da_bo": matrix,
        "h_bi": matrix,
        **({"source_bi": matrix} if activation == "gelu" else {}),
        "w_oi": cut.splits * BYTES * width * width,  # once by each block
        "partials": results * partial,
    }
    assert moved(count.bytes_written) == {
        "da_prev_bi": matrix,
        "dw_oi": 4 * width * width,
        "db_o": 4 * width,
        "partials": results * partial,
    }
    assert set(moved(count.atomics)) == {"arrivals"}


@pytest.mark.parametrize("width, activation", [(64, "tanh"), (128, "tanh"), (64, "gelu")])
def test_a_further_row_moves_no_more_than_its_operands(width, activation):
    fewer, more = 128 * 128, 65536
    assert split_of(fewer, width).splits == split_of(more, width).splits
    totals = [
        sum(count.bytes_read.values()) + sum(count.bytes_written.values())
        for count in (counts(fewer, width, activation), counts(more, width, activation))
    ]
    needed = BYTES * (width + 2 * width) + (BYTES * width if activation == "gelu" else 0)
    assert (totals[1] - totals[0]) / (more - fewer) <= 1.02 * needed


@pytest.mark.parametrize("batch_size, width", [(600, 200), (4096, 192)])
def test_a_wide_layer_writes_everything_once(batch_size, width):
    """It reads its operands once for each tile of the other index; da_prev, dW and db are written once."""
    layer = Layer(batch_size, width, width, "bfloat16", "tanh")
    plan = layer_plans.layer_plan(batch_size, width, width, PRECISIONS["bfloat16"], H200)
    written = moved(counts_of(layer).bytes_written)
    partials = written.pop("partials")
    assert written == {"da_prev_bi": BYTES * batch_size * width, "dw_oi": 4 * width**2, "db_o": 4 * width}
    cut = plan.split
    assert partials <= 4 * plan.partials * (cut.splits + -(-cut.splits // cut.group_size)) / cut.splits


# ---- Bank conflicts


CONFLICT_FREE = {
    "layer_mma_narrow 64 x 64": ("backward", Layer(1024, 64, 64, "bfloat16", "tanh")),
    "layer_mma_narrow 128 x 128": ("backward", Layer(1024, 128, 128, "bfloat16", "gelu")),
    "layer_mma": ("backward", Layer(512, 256, 256, "bfloat16", "tanh")),
    "layer_mma tf32": ("backward", Layer(512, 256, 256, "tf32", "tanh")),
    "forward_mma": ("forward", Layer(512, 256, 256, "bfloat16", "tanh")),
    "forward_mma tf32": ("forward", Layer(512, 256, 256, "tf32", "tanh")),
    "layer_simt": ("backward", Layer(512, 256, 256, "float32", "tanh")),
    "forward_simt": ("forward", Layer(512, 256, 256, "float32", "tanh")),
}


@pytest.mark.parametrize("which, layer", CONFLICT_FREE.values(), ids=CONFLICT_FREE)
def test_shared_memory_is_free_of_bank_conflicts(which, layer):
    count = counts_of(layer, which)
    assert count.conflicts_by_line == {}
    assert count.extra_wavefronts_read == count.extra_wavefronts_written == 0


@pytest.mark.parametrize("precision, n_out, n_in", [("bfloat16", 128, 64), ("tf32", 64, 64), ("tf32", 128, 128)])
def test_the_other_narrow_variants_have_none_in_their_products(precision, n_out, n_in):
    """Where a warp stages 16 columns at a time, two of its rows share a bank once a batch tile as they are stored."""
    conflicts = counts_of(Layer(1024, n_out, n_in, precision, "tanh")).conflicts_by_line
    assert not [line for line in conflicts if line.startswith("mma_fragments.cuh")]
