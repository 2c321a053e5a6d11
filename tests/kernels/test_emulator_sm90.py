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
pytestmark = pytest.mark.thorough

i32, u16, u32, f32, f64 = np.int32, np.uint16, np.uint32, np.float32, np.float64
ORDERS = ("fifo", "lifo", "random")
COPIES = ("late", "early", "random")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SOURCES = {
    entry: path.name
    for path in EMULATOR.glob("selftest*sm90.cu")
    for entry in re.findall(r"^KERNEL (?:__\w+__\([^()]*\) )*(\w+)\(", path.read_text(), re.MULTILINE)
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


def copies_box(x, y, columns=64, rows=16, bytes_of_box=2048, shared_bytes=2048 + 16, **choices):
    maps = [matrix and tensor_map(matrix[0], (columns, rows))._replace(**matrix[1]) for matrix in (x, y)]
    shown = np.zeros(columns * rows, u16)
    run("copied_box", *maps, shown, *map(i32, (bytes_of_box, 0, 0, 0, 0)), shared_bytes=shared_bytes, **choices)


def test_wrong_copies_are_found(checked):
    x, y = matrix_of(40, 64), matrix_of(40, 64, seed=1)
    copies_box((x, {}), (y, {}), checked=checked)
    for arguments, message in [
        ({"x": None}, "prefetch.tensormap: the map is empty"),
        ({"bytes_of_box": 2052}, "mbarrier: byte 2052 of shared memory is no multiple of 8"),
        ({"bytes_of_box": 4096}, r"mbarrier: byte 4096 of shared memory is outside \(2064 bytes\)"),
        ({"rows": 32}, r"tma_load_2d: 4096 bytes from byte 0 of shared memory are outside \(2064 bytes\)"),
    ]:
        with pytest.raises(EmulationError, match=f"copied_box, block 0, thread 0, selftest_sm90.cu:.*: {message}"):
            copies_box(**({"x": (x, {}), "y": (y, {})} | arguments), checked=checked)


def test_copies_outside_their_arrays_are_found():
    x, y = matrix_of(8, 64), matrix_of(40, 64, seed=1)
    with pytest.raises(EmulationError, match=r"read of 16 bytes by a copy of a box: 0 bytes past the end of 'map_x'"):
        copies_box((x, {"rows": 9}), (y, {}), checked=True)
    with pytest.raises(
        EmulationError, match=r"write of 16 bytes by a copy of a box .*: 0 bytes past the end of 'map_y'"
    ):
        copies_box((y, {}), (x, {"rows": 9}), checked=True)
    y.flags.writeable = False
    with pytest.raises(EmulationError, match=r"writes to an array that may only be read: 'map_y' at \[0, 0\]"):
        copies_box((x, {}), (y, {}), checked=True)


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
    run("matrix_stores", fragments, stored, read, i32(16), checked=checked)
    np.testing.assert_array_equal(stored, matrices)
    np.testing.assert_array_equal(read, fragments)


@pytest.mark.parametrize("pitch, extra", [(16, 0), (32, 4), (128, 4 * 7), (144, 0)])
def test_bank_conflicts_of_matrix_stores(pitch, extra):
    fragments, stored, read = np.zeros((32, 4), u32), np.zeros(256, u16), np.zeros((32, 4), u32)
    counts = run("matrix_stores", fragments, stored, read, i32(pitch), shared_bytes=32 * pitch, checked=True).counts
    assert not extra or {(0, extra), (extra, 0)} <= set(counts.conflicts_by_line.values())
    assert counts.extra_wavefronts_written == extra


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


@pytest.mark.parametrize(
    "mistake, message",
    [
        (
            "NO_FIRST_BARRIER",
            r"(race \(read after write\): .*|what nobody has written): shared memory of block \d+, byte",
        ),
        (
            "NO_SECOND_BARRIER",
            r"block \d+, whose shared memory this reads, has ended|the block ends although block \d+, thread \d+",
        ),
        ("RANK_OUTSIDE", r"mapa: rank 4 in a cluster of 4 blocks"),
        ("WAITS_ONLY", r"barrier.cluster.wait: this thread has not arrived"),
        ("ARRIVES_TWICE", r"barrier.cluster.arrive: this thread has arrived and not waited"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_mistakes_with_clusters_are_found(mistake, message, order):
    for resident_blocks in (4, 12):
        with pytest.raises(EmulationError, match=f"^cluster_sums, block .*({message})"):
            cluster_sums(mistake, order=order, resident_blocks=resident_blocks, checked=True)


def test_plans_must_have_the_clusters_that_a_kernel_is_compiled_for():
    x = np.zeros((8, 64, 4), f32)
    with pytest.raises(ValueError, match="clusters of 2 blocks; the kernel is compiled for 4"):
        run("cluster_sums", x, x, i32(0), grid=8, block=64, cluster=2)
    with pytest.raises(ValueError, match="6 blocks in clusters of 4"):
        run("cluster_sums", x, x, i32(0), grid=6, block=64, cluster=4)


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


SCHEDULES = [("fifo", "late"), ("lifo", "early"), ("random", "random"), ("fifo", "early")]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("copies", COPIES)
def test_a_pipeline_without_a_mistake(order, copies, checked):
    for seed in range(2):
        assert pipeline("NONE", order=order, copies=copies, seed=seed, checked=checked)


RACE_WITH_LOAD = r"race \(write after (read|write), by a copy of a box\): .*: shared memory, byte \d+"
NO_PHASE = "mbarrier.arrive: more than 1 arrivals in phase"
STUCK = r"deadlock: .* wait at mbarrier.try_wait for parity [01] of the barrier at byte \d+ \(phase \d"
NOT_FENCED = r"registers were written after the latest wgmma\.fence"

FOUND_IN_EVERY_SCHEDULE = {
    "NO_WAIT_FOR_FULL": r"race \(read after write, by wgmma\): written by a copy of a box of block 0, and nothing",
    "NO_WAIT_FOR_EMPTY": f"{RACE_WITH_LOAD}|{NO_PHASE}",
    "WRONG_PARITY": f"{RACE_WITH_LOAD}|{NO_PHASE}",
    "FEWER_ARRIVALS": r"race \(write after read, by a copy of a box\): read by block 0, thread \d+",
    "MORE_ARRIVALS": r"race \(write after read, by a copy of a box\): read by wgmma of block 0, warpgroup 1",
    "FEWER_BYTES": r"mbarrier: 8192 bytes come for phase 0 .* expects 8176 bytes more",
    "MORE_BYTES": r"deadlock: .* of the barrier at byte 32768 \(phase 0: 0 of 1 arrivals and 16 bytes are missing\)",
    "NO_FENCE_OF_BARRIERS": r"no fence_mbarrier_init has made known to copies: shared memory, byte 32800",
    "BARRIER_OVERWRITTEN": r"mbarrier: something else was written over the barrier at byte 32768 of shared memory",
    "SKIPPED_PHASE": rf"{STUCK}|race \(read after write\): written by a copy of a box|{RACE_WITH_LOAD}",
    "EMPTY_BEFORE_READ": r"race \(write after read, by a copy of a box\): read by block 0, thread \d+",
    "ENDS_BEFORE_COPY": r"race \(write after write\): written by a copy of a box of block 0, and nothing",
    "EMPTY_BEFORE_PRODUCTS": r"race \(write after read, by a copy of a box\): read by wgmma of block 0, warpgroup 1",
    "NO_FENCE_OF_REGISTERS": f"wgmma: d's {NOT_FENCED}",
    "NO_FENCE_OF_A": f"wgmma: A's {NOT_FENCED}",
    "A_OVERWRITTEN": r"wgmma: A's registers were written while the product was under way",
    "ACCUMULATOR_OVERWRITTEN": r"wgmma: accumulator register 5 was written while a product was under way",
    "OUTSIDE": r"wgmma: the descriptor of A leads outside shared memory: row 0, k 0 lies at byte 73728 \(32832 bytes\)",
    "NO_FENCE_BEFORE_STORE": r"proxies: read by a copy of a box to global memory what block 0, thread \d+,",
    "NO_BARRIER_BEFORE_STORE": r"race \(read after write, by a copy of a box to global memory\): written by block 0",
    "NO_WAIT_FOR_STAGING": r"race \(write after read\): read by a copy of a box to global memory of block 0",
    "NO_BARRIER_FOR_STAGING": r"race \(write after read\): read by a copy of a box to global memory of block 0",
    "ENDS_BEFORE_STORE": r"thread 128: returns while its copies still read shared memory \(bulk_wait_read\)",
    "STAGES_REUSED": r"race \(write after read\): read by block 0, thread \d+, and nothing orders the two",
}
WRONG_IN_EVERY_SCHEDULE = ("NO_WAIT_FOR_PRODUCT", "ONE_GROUP_UNDER_WAY", "WRONG_STEP")


def test_every_mistake_is_looked_for():
    assert {"NONE", *FOUND_IN_EVERY_SCHEDULE, *WRONG_IN_EVERY_SCHEDULE} == set(mistakes("Mistake"))


@pytest.mark.parametrize("mistake", FOUND_IN_EVERY_SCHEDULE)
@pytest.mark.parametrize("order, copies", SCHEDULES)
def test_mistakes_are_found(mistake, order, copies):
    with pytest.raises(EmulationError, match=f"^pipeline.*({FOUND_IN_EVERY_SCHEDULE[mistake]})"):
        pipeline(mistake, order=order, copies=copies, checked=True)


@pytest.mark.parametrize("mistake", WRONG_IN_EVERY_SCHEDULE)
@pytest.mark.parametrize("order, copies", SCHEDULES)
def test_mistakes_give_wrong_results(mistake, order, copies, checked):
    """Accumulators are NaN until they have been waited for, also when the product was carried out at once."""
    assert not pipeline(mistake, order=order, copies=copies, checked=checked)


@pytest.mark.parametrize(
    "mistake",
    ["FEWER_BYTES", "MORE_BYTES", "BARRIER_OVERWRITTEN", "A_OVERWRITTEN", "ACCUMULATOR_OVERWRITTEN", "OUTSIDE"],
)
def test_some_mistakes_are_found_without_the_checker(mistake):
    for order, copies in SCHEDULES:
        with pytest.raises(EmulationError, match=FOUND_IN_EVERY_SCHEDULE[mistake]):
            pipeline(mistake, order=order, copies=copies)


@pytest.mark.parametrize("mistake", ["NO_WAIT_FOR_FULL", "FEWER_ARRIVALS", "NO_WAIT_FOR_STAGING", "STAGES_REUSED"])
def test_some_schedule_gives_wrong_results_without_the_checker(mistake):
    def is_right(order, copies):
        try:
            return pipeline(mistake, order=order, copies=copies)
        except EmulationError:
            return False

    assert not all(is_right(order, copies) for order in ORDERS for copies in COPIES)


# ---- One product


def product_of_ones(mistake, **choices):
    out = np.zeros((128, 32), f32)
    number = mistakes("ProductMistake").index(mistake)
    run("product_of_ones", tensor_map(matrix_of(64, 64), (64, 64)), out, i32(number), block=128, **choices)
    return (out == 16).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_product_of_what_threads_wrote(order, checked):
    assert product_of_ones("RIGHT", order=order, shared_bytes=8192 + 8, checked=checked)


WRONG_PRODUCTS = {
    "NO_PROXY_FENCE": r"proxies: read by wgmma what block 0, thread \d+, has written without a fence\.proxy\.async",
    "PROXY_FENCE_TOO_EARLY": r"proxies: read by wgmma what block 0, thread \d+, has written without",
    "FENCE_OF_ANOTHER": r"proxies: read by wgmma what block 0, thread \d+, has written without",
    "NO_BARRIER": r"race \(read after write, by wgmma\): written by block 0, thread \d+|what nobody has written",
    "NEVER_FENCED": r"wgmma: no wgmma\.fence stands before this warpgroup's first product",
    "DIFFERENT_PRODUCTS": r"wgmma: threads of this warpgroup issue different products",
    "HALF_A_WARPGROUP": r"returns while this product of its warpgroup is under way|wait at wgmma\.wait_group",
    "NOT_WAITED_FOR": r"returns while this product of its warpgroup is under way",
    "OVERLAPPING": r"wgmma: d overlaps 32 registers that a product under way adds to",
    "WRITTEN_WHILE_READ": r"race \(write after read\): read by wgmma|race \(read after write, by wgmma\): written by",
    "FREED_BY_ONE_WARP": r"race \(write after read, by a copy of a box\): read by wgmma of block 0, warp(group)? [0-3]",
    "LOAD_OVER_PLAIN": r"proxies: overwritten by a copy of a box what block 0, thread \d+, has written without",
}


@pytest.mark.parametrize("mistake", WRONG_PRODUCTS)
@pytest.mark.parametrize("order, copies", SCHEDULES)
def test_wrong_products_are_found(mistake, order, copies):
    with pytest.raises(EmulationError, match=f"^product_of_ones.*({WRONG_PRODUCTS[mistake]})"):
        product_of_ones(mistake, order=order, copies=copies, shared_bytes=8192 + 8, checked=True)


def test_every_wrong_product_is_looked_for():
    assert {"RIGHT", *WRONG_PRODUCTS} == set(mistakes("ProductMistake"))
