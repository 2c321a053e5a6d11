"""The NumPy backend: the readable specification of what every backend computes, and a fast one on a CPU.

`gpuback._backends.protocol.Ops` says what each operation gets and returns. Operations are *bound* before they run:
views, scratch and decisions are made once, and bound functions only compute.

16-bit values are carried in float32 arrays, which hold every one of them exactly, and are rounded to their format where
they are stored. A product of two 16-bit values is exact in float32, so a float32 GEMM of carriers is a 16-bit product
with float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpuback._backends.numpy import plans
from gpuback._backends.numpy.arrays import NumpyArrays
from gpuback._backends.numpy.gradient_scale import NumpyGradientScale
from gpuback._backends.numpy.gradients import bind_bias_gradient, bind_weight_gradient
from gpuback._backends.numpy.jets import NumpyJets
from gpuback._backends.numpy.layer_backward import LayerBackward
from gpuback._backends.numpy.per_sample import NumpyPerSample
from gpuback._backends.numpy.phases import NumpyPhases
from gpuback._backends.numpy.updates import AdamUpdate, NumpyLossScale, SGDUpdate
from gpuback._backends.numpy.workspace import NumpyWorkspace
from gpuback._backends.protocol import JetOps
from gpuback._core.activation_names import activation_named
from gpuback._core.activations import Activation
from gpuback._core.architecture import Architecture
from gpuback._core.loss_formulas import Softmax, bind_through_output
from gpuback._core.losses import Loss
from gpuback._core.parameters import Layout, ParameterRange
from gpuback._core.precision import Precision, round_to_tf32
from gpuback._core.scratch import aligned_empty, bind
from gpuback._core.threads import ThreadPool
from gpuback._core.typing import Array


class NumpyOps(NumpyPerSample, NumpyArrays):
    """Every operation on NumPy arrays."""

    name = "numpy"
    jets: JetOps | None = NumpyJets()
    reproducible = False
    graph_capture = None  # there are no launches

    def workspace(self, rows: int, sizes: tuple[int, ...], precision: Precision) -> NumpyWorkspace:
        return NumpyWorkspace(rows, sizes, precision)

    def plan_blocks(
        self, sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
    ) -> tuple[int, ThreadPool]:
        """Choose blocks that stay in cache; see `plans.plan_blocks`."""
        return plans.plan_blocks(sizes, batch_size, precision, need_gradient=need_gradient)

    def bind_weights(
        self, theta: Array, layout: Layout, precision: Precision
    ) -> tuple[list[Array], Callable[[], object]]:
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

    def bind_load(self, width: int, precision: Precision, workspace: NumpyWorkspace) -> Callable[[Array], Array]:
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
        self, W: Array, b: Array, h: Array, a: Array | None, activation: Activation | None, workspace: NumpyWorkspace
    ) -> Callable[[Array], None]:
        pre_activation = h if a is None else a
        product, W_T = workspace.c_ordered(pre_activation), W.T
        transpose: Callable[[], object] | None = None
        if plans.is_quicker_transposed(len(h), *W.shape):
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
        self, loss: Loss, output: str, a: Array, da: Array, divisor: float, workspace: NumpyWorkspace
    ) -> Callable[[Array, Array | None], float]:
        """Return a function (y, weight): Σ_b w_b ℓ_b over a block's rows, and da in place of a."""
        losses, wide = np.empty(len(a), a.dtype), np.empty(len(a))
        add_up = partial(wide.dot, np.ones_like(wide))
        run = loss.bind(output, a, losses, workspace.scratch_like(a), divisor)
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
        return sum(parts) / batch_size

    def bind_mean_of_blocks(
        self, rows: int, batch_size: int, dtype: np.dtype[Any]
    ) -> tuple[None, Callable[[list[Any]], float]]:
        return None, lambda parts: self.mean_loss(parts, batch_size)

    def bind_output(self, name: str, a: Array, workspace: NumpyWorkspace) -> Callable[[Array], object]:
        if name == "softmax":
            softmax = Softmax(a, a)

            def apply_softmax(out: Array) -> None:
                softmax.shift()
                softmax.normalise()
                np.copyto(out, a)

            return apply_softmax
        activation, scratch = activation_named(name), workspace.scratch_like(a)
        outputs = a if activation.derivative_from == "h" else np.empty_like(a)  # others read a more than once

        def apply(out: Array) -> None:
            activation.forward(a, outputs, scratch)
            np.copyto(out, outputs)

        return apply

    def bind_output_delta(
        self, output: str, source: Array | None, da: Array, divisor: float, workspace: NumpyWorkspace
    ) -> Callable[[Array, Array | None], None]:
        through_output = bind_through_output(output, source, da, workspace.scratch_like(da))
        round_da = workspace.bind_round(da)

        def output_delta(dy: Array, weight: Array | None) -> None:
            np.copyto(da, dy)
            through_output()
            if weight is not None:
                np.multiply(da, weight[:, None], out=da)
            if divisor != 1.0:
                np.divide(da, divisor, out=da)
            if round_da is not None:
                round_da()

        return output_delta

    def bind_backward(
        self,
        da: Array,
        W: Array,
        da_prev: Array | None,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: NumpyWorkspace,
    ) -> Callable[[Array, Array, Array, bool], None]:
        weight_gradient = bind_weight_gradient(da, W.shape[1], scale, workspace)
        bias_gradient = bind_bias_gradient(da, scale)
        delta = (
            None if da_prev is None else self.bind_delta(da, W, da_prev, activation_prev, source_prev, scale, workspace)
        )

        def backward(h_prev: Array, dW: Array, db: Array, accumulate: bool) -> None:
            weight_gradient(h_prev, dW, accumulate)
            bias_gradient(db, accumulate)
            if delta is not None:
                delta()

        return backward

    def bind_delta(
        self,
        da: Array,
        W: Array,
        da_prev: Array,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: NumpyWorkspace,
    ) -> Callable[[], object]:
        operand = workspace.bind_product_operand(0, da.shape)
        finish = self._bind_finish(da_prev, activation_prev, source_prev, 1.0 / scale, workspace)
        multiply = da.dot

        def delta() -> None:
            if operand is None:
                multiply(W, da_prev)
            else:
                operand(da).dot(W, da_prev)
            if finish is not None:
                finish()

        return delta

    def _bind_finish(
        self, dh: Array, activation: Activation | None, source: Array | None, unscale: float, workspace: NumpyWorkspace
    ) -> Callable[[], object] | None:
        """Return a function that turns dh into da in place; at the network's input it only divides by the scale."""
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

    def bind_gradient_scale(self, rows: int, width: int, precision: Precision) -> NumpyGradientScale:
        return NumpyGradientScale(rows, precision)

    def bind_layer_backward(
        self, da: Array, n_in: int, activation_prev: Activation, precision: Precision
    ) -> LayerBackward:
        return LayerBackward(da, n_in, activation_prev, precision)

    def bind_sgd(
        self, theta: Array, velocity: Array | None, steps: int, ranges: Sequence[ParameterRange] | None = None
    ) -> SGDUpdate:
        return SGDUpdate(theta, velocity, steps, ranges)

    def bind_adam(
        self,
        theta: Array,
        first_moment: Array,
        second_moment: Array,
        steps: int,
        ranges: Sequence[ParameterRange] | None = None,
    ) -> AdamUpdate:
        return AdamUpdate(theta, first_moment, second_moment, steps, ranges)

    def bind_loss_scale(
        self, initial: float, growth_interval: int, n_parameters: int, dtype: np.dtype[Any]
    ) -> NumpyLossScale:
        return NumpyLossScale(initial, growth_interval, dtype)

    def fused_network(
        self,
        architecture: Architecture,
        theta: Array,
        batch_size: int,
        *,
        need_gradient: bool = True,
        need_input_grad: bool = False,
    ) -> NumpyPhases | None:
        """Return passes in two phases where threads share a batch that does not stay in cache; see `plans`."""
        plan = plans.plan_phases(architecture.sizes, batch_size, architecture.precision, need_gradient=need_gradient)
        if plan is None:
            return None
        return NumpyPhases(self, architecture, theta, batch_size, need_gradient, need_input_grad, plan)

    def explain_batch(self, sizes: tuple[int, ...], batch_size: int, precision: Precision) -> str:
        phases = plans.plan_phases(sizes, batch_size, precision)
        if phases is not None:
            return plans.describe_phases(phases)
        rows, threads = self.plan_blocks(sizes, batch_size, precision)
        return plans.describe_blocks(batch_size, rows, threads)

    def explain_network(self, architecture: Architecture, batch_size: int) -> None:
        """Return None: networks go layer by layer."""

    def explain_forward(self, batch_size: int, n_out: int, n_in: int, precision: Precision) -> str:
        return "BLAS GEMM"

    def explain_backward(
        self, batch_size: int, n_out: int, n_in: int, precision: Precision, *, need_da_prev: bool
    ) -> str:
        return "BLAS GEMM for dW, chained sums for db" + (", GEMM for dh" if need_da_prev else "")
