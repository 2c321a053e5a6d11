"""Batches copied ahead on the host: what gave them may write over its arrays at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from gpuback._backends.protocol import BATCH_ARRAYS
from gpuback._core.growing import GrowingBuffer
from gpuback._core.scratch import aligned_empty
from gpuback._core.typing import Array


class NumpyPrefetch:
    """Copies a batch to the buffers of a slot; see `gpuback._backends.protocol.Prefetch`. Nothing is queued."""

    def __init__(self, slots: int) -> None:
        self._buffers = [[GrowingBuffer(_memory) for _ in range(BATCH_ARRAYS)] for _ in range(slots)]

    def scope(self) -> AbstractContextManager[object]:
        return nullcontext()

    def follow(self) -> None:
        pass

    def load(self, slot: int, arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
        return tuple(map(_copied, self._buffers[slot], arrays))

    def acquire(self, slot: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass


def _memory(n_bytes: int) -> Array:
    return aligned_empty(n_bytes, np.dtype(np.uint8))


def _copied(buffer: GrowingBuffer, array: Array | None) -> Array | None:
    if array is None:
        return None
    copy = buffer.view(array.shape, array.dtype)
    copy[...] = array
    return copy
