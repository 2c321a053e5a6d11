"""An optimizer's updates, run on NumPy and in the emulator side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuback._backends.cuda import updates as cuda_updates
from gpuback._backends.numpy import ops as numpy_ops
from gpuback._backends.numpy import updates as numpy_updates
from gpuback._core.parameters import ParameterRange

SGD = {"learning_rate": 0.03, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
MOMENTUM = SGD | {"momentum": 0.9}
ADAM = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False}
ALGORITHMS = {
    "sgd": SGD,
    "sgd, decay": SGD | {"weight_decay": 0.01},
    "momentum": MOMENTUM,
    "momentum, decay": MOMENTUM | {"weight_decay": 0.3},
    "nesterov": MOMENTUM | {"nesterov": True},
    "nesterov, decay": MOMENTUM | {"momentum": 0.7, "nesterov": True, "weight_decay": 1e-50},
    "adam": ADAM,
    "adam, decay": ADAM | {"betas": (0.8, 0.95), "eps": 1e-50, "weight_decay": 0.1},
    "adamw": ADAM | {"weight_decay": 0.01, "decoupled": True},
    "adamw, no decay": ADAM | {"betas": (0.0, 0.5), "decoupled": True},
}


def mixed(rng: np.random.Generator, length: int, dtype: str, largest: float) -> np.ndarray:
    """Numbers of both signs: zeros, subnormal, tiny, ordinary ones, and up to `largest`."""
    info = np.finfo(dtype)
    scales = np.array([0.0, info.smallest_subnormal * 100, info.tiny * 10, 1e-9, 1.0, 10.0, largest])
    scale = scales[rng.integers(len(scales), size=length)]
    return (rng.uniform(0.1, 1, length) * scale * rng.choice([-1.0, 1.0], length)).astype(dtype)


class Run:
    """θ and an optimizer's state, which is not 0 at first, on one backend."""

    def __init__(
        self,
        theta: np.ndarray,
        options: dict[str, Any],
        launcher: Any = None,
        steps: int = 0,
        ranges: Sequence[ParameterRange] | None = None,
        **choices: Any,
    ) -> None:
        adam = "betas" in options
        self.theta = theta.copy()
        self.state = [theta[::-1].copy() for _ in range(2 if adam else int(options["momentum"] > 0))]
        if adam:
            np.abs(self.state[1], out=self.state[1])
        state = self.state or [None]
        if launcher is None:
            make = numpy_updates.AdamUpdate if adam else numpy_updates.SGDUpdate
            self.update: Any = make(self.theta, *state, steps, ranges)
        else:
            make = cuda_updates.AdamUpdate if adam else cuda_updates.SGDUpdate
            self.update = make(np, launcher, self.theta, *state, steps, ranges, **choices)
        self.options = options

    def step(self, gradient: np.ndarray, clip_norm: float | None = None) -> None:
        loss = np.ones((), gradient.dtype)
        with numpy_ops.NumpyOps().scope(self.update.on_invalid):
            self.update(gradient.copy(), loss=loss, clip_norm=clip_norm, **self.options)

    def bits(self) -> tuple[bytes, ...]:
        return tuple(array.tobytes() for array in (self.theta, *self.state))
