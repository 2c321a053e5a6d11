"""Gradient descent on θ: SGD with momentum and Nesterov, Adam, AdamW. One pass over the flat θ, in place.

The definitions are PyTorch's (`torch.optim`), to which results are equal up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpuback._backends.protocol import AdamUpdate, Ops, Update
from gpuback._core.parameters import ParameterRange
from gpuback._core.typing import Array
from gpuback._core.validation import in_range, positive
from gpuback._network.mlp import MLP
from gpuback._training.groups import ByLayer, Groups
from gpuback.errors import OptionError, ShapeError


class HasTheta(Protocol):
    """Gradients, as far as an optimizer reads them."""

    @property
    def theta(self) -> Array: ...


class Progress(NamedTuple):
    """How far an optimizer has come: what its update counts.

    Attributes:
        steps, diverged_at: as the protocol `Update`'s.
        beta_powers: as the protocol `AdamUpdate`'s.
    """

    steps: int = 0
    diverged_at: int | None = None
    beta_powers: tuple[float, float] | None = None


class Optimizer(ABC):
    """The base of all optimizers. An optimizer belongs to the first network that it steps.

    Hyper-parameters may be set between steps, e.g. `optimizer.weight_decay = 0.01`. They are checked as the
    constructor's arguments are, and count from the next step on.
    """

    _update: Update
    """The backend's update of θ and state, once `_bind` or `_restore` has made it."""

    _in_scope: Callable[..., Any]
    """Runs work in the scope of that update."""

    _ranges: list[ParameterRange] | None = None
    """The parts of θ that it treats differently, once `_bind` has found them; None if there are none."""

    reproducible = False
    """Whether its updates have the same bits on every backend."""

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float,
        *,
        trainable: ByLayer[bool] | None = None,
        multipliers: ByLayer[float] | None = None,
        decay_biases: bool = True,
    ) -> None:
        self._groups = Groups.checked(trainable, multipliers, decay_biases)
        self.learning_rate = learning_rate
        self._first_learning_rate = self.learning_rate
        self.weight_decay = weight_decay
        self._state: dict[str, Array] = {}
        self._net: MLP | None = None

    @property
    def learning_rate(self) -> float:
        """η. A schedule may set it between steps, to any number ≥ 0."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = in_range("learning_rate", value, 0.0)

    @property
    def weight_decay(self) -> float:
        """λ ≥ 0."""
        return self._weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._weight_decay = in_range("weight_decay", value, 0.0)

    @property
    def state(self) -> Mapping[str, Array]:
        """Its arrays by name, each (n_parameters,), in θ's dtype; empty before the first step."""
        return MappingProxyType(self._state)

    @property
    def trainable(self) -> tuple[Any, ...] | None:
        """What is trained: for each layer a boolean, or a pair (weights, biases); None: everything."""
        return self._groups.options().get("trainable")

    @property
    def multipliers(self) -> tuple[Any, ...] | None:
        """The multipliers of the learning rate: for each layer a number, or such a pair; None: 1 everywhere."""
        return self._groups.options().get("multipliers")

    @property
    def decay_biases(self) -> bool:
        """Whether the weight decay applies to biases."""
        return self._groups.decay_biases

    @property
    def step_count(self) -> int:
        """How many updates it has made."""
        return 0 if self._net is None else self._update.steps

    def step(self, net: MLP, gradients: HasTheta, clip_norm: float | None = None) -> None:
        """Update `net.theta` in place, once, by whatever the gradients hold: NaN too, which a `TrainStep` would not.

        Args:
            net: the network.
            gradients: as its `value_and_grad` or `vjp` returned them, or anything with a `.theta` of θ's shape and
                dtype.
            clip_norm: gradients whose Euclidean norm over all of θ is larger are scaled down to it; `gradients` may be
                overwritten.

        Raises:
            OptionError: the optimizer belongs to another network; clip_norm is no finite number > 0; the gradients
                overlap θ or the optimizer's state.
            ShapeError: the gradients are another network's.
        """
        clip_norm = None if clip_norm is None else positive("clip_norm", clip_norm)
        gradient, theta = gradients.theta, net.theta
        if gradient is None or gradient.shape != theta.shape or gradient.dtype != theta.dtype:
            came = "a theta of None" if gradient is None else f"{gradient.shape} of {gradient.dtype}"
            raise ShapeError(f"gradients: expected shape {theta.shape} of {theta.dtype}, got {came}")
        self._bind(net)
        net._reserved.require_apart("gradients", gradient)
        gradient = gradient if gradient.flags.c_contiguous else gradient.copy()
        net._version += 1
        self._in_scope(self._update_in_scope, gradient, clip_norm)

    def _update_in_scope(self, gradient: Array, clip_norm: float | None) -> None:
        self._update(gradient, clip_norm=clip_norm, **self._update_options())

    def _step_if_finite(
        self,
        gradient: Array,
        loss: Array | float,
        clip_norm: float | None,
        *,
        stop_after_nonfinite: bool,
        **options: Any,
    ) -> None:
        """Update the network unless the loss or the gradient is not finite; see the protocol `Update`.

        options: for a fused step, `launches=` a function that makes the update's launches, and others with them.
        """
        clip_norm = None if clip_norm is None else float(clip_norm)
        assert self._net is not None
        self._net._version += 1
        self._update(
            gradient,
            loss=loss,
            clip_norm=clip_norm,
            stop_after_nonfinite=stop_after_nonfinite,
            **options,
            **self._update_options(),
        )

    def _bind(self, net: MLP) -> None:
        """Make the optimizer this network's; its state starts at zero."""
        if self._net is net:
            return
        if self._net is not None:
            raise OptionError(
                f"this {type(self).__name__} belongs to another network and holds its state; make a new one, or copy "
                "both together: copy.deepcopy((net, optimizer))"
            )
        if net.ops.reproducible and not self.reproducible:
            raise OptionError(
                f"optimizer {type(self).__name__} has no reproducible form; "
                f"with reproducible=True expected one of {', '.join(kind.__name__ for kind in OPTIMIZERS.values())}"
            )
        layout = net.architecture.layout
        self._groups.require_fit(layout)
        self._ranges, self._state = self._groups.ranges(layout), {}
        self._make_update(net, {}, Progress())

    def _make_update(self, net: MLP, state: Mapping[str, Any], progress: Progress) -> None:
        """Bind the update to θ and to arrays that hold `state`, or zeros, and the scope that it runs in."""
        for name in self._state_names({*self._state, *state}):
            if name not in self._state:
                self._state[name] = array = net.ops.empty(net.theta.shape, net.theta.dtype)
                array.fill(0)
                net._reserved.add(f"the optimizer's {name}", array)
            if name in state:
                self._state[name][...] = net.ops.asarray(state[name], net.theta.dtype, name)
        self._update = self._bind_update(net.ops, net.theta, progress)
        if progress.diverged_at is not None:
            self._update.diverged_at = progress.diverged_at
        self._in_scope = net.ops.bind_scope(self._update.on_invalid)
        self._net = net

    def _progress(self) -> Progress:
        """Say how far it has come; on a GPU, this waits for the work that is queued."""
        return Progress(self._update.steps, self._update.diverged_at)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state in host arrays, for copy and pickle together with the network."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_update", "_in_scope")}
        if self._net is not None:
            to_numpy = self._net.ops.to_numpy
            state["_state"] = {name: to_numpy(array) for name, array in self._state.items()}
            state["_progress"] = self._progress()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from there, in arrays of its own."""
        attributes = dict(state)
        arrays, progress = attributes.pop("_state"), attributes.pop("_progress", None)
        self.__dict__.update(attributes, _state={})
        if self._net is not None:
            self._make_update(self._net, arrays, progress)

    def _restore(self, net: MLP, state: Mapping[str, Any], progress: Progress) -> None:
        """Go on from the state of an optimizer of the same kind."""
        self._bind(net)
        self._make_update(net, state, progress)

    def _options(self) -> dict[str, Any]:
        """Return kind and hyper-parameters as JSON can hold them, with the learning rate before any schedule."""
        given = self._hyper_parameters() | {"learning_rate": self._first_learning_rate}
        return {"optimizer": type(self).__name__, **given, **self._groups.options()}

    def _hyper_parameters(self) -> dict[str, Any]:
        """Return them as they are now, as Python's numbers: NumPy's may have a precision of their own."""
        return {"learning_rate": self._learning_rate, "weight_decay": self._weight_decay}

    def _set_hyper_parameters(self, values: Mapping[str, Any]) -> None:
        """Set those that `_hyper_parameters` has returned."""
        for name, value in values.items():
            setattr(self, name, value)

    def _state_names(self, kept: Collection[str] = ()) -> tuple[str, ...]:
        """Name the arrays that it needs, and those it has a use for among the ones that there are."""
        return ()

    def _update_options(self) -> dict[str, Any]:
        """Return the update's keyword arguments: hyper-parameters as they are now, and its variant."""
        return self._hyper_parameters()

    @abstractmethod
    def _bind_update(self, ops: Ops, theta: Array, progress: Progress) -> Update:
        """Make the backend's update, bound to θ and to the state, to go on from there."""

    def __repr__(self) -> str:
        given = self._hyper_parameters() | self._groups.options()
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{type(self).__name__}({arguments})"


