"""reproducible=True on CUDA, in the emulator: every kernel checked, and every number to the bit as NumPy has it."""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulator import EmulatorLauncher, GuardedNumpy
from emulator.build import KERNELS
from support.exact_reference import NumpyExactBackend
from support.kernel_layers import EXACT_SOURCES, laid_out
from support.planted import planted
from support.requirements import require_emulator, require_nvrtc

import gpuback._backends.registry
from gpuback import MLP, SGD, Adam, AdamW, TrainStep
from gpuback._backends.cuda import row_plans
from gpuback._backends.cuda.arguments import ints, matrices, output_id
from gpuback._backends.cuda.ops import CudaOps
from gpuback._backends.exact import numpy_products
from gpuback._backends.exact import products as exact_products
from gpuback._backends.exact.cuda_ops import CudaExactBackend, ReproducibleCudaOps
from gpuback._backends.exact.losses import RULES, softmax
from gpuback._backends.exact.numpy_ops import ReproducibleNumpyOps
from gpuback._backends.exact.products import Scales, Sums
from gpuback._backends.registry import Backend, BackendStatus
from gpuback._core import elementary
from gpuback._core.activations import ACTIVATIONS, Activation
from gpuback._core.elementary_activations import FORWARD
from gpuback._core.losses import LOSSES, CrossEntropy
from gpuback._core.precision import Precision
from gpuback._cuda import compiler
from gpuback._cuda import cublas as blas
from gpuback._cuda.coefficients import COEFFICIENTS
from gpuback._cuda.launch import DeviceLimits
from gpuback._cuda.sources import flatten
from gpuback._gates.variants import every_kernel
from gpuback.errors import BackendError
from gpuback.testing import random_batch

require_emulator()

