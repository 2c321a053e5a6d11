"""One batch through the network and back: forward pass, loss, back-propagation, over buffers made once per batch size.

A batch is worked on in blocks of rows that the backend chooses. Samples meet only in the sums dW and db. So each block
goes through the whole network, forward and backward, before the next one starts, and adds to the sums. On several
threads, blocks make up tasks; see `gpuback._network.tasks`.

With a `micro_batch_size` no block is larger. On a GPU, where the batch would be one block, this bounds the memory for
activations. Every block's da is divided by B and carries the batch's scale: only the order of sums tells the gradient
from that of the batch in one block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from gpuback._backends.protocol import FusedNetwork, Ops
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array
from gpuback._network.layers import Block, BoundNetwork
from gpuback._network.tasks import Result, Tasks

AnyBlock = TypeVar("AnyBlock", bound=Block)


class Blocks(Generic[AnyBlock]):
    """The blocks of a batch, each bound to its buffers, and the tasks that they make up.

    Args:
        network, batch_size, need_gradient, micro_batch_size: as `Tasks`'s.
        make_block: makes a block of so many rows.
        trainable: the layers whose gradients are added up; None: all.
    """

    def __init__(
        self,
        network: BoundNetwork,
        make_block: Callable[[int], AnyBlock],
        batch_size: int,
        need_gradient: bool,
        micro_batch_size: int | None = None,
        trainable: Sequence[bool] | None = None,
    ) -> None:
        ops, precision = network.ops, network.architecture.precision
        self._ops, self._batch_size, self._refresh_weights = ops, batch_size, network.refresh
        self._tasks = tasks = Tasks(network, batch_size, need_gradient, micro_batch_size)
        self._blocks = [{height: make_block(height) for height in tasks.heights} for _ in tasks.workers]
        alone = batch_size in tasks.heights and not tasks.threads.blas_alone
        self._only_block = self._blocks[0][batch_size] if alone else None
        self._losses: list[Array] | None = None
        self._mean_of_blocks: Callable[[list[Any]], Array | float] = partial(ops.mean_loss, batch_size=batch_size)
        if micro_batch_size is not None and tasks.rows < batch_size:
            mean_of_blocks = ops.bind_mean_of_blocks(tasks.rows, batch_size, precision.accumulator)
            self._losses, self._mean_of_blocks = mean_of_blocks
        layout = network.architecture.layout
        self._partial_views = [layout.split(sums) for sums in tasks.partials]
        self._trained = [k for k in range(len(layout.shapes)) if trainable is None or trainable[k]]
        self._trained_spans = (
            [slice(0, layout.n_parameters)] if trainable is None else list(map(layout.layer, self._trained))
        )

    def _add_up(
        self,
        visit: Callable[[AnyBlock, slice | None, Sequence[Array], Sequence[Array], bool], Any],
        gradients: Gradients,
        accumulate: bool,
    ) -> Array | float:
        """Visit each block, add up the gradients (=, or += with `accumulate`) and return the mean of the losses.

        Args:
            visit: a function of block, its rows, dW, db, accumulate, which returns the rows' loss.
            gradients: where dW and db go.
            accumulate: add to them.
        """
        dW, db = gradients.weights, gradients.biases

        def work(task: int, worker: int) -> list[Any]:
            losses = []
            dW_sum, db_sum = self._partial_views[task - 1] if task else (dW, db)
            add = accumulate and task == 0
            for block, rows in self._each(task, worker):
                losses.append(visit(block, rows, dW_sum, db_sum, add))
                add = True
            return losses

        losses = self._run(work)
        partials = self._tasks.partials
        if partials:
            total = partials[0]
            for span in self._trained_spans:
                for other in partials[1:]:
                    total[span] += other[span]
            dW_total, db_total = self._partial_views[0]
            for k in self._trained:
                for out, part in ((dW[k], dW_total[k]), (db[k], db_total[k])):
                    out += part
        return self._mean(losses)

    def _mean(self, losses: list[list[Any]]) -> Array | float:
        return self._mean_of_blocks(list(itertools.chain.from_iterable(losses)))

    def _each(self, task: int, worker: int) -> Iterator[tuple[AnyBlock, slice | None]]:
        """Yield a task's blocks, over this worker's buffers, each with its rows (None: the whole batch)."""
        blocks = self._blocks[worker]
        for start, end in self._tasks.spans[task]:
            height = end - start
            yield blocks[height], None if height == self._batch_size else slice(start, end)

    def _run(self, work: Callable[[int, int], Result]) -> list[Result]:
        """Bring the weights up to date with θ and return the results of work(task, worker)."""
        self._refresh_weights()
        return self._tasks.run(work)


class Backprop(Blocks[Block]):
    """The passes of one network for one batch size; without `need_gradient` only the forward pass and the loss.

    With `trainable`, one boolean for each layer, only such layers' dW and db are computed; the others' are not written.
    """

    def __init__(
        self,
        architecture: Architecture,
        theta: Array,
        ops: Ops,
        batch_size: int,
        *,
        need_gradient: bool = True,
        need_input_grad: bool = False,
        micro_batch_size: int | None = None,
        trainable: tuple[bool, ...] | None = None,
    ) -> None:
        self.key = passes_key(batch_size, need_gradient, need_input_grad, micro_batch_size, trainable)
        network = BoundNetwork.of(architecture, theta, ops)

        def block(rows: int) -> Block:
            return Block(network, rows, batch_size, need_gradient, need_input_grad, trainable)

        super().__init__(network, block, batch_size, need_gradient, micro_batch_size, trainable)

    def forward(self, x: Array, out: Array) -> None:
        """Compute ŷ into out, (B, n_L)."""

        def work(task: int, worker: int) -> None:
            for block, rows in self._each(task, worker):
                block.forward(rows_of(x, rows))
                block.apply_output(rows_of(out, rows))

        self._run(work)

    def loss(self, x: Array, y: Array, weight: Array | None) -> Array | float:
        """Return (1/B) Σ_b w_b ℓ(ŷ_b, y_b)."""

        def work(task: int, worker: int) -> list[Any]:
            losses = []
            for block, rows in self._each(task, worker):
                block.forward(rows_of(x, rows))
                losses.append(block.loss(rows_of(y, rows), rows_of(weight, rows)))
            return losses

        return self._mean(self._run(work))

    def value_and_grad(
        self,
        x: Array,
        y: Array,
        weight: Array | None,
        gradients: Gradients,
        *,
        accumulate: bool = False,
        loss: Array | None = None,
    ) -> Array | float:
        """Return the loss and write its gradients (=, or += with `accumulate`).

        Args:
            x, y, weight: the batch.
            gradients: where ∂loss/∂θ goes, and ∂loss/∂x (=) if there is an array for it.
            accumulate: add to the θ-gradients.
            loss: where the loss goes, on backends whose losses are arrays; not in micro-batches.
        """
        where = () if loss is None else (loss,)
        dW, db, dx = gradients.weights, gradients.biases, gradients.inputs
        if self._only_block is not None:  # as below, without the calls that a small network would feel
            self._refresh_weights()
            part = self._only_block.value_and_grad(x, y, weight, dW, db, dx, accumulate, *where)
            return self._ops.mean_loss([part], self._batch_size)
        losses, height = self._losses, self._tasks.rows

        def visit(block: Block, rows: slice | None, dW_sum: Sequence[Array], db_sum: Sequence[Array], add: bool) -> Any:
            batch = rows_of(x, rows), rows_of(y, rows), rows_of(weight, rows)
            place = where if losses is None or rows is None else (losses[rows.start // height],)
            return block.value_and_grad(*batch, dW_sum, db_sum, rows_of(dx, rows), add, *place)

        return self._add_up(visit, gradients, accumulate)


Passes: TypeAlias = Backprop | FusedNetwork


def passes_key(
    batch_size: int,
    need_gradient: bool,
    need_input_grad: bool,
    micro_batch_size: int | None,
    trainable: tuple[bool, ...] | None,
) -> tuple[Any, ...]:
    """Return the arguments of `make_passes` that tell a network's passes apart, without those at their defaults."""
    needs = batch_size, need_gradient, need_input_grad
    if trainable is not None:
        return *needs, micro_batch_size, trainable
    return needs if micro_batch_size is None else (*needs, micro_batch_size)


def make_passes(
    architecture: Architecture,
    theta: Array,
    ops: Ops,
    batch_size: int,
    need_gradient: bool,
    need_input_grad: bool,
    micro_batch_size: int | None = None,
    trainable: tuple[bool, ...] | None = None,
) -> Passes:
    """Make a network's passes for one batch size: fused ones where the backend has them, else layer by layer."""
    needs = {"need_gradient": need_gradient, "need_input_grad": need_input_grad}
    if micro_batch_size is None and trainable is None:
        fused = ops.fused_network(architecture, theta, batch_size, **needs)
        if fused is not None:
            return fused
    return Backprop(
        architecture, theta, ops, batch_size, **needs, micro_batch_size=micro_batch_size, trainable=trainable
    )


def empty_gradients(architecture: Architecture, ops: Ops) -> Gradients:
    """Make gradients of a network's shapes; their numbers are arbitrary."""
    theta = ops.empty(architecture.layout.n_parameters, architecture.precision.accumulator)
    return Gradients(theta, *architecture.layout.split(theta))


def rows_of(array: Array, rows: slice | None) -> Array:
    """Return these rows of an array; with None, the array itself."""
    return array if rows is None or array is None else array[rows]
