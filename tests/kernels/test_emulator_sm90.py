"""The emulator's instructions of sm_90a: what they do, and the mistakes with them that it finds."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulationError, EmulatorLauncher
from emulator.build import EMULATOR
from support.kernel_arguments import by_name
from support.requirements import require_emulator

from gpuback._cuda.launch import LaunchPlan, TensorMap, Variant

require_emulator()

i32, u16, u32, f32, f64 = np.int32, np.uint16, np.uint32, np.float32, np.float64
ORDERS = ("fifo", "lifo", "random")
COPIES = ("late", "early", "random")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SOURCES = {
    entry: path.name
    for path in EMULATOR.glob("selftest*sm90.cu")
    for entry in re.findall(r"^KERNEL .*?(\w+)\(const|^KERNEL .*?(\w+)\(\w", path.read_text(), re.MULTILINE)
    for entry in entry
    if entry
}


def run(entry, *arguments, grid=1, block=32, cluster=1, shared_bytes=4096, **choices):
    """Launches a kernel of selftest*sm90.cu and returns the launcher."""
    launcher = EmulatorLauncher(folder=EMULATOR, **choices)
    named = by_name(EMULATOR / SOURCES[entry], entry, arguments)
    plan = LaunchPlan(Variant(SOURCES[entry], entry, wgmma=True), grid, block, shared_bytes, cluster)
    launcher.bind(plan, **named)()
    return launcher


@pytest.fixture(params=[False, True], ids=["plain", "checked"])
def checked(request):
    return request.param


def tensor_map(matrix, box, swizzle=128, dtype="bfloat16"):
    """Of a row-major matrix of 16 bits."""
    rows, columns = matrix.shape
    return TensorMap(matrix, columns, rows, matrix.strides[0] // 2, box, dtype, swizzle)


def matrix_of(rows, columns, pitch=None, seed=0):
    """Numbers of 16 bits in rows that begin at multiples of 16 bytes."""
    pitch = pitch or -(-columns // 8) * 8
    numbers = np.random.default_rng(seed).integers(1, 1 << 16, (rows, pitch), dtype=u16)
    return numbers[:, :columns]


# ---- Copies of boxes


def box_of(matrix, column, row, columns, rows):
    """The box, zero outside the matrix."""
    box = np.zeros((rows, columns), u16)
    for r in range(rows):
        for c in range(columns):
            if 0 <= row + r < matrix.shape[0] and 0 <= column + c < matrix.shape[1]:
                box[r, c] = matrix[row + r, column + c]
    return box


def as_it_lies(box, swizzle):
    """The box's chunks of 8 where shared memory has them: the chunk's number is combined with the row's."""
    rows, columns = box.shape
    lies = np.zeros(box.size, u16)
    for r in range(rows):
        for c in range(0, columns, 8):
            byte = (r * columns + c) * 2
            byte ^= (byte >> 7 & (7 if swizzle == 128 else 3)) << 4
            lies[byte // 2 : byte // 2 + 8] = box[r, c : c + 8]
    return lies


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize(
    "shape, at, columns, rows, swizzle",
    [
        ((64, 64), (0, 0), 64, 64, 128),
        ((100, 72), (64, 64), 64, 64, 128),
        ((37, 13), (0, 0), 64, 40, 128),
        ((37, 13), (-3, -2), 64, 8, 128),
        ((50, 96), (32, 5), 32, 16, 64),
        ((9, 30), (100, 3), 32, 8, 64),
    ],
)
def test_boxes_are_swizzled_filled_with_zeros_and_clipped(shape, at, columns, rows, swizzle, copies, checked):
    x, y = matrix_of(*shape), matrix_of(50, 61, seed=1)
    expected_y = y.copy()
    shown = np.zeros(columns * rows, u16)
    maps = [tensor_map(matrix, (columns, rows), swizzle) for matrix in (x, y)]
    where = (i32(rows * columns * 2), *map(i32, at), i32(8), i32(33))
    bytes_of_box = rows * columns * 2
    launcher = run(
        "copied_box", *maps, shown, *where, shared_bytes=bytes_of_box + 16, copies=copies, checked=checked, seed=2
    )
    box = box_of(x, *at, columns, rows)
    np.testing.assert_array_equal(shown, as_it_lies(box, swizzle))
    landed = expected_y[33 : 33 + rows, 8 : 8 + columns]
    landed[...] = box[: landed.shape[0], : landed.shape[1]]
    np.testing.assert_array_equal(y, expected_y)
    counts = launcher.counts
    assert (counts.bulk_loads, counts.bulk_stores) == (1, 1)
    if checked:
        inside = box_of(np.ones_like(x), *at, columns, rows).sum()
        assert counts.bytes_read["map_x"] == 2 * inside
        assert counts.bytes_written["map_y"] == 2 * landed.size


# ---- Products of a warpgroup


def products_of(n, dtype, swizzle, transpose_a, transpose_b, in_registers, accumulate, seed=0, **choices):
    """The emulator's C (+)= A B, with C 64 x n and K = 64; A, B and C before."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in ((64, 64), (64, n)))
    c = rng.standard_normal((64, n)).astype(f32)
    # As the operand lies in memory, padded to whole chunks.
    a_lies, b_lies = (a.T if transpose_a else a), (b if transpose_b else b.T)
    a_lies, b_lies = np.ascontiguousarray(a_lies).view(u16), np.ascontiguousarray(b_lies).view(u16)
    width = swizzle // 2
    maps = (
        tensor_map(a_lies, (width, 64), swizzle, dtype),
        tensor_map(b_lies, (width, 64 if transpose_b else n), swizzle, dtype),
    )
    out = c.copy()
    launcher = run(
        "product",
        *(None if in_registers else maps[0], maps[1], np.ascontiguousarray(a).view(u16) if in_registers else None),
        *(out, *map(i32, (n, swizzle, transpose_a, transpose_b, dtype == "float16", accumulate))),
        block=128,
        shared_bytes=1024 + 16384 + 64 * 320 * 2,
        **choices,
    )
    assert launcher.counts.warpgroup_products == 4
    return out, a.astype(f64), b.astype(f64), c.astype(f64) * accumulate


@pytest.mark.parametrize("n", [32, 40, 64, 72, 128, 192, 256])
@pytest.mark.parametrize("swizzle", [128, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_a_warpgroup(n, swizzle, dtype):
    for in_registers, transpose_a, transpose_b in [(1, 0, 0), (1, 0, 1), *((0, a, b) for a in (0, 1) for b in (0, 1))]:
        for accumulate in (0, 1):
            got, a, b, c = products_of(n, dtype, swizzle, transpose_a, transpose_b, in_registers, accumulate)
            scale = abs(a) @ abs(b) + abs(c)
            assert (abs(got - (a @ b + c)) / scale).max() < 2.0**-19


@pytest.mark.parametrize("copies", COPIES)
def test_products_do_not_depend_on_when_they_are_carried_out(copies):
    results = [products_of(72, "bfloat16", 128, 0, 1, r, 1, copies=copies, truncate=True)[0] for r in (0, 1)]
    np.testing.assert_array_equal(*results)


# ---- Fragments and pairs


def test_matrix_stores(checked):
    matrices = np.random.default_rng(2).integers(0, 65536, (4, 8, 8)).astype(u16)
    fragments = matrices.reshape(4, 32, 2).swapaxes(0, 1).copy().view(u32).reshape(32, 4)
    stored, read = np.zeros((4, 8, 8), u16), np.zeros((32, 4), u32)
    run("matrix_stores", fragments, stored, read, checked=checked)
    np.testing.assert_array_equal(stored, matrices)
    np.testing.assert_array_equal(read, fragments)


def test_pairs():
    rng = np.random.default_rng(3)
    n = 4096
    a, b = (rng.integers(0, 1 << 32, n, dtype=u32) for _ in range(2))
    b[::7] = a[::7]
    x = (rng.standard_normal(2 * n) * 2.0 ** rng.integers(-20, 20, 2 * n)).astype(f32)
    x[:4] = (np.nan, np.inf, -0.0, 1e38)
    out = np.zeros((6, n), u32)
    run("pairs", a, b, x, out, i32(n))
    got = out.view(u16).reshape(6, n, 2)
    for row, dtype in ((0, ml_dtypes.bfloat16), (1, np.float16)):
        one, other = (words.view(dtype).reshape(n, 2).astype(f32) for words in (a, b))
        with np.errstate(all="ignore"):
            expected = [x.reshape(n, 2).astype(dtype), (one > other).astype(dtype), (one * other).astype(dtype)]
        for words, numbers in zip(got[row::2], expected, strict=True):
            nan = np.isnan(numbers.astype(f32))
            np.testing.assert_array_equal(words[~nan], numbers.view(u16)[~nan])
            assert set(words[nan]) <= {0x7FFF}


# ---- Parts of a block, and clusters


@pytest.mark.parametrize("order", ORDERS)
def test_parts_of_a_block(order, checked):
    elected = np.full(384, -1, i32)
    run("parts_of_a_block", elected, i32(1), block=384, order=order, checked=checked)
    np.testing.assert_array_equal(elected.reshape(12, 32).sum(1), 1)
    with pytest.raises(EmulationError, match=r"deadlock: .*Block 0, threads 128 to 383 wait at setmaxnreg.inc \("):
        run("parts_of_a_block", elected, i32(0), block=384, order=order, checked=checked)
    out = np.zeros(160, i32)
    run("numbers_handed_over", out, block=160, order=order, checked=checked)
    np.testing.assert_array_equal(out[32:], np.arange(32, 160))


def cluster_sums(mistake, **choices):
    x = np.random.default_rng(4).integers(0, 99, (3, 4, 64, 4)).astype(f32)
    sums = np.zeros_like(x)
    number = mistakes("ClusterMistake").index(mistake)
    run("cluster_sums", x, sums, i32(number), grid=12, block=64, cluster=4, **choices)
    expected = np.broadcast_to(np.roll(x, -1, axis=2).sum(1, keepdims=True), x.shape).copy()
    expected[..., 3] = 4 * np.arange(4)[None, :, None]
    return np.array_equal(sums, expected)


def mistakes(enumeration):
    """The names in an enumeration of selftest_checker_sm90.cu, in order."""
    text = (EMULATOR / "selftest_checker_sm90.cu").read_text()
    body = re.search(rf"enum {enumeration} {{(.*?)}};", text, re.DOTALL)[1]
    return re.findall(r"^\s*([A-Z_]+),", body, re.MULTILINE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("resident_blocks", [1, 5, 8])
def test_clusters(order, resident_blocks, checked):
    assert cluster_sums("CORRECT", order=order, resident_blocks=resident_blocks, checked=checked)


# ---- A pipeline of roles


def pipeline(mistake, steps=5, **choices):
    """Whether all that the pipeline computes is right; rows that the last copy does not find are zero."""
    rng = np.random.default_rng(6)
    rows = steps * 64 - 27
    x, w = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((rows, 64), (64, 64)))
    y, sums, columns = np.zeros((rows, 64), ml_dtypes.bfloat16), np.zeros((64, 64), f32), np.zeros(64, f32)
    maps = [tensor_map(matrix.view(u16), (64, 64)) for matrix in (x, w, y)]
    number = mistakes("Mistake").index(mistake)
    run("pipeline", *maps, sums, columns, i32(steps), i32(number), block=256, shared_bytes=4 * 8192 + 64, **choices)
    x, w = x.astype(f64), w.astype(f64)
    between = (x @ w).astype(ml_dtypes.bfloat16).astype(f64)
    return (
        np.allclose(y.astype(f64), between @ w, rtol=0, atol=1e-2 * abs(between) @ abs(w))
        and np.allclose(sums, x.T @ x, rtol=0, atol=1e-5 * (abs(x.T) @ abs(x)).max())
        and np.allclose(columns, x.sum(0), rtol=0, atol=1e-4)
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("copies", COPIES)
def test_a_pipeline_without_a_mistake(order, copies, checked):
    for seed in range(2):
        assert pipeline("NONE", order=order, copies=copies, seed=seed, checked=checked)
