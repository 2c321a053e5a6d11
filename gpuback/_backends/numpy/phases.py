"""A network's passes and its step in two phases with one meeting between them, for threads that share a batch.

First *by rows*: each worker takes some rows of the batch through the forward pass, the loss and every layer's da.
Then *by parameters*: each takes some rows of a layer's W, sums their gradient over the whole batch, and updates them at
once, while they are in cache. So no gradient is summed in parts: samples meet in products over the whole batch alone.

A loss or gradient that is not finite makes no update. Whether a gradient is finite is mostly known before it is
computed: with S = Σ_k ‖h_{k−1}‖² + ‖da_k‖², no sum of products da h is larger than S/2, as |da h| ≤ (da² + h²)/2. Where
S is finite, so is the gradient. Where it is not, the whole gradient is looked at before anything is updated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpuback._backends.numpy.gradients import bind_bias_gradient, bind_weight_gradient
from gpuback._backends.numpy.plans import Phases
from gpuback._backends.numpy.updates import NumpyUpdate
from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.threads import Phase
from gpuback._core.typing import Array


class NumpyPhases:
    """The passes of a whole network for one batch size; see `gpuback._backends.protocol.FusedNetwork`.

    Args:
        ops, architecture, theta, batch_size, need_gradient, need_input_grad: as `Ops.fused_network`'s.
        plan: how batch and parameters are cut, and who works on them.
    """

    def __init__(
        self,
        ops: Ops,
        architecture: Architecture,
        theta: Array,
        batch_size: int,
        need_gradient: bool,
        need_input_grad: bool,
        plan: Phases,
    ) -> None:
        self.key = batch_size, need_gradient, need_input_grad
        self._batch_size, self._threads, self._rows = batch_size, plan.threads, plan.rows
        self._ops, self._layout = ops, architecture.layout
        self._network = _Network(ops, architecture, theta, batch_size, need_gradient, need_input_grad)
        self._by_rows: dict[tuple[int, int], _Rows] = {}
        self._buffers: dict[tuple[int, int], _Buffers] = {}
        self._by_parameters = [_Parameters(self._network, *piece) for piece in plan.parameters if need_gradient]
        self._split: tuple[Any, Any] = None, None

    def forward(self, x: Array, out: Array) -> None:
        """out = ŷ, (B, n_L)."""

        def by_rows(index: int, worker: int) -> None:
            rows = self._rows[index]
            self._piece(index, worker).forward(x[rows], out[rows])

        self._network.refresh()
        self._threads.run(by_rows, len(self._rows))

    def loss(self, x: Array, y: Array, weight: Array | None) -> float:
        """Return (1/B) Σ_b w_b ℓ(ŷ_b, y_b)."""

        def by_rows(index: int, worker: int) -> float:
            rows = self._rows[index]
            return self._piece(index, worker).loss(x[rows], y[rows], None if weight is None else weight[rows])

        self._network.refresh()
        return self._ops.mean_loss(self._threads.run(by_rows, len(self._rows)), self._batch_size)

    def value_and_grad(
        self, x: Array, y: Array, weight: Array | None, gradients: Gradients, *, accumulate: bool = False
    ) -> float:
        """Return the loss; write or add its gradients to `gradients`, ∂loss/∂x too if it has an array for it."""
        dW, db = gradients.weights, gradients.biases

        def sum_up(piece: _Parameters, worker: int) -> None:
            piece.gradient(x, dW, db, accumulate)

        return self._run(x, y, weight, gradients.inputs, lambda *_: None, sum_up)

    def step(
        self, x: Array, y: Array, weight: Array | None, gradient: Array, update: NumpyUpdate, clips: bool, loss: Array
    ) -> None:
        """Make the step that `update` has been asked for.

        Args:
            x, y, weight: the batch.
            gradient: (n_parameters,) to work with.
            update: the optimizer's; none of its parameters is frozen.
            clips: whether the gradient's norm is brought down to `clip_norm`.
            loss: where the loss goes.
        """
        if self._split[0] is not gradient:
            self._split = gradient, self._layout.split(gradient)
        dW, db = self._split[1]
        updates = False

        def decide(value: float, squares: float) -> None:
            nonlocal updates
            is_finite = math.isfinite(value) and squares <= self._network.largest
            updates = is_finite and not clips and update.begin()

        def sum_up_and_update(piece: _Parameters, worker: int) -> None:
            piece.gradient(x, dW, db, False)
            if updates:
                update.part(gradient, piece.span, worker)

        def end() -> None:
            if updates:
                update.end()

        loss[...] = value = self._run(x, y, weight, None, decide, sum_up_and_update, end)
        if not updates:
            update.complete(gradient, value)

    def _run(
        self,
        x: Array,
        y: Array,
        weight: Array | None,
        dx: Array | None,
        decide: Callable[[float, float], object],
        by_parameters: Callable[[_Parameters, int], object],
        end: Callable[[], object] | None = None,
    ) -> float:
        """Run both phases and return the loss.

        Args:
            x, y, weight: the batch.
            dx: where ∂loss/∂x goes.
            decide: called between the phases, with the loss and S.
            by_parameters: work of the second phase on a piece, and the number of the worker.
            end: called after the second phase.
        """
        losses, squares = [0.0] * len(self._rows), [0.0] * len(self._rows)
        value = math.nan

        def rows_of_index(index: int, worker: int) -> None:
            rows = self._rows[index]
            losses[index], squares[index] = self._piece(index, worker).backward(
                x[rows], y[rows], None if weight is None else weight[rows], None if dx is None else dx[rows]
            )

        def meet() -> None:
            nonlocal value
            value = self._ops.mean_loss(losses, self._batch_size)
            decide(value, sum(squares))

        def parameters_of_index(index: int, worker: int) -> None:
            by_parameters(self._by_parameters[index], worker)

        self._network.refresh()
        self._threads.run_phases(
            Phase(rows_of_index, len(self._rows), meet), Phase(parameters_of_index, len(self._by_parameters), end)
        )
        return value

    def _piece(self, index: int, worker: int) -> _Rows:
        """Return some rows of the batch, bound to the buffers of a worker."""
        piece = self._by_rows.get((index, worker))
        if piece is None:
            rows = self._rows[index]
            height = rows.stop - rows.start
            buffers = self._buffers.get((height, worker))
            if buffers is None:
                buffers = self._buffers[height, worker] = _Buffers(self._network, height)
            piece = self._by_rows[index, worker] = _Rows(self._network, rows, buffers)
        return piece


class _Network:
    """A network's parameters, and what its layers keep of the whole batch from the first phase to the second.

    Attributes:
        hidden, deltas: h_1 … h_{L−1} and da_1 … da_L, each (B, n_k); none without gradients.
        inputs: h_0 as products read it; None where that is x itself.
        largest: what S may be: the largest number that sums can hold.
    """

    def __init__(
        self,
        ops: Ops,
        architecture: Architecture,
        theta: Array,
        batch_size: int,
        need_gradient: bool,
        need_input_grad: bool,
    ) -> None:
        self.ops, self.architecture, self.batch_size = ops, architecture, batch_size
        self.need_gradient, self.need_input_grad = need_gradient, need_input_grad
        precision, sizes = architecture.precision, architecture.sizes
        self.weights, self.refresh = ops.bind_weights(theta, architecture.layout, precision)
        self.biases = architecture.layout.split(theta)[1]
        self.scale = precision.gradient_scale(batch_size)
        self.largest = float(np.finfo(precision.accumulator).max)
        workspace = ops.workspace(batch_size, sizes, precision)
        self.hidden, self.deltas, self.inputs = list[Array](), list[Array](), None
        if need_gradient:
            self.hidden = [workspace.hidden(width) for width in sizes[1:-1]]
            self.deltas = [*map(workspace.hidden, sizes[1:-1]), workspace.output(sizes[-1])]
            self.inputs = workspace.hidden(sizes[0]) if precision.sixteen_bit else None


class _Buffers:
    """What one worker writes to while it works on so many rows."""

    def __init__(self, network: _Network, rows: int) -> None:
        architecture = network.architecture
        sizes = architecture.sizes
        self.workspace = workspace = network.ops.workspace(rows, sizes, architecture.precision)
        self.load = network.ops.bind_load(sizes[0], architecture.precision, workspace)
        self.pre_activations = [
            workspace.hidden(width) if g.derivative_from == "a" else None
            for width, g in zip(sizes[1:-1], architecture.hidden_activations, strict=True)
        ]
        self.hidden = [] if network.need_gradient else [workspace.hidden(width) for width in sizes[1:-1]]
        self.output = workspace.output(sizes[-1])
        self.apply_output = network.ops.bind_output(architecture.output, self.output, workspace)
        self.loss = network.ops.bind_loss(
            architecture.loss_row,
            architecture.output,
            self.output,
            self.output,
            network.batch_size / network.scale,
            workspace,
        )
        self.dx = workspace.delta(0, sizes[0]) if network.need_input_grad else None


class _Rows:
    """Some rows of the batch, bound to one worker's buffers: from x to the loss, and back to every layer's da."""

    def __init__(self, network: _Network, rows: slice, buffers: _Buffers) -> None:
        ops, workspace, self._buffers = network.ops, buffers.workspace, buffers
        activations, output = network.architecture.hidden_activations, buffers.output
        hidden = [h[rows] for h in network.hidden] or buffers.hidden
        pre_activations = buffers.pre_activations
        targets = zip([*hidden, output], [*pre_activations, None], [*activations, None], strict=True)
        self._layers = [
            (ops.bind_forward(W, b, h, a, g, workspace), h)
            for W, b, (h, a, g) in zip(network.weights, network.biases, targets, strict=True)
        ]
        if not network.need_gradient:
            return
        self._inputs = None if network.inputs is None else network.inputs[rows]
        self._output_delta = network.deltas[-1][rows]
        below = [da[rows] for da in network.deltas[:-1]]
        sources = [h if a is None else a for h, a in zip(hidden, pre_activations, strict=True)]
        layers = list(zip([*below, output], network.weights, [buffers.dx, *below], strict=True))
        self._deltas = [
            ops.bind_delta(*layers[k], activations[k - 1], sources[k - 1], network.scale, workspace)
            for k in range(len(layers) - 1, 0, -1)
        ]
        if buffers.dx is not None:
            self._deltas.append(ops.bind_delta(*layers[0], None, None, network.scale, workspace))
        self._squares = [partial(flat.dot, flat) for flat in (_flat(part) for part in (*hidden, *below, output))]

    def forward(self, x: Array, out: Array) -> None:
        """out = ŷ."""
        self._to_the_top(x)
        self._buffers.apply_output(out)

    def loss(self, x: Array, y: Array, weight: Array | None) -> float:
        """Return the sum of these rows' losses."""
        self._to_the_top(x)
        loss: float = self._buffers.loss(y, weight)
        return loss

    def backward(self, x: Array, y: Array, weight: Array | None, dx: Array | None) -> tuple[float, float]:
        """Go through the network and back, dx = these rows of ∂loss/∂x; return their loss and their part of S."""
        h_0 = self._to_the_top(x)
        if self._inputs is not None:
            np.copyto(self._inputs, h_0)
        loss = self._buffers.loss(y, weight)
        np.copyto(self._output_delta, self._buffers.output)
        for delta in self._deltas:
            delta()
        if dx is not None and self._buffers.dx is not None:
            np.copyto(dx, self._buffers.dx)
        flat = h_0.reshape(-1)
        return loss, float(flat.dot(flat)) + sum(float(squares()) for squares in self._squares)

    def _to_the_top(self, x: Array) -> Array:
        """Compute a_L; return h_0."""
        h = h_0 = self._buffers.load(x)
        for layer, h_next in self._layers:
            layer(h)
            h = h_next
        return h_0


