"""For tests, gpuback's own and its users': how exact a result must be, gradient checks, and data to try things on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuback._typing import Array, ArrayLike
from gpuback.activations import ACTIVATIONS
from gpuback.errors import DataError, unknown_name
from gpuback.network import MLP
from gpuback.precision import Precision, dtype_name
from gpuback.trace import Trace

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TF32_ROUNDOFF = 2.0**-11


def tolerance(
    magnitude: ArrayLike,
    terms: int,
    dtype: object,
    *,
    exact: ArrayLike = 0.0,
    stored: bool = False,
    allow_tf32: bool = False,
    any_data: bool = False,
) -> NDArray[Any]:
    """How far a sum of products may lie from its exact value C.

        |C − exact| ≤ 4 u √K · (|A||B|) + u_out |exact|

    u is 2⁻²⁴, for float64 2⁻⁵³; where the result is stored in 16 bits, u_out is 2⁻⁸ (bfloat16) or 2⁻¹¹ (float16, and
    2⁻²⁵ absolute, its smallest step), else 0. The root holds for terms of mixed signs and for random positive ones,
    whose roundings cancel; for any data whatever the bound is 2 K u (|A||B|). With TF32 each operand may be off by 2⁻¹¹
    of itself.

    Args:
        magnitude: |A||B|, the sum of the terms' absolute values (with |b| if a bias is added), computed in float64 or
            better.
        terms: K, how many terms each sum has.
        dtype: of the operands, exactly as the operation received them.
        exact: the exact result; needed if `stored`.
        stored: the result is stored in the operands' dtype (da_prev and h are; dW and db are float32 or better).
        allow_tf32: the product was allowed to round its operands to TF32.
        any_data: the data are neither random nor of mixed signs.

    Returns:
        The bound, of magnitude's shape and dtype. Never wider than 2⁻⁸ of the magnitude for K up to 10⁸, so that an
        answer of zeros, or with a row left out, does not pass.
    """
    name = dtype_name(dtype)
    magnitude = np.asarray(magnitude)
    u = UNIT_ROUNDOFF["float64" if name == "float64" else "float32"]
    bound = magnitude * ((2 * terms if any_data else 4 * math.sqrt(terms)) * u)
    if allow_tf32:
        bound = bound + magnitude * (2 * TF32_ROUNDOFF + TF32_ROUNDOFF**2)
    if stored and name in ("bfloat16", "float16"):
        bound = bound + np.abs(exact) * UNIT_ROUNDOFF[name] + (2.0**-25 if name == "float16" else 0.0)
    return np.asarray(bound)


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
    """What `check_gradients` found: a row per parameter block; `print` shows a table.

    Attributes:
        rows: the blocks.
        samples: how many samples were kept; those next to a kink of relu and its kin were left out.
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


FORMULA_LIMIT = 1e-6
DIRECTIONS = 4


