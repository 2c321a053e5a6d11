"""Jets through a network: every layer bound to its buffers, for a fixed number of rows; forward, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpuback._core.activations import Activation
from gpuback._core.jets import Jet
from gpuback._core.typing import Array
from gpuback._network.layers import BoundNetwork

Moving = tuple[Sequence[Array], Sequence[Array]]
"""Ẇ_1 … Ẇ_L and ḃ_1 … ḃ_L."""


class JetLayers:
    """All layers for the jets of one block of rows, which waits for its backward passes as `HeldBlock`'s does.

    Args:
        network: the layers.
        jet: which planes there are.
        rows: how many rows a plane has.
        output: O by name; with "identity", the outputs are a_L's jet.
        moving: how θ moves, with `jet.moving`; arrays that keep their place.
        need_backward: False for forward passes alone.
        to_a: whether seeds are adjoints of a_L's jet, not ŷ's.
        workspace: of another block that does not run at the same time.

    Attributes:
        outputs: ŷ's jet (P, rows, n_L) in A, which `forward` leaves behind.
        seeds: (P, rows, n_L) in A: `backward` starts from it, and overwrites it.
        input_gradient: (P, rows, n_0) in A, which a backward pass leaves behind if it was bound to.
    """

    def __init__(
        self,
        network: BoundNetwork,
        jet: Jet,
        rows: int,
        output: str,
        moving: Moving | None = None,
        *,
        need_backward: bool = True,
        to_a: bool = False,
        workspace: Any = None,
    ) -> None:
        architecture, ops = network.architecture, network.ops
        assert ops.jets is not None
        self._ops = ops.jets
        sizes, precision, planes = architecture.sizes, architecture.precision, jet.planes
        if workspace is None:
            workspace = ops.workspace(planes * rows, sizes, precision)
        self.workspace, self._network, self._jet, self._rows = workspace, network, jet, rows
        self._moves = [None] * len(network.weights) if moving is None else list(zip(*moving, strict=True))
        kept = jet.order + need_backward
        activations: list[Activation | None] = [*architecture.hidden_activations, None]
        self._h = [self._buffer(width, jet.straight_planes if k == 0 else planes) for k, width in enumerate(sizes)]
        self._a = [self._pre_activations(g, h) for g, h in zip(activations, self._h[1:], strict=True)]
        self._m = [self._multipliers(g, width, kept) for g, width in zip(activations, sizes[1:], strict=True)]
        self._load = self._ops.bind_jet_load(self._h[0], workspace)
        self._layers = [
            self._ops.bind_jet_forward(
                jet, network.weights[k], network.biases[k], self._moves[k], self._h[k + 1], self._a[k], self._m[k],
                activations[k], self._planes_in(k), workspace,
            )
            for k in range(len(network.weights))
        ]  # fmt: skip
        self.seeds = self._buffer(sizes[-1])
        bound = self._ops.bind_jet_output(jet, output, self._a[-1], self.seeds, workspace, to_a=to_a)
        self.outputs, self._apply_output, self._output_delta = bound
        self.input_gradient: Array | None = None
        self._passes: dict[bool, list[Callable[..., None]]] = {}

    def _buffer(self, width: int, planes: int | None = None) -> Array:
        planes = self._jet.planes if planes is None else planes
        ops, dtype = self._network.ops, self._network.architecture.precision.accumulator
        return ops.empty((planes, self._rows, width), dtype)

    def _pre_activations(self, g: Activation | None, h: Array) -> Array:
        """Return a layer's a: an array of its own if g' is computed from it, else scratch of all such layers."""
        if g is None:
            return h
        if g.derivative_from == "a":
            return self._buffer(h.shape[2])
        return self._delta(1, h.shape[2])  # free until the way back

    def _delta(self, k: int, width: int) -> Array:
        return self.workspace.delta(k, width).reshape(self._jet.planes, self._rows, width)

    def _multipliers(self, g: Activation | None, width: int, kept: int) -> list[Array]:
        """Make room for what the epilogues of one layer multiply by."""
        if g is None or g.name == "identity":
            return []
        assert g.multipliers is not None
        return [self._buffer(width, 1)[0] for _ in range(min(g.multipliers.not_zero, kept))]

    def _planes_in(self, k: int) -> int:
        """Return how many planes of layer k's input are not 0: x has no second derivatives."""
        return self._jet.straight_planes if k == 0 else self._jet.planes

    def forward(self, x: Array, directions: Array | None) -> None:
        """Compute ŷ's jet.

        Args:
            x: (rows, n_0) in A.
            directions: (D, rows, n_0) or (D, 1, n_0) in A; None: x does not move.
        """
        self._load(x, directions)
        for k, layer in enumerate(self._layers):
            layer(self._h[k])
        if self._apply_output is not None:
            self._apply_output()

    def backward(
        self, dW: Sequence[Array | None], db: Sequence[Array | None], accumulate: bool, need_input_grad: bool
    ) -> None:
        """Differentiate Σ <seeds, outputs>: dW, db (=, or += with `accumulate`; None: skipped) and the inputs' jet.

        Plane 0 of `input_gradient` is the derivative by x, planes 1 … D are those by the directions.
        """
        if need_input_grad not in self._passes:
            self._passes[need_input_grad] = self._bind_backward(need_input_grad)
        if self._output_delta is not None:
            self._output_delta()
        last = len(self._layers) - 1
        for above, layer in enumerate(self._passes[need_input_grad]):
            k = last - above
            layer(self._h[k], dW[k], db[k], accumulate)

    def _bind_backward(self, need_input_grad: bool) -> list[Callable[..., None]]:
        """Bind the layers' backward passes, from the last down."""
        network, jet, widths = self._network, self._jet, self._network.architecture.sizes
        if need_input_grad:
            self.input_gradient = self._buffer(widths[0], jet.straight_planes)
        bound, da = [], self.seeds
        for k in range(len(self._layers) - 1, -1, -1):
            dh, below = self.input_gradient if need_input_grad else None, None
            if k > 0:
                g = network.architecture.hidden_activations[k - 1]
                source = self._a[k - 1] if g.derivative_from == "a" else self._h[k]
                dh, below = self._delta(k, widths[k]), (g, source, self._m[k - 1])
            bound.append(
                self._ops.bind_jet_backward(
                    jet, da, network.weights[k], self._moves[k], dh, below, self._planes_in(k), self.workspace
                )
            )
            da = dh
        return bound
