"""The L2 penalty of scikit-learn's perceptrons, which is on weights only."""

from __future__ import annotations

import numpy as np

from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array
from gpuback._network.mlp import MLP


def write_penalty(net: MLP, gradients: Gradients, rate: float) -> Array:
    """Write ∇W = rate · W and ∇b = 0; return Σ_k W_k · ∇W_k, twice the penalty ½ rate Σ_k ‖W_k‖².

    The loss's gradient is added later.
    """
    for W, dW, db in zip(net.weights, gradients.weights, gradients.biases, strict=True):
        np.multiply(W, rate, out=dW)
        db.fill(0)
    return net.theta.dot(gradients.theta)
