"""The products of a layer with `reproducible=True` on NumPy: few passes, over slices that stay in cache, on every core.

`products.py` says what is computed, and why its bits depend on no order. Here a batch is cut into chunks of rows. A
chunk is split, multiplied and finished by one worker while it is in cache. Inside a chunk every matrix lies feature by
feature: x is (K, R), with the R rows of the batch along contiguous memory. So the scales of the rows, the scales of the
features and sums of either kind are all long vector operations. With A (M, K) for W or Wᵀ,

    P = A₁ x₁,    Q = [A₂ A₁] [x₁; x₂],    C = σ_i τ_j 2⁻²ˢ (P + 2⁻ˢ Q)

Q is one product with 2K terms: each is an integer of at most 2²ˢ⁻¹, so all of its partial sums stay within K 2²ˢ ≤ 2⁵³.
For dW, slices of da and h lie in one matrix (nO + nI, R), which is split in one go by the scales of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuback._backends.exact import products
from gpuback._backends.exact.layers import Multiply
from gpuback._backends.exact.numpy_finish import ELEMENTS_AT_ONCE, Buffers, Finish, parts
from gpuback._core.activations import Activation
from gpuback._core.integers import ceil_div
from gpuback._core.precision import Precision
from gpuback._core.scratch import aligned_empty
from gpuback._core.threads import ThreadPool, blas_threads
from gpuback._core.typing import Array

FEWEST_ROWS = 512
"""Products of fewer rows than these run below BLAS's full rate where layers are wide."""

WORTH_THREADS = 5e6
"""A product of more multiplications than this (0.7 ms of one core with all that belongs to it) is worth threads."""

EXPONENT = np.int64(0x7FF << 52)
"""The bits of a float64's exponent."""

SMALLEST = 2.0**-149
"""Stands for the largest magnitude of a row of zeros: any number serves."""


