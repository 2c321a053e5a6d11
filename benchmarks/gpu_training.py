"""Whole training steps on a GPU, `gpuback.TrainStep` beside PyTorch with its fused Adam; what a call costs the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np

import gpuback
from benchmarks import gpu_clock
from benchmarks.gpu_clock import Stopwatch, torch
from gpuback.activations import ACTIVATIONS
from gpuback.ops import ops_for
from gpuback.precision import Precision

FAMILIES = (
    ((64, 64, 64, 10), 64),
    ((784, 256, 128, 10), 128),
    ((*[64] * 7, 10), 16384),
    ((784, 1024, 1024, 1024, 10), 1024),
)
LEARNING_RATE = 1e-3
CLOSE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Between the losses of the first steps, relative."""


def batch(sizes: tuple[int, ...], batch_size: int) -> tuple[Any, Any]:
    """Samples and labels on the device, as the network keeps them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size, sizes[0]), dtype=np.float32)
    return cupy.asarray(x), cupy.asarray(rng.integers(sizes[-1], size=batch_size))


def torch_step(net: gpuback.MLP, x: Any, y: Any, *, capturable: bool) -> Callable[[], Any]:
    """The same step on the same θ; bfloat16 by autocast, which keeps θ in float32 as gpuback does."""
    layers: list[Any] = []
    for W, b in zip(net.weights, net.biases, strict=True):
        linear = torch.nn.Linear(W.shape[1], W.shape[0], device="cuda")
        with torch.no_grad():
            linear.weight.copy_(torch.as_tensor(W, device="cuda"))
            linear.bias.copy_(torch.as_tensor(b, device="cuda"))
        layers += [linear, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True, capturable=capturable)
    loss_of = torch.nn.CrossEntropyLoss()
    samples, labels = torch.as_tensor(x, device="cuda"), torch.as_tensor(y, device="cuda")
    sixteen_bit = net.dtype.name == "bfloat16"

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=sixteen_bit, cache_enabled=not capturable):
            loss = loss_of(model(samples), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def check(name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Three steps from the same θ have the same losses."""
    losses = [(float(ours()), float(theirs())) for _ in range(3)]
    if not all(abs(a - b) <= CLOSE[name] * abs(b) for a, b in losses):
        raise SystemExit(f"training in {name}: losses of gpuback and PyTorch differ: {losses}")


def measure(sizes: tuple[int, ...], batch_size: int, dtype: str, rounds: int) -> dict[str, Any]:
    """One row: seconds for a step, by contestant."""

    def fresh(reproducible: bool = False) -> tuple[gpuback.MLP, Callable[[], Any]]:
        net = gpuback.MLP(sizes, dtype=dtype, backend="cupy", reproducible=reproducible, seed=0)
        step = gpuback.TrainStep(net, gpuback.Adam(LEARNING_RATE))
        return net, lambda: step(x, y)

    x, y = batch(sizes, batch_size)
    ready: dict[str, Callable[[], Stopwatch]] = {
        "gpuback": lambda: gpu_clock.wall_clock(lambda _: ours(), 1),
        "gpuback graph": lambda: gpu_clock.cupy_graph(lambda _: ours(), 10),
    }
    net, ours = fresh()
    _, exact = fresh(reproducible=True)
    ready["gpuback reproducible"] = lambda: gpu_clock.wall_clock(lambda _: exact(), 1)
    if torch is not None:
        eager, graphed = (torch_step(net, x, y, capturable=capturable) for capturable in (False, True))
        check(dtype, ours, eager)
        ready["PyTorch eager"] = lambda: gpu_clock.wall_clock(lambda _: eager(), 1)
        ready["PyTorch graph"] = lambda: gpu_clock.torch_graph(lambda _: graphed(), 10)
    stopwatches, failures = {}, {}
    for name, make in ready.items():
        try:
            stopwatches[name] = make()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:300]
            gpu_clock.synchronize()
    times = gpu_clock.take_turns(stopwatches, rounds)
    return {
        "sizes": sizes,
        "batch_size": batch_size,
        "dtype": dtype,
        "seconds": {name: spread._asdict() for name, spread in times.items()},
        "failures": failures,
    }


def measure_all(rounds: int) -> Iterator[dict[str, Any]]:
    for dtype in ("float32", "bfloat16"):
        for sizes, batch_size in FAMILIES:
            yield measure(sizes, batch_size, dtype, rounds)


def host_costs() -> dict[str, dict[str, float]]:
    """Seconds that the host is busy with a call on something small; the GPU's work is not waited for."""
    ops, precision = ops_for("cupy"), Precision.of("bfloat16")
    host = np.random.default_rng(0).standard_normal((3, 64, 64), dtype=np.float32).astype(precision.operand)
    da, h, W = (cupy.asarray(x) for x in host)
    outs = {"dW": cupy.empty((64, 64), np.float32), "db": cupy.empty(64, np.float32), "da_prev": cupy.empty_like(h)}
    workspace = ops.workspace(64, (64, 64), precision)
    launch = ops.bind_backward(da, W, outs["da_prev"], ACTIVATIONS["relu"], h, 1.0, workspace)
    sizes, batch_size = FAMILIES[0]
    net = gpuback.MLP(sizes, dtype="bfloat16", backend="cupy", seed=0)
    step = gpuback.TrainStep(net, gpuback.Adam())
    x, y = batch(sizes, batch_size)
    calls: dict[str, Callable[[int], Any]] = {
        "one bound launch": lambda _: launch(h, outs["dW"], outs["db"], False),
        "fused_backward, outputs given": lambda _: gpuback.fused_backward(da, h, W, activation_prev="relu", **outs),
        "fused_backward, outputs fresh": lambda _: gpuback.fused_backward(da, h, W, activation_prev="relu"),
        f"TrainStep, {len(sizes) - 1} layers": lambda _: step(x, y),
    }
    stopwatches = {name: gpu_clock.enqueueing(call, 100) for name, call in calls.items()}
    return {name: spread._asdict() for name, spread in gpu_clock.take_turns(stopwatches, 7).items()}