def _flat(array: Array) -> Array:
    return (array if array.flags.c_contiguous else array.T).reshape(-1)


class _Parameters:
    """Some rows of a layer's W, with its b if they are the last: their gradient, summed over the whole batch.

    Args:
        network: which one.
        layer: which, counting from 0.
        first, end: the rows of W.

    Attributes:
        span: where the parameters lie in θ.
    """

    def __init__(self, network: _Network, layer: int, first: int, end: int) -> None:
        architecture, da = network.architecture, network.deltas[layer]
        n_in, n_out = architecture.layout.shapes[layer]
        place = architecture.layout.layer(layer)
        has_biases = end == n_out
        self.span = slice(place.start + first * n_in, place.stop if has_biases else place.start + end * n_in)
        self._layer, self._rows = layer, slice(first, end)
        self._h = network.hidden[layer - 1] if layer else network.inputs
        workspace = network.ops.workspace(network.batch_size, (n_in, end - first), architecture.precision)
        self._weights = bind_weight_gradient(da[:, first:end], n_in, network.scale, workspace)
        self._biases = bind_bias_gradient(da, network.scale) if has_biases else None

    def gradient(self, x: Array, dW: Sequence[Array], db: Sequence[Array], accumulate: bool) -> None:
        """Compute their part of dW and db (=, or += with `accumulate`)."""
        self._weights(x if self._h is None else self._h, dW[self._layer][self._rows], accumulate)
        if self._biases is not None:
            self._biases(db[self._layer], accumulate)
