"""Choices by this machine's caches, cores and BLAS: the size of blocks, when to use threads, how to multiply."""

from __future__ import annotations

import math
from itertools import pairwise

from gpuback._core.integers import ceil_div, round_up
from gpuback._core.precision import Precision
from gpuback._core.threads import ThreadPool, blas_cores, blas_threads

BLOCK_BYTES = 1 << 21
"""The bytes of activations that a block works on: they stay in a core's second- and third-level caches."""

WORTH_THREADS = 2e8
"""A step with more floating-point operations than this (2 ms of one core) is worth starting threads for."""

OPENBLAS_THREADS, WORTH_BLAS_THREADS = 6e5, 4e6
"""OpenBLAS runs a product on several threads from about the first number of floating-point operations on. Up to the
second (40 µs of one core) that gains little, and where other programs keep the cores busy, waiting for the second
thread has made steps 40 to 140 times slower."""

AVX512_CORES = {"skylakex", "cooperlake", "sapphirerapids"}

FEWEST, LARGEST_W, LARGEST_PRODUCT = 32, 9216, 10**6
"""OpenBLAS's AVX-512 kernels for small products take 1.5 times as long for h Wᵀ, where both factors' terms lie along
rows, as for h times a copy of Wᵀ. The copy and its product together take 11 to 24% less with at least `FEWEST` rows and
outputs, at most `LARGEST_W` numbers in W, and at most `LARGEST_PRODUCT` products of two numbers. With the kernels for
other processors they take as much more."""


def plan_blocks(sizes: tuple[int, ...], batch_size: int, precision: Precision) -> tuple[int, ThreadPool]:
    """Choose how many rows of a batch go through the whole network at a time, and the threads that do it.

    Narrow networks gain when a block's activations stay in cache from the forward pass to the backward pass. Where 256
    rows do not fit, products dominate and do best on many rows. Beyond a few million rows a block grows with √B, so
    that sums over blocks keep to short chains. Several blocks with enough work in them run on as many threads as BLAS
    would use.
    """
    flops = [2 * n_in * n_out for n_in, n_out in pairwise(sizes)]
    fitting = BLOCK_BYTES // (precision.accumulator.itemsize * sum(sizes))
    rows = max(fitting if fitting >= 256 else 4096, math.isqrt(batch_size) // 2)
    blocks, threads = ceil_div(batch_size, rows), 1
    if blocks > 1 and 3 * batch_size * sum(flops) > WORTH_THREADS:
        threads = blas_threads()
        blocks = min(round_up(blocks, threads), batch_size)
    rows = ceil_div(batch_size, blocks)  # equal blocks, but for the last
    blas_alone = OPENBLAS_THREADS < rows * max(flops) < WORTH_BLAS_THREADS
    return rows, ThreadPool(min(threads, blocks), blas_alone=blas_alone)


def is_quicker_transposed(rows: int, n_out: int, n_in: int) -> bool:
    """Tell whether to copy Wᵀ and then multiply h by the copy takes less time than h Wᵀ."""
    weights = n_out * n_in
    small = weights <= LARGEST_W and rows * weights <= LARGEST_PRODUCT
    return small and min(rows, n_out) >= FEWEST and not AVX512_CORES.isdisjoint(blas_cores())
