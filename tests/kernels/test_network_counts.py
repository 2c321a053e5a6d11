"""What a step of a narrow network moves, counted by the emulator on the plan for an H200: samples come once, θ once for
each block and once for the update, and nothing that a batch tile computes leaves a block, or, in two
launches, but once.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from emulator import EmulatorLauncher
from emulator.build import KERNELS
from emulator.counts import Counts
from support.kernel_networks import DTYPES, Network
from support.requirements import require_emulator

from gpuback import SGD, Adam, TrainStep
from gpuback._backends.cuda.network_layout import round_up_16
from gpuback._backends.cuda.network_plans import SumsPlan
from gpuback._network.inputs import as_batch

require_emulator()
pytestmark = pytest.mark.thorough

SEVEN_OF_64 = (64,) * 8
STEPS = [
    (SEVEN_OF_64, 4096, "Adam", False),
    (SEVEN_OF_64, 1024, "SGD", True),
    ((40, 8, 3), 65536, "Adam", False),  # seven layers go the same way, and take the emulator a minute
]
LANES_OF_A_ROW = 8
"""Each of them reads its row's label; the device fetches it once."""


class Step(NamedTuple):
    """One step of training, and what it is known by."""

    counts: Counts
    launches: list[str]
    plan: Any
    n_parameters: int


@functools.cache
def step_of(sizes: tuple[int, ...], batch_size: int, optimizer: str, clips: bool, form: str) -> Step:
    launcher = EmulatorLauncher(checked=True)
    network = Network(sizes, batch_size)
    net = network.on(launcher, form)
    step = TrainStep(net, Adam() if optimizer == "Adam" else SGD(0.1), clip_norm=1.0 if clips else None)
    x, y, _ = as_batch(*network.batch(), net.architecture, net.ops)
    step._step(x[:1], y[:1], None)  # which brings hyper-parameters to the device
    net._pool.clear()
    launcher.reset_counts()
    launcher.launches.clear()
    step._step(x, y, None)
    (passes,) = net._pool._free
    return Step(launcher.counts, launcher.launches, passes._plan, net.n_parameters)


def moved(numbers: dict[str, int], *few: str) -> dict[str, int]:
    """Without zeros, and without a `few` bytes that everybody reads alike."""
    return {name: count for name, count in numbers.items() if count and name not in few}


