"""A network's layers, bound to buffers for a fixed number of rows: from x to a_L, the loss, and from da_L back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.typing import Array


@dataclass(frozen=True)
class BoundNetwork:
    """A network on a backend, its parameters as the backend's products read them.

    Attributes:
        weights: W_1 … W_L: views into θ, or copies in the operands' format, e.g. bfloat16.
        biases: b_1 … b_L, views into θ.
        refresh: brings copies of the weights up to date with θ.
    """

    architecture: Architecture
    ops: Ops
    weights: Sequence[Array]
    biases: Sequence[Array]
    refresh: Callable[[], object]

    @classmethod
    def of(cls, architecture: Architecture, theta: Array, ops: Ops) -> BoundNetwork:
        """Bind the network whose parameters lie in `theta`, (n_parameters,)."""
        weights, refresh = ops.bind_weights(theta, architecture.layout, architecture.precision)
        return cls(architecture, ops, weights, architecture.layout.split(theta)[1], refresh)


Backward = Callable[[Array, Sequence[Array], Sequence[Array], bool], None]
"""(h_0, dW, db, accumulate) → None: from da_L down, each layer's dW and db (=, or += with `accumulate`)."""


class Layers:
    """Every layer bound to its buffers, for a fixed number of rows.

    Args:
        network: the layers.
        rows: how many.
        scale: the power of two that every da carries.
        workspace: of so many rows, for what is only needed while layers run; one of its own by default.

    Attributes:
        output: a_L, (rows, n_L), which `forward` leaves behind.
        output_delta: da_L times `scale`, in the operands' dtype, from which a backward pass starts; may be `output`
            itself.
        hidden, sources: h_1 … h_{L−1}, and what each one's g' is computed from: itself or its a.
        input_gradient: ∂loss/∂x, (rows, n_0), which a backward pass leaves behind if it was asked for.
    """

    def __init__(self, network: BoundNetwork, rows: int, scale: float, workspace: Any = None) -> None:
        architecture, ops = network.architecture, network.ops
        precision, sizes = architecture.precision, architecture.sizes
        self._network, self._scale = network, scale
        if workspace is None:
            workspace = ops.workspace(rows, sizes, precision)
        self.workspace = workspace
        activations = architecture.hidden_activations
        self._load = ops.bind_load(sizes[0], precision, workspace)

        self.hidden = [workspace.hidden(width) for width in sizes[1:-1]]
        pre_activations = [
            workspace.hidden(n) if g.derivative_from == "a" else None
            for n, g in zip(sizes[1:-1], activations, strict=True)
        ]
        self.output = output = workspace.output(sizes[-1])
        targets = zip([*self.hidden, output], [*pre_activations, None], [*activations, None], strict=True)
        self._first, *upper = [
            ops.bind_forward(W, b, h, a, g, workspace)
            for W, b, (h, a, g) in zip(network.weights, network.biases, targets, strict=True)
        ]
        self.output_delta = workspace.output_delta(output)
        self._upper = list(zip(upper, self.hidden, strict=True))
        self.sources = [h if a is None else a for h, a in zip(self.hidden, pre_activations, strict=True)]
        self.input_gradient: Array | None = None

    def forward(self, x: Array) -> Array:
        """Compute a_L, the output layer's pre-activations.

        Returns:
            h_0, x as products read it.
        """
        h_0 = self._load(x)
        self._first(h_0)
        for layer, h in self._upper:
            layer(h)
        return h_0

    def bind_backward(
        self, trainable: Sequence[bool], need_input_grad: bool, weights: Sequence[Array] | None = None
    ) -> Backward:
        """Bind a backward pass. It ends at the lowest layer that has something to compute.

        Args:
            trainable: for each layer, whether its dW and db are computed. The others' entries of dW and db are not
                looked at.
            need_input_grad: whether it leaves ∂loss/∂x in `input_gradient`.
            weights: in place of the network's.
        """
        weights = self._network.weights if weights is None else weights
        ops, workspace, scale = self._network.ops, self.workspace, self._scale
        sizes, hidden = self._network.architecture.sizes, self.hidden
        if need_input_grad and self.input_gradient is None:
            self.input_gradient = workspace.delta(0, sizes[0])
        deltas = [
            self.input_gradient if need_input_grad else None,
            *(workspace.delta(k, width) for k, width in enumerate(sizes[1:-1], 1)),
            self.output_delta,
        ]
        below = [(None, None), *zip(self._network.architecture.hidden_activations, self.sources, strict=True)]
        lowest = 0 if need_input_grad else list(trainable).index(True)
        layers: list[tuple[int, Callable[[Array, Array, Array, bool], object]]] = []
        for k in range(len(sizes) - 2, lowest - 1, -1):
            da, W = deltas[k + 1], weights[k]
            if trainable[k]:
                da_prev = deltas[k] if k > lowest or need_input_grad else None
                layers.append((k, ops.bind_backward(da, W, da_prev, *below[k], scale, workspace)))
            else:
                layers.append((k, _without_gradients(ops.bind_delta(da, W, deltas[k], *below[k], scale, workspace))))

        def backward(h_0: Array, dW: Sequence[Array], db: Sequence[Array], accumulate: bool) -> None:
            inputs = [h_0, *hidden]
            for k, layer in layers:
                layer(inputs[k], dW[k], db[k], accumulate)

        return backward


def _without_gradients(delta: Callable[[], object]) -> Callable[[Array, Array, Array, bool], object]:
    return lambda h_prev, dW, db, accumulate: delta()


class Block(Layers):
    """All layers and the loss, for one block of a batch's rows: forward, loss, backward.

    With `trainable`, only such layers' dW and db are computed.

    Attributes:
        loss: computes the rows' loss from `forward`'s a_L and turns it into the da_L that `backward` starts from.
        apply_output: computes ŷ from `forward`'s a_L.
    """

    def __init__(
        self,
        network: BoundNetwork,
        rows: int,
        batch_size: int,
        need_gradient: bool,
        need_input_grad: bool,
        trainable: Sequence[bool] | None = None,
    ) -> None:
        architecture, ops = network.architecture, network.ops
        scale = architecture.precision.gradient_scale(batch_size)
        super().__init__(network, rows, scale)
        if need_gradient:
            self.backward = self.bind_backward(trainable or [True] * len(network.weights), need_input_grad)
        row, output = architecture.loss_row, architecture.output
        self.loss = ops.bind_loss(row, output, self.output, self.output_delta, batch_size / scale, self.workspace)
        self.apply_output = ops.bind_output(output, self.output, self.workspace)

    def value_and_grad(
        self,
        x: Array,
        y: Array,
        weight: Array | None,
        dW: Sequence[Array],
        db: Sequence[Array],
        dx: Array | None,
        accumulate: bool,
        *where: Array,
    ) -> Any:
        """Go forward, through the loss and back: dW, db (=, or += with `accumulate`) and dx (=) of these rows.

        Args:
            where: an array for the loss, on backends that take one.

        Returns:
            These rows' loss as `ops.bind_loss` returns it.
        """
        h_0 = self.forward(x)
        loss = self.loss(y, weight, *where)
        self.backward(h_0, dW, db, accumulate)
        if dx is not None:
            dx[...] = self.input_gradient
        return loss
