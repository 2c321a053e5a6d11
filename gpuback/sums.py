"""Sums over the batch or over the classes, in short chains and in an order that depends on the shape alone.

Adding K numbers one after the other lets rounding errors pile up over K steps. Cut into chains of length ℓ, whose sums
are added afterwards, no number passes through more than ℓ + K/ℓ additions; ℓ ≈ √K makes that about 2√K.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpuback._typing import Array

SHORT = 13
"""Up to here one chain is short enough: K + 1 ≤ 4√K."""


def chain_length(terms: int) -> int:
    """A power of two within a factor √2 of √terms, so that ℓ + K/ℓ ≤ 2.2 √K."""
    return 1 << (terms.bit_length() // 2)


def bind_sum_columns(x: Array) -> Callable[[Array], None]:
    """A function that writes x's sum over the first axis, out_n = Σ_k x_kn, each time it is called.

    The inner chains are vector-matrix products with a row of ones: that runs at the speed of memory where `np.sum` over
    the first axis of a narrow array does not, and however BLAS orders a product's terms, no chain is longer than ℓ.

    Args:
        x: (K, n), C-contiguous or Fortran-contiguous; read anew at each call.

    Returns:
        A function of `out` (n,), of x's dtype.
    """
    terms, width = x.shape
    if not x.flags.c_contiguous:
        rows = x.T  # each column is contiguous: NumPy adds it pairwise, 8 chains to a block of 128
        return lambda out: np.add.reduce(rows, axis=1, out=out)
    if terms <= SHORT:
        return lambda out: np.add.reduce(x, axis=0, out=out)
    length = chain_length(terms)
    chains = terms // length
    body = x[: chains * length].reshape(chains, length, width)
    tail = x[chains * length :]
    partials = np.empty((chains + (len(tail) > 0), width), x.dtype)
    ones = np.ones(length, x.dtype)
    body_sums = partials[:chains]

    def sum_columns(out: Array) -> None:
        np.matmul(ones, body, out=body_sums)
        if len(tail):
            np.add.reduce(tail, axis=0, out=partials[chains])
        np.add.reduce(partials, axis=0, out=out)

    return sum_columns


def bind_sum_rows(x: Array) -> Callable[[Array], None]:
    """A function that writes x's sum over the second axis, out_k = Σ_n x_kn, each time it is called."""
    return bind_sum_columns(x.T)
