"""Steps of training as one launch: on a GPU, a small network's dozen of launches take longer than its kernels.

A step that comes again with the same shapes is recorded (on CUDA, into a graph) and from then on repeated. A record
holds addresses, not arrays: it counts only as long as the passes, the gradients and the update that it was made of.
Batches that come in the same arrays every time are read there; others are copied to arrays of the record's own. The
loss is copied from where the record leaves it. What else may change from step to step, θ, the optimizer's state and its
hyper-parameters, is read from the device's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from gpuback._backends.protocol import Ops, Recorder
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array
from gpuback._network.backprop import Backprop
from gpuback._training.optimizers import Optimizer

Batch: TypeAlias = tuple[Array, Array, Array | None]
"""Samples, targets and weights, as the passes take them."""

KEPT_GRAPHS = 8
"""For how many kinds of batches (sizes, labels or rows of numbers, weights or none) a TrainStep keeps records."""

LARGEST_INPUTS = 1 << 24
"""Bytes of a batch beyond which nothing is recorded: its kernels take longer than launching them, and copies of it
would take room and time."""


class _Record(NamedTuple):
    """A kind of batch that was seen, and what repeats its step, if it was seen twice.

    Attributes:
        passes, update: what it is made of, or was seen with.
        given: the arrays in which the batch came.
        own: those that it is copied to; None if it is read where it comes.
        loss: where the step leaves the loss.
        replay: launches it.
    """

    passes: weakref.ref[Backprop]
    update: Any
    given: tuple[weakref.ref[Any] | None, ...]
    own: Batch | None = None
    loss: Array = None
    replay: Callable[[], None] | None = None

    def is_of(self, passes: Backprop, optimizer: Optimizer) -> bool:
        return self.passes() is passes and self.update is optimizer.update

    def reads(self, batch: Batch) -> bool:
        """Whether the batch has come in the arrays in which it came before."""
        return all(held is None or held() is array for held, array in zip(self.given, batch, strict=True))


class StepGraphs:
    """The records of one TrainStep.

    Attributes:
        refused: why nothing more is recorded, in words, after it has failed once; None so far.
    """

    def __init__(self, ops: Ops, recorder: Recorder, gradients: Gradients) -> None:
        self._ops, self._recorder, self._gradients = ops, recorder, gradients
        self._records: dict[tuple[int, int, bool], _Record] = {}
        self.refused: str | None = None

    def replayed(
        self,
        passes: Backprop,
        batch: Batch,
        optimizer: Optimizer,
        clip_norm: float | None,
        *,
        stop_after_nonfinite: bool,
    ) -> Array | None:
        """The loss, after a step that is repeated from a record; None if there is none, and nothing was done."""
        record = self._records.get(_kind(batch))
        if record is None or record.replay is None or not record.is_of(passes, optimizer):
            return None
        if record.own is None and not record.reads(batch):
            return None
        recorder = self._recorder
        if recorder.capturing():  # a graph of the user's, in which this record's own memory has no place
            return None
        if record.own is not None:
            for source, target in zip(batch, record.own, strict=True):
                if source is not None:
                    recorder.copy(source, target)
        optimizer.guarded_step(
            self._gradients.theta,
            record.loss,
            clip_norm,
            stop_after_nonfinite=stop_after_nonfinite,
            launches=record.replay,
        )
        loss = self._ops.empty((), record.loss.dtype)
        recorder.copy(record.loss, loss)
        return loss

    def consider(self, passes: Backprop, batch: Batch, optimizer: Optimizer) -> None:
        """Takes note of a step that was made; records it if it was the second of its kind."""
        if self.refused is not None or self._recorder.capturing():
            return
        if sum(array.nbytes for array in batch if array is not None) > LARGEST_INPUTS:
            return
        kind = _kind(batch)
        record = self._records.pop(kind, None)
        if record is None or not record.is_of(passes, optimizer):
            record = _Record(weakref.ref(passes), optimizer.update, tuple(map(_held, batch)))
        else:
            try:
                record = self._recorded(record, passes, batch)
            except Exception as error:  # whatever it is, steps go on as they did before
                self.refused = f"{type(error).__name__}: {error}"
                return
        self._records[kind] = record
        if len(self._records) > KEPT_GRAPHS:
            self._records.pop(next(iter(self._records)))

    def _recorded(self, seen: _Record, passes: Backprop, batch: Batch) -> _Record:
        ops, gradients, update = self._ops, self._gradients, seen.update
        own = None
        if not seen.reads(batch):
            x, y, weight = (None if array is None else ops.empty(array.shape, array.dtype) for array in batch)
            own = x, y, weight
        inputs = batch if own is None else own
        loss = ops.empty((), gradients.theta.dtype)

        def work() -> None:
            passes.value_and_grad(*inputs, gradients, loss=loss)
            update.launch(gradients.theta, loss)

        return seen._replace(own=own, loss=loss, replay=self._recorder.record(work))


def _kind(batch: Batch) -> tuple[int, int, bool]:
    x, y, weight = batch
    return len(x), y.ndim, weight is None


def _held(array: Array | None) -> weakref.ref[Any] | None:
    return None if array is None else weakref.ref(array)
