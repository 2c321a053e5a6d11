"""Share devices with PyTorch: the backend, the memory and the stream of a tensor."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from gpuback._backends.protocol import Ops
from gpuback._backends.registry import ops_for
from gpuback._core.typing import Array
from gpuback.errors import DeviceError


def array_over(tensor: torch.Tensor, ops: Ops) -> Array:
    """Return a tensor's own memory as an array of the backend; a copy only if its negation is still pending."""
    tensor = tensor.detach().resolve_neg()
    return tensor.numpy() if tensor.device.type == "cpu" else ops.to_array(tensor, "a tensor")


@functools.cache
def ops_on(kind: str, index: int | None) -> Ops:
    """Return the backend for a device of PyTorch's.

    Raises:
        DeviceError: a device that is neither a CPU nor an NVIDIA GPU.
        BackendError: CuPy is missing or finds no GPU; the message says which.
    """
    if kind == "cpu":
        return ops_for("numpy")
    if kind != "cuda" or torch.version.hip:
        raise DeviceError(f"expected parameters on a CPU or an NVIDIA GPU, got them on {kind!r}")
    ops_for("cupy")  # raises where there is none
    import cupy

    with cupy.cuda.Device(index):
        return ops_for("cupy")


def stream_of(device: torch.device) -> int:
    """Return the address of PyTorch's current stream; 0 on a CPU. Buffers are used on one stream only."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class _Stream:
    """A CUDA stream as CuPy takes it from others."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def on_stream_of(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that queues gpuback's work on PyTorch's current stream, after PyTorch's earlier work."""
    scope = ops_on(device.type, device.index).scope()
    return _queued_on(device, scope) if device.type == "cuda" else scope


@contextlib.contextmanager
def _queued_on(device: torch.device, scope: AbstractContextManager[object]) -> Iterator[None]:
    import cupy

    # PyTorch exports tensors of its current device only, and CuPy's streams are those of its own.
    stream = cupy.cuda.Stream.from_external(_Stream(stream_of(device)))
    with scope, torch.cuda.device(device), cupy.cuda.Device(device.index), stream:
        yield
