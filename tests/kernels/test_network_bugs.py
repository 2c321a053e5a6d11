"""Mistakes as people make them, planted into the kernels of whole networks: the checker, the bounds, or a step that
should not have been made shows each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from emulator import EmulationError, EmulatorLauncher
from emulator.build import KERNELS
from support.kernel_layers import H200
from support.kernel_networks import SMALL, Network, hold_gradients, network_on
from support.network_bounds import hold
from support.planted import planted
from support.requirements import require_emulator

from gpuback import SGD, TrainStep
from gpuback._cuda.launch import DeviceLimits

require_emulator()
pytestmark = pytest.mark.thorough

NETWORK = Network((17, 40, 16, 5), 301, activation=("gelu", "tanh"))  # three splits, the last of 45 rows
DEVICE = replace(SMALL, multiprocessors=1)
"""One block of `fused_passes` takes all of them, in several batch tiles each."""
SMALLER = replace(DEVICE, shared_bytes=70_000)
"""There, sums are added up in batch tiles of 32."""


class Bug(NamedTuple):
    """What is planted where, in which form of the network it shows, and what is said."""

    source: str
    patches: list[tuple[str, str]]
    form: str
    message: str
    network: Network = NETWORK
    device: DeviceLimits = DEVICE


def run(form: str, folder: Path, network: Network = NETWORK, **choices) -> tuple[bytes, ...]:
    """Held to their bounds, the bits of a loss and gradients."""
    net = network.on(EmulatorLauncher(folder=folder, **{"limits": DEVICE} | choices), form)
    loss, gradients = network.gradients(net, need_input_grad=True)
    expected = network.expected(net)
    hold("loss", loss, expected.loss)
    hold_gradients(net, gradients.theta, gradients.inputs, expected)
    return loss.tobytes(), gradients.theta.tobytes()


SHARED = r"race \((read after write|write after read|write after write).*nothing orders the two: shared memory"
BARRIERS = {
    "behind the batch tile's samples": (
        "network/fused_step.cu",
        "__syncthreads();  // the batch tile's samples are there",
        "fused_step",
    ),
    "behind a layer": ("network/fused_step.cu", "warp_rows.wait();", "fused_step"),
    "behind a_L": ("network/fused_step.cu", "__syncthreads();  // a_L is complete", "fused_step"),
    "behind da_L": ("network/fused_step.cu", "__syncthreads();  // da_L and losses are", "fused_step"),
    "before da takes the place of h": (
        "network/fused_step.cu",
        "__syncthreads();  // nobody reads h_{k-1} any more",
        "fused_step",
    ),
    "behind da": ("network/fused_step.cu", "__syncthreads();  // da_{k-1} is complete; behind", "fused_step"),
    "behind theta": ("network/network_memory.cuh", "__syncthreads();  // everyone's part is there", "fused_step"),
    "behind the last of theta": (
        "network/network_memory.cuh",
        "__syncthreads();  // the batch tile's place is free",
        "fused_step",
    ),
    "behind a layer's inputs and weights": (
        "network/fused_passes.cu",
        "__syncthreads();  // the layer's inputs and",
        "fused_passes",
    ),
    "before the places are used again": (
        "network/fused_passes.cu",
        "__syncthreads();  // nobody reads the layer's",
        "fused_passes",
    ),
    "behind da_L of two launches": ("network/fused_passes.cu", "__syncthreads();  // da_L is complete", "fused_passes"),
    "behind what g' is computed from": (
        "network/fused_passes.cu",
        "__syncthreads();  // it is there, and so",
        "fused_passes",
    ),
    "behind da of two launches": (
        "network/fused_passes.cu",
        "__syncthreads();  // da_{k-1} is complete",
        "fused_passes",
    ),
    "behind the circular buffers of two launches": (
        "network/fused_weight_gradients.cu",
        "__syncthreads();  // the circular buffers are done with",
        "fused_passes",
    ),
    "behind a batch tile that has come": (
        "network/fused_weight_gradients.cu",
        "__syncthreads();  // the batch tile is there for everyone",
        "fused_passes",
    ),
}
FOUND = {
    **{
        f"dropped barrier {name}": Bug(source, [(barrier, "//")], form, SHARED + "|reads what nobody has written")
        for name, (source, barrier, form) in BARRIERS.items()
    },
    "dropped barrier behind a batch tile that is added": Bug(
        "network/fused_weight_gradients.cu",
        [("__syncthreads();  // its place is free", "//")],
        "fused_passes",
        SHARED,
        device=SMALLER,
    ),
    "a_L's place is narrowed too early": Bug(
        "network/output_losses.cuh", [("__syncwarp();  // the other lanes have read theirs", "")], "fused_step", SHARED
    ),
    "dropped wait for what g' is computed from": Bug(
        "network/fused_passes.cu",
        [("cp_async_wait<0>();\n          __syncthreads();  // it is there", "__syncthreads();  // it is there")],
        "fused_passes",
        "asynchronous copy",
    ),
    "dropped wait for a batch tile": Bug(
        "network/fused_weight_gradients.cu", [("cp_async_wait<2>();", "")], "fused_passes", "asynchronous copy"
    ),
    "rows beyond the batch": Bug(
        "network/fused_step.cu",
        [("row1 = min(row0 + rows_per_split, n_batch)", "row1 = row0 + rows_per_split")],
        "fused_step",
        r"past the end of '(x_bi|labels_b)'",
    ),
    "rows beyond the batch in two launches": Bug(
        "network/fused_passes.cu",
        [("row1 = min(row0 + rows_per_split, n_batch);\n    if (", "row1 = row0 + rows_per_split;\n    if (")],
        "fused_passes",
        r"past the end of '(x_bi|labels_b)'",
    ),
    "partial results that are not published": Bug(
        "network/fused_step.cu", [("  publish();\n", "")], "fused_step", r"race .*: 'partials'"
    ),
    "partial results of two launches that are not published": Bug(
        "network/fused_weight_gradients.cu",
        [("      publish();\n      finish", "      finish")],
        "fused_passes",
        r"race .*: 'partials'",
    ),
    "a column too many of theta": Bug(
        "network/weight_gradients.cuh",
        [("if (r < ROWS && o < layer.n_out) body", "if (r < ROWS) body")],
        "fused_step",
        r"race|'gradient'",
    ),
}


@pytest.mark.parametrize("bug", FOUND.values(), ids=FOUND)
def test_the_checker_finds(bug, tmp_path):
    folder = planted({bug.source: bug.patches}, tmp_path)
    with pytest.raises(EmulationError, match=bug.message) as caught:
        run(bug.form, folder, bug.network, limits=bug.device, checked=True)
    print(caught.value)


def test_the_checker_finds_that_losses_are_added_too_early(tmp_path):
    dropped = [("__syncthreads();  // the batch tile is done with, and", "//")]
    net = NETWORK.on(EmulatorLauncher(folder=planted({"network/fused_passes.cu": dropped}, tmp_path), checked=True))
    with pytest.raises(EmulationError, match=SHARED):
        net.loss(*NETWORK.batch()[:2])


WRONG = {
    "a batch tile's last rows are left out": Bug(
        "network/weight_gradients.cuh",
        [("first < valid; first += BAND)", "first + BAND <= valid; first += BAND)")],
        "fused_step",
        "dW_. is off",
    ),
    "the bias is left out": Bug(
        "network/layer_passes.cuh",
        [("c[f][e] += b.at[e % 2];", "c[f][e] += 0 * b.at[e % 2];")],
        "fused_step",
        "off by",
    ),
    "sums of db by the wrong warps": Bug(
        "network/weight_gradients.cuh",
        [("valid, o0(), i0(), offset);", "valid, o0(), i0(), warp_index() % ACROSS * BAND);")],
        "fused_step",
        "db_. is off",
    ),
    "a tile's columns that are another warp's": Bug(
        "network/warp_products.cuh",
        [("if (pairs < COUNT) return", "if (2 * pairs < COUNT) return")],
        "fused_step",
        "off by",
        Network((64, 64, 3), 40),
    ),
    "g' of the wrong layer": Bug(
        "network/layer_passes.cuh", [("k ? net[k - 1].activation", "k ? net[k].activation")], "fused_step", "off by"
    ),
    "g' from h in place of a": Bug(
        "network/fused_passes.cu",
        [("net.pre_activations(k) ? net[k].row_a : net[k].row_h", "net[k].row_h")],
        "fused_passes",
        "off by",
    ),
    "one split less": Bug(
        "network/fused_weight_gradients.cu",
        [("work < layers * results.splits.count;", "work < layers * results.splits.count - 1;")],
        "fused_passes",
        "is off|together|nan",
    ),
}


@pytest.mark.parametrize("bug", WRONG.values(), ids=WRONG)
def test_the_bounds_find(bug, tmp_path):
    with pytest.raises(AssertionError, match=bug.message) as caught:
        run(bug.form, planted({bug.source: bug.patches}, tmp_path), bug.network, limits=bug.device)
    print(caught.value)


# A warp's partial results stand where its arrival says, not where their split's number does: the upper half of a
# counter of arrivals says which place is free.
BY_ARRIVAL = {
    "network/fused_step.cu": [
        (
            "  unsigned most = 0;\n",
            "  unsigned most = 0;\n"
            "  unsigned* arrived = results.arrivals(warp_index()) + split_groups(results.splits);\n"
            "  unsigned place = 0;\n"
            "  if (threadIdx.x % 32 == 0) place = atomicAdd(arrived, 0x10000u) >> 16;\n"
            "  place = __shfl_sync(0xffffffffu, place, 0);\n",
        ),
        ("(int64)(split * layers + k)", "(int64)((int)place * layers + k)"),
        ("finish_fragment(Fragment(), net, k, split,", "finish_fragment(Fragment(), net, k, (int)place,"),
    ],
    "common/split_k.cuh": [("last = atomicAdd(arrivals, 1u) ==", "last = (atomicAdd(arrivals, 1u) & 0xffffu) ==")],
}


def test_bits_tell_sums_in_the_order_of_arrival(tmp_path):
    folder = planted(BY_ARRIVAL, tmp_path)
    schedules = [{"order": order, "resident_blocks": 1, "limits": H200} for order in ("fifo", "lifo", "random")]
    assert len({run("fused_step", folder, **schedule) for schedule in schedules}) > 1
    assert len({run("fused_step", KERNELS, **schedule) for schedule in schedules}) == 1


def step_is_made(folder: Path, form: str, place: tuple[int, float, float], **choices: Any) -> bool:
    """A step with an x and a y of one sample, and zeros else: whether θ is another one afterwards."""
    net = network_on(EmulatorLauncher(folder=folder, **choices), (3, 40), form, loss="squared_error")
    net.theta[...] = 0
    step, x, y = TrainStep(net, SGD(0.1)), np.ones((300, 3)), np.ones((300, 40))
    row, x[row, 1], y[row, 3] = place
    step(x, y)
    return net.theta.any()


INFINITE_GRADIENT, INFINITE_LOSS = (7, 1e30, 1e12), (7, 1.0, 1e20)


@pytest.mark.parametrize("form, source, note", [
    ("fused_step", "network/fused_step.cu", "record_largest(results, OF_SUMS, most);"),
    ("fused_passes", "network/fused_passes.cu", "record_largest(results, OF_INPUTS, most_inputs);"),
    ("fused_passes", "network/fused_passes.cu", "record_largest(results, OF_SUMS, most_deltas);"),
])  # fmt: skip
def test_a_step_that_is_made_shows_what_was_not_recorded(form, source, note, tmp_path):
    assert not step_is_made(KERNELS, form, INFINITE_GRADIENT)
    assert step_is_made(planted({source: [(note, "")]}, tmp_path), form, INFINITE_GRADIENT)


def test_a_step_that_is_made_shows_a_dropped_barrier_before_the_arrival(tmp_path):
    """Other warps arrive before thread 0, which is slow here, has recorded an infinite loss."""
    slow = {
        "network/reduce_and_step.cuh": [
            (
                "  results.losses[split] = sum;",
                "for (int i = 0; i < 3000; ++i) __threadfence(); results.losses[split] = sum;",
            )
        ]
    }
    dropped = {"network/fused_step.cu": [("__syncthreads();  // all of this split is recorded, and", "//")]}
    choices = {"order": "random", "resident_blocks": 3, "seed": 2}
    assert not step_is_made(planted(slow, tmp_path / "slow"), "fused_step", INFINITE_LOSS, **choices)
    assert step_is_made(planted(slow | dropped, tmp_path / "dropped"), "fused_step", INFINITE_LOSS, **choices)


def test_without_a_bug_nothing_is_found():
    for form in ("fused_step", "fused_passes"):
        run(form, KERNELS, order="random", checked=True)
