"""What a backend must do, which backend serves which arrays, and the one operation that users call by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpuback._typing import Array, ArrayLike
from gpuback.activations import ACTIVATIONS, Activation
from gpuback.architecture import Architecture
from gpuback.errors import BackendError, DeviceError, DtypeError, OptionError, ShapeError, require_known
from gpuback.gradients import Gradients
from gpuback.losses import Loss
from gpuback.ops.numpy_ops import NumpyOps
from gpuback.ops.team import Team
from gpuback.parameters import Layout
from gpuback.precision import DTYPES, Precision


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
        halt: bool = False,
        **hyper_parameters: Any,
    ) -> None:
        """One update of θ and of the optimizer's state, unless `loss` or the gradient is not finite.

        It runs in `Ops.scope(self.note_invalid)`.

        Args:
            gradient: ∇θ, (n_parameters,).
            loss: the loss it belongs to; None makes the update whatever the gradient is.
            clip_norm: the gradient's norm is brought down to it.
            halt: no more updates once a loss or gradient was not finite.
            hyper_parameters: of this kind of optimizer.
        """
        ...

    def note_invalid(self, *what: Any) -> None:
        """Takes note that some operation on the host has made NaN of other numbers."""
        ...

    def glance(self) -> int | None:
        """`diverged_at` as of some moment not long ago, without waiting."""
        ...


class LossScale(Protocol):
    """A dynamic loss scale S on a backend: a power of two; see `gpuback.ops.numpy_loss_scale`."""

    state: tuple[float, int, int]
    """S, how many steps in a row have made an update since it last changed, and how many in all have made none. On a
    GPU, reading it waits for what is under way."""

    def scaled(self, weight: Array | None, batch_size: int) -> Array:
        """S w_b, or S without weights; good until the next call."""
        ...

    def unscale(self, gradient: Array, loss: Any) -> Array | float:
        """Takes S out of the gradient, in place; the loss without it."""
        ...

    def settle(self, update: Any) -> None:
        """Draws the conclusion, after an update or none."""
        ...


class Recorder(Protocol):
    """What repeats a sequence of launches at once; see `gpuback.cuda.launch.Launcher`."""

    def record(self, work: Callable[[], object]) -> Callable[[], None]: ...
    def capturing(self) -> bool: ...
    def copy(self, source: Array, target: Array) -> None: ...


class WholePasses(Protocol):
    """The passes of a network that a backend takes as a whole, not layer by layer.

    What `gpuback.backprop.Backprop` does, and a step of training.
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
    def share_out(
        self, sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
    ) -> tuple[int, Team]: ...

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
    def recorder(self) -> Recorder | None:
        """What can record a step of training; None where it is no sequence of launches."""
        ...

    def whole_passes(
        self,
        architecture: Architecture,
        theta: Array,
        batch_size: int,
        *,
        need_gradient: bool = True,
        need_input_grad: bool = False,
    ) -> WholePasses | None:
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
    def shown(self, array: Array, dtype: np.dtype[Any], factor: float = 1.0) -> Array: ...
    def to_floats(self, values: Sequence[Array | float]) -> list[float]: ...
    def received(self, value: ArrayLike, what: str) -> Array: ...
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


class BackendStatus(NamedTuple):
    """Whether a backend can be used on this machine, and why or why not."""

    available: bool
    reason: str


def _numpy_status() -> BackendStatus:
    return BackendStatus(True, f"NumPy {np.__version__}, always there")


@functools.cache
def _cupy_status() -> BackendStatus:
    try:
        import cupy
    except ImportError as error:
        return BackendStatus(
            False, f"CuPy cannot be imported ({error}); pip install '.[cuda12]' or '.[cuda13]' in gpuback's source tree"
        )
    try:
        if not cupy.is_available():
            return BackendStatus(False, "CuPy is installed, but finds no CUDA device or no driver")
        cupy.empty(1)
        name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
    except RuntimeError as error:
        return BackendStatus(False, f"CuPy finds a CUDA device, but cannot use it: {error}")
    return BackendStatus(True, f"CuPy {cupy.__version__} on {name}")


def _numpy_ops(reproducible: bool) -> Ops:
    if reproducible:
        from gpuback.ops.reproducible_numpy import ReproducibleNumpyOps

        return ReproducibleNumpyOps()
    return NumpyOps()


def _cupy_ops(reproducible: bool) -> Ops:
    """On CuPy's current device."""
    import cupy

    return _cupy_ops_on(cupy.cuda.runtime.getDevice(), reproducible)


