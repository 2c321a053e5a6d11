"""The history of a run of `fit`, epoch by epoch, and the type of its callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from gpuback._network.mlp import MLP


@dataclass
class History:
    """The losses and learning rates of a run of `fit`, epoch by epoch.

    Attributes:
        loss: each epoch's training loss: the mean over its samples, each at the θ before its batch's step.
        validation_loss: the loss on the validation data after each epoch; empty without any.
        learning_rate: the learning rate of each epoch's last step.
        best_epoch: the epoch (from 0) with the lowest validation loss; None without validation.
        stopped_early: patience ran out, or a callback said stop.
        steps: updates made in all.
        seconds: how long this call trained, without validation, checkpoints and callbacks.
    """

    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    stopped_early: bool = False
    steps: int = 0
    seconds: float = 0.0
    _batches: int = field(default=0, repr=False)
    """Steps made in all, those of a dynamic loss scale that made no update included: what schedules count."""

    @property
    def epochs(self) -> int:
        """How many epochs were trained."""
        return len(self.loss)

    @property
    def epochs_since_best(self) -> int:
        """How many epochs the validation loss has not improved."""
        return 0 if self.best_epoch is None else self.epochs - 1 - self.best_epoch

    def _add_validation_loss(self, loss: float) -> bool:
        """Append an epoch's validation loss; return whether it is the lowest so far, which NaN never is."""
        self.validation_loss.append(loss)
        if self.best_epoch is not None:
            best = self.validation_loss[self.best_epoch]
            if not (loss < best or (math.isnan(best) and not math.isnan(loss))):
                return False
        self.best_epoch = len(self.validation_loss) - 1
        return True


Callback = Callable[[MLP, History], object]
"""A function of network and history, called after each epoch; one that returns True stops training."""
