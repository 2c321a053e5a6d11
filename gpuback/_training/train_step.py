"""One step of training: forward, loss, backward, update."""

from __future__ import annotations

from functools import partial

from gpuback._backends.protocol import FusedNetwork, LossScale
from gpuback._core.typing import Array, ArrayLike
from gpuback._core.validation import count_or_none, positive
from gpuback._network.backprop import Backprop
from gpuback._network.mlp import MLP
from gpuback._training.graph_replay import Batch, StepGraphs
from gpuback._training.loss_scaling import LossScaling
from gpuback._training.optimizers import Optimizer
from gpuback.errors import OptionError


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
        >>> import gpuback
        >>> step = TrainStep(gpuback.MLP([2, 8, 2], seed=0), gpuback.Adam())
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
        if loss_scaling is not None:
            if not isinstance(loss_scaling, LossScaling):
                raise OptionError(f"loss_scaling: expected a gpuback.LossScaling() or None, got {loss_scaling!r}")
            loss_scaling.require(net.architecture.precision)
        micro_batch_size = count_or_none("micro_batch_size", micro_batch_size)
        clip_norm = None if clip_norm is None else positive("clip_norm", clip_norm)
        if not isinstance(optimizer, Optimizer):
            raise OptionError(f"optimizer: expected one such as gpuback.Adam(), got {optimizer!r}")
        optimizer.bind(net)
        self.net, self.optimizer, self.clip_norm = net, optimizer, clip_norm
        self.micro_batch_size = micro_batch_size
        self.scale = None if loss_scaling is None else self._bound(loss_scaling)
        optimizer.update.diverged_at = None
        self._gradients = net.empty_gradients()
        recorder = net.ops.recorder
        self._graphs = None if recorder is None else StepGraphs(net.ops, recorder, self._gradients)
        self._in_scope = net.ops.bind_scope(lambda *_: optimizer.update.on_invalid())

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

    def run(
        self, samples: Array, targets: Array, weight: Array | None, *, stop_after_nonfinite: bool = False
    ) -> Array | float:
        """The step itself, on arrays that are already checked, on the backend, and in θ's dtype.

        With `stop_after_nonfinite`, the first loss or gradient that is not finite ends all updates, unless a loss scale
        handles it.
        """
        return self._in_scope(self._run, samples, targets, weight, stop_after_nonfinite)

    def _run(self, samples: Array, targets: Array, weight: Array | None, stop_after_nonfinite: bool) -> Array | float:
        in_pieces = self.micro_batch_size is not None and len(samples) > self.micro_batch_size
        if in_pieces or self.scale is not None:
            return self._in_parts((samples, targets, weight), stop_after_nonfinite, in_pieces)
        passes = self.net.acquire(len(samples))
        if isinstance(passes, Backprop):
            loss = self._layer_by_layer(passes, (samples, targets, weight), stop_after_nonfinite)
        else:
            loss = self._at_once(passes, (samples, targets, weight), stop_after_nonfinite)
        self.net.release(passes)
        return loss

    def _in_parts(self, batch: Batch, stop_after_nonfinite: bool, in_pieces: bool) -> Array | float:
        """Gradient, loss scale and update one after the other."""
        samples, targets, weight = batch
        passes = self.net.acquire(len(samples), micro_batch_size=self.micro_batch_size if in_pieces else None)
        gradients, update, scale = self._gradients, self.optimizer.update, self.scale
        if scale is not None:
            weight = scale.scale_weights(weight, len(samples))
        loss = passes.value_and_grad(samples, targets, weight, gradients)
        if scale is not None:
            loss = scale.unscale(gradients.theta, loss)
        self.optimizer.guarded_step(
            gradients.theta, loss, self.clip_norm, stop_after_nonfinite=stop_after_nonfinite and scale is None
        )
        if scale is not None:
            scale.update(update)
        self.net.release(passes)
        return loss

    def _bound(self, loss_scaling: LossScaling) -> LossScale:
        net = self.net
        options = float(loss_scaling.initial), int(loss_scaling.growth_interval), net.n_parameters, net.theta.dtype
        return net.ops.bind_loss_scale(*options)

    def _layer_by_layer(self, passes: Backprop, batch: Batch, stop_after_nonfinite: bool) -> Array | float:
        gradients, graphs = self._gradients, self._graphs
        if graphs is not None:
            repeated = graphs.replayed(
                passes, batch, self.optimizer, self.clip_norm, stop_after_nonfinite=stop_after_nonfinite
            )
            if repeated is not None:
                return repeated
        loss = passes.value_and_grad(*batch, gradients)
        self.optimizer.guarded_step(gradients.theta, loss, self.clip_norm, stop_after_nonfinite=stop_after_nonfinite)
        if graphs is not None:
            graphs.consider(passes, batch, self.optimizer)
        return loss

    def _at_once(self, passes: FusedNetwork, batch: Batch, stop_after_nonfinite: bool) -> Array:
        gradient, update = self._gradients.theta, self.optimizer.update
        loss = self.net.ops.empty((), gradient.dtype)
        launches = partial(passes.step, *batch, gradient, update, self.clip_norm is not None, loss)
        self.optimizer.guarded_step(
            gradient, loss, self.clip_norm, stop_after_nonfinite=stop_after_nonfinite, launches=launches
        )
        return loss
