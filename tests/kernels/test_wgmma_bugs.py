"""Mistakes of asynchronous kernels, planted into a layer's kernels for Hopper: the checker finds each, or a result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from emulator import EmulationError, EmulatorLauncher, GuardedNumpy
from emulator.build import KERNELS
from support.kernel_layers import HOPPER, PRECISIONS, Layer, laid_out
from support.planted import planted
from support.requirements import require_emulator

from gpuback._backends.cuda import layer_plans, wgmma_plans
from gpuback._backends.cuda.ops import CudaOps

require_emulator()
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of how far off results are that are NaN
]

BACKWARD, FORWARD = "layer/layer_wgmma_narrow.cu", "layer/forward_wgmma_narrow.cu"
OWN_STAGES = Layer(64 * 13 + 137, 101, 123, "bfloat16", "relu")  # 128 x 128: a stage for each consumer, five of them
SHARED_STAGES = Layer(64 * 13 + 137, 201, 100, "bfloat16", "relu")  # 256 x 128: both consumers read each stage
HIDDEN = Layer(64 * 11 + 37, 250, 131, "bfloat16", "relu")  # forward, by a device of one multiprocessor
LOGITS = Layer(64 * 11 + 37, 130, 150, "bfloat16", "identity")  # the same of an output layer, in float32


class Bug(NamedTuple):
    """Which texts of the source are replaced by which, which layer runs into it, and what is said then."""

    source: str
    patches: list[tuple[str, str]]
    layer: Layer
    message: str


ARRIVAL = "      wgmma_wait<0>();\n      if (threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(s));"
OTHERS_SYNC = "    if (weights) {\n      cluster_sync<CLUSTER>(THREADS);  // as in reduce_sums\n"

FOUND = {
    "a stage is given back before its products are over": Bug(
        BACKWARD,
        [(ARRIVAL, "      if (threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(s));\n      wgmma_wait<0>();")],
        OWN_STAGES,
        r"race \(write after read, by a copy of a box\): read by wgmma",
    ),
    "a stage is asked for before it is empty": Bug(
        BACKWARD,
        [("if (step >= STAGES) mbarrier_wait(at.empty(s), empty_parity(step - STAGES));", "")],
        OWN_STAGES,
        r"race \(write after (read|write), by a copy of a box\)",
    ),
    "a stage is read before it is full": Bug(
        BACKWARD,
        [("      mbarrier_wait(at.full(step), full_parity(step));\n", "")],
        OWN_STAGES,
        r"race \(read after write, by wgmma\)|reads what nobody has written",
    ),
    "a consumer skips every second phase of a stage's one barrier": Bug(
        BACKWARD,
        [("const int FULL_BARRIERS = CONSUMERS * STAGES;", "const int FULL_BARRIERS = STAGES;")],
        OWN_STAGES,
        r"mbarrier: waits for phase \d+",
    ),
    "a barrier is told too few bytes": Bug(
        BACKWARD,
        [("mbarrier_arrive_expect_tx(full, DA_BYTES + (", "mbarrier_arrive_expect_tx(full, DA_BYTES - H_BYTES + (")],
        OWN_STAGES,
        r"mbarrier: 8192 bytes come for phase .* expects 0 bytes more",
    ),
    "db's warps do not count among a stage's readers": Bug(
        BACKWARD,
        [
            ("+ (task.bias ? DB_WARPS : 0));", ");"),
            ("    __syncwarp();\n    if (threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(s));\n", ""),
        ],
        OWN_STAGES,
        r"race \(write after read, by a copy of a box\): read by block \d+, thread \d+",
    ),
    "sums take the stages before db's warps have read them": Bug(
        BACKWARD,
        [
            ("  bar_sync(OF_READERS, 32 * CONSUMER_WARPS + DB_THREADS);  // the stages have been read\n", ""),
            ("32 * CONSUMER_WARPS + (task.bias ? DB_THREADS : 0)", "32 * CONSUMER_WARPS"),
        ],
        OWN_STAGES,
        r"race \(write after read\)",
    ),
    "what is staged is not fenced": Bug(
        BACKWARD,
        [("  fence_proxy_async();\n", "")],
        OWN_STAGES,
        r"proxies: .* without a fence.proxy.async",
    ),
    "staging is overwritten before the copy has read it": Bug(
        BACKWARD,
        [("    if (stores) bulk_wait_read<0>();\n", "")],
        OWN_STAGES,
        r"race \(write after read\): read by a copy of a box to global memory",
    ),
    "one thread waits for the staging, and the others do not wait for it": Bug(
        BACKWARD,
        [("    bar_sync(OF_CONSUMER + consumer, 128);  // what this consumer staged last has been read\n", "")],
        OWN_STAGES,
        r"race \(write after read\): read by a copy of a box to global memory",
    ),
    "one thread stores what others have not staged": Bug(
        BACKWARD,
        [("  bar_sync(OF_CONSUMER + consumer, 128);  // all rows are staged\n", "")],
        OWN_STAGES,
        r"race \(read after write, by a copy of a box to global memory\)",
    ),
    "the staging goes to the other consumer before it has been read": Bug(
        BACKWARD,
        [("    bulk_wait_read<0>();\n    mbarrier_arrive", "    mbarrier_arrive")],
        SHARED_STAGES,
        r"race \(write after read\): read by a copy of a box to global memory",
    ),
    "a consumer does not wait for the staging": Bug(
        BACKWARD,
        [("    mbarrier_wait(at.staging_free(1 - consumer), (step - 1) / CONSUMERS & 1);", "")],
        SHARED_STAGES,
        r"race \(write after (read|write)\)",
    ),
    "a block reads its peers' sums before they are there": Bug(
        BACKWARD,
        [
            ("  cluster_sync<CLUSTER>(THREADS);  // all sums are there\n", "  bar_sync(OF_CONSUMERS, 256);\n"),
            (OTHERS_SYNC, "    if (weights) {\n"),
        ],
        OWN_STAGES,
        r"race \(read after write\).* shared memory of block \d+|reads what nobody has written",
    ),
    "a block uses its memory, or ends, while peers read it": Bug(
        BACKWARD,
        [
            ("  cluster_sync<CLUSTER>(THREADS);  // they have been read", "  // "),
            (OTHERS_SYNC, "    if (weights) {\n"),
        ],
        OWN_STAGES,
        r"race \(write after read|has ended",
    ),
    "W and h are read before the accumulators are fenced": Bug(
        FORWARD,
        [("      wgmma_fence();\n", "")],
        HIDDEN,
        r"wgmma.fence",
    ),
    "a forward pass does not fence what goes to global memory": Bug(
        FORWARD,
        [("  fence_proxy_async();\n", "")],
        HIDDEN,
        r"proxies: .* without a fence.proxy.async",
    ),
    "a forward pass gives its stage back before the copy has read it": Bug(
        FORWARD,
        [("  bulk_commit();\n  bulk_wait_read<0>();", "  bulk_commit();")],
        HIDDEN,
        r"race \(write after read, by a copy of a box\): read by a copy of a box to global memory|bulk_wait_read",
    ),
    "one thread gives back what others' products still read": Bug(
        FORWARD,
        [("      consumer_sync(consumer);  // h has been read by all\n", "")],
        LOGITS,
        r"race \(write after read, by a copy of a box\): read by wgmma",
    ),
}

WRONG = {
    "da_prev is read before its product is over": Bug(
        BACKWARD, [("wgmma_wait<1>();  // d is there", "")], OWN_STAGES, "da_prev is off"
    ),
    "W's panels lie elsewhere than the descriptor says": Bug(
        BACKWARD,
        [("panel_descriptor(w + o * 128, W_PANEL, 1024)", "panel_descriptor(w + o * 128, PANEL_BYTES, 1024)")],
        OWN_STAGES,
        "da_prev is off",
    ),
    "a step of K of a transposed operand is taken along the row": Bug(
        BACKWARD,
        [("panel_descriptor(h + b * 128, PANEL_BYTES, 1024)", "panel_descriptor(h + b * 2, PANEL_BYTES, 1024)")],
        OWN_STAGES,
        "dW is off",
    ),
}

OTHER_ORDER = Bug(
    "common/reduce_cluster.cuh",
    [
        ("mapa(shared_address(address), 0)", "mapa(shared_address(address), cluster_rank())"),
        ("mapa(shared_address(address), rank)", "mapa(shared_address(address), (cluster_rank() + rank) % Blocks)"),
    ],
    Layer(6 * 64 * 13, 60, 50, "bfloat16", "relu"),
    "",
)


@pytest.fixture(autouse=True)
def long_chains(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans cut two chains: one goes round the stages, and most of their cluster has nothing to do."""
    monkeypatch.setattr(wgmma_plans, "SMALLEST_CHAIN", 64 * 13)
    layer_plans.layer_plan.cache_clear()
    yield
    layer_plans.layer_plan.cache_clear()


