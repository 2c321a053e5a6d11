"""Products of tensor cores on data of several kinds, and ways in which they may add: they add as no standard says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

KINDS = {"bf16": (16, ml_dtypes.bfloat16), "f16": (16, np.float16), "tf32": (8, np.float32)}
"""Format → K of one instruction, and the dtype in which operands come."""

DATA = ("mixed", "positive", "of many sizes", "cancelling", "tiny", "integers")
NOT_EXACT = DATA[:4]


@dataclass(frozen=True)
class Products:
    """C (t, m, n) += A (t, m, K) B (t, K, n), with A and B as the operands' format has them."""

    kind: str
    a: NDArray
    b: NDArray
    c: NDArray

    @property
    def terms(self) -> NDArray[np.float64]:
        """(t, m, n, K + 1): the products, each exact, and c."""
        products = self.a.astype(np.float64)[:, :, None, :] * self.b.astype(np.float64).swapaxes(1, 2)[:, None, :, :]
        return np.concatenate([products, self.c.astype(np.float64)[..., None]], axis=-1)


def random_products(kind: str, data: str, tiles: int, m: int, n: int) -> Products:
    depth, dtype = KINDS[kind]
    rng = np.random.default_rng([len(data), *kind.encode()])

    def draw(*shape: int) -> NDArray:
        x = rng.standard_normal(shape)
        if data == "positive":
            x = rng.random(shape)
        if data == "integers":
            x = rng.integers(-8, 9, shape)
        if data in ("of many sizes", "cancelling"):
            x = x * 2.0 ** rng.integers(-5, 6, shape)
        if data == "tiny":  # subnormal operands
            x = x * {"bf16": 2.0**-128, "f16": 2.0**-17, "tf32": 2.0**-128}[kind]
        x = x.astype(dtype)
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) if kind == "tf32" else x

    a, b, c = draw(tiles, m, depth), draw(tiles, depth, n), draw(tiles, m, n).astype(np.float32)
    if data == "tiny":
        b, c = b.astype(np.float64) * (1 if kind == "f16" else 2.0**128), c * np.float32(0.125)
        b = b.astype(dtype)
    if data == "cancelling":
        c = -(a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    return Products(kind, a, b, c)


def with_specials(case: Products) -> Products:
    """The same products with infinities, NaN and zeros among operands and sums."""
    rng = np.random.default_rng(5)
    for x in (case.a, case.b, case.c):
        for value in (np.inf, -np.inf, np.nan, 0.0):
            x[rng.random(x.shape) < 0.02] = value
    return case


def allowed_error(case: Products, exact: NDArray) -> NDArray:
    """Each term is cut off 24 bits below the leading one of the largest, and the sum at its own 24th bit.

    Below 2⁻¹²⁶ float32 has fixed steps.
    """
    terms = case.terms
    return terms.shape[-1] * 2.0**-24 * np.abs(terms).max(-1) + 2.0**-23 * np.abs(exact) + 2.0**-149


# ---- How a device adds


def summed(case: Products, at_a_time: int, bits: int) -> NDArray[np.float32]:
    """c + Σ a b as tensor cores are thought to add: so many products at a time, with what there is already.

    Terms are aligned to the largest, its power of two being the operands' exponents added (their product's leading one
    may stand one higher), cut off so many bits below, summed exactly, and the sum is cut off to float32. Source: the
    models of Li et al., "FTTN", 2024, and Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021.
    """

    def power(x: NDArray) -> NDArray:
        return np.where(x == 0, -9999, np.frexp(x.astype(np.float64))[1] - 1)

    powers = power(case.a)[:, :, None, :] + power(case.b).swapaxes(1, 2)[:, None, :, :]
    terms, total = case.terms[..., :-1], case.terms[..., -1]
    for k in range(0, terms.shape[-1], at_a_time):
        some = np.concatenate([terms[..., k : k + at_a_time], total[..., None]], axis=-1)
        largest = np.maximum(powers[..., k : k + at_a_time].max(-1), power(total))
        unit = 2.0 ** np.maximum(largest - bits, -1000).astype(np.float64)
        total = _cut_off_to_float32(np.trunc(some / unit[..., None]).sum(-1) * unit)
    return total.astype(np.float32)


def _cut_off_to_float32(x: NDArray[np.float64]) -> NDArray[np.float64]:
    nearest = x.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)


def mean_error(cases: Sequence[Products], results: Sequence[NDArray]) -> float:
    """The mean over all sums of |error| / Σ|terms|."""
    terms = [case.terms for case in cases]
    errors = [np.abs(r - t.sum(-1)) / np.abs(t).sum(-1) for r, t in zip(results, terms, strict=True)]
    return float(np.mean(errors))


def how_it_adds(
    title: str, cases: Sequence[Products], device: Sequence[NDArray], emulated: dict[str, list[NDArray]]
) -> str:
    """Say how exact a device's sums are, and which way of adding comes to its very bits.

    Args:
        title: what was asked, e.g. the format.
        cases: what was computed.
        device: its results.
        emulated: results of the emulator, by a name for its way of adding.
    """
    depth = KINDS[cases[0].kind][0]
    ways = dict(emulated)
    for at_a_time in (depth, depth // 2, depth // 4):
        for bits in (23, 24, 25, 26):
            name = f"{at_a_time} products at a time, cut off {bits} bits below the largest"
            ways[name] = [summed(case, at_a_time, bits) for case in cases]
    agreement = {name: _same_bits(way, device) for name, way in ways.items()}
    closest = max(agreement, key=lambda name: agreement[name])
    lines = [f"{title}: mean error of this device {mean_error(cases, device) * 2**24:.3f} · 2⁻²⁴ Σ|terms|"]
    for name in dict.fromkeys([*emulated, closest]):
        error = mean_error(cases, ways[name]) * 2**24
        lines.append(f"    {name}: {error:.3f}; the same bits in {agreement[name]:.2%}")
    return "\n".join(lines)


def _same_bits(some: Sequence[NDArray], others: Sequence[NDArray]) -> float:
    same = [x.view(np.uint32) == y.view(np.uint32) for x, y in zip(some, others, strict=True)]
    return float(np.mean(same))
