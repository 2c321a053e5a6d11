"""One step of training: forward, loss, backward, update; for float16 with a dynamic loss scale."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from gpuback._backends.protocol import FusedNetwork, LossScale
from gpuback._core.typing import Array, ArrayLike
from gpuback._core.validation import count, count_or_none, positive
from gpuback._network.backprop import Backprop, Passes, empty_gradients
from gpuback._network.inputs import as_batch
from gpuback._network.mlp import MLP
from gpuback._training.graph_replay import Batch, StepGraphs
from gpuback._training.optimizers import Optimizer
from gpuback.errors import OptionError


@dataclass(frozen=True)
class LossScaling:
    """A dynamic loss scale, for float16: S times the loss goes back through the network; S then leaves the gradients.

    float16 holds nothing beyond 65504 and little below 10⁻⁷. The gradients of pre-activations are of order 1 whatever
    the batch size, by a fixed factor (docs/numerics.md); where a loss or a network makes them much larger or smaller,
    S brings them into range. It is a power of two. A step whose loss or gradient is not finite makes no update and
    halves S. After `growth_interval` steps in a row that made one, S is doubled. It stays within 2⁻²⁴ … 2²⁴. On a GPU
    all of this happens on the device; the host does not wait.

    Args:
        initial: S before the first step, a power of two.
        growth_interval: ≥ 1.

    Raises:
        OptionError: an argument is out of range.

    Source: Micikevicius et al., "Mixed precision training", 2018; torch.amp.GradScaler.
    """

    initial: float = 256.0
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        initial = positive("initial", self.initial)
        if np.frexp(initial)[0] != 0.5 or not 2.0**-24 <= initial <= 2.0**24:
            raise OptionError(f"initial: expected a power of two from 2⁻²⁴ to 2²⁴, got {self.initial!r}")
        count("growth_interval", self.growth_interval)

    def _options(self) -> dict[str, Any]:
        """Return the arguments as JSON can hold them."""
        return {name: float(value) for name, value in asdict(self).items()}

    def _bind(self, net: MLP) -> LossScale:
        """Make the scale on the network's backend.

        Raises:
            OptionError: the network's dtype is not float16.
        """
        precision = net.architecture.precision
        if precision.operand != np.float16:
            raise OptionError(
                f"loss_scaling goes with dtype float16, whose range is small; {precision.name} needs none"
            )
        options = float(self.initial), int(self.growth_interval)
        return net.ops.bind_loss_scale(*options, net.n_parameters, net.theta.dtype)


class TrainStep:
    """One step of training: forward, loss, backward, update of θ, by the fastest path there is.

    Buffers are made at the first call with a batch size and reused. With x, y and weights already in the network's
    dtypes (θ's, and int64 labels), a call allocates nothing that grows with the batch. On a GPU, a narrow network's
    step is one launch or two. A wider network's launches are captured into a CUDA graph when a batch size comes a
    second time, and replayed from the third time on. A loss or gradient that is not finite leaves θ and the optimizer
    as they are. One thread at a time may call it.

    `clip_norm`, `micro_batch_size` and `loss_scaling` may be set between steps; they are checked as arguments are. A
    new loss scale starts anew. A deep or pickled copy goes on as the original would, bit for bit, with copies of the
    network and the optimizer. A shallow one has buffers and a loss scale of its own.

    Args:
        net: the network.
        optimizer: SGD, Adam or AdamW; belongs to this network from the first step. What only frozen layers would need
            is not computed: nothing goes back below the lowest layer that is trained.
        clip_norm: gradients whose Euclidean norm over all that is trained is larger are scaled down to it, as
            torch.nn.utils.clip_grad_norm_ does.
        micro_batch_size: larger batches go through the network this many samples at a time, and their gradients are
            added up before the update (gradient accumulation). The step is the same, but for the order of sums; buffers
            are for this many samples only. On NumPy, whose blocks suit the caches anyway, it is an upper bound for
            them. On a GPU every network then goes layer by layer, launch by launch.
        loss_scaling: a dynamic loss scale, for float16 only.

    Example:
        >>> import gpuback
        >>> step = TrainStep(gpuback.MLP([2, 8, 2], seed=0), gpuback.Adam())
        >>> loss = float(step([[0.0, 1.0], [1.0, 0.0]], [0, 1]))
    """

    _loss_scaling: LossScaling | None
    _loss_scale: LossScale | None

    def __init__(
        self,
        net: MLP,
        optimizer: Optimizer,
        *,
        clip_norm: float | None = None,
        micro_batch_size: int | None = None,
        loss_scaling: LossScaling | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise OptionError(f"optimizer: expected one such as gpuback.Adam(), got {optimizer!r}")
        self._net, self._optimizer = net, optimizer
        self.loss_scaling = loss_scaling
        self.micro_batch_size, self.clip_norm = micro_batch_size, clip_norm
        optimizer._bind(net)
        optimizer._update.diverged_at = None
        self._make_buffers()

    def _make_buffers(self) -> None:
        net, optimizer = self._net, self._optimizer
        self._architecture_and_ops = net.architecture, net.ops
        self._trainable = optimizer._groups.trainable_layers
        self._gradients = empty_gradients(*self._architecture_and_ops)
        if self._trainable is not None:
            self._gradients.theta.fill(0)  # frozen layers' gradients are never written, but a loss scale divides them
        capture = net.ops.graph_capture if net.architecture.loss_row.targets != "own" else None
        self._graphs = None if capture is None else StepGraphs(net.ops, capture, self._gradients)
        self._in_scope = net.ops.bind_scope(lambda *_: optimizer._update.on_invalid())

    def __getstate__(self) -> dict[str, Any]:
        """Return what it was made of, for copy and pickle, and the state of the loss scale; no buffers."""
        state = {name: value for name, value in self.__dict__.items() if name not in _MADE_ANEW}
        return state | {"_loss_scale": None if self._loss_scale is None else self._loss_scale.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._loss_scaling is not None:
            self._loss_scale = self._loss_scaling._bind(self._net)
            self._loss_scale.state = state["_loss_scale"]
        self._make_buffers()

    @property
    def net(self) -> MLP:
        """The network."""
        return self._net

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        return self._optimizer

    @property
    def clip_norm(self) -> float | None:
        """What gradients are scaled down to; None: they are not."""
        return self._clip_norm

    @clip_norm.setter
    def clip_norm(self, value: float | None) -> None:
        self._clip_norm = None if value is None else positive("clip_norm", value)

    @property
    def micro_batch_size(self) -> int | None:
        """How many samples go through the network at a time; None: as many as the backend chooses."""
        return self._micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, value: int | None) -> None:
        self._micro_batch_size = count_or_none("micro_batch_size", value)

    @property
    def loss_scaling(self) -> LossScaling | None:
        """The dynamic loss scale that it was given."""
        return self._loss_scaling

    @loss_scaling.setter
    def loss_scaling(self, value: LossScaling | None) -> None:
        if not isinstance(value, LossScaling | None):
            raise OptionError(f"loss_scaling: expected a gpuback.LossScaling() or None, got {value!r}")
        self._loss_scale = None if value is None else value._bind(self._net)
        self._loss_scaling = value

    @property
    def diverged_at(self) -> int | None:
        """How many updates the optimizer had made when a loss or gradient was first not finite; None so far."""
        return self.optimizer._update.diverged_at

    @property
    def loss_scale(self) -> float:
        """The dynamic loss scale S now, 1 without one; on a GPU, reading it waits for what is under way."""
        return 1.0 if self._loss_scale is None else self._loss_scale.state[0]

    @property
    def skipped_steps(self) -> int:
        """How many steps of a dynamic loss scale were not finite and made no update; on a GPU, reading it waits."""
        return 0 if self._loss_scale is None else self._loss_scale.state[2]

    def __call__(self, x: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Array:
        """Make one step on a batch; arguments and errors as `MLP.value_and_grad`'s.

        Returns:
            The loss before the update, a 0-d array on the network's backend.
        """
        loss = self._step(*as_batch(x, y, sample_weight, *self._architecture_and_ops))
        return self.net._scalar(loss)

    def _step(
        self, samples: Array, targets: Array, weight: Array | None, *, stop_after_nonfinite: bool = False
    ) -> Array | float:
        """Make one step on arrays that `as_batch` has checked; `fit` calls it.

        With `stop_after_nonfinite`, the first loss or gradient that is not finite ends all updates, unless a loss scale
        handles it.
        """
        return self._in_scope(self._step_in_scope, (samples, targets, weight), stop_after_nonfinite)

    def _step_in_scope(self, batch: Batch, stop_after_nonfinite: bool) -> Array | float:
        size, micro_batch_size = len(batch[0]), self.micro_batch_size
        if micro_batch_size is not None and size <= micro_batch_size:
            micro_batch_size = None
        passes = self.net._acquire(size, micro_batch_size=micro_batch_size, trainable=self._trainable)
        if micro_batch_size is not None or self._loss_scale is not None:
            loss = self._separate_update(passes, batch, stop_after_nonfinite)
        elif isinstance(passes, Backprop):
            loss = self._layer_by_layer(passes, batch, stop_after_nonfinite)
        else:
            loss = self._fused_step(passes, batch, stop_after_nonfinite)
        self.net._release(passes)
        return loss

    def _separate_update(self, passes: Passes, batch: Batch, stop_after_nonfinite: bool) -> Array | float:
        """Compute the gradients, in micro-batches or not, then unscale them, then update."""
        samples, targets, weight = batch
        gradients, scale = self._gradients, self._loss_scale
        if scale is not None:
            weight = scale.scale_weights(weight, len(samples))
        loss = passes.value_and_grad(samples, targets, weight, gradients)
        if scale is not None:
            loss = scale.unscale(gradients.theta, loss)
        self.optimizer._step_if_finite(
            gradients.theta, loss, self.clip_norm, stop_after_nonfinite=stop_after_nonfinite and scale is None
        )
        if scale is not None:
            scale.update(self.optimizer._update)
        return loss

    def _layer_by_layer(self, passes: Backprop, batch: Batch, stop_after_nonfinite: bool) -> Array | float:
        """Replay the step's graph if there is one; else launch layer by layer."""
        gradients, graphs = self._gradients, self._graphs
        if graphs is not None:
            replayed = graphs.try_replay(
                passes, batch, self.optimizer, self.clip_norm, stop_after_nonfinite=stop_after_nonfinite
            )
            if replayed is not None:
                return replayed
        loss = passes.value_and_grad(*batch, gradients)
        self.optimizer._step_if_finite(gradients.theta, loss, self.clip_norm, stop_after_nonfinite=stop_after_nonfinite)
        if graphs is not None:
            graphs.maybe_capture(passes, batch, self.optimizer)
        return loss

    def _fused_step(self, passes: FusedNetwork, batch: Batch, stop_after_nonfinite: bool) -> Array:
        """Launch passes and update at once."""
        gradient, update = self._gradients.theta, self.optimizer._update
        loss = self.net.ops.empty((), gradient.dtype)
        launches = partial(passes.step, *batch, gradient, update, self.clip_norm is not None, loss)
        self.optimizer._step_if_finite(
            gradient, loss, self.clip_norm, stop_after_nonfinite=stop_after_nonfinite, launches=launches
        )
        return loss


_MADE_ANEW = {"_architecture_and_ops", "_trainable", "_gradients", "_graphs", "_in_scope"}
"""The attributes that `_make_buffers` sets."""
