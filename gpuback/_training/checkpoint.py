"""The whole state of a training run in one file, from which it goes on to the same bits."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import numpy as np

from gpuback._backends.protocol import LARGEST_SCALE, SMALLEST_SCALE, LossScale
from gpuback._core import persistence
from gpuback._core.fields import Fields
from gpuback._core.output_files import require_writable
from gpuback._core.typing import Array, PathLike
from gpuback._network.mlp import MLP
from gpuback._text import quoted
from gpuback._training.history import History
from gpuback._training.optimizers import Optimizer
from gpuback.errors import OptionError

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
            FileFormatError: the file is damaged or no checkpoint; the message names the field. Nothing has changed.
            OptionError: it is another run's; the message names the difference.
        """
        fields = Fields(self.path, "a checkpoint of gpuback.fit", *persistence.read(self.path, kind="checkpoint"))
        self._require_same_run(fields)
        seed, step_count, learning_rate = self._seed(fields), fields.count("step_count"), fields.rate("learning_rate")
        steps = fields.count("steps", highest=step_count)
        loss_scale = _loss_scale(fields, scale is not None)
        skipped = 0 if loss_scale is None else loss_scale[2]
        # older files do not have it
        batches = fields.count("batches", steps) if fields.has("batches") else steps + skipped
        seen = _seen(fields)
        best_epoch, best = fields.value("best_epoch"), None
        one_each = net.theta.shape, net.theta.dtype
        if seen["validation_loss"]:
            best_epoch = fields.count("best_epoch", highest=len(seen["validation_loss"]) - 1)
            best = fields.array("best_theta", *one_each)
        elif best_epoch is not None:
            fields.refuse("best_epoch", "None, as there is no validation loss", best_epoch)
        theta = fields.array("theta", *one_each)
        state = {name: fields.array(STATE + name, *one_each) for name in optimizer._state_names}
        known = ("theta", *seen, *(STATE + name for name in state), *(() if best is None else ("best_theta",)))
        fields.require_arrays(known)

        optimizer._restore(net, state, step_count)
        optimizer.learning_rate = learning_rate
        if scale is not None and loss_scale is not None:
            scale.state = loss_scale
        net.theta = theta
        history.loss, history.validation_loss, history.learning_rate = seen.values()
        history.best_epoch, history.steps, history._batches = best_epoch, steps, batches
        history.stopped_early = patience is not None and history.epochs_since_best >= patience
        return seed, None if best is None else net.ops.asarray(best, net.theta.dtype, "best_theta")

    def _require_same_run(self, fields: Fields) -> None:
        saved, here = fields.mapping("run"), _jsonable(self._identity)
        for name in here | saved:  # an option that is at its default need not be there
            if saved.get(name) != here.get(name):
                there, now = (quoted(run[name]) if name in run else "the default" for run in (saved, here))
                raise OptionError(
                    f"checkpoint {self.path} is another run's: {name} is {there} there and {now} here. "
                    "Remedy: the same options, another file, or resume=False"
                )

    def _seed(self, fields: Fields) -> int:
        given = self._identity.get("seed")
        seed = fields.value("seed")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 or given not in (None, seed):
            fields.refuse("seed", "an integer ≥ 0" if given is None else repr(given), seed)
        return seed


def _seen(fields: Fields) -> dict[str, list[float]]:
    """Return the losses and learning rates of the epochs so far."""
    names = ("loss", "validation_loss", "learning_rate")
    seen: dict[str, list[float]] = {name: fields.array(name, None, np.dtype(np.float64)).tolist() for name in names}
    epochs = len(seen["loss"])
    for name, lengths in (("learning_rate", (epochs,)), ("validation_loss", (0, epochs))):
        if len(seen[name]) not in lengths:
            fields.refuse(name, f"a number for each of {epochs} epochs", f"{len(seen[name])} numbers")
    return seen


def _loss_scale(fields: Fields, expected: bool) -> tuple[float, int, int] | None:
    """Return the state of a `LossScale`, if one is expected."""
    state = fields.value("loss_scale")
    if not expected:
        if state is not None:
            fields.refuse("loss_scale", "None", state)
        return None
    if not isinstance(state, list) or len(state) != 3 or not isinstance(state[0], float):
        fields.refuse("loss_scale", "a number and two counts", state)
    scale = state[0]
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE or math.frexp(scale)[0] != 0.5:
        fields.refuse("loss_scale", f"a power of two from {SMALLEST_SCALE} to {LARGEST_SCALE}", scale)
    return scale, fields.checked_count("loss_scale", state[1]), fields.checked_count("loss_scale", state[2])


def _jsonable(value: Any) -> Any:
    """Turn tuples into lists, as they come back from JSON."""
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, (tuple, list)) else value
