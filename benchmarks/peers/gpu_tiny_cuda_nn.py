"""tiny-cuda-nn on a GPU: fully fused networks in float16, trained by PyTorch's Adam.

Its network differs from the case's. It has no biases, hidden layers of one width out of 16, 32, 64 and 128, and weights
of its own. So it is checked against its own weights: loss and gradient of the same network by PyTorch, in float32.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch

from benchmarks.cases import BETAS, EPS, LEARNING_RATES, Case, CheckFailedError, data, gpu_data
from benchmarks.peers import Contestant, LeftOutError
from benchmarks.peers.gpu_arrays import DEVICE, synchronize

WIDTHS = (16, 32, 64, 128)
PADDED_TO = 16
CLOSE_LOSS, CLOSE_GRADIENT = 2e-2, 0.1
"""Largest errors, relative to the loss and to the gradient's length."""


def why_not(case: Case) -> str | None:
    """Explain why it cannot take part in a case; None if it can."""
    if case.dtype != "bfloat16":
        return "computes in 16 bits"
    hidden = set(case.sizes[1:-1])
    if len(hidden) != 1 or not hidden <= set(WIDTHS):
        return f"has hidden layers of one width out of {', '.join(map(str, WIDTHS))}"
    return None if case.sizes[0] % PADDED_TO == 0 else f"pads inputs to multiples of {PADDED_TO}, with ones"


def contestant(case: Case, variant: str) -> Contestant:
    reason = why_not(case)
    if reason is not None:
        raise LeftOutError(reason)
    import tinycudann

    network = tinycudann.Network(case.sizes[0], case.sizes[-1], configuration(case))
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATES["Adam"], BETAS, EPS, fused=True)
    loss_of = torch.nn.functional.cross_entropy
    start = data.training(case)
    y = torch.from_numpy(start.y).to(DEVICE)
    samples = [
        torch.from_numpy(start.x).to(DEVICE, copy=True)
        for _ in range(gpu_data.copies(start.x.nbytes, gpu_data.MOST_BATCHES))
    ]
    turn = cycle(samples)

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(network(next(turn)).float(), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def check() -> dict[str, Any]:
        theta = network.params.detach().float().requires_grad_()
        loss = loss_of(plain_forward(case, theta, samples[0]), y)
        (gradient,) = torch.autograd.grad(loss, theta)
        found, expected = float(call()), loss.item()
        if not abs(found - expected) <= CLOSE_LOSS * abs(expected):
            raise CheckFailedError(f"check failed: its loss is {found:.4g} instead of {expected:.4g}")
        error = float((network.params.grad.float() - gradient).norm() / gradient.norm())
        if not error <= CLOSE_GRADIENT:
            raise CheckFailedError(f"check failed: its gradient is off by {error:.2g} of its length")
        return {}

    return Contestant(call, check, "float16, no biases, Adam fused", wait=synchronize, sets=len(samples))


def configuration(case: Case) -> dict[str, Any]:
    return {
        "otype": "FullyFusedMLP",
        "activation": "ReLU",
        "output_activation": "None",
        "n_neurons": case.sizes[1],
        "n_hidden_layers": len(case.sizes) - 2,
    }


def plain_forward(case: Case, theta: Any, x: Any) -> Any:
    """Compute the network's outputs by PyTorch. Weights lie layer by layer, row by row; outputs are padded."""
    h, start = x.float(), 0
    for k, (n_in, n_out) in enumerate(case.layers, 1):
        rows = -(-n_out // PADDED_TO) * PADDED_TO
        W = theta[start : start + rows * n_in].reshape(rows, n_in)
        start += rows * n_in
        h = h @ W.t()
        h = torch.relu(h) if k < len(case.layers) else h
    return h[:, : case.sizes[-1]]
