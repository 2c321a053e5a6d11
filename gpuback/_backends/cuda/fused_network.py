"""The passes of a narrow network on CUDA in a launch or two, in place of `Backprop`'s layer by layer.

One launch (network/fused_step.cu) or two (network/fused_passes.cu, network/fused_weight_gradients.cu) make the forward
pass, the loss, the backward pass and, in training, the optimizer's update. Clipping needs the gradient's norm first,
which takes one launch more; so do learning rates or weight decay that are not the same for all of θ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from gpuback._backends.cuda import network_plans
from gpuback._backends.cuda.arguments import ints, labels_and_targets, loss_id, loss_parameters, output_id
from gpuback._backends.cuda.arrays import CudaArrays
from gpuback._backends.cuda.network_plans import PassesPlan, StepPlan, TwoLaunches, WeightGradientsPlan
from gpuback._backends.cuda.updates import CudaUpdate
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array
from gpuback._cuda.launch import Argument, Launch, Slot

KEEP_GRADIENT, DECIDE = 0, 1
"""Keep the gradient and make no step; keep it and decide whether there is a step. As `OptimizerKind` in
kernels/network/reduce_and_step.cuh."""

OUTPUTS, LOSS, GRADIENTS = 0, 1, 2
"""What `fused_passes` is asked for."""


class CudaFusedNetwork:
    """The passes of one narrow network for one batch size; see `gpuback._network.backprop.Backprop`."""

    def __init__(
        self,
        arrays: CudaArrays,
        architecture: Architecture,
        theta: Array,
        plan: StepPlan | TwoLaunches,
        key: tuple[int, bool, bool],
    ) -> None:
        self.key = key
        batch_size, need_gradient, _ = key
        self._arrays, self._architecture, self._theta, self._batch_size = arrays, architecture, theta, batch_size
        self._plan = plan
        precision = architecture.precision
        scale = precision.gradient_scale(batch_size)
        total: Any = precision.accumulator.type
        self._divisor, self._factor = total(batch_size / scale), total(1.0 / scale)
        self._steps: WeakKeyDictionary[CudaUpdate, dict[bool, Callable[..., None]]] = WeakKeyDictionary()
        limits, xp = arrays.launcher.limits, arrays.xp
        self._depth = len(architecture.sizes) - 1
        if not need_gradient:
            forward = network_plans.passes_plan(architecture, batch_size, limits, backward=False)
            assert isinstance(forward, PassesPlan)  # what has room for the backward pass has it without
            self._losses = arrays.empty(forward.split.splits, np.dtype(np.float64))
            self._counters = xp.zeros(network_plans.COUNTERS, np.uint32)
            self._forward = {
                wanted: self._bind_passes(forward, xp.asarray(forward.layout.view(np.int32)), wanted, None)
                for wanted in (OUTPUTS, LOSS)
            }
            return
        if isinstance(plan, StepPlan):
            layout, sums, splits = plan.layout, plan.sums, plan.sums.split.splits
        else:
            layout, sums, splits = plan.passes.layout, plan.weight_gradients.sums, plan.passes.split.splits
        self._layout = xp.asarray(layout.view(np.int32))
        self._partials = arrays.empty(sums.partials, precision.accumulator)
        self._squares, self._counters = xp.zeros(sums.slots, np.float64), xp.zeros(sums.counters, np.uint32)
        self._losses = arrays.empty(splits, np.dtype(np.float64))
        if isinstance(plan, TwoLaunches):
            self._workspace = arrays.empty(plan.passes.columns * batch_size, precision.operand)
            self._passes = self._bind_passes(plan.passes, self._layout, GRADIENTS, self._workspace)
        no_optimizer = dict.fromkeys(("first_state", "second_state", "hyper", "state"))
        self._gradient = self._bind_step(KEEP_GRADIENT, no_optimizer)

    def forward(self, x: Array, out: Array) -> None:
        """out = ŷ, (B, n_L)."""
        self._forward[OUTPUTS](x, None, None, None, out, None, None)

    def loss(self, x: Array, y: Array, weight: Array | None) -> Array:
        """(1/B) Σ_b w_b ℓ(ŷ_b, y_b)."""
        mean = self._fresh_loss()
        self._forward[LOSS](x, *labels_and_targets(y), weight, None, None, mean)
        return mean

    def value_and_grad(
        self, x: Array, y: Array, weight: Array | None, gradients: Gradients, *, accumulate: bool = False
    ) -> Array:
        """Return the loss; write or add its gradients to `gradients`, ∂loss/∂x too if it has an array for it."""
        mean = self._fresh_loss()
        self._gradient(x, y, weight, gradients.theta, accumulate, gradients.inputs, mean)
        return mean

    def step(
        self, x: Array, y: Array, weight: Array | None, gradient: Array, update: CudaUpdate, clips: bool, loss: Array
    ) -> None:
        """Make a step of training by the hyper-parameters on the device. It only launches.

        Args:
            x, y, weight: the batch.
            gradient: (n_parameters,) to work with.
            update: the optimizer's; none of its parameters is frozen.
            clips: whether the gradient's norm is brought down to `clip_norm`.
            loss: where the loss goes.
        """
        launches = self._steps.setdefault(update, {})
        decide = clips or not update.uniform  # the gradient is kept, and the update's own launch follows
        if clips not in launches:
            kind = DECIDE if decide else update.kernel_id
            first, second = update.moments
            state = {"first_state": first, "second_state": second, "hyper": update.hyper, "state": update.state}
            launches[clips] = self._bind_step(kind, state)
        launches[clips](x, y, weight, gradient, False, None, loss)
        if decide:
            update.launch_step(gradient)

    def _fresh_loss(self) -> Array:
        return self._arrays.empty((), self._architecture.precision.accumulator)

    def _batch(self) -> dict[str, Argument]:
        """Describe a batch, with slots for the samples, labels, targets and weights."""
        slots = {name: Slot() for name in ("x_bi", "labels_b", "targets_bj", "weight_b")}
        return slots | ints(layers=self._depth, n_batch=self._batch_size)

    def _loss_options(self) -> dict[str, Argument]:
        architecture = self._architecture
        loss, output = loss_id(architecture.loss_row), output_id(architecture.output)
        return ints(loss=loss, output=output) | {"divisor": self._divisor}

    def _bind_passes(self, plan: PassesPlan, layout: Array, wanted: int, workspace: Array | None) -> Launch:
        """Bind a function of the samples, labels, targets, weights, ŷ, dx and the mean loss."""
        loss, width = self._architecture.loss_row, self._architecture.sizes[-1]
        return self._arrays.launcher.bind(
            plan.launch,
            layout=layout,
            theta=self._theta,
            **self._batch(),
            **self._loss_options(),
            parameters=loss_parameters(self._arrays.xp, loss, width, self._theta.dtype),
            out_bj=Slot(),
            dx_bi=Slot(),
            mean_loss=Slot(),
            factor=self._factor,
            **ints(all_weights=plan.all_weights, wanted=wanted, tile_b=plan.tile_b),
            **ints(rows_per_split=plan.split.rows_per_split, n_splits=plan.split.splits),
            workspace=workspace,
            losses=self._losses,
            counters=self._counters,
        )

    def _bind_step(self, kind: int, state: dict[str, Array | None]) -> Callable[..., None]:
        """Bind a function of the samples, targets, weights, the gradient, accumulate, dx and the mean loss."""
        plan, bind = self._plan, self._arrays.launcher.bind
        update: dict[str, Argument] = {
            "layout": self._layout,
            "theta": self._theta,
            **ints(n_parameters=self._theta.size, optimizer=kind),
            **state,
            "gradient": Slot(),
            "accumulate": Slot(np.int32),
            "factor": self._factor,
        }
        if isinstance(plan, StepPlan):
            launch = bind(
                plan.launch,
                **self._batch(),
                **self._loss_options(),
                **update,
                dx_bi=Slot(),
                mean_loss=Slot(),
                **self._sums(plan),
            )

            def run(x: Array, y: Array, weight: Array | None, *outputs: Any) -> None:
                launch(x, *labels_and_targets(y), weight, *outputs)

            return run
        passes = self._passes
        add_up = bind(
            plan.weight_gradients.launch,
            **ints(layers=self._depth, n_batch=self._batch_size, loss_count=plan.passes.split.splits),
            workspace=self._workspace,
            **update,
            mean_loss=Slot(),
            **self._sums(plan.weight_gradients),
        )

        def run_both(
            x: Array, y: Array, weight: Array | None, gradient: Array, accumulate: bool, dx: Array | None, loss: Array
        ) -> None:
            passes(x, *labels_and_targets(y), weight, None, dx, None)
            add_up(gradient, accumulate, loss)

        return run_both

    def _sums(self, plan: StepPlan | WeightGradientsPlan) -> dict[str, Argument]:
        """Describe the split of sums over the batch, and their workspace."""
        split = plan.sums.split
        # By wgmma a batch tile always has 128 rows.
        tile_b = {} if plan.launch.variant.wgmma else ints(tile_b=plan.tile_b)
        return {
            **tile_b,
            **ints(n_fragments=plan.sums.fragments),
            **ints(rows_per_split=split.rows_per_split, n_splits=split.splits, group_size=split.group_size),
            "partials": self._partials,
            "losses": self._losses,
            "squares": self._squares,
            "counters": self._counters,
        }
