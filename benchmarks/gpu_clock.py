"""How contestants are timed on a GPU: CUDA graphs between events, so that launching costs nothing, or a wall clock.

A contestant works on one of several sets of buffers, together larger than the level-2 cache, one after the other, so
that none finds its operands there. Contestants take turns, round by round.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np

try:
    import torch as torch
except ImportError:  # then there are no peers
    torch = None

Run = Callable[[int], object]
"""Puts the work on set k into the queue; may return what must stay alive."""

Stopwatch = Callable[[], float]
"""Works on every set once; seconds for one set."""


class Spread(NamedTuple):
    """Seconds over rounds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        p20, median, p80 = (float(value) for value in np.percentile(seconds, (20, 50, 80)))
        return cls(median, p20, p80)


def synchronize() -> None:
    cupy.cuda.runtime.deviceSynchronize()


def cupy_graph(run: Run, sets: int) -> Stopwatch:
    """What CuPy's current stream gets, captured."""
    stream, start, end = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Event(), cupy.cuda.Event()
    with stream:
        kept = [run(k) for k in range(sets)]  # compiles, and fills the memory pool: a capture may not allocate
        stream.synchronize()
        kept.clear()
        stream.begin_capture()
        try:
            kept = [run(k) for k in range(sets)]
        finally:
            graph = stream.end_capture()

    def seconds() -> float:
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / sets

    seconds.kept = kept  # type: ignore[attr-defined]
    return seconds


def torch_graph(run: Run, sets: int) -> Stopwatch:
    """What PyTorch's current stream gets, captured."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            for k in range(sets):
                run(k)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(k) for k in range(sets)]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / sets

    seconds.kept = kept  # type: ignore[attr-defined]
    return seconds


def wall_clock(run: Run, sets: int, calls: int = 50) -> Stopwatch:
    """Call after call, as a program makes them; the queue is empty before and after."""

    def seconds() -> float:
        synchronize()
        started = time.perf_counter()
        for call in range(calls):
            run(call % sets)
        synchronize()
        return (time.perf_counter() - started) / calls

    return seconds


def enqueueing(run: Run, calls: int = 200) -> Stopwatch:
    """What a call costs the host, which does not wait for the work; `calls` fit into the driver's queue."""

    def seconds() -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run(0)
        elapsed = (time.perf_counter() - started) / calls
        synchronize()
        return elapsed

    return seconds


def take_turns(contestants: dict[str, Stopwatch], rounds: int) -> dict[str, Spread]:
    """Each once to warm up, then round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, stopwatch in contestants.items():
            elapsed = stopwatch()
            if turn:
                seconds[name].append(elapsed)
    return {name: Spread.of(figures) for name, figures in seconds.items()}


def between_events(work: Callable[[], object], rounds: int = 10) -> float:
    """Median seconds of something long, on the default stream."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    seconds = []
    for _ in range(rounds + 2):
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(float(cupy.cuda.get_elapsed_time(start, end)) / 1e3)
    return float(np.median(seconds[2:]))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether PyTorch's float32 products may use TF32."""
    if torch is None:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, read and written."""
    source, target = (cupy.zeros(1 << 30, np.uint8) for _ in range(2))
    stream = cupy.cuda.Stream.null
    seconds = between_events(lambda: target.data.copy_from_device_async(source.data, source.nbytes, stream))
    return 2 * source.nbytes / seconds


def product_rate(name: str, rounds: int) -> float:
    """Operations per second of PyTorch's product of two large matrices of random numbers."""
    n, dtype = 8192, torch.bfloat16 if name == "bfloat16" else torch.float32
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with tf32(name == "tf32"):
        seconds = between_events(lambda: torch.mm(a, b, out=out), rounds)
    return float(2 * n**3 / seconds)


def ceilings() -> dict[str, float]:
    """What this device reaches, by name; rates of products only where PyTorch is there to make them."""
    found = {"bandwidth": copy_bandwidth()}
    cupy.get_default_memory_pool().free_all_blocks()
    if torch is not None:
        found |= {name: product_rate(name, n) for name, n in (("bfloat16", 20), ("tf32", 10), ("float32", 4))}
        torch.cuda.empty_cache()
    return found


def as_tensor(array: Any) -> Any:
    """A CuPy array's memory as a tensor of the same format."""
    if array.dtype.name == "bfloat16":
        return torch.as_tensor(array.view(np.int16), device="cuda").view(torch.bfloat16)
    return torch.as_tensor(array, device="cuda")