def run(bug: Bug, folder: Path, order: str = "random", copies: str = "random", **choices: object) -> object:
    """The bits of the layer's pass, which is held to the contract's tolerance."""
    layer, forward = bug.layer, bug.source == FORWARD
    limits = replace(HOPPER, multiprocessors=1) if forward else HOPPER
    launcher = EmulatorLauncher(order, copies=copies, limits=limits, folder=folder, **choices)
    if not forward:
        gradients = layer.backward(launcher)
        layer.check(gradients)
        return gradients.bits()
    if layer is LOGITS:
        return logits(layer, launcher).tobytes()
    out = layer.forward(launcher)
    layer.check_forward(out)
    return out.tobytes()


def logits(layer: Layer, launcher: EmulatorLauncher) -> np.ndarray:
    ops, precision = CudaOps(GuardedNumpy(), launcher), PRECISIONS[layer.precision]
    h, W = (laid_out(x, "padded") for x in (layer.operands.h_prev, layer.operands.W))
    workspace = ops.workspace(layer.batch_size, (layer.n_in, layer.n_out), precision)
    out, bias = workspace.output(layer.n_out), np.ones(layer.n_out, np.float32)
    ops.bind_forward(W, bias, out, None, None, workspace)(h)
    exact = h.astype(np.float64) @ W.astype(np.float64).T + 1
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-4)
    return out