def check_gradients(
    net: MLP, x: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None, seed: int = 0
) -> GradientReport:
    """Checks back-propagation by what a derivative means: change the parameters a little, see how much the loss
    changes.

    For each block (every W_k, b_k, and the inputs) the loss of a float64 twin of the network is differenced along
    random directions and compared with the twin's gradient; then the network's own gradient, in its own dtype, is
    compared with the twin's. Finite differences say nothing across a kink, so samples with a pre-activation that
    changes sign on the way are left out.

    Args:
        net, x, y, sample_weight: as `MLP.value_and_grad` takes them; tens of samples are enough.
        seed: of the directions.

    Returns:
        The largest relative errors per block, and whether all are within limits.

    Raises:
        DataError: every sample lies next to a kink, or the loss is not finite.
    """
    twin = _float64_twin(net)
    checked = net.checked(x, y, sample_weight)
    samples, targets = net.ops.to_numpy(checked[0]).astype(np.float64), net.ops.to_numpy(checked[1])
    weight = None if checked[2] is None else net.ops.to_numpy(checked[2])
    blocks = [
        (f"{kind}{k}", view)
        for k in range(1, len(net.sizes))
        for kind, view in (("W", twin.weights[k - 1]), ("b", twin.biases[k - 1]))
    ]
    blocks.append(("inputs", samples))
    rng = np.random.Generator(np.random.PCG64(seed))
    directions = [[_unit(rng.standard_normal(view.shape)) for _ in range(DIRECTIONS)] for _, view in blocks]

    for step in (1e-4, 1e-5, 1e-6):
        keep = _rows_away_from_kinks(twin, samples, targets, blocks, directions, step)
        if keep.any():
            break
    else:
        raise DataError("every sample lies next to a kink of the activation: expected some that do not; try other data")
    weight = None if weight is None else weight[keep]
    # From here on only the samples kept; perturbing the inputs must still reach what the loss is computed from.
    samples, targets = np.ascontiguousarray(samples[keep]), targets[keep]
    blocks[-1] = ("inputs", samples)
    directions[-1] = [_unit(direction[keep]) for direction in directions[-1]]

    def loss() -> float:
        return float(twin.loss(samples, targets, sample_weight=weight))

    value, exact = twin.value_and_grad(samples, targets, sample_weight=weight, need_input_grad=True)
    if not math.isfinite(value):
        raise DataError(f"the loss is {float(value)}: expected a finite one to differentiate")
    _, own = net.value_and_grad(samples, targets, sample_weight=weight, need_input_grad=True)
    expected, actual = _in_blocks(exact), [net.ops.to_numpy(part) for part in _in_blocks(own)]
    bounds = _rounding_bounds(twin, samples, targets, weight)
    limit = _rounding_limit(net)
    rows = []
    # A difference of losses cannot be told from 0 below some roundings of the loss.
    resolution = 16 * UNIT_ROUNDOFF["float64"] * abs(float(value)) / step / FORMULA_LIMIT
    for (name, view), along, gradient, ours, bound in zip(blocks, directions, expected, actual, bounds, strict=True):
        size = float(np.linalg.norm(gradient)) / math.sqrt(gradient.size) + resolution or 1.0
        errors = [abs(_derivative(loss, view, d, step) - float(np.vdot(gradient, d))) / size for d in along]
        rounding = float(np.linalg.norm(ours - gradient)) / (float(np.linalg.norm(bound)) or 1.0)
        rows.append(BlockCheck(name, max(errors), rounding, limit))
    return GradientReport(tuple(rows), len(samples))


def _float64_twin(net: MLP) -> MLP:
    """The same function in float64: parameters as the network's products read them."""
    options = net.architecture.as_options() | {"dtype": "float64", "allow_tf32": False}
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
    """Which samples keep the sign of every pre-activation with a kink at 0, as far as the differences will reach."""
    kinked = [k for k, name in enumerate(twin.architecture.activations, 1) if ACTIVATIONS[name].kinks]
    keep = np.ones(len(samples), bool)
    if not kinked:
        return keep

    def signs() -> list[NDArray[np.bool_]]:
        trace = twin.trace(samples, targets)
        return [trace.a[k] > 0 for k in kinked]

    here = signs()
    for (_, view), along in zip(blocks, directions, strict=True):
        original = view.copy()
        for direction in along:
            for offset in (-2 * step, 2 * step):
                view[...] = original + offset * direction
                for before, after in zip(here, signs(), strict=True):
                    keep &= (before == after).all(axis=1)
        view[...] = original
    return keep


def _derivative(loss: Any, view: NDArray[np.float64], direction: NDArray[np.float64], step: float) -> float:
    """dloss/dt at t = 0 along view + t·direction, by the five-point formula, whose error is of order step⁴."""
    original = view.copy()

    def at(offset: float) -> float:
        view[...] = original + offset * direction
        return float(loss())

    slope = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    view[...] = original
    return slope


def _in_blocks(gradients: Any) -> list[Array]:
    """W1, b1, …, inputs: the order of the report."""
    pairs = zip(gradients.weights, gradients.biases, strict=True)
    return [*(part for pair in pairs for part in pair), gradients.inputs]


