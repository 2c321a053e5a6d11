"""The NumPy backend with `reproducible=True`: the specification, to the bit, of what every backend computes then.

Products are exact splits (`products.py`, `numpy_products.py`), and `numpy_finish.py` says what follows them. Only IEEE
+ − × ÷ √ and comparisons decide any bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from gpuback._backends.exact import numpy_products
from gpuback._backends.exact.layers import ExactLayers, Multiply, loss_rule, output_functions
from gpuback._backends.exact.losses import softmax, through_output
from gpuback._backends.exact.numpy_finish import ELEMENTS_AT_ONCE
from gpuback._backends.exact.numpy_products import ExactWork, pool_for, rows_at_once
from gpuback._backends.exact.per_sample import ReproducibleNumpyPerSample
from gpuback._backends.numpy.ops import NumpyOps
from gpuback._backends.numpy.workspace import NumpyWorkspace
from gpuback._backends.protocol import JetOps
from gpuback._core.elementary import store
from gpuback._core.exact_sums import exact_sum
from gpuback._core.integers import ceil_div
from gpuback._core.losses import Loss
from gpuback._core.precision import Precision
from gpuback._core.reproducible_forms import evaluated
from gpuback._core.scratch import CACHE_LINE, aligned_empty
from gpuback._core.threads import ThreadPool, blas_threads
from gpuback._core.typing import Array

EXPONENTIALS = 500
"""Multiplications that take as long as what a loss computes for one number, roughly."""

FORWARD_WORTH_THREADS = 1e7
"""A forward pass with more floating-point operations, of plain products, than this is worth threads."""


class ReproducibleNumpyOps(ExactLayers, ReproducibleNumpyPerSample, NumpyOps):
    """Every operation on NumPy arrays, with the bits that all backends get.

    Args:
        multiply: (left, right, out) → None, out = left right of integers whose sums float64 holds exactly.
    """

    jets: JetOps | None = None
    reproducible = True
    _products: ClassVar[Any] = numpy_products

    def __init__(self, multiply: Multiply = np.dot) -> None:
        self._multiply = multiply

    def workspace(self, rows: int, sizes: tuple[int, ...], precision: Precision) -> ReproducibleWorkspace:
        return ReproducibleWorkspace(rows, sizes, precision, self._multiply)

    def plan_blocks(
        self, sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
    ) -> tuple[int, ThreadPool]:
        """Choose one block for a gradient: the scales of dW's products belong to the whole batch."""
        if need_gradient:
            return batch_size, ThreadPool(1, blas_alone=True)
        flops = sum(2 * n_in * n_out for n_in, n_out in pairwise(sizes))
        threads = blas_threads() if batch_size * flops > FORWARD_WORTH_THREADS else 1
        rows = min(batch_size, rows_at_once(max(sizes)))
        blocks = ceil_div(batch_size, rows)
        return rows, ThreadPool(min(threads, blocks), blas_alone=True)

    def bind_load(self, width: int, precision: Precision, workspace: NumpyWorkspace) -> Callable[[Array], Array]:
        """Return a function that copies x feature by feature, in the operands' format."""
        h_0 = workspace.hidden(width)
        round_h = workspace.bind_round(h_0)

        def load(x: Array) -> Array:
            np.copyto(h_0, x)
            if round_h is not None:
                round_h()
            return h_0

        return load

    def bind_loss(  # type: ignore[override]
        self, loss: Loss, output: str, a: Array, da: Array, divisor: float, workspace: ReproducibleWorkspace
    ) -> Callable[[Array, Array | None], Array]:
        """Return a function (y, weight) that returns w_b ℓ_b, (rows,) float64; see `Ops.bind_loss`."""
        rule, round_da = loss_rule(loss, output), workspace.bind_round(da)
        parameters = loss.parameters(a.shape[1])

        chunks = _chunks(*a.shape)
        pool = pool_for(EXPONENTIALS * a.size, len(chunks))

        def loss_and_delta(y: Array, weight: Array | None) -> Array:
            losses = np.empty(len(a))

            def chunk(index: int, worker: int) -> None:
                rows = chunks[index]
                losses[rows], delta = rule(a[rows].astype(np.float64), y[rows], parameters)
                if weight is not None:
                    losses[rows] *= weight[rows]
                    delta *= weight[rows, None]
                delta /= divisor
                store(delta, da[rows])

            pool.run(chunk, len(chunks))
            if round_da is not None:
                round_da()
            return losses

        return loss_and_delta

    def mean_loss(self, parts: list[Array], batch_size: int) -> float:
        """Return the mean of the samples' losses: their exact sum / B, rounded to float32."""
        with np.errstate(all="ignore"):
            return float(np.float32(exact_sum(np.concatenate(parts)) / batch_size))

    def bind_mean_of_blocks(
        self, rows: int, batch_size: int, dtype: np.dtype[Any]
    ) -> tuple[None, Callable[[list[Any]], float]]:
        """Return the mean of the blocks' losses.

        Each is rounded to float32. They are added up in float64 in their order, and the mean is rounded to float32.
        """

        def mean(parts: list[Array]) -> float:
            total = 0.0
            with np.errstate(all="ignore"):
                for part in parts:
                    total += self.mean_loss([part], len(part)) * len(part)
                return float(np.float32(total / batch_size))

        return None, mean

    def bind_output(self, name: str, a: Array, workspace: NumpyWorkspace) -> Callable[[Array], object]:
        functions = output_functions(name)

        def apply(out: Array) -> None:
            for rows in _chunks(len(a), a.shape[1]):
                values = a[rows].astype(np.float64)
                values = softmax(values)[1] if functions is None else evaluated(functions[0], values)
                store(values, out[rows])

        return apply

    def bind_output_delta(
        self, output: str, source: Array | None, da: Array, divisor: float, workspace: NumpyWorkspace
    ) -> Callable[[Array, Array | None], None]:
        functions, round_da = output_functions(output), workspace.bind_round(da)

        def output_delta(dy: Array, weight: Array | None) -> None:
            for rows in _chunks(*dy.shape):
                values = dy[rows].astype(np.float64)
                delta = through_output(functions, values if source is None else source[rows].astype(np.float64), values)
                if weight is not None:
                    delta *= weight[rows, None]
                delta /= divisor
                store(delta, da[rows])
            if round_da is not None:
                round_da()

        return output_delta

    def explain_forward(self, batch_size: int, n_out: int, n_in: int, precision: Precision) -> str:
        return "3 exact float64 BLAS GEMMs of slices"

    def explain_backward(
        self, batch_size: int, n_out: int, n_in: int, precision: Precision, *, need_da_prev: bool
    ) -> str:
        return "3 exact float64 BLAS GEMMs of slices for dW, exact sums for db" + (", 3 for dh" if need_da_prev else "")


