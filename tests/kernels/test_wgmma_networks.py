"""A narrow network's step by wgmma, in the emulator: who goes this way, loss and gradients within their bounds, the
same bits in every schedule, and what it moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from emulator import EmulatorLauncher
from emulator.build import KERNELS
from support.integer_networks import check_integer_network
from support.kernel_layers import H200, HOPPER
from support.kernel_networks import LOSSES, Network, Planner, described, hold_gradients, network_on, run_everything
from support.network_bounds import hold
from support.requirements import require_emulator

import gpuback
from gpuback import SGD, Adam, TrainStep, losses
from gpuback._backends.cuda import network_plans, split_k
from gpuback._backends.cuda.network_plans import StepPlan, possible_fused_plan
from gpuback._backends.cuda.split_k import SplitK
from gpuback._core.activations import ACTIVATIONS
from gpuback._cuda.launch import DeviceLimits
from gpuback._gates.variants import every_kernel
from gpuback._network.inputs import as_batch

require_emulator()

SEVEN_OF_64 = (64,) * 8
FOURTEEN_OF_32 = (32, 31, 17, 32, 30, 32, 32, 20, 32, 32, 29, 32, 3, 32, 32)
TYPES = ("bfloat16", "float16")
SOURCE = "network/fused_step_wgmma.cu"


def launcher_with(order: str = "random", copies: str = "random", **choices: Any) -> EmulatorLauncher:
    return EmulatorLauncher(order, copies=copies, **{"limits": HOPPER} | choices)


# ---- Who goes this way


def plan_of(network: Network, limits: DeviceLimits) -> StepPlan:
    plan = possible_fused_plan(network.on(Planner(limits=limits)).architecture, network.batch_size, limits)
    assert isinstance(plan, StepPlan)
    return plan


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "sizes, width", [((1, 1), 32), (FOURTEEN_OF_32, 32), ((32, 33), 64), (SEVEN_OF_64, 64), ((64, 1, 64), 64)]
)
def test_networks_of_16_bits_up_to_64_wide_go_by_wgmma(sizes, width, dtype):
    plan = plan_of(Network(sizes, 999, dtype), HOPPER)
    assert plan.launch.variant.entry == "fused_step_wgmma" and plan.launch.variant.wgmma
    assert f"MAX_WIDTH={width}" in plan.launch.variant.defines
    assert plan.launch.shared_bytes <= HOPPER.shared_bytes and plan.launch.block == 512
    assert plan.launch.grid == plan.sums.split.splits == 8


@pytest.mark.parametrize(
    "network, limits",
    [
        (Network((64, 64), 999), H200),
        (Network((64, 65), 999), HOPPER),
        (Network((32, 32), 999, "float32"), HOPPER),
        (Network((32, 32), 999, "tf32"), HOPPER),
        (Network((64, 64), 999), replace(HOPPER, shared_bytes=200_000)),
    ],
)
def test_others_keep_their_plan(network, limits):
    plan, without = plan_of(network, limits), plan_of(network, replace(limits, wgmma=False))
    assert plan.launch.variant.entry == "fused_step" and not without.remark
    assert (plan.launch, plan.tile_b, plan.sums) == (without.launch, without.tile_b, without.sums)
    assert plan.layout.tobytes() == without.layout.tobytes()


def test_it_is_explained():
    def says(sizes: tuple[int, ...], **options: Any) -> str:
        return str(network_on(launcher_with(), sizes, dtype="bfloat16", **options).explain(999))

    narrow = "fused_step_wgmma, 8 blocks, batch tiles of 128 rows, 8 splits of 128 rows, by wgmma (GPUBACK_HOPPER)"
    assert narrow in says((64, 64, 10))
    wide = says((64, 128))
    assert "fused_step, 8 blocks" in wide and "(by wgmma layers go up to 64 wide)" in wide
    two = "in two launches: beside the sums of all gradients, registers have no room for"
    assert two in says((64, 64), loss=losses.Huber(0.5))


# ---- Bounds

SHAPES = [
    ((1, 1), 1),
    ((63, 3), 33),
    ((3, 17, 2), 65),
    ((17, 40, 16, 5), 301),
    ((64, 17, 64), 1000),
    (SEVEN_OF_64, 128),
    (FOURTEEN_OF_32[:13], 96),
]


def bound_cases() -> Iterator[dict[str, Any]]:
    """Every activation and loss, with shapes, types and weights that take turns."""
    names = [*ACTIVATIONS]
    for i in range(2 * len(names)):
        sizes, batch_size = SHAPES[i % len(SHAPES)]
        fitting = [(loss, output, rows) for loss, output, rows in LOSSES if sizes[-1] > 1 or output == "identity"]
        activation = names[i // 2]
        if "sigmoid" in activation and len(sizes) > 10:
            continue  # behind so many of them all samples are alike, and share their roundings
        if activation == "hard_tanh" and batch_size == 1000:
            continue  # so many are near a kink that zeros would pass
        yield {
            "shape": (sizes, batch_size),
            "dtype": TYPES[i // 4 % 2],
            "activation": activation,
            "loss": fitting[(i + i // len(SHAPES)) % len(fitting)],
            "weighted": i % 3 == 1,
            "form": "fused_step",
        }


@pytest.mark.thorough
@pytest.mark.parametrize("case", list(bound_cases()), ids=described)
def test_loss_and_gradients_are_within_their_bounds(case):
    (sizes, batch_size), (loss, output, rows) = case["shape"], case["loss"]
    network = Network(sizes, batch_size, case["dtype"], case["activation"], loss, output, rows, case["weighted"])
    launcher = launcher_with()
    net = network.on(launcher)
    value, gradients = network.gradients(net, need_input_grad=True)
    assert launcher.launches[-1] == "fused_step_wgmma"
    expected = network.expected(net)
    hold("loss", value, expected.loss)
    hold_gradients(net, gradients.theta, gradients.inputs, expected)
    before = gradients.theta.copy()
    _, again = network.gradients(net, out=gradients, accumulate=True)
    np.testing.assert_array_equal(again.theta, before + before)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("sizes, batch_size", [((1, 1), 1), ((5, 7, 6, 4), 32), ((30, 3, 60), 64), ((3, 64, 2), 256)])
def test_networks_of_small_integers_are_exact(sizes, batch_size, activation, dtype, monkeypatch):
    launcher = launcher_with()
    monkeypatch.setattr(gpuback, "MLP", lambda sizes, **options: network_on(launcher, sizes, **options))
    check_integer_network(activation, sizes, batch_size, dtype)
    assert "fused_step_wgmma" in launcher.launches


@pytest.mark.thorough
def test_rows_beyond_the_batch_are_zero():
    """There, where inputs are 0, an activation may be infinite."""
    net = network_on(launcher_with(checked=True), (3, 5, 4), activation="exponential", dtype="bfloat16")
    net.weights[0][...] = 1
    net.biases[0][...] = 100
    loss, gradients = net.value_and_grad(np.full((37, 3), -33.0), np.arange(37) % 4, need_input_grad=True)
    assert np.isfinite(loss) and np.isfinite(gradients.theta).all() and np.isfinite(gradients.inputs).all()
    assert gradients.weights[0].any()


@pytest.mark.thorough
def test_a_large_sum_times_a_slope_of_zero_is_nan_for_relu():
    """Sums are rounded first, as in the layers' kernels for Hopper."""
    net = network_on(launcher_with(), (1, 1, 1), activation="relu", dtype="float16", loss="squared_error")
    net.theta[...] = [1, 0, 60000, 0]
    _, gradients = net.value_and_grad(np.float32([[-1.0]]), np.float32([[-3.0]]))
    assert np.isnan(gradients.weights[0]).all()


