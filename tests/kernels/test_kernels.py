"""Every kernel that plans can ask for, run by the checking emulator: no race, no access out of bounds, no shared memory
read before it is written; results within the contract's tolerance, and the same bits whoever runs first and wherever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from emulator import EmulatorLauncher, GuardedNumpy
from emulator.build import KERNELS, entry_points
from numpy.typing import NDArray
from support.kernel_layers import A10, A100, EXACT_SOURCES, H200, PRECISIONS, Gradients, Layer, laid_out
from support.requirements import require_emulator

import gpuback._backends.registry
from gpuback import MLP, SGD, Adam, TrainStep
from gpuback._backends.cuda import layer_plans, split_k
from gpuback._backends.cuda.ops import CudaOps
from gpuback._backends.registry import Backend, BackendStatus
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.losses import LOSSES
from gpuback._core.scratch import Scratch
from gpuback._cuda.launch import DeviceLimits, Variant
from gpuback._gates.variants import every_kernel
from gpuback.testing import random_batch

require_emulator()

SCHEDULES = [("fifo", "late"), ("lifo", "early"), ("random", "random")]


@pytest.fixture
def plan_for(monkeypatch):
    """A function that makes plans want so few work tiles that small shapes get large tiles and long splits."""
    yield lambda items: want(items, monkeypatch)
    monkeypatch.undo()
    forget_plans()


def want(items: int | None, patch: pytest.MonkeyPatch) -> None:
    if items is not None:
        patch.setattr(split_k, "WORK_TILES_WANTED", items)
        patch.setattr(layer_plans, "SIMT_WORK_TILES_WANTED", items)
        patch.setattr(layer_plans, "SIMT_LARGE_TILES_WANTED", items // 2)
    forget_plans()


def forget_plans() -> None:
    for plan in (layer_plans.layer_plan, layer_plans.delta_plan, layer_plans.forward_plan):
        plan.cache_clear()


# ---- Every variant of the layers' kernels


class Case(NamedTuple):
    """A pass of a ragged layer on a device, and how many work tiles a plan shall want (None: as many as ever)."""

    direction: str
    layer: Layer
    limits: DeviceLimits
    items: int | None

    @property
    def variant(self) -> Variant:
        layer = self.layer
        shape = layer.batch_size, layer.n_out, layer.n_in, PRECISIONS[layer.precision], self.limits
        with pytest.MonkeyPatch.context() as patch:
            want(self.items, patch)
            plan = (
                layer_plans.layer_plan(*shape).launch
                if self.direction == "backward"
                else layer_plans.forward_plan(*shape).launch
            )
        forget_plans()
        return plan.variant


def layer_cases() -> Iterator[Case]:
    for precision in ("bfloat16", "float16", "tf32"):
        for n_out, n_in, activation in [(61, 50, "tanh"), (61, 123, "tanh"), (101, 50, "tanh"), (101, 123, "gelu")]:
            for limits in (H200, A100, A10):
                yield Case("backward", Layer(801, n_out, n_in, precision, activation), limits, items=3)
    for precision in PRECISIONS:
        for direction in ("backward", "forward"):
            for items in (None, 12):
                yield Case(direction, Layer(701, 150, 137, precision, "tanh"), H200, items)


LAYER_CASES = {case.variant: case for case in reversed(list(layer_cases()))}


def variant_id(variant: Variant) -> str:
    return "-".join([variant.entry, *(define.partition("=")[2] for define in variant.defines)])


def run_case(variant: Variant, layout: str = "padded", **choices: Any) -> Gradients | NDArray:
    """What a variant's case gives."""
    direction, layer, limits, _ = LAYER_CASES[variant]
    launcher = EmulatorLauncher(checked=True, limits=limits, **choices)
    result = getattr(layer, direction)(launcher, layout=layout)
    assert launcher.variants == {variant}
    return result


def check_case(variant: Variant, result: Any) -> None:
    direction, layer, *_ = LAYER_CASES[variant]
    if direction == "forward":
        layer.check_forward(result)
    else:
        layer.check(result)


def bits_of(result: Gradients | NDArray) -> Any:
    return result.bits() if isinstance(result, Gradients) else result.tobytes()


