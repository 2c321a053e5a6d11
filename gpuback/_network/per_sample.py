"""Each sample's own gradient: its norm, a mean of clipped ones, or all of them written out.

Samples go through the network and back together, as in `backprop.py`, and meet only where dW and db are summed.
Before that sum a sample's gradient is known by its rows of da_k and h_{k−1}, whose outer product it is:

    ‖∇_b‖² = Σ_k ‖da_k[b]‖² (‖h_{k−1}[b]‖² + 1)

and c_b ∇_b has the rows c_b da_k[b]. So norms cost the forward pass and the da's, and a clipped gradient costs what an
unclipped one does: the forward pass, the da's, the norms, and with scaled da's the sums dW and db.

Here da is that of a sample's own loss, w_b ∂ℓ_b/∂a, not divided by B, until it is clipped.

Source: Goodfellow, Efficient per-example gradient computations, 2015 (the norms); Abadi et al., Deep learning with
differential privacy, 2016 (what clipping them is for).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.precision import Precision
from gpuback._core.typing import Array
from gpuback._core.validation import number
from gpuback._network.backprop import Block, Blocks, keep, rows_of
from gpuback.errors import OptionError

if TYPE_CHECKING:
    from gpuback._network.mlp import MLP

LARGEST_CLIPPED, LARGEST_SCALE = 14, 100
"""Powers of two: float16, which ends at 2¹⁶, holds clipped da's below the first; the second's inverse is an ordinary
float32."""


def gradient_norms(net: MLP, x: Array, y: Array, weight: Array | None) -> Array:
    """`MLP.gradient_norms`, its arguments checked."""
    norms = net.ops.empty(len(x), net.theta.dtype)
    with _passes(net, len(x), None) as passes:
        passes.norms(x, y, weight, norms)
    return norms


def gradients(net: MLP, x: Array, y: Array, weight: Array | None) -> Gradients:
    """`MLP.per_sample_grad`, its arguments checked."""
    theta = net.ops.empty((len(x), net.n_parameters), net.theta.dtype)
    gradients = Gradients(theta, *net.architecture.layout.split(theta))
    with _passes(net, len(x), None) as passes:
        passes.gradients(x, y, weight, gradients)
    return gradients


def value_and_clipped_grad(
    net: MLP, x: Array, y: Array, weight: Array | None, max_norm: float, gradients: Gradients
) -> Array | float:
    """`MLP.value_and_clipped_grad` with a finite max_norm, its arguments checked."""
    gradients.inputs = None
    with _passes(net, len(x), clip_scale(net.architecture.precision, len(x), max_norm)) as passes:
        return passes.value_and_clipped_grad(x, y, weight, max_norm, gradients)


def checked_max_norm(value: float) -> float:
    """`value` as a float if 0 < value ≤ ∞."""
    checked = number(value)
    if not checked > 0.0:
        raise OptionError(f"max_norm: expected a number > 0, math.inf for no clipping, got {value!r}")
    return checked


def clip_scale(precision: Precision, batch_size: int, max_norm: float) -> float:
    """The power of two that clipped da's carry: for float16 one that brings max_norm / B near 2¹⁴, else 1.

    No da is longer than the gradient it belongs to, so a clipped one is at most max_norm / B: far below what float16
    holds exactly where many samples are shortened a lot. Where few are, the scale is that of ordinary gradients.
    """
    ordinary = precision.gradient_scale(batch_size)
    if precision.operand != np.float16:
        return ordinary
    return max(ordinary, 2.0 ** min(LARGEST_CLIPPED - math.frexp(max_norm / batch_size)[1], LARGEST_SCALE))


@contextmanager
def _passes(net: MLP, batch_size: int, clip_scale: float | None) -> Iterator[PerSample]:
    """The passes for one batch size, out of the network's store, and the scope that they run in."""
    passes = net.per_sample_passes.pop((batch_size, clip_scale), None)
    if passes is None:
        passes = PerSample(net.architecture, net.theta, net.ops, batch_size, clip_scale)
    with net.ops.scope():
        yield passes
    keep(passes, net.per_sample_passes)


