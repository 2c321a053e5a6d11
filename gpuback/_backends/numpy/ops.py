"""The NumPy backend: the readable specification of what every backend computes, and a fast one on a CPU.

Operations are *bound* before they run: `bind_forward(...)` and its kin take the arrays that stay the same from batch to
batch and return a function of what changes, so that views, scratch and decisions are made once.

16-bit values are carried in float32 arrays (which hold every one of them exactly) and rounded to their format where
they are stored; a product of two is exact in float32, so a float32 GEMM of carriers is a 16-bit product with float32
sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import Context
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._backends.host_arrays import as_host_array
from gpuback._backends.numpy.loss_scale import NumpyLossScale
from gpuback._backends.numpy.per_sample import NumpyPerSample
from gpuback._backends.numpy.small_products import is_quicker_transposed
from gpuback._backends.numpy.threads import ThreadPool, blas_threads
from gpuback._backends.numpy.updates import AdamUpdate, SGDUpdate, all_finite, norm
from gpuback._backends.numpy.workspace import Workspace
from gpuback._core.activations import ACTIVATIONS, Activation
from gpuback._core.architecture import Architecture
from gpuback._core.chained_sums import bind_sum_columns
from gpuback._core.integers import ceil_div, round_up
from gpuback._core.losses import Loss, Softmax
from gpuback._core.parameters import Layout
from gpuback._core.precision import Precision, round_to_tf32
from gpuback._core.scratch import aligned_empty, bind
from gpuback._core.typing import Array, ArrayLike

BLOCK_BYTES = 1 << 21
"""How much of a batch's activations is worked on at a time: what stays in a core's second- and third-level caches."""

WORTH_SHARING = 2e8
"""A step with more floating-point operations than this (2 ms of one core) is worth starting threads for."""

OPENBLAS_SHARES, WORTH_BLAS_SHARING = 6e5, 4e6
"""OpenBLAS shares a product from about the first number of floating-point operations on. Up to the second (40 µs of one
core) that gains little, and where other programs keep the cores busy, waiting for the second thread has made steps 40
to 140 times slower."""

FINISHED_AT_ONCE = 1 << 17
"""Numbers of a single layer's da_prev to which g' is applied at a time."""

SIGNED, UNSIGNED = np.dtype(np.intp), np.dtype(np.uintp)


class NumpyOps(NumpyPerSample):
    """Every operation on NumPy arrays."""

    name = "numpy"
    reproducible = False
    graph_capture = None  # there are no launches

    def scope(self, on_invalid: Callable[..., object] | None = None) -> AbstractContextManager[object]:
        if on_invalid is None:
            return np.errstate(all="ignore")
        return np.errstate(all="ignore", invalid="call", call=on_invalid)

    def bind_scope(self, on_invalid: Callable[..., object]) -> Callable[..., Any]:
        """A context of its own, in which NumPy's settings stay: entering it takes a tenth of `errstate`'s time."""
        context = Context()
        context.run(np.seterr, all="ignore", invalid="call")
        context.run(np.seterrcall, on_invalid)
        return context.run

    def workspace(self, rows: int, sizes: tuple[int, ...], precision: Precision) -> Workspace:
        return Workspace(rows, sizes, precision)

    def plan_blocks(
        self, sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
    ) -> tuple[int, ThreadPool]:
        """How many rows of a batch to take through the whole network at a time, and who shares the blocks.

        Narrow networks gain when a block's activations stay in cache from the forward pass to the backward pass. Where
        256 rows do not fit, products dominate and do best on many rows. Beyond a few million rows a block grows with
        √B, so that sums over blocks keep to short chains. Several blocks with enough work in them are shared between as
        many threads as BLAS would use.
        """
        flops = [2 * n_in * n_out for n_in, n_out in pairwise(sizes)]
        fitting = BLOCK_BYTES // (precision.accumulator.itemsize * sum(sizes))
        rows = max(fitting if fitting >= 256 else 4096, math.isqrt(batch_size) // 2)
        blocks, threads = ceil_div(batch_size, rows), 1
        if blocks > 1 and 3 * batch_size * sum(flops) > WORTH_SHARING:
            threads = blas_threads()
            blocks = min(round_up(blocks, threads), batch_size)
        rows = ceil_div(batch_size, blocks)  # of one size, but for the last
        return rows, ThreadPool(
            min(threads, blocks), blas_alone=OPENBLAS_SHARES < rows * max(flops) < WORTH_BLAS_SHARING
        )

    def bind_weights(
        self, theta: Array, layout: Layout, precision: Precision
    ) -> tuple[list[Array], Callable[[], object]]:
        """Each W as products read it (W itself if nothing is rounded), and a function that brings them up to date
        with θ.
        """
        weights = layout.split(theta)[0]
        if not (precision.sixteen_bit or precision.tf32):
            return list(weights), lambda: None
        bound = [self._bind_weights(W, precision) for W in weights]

        def refresh() -> None:
            for _, refresh_one in bound:
                refresh_one()

        return [operand for operand, _ in bound], refresh

    def _bind_weights(self, weights: Array, precision: Precision) -> tuple[Array, Callable[[], object]]:
        if precision.sixteen_bit:
            operand, rounded = aligned_empty(weights.shape, weights.dtype), np.empty(weights.shape, precision.operand)

            def refresh() -> None:
                np.copyto(rounded, weights, casting="unsafe")
                np.copyto(operand, rounded)

            return operand, refresh
        operand, nan = aligned_empty(weights.shape, weights.dtype), np.empty(weights.shape, bool)
        return operand, lambda: round_to_tf32(weights, operand, nan)

    def bind_load(self, width: int, precision: Precision, workspace: Workspace) -> Callable[[Array], Array]:
        """A function from a block of samples to the h_0 that products read: rounded to the operands' dtype."""
        if not precision.sixteen_bit:
            return lambda x: x
        h_0 = workspace.hidden(width)
        round_h = workspace.bind_round(h_0)
        assert round_h is not None

        def load(x: Array) -> Array:
            np.copyto(h_0, x)
            round_h()
            return h_0

        return load

    def bind_forward(
        self, W: Array, b: Array, h: Array, a: Array | None, activation: Activation | None, workspace: Workspace
    ) -> Callable[[Array], None]:
        """h = g(a), a = h_prev Wᵀ + b, as a function of h_prev (rows, nI).

        Args:
            W, b: (nO, nI) as products read it, and (nO,).
            h: (rows, nO), written; rounded to the operands' dtype unless it is the output layer's.
            a: (rows, nO), written and kept, or None. Where g' is computed from a, it is rounded to the operands' dtype
                before g reads it, so that g and g' see the same a.
            activation: g, or None for the output layer, whose function belongs to the loss.
        """
        pre_activation = h if a is None else a
        product, W_T = workspace.c_ordered(pre_activation), W.T
        transpose: Callable[[], object] | None = None
        if is_quicker_transposed(len(h), *W.shape):
            W_T = aligned_empty(W_T.shape, W.dtype)
            transpose = partial(np.copyto, W_T, W.T)
        operand = workspace.bind_product_operand(0, (len(h), W.shape[1]))
        if activation is None:
            add_bias = bind(np.add, product.T, b[:, None], out=h.T)

            def forward_output(h_prev: Array) -> None:
                if transpose is not None:
                    transpose()
                (h_prev if operand is None else operand(h_prev)).dot(W_T, product)
                add_bias()

            return forward_output

        add_bias = bind(np.add, product, b, out=pre_activation)
        g, scratch = activation.forward, workspace.scratch_like(h)
        round_h = workspace.bind_round(h)
        round_a = workspace.bind_round(pre_activation) if activation.derivative_from == "a" else None

        def forward(h_prev: Array) -> None:
            if transpose is not None:
                transpose()
            (h_prev if operand is None else operand(h_prev)).dot(W_T, product)
            add_bias()
            if round_a is not None:
                round_a()
            g(pre_activation, h, scratch)
            if round_h is not None:
                round_h()

        return forward

    def bind_loss(
        self, loss: Loss, output: str, a: Array, da: Array, divisor: float, workspace: Workspace
    ) -> Callable[[Array, Array | None], float]:
        """Σ_b w_b ℓ_b over a block's rows, and da = w_b ∂ℓ_b/∂a_b / divisor, as a function of y and w.

        Args:
            loss, output: entries of the table of losses.
            a: (rows, n_L) the output layer's pre-activations.
            da: (rows, n_L), written: here a itself.
            divisor: B, the number of samples in the whole batch, over the scale that da carries.
        """
        losses, wide = np.empty(len(a), a.dtype), np.empty(len(a))
        add_up = partial(wide.dot, np.ones_like(wide))
        run = loss.outputs[output](a, losses, workspace.scratch_like(a), divisor)
        round_da = workspace.bind_round(a)

        def loss_and_delta(y: Array, weight: Array | None) -> float:
            run(y)
            if weight is not None:
                np.multiply(losses, weight, out=losses)
                np.multiply(a, weight[:, None], out=a)
            if round_da is not None:
                round_da()
            np.copyto(wide, losses)
            return float(add_up())

        return loss_and_delta

    def mean_loss(self, parts: list[float], batch_size: int) -> float:
        """The batch's loss from what `bind_loss` gave for its blocks."""
        return sum(parts) / batch_size

    def bind_mean_of_blocks(
        self, rows: int, batch_size: int, dtype: np.dtype[Any]
    ) -> tuple[None, Callable[[list[Any]], float]]:
        """(None, a function of what `bind_loss` gave for a batch's blocks, each but the last of so many rows)."""
        return None, lambda parts: self.mean_loss(parts, batch_size)

    def bind_output(self, name: str, a: Array, workspace: Workspace) -> Callable[[Array], object]:
        """out = ŷ = O(a), as a function of out; a is overwritten."""
        if name == "softmax":
            softmax = Softmax(a, a)

            def apply_softmax(out: Array) -> None:
                softmax.shift()
                softmax.normalise()
                np.copyto(out, a)

            return apply_softmax
        output, scratch = ACTIVATIONS[name].forward, workspace.scratch_like(a)

        def apply(out: Array) -> None:
            output(a, a, scratch)
            np.copyto(out, a)

        return apply

    def bind_backward(
        self,
        da: Array,
        W: Array,
        da_prev: Array | None,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: Workspace,
    ) -> Callable[[Array, Array, Array, bool], None]:
        """dW (+)= daᵀ h_prev / scale, db (+)= Σ_b da_b / scale, da_prev = (da W) ⊙ g', as a function (h_prev, dW, db,
        accumulate).

        Args:
            da: (rows, nO), `scale` times the gradient of the pre-activations.
            W: (nO, nI) as products read it.
            da_prev: (rows, nI), written, carrying the same scale; None to skip it.
            activation_prev, source_prev: g of the layer below, and what its g' is computed from, (rows, nI). None at
                the network's input, where da_prev is ∂loss/∂x: without g', without the scale, and not rounded to the
                operands' dtype.
            scale: a power of two.
        """
        da_operand = workspace.bind_product_operand(0, da.shape)
        h_operand = workspace.bind_product_operand(1, (len(da), W.shape[1]))
        sum_da = bind_sum_columns(da)
        unscale = 1.0 / scale
        finish = (
            None if da_prev is None else self._bind_finish(da_prev, activation_prev, source_prev, unscale, workspace)
        )

        def backward(h_prev: Array, dW: Array, db: Array, accumulate: bool) -> None:
            dW_sum, db_sum = dW, db
            if accumulate:
                dW_sum, db_sum = workspace.gradient[: dW.size].reshape(dW.shape), np.empty_like(db)
            da_product = da if da_operand is None else da_operand(da)
            h_product = h_prev if h_operand is None else h_operand(h_prev)
            da_product.T.dot(h_product, dW_sum)
            sum_da(db_sum)
            if unscale != 1.0:
                np.multiply(dW_sum, unscale, out=dW_sum)
                np.multiply(db_sum, unscale, out=db_sum)
            if accumulate:
                np.add(dW, dW_sum, out=dW)
                np.add(db, db_sum, out=db)
            if da_prev is not None:
                da_product.dot(W, da_prev)
                if finish is not None:
                    finish()

        return backward

    def bind_delta(
        self,
        da: Array,
        W: Array,
        da_prev: Array,
        activation_prev: Activation,
        source_prev: Array,
        workspace: Workspace,
    ) -> Callable[[], object]:
        """da_prev = (da W) ⊙ g', what `bind_backward` passes down, by itself."""
        operand = workspace.bind_product_operand(0, da.shape)
        finish = self._bind_finish(da_prev, activation_prev, source_prev, 1.0, workspace)
        assert finish is not None

        def delta() -> None:
            (da if operand is None else operand(da)).dot(W, da_prev)
            finish()

        return delta

    def _bind_finish(
        self, dh: Array, activation: Activation | None, source: Array | None, unscale: float, workspace: Workspace
    ) -> Callable[[], object] | None:
        """What turns dh into da in place; at the network's input, only the scale goes."""
        if activation is None:
            return None if unscale == 1.0 else lambda: np.multiply(dh, unscale, out=dh)
        times_slope = partial(activation.backward, dh, source, workspace.scratch_like(dh))
        round_dh = workspace.bind_round(dh)
        if round_dh is None:
            return times_slope

        def finish() -> None:
            times_slope()
            round_dh()

        return finish

    def layer_backward(
        self,
        da: Array,
        h_prev: Array,
        W: Array,
        source: Array | None,
        activation_prev: Activation,
        precision: Precision,
        dW: Array,
        db: Array,
        da_prev: Array | None,
        accumulate: bool,
    ) -> None:
        """`gpuback.fused_backward`, its arguments checked."""
        da, h_prev, W = (_carrier(array, precision) for array in (da, h_prev, W))
        source = None if source is None else _carrier(source, precision)
        workspace = self.workspace(len(da), (W.shape[1], len(W)), precision)
        # BLAS writes aligned float32 or float64 only; whatever else was given gets the result copied in.
        dW_sum, db_sum = (np.require(array, requirements="A") for array in (dW, db))
        product = da_prev
        if da_prev is not None and (precision.sixteen_bit or not da_prev.flags.aligned):
            product = self.empty(da_prev.shape, precision.accumulator)
        if precision.tf32:
            W, refresh = self._bind_weights(W, precision)
            refresh()
        run = self.bind_backward(da, W, product, None, None, 1.0, workspace)
        run(h_prev, dW_sum, db_sum, accumulate)
        if product is not None:  # in parts that stay in cache
            rows = max(1, FINISHED_AT_ONCE // W.shape[1])
            workspace = self.workspace(rows, (W.shape[1],), precision)
            for part in (slice(start, start + rows) for start in range(0, len(da), rows)):
                finish = self._bind_finish(
                    product[part], activation_prev, None if source is None else source[part], 1.0, workspace
                )
                if finish is not None:
                    finish()
        for given, result in ((dW, dW_sum), (db, db_sum), (da_prev, product)):
            if given is not None and given is not result:
                given[...] = result

    def may_overlap(self, array: Array, other: Array) -> bool:
        """Whether two arrays may share memory."""
        return np.may_share_memory(array, other)

    def any_outside(self, array: Array, highest: int) -> bool:
        """Whether an element lies outside 0 … highest. NaN does not count."""
        if array.dtype is SIGNED:  # as an unsigned number a negative one is huge: one maximum finds both kinds
            unsigned = array.view(UNSIGNED)
            return bool(unsigned.item(unsigned.argmax()) > highest)  # argmax is quicker to start than maximum.reduce
        return bool(array.min() < 0 or array.max() > highest)

    def fused_network(self, architecture: Architecture, theta: Array, batch_size: int, **needs: bool) -> None:
        """Networks go layer by layer."""

    all_finite, norm = staticmethod(all_finite), staticmethod(norm)
    bind_sgd, bind_adam = SGDUpdate, AdamUpdate

    def bind_loss_scale(
        self, initial: float, growth_interval: int, n_parameters: int, dtype: np.dtype[Any]
    ) -> NumpyLossScale:
        """S, starting at `initial`, doubled after so many updates in a row."""
        return NumpyLossScale(initial, growth_interval, dtype)

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return aligned_empty(shape, dtype)

    def scalar(self, value: Array | float, dtype: np.dtype[Any]) -> Array:
        """A 0-d array."""
        return np.array(value, dtype)

    def copy_for_display(self, array: Array, dtype: np.dtype[Any], factor: float = 1.0) -> Array:
        """A fresh C-ordered copy in `dtype`, which holds every value of array's, times a power of two."""
        copy = np.array(array, dtype, order="C")
        if factor != 1.0:
            copy *= factor
        return copy

    def to_floats(self, values: Sequence[Array | float]) -> list[float]:
        return [float(value) for value in values]

    def indices(self, order: NDArray[np.intp]) -> Array:
        """Row numbers as `take_rows` wants them."""
        return order

    def take_rows(self, array: Array, indices: Array, out: Array) -> None:
        """out = array[indices]. Indices are in range; "raise" would make NumPy buffer the output."""
        np.take(array, indices, axis=0, out=out, mode="clip")

    def to_numpy(self, array: Array) -> NDArray[Any]:
        return np.asarray(array)

    def to_array(self, value: ArrayLike, what: str) -> Array:
        """Real numbers of any kind as an array, of whatever dtype, where they are: for a look before `asarray`."""
        return as_host_array(value, None, what)

    asarray = staticmethod(as_host_array)

    def explain_network(self, architecture: Architecture, batch_size: int) -> None:
        """Networks go layer by layer."""

    def explain_forward(self, batch_size: int, n_out: int, n_in: int, precision: Precision) -> str:
        """What runs a layer's forward pass."""
        return "BLAS GEMM"

    def explain_backward(
        self, batch_size: int, n_out: int, n_in: int, precision: Precision, *, need_da_prev: bool
    ) -> str:
        """What runs a layer's backward pass."""
        return "BLAS GEMM for dW, chained sums for db" + (", GEMM for dh" if need_da_prev else "")


def _carrier(array: Array, precision: Precision) -> Array:
    """16-bit values in float32, which holds them exactly; strides that sums cannot walk are copied out."""
    array = array.astype(precision.accumulator, copy=False)
    return array if array.flags.c_contiguous or array.flags.f_contiguous else np.ascontiguousarray(array)
