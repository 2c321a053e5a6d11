"""Choices by this machine's caches, cores and BLAS: how a batch is cut, who works on it, how to multiply.

How batch and parameters are cut depends on shapes and dtype alone, and not on the number of threads, which take piece
after piece. So results do not depend on it either.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from gpuback._core.integers import ceil_div, round_up
from gpuback._core.precision import Precision
from gpuback._core.threads import ThreadPool, blas_cores, blas_threads

BLOCK_BYTES = 1 << 21
"""The bytes of activations that a block works on: they stay in a core's second- and third-level caches."""

FEWEST_BLOCK_ROWS = 256
"""Products of fewer rows run below BLAS's full rate."""

WORTH_THREADS = 1.2e8
"""A pass with more floating-point operations than this (1 ms of one core) is worth sharing. To wake a thread takes 20
to 60 µs, and a few times a pass a thread waits as long for Python's lock. With 1.0 to 1.1 · 10⁸ operations two threads
took 0.85 to 1.2 times as long as one, with 1.3 to 2.2 · 10⁸ 0.55 to 1, with more 0.55 to 0.85: see
benchmarks/results/shared_steps.json."""

FEWEST_PIECE_ROWS, MOST_PIECE_ROWS, ROW_PIECES, FEWEST_PIECE_FLOPS = 64, 512, 4, 3e7
"""By rows, a batch is cut into `ROW_PIECES`, into two if those had fewer rows or operations than the least, or into
more if in a wide network those had more than `MOST_PIECE_ROWS` rows. For each piece BLAS copies all weights anew. And
threads that make many short calls wait for Python's lock."""

FEWEST_ROWS = 32
"""A smaller batch is not cut by rows."""

PIECE_FLOPS, MOST_PIECES, FEWEST_PIECE_OUTPUTS = 2e7, 8, 32
"""By parameters, W is cut into a power of two of pieces, each of about so many floating-point operations, but of no
fewer rows."""

OPENBLAS_THREADS = 6e5
"""OpenBLAS runs a product on several threads from about this number of floating-point operations on."""

AVX512_CORES = {"skylakex", "cooperlake", "sapphirerapids"}

FEWEST, LARGEST_W, LARGEST_PRODUCT = 32, 9216, 10**6
"""OpenBLAS's AVX-512 kernels for small products take 1.5 times as long for h Wᵀ, where both factors' terms lie along
rows, as for h times a copy of Wᵀ. The copy and its product together take 11 to 24% less with at least `FEWEST` rows and
outputs, at most `LARGEST_W` numbers in W, and at most `LARGEST_PRODUCT` products of two numbers. With the kernels for
other processors they take as much more."""


class Phases(NamedTuple):
    """A batch in two phases.

    Attributes:
        rows: the pieces of the first.
        parameters: the pieces of the second: a layer, counting from 0, and the first row of its W and the row after
            the last. Large ones come first.
        threads: who works on them.
    """

    rows: list[slice]
    parameters: list[tuple[int, int, int]]
    threads: ThreadPool


def plan_phases(
    sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
) -> Phases | None:
    """Cut batch and parameters for two phases; None if the batch goes in blocks with sums of their own, or whole."""
    if precision.reproducible or not is_worth_threads(sizes, batch_size, need_gradient):
        return None
    if goes_in_blocks(sizes, batch_size, precision) or (batch_size < FEWEST_ROWS and not need_gradient):
        return None
    height = ceil_div(batch_size, row_pieces(sizes, batch_size, need_gradient, MOST_PIECE_ROWS))
    rows = [slice(start, min(start + height, batch_size)) for start in range(0, batch_size, height)]
    parameters = []
    for layer, (n_in, n_out) in enumerate(pairwise(sizes)):
        pieces = 1
        while pieces < MOST_PIECES and batch_size * n_in * n_out > PIECE_FLOPS * pieces:
            pieces *= 2
        each = n_out if precision.tf32 else min(n_out, max(FEWEST_PIECE_OUTPUTS, ceil_div(n_out, pieces)))
        parameters += [(layer, first, min(first + each, n_out)) for first in range(0, n_out, each)]
    parameters.sort(key=lambda piece: (piece[1] - piece[2]) * sizes[piece[0]])
    return Phases(rows, parameters, ThreadPool(blas_threads(), blas_alone=True))


