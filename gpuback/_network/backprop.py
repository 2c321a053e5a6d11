"""One batch through the network and back: forward pass, loss, back-propagation, over buffers made once per batch size.

A batch is worked on in blocks of rows that the backend chooses. Samples meet only in the sums dW and db, so each block
goes through the whole network, forward and backward, before the next one starts, and adds to the sums. Where a backend
works with several threads, blocks make up shares, each with sums of its own, which are added in order at the end: a
thread that is done with one takes the next, and which thread took which makes no difference.

With a `micro_batch_size` no block is larger: on a GPU, where the batch would be one block, that is what bounds the room
for activations. Every block's da is divided by B and carries the batch's scale, so that nothing but the order of sums
tells the gradient from that of the batch in one piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array

Result = TypeVar("Result")
AnyBlock = TypeVar("AnyBlock", bound="Block")


SHARES_EACH = 4
"""Shares for each thread, so that one which others keep from running holds nobody up for long."""

SUMS_BYTES = 1 << 26
"""What the shares' sums may take, if they are more than threads."""

KEPT_PASSES = 4
"""For how many batch sizes, with gradient or without, a network keeps buffers; a block of rows is some megabytes."""


class Blocks(Generic[AnyBlock]):
    """A batch of one size cut into blocks of rows, shared out, with the buffers that gradients are added up in."""

    def __init__(
        self,
        make_block: Callable[..., AnyBlock],
        architecture: Architecture,
        theta: Array,
        ops: Ops,
        batch_size: int,
        need_gradient: bool,
        need_input_grad: bool,
        micro_batch_size: int | None = None,
    ) -> None:
        precision = architecture.precision
        self._batch_size = batch_size
        self._ops = ops
        _, biases = architecture.layout.split(theta)
        operands, self._refresh_weights = ops.bind_weights(theta, architecture.layout, precision)

        def block(rows: int) -> AnyBlock:
            return make_block(architecture, operands, biases, ops, rows, batch_size, need_gradient, need_input_grad)

        rows, self._threads = ops.plan_blocks(architecture.sizes, batch_size, precision, need_gradient=need_gradient)
        if micro_batch_size is not None:
            rows = min(rows, micro_batch_size)
        n_parameters = architecture.layout.n_parameters
        sums_bytes = n_parameters * precision.accumulator.itemsize if need_gradient else 0
        self._shares = in_shares(batch_size, rows, self._threads.size, sums_bytes)
        heights = {end - start for share in self._shares for start, end in share}
        workers = range(min(self._threads.size, len(self._shares)))
        self._blocks = [{height: block(height) for height in heights} for _ in workers]
        in_one_piece = batch_size in heights and not self._threads.blas_alone
        self._whole = self._blocks[0][batch_size] if in_one_piece else None
        self._rows, self._places = rows, None
        self._mean_of_blocks: Callable[[list[Any]], Array | float] = partial(ops.mean_loss, batch_size=batch_size)
        if micro_batch_size is not None and rows < batch_size:
            self._places, self._mean_of_blocks = ops.bind_mean_of_blocks(rows, batch_size, precision.accumulator)
        others = self._shares[1:] if need_gradient else []
        self._partials = [ops.empty(n_parameters, precision.accumulator) for _ in others]
        self._partial_views = [architecture.layout.split(sums) for sums in self._partials]

    def _add_up(
        self,
        visit: Callable[[AnyBlock, slice | None, Sequence[Array], Sequence[Array], bool], Any],
        gradients: Gradients,
        accumulate: bool,
    ) -> Array | float:
        """The mean of what `visit`, (block, its rows, dW, db, accumulate), says of each block's loss; it adds to dW and
        db, which end in (or, accumulating, on) `gradients`.
        """
        dW, db = gradients.weights, gradients.biases

        def work(share: int, worker: int) -> list[Any]:
            parts = []
            dW_sum, db_sum = self._partial_views[share - 1] if share else (dW, db)
            add = accumulate and share == 0
            for block, rows in self._each(share, worker):
                parts.append(visit(block, rows, dW_sum, db_sum, add))
                add = True
            return parts

        parts = self._run(work)
        if self._partials:
            total = self._partials[0]
            for other in self._partials[1:]:
                total += other
            dW_total, db_total = self._partial_views[0]
            for whole, part in zip((*dW, *db), (*dW_total, *db_total), strict=True):
                whole += part
        return self._mean(parts)

    def _mean(self, parts: list[list[Any]]) -> Array | float:
        return self._mean_of_blocks(list(itertools.chain.from_iterable(parts)))

    def _each(self, share: int, worker: int) -> Iterator[tuple[AnyBlock, slice | None]]:
        """A share's blocks, one after the other, as a worker of the team holds them, with their rows (None: all)."""
        blocks = self._blocks[worker]
        for start, end in self._shares[share]:
            height = end - start
            yield blocks[height], None if height == self._batch_size else slice(start, end)

    def _run(self, work: Callable[[int, int], Result]) -> list[Result]:
        """The results of `work` on each share, with the weights as products read them up to date with θ."""
        self._refresh_weights()
        return self._threads.run(work, len(self._shares))