@functools.cache
def _cupy_ops_on(device_id: int, reproducible: bool) -> Ops:
    import cupy

    from gpuback.cuda.device import CudaLauncher
    from gpuback.ops.cuda_ops import CudaOps

    device = cupy.cuda.Device(device_id) if cupy.cuda.runtime.getDeviceCount() > 1 else None
    if reproducible:
        from gpuback.cuda.blas import bind_multiply
        from gpuback.ops.reproducible_cuda import ReproducibleCudaOps

        return ReproducibleCudaOps(cupy, CudaLauncher(device_id), bind_multiply(), device=device)
    return CudaOps(cupy, CudaLauncher(device_id), device=device)


class Backend(NamedTuple):
    """How to make a backend's operations (reproducible ones or not), and whether they can be used here."""

    make: Callable[[bool], Ops]
    status: Callable[[], BackendStatus]


BACKENDS = {"numpy": Backend(_numpy_ops, _numpy_status), "cupy": Backend(_cupy_ops, _cupy_status)}


def backends() -> dict[str, BackendStatus]:
    """Every backend that gpuback knows, whether this machine can use it, and why or why not."""
    return {name: backend.status() for name, backend in BACKENDS.items()}


def ops_for(name: str, *, reproducible: bool = False) -> Ops:
    """The backend of that name; "auto" is the fastest that can be used here.

    Args:
        name: of the backend.
        reproducible: its operations that give the same bits as every other backend's.

    Raises:
        OptionError: an unknown name.
        BackendError: it cannot be used on this machine; the message says why.
    """
    require_known("backend", name, (*BACKENDS, "auto"))
    if name == "auto":
        name = "cupy" if BACKENDS["cupy"].status().available else "numpy"
    status = BACKENDS[name].status()
    if not status.available:
        raise BackendError(f"backend {name!r} cannot be used here: {status.reason}. backend='numpy' always works")
    return BACKENDS[name].make(reproducible)


def fused_backward(
    da: Array,
    h_prev: Array,
    W: Array,
    *,
    activation_prev: str = "identity",
    a_prev: Array | None = None,
    need_da_prev: bool = True,
    allow_tf32: bool = False,
    dW: Array | None = None,
    db: Array | None = None,
    da_prev: Array | None = None,
    accumulate: bool = False,
) -> tuple[Array, Array, Array | None]:
    """One layer's backward pass: its weights' and biases' gradients and the gradient of the pre-activations below.

        dW      (+)= daᵀ h_prev          outer products of each sample, summed over the batch
        db      (+)= Σ_b da[b]
        da_prev   =  (da W) ⊙ g'(a_prev)

    Sums are float32 for 16-bit operands. Nothing is converted: all operands have one dtype and one backend. Inputs may
    be strided; outputs are C-contiguous.

    Args:
        da: (B, nO) ∂loss/∂a of this layer.
        h_prev: (B, nI) the layer's input.
        W: (nO, nI) its weights. float64, float32, bfloat16 or float16, like da and h_prev.
        activation_prev: g of the layer below, whose output is h_prev.
        a_prev: (B, nI) the pre-activations below; needed for gelu and silu, whose g' does not follow from h_prev.
        need_da_prev: False skips da_prev (the first layer's input needs no gradient).
        allow_tf32: float32 products may round their operands to TF32.
        dW, db, da_prev: arrays to write to: (nO, nI) and (nO,) in float32 (float64 for float64 operands), and (B, nI)
            in the operands' dtype. Fresh ones by default.
        accumulate: add to dW and db (which must be given) instead of overwriting them.

    Returns:
        (dW, db, da_prev); da_prev is None if it was not wanted.

    Raises:
        DeviceError: arrays of different backends or devices.
        DtypeError, ShapeError: an array does not fit the others; an output is not C-contiguous.
        BackendError: the GPU has no tensor cores for these operands, or the kernel cannot be compiled.
        OptionError: an unknown activation, a_prev missing, accumulate without dW and db, an output that overlaps an
            input.
    """
    named = {"da": da, "h_prev": h_prev, "W": W, "a_prev": a_prev, "dW": dW, "db": db, "da_prev": da_prev}
    ops = ops_of({name: array for name, array in named.items() if array is not None or name in ("da", "h_prev", "W")})
    require_known("activation", activation_prev, ACTIVATIONS)
    activation = ACTIVATIONS[activation_prev]
    precision = _common_precision(da, h_prev, W, allow_tf32)
    batch_size, n_out, n_in = _layer_shape(da, h_prev, W)
    if activation.derivative_from == "a" and need_da_prev:
        if a_prev is None:
            raise OptionError(f"a_prev: {activation_prev}'s derivative needs the pre-activations below, and got None")
        _require(a_prev, "a_prev", (batch_size, n_in), precision.operand)
    if accumulate and (dW is None or db is None):
        raise OptionError("accumulate=True adds to dW and db: expected both, got None")
    if da_prev is not None and not need_da_prev:
        raise OptionError("da_prev was given, but need_da_prev=False says that it is not wanted")

    dW = _output(ops, dW, "dW", (n_out, n_in), precision.total, named)
    db = _output(ops, db, "db", (n_out,), precision.total, named)
    if need_da_prev:
        da_prev = _output(ops, da_prev, "da_prev", (batch_size, n_in), precision.operand, named)
    source = None
    if need_da_prev:
        source = a_prev if activation.derivative_from == "a" else h_prev
    with ops.scope():
        ops.layer_backward(da, h_prev, W, source, activation, precision, dW, db, da_prev, accumulate)
    return dW, db, da_prev


