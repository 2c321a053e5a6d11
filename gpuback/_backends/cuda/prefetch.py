"""Batches copied to a GPU ahead of the steps that read them, through pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np

from gpuback._backends.protocol import BATCH_ARRAYS
from gpuback._core.growing import GrowingBuffer
from gpuback._core.typing import Array
from gpuback._cuda.launch import CopyStream

Buffers: TypeAlias = tuple[GrowingBuffer, GrowingBuffer]
"""For one array, on the host and on the device."""

BYTE = np.dtype(np.uint8)


class CudaPrefetch:
    """Copies a batch to the buffers of a slot; see `gpuback._backends.protocol.Prefetch`.

    Copies run on a stream of their own, from pinned memory, while steps run on another. A step waits for its batch's
    copies on the device. Only the loading thread waits on the host, for the step that is to be over before its slot is
    written again.

    Args:
        copies: queues copies.
        empty: makes arrays on the device.
        slots: the number of slots.
    """

    def __init__(self, copies: CopyStream, empty: Callable[[int, np.dtype[Any]], Array], slots: int) -> None:
        def make_buffers() -> Buffers:
            return GrowingBuffer(copies.host_buffer), GrowingBuffer(lambda n_bytes: empty(n_bytes, BYTE))

        self._copies = copies
        self._buffers = [[make_buffers() for _ in range(BATCH_ARRAYS)] for _ in range(slots)]
        self._references: list[list[Array | None]] = [[]] * slots  # what lies on the device already

    def scope(self) -> AbstractContextManager[object]:
        return self._copies.scope()

    def follow(self) -> None:
        self._copies.follow()

    def load(self, slot: int, arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
        self._copies.wait_for_step(slot)
        self._references[slot] = [array for array in arrays if not isinstance(array, np.ndarray)]
        loaded = tuple(map(self._on_device, self._buffers[slot], arrays))
        self._copies.record(slot)
        return loaded

    def _on_device(self, buffers: Buffers, array: Array | None) -> Array | None:
        if not isinstance(array, np.ndarray):
            return array
        pinned, copy = (buffer.view(array.shape, array.dtype) for buffer in buffers)
        pinned[...] = array
        self._copies.copy(pinned, copy)
        return copy

    def acquire(self, slot: int) -> None:
        self._copies.acquire(slot)

    def release(self, slot: int) -> None:
        self._copies.release(slot)
