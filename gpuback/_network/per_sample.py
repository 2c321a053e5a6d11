"""Per-sample gradients: their norms, the mean of clipped ones, or all of them written out.

Samples go through the network and back together, as in `backprop.py`, and meet only where dW and db are summed. A
sample's gradient is the outer product of its rows of da_k and h_{k−1}, so its norm follows from theirs:

    ‖∇_b‖² = Σ_k ‖da_k[b]‖² (‖h_{k−1}[b]‖² + 1)

and c_b ∇_b has the rows c_b da_k[b]. So norms cost the forward pass and the da's. A clipped gradient costs little more
than an unclipped one: the forward pass, the da's, the norms, and the sums dW and db of scaled da's.

Until it is clipped, da is here of a sample's own loss, w_b ∂ℓ_b/∂a, not divided by B.

Source: Goodfellow, Efficient per-example gradient computations, 2015 (the norms); Abadi et al., Deep learning with
differential privacy, 2016 (clipping).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.precision import Precision
from gpuback._core.typing import Array
from gpuback._core.validation import number
from gpuback._network.backprop import Blocks, rows_of
from gpuback._network.layers import Block, BoundNetwork
from gpuback.errors import OptionError

LARGEST_CLIPPED, LARGEST_SCALE = 14, 100
"""Powers of two: float16, which ends at 2¹⁶, holds clipped da's below the first; the second's inverse is an ordinary
float32."""


def checked_max_norm(value: float) -> float:
    """Return `value` as a float if 0 < value ≤ ∞."""
    checked = number(value)
    if not checked > 0.0:
        raise OptionError(f"max_norm: expected a number > 0, math.inf for no clipping, got {value!r}")
    return checked


def clip_scale(precision: Precision, batch_size: int, max_norm: float) -> float:
    """Choose the power of two that clipped da's carry: for float16 one that brings max_norm / B near 2¹⁴, else 1.

    No da is longer than the gradient it belongs to, so a clipped one is at most max_norm / B. Where most samples are
    clipped hard, this is far below the numbers that float16 holds exactly. Where few are, the scale is that of ordinary
    gradients.
    """
    ordinary = precision.gradient_scale(batch_size)
    if precision.operand != np.float16:
        return ordinary
    return max(ordinary, 2.0 ** min(LARGEST_CLIPPED - math.frexp(max_norm / batch_size)[1], LARGEST_SCALE))


class PerSample(Blocks["PerSampleBlock"]):
    """The per-sample passes of one network for one batch size.

    Args:
        architecture, theta, ops, batch_size: as `gpuback._network.backprop.Backprop`'s.
        clip_scale: the power of two that clipped da's carry; every layer's da is kept then. None if nothing is clipped.
    """

    def __init__(
        self, architecture: Architecture, theta: Array, ops: Ops, batch_size: int, clip_scale: float | None
    ) -> None:
        self.key = batch_size, clip_scale
        network = BoundNetwork.of(architecture, theta, ops)

        def block(rows: int) -> PerSampleBlock:
            return PerSampleBlock(network, rows, batch_size, clip_scale)

        super().__init__(network, block, batch_size, need_gradient=clip_scale is not None)

    def norms(self, x: Array, y: Array, weight: Array | None, out: Array) -> None:
        """Compute out_b = ‖∂(w_b ℓ_b)/∂θ‖, (B,)."""

        def work(task: int, worker: int) -> None:
            for block, rows in self._each(task, worker):
                block.norms(rows_of(x, rows), rows_of(y, rows), rows_of(weight, rows), rows_of(out, rows))

        self._run(work)

    def gradients(self, x: Array, y: Array, weight: Array | None, out: Gradients) -> None:
        """Compute out = ∂(w_b ℓ_b)/∂θ of each sample, (B, n_parameters)."""

        def work(task: int, worker: int) -> None:
            for block, rows in self._each(task, worker):
                dW, db = ([rows_of(part, rows) for part in parts] for parts in (out.weights, out.biases))
                block.gradients(rows_of(x, rows), rows_of(y, rows), rows_of(weight, rows), dW, db)

        self._run(work)

    def value_and_clipped_grad(
        self, x: Array, y: Array, weight: Array | None, max_norm: float, gradients: Gradients
    ) -> Array | float:
        """Return the loss; gradients = (1/B) Σ_b c_b ∂(w_b ℓ_b)/∂θ."""

        def visit(
            block: PerSampleBlock, rows: slice | None, dW: Sequence[Array], db: Sequence[Array], add: bool
        ) -> Any:
            batch = rows_of(x, rows), rows_of(y, rows), rows_of(weight, rows)
            return block.value_and_clipped_grad(*batch, max_norm, dW, db, add)

        return self._add_up(visit, gradients, accumulate=False)


class PerSampleBlock(Block):
    """All layers and the loss for one block of rows, each row with its own loss, as if it were a batch of one."""

    def __init__(self, network: BoundNetwork, rows: int, batch_size: int, clip_scale: float | None) -> None:
        super().__init__(network, rows, batch_size=1, need_gradient=False, need_input_grad=False)
        architecture, ops, weights = network.architecture, network.ops, network.weights
        clips = clip_scale is not None
        widths, workspace = architecture.sizes[1:-1], self.workspace
        below = [workspace.hidden(n) if clips else workspace.delta(k, n) for k, n in enumerate(widths, 1)]
        deltas = [*below, self.output_delta]
        norms = ops.empty(rows, np.dtype(np.float64))
        self._add_norms = [ops.bind_add_norms(da, norms, workspace) for da in deltas]
        self._outer = [ops.bind_outer(da, workspace) for da in deltas]
        self._down: list[Callable[[], object]] = [
            ops.bind_delta(da, W, da_prev, g, source, 1.0, workspace)
            for da, W, da_prev, g, source in zip(
                deltas[1:], weights[1:], below, architecture.hidden_activations, self.sources, strict=True
            )
        ]
        if clip_scale is not None:
            self._clip = [ops.bind_clip(da, norms, clip_scale / batch_size, workspace) for da in deltas]
            self._backward = [
                ops.bind_backward(da, W, None, None, None, clip_scale, workspace)
                for da, W in zip(deltas, weights, strict=True)
            ]

    def norms(self, x: Array, y: Array, weight: Array | None, out: Array | None) -> tuple[Any, list[Array]]:
        """Go forward, through the loss and back, and add up each layer's part of the norms.

        Returns:
            These rows' loss as `ops.bind_loss` returns it, and h_0 … h_{L−1}.
        """
        inputs, loss = self._to_the_loss(x, y, weight)
        top = len(inputs) - 1
        for k in range(top, -1, -1):
            self._add_norms[k](inputs[k], k == top, None if k else out)
            if k:
                self._down[k - 1]()
        return loss, inputs

    def gradients(self, x: Array, y: Array, weight: Array | None, dW: Sequence[Array], db: Sequence[Array]) -> None:
        """Go forward, through the loss and back, and write each layer's outer products to dW and db."""
        inputs, _ = self._to_the_loss(x, y, weight)
        for k in range(len(inputs) - 1, -1, -1):
            self._outer[k](inputs[k], dW[k], db[k])
            if k:
                self._down[k - 1]()

    def value_and_clipped_grad(
        self,
        x: Array,
        y: Array,
        weight: Array | None,
        max_norm: float,
        dW: Sequence[Array],
        db: Sequence[Array],
        accumulate: bool,
    ) -> Any:
        """Compute the norms, scale every da, and sum over these rows: dW, db (=, or += with `accumulate`).

        Returns:
            These rows' loss as `ops.bind_loss` returns it.
        """
        loss, inputs = self.norms(x, y, weight, None)
        for k in range(len(inputs) - 1, -1, -1):
            self._clip[k](max_norm)
            self._backward[k](inputs[k], dW[k], db[k], accumulate)
        return loss

    def _to_the_loss(self, x: Array, y: Array, weight: Array | None) -> tuple[list[Array], Any]:
        inputs = [self.forward(x), *self.hidden]
        return inputs, self.loss(y, weight)