def row_pieces(sizes: tuple[int, ...], batch_size: int, need_gradient: bool, most_rows: int) -> int:
    """Return into how many pieces of rows to cut a batch that is worth sharing."""
    if batch_size < FEWEST_ROWS:
        return 1
    most = min(batch_size / FEWEST_PIECE_ROWS, operations(sizes, batch_size, need_gradient) / FEWEST_PIECE_FLOPS)
    return even(max(2, ceil_div(batch_size, most_rows), min(ROW_PIECES, int(most))))


def even(pieces: int) -> int:
    """Round up to a number of pieces that two or four cores can share evenly."""
    return round_up(pieces, 4 if pieces > 4 else min(pieces, 2))


def is_worth_threads(sizes: tuple[int, ...], batch_size: int, need_gradient: bool) -> bool:
    """Whether a pass takes long enough to be shared."""
    return operations(sizes, batch_size, need_gradient) > WORTH_THREADS


def operations(sizes: tuple[int, ...], batch_size: int, need_gradient: bool) -> int:
    """Count the floating-point operations of a pass's products."""
    return (3 if need_gradient else 1) * batch_size * sum(2 * n_in * n_out for n_in, n_out in pairwise(sizes))


def goes_in_blocks(sizes: tuple[int, ...], batch_size: int, precision: Precision) -> bool:
    """Whether blocks, whose activations stay in cache from forward to backward pass, are worth sums of their own.

    They are if sums are no larger than the activations of the whole batch.
    """
    n_parameters = sum(n_out * (n_in + 1) for n_in, n_out in pairwise(sizes))
    return fitting_rows(sizes, precision) >= FEWEST_BLOCK_ROWS and n_parameters <= batch_size * sum(sizes)


def fitting_rows(sizes: tuple[int, ...], precision: Precision) -> int:
    """Return how many rows' activations stay in cache."""
    return BLOCK_BYTES // (precision.accumulator.itemsize * sum(sizes))


def plan_blocks(
    sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
) -> tuple[int, ThreadPool]:
    """Choose how many rows of a batch go through the whole network at a time, and the threads that do it.

    Narrow networks gain when a block's activations stay in cache from the forward pass to the backward pass. Where 256
    rows do not fit, products dominate and do best on many rows. Beyond a few million rows a block grows with √B, so
    that sums over blocks keep to short chains. Several blocks with enough work in them run on as many threads as BLAS
    would use.
    """
    flops = [2 * n_in * n_out for n_in, n_out in pairwise(sizes)]
    fitting = fitting_rows(sizes, precision)
    rows = max(fitting if fitting >= FEWEST_BLOCK_ROWS else 4096, math.isqrt(batch_size) // 2)
    blocks, threads = ceil_div(batch_size, rows), 1
    is_shared = is_worth_threads(sizes, batch_size, need_gradient)
    if is_shared:
        threads = blas_threads()
        blocks = row_pieces(
            sizes, batch_size, need_gradient, min(rows, MOST_PIECE_ROWS) if fitting < FEWEST_BLOCK_ROWS else rows
        )
    rows = ceil_div(batch_size, blocks)  # equal blocks, but for the last
    blas_alone = rows * max(flops) > OPENBLAS_THREADS
    return rows, ThreadPool(min(threads, ceil_div(batch_size, rows)), blas_alone=blas_alone, is_shared=is_shared)


def describe_phases(plan: Phases) -> str:
    """Say what a plan in two phases is, for `explain`."""
    height = plan.rows[0].stop
    return (
        f"in two phases{_on(plan.threads)}: {len(plan.rows)} pieces of up to {height} rows forward and back to all "
        f"da, then {len(plan.parameters)} pieces of W, each summed over the whole batch and updated at once"
    )


def describe_blocks(batch_size: int, rows: int, threads: ThreadPool) -> str:
    """Say what blocks of so many rows are, for `explain`."""
    blocks = ceil_div(batch_size, rows)
    if blocks == 1:
        return "the whole batch at once"
    each = "each forward and backward in turn while it is in cache"
    return f"{blocks} blocks of up to {rows} rows, {each}{_on(threads)}"


def _on(threads: ThreadPool) -> str:
    return f", on {threads.size} threads" if threads.size > 1 else ""


def is_quicker_transposed(rows: int, n_out: int, n_in: int) -> bool:
    """Tell whether to copy Wᵀ and then multiply h by the copy takes less time than h Wᵀ."""
    weights = n_out * n_in
    small = weights <= LARGEST_W and rows * weights <= LARGEST_PRODUCT
    return small and min(rows, n_out) >= FEWEST and not AVX512_CORES.isdisjoint(blas_cores())
