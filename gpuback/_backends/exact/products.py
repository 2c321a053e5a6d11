"""Matrix products whose bits depend on nothing but their operands: not on the BLAS, its threads, the GPU or the order
of the rows that a sum runs over.

C = A B, A (M, K), B (K, N), by exact splitting. With σ_i the power of two just above the largest |A_ik| of a row, τ_j
that of a column of B, and s = (53 − ⌈log₂ min(K, 8192)⌉)//2, each number is cut into two integers,

    A_ik ≈ σ_i (2⁻ˢ a₁ + 2⁻²ˢ a₂),  a₁ = rint(2ˢ A_ik/σ_i),  a₂ = rint(2ˢ (2ˢ A_ik/σ_i − a₁)),

which float64 holds and computes without rounding: A_ik has 24 bits, scaling by a power of two is exact, so is the
difference of a number and its nearest integer. |A_ik| < σ_i, so |a₁| ≤ 2ˢ, and |a₂| ≤ 2ˢ⁻¹. Then in float64

    P = Σ_k a₁ b₁,   Q = Σ_k (a₁ b₂ + a₂ b₁),   C = fl₃₂(σ_i τ_j 2⁻²ˢ (P + 2⁻ˢ Q)) + 0.

Why P and Q have the same bits whoever adds: over a block of up to 8192 terms every term of P is an integer of at most
2²ˢ in magnitude, and each pair of terms of Q as well. Any partial sum, of any terms in any order, with or without fma,
is an integer of at most min(K, 8192)·2²ˢ ≤ 2⁵³, and float64 holds all of these: nothing is ever rounded. Blocks are
added as int64: fewer than 2²³ terms sum to less than 2²³·2⁴⁰ = 2⁶³. A product that is cut differently, to fit buffers,
is the same integer again. What follows (one sum, multiplications by powers of two, one rounding to float32) is a fixed
sequence of IEEE operations per element. Adding +0 makes −0 and 0 one.

The error: a₁ and a₂ leave out at most 2⁻²ˢ⁻¹ σ_i of A_ik, and P + 2⁻ˢ Q leaves out Σ a₂ b₂ 2⁻²ˢ, so that with
σ_i ≤ 2 max|A_i| and τ_j likewise

    |C − AB| ≤ u |C| + 5 K 2⁻²ˢ max_k|A_ik| max_k|B_kj| + 2⁻¹⁵⁰,   2⁻²ˢ ≤ 2⁻⁴⁰,   u = 2⁻²⁴,

where 2⁻¹⁵⁰ is half of float32's smallest number, and what sums of several blocks lose as they become float64 is far
below the middle term. 16-bit results are rounded once more.

A row of A or a column of B that holds a NaN or an infinity makes every C of it NaN.

A backend brings the operations of `ExactBackend`. The `bind_…` functions below make the passes of a layer of them.
NumPy has passes of its own, for its caches and threads (`numpy_products.py`), with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from gpuback._core.activations import Activation
from gpuback._core.typing import Array
from gpuback.errors import ShapeError

BLOCK = 8192
"""The most terms that are added in float64."""

LONGEST = 2**23 - 1
"""The most terms that a product may have: blocks of them are added as int64."""


def slice_bits(terms: int) -> int:
    """Return s, the bits in a slice of the operands of a sum of K terms."""
    return (53 - (min(terms, BLOCK) - 1).bit_length()) // 2


def require_exact_sums(rows: int, sizes: tuple[int, ...]) -> None:
    """Raise ShapeError for a batch or a layer whose sums might not be exact."""
    for what, length in (("a batch", rows), ("layers", max(sizes))):
        if length > LONGEST:
            unit = "rows" if length == rows else "units"
            raise ShapeError(
                f"expected {what} of at most {LONGEST:,} {unit} with reproducible=True, whose sums are exact up to "
                f"there, got {length:,}"
            )


class Sums(NamedTuple):
    """P and Q of a product: float64 of one block, or int64 of several."""

    p: Array
    q: Array


class Scales(NamedTuple):
    """The scales of a product: the largest magnitude in each row of A and in each column of B, float32, and s."""

    rows: Array
    columns: Array
    bits: int


class ExactBackend(Protocol):
    """The operations of a backend on matrices and their slices; slices are float64.

    A scale is given by the largest magnitude in its row or column, float32: σ is the power of two just above it, 1
    where it is 0, NaN where it is not finite.
    """

    def rows_at_once(self, widest: int) -> int:
        """Return how many rows of a batch to split at a time, at most `BLOCK`."""
        ...

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Make a C-contiguous array with any contents."""
        ...

    def largest_of_rows(self, x: Array, largest: Array) -> None:
        """largest_i = max_k |x_ik|, (M,) float32, of x (M, K)."""
        ...

    def largest_of_columns(self, x: Array, largest: Array) -> None:
        """largest_j = max_k |x_kj|, (N,) float32, of x (K, N)."""
        ...

    def split_rows(self, x: Array, largest: Array, bits: int, first: Array, second: Array) -> None:
        """first = a₁, second = a₂: the slices of x, of `bits` bits, by the scales of its rows."""
        ...

    def split_columns(self, x: Array, largest: Array, bits: int, first: Array, second: Array) -> None:
        """first = b₁, second = b₂: the slices of x, of `bits` bits, by the scales of its columns."""
        ...

    def multiply(self, left: Array, right: Array, out: Array) -> None:
        """out = left right, of integers that float64 adds exactly, in whatever order.

        Operands may be transposed, and their rows may be parts of longer ones.
        """
        ...

    def accumulate(self, addend: Array, total: Array) -> None:
        """total += addend, of integers that float64 adds exactly."""
        ...

    def add(self, sums: Sums, totals: Sums, *, first: bool) -> None:
        """totals += sums, or = for the first block."""
        ...

    def finish_forward(
        self, sums: Sums, scales: Scales, b: Array, a: Array | None, h: Array, g: Activation | None
    ) -> None:
        """Write a = C + b, rounded once, and h = g(a), or h = a without g; see `Ops.bind_forward`."""
        ...

    def finish_delta(
        self, sums: Sums, scales: Scales, source: Array | None, g: Activation | None, factor: float, da_prev: Array
    ) -> None:
        """Write da_prev = C ⊙ g'(source), or factor C without g; factor is a power of two."""
        ...

    def finish_gradient(self, sums: Sums, scales: Scales, factor: float, out: Array, accumulate: bool) -> None:
        """out (+)= factor C; factor is a power of two."""
        ...


