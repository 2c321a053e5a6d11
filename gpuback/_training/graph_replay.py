"""Replay training steps as one launch: on a GPU, a small network's dozen launches take longer than its kernels.

A step that comes a second time with the same shapes is captured (on CUDA, into a graph), and replayed from the third
time on. A graph holds addresses, not arrays. So it is valid only as long as the passes, the gradients and the update
that it was captured with. A batch that comes in the same arrays every time is read there; others are copied to arrays
of the graph's own. The loss is copied from where the graph leaves it. Whatever else may change from step to step (θ,
the optimizer's state, its hyper-parameters) is read from the device's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from gpuback._backends.protocol import GraphCapture, Ops
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array
from gpuback._network.backprop import Backprop
from gpuback._training.optimizers import Optimizer

Batch: TypeAlias = tuple[Array, Array, Array | None]
"""Samples, targets and weights, as the passes take them."""

KEPT_GRAPHS = 8
"""For how many kinds of batches (sizes, labels or rows of numbers, weights or none) a TrainStep keeps graphs."""

LARGEST_INPUTS = 1 << 24
"""Bytes of a batch beyond which nothing is captured: its kernels take longer than launching them, and copies of it
would take memory and time."""


class CapturedStep(NamedTuple):
    """A step that was made once, and the graph that replays it if it was made twice.

    Attributes:
        passes, update: what it was made with.
        given: the arrays in which the batch came.
        own: the arrays that a batch is copied to; None if it is read where it comes.
        loss: where the step leaves the loss.
        replay: launches the graph.
    """

    passes: weakref.ref[Backprop]
    update: Any
    given: tuple[weakref.ref[Any] | None, ...]
    own: Batch | None = None
    loss: Array = None
    replay: Callable[[], None] | None = None

    def is_of(self, passes: Backprop, optimizer: Optimizer) -> bool:
        return self.passes() is passes and self.update is optimizer._update

    def reads(self, batch: Batch) -> bool:
        """Whether the batch has come in the arrays in which it came before."""
        return all(before is None or before() is array for before, array in zip(self.given, batch, strict=True))


class StepGraphs:
    """The captured steps of one TrainStep.

    Attributes:
        failure: why nothing more is captured, in words, after capturing has failed once; None so far.
    """

    def __init__(self, ops: Ops, capture: GraphCapture, gradients: Gradients) -> None:
        self._ops, self._capture, self._gradients = ops, capture, gradients
        self._steps: dict[tuple[int, int, bool], CapturedStep] = {}
        self.failure: str | None = None

    def try_replay(
        self,
        passes: Backprop,
        batch: Batch,
        optimizer: Optimizer,
        clip_norm: float | None,
        *,
        stop_after_nonfinite: bool,
    ) -> Array | None:
        """Make the step by its graph and return the loss; do nothing and return None if there is no graph for it."""
        step = self._steps.get(_kind(batch))
        if step is None or step.replay is None or not step.is_of(passes, optimizer):
            return None
        if step.own is None and not step.reads(batch):
            return None
        capture = self._capture
        if capture.capturing():  # into a graph of the user's, in which this one's own memory has no place
            return None
        if step.own is not None:
            for source, target in zip(batch, step.own, strict=True):
                if source is not None:
                    capture.copy(source, target)
        optimizer._step_if_finite(
            self._gradients.theta,
            step.loss,
            clip_norm,
            stop_after_nonfinite=stop_after_nonfinite,
            launches=step.replay,
        )
        loss = self._ops.empty((), step.loss.dtype)
        capture.copy(step.loss, loss)
        return loss

    def maybe_capture(self, passes: Backprop, batch: Batch, optimizer: Optimizer) -> None:
        """Remember a step that was made; capture it if it was the second of its kind."""
        if self.failure is not None or self._capture.capturing():
            return
        if sum(array.nbytes for array in batch if array is not None) > LARGEST_INPUTS:
            return
        kind = _kind(batch)
        step = self._steps.pop(kind, None)
        if step is None or not step.is_of(passes, optimizer):
            step = CapturedStep(weakref.ref(passes), optimizer._update, tuple(map(_weak, batch)))
        else:
            try:
                step = self._captured(step, passes, batch)
            except Exception as error:  # whatever it is, steps go on as they did before
                self.failure = f"{type(error).__name__}: {error}"
                return
        self._steps[kind] = step
        if len(self._steps) > KEPT_GRAPHS:
            self._steps.pop(next(iter(self._steps)))

    def _captured(self, seen: CapturedStep, passes: Backprop, batch: Batch) -> CapturedStep:
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

        return seen._replace(own=own, loss=loss, replay=self._capture.capture(work))


def _kind(batch: Batch) -> tuple[int, int, bool]:
    x, y, weight = batch
    return len(x), y.ndim, weight is None


def _weak(array: Array | None) -> weakref.ref[Any] | None:
    return None if array is None else weakref.ref(array)
