"""What a backend must do: the protocol `Ops`, and what it hands out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpuback._backends.numpy.threads import ThreadPool
from gpuback._core.activations import Activation
from gpuback._core.architecture import Architecture
from gpuback._core.gradients import Gradients
from gpuback._core.losses import Loss
from gpuback._core.parameters import Layout
from gpuback._core.precision import Precision
from gpuback._core.typing import Array, ArrayLike


class Update(Protocol):
    """An optimizer's step on a backend: the decision whether to make it, and the count of those made."""

    diverged_at: int | None
    """How many updates there were when a loss or gradient was first not finite; None so far. On a GPU, reading it waits
    for what is under way."""

    @property
    def steps(self) -> int:
        """Updates made so far; waits likewise."""
        ...

    def __call__(
        self,
        gradient: Array,
        *,
        loss: Any = None,
        clip_norm: float | None = None,
        stop_after_nonfinite: bool = False,
        **hyper_parameters: Any,
    ) -> None:
        """One update of θ and of the optimizer's state, unless `loss` or the gradient is not finite.

        It runs in `Ops.scope(self.on_invalid)`.

        Args:
            gradient: ∇θ, (n_parameters,).
            loss: the loss it belongs to; None makes the update whatever the gradient is.
            clip_norm: the gradient's norm is brought down to it.
            stop_after_nonfinite: no more updates once a loss or gradient was not finite.
            hyper_parameters: of this kind of optimizer.
        """
        ...

    def on_invalid(self, *what: Any) -> None:
        """Takes note that some operation on the host has made NaN of other numbers."""
        ...

    def poll_diverged(self) -> int | None:
        """`diverged_at` as of some moment not long ago, without waiting."""
        ...


class LossScale(Protocol):
    """A dynamic loss scale S on a backend: a power of two; see `gpuback._backends.numpy.loss_scale`."""

    state: tuple[float, int, int]
    """S, how many steps in a row have made an update since it last changed, and how many in all have made none. On a
    GPU, reading it waits for what is under way."""

    def scale_weights(self, weight: Array | None, batch_size: int) -> Array:
        """S w_b, or S without weights; good until the next call."""
        ...

    def unscale(self, gradient: Array, loss: Any) -> Array | float:
        """Takes S out of the gradient, in place; the loss without it."""
        ...

    def update(self, update: Any) -> None:
        """Draws the conclusion, after an update or none."""
        ...


class GraphCapture(Protocol):
    """What repeats a sequence of launches at once; see `gpuback._cuda.launch.Launcher`."""

    def record(self, work: Callable[[], object]) -> Callable[[], None]: ...
    def capturing(self) -> bool: ...
    def copy(self, source: Array, target: Array) -> None: ...


class FusedNetwork(Protocol):
    """The passes of a network that a backend takes as a whole, not layer by layer.

    What `gpuback._network.backprop.Backprop` does, and a step of training.
    """

    @property
    def key(self) -> tuple[int, bool, bool]:
        """Batch size, and whether there are buffers for gradients, and for the inputs'."""
        ...

    def forward(self, x: Array, out: Array) -> None: ...
    def loss(self, x: Array, y: Array, weight: Array | None) -> Array: ...
    def value_and_grad(
        self,
        x: Array,
        y: Array,
        weight: Array | None,
        gradients: Gradients,
        *,
        accumulate: bool = False,
    ) -> Array: ...
    def step(
        self, x: Array, y: Array, weight: Array | None, gradient: Array, update: Any, clips: bool, loss: Array
    ) -> None: ...


