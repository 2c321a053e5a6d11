"""The passes of a narrow network on CUDA, a launch or two each: what `Backprop` does layer by layer.

In one launch (kernels/network_narrow.cu) or two (network_chain.cu) go forward pass, loss, backward pass and, in a step
of training, the optimizer's update. Clipping needs the gradient's norm first, and is one launch more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from gpuback._backends.cuda import network_plans
from gpuback._backends.cuda.network_plans import ChainPlan, StepPlan, SumsPlan, WeightsPlan
from gpuback._backends.cuda.updates import CudaUpdate
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array
from gpuback._cuda.launch import Argument, DeviceLimits, Launch, Slot

if TYPE_CHECKING:
    from gpuback._backends.cuda.ops import CudaOps

KEEP_GRADIENT, DECIDE = 0, 1
"""What the kernels do with a gradient, besides the optimizers' steps: keep it; keep it and settle whether there is a
step. As in kernels/network_totals.cuh."""

OUTPUTS, LOSS, GRADIENTS = 0, 1, 2
"""What `network_chain` is asked for."""


class TwoLaunches(NamedTuple):
    """The plans of a step in two launches."""

    chain: ChainPlan
    weights: WeightsPlan


def gradient_plan(architecture: Architecture, batch_size: int, limits: DeviceLimits) -> StepPlan | TwoLaunches | str:
    """How a narrow network's step is launched; or, in words, why it goes layer by layer."""
    plan = possible_plan(architecture, batch_size, limits)
    rows = plan.rows if isinstance(plan, StepPlan) else None
    return plan if isinstance(plan, str) else network_plans.drawback(architecture, rows) or plan


def possible_plan(architecture: Architecture, batch_size: int, limits: DeviceLimits) -> StepPlan | TwoLaunches | str:
    """How a narrow network's step could be launched, whether or not that is the fastest."""
    reason = network_plans.refusal(architecture, limits)
    if reason is not None:
        return reason
    step = network_plans.step_plan(architecture, batch_size, limits)
    if isinstance(step, StepPlan):
        return step
    chain = network_plans.chain_plan(architecture, batch_size, limits, backward=True)
    weights = network_plans.weights_plan(architecture, batch_size, limits)
    if isinstance(chain, str) or isinstance(weights, str):
        return chain if isinstance(chain, str) else str(weights)
    return TwoLaunches(chain, weights)