@pytest.mark.parametrize("variant", LAYER_CASES, ids=variant_id)
def test_a_layers_kernel_in_every_schedule_and_at_any_alignment(variant, plan_for, quick):
    plan_for(LAYER_CASES[variant].items)
    result = run_case(variant, order="random", copies="random", resident_blocks=4)
    check_case(variant, result)
    if quick:
        return
    others = [
        run_case(variant, order="fifo", copies="late", resident_blocks=1),
        run_case(variant, order="lifo", copies="early", resident_blocks=3),
        run_case(variant, "odd", order="random", seed=1),  # by plain loads, element by element
    ]
    assert {bits_of(other) for other in others} == {bits_of(result)}


def test_every_kernel_has_a_variant():
    """That no variant is left out is then seen below, in test_network_kernels.py and in test_reproducible_cuda.py."""
    variants = [kernel.variant for kernel in every_kernel()]
    defines_of = {variant.source: variant.defines for variant in variants}
    for source, defines in defines_of.items():
        asked_for = {variant.entry for variant in variants if variant.source == source}
        assert set(entry_points(KERNELS / source, defines, (9, 0))) == asked_for


def test_no_variant_is_left_out():
    """The cases above, and the network below, together run what is asked for layer by layer without `reproducible`.

    Layers on Hopper, and the copies that they need, are run in test_wgmma_layers.py.
    """
    kernels = [case.variant for case in every_kernel() if not case.variant.wgmma]
    layers = {variant for variant in kernels if variant.entry.startswith(("layer_", "forward_"))}
    assert set(LAYER_CASES) == layers
    others = (*EXACT_SOURCES, "network/fused_step.cu", "network/fused_passes.cu", "network/fused_weight_gradients.cu")
    rows = {variant for variant in kernels if variant.source not in others} - layers
    rows = {variant for variant in rows if variant.entry != "copy_elements"}
    launcher, scaling = EmulatorLauncher(checked=True), EmulatorLauncher(checked=True)
    for name in PRECISIONS:
        train(launcher, name, Adam(0.01), (3, 5, 2))
        train(launcher, name, SGD(0.01), (3, 5, 2))
        output_delta(launcher, name, "tanh")
        gradient_scale(scaling, name)  # which also launches one of exact_sums.cu's
    for name in ("float32", "float64"):
        train(launcher, name, Adam(0.01, decay_biases=False), (3, 5, 2))
        train(launcher, name, SGD(0.01, trainable=[False, True]), (3, 5, 2))
    assert launcher.variants <= rows | layers
    assert rows <= launcher.variants | scaling.variants


# ---- Bits


SPLITS = {
    "layer_mma_narrow": Layer(900, 64, 40, "bfloat16"),
    "layer_mma": Layer(900, 130, 70, "bfloat16"),
    "layer_mma tf32": Layer(900, 130, 70, "tf32"),
    "layer_simt": Layer(900, 70, 40, "float32"),
    "layer_simt float64": Layer(900, 70, 40, "float64"),
}


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("layer", SPLITS.values(), ids=SPLITS)
def test_bits_do_not_depend_on_the_device_or_on_who_runs_when(layer):
    devices = [replace(H200, multiprocessors=count) for count in (1, 7, 132)] + [A100, A10]
    bits = set()
    for seed, limits in enumerate(devices):
        for (order, copies), resident in zip(SCHEDULES, (1, 2, 5), strict=True):
            launcher = EmulatorLauncher(order, copies=copies, resident_blocks=resident, limits=limits, seed=seed)
            gradients = layer.backward(launcher)
            bits.add(gradients.bits())
    layer.check(gradients)
    assert len(bits) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n_out, n_in", [(64, 40), (130, 70)])
def test_small_integers_are_exact(precision, n_out, n_in):
    layer = Layer(900, n_out, n_in, precision, "identity", "integers")
    dW, db, da_prev = layer.backward(EmulatorLauncher("random", copies="random"), before=3.0)
    da, h_prev, W = (x.astype(np.int64) for x in (layer.operands.da, layer.operands.h_prev, layer.operands.W))
    np.testing.assert_array_equal(dW, da.T @ h_prev + 3)
    np.testing.assert_array_equal(db, da.sum(axis=0) + 3)
    np.testing.assert_array_equal(da_prev, (da @ W).astype(da_prev.dtype))


