"""The CUDA backend: the operations of `NumpyOps` as launches of gpuback's kernels.

Launches are laid out when an operation is bound; running it fills in what changed and launches. Nothing waits for the
GPU: the loss stays on it, and so does the decision whether a step is made.

16-bit values are stored as such, rows padded to 16 bytes, which asynchronous copies need. The array module and what
launches come from outside, so that NumPy arrays and the emulator can stand in for a GPU.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._backends.cuda import plans
from gpuback._backends.cuda.fused_network import CudaFusedNetwork, TwoLaunches, gradient_plan
from gpuback._backends.cuda.loss_scale import CudaLossScale
from gpuback._backends.cuda.network_plans import StepPlan, step_plan
from gpuback._backends.cuda.per_sample import CudaPerSample
from gpuback._backends.cuda.updates import AdamUpdate, SGDUpdate
from gpuback._backends.cuda.workspace import CudaBuffers, CudaWorkspace, pitch_for, pitch_of
from gpuback._backends.inputs import DLPACK_CUDA, as_host_array, dlpack_device, from_dlpack, is_real
from gpuback._core.activations import ACTIVATIONS, Activation
from gpuback._core.architecture import Architecture
from gpuback._core.losses import Loss
from gpuback._core.parameters import Layout
from gpuback._core.precision import Precision
from gpuback._core.threads import ThreadPool
from gpuback._core.typing import Array, ArrayLike
from gpuback._cuda.launch import Argument, Launch, Launcher, Slot
from gpuback.errors import DeviceError, DeviceMemoryError, OptionError

IDENTITY = ACTIVATIONS["identity"].kernel_id
KEPT_LAUNCHES = 64
"""For how many shapes `fused_backward` keeps what it has laid out, on each thread."""

SOFTMAX = -1
"""How kernels know the output function that is no activation."""


class CudaOps(CudaPerSample):
    """Every operation on CuPy arrays of one device.

    Args:
        xp: CuPy, or what stands in for it.
        launcher: what runs kernels.
        name: of the backend.
        device: a context in which `launcher`'s device is the current one.
        fuse_networks: narrow networks are taken as a whole, in a launch or two; else all go layer by layer.
    """

    reproducible = False

    def __init__(
        self,
        xp: Any,
        launcher: Launcher,
        *,
        name: str = "cupy",
        device: AbstractContextManager[object] | None = None,
        fuse_networks: bool = True,
    ) -> None:
        self.name = name
        self._takes_networks = fuse_networks
        self.xp = xp
        self.launcher = launcher
        self._device = nullcontext() if device is None else device
        self._laid_out = threading.local()

    def scope(self, on_invalid: Callable[..., object] | None = None) -> AbstractContextManager[object]:
        return self._device

    def bind_scope(self, on_invalid: Callable[..., object]) -> Callable[..., Any]:
        def run(work: Callable[..., Any], *arguments: Any) -> Any:
            with self._device:
                return work(*arguments)

        return run

    def workspace(self, rows: int, sizes: tuple[int, ...], precision: Precision) -> CudaWorkspace:
        return CudaWorkspace(self, rows, sizes, precision)

    def plan_blocks(
        self, sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
    ) -> tuple[int, ThreadPool]:
        """The whole batch at once."""
        return batch_size, ThreadPool(1, blas_alone=False)

    # Passes

    def bind_weights(
        self, theta: Array, layout: Layout, precision: Precision
    ) -> tuple[list[Array], Callable[[], object]]:
        """Each W as products read it: on tensor cores a padded copy in the operands' format, all made by one launch."""
        if not plans.uses_tensor_cores(precision):
            return list(layout.split(theta)[0]), _nothing
        table, row, place = [], 0, 0
        for (n_in, n_out), start in zip(layout.shapes, layout.weight_starts, strict=True):
            pitch = pitch_for(n_in, precision.operand)
            table.append((row, n_in, start, place, pitch))
            row, place = row + n_out, place + n_out * pitch
        table.append((row, 0, 0, 0, 0))
        flat = self.xp.empty(place, precision.operand)
        copies = [
            flat[place : place + n_out * pitch].reshape(n_out, pitch)[:, :n_in]
            for (n_in, n_out), (_, _, _, place, pitch) in zip(layout.shapes, table, strict=False)
        ]
        arguments = [theta, flat, self.xp.asarray(table, np.int64), _int(len(layout.shapes))]
        return copies, self.launcher.bind(plans.copy_plan("copy_weights", row, precision), arguments)

    def bind_load(self, width: int, precision: Precision, workspace: CudaBuffers) -> Callable[[Array], Array]:
        """A function from the samples to the h_0 that products read: rounded to the operands' dtype."""
        if not precision.sixteen_bit:
            return _itself
        h_0 = workspace.hidden(width)
        rows = workspace.rows
        launch = self.launcher.bind(
            plans.copy_plan("copy_rows", rows, precision),
            [Slot(), _int(width), h_0, pitch_of(h_0), _int(rows), _int(width)],
        )

        def load(x: Array) -> Array:
            launch(x)
            return h_0

        return load

    def bind_forward(
        self, W: Array, b: Array, h: Array, a: Array | None, activation: Activation | None, workspace: CudaWorkspace
    ) -> Callable[[Array], None]:
        """h = g(a), a = h_prev Wᵀ + b, in one launch; see `NumpyOps.bind_forward`."""
        precision, (n_out, n_in) = workspace.precision, W.shape
        plan = plans.forward_plan(len(h), n_out, n_in, precision, self.launcher.limits)
        tensor_cores = plans.uses_tensor_cores(precision)
        kind = IDENTITY if activation is None else activation.kernel_id
        launches: dict[np.int32, Launch] = {}

        def forward(h_prev: Array) -> None:
            pitch = pitch_of(h_prev)
            launch = launches.get(pitch)
            if launch is None:
                out = [h, pitch_of(h)] + ([_int(activation is None)] if tensor_cores else [])
                kept = [a, _int(0) if a is None else pitch_of(a)]
                shape = [_int(len(h)), _int(n_out), _int(n_in), _int(kind)]
                launch = self.launcher.bind(plan, [Slot(), pitch, W, pitch_of(W), b, *kept, *out, *shape])
                launches[pitch] = launch
            launch(h_prev)

        return forward

    def bind_loss(
        self, loss: Loss, output: str, a: Array, da: Array, divisor: float, workspace: CudaWorkspace
    ) -> Callable[..., Array]:
        """The mean over the batch of w_b ℓ_b, a 0-d array, and da = w_b ∂ℓ_b/∂a_b / divisor, as a function of y and w,
        and of where the mean goes: a fresh array, if that is not given.

        A label that is out of range makes its loss and its row of da NaN.
        """
        precision, (rows, width) = workspace.precision, a.shape
        total: Any = precision.accumulator.type
        plan = plans.loss_plan(rows, precision)
        launch = self.launcher.bind(
            plan,
            [
                *(a, pitch_of(a)),
                *(Slot(), Slot(), Slot()),  # labels, targets, weight
                *(da, pitch_of(da)),
                Slot(),  # the mean loss
                *(_int(rows), _int(width), _int(loss.kernel_id), _int(output_id(output)), total(divisor)),
                *(self.xp.empty(plan.grid, np.float64), workspace.counters),
            ],
        )

        def loss_and_delta(y: Array, weight: Array | None, mean: Array | None = None) -> Array:
            if mean is None:
                mean = self.xp.empty((), precision.accumulator)
            labels, targets = (y, None) if y.ndim == 1 else (None, y)
            launch(labels, targets, weight, mean)
            return mean

        return loss_and_delta

    def mean_loss(self, parts: list[Array], batch_size: int) -> Array:
        """The batch's loss, which `bind_loss` gave for the batch as one block."""
        (mean,) = parts
        return mean

    def bind_mean_of_blocks(
        self, rows: int, batch_size: int, dtype: np.dtype[Any]
    ) -> tuple[list[Array], Callable[[list[Any]], Array]]:
        """See `gpuback._backends.protocol.Ops`: one launch."""
        blocks = -(-batch_size // rows)
        means = self.xp.empty(blocks, dtype)
        launch = self.launcher.bind(
            plans.vector_plan("mean_of_blocks", 1, plans.real_of(dtype)),
            [means, _int(blocks), _int(rows), _int(batch_size), Slot()],
        )

        def mean(parts: list[Any]) -> Array:
            out = self.xp.empty((), dtype)
            launch(out)
            return out

        return [means[i : i + 1].reshape(()) for i in range(blocks)], mean

    def bind_output(self, name: str, a: Array, workspace: CudaWorkspace) -> Callable[[Array], object]:
        """out = ŷ = O(a), as a function of out."""
        rows, width = a.shape
        return self.launcher.bind(
            plans.output_plan(rows, workspace.precision),
            [a, pitch_of(a), Slot(), _int(width), _int(rows), _int(width), _int(output_id(name))],
        )

    def bind_backward(
        self,
        da: Array,
        W: Array,
        da_prev: Array | None,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: CudaWorkspace,
    ) -> Callable[[Array, Array, Array, bool], None]:
        """dW, db and da_prev in one launch; see `NumpyOps.bind_backward`."""
        precision, (n_out, n_in), rows = workspace.precision, W.shape, len(da)
        plan = plans.layer_plan(rows, n_out, n_in, precision, self.launcher.limits, need_da_prev=da_prev is not None)
        launches: dict[np.int32, Launch] = {}

        def bind(h_pitch: np.int32) -> Launch:
            return self._bind_layer(
                plan,
                precision,
                (rows, n_out, n_in),
                [*_rows(da), Slot(), h_pitch, *_rows(W), *_rows(source_prev), *_rows(da_prev)],
                prev_as_sums=da_prev is not None and da_prev.dtype == precision.accumulator,
                activation=IDENTITY if activation_prev is None else activation_prev.kernel_id,
                prev_factor=1.0 / scale if activation_prev is None else 1.0,
                factor=1.0 / scale,
                workspace=[workspace.partials, workspace.counters, workspace.tickets],
            )

        def backward(h_prev: Array, dW: Array, db: Array, accumulate: bool) -> None:
            pitch = pitch_of(h_prev)
            launch = launches.get(pitch)
            if launch is None:
                launch = launches[pitch] = bind(pitch)
            launch(h_prev, dW, db, accumulate)

        return backward

    def bind_delta(
        self,
        da: Array,
        W: Array,
        da_prev: Array,
        activation_prev: Activation,
        source_prev: Array,
        workspace: CudaWorkspace,
    ) -> Callable[[], object]:
        """da_prev by itself, as dW's launch without an item of dW; see `NumpyOps.bind_delta`."""
        precision, (n_out, n_in), rows = workspace.precision, W.shape, len(da)
        launch = self._bind_layer(
            plans.delta_plan(rows, n_out, n_in, precision, self.launcher.limits),
            precision,
            (rows, n_out, n_in),
            [*_rows(da), *_rows(None), *_rows(W), *_rows(source_prev), *_rows(da_prev)],
            prev_as_sums=False,
            activation=activation_prev.kernel_id,
            prev_factor=1.0,
            factor=1.0,
            workspace=[None, None, workspace.tickets],
        )
        return partial(launch, None, None, False)

    def _bind_layer(
        self,
        plan: plans.LayerPlan,
        precision: Precision,
        shape: tuple[int, int, int],
        matrices: list[Argument],
        *,
        prev_as_sums: bool,
        activation: int,
        prev_factor: float,
        factor: float,
        workspace: list[Argument],
    ) -> Launch:
        """The launch of a layer's backward pass, with slots for dW, db and accumulate, and those among its `matrices`.

        Those are da, h, W, source and da_prev, each with its pitch.
        """
        total: Any = precision.accumulator.type
        flag = [_int(prev_as_sums)] if plans.uses_tensor_cores(precision) else []
        chains = [_int(plan.chains.count), _int(plan.chains.group_size), _int(plan.chains.rows)]
        return self.launcher.bind(
            plan.launch,
            [
                *(*matrices, *flag, Slot(), Slot(), *map(_int, shape), _int(activation)),
                *(total(prev_factor), total(factor), Slot(np.int32)),
                *(*chains, *(workspace if plan.draws else workspace[:-1])),
            ],
        )

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
    ) -> None:
        """`gpuback.fused_backward`, its arguments checked. What is laid out for a shape is kept for the next call."""
        for array in (da, h_prev, W, source, dW, db, da_prev):
            self._require_aligned(array)
        da, h_prev, W, source = (self._walkable(array) for array in (da, h_prev, W, source))
        pitches = [None if array is None else pitch_of(array) for array in (da, h_prev, W, source, da_prev)]
        key = (len(da), *W.shape, precision, activation_prev.name, *pitches)
        launches: dict[Any, tuple[Launch, plans.LayerPlan]] = self._laid_out.__dict__.setdefault("launches", {})
        if key not in launches:
            if len(launches) >= KEPT_LAUNCHES:
                launches.pop(next(iter(launches)))
            need = da_prev is not None
            plan = plans.layer_plan(len(da), *W.shape, precision, self.launcher.limits, need_da_prev=need)
            matrices = [x for pitch in pitches for x in ([None, _int(0)] if pitch is None else [Slot(), pitch])]
            launch = self._bind_layer(
                plan,
                precision,
                (len(da), *W.shape),
                matrices,
                prev_as_sums=False,
                activation=activation_prev.kernel_id,
                prev_factor=1.0,
                factor=1.0,
                workspace=[Slot(), Slot(), Slot()],
            )
            launches[key] = launch, plan
        launch, plan = launches[key]
        # Fresh for each call: calls on different streams may be under way together.
        partials = self.empty(plan.partials, precision.accumulator)
        counters = self.xp.zeros(plan.counters + 1, np.uint32)
        given = [array for array in (da, h_prev, W, source, da_prev) if array is not None]
        launch(*given, dW, db, accumulate, partials, counters, *([counters[-1:]] if plan.draws else []))

    def _require_aligned(self, array: Array | None) -> None:
        """GPUs read a number only at a multiple of its size."""
        if array is not None and not isinstance(array, np.ndarray):
            address = self.launcher.address(array)
            if address % array.itemsize:
                raise OptionError(
                    f"expected arrays whose elements lie at multiples of their size, "
                    f"got one of {array.dtype} at address {address:#x}"
                )

    def _walkable(self, array: Array | None) -> Array | None:
        """A matrix whose rows are contiguous and lie one after the other: itself, or a copy."""
        if array is None or (
            array.strides[1] == array.itemsize
            and array.strides[0] >= array.shape[1] * array.itemsize
            and array.strides[0] % array.itemsize == 0
        ):
            return array
        return self.xp.ascontiguousarray(array)

    def may_overlap(self, array: Array, other: Array) -> bool:
        """Whether two arrays may share memory: whether the bytes from the first to the last of each do."""
        first, after = self._extent(array)
        other_first, other_after = self._extent(other)
        return first < other_after and other_first < after

    def _extent(self, array: Array) -> tuple[int, int]:
        first = after = self.launcher.address(array)
        for length, stride in zip(array.shape, array.strides, strict=True):
            if stride < 0:
                first += (length - 1) * stride
            else:
                after += (length - 1) * stride
        return first, after + array.itemsize

    # Updates

    @property
    def recorder(self) -> Launcher | None:
        """What is bound for a step of training, its update too, only launches."""
        return self.launcher

    def fused_network(
        self,
        architecture: Architecture,
        theta: Array,
        batch_size: int,
        *,
        need_gradient: bool = True,
        need_input_grad: bool = False,
    ) -> CudaFusedNetwork | None:
        """The passes of a narrow network, a launch or two each; None for others."""
        plan = self._network_plan(architecture, batch_size)
        if isinstance(plan, str):
            return None
        return CudaFusedNetwork(self, architecture, theta, plan, (batch_size, need_gradient, need_input_grad))

    def _network_plan(self, architecture: Architecture, batch_size: int) -> StepPlan | TwoLaunches | str:
        if not self._takes_networks:
            return "so this backend was asked to"
        return gradient_plan(architecture, batch_size, self.launcher.limits)

    def bind_sgd(self, theta: Array, velocity: Array | None, steps: int) -> SGDUpdate:
        return SGDUpdate(self.xp, self.launcher, theta, velocity, steps)

    def bind_adam(self, theta: Array, first_moment: Array, second_moment: Array, steps: int) -> AdamUpdate:
        return AdamUpdate(self.xp, self.launcher, theta, first_moment, second_moment, steps)

    def bind_loss_scale(
        self, initial: float, growth_interval: int, n_parameters: int, dtype: np.dtype[Any]
    ) -> CudaLossScale:
        return CudaLossScale(self, initial, growth_interval, n_parameters, dtype)

    def norm(self, array: Array) -> float:
        """√Σ x², without overflow or underflow on the way; waits for it."""
        plan = plans.vector_plan("vector_norm", array.size, plans.real_of(array.dtype))
        result = self.xp.empty((), np.float64)
        partials, arrivals = self.xp.empty(3 * plan.grid, np.float64), self.xp.zeros(1, np.uint32)
        self.launcher.bind(plan, [array, np.int64(array.size), result, partials, arrivals])()
        return float(result)

    def all_finite(self, array: Array) -> bool:
        """Whether no element is infinite or NaN."""
        return math.isfinite(self.norm(array)) or bool(np.isfinite(self.to_numpy(array)).all())

    def any_outside(self, array: Array, highest: int) -> bool:
        """Whether an element lies outside 0 … highest, if that is seen on the host.

        Data on the GPU are not looked at, which would mean to wait for it: the kernels turn a label that is out of
        range into NaN.
        """
        return isinstance(array, np.ndarray) and bool(array.min() < 0 or array.max() > highest)

    # Arrays

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array, not yet written to.

        Raises:
            DeviceMemoryError: the device has no room for it.
        """
        try:
            return self.xp.empty(shape, dtype)
        except MemoryError as error:
            needed = math.prod((shape,) if isinstance(shape, int) else shape) * np.dtype(dtype).itemsize
            raise DeviceMemoryError(
                f"{needed:,} bytes of the device's memory are needed for an array of shape {shape}, and there is no "
                f"room: {error}. Remedy: a smaller batch"
            ) from error

    def padded(self, rows: int, columns: int, dtype: np.dtype[Any]) -> Array:
        """A matrix whose rows start at multiples of 16 bytes."""
        return self.empty((rows, pitch_for(columns, dtype)), dtype)[:, :columns]

    def scalar(self, value: Array | float, dtype: np.dtype[Any]) -> Array:
        """A 0-d array: the loss itself, which every step makes anew."""
        return value

    def copy_for_display(self, array: Array, dtype: np.dtype[Any], factor: float = 1.0) -> Array:
        """A fresh C-ordered copy in `dtype`, times a power of two; by way of the host, to look at."""
        copy = np.array(self.to_numpy(array), dtype, order="C")
        return self.xp.asarray(copy * copy.dtype.type(factor))

    def to_floats(self, values: Sequence[Array]) -> list[float]:
        return [float(value) for value in self.to_numpy(self.xp.stack(list(values)))] if values else []

    def indices(self, order: NDArray[np.intp]) -> Array:
        return self.xp.asarray(order)

    def take_rows(self, array: Array, indices: Array, out: Array) -> None:
        self.xp.take(array, indices, axis=0, out=out)

    def to_numpy(self, array: Array) -> NDArray[Any]:
        return array if isinstance(array, np.ndarray) else self.xp.asnumpy(array)

    def to_array(self, value: ArrayLike, what: str) -> Array:
        """Real numbers of any kind as an array, of whatever dtype, where they are: for a look before `asarray`."""
        array = self._on_device(value, what)
        return as_host_array(value, None, what) if array is None else array

    def _on_device(self, value: ArrayLike, what: str) -> Array | None:
        """An array in a GPU's memory; None for data on the host."""
        if isinstance(value, np.ndarray):
            return None
        if isinstance(value, self.xp.ndarray):
            return value
        if hasattr(value, "__dlpack__") and dlpack_device(value, what)[0] in DLPACK_CUDA:
            return from_dlpack(value, what, self.xp.from_dlpack)
        return None

    def asarray(self, value: ArrayLike, dtype: np.dtype[Any] | None, what: str) -> Array:
        """Real numbers of any kind as a C-contiguous array of `dtype` on this device; data on the host are copied.

        Raises:
            DeviceError: an array on another device.
            DtypeError: complex numbers, text, objects.
        """
        array = self._on_device(value, what)
        if array is None:
            return self.xp.asarray(as_host_array(value, dtype, what))
        self._require_aligned(array)
        device = getattr(self.launcher, "device_id", None)
        if device is not None and array.device.id != device:
            raise DeviceError(f"{what}: expected data on CUDA device {device}, got an array on {array.device.id}")
        if dtype is None or array.dtype == dtype:
            if not is_real(array.dtype):
                as_host_array(np.empty(0, array.dtype), dtype, what)  # raises, in the words that NumPy users see
            return self.xp.ascontiguousarray(array)
        return self._converted(array, dtype, what)

    def _converted(self, array: Array, dtype: np.dtype[Any], what: str) -> Array:
        """Floats by way of the host: CuPy's own conversions take subnormal numbers for 0. Integers on the device."""
        if array.dtype.kind in "biu":
            return self.xp.ascontiguousarray(array.astype(dtype))
        return self.xp.asarray(as_host_array(self.to_numpy(array), dtype, what))

    # In words

    def explain_network(self, architecture: Architecture, batch_size: int) -> tuple[list[str], str]:
        """The launches of a whole step, none if it goes layer by layer; and why so."""
        plan = self._network_plan(architecture, batch_size)
        if isinstance(plan, str):
            return [], plan
        if isinstance(plan, StepPlan):
            one = f"network_narrow, {plan.launch.grid} blocks, slabs of {plan.rows} rows, {plan.sums.chains}"
            return [one], "a block has room for all weights, and its registers for the sums of all gradients"
        chain, weights = plan
        kept = "all weights" if chain.all_weights else "one layer's weights"
        both = [
            f"network_chain, {chain.launch.grid} blocks, slabs of {chain.rows} rows beside {kept}, {chain.chains}",
            f"{weights.launch.variant.entry}, {weights.launch.grid} blocks, for each layer {weights.sums.chains}",
        ]
        return both, str(step_plan(architecture, batch_size, self.launcher.limits))

    def explain_forward(self, batch_size: int, n_out: int, n_in: int, precision: Precision) -> str:
        """What runs a layer's forward pass."""
        plan = plans.forward_plan(batch_size, n_out, n_in, precision, self.launcher.limits)
        return f"{plan.variant.entry}, {plan.grid} blocks"

    def explain_backward(
        self, batch_size: int, n_out: int, n_in: int, precision: Precision, *, need_da_prev: bool
    ) -> str:
        """What runs a layer's backward pass."""
        plan = plans.layer_plan(batch_size, n_out, n_in, precision, self.launcher.limits, need_da_prev=need_da_prev)
        return f"{plan.launch.variant.entry}, {plan.why}"


def _int(value: int) -> np.int32:
    return np.int32(value)


def _rows(matrix: Array | None) -> list[Argument]:
    """A matrix as kernels take it: where it begins, and its pitch."""
    return [None, _int(0)] if matrix is None else [matrix, pitch_of(matrix)]


def output_id(name: str) -> int:
    """The kernels' number for an output function."""
    return SOFTMAX if name == "softmax" else ACTIVATIONS[name].kernel_id


def _nothing() -> None:
    """What there is to do where nothing is rounded."""


def _itself(array: Array) -> Array:
    """What products read where nothing is rounded."""
    return array
