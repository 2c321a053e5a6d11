"""Split-K: how a sum over the batch is cut into partial sums that run in parallel.

The split follows from the shape alone, never from the device: every device adds in the same order, to the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpuback._core.integers import ceil_div, round_up

WORK_TILES_WANTED = 132
"""Work tiles of dW: enough for the largest GPUs. Bits depend on it, so it does not follow the device."""

SMALLEST_SPLIT, LARGEST_SPLIT = 256, 2048
"""Rows of the batch that one partial sum adds up. Below the first, partial sums are more work than they save. Above the
second, tensor cores, which cut off what does not fit as they add 16 products at a time, lose more than √K allows."""

NARROW_SMALLEST_SPLIT = 128
"""The same for narrow layers, which otherwise spend more time on partial sums than on samples."""


@dataclass(frozen=True)
class SplitK:
    """A sum over the batch in partial sums, which are added up in groups.

    Attributes:
        splits: how many partial sums.
        rows_per_split: rows of the batch that each adds up; the last may have fewer.
    """

    splits: int
    rows_per_split: int

    def __str__(self) -> str:
        return f"{self.splits} splits of {self.rows_per_split} rows"

    @property
    def group_size(self) -> int:
        """⌈√splits⌉."""
        return math.isqrt(max(self.splits, 1) - 1) + 1

    @property
    def counters(self) -> int:
        """One for each group and one for the groups."""
        return ceil_div(self.splits, self.group_size) + 1


def split_batch(batch_size: int, wanted: int, smallest: int, largest: int) -> SplitK:
    """Cut a batch into about `wanted` splits of a multiple of 64 rows, within limits."""
    rows = round_up(min(max(ceil_div(batch_size, wanted), smallest), largest), 64)
    return SplitK(ceil_div(batch_size, rows), rows)


def narrow_split(batch_size: int) -> SplitK:
    """Cut a narrow layer's sums over the batch."""
    return split_batch(batch_size, WORK_TILES_WANTED, NARROW_SMALLEST_SPLIT, LARGEST_SPLIT)
