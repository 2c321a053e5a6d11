"""A batch's jets: blocks of rows that make up tasks for threads, each forward, and back at once or later."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

from gpuback._backends.protocol import Ops
from gpuback._core.activation_names import activation_named
from gpuback._core.architecture import Architecture
from gpuback._core.jets import Jet
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array
from gpuback._network.jets import JetLayers
from gpuback._network.layers import BoundNetwork
from gpuback._network.pool import Pool
from gpuback._network.reserved import Reserved
from gpuback._network.tasks import Tasks
from gpuback.errors import OptionError

BLOCK_BYTES = 1 << 21
"""The bytes of a block's planes of activations; `plans.BLOCK_BYTES` says why."""

FEWEST_ROWS = 64
"""Where not even so many rows fit, products dominate and do best on many."""

Top = Callable[[Array, Array, slice], None]
"""(outputs, seeds, rows) → None: fill the adjoints of a block's outputs."""


class Jettable(Protocol):
    """A network, as far as its jets go."""

    _version: int
    _held_pool: Pool
    _reserved: Reserved

    @property
    def architecture(self) -> Architecture: ...

    @property
    def ops(self) -> Ops: ...

    @property
    def theta(self) -> Array: ...


def jets_of(
    net: Jettable, size: int, jet: Jet, *, held: bool = False, need_backward: bool = True, to_a: bool = False
) -> JetPasses:
    """Return a network's passes for such jets of `size` samples, from its pool or new; options as `JetPasses`'s.

    Raises:
        OptionError: the network has no such derivatives.
    """
    architecture, ops = net.architecture, net.ops
    why = refusal(architecture, ops, jet.order, need_backward)
    if why is not None:
        raise OptionError(why)
    key = size, jet, held, need_backward, to_a
    passes: JetPasses | None = net._held_pool.acquire(key)
    if passes is None:
        options = {"held": held, "need_backward": need_backward, "to_a": to_a}
        network = BoundNetwork.of(architecture, net.theta, ops)
        passes = JetPasses(key, network, size, jet, architecture.output, **options)
    return passes


FUNCTIONS = "slope", "curvature", "third"
"""What users register for m₁, m₂ and m₃."""


def refusal(architecture: Architecture, ops: Ops, order: int, need_backward: bool) -> str | None:
    """Say why a network has no jets of such an order, or no way back through them; None if it has."""
    if ops.jets is None:
        mode = "reproducible=True" if ops.reproducible else f"backend {ops.name!r}"
        return f"derivatives along directions: expected backend 'numpy' without reproducible=True, got {mode}"
    if architecture.precision.name == "float16":
        return "derivatives along directions: expected dtype float64, float32 or bfloat16, got float16"
    if order == 2 and architecture.output == "softmax":
        return "second derivatives of softmax: expected another output function, e.g. output='identity'"
    for name in (*architecture.activations, architecture.output):
        multipliers = None if name == "softmax" else activation_named(name).multipliers
        known = 3 if name == "softmax" else 0 if multipliers is None else multipliers.known
        if known < order + need_backward:
            missing = FUNCTIONS[known]
            return f"activation {name!r} was registered without {missing}=: register_activation({name!r}, {missing}=…)"
    return None


