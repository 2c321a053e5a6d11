"""Narrow networks whose passes run in the emulator as a whole, in one launch or in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from emulator import EmulatorLauncher, GuardedNumpy
from numpy.typing import NDArray

import gpuback._backends.registry
from gpuback import MLP, SGD, Adam, Gradients, TrainStep
from gpuback._backends.cuda import network_plans
from gpuback._backends.cuda.network_plans import Refusal, StepPlan, TwoLaunches, possible_fused_plan
from gpuback._backends.cuda.ops import CudaOps
from gpuback._backends.registry import Backend, BackendStatus
from gpuback._core.architecture import Architecture
from gpuback._cuda.launch import DeviceLimits, LaunchPlan
from support.kernel_layers import H200
from support.network_bounds import Expected, Near, Oracle, hold

SMALL = DeviceLimits(H200.capability, 101376, 72)
"""With an A10's shared memory. The emulator compiles for a capability, so it is the H200's."""

ALONE = replace(H200, multiprocessors=1)

DTYPES = {
    "float32": {"dtype": "float32"},
    "tf32": {"dtype": "float32", "allow_tf32": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}

LOSSES = [
    ("cross_entropy", None, False),
    ("cross_entropy", None, True),
    ("binary_cross_entropy", None, False),
    *(("squared_error", output, False) for output in ("identity", "softmax", "sigmoid", "tanh")),
]
"""Those of `fused_step`: the name, the output function, and whether targets of a cross entropy are rows."""


class WholeOps(CudaOps):
    """Whole networks also where they are faster layer by layer."""

    def _network_plan(self, architecture: Architecture, batch_size: int) -> StepPlan | TwoLaunches | Refusal:
        return possible_fused_plan(architecture, batch_size, self.launcher.limits)


class TwoLaunchOps(CudaOps):
    """Two launches also where registers hold all sums."""

    def _network_plan(self, architecture: Architecture, batch_size: int) -> StepPlan | TwoLaunches | Refusal:
        return two_launches(architecture, batch_size, self.launcher.limits)


def two_launches(architecture: Architecture, batch_size: int, limits: DeviceLimits) -> TwoLaunches:
    passes = network_plans.passes_plan(architecture, batch_size, limits, backward=True)
    weight_gradients = network_plans.weight_gradients_plan(architecture, batch_size, limits)
    assert not isinstance(passes, Refusal) and not isinstance(weight_gradients, Refusal)
    return TwoLaunches(passes, weight_gradients)


def ops_on(launcher: EmulatorLauncher, form: str = "fused_step") -> CudaOps:
    """A backend on which networks go by a "fused_step" if one fits, by "fused_passes" and more, or by "layers"."""
    if form == "layers":
        return CudaOps(GuardedNumpy(), launcher, name="on test", fuse_networks=False)
    return {"fused_step": WholeOps, "fused_passes": TwoLaunchOps}[form](GuardedNumpy(), launcher, name="on test")


def network_on(launcher: EmulatorLauncher, sizes: Sequence[int], form: str = "fused_step", **options: Any) -> MLP:
    """A network with small random biases."""
    ops = ops_on(launcher, form)
    with pytest.MonkeyPatch.context() as patch:
        backend = Backend(lambda reproducible: ops, lambda: BackendStatus(True, "emulated"))
        patch.setitem(gpuback._backends.registry.BACKENDS, "on test", backend)
        patch.setattr(Architecture, "require_learnable", lambda self: None)  # a file may hold any network
        net = MLP(sizes, backend="on test", **{"seed": 0} | options)
    rng = np.random.default_rng(len(sizes))
    for b in net.biases:
        b[...] = 0.3 * rng.standard_normal(b.shape)
    return net


@dataclass(frozen=True)
class Network:
    """A network and a batch, all by numbers that are easily written down."""

    sizes: tuple[int, ...]
    batch_size: int
    dtype: str = "bfloat16"
    activation: str | tuple[str, ...] = "tanh"
    loss: str = "cross_entropy"
    output: str | None = None
    rows: bool = False  # targets of a cross entropy are rows
    weighted: bool = False

    def on(self, launcher: EmulatorLauncher, form: str = "fused_step") -> MLP:
        described = {"activation": self.activation, "loss": self.loss, "output": self.output}
        return network_on(launcher, self.sizes, form, **described, **DTYPES[self.dtype])

    def batch(self) -> tuple[NDArray, NDArray, NDArray | None]:
        rng = np.random.default_rng([self.batch_size, *self.sizes])
        shape = self.batch_size, self.sizes[-1]
        x = rng.standard_normal((self.batch_size, self.sizes[0])).astype(np.float32)
        weight = (2 * rng.random(self.batch_size)).astype(np.float32) if self.weighted else None
        if self.loss == "cross_entropy" and not self.rows:
            return x, rng.integers(self.sizes[-1], size=self.batch_size), weight
        y = rng.standard_normal(shape) if self.loss == "squared_error" else rng.random(shape)
        if self.rows:
            y /= y.sum(axis=1, keepdims=True)
        return x, y.astype(np.float32), weight

    def expected(self, net: MLP) -> Expected:
        return Oracle(net.architecture, self.batch_size).step(net.theta, *self.batch())

    def gradients(self, net: MLP, **options: Any) -> tuple[NDArray, Gradients]:
        x, y, weight = self.batch()
        return net.value_and_grad(x, y, sample_weight=weight, **options)


def hold_gradients(net: MLP, theta: NDArray, inputs: NDArray | None, expected: Expected) -> None:
    """Holds gradients to their bounds, layer by layer."""
    layout = net.architecture.layout
    values, spreads = (layout.split(part) for part in expected.gradient)
    for name, *parts in zip("Wb", layout.split(theta), values, spreads, strict=True):
        for k, (result, value, spread) in enumerate(zip(*parts, strict=True)):
            hold(f"d{name}_{k + 1}", result, Near(value, spread))
    if inputs is not None:
        hold("dx", inputs, expected.inputs)


def described(case: dict) -> str:
    sizes, batch_size = case["shape"]
    widths = "-".join(map(str, sizes))
    return (
        f"{batch_size}x{widths} {case['dtype']} {case['activation']} {case['loss'][0]} {case['loss'][1]} {case['form']}"
    )


class Planner(EmulatorLauncher):
    """Notes which variants it is asked for, and launches nothing."""

    def bind(self, plan: LaunchPlan, /, **_: Any) -> Any:
        self.variants.add(plan.variant)
        return lambda *values: None


def run_everything(launcher: EmulatorLauncher, form: str, network: Network, quick: bool = False) -> tuple[bytes, ...]:
    """The bits of all that passes and steps of training give."""
    x, y, weight = network.batch()
    net = network.on(launcher, form)
    value, gradients = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
    net.value_and_grad(x, y, out=gradients, accumulate=True)
    results = [value, gradients.theta, net.forward(x), net.loss(x, y)]
    value, gradients = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
    results += [value, gradients.theta, gradients.inputs]
    for optimizer, clip_norm in [(Adam(0.01), None), (SGD(0.01, 0.9), 0.1)][quick:]:
        net = network.on(launcher, form)
        step = TrainStep(net, optimizer, clip_norm=clip_norm)
        results += [step(x, y, weight) for _ in range(2)]
        results += [net.theta, optimizer._update.state, *(m for m in optimizer._update.moments if m is not None)]
    return tuple(array.tobytes() for array in results)
