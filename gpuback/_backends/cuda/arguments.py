"""How kernels are told of functions and batches."""

from __future__ import annotations

from gpuback._core.activations import ACTIVATIONS, Activation
from gpuback._core.typing import Array

SOFTMAX = -1
"""How kernels know the output function that is no activation."""


def activation_id(activation: Activation | None) -> int:
    """The kernels' number for an activation; without one, the identity's."""
    return ACTIVATIONS["identity"].kernel_id if activation is None else activation.kernel_id


def output_id(name: str) -> int:
    """The kernels' number for an output function."""
    return SOFTMAX if name == "softmax" else ACTIVATIONS[name].kernel_id


def labels_and_targets(y: Array) -> tuple[Array | None, Array | None]:
    """y as kernels take it: labels (B,), or targets (B, n_L); the other one is None."""
    return (y, None) if y.ndim == 1 else (None, y)
