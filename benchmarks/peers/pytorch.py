"""PyTorch: eager, and the same functions by torch.compile. Steps run on a GPU too."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.cases import BETAS, CHECKED_STEPS, EPS, LEARNING_RATES, Case, data
from benchmarks.peers import Contestant, blas_threads, nothing

Decorate = Callable[[Callable[..., Any]], Callable[..., Any]]


def contestant(case: Case, variant: str) -> Contestant:
    """Make a contestant. Variant "compiled" uses torch.compile; with "cuda" before it, a step runs on the GPU."""
    decorate = compiled() if variant.endswith("compiled") else lambda f: f
    if variant.startswith("cuda"):
        return step(case, decorate, "cuda")
    make = {"layer": layer_backward, "loss": loss, "fit": fit, "product": product}.get(case.family, step)
    made = make(case, decorate)
    made.choices = {blas_threads.named(n): partial(torch.set_num_threads, n) for n in dict.fromkeys((MOST_THREADS, 1))}
    spins = os.environ.get("GOMP_SPINCOUNT")
    made.setting = ", ".join(filter(None, (made.setting, f"GOMP_SPINCOUNT={spins}" if spins else "")))
    return made


def compiled() -> Decorate:
    """Reset torch.compile, which silently stops compiling a function after eight shapes."""
    import torch._dynamo

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.compiler.reset()
    return partial(torch.compile, dynamic=False, fullgraph=True)


MOST_THREADS = torch.get_num_threads()
"""PyTorch's number of threads when it is loaded."""


def layer_backward(case: Case, decorate: Decorate) -> Contestant:
    layer = data.layer(case)
    da, h, W = (torch.from_numpy(part) for part in (layer.da, layer.h, layer.W))

    def backward(da: Any, h: Any, W: Any) -> tuple[Any, ...]:
        return da.t() @ h, da.sum(0), torch.ops.aten.threshold_backward(da @ W, h, 0)

    backward = decorate(backward)

    def call() -> Any:
        with torch.no_grad():
            return backward(da, h, W)

    def check() -> dict[str, Any]:
        return {name: part.numpy() for name, part in zip(("dW", "db", "da_prev"), call(), strict=True)}

    return Contestant(call, check)


def loss(case: Case, decorate: Decorate) -> Contestant:
    logits = data.logits(case)
    a, y = torch.from_numpy(logits.a).requires_grad_(), torch.from_numpy(logits.y)
    cross_entropy = decorate(lambda a, y: functional.cross_entropy(a, y))

    def call() -> tuple[Any, Any]:
        value = cross_entropy(a, y)
        return value, torch.autograd.grad(value, a)[0]

    def check() -> dict[str, Any]:
        value, da = call()
        return {"loss": value.item(), "da": da.numpy()}

    return Contestant(call, check)


class Trainer:
    """A network, its optimizer, and steps that train it."""

    def __init__(
        self, case: Case, start: data.Training, decorate: Decorate, device: str = "cpu", *, capturable: bool = False
    ) -> None:
        self._start = start
        layers: list[Any] = []
        dtype = torch.from_numpy(start.x[:1]).dtype
        for n_in, n_out in case.layers:
            layers += [torch.nn.Linear(n_in, n_out, dtype=dtype, device=device), torch.nn.ReLU()]
        self._layers = layers[:-1:2]
        model = torch.nn.Sequential(*layers[:-1])

        def loss(x: Any, y: Any) -> Any:
            return functional.cross_entropy(model(x), y)

        def mixed_loss(x: Any, y: Any) -> Any:  # θ stays in float32, as gpuback's does
            with torch.autocast(device, torch.bfloat16, cache_enabled=not capturable):
                return loss(x, y)

        self._loss = decorate(mixed_loss if case.dtype == "bfloat16" else loss)
        self._adam = {"fused": True, "capturable": True} if capturable else {"fused": True}
        self._case = case
        self._optimizer: Any = None
        self._parameters = list(model.parameters())
        self.restart()

    def restart(self) -> None:
        """Restore the first θ, with an optimizer that has not stepped."""
        with torch.no_grad():
            for layer, W, b in zip(self._layers, self._start.weights, self._start.biases, strict=True):
                layer.weight.copy_(torch.from_numpy(W))
                layer.bias.copy_(torch.from_numpy(b))
        rate = LEARNING_RATES[self._case.optimizer]
        if self._case.optimizer == "SGD":
            self._optimizer = torch.optim.SGD(self._parameters, rate, fused=True)
        else:
            self._optimizer = torch.optim.Adam(self._parameters, rate, BETAS, EPS, **self._adam)

    def step(self, x: Any, y: Any) -> Any:
        self._optimizer.zero_grad(set_to_none=True)
        value = self._loss(x, y)
        value.backward()
        self._optimizer.step()
        return value.detach()

    @property
    def theta(self) -> Any:
        return torch.cat([part.detach().ravel() for part in self._parameters]).cpu().numpy()


def step(case: Case, decorate: Decorate, device: str = "cpu") -> Contestant:
    start = data.training(case)
    trainer = Trainer(case, start, decorate, device)
    x, y = torch.from_numpy(start.x).to(device), torch.from_numpy(start.y).to(device)

    def call() -> Any:
        return trainer.step(x, y)

    def check() -> dict[str, Any]:
        trainer.restart()
        losses = [call() for _ in range(CHECKED_STEPS)]
        return {"theta": trainer.theta, "loss": losses[-1].item()}

    wait = nothing if device == "cpu" else torch.cuda.synchronize
    return Contestant(call, check, "optimizer fused", wait=wait, restart=trainer.restart)


def fit(case: Case, decorate: Decorate) -> Contestant:
    start = data.training(case)
    trainer = Trainer(case, start, decorate)
    x, y = torch.from_numpy(start.x), torch.from_numpy(start.y)

    def run(epochs: int, shuffle: bool) -> Any:
        trainer.restart()
        for _ in range(epochs):
            order = torch.randperm(case.samples) if shuffle else torch.arange(case.samples)
            for rows in order.split(case.batch_size):
                trainer.step(x[rows], y[rows])
        return trainer.theta

    return Contestant(lambda: run(case.epochs, True), lambda: {"theta": run(1, False)}, "optimizer fused")


def product(case: Case, decorate: Decorate) -> Contestant:
    a, b = (torch.from_numpy(part) for part in data.factors(case))
    out = torch.empty_like(a)

    def call() -> Any:
        return torch.mm(a, b, out=out)

    return Contestant(call, lambda: {"product": call().numpy()})
