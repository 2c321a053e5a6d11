"""Mistakes of asynchronous kernels, planted into the step of a whole network by wgmma: a schedule or the checker shows
each.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from emulator import EmulationError, EmulatorLauncher
from emulator.build import KERNELS
from support.kernel_layers import HOPPER
from support.kernel_networks import Network, hold_gradients
from support.network_bounds import hold
from support.planted import planted
from support.requirements import require_emulator

from gpuback._backends.cuda import network_plans, split_k
from gpuback._backends.cuda.split_k import SplitK

require_emulator()
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings(
        "ignore::RuntimeWarning"
    ),  # how far results are off that are NaN or have no room to be off
]

SOURCE = "network/fused_step_wgmma.cu"
NETWORK = Network((17, 40, 16, 5), 700, activation=("gelu", "relu"))  # an odd number of layers
SCHEDULES = [("fifo", "late", 0), ("lifo", "early", 0), *(("random", "random", seed) for seed in range(4))]


@pytest.fixture(autouse=True)
def long_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks, of four slabs and of two, the last of which has 60 rows."""
    monkeypatch.setattr(split_k, "narrow_split", lambda size: SplitK(2, 448))
    monkeypatch.setattr(network_plans, "step_plan", network_plans.step_plan.__wrapped__)


def run(folder: Path, order: str, copies: str, seed: int) -> bytes:
    """The bits of gradients; they and the loss are held to their bounds."""
    launcher = EmulatorLauncher(order, seed=seed, copies=copies, checked=True, limits=HOPPER, folder=folder)
    net = NETWORK.on(launcher)
    loss, gradients = NETWORK.gradients(net, need_input_grad=True)
    expected = NETWORK.expected(net)
    hold("loss", loss, expected.loss)
    hold_gradients(net, gradients.theta, gradients.inputs, expected)
    return gradients.theta.tobytes()


class Bug(NamedTuple):
    """Which texts of the source are replaced by which, and what is said, in every schedule."""

    patches: list[tuple[str, str]]
    message: str


RACE = r"race \((read after write|write after read|write after write)"
ARRIVALS = """      if (lane == 0) {
        mbarrier_arrive(at.empty(FIRST));
        mbarrier_arrive(at.h_free(k));
      }
"""
FENCE = "    fence_proxy_async();\n    __syncwarp();"

BUGS = {
    "a phase is skipped where the number of layers is odd": Bug(
        [("mbarrier_wait(at.full(FIRST), slab * uses + j & 1);", "mbarrier_wait(at.full(FIRST), j & 1);")],
        f"{RACE}|deadlock",
    ),
    "full counts one warpgroup": Bug(
        [("mbarrier_init(at.full(place), STRIPS);", "mbarrier_init(at.full(place), STRIPS / 2);")],
        f"{RACE}|deadlock|nobody has written|mbarrier",
    ),
    "places are given back before products are over": Bug(
        [(f"      wgmma_wait<0>();\n{ARRIVALS}", f"{ARRIVALS}      wgmma_wait<0>();\n")], RACE
    ),
    "da is overwritten before it is read": Bug(
        [("    wait_empty(place, slab * uses(place) + (which >> 1));\n", "")], RACE
    ),
    "h is overwritten before it is read": Bug([("      wait_h_free(k);\n", "")], RACE),
    "a is written in place of h before that is read": Bug([("    if (keeps_a) wait_h_free(k + 1);\n", "")], RACE),
    "da is not fenced": Bug([(FENCE, "    __syncwarp();")], "fence.proxy.async|proxy"),
    "weights are not fenced": Bug([("  fence_proxy_async();\n  __syncthreads();", "  __syncthreads();")], "proxy"),
    "lanes do not wait for each other before the arrival": Bug(
        [(FENCE, "    fence_proxy_async();")], f"{RACE}|nothing orders|proxy"
    ),
    "h takes a's place after dW may read it": Bug(
        [
            ("    if (!h_is_late) warp.arrive", "    warp.arrive"),
            ("    if (h_is_late) warp.arrive(at.full(place));\n", ""),
        ],
        RACE,
    ),
    "the chain reads sums that are not there": Bug(
        [("    if (keeps_a) wait_h_free(k + 1);\n    wgmma_wait<0>();", "    if (keeps_a) wait_h_free(k + 1);")],
        "off by|not finite|nan|wgmma",
    ),
    "ones lie elsewhere": Bug(
        [("descriptor(h, at.ones() - h)", "descriptor(h, PANEL)")], "off by|nobody has written|outside"
    ),
    "a_L is read before it is there": Bug([("  __syncwarp();  // a_L is there\n", "")], RACE),
    "da_L is read before it is there": Bug([("  __syncwarp();  // da_L is complete\n", "")], RACE),
    "da takes the place of da_L that others read": Bug([("  __syncwarp();  // it is read\n", "")], RACE),
    "the circular buffers overwrite panels": Bug(
        [("  __syncthreads();  // losses are there, and", "//"), ("  __syncthreads();  // all of this split", "//")],
        RACE,
    ),
    "rows beyond the batch count": Bug(
        [("pairs[i] &= !has_row(i % 2) ? 0 :", "pairs[i] &="), ("if (n == COLUMNS && valid >= 16) return;", "")],
        "off by",
    ),
    "a lane's sums belong to other columns": Bug(
        [("const int i = (pack - 1) * 8", "const int i = pack * 8")], "off by"
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, tmp_path: Path) -> None:
    bug = BUGS[name]
    folder = planted({SOURCE: bug.patches}, tmp_path)
    with pytest.raises((EmulationError, AssertionError), match=bug.message):
        for schedule in SCHEDULES:
            run(folder, *schedule)


def test_without_a_bug_nothing_is_found() -> None:
    for schedule in SCHEDULES:
        run(KERNELS, *schedule)


def test_db_by_products_of_its_own_has_the_same_bits(tmp_path: Path) -> None:
    """Were a device not to take columns of B that lie elsewhere."""
    apart = planted({SOURCE: [("#define DB_APART 0", "#define DB_APART 1")]}, tmp_path)
    assert run(apart, *SCHEDULES[0]) == run(KERNELS, *SCHEDULES[0])
