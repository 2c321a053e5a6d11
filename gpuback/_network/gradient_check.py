"""Gradient checks: back-propagation against finite differences of the loss, and against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._core.losses import AbsoluteError, BinaryCrossEntropy, CrossEntropy, Huber, Quantile, SquaredError
from gpuback._core.precision import TF32_ROUNDOFF, UNIT_ROUNDOFF
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array, ArrayLike
from gpuback._network.inputs import as_batch
from gpuback._network.mlp import MLP
from gpuback._network.trace import Trace
from gpuback.errors import DataError

FORMULA_LIMIT = 1e-6
"""The five-point formula at steps of 1e-4 to 1e-6 in float64 leaves 1e-8 at most; a wrong formula, far more."""

DIRECTIONS = 4
"""Random directions per block: each sees an error in any of the block's elements."""


NEARBY = 1e-6
"""How far the output layer is moved, relative to the bound of its error, to see what its gradient does."""


@dataclass(frozen=True)
class BlockCheck:
    """The check of one parameter block.

    Attributes:
        block: "W1", "b1", …, or "inputs".
        formula_error: the float64 gradient against finite differences: the largest error of a directional derivative,
            relative to its expected size.
        rounding_error: the network's own gradient against the float64 one, in Euclidean norm, relative to what it would
            be off by if every operation rounded its operands and results by as much as themselves.
        rounding_limit: how large that may be: the relative size of the dtype's roundings.
    """

    block: str
    formula_error: float
    rounding_error: float
    rounding_limit: float

    @property
    def passed(self) -> bool:
        return self.formula_error <= FORMULA_LIMIT and self.rounding_error <= self.rounding_limit


@dataclass(frozen=True)
class GradientReport:
    """The result of `check_gradients`: a row per parameter block; `print` shows a table.

    Attributes:
        rows: the blocks.
        samples: how many samples were used; samples next to a kink of relu and its kin were left out.
    """

    rows: tuple[BlockCheck, ...]
    samples: int

    @property
    def passed(self) -> bool:
        """Every block is within its limits."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'block':<8} {'formula error':>14} {'rounding error':>15} {'limit':>8}"]
        for row in self.rows:
            verdict = "" if row.passed else "  FAILED"
            figures = f"{row.formula_error:>14.1e} {row.rounding_error:>15.1e} {row.rounding_limit:>8.0e}"
            lines.append(f"{row.block:<8} {figures}{verdict}")
        verdict = "passed" if self.passed else "FAILED"
        lines.append(f"{verdict}: formula limit {FORMULA_LIMIT:.0e}, {self.samples} samples")
        return "\n".join(lines)


@np.errstate(all="ignore")
def check_gradients(
    net: MLP, x: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None, seed: int = 0
) -> GradientReport:
    """Check back-propagation by finite differences: move the parameters a little, see how much the loss changes.

    For each block (every W_k, b_k, and the inputs) the loss of a float64 twin of the network is differenced along
    random directions and compared with the twin's gradient. Then the network's own gradient, in its own dtype, is
    compared with the twin's. Finite differences are meaningless across a kink, so samples with a pre-activation that
    crosses one on the way are left out, as are those on a kink of the loss. Where a function that is the loss has kinks
    is not known.

    Args:
        net, x, y, sample_weight: as `MLP.value_and_grad` takes them; tens of samples are enough.
        seed: of the directions.

    Returns:
        The largest relative errors per block, and whether all are within limits.

    Raises:
        DataError: every sample lies next to a kink, or the loss is not finite.
    """
    twin = _float64_twin(net)
    own_samples, own_targets, own_weight = as_batch(x, y, sample_weight, net.architecture, net.ops)
    samples, targets = net.ops.to_numpy(own_samples).astype(np.float64), net.ops.to_numpy(own_targets)
    weight = None if own_weight is None else net.ops.to_numpy(own_weight)
    blocks = [
        (f"{kind}{k}", view)
        for k in range(1, len(net.sizes))
        for kind, view in (("W", twin.weights[k - 1]), ("b", twin.biases[k - 1]))
    ]
    blocks.append(("inputs", samples))
    rng = np.random.Generator(np.random.PCG64(seed))
    directions = [[_unit(rng.standard_normal(view.shape)) for _ in range(DIRECTIONS)] for _, view in blocks]

    for step in (1e-4, 1e-5, 1e-6):
        smooth = _rows_away_from_kinks(twin, samples, targets, blocks, directions, step)
        if smooth.any():
            break
    else:
        raise DataError("every sample lies next to a kink of the activation: expected some that do not; try other data")
    weight = None if weight is None else weight[smooth]
    # From here on only these samples; perturbing the inputs must still reach what the loss is computed from.
    samples, targets = np.ascontiguousarray(samples[smooth]), targets[smooth]
    blocks[-1] = ("inputs", samples)
    directions[-1] = [_unit(direction[smooth]) for direction in directions[-1]]

    def loss() -> float:
        return float(twin.loss(samples, targets, sample_weight=weight))

    value, exact = loss(), twin.value_and_grad(samples, targets, sample_weight=weight, need_input_grad=True)[1]
    if not math.isfinite(value):
        raise DataError(f"the loss is {value}: expected a finite one to differentiate")
    _, own = net.value_and_grad(samples, targets, sample_weight=weight, need_input_grad=True)
    expected, actual = _in_blocks(exact), [net.ops.to_numpy(part) for part in _in_blocks(own)]
    bounds = _rounding_bounds(twin, samples, targets, weight)
    limit = _rounding_limit(net)
    rows = []
    for (name, view), along, gradient, ours, bound in zip(blocks, directions, expected, actual, bounds, strict=True):
        typical = float(np.linalg.norm(gradient)) / math.sqrt(gradient.size)
        errors = [_formula_error(loss, value, view, d, float(np.vdot(gradient, d)), typical, step) for d in along]
        rounding = float(np.linalg.norm(ours - gradient)) / (float(np.linalg.norm(bound)) or 1.0)
        rows.append(BlockCheck(name, max(errors), rounding, limit))
    return GradientReport(tuple(rows), len(samples))


def _float64_twin(net: MLP) -> MLP:
    """Make the same function in float64, with parameters as the network's products read them."""
    exact = {"dtype": "float64", "allow_tf32": False, "reproducible": False, "loss": net.architecture.loss_row}
    options = net.architecture.as_options() | exact
    twin = MLP(**options, backend="numpy", seed=0)
    twin.theta[:] = net.ops.to_numpy(net.theta)
    if net.architecture.precision.sixteen_bit:
        for W in twin.weights:
            W[...] = W.astype(net.dtype)
    return twin