def ops_of(arrays: dict[str, Array]) -> Ops:
    """The backend that all arrays belong to.

    Raises:
        DtypeError: something that is no array.
        DeviceError: arrays of different backends or devices, or of a library that is none of them.
    """
    for name, array in arrays.items():
        if not hasattr(array, "__dlpack__"):
            raise DtypeError(
                f"{name}: expected a numpy.ndarray or a cupy.ndarray (nothing is converted here), "
                f"got {type(array).__name__}"
            )
    kinds = {type(array) for array in arrays.values()}
    if kinds == {np.ndarray}:
        return NumpyOps()
    homes = {name: _home(array) for name, array in arrays.items()}
    home = next(iter(homes.values()))
    if len(set(homes.values())) > 1 or not home.startswith((NUMPY_HOME, CUPY_HOME)):
        raise DeviceError(
            "expected arrays of NumPy, or of CuPy on one device, got "
            + ", ".join(f"{name}: {home}" for name, home in homes.items())
        )
    if home == NUMPY_HOME:  # of a subclass
        return NumpyOps()
    return _cupy_ops_on(next(iter(arrays.values())).device.id, reproducible=False)


NUMPY_HOME, CUPY_HOME = "numpy.ndarray", "cupy.ndarray on device"


def _home(array: Array) -> str:
    """Where an array lives, in words."""
    if isinstance(array, np.ndarray):
        return NUMPY_HOME
    kind = f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}"
    return f"{CUPY_HOME} {array.device.id}" if kind == "cupy.ndarray" else f"{kind}, another library's"


def _common_precision(da: Array, h_prev: Array, W: Array, allow_tf32: bool) -> Precision:
    if not da.dtype == h_prev.dtype == W.dtype or da.dtype not in DTYPES.values():
        raise DtypeError(
            f"da, h_prev and W: expected one dtype out of {', '.join(DTYPES)} for all three, "
            f"got {da.dtype}, {h_prev.dtype} and {W.dtype}"
        )
    return _precision(da.dtype, allow_tf32)


_precision = functools.cache(lambda dtype, allow_tf32: Precision.of(dtype, allow_tf32=allow_tf32))


def _layer_shape(da: Array, h_prev: Array, W: Array) -> tuple[int, int, int]:
    for name, array, axes in (("da", da, "(B, nO)"), ("h_prev", h_prev, "(B, nI)"), ("W", W, "(nO, nI)")):
        if array.ndim != 2 or 0 in array.shape:
            raise ShapeError(f"{name}: expected shape {axes} with at least one element, got {array.shape}")
    if da.shape[0] != h_prev.shape[0] or W.shape != (da.shape[1], h_prev.shape[1]):
        raise ShapeError(
            f"expected da (B, nO), h_prev (B, nI) and W (nO, nI), "
            f"got da {da.shape}, h_prev {h_prev.shape} and W {W.shape}"
        )
    return da.shape[0], da.shape[1], h_prev.shape[1]


def _require(array: Array, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if array.shape != shape:
        raise ShapeError(f"{name}: expected shape {shape}, got {array.shape}")
    if array.dtype != dtype:
        raise DtypeError(f"{name}: expected dtype {dtype}, got {array.dtype}")


def _output(
    ops: Ops,
    array: Array | None,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    named: dict[str, Array | None],
) -> Array:
    """The array to write a result to: the caller's, once it is known to fit and to overlap no other, or a fresh one."""
    if array is None:
        return ops.empty(shape, dtype)
    _require(array, name, shape, dtype)
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise OptionError(f"{name}: expected a writeable array, got a read-only one")
    if not array.flags.c_contiguous:
        raise ShapeError(f"{name}: expected a C-contiguous array, got strides {array.strides} for shape {shape}")
    for other, value in named.items():
        if other == name:
            break  # outputs that follow are held against this one in their turn
        if value is not None and ops.may_overlap(array, value):
            raise OptionError(f"{name}: expected an array of its own, got one that shares memory with {other}")
    return array
