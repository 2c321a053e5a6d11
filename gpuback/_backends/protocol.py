"""How to write a backend: the protocol `Ops`, and the protocols of the objects that its methods return.

A backend computes on its own arrays. Everything above it (networks, training, explain) calls only these methods.
`NumpyOps` in `numpy/ops.py` is a readable implementation of every operation, `ReproducibleNumpyOps` in
`exact/numpy_ops.py` of what an operation computes with `reproducible=True`, to the bit.

To add a backend:

1. Write a class with the methods of `Ops`. Start from `NumpyOps`, and replace one method after the other.
2. Add a row to `BACKENDS` in `registry.py`: a function that makes the class, and a status that says why it cannot be
   used where that is so. If it has an array type of its own, let `ops_of` recognise it.
3. For `reproducible=True`, write the few operations of `exact.products.ExactBackend` and inherit `exact.layers`.
4. Add the class to `tests/backends/test_protocol.py`, which compares names, parameters and defaults with this page, and
   to the fixture `_backend` in `tests/conftest.py`. All tests marked `on_each_backend` then run on it: passes, losses,
   per-sample gradients and updates against float64 (`docs/numerics.md`), and in the reproducible mode bit by bit.

Notation. A batch has B samples. It goes through the network in blocks of `rows` samples. A layer has nI inputs and nO
outputs: h_prev (rows, nI), W (nO, nI), b (nO,), a = h_prev Wᵀ + b and h = g(a), both (rows, nO). da stands for
∂loss/∂a. O is `precision.operand`, the dtype that operands of products are rounded to, and A is
`precision.accumulator`, the dtype of θ, gradients and sums. A backend may carry O's values in a wider dtype, as NumPy
carries 16-bit values in float32; it has to round them all the same. "=" overwrites, "+=" adds, "(+)=" does what
`accumulate` says.

Methods named `bind_…` are called ahead: `bind_sgd`, `bind_adam` and `bind_loss_scale` once per network, `bind_scope`
once per `TrainStep`, all others once per batch size. These others take what stays the same from batch to batch
(weights, buffers) and return a function of what changes. Such a function

- in a step of training allocates nothing that grows with the batch, except losses that it returns; scratch comes from
  the workspace,
- keeps no reference to its arguments, and writes only to arrays that are named as written,
- converts nothing: its arguments have the dtypes and shapes that stand here,
- does not wait for a device, and does not raise on NaN or infinity,
- with a `graph_capture`, only launches: it does not allocate, copy by other means, or read values on the host. Captured
  are the functions of `bind_load`, `bind_forward`, `bind_loss` (told where the loss goes), `bind_backward` and
  `bind_delta`, the refresh of `bind_weights`, and `CapturableUpdate.launch`.

Bound functions run in `Ops.scope`. The order of every sum depends on shapes alone, never on timing. A backend's own
sums of K terms run in chains of length ℓ with ℓ + K/ℓ ≤ 4√K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpuback._core.activations import Activation
from gpuback._core.architecture import Architecture
from gpuback._core.jets import Jet
from gpuback._core.losses import Loss
from gpuback._core.parameters import Gradients, Layout, ParameterRange
from gpuback._core.precision import Precision
from gpuback._core.threads import ThreadPool
from gpuback._core.typing import Array, ArrayLike

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 2.0**24
"""The limits of a dynamic loss scale. float16 holds a sample's ∂ℓ/∂a up to 2³⁹ at the smallest, and down to 2⁻⁴⁸ at
the largest."""


BATCH_ARRAYS = 3
"""A batch is samples, targets and weights."""


class Workspace(Protocol):
    """The buffers that the layers of one block share. Memory order, padding and dtype are the backend's choice."""

    def hidden(self, width: int) -> Array:
        """Make a buffer of its own for a hidden layer's h or a, (rows, width)."""
        ...

    def output(self, width: int) -> Array:
        """Make the buffer for a_L, (rows, width), in A."""
        ...

    def output_delta(self, output: Array) -> Array:
        """Return the buffer for da_L, (rows, n_L); it may be `output` itself, which `bind_loss` then overwrites."""
        ...

    def delta(self, layer: int, width: int) -> Array:
        """Return the buffer for da of a layer, (rows, width).

        Layers may take two buffers in turn: da_k is no longer needed once da_{k−1} is computed. Layer 0 stands for the
        network's input, whose buffer holds ∂loss/∂x in A.
        """
        ...


