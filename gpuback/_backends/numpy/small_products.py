"""Small products h Wᵀ, of which some BLAS kernels make more work than others."""

from __future__ import annotations

from gpuback._backends.numpy.threads import blas_cores

AVX512_CORES = {"skylakex", "cooperlake", "sapphirerapids"}

FEWEST, LARGEST_W, LARGEST_PRODUCT = 32, 9216, 10**6
"""OpenBLAS's AVX-512 kernels for small products take 1.5 times as long for h Wᵀ, where both factors' terms lie along
rows, as for h times a copy of Wᵀ. With at least so many rows and outputs, at most so many numbers in W, and at most so
many products of two numbers, the copy and its product together take 11 to 24% less; with the kernels for other
processors, as much more."""


def is_quicker_transposed(rows: int, n_out: int, n_in: int) -> bool:
    """Whether to copy Wᵀ, and then h times that, takes less time than h Wᵀ."""
    weights = n_out * n_in
    small = weights <= LARGEST_W and rows * weights <= LARGEST_PRODUCT
    return small and min(rows, n_out) >= FEWEST and not AVX512_CORES.isdisjoint(blas_cores())
