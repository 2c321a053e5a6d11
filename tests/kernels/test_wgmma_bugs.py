"""Mistakes of asynchronous kernels, planted into a layer's kernels for Hopper: a schedule or the checker shows each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from emulator import EmulationError, EmulatorLauncher
from emulator.build import KERNELS
from support.kernel_layers import HOPPER, Layer
from support.planted import planted
from support.requirements import require_emulator

from gpuback._backends.cuda import layer_plans, wgmma_plans

require_emulator()
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # how far results are off that are NaN or have no room to be off
]

SEEDS = 12
"""How many random schedules look for a bug, after the two fixed ones."""

SOURCE = "layer/layer_wgmma_narrow.cu"
OWN_STAGES = Layer(8 * 64 * 11 + 37, 101, 123, "bfloat16", "relu")  # 128 x 128: a stage for each consumer, five of them
SHARED_STAGES = Layer(8 * 64 * 9 + 37, 201, 100, "bfloat16", "relu")  # 256 x 128: both consumers read each stage
FORWARD = Layer(64 * 16 + 37, 250, 131, "bfloat16", "relu")  # with a device of one multiprocessor


class Bug(NamedTuple):
    """Which texts of the source are replaced by which, and which layer runs into it."""

    patches: list[tuple[str, str]]
    layer: Layer = OWN_STAGES
    source: str = SOURCE


ARRIVAL = "      wgmma_wait<0>();\n      if (threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(s));"

BY_SCHEDULES = {
    "a stage is given back before its products are over": Bug(
        [(ARRIVAL, "      if (threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(s));\n      wgmma_wait<0>();")]
    ),
    "staging is overwritten before the copy has read it": Bug(
        [("            if (threadIdx.x % 128 == 0) bulk_wait_read<0>();\n            bar_sync", "            bar_sync")]
    ),
    "one thread stores what others have not staged": Bug(
        [("          bar_sync(OF_CONSUMER + consumer, 128);  // all rows are staged\n", "")]
    ),
    "da_prev is read before its product is over": Bug([("wgmma_wait<1>();  // d is there", "")]),
    "db's warps do not count among a stage's readers": Bug(
        [
            ("+ (task.bias ? DB_WARPS : 0));", ");"),
            (
                "    if (threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(s));\n  }\n  bar_sync(OF_READERS",
                "  }\n  bar_sync(OF_READERS",
            ),
        ]
    ),
    "sums take the stages before db's warps have read them": Bug(
        [
            ("  bar_sync(OF_READERS, 32 * CONSUMER_WARPS + DB_THREADS);  // the stages have been read\n", ""),
            ("32 * CONSUMER_WARPS + (task.bias ? DB_THREADS : 0)", "32 * CONSUMER_WARPS"),
        ]
    ),
    "a stage is asked for before it is empty": Bug(
        [("if (step >= STAGES) mbarrier_wait(at.empty(s), empty_parity(step - STAGES));", "")]
    ),
    "a stage is read before it is full": Bug(
        [("      mbarrier_wait(at.full(step), full_parity(step));\n      wgmma_fence();", "      wgmma_fence();")]
    ),
    "a barrier is told too few bytes": Bug(
        [("mbarrier_arrive_expect_tx(full, DA_BYTES + (", "mbarrier_arrive_expect_tx(full, DA_BYTES - H_BYTES + (")]
    ),
    "one full barrier for a stage, whose phases consumers skip": Bug(
        [("const int FULL_BARRIERS = CONSUMERS * STAGES;", "const int FULL_BARRIERS = STAGES;")]
    ),
    "W's panels lie elsewhere than the descriptor says": Bug(
        [("panel_descriptor(w + o * 128, W_PANEL, 1024)", "panel_descriptor(w + o * 128, PANEL_BYTES, 1024)")]
    ),
    "a step of K of a transposed operand is taken along the row": Bug(
        [("panel_descriptor(h + b * 128, PANEL_BYTES, 1024)", "panel_descriptor(h + b * 2, PANEL_BYTES, 1024)")]
    ),
    "the staging goes to the other consumer before it has been read": Bug(
        [("              bulk_wait_read<0>();\n              mbarrier_arrive", "              mbarrier_arrive")],
        SHARED_STAGES,
    ),
    "a consumer does not wait for the staging": Bug(
        [("            mbarrier_wait(at.staging_free(1 - consumer), (step - 1) / CONSUMERS & 1);", "")], SHARED_STAGES
    ),
    "a block reads its peers' sums before they are there": Bug(
        [
            ("    cluster_sync<CLUSTER>(THREADS);  // all sums are there\n", "    bar_sync(OF_CONSUMERS, 256);\n"),
            ("    if (weights) {\n      cluster_sync<CLUSTER>(THREADS);\n", "    if (weights) {\n"),
        ]
    ),
    "a block takes its memory for the reduction while peers read it": Bug(
        [
            ("    cluster_sync<CLUSTER>(THREADS);  // they have been read", "    // "),
            ("    if (weights) {\n      cluster_sync<CLUSTER>(THREADS);\n", "    if (weights) {\n"),
        ]
    ),
    "h is overwritten before all warps' products have read it": Bug(
        [("      consumer_sync(consumer);  // h has been read by all\n", "")], FORWARD, "layer/forward_wgmma_narrow.cu"
    ),
    "a forward pass gives its stage back before the copy has read it": Bug(
        [("  bulk_commit();\n  bulk_wait_read<0>();", "  bulk_commit();")], FORWARD, "layer/forward_wgmma_narrow.cu"
    ),
}


@pytest.fixture(autouse=True)
def one_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans cut the batch for one cluster, so that a small one goes round the stages."""
    monkeypatch.setattr(wgmma_plans, "CHAINS_WANTED", wgmma_plans.CLUSTER)
    layer_plans.layer_plan.cache_clear()
    yield
    layer_plans.layer_plan.cache_clear()


def run(bug: Bug, folder: Path, order: str, copies: str, **choices: object) -> None:
    """Run the layer, and hold it to the contract's tolerance."""
    forward = bug.source.startswith("layer/forward")
    limits = replace(HOPPER, multiprocessors=1) if forward else HOPPER
    launcher = EmulatorLauncher(order, copies=copies, limits=limits, folder=folder, **choices)
    if forward:
        bug.layer.check_forward(bug.layer.forward(launcher))
    else:
        bug.layer.check(bug.layer.backward(launcher))


def schedules() -> Iterator[dict[str, object]]:
    yield {"order": "fifo", "copies": "late"}
    yield {"order": "lifo", "copies": "early"}
    for seed in range(SEEDS):
        yield {"order": "random", "copies": "random", "seed": seed}


@pytest.mark.parametrize("bug", BY_SCHEDULES.values(), ids=BY_SCHEDULES)
def test_a_schedule_shows(bug, tmp_path):
    folder, shown = planted({bug.source: bug.patches}, tmp_path), []
    for schedule in schedules():
        try:
            run(bug, folder, **schedule)
        except (AssertionError, EmulationError) as error:
            shown.append((schedule, str(error)))
            break
    print(shown)
    assert shown


@pytest.mark.parametrize("layer", [OWN_STAGES, SHARED_STAGES, FORWARD], ids=str)
def test_without_a_bug_no_schedule_shows_anything(layer):
    source = "layer/forward_wgmma_narrow.cu" if layer is FORWARD else SOURCE
    for schedule in schedules():
        run(Bug([], layer, source), KERNELS, **schedule)