class Update(Protocol):
    """One optimizer's update of θ and of its state, in place; it counts the updates made.

    The formulas are those of `SGDUpdate` and `AdamUpdate` in `numpy/updates.py`: fixed sequences of + − × ÷ √, rounded
    one by one, so that all backends get the same bits from the same gradient.
    """

    diverged_at: int | None
    """The number of updates made when a loss or gradient was first not finite; None so far. Reading it on a GPU waits
    for the work that is queued."""

    @property
    def steps(self) -> int:
        """The number of updates made. Reading it on a GPU waits for the work that is queued."""
        ...

    def __call__(
        self,
        gradient: Array,
        *,
        loss: Any = None,
        clip_norm: float | None = None,
        stop_after_nonfinite: bool = False,
        launches: Callable[[], None] | None = None,
        **hyper_parameters: Any,
    ) -> None:
        """Update θ once, unless `loss` or the gradient is not finite. Runs in `Ops.scope(self.on_invalid)`.

        Frozen parameters (see `Ops.bind_sgd`) stay as they are, and their gradient counts nowhere.

        May not wait for a device: the decision whether to update is made where the gradient is.

        Args:
            gradient: ∇θ, (n_parameters,) in A, contiguous; overwritten only with a clip_norm.
            loss: the loss that the gradient belongs to, as the passes returned it. None: update in any case.
            clip_norm: the Euclidean norm that a longer gradient is scaled down to.
            stop_after_nonfinite: make no more updates once a loss or gradient was not finite.
            launches: a `FusedNetwork.step` to run instead, which computes the gradient and makes the update that the
                other arguments ask for.
            hyper_parameters: learning_rate, weight_decay, and momentum and nesterov, or betas, eps and decoupled.
        """
        ...

    def on_invalid(self, *what: Any) -> None:
        """Note that an operation on the host has made NaN of other numbers, so that its bits can be made canonical."""
        ...

    def poll_diverged(self) -> int | None:
        """Return `diverged_at` as of a recent moment, without waiting."""
        ...


class AdamUpdate(Update, Protocol):
    """Adam's update."""

    beta_powers: tuple[float, float] | None
    """(Πβ₁, Πβ₂) over the updates made, from which copies and checkpoints go on. None: the next update computes βᵗ by
    its own β, with t = `steps`. Reading it on a GPU waits for the work that is queued."""


class CapturableUpdate(Update, Protocol):
    """An update on a backend with a `graph_capture`: its launches can be part of a captured step.

    Given `launches`, a call writes the hyper-parameters to the device and then runs those. They may be a captured step.
    """

    def launch(self, gradient: Array, loss: Array | None) -> None:
        """Queue one update by the hyper-parameters that are on the device. Only launches."""
        ...


class LossScale(Protocol):
    """A dynamic loss scale S, a power of two from `SMALLEST_SCALE` to `LARGEST_SCALE`.

    S multiplies the samples' weights on the way in and leaves gradient and loss before the update; both are exact. A
    step without an update, because a number overflowed, halves S. `growth_interval` updates in a row double it.
    """

    state: tuple[float, int, int]
    """S, the number of updates in a row since S last changed, and the number of steps without an update in all. Reading
    it on a GPU waits for the work that is queued."""

    def scale_weights(self, weight: Array | None, batch_size: int) -> Array:
        """Return S w_b, (batch_size,) in A, or S without weights. The array is valid until the next call."""
        ...

    def unscale(self, gradient: Array, loss: Any) -> Array | float:
        """Divide the gradient by S, in place; return loss / S."""
        ...

    def update(self, update: Any) -> None:
        """Adapt S to whether `update`, an `Update` of the same backend, made an update when it was last called."""
        ...


