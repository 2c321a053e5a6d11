"""The CUDA backend: the operations of `NumpyOps` as launches of gpuback's kernels.

Launches are laid out when an operation is bound; running it fills in what changed and launches. Nothing waits for the
GPU: the loss stays on it, and so does the decision whether a step is made.

16-bit values are stored as such, rows padded to 16 bytes, which asynchronous copies need. The array module and what
launches come from outside, so that NumPy arrays and the emulator can stand in for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from gpuback._backends.cuda import layer_plans, row_plans
from gpuback._backends.cuda.arguments import (
    ints,
    labels_and_targets,
    loss_id,
    loss_parameters,
    matrices,
    output_cases,
    output_id,
)
from gpuback._backends.cuda.arrays import pitch_for
from gpuback._backends.cuda.formats import accum_of, uses_tensor_cores
from gpuback._backends.cuda.fused_network import CudaFusedNetwork
from gpuback._backends.cuda.gradient_scale import CudaGradientScale
from gpuback._backends.cuda.layers import CudaLayers
from gpuback._backends.cuda.network_plans import Refusal, StepPlan, TwoLaunches, fused_plan, step_plan
from gpuback._backends.cuda.per_sample import CudaPerSample
from gpuback._backends.cuda.updates import AdamUpdate, CudaLossScale, SGDUpdate
from gpuback._backends.cuda.workspace import CudaBuffers, CudaWorkspace
from gpuback._backends.protocol import JetOps
from gpuback._core import own_loss
from gpuback._core.activation_names import derivative_of_output
from gpuback._core.architecture import Architecture
from gpuback._core.integers import ceil_div
from gpuback._core.losses import Loss, OwnLoss
from gpuback._core.parameters import Layout, ParameterRange
from gpuback._core.precision import Precision
from gpuback._core.threads import ThreadPool
from gpuback._core.typing import Array
from gpuback._cuda.hopper import switch_in_words
from gpuback._cuda.launch import Launch, Launcher, Slot


class CudaOps(CudaLayers, CudaPerSample):
    """Every operation on CuPy arrays of one device.

    Args:
        xp, launcher, name, device: see `CudaArrays`.
        fuse_networks: narrow networks are taken as a whole, in a launch or two; else all go layer by layer.
    """

    jets: JetOps | None = None
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
        super().__init__(xp, launcher, name=name, device=device)
        self._fuse_networks = fuse_networks

    def workspace(self, rows: int, sizes: tuple[int, ...], precision: Precision) -> CudaWorkspace:
        return CudaWorkspace(self, rows, sizes, precision)

    def plan_blocks(
        self, sizes: tuple[int, ...], batch_size: int, precision: Precision, *, need_gradient: bool = True
    ) -> tuple[int, ThreadPool]:
        """Take the whole batch as one block."""
        return batch_size, ThreadPool(1, blas_alone=False)

    # Passes

    def bind_weights(
        self, theta: Array, layout: Layout, precision: Precision
    ) -> tuple[list[Array], Callable[[], object]]:
        """Bind each W as products read it: on tensor cores a padded copy in the operands' format, all by one launch."""
        if not uses_tensor_cores(precision):
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
        launch = self.launcher.bind(
            row_plans.copy_plan("copy_weights", row, precision),
            theta=theta,
            copies=flat,
            table=self.xp.asarray(table, np.int64),
            **ints(layers=len(layout.shapes)),
        )
        return copies, launch

    def bind_load(self, width: int, precision: Precision, workspace: CudaBuffers) -> Callable[[Array], Array]:
        """Bind a function from the samples to h_0, rounded to the operands' dtype."""
        if not precision.sixteen_bit:
            return _itself
        h_0 = workspace.hidden(width)
        rows = workspace.rows
        launch = self.launcher.bind(
            row_plans.copy_plan("copy_rows", rows, precision),
            x_bi=Slot(),
            **matrices(out_bi=h_0),
            **ints(x_pitch=width, n_batch=rows, n=width),
        )

        def load(x: Array) -> Array:
            launch(x)
            return h_0

        return load

    def bind_loss(
        self, loss: Loss, output: str, a: Array, da: Array, divisor: float, workspace: CudaWorkspace
    ) -> Callable[..., Array]:
        """Bind da = w_b ∂ℓ_b/∂a_b / divisor and the mean over the batch of w_b ℓ_b.

        A label that is out of range makes its loss and its row of da NaN, a count below 0 its loss.

        Returns:
            A function of y, w and an array for the mean, by default a fresh one; it returns the mean, a 0-d array.
        """
        if isinstance(loss, OwnLoss):
            return self._bind_own_loss(loss, output, a, da, divisor, workspace)
        precision, (rows, width) = workspace.precision, a.shape
        total: Any = precision.accumulator.type
        plan = row_plans.loss_plan(rows, precision)
        launch = self.launcher.bind(
            plan,
            **matrices(a_bj=a, da_bj=da),
            labels_b=Slot(),
            targets_bj=Slot(),
            weight_b=Slot(),
            mean_loss=Slot(),
            **ints(n_batch=rows, n=width, loss=loss_id(loss), output=output_id(output)),
            parameters=loss_parameters(self.xp, loss, width, precision.accumulator),
            divisor=total(divisor),
            partials=self.xp.empty(plan.grid, np.float64),
            arrivals=workspace.counters,
        )

        def loss_and_delta(y: Array, weight: Array | None, mean: Array | None = None) -> Array:
            if mean is None:
                mean = self.xp.empty((), precision.accumulator)
            launch(*labels_and_targets(y), weight, mean)
            return mean

        return loss_and_delta

    def _bind_own_loss(
        self, loss: OwnLoss, output: str, a: Array, da: Array, divisor: float, workspace: CudaWorkspace
    ) -> Callable[..., Array]:
        """Bind a user's function: a launch for ŷ before it, and one for da and the mean of its losses after it."""
        dtype = workspace.precision.accumulator
        y_hat = self.empty(a.shape, dtype)
        to_output = self.bind_output(output, a, workspace)
        plan = row_plans.output_delta_plan(len(a), workspace.precision)
        losses = {
            "losses_b": Slot(),
            "mean_loss": Slot(),
            "partials": self.xp.empty(plan.grid, np.float64),
            "arrivals": workspace.counters,
        }
        launch = self._bind_delta_launch(
            output, a if derivative_of_output(output) == "a" else y_hat, da, divisor, workspace, losses
        )

        def loss_and_delta(y: Array, weight: Array | None, mean: Array | None = None) -> Array:
            to_output(y_hat)
            function = own_loss.require_function(loss.function, loss.name)
            pair = own_loss.call(function, loss.name, y_hat, y, self.xp.ndarray, self.name)
            values, gradient = (self.xp.ascontiguousarray(part, dtype=dtype) for part in pair)
            if mean is None:
                mean = self.xp.empty((), dtype)
            launch(gradient, weight, values, mean)
            return mean

        return loss_and_delta

    def mean_loss(self, parts: list[Array], batch_size: int) -> Array:
        """Return the loss of the batch, which is one block."""
        (mean,) = parts
        return mean

    def bind_mean_of_blocks(
        self, rows: int, batch_size: int, dtype: np.dtype[Any]
    ) -> tuple[list[Array], Callable[[list[Any]], Array]]:
        """Bind the mean of blocks' losses as one launch; see `gpuback._backends.protocol.Ops`."""
        blocks = ceil_div(batch_size, rows)
        means = self.xp.empty(blocks, dtype)
        launch = self.launcher.bind(
            row_plans.vector_plan("mean_of_blocks", 1, accum_of(dtype)),
            means=means,
            mean=Slot(),
            **ints(n_blocks=blocks, rows=rows, n_batch=batch_size),
        )

        def mean(parts: list[Any]) -> Array:
            out = self.xp.empty((), dtype)
            launch(out)
            return out

        return [means[i : i + 1].reshape(()) for i in range(blocks)], mean

    def bind_output(self, name: str, a: Array, workspace: CudaWorkspace) -> Callable[[Array], object]:
        """Bind out = ŷ = O(a) as a function of out."""
        (rows, width), cases = a.shape, output_cases(name)
        return self.launcher.bind(
            cases.added_to(row_plans.output_plan(rows, workspace.precision)),
            **matrices(a_bj=a),
            out_bj=Slot(),
            **ints(out_pitch=width, n_batch=rows, n=width, output=cases.numbers[0]),
        )

    def bind_output_delta(
        self, output: str, source: Array | None, da: Array, divisor: float, workspace: CudaWorkspace
    ) -> Callable[[Array, Array | None], object]:
        """Bind da = w_b J_bᵀ dy_b / divisor as a function of dy and w; see `gpuback._backends.protocol.Ops`."""
        no_losses = dict.fromkeys(("losses_b", "mean_loss", "partials", "arrivals"))
        return self._bind_delta_launch(output, source, da, divisor, workspace, no_losses)

    def _bind_delta_launch(
        self,
        output: str,
        source: Array | None,
        da: Array,
        divisor: float,
        workspace: CudaWorkspace,
        losses: dict[str, Any],
    ) -> Launch:
        precision, (rows, width) = workspace.precision, da.shape
        total: Any = precision.accumulator.type
        cases = output_cases(output)
        return self.launcher.bind(
            cases.added_to(row_plans.output_delta_plan(rows, precision)),
            dy_bj=Slot(),
            weight_b=Slot(),
            **matrices(source_bj=source, da_bj=da),
            **ints(dy_pitch=width, n_batch=rows, n=width, output=cases.numbers[0]),
            divisor=total(divisor),
            **losses,
        )

    def bind_gradient_scale(self, rows: int, width: int, precision: Precision) -> CudaGradientScale:
        return CudaGradientScale(self, rows, width, precision)

    # Updates

    @property
    def graph_capture(self) -> Launcher | None:
        """The launcher. Bound functions of a training step, its update included, only launch."""
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
        """Return the passes of a narrow network, a launch or two each; None for others."""
        plan = self._network_plan(architecture, batch_size)
        if isinstance(plan, Refusal):
            return None
        return CudaFusedNetwork(self, architecture, theta, plan, (batch_size, need_gradient, need_input_grad))

    def _network_plan(self, architecture: Architecture, batch_size: int) -> StepPlan | TwoLaunches | Refusal:
        if not self._fuse_networks:
            return Refusal("so this backend was asked to")
        return fused_plan(architecture, batch_size, self.launcher.limits)

    def bind_sgd(
        self, theta: Array, velocity: Array | None, steps: int, ranges: Sequence[ParameterRange] | None = None
    ) -> SGDUpdate:
        return SGDUpdate(self.xp, self.launcher, theta, velocity, steps, ranges)

    def bind_adam(
        self,
        theta: Array,
        first_moment: Array,
        second_moment: Array,
        steps: int,
        ranges: Sequence[ParameterRange] | None = None,
    ) -> AdamUpdate:
        return AdamUpdate(self.xp, self.launcher, theta, first_moment, second_moment, steps, ranges)

    def bind_loss_scale(
        self, initial: float, growth_interval: int, n_parameters: int, dtype: np.dtype[Any]
    ) -> CudaLossScale:
        return CudaLossScale(self, initial, growth_interval, n_parameters, dtype)

    def norm(self, array: Array) -> float:
        """Compute √Σ x² without overflow or underflow on the way, and wait for it."""
        plan = row_plans.vector_plan("vector_norm", array.size, accum_of(array.dtype))
        result = self.xp.empty((), np.float64)
        partials, arrivals = self.xp.empty(3 * plan.grid, np.float64), self.xp.zeros(1, np.uint32)
        workspace = {"partials": partials, "arrivals": arrivals}
        self.launcher.bind(plan, x=array, n=np.int64(array.size), result=result, **workspace)()
        return float(result)

    def all_finite(self, array: Array) -> bool:
        """Say whether no element is infinite or NaN."""
        return math.isfinite(self.norm(array)) or bool(np.isfinite(self.to_numpy(array)).all())

    # Explanations

    def explain_batch(self, sizes: tuple[int, ...], batch_size: int, precision: Precision) -> str:
        return "the whole batch at once"

    def explain_network(self, architecture: Architecture, batch_size: int) -> tuple[list[str], str]:
        """List the launches of a fused step, none if it goes layer by layer; and say why."""
        launches, why = self._network_in_words(architecture, batch_size)
        switch = switch_in_words(self.launcher.limits) if architecture.precision.sixteen_bit else ""
        return launches, f"{why}; {switch}" if switch else why

    def _network_in_words(self, architecture: Architecture, batch_size: int) -> tuple[list[str], str]:
        plan = self._network_plan(architecture, batch_size)
        if isinstance(plan, Refusal):
            return [], plan.reason
        if isinstance(plan, StepPlan):
            return plan.in_words, "a block has room for all weights, and its registers for the sums of all gradients"
        step = step_plan(architecture, batch_size, self.launcher.limits)
        return plan.in_words, step.reason if isinstance(step, Refusal) else "so this backend was asked to"

    def explain_forward(self, batch_size: int, n_out: int, n_in: int, precision: Precision) -> str:
        """Name the kernel of a layer's forward pass."""
        plan = layer_plans.forward_plan(batch_size, n_out, n_in, precision, self.launcher.limits)
        return f"{plan.launch.variant.entry}, {plan.launch.grid} blocks"

    def explain_backward(
        self, batch_size: int, n_out: int, n_in: int, precision: Precision, *, need_da_prev: bool
    ) -> str:
        """Name the kernel of a layer's backward pass."""
        plan = layer_plans.layer_plan(
            batch_size, n_out, n_in, precision, self.launcher.limits, need_da_prev=need_da_prev
        )
        return f"{plan.launch.variant.entry}, {plan.why}"


def _nothing() -> None:
    """Do nothing: no operand is rounded."""


def _itself(array: Array) -> Array:
    """Return the array: no operand is rounded."""
    return array
