"""Mistakes as people make them, planted into the kernels of whole networks: the checker, the bounds, or a step that
should not have been made shows each.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from emulator import EmulationError, EmulatorLauncher
from emulator.build import KERNELS
from emulator_requirements import require_emulator
from kernel_layers import H200
from kernel_networks import SMALL, Network, hold_gradients, network_on
from network_bounds import hold

from gpuback import SGD, TrainStep
from gpuback._cuda.launch import DeviceLimits

require_emulator()

NETWORK = Network((17, 40, 16, 5), 301, activation=("gelu", "tanh"))  # three chains, the last of 45 rows
DEVICE = replace(SMALL, multiprocessors=1)
"""One block of `network_chain` takes all of them, in several slabs each."""
SMALLER = replace(DEVICE, shared_bytes=70_000)
"""There, sums are added up in slabs of 32."""


class Bug(NamedTuple):
    """What is planted where, in which form of the network it shows, and what is said."""

    source: str
    patches: list[tuple[str, str]]
    form: str
    message: str
    network: Network = NETWORK
    device: DeviceLimits = DEVICE


def planted(patches: dict[str, list[tuple[str, str]]], folder: Path) -> Path:
    """A copy of the kernels' sources with bugs in them."""
    shutil.copytree(KERNELS, folder / "kernels")
    for source, changes in patches.items():
        path = folder / "kernels" / source
        text = path.read_text(encoding="utf-8")
        for before, after in changes:
            assert text.count(before) == 1, f"{source} has changed: {text.count(before)} times {before!r}, expected one"
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")
    return folder / "kernels"


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
    "behind the slab's samples": ("network_narrow.cu", "__syncthreads();  // the slab's samples are there", "whole"),
    "behind a layer": ("network_narrow.cu", "place.wait();", "whole"),
    "behind a_L": ("network_narrow.cu", "__syncthreads();  // a_L is complete", "whole"),
    "behind da_L": ("network_narrow.cu", "__syncthreads();  // da_L and losses are", "whole"),
    "before da takes the place of h": (
        "network_narrow.cu",
        "__syncthreads();  // nobody reads h_{k-1} any more",
        "whole",
    ),
    "behind da": ("network_narrow.cu", "__syncthreads();  // da_{k-1} is complete; behind", "whole"),
    "behind theta": ("network_memory.cuh", "__syncthreads();  // everyone's part is there", "whole"),
    "behind the last of theta": ("network_memory.cuh", "__syncthreads();  // the slab's place is free", "whole"),
    "behind a layer's inputs and weights": ("network_chain.cu", "__syncthreads();  // the layer's inputs and", "two"),
    "before the places are used again": ("network_chain.cu", "__syncthreads();  // nobody reads the layer's", "two"),
    "behind da_L of two launches": ("network_chain.cu", "__syncthreads();  // da_L is complete", "two"),
    "behind what g' is computed from": ("network_chain.cu", "__syncthreads();  // it is there, and so", "two"),
    "behind da of two launches": ("network_chain.cu", "__syncthreads();  // da_{k-1} is complete", "two"),
    "behind the rings of two launches": ("network_chain.cu", "__syncthreads();  // the rings are done with", "two"),
    "behind a slab that has come": ("network_chain.cu", "__syncthreads();  // the slab is there for everyone", "two"),
}
FOUND = {
    **{
        f"dropped barrier {name}": Bug(source, [(barrier, "//")], form, SHARED + "|reads what nobody has written")
        for name, (source, barrier, form) in BARRIERS.items()
    },
    "dropped barrier behind a slab that is added": Bug(
        "network_chain.cu", [("__syncthreads();  // its place is free", "//")], "two", SHARED, device=SMALLER
    ),
    "a_L's place is narrowed too early": Bug(
        "network_slab.cuh", [("__syncwarp();  // the other lanes have read theirs", "")], "whole", SHARED
    ),
    "dropped wait for what g' is computed from": Bug(
        "network_chain.cu",
        [("cp_async_wait<0>();\n          __syncthreads();  // it is there", "__syncthreads();  // it is there")],
        "two",
        "asynchronous copy",
    ),
    "dropped wait for a slab": Bug("network_chain.cu", [("cp_async_wait<2>();", "")], "two", "asynchronous copy"),
    "rows beyond the batch": Bug(
        "network_narrow.cu",
        [("row1 = min(row0 + rows_per_split, n_batch)", "row1 = row0 + rows_per_split")],
        "whole",
        r"past the end of '(x_bi|labels_b)'",
    ),
    "rows beyond the batch in two launches": Bug(
        "network_chain.cu",
        [("row1 = min(row0 + rows_per_split, n_batch);\n    if (", "row1 = row0 + rows_per_split;\n    if (")],
        "two",
        r"past the end of '(x_bi|labels_b)'",
    ),
    "partial results that are not published": Bug(
        "network_narrow.cu", [("  publish();\n", "")], "whole", r"race .*: 'partials'"
    ),
    "partial results of two launches that are not published": Bug(
        "network_chain.cu", [("      publish();\n      finish", "      finish")], "two", r"race .*: 'partials'"
    ),
    "a column too many of theta": Bug(
        "network_totals.cuh",
        [("if (r < P::ROWS && o < layer.n_out) body", "if (r < P::ROWS) body")],
        "whole",
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
    dropped = [("__syncthreads();  // the slab is done with, and", "//")]
    net = NETWORK.on(EmulatorLauncher(folder=planted({"network_chain.cu": dropped}, tmp_path), checked=True))
    with pytest.raises(EmulationError, match=SHARED):
        net.loss(*NETWORK.batch()[:2])


WRONG = {
    "a slab's last rows are left out": Bug(
        "network_slab.cuh",
        [("first < valid; first += BAND)", "first + BAND <= valid; first += BAND)")],
        "whole",
        "dW_. is off",
    ),
    "the bias is left out": Bug(
        "network_slab.cuh",
        [("c[f][e] += b.at[e % 2];", "c[f][e] += 0 * b.at[e % 2];")],
        "whole",
        "off by",
    ),
    "sums of db by the wrong warps": Bug(
        "network_totals.cuh",
        [("valid, o0(), i0(), offset);", "valid, o0(), i0(), warp_index() % ACROSS * BAND);")],
        "whole",
        "db_. is off",
    ),
    "a tile's columns that are another warp's": Bug(
        "network_slab.cuh",
        [("if (pairs < COUNT) return", "if (2 * pairs < COUNT) return")],
        "whole",
        "off by",
        Network((64, 64, 3), 40),
    ),
    "g' of the wrong layer": Bug(
        "network_slab.cuh", [("k ? net[k - 1].activation", "k ? net[k].activation")], "whole", "off by"
    ),
    "g' from h in place of a": Bug(
        "network_chain.cu", [("net.kept(k) ? net[k].row_a : net[k].row_h", "net[k].row_h")], "two", "off by"
    ),
    "one chain less": Bug(
        "network_chain.cu",
        [("item < layers * notes.chains.count;", "item < layers * notes.chains.count - 1;")],
        "two",
        "is off|together|nan",
    ),
}


@pytest.mark.parametrize("bug", WRONG.values(), ids=WRONG)
def test_the_bounds_find(bug, tmp_path):
    with pytest.raises(AssertionError, match=bug.message) as caught:
        run(bug.form, planted({bug.source: bug.patches}, tmp_path), bug.network, limits=bug.device)
    print(caught.value)


# A warp's partial results stand where its arrival says, not where their chain's number does: the upper half of a
# counter of arrivals says which place is free.
BY_ARRIVAL = {
    "network_narrow.cu": [
        (
            "  unsigned most = 0;\n",
            "  unsigned most = 0;\n"
            "  unsigned* tickets = notes.arrivals(warp_index()) + chain_groups(notes.chains);\n"
            "  unsigned place = 0;\n"
            "  if (threadIdx.x % 32 == 0) place = atomicAdd(tickets, 0x10000u) >> 16;\n"
            "  place = __shfl_sync(0xffffffffu, place, 0);\n",
        ),
        ("(int64)(chain * layers + k)", "(int64)((int)place * layers + k)"),
        ("finish_piece<MAX_WIDTH>(net, k, chain,", "finish_piece<MAX_WIDTH>(net, k, (int)place,"),
    ],
    "reduce.cuh": [("last = atomicAdd(arrivals, 1u) ==", "last = (atomicAdd(arrivals, 1u) & 0xffffu) ==")],
}


def test_bits_tell_sums_in_the_order_of_arrival(tmp_path):
    folder = planted(BY_ARRIVAL, tmp_path)
    schedules = [{"order": order, "resident_blocks": 1, "limits": H200} for order in ("fifo", "lifo", "random")]
    assert len({run("whole", folder, **schedule) for schedule in schedules}) > 1
    assert len({run("whole", KERNELS, **schedule) for schedule in schedules}) == 1


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
    ("whole", "network_narrow.cu", "note(notes, OF_SUMS, most);"),
    ("two", "network_chain.cu", "note(notes, OF_INPUTS, most_inputs);"),
    ("two", "network_chain.cu", "note(notes, OF_SUMS, most_deltas);"),
])  # fmt: skip
def test_a_step_that_is_made_shows_what_was_not_noted(form, source, note, tmp_path):
    assert not step_is_made(KERNELS, form, INFINITE_GRADIENT)
    assert step_is_made(planted({source: [(note, "")]}, tmp_path), form, INFINITE_GRADIENT)


def test_a_step_that_is_made_shows_a_dropped_barrier_before_the_arrival(tmp_path):
    """Other warps arrive before thread 0, which is slow here, has noted an infinite loss."""
    slow = {
        "network_totals.cuh": [
            (
                "  notes.losses[chain] = sum;",
                "for (int i = 0; i < 3000; ++i) __threadfence(); notes.losses[chain] = sum;",
            )
        ]
    }
    dropped = {"network_narrow.cu": [("__syncthreads();  // all of this chain is noted, and", "//")]}
    choices = {"order": "random", "resident_blocks": 3, "seed": 2}
    assert not step_is_made(planted(slow, tmp_path / "slow"), "whole", INFINITE_LOSS, **choices)
    assert step_is_made(planted(slow | dropped, tmp_path / "dropped"), "whole", INFINITE_LOSS, **choices)


def test_without_a_bug_nothing_is_found():
    for form in ("whole", "two"):
        run(form, KERNELS, order="random", checked=True)