@pytest.mark.parametrize("bug", FOUND.values(), ids=FOUND)
def test_the_checker_finds(bug, tmp_path):
    folder = planted({bug.source: bug.patches}, tmp_path)
    for order, copies in (("fifo", "late"), ("random", "random")):
        with pytest.raises(EmulationError, match=bug.message) as caught:
            run(bug, folder, order, copies, checked=True)
    print(caught.value)


@pytest.mark.parametrize("bug", WRONG.values(), ids=WRONG)
def test_the_oracle_finds(bug, tmp_path):
    with pytest.raises(AssertionError, match=bug.message) as caught:
        run(bug, planted({bug.source: bug.patches}, tmp_path))
    print(caught.value)


def test_bits_tell_sums_of_a_cluster_in_another_order(tmp_path):
    folder = planted({OTHER_ORDER.source: OTHER_ORDER.patches}, tmp_path)
    assert run(OTHER_ORDER, folder) != run(OTHER_ORDER, KERNELS)


@pytest.mark.parametrize(
    "source, layer", [(BACKWARD, OWN_STAGES), (BACKWARD, SHARED_STAGES), (FORWARD, HIDDEN), (FORWARD, LOGITS)]
)
def test_without_a_bug_nothing_is_found(source, layer):
    for order, copies in (("fifo", "late"), ("random", "random")):
        run(Bug(source, [], layer, ""), KERNELS, order, copies, checked=True)
