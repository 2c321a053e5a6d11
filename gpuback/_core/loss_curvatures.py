"""Second derivatives of losses: for each row ∇ℓ, and ∇²ℓ times a vector, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpuback._core.losses import (
    AbsoluteError,
    BinaryCrossEntropy,
    CrossEntropy,
    Huber,
    Loss,
    OwnLoss,
    Poisson,
    Quantile,
    SquaredError,
)
from gpuback._core.own_loss import call, require_function, require_returned
from gpuback._core.typing import Array
from gpuback.errors import OptionError

Curvature = Callable[[Array, Array, Array], tuple[Array, Array]]
"""(ŷ, t, y) → ∇ℓ (B, n_L) and ∇²ℓ t (B, n_L)."""

CANONICAL = {
    (CrossEntropy, "softmax"),
    (BinaryCrossEntropy, "sigmoid"),
    (SquaredError, "identity"),
    (Poisson, "exponential"),
}
"""Losses with the output function for which ∂ℓ/∂a = c ŷ − t: nothing is divided by a ŷ that may be 0."""


def is_canonical(loss: Loss, output: str) -> bool:
    """Tell whether `curvature` is by a_L; else it is by ŷ."""
    return (type(loss), output) in CANONICAL


def curvature(loss: Loss) -> Curvature:
    """Return ∇ℓ and ∇²ℓ t as a function; t is how ŷ moves.

    By a_L, for a canonical pair: ∇ℓ = c ŷ − t(y) with c = Σ_j t_j(y) for cross-entropy, else 1, and ∇²ℓ ȧ = c ẏ, for
    ẏ = J ȧ. Else by ŷ.

    Raises:
        OptionError: a user's function without a method `hessian_vector`.
    """
    if isinstance(loss, CrossEntropy):
        return lambda y_hat, t, y: _cross_entropy(loss, y_hat, t, y)
    if isinstance(loss, (BinaryCrossEntropy, SquaredError, Poisson)):
        return lambda y_hat, t, y: (y_hat - y, t)
    if isinstance(loss, AbsoluteError):
        return lambda y_hat, t, y: (np.sign(y_hat - y), np.zeros_like(t))
    if isinstance(loss, Huber):
        return lambda y_hat, t, y: _huber(loss.delta, y_hat - y, t)
    if isinstance(loss, Quantile):
        return lambda y_hat, t, y: (_quantile(loss, y_hat - y), np.zeros_like(t))
    assert isinstance(loss, OwnLoss)
    return _own(loss)


def _cross_entropy(loss: CrossEntropy, y_hat: Array, t: Array, y: Array) -> tuple[Array, Array]:
    n = y_hat.shape[1]
    targets = y
    if y.ndim == 1:
        targets = np.zeros_like(y_hat)
        targets[np.arange(len(y)), y] = 1
    rows = loss.parameters(n)
    if rows is not None:
        factor, constant = rows.astype(y_hat.dtype)
        targets = targets * factor + constant
    total = targets.sum(axis=1, keepdims=True)
    return total * y_hat - targets, total * t


def _huber(delta: float, residual: Array, t: Array) -> tuple[Array, Array]:
    clipped = np.clip(residual, -delta, delta)
    return clipped, np.where(clipped == residual, t, 0 * t)


def _quantile(loss: Quantile, residual: Array) -> Array:
    above, below = loss.parameters(residual.shape[1]).astype(residual.dtype)
    return np.where(residual > 0, above, np.where(residual < 0, -below, 0 * residual))


def _own(loss: OwnLoss) -> Curvature:
    function = require_function(loss.function, loss.name)
    hessian_vector = getattr(function, "hessian_vector", None)
    if not callable(hessian_vector):
        raise OptionError(
            f"loss {loss.name!r}: expected a method hessian_vector(y_hat, y, t) that returns ∇²ℓ t, which second "
            "derivatives need beside ∂ℓ/∂ŷ"
        )

    def own(y_hat: Array, t: Array, y: Array) -> tuple[Array, Array]:
        shown, targets, moves = (_read_only(array) for array in (y_hat, y, t))
        _, gradient = call(function, loss.name, shown, targets, np.ndarray, "numpy")
        product = hessian_vector(shown, targets, moves)
        require_returned(loss.name, "hessian_vector's ∇²ℓ t", product, t.shape, np.ndarray, "numpy")
        return gradient.astype(t.dtype), product.astype(t.dtype)

    return own


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