class ReproducibleWorkspace(NumpyWorkspace):
    """The buffers of one network for one batch size, feature by feature but for the output layer's."""

    def __init__(self, rows: int, sizes: tuple[int, ...], precision: Precision, multiply: Multiply) -> None:
        super().__init__(rows, sizes, precision)
        self.slices = ExactWork(rows, sizes, precision, multiply)

    def hidden(self, width: int) -> Array:
        return self._feature_major(aligned_empty(self._length() * width, self._precision.accumulator), width)

    def delta(self, layer: int, width: int) -> Array:
        if layer == 0:
            return self.hidden(width)
        return self._feature_major(self._feature_deltas[layer % 2], width)

    @cached_property
    def _feature_deltas(self) -> list[Array]:
        widest = max(self._sizes[1:])
        return [aligned_empty(self._length() * widest, self._precision.accumulator) for _ in range(2)]

    def _length(self) -> int:
        """Return how far apart features begin: not by a multiple of 1 KB, whose places in a cache are few."""
        return self.rows + (CACHE_LINE // 4 if self.rows % 256 == 0 else 0)

    def _feature_major(self, flat: Array, width: int) -> Array:
        """Return (rows, width) with each feature's numbers side by side."""
        return flat[: self._length() * width].reshape(width, -1).T[: self.rows]

    def bind_round(self, array: Array) -> Callable[[], object] | None:
        if not self._precision.sixteen_bit:
            return None
        rounded = np.empty_like(array, self._precision.operand)

        def round_in_place() -> None:
            np.copyto(rounded, array, casting="unsafe")
            np.copyto(array, rounded)

        return round_in_place


def _chunks(rows: int, width: int) -> list[slice]:
    """Cut rows of the output layer into chunks of up to `ELEMENTS_AT_ONCE` elements, and at least one for a thread."""
    at_once = max(1, min(ELEMENTS_AT_ONCE // width, ceil_div(rows, blas_threads())))
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]