class Slices(NamedTuple):
    """The slices a₁ and a₂ of a matrix, or of a part of it along K."""

    first: Array
    second: Array

    @property
    def transposed(self) -> Slices:
        return Slices(self.first.T, self.second.T)


Pair = TypeVar("Pair", Slices, Sums)


class PairPool(Generic[Pair]):
    """Memory for pairs of matrices. Views of it are made once; a pair that does not fit gets memory of its own."""

    def __init__(self, kind: type[Pair], backend: ExactBackend, size: int, dtype: np.dtype[Any]) -> None:
        self._kind: type[Pair] = kind
        self._empty = partial(backend.empty, dtype=dtype)
        self._flats = [self._empty(size) for _ in range(2)]
        self._views: dict[tuple[int, int, int], Pair] = {}

    def __call__(self, rows: int, columns: int, start: int = 0) -> Pair:
        """Return a pair of matrices that start at an offset."""
        key, end = (rows, columns, start), start + rows * columns
        if key not in self._views:
            flats = self._flats if end <= self._flats[0].size else [self._empty(end) for _ in range(2)]
            self._views[key] = self._kind(*(flat[start:end].reshape(rows, columns) for flat in flats))
        return self._views[key]


class SliceBuffers:
    """The buffers that the products of one network share, for batches of up to `rows` rows.

    Attributes:
        left, right: slices of the first and of the second operand.
        sums, totals: of one block and of several.
        bias_sums, bias_totals: of db.
    """

    def __init__(self, backend: ExactBackend, rows: int, sizes: tuple[int, ...]) -> None:
        require_exact_sums(rows, sizes)
        double, single, int64 = np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.int64)
        widest, of_weights = max(sizes), max(n_in * n_out for n_in, n_out in pairwise(sizes))
        self.backend = backend
        self.at_once = at_once = min(rows, backend.rows_at_once(widest))
        # Only the input's gradient is as wide as the input, and it is rarely asked for: its memory is made on demand.
        product = max(at_once * max(sizes[1:]), of_weights)
        several_blocks = rows > at_once or max(sizes) > BLOCK
        self.left = PairPool(Slices, backend, at_once * widest, double)
        self.right = PairPool(Slices, backend, max(at_once * widest, of_weights), double)
        self.sums = PairPool(Sums, backend, product, double)
        self.totals = PairPool(Sums, backend, product if several_blocks else 0, int64)
        self.bias_sums = PairPool(Sums, backend, widest, double)
        self.bias_totals = PairPool(Sums, backend, widest, int64)
        self.row_scales, self.column_scales = (backend.empty(max(at_once, widest), single) for _ in range(2))
        self.ones = backend.empty((1, at_once), double)
        self.ones.fill(1.0)
        self._addend = backend.empty(product, double)

    def bind_multiply(self, left: Slices, right: Slices, sums: Sums) -> Callable[[], None]:
        """Return a function that computes P and Q of (M, K) times (K, N)."""
        multiply, accumulate = self.backend.multiply, self.backend.accumulate
        if sums.q.size > self._addend.size:
            self._addend = self.backend.empty(sums.q.size, np.dtype(np.float64))
        addend = self._addend[: sums.q.size].reshape(sums.q.shape)

        def run() -> None:
            multiply(left.first, right.first, sums.p)
            multiply(left.first, right.second, sums.q)
            multiply(left.second, right.first, addend)
            accumulate(addend, sums.q)

        return run

    def blocks_of_rows(self, rows: int) -> list[slice]:
        """Cut a batch's rows into blocks that the buffers hold."""
        return [slice(start, min(start + self.at_once, rows)) for start in range(0, rows, self.at_once)]