class SGD(Optimizer):
    """Stochastic gradient descent: v ← μ v + g, θ ← θ − η v, with g = ∇θ + λ θ.

    Args:
        learning_rate: η ≥ 0.
        momentum: μ in [0, 1). With 0, θ ← θ − η g.
        nesterov: step by g + μ v instead of v; needs momentum.
        weight_decay: λ ≥ 0.
        trainable: what is updated: True or False for each layer, or a pair (weights, biases) of them, e.g.
            `[False, (False, True), True]`. The rest is frozen: its state stays too, its gradient counts neither for
            `clip_norm` nor for whether a step is finite, and TrainStep does not compute what only it would need. None:
            everything.
        multipliers: m ≥ 0 for each layer, or a pair (weights, biases): there the learning rate is η m. None: 1.
        decay_biases: whether λ applies to biases; False: to weights alone.

    Raises:
        OptionError: an argument is out of range or of the wrong kind, or nothing is trainable. A number of values other
            than the network's number of layers is a ShapeError, when the optimizer first meets the network.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013;
        torch.optim.SGD.
    """

    reproducible = True

    def __init__(
        self,
        learning_rate: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        trainable: ByLayer[bool] | None = None,
        multipliers: ByLayer[float] | None = None,
        decay_biases: bool = True,
    ) -> None:
        super().__init__(
            learning_rate, weight_decay, trainable=trainable, multipliers=multipliers, decay_biases=decay_biases
        )
        self._momentum, self._nesterov = 0.0, False
        self.momentum, self.nesterov = momentum, nesterov

    @property
    def momentum(self) -> float:
        """μ in [0, 1). The velocity begins at 0 when μ is first more than 0, and stays from then on."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        momentum = in_range("momentum", value, 0.0, 1.0)
        self._require_momentum(momentum, self._nesterov)
        before, self._momentum = self._momentum, momentum
        if self._net is not None and len(self._state) < len(self._state_names()):
            try:
                self._make_update(self._net, {}, self._progress())
            except BaseException:  # no memory
                self._momentum = before
                raise

    @property
    def nesterov(self) -> bool:
        """Whether it steps by g + μ v; needs momentum, so set that first."""
        return self._nesterov

    @nesterov.setter
    def nesterov(self, value: bool) -> None:
        if not isinstance(value, (bool, np.bool_)):
            raise OptionError(f"nesterov: expected True or False, got {value!r}")
        self._require_momentum(self._momentum, bool(value))
        self._nesterov = bool(value)

    @staticmethod
    def _require_momentum(momentum: float, nesterov: bool) -> None:
        if nesterov and momentum == 0.0:
            raise OptionError("nesterov=True needs momentum > 0, got momentum=0.0")

    def _hyper_parameters(self) -> dict[str, Any]:
        return {
            "learning_rate": self._learning_rate,
            "momentum": self._momentum,
            "nesterov": self._nesterov,
            "weight_decay": self._weight_decay,
        }

    def _set_hyper_parameters(self, values: Mapping[str, Any]) -> None:
        if "nesterov" in values:
            self.nesterov = False  # or a momentum of 0 could not be set
        super()._set_hyper_parameters(values)

    def _state_names(self, kept: Collection[str] = ()) -> tuple[str, ...]:
        return ("velocity",) if self._momentum or "velocity" in kept else ()

    def _bind_update(self, ops: Ops, theta: Array, progress: Progress) -> Update:
        return ops.bind_sgd(theta, self._state.get("velocity"), progress.steps, self._ranges)


class Adam(Optimizer):
    """Adam: a step is the gradient's running mean over the root of its running mean square, both corrected for bias.

    m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², θ ← θ − η (m/(1 − β₁ᵗ)) / (√(v/(1 − β₂ᵗ)) + ε), with g = ∇θ + λ θ.

    Args:
        learning_rate: η ≥ 0.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε > 0.
        weight_decay: λ ≥ 0.
        trainable, multipliers, decay_biases: by layer, as SGD's.

    Raises:
        OptionError, ShapeError: as SGD.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015; torch.optim.Adam.
    """

    reproducible = True
    _decoupled = False
    _update: AdamUpdate

    def __init__(
        self,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        trainable: ByLayer[bool] | None = None,
        multipliers: ByLayer[float] | None = None,
        decay_biases: bool = True,
    ) -> None:
        super().__init__(
            learning_rate, weight_decay, trainable=trainable, multipliers=multipliers, decay_biases=decay_biases
        )
        self.betas, self.eps = betas, eps

    @property
    def betas(self) -> tuple[float, float]:
        """(β₁, β₂), each in [0, 1). Where they change, βᵗ is the product of the β of all t steps."""
        return self._betas

    @betas.setter
    def betas(self, value: tuple[float, float]) -> None:
        try:
            first, second = value
        except (TypeError, ValueError):
            raise OptionError(f"betas: expected two numbers in [0, 1), got {value!r}") from None
        self._betas = in_range("betas[0]", first, 0.0, 1.0), in_range("betas[1]", second, 0.0, 1.0)

    @property
    def eps(self) -> float:
        """ε > 0."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = positive("eps", value)

    def _hyper_parameters(self) -> dict[str, Any]:
        return {
            "learning_rate": self._learning_rate,
            "betas": self._betas,
            "eps": self._eps,
            "weight_decay": self._weight_decay,
        }

    def _state_names(self, kept: Collection[str] = ()) -> tuple[str, ...]:
        return "first_moment", "second_moment"

    def _progress(self) -> Progress:
        return super()._progress()._replace(beta_powers=self._update.beta_powers)

    def _update_options(self) -> dict[str, Any]:
        return self._hyper_parameters() | {"decoupled": self._decoupled}

    def _bind_update(self, ops: Ops, theta: Array, progress: Progress) -> AdamUpdate:
        first, second = (self._state[name] for name in self._state_names())
        update = ops.bind_adam(theta, first, second, progress.steps, self._ranges)
        update.beta_powers = progress.beta_powers
        return update


class AdamW(Adam):
    """Adam with decoupled weight decay: θ ← (1 − ηλ) θ before each step, instead of λ θ in the gradient.

    Arguments and errors as Adam's; weight_decay is λ.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019; torch.optim.AdamW.
    """

    _decoupled = True

    def __init__(
        self,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        trainable: ByLayer[bool] | None = None,
        multipliers: ByLayer[float] | None = None,
        decay_biases: bool = True,
    ) -> None:
        super().__init__(
            learning_rate,
            betas,
            eps,
            weight_decay,
            trainable=trainable,
            multipliers=multipliers,
            decay_biases=decay_biases,
        )


OPTIMIZERS: dict[str, type[SGD] | type[Adam]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
