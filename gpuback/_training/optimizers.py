"""Gradient descent on θ: SGD with momentum and Nesterov, Adam, AdamW. One pass over the flat θ, in place.

The definitions are PyTorch's (`torch.optim`), to which results are equal up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from gpuback._backends.protocol import Ops, Update
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


class Optimizer(ABC):
    """The base of all optimizers. An optimizer belongs to the first network that it steps.

    Attributes:
        state: its arrays by name, each (n_parameters,), in θ's dtype; empty before the first step.
    """

    _update: Update
    """The backend's update of θ and state, once `_bind` or `_restore` has made it."""

    _in_scope: Callable[..., Any]
    """Runs work in the scope of that update."""

    _state_names: tuple[str, ...] = ()
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
        self.weight_decay = in_range("weight_decay", weight_decay, 0.0)
        self.state: dict[str, Array] = {}
        self._net: MLP | None = None

    @property
    def learning_rate(self) -> float:
        """η. A schedule may set it between steps, to any number ≥ 0."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = in_range("learning_rate", value, 0.0)

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
            OptionError: the optimizer belongs to another network; clip_norm is no finite number > 0.
            ShapeError: the gradients are another network's.
        """
        clip_norm = None if clip_norm is None else positive("clip_norm", clip_norm)
        gradient, theta = gradients.theta, net.theta
        if gradient is None or gradient.shape != theta.shape or gradient.dtype != theta.dtype:
            came = "a theta of None" if gradient is None else f"{gradient.shape} of {gradient.dtype}"
            raise ShapeError(f"gradients: expected shape {theta.shape} of {theta.dtype}, got {came}")
        self._bind(net)
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

        options: on a GPU, `launches=` a function that makes the update's launches, and others with them.
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
                f"this {type(self).__name__} belongs to another network and holds its state; make a new one"
            )
        if net.ops.reproducible and not self.reproducible:
            raise OptionError(
                f"optimizer {type(self).__name__} has no reproducible form; "
                f"with reproducible=True expected one of {', '.join(kind.__name__ for kind in OPTIMIZERS.values())}"
            )
        layout = net.architecture.layout
        self._groups.require_fit(layout)
        self._ranges = self._groups.ranges(layout)
        for name in self._state_names:
            self.state[name] = net.ops.empty(net.theta.shape, net.theta.dtype)
            self.state[name].fill(0)
        self._make_update(net, 0)
        self._net = net

    def _make_update(self, net: MLP, step_count: int) -> None:
        """Bind the update to θ and to the state, and the scope that it runs in."""
        self._update = self._bind_update(net.ops, net.theta, step_count)
        self._in_scope = net.ops.bind_scope(self._update.on_invalid)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the update, which is bound to this θ, for copy and pickle together with the network."""
        return {**self.__dict__, "_update": self.step_count, "_in_scope": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        step_count = self.__dict__.pop("_update")
        if self._net is not None:
            self._make_update(self._net, step_count)

    def _restore(self, net: MLP, state: Mapping[str, Any], step_count: int) -> None:
        """Go on from the state of an optimizer of the same kind after `step_count` steps."""
        self._bind(net)
        for name in self._state_names:
            self.state[name][...] = net.ops.asarray(state[name], net.theta.dtype, name)
        self._make_update(net, step_count)

    def _options(self) -> dict[str, Any]:
        """Return kind and hyper-parameters as JSON can hold them, with the learning rate before any schedule."""
        given = self._hyper_parameters() | {"learning_rate": self._first_learning_rate}
        return {"optimizer": type(self).__name__, **given, **self._groups.options()}

    def _hyper_parameters(self) -> dict[str, Any]:
        """Return them as they are now, as Python's numbers: NumPy's may have a precision of their own."""
        return {"learning_rate": self._learning_rate, "weight_decay": float(self.weight_decay)}

    def _update_options(self) -> dict[str, Any]:
        """Return the update's keyword arguments: hyper-parameters as they are now, and its variant."""
        return self._hyper_parameters()

    @abstractmethod
    def _bind_update(self, ops: Ops, theta: Array, step_count: int) -> Update:
        """Make the backend's update, bound to θ and to the state."""

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
        self.momentum = in_range("momentum", momentum, 0.0, 1.0)
        self.nesterov = bool(nesterov)
        if self.nesterov and self.momentum == 0.0:
            raise OptionError("nesterov=True needs momentum > 0, got momentum=0.0")
        self._state_names = ("velocity",) if self.momentum else ()

    def _hyper_parameters(self) -> dict[str, Any]:
        return {
            "learning_rate": self._learning_rate,
            "momentum": float(self.momentum),
            "nesterov": bool(self.nesterov),
            "weight_decay": float(self.weight_decay),
        }

    def _bind_update(self, ops: Ops, theta: Array, step_count: int) -> Update:
        return ops.bind_sgd(theta, self.state.get("velocity"), step_count, self._ranges)


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
    _state_names = ("first_moment", "second_moment")
    _decoupled = False

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
        try:
            first, second = betas
        except (TypeError, ValueError):
            raise OptionError(f"betas: expected two numbers in [0, 1), got {betas!r}") from None
        self.betas = (in_range("betas[0]", first, 0.0, 1.0), in_range("betas[1]", second, 0.0, 1.0))
        self.eps = positive("eps", eps)

    def _hyper_parameters(self) -> dict[str, Any]:
        return {
            "learning_rate": self._learning_rate,
            "betas": (float(self.betas[0]), float(self.betas[1])),
            "eps": float(self.eps),
            "weight_decay": float(self.weight_decay),
        }

    def _update_options(self) -> dict[str, Any]:
        return self._hyper_parameters() | {"decoupled": self._decoupled}

    def _bind_update(self, ops: Ops, theta: Array, step_count: int) -> Update:
        return ops.bind_adam(theta, self.state["first_moment"], self.state["second_moment"], step_count, self._ranges)


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