DTYPES = ("float32", "bfloat16", "float16")
PAIRS = [(loss.name, output) for loss in LOSSES.values() for output in loss.outputs]
WEIGHTED = "weighted_cross_entropy"
"""Stands for cross_entropy with options."""
SHAPES = [(1, 1), (3, 17), (17, 3), (33, 100), (100, 33), (9, 300)]
KINDS = ("mixed", "zeros", "wide", "subnormal", "special")
SCHEDULES = [("fifo", 1), ("lifo", 3), ("random", 2)]
NO_TENSOR_CORES = DeviceLimits((7, 5), 65536, 40)
"""Limits of a T4."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def numbers(shape: tuple[int, int], kind: str, dtype: str) -> Any:
    """Numbers of a dtype, in float32."""
    rng = np.random.default_rng([*shape, KINDS.index(kind)])
    x = rng.standard_normal(shape)
    if kind == "zeros":
        x[rng.random(shape[0]) < 0.4] = 0.0
        x[:, rng.random(shape[1]) < 0.4] = -0.0
    if kind == "wide":
        low, high = (-20, 14) if dtype == "float16" else (-148, 126)
        x *= 2.0 ** rng.integers(low, high, shape)
    if kind == "subnormal":
        x = np.rint(100 * x) * (2.0**-24 if dtype == "float16" else 2.0**-149)
    if kind == "special":
        x[rng.random(shape) < 0.05] = np.nan
        x[rng.random(shape) < 0.05] = np.inf
        x[rng.random(shape) < 0.05] = -np.inf
    return x.astype(np.float32).astype(Precision.of(dtype).operand).astype(np.float32)


def bits(array: Any) -> bytes:
    """Of 16-bit numbers those of the float32 that NumPy keeps them in."""
    array = np.asarray(array)
    return array.astype(np.float32 if array.itemsize == 2 else array.dtype).tobytes()


def empty(shape: Any, dtype: Any) -> Any:
    return GuardedNumpy().empty(shape, dtype)


def copied(array: Any) -> Any:
    result = empty(array.shape, array.dtype)
    result[...] = array
    return result


class ExactBackends:
    """NumPy's, and CUDA's as the checking emulator runs it."""

    def __init__(self, dtype: str, **choices: Any) -> None:
        self.precision = Precision.of(dtype, reproducible=True)
        self.numpy = NumpyExactBackend(512, self.precision, np.dot)
        ops = CudaOps(GuardedNumpy(), EmulatorLauncher(**({"checked": True} | choices)))
        self.cuda = CudaExactBackend(ops, self.precision, np.dot)

    def operand(self, x: Any, layout: str = "padded") -> Any:
        return laid_out(x.astype(self.precision.operand), layout)


# ---- ExactBackends


def check_split(dtype: str, shape: tuple[int, int], kind: str, direction: str, layout: str, **choices: Any) -> None:
    both, x = ExactBackends(dtype, **choices), numbers(shape, kind, dtype)
    length = shape[direction == "columns"]
    largest, found = np.empty(length, np.float32), empty(length, np.float32)
    operand = both.operand(x, layout)
    getattr(both.numpy, f"largest_of_{direction}")(x, largest)
    getattr(both.cuda, f"largest_of_{direction}")(operand, found)
    finite = np.isfinite(largest)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    np.testing.assert_array_equal(found[finite], largest[finite])

    terms = 12
    expected = np.empty((2, *shape))
    slices = empty((shape[0], 2 * shape[1] + 3), np.float64)
    parts = slices[:, : shape[1]], slices[:, shape[1] + 3 :]
    getattr(both.numpy, f"split_{direction}")(x, largest, terms, *expected)
    getattr(both.cuda, f"split_{direction}")(operand, found, terms, *parts)
    np.testing.assert_array_equal(np.stack(parts), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["rows", "columns"])
def test_slices(direction, kind, dtype):
    for index, shape in enumerate(SHAPES):
        check_split(dtype, shape, kind, direction, ("padded", "odd", "tight")[index % 3])


@pytest.mark.parametrize("order, resident", SCHEDULES)
def test_slices_in_every_schedule(order, resident, monkeypatch):
    monkeypatch.setattr(row_plans, "ROWS_OF_A_BLOCK", 8)  # several blocks look for the largest of the same columns
    for direction in ("rows", "columns"):
        check_split("float32", (100, 70), "mixed", direction, "padded", order=order, resident_blocks=resident)


def test_sums_of_blocks_are_added():
    rng = np.random.default_rng(0)
    both, shape = ExactBackends("float32"), (9, 37)
    blocks = rng.integers(-(2**52), 2**52, (3, 2, *shape)).astype(np.float64)
    totals = Sums(*(empty(shape, np.int64) for _ in range(2)))
    for index, block in enumerate(blocks):
        both.cuda.add(Sums(*(copied(part) for part in block)), totals, first=index == 0)
    np.testing.assert_array_equal(np.stack(totals), blocks.astype(np.int64).sum(axis=0))
    total = copied(blocks[0, 0])
    both.cuda.accumulate(copied(blocks[1, 0] / 2), total)
    np.testing.assert_array_equal(total, blocks[0, 0] + blocks[1, 0] / 2)


SLICE_BITS = 20


def product(shape: tuple[int, int], whole: bool, extremes: bool) -> tuple[Sums, Scales]:
    """P and Q of numbers about 1; with `extremes` also of ones that underflow, overflow, or are none."""
    rng = np.random.default_rng([*shape, whole, extremes])
    highest = 2**60 if whole else 2**40
    dtype = np.int64 if whole else np.float64
    sums = Sums(*(rng.integers(-highest, highest, shape).astype(dtype) for _ in range(2)))
    factor = 2.0 ** (-9 if whole else 0)
    scales = [rng.uniform(0.6, 1.9, length).astype(np.float32) * np.float32(factor) for length in shape]
    if extremes:
        values = np.float32([0.0, 1e-45, 3e-39, 1e-20, 1e20, 3.4e38, np.inf, np.nan])
        for scale in scales:
            where = rng.random(len(scale)) < 0.5
            scale[where] = rng.choice(values, int(where.sum()))
        for part in sums:
            part[rng.random(shape) < 0.1] = 0
            part[rng.random(shape) < 0.1] = -1
    return sums, Scales(*scales, SLICE_BITS)


def on_device(sums: Sums, scales: Scales) -> tuple[Sums, Scales]:
    return Sums(*map(copied, sums)), Scales(copied(scales.rows), copied(scales.columns), scales.bits)


def products(dtype: str) -> Iterator[tuple[Sums, Scales, str]]:
    for index, shape in enumerate(SHAPES):
        layout = ("padded", "odd", "tight")[index % 3]
        yield *product(shape, whole=False, extremes=False), layout
        yield *product(shape, whole=index % 2 == 0, extremes=True), layout


def check_forward(dtype: str, g: Activation | None, **choices: Any) -> None:
    both = ExactBackends(dtype, **choices)
    for sums, scales, layout in products(dtype):
        shape = sums.p.shape
        b = np.random.default_rng(0).standard_normal(shape[1]).astype(np.float32)
        keeps = g is not None and (g.derivative_from == "a" or shape[0] % 2 == 1)
        h, a = np.empty(shape, np.float32), np.empty(shape, np.float32) if keeps else None
        both.numpy.finish_forward(sums, scales, b, a, h, g)
        out = both.operand(np.zeros(shape), layout) if g else empty(shape, np.float32)
        kept = both.operand(np.zeros(shape), layout) if keeps else None
        both.cuda.finish_forward(*on_device(sums, scales), copied(b), kept, out, g)
        assert bits(out) == bits(h)
        if keeps:  # NumPy keeps what g' does not read in float32
            assert bits(kept) == bits(a.astype(both.precision.operand))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*FORWARD, None])
def test_pre_activations_and_activations(name, dtype):
    check_forward(dtype, None if name is None else ACTIVATIONS[name])


def check_delta(dtype: str, g: Activation | None, **choices: Any) -> None:
    both = ExactBackends(dtype, **choices)
    for sums, scales, layout in products(dtype):
        shape, factor = sums.p.shape, 1.0 if g else 2.0**-7
        source = numbers(shape, "special", dtype)
        da_prev = np.empty(shape, np.float32)
        both.numpy.finish_delta(sums, scales, source, g, factor, da_prev)
        out = both.operand(np.zeros(shape), layout) if g else empty(shape, np.float32)
        both.cuda.finish_delta(*on_device(sums, scales), both.operand(source, layout), g, factor, out)
        assert bits(out) == bits(da_prev)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*FORWARD, None])
def test_deltas(name, dtype):
    check_delta(dtype, None if name is None else ACTIVATIONS[name])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.0**-7])
def test_gradients(factor, accumulate):
    both = ExactBackends("float32")
    for sums, scales, layout in products("float32"):
        before = numbers(sums.p.shape, "special", "float32")
        expected, out = before.copy(), laid_out(before, layout)
        both.numpy.finish_gradient(sums, scales, factor, expected, accumulate)
        both.cuda.finish_gradient(*on_device(sums, scales), factor, out, accumulate)
        assert bits(out) == bits(expected)


# ---- The output layer


def check_losses(loss: str, output: str, dtype: str, kind: str, *, probabilities: bool = False, **choices: Any) -> None:
    """Rows' losses in float64, before their sum can hide anything, da, and ŷ."""
    precision = Precision.of(dtype, reproducible=True)
    launcher = EmulatorLauncher(**({"checked": True} | choices))
    weighted, loss = loss == WEIGHTED, "cross_entropy" if loss == WEIGHTED else loss
    for rows, width in [(1, 1), (5, 3), (11, 33), (23, 200)]:
        row = CrossEntropy(label_smoothing=0.125, class_weight=[0.5, *range(width - 1)]) if weighted else LOSSES[loss]
        parameters = row.parameters(width)
        rng = np.random.default_rng([rows, width])
        a = laid_out(numbers((rows, width), kind, "float32") * np.float32(4.0 if kind == "mixed" else 1.0), "tight")
        labels = rng.integers(width, size=rows) if loss == "cross_entropy" and not probabilities else None
        targets = rng.random((rows, width)).astype(np.float32) if labels is None else None
        if targets is not None:
            targets[0] = 0
        if loss in ("absolute_error", "huber", "quantile"):  # a residual of 0
            targets[:, 0] = elementary.apply(FORWARD[output], a)[:, 0]
        weight = copied(rng.random(rows).astype(np.float32)) if width != 3 else None
        da, losses = laid_out(np.zeros((rows, width), precision.operand), "padded"), empty(rows, np.float64)
        launcher.bind(
            row_plans.exact_row_plan("exact_loss_rows", rows, precision),
            **matrices(a_bj=a, da_bj=da),
            labels_b=None if labels is None else copied(labels),
            targets_bj=None if targets is None else copied(targets),
            weight_b=weight,
            losses_b=losses,
            **ints(n_batch=rows, n=width, loss=row.kernel_id, output=output_id(output)),
            parameters=parameters,
            divisor=np.float64(rows / 8),
        )()
        y = targets if labels is None else labels
        expected, delta = RULES[loss, output](a.astype(np.float64), y, parameters)
        if weight is not None:
            expected, delta = expected * weight, delta * weight[:, None]
        np.testing.assert_array_equal(losses, expected)
        stored = np.empty((rows, width), np.float32)
        elementary.store(delta / (rows / 8), stored)
        assert bits(da) == bits(stored.astype(precision.operand))

        y_hat, found = np.empty((rows, width), np.float32), empty((rows, width), np.float32)
        plan = row_plans.exact_row_plan("exact_output_rows", rows, precision)
        sizes = ints(n_batch=rows, n=width, output=output_id(output))
        launcher.bind(plan, **matrices(a_bj=a, out_bj=found), **sizes)()
        if output == "softmax":
            elementary.store(softmax(a.astype(np.float64))[1], y_hat)
        else:
            y_hat = elementary.apply(FORWARD[output], a)
        assert bits(found) == bits(y_hat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mixed", "zeros", "wide", "special"])
@pytest.mark.parametrize("loss, output", [*PAIRS, (WEIGHTED, "softmax")])
def test_losses(loss, output, kind, dtype):
    check_losses(loss, output, dtype, kind)
    if loss in ("cross_entropy", WEIGHTED):
        check_losses(loss, output, dtype, kind, probabilities=True)


@pytest.mark.parametrize("wrong", [-1, 7, 2**31, -(2**62), 2**62])
def test_a_label_out_of_range_makes_its_row_nan_and_reads_nothing(wrong):
    rows, width, precision = 11, 7, Precision.of("bfloat16", reproducible=True)
    ops = ReproducibleCudaOps(GuardedNumpy(), EmulatorLauncher(checked=True), np.dot)
    workspace = ops.workspace(rows, (4, width), precision)
    a, y = workspace.output(width), copied(np.arange(rows) % width)
    a[...] = numbers((rows, width), "mixed", "float32")
    da = workspace.output_delta(a)
    run = ops.bind_loss(LOSSES["cross_entropy"], "softmax", a, da, 1.0, workspace)
    run(y, None)
    right = np.delete(da, 4, axis=0).copy()
    y[4] = wrong
    loss = run(y, None)
    assert bits(loss) == bits(np.float32(np.nan)) and bits(da[4]) == bits(np.full(width, np.float32(np.nan)))
    np.testing.assert_array_equal(np.delete(da, 4, axis=0), right)


# ---- Networks


def twins(launcher: EmulatorLauncher, sizes=(5, 40, 7, 3), **options: Any) -> list[MLP]:
    """The same network on NumPy and in the emulator."""
    ops = {
        "numpy": ReproducibleNumpyOps(),
        "twin": ReproducibleCudaOps(GuardedNumpy(), launcher, np.dot, name="twin"),
    }
    nets = []
    for name, each in ops.items():
        with pytest.MonkeyPatch.context() as patch:
            backend = Backend(lambda _, each=each: each, lambda: BackendStatus(True, ""))
            patch.setitem(gpuback._backends.registry.BACKENDS, name, backend)
            nets.append(MLP(sizes, backend=name, reproducible=True, seed=0, **options))
    return nets


def results(net: MLP, x: Any, y: Any, weight: Any = None) -> dict[str, bytes]:
    found = {"y_hat": net.forward(x), "loss": net.loss(x, y, sample_weight=weight)}
    loss, gradients = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
    found |= {"loss again": loss, "dx": gradients.inputs, "gradient": gradients.theta.copy()}
    net.value_and_grad(x, y, out=gradients, accumulate=True)
    found["accumulated"] = gradients.theta
    return {name: bits(array) for name, array in found.items()}


CASES = [
    (activation, *PAIRS[(i + 2 * j) % len(PAIRS)], dtype)
    for (i, activation), (j, dtype) in itertools.product(enumerate(FORWARD), enumerate(DTYPES))
]


@pytest.mark.parametrize("activation, loss, output, dtype", CASES)
def test_networks(activation, loss, output, dtype):
    launcher = EmulatorLauncher("random", resident_blocks=3)
    numpy_net, net = twins(launcher, activation=(activation, "tanh"), loss=loss, output=output, dtype=dtype)
    x, y = random_batch(net, 37)
    weight = np.random.default_rng(0).random(37)
    assert results(net, x, y) == results(numpy_net, x, y)
    assert results(net, x, y, weight) == results(numpy_net, x, y, weight)
    x[3, 1], x[5, 2], x[6] = np.nan, -np.inf, 1e30
    assert results(net, x, y, weight) == results(numpy_net, x, y, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_traces(dtype):
    numpy_net, net = twins(EmulatorLauncher(), activation=("gelu", "sigmoid"), dtype=dtype)
    x, y = random_batch(net, 19)
    found, expected = (each.trace(x, y) for each in (net, numpy_net))
    for name in ("h", "dh", "da", "dW", "db"):
        for mine, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert mine is theirs is None or bits(mine) == bits(theirs), name
    assert bits(found.output) == bits(expected.output) and found.loss == expected.loss
    for mine, theirs in zip(found.a[1:], expected.a[1:], strict=True):  # what g' does not read may be shown rounded
        operand = net.architecture.precision.operand
        assert bits(mine.astype(operand)) == bits(theirs.astype(operand))


@pytest.mark.parametrize("at_once, block", [(7, 16), (64, 5), (1, 8192)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_several_blocks(at_once, block, dtype, monkeypatch):
    monkeypatch.setattr(CudaExactBackend, "rows_at_once", lambda self, widest: at_once)
    monkeypatch.setattr(numpy_products, "rows_at_once", lambda widest: at_once)
    monkeypatch.setattr(exact_products, "BLOCK", block)
    numpy_net, net = twins(EmulatorLauncher(checked=True), (9, 21, 4), dtype=dtype, activation="silu")
    x, y = random_batch(net, 23)
    assert results(net, x, y) == results(numpy_net, x, y)


OPTIMIZERS = {
    "sgd": lambda: SGD(0.1),
    "nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda: Adam(0.01),
    "adamw": lambda: AdamW(0.01, weight_decay=0.1),
    "frozen parts": lambda: Adam(0.01, trainable=[False, (False, True), True], multipliers=[1, 0.1, (1, 2)]),
    "weights decay": lambda: SGD(0.1, momentum=0.9, weight_decay=0.1, decay_biases=False),
}


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training(optimizer, clip_norm):
    dtype = DTYPES[len(optimizer) % 3]
    nets = twins(EmulatorLauncher("random"), activation=("silu", "elu"), dtype=dtype)
    losses = []
    for net in nets:
        step = TrainStep(net, OPTIMIZERS[optimizer](), clip_norm=clip_norm)
        losses.append([bits(step(*random_batch(net, 29, seed))) for seed in range(5)])
    assert losses[0] == losses[1]
    assert bits(nets[0].theta) == bits(nets[1].theta)
    assert nets[0].ops.norm(nets[0].theta) == nets[1].ops.norm(nets[1].theta)


def test_every_kernel_runs_in_every_schedule_and_none_is_left_out(monkeypatch):
    """Checked, with arrays that end at memory nobody may touch; also those of test_update_bits.py."""
    exact = {kernel.variant for kernel in every_kernel() if kernel.variant.source in EXACT_SOURCES}
    monkeypatch.setattr(exact_products, "BLOCK", 16)
    variants, found = set(), set()
    for order, resident in SCHEDULES:
        for dtype in DTYPES:
            launcher = EmulatorLauncher(order, resident_blocks=resident, checked=True)
            _, net = twins(launcher, (5, 20, 3), activation="gelu", dtype=dtype)
            x, y = random_batch(net, 21)
            step = TrainStep(net, Adam(), clip_norm=0.1)
            losses = [bits(step(x, y)) for _ in range(2)]
            y_hat = net.forward(x)
            da = net.ops.padded(21, 3, net.dtype)
            net.ops.bind_output_delta(
                "softmax", y_hat, da, 21.0, net.ops.workspace(21, net.sizes, net.architecture.precision)
            )(y_hat, None)
            found.add((dtype, *losses, bits(net.theta), bits(y_hat), bits(da), net.ops.norm(net.theta)))
            variants |= launcher.variants
    assert exact <= variants
    assert len(found) == len(DTYPES)


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_cores_are_not_needed(dtype):
    numpy_net, net = twins(EmulatorLauncher(limits=NO_TENSOR_CORES), dtype=dtype)
    x, y = random_batch(net, 9)
    assert results(net, x, y) == results(numpy_net, x, y)
    assert "cuBLAS" in str(net.explain(9))


# ---- Planted mistakes


def gelu(folder: Any) -> None:
    check_forward("bfloat16", ACTIVATIONS["gelu"], folder=folder)


def tanh(folder: Any) -> None:
    check_forward("bfloat16", ACTIVATIONS["tanh"], folder=folder)


def slices(folder: Any) -> None:
    for kind, direction in itertools.product(KINDS, ("rows", "columns")):
        check_split("float32", (33, 100), kind, direction, "padded", folder=folder)


def squared_errors(folder: Any) -> None:
    check_losses("squared_error", "tanh", "float32", "mixed", folder=folder)


def contracted(folder: Any) -> None:
    assert not contractible("exact/exact_losses.cu", folder)


PLANTED = {
    "+0 left out": (
        gelu,
        "common/canonical_nan.cuh",
        "__fadd_rn(__double2float_rn(x.value), 0.0f)",
        "__double2float_rn(x.value)",
    ),
    "+0 added too early": (
        gelu,
        "common/canonical_nan.cuh",
        "__double2float_rn(x.value), 0.0f",
        "__double2float_rn((x + 0.0).value), -0.0f",
    ),
    "g does not see the a of g'": (gelu, "exact/combine_products.cu", "pre = to_accum(rounded);  // g", ";  // g"),
    "g sees a rounded a": (tanh, "exact/combine_products.cu", "if (derivative_from_a(activation)) pre", "pre"),
    "P left out": (
        *(tanh, "exact/combine_products.cu", "* power_of_two(-bits) + number(p_rc, are_int64, index);"),
        "* power_of_two(-bits) + Double(0.0);",
    ),
    "signs among the magnitudes": (slices, "exact/split_operands.cu", "& 0x7fffffffu", ""),
    "subnormal scales": (slices, "exact/exact_products.cuh", "bits ? -117 - __clz((int)bits) : 0", "bits ? -126 : 0"),
    "a lower slice that is cut off": (slices, "exact/split_operands.cu", "= rint(((scaled", "= floor(((scaled"),
    "a sum over a row from its end": (
        *(
            squared_errors,
            "exact/exact_losses.cu",
            "  for (int j = threadIdx.x % 32; j < n; j += 32) sum = sum + term(j);",
        ),
        "  for (int j = n / 32 * 32 + threadIdx.x % 32; j >= 0; j -= 32)\n    if (j < n) sum = sum + term(j);",
    ),
    "lanes that are added as neighbours": (
        *(squared_errors, "exact/exact_losses.cu", "for (int step = 16; step > 0; step /= 2) sum = sum"),
        "for (int step = 1; step < 32; step *= 2) sum = sum",
    ),
    "a product and a sum for the compiler to contract": (
        *(contracted, "exact/exact_losses.cu", "mass * softmax(a[j]) - t"),
        "Double(mass.value * softmax(a[j]).value - t.value)",
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("check, source, before, after", PLANTED.values(), ids=PLANTED)
def test_bits_tell(check, source, before, after, tmp_path):
    if check is contracted:
        require_nvrtc()
    with pytest.raises(AssertionError):
        check(planted({source: [(before, after)]}, tmp_path))


def test_without_a_mistake_bits_tell_nothing():
    for check in (gelu, tanh, slices, squared_errors):
        check(KERNELS)


# ---- Contraction, which the emulator's compiler never does


def contractible(source: str, folder: Any = None, entry: str = "") -> list[str]:
    """Instructions in the PTX of a kernel, or of a file's kernels, that round more than one operation together, or that
    ptxas might join.
    """
    nvrtc, _ = compiler.load_nvrtc()
    program = nvrtc.createProgram(flatten(source, folder), source, (), ())
    options = [option for option in compiler.OPTIONS if not option.startswith("--ptxas")]
    defines = [f"-D{define}" for define in ("Element=bfloat16", "Accum=float", *COEFFICIENTS)]
    nvrtc.compileProgram(program, ("-arch=compute_90", *options, *defines))
    code = nvrtc.getPTX(program)
    nvrtc.destroyProgram(program)
    text = code.decode() if isinstance(code, bytes) else code
    if entry:
        text = next(part for part in text.split(".visible .entry ") if part.startswith(f"{entry}("))
    assert ".rn.f" in text
    return re.findall(r"\b(?:fma|mad|add|sub|mul)\.(?!rn\.)[\w.]*f(?:32|64)\b|\bfma\.[\w.]+|\b\w+\.approx[\w.]*", text)


@pytest.mark.parametrize("source", ["exact/split_operands.cu", "exact/combine_products.cu", "exact/exact_losses.cu"])
def test_no_compiler_may_contract_anything(source):
    require_nvrtc()
    assert not contractible(source)


@pytest.mark.parametrize(
    "entry",
    [
        "sgd",
        "adam",
        *(pytest.param(entry, marks=pytest.mark.thorough) for entry in ("sgd_in_ranges", "adam_in_ranges")),
    ],
)
def test_nor_in_an_optimizers_step(entry):
    require_nvrtc()
    assert not contractible("elementwise/optimizers.cu", entry=entry)


# ---- cuBLAS


class OnDevice:
    """What `multiply` looks at of a CuPy array."""

    def __init__(self, array: Any) -> None:
        self.shape, self.strides, self.itemsize = array.shape, array.strides, array.itemsize
        self.data = SimpleNamespace(ptr=array.__array_interface__["data"][0])


def by_columns(address: int, rows: int, columns: int, pitch: int) -> Any:
    """A matrix as cuBLAS reads memory."""
    assert pitch >= rows
    memory = (ctypes.c_double * (pitch * (columns - 1) + rows)).from_address(address)
    flat = np.ctypeslib.as_array(memory)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (8, 8 * pitch))


def fake_gemm(handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algo):
    assert (handle, a_type, b_type, c_type, compute, algo) == (17, 1, 1, 1, 71, -1)
    left = by_columns(a, k, m, lda).T if op_a else by_columns(a, m, k, lda)
    right = by_columns(b, n, k, ldb).T if op_b else by_columns(b, k, n, ldb)
    alpha, beta = (ctypes.c_double.from_address(x).value for x in (alpha, beta))
    assert beta == 0.0  # or NaN that lies there would count
    by_columns(c, m, n, ldc)[...] = alpha * (left @ right)


@pytest.fixture
def multiply(monkeypatch):
    names = {"CUBLAS_COMPUTE_64F_PEDANTIC": 71, "CUBLAS_GEMM_DEFAULT": -1, "CUBLAS_OP_N": 0, "CUBLAS_OP_T": 1}
    cuda = SimpleNamespace(
        cublas=SimpleNamespace(gemmEx=fake_gemm, **names),
        device=SimpleNamespace(get_cublas_handle=lambda: 17),
        runtime=SimpleNamespace(CUDA_R_64F=1),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    return blas.bind_multiply()


FORMS = {
    "tight": lambda x: x.copy(),
    "part of longer rows": lambda x: np.hstack([x + 1, x, x + 2])[:, x.shape[1] : 2 * x.shape[1]],
    "some rows": lambda x: np.vstack([x - 1, x, x + 1])[len(x) : 2 * len(x)],
    "transposed": lambda x: x.T.copy().T,
    "part, transposed": lambda x: np.hstack([x.T, x.T + 1])[:, : len(x)].T,
}


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (1, 5, 3), (4, 1, 3), (4, 5, 1), (1, 5, 1), (4, 5, 3)])
def test_cublas_is_told_how_matrices_lie(m, k, n, multiply):
    rng = np.random.default_rng(0)
    left, right = rng.integers(-9, 9, (m, k)).astype(float), rng.integers(-9, 9, (k, n)).astype(float)
    for form_left, form_right in itertools.product(FORMS.values(), repeat=2):
        a, b, out = form_left(left), form_right(right), np.full((m, n + 2), np.nan)
        multiply(OnDevice(a), OnDevice(b), OnDevice(out[:, :n]))
        np.testing.assert_array_equal(out[:, :n], left @ right)
        assert np.isnan(out[:, n:]).all()


@pytest.mark.parametrize("setting", ["", "0", "1"])
def test_cublas_may_not_emulate_float64(setting, multiply, monkeypatch):
    monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", setting)
    if setting != "1":
        blas.bind_multiply()
        return
    with pytest.raises(BackendError, match=r"CUBLAS_EMULATE_DOUBLE_PRECISION=1 .*Remedy: unset CUBLAS_EMULATE_DOUBLE"):
        blas.bind_multiply()


def test_without_cublas_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(BackendError, match=r"needs cuBLAS, which CuPy cannot load .* pip install"):
        blas.bind_multiply()
