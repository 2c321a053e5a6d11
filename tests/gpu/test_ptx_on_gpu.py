"""Every function of kernels/common/ptx.cuh on a GPU beside its CPU twin in the emulator: the same data, the same bits.

Tensor cores add as no standard says. Their sums are held to what the emulator's `truncate` mode guarantees, and it is
printed (pytest -s) which way of adding comes to the very bits of this device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator import EmulatorLauncher
from numpy.typing import NDArray
from support.kernel_arguments import by_name
from support.requirements import require_emulator, require_gpu
from support.tensor_core_sums import (
    DATA,
    KINDS,
    NOT_EXACT,
    Products,
    allowed_error,
    how_it_adds,
    mean_error,
    random_products,
    with_specials,
)

from gpuback._cuda.device import CudaLauncher
from gpuback._cuda.launch import LaunchPlan, Variant

pytestmark = pytest.mark.gpu

FOLDER = Path(__file__).parent / "kernels"
SOURCE = "ptx_functions.cu"
TILES = 200  # products of each kind of data
i32, u16, u32, f32, f64 = np.int32, np.uint16, np.uint32, np.float32, np.float64


@pytest.fixture(scope="module")
def on_gpu() -> Callable[..., list[NDArray]]:
    """Launches a kernel and returns its arrays as it leaves them; takes NumPy arrays and scalars."""
    require_gpu()
    import cupy

    launcher = CudaLauncher(folder=FOLDER)

    def run(entry: str, *arguments: Any, grid: int = 1, block: int = 32, shared_bytes: int = 4096) -> list[NDArray]:
        given = [cupy.asarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
        launcher.bind(plan(entry, grid, block, shared_bytes), **by_name(FOLDER / SOURCE, entry, given))()
        return [cupy.asnumpy(x) for x in given if not isinstance(x, np.generic)]

    return run


@pytest.fixture(scope="module")
def on_cpu() -> Callable[..., list[NDArray]]:
    """The same in the emulator, whose choices may be given as well."""
    require_emulator()

    def run(
        entry: str, *arguments: Any, grid: int = 1, block: int = 32, shared_bytes: int = 4096, **choices: Any
    ) -> list[NDArray]:
        given = [x.copy() if isinstance(x, np.ndarray) else x for x in arguments]
        launcher = EmulatorLauncher(folder=FOLDER, **choices)
        launcher.bind(plan(entry, grid, block, shared_bytes), **by_name(FOLDER / SOURCE, entry, given))()
        return [x for x in given if isinstance(x, np.ndarray)]

    return run


@pytest.fixture
def on_both(on_gpu: Any, on_cpu: Any) -> Callable[..., Iterator[tuple[NDArray, NDArray]]]:
    """Each array as the GPU and as the CPU leaves it."""
    return lambda *given, **shape: zip(on_gpu(*given, **shape), on_cpu(*given, **shape), strict=True)


def plan(entry: str, grid: int, block: int, shared_bytes: int) -> LaunchPlan:
    return LaunchPlan(Variant(SOURCE, entry), grid, block, shared_bytes)


def assert_same_bits(results: Any) -> None:
    for gpu, cpu in results:
        assert gpu.tobytes() == cpu.tobytes(), f"{np.count_nonzero(gpu != cpu)} of {gpu.size} differ"


# ---- Conversions


def floats_of_all_kinds() -> NDArray[np.float32]:
    """Random bits; ties and their neighbours for each format; numbers around float16's range; the special ones."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=u32)
    ties = [(bits & ~u32(2**n - 1)) + u32(2 ** (n - 1)) + u32(d % 2**32) for n in (13, 16) for d in (-1, 0, 1)]
    near = rng.standard_normal(100_000) * 2.0 ** rng.integers(-30, 20, 100_000)
    steps = np.arange(4096) / 4 * 2.0**-24  # float16's subnormals, their ties and quarters
    special = [0.0, np.inf, np.nan, 65504, 65519.996, 65520, 65536, 2.0**-25, 2.0**-26, 1e-45, 2.0**-126, 3.4e38]
    with np.errstate(all="ignore"):
        rest = np.concatenate([near, steps, -steps, special, np.negative(special)]).astype(f32)
        return np.concatenate([bits.view(f32), *(t.view(f32) for t in ties), rest])


def test_roundings(on_both: Any) -> None:
    """NaN becomes one and the same in 16 bits. In TF32 it is NaN to those who read 19 bits, whatever it carries."""
    x = floats_of_all_kinds()
    outs = np.zeros(x.size, u16), np.zeros(x.size, u16), np.zeros(x.size, u32)
    *sixteen_bit, (gpu, cpu) = on_both("conversions", x, *outs, i32(x.size), grid=4, block=256)
    assert_same_bits(sixteen_bit)
    number = ~np.isnan(x)
    assert_same_bits([(gpu[number], cpu[number])])
    assert np.isnan((gpu[~number] & u32(0xFFFFE000)).view(f32)).all()


