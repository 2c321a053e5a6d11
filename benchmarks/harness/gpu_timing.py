"""Timing on a GPU: CUDA graphs between events, so that launches do not count, or a wall clock.

A contestant works on one of several sets of buffers, together larger than the level-2 cache, one after the other, so
that none finds its operands there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import cupy
import numpy as np

from benchmarks.peers.gpu_arrays import synchronize as synchronize
from benchmarks.peers.gpu_arrays import torch as torch

Call = Callable[[], object]
"""Enqueues the work on the next set. May return objects that must stay alive."""

Stopwatch = Callable[[], float]
"""Works for one turn, and returns seconds for one set."""

TURN, FEWEST_CALLS, MOST_CALLS = 0.02, 3, 200
"""Seconds that a turn by the wall clock takes, and the fewest and the most calls in it."""


def cupy_graph(call: Call, sets: int) -> Stopwatch:
    """Capture the calls on CuPy's current stream, and time the graph."""
    synchronize()
    stream, start, end = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Event(), cupy.cuda.Event()
    with stream:
        results = [call() for _ in range(sets)]  # compiles, and fills the memory pool: a capture may not allocate
        stream.synchronize()
        results.clear()
        stream.begin_capture()
        try:
            results = [call() for _ in range(sets)]
        finally:
            graph = stream.end_capture()

    def seconds() -> float:
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / sets

    seconds.results = results  # type: ignore[attr-defined]  # the graph writes to them
    return seconds


def torch_graph(call: Call, sets: int) -> Stopwatch:
    """Capture the calls on PyTorch's current stream, and time the graph."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2 * sets):
            call()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX has threads of its own here
        results = [call() for _ in range(sets)]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / sets

    seconds.results = results  # type: ignore[attr-defined]  # the graph writes to them
    return seconds


def wall_clock(call: Call, wait: Callable[[], object]) -> Stopwatch:
    """Time call after call, as a program makes them. The queue is empty before and after.

    Args:
        call: the work.
        wait: for libraries whose work may not have reached the queue when a call returns.
    """

    def timed(calls: int) -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        synchronize()
        return (time.perf_counter() - started) / calls

    timed(1)  # compiles
    calls = max(FEWEST_CALLS, min(MOST_CALLS, round(TURN / timed(FEWEST_CALLS))))
    return lambda: timed(calls)


def enqueueing(call: Call, calls: int, wait: Callable[[], object]) -> Stopwatch:
    """Time calls on the host, without waiting for the work. `calls` fit into the driver's queue."""

    def seconds() -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        elapsed = (time.perf_counter() - started) / calls
        wait()
        synchronize()
        return elapsed

    return seconds


def between_events(work: Callable[[], object], rounds: int = 10) -> float:
    """Measure the median seconds of long work on the default stream."""
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
    """Set whether PyTorch's float32 products may use TF32."""
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
    """Measure bytes per second of a large copy on the device, read and written."""
    source, target = (cupy.zeros(1 << 30, np.uint8) for _ in range(2))
    stream = cupy.cuda.Stream.null
    seconds = between_events(lambda: target.data.copy_from_device_async(source.data, source.nbytes, stream))
    return 2 * source.nbytes / seconds


def product_rate(name: str, rounds: int) -> float:
    """Measure operations per second of PyTorch's product of two large matrices of random numbers."""
    n, dtype = 8192, torch.bfloat16 if name == "bfloat16" else torch.float32
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with tf32(name == "tf32"):
        seconds = between_events(lambda: torch.mm(a, b, out=out), rounds)
    return float(2 * n**3 / seconds)


def cupy_product_rate(rounds: int) -> float:
    """Measure operations per second of CuPy's product of such matrices, in float32."""
    n, rng = 8192, np.random.default_rng(0)
    a, b = (cupy.asarray(rng.standard_normal((n, n), dtype=np.float32)) for _ in range(2))
    out = cupy.empty_like(a)
    return float(2 * n**3 / between_events(lambda: cupy.matmul(a, b, out=out), rounds))


def ceilings() -> dict[str, float]:
    """Measure the highest rates of this device, by name. Without PyTorch, products are in float32 only."""
    found = {"copy": copy_bandwidth()}
    cupy.get_default_memory_pool().free_all_blocks()
    if torch is None:
        found["float32"] = cupy_product_rate(4)
        cupy.get_default_memory_pool().free_all_blocks()
    else:
        found |= {name: product_rate(name, n) for name, n in (("bfloat16", 20), ("tf32", 10), ("float32", 4))}
        torch.cuda.empty_cache()
    return found