# ---- Corners of the layers' kernels


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 130, 1), (2, 1, 130), (65, 17, 3), (3, 129, 131)], ids=str)
def test_the_smallest_shapes(shape, precision):
    layer = Layer(*shape, precision, "relu")
    for layout in ("padded", "odd"):
        launcher = EmulatorLauncher("lifo", copies="random", checked=True)
        layer.check(layer.backward(launcher, layout=layout))
        layer.check_forward(layer.forward(launcher, layout=layout))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n_in", [40, 200])
@pytest.mark.parametrize("need_da_prev", [True, False])
def test_gradients_are_added_to(precision, n_in, need_da_prev):
    layer = Layer(300, 40, n_in, precision, "gelu")
    launcher = EmulatorLauncher("random", copies="random", checked=True)
    layer.check(layer.backward(launcher, need_da_prev=need_da_prev, before=0.5), before=0.5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("items, n_out, n_in", [(None, 70, 37), (12, 70, 137), (None, 140, 1)])
def test_da_of_the_layer_below_by_itself(precision, items, n_out, n_in, plan_for):
    plan_for(items)
    layer = Layer(301, n_out, n_in, precision, "gelu")
    bits = set()
    for (order, copies), layout in zip(SCHEDULES, ("padded", "odd", "tight"), strict=True):
        ops = CudaOps(GuardedNumpy(), EmulatorLauncher(order, copies=copies, checked=True))
        da, W, a_prev = (laid_out(x, layout) for x in (layer.operands.da, layer.operands.W, layer.operands.a_prev))
        da_prev = laid_out(np.full_like(a_prev, np.nan), layout)
        workspace = ops.workspace(301, (n_in, n_out), PRECISIONS[precision])
        ops.bind_delta(da, W, da_prev, ACTIVATIONS["gelu"], a_prev, 1.0, workspace)()
        bits.add(da_prev.tobytes())
    assert len(bits) == 1
    layer.check(layer.backward(EmulatorLauncher())._replace(da_prev=da_prev))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(256, 1267, 1638), (2048, 1983, 977), (8192, 83, 531), (300, 40, 24)], ids=str)
@pytest.mark.parametrize("need_da_prev", [True, False])
def test_a_workspace_has_room_for_every_plan(shape, precision, need_da_prev):
    """A plan without da_prev has fewer items, so perhaps smaller tiles, and more of them to count."""
    batch_size, n_out, n_in = shape
    ops = CudaOps(np, EmulatorLauncher())
    workspace = ops.workspace(batch_size, (n_in, n_out), PRECISIONS[precision])
    plan = layer_plans.layer_plan(*shape, PRECISIONS[precision], ops.launcher.limits, need_da_prev=need_da_prev)
    assert workspace.partials.size >= plan.partials
    assert workspace.counters.size >= plan.counters


