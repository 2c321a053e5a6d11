"""The emulator itself: what it runs it runs right, and the mistakes that it is there for it finds."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import math
import re
import threading
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulationError, EmulatorLauncher, GuardedNumpy, StrictNumpy
from emulator.build import EMULATOR, KERNELS, CompileError, entry_points, kernel_library
from support.kernel_arguments import by_name
from support.requirements import require_emulator

from gpuback._cuda.launch import DeviceLimits, LaunchPlan, Slot, TensorMap, Variant
from gpuback._cuda.sources import flatten, parameter_names
from gpuback._gates.variants import every_kernel
from gpuback.errors import BackendError

require_emulator()

i32, u32, f32, f64 = np.int32, np.uint32, np.float32, np.float64
ORDERS = ("fifo", "lifo", "random")
SOURCES = {
    entry: path.name
    for path in EMULATOR.glob("selftest*.cu")
    for entry in re.findall(r"^KERNEL (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
}


def run(entry, *arguments, grid=1, block=32, shared_bytes=4096, **choices):
    """Launches a kernel of selftest*.cu and returns the launcher."""
    launcher = EmulatorLauncher(folder=EMULATOR, **choices)
    named = by_name(EMULATOR / SOURCES[entry], entry, arguments) if entry in SOURCES else {}
    launcher.bind(LaunchPlan(variant(entry), grid, block, shared_bytes), **named)()
    return launcher


def variant(entry):
    return Variant(SOURCES.get(entry, "selftest.cu"), entry)


@pytest.fixture(params=[False, True], ids=["plain", "checked"])
def checked(request):
    return request.param


# ---- Threads, warps, blocks


@pytest.mark.parametrize("order", ORDERS)
def test_warp_functions(order, checked):
    out = np.zeros((8, 32), i32)
    run("warp_functions", out, order=order, checked=checked)
    lane = np.arange(32)
    expected = [
        np.full(32, 5),
        lane // 8 * 8 + 1,
        lane ^ 3,
        np.where(lane % 16 + 4 < 16, lane + 4, lane),
        np.where(lane % 16 >= 4, lane - 4, lane),
        np.full(32, sum(1 << i for i in range(0, 32, 3))),
        np.full(32, 1),
        np.full(32, 1),
    ]
    np.testing.assert_array_equal(out, expected)


def test_partial_masks_and_lanes_that_returned(checked):
    out = np.full(32, -1.0)
    run("partial_masks", out, checked=checked)
    lane = np.arange(32)
    np.testing.assert_array_equal(out, np.where(lane % 2 == 0, (lane ^ 1) + 0.5 + 16, -1))


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_returned_are_not_waited_for(order, checked):
    total = np.zeros((), i32)
    run("early_exit", total, i32(70), grid=3, block=128, order=order, checked=checked)
    assert total == 3 * sum(range(70))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warps", [1, 2, 3])
def test_barriers_of_some_warps(order, warps, checked):
    """Each group of warps goes its own way, and what a warp passed on comes back to it after a round."""
    out = np.full(7 * 32, -1, i32)
    run("barriers_of_warps", out, i32(warps), grid=1, block=7 * 32, order=order, checked=checked)
    taking_part = 7 // warps * warps * 32
    came_back = np.arange(taking_part) + sum(range(warps))
    np.testing.assert_array_equal(out, np.append(came_back, np.full(7 * 32 - taking_part, -1)))


def test_atomics(checked):
    signed, unsigned = np.zeros(4, i32), np.array([0, 2**32 - 1, 1, 0, 0], u32)
    run("atomics", signed, unsigned, block=40, checked=checked)
    np.testing.assert_array_equal(signed, [80, -40, 39, -39])
    np.testing.assert_array_equal(unsigned, [2**32 - 1, 0, 7, 40, 0])


def arrivals(**choices):
    counter, thread_of = np.zeros(1, u32), np.full(256, -1, i32)
    run("order_of_arrival", counter, thread_of, grid=4, block=64, **choices)
    assert sorted(thread_of) == list(range(256))
    return thread_of.tolist()


def test_order_of_threads_and_blocks():
    assert arrivals(order="fifo") == list(range(256))
    assert arrivals(order="lifo", resident_blocks=1) == list(range(255, -1, -1))
    random = arrivals(order="random", seed=1)
    assert random == arrivals(order="random", seed=1)
    assert random != arrivals(order="random", seed=2)


def test_random_launches_differ_from_each_other():
    launcher = EmulatorLauncher("random", folder=EMULATOR)
    counter, thread_of = np.zeros(1, u32), np.zeros(64, i32)
    launch = launcher.bind(LaunchPlan(variant("order_of_arrival"), 1, 64), counter=counter, thread_of=thread_of)
    seen = set()
    for _ in range(3):
        counter[...] = 0
        launch()
        seen.add(tuple(thread_of))
    assert len(seen) == 3
    assert launcher.launches == ["order_of_arrival"] * 3


@pytest.mark.parametrize(
    "entry, block, arguments, message",
    [
        ("divergence", 32, ["out"], r"thread 16, selftest.cu:\d+: divergence: .* __shfl_sync while .* __syncwarp"),
        (
            "deadlock",
            96,
            ["out"],
            r"threads 0 to 63 wait at __syncthreads \(selftest.cu:\d+\).* 64 to 79 wait at __syncwarp \(",
        ),
        ("barrier_of_warps_waited_for_in_vain", 96, [], r"threads 0 to 63 wait at bar.sync \(selftest.cu:\d+\)"),
        ("barrier_of_warps", 64, [i32(0), i32(32)], r"thread 0, .*: bar.sync: barrier 0; a block has 1 to 15 besides"),
        ("barrier_of_warps", 64, [i32(16), i32(32)], r"bar.sync: barrier 16; a block has 1 to 15"),
        ("barrier_of_warps", 64, [i32(1), i32(33)], r"bar.sync: expects 33 threads; a block of 64 has whole warps"),
        ("barrier_of_warps", 64, [i32(1), i32(96)], r"bar.sync: expects 96 threads; a block of 64 has whole warps"),
        ("barrier_of_warps", 96, [i32(1), i32(64)], r"expects 96 threads at barrier 1, where others expect 64"),
        ("foreign_mask", 32, [], r"thread 1, selftest.cu:\d+: __syncwarp: the mask 0x00000001 leaves out"),
        ("shuffle_from_absent_lane", 32, ["out"], r"selftest.cu:\d+: shuffle: reads lane 20, which does not take part"),
        ("divides", 1, ["out", i32(0)], r"thread 0: integer division by zero"),
        ("deep_stack", 1, ["out", i32(1000)], r"thread 0: stack overflow"),
        (
            "product_of_part_of_a_warp",
            32,
            ["floats"],
            r"thread 7: this lane returns while others .* mma\.m16n8k16\.bf16",
        ),
        ("product_of_part_of_a_warp", 16, ["floats"], r"mma\.m16n8k16\.bf16: lanes of this warp .* do not exist"),
    ],
)
def test_a_launch_that_cannot_go_on_says_why(entry, block, arguments, message, checked):
    arrays = {"out": np.zeros(128, i32), "floats": np.zeros(128, f32)}
    arguments = [arrays[a] if isinstance(a, str) else a for a in arguments]
    with pytest.raises(EmulationError, match=message):
        run(entry, *arguments, block=block, checked=checked)
    run("divides", arrays["out"], i32(2), block=1, checked=checked)  # the next launch is not affected
    assert arrays["out"][0] == 3


# ---- Arguments


def test_scalars_and_slots(checked):
    launcher = EmulatorLauncher(folder=EMULATOR, checked=checked)
    out, other = np.zeros(1), np.zeros(1)
    plan = LaunchPlan(variant("scalars"), 1, 1)
    # Slots take values in the order in which they are given, whatever the order of the kernel's parameters.
    launch = launcher.bind(plan, e=Slot(np.int64), out=Slot(), a=i32(-1), b=u32(2**31), c=Slot(f32), d=f64(0.125))
    launch(2**40, out, 0.5)
    assert out[0] == -1 + 2**31 + 0.5 + 0.125 + 2**40
    launch(0, other, 1.5)
    assert other[0] == -1 + 2**31 + 1.5 + 0.125


def matrix(rows, pitch):
    """Of bfloat16, as its bits, at a multiple of 16."""
    return GuardedNumpy().zeros((rows, pitch), np.uint16)


def map_of(array, columns=20, **changes):
    return TensorMap(array, columns, 5, 24, (32, 8), "bfloat16", 64)._replace(**changes)


def test_tensor_maps_hold_a_matrix_and_a_box(checked):
    x, y, out = matrix(5, 24), matrix(5, 24), np.zeros(32, np.uint64)
    launcher = EmulatorLauncher(folder=EMULATOR, checked=checked)
    launch = launcher.bind(
        LaunchPlan(variant("map_words"), 1, 32),
        unrelated=Slot(i32), y=map_of(Slot(), 24, box=(64, 256), swizzle=128), x=map_of(x), out=Slot(),
    )  # fmt: skip
    x[0, 0] = 7
    launch(1, y, out)
    of_x = [x.ctypes.data, 20, 5, 48, 32 | 8 << 32, 2 | 64 << 32]
    of_y = [y.ctypes.data, 24, 5, 48, 64 | 256 << 32, 2 | 128 << 32]
    assert out.tolist() == [*of_x, *[0] * 10, *of_y, *[0] * 10]
    assert y[0, 0] == 7
    if checked:
        assert launcher.counts.bytes_read == {"x": 2, "y": 0, "out": 0}
        assert launcher.counts.bytes_written == {"x": 0, "y": 2, "out": 256}
    other = matrix(5, 24)
    launch(1, other, out)  # the same map, of another matrix
    assert out.tolist()[16:] == [other.ctypes.data, *of_y[1:], *[0] * 10] and other[0, 0] == 7
    launch(1, None, out)
    assert out.tolist()[16:] == [0] * 16
    launch(1, y, out)
    assert out.tolist()[16:22] == of_y


def test_a_map_of_nothing_is_zero(checked):
    out = np.ones(32, np.uint64)
    run("map_words", map_of(None), i32(1), None, out, checked=checked)
    assert not out.any()


def test_arrays_of_maps_are_what_a_launch_may_touch():
    x, y, out = matrix(5, 24), matrix(5, 24), np.zeros(32, np.uint64)
    y.flags.writeable = False
    with pytest.raises(EmulationError, match=r"map_words.*'y' at \[0, 0\]"):
        run("map_words", map_of(x), i32(1), map_of(y), out, checked=True)


def test_a_record_holds_maps_by_value():
    x, y, other, out = matrix(5, 24), matrix(5, 24), matrix(5, 24), np.zeros(32, np.uint64)
    launcher = EmulatorLauncher(folder=EMULATOR)
    plan = LaunchPlan(variant("map_words"), 1, 32)
    launch = launcher.bind(plan, x=map_of(Slot()), unrelated=i32(1), y=map_of(Slot()), out=out)
    replay = launcher.capture(lambda: launch(x, y))
    x[0, 0] = 3
    launch(other, other)
    replay()
    assert (out[0], out[16], y[0, 0]) == (x.ctypes.data, y.ctypes.data, 3)
    with pytest.raises(TypeError, match="2 open arguments: got 1"):
        launch(x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": np.zeros(32, np.uint16)}, "'x' is a TensorMap, got array"),
        ({"x": Slot()}, "'x' is a TensorMap, got Slot"),
        ({"unrelated": map_of(None)}, "'unrelated' is no TensorMap, got TensorMap"),
        ({"out": map_of(None)}, "'out' is no TensorMap, got TensorMap"),
    ],
)
def test_maps_and_other_arguments_are_not_confused(arguments, message):
    given = {"x": None, "unrelated": i32(1), "y": None, "out": None} | arguments
    with pytest.raises(TypeError, match=re.escape(message)):
        EmulatorLauncher(folder=EMULATOR).bind(LaunchPlan(variant("map_words"), 1, 32), **given)


def test_kernels_for_hopper_are_refused_by_another_device():
    launcher = EmulatorLauncher(folder=EMULATOR, limits=DeviceLimits((8, 0), 166912, 108))
    with pytest.raises(ValueError, match=r"map_words: for Hopper; this device has \(8, 0\)"):
        launcher.bind(LaunchPlan(variant("map_words")._replace(wgmma=True), 1, 32))


def test_a_map_of_an_array_that_is_not_aligned_never_reaches_a_launch():
    plan, given = LaunchPlan(variant("map_words"), 1, 32), {"unrelated": i32(1), "y": None, "out": None}
    shifted = matrix(6, 24).reshape(-1)[4:]
    launcher = EmulatorLauncher(folder=EMULATOR)
    message = r"tensor map 'x': expected an address that is a multiple of 16, got 0x\w+8"
    with pytest.raises(BackendError, match=message):
        launcher.bind(plan, x=map_of(shifted), **given)
    launch = launcher.bind(plan, x=map_of(Slot()), **given)
    with pytest.raises(BackendError, match=message):
        launch(shifted)
    assert launcher.launches == []


@pytest.mark.parametrize(
    "position, argument, message",
    [
        (0, np.zeros(1, f32), "'out' points to float64, got an array of float32"),
        (0, i32(1), "'out' is a pointer, got a scalar int32"),
        (1, u32(1), "'a' is a scalar int32"),
        (2, None, "'b' is a scalar uint32, got None"),
        (3, 1.0, "'c' is a scalar float32, got 1.0"),
        (5, Slot(i32), "'e' is a scalar int64"),
    ],
)
def test_arguments_that_the_kernel_would_misread_are_refused(position, argument, message):
    arguments = [np.zeros(1), i32(1), u32(1), f32(1), f64(1), np.int64(1)]
    arguments[position] = argument
    with pytest.raises(TypeError, match=re.escape(message)):
        run("scalars", *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "got none; missing: out, divisor; unknown: none"),
        ({"out": None}, "got out; missing: divisor; unknown: none"),
        ({"out": None, "divider": i32(2)}, "got out, divider; missing: divisor; unknown: divider"),
        ({"out": None, "divisor": i32(2), "n": i32(1)}, "got out, divisor, n; missing: none; unknown: n"),
    ],
)
def test_names_that_the_kernel_does_not_have_are_refused(arguments, message):
    launcher = EmulatorLauncher(folder=EMULATOR)
    with pytest.raises(TypeError, match=f"selftest.cu divides: expected the arguments out, divisor; {message}"):
        launcher.bind(LaunchPlan(variant("divides"), 1, 1), **arguments)


def test_a_gpu_and_the_emulator_know_parameters_by_the_same_names():
    """One reads the KERNEL lines of a flat source, the other lets g++ expand their macros."""
    variants = {(kernel.variant.source, kernel.variant.entry): kernel.variant for kernel in every_kernel()}
    expanded = {}
    for (source, entry), which in variants.items():
        if source not in expanded:
            expanded[source] = entry_points(KERNELS / source, which.defines, (9, 0))
        assert parameter_names(flatten(source), entry) == expanded[source][entry]


def test_choices_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="order 'sorted': expected one of fifo, lifo, random"):
        EmulatorLauncher("sorted")
    with pytest.raises(ValueError, match="copies 'never'"):
        EmulatorLauncher(copies="never")
    with pytest.raises(ValueError, match="at least one block"):
        EmulatorLauncher(resident_blocks=0)


def test_plans_beyond_the_device_are_refused():
    with pytest.raises(ValueError, match="has no KERNEL missing"):
        run("missing")
    with pytest.raises(ValueError, match="232449 bytes of shared memory"):
        run("foreign_mask", shared_bytes=232449)
    with pytest.raises(ValueError, match="1025 threads"):
        run("foreign_mask", block=1025)


def test_compiling_once_for_all_who_need_it(tmp_path):
    source = tmp_path / "small.cu"
    source.write_text('#include "common/ptx.cuh"\nKERNEL empty() {}\n')
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = [pool.submit(kernel_library, source, (), (9, 0), False) for _ in range(4)]
    libraries = {job.result() for job in waiting}
    assert len(libraries) == 1
    source.write_text('#include "common/ptx.cuh"\nKERNEL empty() { unknown(); }\n')
    with pytest.raises(CompileError, match="unknown"):
        kernel_library(source, (), (9, 0), False)
    folder = libraries.pop().parent
    assert not list(folder.glob("small*.tmp"))
    for path in folder.glob("small-*"):
        path.unlink()


# ---- Functions of ptx.cuh


def floats_of_all_kinds():
    """Random bits; numbers around float16's range; ties and their neighbours for each format; the special ones."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20000, dtype=u32)
    ties = [(bits & ~u32(2**n - 1)) + u32(2 ** (n - 1)) + u32(d % 2**32) for n in (13, 16) for d in (-1, 0, 1)]
    near = (rng.standard_normal(20000) * 2.0 ** rng.integers(-30, 20, 20000)).astype(f32)
    steps = np.arange(0, 4096) / 4 * 2.0**-24  # float16's subnormals, their ties and quarters
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        -np.nan,
        65504,
        65519.996,
        65520,
        65536,
        2.0**-25,
        2.0**-26,
        1e-45,
        3.4e38,
    ]
    with np.errstate(all="ignore"):
        return np.concatenate([bits.view(f32), *(t.view(f32) for t in ties), near, steps, -steps, special]).astype(f32)


