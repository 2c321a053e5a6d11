"""gpuback on a GPU: a layer's launch and its public call, the loss as a step runs it, training steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import cupy

import gpuback
from benchmarks.cases import CHECKED_STEPS, Case, data, gpu_data
from benchmarks.peers import Contestant
from benchmarks.peers.gpu_arrays import synchronize
from benchmarks.peers.gpuback_library import trainer
from gpuback._backends.registry import ops_for
from gpuback._core.activations import ACTIVATIONS


def contestant(case: Case, variant: str) -> Contestant:
    """Make a contestant.

    Args:
        case: what it runs.
        variant: of a layer "launch", "call" or "call, outputs fresh"; of a step "reproducible" or "captured".
    """
    if case.family == "layer":
        return layer_backward(case, variant)
    if case.family == "loss":
        return loss(case)
    made = step(case, reproducible=variant == "reproducible")
    made.graph = "cupy" if variant == "captured" else ""
    return made


def layer_backward(case: Case, variant: str) -> Contestant:
    sets = gpu_data.layer(case)
    run, setting = bound(case, sets) if variant == "launch" else (called(case, sets, variant), "")
    turn = cycle(range(len(sets)))

    def check() -> dict[str, Any]:
        first = sets[0]
        for result in first[3:]:
            result.data.memset(0xFF, result.nbytes)  # NaN shows values that are not written
        dW, db, da_prev = run(0) or first[3:]
        return {"dW": dW, "db": db, "da_prev": da_prev}

    made = Contestant(lambda: run(next(turn)), check, setting, wait=synchronize, sets=len(sets))
    made.graph = "cupy" if variant == "launch" else ""
    return made


def bound(case: Case, sets: list[gpu_data.Buffers]) -> tuple[Callable[[int], Any], str]:
    """Bind the layer's launch, laid out as in a training step, and return it with its name."""
    ops, precision, (n_in, n_out) = ops_for("cupy"), gpu_data.precision_of(case), case.sizes
    workspace = ops.workspace(case.batch_size, case.sizes, precision)
    relu = ACTIVATIONS["relu"]
    launches = [ops.bind_backward(s.da, s.W, s.da_prev, relu, s.h, 1.0, workspace) for s in sets]

    def run(k: int) -> None:
        launches[k](sets[k].h, sets[k].dW, sets[k].db, False)

    what = ops.explain_backward(case.batch_size, n_out, n_in, precision, need_da_prev=True)
    return run, what.partition(",")[0]


def called(case: Case, sets: list[gpu_data.Buffers], variant: str) -> Callable[[int], Any]:
    """Call the public function."""
    tf32, fresh = gpu_data.precision_of(case).tf32, variant == "call, outputs fresh"

    def run(k: int) -> Any:
        s = sets[k]
        outs = {} if fresh else {"dW": s.dW, "db": s.db, "da_prev": s.da_prev}
        return gpuback.fused_backward(s.da, s.h, s.W, activation_prev="relu", allow_tf32=tf32, **outs)

    return run


def loss(case: Case) -> Contestant:
    """Compute the loss of logits at several addresses, each with a da of its own."""
    logits = data.logits(case)
    net = gpuback.MLP((1, *case.sizes), dtype=case.dtype, backend="cupy", seed=0)
    ops, rows = net.ops, case.batch_size
    workspace = ops.workspace(rows, net.sizes, net.architecture.precision)
    y = ops.asarray(logits.y, None, "labels")
    das, runs = [], []
    for _ in range(gpu_data.copies(case.bytes, gpu_data.MOST_SETS)):
        a = cupy.asarray(logits.a)
        das.append(workspace.output_delta(a))
        runs.append(ops.bind_loss(net.architecture.loss_row, net.architecture.output, a, das[-1], rows, workspace))
    turn = cycle(runs)

    def check() -> dict[str, Any]:
        value = ops.mean_loss([runs[0](y, None)], rows)
        return {"loss": float(value), "da": ops.to_numpy(das[0])}

    return Contestant(lambda: next(turn)(y, None), check, wait=synchronize, sets=len(runs), graph="cupy")


def step(case: Case, *, most: int = gpu_data.MOST_BATCHES, reproducible: bool = False) -> Contestant:
    """Train on batches at several addresses. `restart` and `check` make the network."""
    start = data.training(case)
    theta = data.flat(start.weights, start.biases)
    precision = gpu_data.precision_of(case)
    options = {"dtype": precision.name, "allow_tf32": precision.tf32, "reproducible": reproducible}
    batches = [(cupy.asarray(start.x), cupy.asarray(start.y)) for _ in range(gpu_data.copies(start.x.nbytes, most))]
    turn = cycle(batches)
    takes: Any = None

    def restart() -> None:
        nonlocal takes
        takes = None  # so that its memory is reused
        takes = trainer(case, theta, backend="cupy", **options)

    def call() -> Any:
        return takes(*next(turn))

    def check() -> dict[str, Any]:
        restart()
        losses = [call() for _ in range(CHECKED_STEPS)]
        return {"theta": takes.net.ops.to_numpy(takes.net.theta), "loss": float(losses[-1])}

    return Contestant(call, check, wait=synchronize, restart=restart, sets=len(batches))


def memory(case: Case, variant: str) -> int:
    """Measure the bytes that a batch, the network and three steps take from a memory pool of their own."""
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        made = step(case, most=1, reproducible=variant == "reproducible")
        made.restart()
        for _ in range(CHECKED_STEPS):
            made.call()
        made.wait()
        return int(pool.total_bytes())