def test_widenings_of_all_16_bit_patterns(on_both: Any) -> None:
    bits = np.arange(65536, dtype=u16)
    outs = np.zeros(bits.size, f32), np.zeros(bits.size, f32)
    results = on_both("widenings", bits, *outs, i32(bits.size), grid=4, block=256)
    for gpu, cpu in results:
        number = ~np.isnan(cpu) if cpu.dtype == f32 else np.ones(cpu.shape, bool)
        np.testing.assert_array_equal(gpu[number].view(u16), cpu[number].view(u16))
        assert np.isnan(gpu[~number]).all()  # a float16 NaN's payload is the device's affair


# ---- Memory


def test_copies_of_every_length(on_both: Any) -> None:
    """Two groups; which of them a wait is for; zeros behind the bytes that count."""
    rng = np.random.default_rng(1)
    blocks, threads = 8, 17 * 4
    source = rng.integers(0, 256, (blocks * threads, 16), dtype=np.uint8)
    valid = np.concatenate([rng.permutation(np.repeat(np.arange(17), 4)) for _ in range(blocks)]).astype(i32)
    outs = np.zeros_like(source), np.zeros_like(source)
    words = [x.view(u32) for x in (source, *outs)]
    shape = {"grid": blocks, "block": threads, "shared_bytes": 16 * threads}
    results = list(on_both("copies", words[0], valid, *words[1:], **shape))
    assert_same_bits(results)
    both = results[-1][0].view(np.uint8).reshape(blocks, threads, 16)[:, ::-1].reshape(-1, 16)
    np.testing.assert_array_equal(both, np.where(np.arange(16) < valid[:, None], source, 0))


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_barriers_of_some_warps(on_both: Any, warps: int) -> None:
    out = np.zeros(8 * 512, u32)
    assert_same_bits(on_both("barriers_of_warps", out, i32(warps), grid=8, block=512))


def test_matrix_loads_from_any_rows(on_both: Any) -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        table, rows = rng.integers(0, 65536, (64, 8)).astype(u16), rng.permutation(64)[:32].astype(i32)
        outs = np.zeros((32, 4), u32), np.zeros((32, 4), u32)
        assert_same_bits(on_both("matrix_loads", table.view(u32), rows, *outs))


def test_loads_through_the_cache(on_both: Any) -> None:
    rng = np.random.default_rng(3)
    floats = rng.integers(0, 2**32, 1024, u32).view(f32)
    doubles, words = rng.integers(0, 2**64, 1024, dtype=np.uint64).view(f64), rng.integers(0, 2**32, (1024, 4), u32)
    outs = np.zeros_like(floats), np.zeros_like(doubles), np.zeros_like(words)
    assert_same_bits(on_both("cached_loads", floats, doubles, words, *outs, grid=4, block=256))


# ---- Products


each_kind = pytest.mark.parametrize("kind", KINDS)


def products(kind: str, data: str) -> Products:
    return random_products(kind, data, TILES, 16, 8)


def computed(case: Products, launch: Callable[..., list[NDArray]], **choices: Any) -> NDArray[np.float32]:
    if case.kind == "tf32":
        return launch("products_tf32", case.a, case.b, case.c, grid=TILES, **choices)[-1]
    bits = case.a.view(u16), case.b.view(u16)
    return launch("products_16bit", *bits, case.c, i32(case.kind == "f16"), grid=TILES, **choices)[-1]


@each_kind
@pytest.mark.parametrize("data", DATA)
def test_products(kind: str, data: str, on_gpu: Any, on_cpu: Any) -> None:
    case = products(kind, data)
    exact = case.terms.sum(-1)
    limit = allowed_error(case, exact)
    for result in (computed(case, on_gpu), computed(case, on_cpu), computed(case, on_cpu, truncate=True)):
        error = np.abs(result - exact)
        assert np.all(error <= limit), f"{(error / limit).max():.3g} times its limit"
        if data == "integers":
            np.testing.assert_array_equal(result, exact)


@each_kind
def test_products_of_infinities_and_nan(kind: str, on_gpu: Any, on_cpu: Any) -> None:
    case = with_specials(products(kind, "mixed"))
    gpu, cpu = computed(case, on_gpu), computed(case, on_cpu)
    assert 0.1 < np.isnan(cpu).mean() < 0.9 and np.isinf(cpu).any()
    odd = ~np.isfinite(cpu)
    np.testing.assert_array_equal(gpu[odd], cpu[odd])
    assert np.isfinite(gpu[~odd]).all()


def test_tf32_products_read_no_more_than_19_bits(on_gpu: Any) -> None:
    case = products("tf32", "mixed")
    more = (case.a.view(u32) | u32(0x1FFF)).view(f32)
    np.testing.assert_array_equal(computed(Products("tf32", more, case.b, case.c), on_gpu), computed(case, on_gpu))


@each_kind
def test_how_this_device_adds(kind: str, on_gpu: Any, on_cpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The emulator's truncating products are no more exact than the device's."""
    cases = [products(kind, data) for data in NOT_EXACT]
    gpu = [computed(case, on_gpu) for case in cases]
    truncating = [computed(case, on_cpu, truncate=True) for case in cases]
    emulated = {
        "the emulator, rounding": [computed(case, on_cpu) for case in cases],
        "the emulator, truncating": truncating,
    }
    with capsys.disabled():
        print("\n" + how_it_adds(kind, cases, gpu, emulated))
    assert mean_error(cases, gpu) <= 1.05 * mean_error(cases, truncating)