def _rounding_bounds(
    twin: MLP, samples: NDArray[np.float64], targets: NDArray[Any], weight: NDArray[np.float64] | None
) -> list[NDArray[np.float64]]:
    """How far each gradient may be off if every operation rounds its operands and results by at most 1 (of themselves).

    Errors are propagated operation by operation, forward and backward, to first order and on absolute values; the
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

    y = np.zeros_like(t.output)
    if targets.ndim == 1:
        y[np.arange(batch_size), targets] = 1
    else:
        y[...] = targets
    error = (a_error[depth] + np.abs(t.output) + np.abs(y)) / batch_size
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


def _slopes(twin: MLP, t: Trace) -> list[NDArray[np.float64]]:
    """|g'(a_k)| of each hidden layer, at index k."""
    slopes = [np.empty(0)]
    for k, row in enumerate(twin.architecture.hidden_activations, 1):
        slope = np.ones_like(t.a[k])
        row.backward(slope, t.h[k] if row.derivative_from == "h" else t.a[k], (slope.copy(), slope.copy()))
        slopes.append(np.abs(slope))
    return slopes


def _rounding_limit(net: MLP) -> float:
    """The unit roundoff of the operands, and √K times that of the sums."""
    precision = net.architecture.precision
    operands = TF32_ROUNDOFF if precision.tf32 else UNIT_ROUNDOFF[precision.name]
    return operands + UNIT_ROUNDOFF[precision.total.name] * math.sqrt(max(net.sizes))


Kind = Literal["mixed", "positive", "constant", "integers"]


def random_array(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    kind: Kind = "mixed",
    *,
    scale: float = 1.0,
    dtype: object = "float64",
) -> NDArray[Any]:
    """Data that find different bugs.

    Args:
        rng: NumPy's generator.
        shape: of the result.
        kind: "mixed": normal, of both signs. "positive": uniform on (0, 1]. "constant": all one number. "integers": −3
            … 3, whose products and sums are exact in every dtype as long as they stay below 2²⁴; `scale` does not
            apply.
        scale: a factor.
        dtype: of the result; the values are rounded to it.
    """
    if kind == "mixed":
        values = rng.standard_normal(shape) * scale
    elif kind == "positive":
        values = (1.0 - rng.random(shape)) * scale
    elif kind == "constant":
        values = np.full(shape, rng.uniform(0.5, 1.0) * scale)
    elif kind == "integers":
        values = rng.integers(-3, 4, shape).astype(np.float64)
    else:
        raise unknown_name("kind of data", kind, ("mixed", "positive", "constant", "integers"))
    return values.astype(Precision.of(dtype).operand)


@dataclass(frozen=True)
class LayerCase:
    """Operands of one layer's backward pass that belong together: h_prev = g(a_prev)."""

    da: NDArray[Any]
    h_prev: NDArray[Any]
    a_prev: NDArray[Any]
    W: NDArray[Any]


def random_layer(
    rng: np.random.Generator,
    batch_size: int,
    n_out: int,
    n_in: int,
    *,
    activation_prev: str = "identity",
    kind: Kind = "mixed",
    scale: float = 1.0,
    dtype: object = "float32",
) -> LayerCase:
    """Operands for `fused_backward`: da (B, nO) and W (nO, nI) times `scale`, a_prev (B, nI) of order 1."""
    da = random_array(rng, (batch_size, n_out), kind, scale=scale, dtype=dtype)
    W = random_array(rng, (n_out, n_in), kind, scale=scale, dtype=dtype)
    a_prev = random_array(rng, (batch_size, n_in), kind, dtype=dtype)
    a, h = a_prev.astype(np.float64), np.empty((batch_size, n_in))
    ACTIVATIONS[activation_prev].forward(a, h, (np.empty_like(h), np.empty_like(h)))
    return LayerCase(da, h.astype(da.dtype), a_prev, W)


def random_batch(net: MLP, batch_size: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """x (B, n_0) and targets y that fit the network's loss."""
    rng = np.random.Generator(np.random.PCG64(seed))
    x = rng.standard_normal((batch_size, net.sizes[0]))
    kind = net.architecture.loss_row.targets
    if kind == "classes":
        return x, rng.integers(net.sizes[-1], size=batch_size)
    shape = (batch_size, net.sizes[-1])
    return x, rng.random(shape) if kind == "probabilities" else rng.standard_normal(shape)
