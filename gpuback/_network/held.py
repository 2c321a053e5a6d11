"""A batch whose backward pass comes later than its forward pass: never, once, or again and again.

As in `gpuback._network.backprop`, a batch goes through the network in blocks of rows, which make up tasks for threads.
But here each block has buffers of its own, in which it waits for its backward passes. Blocks of one task run one after
the other, so they share what they need only while they run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar

import numpy as np

from gpuback._backends.protocol import GradientScale
from gpuback._core.activation_names import derivative_of_output
from gpuback._core.parameters import Gradients
from gpuback._core.threads import ThreadPool
from gpuback._core.typing import Array
from gpuback._network.backprop import empty_gradients
from gpuback._network.layers import Backward, BoundNetwork, Layers
from gpuback._network.pool import Keyed, Pool
from gpuback._network.tasks import Tasks
from gpuback.errors import CopyError

Result = TypeVar("Result")

Needs = tuple[bool, bool]
"""Whether a backward pass computes the gradient by θ, and whether that by x."""


class HeldPasses:
    """A network's passes for one batch size, which hold the batch between its forward pass and its backward passes.

    Args:
        key: the pool's.
        network: `forward` refreshes its weights, and `backward` reads them as they were then.
        batch_size: B.
        output: O by name. With "identity", ŷ = a_L.
        need_gradient: False for forward passes alone, which hold nothing.
        threads: the backend's choice by default.

    Attributes:
        in_scope: a function (work, *arguments) that returns work(*arguments), run in the backend's scope, as the passes
            have to be.
    """

    def __init__(
        self,
        key: Hashable,
        network: BoundNetwork,
        batch_size: int,
        output: str,
        *,
        need_gradient: bool = True,
        threads: ThreadPool | None = None,
    ) -> None:
        self.key = key
        self.in_scope = network.ops.bind_scope(lambda *_: None)
        self._network, self._need_gradient = network, need_gradient
        self._tasks = tasks = Tasks(network, batch_size, need_gradient, threads=threads)
        self._blocks: dict[object, HeldBlock] = {}
        if need_gradient:
            for spans in tasks.spans:
                workspaces: dict[int, Any] = {}
                for start, end in spans:
                    block = HeldBlock(network, end - start, output, workspaces.get(end - start))
                    self._blocks[start] = block
                    workspaces[end - start] = block.workspace
        else:
            self._blocks = {
                (height, worker): HeldBlock(network, height, output)
                for height in tasks.heights
                for worker in tasks.workers
            }
        layout = network.architecture.layout
        self._partial_views = [layout.split(partial) for partial in tasks.partials]
        nothing = (None,) * len(network.weights)
        self._no_gradients = nothing, nothing
        alone = batch_size in tasks.heights and not tasks.threads.blas_alone
        self._only_block = self._blocks[0] if need_gradient and alone else None
        self._bound = set[Needs]()
        self._weights: Sequence[Array] | None = None
        precision, width = network.architecture.precision, network.architecture.sizes[-1]
        self._scale: GradientScale | None = None
        if need_gradient and precision.operand == np.float16:
            self._scale = network.ops.bind_gradient_scale(batch_size, width, precision)
        self._scaled: Gradients | None = None

    def bind_backward(self, needs: Needs) -> None:
        """Bind backward passes with such results; `backward` does so when it first needs them."""
        for block in self._blocks.values():
            block.bind_pass(needs, self._weights)
        self._bound.add(needs)

    def reload(self, x: Array) -> None:
        """Let backward passes read x where it is now: what `forward` was given has been overwritten."""
        for spans in self._tasks.spans:
            for start, end in spans:
                self._blocks[start].reload(x[start:end])

    def use_weights(self, weights: Sequence[Array] | None) -> None:
        """Let backward passes read these weights; None: the network's, as `forward` does."""
        self._weights = weights
        self._bound.clear()

    def forward(self, x: Array, out: Array) -> None:
        """out = ŷ. The passes refer to x, which has to stay as it is, until `forget`.

        Args:
            x, out: (B, n_0) and (B, n_L) in A, C-contiguous.
        """
        self._network.refresh()
        if self._only_block is not None:  # as below, without the calls that a small network would feel
            self._only_block.run_forward(x, out)
            return

        def work(task: int, worker: int) -> None:
            for start, end in self._tasks.spans[task]:
                block = self._blocks[start if self._need_gradient else (end - start, worker)]
                block.run_forward(x[start:end], out[start:end])

        self._tasks.run(work)

    def backward(self, dy: Array, gradients: Gradients, accumulate: bool = False) -> None:
        """Differentiate Σ_b <dy_b, ŷ_b>: by θ into gradients.theta (=, or += with `accumulate`), by x into .inputs (=).

        Where one of them is None, it is not computed. float16 holds neither the small dy of a mean over many samples
        nor large sums. There dy is multiplied by a power of two by which the results are divided.

        Args:
            dy: (B, n_L) in A, C-contiguous.
            gradients: arrays in A, C-contiguous.
            accumulate: add to gradients.theta.
        """
        scale, inputs = self._scale, gradients.inputs
        if scale is None:
            self._add_up(dy, None, gradients, inputs, accumulate)
            return
        sums = gradients
        if accumulate:
            if self._scaled is None:
                self._scaled = empty_gradients(self._network.architecture, self._network.ops)
            sums = self._scaled
        self._add_up(dy, scale.fit(dy), sums, inputs, False)
        if sums.theta is not None:
            scale.unscale(sums.theta, gradients.theta, accumulate)
        if inputs is not None:
            scale.unscale(inputs, inputs, False)

    def _add_up(
        self, dy: Array, weight: Array | None, gradients: Gradients, inputs: Array | None, accumulate: bool
    ) -> None:
        """Run the blocks' backward passes, from w_b dy_b."""
        needs = gradients.theta is not None, inputs is not None
        if needs not in self._bound:
            self.bind_backward(needs)
        if self._only_block is not None:
            dW, db = (gradients.weights, gradients.biases) if needs[0] else self._no_gradients
            self._only_block.run_backward(needs, dy, weight, dW, db, inputs, accumulate)
            return
        sums = [(gradients.weights, gradients.biases), *self._partial_views] if needs[0] else None

        def work(task: int, worker: int) -> None:
            spans = self._tasks.spans[task]
            dW, db = self._no_gradients if sums is None else sums[task]
            for start, end in spans:
                self._blocks[start].run_backward(
                    needs,
                    dy[start:end],
                    None if weight is None else weight[start:end],
                    dW,
                    db,
                    None if inputs is None else inputs[start:end],
                    start > spans[0][0] or (accumulate and task == 0),
                )

        self._tasks.run(work)
        if needs[0]:
            for partial in self._tasks.partials:
                gradients.theta += partial

    def forget(self) -> None:
        """Drop references to the batch."""
        for block in self._blocks.values():
            block.h_0 = None


