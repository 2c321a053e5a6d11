"""The batches that `fit` trains on, epoch by epoch, and the samples that it validates on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from gpuback._core.integers import ceil_div
from gpuback._core.parameters import permutation
from gpuback._core.typing import ArrayLike
from gpuback._core.validation import count_or_none
from gpuback._network.mlp import MLP
from gpuback._training.batches import Batches, Samples, hold_out, split
from gpuback.errors import OptionError

BATCH_SIZE = 128
"""How many samples batch_size="auto" takes."""


class Source(Protocol):
    """Batches of a run: from arrays in memory, or streamed."""

    def identity(self) -> dict[str, Any]:
        """Return what tells these data from others, for a checkpoint."""
        ...

    def start(self, seed: int) -> tuple[Samples | None, int | None]:
        """Get ready for the first epoch.

        Args:
            seed: of the order, and of what is held out.

        Returns:
            The samples to validate on, and the number of an epoch's batches if it is known.
        """
        ...

    def epoch(self, number: int) -> Iterator[Samples]:
        """Yield an epoch's batches. A batch's arrays may change when the next one is asked for."""
        ...

    def close(self) -> None:
        """Free what `start` and `epoch` took; after an error within an epoch too."""
        ...


class ArraySource:
    """Mini-batches of arrays in memory; arguments and errors as `fit`'s."""

    def __init__(
        self,
        net: MLP,
        x: ArrayLike | None,
        y: ArrayLike | None,
        sample_weight: ArrayLike | None,
        *,
        batch_size: int | Literal["auto"] | None,
        shuffle: bool | None,
        validation: float | Sequence[ArrayLike] | None,
    ) -> None:
        if x is None or y is None:
            missing = [name for name, value in (("x", x), ("y", y)) if value is None]
            raise OptionError(f"expected x and y, or batches=, got no {' and no '.join(missing)}")
        self._batch_size = BATCH_SIZE if is_auto(batch_size) else count_or_none("batch_size", batch_size)
        self._net, self._shuffle = net, shuffle is None or bool(shuffle)
        self._samples = Samples.checked(net, x, y, sample_weight)
        self._held_out = hold_out(net, validation, len(self._samples.x))

    def identity(self) -> dict[str, Any]:
        ops, held_out = self._net.ops, self._held_out
        return {
            "data": self._samples.digest(ops),
            "validation": held_out if isinstance(held_out, int) else held_out.digest(ops),
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
        }

    def start(self, seed: int) -> tuple[Samples | None, int | None]:
        held_out = self._held_out
        validation = None if isinstance(held_out, int) else held_out
        if isinstance(held_out, int) and held_out:
            self._samples, validation = split(self._samples, held_out, seed)
        count = len(self._samples.x)
        size = count if self._batch_size is None else min(self._batch_size, count)
        self._seed, self._batches = seed, Batches(self._net, self._samples, size)
        return validation, ceil_div(count, size)

    def epoch(self, number: int) -> Iterator[Samples]:
        shuffled = self._shuffle and self._batch_size is not None
        order = permutation(len(self._samples.x), self._seed, number) if shuffled else None
        return self._batches.each(order)

    def close(self) -> None:
        pass


def is_auto(batch_size: object) -> bool:
    return isinstance(batch_size, str) and batch_size == "auto"