def test_conversions_are_exact_to_the_bit():
    x = floats_of_all_kinds()
    bf16, f16, tf32 = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint16), np.zeros(x.size, u32)
    run("conversions", x, bf16, f16, tf32, i32(x.size), block=64)
    nan = np.isnan(x)
    with np.errstate(over="ignore", invalid="ignore"):
        expected_bf16, expected_f16 = x.astype(ml_dtypes.bfloat16), x.astype(np.float16)
    np.testing.assert_array_equal(bf16[~nan], expected_bf16.view(np.uint16)[~nan])
    np.testing.assert_array_equal(f16[~nan], expected_f16.view(np.uint16)[~nan])
    # TF32 cuts 13 bits off; a half or more of the last kept bit goes up, away from zero, up to infinity.
    bits = x.view(u32).astype(np.int64)
    kept, cut = bits >> 13, bits & 0x1FFF
    expected_tf32 = np.where(np.isinf(x), bits, (kept + (cut >= 0x1000)) << 13)
    np.testing.assert_array_equal(tf32[~nan], expected_tf32[~nan])
    # As PTX has it, every NaN becomes the same one.
    assert set(bf16[nan]) == {0x7FFF} and set(f16[nan]) == {0x7FFF} and set(tf32[nan]) == {0x7FFFFFFF}


