"""The losses with `reproducible=True`: each row in float64, by fixed sequences of operations; rounded where stored.

Every entry takes a few rows of pre-activations a_L, (R, n) float64, of targets, and the loss's parameters in float64,
and returns the rows' losses ℓ (R,) and ∂ℓ/∂a (R, n), both float64. The equations are those of
`gpuback._core.loss_formulas`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpuback._core.elementary import Function, exp, expm1, log, log1p
from gpuback._core.elementary_activations import FORWARD, SLOPE
from gpuback._core.loss_formulas import OVERFLOWN
from gpuback._core.losses import ELEMENTWISE
from gpuback._core.reproducible_forms import evaluated
from gpuback._core.typing import Array

Rule = Callable[[Array, Array, Array | None], tuple[Array, Array]]

LANES = 32
"""A row is added up in 32 sums of every 32nd number, one for each lane of a warp."""


def row_sums(x: Array) -> Array:
    """Return Σ_j x_rj, (R,): each lane's sum over every 32nd column, then the sum of lanes.

    Of fewer columns than lanes, the lanes that would stay 0 are left out: adding 0 to a sum changes no bit.
    """
    rows, width = x.shape
    count = min(LANES, 1 << (width - 1).bit_length())
    lanes = np.zeros((count, rows))
    for start in range(0, width, count):
        part = x.T[start : start + count]
        np.add(lanes[: len(part)], part, out=lanes[: len(part)])
    return sum_of_lanes(lanes.T)


def sum_of_lanes(lanes: Array) -> Array:
    """Add (R, n ≤ 32) over lanes by halves, as a warp's shuffles do: lane i and lane i + 16, then i + 8, …, i + 1."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def softmax(a: Array) -> tuple[Array, Array, Array]:
    """Return z = a − max_j a_j, ŷ = e^z / s, and s = Σ_j e^z_j (R, 1)."""
    z = a - a.max(axis=1, keepdims=True)
    powers = evaluated(exp, z)
    total = row_sums(powers)[:, None]
    return z, powers / total, total


def _softmax_cross_entropy(a: Array, y: Array, parameters: Array | None) -> tuple[Array, Array]:
    if y.ndim == 1:
        if parameters is None:
            return _cross_entropy_of_labels(a, y)
        y = np.eye(a.shape[1])[y]
    z, predicted, total = softmax(a)
    y = y.astype(np.float64)
    if parameters is not None:
        y = parameters[0] * y + parameters[1]
    mass = row_sums(y)[:, None]
    terms = np.where(y == 0, 0.0, y * (evaluated(log, total) - z))  # 0 times an infinite distance would be NaN
    return row_sums(terms), mass * predicted - y


def _cross_entropy_of_labels(a: Array, y: Array) -> tuple[Array, Array]:
    """ℓ = log(r + e^z_y) − z_y with r = Σ_{j≠y} e^z_j, which is log(1 + r) where z_y is 0; ŷ_y − 1 = −r/(r + e^z_y).

    No term cancels, however sure the prediction is.
    """
    own = np.arange(len(a)), y
    z = a - a.max(axis=1, keepdims=True)
    powers = evaluated(exp, z)
    own_power = powers[own]
    powers[own] = 0.0
    rest = row_sums(powers)
    total = rest + own_power
    losses = np.where(z[own] == 0.0, evaluated(log1p, rest), evaluated(log, total) - z[own])
    powers[own] = -rest
    return losses, powers / total[:, None]


def _sigmoid_binary_cross_entropy(a: Array, y: Array, parameters: Array | None) -> tuple[Array, Array]:
    """∂ℓ/∂a = ŷ − y as (1 − y) sigmoid(a) − y sigmoid(−a): no term cancels for a y of 0 or 1."""
    distance = np.where(np.isinf(a), np.abs(a), np.where(a < 0, 0.0, a) - a * y)  # ∞ − ∞ would be NaN
    distance = np.where(y == (a > 0), 0.0, distance)
    terms = distance + evaluated(log1p, evaluated(exp, -np.abs(a)))
    sigmoid = FORWARD["sigmoid"]
    y = y.astype(np.float64)
    return row_sums(terms), (1.0 - y) * evaluated(sigmoid, a) - y * evaluated(sigmoid, -a)