class CudaFusedNetwork:
    """The passes of one narrow network for one batch size; see `gpuback._network.backprop.Backprop`."""

    def __init__(
        self,
        ops: CudaOps,
        architecture: Architecture,
        theta: Array,
        plan: StepPlan | TwoLaunches,
        key: tuple[int, bool, bool],
    ) -> None:
        self.key = key
        batch_size, need_gradient, _ = key
        self._ops, self._architecture, self._theta, self._batch_size = ops, architecture, theta, batch_size
        self._plan = plan
        precision = architecture.precision
        scale = precision.gradient_scale(batch_size)
        total: Any = precision.accumulator.type
        self._divisor, self._factor = total(batch_size / scale), total(1.0 / scale)
        self._steps: WeakKeyDictionary[CudaUpdate, dict[bool, Callable[..., None]]] = WeakKeyDictionary()
        limits, xp = ops.launcher.limits, ops.xp
        self._depth = _int(len(architecture.sizes) - 1)
        if not need_gradient:
            forward = network_plans.chain_plan(architecture, batch_size, limits, backward=False)
            assert isinstance(forward, ChainPlan)  # what has room for the backward pass has it without
            self._losses = ops.empty(forward.chains.count, np.dtype(np.float64))
            self._counters = xp.zeros(network_plans.COUNTERS, np.uint32)
            self._forward = {
                wanted: self._bind_chain(forward, xp.asarray(forward.layout), wanted, None)
                for wanted in (OUTPUTS, LOSS)
            }
            return
        plans = (plan,) if isinstance(plan, StepPlan) else plan
        self._layout = xp.asarray(plans[0].layout)
        sums, chains = plans[-1].sums, plans[-1].sums.chains.count
        self._partials = ops.empty(sums.partials, precision.accumulator)
        self._squares, self._counters = xp.zeros(sums.slots, np.float64), xp.zeros(sums.counters, np.uint32)
        if isinstance(plan, TwoLaunches):
            chains = plan.chain.chains.count
            self._workspace = ops.empty(plan.chain.columns * batch_size, precision.operand)
        self._losses = ops.empty(chains, np.dtype(np.float64))
        if isinstance(plan, TwoLaunches):
            self._chain = self._bind_chain(plan.chain, self._layout, GRADIENTS, self._workspace)
        self._gradient = self._bind_step(KEEP_GRADIENT, [None, None, None, None])

    def forward(self, x: Array, out: Array) -> None:
        """out = ŷ, (B, n_L)."""
        self._forward[OUTPUTS](x, None, None, None, out, None, None)

    def loss(self, x: Array, y: Array, weight: Array | None) -> Array:
        """(1/B) Σ_b w_b ℓ(ŷ_b, y_b)."""
        mean = self._fresh_loss()
        self._forward[LOSS](x, *_targets(y), weight, None, None, mean)
        return mean

    def value_and_grad(
        self, x: Array, y: Array, weight: Array | None, gradients: Gradients, *, accumulate: bool = False
    ) -> Array:
        """The loss; its gradients into (or, accumulating, onto) `gradients`, ∂loss/∂x too if there is room for it."""
        mean = self._fresh_loss()
        self._gradient(x, y, weight, gradients.theta, accumulate, gradients.inputs, mean)
        return mean

    def step(
        self, x: Array, y: Array, weight: Array | None, gradient: Array, update: CudaUpdate, clips: bool, loss: Array
    ) -> None:
        """A step of training by the hyper-parameters that lie on the device; nothing but launches.

        Args:
            x, y, weight: the batch.
            gradient: (n_parameters,) to work with; it holds ∇θ afterwards only if the step `clips`.
            update: the optimizer's.
            clips: whether the gradient's norm is brought down to `clip_norm`.
            loss: where the loss goes.
        """
        launches = self._steps.setdefault(update, {})
        if clips not in launches:
            kind = DECIDE if clips else update.kernel_id
            launches[clips] = self._bind_step(kind, [*update.moments, update.hyper, update.state])
        launches[clips](x, y, weight, gradient, False, None, loss)
        if clips:
            update.launch_step(gradient)

    def _fresh_loss(self) -> Array:
        return self._ops.empty((), self._architecture.precision.accumulator)

    def _loss_options(self) -> list[Argument]:
        from gpuback._backends.cuda.ops import output_id

        architecture = self._architecture
        return [_int(architecture.loss_row.kernel_id), _int(output_id(architecture.output)), self._divisor]

    def _bind_chain(self, plan: ChainPlan, layout: Array, wanted: int, workspace: Array | None) -> Launch:
        """A function of the samples, labels, targets, weights, ŷ, dx and the mean loss."""
        batch = [Slot(), Slot(), Slot(), Slot(), _int(self._batch_size)]
        return self._ops.launcher.bind(
            plan.launch,
            [
                *(layout, self._depth, _int(plan.all_weights), *batch, _int(wanted)),
                *(
                    *self._loss_options(),
                    self._factor,
                    _int(plan.rows),
                    _int(plan.chains.rows),
                    _int(plan.chains.count),
                ),
                self._theta,
                *(Slot(), Slot(), Slot(), workspace, self._losses, self._counters),
            ],
        )

    def _bind_step(self, kind: int, state: list[Array | None]) -> Callable[..., None]:
        """A function of the samples, targets, weights, the gradient, accumulate, dx and the mean loss."""
        plan, bind = self._plan, self._ops.launcher.bind
        update = [self._theta, _int(self._theta.size), _int(kind), *state, Slot(), Slot(np.int32), self._factor]
        if isinstance(plan, StepPlan):
            batch = [Slot(), Slot(), Slot(), Slot(), _int(self._batch_size)]
            launch = bind(
                plan.launch,
                [
                    *(self._layout, self._depth, *batch, *self._loss_options()),
                    *(_int(plan.rows), *_chains(plan.sums), *update, Slot(), Slot()),
                    *(self._partials, self._losses, self._squares, self._counters, _int(plan.sums.pieces)),
                ],
            )

            def run(x: Array, y: Array, weight: Array | None, *outputs: Any) -> None:
                launch(x, *_targets(y), weight, *outputs)

            return run
        chain, weights = self._chain, plan.weights
        add_up = bind(
            weights.launch,
            [
                *(self._layout, self._depth, self._workspace, _int(self._batch_size)),
                *(_int(weights.rows), *_chains(weights.sums), *update, Slot(), self._partials, self._losses),
                *(_int(plan.chain.chains.count), self._squares, self._counters, _int(weights.sums.pieces)),
            ],
        )

        def run_both(
            x: Array, y: Array, weight: Array | None, gradient: Array, accumulate: bool, dx: Array | None, loss: Array
        ) -> None:
            chain(x, *_targets(y), weight, None, dx, None)
            add_up(gradient, accumulate, loss)

        return run_both


def _chains(sums: SumsPlan) -> list[Argument]:
    return [_int(sums.chains.rows), _int(sums.chains.count), _int(sums.chains.group_size)]


def _targets(y: Array) -> tuple[Array | None, Array | None]:
    """Labels and targets, of which there is one."""
    return (y, None) if y.ndim == 1 else (None, y)


def _int(value: int) -> np.int32:
    return np.int32(value)
