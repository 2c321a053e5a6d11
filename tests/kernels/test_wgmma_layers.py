"""Layers on the kernels for Hopper, in the checking emulator: which layers go there, results within the contract's
tolerance at any alignment, and the same bits whoever runs first and wherever.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from emulator import EmulatorLauncher, GuardedNumpy
from support.kernel_layers import HOPPER, PRECISIONS, Layer, laid_out
from support.requirements import require_emulator

from gpuback import MLP
from gpuback._backends.cuda import layer_plans, wgmma_plans
from gpuback._backends.cuda.ops import CudaOps
from gpuback._core.activations import ACTIVATIONS
from gpuback._cuda.launch import Variant
from gpuback._gates.variants import every_kernel

require_emulator()

SCHEDULES = [("fifo", "late"), ("lifo", "early"), ("random", "random")]
SIXTEEN_BIT = ("bfloat16", "float16")
WIDTHS = {(64, 64): (61, 50), (128, 128): (101, 123), (256, 128): (201, 150), (256, 256): (250, 131)}
"""By the widths of a variant: nO and nI of a ragged layer for it."""

FEW_BLOCKS = replace(HOPPER, multiprocessors=2)
"""A device on which forward passes go round the stages."""


@pytest.fixture
def chains_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A function that makes plans cut chains of at least so many rows, so that small batches go round the stages."""

    def at_least(rows: int) -> None:
        monkeypatch.setattr(wgmma_plans, "SMALLEST_CHAIN", rows)
        layer_plans.layer_plan.cache_clear()

    yield at_least
    layer_plans.layer_plan.cache_clear()


def launcher_of(order: str, copies: str, **choices: Any) -> EmulatorLauncher:
    return EmulatorLauncher(order, copies=copies, **({"limits": HOPPER, "checked": True} | choices))


def entries(launcher: EmulatorLauncher) -> set[str]:
    return {variant.entry for variant in launcher.variants}


# ---- Which layers go there