def _softmax_squared_error(a: Array, y: Array, parameters: Array | None) -> tuple[Array, Array]:
    _, predicted, _ = softmax(a)
    residual = predicted - y
    dot = row_sums(residual * predicted)[:, None]
    return 0.5 * row_sums(residual * residual), predicted * (residual - dot)


def _elementwise_squared_error(name: str) -> Rule:
    def rule(a: Array, y: Array, parameters: Array | None) -> tuple[Array, Array]:
        predicted = evaluated(FORWARD[name], a)
        residual = predicted - y
        return 0.5 * row_sums(residual * residual), residual * evaluated(SLOPE[name], predicted)

    return rule


def through_output(functions: tuple[Function, Function] | None, source: Array, dy: Array) -> Array:
    """Return Jᵀ dy, J = ∂ŷ/∂a of an output function: R rows of dy = ∂ℓ/∂ŷ, of what O' is computed from, and of ∂ℓ/∂a.

    All are (R, n) float64. `functions` are O and O', or None for softmax. `source` is ŷ or, where O' is computed from
    it, a.
    """
    if functions is None:
        return source * (dy - row_sums(dy * source)[:, None])
    return dy * evaluated(functions[1], source)


Penalty = Callable[[Array, Array | None], tuple[Array, Array]]
"""Of residuals r = ŷ − y: p'(r), and the factor whose product with it is p(r)."""


def _elementwise(name: str, penalty: Penalty) -> Rule:
    def rule(a: Array, y: Array, parameters: Array | None) -> tuple[Array, Array]:
        predicted = evaluated(FORWARD[name], a)
        slope, factor = penalty(predicted - y, parameters)
        return row_sums(slope * factor), slope * evaluated(SLOPE[name], predicted)

    return rule


def _absolute(r: Array, parameters: Array | None) -> tuple[Array, Array]:
    return np.where(r > 0, 1.0, np.where(r < 0, -1.0, r)), r


def _huber(r: Array, parameters: Array | None) -> tuple[Array, Array]:
    assert parameters is not None
    clipped = np.where(r > parameters, parameters, np.where(r < -parameters, -parameters, r))
    return clipped, r - 0.5 * clipped


def _quantile(r: Array, parameters: Array | None) -> tuple[Array, Array]:
    assert parameters is not None
    above, below = parameters
    return np.where(r > 0, above, np.where(r < 0, -below, r)), r


def _exponential_poisson(a: Array, y: Array, parameters: Array | None) -> tuple[Array, Array]:
    y = y.astype(np.float64)
    predicted, difference = evaluated(exp, a), a - evaluated(log, y)
    # Beyond OVERFLOWN the first is larger by far, and an infinite second would be left.
    terms = y * (evaluated(expm1, difference) - np.minimum(difference, OVERFLOWN))
    return row_sums(np.where(y == 0, predicted, terms)), predicted - y


RULES: dict[tuple[str, str], Rule] = {
    ("cross_entropy", "softmax"): _softmax_cross_entropy,
    ("binary_cross_entropy", "sigmoid"): _sigmoid_binary_cross_entropy,
    ("squared_error", "softmax"): _softmax_squared_error,
    **{("squared_error", name): _elementwise_squared_error(name) for name in ELEMENTWISE},
    **{("absolute_error", name): _elementwise(name, _absolute) for name in ELEMENTWISE},
    **{("huber", name): _elementwise(name, _huber) for name in ELEMENTWISE},
    **{("quantile", name): _elementwise(name, _quantile) for name in ELEMENTWISE},
    ("poisson", "exponential"): _exponential_poisson,
}
"""The rule of each pair of loss and output function."""
