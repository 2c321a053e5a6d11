"""A callback of `fit` that writes a run's curves for TensorBoard: `pip install '.[tensorboard]'` in the source tree.

It writes with tensorboardX, which needs no TensorBoard: that is only for looking at the curves, there or elsewhere.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from gpuback._core.typing import Array, PathLike
from gpuback._network.mlp import MLP
from gpuback._training.history import Callback, History
from gpuback.errors import OptionError, missing_extra

try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
except ImportError:
    raise missing_extra("tensorboardX", "gpuback.tensorboard", "tensorboard") from None

Metric = Callable[[MLP], "float | Array"]


def logger(folder: PathLike, *, metrics: Mapping[str, Metric] | None = None) -> Callback:
    """Make a callback that writes loss, validation loss and learning rate after each epoch, epochs counted from 1.

    One run of `fit` writes to one folder. A resumed run goes on there: what an earlier process has logged beyond the
    checkpoint is hidden by the epochs that are trained again. Other than that each curve is `History`'s.

    Args:
        folder: of this run; it is made if need be. TensorBoard shows folders side by side by their names.
        metrics: further curves by name, each a function of the network, such as the accuracy on held-out data.

    Returns:
        The callback, for `fit(..., callbacks=[logger("runs/first")])`.

    Raises:
        OptionError: a metric is no function.
        OSError: the folder cannot be made.
    """
    metrics = dict(metrics or {})
    for name, metric in metrics.items():
        if not callable(metric):
            raise OptionError(f"metrics[{name!r}]: expected a function of the network, got {metric!r}")
    os.makedirs(folder, exist_ok=True)  # now, so that a bad path is found before an epoch is trained
    return _Logger(folder, metrics)


class _Logger:
    """The callback. A copy, and what comes out of a pickle, goes on in the same folder with a file of its own."""

    def __init__(self, folder: PathLike, metrics: Mapping[str, Metric]) -> None:
        self._folder, self._metrics = folder, metrics
        self._writer: EventsWriter | None = None

    def __call__(self, net: MLP, history: History) -> None:
        epoch = history.epochs
        if self._writer is None:
            self._writer = _opened(self._folder, epoch)
            weakref.finalize(self, self._writer.close)
        values = {"loss/training": history.loss[-1], "learning_rate": history.learning_rate[-1]}
        if history.validation_loss:
            values["loss/validation"] = history.validation_loss[-1]
        values |= {name: float(metric(net)) for name, metric in self._metrics.items()}
        for name, value in values.items():
            self._writer.write_event(Event(wall_time=time.time(), step=epoch, summary=summary.scalar(name, value)))
        self._writer.flush()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}


def _opened(folder: PathLike, first_epoch: int) -> EventsWriter:
    """Start a new file of events; TensorBoard forgets what earlier files have of this epoch and later ones.

    Files are read in the order of their names, which begin with the second: what follows keeps them apart within one.
    """
    writer = EventsWriter(os.path.join(folder, "events"), f".{time.time_ns()}")
    start = SessionLog(status=SessionLog.START)
    writer.write_event(Event(wall_time=time.time(), step=first_epoch, session_log=start))
    return writer