class Ops(Protocol):
    """A backend. `NumpyOps` says in full what each operation computes; others give the same numbers.

    `bind_…` take what stays the same from batch to batch and return a function of what changes.
    """

    name: str
    reproducible: bool
    """Whether results have the bits that every backend gives with `reproducible=True`."""

    def scope(self, on_invalid: Callable[..., object] | None = None) -> AbstractContextManager[object]:
        """What every computation runs in: no warnings about infinities; the right device.

        Args:
            on_invalid: called when an operation on the host has made NaN of other numbers.
        """
        ...

    def bind_scope(self, on_invalid: Callable[..., object]) -> Callable[..., Any]:
        """Such a scope, made once for many times: a function (work, *arguments) that does work(*arguments) in it.

        One thread at a time may call it.
        """
        ...

    def workspace(self, rows: int, sizes: tuple[int, ...], precision: Precision) -> Any: ...
    def plan_blocks(
        self, sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
    ) -> tuple[int, ThreadPool]: ...

    def bind_weights(
        self, theta: Array, layout: Layout, precision: Precision
    ) -> tuple[list[Array], Callable[[], object]]: ...
    def bind_load(self, width: int, precision: Precision, workspace: Any) -> Callable[[Array], Array]: ...
    def bind_forward(
        self, W: Array, b: Array, h: Array, a: Array | None, activation: Activation | None, workspace: Any
    ) -> Callable[[Array], None]: ...
    def bind_loss(
        self, loss: Loss, output: str, a: Array, da: Array, divisor: float, workspace: Any
    ) -> Callable[[Array, Array | None], Any]: ...
    def mean_loss(self, parts: list[Any], batch_size: int) -> Array | float: ...
    def bind_mean_of_blocks(
        self, rows: int, batch_size: int, dtype: np.dtype[Any]
    ) -> tuple[list[Array] | None, Callable[[list[Any]], Array | float]]:
        """What makes one loss of a batch that goes through the network in blocks, each but the last of so many rows.

        Returns:
            Where each block's `bind_loss` is to leave its loss, if the backend wants to say so; and a function of what
            these returned.
        """
        ...

    def bind_output(self, name: str, a: Array, workspace: Any) -> Callable[[Array], object]: ...
    def bind_backward(
        self,
        da: Array,
        W: Array,
        da_prev: Array | None,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: Any,
    ) -> Callable[[Array, Array, Array, bool], None]: ...

    # What a layer's backward pass is to each sample by itself

    def bind_delta(
        self,
        da: Array,
        W: Array,
        da_prev: Array,
        activation_prev: Activation,
        source_prev: Array,
        workspace: Any,
    ) -> Callable[[], object]: ...
    def bind_add_norms(
        self, da: Array, norms: Array, workspace: Any
    ) -> Callable[[Array, bool, Array | None], None]: ...
    def bind_clip(self, da: Array, norms: Array, factor: float, workspace: Any) -> Callable[[float], None]: ...
    def bind_outer(self, da: Array, workspace: Any) -> Callable[[Array, Array, Array], None]: ...

    def layer_backward(
        self,
        da: Array,
        h_prev: Array,
        W: Array,
        source: Array | None,
        activation_prev: Activation,
        precision: Precision,
        dW: Array,
        db: Array,
        da_prev: Array | None,
        accumulate: bool,
    ) -> None: ...
    def may_overlap(self, array: Array, other: Array) -> bool: ...

    @property
    def graph_capture(self) -> GraphCapture | None:
        """What can record a step of training; None where it is no sequence of launches."""
        ...

    def fused_network(
        self,
        architecture: Architecture,
        theta: Array,
        batch_size: int,
        *,
        need_gradient: bool = True,
        need_input_grad: bool = False,
    ) -> FusedNetwork | None:
        """The passes of a network that is taken as a whole; None where it goes layer by layer."""
        ...

    def bind_sgd(self, theta: Array, velocity: Array | None, steps: int) -> Update: ...
    def bind_adam(self, theta: Array, first_moment: Array, second_moment: Array, steps: int) -> Update: ...
    def bind_loss_scale(
        self, initial: float, growth_interval: int, n_parameters: int, dtype: np.dtype[Any]
    ) -> LossScale: ...
    def norm(self, array: Array) -> float: ...
    def all_finite(self, array: Array) -> bool: ...
    def any_outside(self, array: Array, highest: int) -> bool: ...

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array: ...
    def scalar(self, value: Array | float, dtype: np.dtype[Any]) -> Array: ...
    def copy_for_display(self, array: Array, dtype: np.dtype[Any], factor: float = 1.0) -> Array: ...
    def to_floats(self, values: Sequence[Array | float]) -> list[float]: ...
    def to_array(self, value: ArrayLike, what: str) -> Array: ...
    def asarray(self, value: ArrayLike, dtype: np.dtype[Any] | None, what: str) -> Array: ...
    def indices(self, order: NDArray[np.intp]) -> Array: ...
    def take_rows(self, array: Array, indices: Array, out: Array) -> None: ...
    def to_numpy(self, array: Array) -> NDArray[Any]: ...

    def explain_network(self, architecture: Architecture, batch_size: int) -> tuple[list[str], str] | None:
        """The launches of a whole step, none if it goes layer by layer, and why so; None where it always does."""
        ...

    def explain_forward(self, batch_size: int, n_out: int, n_in: int, precision: Precision) -> str: ...
    def explain_backward(
        self, batch_size: int, n_out: int, n_in: int, precision: Precision, *, need_da_prev: bool
    ) -> str: ...