class Backprop(Blocks["Block"]):
    """The passes of one network for one batch size; without `need_gradient` only the forward pass and the loss."""

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
    ) -> None:
        self.key = batch_size, need_gradient, need_input_grad
        super().__init__(Block, architecture, theta, ops, batch_size, need_gradient, need_input_grad, micro_batch_size)

    def forward(self, x: Array, out: Array) -> None:
        """out = ŷ, (B, n_L)."""

        def work(share: int, worker: int) -> None:
            for block, rows in self._each(share, worker):
                block.forward(rows_of(x, rows))
                block.apply_output(rows_of(out, rows))

        self._run(work)

    def loss(self, x: Array, y: Array, weight: Array | None) -> Array | float:
        """(1/B) Σ_b w_b ℓ(ŷ_b, y_b)."""

        def work(share: int, worker: int) -> list[Any]:
            parts = []
            for block, rows in self._each(share, worker):
                block.forward(rows_of(x, rows))
                parts.append(block.loss(rows_of(y, rows), rows_of(weight, rows)))
            return parts

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
        """The loss; and its gradients into (or, accumulating, onto) `gradients`, ∂loss/∂x too if there is room for it.

        On backends whose losses are arrays, `loss` is where it goes, but not in micro-batches.
        """
        where = () if loss is None else (loss,)
        dW, db, dx = gradients.weights, gradients.biases, gradients.inputs
        if self._whole is not None:  # as below, without the calls that a small network would feel
            self._refresh_weights()
            part = self._whole.value_and_grad(x, y, weight, dW, db, dx, accumulate, *where)
            return self._ops.mean_loss([part], self._batch_size)

        def visit(block: Block, rows: slice | None, dW_sum: Sequence[Array], db_sum: Sequence[Array], add: bool) -> Any:
            batch = rows_of(x, rows), rows_of(y, rows), rows_of(weight, rows)
            place = where if self._places is None or rows is None else (self._places[rows.start // self._rows],)
            return block.value_and_grad(*batch, dW_sum, db_sum, rows_of(dx, rows), add, *place)

        return self._add_up(visit, gradients, accumulate)


def in_shares(batch_size: int, rows: int, team_size: int, sums_bytes: int) -> list[list[tuple[int, int]]]:
    """A batch's blocks of `rows`, each as (first row, row after the last), in shares for a team.

    Args:
        batch_size: B.
        rows: of a block; the last one may have fewer.
        team_size: how many work at a time.
        sums_bytes: what the sums of one share take; 0 if it has none.
    """
    most = team_size * SHARES_EACH if team_size > 1 else 1
    if sums_bytes * most > SUMS_BYTES:
        most = team_size
    ends = [(start, min(start + rows, batch_size)) for start in range(0, batch_size, rows)]
    share = -(-len(ends) // most)
    return [ends[first : first + share] for first in range(0, len(ends), share)]


def rows_of(array: Array, rows: slice | None) -> Array:
    """These rows of an array; the array itself where that is all of them."""
    return array if rows is None or array is None else array[rows]


class Layers:
    """A fixed number of rows: every layer bound to its buffers, from x to a_L and from da_L back.

    Attributes:
        output: a_L, (rows, n_L), which `forward` leaves behind.
        output_delta: da_L times `scale`, in the operands' dtype, from which `backward` starts; may be `output` itself.
        hidden, sources: h_1 … h_{L−1}, and what each one's g' is computed from: itself or its a.
        input_gradient: ∂loss/∂x, (rows, n_0), which `backward` leaves behind if it was asked for.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Sequence[Array],
        biases: Sequence[Array],
        ops: Ops,
        rows: int,
        scale: float,
        need_gradient: bool,
        need_input_grad: bool,
    ) -> None:
        precision, sizes = architecture.precision, architecture.sizes
        self.workspace = workspace = ops.workspace(rows, sizes, precision)
        activations = architecture.hidden_activations
        self._load = ops.bind_load(sizes[0], precision, workspace)

        self.hidden = [workspace.hidden(width) for width in sizes[1:-1]]
        kept = [
            workspace.hidden(n) if g.derivative_from == "a" else None
            for n, g in zip(sizes[1:-1], activations, strict=True)
        ]
        self.output = output = workspace.output(sizes[-1])
        self._first, *upper = [
            ops.bind_forward(W, b, h, a, g, workspace)
            for W, b, h, a, g in zip(
                weights, biases, [*self.hidden, output], [*kept, None], [*activations, None], strict=True
            )
        ]
        self.output_delta = da_top = workspace.output_delta(output)
        self._upper = list(zip(upper, self.hidden, strict=True))

        self.sources = [h if a is None else a for h, a in zip(self.hidden, kept, strict=True)]
        self._backward: list[Callable[[Array, Array, Array, bool], None]] = []
        self.input_gradient = workspace.delta(0, sizes[0]) if need_input_grad else None
        if not need_gradient:
            return
        da_below = [self.input_gradient, *(workspace.delta(k, width) for k, width in enumerate(sizes[1:-1], 1))]
        sources = [None, *self.sources]
        below = [None, *activations]
        for W, da, da_prev, g, source in zip(weights, [*da_below[1:], da_top], da_below, below, sources, strict=True):
            self._backward.append(ops.bind_backward(da, W, da_prev, g, source, scale, workspace))

    def forward(self, x: Array) -> Array:
        """Up to the output layer's pre-activations a_L.

        Returns:
            h_0, x as products read it.
        """
        h_0 = self._load(x)
        self._first(h_0)
        for layer, h in self._upper:
            layer(h)
        return h_0

    def backward(self, h_0: Array, dW: Sequence[Array], db: Sequence[Array], accumulate: bool) -> None:
        """From da_L down: each layer's dW, db and the da of the layer below."""
        inputs = [h_0, *self.hidden]
        for k in range(len(self._backward) - 1, -1, -1):
            self._backward[k](inputs[k], dW[k], db[k], accumulate)


class Block(Layers):
    """Those, with the loss, which takes `forward`'s a_L to the da_L that `backward` starts from, or with ŷ."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Sequence[Array],
        biases: Sequence[Array],
        ops: Ops,
        rows: int,
        batch_size: int,
        need_gradient: bool,
        need_input_grad: bool,
    ) -> None:
        scale = architecture.precision.gradient_scale(batch_size)
        super().__init__(architecture, weights, biases, ops, rows, scale, need_gradient, need_input_grad)
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
        """Forward; the loss; from the da_L that it leaves behind, down: each layer's dW, db and the da below.

        Returns:
            What `ops.bind_loss` says of these rows.
        """
        h_0 = self.forward(x)
        loss = self.loss(y, weight, *where)
        self.backward(h_0, dW, db, accumulate)
        if dx is not None:
            dx[...] = self.input_gradient
        return loss


def keep(passes: Any, store: dict[Any, Any]) -> None:
    """Puts passes into a network's store by their `key`; the oldest ones go."""
    store[passes.key] = passes
    if len(store) > KEPT_PASSES:
        for oldest in list(store)[:-KEPT_PASSES]:
            store.pop(oldest, None)
