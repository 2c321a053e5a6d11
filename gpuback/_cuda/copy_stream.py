"""Copies from the host to a CUDA device on a stream of their own, by CuPy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._core.typing import Array


class CudaCopyStream:
    """Copies to one CUDA device; see `gpuback._cuda.launch.CopyStream`.

    Two events order a slot's life: `copied` comes after its copies, on the copies' stream, and `done` after the step
    that reads them, on whichever stream is CuPy's current one. Waiting for an event that was never recorded returns at
    once.

    Args:
        cupy: the module.
        device_id: the device, which is the current one now.
        stream: the copies', which does not wait for the default stream.
        slots: the number of slots.
    """

    def __init__(self, cupy: Any, device_id: int, stream: Any, slots: int) -> None:
        self._cupy, self._device_id, self._stream = cupy, device_id, stream
        self._copied, self._done = [self._event() for _ in range(slots)], [self._event() for _ in range(slots)]
        self._queued = self._event()

    def _event(self) -> Any:
        # A thread that waits sleeps: the cores belong to those that read data.
        return self._cupy.cuda.Event(block=True, disable_timing=True)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        with self._cupy.cuda.Device(self._device_id), self._stream:
            yield

    def host_buffer(self, n_bytes: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(n_bytes), np.uint8, n_bytes)

    def wait_for_step(self, slot: int) -> None:
        self._done[slot].synchronize()

    def copy(self, source: NDArray[Any], target: Array) -> None:
        target.set(source, stream=self._stream)

    def record(self, slot: int) -> None:
        self._stream.record(self._copied[slot])

    def acquire(self, slot: int) -> None:
        with self._cupy.cuda.Device(self._device_id):
            self._cupy.cuda.get_current_stream().wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        with self._cupy.cuda.Device(self._device_id):
            self._cupy.cuda.get_current_stream().record(self._done[slot])

    def follow(self) -> None:
        with self._cupy.cuda.Device(self._device_id):
            self._cupy.cuda.get_current_stream().record(self._queued)
            self._stream.wait_event(self._queued)