# ---- Every variant, in every schedule


def long_splits(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Splits of more than 128 rows, which otherwise come with batches of thousands."""
    monkeypatch.setattr(split_k, "narrow_split", lambda size: SplitK(-(-size // rows), rows))
    monkeypatch.setattr(network_plans, "step_plan", network_plans.step_plan.__wrapped__)


VARIANT_CASES = [
    Network((17, 32, 5, 30), 201, dtype, ("gelu", "relu"), rows=True, weighted=True) for dtype in TYPES
] + [
    Network((50, 64, 17, 64, 3), 201, dtype, ("silu", "leaky_relu", "tanh"), "binary_cross_entropy") for dtype in TYPES
]
SCHEDULES = [("fifo", "late", 1), ("lifo", "early", 3), ("random", "random", 4)]


@pytest.mark.thorough
@pytest.mark.parametrize("network", VARIANT_CASES, ids=str)
def test_a_variant_in_every_schedule(network):
    bits = {
        run_everything(launcher_with(order, copies, resident_blocks=resident, checked=True), "fused_step", network)
        for order, copies, resident in SCHEDULES
    }
    assert len(bits) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_long_splits_in_every_schedule(layers, monkeypatch):
    """Slabs that follow each other, with an odd and an even number of layers."""
    long_splits(monkeypatch, 448)
    network = Network((40, 33, 17, 5)[: layers + 1], 700, activation=("relu", "gelu")[: layers - 1], weighted=True)
    bits = set()
    for order, copies, resident in SCHEDULES:
        net = network.on(launcher_with(order, copies, resident_blocks=resident, checked=True))
        value, gradients = network.gradients(net, need_input_grad=True)
        expected = network.expected(net)
        hold("loss", value, expected.loss)
        hold_gradients(net, gradients.theta, gradients.inputs, expected)
        bits.add((value.tobytes(), gradients.theta.tobytes(), gradients.inputs.tobytes()))
    assert len(bits) == 1


def test_no_variant_is_left_out():
    planner = Planner(limits=HOPPER)
    for network in VARIANT_CASES:
        run_everything(planner, "fused_step", network, quick=True)
    assert {variant for variant in planner.variants if variant.source.startswith("network/") and variant.wgmma} == {
        kernel.variant
        for kernel in every_kernel()
        if kernel.variant.source.startswith("network/") and kernel.variant.wgmma
    }


@pytest.mark.thorough
@pytest.mark.parametrize("place", [(7, 1e30, 1e12), (7, 1.0, 1e20)])
def test_a_loss_or_gradient_that_is_not_finite_makes_no_step(place):
    net = network_on(launcher_with(checked=True), (3, 40), loss="squared_error", dtype="bfloat16")
    net.theta[...] = 0
    step, x, y = TrainStep(net, SGD(0.1)), np.ones((300, 3)), np.ones((300, 40))
    row, x[row, 1], y[row, 3] = place
    step(x, y)
    assert not net.theta.any()
    step(np.ones((300, 3)), np.ones((300, 40)))
    assert net.theta.all()


# ---- What it moves


@pytest.mark.thorough
@pytest.mark.parametrize("sizes, batch_size, clips", [(SEVEN_OF_64, 1024, False), ((40, 8, 3), 2048, True)])
def test_a_step_moves_samples_once(sizes, batch_size, clips):
    """θ comes once for each block and once for the update, and a block leaves one partial result."""
    launcher = launcher_with(checked=True)
    network = Network(sizes, batch_size)
    net = network.on(launcher)
    step = TrainStep(net, Adam(), clip_norm=1.0 if clips else None)
    x, y, _ = as_batch(*network.batch(), net.architecture, net.ops)
    step._step(x[:1], y[:1], None)  # which brings hyper-parameters to the device
    net._pool.clear()
    launcher.reset_counts()
    launcher.launches.clear()
    step._step(x, y, None)
    assert launcher.launches == ["fused_step_wgmma"] + ["adam"] * clips
    (passes,) = net._pool._free
    counts, plan, n = launcher.counts, passes._plan, net.n_parameters
    blocks, split = plan.launch.grid, plan.sums.split
    assert blocks == split.splits == batch_size // 128
    strips = sum(-(-n_out // 16) * (1 + -(-n_in // 8)) for n_in, n_out in pairwise(sizes))
    partials = 512 * strips * (split.splits + -(-split.splits // split.group_size))
    common = {"hyper", "state", "mean_loss", "counters"}
    read = {name: count for name, count in counts.bytes_read.items() if count and name not in common}
    written = {name: count for name, count in counts.bytes_written.items() if count and name not in common}
    names = ("first_moment", "second_moment") if clips else ("first_state", "second_state")
    state = dict.fromkeys(names, 4 * n)
    kept = {"gradient": 4 * n} if clips else {}
    assert read == {
        "x_bi": 4 * batch_size * sizes[0],
        "labels_b": 8 * batch_size * 8,  # by each of the lanes that work on a row
        "theta": 4 * n * blocks + 4 * n,
        "layout": 48 * len(sizes) * blocks,
        "partials": partials,
        "losses": 8 * blocks,
        **({"squares": 8 * plan.sums.slots} if clips else {}),
        **state,
        **kept,
    }
    assert written == {
        "theta": 4 * n,
        "partials": partials,
        "losses": 8 * blocks,
        "squares": 8 * plan.sums.fragments,
        **state,
        **kept,
    }
    layers = len(sizes) - 1
    products = 2 * 4 * (2 * layers - 1) + 8 * layers  # of a slab: two warpgroups, up and down; sums
    assert counts.warpgroup_products == products * blocks


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", [SEVEN_OF_64, (32,) * 4])
def test_panels_are_free_of_bank_conflicts(sizes):
    """But for the element of a label, and for θ, whose rows begin anywhere: two neighbours for a lane."""
    launcher = launcher_with(checked=True)
    network = Network(sizes, 256, activation="gelu")
    network.gradients(network.on(launcher), need_input_grad=True)
    for line in launcher.counts.conflicts_by_line:
        text = (KERNELS / SOURCE).read_text(encoding="utf-8").splitlines()[int(line.rpartition(":")[2]) - 1]
        assert "loss_formulas.cuh" in line or "weights[o * n_in + column" in text, line
