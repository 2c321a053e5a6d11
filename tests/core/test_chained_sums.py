"""gpuback._core.chained_sums: exact where the sum is exact, and never a chain longer than 4√K, whatever the data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuback._core.chained_sums import ONE_CHAIN, bind_sum_columns, bind_sum_rows, chain_length

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}
LENGTHS = [*range(1, 70), 100, 127, 128, 129, 255, 1000, 4095, 4097, 20_000, 65_537]


def sum_columns(x: NDArray, order: str) -> NDArray:
    """x's sum over the first axis, from a copy of x in that order of memory; `out` starts as NaN."""
    out = np.full(x.shape[1], np.nan, x.dtype)
    bind_sum_columns(np.array(x, order=order))(out)
    return out


def sum_rows(x: NDArray, order: str) -> NDArray:
    """x's sum over the second axis."""
    out = np.full(len(x), np.nan, x.dtype)
    bind_sum_rows(np.array(x, order=order))(out)
    return out


def assert_short_chains(x: NDArray, order: str) -> None:
    """Terms of one sign: passing through n additions costs at most n·u of what they add up to; n ≤ 4√K by contract."""
    exact = np.array([math.fsum(column) for column in x.T.tolist()])
    limit = 4 * math.sqrt(len(x)) * UNIT_ROUNDOFF[x.dtype.name] * np.abs(exact)
    assert np.all(np.abs(sum_columns(x, order) - exact) <= limit)
    assert np.all(np.abs(sum_rows(x.T, order) - exact) <= limit)


def test_no_chain_is_longer_than_four_roots_of_k() -> None:
    """ℓ + K/ℓ ≤ 4√K, a remainder counting as one more chain; up to ONE_CHAIN all is one chain, from zero."""
    assert all(terms + 1 <= 4 * math.sqrt(terms) for terms in range(1, ONE_CHAIN + 1))
    lengths = [(terms, chain_length(terms)) for terms in range(ONE_CHAIN + 1, 1_000_001)]
    terms, chain = np.array(lengths).T
    assert np.all(chain >= 1)
    assert np.all(chain + -(-terms // chain) <= 4 * np.sqrt(terms))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_a_large_number_swallows_no_more_than_its_chain(dtype: str, order: str) -> None:
    """2/u absorbs each 1 that is added to it alone: the error counts the ones in the large number's chain."""
    for terms in LENGTHS:
        positions = sorted({0, 1 % terms, terms // 3, terms // 2, terms - 1})
        x = np.ones((terms, len(positions)), dtype)
        x[positions, range(len(positions))] = 2 / UNIT_ROUNDOFF[dtype]
        assert_short_chains(x, order)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1 + 2.0**-23, -7e-30])
def test_constants_add_up_within_the_worst_case_bound(value: float, dtype: str, order: str) -> None:
    """Equal terms round the same way step after step: what a long chain does worst."""
    for terms in (*LENGTHS, 1_000_003):
        for width in (1, 2) if terms > 10_000 else (1, 2, 5):
            assert_short_chains(np.full((terms, width), value, dtype), order)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    terms=st.integers(1, 400),
    width=st.integers(1, 40),
    order=st.sampled_from("CF"),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_integer_sums_are_exact(terms: int, width: int, order: str, dtype: str, seed: int) -> None:
    integers = np.random.default_rng(seed).integers(-20_000, 20_001, (terms, width))  # sums stay below 2²³
    assert sum_columns(integers.astype(dtype), order).tolist() == integers.sum(axis=0).tolist()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(65_537, 1), (65_537, 3), (50_001, 40), (1, 300), (1, 1), (13, 7), (14, 7)])
def test_every_row_counts_once(shape: tuple[int, int], order: str) -> None:
    """Row k holds k mod 199: leaving out, repeating or misplacing a chain gives another integer."""
    integers = np.add.outer(np.arange(shape[0]) % 199, np.arange(shape[1]) % 7)
    assert sum_columns(integers.astype(np.float32), order).tolist() == integers.sum(axis=0).tolist()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (4, 1), (1, 9), (5, 13), (5, 14), (3, 300), (2, 20_000), (300, 3), (501, 40)]
)
def test_rows_are_summed_over_the_second_axis(shape: tuple[int, int], order: str) -> None:
    integers = np.random.default_rng(0).integers(-50, 51, shape)
    assert sum_rows(integers.astype(np.float32), order).tolist() == integers.sum(axis=1).tolist()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(3, 2), (40, 3), (43, 1), (300, 5)])
def test_a_bound_sum_reads_its_array_anew(shape: tuple[int, int], order: str) -> None:
    x, out = np.zeros(shape, order=order), np.empty(shape[1])
    add_up = bind_sum_columns(x)
    for value in (1.0, -3.0):
        x[...] = value
        add_up(out)
        assert out.tolist() == [value * shape[0]] * shape[1]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("terms", [5, 100, 4096, 5000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_column(value: float, terms: int, order: str) -> None:
    x = np.ones((terms, 3), np.float32)
    for row in (0, terms - 1):
        poisoned = x.copy()
        poisoned[row, 1] = value
        np.testing.assert_array_equal(sum_columns(poisoned, order), [terms, value, terms])
