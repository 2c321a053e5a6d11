"""Time norms of 1024 samples' gradients, and their clipped mean, beside torch.func on a CPU; count their memory.

Each contestant has a process of its own. Times are in milliseconds a call: every contestant has a turn in each round,
and the figure is the median of the rounds' medians. Memory is in megabytes: how far the first call with all samples
raises the process's peak resident set, as Linux counts it, above what the process takes after a call with two samples.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIZES, BATCH_SIZE, MAX_NORM = (784, 512, 512, 10), 1024, 1.0
ROUNDS, SECONDS = 5, 1.0

Call = Callable[[int], object]
"""Runs on so many samples, the first ones."""


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((BATCH_SIZE, SIZES[0]), dtype=np.float32), rng.integers(SIZES[-1], size=BATCH_SIZE)


def of_gpuback(what: str) -> Call:
    from gpuback import MLP

    net = MLP(SIZES, backend="numpy", seed=0)
    x, y = data()
    if what == "norms":
        return lambda count: net.gradient_norms(x[:count], y[:count])
    if what == "clipped":
        return lambda count: net.value_and_clipped_grad(x[:count], y[:count], MAX_NORM)
    return lambda count: net.value_and_grad(x[:count], y[:count])


def of_torch(what: str, chunk_size: int | None = None) -> Call:
    import torch
    from torch.func import grad, vmap

    from gpuback import MLP

    net = MLP(SIZES, backend="numpy", seed=0)
    parameters = [torch.tensor(part) for pair in zip(net.weights, net.biases, strict=True) for part in pair]
    x, y = map(torch.tensor, data())

    def loss(parameters: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = x
        for k in range(0, len(parameters), 2):
            a = torch.nn.functional.linear(h, parameters[k], parameters[k + 1])
            h = torch.relu(a)
        return torch.nn.functional.cross_entropy(a, y)

    def norm(parameters: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Compute the norm of one sample's gradient. With chunks, only so many gradients exist at a time."""
        return torch.sqrt(sum((part * part).sum() for part in grad(loss)(parameters, x, y)))

    each_norm = vmap(norm, in_dims=(None, 0, 0), chunk_size=chunk_size)
    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def clipped(count: int) -> list[torch.Tensor]:
        gradients = each(parameters, x[:count], y[:count])
        squares = sum((part.reshape(count, -1) ** 2).sum(dim=1) for part in gradients)
        factors = torch.clamp(MAX_NORM / torch.sqrt(squares), max=1.0) / count
        return [torch.tensordot(factors, part, dims=1) for part in gradients]

    if what == "norms":
        return lambda count: each_norm(parameters, x[:count], y[:count])
    if what == "clipped":
        return clipped
    for part in parameters:
        part.requires_grad_()
    return lambda count: torch.autograd.grad(loss(parameters, x[:count], y[:count]), parameters)


CONTESTANTS: dict[str, Callable[[], Call]] = {
    "norms: gpuback": lambda: of_gpuback("norms"),
    "norms: torch.func": lambda: of_torch("norms"),
    "norms: torch.func, 64 at a time": lambda: of_torch("norms", 64),
    "clipped mean: gpuback": lambda: of_gpuback("clipped"),
    "clipped mean: torch.func": lambda: of_torch("clipped"),
    "ordinary gradient: gpuback": lambda: of_gpuback("gradient"),
    "ordinary gradient: PyTorch": lambda: of_torch("gradient"),
}


def work(name: str) -> None:
    """Work in a contestant's process: print megabytes at once, then seconds a call for each line that is read."""
    call = CONTESTANTS[name]()
    call(2)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    call(BATCH_SIZE)
    print((kilobytes("VmHWM") - before) * 1024 / 1e6, flush=True)
    for _ in sys.stdin:
        calls: list[float] = []
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end or not calls:
            started = time.perf_counter()
            call(BATCH_SIZE)
            calls.append(time.perf_counter() - started)
        print(statistics.median(calls), flush=True)


def kilobytes(what: str) -> int:
    """Read a figure of this process's memory, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.per_sample", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", help=argparse.SUPPRESS)  # for a contestant's process
    only = parser.parse_args().only
    if only is not None:
        work(only)
        return
    command = [sys.executable, "-m", "benchmarks.studies.per_sample", "--only"]
    workers = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        for name in CONTESTANTS
    }
    try:
        megabytes = {name: answer(worker) for name, worker in workers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(ROUNDS):
            for name, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("\n")
                seconds[name].append(answer(worker))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    print(f"{'-'.join(map(str, SIZES))}, B = {BATCH_SIZE}, float32")
    for name, rounds in seconds.items():
        spread = f"{1e3 * min(rounds):.1f} to {1e3 * max(rounds):.1f}"
        print(f"{name:34} {1e3 * statistics.median(rounds):8.1f} ms ({spread})  {megabytes[name]:8.1f} MB")


def answer(worker: subprocess.Popen[str]) -> float:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a contestant's process has ended: {worker.args!r}")
    return float(line)


if __name__ == "__main__":
    main()