class HeldBlock(Layers):
    """All layers for one block of rows, which holds the block between its passes.

    Args:
        network, rows: as those of `Layers`.
        output: O by name.
        workspace: shared with other blocks, none of which runs at the same time; one of its own by default.

    Attributes:
        h_0: x as products read it, which may be x itself.
    """

    def __init__(self, network: BoundNetwork, rows: int, output: str, workspace: Any = None) -> None:
        super().__init__(network, rows, 1.0, workspace)
        ops, width = network.ops, network.architecture.sizes[-1]
        self.h_0: Array = None
        self._output_function = output
        self._apply_output = ops.bind_output(output, self.output, self.workspace)
        self._from_a = derivative_of_output(output) == "a"
        self._source = None if output == "identity" else self.workspace.output(width)
        self._load_delta: Callable[[Array, Array | None], object] | None = None
        self._passes: dict[Needs, Backward] = {}

    def run_forward(self, x: Array, out: Array) -> None:
        """out = ŷ; keep h_0 and what O' is computed from."""
        self.h_0 = self.forward(x)
        source = self._source
        if source is None:
            self._apply_output(out)
        elif self._from_a:
            source[...] = self.output
            self._apply_output(out)
        else:
            self._apply_output(source)
            out[...] = source

    def reload(self, x: Array) -> None:
        """Take x for the backward passes anew."""
        self.h_0 = self._load(x)

    def bind_pass(self, needs: Needs, weights: Sequence[Array] | None) -> None:
        """Bind the backward pass with such results, by these weights; None: the network's."""
        if self._load_delta is None:
            self._load_delta = self._network.ops.bind_output_delta(
                self._output_function, self._source, self.output_delta, 1.0, self.workspace
            )
        need_theta_grad, need_input_grad = needs
        trainable = [need_theta_grad] * len(self._network.weights)
        self._passes[needs] = self.bind_backward(trainable, need_input_grad, weights)

    def run_backward(
        self,
        needs: Needs,
        dy: Array,
        weight: Array | None,
        dW: Sequence[Array],
        db: Sequence[Array],
        dx: Array | None,
        accumulate: bool,
    ) -> None:
        """Compute dW and db (=, or += with `accumulate`) and dx (=), if `needs` says so, from w_b dy_b."""
        assert self._load_delta is not None
        self._load_delta(dy, weight)
        self._passes[needs](self.h_0, dW, db, accumulate)
        if dx is not None:
            dx[...] = self.input_gradient


class Leasable(Keyed, Protocol):
    """Passes that a `Lease` can hold."""

    def forget(self) -> None:
        """Drop references to the batch."""
        ...


LeasedPasses = TypeVar("LeasedPasses", bound=Leasable)


class Lease(Generic[LeasedPasses]):
    """Passes that belong to one batch as long as this object lives. Dropping it releases them to the pool.

    They are not released if the last work on them has raised, for they may be half written.
    """

    def __init__(self, pool: Pool, passes: LeasedPasses) -> None:
        self._pool, self.passes = pool, passes
        self._lock, self._intact = threading.Lock(), True

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Return work(*arguments), work on these passes; threads take turns."""
        with self._lock:
            self._intact = False
            result = work(*arguments)
            self._intact = True
        return result

    def __del__(self) -> None:
        if self._intact:
            self.passes.forget()
            self._pool.release(self.passes)


class HoldsBatch:
    """The base of what a call returns to go back later: it has a `Lease`, and nothing about it changes."""

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise CopyError(
            f"a {type(self).__name__} holds its batch in buffers of its network and cannot be copied or pickled; "
            "copy the network, and make the call again"
        )
