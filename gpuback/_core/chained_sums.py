"""Sums over the batch or over the classes, in short chains and in an order that depends on the shape alone.

Adding K numbers one after the other lets rounding errors pile up over K steps. Cut into chains of length ℓ, whose sums
are added afterwards, no number passes through more than ℓ + K/ℓ additions; ℓ ≈ √K makes that about 2√K.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from gpuback._core.typing import Array

ONE_CHAIN = 13
"""Up to this many terms one chain meets the bound: K + 1 ≤ 4√K."""

BLAS_ONE_THREAD = 9000
"""Up to this many numbers in the matrix, no BLAS was seen to split a vector-matrix product between threads."""


def chain_length(terms: int) -> int:
    """Return a power of two within a factor √2 of √terms, so that ℓ + K/ℓ ≤ 2.2 √K."""
    return 1 << (terms.bit_length() // 2)


def bind_sum_columns(x: Array) -> Callable[[Array], object]:
    """Return a function that writes x's sum over the first axis, out_n = Σ_k x_kn, each time it is called.

    A chain is a row of ones times a matrix. BLAS runs that at the speed of memory, `np.sum` over the first axis of a
    narrow array does not. No chain is longer than ℓ, in whatever order BLAS adds.

    Args:
        x: (K, n), C-contiguous or Fortran-contiguous; read anew at each call.

    Returns:
        A function of `out` (n,), of x's dtype.
    """
    terms, width = x.shape
    if not x.flags.c_contiguous:
        return _bind_sum_of_contiguous(x.T)
    if terms <= ONE_CHAIN:
        return _bind_chain(x)
    length = chain_length(terms)
    chains = terms // length
    tail = x[chains * length :]
    has_tail = len(tail) > 0
    partials = np.empty((chains + has_tail, width), x.dtype)
    add_up = _bind_chain(partials)
    ones = np.ones(length, x.dtype)
    if chains * length * width <= BLAS_ONE_THREAD:  # chains side by side, each takes every `chains`-th row
        body, body_sums = x[: chains * length].reshape(length, chains * width), partials[:chains].reshape(-1)
    else:
        body, body_sums = x[: chains * length].reshape(chains, length, width), partials[:chains]
    add_up_chains = partial(ones.dot if body.ndim == 2 else partial(np.matmul, ones), body, body_sums)

    def sum_columns(out: Array) -> None:
        add_up_chains()
        if has_tail:
            np.add.reduce(tail, axis=0, out=partials[chains])
        add_up(out)

    return sum_columns


def _bind_chain(x: Array) -> Callable[[Array], object]:
    """Sum over the first axis of a C-contiguous array, each column in one chain."""
    if x.size > BLAS_ONE_THREAD:
        return lambda out: np.add.reduce(x, axis=0, out=out)
    return partial(np.ones(len(x), x.dtype).dot, x)


def _bind_sum_of_contiguous(rows: Array) -> Callable[[Array], object]:
    """Sum over the second axis of a C-contiguous array (n, K)."""
    width, terms = rows.shape
    length = chain_length(terms)
    chains = terms // length
    if rows.size > BLAS_ONE_THREAD or chains * length < terms:
        return lambda out: np.add.reduce(rows, axis=1, out=out)  # pairwise, 8 chains to a block of 128
    partials, ones, others = (
        np.empty((width, chains), rows.dtype),
        np.ones(length, rows.dtype),
        np.ones(chains, rows.dtype),
    )
    add_up_chains = partial(rows.reshape(-1, length).dot, ones, partials.reshape(-1))

    def sum_rows(out: Array) -> None:
        add_up_chains()
        partials.dot(others, out)

    return sum_rows


def bind_sum_rows(x: Array) -> Callable[[Array], object]:
    """Return a function that writes x's sum over the second axis, out_k = Σ_n x_kn, each time it is called."""
    return bind_sum_columns(x.T)