def partial_results(sizes: tuple[int, ...], sums: SumsPlan, rows: int) -> int:
    """Bytes of all: one for each split, and at the second level for each group. A warp holds `rows` x 16 of dW and, of
    the first columns, as many of db in room for 4 x 32."""
    numbers = 0
    for n_in, n_out in pairwise(sizes):
        numbers += -(-n_out // rows) * (-(-n_in // 16) * rows * 16 + 4 * 32)
    split = sums.split
    groups = -(-split.splits // split.group_size)
    return 4 * numbers * (split.splits + (groups if groups > 1 else 0))


FEW = ("hyper", "state", "mean_loss")


def check_few(counts: Counts, sums: SumsPlan) -> None:
    """Every lane that makes updates holds the hyper-parameters; a warp fetches them in one go."""
    for name in ("hyper", "state"):
        assert counts.bytes_read[name] <= 8 * 11 * 32 * (sums.fragments + 1 + 8 * 16)
    assert counts.bytes_written["state"] <= 64 and counts.bytes_written["mean_loss"] == 4
    assert set(moved(counts.atomics)) == {"counters"}
    assert counts.atomics["counters"] <= 3 * 8 * 4 * sums.split.splits * sums.fragments


@pytest.mark.parametrize("sizes, batch_size, optimizer, clips", STEPS)
def test_one_launch(sizes, batch_size, optimizer, clips):
    counts, launches, plan, n = step_of(sizes, batch_size, optimizer, clips, "fused_step")
    assert launches == (["fused_step", "sgd"] if clips else ["fused_step"])
    blocks, splits = plan.launch.grid, plan.sums.split.splits
    assert blocks == splits <= 132 and plan.sums.split.rows_per_split == max(128, batch_size // 128)
    assert plan.tile_b == (128 if sizes == SEVEN_OF_64 else 256)
    partials = partial_results(sizes, plan.sums, 16)
    state = {"first_state": 4 * n, "second_state": 4 * n} if optimizer == "Adam" else {}
    kept = {"gradient": 4 * n} if clips else {}
    assert moved(counts.bytes_read, *FEW) == {
        "x_bi": 4 * batch_size * sizes[0],
        "labels_b": 8 * batch_size * LANES_OF_A_ROW,
        "theta": 4 * n * blocks + 4 * n,
        "layout": 48 * len(sizes) * blocks,
        "partials": partials,
        "losses": 8 * splits,
        **({"squares": 8 * plan.sums.slots} if clips else {}),
        **state,
        **kept,
    }
    assert moved(counts.bytes_written, *FEW) == {
        "theta": 4 * n,
        "partials": partials,
        "losses": 8 * splits,
        "squares": 8 * plan.sums.fragments,
        **state,
        **kept,
    }
    check_few(counts, plan.sums)


@pytest.mark.parametrize("sizes, batch_size, optimizer, clips", STEPS)
def test_two_launches(sizes, batch_size, optimizer, clips):
    """Every h and da, rows of whole 16, is written once and read once, and what g' is computed from once more."""
    counts, launches, plan, n = step_of(sizes, batch_size, optimizer, clips, "fused_passes")
    assert launches == ["fused_passes", "fused_weight_gradients_64"] + ["sgd"] * clips
    passes, sums = plan.passes, plan.weight_gradients.sums
    assert passes.all_weights
    rows_of_h, rows_of_da, rows_of_sources = (
        2 * batch_size * sum(map(round_up_16, widths)) for widths in (sizes[:-1], sizes[1:], sizes[1:-1])
    )
    partials = partial_results(sizes, sums, 32)
    state = {"first_state": 4 * n, "second_state": 4 * n} if optimizer == "Adam" else {}
    kept = {"gradient": 4 * n} if clips else {}
    assert moved(counts.bytes_read, *FEW) == {
        "x_bi": 4 * batch_size * sizes[0],
        "labels_b": 8 * batch_size * LANES_OF_A_ROW,
        "theta": 4 * n * passes.launch.grid + 4 * n,
        "layout": 48 * len(sizes) * (passes.launch.grid + plan.weight_gradients.launch.grid),
        "workspace": rows_of_h + rows_of_da + rows_of_sources,
        "partials": partials,
        "losses": 8 * passes.split.splits,
        **({"squares": 8 * sums.slots} if clips else {}),
        **state,
        **kept,
    }
    assert moved(counts.bytes_written, *FEW) == {
        "theta": 4 * n,
        "workspace": rows_of_h + rows_of_da,
        "partials": partials,
        "losses": 8 * passes.split.splits,
        "squares": 8 * sums.fragments,
        **state,
        **kept,
    }
    check_few(counts, sums)


def test_gelu_keeps_its_pre_activations_too():
    network, launcher = Network((64, 64, 64), 256, activation="gelu"), EmulatorLauncher(checked=True)
    network.gradients(network.on(launcher, "fused_passes"))
    assert launcher.counts.bytes_written["workspace"] == 2 * 256 * 64 * (2 + 2 + 1)


# ---- Bank conflicts


@pytest.mark.parametrize("sizes", [(64,) * 4, (128,) * 3])
@pytest.mark.parametrize("form", ["fused_step", "fused_passes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_free_of_bank_conflicts(sizes, form, dtype):
    """In the 16-bit kernels a_L alone has many: as it is stored, rows padded for the da_L that takes its place. The
    element of a label, losses and sums of db have few. In TF32 W has some in da W: its rows are padded for the forward
    product."""
    launcher = EmulatorLauncher(checked=True)
    network = Network(sizes, 256, dtype, "gelu")
    network.gradients(network.on(launcher, form), need_input_grad=True)
    lines = launcher.counts.conflicts_by_line
    in_products = {line for line in lines if "fragments.cuh" in line}
    if dtype == "tf32":
        (line,) = in_products
        assert (
            "first[(TRANSPOSED_A ? 4 : 1) * pitch]" in text_of(line, "tiles/mma_fragments.cuh") and lines[line][1] == 0
        )
    else:
        assert not in_products
    if dtype in ("bfloat16", "float16"):
        stored, *others = sorted(lines, key=lambda line: sum(lines[line]), reverse=True)
        assert "(top + p * 8 * net.pitch_top()" in text_of(stored, "network/layer_passes.cuh")
        for line in others:
            sources = ("network/output_losses.cuh", "network/weight_gradients.cuh", "common/loss_formulas.cuh")
            where = [text_of(line, source) for source in sources]
            assert any(name in text for text in where for name in ("db.at[", "losses[", "row.a[column]")), line
        assert max(sum(lines[line]) for line in others) < lines[stored][1] / 2


def text_of(line: str, source: str) -> str:
    """Of a line that is told by its number; of inlined code the number is right, and its file may be its caller's."""
    lines = (KERNELS / source).read_text(encoding="utf-8").splitlines()
    return "".join(lines[int(line.rpartition(":")[2]) - 1 :][:1])