class JetPasses:
    """A network's passes with jets for one batch size.

    Args:
        key: the pool's.
        network: `forward` refreshes its weights.
        batch_size: B.
        jet: which planes there are.
        output: O by name.
        held: whether each block keeps its planes until it goes back; else blocks of one size share buffers, and
            `differentiate` takes each there and back.
        need_backward: False for forward passes alone.
        to_a: whether seeds are adjoints of a_L's jet, not ŷ's.

    Attributes:
        theta_dot: (n_parameters,) in A: how θ moves, with `jet.moving`; to be filled before `forward`.
    """

    def __init__(
        self,
        key: Hashable,
        network: BoundNetwork,
        batch_size: int,
        jet: Jet,
        output: str,
        *,
        held: bool = False,
        need_backward: bool = True,
        to_a: bool = False,
    ) -> None:
        architecture, ops = network.architecture, network.ops
        layout, precision = architecture.layout, architecture.precision
        self.key, self.jet, self._network, self._held = key, jet, network, held
        self.in_scope = ops.bind_scope(lambda *_: None)
        moving = None
        self._refresh_moving: Callable[[], object] = _nothing
        if jet.moving:
            self.theta_dot = ops.empty(layout.n_parameters, precision.accumulator)
            weights, self._refresh_moving = ops.bind_weights(self.theta_dot, layout, precision)
            moving = weights, layout.split(self.theta_dot)[1]
        fitting = BLOCK_BYTES // (precision.accumulator.itemsize * sum(architecture.sizes) * jet.planes)
        rows = fitting if fitting >= FEWEST_ROWS else 4096 // jet.planes
        self._tasks = tasks = Tasks(
            network, batch_size, need_backward, micro_batch_size=max(rows, 1), planes=jet.planes
        )
        self._partial_views = [layout.split(partial) for partial in tasks.partials]

        def block(height: int, workspace: Any = None) -> JetLayers:
            return JetLayers(
                network, jet, height, output, moving, need_backward=need_backward, to_a=to_a, workspace=workspace
            )

        self._blocks: dict[object, JetLayers] = {}
        if held:
            for spans in tasks.spans:
                workspaces: dict[int, Any] = {}
                for start, end in spans:
                    made = self._blocks[start] = block(end - start, workspaces.get(end - start))
                    workspaces[end - start] = made.workspace
        else:
            self._blocks = {(height, worker): block(height) for height in tasks.heights for worker in tasks.workers}

    def _each(self, task: int, worker: int) -> Iterator[tuple[JetLayers, slice]]:
        for start, end in self._tasks.spans[task]:
            yield self._blocks[start if self._held else (end - start, worker)], slice(start, end)

    def forward(self, x: Array, directions: Array | None, out: Array) -> None:
        """out = ŷ's jet (P, B, n_L).

        Args:
            x: (B, n_0) in A.
            directions: (D, B, n_0) or (D, 1, n_0) in A; None: x does not move.
            out: in A.
        """
        self._refresh()

        def work(task: int, worker: int) -> None:
            for block, rows in self._each(task, worker):
                block.forward(x[rows], _of_rows(directions, rows))
                out[:, rows] = block.outputs

        self._tasks.run(work)

    def backward(
        self, seeds: Sequence[Array | None], gradients: Gradients, inputs: Array | None, accumulate: bool = False
    ) -> None:
        """Differentiate Σ_j <seeds_j, ŷ_j>, after `forward` with `held`.

        Args:
            seeds: for each plane (B, n_L) in A; None: 0.
            gradients: θ's (=, or += with `accumulate`), unless its `theta` is None.
            inputs: (1 + D, B, n_0) in A for the derivatives by x and the directions; None: not computed.
        """

        def top(outputs: Array, block_seeds: Array, rows: slice) -> None:
            for seed, plane in zip(seeds, block_seeds, strict=True):
                plane[...] = 0 if seed is None else seed[rows]

        self._go_back(top, gradients, inputs, accumulate, _stay)

    def differentiate(
        self, x: Array, directions: Array | None, top: Top, gradients: Gradients, inputs: Array | None, accumulate: bool
    ) -> None:
        """Take each block there and back, from the seeds that `top` computes of its outputs; results: `backward`'s."""
        self._refresh()
        self._go_back(
            top, gradients, inputs, accumulate, lambda block, rows: block.forward(x[rows], _of_rows(directions, rows))
        )

    def _refresh(self) -> None:
        self._network.refresh()
        self._refresh_moving()

    def _go_back(
        self,
        top: Top,
        gradients: Gradients,
        inputs: Array | None,
        accumulate: bool,
        go_forward: Callable[[JetLayers, slice], None],
    ) -> None:
        nothing = (None,) * len(self._network.weights)
        sums: list[tuple[Sequence[Array | None], Sequence[Array | None]]] = [(nothing, nothing)] * len(
            self._tasks.spans
        )
        if gradients.theta is not None:
            sums = [(gradients.weights, gradients.biases), *self._partial_views]

        def work(task: int, worker: int) -> None:
            add = accumulate and task == 0
            for block, rows in self._each(task, worker):
                go_forward(block, rows)
                top(block.outputs, block.seeds, rows)
                block.backward(*sums[task], add, inputs is not None)
                if inputs is not None:
                    inputs[:, rows] = block.input_gradient
                add = True

        self._tasks.run(work)
        if gradients.theta is not None:
            for partial in self._tasks.partials:
                gradients.theta += partial

    def forget(self) -> None:
        """Keep nothing of the batch that it does not own: nothing to do."""


def _nothing() -> None:
    pass


def _stay(block: JetLayers, rows: slice) -> None:
    """Go forward no more: the block has its planes already."""


def _of_rows(directions: Array | None, rows: slice) -> Array | None:
    return directions if directions is None or directions.shape[1] == 1 else directions[:, rows]
