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
    views_of, add_up = plan_sum_columns(x)
    return partial(add_up, *views_of(x))


def plan_sum_columns(like: Array) -> tuple[Callable[[Array], tuple[Array, ...]], Callable[..., object]]:
    """Do what can be done for `bind_sum_columns` before x is known, from an array of its shape, dtype and order.

    Returns:
        views_of, add_up: `add_up(*views_of(x), out)` writes x's sum.
    """
    terms, width = like.shape
    if not like.flags.c_contiguous:
        return _plan_sum_of_contiguous(like.T)
    if terms <= ONE_CHAIN:
        return _itself, _plan_chain(like)
    length = chain_length(terms)
    chains = terms // length
    chained = chains * length
    has_tail = chained < terms
    partials = np.empty((chains + has_tail, width), like.dtype)
    chains_of_partials, last, sum_partials = partials[:chains], partials[-1], _plan_chain(partials)
    ones = np.ones(length, like.dtype)
    add_up_chains: Callable[..., object] = partial(np.matmul, ones)
    shape: tuple[int, ...] = (chains, length, width)
    if chained * width <= BLAS_ONE_THREAD:  # chains side by side, each takes every `chains`-th row
        add_up_chains, shape, chains_of_partials = ones.dot, (length, chains * width), chains_of_partials.reshape(-1)

    def views_of(x: Array) -> tuple[Array, ...]:
        return (x[:chained].reshape(shape), x[chained:]) if has_tail else (x.reshape(shape),)

    def add_up(body: Array, out: Array) -> None:
        add_up_chains(body, chains_of_partials)
        sum_partials(partials, out)

    def add_up_with_tail(body: Array, tail: Array, out: Array) -> None:
        np.add.reduce(tail, axis=0, out=last)
        add_up(body, out)

    return views_of, add_up_with_tail if has_tail else add_up


def _itself(x: Array) -> tuple[Array]:
    return (x,)


def _plan_chain(like: Array) -> Callable[[Array, Array], object]:
    """Sum over the first axis of a C-contiguous array, each column in one chain."""
    if like.size > BLAS_ONE_THREAD:
        return lambda x, out: np.add.reduce(x, axis=0, out=out)
    return np.ones(len(like), like.dtype).dot


def _plan_sum_of_contiguous(
    like: Array,
) -> tuple[Callable[[Array], tuple[Array, ...]], Callable[[Array, Array], object]]:
    """Sum over the second axis of a C-contiguous array (n, K), for views of its transpose."""
    width, terms = like.shape
    length = chain_length(terms)
    chains = terms // length
    if like.size > BLAS_ONE_THREAD or chains * length < terms:  # pairwise, 8 chains to a block of 128
        return lambda x: (x.T,), lambda rows, out: np.add.reduce(rows, axis=1, out=out)
    partials, ones, others = (
        np.empty((width, chains), like.dtype),
        np.ones(length, like.dtype),
        np.ones(chains, like.dtype),
    )
    sums_of_chains = partials.reshape(-1)

    def views_of(x: Array) -> tuple[Array]:
        return (x.T.reshape(-1, length),)

    def add_up(body: Array, out: Array) -> None:
        body.dot(ones, sums_of_chains)
        partials.dot(others, out)

    return views_of, add_up


def bind_sum_rows(x: Array) -> Callable[[Array], object]:
    """Return a function that writes x's sum over the second axis, out_k = Σ_n x_kn, each time it is called."""
    return bind_sum_columns(x.T)