@pytest.mark.parametrize(
    "n_out, n_in, backward, forward",
    [
        (64, 64, "layer_wgmma_narrow", "forward_wgmma_narrow"),
        (256, 256, "layer_wgmma_narrow", "forward_wgmma_narrow"),
        (1, 1000, "layer_wgmma_narrow", "forward_mma"),
        (512, 512, "layer_mma", "forward_mma"),
    ],
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_narrow_layers_of_16_bits_go_there_if_the_device_may(n_out, n_in, backward, forward, precision):
    shape = 256, n_out, n_in, PRECISIONS[precision]
    plans = layer_plans.layer_plan, layer_plans.delta_plan, layer_plans.forward_plan
    found = [plan(*shape, HOPPER) for plan in plans]
    if precision in SIXTEEN_BIT:
        assert [plan.launch.variant.entry for plan in found] == [backward, backward, forward]
    without = replace(HOPPER, wgmma=False)
    for plan, chosen in zip(plans, found, strict=True):
        assert not plan(*shape, without).launch.variant.wgmma
        if not chosen.launch.variant.wgmma:
            assert chosen == plan(*shape, without)


@pytest.mark.parametrize("batch_size", [1, 100, 1000, 2**13 - 1, 2**13, 2**16, 2**20, 2**22 + 1])
@pytest.mark.parametrize("n_out, n_in", [(64, 64), (128, 128), (256, 256), (72, 136), (200, 5000)])
def test_chains_are_as_long_as_the_contract_lets_them(batch_size, n_out, n_in):
    plan = layer_plans.layer_plan(batch_size, n_out, n_in, PRECISIONS["bfloat16"], HOPPER)
    rows = plan.split.rows_per_split // wgmma_plans.CLUSTER
    assert rows % 64 == 0 and 128 <= rows <= (2048 if batch_size < 8192 else 4096)
    assert plan.split.splits * plan.split.rows_per_split >= batch_size
    assert plan.launch.grid % plan.launch.cluster == 0 and plan.launch.shared_bytes <= HOPPER.shared_bytes


def test_explanations_name_the_kernel_and_the_switch():
    ops = CudaOps(np, EmulatorLauncher(limits=HOPPER))
    said = ops.explain_backward(65536, 128, 128, PRECISIONS["bfloat16"], need_da_prev=True)
    assert said.startswith("layer_wgmma_narrow, one launch by TMA and wgmma (GPUBACK_HOPPER): each of 128 blocks")
    assert ops.explain_forward(65536, 128, 128, PRECISIONS["bfloat16"]).startswith("forward_wgmma_narrow, 132 blocks")


# ---- Every variant


class Case(NamedTuple):
    """A layer, the variant that it takes, and how many rows go round that variant's stages more than twice."""

    layer: Layer
    variant: Variant
    rows: int


def backward_cases() -> Iterator[Case]:
    for panels in wgmma_plans.NARROW_PANELS:
        n_out, n_in = WIDTHS[panels.max_out, panels.columns]
        for precision, activation in itertools.product(SIXTEEN_BIT, ("relu", "gelu")):
            from_a = activation == "gelu"
            rows = 64 * (2 * (panels.stages_from_a if from_a else panels.stages) + 3)
            yield Case(Layer(rows + 137, n_out, n_in, precision, activation), panels.variant(precision, from_a), rows)


def forward_cases() -> Iterator[Case]:
    for panels in wgmma_plans.FORWARD_PANELS:
        n_out, n_in = WIDTHS[panels.widest, panels.widest]
        rows = 2 * 64 * (2 * panels.stages + 3)
        for precision in SIXTEEN_BIT:
            yield Case(Layer(rows + 37, n_out, n_in, precision, "tanh"), panels.variant(precision), rows)


def case_id(case: Case) -> str:
    return "-".join([case.variant.entry, *(define.partition("=")[2] for define in case.variant.defines)])


@pytest.mark.thorough
@pytest.mark.parametrize("case", list(backward_cases()), ids=case_id)
def test_a_backward_pass_in_every_schedule_and_at_any_alignment(case, chains_of):
    chains_of(case.rows)
    results = []
    for (order, copies), layout in zip(SCHEDULES, ("padded", "tight", "odd"), strict=True):
        launcher = launcher_of(order, copies, checked=layout == "odd" and case.layer.precision == "bfloat16")
        results.append(case.layer.backward(launcher, layout=layout))
        assert case.variant in launcher.variants
        assert entries(launcher) == {"layer_wgmma_narrow", *(["copy_elements"] if layout != "padded" else [])}
    case.layer.check(results[0])
    assert len({result.bits() for result in results}) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("case", list(forward_cases()), ids=case_id)
def test_a_forward_pass_in_every_schedule_and_on_any_device(case):
    results = []
    for (order, copies), limits in zip(SCHEDULES, (HOPPER, FEW_BLOCKS, FEW_BLOCKS), strict=True):
        checked = order == "random" and case.layer.precision == "bfloat16"
        launcher = launcher_of(order, copies, limits=limits, checked=checked)
        results.append(case.layer.forward(launcher))
        assert launcher.variants == {case.variant}
    case.layer.check_forward(results[0])
    assert len({result.tobytes() for result in results}) == 1


def test_no_variant_is_left_out():
    run = {case.variant for case in (*backward_cases(), *forward_cases())}
    entries = {variant.entry for variant in run}
    assert run == {kernel.variant for kernel in every_kernel() if kernel.variant.entry in entries}


# ---- Bits and numbers


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(3000, 64, 40), (900, 250, 200)], ids=str)
def test_bits_do_not_depend_on_the_device_or_on_who_runs_when(shape):
    layer, bits = Layer(*shape, "bfloat16"), set()
    for seed, count in enumerate((1, 7, 132)):
        limits = replace(HOPPER, multiprocessors=count)
        for (order, copies), resident in zip(SCHEDULES, (8, 16, 24), strict=True):
            launcher = launcher_of(order, copies, limits=limits, seed=seed, resident_blocks=resident, checked=False)
            bits.add(layer.backward(launcher).bits())
    assert len(bits) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("n_out, n_in", [(64, 40), (130, 70), (250, 300)])
def test_small_integers_are_exact(precision, n_out, n_in):
    layer = Layer(900, n_out, n_in, precision, "identity", "integers")
    dW, db, da_prev = layer.backward(launcher_of("random", "random", checked=False), before=3.0)
    da, h_prev, W = (x.astype(np.int64) for x in (layer.operands.da, layer.operands.h_prev, layer.operands.W))
    np.testing.assert_array_equal(dW, da.T @ h_prev + 3)
    np.testing.assert_array_equal(db, da.sum(axis=0) + 3)
    np.testing.assert_array_equal(da_prev, (da @ W).astype(da_prev.dtype))


@pytest.mark.thorough
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("kind", ["mixed", "positive"])
@pytest.mark.parametrize("batch_size, rows", [(4096, 2048), (8192, 4096)])
def test_tensor_cores_that_cut_off_in_the_longest_chains(precision, kind, batch_size, rows, chains_of):
    """Hardware truncates. Chains keep the error within the contract."""
    chains_of(rows)
    layer = Layer(batch_size, 40, 24, precision, "identity", kind)
    split = layer_plans.layer_plan(batch_size, 40, 24, PRECISIONS[precision], HOPPER).split
    assert split.rows_per_split == wgmma_plans.CLUSTER * rows
    layer.check(layer.backward(EmulatorLauncher(truncate=True, limits=HOPPER)))


@pytest.mark.thorough
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 130, 1), (2, 1, 130), (65, 17, 3), (3, 129, 131)], ids=str)
def test_the_smallest_shapes(shape, precision):
    layer = Layer(*shape, precision, "relu")
    for layout in ("padded", "odd"):
        launcher = launcher_of("lifo", "random", checked=precision == "bfloat16")
        layer.check(layer.backward(launcher, layout=layout))
    layer.check_forward(layer.forward(launcher))
    assert {"layer_wgmma_narrow", "forward_wgmma_narrow"} <= entries(launcher)