class GradientScale(Protocol):
    """The power of two σ that da carries through a float16 backward pass, chosen by the dy that it starts from."""

    def fit(self, dy: Array) -> Array:
        """Choose σ so that ½ ≤ σ max |dy| < 1, and return it as the weights w_b of `bind_output_delta`. Does not wait.

        σ is 1 if the maximum is 0 or not finite, and stays within 2⁻¹²⁶ … 2¹²⁶.

        Args:
            dy: (rows, n_L) in A, C-contiguous.

        Returns:
            (rows,) in A, every element σ; valid until the next call.
        """
        ...

    def unscale(self, values: Array, out: Array, accumulate: bool) -> None:
        """out (+)= values / σ: contiguous arrays in A of one shape, of which `values` may be overwritten.

        Without `accumulate`, out may be `values` itself.
        """
        ...


class GraphCapture(Protocol):
    """Captures a sequence of launches, to repeat it as one; see `gpuback._cuda.launch.Launcher`."""

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """Return a function that repeats the launches of `work`, with the arguments that they have now.

        Nothing runs during the capture. `work` may only launch. The arrays that its launches read and write have to be
        kept alive as long as the function is called.

        Raises:
            BackendError: the device, or its driver, cannot capture.
        """
        ...

    def capturing(self) -> bool:
        """Tell whether launches are now being captured, by `capture` or by the user, rather than run."""
        ...

    def copy(self, source: Array, target: Array) -> None:
        """Queue target = source, of one dtype and shape, both contiguous."""
        ...