def blocks_of_terms(terms: int) -> list[slice]:
    """Cut a sum's terms into blocks of up to `BLOCK`."""
    return [slice(start, min(start + BLOCK, terms)) for start in range(0, terms, BLOCK)]


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _rows(x: Array, part: slice) -> Array:
    """Return rows of a matrix: the matrix itself where they are all of it."""
    return x if x is None or _length(part) == len(x) else x[part]


def _columns(x: Array, part: slice) -> Array:
    return x if _length(part) == x.shape[1] else x[:, part]


def _bind_times_rows(
    buffers: SliceBuffers, rows: int, factors: list[Slices], terms: int, width: int, bits: int
) -> tuple[Callable[[Array], None], Sums, Array]:
    """Bind x (rows, terms) times a matrix that is split already, block by block of K.

    Returns:
        A function of x; P and Q, which it writes; and the largest magnitudes in x's rows, which it writes too.
    """
    backend, largest, sums = buffers.backend, buffers.row_scales[:rows], buffers.sums(rows, width)
    result = buffers.totals(rows, width) if len(factors) > 1 else sums
    blocks = []
    for part, factor in zip(blocks_of_terms(terms), factors, strict=True):
        left = buffers.left(rows, _length(part))
        blocks.append((part, left, buffers.bind_multiply(left, factor, sums)))

    def times_rows(x: Array) -> None:
        backend.largest_of_rows(x, largest)
        for part, left, multiply in blocks:
            backend.split_rows(_columns(x, part), largest, bits, left.first, left.second)
            multiply()
            if result is not sums:
                backend.add(sums, result, first=part.start == 0)

    return times_rows, result, largest


def bind_forward(
    buffers: SliceBuffers, W: Array, b: Array, h: Array, a: Array | None, g: Activation | None
) -> Callable[[Array], None]:
    """Return a function of h_prev: h = g(a), a = h_prev Wᵀ + b; see `Ops.bind_forward`."""
    backend, (n_out, n_in) = buffers.backend, W.shape
    bits, largest = slice_bits(n_in), buffers.column_scales[:n_out]
    weights = [
        (_columns(W, part), buffers.right(n_out, _length(part), n_out * part.start)) for part in blocks_of_terms(n_in)
    ]
    factors = [slices.transposed for _, slices in weights]
    batch = []
    for rows in buffers.blocks_of_rows(len(h)):
        times_rows, sums, largest_h = _bind_times_rows(buffers, _length(rows), factors, n_in, n_out, bits)
        batch.append((rows, times_rows, sums, Scales(largest_h, largest, bits), _rows(a, rows), _rows(h, rows)))

    def forward(h_prev: Array) -> None:
        backend.largest_of_rows(W, largest)
        for part, slices in weights:
            backend.split_rows(part, largest, bits, slices.first, slices.second)
        for rows, times_rows, sums, scales, a_rows, h_rows in batch:
            times_rows(_rows(h_prev, rows))
            backend.finish_forward(sums, scales, b, a_rows, h_rows, g)

    return forward


