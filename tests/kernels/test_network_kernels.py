"""The kernels that take a whole narrow network at once, in the emulator: loss and gradients within their bounds,
integers exact, no fault that the checker finds, and the same bits whoever runs when and on whichever device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emulator import EmulatorLauncher
from numpy.typing import NDArray
from support.integer_networks import check_integer_network
from support.kernel_layers import H200
from support.kernel_networks import (
    ALONE,
    DTYPES,
    LOSSES,
    SMALL,
    Network,
    Planner,
    described,
    hold_gradients,
    network_on,
    run_everything,
    two_launches,
)
from support.network_bounds import hold
from support.oracle import to_tf32
from support.requirements import require_emulator

import gpuback
from gpuback._backends.cuda import network_plans, split_k
from gpuback._backends.cuda.network_layout import round_up_16
from gpuback._backends.cuda.network_plans import StepPlan, possible_fused_plan
from gpuback._backends.cuda.split_k import SplitK
from gpuback._core.activations import ACTIVATIONS
from gpuback._gates.variants import every_kernel
from gpuback.testing import tolerance

require_emulator()

SCHEDULES = [("fifo", "late", 1, H200), ("lifo", "early", 3, SMALL), ("random", "random", 4, ALONE)]
"""Order, copies, resident blocks, device."""

# ---- Bounds

SHAPES = [
    ((1, 1), 1),
    ((100, 3), 33),
    ((3, 17, 2), 65),
    ((17, 100, 3), 300),
    ((128, 64, 1), 129),
    ((64, 17, 64), 1000),
    ((2, 128, 128, 5), 200),
    ((64,) * 8, 128),
    ((1, 3, 17, 64, 100, 128, 1), 37),
    ((32, 31, 17, 32, 30, 32, 32, 20, 32, 32, 29, 32, 32), 96),
]
FIELDS = {
    "shape": SHAPES,
    "dtype": list(DTYPES),
    "activation": ["identity", "relu", "leaky_relu", "elu", "sigmoid", "tanh", "softplus", "gelu", "silu"],
    "loss": LOSSES,
    "weighted": [False, True],
    "inputs": [False, True],
    "form": ["fused_step", "fused_passes"],
    "limits": [H200, SMALL],
}


def makes_sense(case: dict) -> bool:
    """One class is always right: its loss and gradients are 0. In float32 two launches have no room for 128 on SMALL.
    Behind twelve sigmoids all samples are alike and share their roundings, which bounds take to be independent."""
    sizes, _ = case["shape"]
    loss, output, _ = case["loss"]
    wide = case["dtype"] in ("float32", "tf32") and max(sizes) > 64 and case["limits"] is SMALL
    alike = case["activation"] == "sigmoid" and len(sizes) > 10
    return (
        not wide
        and not alike
        and (sizes[-1] > 1 or loss == "binary_cross_entropy" or output in ("identity", "sigmoid", "tanh"))
    )


def pairwise() -> Iterator[dict]:
    """Cases in which any two values of two fields come together, those with which most pairs are new first."""
    rng = np.random.default_rng(0)
    missing = {
        pair
        for pair in itertools.combinations(
            [(name, i) for name, values in FIELDS.items() for i in range(len(values))], 2
        )
        if pair[0][0] != pair[1][0]
    }
    for _ in range(400):
        best, new = {}, set()
        for _ in range(40):
            indices = {name: int(rng.integers(len(values))) for name, values in FIELDS.items()}
            case = {name: FIELDS[name][i] for name, i in indices.items()}
            pairs = set(itertools.combinations(indices.items(), 2)) & missing
            if makes_sense(case) and len(pairs) > len(new):
                best, new = case, pairs
        if new:
            missing -= new
            yield best


CASES = list(pairwise())


@pytest.mark.thorough(first=10)
@pytest.mark.parametrize("case", CASES, ids=described)
def test_loss_and_gradients_are_within_their_bounds(case):
    (sizes, batch_size), (loss, output, rows) = case["shape"], case["loss"]
    network = Network(sizes, batch_size, case["dtype"], case["activation"], loss, output, rows, case["weighted"])
    net = network.on(EmulatorLauncher("random", copies="random", limits=case["limits"]), case["form"])
    value, gradients = network.gradients(net, need_input_grad=case["inputs"])
    expected = network.expected(net)
    hold("loss", value, expected.loss)
    hold_gradients(net, gradients.theta, gradients.inputs, expected)
    x, y, weight = network.batch()
    assert net.loss(x, y, sample_weight=weight).tobytes() == value.tobytes()
    before = gradients.theta.copy()
    _, again = network.gradients(net, out=gradients, accumulate=True)
    np.testing.assert_array_equal(again.theta, before + before)


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name not in FIELDS["activation"]])
@pytest.mark.parametrize("form, dtype", [("fused_step", "float32"), ("fused_passes", "bfloat16")])
def test_every_other_activation(form, dtype, activation):
    network = Network((3, 17, 2), 65, dtype, activation)
    net = network.on(EmulatorLauncher("random", copies="random"), form)
    value, gradients = network.gradients(net, need_input_grad=True)
    expected = network.expected(net)
    hold("loss", value, expected.loss)
    hold_gradients(net, gradients.theta, gradients.inputs, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "output, loss", [("softmax", "cross_entropy"), ("sigmoid", "squared_error"), ("tanh", "squared_error")]
)
def test_outputs(output, loss, dtype):
    network = Network((17, 100, 3), 130, dtype, "gelu", loss, output)
    net = network.on(EmulatorLauncher("lifo", checked=True))
    expected = network.expected(net).outputs
    digits = {"float32": 1e-5, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(net.forward(network.batch()[0]), expected, atol=digits)


DEFECTS = [Network((17, 100, 3), 300), Network((64, 64, 17, 64), 1000, activation="silu"), Network((30, 32, 32), 37)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", DEFECTS, ids=str)
def test_bounds_refuse_what_was_left_out(network, dtype):
    """A row, a column, a bias's gradient, all of it: from results that are else exact."""
    network = replace(network, dtype=dtype)
    net = network.on(EmulatorLauncher())
    expected = network.expected(net)
    layout = net.architecture.layout
    hold_gradients(net, expected.gradient.value, expected.inputs.value, expected)

    def refused(part: str, k: int, place: Any, change: NDArray | float) -> None:
        theta = expected.gradient.value.copy()
        array = layout.split(theta)["Wb".index(part)][k][place]
        array[...] = change if np.ndim(change) == 0 else array - change
        with pytest.raises(AssertionError, match="off by"):
            hold_gradients(net, theta, None, expected)

    for k, (da, h) in enumerate(expected.rows):
        for b in (0, network.batch_size // 2, network.batch_size - 1):
            refused("W", k, ..., np.outer(da[b], h[b]))
        for last in (0, -1):
            refused("W", k, (slice(None), last), 0)
            refused("W", k, last, 0)
        refused("b", k, ..., 0)
        refused("W", k, ..., 0)
    with pytest.raises(AssertionError, match="off by"):
        hold("dx", np.where(np.arange(network.batch_size)[:, None] == 7, 0, expected.inputs.value), expected.inputs)
    with pytest.raises(AssertionError, match="off by"):
        hold("loss", np.asarray(expected.loss.value * (1 - 1 / network.batch_size)), expected.loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_sums_over_the_batch_keep_the_contract_of_one_operation(dtype, activation):
    """Two launches write down every da and h. One launch has computed the same ones, as dx and the loss show; both
    forms' dW and db are held to them."""
    network = Network((50, 64, 17, 64), 700, dtype, activation, weighted=True)
    nets = [network.on(EmulatorLauncher("random"), form) for form in ("fused_step", "fused_passes")]
    results = [network.gradients(net, need_input_grad=True) for net in nets]
    assert len({(value.tobytes(), gradients.inputs.tobytes()) for value, gradients in results}) == 1

    h, da = written_rows(nets[1], network)
    read = to_tf32 if dtype == "tf32" else np.asarray
    for _, gradients in results:
        for k, (dW, db) in enumerate(zip(gradients.weights, gradients.biases, strict=True)):
            exact, limit = read(da[k]).T @ read(h[k]), np.abs(da[k]).T @ np.abs(h[k])
            assert np.all(np.abs(dW - exact) <= tolerance(limit, network.batch_size, "float32"))
            limit = tolerance(np.abs(da[k]).sum(axis=0), network.batch_size, "float32")
            assert np.all(np.abs(db - da[k].sum(axis=0)) <= limit)


def written_rows(net: gpuback.MLP, network: Network) -> tuple[list[NDArray], list[NDArray]]:
    """Each layer's h_{k-1} and da_k, as two launches have left them in the workspace."""
    (passes,), batch_size = net._pool._free, network.batch_size
    plan, scale = passes._plan.passes, net.architecture.precision.gradient_scale(batch_size)

    def rows(name: str, k: int) -> NDArray:
        first, width = int(plan.layout[name][k]), network.sizes[k]
        padded = round_up_16(width)
        flat = passes._workspace[first * batch_size : (first + padded) * batch_size].astype(np.float64)
        assert not flat.reshape(batch_size, padded)[:, width:].any()
        return flat.reshape(batch_size, padded)[:, :width]

    depth = len(network.sizes) - 1
    return [rows("row_h", k) for k in range(depth)], [rows("row_da", k + 1) / scale for k in range(depth)]


# ---- Integers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("form", ["fused_step", "fused_passes"])
@pytest.mark.parametrize(
    "sizes, batch_size",
    [((1, 1), 1), ((5, 7, 6, 4), 32), ((2, 9, 8, 9, 35), 16), ((30, 3, 65), 64), ((3, 100, 2), 256)],
)
def test_networks_of_small_integers_are_exact(sizes, batch_size, form, activation, dtype, monkeypatch):
    """Not a row, not a column may be missing."""
    launcher = EmulatorLauncher("random", copies="random")
    monkeypatch.setattr(gpuback, "MLP", lambda sizes, **options: network_on(launcher, sizes, form, **options))
    check_integer_network(activation, sizes, batch_size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["fused_step", "fused_passes"])
def test_a_large_batch_of_small_integers_is_exact(form, dtype):
    rng, batch_size = np.random.default_rng(0), 4096
    net = network_on(EmulatorLauncher(), (60, 100), form, loss="squared_error", **DTYPES[dtype])
    net.theta[...] = 0
    x, y = rng.integers(-3, 4, (batch_size, 60)), rng.integers(-3, 4, (batch_size, 100))
    loss, gradients = net.value_and_grad(x, y)
    np.testing.assert_array_equal(gradients.weights[0] * batch_size, -y.T @ x)
    np.testing.assert_array_equal(gradients.biases[0] * batch_size, -y.sum(axis=0))
    assert loss * batch_size == (y**2).sum() / 2


# ---- Every variant, in every schedule


def variant_cases() -> Iterator[tuple[str, Network]]:
    activations = ("gelu", "relu")
    for dtype in DTYPES:
        yield "fused_step", Network((17, 32, 5, 30), 201, dtype, activations, rows=True, weighted=True)
        yield "fused_step", Network((50, 64, 17, 3), 201, dtype, activations)
        yield "fused_passes", Network((50, 64, 17, 3), 201, dtype, activations, weighted=True)
        sizes = (70, 128) if dtype in ("float32", "tf32") else (70, 128, 9)
        yield "fused_step", Network(sizes, 150, dtype, activations[: len(sizes) - 2], "binary_cross_entropy")
        yield "fused_passes", Network((66, 40), 150, dtype, (), "squared_error", "softmax")
    yield "fused_passes", Network((128, 100, 128, 64, 3), 140, "bfloat16", (*activations, "tanh"))


VARIANT_CASES = list(variant_cases())


@pytest.mark.parametrize("form, network", VARIANT_CASES, ids=str)
def test_a_variant_in_every_schedule_and_on_every_device(form, network, quick):
    bits = {
        run_everything(
            EmulatorLauncher(order, copies=copies, resident_blocks=resident, limits=limits, checked=True),
            form,
            network,
            quick,
        )
        for order, copies, resident, limits in (SCHEDULES[-1:] if quick else SCHEDULES)
    }
    assert len(bits) == 1


def test_no_variant_is_left_out():
    """By the cases above."""
    planner = Planner()
    for form, network in VARIANT_CASES:
        run_everything(planner, form, network, quick=True)
    assert {variant for variant in planner.variants if variant.source.startswith("network/")} == {
        kernel.variant
        for kernel in every_kernel()
        if kernel.variant.source.startswith("network/") and not kernel.variant.wgmma
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [320, 448])
def test_how_long_splits_are_cut_into_batch_tiles_changes_no_bit(rows, dtype, monkeypatch):
    """Splits of more than 128 rows, which otherwise come with batches of thousands; tiles begin anywhere in them."""
    monkeypatch.setattr(split_k, "narrow_split", lambda size: SplitK(-(-size // rows), rows))
    monkeypatch.setattr(split_k, "split_batch", lambda size, *_: SplitK(-(-size // rows), rows))
    for plan in (network_plans.step_plan, network_plans.passes_plan, network_plans.weight_gradients_plan):
        monkeypatch.setattr(network_plans, plan.__name__, plan.__wrapped__)
    network = Network((17, 40, 16, 5), 700, dtype, ("relu", "gelu"), weighted=True)
    for form in ("fused_step", "fused_passes"):
        found = {}
        for shared_bytes in (232_448, 101_376, 70_000, 56_000, 48_000, 42_000):
            limits = replace(H200, shared_bytes=shared_bytes, multiprocessors=2)
            net = network.on(EmulatorLauncher(limits=limits), form)
            plan = (
                possible_fused_plan(net.architecture, 700, limits)
                if form == "fused_step"
                else two_launches(net.architecture, 700, limits)
            )
            if form == "fused_step" and not isinstance(plan, StepPlan):
                continue
            loss, gradients = network.gradients(net, need_input_grad=True)
            expected = network.expected(net)
            hold("loss", loss, expected.loss)
            hold_gradients(net, gradients.theta, gradients.inputs, expected)
            cut = plan.tile_b if form == "fused_step" else (plan.passes.tile_b, plan.weight_gradients.tile_b)
            found[cut] = loss.tobytes(), gradients.theta.tobytes(), gradients.inputs.tobytes()
        assert len(found) > 1 and len(set(found.values())) == 1
