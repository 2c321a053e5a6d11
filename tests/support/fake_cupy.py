"""As much of CuPy as benchmarks on a GPU use, on NumPy: what they do can be tested without a GPU, if not how fast."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuback._backends.registry
from gpuback._backends.protocol import Ops
from gpuback._backends.registry import Backend, BackendStatus

OTHERS = ("torch", "jax", "nvmath", "tinycudann")
"""Libraries that there are none of beside it."""

LEVEL_2_CACHE = 40_000
CEILINGS = {"copy": 4e12, "bfloat16": 8e14, "tf32": 4e14, "float32": 5e13}


class Memory:
    """A pointer."""

    def __init__(self, address: int) -> None:
        self.ptr = address

    def __add__(self, offset: int) -> Memory:
        return Memory(self.ptr + offset)

    def copy_from_device(self, source: Memory, size: int) -> None:
        ctypes.memmove(self.ptr, source.ptr, size)

    def copy_from_device_async(self, source: Memory, size: int, stream: Any) -> None:
        """Of a gigabyte, for its time alone."""

    def memset(self, value: int, size: int) -> None:
        ctypes.memset(self.ptr, value, size)


class Array(np.ndarray):
    @property
    def data(self) -> Memory:  # type: ignore[override]
        return Memory(self.ctypes.data)


def asarray(x: Any) -> Array:
    if isinstance(x, Array):
        return x
    return np.array(x.numpy() if hasattr(x, "numpy") else x, order="C").view(Array)  # a tensor, or of NumPy


def asnumpy(x: Any) -> np.ndarray:
    return np.array(x)


class Stream:
    null = None

    def __init__(self, non_blocking: bool = False) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def begin_capture(self) -> None: ...

    def end_capture(self) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda stream: None)


class Event:
    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class MemoryPool:
    def malloc(self, size: int) -> None: ...

    def total_bytes(self) -> int:
        return 123_456

    def free_all_blocks(self) -> None: ...


def module() -> Any:
    runtime = SimpleNamespace(
        deviceSynchronize=lambda: None,
        getDevice=lambda: 0,
        getDeviceProperties=lambda device: {
            "name": b"A fake GPU", "multiProcessorCount": 7, "l2CacheSize": LEVEL_2_CACHE,
        },
        runtimeGetVersion=lambda: 13020,
        driverGetVersion=lambda: 13000,
    )  # fmt: skip
    cuda = SimpleNamespace(
        Stream=Stream, Event=Event, MemoryPool=MemoryPool, runtime=runtime,
        get_elapsed_time=lambda start, end: 0.5,
        using_allocator=lambda malloc: contextlib.nullcontext(),
        cublas=SimpleNamespace(getVersion=lambda handle: 130200),
        device=SimpleNamespace(get_cublas_handle=lambda: 0),
    )  # fmt: skip
    return SimpleNamespace(
        asarray=asarray, asnumpy=asnumpy, ndarray=Array, linalg=np.linalg, exp=np.exp, log=np.log, matmul=np.matmul,
        empty=lambda shape, dtype: np.full(shape, 7, dtype).view(Array),
        zeros=lambda shape, dtype: np.zeros(shape, dtype).view(Array),
        arange=lambda n: np.arange(n).view(Array),
        cuda=cuda, get_default_memory_pool=MemoryPool, __spec__=ModuleSpec("cupy", None),
    )  # fmt: skip


@contextlib.contextmanager
def installed(
    make_ops: Callable[[bool], Ops] = gpuback._backends.registry._numpy_ops, without: Sequence[str] = OTHERS
) -> Iterator[None]:
    """`import cupy` gives the fake, and other libraries cannot be imported.

    Args:
        make_ops: what backend="cupy" is, given whether it is to be reproducible.
        without: those libraries.
    """
    with pytest.MonkeyPatch.context() as patch:
        _forget()
        patch.setitem(sys.modules, "cupy", module())
        for name in without:
            patch.setitem(sys.modules, name, None)
        backend = Backend(make_ops, lambda: BackendStatus(True, "a fake"))
        patch.setitem(gpuback._backends.registry.BACKENDS, "cupy", backend)
        patch.setattr(gpuback._backends.registry, "ops_of", lambda arrays: make_ops(False))
        patch.setattr(importlib.import_module("benchmarks.cases.gpu_data").Numbers, "SIZE", 1 << 12)
        arrays = importlib.import_module("benchmarks.peers.gpu_arrays")
        if "torch" not in without:
            patch.setattr(arrays, "torch", importlib.import_module("torch"))
        patch.setattr(arrays, "DEVICE", "cpu")
        timing = importlib.import_module("benchmarks.harness.gpu_timing")
        patch.setattr(timing, "TURN", 1e-4)
        patch.setattr(timing, "ceilings", lambda: dict(CEILINGS))
        yield
    _forget()


def _forget() -> None:
    """What imports CuPy is imported anew."""
    for name in list(sys.modules):
        parent, _, last = name.rpartition(".")
        if parent.startswith("benchmarks.") and last.startswith("gpu_"):
            del sys.modules[name]
            delattr(sys.modules[parent], last)