def _unit(direction: NDArray[np.float64]) -> NDArray[np.float64]:
    return direction / (np.linalg.norm(direction) or 1.0)


def _rows_away_from_kinks(
    twin: MLP,
    samples: NDArray[np.float64],
    targets: NDArray[Any],
    blocks: list[tuple[str, NDArray[np.float64]]],
    directions: list[list[NDArray[np.float64]]],
    step: float,
) -> NDArray[np.bool_]:
    """Find samples that stay on their side of every kink of an activation or of the loss within the steps."""
    kinks = {k: row.kinks for k, row in enumerate(twin.architecture.hidden_activations, 1) if row.kinks}
    smooth = np.ones(len(samples), bool)
    loss = twin.architecture.loss_row
    if not kinks and not isinstance(loss, (AbsoluteError, Huber, Quantile)):
        return smooth

    def pieces() -> list[NDArray[np.bool_]]:
        """Where a is beyond each kink."""
        trace = twin.trace(samples, targets)
        sides = [trace.a[k] > kink for k in kinks for kink in kinks[k]]
        if isinstance(loss, (AbsoluteError, Quantile)):
            sides.append(trace.output > targets)
        elif isinstance(loss, Huber):
            sides.append(np.abs(trace.output - targets) > loss.delta)
        return sides

    here = pieces()
    for (_, view), along in zip(blocks, directions, strict=True):
        original = view.copy()
        for direction in along:
            for offset in (-2 * step, 2 * step):
                view[...] = original + offset * direction
                for before, after in zip(here, pieces(), strict=True):
                    smooth &= (before == after).all(axis=1)
        view[...] = original
    return smooth


def _formula_error(
    loss: Callable[[], float],
    value: float,
    view: NDArray[np.float64],
    direction: NDArray[np.float64],
    expected: float,
    typical: float,
    step: float,
) -> float:
    """Return the error of a directional derivative relative to `typical`, by the best of a few steps.

    A long step suffers from curvature, a short one from rounding: below some roundings of the loss no difference can be
    told from 0, and that resolution is added to `typical`. A gradient that is wrong is wrong for every step.
    """
    best = math.inf
    for finer in (step, step / 10, step / 100):
        resolution = 16 * UNIT_ROUNDOFF["float64"] * abs(value) / finer / FORMULA_LIMIT
        error = abs(_derivative(loss, view, direction, finer) - expected) / (typical + resolution or 1.0)
        best = min(best, error)
        if best <= FORMULA_LIMIT / 10:
            break
    return best


def _derivative(
    loss: Callable[[], float], view: NDArray[np.float64], direction: NDArray[np.float64], step: float
) -> float:
    """Compute dloss/dt at t = 0 along view + t·direction by the five-point formula, whose error is of order step⁴."""
    original = view.copy()

    def at(offset: float) -> float:
        view[...] = original + offset * direction
        return float(loss())

    slope = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    view[...] = original
    return slope