class Prefetch(Protocol):
    """Brings batches to the backend on one thread, the loading one, while another, the stepping one, trains on others.

    A batch has one of a fixed number of slots, 0, 1, …, from its `load` until `release` was called for that slot.
    """

    def scope(self) -> AbstractContextManager[object]:
        """Return the context that the loading thread runs in, its user's code too: the right device is current."""
        ...

    def follow(self) -> None:
        """Let later loads come after what the calling thread has queued. Does not wait."""
        ...

    def load(self, slot: int, arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
        """Return a batch's arrays on the backend: copies in the slot's buffers of those on the host, others themselves.

        Runs on the loading thread, waits until the step that read the slot's last batch is over, and holds on to the
        arrays until then.
        """
        ...

    def acquire(self, slot: int) -> None:
        """Let what the calling thread queues from now on come after the slot's copies. Does not wait."""
        ...

    def release(self, slot: int) -> None:
        """Give the slot back: what read its batch has been queued by the calling thread. Does not wait."""
        ...


class FusedNetwork(Protocol):
    """The passes of a whole network for one batch size, in place of those of its layers.

    The methods do what those of `gpuback._network.backprop.Backprop` do. Results are within the same bounds.
    """

    @property
    def key(self) -> tuple[int, bool, bool]:
        """Batch size, whether it has buffers for gradients, and whether for the inputs' gradient."""
        ...

    def forward(self, x: Array, out: Array) -> None:
        """out = ŷ, (B, n_L) in A, from x (B, n_0) in A."""
        ...

    def loss(self, x: Array, y: Array, weight: Array | None) -> Array:
        """Return (1/B) Σ_b w_b ℓ(ŷ_b, y_b), a fresh 0-d array in A.

        Args:
            x: (B, n_0) in A.
            y: labels (B,) int64, or targets (B, n_L) in A.
            weight: w (B,) in A; None for 1.
        """
        ...

    def value_and_grad(
        self,
        x: Array,
        y: Array,
        weight: Array | None,
        gradients: Gradients,
        *,
        accumulate: bool = False,
    ) -> Array:
        """Return the loss; gradients.theta (+)= ∇θ; gradients.inputs = ∂loss/∂x if it is an array."""
        ...

    def step(
        self, x: Array, y: Array, weight: Array | None, gradient: Array, update: Any, clips: bool, loss: Array
    ) -> None:
        """Make a step of training by the hyper-parameters that are on the device. Only launches.

        Args:
            x, y, weight: the batch, as for `loss`.
            gradient: (n_parameters,) in A to work with; its contents afterwards are arbitrary.
            update: the optimizer's `CapturableUpdate`, of the same backend. None of its parameters is frozen.
            clips: whether the gradient is scaled down to the `clip_norm` among the hyper-parameters.
            loss: a 0-d array in A, written.
        """
        ...


Moves: TypeAlias = tuple[Array, Array] | None
"""Ẇ (nO, nI), as products read it, and ḃ (nO,) in A: how a layer's parameters move; None if they do not."""


class JetOps(Protocol):
    """Operations on jets (P, rows, n): `gpuback._core.jets` says what these are, `multipliers` what m₁, m₂, m₃ are.

    The formulas stand in `gpuback._backends.numpy.jets`. Workspaces are for P · rows rows.
    """

    def bind_jet_load(self, h: Array, workspace: Any) -> Callable[[Array, Array | None], None]:
        """Return a function (x, directions) that fills h (1 + D, rows, n_0), x's jet without seconds, rounded to O.

        x is (rows, n_0), directions (D, rows, n_0) or (D, 1, n_0), both in A; None stands for zeros.
        """
        ...

    def bind_jet_forward(
        self,
        jet: Jet,
        W: Array,
        b: Array,
        moves: Moves,
        h: Array,
        a: Array,
        m: Sequence[Array],
        activation: Activation | None,
        planes_in: int,
        workspace: Any,
    ) -> Callable[[Array], None]:
        """Return a function of h_prev (P, rows, nI) in O: h = g(a), a = h_prev Wᵀ + b, for jets.

        Args:
            W, b, activation: as `Ops.bind_forward`'s.
            moves: how W and b move.
            h: (P, rows, nO), written, rounded to O.
            a: (P, rows, nO), written; rounded to O where g' is computed from a; may be h for the output layer.
            m: arrays (rows, nO) for m₁ and those after it that are not 0 and will be needed; written.
            planes_in: how many planes of h_prev are not 0, and are read.
        """
        ...

    def bind_jet_output(
        self, jet: Jet, output: str, a: Array, dy: Array, workspace: Any, *, to_a: bool
    ) -> tuple[Array, Callable[[], object] | None, Callable[[], object] | None]:
        """Bind the output function O for jets; softmax has no second derivatives.

        Args:
            a: a_L's jet (P, rows, n_L) in A.
            dy: adjoints of ŷ's jet (P, rows, n_L) in A.
            to_a: whether they are of a_L's jet instead.

        Returns:
            ŷ's jet, which may be a; a function that computes it; and one that turns dy into da_L, rounded to O, in
            place. Either function may be None if there is nothing to do.
        """
        ...

    def bind_jet_backward(
        self,
        jet: Jet,
        da: Array,
        W: Array,
        moves: Moves,
        dh: Array | None,
        below: tuple[Activation, Array, Sequence[Array]] | None,
        planes_in: int,
        workspace: Any,
    ) -> Callable[[Array, Array | None, Array | None, bool], None]:
        """Return a function (h_prev, dW, db, accumulate): `Ops.bind_backward` for jets; dW and db may be None.

        Args:
            da: (P, rows, nO) in O.
            dh: (P, rows, nI), written, da of the layer below; None to skip it. At the network's input, without g' and
                not rounded, as many planes as are wanted.
            below: g of the layer below, the jet that its g' is computed from, and its m.
            moves, planes_in: as `bind_jet_forward`'s.
        """
        ...


class Ops(Protocol):
    """A backend: every operation on its arrays, in the order of a batch's life."""

    name: str
    """What users write as `backend=`."""

    reproducible: bool
    """Whether results have the bits that every backend gives with `reproducible=True`."""

    jets: JetOps | None
    """The operations on jets; None where there are none."""

    # Scope

    def scope(self, on_invalid: Callable[..., object] | None = None) -> AbstractContextManager[object]:
        """Return the context that computations run in: the right device is current, and infinities raise no warnings.

        Args:
            on_invalid: called when an operation on the host has made NaN of other numbers.
        """
        ...

    def bind_scope(self, on_invalid: Callable[..., object] | None = None) -> Callable[..., Any]:
        """Return a function (work, *arguments) that returns work(*arguments), run in such a scope.

        The scope is made once for many calls. One thread at a time may call the function.
        """
        ...

    # Arrays

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Make a C-contiguous array with any contents.

        Raises:
            DeviceMemoryError: the device has no room for it.
        """
        ...

    def asarray(self, value: ArrayLike, dtype: np.dtype[Any] | None, what: str) -> Array:
        """Convert real numbers of any kind to a C-contiguous array of this backend.

        Returns `value` itself where it is one already. Copies data from the host to the device where needed, never the
        other way. A number too large for `dtype` becomes infinite; subnormal numbers stay.

        Args:
            value: an array of any library, nested sequences of numbers, anything with `__dlpack__`.
            dtype: of the result; None keeps the numbers' own.
            what: the argument's name, for the message.

        Raises:
            DeviceError: an array on another device.
            DtypeError: complex numbers, text, objects, arrays that cannot be shared.
        """
        ...

    def to_array(self, value: ArrayLike, what: str) -> Array:
        """Return real numbers of any kind as an array, where they are and in their own dtype; errors as `asarray`'s.

        Callers look at its shape and dtype before they call `asarray`.
        """
        ...

    def to_numpy(self, array: Array) -> NDArray[Any]:
        """Return the numbers as a NumPy array, waiting for them; on the host it may be the array itself."""
        ...

    def to_floats(self, values: Sequence[Array | float]) -> list[float]:
        """Return losses, as the passes returned them, as Python's floats; waits once for all of them."""
        ...

    def scalar(self, value: Array | float, dtype: np.dtype[Any]) -> Array:
        """Return a loss, as the passes returned it, as a 0-d array that belongs to the caller. Does not wait."""
        ...

    def copy_for_display(self, array: Array, dtype: np.dtype[Any], factor: float = 1.0) -> Array:
        """Return a fresh C-contiguous copy of array × factor; may wait.

        Args:
            array: a buffer of a `Workspace`, of any layout.
            dtype: one that holds every value of the array.
            factor: a power of two.
        """
        ...

    def indices(self, order: NDArray[np.intp]) -> Array:
        """Return row numbers, (n,), as `take_rows` reads them."""
        ...

    def take_rows(self, array: Array, indices: Array, out: Array) -> None:
        """out = array[indices]. The indices, a part of what `indices` returned, are in range; `out` is C-contiguous."""
        ...

    def prefetch(self, slots: int) -> Prefetch:
        """Return what brings batches here ahead of the steps that read them, with so many slots."""
        ...

    def may_overlap(self, array: Array, other: Array) -> bool:
        """Tell whether two arrays may share memory. False only if they do not."""
        ...

    def any_outside(self, array: Array, highest: float) -> bool:
        """Tell whether a label or target lies outside 0 … highest; NaN does not count.

        A backend that would have to wait for the data may say False: then a label out of range makes its loss NaN.
        """
        ...

    def all_finite(self, array: Array) -> bool:
        """Tell whether no element of x (n,) is infinite or NaN. Waits."""
        ...

    def norm(self, array: Array) -> float:
        """Return √Σ x² of x (n,) in A, without overflow or underflow on the way. Waits.

        It is exact but for the last roundings where `reproducible`.
        """
        ...

    # Blocks and buffers

    def plan_blocks(
        self, sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
    ) -> tuple[int, ThreadPool]:
        """Choose how many rows of a batch go through the whole network at a time, and the threads that do it.

        The numbers decide the order of sums, so they may depend on shapes, precision and the number of threads only.

        Args:
            sizes: (n_0, …, n_L).
            batch_size: B.
            precision: of the network.
            need_gradient: False for a forward pass alone.

        Returns:
            The rows of a block, from 1 to B, and a pool whose workers take blocks; of size 1 where the device is
            parallel by itself.
        """
        ...

    def workspace(self, rows: int, sizes: tuple[int, ...], precision: Precision) -> Any:
        """Make a `Workspace` for blocks of `rows` rows, which the methods below get. It may hold scratch of theirs."""
        ...

    # Number formats, and weights as products read them

    def bind_weights(
        self, theta: Array, layout: Layout, precision: Precision
    ) -> tuple[list[Array], Callable[[], object]]:
        """Return each layer's W as products read it, and a function that refreshes these from θ.

        The function runs at the start of every batch: users may write to θ at any time, so nothing computed from θ may
        outlive a batch.

        Args:
            theta: θ, (n_parameters,) in A.
            layout: where each layer lies in θ.
            precision: of the network.

        Returns:
            W_1 … W_L, each (nO, nI): views of θ where nothing is rounded, else copies rounded to O or TF32.
        """
        ...

    def bind_load(self, width: int, precision: Precision, workspace: Any) -> Callable[[Array], Array]:
        """Return a function from x (rows, width) in A to h_0, x rounded to O: x itself where nothing is rounded."""
        ...

    # Forward

    def bind_forward(
        self, W: Array, b: Array, h: Array, a: Array | None, activation: Activation | None, workspace: Any
    ) -> Callable[[Array], None]:
        """Return a function of h_prev (rows, nI) in O: h = g(a), a = h_prev Wᵀ + b, summed in A.

        Args:
            W, b: (nO, nI) from `bind_weights`; (nO,) in A, a view of θ.
            h: (rows, nO), written, rounded to O.
            a: (rows, nO), written, or None if it is not needed later. Where g' is computed from a, a is rounded to O
                before g reads it, so that g and g' see the same a.
            activation: g. None for the output layer, whose function belongs to the loss: then h = a in A, unrounded.
            workspace: of this many rows.
        """
        ...

    def bind_output(self, name: str, a: Array, workspace: Any) -> Callable[[Array], object]:
        """Return a function of `out` (rows, n_L) in A: out = ŷ = O(a). It may overwrite a, the `Workspace.output`.

        Args:
            name: of the output function: "softmax" or an activation.
            a: (rows, n_L) in A.
            workspace: of this many rows.
        """
        ...

    def bind_output_delta(
        self, output: str, source: Array | None, da: Array, divisor: float, workspace: Any
    ) -> Callable[[Array, Array | None], object]:
        """Return a function (dy, weight): da_b = w_b J_bᵀ dy_b / divisor, rounded to O, with J_b = ∂ŷ_b/∂a_b.

        dy is (rows, n_L) in A, C-contiguous; weight is w (rows,) in A or None. With dy = ∂ℓ/∂ŷ, da is what `bind_loss`
        computes.

        Args:
            output: the name of O: "softmax" or an activation.
            source: what O' is computed from, (rows, n_L) in A, only read: a_L for an activation whose `derivative_from`
                is "a", else ŷ; None for the identity.
            da: (rows, n_L), written; the `Workspace.output_delta`.
            divisor: as `bind_loss`'s.
            workspace: of this many rows.
        """
        ...

    # Loss

    def bind_loss(
        self, loss: Loss, output: str, a: Array, da: Array, divisor: float, workspace: Any
    ) -> Callable[..., Any]:
        """Return a function (y, weight) that computes a block's loss, and da = w_b ∂ℓ_b/∂a_b / divisor, rounded to O.

        y holds labels (rows,) int64 or targets (rows, n_L) in A, or for an `OwnLoss` rows of whatever its function
        reads; weight is w (rows,) in A or None. For an `OwnLoss` this calls the user's function with ŷ
        (`gpuback._core.own_loss.call`) and goes on as `bind_output_delta`; it is never captured. The function returns
        the block's part of the loss in whatever form `mean_loss` reads. Where that is an array, a third argument says
        where to write it: a captured step may not allocate it.

        Args:
            loss, output: the loss with its options, and one of its output functions.
            a: (rows, n_L) in A.
            da: (rows, n_L), written; the `Workspace.output_delta` of a.
            divisor: B, the number of samples in the whole batch, divided by the scale that da carries.
            workspace: of this many rows.
        """
        ...

    def mean_loss(self, parts: list[Any], batch_size: int) -> Array | float:
        """Return the batch's loss (1/B) Σ_b w_b ℓ_b from what `bind_loss`'s functions returned for its blocks."""
        ...

    def bind_mean_of_blocks(
        self, rows: int, batch_size: int, dtype: np.dtype[Any]
    ) -> tuple[list[Array] | None, Callable[[list[Any]], Array | float]]:
        """Bind the loss of a batch in micro-batches: blocks of `rows` rows, the last of which may be shorter.

        Returns:
            The place for each block's loss, to be given to `bind_loss`'s function, or None if it needs none; and a
            function from what these functions returned to the batch's loss, of `dtype`.
        """
        ...

    # Backward

    def bind_backward(
        self,
        da: Array,
        W: Array,
        da_prev: Array | None,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: Any,
    ) -> Callable[[Array, Array, Array, bool], None]:
        """Return a function (h_prev, dW, db, accumulate) that takes the gradient through one layer.

            dW      (+)= daᵀ h_prev / scale       outer products of each sample, summed over the rows
            db      (+)= Σ_b da_b / scale
            da_prev   =  (da W) ⊙ g'(a_prev)      rounded to O

        h_prev is (rows, nI) in O. dW (nO, nI) and db (nO,) are in A and C-contiguous; sums are in A.

        Args:
            da: (rows, nO) in O, `scale` times the gradient of the pre-activations.
            W: (nO, nI) from `bind_weights`.
            da_prev: (rows, nI), written, carrying the same scale; None to skip it.
            activation_prev, source_prev: g of the layer below, and the array (rows, nI) that its g' is computed from:
                h or a, as `Activation.derivative_from` says. None at the network's input, where da_prev is ∂loss/∂x in
                A: without g', divided by scale, and not rounded.
            scale: a power of two.
            workspace: of this many rows.
        """
        ...

    def bind_delta(
        self,
        da: Array,
        W: Array,
        da_prev: Array,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: Any,
    ) -> Callable[[], object]:
        """Return a function without arguments: da_prev = (da W) ⊙ g'(a_prev).

        This is `bind_backward` without dW and db; arguments as its own.
        """
        ...

    def bind_gradient_scale(self, rows: int, width: int, precision: Precision) -> GradientScale:
        """Return the scale that float16 gradients carry which start from a dy (rows, width) in A."""
        ...

    def bind_layer_backward(
        self, da: Array, n_in: int, activation_prev: Activation, precision: Precision
    ) -> Callable[[Array, Array, Array, Array | None, Array, Array, Array | None, bool], None]:
        """Return a function (da, h_prev, W, source, dW, db, da_prev, accumulate): `gpuback.fused_backward`, checked.

        It is `bind_backward`'s with scale 1, for operands of the user's, given at each call: in O itself, of any
        strides and alignment that the caller did not refuse. The backend copies what it cannot read in place. No array
        is kept from call to call. One thread at a time may call it.

        Args:
            da: of the shape, dtype and strides that calls will have; not read.
            n_in: nI.
            activation_prev: g of the layer below. A call's `source` is what g' is computed from, (B, nI), or None
                without da_prev.
            precision: of the operands.

        Raises:
            OptionError: from the function, an alignment that the device cannot read.
        """
        ...

    # Each sample's own gradient: da is not divided by B, and samples do not meet before they are clipped.

    def bind_add_norms(self, da: Array, norms: Array, workspace: Any) -> Callable[[Array, bool, Array | None], None]:
        """Return a function (h_prev, first, out): norms_b = √(norms_b² + ‖da_b‖² (‖h_prev_b‖² + 1)).

        ‖da_b‖² (‖h_prev_b‖² + 1) is ‖∇W‖² + ‖∇b‖² of sample b in one layer, without forming either.

        Args:
            da: (rows, nO) in O.
            norms: (rows,) float64, updated; overwritten if `first`.
            workspace: of this many rows.

        h_prev is (rows, nI) in O. `out` is None or (rows,) in A: then out = norms, rounded.
        """
        ...

    def bind_clip(self, da: Array, norms: Array, factor: float, workspace: Any) -> Callable[[float], None]:
        """Return a function of max_norm: da_b *= factor min(1, max_norm / norms_b); NaN where the norm is not finite.

        Args:
            da: (rows, nO), updated, rounded to O.
            norms: (rows,) float64.
            factor: the same for all rows.
            workspace: of this many rows.
        """
        ...

    def bind_outer(self, da: Array, workspace: Any) -> Callable[[Array, Array, Array], None]:
        """Return a function (h_prev, dW, db): dW_b = da_b h_prev_bᵀ, db_b = da_b.

        h_prev is (rows, nI) in O. dW (rows, nO, nI) and db (rows, nO), in A, are written: views of (B, n_parameters).
        """
        ...

    # Updates

    def bind_sgd(
        self, theta: Array, velocity: Array | None, steps: int, ranges: Sequence[ParameterRange] | None = None
    ) -> Update:
        """Return SGD's update of θ, (n_parameters,) in A, and of v like it, after `steps` updates; no v, no momentum.

        A backend with a `graph_capture` returns a `CapturableUpdate`.

        Args:
            theta, velocity: updated in place.
            steps: the number of updates made before.
            ranges: the parts of θ that are trained, in ascending order, apart from each other or touching; None: all
                of θ. In range i the learning rate is η_i = η m_i, with the range's multiplier m_i, and the weight
                decay λ_i = λ, or 0 where the range does not decay: float64 products, from which the formulas go on.
                Parameters in no range are frozen. Neither they nor their state are written. Their part of the gradient
                may hold anything: no check, norm or update takes it into account.
        """
        ...

    def bind_adam(
        self,
        theta: Array,
        first_moment: Array,
        second_moment: Array,
        steps: int,
        ranges: Sequence[ParameterRange] | None = None,
    ) -> AdamUpdate:
        """Return Adam's update of θ, (n_parameters,) in A, and of m and v like it; arguments as `bind_sgd`'s."""
        ...

    def bind_loss_scale(
        self, initial: float, growth_interval: int, n_parameters: int, dtype: np.dtype[Any]
    ) -> LossScale:
        """Return a dynamic loss scale for gradients (n_parameters,) of `dtype`.

        Args:
            initial: S before the first step, a power of two.
            growth_interval: the number of updates in a row after which S is doubled.
            n_parameters, dtype: of the gradient.
        """
        ...

    @property
    def graph_capture(self) -> GraphCapture | None:
        """Return the object that captures a training step; None if a step is no sequence of launches."""
        ...

    # Whole networks at once

    def fused_network(
        self,
        architecture: Architecture,
        theta: Array,
        batch_size: int,
        *,
        need_gradient: bool = True,
        need_input_grad: bool = False,
    ) -> FusedNetwork | None:
        """Return the passes of a whole network for one batch size; None where the network goes layer by layer.

        Args:
            architecture: the network.
            theta: θ, (n_parameters,) in A, read anew by every pass.
            batch_size: B.
            need_gradient: False for `forward` and `loss` alone.
            need_input_grad: whether `value_and_grad` gives ∂loss/∂x.
        """
        ...

    # What runs, in words

    def explain_batch(self, sizes: tuple[int, ...], batch_size: int, precision: Precision) -> str:
        """Say how a batch is cut for a step of training, and who works on it."""
        ...

    def explain_network(self, architecture: Architecture, batch_size: int) -> tuple[list[str], str] | None:
        """Name the launches of a fused step, none if the network goes layer by layer, and say why.

        None on a backend without fused networks.
        """
        ...

    def explain_forward(self, batch_size: int, n_out: int, n_in: int, precision: Precision) -> str:
        """Name what runs `bind_forward`'s function."""
        ...

    def explain_backward(
        self, batch_size: int, n_out: int, n_in: int, precision: Precision, *, need_da_prev: bool
    ) -> str:
        """Name what runs `bind_backward`'s function."""
        ...