@pytest.mark.thorough
@pytest.mark.parametrize("n_in", [40, 200])
@pytest.mark.parametrize("need_da_prev", [True, False])
def test_gradients_are_added_to(n_in, need_da_prev):
    layer = Layer(300, 40, n_in, "bfloat16", "gelu")
    launcher = launcher_of("random", "random")
    layer.check(layer.backward(launcher, need_da_prev=need_da_prev, before=0.5), before=0.5)


@pytest.mark.thorough
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
@pytest.mark.parametrize("n_out, n_in", [(70, 37), (240, 137)])
def test_da_of_the_layer_below_by_itself_has_the_bits_of_the_whole_pass(activation, n_out, n_in):
    """With g' from h, with g' from a, and in float32 at the network's input."""
    layer = Layer(301, n_out, n_in, "bfloat16", activation or "identity")
    precision, found = PRECISIONS["bfloat16"], []
    g = None if activation is None else ACTIVATIONS[activation]
    da, h, W, a = (
        laid_out(x, "padded") for x in (*(getattr(layer.operands, name) for name in ("da", "h_prev", "W", "a_prev")),)
    )
    source = None if g is None else a if g.derivative_from == "a" else h
    for whole in (True, False):
        launcher = launcher_of("random", "random")
        ops = CudaOps(GuardedNumpy(), launcher)
        workspace = ops.workspace(301, (n_in, n_out), precision)
        da_prev = ops.empty((301, n_in), precision.accumulator) if g is None else laid_out(np.zeros_like(h), "padded")
        if whole:
            dW, db = ops.empty((n_out, n_in), precision.accumulator), ops.empty(n_out, precision.accumulator)
            ops.bind_backward(da, W, da_prev, g, source, 4.0, workspace)(h, dW, db, False)
        else:
            ops.bind_delta(da, W, da_prev, g, source, 4.0, workspace)()
        assert entries(launcher) == {"layer_wgmma_narrow"}
        found.append(da_prev)
    assert found[0].tobytes() == found[1].tobytes()
    if g is None:
        exact = da.astype(np.float64) @ W.astype(np.float64) / 4
        np.testing.assert_allclose(found[0], exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    else:
        layer.check(layer.backward(EmulatorLauncher())._replace(da_prev=found[0]))


@pytest.mark.thorough
def test_relus_slope_is_zero_or_one_to_the_bit():
    """ReLU is computed on pairs of elements: NaN goes through where g' is 0 or not, and so does -0."""
    values = np.array([[1.0, -2.0, np.nan, np.inf, -np.inf, -0.0]])
    rows = np.repeat(values, 3, axis=0).astype(PRECISIONS["bfloat16"].operand)
    h = np.array([[1.0], [0.0], [-0.0]]).repeat(6, axis=1).astype(rows.dtype)
    results = []
    for limits in (HOPPER, replace(HOPPER, wgmma=False)):
        ops = CudaOps(GuardedNumpy(), EmulatorLauncher(limits=limits))
        da_prev, W = np.empty_like(rows), np.eye(6, dtype=rows.dtype)
        da, dW, db = np.ones((3, 6), rows.dtype), np.empty((6, 6), np.float32), np.empty(6, np.float32)
        for column in range(6):
            one = np.zeros_like(da)
            one[:, column] = rows[:, column]
            backward = ops.bind_layer_backward(one, 6, ACTIVATIONS["relu"], PRECISIONS["bfloat16"])
            backward(one, h, W, h, dW, db, da_prev, False)
            results.append((limits.wgmma, column, da_prev.copy()))
    for (_, column, found), (_, _, expected) in zip(results[:6], results[6:], strict=True):
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        numbers = ~np.isnan(expected)
        assert found[numbers].tobytes() == expected[numbers].tobytes(), column


# ---- A network


@pytest.mark.thorough
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
def test_a_networks_layers_all_go_there(precision, monkeypatch):
    import gpuback._backends.registry
    from gpuback._backends.registry import Backend, BackendStatus

    bits = set()
    for order, copies in SCHEDULES:
        launcher = launcher_of(order, copies, checked=order == "random")
        ops = CudaOps(GuardedNumpy(), launcher, name="checked", fuse_networks=False)
        backend = Backend(lambda reproducible, ops=ops: ops, lambda: BackendStatus(True, "emulated"))
        monkeypatch.setitem(gpuback._backends.registry.BACKENDS, "checked", backend)
        net = MLP((9, 70, 130, 3), activation=["gelu", "tanh"], dtype=precision, seed=0, backend="checked")
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((137, 9)), rng.integers(3, size=137)
        loss, gradients = net.value_and_grad(x, y, need_input_grad=True)
        net.gradient_norms(x, y)
        bits.add((float(loss), gradients.theta.tobytes(), gradients.inputs.tobytes()))
        assert {name for name in entries(launcher) if name.startswith(("layer", "forward"))} == {
            "layer_wgmma_narrow",
            "forward_wgmma_narrow",
        }
    assert len(bits) == 1
