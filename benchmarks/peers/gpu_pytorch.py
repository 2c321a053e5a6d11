"""PyTorch on a GPU: eager, in CUDA graphs, and compiled."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from torch.nn import functional

from benchmarks.cases import CHECKED_STEPS, Case, data, gpu_data
from benchmarks.peers import Contestant, LeftOutError, gpu_arrays
from benchmarks.peers.gpu_arrays import DEVICE, as_array, as_tensor, synchronize
from benchmarks.peers.pytorch import Decorate, Trainer, compiled


def contestant(case: Case, variant: str) -> Contestant:
    """Make a contestant.

    Args:
        case: what it runs.
        variant: "captured" for CUDA graphs, "captured compiled" for compiled functions in them, "captured products" for
            a layer's products alone.
    """
    if gpu_arrays.torch is None:
        raise LeftOutError("finds no GPU")
    decorate, captured = compiled() if variant.endswith("compiled") else lambda f: f, variant.startswith("captured")
    if variant.endswith("products"):
        made = layer_products(case)
    elif case.family == "layer":
        made = layer_backward(case, decorate)
    elif case.family == "loss":
        made = loss(case, decorate)
    else:
        made = step(case, decorate, captured=captured)
    made.graph = "torch" if captured else ""
    return made


def backward(da: Any, h: Any, W: Any) -> tuple[Any, ...]:
    """Compute a layer's gradients. dW and da_prev have the operands' format."""
    return da.t() @ h, da.sum(0, dtype=torch.float32), (da @ W) * (h > 0)


def layer_backward(case: Case, decorate: Decorate) -> Contestant:
    sets = [tuple(map(as_tensor, buffers[:3])) for buffers in gpu_data.layer(case)]
    turn, layer = cycle(sets), decorate(backward)

    def check() -> dict[str, Any]:
        return {name: as_array(part) for name, part in zip(("dW", "db", "da_prev"), layer(*sets[0]), strict=True)}

    return Contestant(lambda: layer(*next(turn)), check, wait=synchronize, sets=len(sets))


def layer_products(case: Case) -> Contestant:
    """Multiply by cuBLAS and do nothing else. The check completes what is missing of a layer."""
    sets = [tuple(map(as_tensor, buffers[:3])) for buffers in gpu_data.layer(case)]
    turn = cycle(sets)

    def products(da: Any, h: Any, W: Any) -> tuple[Any, Any]:
        return da.t() @ h, da @ W

    def check() -> dict[str, Any]:
        da, h, _ = sets[0]
        dW, dh = products(*sets[0])
        parts = {"dW": dW, "db": da.sum(0, dtype=torch.float32), "da_prev": dh * (h > 0)}
        return {name: as_array(part) for name, part in parts.items()}

    return Contestant(lambda: products(*next(turn)), check, "products alone", wait=synchronize, sets=len(sets))


def loss(case: Case, decorate: Decorate) -> Contestant:
    logits = data.logits(case)
    y = torch.from_numpy(logits.y).to(DEVICE)
    sets = [
        torch.from_numpy(logits.a).to(DEVICE, copy=True).requires_grad_()
        for _ in range(gpu_data.copies(case.bytes, gpu_data.MOST_SETS))
    ]
    turn, cross_entropy = cycle(sets), decorate(lambda a, y: functional.cross_entropy(a, y))

    def call() -> tuple[Any, Any]:
        a = next(turn)
        value = cross_entropy(a, y)
        return value, torch.autograd.grad(value, a)[0]

    def check() -> dict[str, Any]:
        value, da = call()
        return {"loss": value.item(), "da": da.cpu().numpy()}

    return Contestant(call, check, wait=synchronize, sets=len(sets))


def step(case: Case, decorate: Decorate, *, most: int = gpu_data.MOST_BATCHES, captured: bool = False) -> Contestant:
    """Train on batches at several addresses."""
    start = data.training(case)
    trainer = Trainer(case, start, decorate, DEVICE, capturable=captured)
    batches = [
        (torch.from_numpy(start.x).to(DEVICE, copy=True), torch.from_numpy(start.y).to(DEVICE, copy=True))
        for _ in range(gpu_data.copies(start.x.nbytes, most))
    ]
    turn = cycle(batches)

    def call() -> Any:
        return trainer.step(*next(turn))

    def check() -> dict[str, Any]:
        trainer.restart()
        losses = [call() for _ in range(CHECKED_STEPS)]
        return {"theta": trainer.theta, "loss": losses[-1].item()}

    return Contestant(call, check, "Adam fused", wait=synchronize, restart=trainer.restart, sets=len(batches))


def memory(case: Case, variant: str) -> int:
    """Measure the most bytes that tensors of a batch, the network and three steps took at once."""
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = step(case, lambda f: f, most=1)
    for _ in range(CHECKED_STEPS):
        made.call()
    synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