def rows_at_once(widest: int) -> int:
    """Return how many rows of a batch to work on at a time."""
    return min(products.BLOCK, max(ELEMENTS_AT_ONCE // widest, min(FEWEST_ROWS, ELEMENTS_AT_ONCE // 64)))


def pool_for(multiplications: int, chunks: int) -> ThreadPool:
    """Choose threads for an operation of so many multiplications, in so many chunks."""
    if chunks > 1 and multiplications > WORTH_THREADS:
        return ThreadPool(min(blas_threads(), chunks), blas_alone=True)
    return ThreadPool(1, blas_alone=False)


class ExactWork:
    """What the layers of one network share, for batches of so many rows.

    Attributes:
        chunks: the rows that are worked on at a time.
    """

    def __init__(self, rows: int, sizes: tuple[int, ...], precision: Precision, multiply: Multiply) -> None:
        products.require_exact_sums(rows, sizes)
        self.multiply, self.precision = multiply, precision
        at_once = rows_at_once(max(sizes))
        workers = blas_threads()
        if rows > at_once:
            at_once = min(at_once, ceil_div(rows, min(workers, rows)))
        self.rows = rows
        self.chunks = [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]
        self._buffers = [Buffers() for _ in range(workers)]

    def pool(self, multiplications: int) -> ThreadPool:
        """Return the pool for an operation of so many multiplications."""
        return pool_for(multiplications, len(self.chunks))

    def buffers(self, worker: int) -> Buffers:
        return self._buffers[worker]


class Scales:
    """The scales of a matrix's rows or columns: of each, σ 2⁻ˢ and its inverse, σ the power of two above `largest`.

    Where `largest` is not finite, they are ∞ and 0: slices are 0 or NaN, and σ times any sum of them is NaN.

    Attributes:
        largest: the largest magnitudes, float32, at least `SMALLEST`, from which `update` computes the others.
    """

    def __init__(self, count: int, bits: int) -> None:
        self.largest = np.empty(count, np.float32)
        self.unit, self.inverse = np.empty((2, count))
        self._exponents = self.unit.view(np.int64)
        self._factor = np.array(2.0 ** (1 - bits))

    def update(self) -> None:
        np.copyto(self.unit, self.largest)
        np.bitwise_and(self._exponents, EXPONENT, out=self._exponents)  # σ/2
        np.multiply(self.unit, self._factor, out=self.unit)
        np.divide(1.0, self.unit, out=self.inverse)


def bind_split(first: Array, second: Array, inverse: Array, bits: int) -> Callable[[], None]:
    """Return a function that cuts the numbers in `second` into slices.

    Args:
        first, second: (n, m); a₁ and a₂ are written there.
        inverse: 2ˢ/σ, of a shape that broadcasts to theirs.
    """
    power = np.array(2.0**bits)
    inverse = np.broadcast_to(inverse, first.shape) if inverse.shape[0] == 1 else inverse
    cut = [(first[part], second[part], inverse[part]) for part in parts(*first.shape)]

    def split() -> None:
        for a_1, a_2, by in cut:
            np.multiply(a_2, by, out=a_2)
            np.rint(a_2, out=a_1)
            np.subtract(a_2, a_1, out=a_2)
            np.multiply(a_2, power, out=a_2)
            np.rint(a_2, out=a_2)

    return split


class WeightSlices:
    """The slices of A (M, K), by the scales of its rows: [A₂ A₁] for each block of K."""

    def __init__(self, A: Array) -> None:
        (height, terms), self._A = A.shape, A
        self.bits = products.slice_bits(terms)
        self.scales = Scales(height, self.bits)
        self._magnitudes = np.empty((height, terms), np.float32)
        self.blocks: list[tuple[slice, Array, Array]] = []
        self._splits = []
        for block in products.blocks_of_terms(terms):
            length = block.stop - block.start
            both = aligned_empty((height, 2 * length), np.dtype(np.float64))
            second, first = both[:, :length], both[:, length:]
            self.blocks.append((block, first, both))
            self._splits.append(
                (A[:, block], second, bind_split(first, second, self.scales.inverse[:, None], self.bits))
            )

    def update(self) -> None:
        np.abs(self._A, out=self._magnitudes)
        np.maximum.reduce(self._magnitudes, axis=1, out=self.scales.largest, initial=SMALLEST)
        self.scales.update()
        for A, second, split in self._splits:
            np.copyto(second, A)
            split()


class Sums:
    """P and Q (M, N), of one block of terms or, as int64, of several."""

    def __init__(self, buffers: Buffers, name: str, shape: tuple[int, ...], several: bool) -> None:
        self.p, self.q = (buffers(f"{name} {which}", *shape) for which in "pq")
        self.addend = buffers(f"{name} addend", *shape)
        self.totals = [buffers(f"{name} total {which}", *shape, dtype=np.int64) for which in "pq"] if several else None
        self.terms = 0
        self._empty_totals = True

    def clear(self) -> None:
        self.terms, self._empty_totals = 0, True

    def make_room(self, terms: int) -> bool:
        """Say whether P and Q are to be written, not added to; first move them to the totals if they are full."""
        if self.terms + terms > products.BLOCK:
            self.to_totals()
        first, self.terms = self.terms == 0, self.terms + terms
        return first

    def to_totals(self) -> None:
        if self.totals is not None and self.terms:
            for part, total in zip((self.p, self.q), self.totals, strict=True):
                if self._empty_totals:
                    np.copyto(total, part, casting="unsafe")
                else:
                    np.add(total, part, out=total, dtype=np.int64, casting="unsafe")
            self.terms, self._empty_totals = 0, False

    def add(self, other: Sums) -> None:
        """Add another worker's."""
        self.to_totals()
        other.to_totals()
        if self.totals is None or other.totals is None:
            np.add(self.p, other.p, out=self.p)
            np.add(self.q, other.q, out=self.q)
            return
        for mine, theirs in zip(self.totals, other.totals, strict=True):
            np.add(mine, theirs, out=mine)

    def bind_combine(self, rows: Array, columns: Array, bits: int) -> Callable[[], Array]:
        """Return a function that computes C = σ_i τ_j 2⁻²ˢ (P + 2⁻ˢ Q) in Q's place, in float64.

        Args:
            rows, columns: σ 2⁻ˢ (M, 1) and τ 2⁻ˢ (1, N) or (N,).
        """
        p, q, factor = self.p, self.q, np.array(2.0**-bits)
        totals = self.totals

        def combine() -> Array:
            if totals is None:
                np.multiply(q, factor, out=q)
                np.add(q, p, out=q)
                np.multiply(q, rows, out=q)
                np.multiply(q, columns, out=q)
                return q
            self.to_totals()
            np.multiply(totals[1], factor, out=q)
            np.add(q, totals[0], out=q)
            for scales in (rows, columns):  # an int64 is no NaN, so that here ∞ must become one
                np.multiply(q, scales + 0.0 * scales, out=q)
            return q

        return combine


def bind_product(work: ExactWork, A: Array, finish: Callable[[Buffers, slice, Array], None]) -> Callable[[Array], None]:
    """Return a function of x (B, K): it computes C = A xᵀ, (M, R) for R rows at a time.

    Args:
        A: (M, K), W or Wᵀ.
        finish: given a worker's buffers, some rows, and their C in float64.
    """
    (height, terms), weights = A.shape, WeightSlices(A)
    pool = work.pool(work.rows * A.size)
    several = len(weights.blocks) > 1
    bound: dict[tuple[int, int], Callable[[Array], Array]] = {}

    def bind_chunk(rows: int, buffers: Buffers) -> Callable[[Array], Array]:
        scales, magnitudes = Scales(rows, weights.bits), buffers("magnitudes", terms, rows, dtype=np.float32)
        sums = Sums(buffers, "product", (height, rows), several)
        combine = sums.bind_combine(weights.scales.unit[:, None], scales.unit[None], weights.bits)
        blocks = []
        for block, first, both in weights.blocks:
            slices = buffers("slices", 2 * first.shape[1], rows)
            x_1, x_2 = slices[: first.shape[1]], slices[first.shape[1] :]
            blocks.append(
                (block, first, both, slices, x_1, x_2, bind_split(x_1, x_2, scales.inverse[None], weights.bits))
            )
        multiply = work.multiply

        def product(x: Array) -> Array:
            np.abs(x, out=magnitudes)
            np.maximum.reduce(magnitudes, axis=0, out=scales.largest, initial=SMALLEST)
            scales.update()
            sums.clear()
            for block, first, both, slices, x_1, x_2, split in blocks:
                np.copyto(x_2, x[block])
                split()
                sums.make_room(len(x_1))
                multiply(first, x_1, sums.p)
                multiply(both, slices, sums.q)
            return combine()

        return product

    def run(x: Array) -> None:
        weights.update()
        features = x.T

        def chunk(index: int, worker: int) -> None:
            rows, buffers = work.chunks[index], work.buffers(worker)
            key = rows.stop - rows.start, worker
            if key not in bound:
                bound[key] = bind_chunk(key[0], buffers)
            finish(buffers, rows, bound[key](features[:, rows]))

        pool.run(chunk, len(work.chunks))

    return run


def bind_forward(
    work: ExactWork, W: Array, b: Array, h: Array, a: Array | None, g: Activation | None
) -> Callable[[Array], None]:
    """Return a function of h_prev: h = g(a), a = h_prev Wᵀ + b; see `Ops.bind_forward`."""
    pre, bias = h if a is None else a, np.empty((len(b), 1))
    finish = Finish(work.precision, g)

    def finish_chunk(buffers: Buffers, rows: slice, values: Array) -> None:
        finish.forward(buffers, values, bias, pre.T[:, rows], h.T[:, rows])

    product = bind_product(work, W, finish_chunk)

    def forward(h_prev: Array) -> None:
        np.copyto(bias[:, 0], b)
        product(h_prev)

    return forward


def bind_delta(
    work: ExactWork,
    da: Array,
    W: Array,
    da_prev: Array,
    g: Activation | None,
    source: Array | None,
    unscale: float,
) -> Callable[[], None]:
    """Return a function without arguments: da_prev = (da W) ⊙ g'(source), or without g unscale da W."""
    finish, factor = Finish(work.precision, g), 1.0 if g else unscale

    def finish_chunk(buffers: Buffers, rows: slice, values: Array) -> None:
        finish.delta(buffers, values, factor, None if source is None else source.T[:, rows], da_prev.T[:, rows])

    product = bind_product(work, W.T, finish_chunk)
    return lambda: product(da)


def bind_backward(
    work: ExactWork,
    da: Array,
    W: Array,
    da_prev: Array | None,
    g: Activation | None,
    source: Array | None,
    scale: float,
) -> Callable[[Array, Array, Array, bool], None]:
    """Return a function (h_prev, dW, db, accumulate) for a layer's backward pass; see `Ops.bind_backward`."""
    gradient = _bind_gradient(work, da, W.shape[1], 1.0 / scale)
    delta = None if da_prev is None else bind_delta(work, da, W, da_prev, g, source, 1.0 / scale)

    def backward(h_prev: Array, dW: Array, db: Array, accumulate: bool) -> None:
        gradient(h_prev, dW, db, accumulate)
        if delta is not None:
            delta()

    return backward


class _GradientSums:
    """P and Q of daᵀ h and of Σ_b da_b, over the chunks that one worker takes."""

    def __init__(self, work: ExactWork, worker: int, n_out: int, n_in: int, scales: Scales, bits: int) -> None:
        self._work, self._buffers, self._inverse, self._bits = work, work.buffers(worker), scales.inverse, bits
        several = work.rows > products.BLOCK
        self._n_out, self._height = n_out, n_out + n_in
        self.weights = Sums(self._buffers, "dW", (n_out, n_in), several)
        self.biases = Sums(self._buffers, "db", (n_out, 1), several)
        unit_da, unit_h = scales.unit[:n_out, None], scales.unit[None, n_out:]
        self.combine_weights = self.weights.bind_combine(unit_da, unit_h, bits)
        self.combine_biases = self.biases.bind_combine(unit_da, np.ones((1, 1)), bits)
        self.used = False
        self._bound: dict[int, tuple[Any, ...]] = {}

    def clear(self) -> None:
        self.used = False
        self.weights.clear()
        self.biases.clear()

    def take(self, da: Array, h: Array) -> None:
        """Add the products of da (nO, R) and h (nI, R)."""
        rows = da.shape[1]
        if rows not in self._bound:
            self._bound[rows] = self._bind(rows)
        second, split, (da_1, da_2), (h_1, h_2), ones = self._bound[rows]
        np.copyto(second[: self._n_out], da)
        np.copyto(second[self._n_out :], h)
        split()
        multiply, weights, biases = self._work.multiply, self.weights, self.biases
        self.used = True
        biases.make_room(rows)
        if weights.make_room(rows):
            multiply(da_1, h_1, weights.p)
            multiply(da_1, h_2, weights.q)
            multiply(da_1, ones, biases.p)
            multiply(da_2, ones, biases.q)
        else:
            for left, right, total in ((da_1, h_1, weights.p), (da_1, h_2, weights.q)):
                multiply(left, right, weights.addend)
                np.add(total, weights.addend, out=total)
            for left, total in ((da_1, biases.p), (da_2, biases.q)):
                multiply(left, ones, biases.addend)
                np.add(total, biases.addend, out=total)
        multiply(da_2, h_1, weights.addend)
        np.add(weights.q, weights.addend, out=weights.q)

    def _bind(self, rows: int) -> tuple[Any, ...]:
        first, second = self._buffers("slices", 2, self._height, rows)
        split = bind_split(first, second, self._inverse[:, None], self._bits)
        n_out = self._n_out
        return second, split, (first[:n_out], second[:n_out]), (first[n_out:].T, second[n_out:].T), np.ones((rows, 1))


def _bind_gradient(work: ExactWork, da: Array, n_in: int, factor: float) -> Callable[[Array, Array, Array, bool], None]:
    """Return a function (h_prev, dW, db, accumulate): dW (+)= factor daᵀ h_prev, db (+)= factor Σ_b da_b.

    db is daᵀ times a column of ones, which needs no slices: with τ = 2ˢ its b₁ are 1 and its b₂ are 0.
    """
    n_out, bits = da.shape[1], products.slice_bits(work.rows)
    scales = Scales(n_out + n_in, bits)
    largest = np.empty((len(work.chunks), n_out + n_in), np.float32)
    pool = work.pool(work.rows * n_out * n_in)
    workers = [_GradientSums(work, k, n_out, n_in, scales, bits) for k in range(pool.size)]
    finish = Finish(work.precision, None)

    def gradient(h_prev: Array, dW: Array, db: Array, accumulate: bool) -> None:
        da_features, h_features = da.T, h_prev.T

        def find_largest(index: int, worker: int) -> None:
            rows, out, buffers = work.chunks[index], largest[index], work.buffers(worker)
            for x, place in ((da_features, out[:n_out]), (h_features, out[n_out:])):
                magnitudes = buffers("magnitudes", len(x), rows.stop - rows.start, dtype=np.float32)
                np.abs(x[:, rows], out=magnitudes)
                np.maximum.reduce(magnitudes, axis=1, out=place)

        def add_up(index: int, worker: int) -> None:
            rows = work.chunks[index]
            workers[worker].take(da_features[:, rows], h_features[:, rows])

        pool.run(find_largest, len(work.chunks))
        np.maximum.reduce(largest, axis=0, out=scales.largest, initial=SMALLEST)
        scales.update()
        for sums in workers:
            sums.clear()
        pool.run(add_up, len(work.chunks))
        total, *others = [sums for sums in workers if sums.used]
        for other in others:
            total.weights.add(other.weights)
            total.biases.add(other.biases)
        for combine, out in ((total.combine_weights, dW), (total.combine_biases, db[:, None])):
            finish.gradient(work.buffers(0), combine(), factor, out, accumulate)

    return gradient
