"""Minimize the loss of all samples with SciPy's L-BFGS-B, on whatever backend the network is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from gpuback._network.backprop import empty_gradients
from gpuback._network.mlp import MLP
from gpuback.sklearn.penalty import write_penalty
from gpuback.sklearn.samples import TrainingSet


class Objective:
    """F(θ) = Σ_b w_b ℓ_b / Σ_b w_b + ½ α Σ_k ‖W_k‖² / Σ_b w_b over all samples, and ∇F.

    θ is in the order of `MLP.theta` and float64, as SciPy has it; the network rounds it to its own dtype.

    Args:
        net: the network. An evaluation leaves it at the θ that was evaluated.
        samples: with `one_loss`.
        alpha: α.

    Attributes:
        loss: F of the last evaluation as scikit-learn reports it, which divides squared errors by the number of outputs
            and not their gradient. Minimized is F, whose gradient is ∇F.
    """

    def __init__(self, net: MLP, samples: TrainingSet, alpha: float) -> None:
        self._net, self._samples, self._alpha = net, samples, alpha
        self._gradients = empty_gradients(net.architecture, net.ops)
        self._divisor = net.sizes[-1] if net.architecture.loss == "squared_error" else 1
        self.loss = np.nan

    def __call__(self, theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return F(θ) and ∇F(θ)."""
        net, gradients = self._net, self._gradients
        net.theta = theta
        losses: list[Any] = []
        penalty: Any = None
        with net.ops.scope():
            for batch, weight_sum in self._samples.each():
                if penalty is None:
                    penalty = write_penalty(net, gradients, self._alpha / weight_sum)
                passes = net._acquire(len(batch.x))
                losses.append(passes.value_and_grad(batch.x, batch.y, batch.weight, gradients, accumulate=True))
                net._release(passes)
            *values, twice_the_penalty = net.ops.to_floats([*losses, penalty])
        data, penalty = sum(values), 0.5 * twice_the_penalty
        self.loss = data / self._divisor + penalty
        return data + penalty, net.ops.to_numpy(gradients.theta).astype(np.float64)


def minimize_loss(
    objective: Objective, net: MLP, each_iteration: Callable[[float], None], *, gtol: float, maxiter: int, maxfun: int
) -> str | None:
    """Bring the network to the θ where the search ends, and `objective.loss` to its loss.

    Args:
        objective: the network's.
        net: the network, at the θ to begin with.
        each_iteration: called after every iteration with the loss.
        gtol, maxiter, maxfun: SciPy's options: the largest |∂F/∂θ_i| that counts as zero, and the most iterations and
            evaluations.

    Returns:
        The reason why the search ended if it is not convergence.

    Raises:
        KeyboardInterrupt: the network is at the θ of the last whole iteration.
    """
    reached = np.asarray(net.ops.to_numpy(net.theta), np.float64).copy()

    def note(theta: NDArray[np.float64]) -> None:
        nonlocal reached
        reached = theta.copy()
        each_iteration(objective.loss)

    options = {"gtol": gtol, "maxiter": maxiter, "maxfun": maxfun}
    try:
        result = minimize(objective, reached, jac=True, method="L-BFGS-B", callback=note, options=options)
    except KeyboardInterrupt:
        net.theta = reached
        raise
    objective(result.x)  # the last that SciPy evaluated may be another
    return None if result.status == 0 else str(result.message)