@pytest.mark.parametrize("precision", ["float64", "float32", "tf32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_slopes_far_out(name, precision):
    """One input, one output, weight 1: out = g(x), da_prev = g'; against the table in wider arithmetic."""
    activation, precision = ACTIVATIONS[name], PRECISIONS[precision]
    wide = np.longdouble if precision.name == "float64" else np.float64
    x = np.concatenate(
        [np.linspace(-30, 30, 301), [0.0, -0.0, 2.0**10, -(2.0**10), 2.0**100, -(2.0**100), np.inf, -np.inf, np.nan]]
    )
    if precision.tf32:
        x = np.round(x * 16) / 16  # what TF32 holds
    a = x.astype(precision.operand)[:, None]
    expected = a.astype(wide)
    with np.errstate(all="ignore"):
        activation.forward(a.astype(wide), expected, Scratch(expected))
        slope = np.ones_like(expected)
        source = a if activation.derivative_from == "a" else expected.astype(a.dtype)
        activation.backward(slope, source.astype(wide), Scratch(expected))

    ops = CudaOps(GuardedNumpy(), EmulatorLauncher(checked=True))
    one, zero = np.ones((1, 1), a.dtype), np.zeros(1, precision.accumulator)
    out, da, da_prev = np.empty_like(a), np.ones_like(a), np.empty_like(a)
    workspace = ops.workspace(len(a), (1, 1), precision)
    ops.bind_forward(one, zero, out, np.empty_like(a), activation, workspace)(a)
    ops.bind_layer_backward(da, 1, activation, precision)(da, a, one, source, one.copy(), zero.copy(), da_prev, False)
    u = 2.0**-53 if precision.name == "float64" else 2.0**-24
    with np.errstate(over="ignore"):  # exponentials
        expected, slope = (each.astype(a.dtype).astype(wide) for each in (expected, slope))
    np.testing.assert_allclose(out.astype(wide), expected, rtol=16 * u, atol=16 * u)
    np.testing.assert_allclose(da_prev.astype(wide), slope, rtol=16 * u, atol=100 * u)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_sines_of_numbers_of_any_size(precision):
    """π reaches deep into a large number's digits. Kernels reduce by all of it that sin and cos take."""
    activation, precision = ACTIVATIONS["sine"], PRECISIONS[precision]
    info, rng = np.finfo(precision.operand), np.random.default_rng(0)
    x = rng.uniform(1, 2, 1500) * 2.0 ** rng.integers(-20, info.maxexp, 1500) * rng.choice([-1, 1], 1500)
    near = np.pi / 2 * np.concatenate([np.arange(200), rng.integers(1, 10**9, 200)])
    ends = [99_999.9, 1e5, 100_000.1, info.max]
    a = np.concatenate([x, near, ends]).astype(precision.operand)[:, None]
    ops = CudaOps(GuardedNumpy(), EmulatorLauncher(checked=True))
    one, zero = np.ones((1, 1), a.dtype), np.zeros(1, precision.accumulator)
    out, da, da_prev = np.empty_like(a), np.ones_like(a), np.empty_like(a)
    ops.bind_forward(one, zero, out, np.empty_like(a), activation, ops.workspace(len(a), (1, 1), precision))(a)
    ops.bind_layer_backward(da, 1, activation, precision)(da, a, one, a, one.copy(), zero.copy(), da_prev, False)
    wide = a.astype(np.longdouble if precision.name == "float64" else np.float64)
    limit = 2.5 * (2.0**-53 if precision.name == "float64" else 2.0**-24)
    assert np.abs(out - np.sin(wide)).max() <= limit
    assert np.abs(da_prev - np.cos(wide)).max() <= limit


@pytest.mark.parametrize("number", [31, 63, 64, -1])
def test_a_number_without_a_function_makes_nan(number):
    """Were it the identity, a network could train with an activation that nobody asked for."""
    g, precision = replace(ACTIVATIONS["tanh"], kernel_id=number), PRECISIONS["float32"]
    x, one, zero = np.ones((5, 1), np.float32), np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    ops, out, da_prev = CudaOps(GuardedNumpy(), EmulatorLauncher(checked=True)), np.empty_like(x), np.empty_like(x)
    ops.bind_forward(one, zero, out, np.empty_like(x), g, ops.workspace(len(x), (1, 1), precision))(x)
    ops.bind_layer_backward(x, 1, g, precision)(x, x, one, x, one.copy(), zero.copy(), da_prev, False)
    assert np.isnan(out).all() and np.isnan(da_prev).all()


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["mixed", "positive"])
@pytest.mark.parametrize("n_out, n_in", [(40, 24), (140, 24)], ids=["narrow", "wide"])
def test_tensor_cores_that_cut_off(precision, kind, n_out, n_in):
    """Hardware truncates. Splits of the batch keep the error within the contract."""
    layer = Layer(4096, n_out, n_in, precision, "identity", kind)
    layer.check(layer.backward(EmulatorLauncher(truncate=True)))


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("n_out, n_in", [(40, 24), (140, 24)], ids=["narrow", "wide"])
def test_tensor_cores_that_cut_off_in_one_long_split(precision, n_out, n_in, plan_for):
    plan_for(1)
    layer = Layer(4096, n_out, n_in, precision, "identity", "mixed")
    layer.check(layer.backward(EmulatorLauncher(checked=True, truncate=True)))


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["mixed", "positive"])
def test_tensor_cores_that_cut_off_over_many_inputs_and_outputs(precision, kind):
    layer = Layer(20, 3000, 10, precision, "identity", kind)
    layer.check(layer.backward(EmulatorLauncher(truncate=True)))
    layer = replace(layer, n_out=10, n_in=3000)
    layer.check_forward(layer.forward(EmulatorLauncher(truncate=True)))


