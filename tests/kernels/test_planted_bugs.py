"""Mistakes as people make them, planted into the kernels: the emulator finds each, and says where."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from emulator import EmulationError, EmulatorLauncher
from emulator.build import KERNELS
from support.kernel_layers import Layer
from support.planted import planted
from support.requirements import require_emulator

from gpuback._backends.cuda import layer_plans

require_emulator()
pytestmark = pytest.mark.thorough

NARROW = Layer(901, 60, 50, "bfloat16", "tanh")  # layer_mma_narrow, several splits
WIDE = Layer(600, 140, 70, "bfloat16", "tanh")  # layer_mma
WITHOUT_TENSOR_CORES = Layer(300, 70, 50, "float32", "tanh")  # layer_simt


class Bug(NamedTuple):
    """What is planted where, which layer runs into it, and what the emulator says."""

    source: str
    patches: list[tuple[str, str]]
    layer: Layer
    message: str
    layout: str = "padded"


FOUND = {
    "dropped block barrier": Bug(
        "layer/layer_mma_narrow.cu",
        [("__syncthreads();  // this tile has arrived for everyone", "//")],
        NARROW,
        r"race \(read after write.* nothing orders the two: shared memory",
    ),
    "dropped block barrier behind a tile": Bug(
        "tiles/mma_tile.cuh",
        [("__syncthreads();  // shared memory is free again", "")],
        WIDE,
        r"layer_mma, .* race \(write after read.* shared memory",
    ),
    "dropped block barrier around the next work tile": Bug(
        "tiles/tile_scheduler.cuh",
        [("__syncthreads();  // everyone sees the tile", "")],
        WIDE,
        r"layer_mma, .* tile_scheduler.cuh:\d+: (race \(read after|reads what nobody has written).*: shared memory",
    ),
    "dropped wait for asynchronous copies": Bug(
        "layer/layer_mma_narrow.cu",
        [("cp_async_wait<STAGES - 2>();", "")],
        NARROW,
        r"asynchronous copy",
    ),
    "dropped wait for asynchronous copies without tensor cores": Bug(
        "tiles/simt_tile.cuh",
        [("cp_async_wait<0>();", "")],
        WITHOUT_TENSOR_CORES,
        r"layer_simt, .* asynchronous copy",
    ),
    "rows beyond the batch": Bug(
        "layer/layer_mma_narrow.cu",
        [("row1 = min(row0 + rows_per_split, n_batch)", "row1 = row0 + rows_per_split")],
        NARROW,
        r"past the end of '\w+'",
    ),
    "a column too many": Bug(
        "tiles/epilogue.cuh",
        [("o >= to.n_out || i >= to.n_in", "o >= to.n_out || i > to.n_in")],
        NARROW,
        r"'dw_oi'",
    ),
    "wide accesses to odd rows": Bug(
        "common/types.cuh",
        [("return ((uint64)matrix % 16 == 0) && (pitch * sizeof(T) % 16 == 0);", "return true;")],
        NARROW,
        r"cp.async: an address is not a multiple of 16",
        "odd",
    ),
    "arrival published before the partial result": Bug(
        "common/split_k.cuh",
        [
            (
                "  store_partial(sums, packs, partials + split * stride);\n  publish();\n  const LastSum",
                "  publish();\n  const LastSum",
            ),
            (
                "  if (last.count) write_totals",
                "  store_partial(sums, packs, partials + split * stride);\n  if (last.count) write_totals",
            ),
        ],
        NARROW,
        r"race .*'partials'",
    ),
    "missing fence before the arrival": Bug(
        "common/split_k.cuh",
        [("  if (threadIdx.x % 32 == 0) __threadfence();", "")],
        NARROW,
        r"race \(read after write.*'partials'",
    ),
    "missing fence after the arrival": Bug(
        "common/split_k.cuh",
        [("__threadfence();  // reads come after", "// reads come after")],
        NARROW,
        r"race \(read after write.*'partials'",
    ),
    "only one lane's writes are fenced": Bug(
        "common/split_k.cuh",
        [("__syncwarp();  // the lanes' writes come before lane 0's fence", "")],
        NARROW,
        r"race \(read after write.*'partials'",
    ),
    "shared memory read before it is written": Bug(
        "layer/layer_mma_narrow.cu",
        [("if (da_prev_bi) load_tile<MAX_OUT", "if (!da_prev_bi) load_tile<MAX_OUT")],
        NARROW,
        r"reads what nobody has written: shared memory",
    ),
    "divergent warp collective": Bug(
        "common/split_k.cuh",
        [("last = __shfl_sync(0xffffffffu, last, 0);", "if (!last) last = __shfl_sync(0xffffffffu, last, 0);")],
        NARROW,
        r"divergence: .*__shfl_sync",
    ),
    "missing warp barrier before staged memory is read": Bug(
        "layer/layer_mma_narrow.cu",
        [("__syncwarp();  // the 16 rows are complete", "")],
        NARROW,
        r"reads what nobody has written: shared memory",
    ),
}

WRONG = {
    "wrong fragment index": Bug(
        "tiles/mma_fragments.cuh",
        [
            (
                "n0 + lane / 16 * 8);\n    first[0] = b[0], first[1] = b[1], second[0] = b[2]",
                "n0 + lane / 16 * 8);\n    first[0] = b[0], first[1] = b[2], second[0] = b[1]",
            )
        ],
        NARROW,
        r"dW is off by .* times its limit",
    ),
    "wrong fragment index of the bias": Bug(
        "layer/layer_mma.cu",
        [("e = (index - per_lane) % 2 * 2", "e = (index - per_lane) % 2")],
        WIDE,
        r"db is off by .* times its limit",
    ),
    "the last stage is left out": Bug(
        "tiles/mma_tile.cuh",
        [("const int steps = ceil_div(k1 - k0, STEP);", "const int steps = (k1 - k0) / STEP;")],
        WIDE,
        r"dW is off by .* times its limit",
    ),
}

# Whoever arrives first in its group takes the first place: the upper half of the counter says which is free.
BY_ARRIVAL = Bug(
    "common/split_k.cuh",
    [
        (
            "used / Pack<Real>::count;\n  store_partial(sums, packs, partials + split * stride);",
            "used / Pack<Real>::count;\n"
            "  const int group = split / splits.group_size;\n"
            "  unsigned place = 0;\n"
            "  if (threadIdx.x % 32 == 0) place = atomicAdd(arrivals + group, 0x10000u) >> 16;\n"
            "  place = __shfl_sync(0xffffffffu, place, 0);\n"
            "  store_partial(sums, packs, partials + (group * splits.group_size + (int)place) * stride);",
        ),
        ("last = atomicAdd(arrivals, 1u) ==", "last = (atomicAdd(arrivals, 1u) & 0xffffu) =="),
    ],
    NARROW,
    "",
)


def run(bug: Bug, folder: Path, **choices) -> tuple[bytes, ...]:
    gradients = bug.layer.backward(EmulatorLauncher(folder=folder, **choices), layout=bug.layout)
    bug.layer.check(gradients)
    return gradients.bits()


@pytest.mark.parametrize("bug", FOUND.values(), ids=FOUND)
def test_the_checker_finds(bug, tmp_path):
    folder = planted({bug.source: bug.patches}, tmp_path)
    for order in ("fifo", "random"):
        with pytest.raises(EmulationError, match=bug.message) as caught:
            run(bug, folder, order=order, checked=True)
    print(caught.value)


def test_the_checker_finds_a_missing_warp_barrier_before_staged_memory_is_used_again(tmp_path, monkeypatch):
    """In a variant with batch tiles so long that a warp stages its columns in two passes."""
    bug = Bug(
        "layer/layer_mma_narrow.cu",
        [("__syncwarp();  // everyone has read what this warp staged last", "")],
        Layer(301, 60, 120, "bfloat16", "tanh"),
        r"race \(write after read.* shared memory",
    )
    monkeypatch.setattr(layer_plans, "narrow_tile_choices", lambda *layer: [layer_plans.NarrowTile(64, 128, 128, 2)])
    layer_plans.layer_plan.cache_clear()
    try:
        run(bug, KERNELS, checked=True)
        with pytest.raises(EmulationError, match=bug.message) as caught:
            run(bug, planted({bug.source: bug.patches}, tmp_path), checked=True)
    finally:
        layer_plans.layer_plan.cache_clear()
    print(caught.value)


@pytest.mark.parametrize("bug", WRONG.values(), ids=WRONG)
def test_the_oracle_finds(bug, tmp_path):
    with pytest.raises(AssertionError, match=bug.message) as caught:
        run(bug, planted({bug.source: bug.patches}, tmp_path), checked=True)
    print(caught.value)


def test_bits_tell_sums_in_the_order_of_arrival(tmp_path):
    folder = planted({BY_ARRIVAL.source: BY_ARRIVAL.patches}, tmp_path)
    schedules = [{"order": order, "resident_blocks": 1, "checked": True} for order in ("fifo", "lifo", "random")]
    assert len({run(BY_ARRIVAL, folder, **schedule) for schedule in schedules}) > 1
    assert len({run(BY_ARRIVAL, KERNELS, **schedule) for schedule in schedules}) == 1


def test_without_a_bug_nothing_is_found():
    for layer in (NARROW, WIDE, WITHOUT_TENSOR_CORES):
        for layout in ("padded", "odd"):
            layer.check(layer.backward(EmulatorLauncher("random", checked=True), layout=layout))
