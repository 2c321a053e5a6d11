"""Compute sums and norms exactly but for one rounding, so that their bits depend on no order and no backend.

Let 2ᵉ be the smallest power of two above the largest |x|. Every term becomes a fixed-point number with 63 bits below
2ᵉ,

    sum:   V = Σ rint(2⁶³ x 2⁻ᵉ),     Σ x    = 2ᵉ 2⁻⁶³ V
    norm:  V = Σ rint(2⁶³ (x 2⁻ᵉ)²),  √Σ x²  = 2ᵉ √(2⁻⁶³ V)

with V, an integer, rounded to float64 once. A square is float64's: exact for x in float32, else rounded.

Why V is exact. A term t, smaller than 1, is cut: u = 2³⁸ t, l = rint(u), r = 2²⁵ (u − l). Nothing is rounded but l:
factors are powers of two, and u − l is a multiple of u's last bit and not longer than u. So 2²⁵ l + rint(r) is 2⁶³ t
rounded to an integer (ties to even too, for 2²⁵ l is even). The l are integers up to 2³⁸: `TERMS_AT_ONCE` = 2¹⁴ of them
add up to 2⁵² at most, and float64 adds integers exactly, in any order, as long as every sum is below 2⁵³. So do the
rint(r), up to 2²⁴ each. The sums of so many terms are added as Python's integers. kernels/exact/exact_sums.cu cuts each
term into three limbs of 21 bits, whose sums are exact for up to 2³¹ terms, and gets the same V.

Error. Each term is off by 2⁻⁶⁴ 2ᵉ ≤ 2⁻⁶³ max|x| at most: the sum by n 2⁻⁶³ max|x|, and by the rounding of V. For the
norm, Σ (x 2⁻ᵉ)² ≥ ¼ makes that n 2⁻⁶³ of the result, and the roundings of V, of the root and (in float64) of the
squares 2⁻⁵³ each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gpuback._core.typing import Array

TERMS_AT_ONCE = 1 << 14
"""The number of terms that are cut at a time: more might not add up exactly, and would not stay in the cache."""

UPPER, LOWER = 38, 25
"""Bits of the two parts that a term is cut into."""


def norm(*arrays: Array) -> float:
    """√Σ x² over all of x, given in parts (n,), without overflow or underflow; NaN or infinity where an element is."""
    largest = _largest(arrays)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    exponent = math.frexp(largest)[1]
    return _times_power(math.sqrt(_total(arrays, exponent, squares=True)), exponent)


def exact_sum(array: Array) -> float:
    """Σ x of x (n,); NaN where an element is infinite or NaN."""
    largest = _largest([array])
    if not math.isfinite(largest):
        return math.nan
    exponent = math.frexp(largest)[1]
    return _times_power(_total([array], exponent, squares=False), exponent)


def _largest(arrays: Sequence[Array]) -> float:
    """max |x|; NaN wins."""
    sizes = [float(max(np.max(array), -np.min(array))) for array in arrays]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes)


def _total(arrays: Sequence[Array], exponent: int, *, squares: bool) -> float:
    """2⁻⁶³ V, rounded once."""
    scale = UPPER // 2 - exponent if squares else UPPER - exponent
    halves = (2.0 ** (scale // 2), 2.0 ** (scale - scale // 2))  # float64 may not hold 2**scale itself
    scratch = np.empty((2, min(TERMS_AT_ONCE, max(map(len, arrays)))))
    total = 0
    for part in (x[start : start + TERMS_AT_ONCE] for x in arrays for start in range(0, len(x), TERMS_AT_ONCE)):
        rest, limb = scratch[:, : len(part)]
        np.copyto(rest, part)
        for half in halves:
            np.multiply(rest, half, out=rest)
        if squares:
            np.multiply(rest, rest, out=rest)
        np.rint(rest, out=limb)
        upper = int(np.add.reduce(limb))
        np.subtract(rest, limb, out=rest)
        np.multiply(rest, 2.0**LOWER, out=rest)
        np.rint(rest, out=rest)
        total += (upper << LOWER) + int(np.add.reduce(rest))
    return math.ldexp(total, -(UPPER + LOWER))


def _times_power(value: float, exponent: int) -> float:
    """value · 2^exponent, infinite where float64 cannot hold it."""
    half = exponent // 2
    return value * 2.0**half * 2.0 ** (exponent - half)
