"""Every function of kernels/common/ptx_sm90.cuh, on a GPU and in the emulator, held to what NumPy says must come out.

Operands of products are laid out in shared memory by this module, from the description in ptx_sm90.cuh alone. Tensor
cores add as no standard says: their sums are held to bounds, and it is printed (pytest -s) which way of adding comes to
the very bits of this device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from support.requirements import require_emulator, require_gpu, require_nvrtc
from support.tensor_core_sums import (
    DATA,
    NOT_EXACT,
    Products,
    allowed_error,
    how_it_adds,
    mean_error,
    random_products,
    with_specials,
)

from gpuback._cuda.compiler import compile_variant
from gpuback._cuda.device import CudaLauncher
from gpuback._cuda.launch import DeviceLimits, LaunchPlan, TensorMap, Variant
from gpuback._cuda.launch import Launcher as AnyLauncher

FOLDER = Path(__file__).parent / "kernels"
HOPPER = DeviceLimits((9, 0), 232448, 132, wgmma=True)
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
i32, u16, u32, f32 = np.int32, np.uint16, np.uint32, np.float32


@dataclass(frozen=True)
class Machine:
    """A GPU, or the emulator."""

    launcher: AnyLauncher
    to_device: Callable[[NDArray], Any]
    to_host: Callable[[Any], NDArray]

    def run(
        self,
        source: str,
        entry: str,
        /,
        *,
        defines: tuple[str, ...] = (),
        grid: int = 1,
        block: int = 128,
        shared_bytes: int = 0,
        cluster: int = 1,
        **arguments: Any,
    ) -> dict[str, NDArray]:
        """Launch a kernel, and return its arrays as it leaves them. Maps are of arrays, which come back too."""
        given = {name: self._given(value) for name, value in arguments.items()}
        variant = Variant(source, entry, defines, wgmma=True)
        self.launcher.bind(LaunchPlan(variant, grid, block, shared_bytes, cluster), **given)()
        arrays = {name: x.array if isinstance(x, TensorMap) else x for name, x in given.items()}
        return {name: self.to_host(x) for name, x in arrays.items() if hasattr(x, "shape") and x.shape}

    def _given(self, value: Any) -> Any:
        if isinstance(value, TensorMap):
            return value._replace(array=self.to_device(value.array))
        return self.to_device(value) if isinstance(value, np.ndarray) else value


def gpu() -> Machine:
    require_gpu()
    import cupy

    launcher = CudaLauncher(folder=FOLDER)
    if launcher.limits.capability != HOPPER.capability:
        pytest.skip("needs a GPU of compute capability 9.0")
    return Machine(launcher, cupy.asarray, cupy.asnumpy)


def emulator(**choices: Any) -> Machine:
    require_emulator()
    from emulator import EmulatorLauncher

    launcher = EmulatorLauncher("random", folder=FOLDER, limits=HOPPER, copies="random", **choices)
    return Machine(launcher, np.copy, lambda x: x)


@pytest.fixture(
    scope="module",
    params=[pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("emulator", marks=pytest.mark.thorough)],
)
def machine(request: pytest.FixtureRequest) -> Machine:
    return gpu() if request.param == "gpu" else emulator(truncate=True, checked=True)


# ---- Operands of products


@dataclass
class Image:
    """What shared memory holds: panels, each beginning at a multiple of 1024 bytes."""

    swizzle: int
    panels: list[NDArray] = field(default_factory=list)
    size: int = 0

    def add(self, matrix: NDArray) -> tuple[int, int]:
        """Lay a matrix out in panels of `swizzle` bytes a row. Returns where it begins, and the bytes of a panel."""
        start, width = self.size, self.swizzle // 2
        rows, columns = matrix.shape
        for first in range(0, columns, width):
            part = np.zeros((rows, width), u16)
            part[:, : min(width, columns - first)] = matrix.view(u16)[:, first : first + width]
            self.panels.append(laid_out(part))
            self.size += self.panels[-1].nbytes
        return start, self.panels[-1].nbytes

    @property
    def words(self) -> NDArray[np.uint32]:
        return np.concatenate(self.panels).view(u32)


def laid_out(part: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """A panel as it lies in memory: row after row, 16-byte chunks permuted; zeros up to a multiple of 1024 bytes."""
    rows, width = part.shape
    row, chunk = np.divmod(np.arange(rows * width // 8), width // 8)
    # Bits 4 to 6 of an address take part in the 128-byte swizzle, 4 and 5 in that of 64, with those three above.
    place = chunk ^ (row % 8 if width == 64 else row // 2 % 4)
    out = np.zeros((-(-rows * width // 512) * 64, 8), u16)
    out[row * (width // 8) + place] = part.reshape(-1, 8)
    return out.ravel()


def k_major(image: Image, matrix: NDArray) -> list[int]:
    """An operand whose rows of a panel are its rows or columns, K along them. Returns the numbers of an Operand."""
    start, _ = image.add(matrix)
    return [start, 32, 16, 0, 8 * image.swizzle]


def mn_major(image: Image, matrix_k: NDArray) -> list[int]:
    """An operand given as its transpose, whose rows are K."""
    start, panel = image.add(matrix_k)
    return [start, 16 * image.swizzle, panel, 0, 8 * image.swizzle]


def small_integers(rng: np.random.Generator, kind: str, *shape: int) -> NDArray:
    """Products of these, and sums of a few hundred, are exact."""
    return rng.integers(-8, 9, shape).astype(DTYPES[kind])


PRODUCTS = "ptx_sm90_products.cu", "products"


def _defines(n: int, kind: str) -> tuple[str, str]:
    return f"WIDTH={n}", f"FORMAT={kind}"


def multiply(
    machine: Machine,
    image: Image,
    operands: Sequence[Sequence[int]],
    c: NDArray[np.float32],
    *,
    kind: str = "bf16",
    transposes: tuple[int, int] = (0, 0),
    a_rows: NDArray | None = None,
    steps: int = 1,
    accumulate: int = 1,
) -> NDArray[np.float32]:
    """C (64, N) (+)= A B. A comes from the image, or through registers from `a_rows`."""
    words, n = image.words, c.shape[-1]
    return machine.run(
        *PRODUCTS,
        defines=_defines(n, kind),
        shared_bytes=words.nbytes,
        images=words,
        packs=i32(words.nbytes // 16),
        operands=np.array(operands, u32).ravel(),
        swizzle=i32(image.swizzle),
        transpose_a=i32(transposes[0]),
        transpose_b=i32(transposes[1]),
        a_mk=None if a_rows is None else np.ascontiguousarray(a_rows).view(u32),
        c_mn=c,
        steps=i32(steps),
        accumulate=i32(accumulate),
    )["c_mn"]


WIDTHS = (8, 32, 40, 64, 72, 128, 192, 256)
BOTH_FORMATS = [*((n, "bf16") for n in WIDTHS), (64, "f16")]


@pytest.mark.parametrize("swizzle", [128, 64])
@pytest.mark.parametrize("n, kind", BOTH_FORMATS)
def test_products_of_every_width_and_layout(n: int, kind: str, swizzle: int, machine: Machine) -> None:
    """K along a panel's rows or down them, for A and for B; A in registers too; with and without earlier sums."""
    rng = np.random.default_rng(n)
    k = swizzle // 2
    a, b = small_integers(rng, kind, 64, k), small_integers(rng, kind, k, n)
    c = rng.integers(-99, 99, (64, n)).astype(f32)
    product = a.astype(f32) @ b.astype(f32)
    for transpose_b, accumulate in ((0, 1), (1, 0)):
        expected = product + accumulate * c
        for transpose_a in (0, 1):
            image = Image(swizzle)
            of_a = mn_major(image, a.T.copy()) if transpose_a else k_major(image, a)
            of_b = mn_major(image, b) if transpose_b else k_major(image, b.T.copy())
            options: dict[str, Any] = {"kind": kind, "steps": k // 16, "accumulate": accumulate}
            transposes = transpose_a, transpose_b
            result = multiply(machine, image, (of_a, of_b), c, transposes=transposes, **options)
            np.testing.assert_array_equal(result, expected, f"SS, transposes {transposes}")
        result = multiply(machine, image, (of_a, of_b), c, transposes=(0, transpose_b), a_rows=a, **options)
        np.testing.assert_array_equal(result, expected, f"RS, transpose {transpose_b}")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("n, swizzle", [(72, 128), (40, 64)])
def test_the_last_columns_come_from_a_panel_elsewhere(n: int, swizzle: int, before: bool, machine: Machine) -> None:
    """The leading offset reaches to a panel of 16 rows, the same at each step, behind B's own panel or before it."""
    rng = np.random.default_rng(n)
    k, width = 64, swizzle // 2
    a, b = small_integers(rng, "bf16", k, 64), small_integers(rng, "bf16", k, width)
    more = small_integers(rng, "bf16", 16, n - width)
    image = Image(swizzle)
    if before:
        elsewhere, _ = image.add(more)
    of_a, of_b = mn_major(image, a), mn_major(image, b)
    if not before:
        image.add(small_integers(rng, "bf16", 16, width))  # a panel that is not meant
        elsewhere, _ = image.add(more)
    start, step = of_b[:2]
    of_b[2:4] = elsewhere - start & 0xFFFFFFFF, -step & 0xFFFFFFFF
    c = np.zeros((64, n), f32)
    result = multiply(machine, image, (of_a, of_b), c, transposes=(1, 1), steps=k // 16)
    all_of_b = np.hstack([b, np.tile(more, (k // 16, 1))])
    np.testing.assert_array_equal(result, a.T.astype(f32) @ all_of_b.astype(f32))


@pytest.mark.parametrize("n", [32, 40])
def test_a_leading_offset_of_0_repeats_a_panel(n: int, machine: Machine) -> None:
    """A of 32 rows, in panels of 64 bytes a row, fills the 64 rows of a product twice."""
    rng = np.random.default_rng(n)
    a, b = small_integers(rng, "bf16", 64, 32), small_integers(rng, "bf16", 64, n)
    image = Image(64)
    of_a, of_b = mn_major(image, a), mn_major(image, b)
    of_a[2] = 0
    result = multiply(machine, image, (of_a, of_b), np.zeros((64, n), f32), transposes=(1, 1), steps=4)
    np.testing.assert_array_equal(result, np.tile(a.T.astype(f32) @ b.astype(f32), (2, 1)))


@pytest.mark.thorough
def test_kernels_compile_where_there_is_no_gpu() -> None:
    require_nvrtc("sm_90a")
    variants = [Variant(*PRODUCTS, _defines(n, kind)) for n, kind in BOTH_FORMATS]
    variants += [Variant("ptx_sm90_copies.cu", "boxes")]  # with all others of the file
    for variant in variants:
        assert compile_variant(variant, "sm_90a", folder=FOLDER).resources.spill_store_bytes == 0


# ---- Sums of products

TILES = 6
FORMATS = tuple(DTYPES)


def computed(machine: Machine, case: Products, *, registers: bool = False) -> NDArray[np.float32]:
    """One instruction, K = 16, for each tile."""
    results = []
    for a, b, c in zip(case.a, case.b, case.c, strict=True):
        image = Image(128)
        wide = [np.hstack([part, np.zeros((64, 48), part.dtype)]) for part in (a, b.T)]
        operands = [k_major(image, part) for part in wide]
        options = {"kind": case.kind, "a_rows": a if registers else None}
        results.append(multiply(machine, image, operands, c, **options))  # type: ignore[arg-type]
    return np.stack(results)


def products(kind: str, data: str) -> Products:
    return random_products(kind, data, TILES, 64, 64)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("data", DATA)
def test_sums(kind: str, data: str, machine: Machine) -> None:
    """Operands in registers give the same bits as in shared memory."""
    case = products(kind, data)
    exact = case.terms.sum(-1)
    limit = allowed_error(case, exact)
    result = computed(machine, case)
    error = np.abs(result - exact)
    assert np.all(error <= limit), f"{(error / limit).max():.3g} times its limit"
    if data == "integers":
        np.testing.assert_array_equal(result, exact)
    assert computed(machine, case, registers=True).tobytes() == result.tobytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_sums_of_infinities_and_nan(kind: str, machine: Machine) -> None:
    case = with_specials(products(kind, "mixed"))
    with np.errstate(invalid="ignore"):
        exact = case.terms.sum(-1)
    assert 0.1 < np.isnan(exact).mean() < 0.9 and np.isinf(exact).any()
    odd, result = ~np.isfinite(exact), computed(machine, case)
    np.testing.assert_array_equal(result[odd], exact[odd].astype(f32))
    assert np.isfinite(result[~odd]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
def test_how_this_device_adds(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The emulator's truncating products are no more exact than the device's."""
    device = gpu()
    cases = [products(kind, data) for data in NOT_EXACT]
    results = [computed(device, case) for case in cases]
    ways = {"rounding": emulator(), "truncating": emulator(truncate=True, checked=True)}
    emulated = {f"the emulator, {way}": [computed(one, case) for case in cases] for way, one in ways.items()}
    with capsys.disabled():
        print("\n" + how_it_adds(f"wgmma, {kind}", cases, results, emulated))
    assert mean_error(cases, results) <= 1.05 * mean_error(cases, emulated["the emulator, truncating"])


# ---- Copies of boxes


def boxed(matrix: NDArray, column: int, row: int, box: tuple[int, int]) -> NDArray:
    """The part of a matrix in a box that begins there, zeros outside."""
    columns, rows = box
    out = np.zeros((rows, columns), matrix.dtype)
    height, width = matrix.shape
    top, left = max(row, 0), max(column, 0)
    inside = matrix[top : max(min(row + rows, height), top), left : max(min(column + columns, width), left)]
    out[top - row :, left - column :][: inside.shape[0], : inside.shape[1]] = inside
    return out


def overwrite(matrix: NDArray, part: NDArray, column: int, row: int) -> None:
    """Put a part where it lies inside the matrix."""
    for r, c in np.ndindex(part.shape):
        if 0 <= row + r < matrix.shape[0] and 0 <= column + c < matrix.shape[1]:
            matrix[row + r, column + c] = part[r, c]


@pytest.mark.parametrize("box", [(64, 16), (64, 37), (32, 24)], ids=str)
def test_copies_of_boxes(box: tuple[int, int], machine: Machine) -> None:
    """Across every edge of ragged matrices. A box's place in the target is left out where it lies outside."""
    rng = np.random.default_rng(box)
    swizzle = 2 * box[0]
    pitched_x, pitched_y = (rng.integers(1, 65535, shape).astype(u16) for shape in ((37, 104), (150, 200)))
    x, y = pitched_x[:, :100], pitched_y[:141, :190]  # pitches are multiples of 8 elements
    sources = [(0, 0), (64, 16), (96, 32), (-8, -3), (128, 5), (3, 40), (37, 36), (1, -16)]
    targets = [(0, 0), (130, 0), (-5, 50), (70, 50), (137, 50), (60, 110), (130, 120), (200, 0)]
    rows = -(-box[1] * swizzle // 1024) * 1024 // swizzle
    result = machine.run(
        "ptx_sm90_copies.cu",
        "boxes",
        shared_bytes=rows * swizzle + 16,
        source=TensorMap(pitched_x, 100, 37, 104, box, "bfloat16", swizzle),
        target=TensorMap(pitched_y, 190, 141, 200, box, "float16", swizzle),
        images=np.zeros((len(sources), box[1] * swizzle // 4), u32),
        bytes=i32(box[1] * swizzle),
        places=np.hstack([sources, targets]).astype(i32),
        count=i32(len(sources)),
    )
    expected = pitched_y.copy()
    for image, source, target in zip(result["images"], sources, targets, strict=True):
        part = boxed(x, *source, box)
        np.testing.assert_array_equal(image.view(u16), laid_out(part)[: part.size], str(source))
        overwrite(expected[: y.shape[0], : y.shape[1]], ~part, *target)
    np.testing.assert_array_equal(result["target"], expected)
    np.testing.assert_array_equal(result["source"], pitched_x)


# ---- Parts of a block, clusters


@pytest.mark.parametrize("count", [1, 4, 29])
def test_a_pipeline_of_warpgroups(count: int, machine: Machine) -> None:
    """Barriers in shared memory, registers moved between warpgroups, a lane that acts for its warp, bar.arrive."""
    rng = np.random.default_rng(count)
    x = rng.integers(0, 65536, (count * 64, 64)).astype(u16)
    result = machine.run(
        "ptx_sm90_copies.cu",
        "pipeline",
        block=384,
        shared_bytes=4 * 8192 + 64,
        source=TensorMap(x, 64, len(x), 64, (64, 64), "bfloat16"),
        sums=np.zeros((2, 128), u32),
        elected=np.zeros(1, u32),
        count=i32(count),
    )
    expected = np.zeros((2, 128), u32)
    for n, box in enumerate(x.reshape(count, 64, 64)):
        expected[n % 2] += laid_out(box).view(u32).reshape(-1, 128).sum(0, dtype=u32)
    np.testing.assert_array_equal(result["sums"], expected)
    assert result["elected"] == 1


def test_sums_of_clusters(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    clusters = 40
    x = rng.integers(-99, 99, (clusters, 4, 64, 4)).astype(f32)
    result = machine.run(
        "ptx_sm90_copies.cu",
        "sums_of_clusters",
        grid=4 * clusters,
        block=64,
        shared_bytes=1024,
        cluster=4,
        x=x,
        sums=np.zeros_like(x),
        ranks=np.full((clusters, 4, 64), -1, i32),
    )
    total = sum(np.roll(x[:, rank], -rank, axis=1) for rank in range(4))
    np.testing.assert_array_equal(result["sums"], np.repeat(total[:, None], 4, axis=1))
    np.testing.assert_array_equal(result["ranks"], np.broadcast_to(np.arange(4)[None, :, None], (clusters, 4, 64)))


# ---- Fragments, and pairs of numbers


def test_matrix_stores_to_any_rows(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        fragments, rows = rng.integers(0, 2**32, (32, 4), u32), rng.permutation(64)[:32].astype(i32)
        result = machine.run(
            "ptx_sm90_copies.cu",
            "matrix_stores",
            block=32,
            shared_bytes=1024,
            fragments=fragments,
            rows=rows,
            table=np.ones((64, 4), u32),
            back=np.zeros((32, 4), u32),
        )
        table = np.zeros((64, 4), u32)
        table[rows] = fragments.reshape(8, 4, 4).transpose(2, 0, 1).reshape(32, 4)  # lane 4 r + t, matrix i
        np.testing.assert_array_equal(result["table"], table)
        np.testing.assert_array_equal(result["back"], fragments)


def assert_same_numbers(bits: NDArray, expected: NDArray) -> None:
    """The same bits, but for the payload of NaN."""
    result = bits.view(expected.dtype)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(result.view(u16)[number], expected.view(u16)[number])


def pairs_kernel(machine: Machine, entry: str, n: int, **arguments: Any) -> dict[str, NDArray]:
    return machine.run("ptx_sm90_copies.cu", entry, grid=2, block=256, n=i32(n), **arguments)


def test_roundings_of_pairs(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 20_000, u32).view(f32)
    near = (rng.standard_normal(20_000) * 2.0 ** rng.integers(-30, 20, 20_000)).astype(f32)
    ties = (near.view(u32) & u32(0xFFFF0000) | u32(0x8000)).view(f32)
    x = np.concatenate([x, near, ties, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65519.996, 65520.0, 3.4e38], f32)])
    n = x.size // 2
    pairs = pairs_kernel(machine, "pairs_of_floats", n, x=x, pairs=np.zeros((2, n), u32))["pairs"]
    with np.errstate(all="ignore"):
        expected = [x.astype(dtype) for dtype in DTYPES.values()]
    for bits, numbers in zip(pairs, expected, strict=True):
        assert_same_numbers(bits, numbers)


def test_comparisons_and_products_of_pairs(machine: Machine) -> None:
    rng = np.random.default_rng(1)
    bits = [rng.integers(0, 65536, 20_000).astype(u16) for _ in range(2)]
    bits[1][:2000] = bits[0][:2000]  # equal ones
    bits[1][2000:4000] = bits[0][2000:4000] ^ 0x8000  # among them 0 and −0, perhaps
    bits[0][:4], bits[1][:4] = (0, 0x8000, 0, 0x8000), (0x8000, 0, 0, 0x8000)
    n = bits[0].size // 2
    a, b = (x.view(u32) for x in bits)
    outs = {name: np.zeros((2, n), u32) for name in ("greater", "product")}
    result = pairs_kernel(machine, "pairs_of_pairs", n, a=a, b=b, **outs)
    for row, dtype in enumerate(DTYPES.values()):
        x, y = (part.view(dtype) for part in bits)
        with np.errstate(all="ignore"):
            greater = (x > y).astype(dtype)
            product = (x.astype(f32) * y.astype(f32)).astype(
                dtype
            )  # exact in float32, unless it is below bfloat16's too
        assert_same_numbers(result["greater"][row], greater)
        assert_same_numbers(result["product"][row], product)