# ---- Losses


def loss_rows(a: Any, y: Any, precision: str = "float32", loss: str = "cross_entropy", **choices: Any) -> tuple:
    """(mean loss, da) of one launch; da is not divided by anything."""
    xp, n = GuardedNumpy(), a.shape[1]
    launcher = EmulatorLauncher(**({"checked": True} | choices))
    ops = CudaOps(xp, launcher)
    workspace = ops.workspace(len(a), (4, n), PRECISIONS[precision])
    held, targets = laid_out(a.astype(PRECISIONS[precision].accumulator), "tight"), xp.empty(y.shape, y.dtype)
    targets[...] = y
    da = workspace.output_delta(held)
    bound = ops.bind_loss(LOSSES[loss], LOSSES[loss].default_output, held, da, 1.0, workspace)
    return bound(targets, None), da


@pytest.mark.parametrize("wrong", [-1, 7, 2**31, -(2**62), 2**62])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_label_out_of_range_makes_its_row_nan_and_reads_nothing(wrong, precision):
    a = np.random.default_rng(0).standard_normal((41, 7))
    y = np.random.default_rng(1).integers(7, size=41)
    _, right = loss_rows(a, y, precision)
    y[17] = wrong
    loss, da = loss_rows(a, y, precision, order="random")
    assert np.isnan(loss)
    assert np.isnan(da[17].astype(np.float64)).all()
    np.testing.assert_array_equal(np.delete(da, 17, axis=0), np.delete(right, 17, axis=0))


def output_delta(launcher: Any, precision: str, output: str) -> Any:
    """da of one launch, from ∂loss/∂ŷ."""
    rng, (rows, n), chosen = np.random.default_rng(2), (41, 35), PRECISIONS[precision]
    ops = CudaOps(GuardedNumpy(), launcher)
    numbers = rng.standard_normal((rows, n)), rng.random((rows, n)), rng.random(rows)
    dy, source, weight = (ops.asarray(array, chosen.accumulator, "") for array in numbers)
    workspace = ops.workspace(rows, (4, n), chosen)
    da = workspace.output_delta(source)
    ops.bind_output_delta(output, None if output == "identity" else source, da, 2.0, workspace)(dy, weight)
    return da


@pytest.mark.parametrize("output", ["softmax", "tanh", "gelu", "identity"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_da_of_a_given_gradient_of_the_output_in_every_schedule(precision, output):
    found = set()
    for order, resident in (("fifo", 1), ("lifo", 3), ("random", 5)):
        launcher = EmulatorLauncher(order, resident_blocks=resident, checked=True)
        found.add(output_delta(launcher, precision, output).tobytes())
    assert len(found) == 1


def gradient_scale(launcher: Any, precision: str) -> tuple[Any, Any]:
    """The scale that a gradient gets, once for each row, and sums that others without it are added to."""
    rng, (rows, n), chosen = np.random.default_rng(4), (700, 5), PRECISIONS[precision]
    ops = CudaOps(GuardedNumpy(), launcher)
    numbers = 1e-6 * rng.standard_normal((rows, n)), rng.standard_normal(1500), rng.standard_normal(1500)
    dy, values, sums = (ops.asarray(array, chosen.accumulator, "") for array in numbers)
    scale = ops.bind_gradient_scale(rows, n, chosen)
    weights = scale.fit(dy)
    expected = sums + values / weights[0]
    scale.unscale(values, sums, True)
    np.testing.assert_array_equal(sums, expected)
    return weights, sums


@pytest.mark.parametrize("precision", ["float16", "float64"])
def test_a_gradients_scale_in_every_schedule(precision):
    found = set()
    for order, resident in (("fifo", 1), ("lifo", 3), ("random", 5)):
        launcher = EmulatorLauncher(order, resident_blocks=resident, checked=True)
        found.add(tuple(array.tobytes() for array in gradient_scale(launcher, precision)))
    assert len(found) == 1


@pytest.mark.parametrize("batch_size, n", [(1, 1), (7, 33), (9000, 3)])
def test_the_mean_loss_has_the_same_bits_in_every_schedule(batch_size, n):
    rng = np.random.default_rng(0)
    a, y = rng.standard_normal((batch_size, n)), rng.integers(n, size=batch_size)
    results = [
        loss_rows(a, y, order=order, resident_blocks=resident, checked=batch_size < 100)
        for order, resident in (("fifo", 1), ("lifo", 3), ("random", 5))
    ]
    assert len({(loss.tobytes(), da.tobytes()) for loss, da in results}) == 1
    z = a.astype(np.float32).astype(np.float64)
    exact = np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(batch_size), y])
    assert abs(results[0][0] - exact) <= 20 * 2.0**-24 * np.abs(z).sum(axis=1).max()


