"""Training: `fit` takes steps over shuffled mini-batches, epoch by epoch."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Number
from typing import Literal

import numpy as np

from gpuback import schedules
from gpuback._backends.protocol import SMALLEST_SCALE
from gpuback._core.activation_names import registered_forms
from gpuback._core.typing import Array, ArrayLike, PathLike
from gpuback._core.validation import count, count_or_none
from gpuback._network.mlp import MLP
from gpuback._training.batches import Samples
from gpuback._training.checkpoint import Checkpoint
from gpuback._training.history import Callback, History
from gpuback._training.optimizers import Adam, Optimizer
from gpuback._training.progress import progress_bar
from gpuback._training.sources import ArraySource, Source
from gpuback._training.streaming import BatchesLike, Stream, require_batches_alone
from gpuback._training.train_step import LossScaling, TrainStep
from gpuback.errors import DivergedError, OptionError
from gpuback.schedules import Rate


def fit(
    net: MLP,
    x: ArrayLike | None = None,
    y: ArrayLike | None = None,
    *,
    sample_weight: ArrayLike | None = None,
    batches: BatchesLike | None = None,
    steps_per_epoch: int | None = None,
    optimizer: Optimizer | None = None,
    schedule: Rate | None = None,
    epochs: int = 10,
    batch_size: int | Literal["auto"] | None = "auto",
    shuffle: bool | None = None,
    seed: int | None = None,
    validation: float | Sequence[ArrayLike] | None = None,
    clip_norm: float | None = None,
    micro_batch_size: int | None = None,
    loss_scaling: LossScaling | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: PathLike | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> History:
    """Train `net` in place by gradient descent over shuffled mini-batches.

    Args:
        net: the network.
        x, y, sample_weight: N samples, as `MLP.value_and_grad` takes them, all finite.
        batches: in place of these, something that gives (x, y) or (x, y, sample_weight) batch by batch: a list, a
            PyTorch DataLoader or the like, which each epoch goes through from its start; a function of the epoch's
            number, from 0, that returns an iterable; or an iterator, which each epoch reads on from where the last one
            ended. A thread takes, checks and copies batches, at most two ahead of the step. See docs/streaming.md.
        steps_per_epoch: with `batches`, how many an epoch takes. None: all that there are. An iterator needs it, unless
            there is one epoch.
        optimizer: `Adam()` by default.
        schedule: the learning rate as a function of the step number, which counts this run's steps from 0, such as
            `gpuback.schedules.cosine(0.01, steps=1000)`; it is set before each step. None leaves the optimizer's.
        epochs: how often to go through the data (in all: a resumed run counts those already done).
        batch_size: samples per step; the last batch of an epoch may be shorter. "auto": 128. None: all of them, plain
            gradient descent. `batches` have sizes of their own, which may vary.
        shuffle: a new order each epoch. None: yes for arrays, while `batches` come in their own order.
        seed: of the order and of the validation split, an integer ≥ 0. None takes one from the operating system.
        validation: a fraction of the samples to hold out, or (x, y) of one's own; with `batches`, (x, y).
        clip_norm, micro_batch_size, loss_scaling: as TrainStep's.
        patience: stop when the validation loss has not improved for so many epochs. The best θ is restored at the end,
            also when Ctrl-C (KeyboardInterrupt) or SystemExit ends training; an epoch that was not finished counts for
            nothing then.
        callbacks: functions of (net, history), called after each epoch. One that returns a true scalar stops training:
            True, a number other than 0, or an array without axes of any library. Anything else it returns is ignored.
        checkpoint: a file to keep the whole state of the run in (safetensors), written at the end of epochs, at most
            once a second, and at the end. It is written beside and renamed, so a crash leaves the earlier one.
        resume: go on from `checkpoint`, to the bits that an uninterrupted run reaches; start anew if there is no such
            file. With `batches` the bits are the same if the epochs that follow get the same batches.
        progress: a progress bar on stderr; None shows one on a terminal where rich is installed.

    Returns:
        The history of the whole run, resumed epochs included.

    Raises:
        DivergedError: a loss or gradient was not finite; θ and optimizer are those of the last finite step. Or an
            update overflowed (an absurd learning rate): then θ is what that left, and the message says so.
        DataError: NaN or infinity in the data, or numbers that the network's dtype cannot hold; `batches` gave
            something else than batches, none, or fewer than steps_per_epoch.
        ShapeError, DtypeError, LabelError, DeviceError: the data do not fit the network; of `batches`, the message
            names epoch and batch. What `batches` itself raises is passed on.
        OptionError: an option is out of range, two exclude each other, or the checkpoint is another run's.
        FileFormatError: the checkpoint is damaged.
    """
    epochs = count("epochs", epochs, 0)
    patience, seed = count_or_none("patience", patience), count_or_none("seed", seed, 0)
    if resume and checkpoint is None:
        raise OptionError("resume=True needs checkpoint=, the file to go on from")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise OptionError(f"callbacks: expected a sequence of functions of (net, history), got {callbacks!r}")
    if patience is not None and validation is None:
        raise OptionError("patience watches the validation loss: expected validation=, got None")
    if schedule is not None:
        schedule = schedules.checked(schedule)
    optimizer = Adam() if optimizer is None else optimizer
    source: Source
    if batches is None:
        if steps_per_epoch is not None:
            raise OptionError(f"steps_per_epoch: expected batches= with it, got {steps_per_epoch!r} without")
        source = ArraySource(net, x, y, sample_weight, batch_size=batch_size, shuffle=shuffle, validation=validation)
    else:
        require_batches_alone(x=x, y=y, sample_weight=sample_weight, batch_size=batch_size, shuffle=shuffle, seed=seed)
        source = Stream(net, batches, steps_per_epoch, validation, epochs=epochs, resume=resume)
    step = TrainStep(net, optimizer, clip_norm=clip_norm, micro_batch_size=micro_batch_size, loss_scaling=loss_scaling)
    history = History()
    best_theta = saved = None
    if checkpoint is not None:
        identity = {
            "architecture": net.architecture.as_options(),
            **optimizer._options(),
            **source.identity(),
            "seed": seed,
            "clip_norm": step.clip_norm,
            "micro_batch_size": step.micro_batch_size,
            "loss_scaling": None if loss_scaling is None else loss_scaling._options(),
            "schedule": schedules.identity(schedule),
        }
        if forms := registered_forms((*net.architecture.activations, net.architecture.output)):
            identity["registered_activations"] = forms
        saved = Checkpoint(checkpoint, identity)
    seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) if seed is None else seed
    if resume and saved is not None and os.path.exists(saved.path):
        seed, best_theta = saved.restore(net, optimizer, history, patience, step._loss_scale)
    earlier_steps = optimizer.step_count - history.steps
    validation_samples, steps_an_epoch = source.start(seed)
    all_steps = None if steps_an_epoch is None else epochs * steps_an_epoch

    try:
        with contextlib.closing(source), progress_bar(progress, all_steps, history._batches) as advance:
            while history.epochs < epochs and not history.stopped_early:
                started = time.perf_counter()
                set_rate = partial(_set_rate, optimizer, schedule, history._batches)
                loss, made = _train_epoch(step, source.epoch(history.epochs), history.epochs, set_rate, advance)
                history.loss.append(loss)
                history.learning_rate.append(optimizer.learning_rate)
                history.steps, history._batches = optimizer.step_count - earlier_steps, history._batches + made
                history.seconds += time.perf_counter() - started

                if validation_samples is not None:
                    if history._add_validation_loss(_mean_loss(net, validation_samples, step.micro_batch_size)):
                        best_theta = net.theta.copy()
                    history.stopped_early = patience is not None and history.epochs_since_best >= patience
                stops = [callback(net, history) for callback in callbacks]
                history.stopped_early |= any(map(_says_stop, stops))
                if saved is not None:
                    last = history.stopped_early or history.epochs == epochs
                    saved.write(net, optimizer, history, seed, best_theta, step._loss_scale, last=last)
    except (KeyboardInterrupt, SystemExit):
        _restore_best(net, patience, best_theta)
        raise
    _restore_best(net, patience, best_theta)
    return history


def _restore_best(net: MLP, patience: int | None, best_theta: Array | None) -> None:
    if patience is not None and best_theta is not None:
        net.theta = best_theta


def _mean_loss(net: MLP, samples: Samples, size: int | None) -> float:
    """Compute the loss over the samples, `size` at a time; None: all at once."""
    rows = len(samples.x)
    size = rows if size is None else size
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    weight = samples.weight
    losses = net.ops.to_floats(
        [
            net.loss(samples.x[part], samples.y[part], sample_weight=None if weight is None else weight[part])
            for part in parts
        ]
    )
    if len(losses) == 1:
        return losses[0]
    return math.fsum(loss * (part.stop - part.start) for loss, part in zip(losses, parts, strict=True)) / rows


def _says_stop(returned: object) -> bool:
    """Whether a callback returned a true scalar: a number, or an array without axes of any library."""
    is_scalar = isinstance(returned, Number) or getattr(returned, "ndim", None) == 0
    return is_scalar and not isinstance(returned, (str, bytes)) and bool(returned)


STEPS_PER_POLL = 16
"""How often to ask whether training has diverged: on a GPU, steps run far ahead of the host."""


def _set_rate(optimizer: Optimizer, schedule: Rate | None, first_step: int, made: int) -> None:
    """Set the schedule's learning rate for the step that comes `made` steps after the epoch's first."""
    if schedule is not None:
        optimizer.learning_rate = schedule(first_step + made)


def _train_epoch(
    step: TrainStep,
    batches: Iterator[Samples],
    epoch: int,
    set_rate: Callable[[int], None],
    advance: Callable[[float], None],
) -> tuple[float, int]:
    """Make a step on each batch; return the mean loss over the samples, each at the θ before its batch's step.

    Returns:
        That loss, and the number of batches.
    """
    net, optimizer = step.net, step.optimizer
    first_step, losses, counts = optimizer.step_count, list[Array | float](), list[int]()
    for batch in batches:
        set_rate(len(losses))
        losses.append(step._step(batch.x, batch.y, batch.weight, stop_after_nonfinite=True))
        counts.append(len(batch.x))
        polls = len(losses) % STEPS_PER_POLL == 0 and step._loss_scale is None
        if polls and optimizer._update.poll_diverged() is not None:
            break
        advance(losses[-1])
    values = net.ops.to_floats(losses)
    diverged_at = step.diverged_at if step._loss_scale is None else None
    if diverged_at is not None:
        state = "the network holds the state after the last finite step"
        if not _theta_is_finite(net):
            state = "the update before it overflowed, and θ is what that left"
        what = "gradient" if math.isfinite(values[diverged_at - first_step]) else "loss"
        raise _diverged(f"the {what} was not finite at step {diverged_at}", state, diverged_at, epoch)
    if step._loss_scale is not None:
        _require_scaled_steps(step, values, epoch)
    # An update that overflows shows in the next step's loss; after the last step of an epoch there is none.
    if not _theta_is_finite(net):
        steps = step.optimizer.step_count
        raise _diverged(f"the update of step {steps - 1} overflowed", "θ is what it left", steps - 1, epoch)
    total = math.fsum(value * count for value, count in zip(values, counts, strict=True))
    return total / sum(counts), len(counts)


def _require_scaled_steps(step: TrainStep, losses: list[float], epoch: int) -> None:
    """Raise DivergedError if a loss was not finite, or a gradient even at the smallest loss scale."""
    steps, state = step.optimizer.step_count, "steps that were not finite made no update"
    for batch, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise _diverged(f"the loss of the epoch's batch {batch} was not finite", state, steps, epoch)
    assert step._loss_scale is not None
    scale, good_steps, _ = step._loss_scale.state
    if scale <= SMALLEST_SCALE and not good_steps:
        raise _diverged(f"gradients were not finite at a loss scale of {scale:g}", state, steps, epoch)


def _theta_is_finite(net: MLP) -> bool:
    with net.ops.scope():
        return net.ops.all_finite(net.theta)


def _diverged(what: str, state: str, step: int, epoch: int) -> DivergedError:
    remedies = "Remedies: a smaller learning_rate, clip_norm=, or scaled inputs"
    return DivergedError(f"{what} (epoch {epoch}); {state}. {remedies}", step=step, epoch=epoch)