class PerSample(Blocks["PerSampleBlock"]):
    """The passes of one network for one batch size that look at each sample by itself.

    Args:
        architecture, theta, ops, batch_size: as `gpuback._network.backprop.Backprop`'s.
        clip_scale: what clipped da's carry, a power of two; None if nothing is clipped. Every layer's da is kept then.
    """

    def __init__(
        self, architecture: Architecture, theta: Array, ops: Ops, batch_size: int, clip_scale: float | None
    ) -> None:
        self.key = batch_size, clip_scale
        make_block = partial(PerSampleBlock, clip_scale)
        super().__init__(make_block, architecture, theta, ops, batch_size, clip_scale is not None, False)

    def norms(self, x: Array, y: Array, weight: Array | None, out: Array) -> None:
        """out_b = ‖∂(w_b ℓ_b)/∂θ‖, (B,)."""

        def work(share: int, worker: int) -> None:
            for block, rows in self._each(share, worker):
                block.norms(rows_of(x, rows), rows_of(y, rows), rows_of(weight, rows), rows_of(out, rows))

        self._run(work)

    def gradients(self, x: Array, y: Array, weight: Array | None, out: Gradients) -> None:
        """∂(w_b ℓ_b)/∂θ of each sample, (B, n_parameters)."""

        def work(share: int, worker: int) -> None:
            for block, rows in self._each(share, worker):
                dW, db = ([rows_of(part, rows) for part in parts] for parts in (out.weights, out.biases))
                block.gradients(rows_of(x, rows), rows_of(y, rows), rows_of(weight, rows), dW, db)

        self._run(work)

    def value_and_clipped_grad(
        self, x: Array, y: Array, weight: Array | None, max_norm: float, gradients: Gradients
    ) -> Array | float:
        """The loss, and (1/B) Σ_b c_b ∂(w_b ℓ_b)/∂θ into `gradients`."""

        def visit(
            block: PerSampleBlock, rows: slice | None, dW: Sequence[Array], db: Sequence[Array], add: bool
        ) -> Any:
            batch = rows_of(x, rows), rows_of(y, rows), rows_of(weight, rows)
            return block.value_and_clipped_grad(*batch, max_norm, dW, db, add)

        return self._add_up(visit, gradients, accumulate=False)


class PerSampleBlock(Block):
    """A fixed number of rows: every layer bound to its buffers, up to the loss as for a batch of one sample."""

    def __init__(
        self,
        clip_scale: float | None,
        architecture: Architecture,
        weights: Sequence[Array],
        biases: Sequence[Array],
        ops: Ops,
        rows: int,
        batch_size: int,
        need_gradient: bool,
        need_input_grad: bool,
    ) -> None:
        super().__init__(architecture, weights, biases, ops, rows, 1, False, need_input_grad)
        clips = clip_scale is not None
        widths, workspace = architecture.sizes[1:-1], self.workspace
        below = [workspace.hidden(n) if clips else workspace.delta(k, n) for k, n in enumerate(widths, 1)]
        deltas = [*below, self.output_delta]
        norms = ops.empty(rows, np.dtype(np.float64))
        self._add_norms = [ops.bind_add_norms(da, norms, workspace) for da in deltas]
        self._outer = [ops.bind_outer(da, workspace) for da in deltas]
        self._down: list[Callable[[], object]] = [
            ops.bind_delta(da, W, da_prev, g, source, workspace)
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
        """Forward; the loss; from the da_L that it leaves behind, down: each layer's share of the norms, the da below.

        Returns:
            What `ops.bind_loss` says of these rows, and h_0 … h_{L−1}.
        """
        inputs, loss = self._to_the_loss(x, y, weight)
        top = len(inputs) - 1
        for k in range(top, -1, -1):
            self._add_norms[k](inputs[k], k == top, None if k else out)
            if k:
                self._down[k - 1]()
        return loss, inputs

    def gradients(self, x: Array, y: Array, weight: Array | None, dW: Sequence[Array], db: Sequence[Array]) -> None:
        """Likewise, each layer's outer products."""
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
        """The norms; then every da scaled, and the sums over these rows.

        Returns:
            What `ops.bind_loss` says of these rows.
        """
        loss, inputs = self.norms(x, y, weight, None)
        for k in range(len(inputs) - 1, -1, -1):
            self._clip[k](max_norm)
            self._backward[k](inputs[k], dW[k], db[k], accumulate)
        return loss

    def _to_the_loss(self, x: Array, y: Array, weight: Array | None) -> tuple[list[Array], Any]:
        inputs = [self.forward(x), *self.hidden]
        return inputs, self.loss(y, weight)
