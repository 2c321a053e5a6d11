"""Training: one step (forward, backward, update), and `fit`, which takes steps over shuffled mini-batches."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from gpuback import schedules
from gpuback._typing import Array, ArrayLike, PathLike
from gpuback.backprop import Backprop
from gpuback.checkpoint import Checkpoint
from gpuback.errors import DivergedError, OptionError
from gpuback.history import Callback, History
from gpuback.loss_scaling import LossScaling
from gpuback.network import KEPT_PASSES, MLP
from gpuback.ops import LossScale, WholePasses
from gpuback.ops.numpy_loss_scale import SMALLEST_SCALE
from gpuback.optimizers import Adam, Optimizer, positive
from gpuback.parameters import permutation
from gpuback.progress import progress_bar
from gpuback.samples import Batches, Samples, held_out, split
from gpuback.schedules import Rate
from gpuback.step_graphs import Batch, StepGraphs


class TrainStep:
    """One step of training: forward, loss, backward, update of θ, by the fastest path there is.

    Buffers are made at the first call with a batch size and reused: with x, y and weights already in the network's
    dtypes (θ's, and int64 labels), a call allocates nothing that grows with the batch. On a GPU a narrow network's step
    is one launch or two; of others the launches are recorded when a batch size comes a second time, and from the third
    time on repeated at once, as a CUDA graph. A loss or gradient that is not finite leaves θ and the optimizer alone:
    that step and all later ones that are not finite make no update. One thread at a time may call it.

    Args:
        net: the network.
        optimizer: SGD, Adam or AdamW; belongs to this network from the first step.
        clip_norm: gradients whose Euclidean norm over all of θ is larger are scaled down to it, as
            torch.nn.utils.clip_grad_norm_ does.
        micro_batch_size: larger batches go through the network so many samples at a time, whose gradients are added up
            before the update (gradient accumulation): the same step, but for the order of sums, with buffers for so
            many samples only. On NumPy, which works in blocks that suit the caches anyway, it is an upper bound for
            them. On a GPU all networks go layer by layer then, and launch by launch.
        loss_scaling: a dynamic loss scale, for float16 only.

    Example:
        >>> step = TrainStep(MLP([2, 8, 2], seed=0), Adam())
        >>> loss = float(step([[0.0, 1.0], [1.0, 0.0]], [0, 1]))
    """

    def __init__(
        self,
        net: MLP,
        optimizer: Optimizer,
        *,
        clip_norm: float | None = None,
        micro_batch_size: int | None = None,
        loss_scaling: LossScaling | None = None,
    ) -> None:
        _check_counts(micro_batch_size=micro_batch_size)
        if loss_scaling is not None:
            if not isinstance(loss_scaling, LossScaling):
                raise OptionError(f"loss_scaling: expected a gpuback.LossScaling() or None, got {loss_scaling!r}")
            loss_scaling.require(net.architecture.precision)
        clip_norm = None if clip_norm is None else positive("clip_norm", clip_norm)
        if not isinstance(optimizer, Optimizer):
            raise OptionError(f"optimizer: expected one such as gpuback.Adam(), got {optimizer!r}")
        optimizer.bind(net)
        self.net, self.optimizer, self.clip_norm = net, optimizer, clip_norm
        self.micro_batch_size = None if micro_batch_size is None else int(micro_batch_size)
        self._in_pieces: dict[int, Backprop] = {}
        self.scale = None if loss_scaling is None else self._bound(loss_scaling)
        optimizer.update.diverged_at = None
        self._gradients = net.empty_gradients()
        recorder = net.ops.recorder
        self._graphs = None if recorder is None else StepGraphs(net.ops, recorder, self._gradients)
        self._in_scope = net.ops.bind_scope(lambda *_: optimizer.update.note_invalid())

    @property
    def diverged_at(self) -> int | None:
        """How many updates the optimizer had made when a loss or gradient was first not finite; None so far."""
        return self.optimizer.update.diverged_at

    @property
    def loss_scale(self) -> float:
        """What a dynamic loss scale is at now, 1 without one; on a GPU, reading it waits for what is under way."""
        return 1.0 if self.scale is None else self.scale.state[0]

    @property
    def skipped_steps(self) -> int:
        """How many steps a dynamic loss scale has seen that were not finite and made no update; waits likewise."""
        return 0 if self.scale is None else self.scale.state[2]

    def __call__(self, x: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Array:
        """One step on a batch; arguments and errors as `MLP.value_and_grad`'s.

        Returns:
            The loss before the update, a 0-d array on the network's backend.
        """
        net = self.net
        return net.ops.scalar(self.run(*net.checked(x, y, sample_weight)), net.theta.dtype)

    def run(self, samples: Array, targets: Array, weight: Array | None, *, halt: bool = False) -> Array | float:
        """The step itself, on arrays that are already checked, on the backend, and in θ's dtype.

        With `halt` there are no more updates once a loss or gradient was not finite, unless there is a loss scale for
        it.
        """
        return self._in_scope(self._run, samples, targets, weight, halt)

    def _run(self, samples: Array, targets: Array, weight: Array | None, halt: bool) -> Array | float:
        in_pieces = self.micro_batch_size is not None and len(samples) > self.micro_batch_size
        if in_pieces or self.scale is not None:
            return self._in_parts((samples, targets, weight), halt, self.micro_batch_size if in_pieces else None)
        passes = self.net.take_passes(len(samples))
        if isinstance(passes, Backprop):
            loss = self._layer_by_layer(passes, (samples, targets, weight), halt)
        else:
            loss = self._at_once(passes, (samples, targets, weight), halt)
        self.net.keep_passes(passes)
        return loss

    def _in_parts(self, batch: Batch, halt: bool, micro_batch_size: int | None) -> Array | float:
        """Gradient, loss scale and update one after the other."""
        samples, targets, weight = batch
        pieces = None if micro_batch_size is None else self._pieces(len(samples))
        passes = self.net.take_passes(len(samples)) if pieces is None else pieces
        gradients, update, scale = self._gradients, self.optimizer.update, self.scale
        if scale is not None:
            weight = scale.scaled(weight, len(samples))
        loss = passes.value_and_grad(samples, targets, weight, gradients)
        if scale is not None:
            loss = scale.unscale(gradients.theta, loss)
        self.optimizer.guarded_step(gradients.theta, loss, self.clip_norm, halt=halt and scale is None)
        if scale is not None:
            scale.settle(update)
        if pieces is None:
            self.net.keep_passes(passes)
        else:
            self._in_pieces[len(samples)] = pieces
        return loss

    def _pieces(self, size: int) -> Backprop:
        """The passes of a batch in micro-batches, out of the store: what an error leaves half done is not put back."""
        store, net = self._in_pieces, self.net
        if size not in store:
            while len(store) >= KEPT_PASSES:
                store.pop(next(iter(store)))
            return Backprop(net.architecture, net.theta, net.ops, size, micro_batch_size=self.micro_batch_size)
        return store.pop(size)

    def _bound(self, loss_scaling: LossScaling) -> LossScale:
        net = self.net
        options = float(loss_scaling.initial), int(loss_scaling.growth_interval), net.n_parameters, net.theta.dtype
        return net.ops.bind_loss_scale(*options)

    def _layer_by_layer(self, passes: Backprop, batch: Batch, halt: bool) -> Array | float:
        gradients, graphs = self._gradients, self._graphs
        if graphs is not None:
            repeated = graphs.replayed(passes, batch, self.optimizer, self.clip_norm, halt=halt)
            if repeated is not None:
                return repeated
        loss = passes.value_and_grad(*batch, gradients)
        self.optimizer.guarded_step(gradients.theta, loss, self.clip_norm, halt=halt)
        if graphs is not None:
            graphs.consider(passes, batch, self.optimizer)
        return loss

    def _at_once(self, passes: WholePasses, batch: Batch, halt: bool) -> Array:
        gradient, update = self._gradients.theta, self.optimizer.update
        loss = self.net.ops.empty((), gradient.dtype)
        launches = partial(passes.step, *batch, gradient, update, self.clip_norm is not None, loss)
        self.optimizer.guarded_step(gradient, loss, self.clip_norm, halt=halt, launches=launches)
        return loss


def fit(
    net: MLP,
    x: ArrayLike,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    optimizer: Optimizer | None = None,
    schedule: Rate | None = None,
    epochs: int = 10,
    batch_size: int | None = 128,
    shuffle: bool = True,
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
    """Trains `net` in place by gradient descent over shuffled mini-batches.

    Args:
        net: the network.
        x, y, sample_weight: N samples, as `MLP.value_and_grad` takes them, all finite.
        optimizer: `Adam()` by default.
        schedule: the learning rate as a function of the step number, which counts this run's steps from 0, such as
            `gpuback.schedules.cosine(0.01, steps=1000)`; it is set before each step. None leaves the optimizer's.
        epochs: how often to go through the data (in all: a resumed run counts those already done).
        batch_size: samples per step; the last batch of an epoch may be shorter. None: all of them, plain gradient
            descent.
        shuffle: a new order each epoch.
        seed: of the order and of the validation split, an integer ≥ 0. None takes one from the operating system.
        validation: a fraction of the samples to hold out, or (x, y) of one's own.
        clip_norm, micro_batch_size, loss_scaling: as TrainStep's.
        patience: stop when the validation loss has not improved for so many epochs. The best θ is restored at the end.
        callbacks: functions of (net, history), called after each epoch; one that returns True stops training.
        checkpoint: a file to keep the whole state of the run in (safetensors), written at the end of epochs, at most
            once a second, and at the end. It is written beside and renamed, so a crash leaves the earlier one.
        resume: go on from `checkpoint`, to the bits that an uninterrupted run reaches; start anew if there is no such
            file.
        progress: a progress bar on stderr; None shows one on a terminal where rich is installed.

    Returns:
        The history of the whole run, resumed epochs included.

    Raises:
        DivergedError: a loss or gradient was not finite; θ and optimizer are those of the last finite step. Or an
            update overflowed (an absurd learning rate): then θ is what that left, and the message says so.
        DataError: NaN or infinity in the data, or numbers that the network's dtype cannot hold.
        ShapeError, DtypeError, LabelError, DeviceError: the data do not fit the network.
        OptionError: an option is out of range, or the checkpoint is another run's.
        FileFormatError: the checkpoint is damaged.
    """
    _check_counts(epochs=epochs, batch_size=batch_size, patience=patience, seed=seed)
    if resume and checkpoint is None:
        raise OptionError("resume=True needs checkpoint=, the file to go on from")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise OptionError(f"callbacks: expected a sequence of functions of (net, history), got {callbacks!r}")
    if patience is not None and validation is None:
        raise OptionError("patience watches the validation loss: expected validation=, got None")
    if schedule is not None:
        schedule = schedules.checked(schedule)
    optimizer = Adam() if optimizer is None else optimizer
    samples = Samples.checked(net, x, y, sample_weight)
    held = held_out(net, validation, len(samples.x))
    step = TrainStep(net, optimizer, clip_norm=clip_norm, micro_batch_size=micro_batch_size, loss_scaling=loss_scaling)
    history = History()
    best_theta = saved = None
    if checkpoint is not None:
        identity = {
            "architecture": net.architecture.as_options(),
            **optimizer.options(),
            "data": samples.digest(net.ops),
            "validation": held if isinstance(held, int) else held.digest(net.ops),
            "batch_size": None if batch_size is None else int(batch_size),
            "shuffle": bool(shuffle),
            "seed": None if seed is None else int(seed),
            "clip_norm": step.clip_norm,
            "micro_batch_size": step.micro_batch_size,
            "loss_scaling": None if loss_scaling is None else loss_scaling.options(),
            "schedule": schedules.identity(schedule),
        }
        saved = Checkpoint(checkpoint, identity)
    seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) if seed is None else int(seed)
    if resume and saved is not None and os.path.exists(saved.path):
        seed, best_theta = saved.restore(net, optimizer, history, patience, step.scale)
    earlier_steps = optimizer.step_count - history.steps
    held_samples = None if isinstance(held, int) else held
    if isinstance(held, int) and held:
        samples, held_samples = split(samples, held, seed)
    size = len(samples.x) if batch_size is None else min(batch_size, len(samples.x))
    batches = Batches(net, samples, size)

    steps_an_epoch = -(-len(samples.x) // size)

    with progress_bar(progress, epochs * steps_an_epoch, history.epochs * steps_an_epoch) as advance:
        while history.epochs < epochs and not history.stopped_early:
            started = time.perf_counter()
            order = permutation(len(samples.x), seed, history.epochs) if shuffle and batch_size is not None else None
            set_rate = partial(_set_rate, optimizer, schedule, history.epochs * steps_an_epoch)
            history.loss.append(_train_epoch(step, batches.each(order), history.epochs, set_rate, advance))
            history.learning_rate.append(optimizer.learning_rate)
            history.steps = optimizer.step_count - earlier_steps
            history.seconds += time.perf_counter() - started

            if held_samples is not None:
                value = net.loss(held_samples.x, held_samples.y, sample_weight=held_samples.weight)
                if history.note_validation(float(value)):
                    best_theta = net.theta.copy()
                history.stopped_early = patience is not None and history.epochs_since_best >= patience
            stops = [callback(net, history) for callback in callbacks]
            history.stopped_early |= any(isinstance(stop, (bool, np.bool_)) and bool(stop) for stop in stops)
            if saved is not None:
                last = history.stopped_early or history.epochs == epochs
                saved.write(net, optimizer, history, seed, best_theta, patience, step.scale, last=last)
    if patience is not None and best_theta is not None:
        net.theta[...] = best_theta
    return history


LOOK_EVERY = 16
"""Steps between two looks at whether training has diverged: on a GPU they run far ahead of what the host knows."""


def _set_rate(optimizer: Optimizer, schedule: Rate | None, first_step: int, made: int) -> None:
    """Before a step: the learning rate that the schedule has for it, `made` steps after the epoch's first."""
    if schedule is not None:
        optimizer.learning_rate = schedule(first_step + made)


def _train_epoch(
    step: TrainStep,
    batches: Iterator[Samples],
    epoch: int,
    set_rate: Callable[[int], None],
    advance: Callable[[float], None],
) -> float:
    """A step on each batch; the mean loss over the samples, each at the θ its batch met."""
    net, update = step.net, step.optimizer.update
    first_step, losses, counts = update.steps, list[Array | float](), list[int]()
    for batch in batches:
        set_rate(len(losses))
        losses.append(step.run(batch.x, batch.y, batch.weight, halt=True))
        counts.append(len(batch.x))
        if len(losses) % LOOK_EVERY == 0 and step.scale is None and update.glance() is not None:
            break
        advance(losses[-1])
    values = net.ops.to_floats(losses)
    diverged_at = step.diverged_at if step.scale is None else None
    if diverged_at is not None:
        state = "the network holds the state after the last finite step"
        if not _theta_is_finite(net):
            state = "the update before it overflowed, and θ is what that left"
        what = "gradient" if math.isfinite(values[diverged_at - first_step]) else "loss"
        raise _diverged(f"the {what} was not finite at step {diverged_at}", state, diverged_at, epoch)
    if step.scale is not None:
        _require_scaled_steps(step, values, epoch)
    # An update that overflows shows in the next step's loss; after the last step of an epoch there is none.
    if not _theta_is_finite(net):
        steps = step.optimizer.step_count
        raise _diverged(f"the update of step {steps - 1} overflowed", "θ is what it left", steps - 1, epoch)
    return math.fsum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


def _require_scaled_steps(step: TrainStep, losses: list[float], epoch: int) -> None:
    """With a dynamic loss scale some gradients may overflow, but no loss, and not at whatever scale."""
    steps, state = step.optimizer.step_count, "steps that were not finite made no update"
    if not all(map(math.isfinite, losses)):
        raise _diverged("a loss was not finite", state, steps, epoch)
    assert step.scale is not None
    scale, good_steps, _ = step.scale.state
    if scale <= SMALLEST_SCALE and not good_steps:
        raise _diverged(f"gradients were not finite at a loss scale of {scale:g}", state, steps, epoch)


def _theta_is_finite(net: MLP) -> bool:
    with net.ops.scope():
        return net.ops.all_finite(net.theta)


def _diverged(what: str, state: str, step: int, epoch: int) -> DivergedError:
    remedies = "Remedies: a smaller learning_rate, clip_norm=, or scaled inputs"
    return DivergedError(f"{what} (epoch {epoch}); {state}. {remedies}", step=step, epoch=epoch)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        lowest = 0 if name in ("seed", "epochs") else 1
        whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
        if count is None and name != "epochs":
            continue
        if not whole or count < lowest:  # type: ignore[operator]
            raise OptionError(
                f"{name}: expected an integer ≥ {lowest}{'' if name == 'epochs' else ' or None'}, got {count!r}"
            )