def test_widening_is_exact():
    from_bf16, from_f16 = np.zeros(65536, f32), np.zeros(65536, f32)
    run("widening", from_bf16, from_f16)
    bits = np.arange(65536, dtype=np.uint16)
    for got, expected in ((from_bf16, bits.view(ml_dtypes.bfloat16)), (from_f16, bits.view(np.float16))):
        np.testing.assert_array_equal(got, expected.astype(f32))
        finite = np.isfinite(got)
        np.testing.assert_array_equal(np.signbit(got[finite]), np.signbit(expected.astype(f32)[finite]))


def test_loads_through_the_cache(checked):
    rng = np.random.default_rng(1)
    doubles, singles, out = rng.standard_normal(32), rng.integers(0, 99, (32, 4)).astype(f32), np.zeros(32)
    launcher = run("cached_loads", doubles, singles, out, checked=checked)
    np.testing.assert_allclose(out, doubles + singles.sum(1), rtol=1e-15)
    if checked:
        assert launcher.counts.bytes_read == {"doubles": 256, "singles": 512, "out": 0}


@pytest.mark.parametrize("copies", ["late", "early", "random"])
def test_asynchronous_copies(copies, checked):
    source, out = np.arange(1, 273, dtype=np.uint8), np.zeros(272, np.uint8)
    launcher = run("copies", source, out, copies=copies, checked=checked, seed=3)
    position = np.arange(272)
    np.testing.assert_array_equal(out, np.where(position % 16 < position // 16, source, 0))
    assert launcher.counts.asynchronous_copies == 17


def test_matrix_loads(checked):
    matrices = np.random.default_rng(2).integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    plain, transposed = np.zeros((32, 4), u32), np.zeros((32, 4), u32)
    launcher = run("matrix_loads", matrices, plain, transposed, checked=checked)
    for got, expected in ((plain, matrices), (transposed, matrices.transpose(0, 2, 1))):
        # Lane l holds, of each matrix, two neighbours in row l / 4.
        np.testing.assert_array_equal(got.view(np.uint16).reshape(32, 4, 2), expected.reshape(4, 32, 2).swapaxes(0, 1))
    assert launcher.counts.matrix_loads == 2


def matrices_of(kind, rng, integers=False):
    """A, B, C for one mma; A and B representable in the operand's format."""
    depth = 8 if kind == "tf32" else 16
    draw = (
        (lambda *s: rng.integers(-8, 9, s).astype(f32)) if integers else lambda *s: rng.standard_normal(s).astype(f32)
    )
    a, b, c = draw(16, depth), draw(depth, 8), draw(16, 8)
    if kind == "tf32":
        return [(m.view(u32) & u32(0xFFFFE000)).view(f32) for m in (a, b)] + [c]
    dtype = ml_dtypes.bfloat16 if kind == "bf16" else np.float16
    return [a.astype(dtype), b.astype(dtype), c]


def multiply(kind, a, b, c, **choices):
    out = c.copy()
    if kind == "tf32":
        launcher = run("product_tf32", a, b, out, **choices)
    else:
        launcher = run("product_16bit", a, b, out, i32(kind == "f16"), **choices)
    assert launcher.counts.matrix_products == 1
    return out


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("truncate", [False, True], ids=["rounding", "truncating"])
def test_matrix_products(kind, truncate, checked):
    rng = np.random.default_rng(3)
    a, b, c = matrices_of(kind, rng)
    got = multiply(kind, a, b, c, truncate=truncate, checked=checked)
    exact = a.astype(f64) @ b.astype(f64) + c
    scale = abs(a.astype(f64)) @ abs(b.astype(f64)) + abs(c)
    error = abs(got - exact) / scale
    assert error.max() < 2.0**-21
    assert error.max() > 0
    a, b, c = matrices_of(kind, rng, integers=True)
    got = multiply(kind, a, b, c, truncate=truncate, checked=checked)
    np.testing.assert_array_equal(got, a.astype(f64) @ b.astype(f64) + c)


def cut_off(value: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(value / unit) * unit


def leading_power(value: Fraction) -> Fraction:
    """The power of two at a number's leading one."""
    return Fraction(2) ** (math.frexp(float(value))[1] - 1)


def truncated_sum(products: list[tuple[Fraction, Fraction]], c: Fraction) -> float:
    """As Hopper's tensor cores add; tests/gpu/test_ptx_on_gpu.py asks a device."""
    powers = [leading_power(a) * leading_power(b) for a, b in products] + [leading_power(c)]
    unit = max(powers) / 2**25
    total = sum(cut_off(term, unit) for term in [*(a * b for a, b in products), c])
    return float(cut_off(total, leading_power(total) / 2**23)) if total else 0.0


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("size_of_c", [0.01, 1, 100])
def test_truncating_products_are_what_they_are_said_to_be(kind, size_of_c):
    rng = np.random.default_rng(4)
    a, b, c = matrices_of(kind, rng)
    c *= f32(size_of_c)
    got = multiply(kind, a, b, c, truncate=True)
    for i, j in np.ndindex(16, 8):
        products = [(Fraction(float(x)), Fraction(float(y))) for x, y in zip(a[i], b[:, j], strict=True)]
        assert got[i, j] == truncated_sum(products, Fraction(float(c[i, j])))


def test_truncating_products_of_special_numbers():
    a, b, c = np.zeros((16, 8), f32), np.ones((8, 8), f32), np.zeros((16, 8), f32)
    a[1, 0], a[2, 0], a[3, :2], c[4] = np.inf, np.nan, (np.inf, -np.inf), -np.inf
    for truncate in (False, True):
        got = multiply("tf32", a, b, c, truncate=truncate)
        np.testing.assert_array_equal(got[:5, 0], [0, np.inf, np.nan, np.nan, -np.inf])


def test_tf32_products_read_no_more_than_19_bits():
    a, b, c = matrices_of("tf32", np.random.default_rng(5))
    more = (a.view(u32) | u32(0x1FFF)).view(f32)
    np.testing.assert_array_equal(multiply("tf32", more, b, c), multiply("tf32", a, b, c))


# ---- Mistakes that the checker finds


def passes(entry, mistake, **choices):
    """Runs one of the kernels with a switch for mistakes."""
    if entry == "sum_of_blocks":
        x, partials, total = np.arange(256.0), np.zeros(256), np.zeros(())
        arrivals = np.zeros(1, u32)
        run(entry, x, partials, arrivals, total, i32(mistake), grid=4, block=64, **choices)
        return total == x.sum() and arrivals[0] == 0
    if entry == "copied_neighbours":
        x, out = np.arange(256, dtype=f32).reshape(64, 4), np.zeros(64, f32)
        run(entry, x, out, i32(mistake), block=64, **choices)
        return np.array_equal(out, x[:, 0] + np.roll(x[:, 1], -1))
    block = {"exchange_in_warp": 32, "exchange_between_warps": 128}.get(entry, 64)
    out = np.zeros(block, f32)
    run(entry, out, i32(mistake), block=block, **choices)
    thread = np.arange(block)
    expected = {32: (thread ^ 1) + 1, 64: (thread + 1) % 64 + (thread + 2) % 64, 128: thread ^ 64}[block]
    return np.array_equal(out, expected)


KERNELS_WITH_MISTAKES = (
    "exchange",
    "exchange_between_warps",
    "exchange_in_warp",
    "sum_of_blocks",
    "copied_neighbours",
)


@pytest.mark.parametrize("entry", KERNELS_WITH_MISTAKES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("copies", ["late", "early", "random"])
def test_without_a_mistake_nothing_is_found(entry, order, copies, checked):
    for resident_blocks in (1, 3):
        assert passes(entry, 0, order=order, copies=copies, checked=checked, resident_blocks=resident_blocks)


@pytest.mark.parametrize(
    "entry, mistake, message",
    [
        ("exchange", 1, r"reads what nobody has written: shared memory, byte \d+"),
        (
            "exchange",
            2,
            r"race \(read after write\): written by block 0, thread \d+.*: shared memory|what nobody has written",
        ),
        (
            "exchange",
            3,
            r"race \((write after read\): read|read after write\): written) by block 0, thread \d+, and nothing orders",
        ),
        (
            "exchange",
            4,
            r"race \(write after write\): written by block 0, thread \d+, and nothing orders .*: shared memory",
        ),
        ("exchange", 5, r"race \((read after write|write after read)\)"),
        ("exchange_between_warps", 1, r"race \((read after write|write after read)\)|what nobody has written"),
        (
            "exchange_in_warp",
            1,
            r"race \(read after write\): written by block 0, thread \d+, and nothing orders the two",
        ),
        ("sum_of_blocks", 1, r"race \(.*: 'partials' at \[\d+\]"),
        ("sum_of_blocks", 2, r"race \(read after write\): written by block \d, thread 0, .*: 'partials' at \[\d+\]"),
        ("sum_of_blocks", 3, r"race \(read after write\): written by block \d, thread \d+, .*: 'partials' at \[\d+\]"),
        ("sum_of_blocks", 4, r"race \(.*: 'partials' at \[\d+\]"),
        (
            "copied_neighbours",
            1,
            r"written by an asynchronous copy of .* the copy has not been waited for: shared memory",
        ),
        (
            "copied_neighbours",
            2,
            r"what nobody has written|written by an asynchronous copy of .* nothing orders the two",
        ),
        ("copied_neighbours", 3, r"race \((write after read, by an asynchronous copy|read after write)\): "),
        ("copied_neighbours", 4, r"race \(write after write\): .* the copy has not been waited for"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_mistakes_are_found(entry, mistake, message, order):
    with pytest.raises(
        EmulationError, match=rf"^{entry}, block \d+, thread \d+, selftest_checker\.cu:\d+: .*({message})"
    ):
        passes(entry, mistake, order=order, checked=True)


@pytest.mark.parametrize("entry, mistake", [("exchange", 2), ("exchange", 3), ("copied_neighbours", 1)])
def test_some_schedule_gives_wrong_results_without_the_checker(entry, mistake):
    assert not all(passes(entry, mistake, order=order, copies="late") for order in ORDERS)


def test_blocks_that_never_run_at_once_race_too():
    with pytest.raises(EmulationError, match=r"race \(write after write\): written by block 0, thread 0.*'y' at \[0\]"):
        run("same_place", np.zeros(4, f32), grid=3, resident_blocks=1, checked=True)


@pytest.mark.parametrize(
    "read, written, message",
    [
        (100, 0, r"out of bounds: read of 4 bytes: 0 bytes past the end of 'x'"),
        (103, 0, r"out of bounds: read of 4 bytes: 12 bytes past the end of 'x'"),
        (-2, 0, r"out of bounds: read of 4 bytes: 8 bytes before the start of 'x'"),
        (0, 61, r"out of bounds: write of 4 bytes: 4 bytes past the end of 'y'"),
        (0, 2**30, r"out of bounds: write of 4 bytes: address 0x\w+, near no array"),
    ],
)
def test_accesses_outside_arrays_are_found(read, written, message):
    base = np.zeros(400, f32)
    with pytest.raises(EmulationError, match=rf"selftest_checker\.cu:\d+: {message}"):
        run("touches", base[100:200], base[300:360], i32(read), i32(written), checked=True)


def test_the_padding_of_rows_may_be_read_but_not_the_last_row_s():
    padded = np.zeros((8, 8), f32)[:6, :5]
    out = np.zeros(32, f32)
    run("touches", padded, out, i32(38), i32(0), checked=True)
    with pytest.raises(EmulationError, match=r"0 bytes past the end of 'x'"):
        run("touches", padded, out, i32(45), i32(0), checked=True)
    with pytest.raises(EmulationError, match=r"race .*: 'y' at \[0, 0\]"):
        run("same_place", np.zeros((8, 8), f32)[1:, 2:], grid=2, checked=True)


@pytest.mark.parametrize("index", [1024, -1, 9000])
def test_accesses_outside_shared_memory_are_found(index, checked):
    with pytest.raises(EmulationError, match=rf"out of bounds: .* byte {4 * index} of shared memory \(4096 bytes\)"):
        run("touches_shared", np.zeros(4, f32), i32(index), block=1, checked=checked or index < 0)


def test_other_wrong_accesses_are_found():
    x, y = np.zeros(64, f32), np.zeros(64, f32)
    with pytest.raises(EmulationError, match=r"writes to an array that the kernel takes as const: 'x' at \[0\]"):
        run("writes_const", x, checked=True)
    with pytest.raises(EmulationError, match=r"misaligned access: 'x' at \[1\]"):
        run("misaligned", x, y, block=1, checked=True)
    with pytest.raises(EmulationError, match=r"read of 4 bytes by an asynchronous copy: 0 bytes past the end of 'x'"):
        run("copies_out_of_bounds", x[:60], i32(60), i32(4), block=1, checked=True)
    run("copies_out_of_bounds", x[:60], i32(60), i32(0), block=1, checked=True)  # copies nothing
    with pytest.raises(EmulationError, match=r"cp.async: an address is not a multiple of 16"):
        run("copies_out_of_bounds", x, i32(1), i32(16), block=1)


def test_copies_that_nobody_waited_for_are_over_when_the_launch_is():
    """The next launch knows of them, however many there were."""
    for _ in range(2):
        run("copies_never_waited_for", np.zeros(4, f32), i32(20), block=1, checked=True)


def test_a_kernel_may_write_through_one_name_what_it_reads_through_another():
    x = np.arange(64, dtype=f32)
    run("touches", x, x, i32(0), i32(40), checked=True)
    assert x[40] == 1


# ---- Guard pages


@pytest.mark.parametrize("read, written, name", [(36, 0, "x"), (0, 36, "y"), (300, 0, "x")])
def test_overruns_of_guarded_arrays_are_caught_without_the_checker(read, written, name):
    guarded = GuardedNumpy()
    x, y = guarded.zeros((6, 6), f32), guarded.empty(36, f32)
    with pytest.raises(EmulationError, match=rf"thread 0: out of bounds: .* past the end of '{name}'"):
        run("touches", x, y, i32(read), i32(written))


def test_guarded_arrays():
    guarded = GuardedNumpy()
    assert guarded.float32 is np.float32
    for shape, dtype in (((), f64), (5, ml_dtypes.bfloat16), ((3, 0), f32), ([3, 5], i32), (np.int64(4097), np.uint8)):
        zeros, empty = guarded.zeros(shape, dtype), guarded.empty(shape, dtype)
        assert zeros.shape == empty.shape == np.zeros(shape).shape
        assert zeros.dtype == empty.dtype == dtype
        assert not zeros.any()
        assert set(empty.reshape(-1).view(np.uint8)) <= {0xFF}
        for array in (zeros, empty):
            start, end = array.ctypes.data, array.ctypes.data + array.nbytes
            assert start % 16 == 0
            assert -end % 4096 < 16
            assert array.flags.c_contiguous and array.flags.writeable


def test_guarded_arrays_give_their_memory_back():
    def mappings():
        gc.collect()
        return len(Path("/proc/self/maps").read_text().splitlines())

    guarded = GuardedNumpy()
    views = [guarded.zeros(1000)[10:] for _ in range(50)]
    assert all(view.sum() == 0 for view in views)
    held = mappings()
    del views
    assert mappings() <= held - 50


# ---- Records, as CUDA graphs are


def test_a_record_repeats_launches_with_the_arguments_they_had(checked):
    total, other = np.zeros((), i32), np.zeros((), i32)
    launcher = EmulatorLauncher(folder=EMULATOR, checked=checked)
    launch = launcher.bind(LaunchPlan(variant("early_exit"), 1, 128, 512), sum=Slot(), n=Slot(i32))

    def work():
        assert launcher.capturing()
        launch(total, 70)
        launch(other, 3)

    replay = launcher.capture(work)
    assert (total, other, launcher.launches) == (0, 0, []) and not launcher.capturing()
    replay()
    launch(other, 10)
    replay()
    assert (total, other) == (2 * sum(range(70)), 2 * sum(range(3)) + sum(range(10)))
    assert launcher.launches == ["early_exit"] * 5
    assert launcher.replays == 2


def test_a_record_keeps_neither_arrays_nor_launches_alive():
    for lost in ("array", "launch"):
        launcher = EmulatorLauncher(folder=EMULATOR)
        kept = {"array": np.zeros((), i32)}
        kept["launch"] = launcher.bind(LaunchPlan(variant("early_exit"), 1, 64, 256), sum=Slot(), n=i32(5))
        replay = launcher.capture(lambda kept=kept: kept["launch"](kept["array"]))
        replay()
        del kept[lost]
        with pytest.raises(EmulationError, match="a record was replayed whose arrays or launches are gone"):
            replay()


def test_while_launches_are_recorded_nothing_else_may_be_done():
    launcher = EmulatorLauncher(folder=EMULATOR)
    xp, total = StrictNumpy(launcher), np.zeros((), i32)
    for work, message in [
        (lambda: launcher.capture(lambda: None), "a record was begun within another one"),
        (lambda: launcher.copy(total, total), "a copy while launches are recorded"),
        (lambda: xp.zeros(3), "zeros while launches are recorded"),
    ]:
        with pytest.raises(EmulationError, match=message):
            launcher.capture(work)
        assert not launcher.capturing() and message in launcher.failed_records[-1]
    assert launcher.capture(lambda: xp.float32(isinstance(total, xp.ndarray)))() is None
    assert xp.zeros(3).tolist() == [0, 0, 0]


def test_other_threads_go_on_while_one_records():
    total = np.zeros((), i32)
    launcher = EmulatorLauncher(folder=EMULATOR)
    launch = launcher.bind(LaunchPlan(variant("early_exit"), 1, 64, 256), sum=total, n=i32(5))

    def work():
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()

    replay = launcher.capture(work)
    assert total == 10
    replay()
    assert total == 10


# ---- Counts


def test_counts():
    x, y, more = np.zeros((64, 4), f32), np.zeros((64, 4), f32), np.zeros(4, f32)
    total = np.zeros((), i32)
    launcher = EmulatorLauncher(folder=EMULATOR, checked=True)
    launch = launcher.bind(LaunchPlan(variant("counted"), 1, 64, 1024), x=x, y=y, sum=total, more=more)
    launch()
    launch()
    counts = launcher.counts
    assert counts.bytes_read == {"x": 2 * 64 * (16 + 16), "y": 0, "sum": 0, "more": 2 * 64 * 12}
    assert counts.bytes_written == {"x": 0, "y": 2 * 64 * 16, "sum": 0, "more": 0}
    assert counts.atomics == {"x": 0, "y": 0, "sum": 128, "more": 0}
    assert counts.barriers == 2
    assert counts.asynchronous_copies == 128
    assert counts.extra_wavefronts_read == counts.extra_wavefronts_written == 0
    assert launcher.launches == ["counted", "counted"]
    launcher.reset_counts()
    zero = launcher.counts
    assert not any(getattr(zero, field.name) for field in dataclasses.fields(zero))


@pytest.mark.parametrize(
    "size, stride, extra",
    # Of 2 bytes two lanes share a word. Of 8 bytes 16 lanes are served at once, of 16 bytes 8.
    [
        *[(2, 1, 0), (2, 2, 0), (2, 3, 1), (2, 4, 1), (2, 8, 3)],
        *[(4, 1, 0), (4, 2, 1), (4, 3, 0), (4, 4, 3), (4, 8, 7), (4, 31, 0), (4, 32, 31), (4, 33, 0)],
        *[(8, 1, 0), (8, 2, 2 * 1), (8, 3, 0), (8, 4, 2 * 3), (8, 16, 2 * 15)],
        *[(16, 1, 0), (16, 2, 4 * 1), (16, 3, 0), (16, 4, 4 * 3), (16, 8, 4 * 7)],
    ],
)
def test_bank_conflicts(size, stride, extra):
    out = np.zeros(4, f32)
    counts = run("strided_access", out, i32(stride), i32(size), shared_bytes=32 * stride * size, checked=True).counts
    assert (counts.extra_wavefronts_read, counts.extra_wavefronts_written) == (extra, extra)
    assert sorted(counts.conflicts_by_line.values()) == ([(0, extra), (extra, 0)] if extra else [])


def test_lanes_that_read_the_same_word_do_not_conflict():
    assert run("broadcast_access", np.zeros(32, f32), checked=True).counts.extra_wavefronts_read == 0


@pytest.mark.parametrize("pitch, extra", [(16, 0), (32, 4), (64, 4 * 3), (128, 4 * 7), (256, 4 * 7), (80, 0), (144, 0)])
def test_bank_conflicts_of_matrix_loads(pitch, extra):
    """Rows 16 bytes longer than a power of two lie in different banks."""
    out = np.zeros(32, u32)
    counts = run("tile_access", out, i32(pitch), shared_bytes=32 * pitch, checked=True).counts
    assert (counts.extra_wavefronts_read, counts.extra_wavefronts_written) == (extra, 0)