def bind_backward(
    buffers: SliceBuffers,
    da: Array,
    W: Array,
    da_prev: Array | None,
    g: Activation | None,
    source: Array | None,
    scale: float,
) -> Callable[[Array, Array, Array, bool], None]:
    """Return a function (h_prev, dW, db, accumulate) for a layer's backward pass; see `Ops.bind_backward`."""
    gradient = _bind_gradient(buffers, da, W.shape[1], 1.0 / scale)
    delta = None if da_prev is None else bind_delta(buffers, da, W, da_prev, g, source, 1.0 / scale)

    def backward(h_prev: Array, dW: Array, db: Array, accumulate: bool) -> None:
        gradient(h_prev, dW, db, accumulate)
        if delta is not None:
            delta()

    return backward


def _bind_gradient(
    buffers: SliceBuffers, da: Array, n_in: int, factor: float
) -> Callable[[Array, Array, Array, bool], None]:
    """Return a function (h_prev, dW, db, accumulate): dW (+)= factor daᵀ h_prev, db (+)= factor Σ_b da_b.

    db is daᵀ times a column of ones, which needs no slices: with τ = 2ˢ its b₁ are 1 and its b₂ are 0.
    """
    backend, (batch_size, n_out) = buffers.backend, da.shape
    bits = slice_bits(batch_size)
    largest_da, largest_h = buffers.row_scales[:n_out], buffers.column_scales[:n_in]
    of_ones = backend.empty(1, np.dtype(np.float32))
    of_ones.fill(2.0 ** (bits - 1))
    scales, bias_scales = Scales(largest_da, largest_h, bits), Scales(largest_da, of_ones, bits)
    result = sums = buffers.sums(n_out, n_in)
    bias_result = bias_sums = buffers.bias_sums(1, n_out)
    if batch_size > buffers.at_once:
        result, bias_result = buffers.totals(n_out, n_in), buffers.bias_totals(1, n_out)
    bias_column = Sums(*(part.reshape(n_out, 1) for part in bias_result))
    batch = []
    for rows in buffers.blocks_of_rows(batch_size):
        count = _length(rows)
        left, right = buffers.left(count, n_out), buffers.right(count, n_in)
        multiply = buffers.bind_multiply(left.transposed, right, sums)
        batch.append((rows, _rows(da, rows), left, right, buffers.ones[:, :count], multiply))

    def gradient(h_prev: Array, dW: Array, db: Array, accumulate: bool) -> None:
        backend.largest_of_columns(da, largest_da)
        backend.largest_of_columns(h_prev, largest_h)
        for rows, da_rows, left, right, ones, multiply in batch:
            backend.split_columns(da_rows, largest_da, bits, left.first, left.second)
            backend.split_columns(_rows(h_prev, rows), largest_h, bits, right.first, right.second)
            multiply()
            backend.multiply(ones, left.first, bias_sums.p)
            backend.multiply(ones, left.second, bias_sums.q)
            if result is not sums:
                backend.add(sums, result, first=rows.start == 0)
                backend.add(bias_sums, bias_result, first=rows.start == 0)
        backend.finish_gradient(result, scales, factor, dW, accumulate)
        backend.finish_gradient(bias_column, bias_scales, factor, db.reshape(n_out, 1), accumulate)

    return gradient


def bind_delta(
    buffers: SliceBuffers,
    da: Array,
    W: Array,
    da_prev: Array,
    g: Activation | None,
    source: Array | None,
    unscale: float,
) -> Callable[[], None]:
    """Return a function without arguments: da_prev = (da W) ⊙ g'(source), or without g unscale da W."""
    backend, (n_out, n_in), factor = buffers.backend, W.shape, 1.0 if g else unscale
    bits, largest = slice_bits(n_out), buffers.column_scales[:n_in]
    weights = [
        (_rows(W, part), buffers.right(_length(part), n_in, n_in * part.start)) for part in blocks_of_terms(n_out)
    ]
    factors = [slices for _, slices in weights]
    batch = []
    for rows in buffers.blocks_of_rows(len(da)):
        times_rows, sums, largest_da = _bind_times_rows(buffers, _length(rows), factors, n_out, n_in, bits)
        scales = Scales(largest_da, largest, bits)
        batch.append((times_rows, _rows(da, rows), sums, scales, _rows(source, rows), _rows(da_prev, rows)))

    def delta() -> None:
        backend.largest_of_columns(W, largest)
        for part, slices in weights:
            backend.split_columns(part, largest, bits, slices.first, slices.second)
        for times_rows, da_rows, sums, scales, source_rows, da_prev_rows in batch:
            times_rows(da_rows)
            backend.finish_delta(sums, scales, source_rows, g, factor, da_prev_rows)

    return delta