def _in_blocks(gradients: Any) -> list[Array]:
    """List gradients in the order of the report: W1, b1, …, inputs."""
    pairs = zip(gradients.weights, gradients.biases, strict=True)
    return [*(part for pair in pairs for part in pair), gradients.inputs]


def _rounding_bounds(
    twin: MLP, samples: NDArray[np.float64], targets: NDArray[Any], weight: NDArray[np.float64] | None
) -> list[NDArray[np.float64]]:
    """Bound each gradient's error if every operation rounds operands and results by at most 1, relative to them.

    Errors are propagated operation by operation, forward and backward, to first order and on absolute values. The
    caller scales the result by the unit roundoff.
    """
    t = twin.trace(samples, targets, sample_weight=weight)
    depth, batch_size = len(twin.sizes) - 1, len(samples)
    nothing = np.empty(0)  # stands at the indices that do not exist
    h, da, dh = ([nothing if part is None else np.abs(part) for part in parts] for parts in (t.h, t.da, t.dh))
    W, b = ([nothing, *map(np.abs, parts)] for parts in (twin.weights, twin.biases))
    slopes = _slopes(twin, t)

    h_error = [h[0]]
    a_error = [nothing]
    for k in range(1, depth + 1):
        a_error.append((h_error[k - 1] + h[k - 1]) @ W[k].T + b[k])
        h_error.append(slopes[k] * a_error[k] + h[k] if k < depth else nothing)

    error = _loss_error(twin, t, targets, a_error[depth]) / batch_size
    if weight is not None:
        error *= np.abs(weight)[:, None]
    bounds: list[NDArray[np.float64]] = []
    for k in range(depth, 0, -1):
        dW_bound = (error + da[k]).T @ h[k - 1] + da[k].T @ h_error[k - 1]
        bounds[:0] = [dW_bound, (error + da[k]).sum(axis=0)]
        error = (error + da[k]) @ W[k]
        if k > 1:  # g' is good to absolute error, and the pre-activation that it belongs to is off as well
            error = slopes[k - 1] * error + dh[k - 1] * (1 + a_error[k - 1])
    return [*bounds, error]


def _loss_error(twin: MLP, t: Trace, targets: NDArray[Any], a_error: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bound the error of ∂ℓ_b/∂a_b, (B, n_L), where a is off by `a_error`.

    For canonical pairs it is ŷ − y. For other losses it is seen from what ∂ℓ/∂a does if a and y move that little.
    """
    row, output = twin.architecture.loss_row, twin.architecture.output
    if isinstance(row, (CrossEntropy, BinaryCrossEntropy, SquaredError)) and row.parameters(t.output.shape[1]) is None:
        y = np.zeros_like(t.output)
        if targets.ndim == 1:
            y[np.arange(len(y)), targets] = 1
        else:
            y[...] = targets
        error: NDArray[np.float64] = a_error + np.abs(t.output) + np.abs(y)
        return error

    def gradient(a: NDArray[np.float64], y: NDArray[Any]) -> NDArray[np.float64]:
        delta = a.copy()
        row.bind(output, delta, np.empty(len(a)), Scratch(delta), 1.0)(y)
        return delta

    a, rng = t.a[-1], np.random.Generator(np.random.PCG64(0))
    with twin.ops.scope():
        exact = gradient(a, targets)
        error = np.abs(exact)
        for _ in range(DIRECTIONS):
            moved = a + NEARBY * rng.choice((-1.0, 1.0), a.shape) * (a_error + np.abs(a))
            y = targets
            if targets.dtype.kind == "f":
                y = targets * (1.0 + NEARBY * rng.choice((-1.0, 1.0), targets.shape))
            np.maximum(error, np.abs(exact) + np.abs(gradient(moved, y) - exact) / NEARBY, out=error)
    return error


def _slopes(twin: MLP, t: Trace) -> list[NDArray[np.float64]]:
    """Compute |g'(a_k)| of each hidden layer, at index k."""
    slopes = [np.empty(0)]
    for k, row in enumerate(twin.architecture.hidden_activations, 1):
        slope = np.ones_like(t.a[k])
        row.backward(slope, t.h[k] if row.derivative_from == "h" else t.a[k], Scratch(slope))
        slopes.append(np.abs(slope))
    return slopes


def _rounding_limit(net: MLP) -> float:
    """Add the unit roundoff of the operands and √K times that of the sums."""
    precision = net.architecture.precision
    operands = TF32_ROUNDOFF if precision.tf32 else UNIT_ROUNDOFF[precision.name]
    return operands + UNIT_ROUNDOFF[precision.accumulator.name] * math.sqrt(max(net.sizes))
