"""The whole state of a training run in one file, from which it goes on to the same bits."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from gpuback._backends.protocol import LossScale
from gpuback._core import persistence
from gpuback._core.output_files import require_writable
from gpuback._core.typing import Array, PathLike
from gpuback._network.mlp import MLP
from gpuback._training.history import History
from gpuback._training.optimizers import Optimizer
from gpuback.errors import FileFormatError, OptionError

SECONDS_BETWEEN_WRITES = 1.0
STATE = "optimizer."


class Checkpoint:
    """The file of a run's state.

    It holds θ, the optimizer's arrays, step count and learning rate, the loss scale, the seed from which every epoch's
    order follows, the history so far (whose length is the position), and the best θ if it is to be restored.

    Args:
        path: the file.
        identity: the run's architecture, hyper-parameters, data, batch size, …; a file with others is refused.
    """

    def __init__(self, path: PathLike, identity: dict[str, Any]) -> None:
        self.path = os.fspath(path)
        require_writable(self.path, regular=True)
        self._identity = identity
        self._written = -float("inf")

    def write(
        self,
        net: MLP,
        optimizer: Optimizer,
        history: History,
        seed: int,
        best_theta: Array | None,
        scale: LossScale | None,
        *,
        last: bool,
    ) -> None:
        """Write the state at the end of an epoch: at most once a second, and always at the `last`."""
        if not last and time.monotonic() - self._written < SECONDS_BETWEEN_WRITES:
            return
        to_numpy = net.ops.to_numpy
        arrays = {
            "theta": to_numpy(net.theta),
            "loss": np.array(history.loss, np.float64),
            "validation_loss": np.array(history.validation_loss, np.float64),
            "learning_rate": np.array(history.learning_rate, np.float64),
            **{STATE + name: to_numpy(array) for name, array in optimizer.state.items()},
        }
        if best_theta is not None:
            arrays["best_theta"] = to_numpy(best_theta)
        metadata = {
            "run": self._identity,
            "seed": seed,
            "step_count": optimizer.step_count,
            "learning_rate": optimizer.learning_rate,
            "best_epoch": history.best_epoch,
            "steps": history.steps,
            "batches": history._batches,
            "loss_scale": None if scale is None else scale.state,
        }
        persistence.write(self.path, arrays, metadata, kind="checkpoint")
        self._written = time.monotonic()

    def restore(
        self, net: MLP, optimizer: Optimizer, history: History, patience: int | None, scale: LossScale | None
    ) -> tuple[int, Array | None]:
        """Bring network, optimizer, history and loss scale to the saved state; return the seed and the best θ.

        A run whose patience had run out has still stopped, unless it is given more now. Callbacks are asked again after
        the next epoch.

        Raises:
            FileFormatError: the file is damaged or no checkpoint.
            OptionError: it is another run's; the message names the difference.
        """
        arrays, metadata = persistence.read(self.path, kind="checkpoint")
        try:
            saved, here = metadata["run"], _jsonable(self._identity)
            for name in here | saved:  # an option that is at its default need not be there
                if saved.get(name) != here.get(name):
                    there, now = (repr(run[name]) if name in run else "the default" for run in (saved, here))
                    raise OptionError(
                        f"checkpoint {self.path} is another run's: {name} is {there} there and {now} here. "
                        "Remedy: the same options, another file, or resume=False"
                    )
            theta, best = arrays["theta"], arrays.get("best_theta")
            seen = {name: arrays[name].tolist() for name in ("loss", "validation_loss", "learning_rate")}
            best_epoch, steps, seed = metadata["best_epoch"], metadata["steps"], metadata["seed"]
            step_count, learning_rate = metadata["step_count"], metadata["learning_rate"]
            loss_scale = metadata["loss_scale"]
            skipped = 0 if loss_scale is None else loss_scale[2]
            batches = metadata.get("batches", steps + skipped)  # older files do not have it
        except KeyError as error:
            raise FileFormatError(
                f"{self.path}: expected a checkpoint of gpuback.fit, got one without {error}"
            ) from error
        state = {name.removeprefix(STATE): array for name, array in arrays.items() if name.startswith(STATE)}
        optimizer._restore(net, state, step_count)
        optimizer.learning_rate = learning_rate
        if scale is not None:
            scale.state = tuple(loss_scale)
        net.theta = theta
        history.loss, history.validation_loss, history.learning_rate = seen.values()
        history.best_epoch, history.steps, history._batches = best_epoch, steps, batches
        history.stopped_early = patience is not None and history.epochs_since_best >= patience
        return seed, None if best is None else net.ops.asarray(best, net.theta.dtype, "best_theta")


def _jsonable(value: Any) -> Any:
    """Turn tuples into lists, as they come back from JSON."""
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, (tuple, list)) else value
