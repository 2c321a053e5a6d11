"""What back-propagation gives: ∂loss/∂θ, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from gpuback._core.typing import Array


@dataclass
class Gradients:
    """∂loss/∂θ: for each part of a network, an array of that part's shape.

    Attributes:
        theta: (n_parameters,) all of it, in θ's order and dtype.
        weights, biases: ∇W_k (nO, nI) and ∇b_k (nO,), views into `theta`; counted from 0 as tuples are, so weights[0]
            is ∇W_1. `MLP.per_sample_grad` puts an axis of B samples in front of all three.
        inputs: (B, n_0) ∂loss/∂x in θ's dtype, if it was asked for.
    """

    theta: Array
    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    inputs: Array | None = None
