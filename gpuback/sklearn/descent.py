"""Run scikit-learn's Adam and SGD with gpuback: losses are divided by Σw, L2 is on weights only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._network.backprop import empty_gradients
from gpuback._network.mlp import MLP
from gpuback._training.optimizers import SGD, Adam
from gpuback.sklearn.penalty import write_penalty
from gpuback.sklearn.samples import TrainingSet

SMALLEST_RATE = 1e-6
"""The adaptive schedule stops where the learning rate is no larger."""


class Descent:
    """Gradient descent on one network, epoch by epoch.

    A batch's loss is Σ_b w_b ℓ_b / Σ_b w_b + ½ α Σ_k ‖W_k‖² / Σ_b w_b, without a penalty on biases. For several outputs
    the *reported* ℓ_b of squared_error is the mean over outputs, ½ Σ_j (ŷ_j − y_j)² / n_L, while the gradient is that
    of the sum, as scikit-learn has it.

    Adam: θ ← θ − (η√c₂/c₁) m/(√v + ε), cᵢ = 1 − βᵢᵗ. gpuback's Adam adds ε√c₂ instead of ε, so it is given ε/√c₂.
    SGD: v ← μv − η∇θ, θ ← θ + v (Nesterov: θ + μv − η∇θ). η is inside v here and outside in gpuback, so v is rescaled
    when η changes.

    Args:
        net: the network.
        parameters: the estimator's, checked.

    Source: scikit-learn's `_multilayer_perceptron.py` and `_stochastic_optimizers.py`.
    """

    def __init__(self, net: MLP, parameters: Mapping[str, Any]) -> None:
        names = ("solver", "learning_rate_init", "beta_1", "beta_2", "epsilon", "momentum", "nesterovs_momentum")
        self._parameters = {name: parameters[name] for name in (*names, "learning_rate", "power_t")}
        self.steps = 0
        self._net, p = net, self._parameters
        rate, momentum = float(p["learning_rate_init"]), float(p["momentum"])
        self._optimizer: Adam | SGD
        if p["solver"] == "adam":
            self._optimizer = Adam(rate, (float(p["beta_1"]), float(p["beta_2"])), float(p["epsilon"]))
        else:
            self._optimizer = SGD(rate, momentum, nesterov=bool(p["nesterovs_momentum"]) and momentum > 0)
        self._optimizer._bind(net)
        self._gradients = empty_gradients(net.architecture, net.ops)

    @property
    def learning_rate(self) -> float:
        """η, as the schedule has it now."""
        return self._optimizer.learning_rate

    def portable(self) -> dict[str, Any]:
        """Return the state as host arrays; `restored` reads it."""
        return {
            "parameters": self._parameters,
            "steps": self.steps,
            "learning_rate": self._optimizer.learning_rate,
            "state": {name: self._net.ops.to_numpy(array).copy() for name, array in self._optimizer.state.items()},
        }

    @classmethod
    def restored(cls, net: MLP, portable: Mapping[str, Any]) -> Descent:
        """Make the descent that `portable` describes, to go on with `net`."""
        descent = cls(net, portable["parameters"])
        descent.steps = portable["steps"]
        descent._optimizer.learning_rate = portable["learning_rate"]
        descent._optimizer._restore(net, portable["state"], descent.steps)
        return descent

    def epoch(self, batches: TrainingSet, order: NDArray[np.intp] | None, alpha: float) -> float:
        """Make a step on each batch; return the mean of their losses, weighted by their numbers of samples."""
        net, gradients = self._net, self._gradients
        divisor = net.sizes[-1] if net.architecture.loss == "squared_error" else 1
        losses, penalties, counts = [], [], []
        with net.ops.scope():
            for batch, weight_sum in batches.each(order):
                if alpha:
                    penalties.append(write_penalty(net, gradients, alpha / weight_sum))
                passes = net._acquire(len(batch.x))
                losses.append(passes.value_and_grad(batch.x, batch.y, batch.weight, gradients, accumulate=alpha > 0))
                net._release(passes)
                self._step()
                counts.append(len(batch.x))
            values = np.array(net.ops.to_floats(losses)) / divisor
            if penalties:
                values += 0.5 * np.array(net.ops.to_floats(penalties))
        return float(values @ counts) / sum(counts)

    def _step(self) -> None:
        self.steps += 1
        if isinstance(self._optimizer, Adam):
            self._optimizer.eps = self._parameters["epsilon"] / math.sqrt(
                1.0 - self._parameters["beta_2"] ** self.steps
            )
        self._optimizer.step(self._net, self._gradients)

    def end_epoch(self, samples_seen: int) -> None:
        """Set the learning rate by the schedule, after an epoch."""
        p = self._parameters
        if p["solver"] == "sgd" and p["learning_rate"] == "invscaling":
            self._set_rate(float(p["learning_rate_init"]) / (samples_seen + 1) ** float(p["power_t"]))

    def stops(self, message: str, verbose: bool) -> bool:
        """Tell whether training stops, now that it no longer improves; if not, divide the learning rate by 5."""
        adaptive = self._parameters["solver"] == "sgd" and self._parameters["learning_rate"] == "adaptive"
        rate = self._optimizer.learning_rate
        if not adaptive or rate <= SMALLEST_RATE:
            if verbose:
                print(message + (" Learning rate too small. Stopping." if adaptive else " Stopping."))
            return True
        self._set_rate(rate / 5.0)
        if verbose:
            print(f"{message} Setting learning rate to {rate / 5.0:f}")
        return False

    def _set_rate(self, rate: float) -> None:
        before, self._optimizer.learning_rate = self._optimizer.learning_rate, rate
        if "velocity" in self._optimizer.state and rate != before:
            with self._net.ops.scope():
                self._optimizer.state["velocity"] *= before / rate