# ---- A network, all of whose launches are checked


def train(
    launcher: EmulatorLauncher, precision: str, optimizer: Any, sizes: Sequence[int] = (9, 70, 11, 3)
) -> tuple[MLP, list[float], Any]:
    """A network after a few steps, its losses, and its outputs."""
    ops = CudaOps(GuardedNumpy(), launcher, name="checked", fuse_networks=False)
    with pytest.MonkeyPatch.context() as patch:
        status = BackendStatus(True, "emulated")
        patch.setitem(gpuback._backends.registry.BACKENDS, "checked", Backend(lambda reproducible: ops, lambda: status))
        net = network(precision, sizes, "checked")
        step = TrainStep(net, optimizer, clip_norm=1.0)
        x, y = random_batch(net, 37)
        losses = [float(step(x, y)) for _ in range(3)]
        losses.append(float(TrainStep(net, optimizer, micro_batch_size=16)(x, y)))
        loss, gradients = net.value_and_grad(x, y, need_input_grad=True)
        scale = ops.bind_loss_scale(4.0, 1, net.n_parameters, net.theta.dtype)
        assert float(scale.unscale(gradients.theta, loss)) == float(loss) / 4
        assert (scale.scale_weights(None, len(x)) == 4).all()
        scale.update(optimizer._update)
        each = net.per_sample_grad(x, y)
        np.testing.assert_allclose(net.gradient_norms(x, y), np.linalg.norm(each.theta, axis=1), rtol=1e-5)
        net.value_and_clipped_grad(x, y, 0.5)
        ops.norm(net.theta)
        return net, losses, net.forward(x)


def network(precision: str, sizes: Sequence[int], backend: str) -> MLP:
    dtype = precision.replace("tf32", "float32")
    options = {"dtype": dtype, "allow_tf32": precision == "tf32", "backend": backend}
    return MLP(sizes, activation=["gelu", "tanh"][: len(sizes) - 2], seed=0, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "make, sizes",
    [(lambda: SGD(0.1, 0.9, True, 0.01), (9, 70, 11, 3)), (lambda: Adam(0.01), (150, 135, 4))],
    ids=["SGD", "Adam"],
)
def test_training_a_network(precision, make, sizes, quick):
    launchers = [
        EmulatorLauncher(order, copies=copies, resident_blocks=resident, checked=True)
        for (order, copies), resident in list(zip(SCHEDULES, (1, 3, 2), strict=True))[2 * quick :]
    ]
    runs = [train(launcher, precision, make(), sizes) for launcher in launchers]
    assert len({(net.theta.tobytes(), *losses, out.tobytes()) for net, losses, out in runs}) == 1

    twin = network(precision, sizes, "numpy")
    x, y = random_batch(twin, 37)
    step = TrainStep(twin, make(), clip_norm=1.0)
    digits = {"float64": 1e-12, "float32": 1e-5, "tf32": 3e-3, "bfloat16": 3e-2, "float16": 3e-3}[precision]
    _, losses, out = runs[0]
    steps = [step, step, step, TrainStep(twin, step.optimizer, micro_batch_size=16)]
    np.testing.assert_allclose(losses, [float(step(x, y)) for step in steps], rtol=digits)
    np.testing.assert_allclose(out, twin.forward(x), rtol=10 * digits, atol=digits)
