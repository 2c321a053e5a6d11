"""A batch cut into blocks of rows, and blocks grouped into tasks for threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

from gpuback._core.integers import ceil_div
from gpuback._core.threads import ThreadPool
from gpuback._network.layers import BoundNetwork

Result = TypeVar("Result")

MOST_TASKS = 32
"""With several tasks each, workers end at about the same time even if other programs hold one of them up. The number
does not depend on that of the workers, so that neither does the order of sums."""

MOST_SUMS_BYTES = 1 << 26
"""How much memory the tasks' sums may take if there are more than two tasks."""


class Tasks:
    """The blocks of rows in which a batch goes through a network, as tasks for a pool of threads.

    Each task adds up gradients of its own, which are added in order at the end. So the result does not depend on which
    worker took which task, nor on how many workers there are.

    Args:
        network, batch_size: whose batch it is, and how many rows it has.
        need_gradient: whether there are gradients to add up.
        micro_batch_size: no block has more rows.
        threads: the backend's choice by default.
        planes: how many rows each sample has in products.

    Attributes:
        rows: how many a block has; the last one may have fewer.
        spans: each task's blocks as (first row, row after the last).
        heights: how many rows there are in a block: one number or two.
        workers: indices of the threads that take tasks.
        partials: what each task but the first adds up gradients in, (n_parameters,).
    """

    def __init__(
        self,
        network: BoundNetwork,
        batch_size: int,
        need_gradient: bool,
        micro_batch_size: int | None = None,
        threads: ThreadPool | None = None,
        planes: int = 1,
    ) -> None:
        architecture, ops = network.architecture, network.ops
        sizes, precision = architecture.sizes, architecture.precision
        rows, chosen = ops.plan_blocks(sizes, batch_size * planes, precision, need_gradient=need_gradient)
        rows = ceil_div(rows, planes)
        self.rows = rows if micro_batch_size is None else min(rows, micro_batch_size)
        self.threads = chosen if threads is None else threads
        n_parameters = architecture.layout.n_parameters
        sums_bytes = n_parameters * precision.accumulator.itemsize if need_gradient else 0
        self.spans = split_tasks(batch_size, self.rows, self.threads.is_shared, sums_bytes)
        self.heights = {end - start for start, end in itertools.chain.from_iterable(self.spans)}
        self.workers = range(min(self.threads.size, len(self.spans)))
        others = self.spans[1:] if need_gradient else []
        self.partials = [ops.empty(n_parameters, precision.accumulator) for _ in others]

    def run(self, work: Callable[[int, int], Result]) -> list[Result]:
        """Return the results of work(task, worker) for each task, in order."""
        return self.threads.run(work, len(self.spans))


def split_tasks(batch_size: int, rows: int, is_shared: bool, sums_bytes: int) -> list[list[tuple[int, int]]]:
    """Cut a batch into blocks of `rows`, each as (first row, row after the last), and group them into tasks.

    Args:
        batch_size: B.
        rows: of a block; the last one may have fewer.
        is_shared: whether there may be more than one task.
        sums_bytes: how much memory the sums of one task take; 0 if it has none.
    """
    most = MOST_TASKS if is_shared else 1
    if is_shared and sums_bytes:
        most = max(2, min(MOST_TASKS, MOST_SUMS_BYTES // sums_bytes))
    blocks = [(start, min(start + rows, batch_size)) for start in range(0, batch_size, rows)]
    each = ceil_div(len(blocks), most)
    return [blocks[first : first + each] for first in range(0, len(blocks), each)]
