"""The losses' formulas on NumPy: from the output layer's pre-activations to a sample's loss and its gradient ∂ℓ/∂a_L.

Each of these *builds* the function that runs per batch, so that buffers, index arrays and views are made once:
`build(a, losses, scratch, divisor, parameters)` takes the output layer's pre-activations a (B, n), an array for the
samples' losses (B,), scratch like a, and the loss's parameters in a's dtype (`Loss.parameters`). It returns `run(y)`,
which writes ℓ_b into `losses` and overwrites a by ∂ℓ_b/∂a_b / divisor. The caller sums over the batch and applies the
sample weights. Rows do not affect each other here.

Canonical pairs (softmax + cross-entropy, sigmoid + binary cross-entropy, identity + squared error, exponential +
Poisson deviance) are one expression each, ŷ − e(y). Others go through the output function's whole Jacobian, (∂ŷ/∂a)ᵀ
∂ℓ/∂ŷ.

`a` may be C- or Fortran-contiguous. Fortran order (each class contiguous) makes sums over a few classes vector
operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from gpuback._core.activation_names import activation_named
from gpuback._core.activations_from_h import sigmoid
from gpuback._core.chained_sums import bind_sum_rows
from gpuback._core.scratch import Scratch, bind
from gpuback._core.typing import Array

Run = Callable[[Array], None]
Build = Callable[[Array, Array, Scratch, float, Array | None], Run]

OVERFLOWN = 1e4
"""e to this power is infinite in every dtype."""


class Softmax:
    """ŷ = softmax(a), row by row, in steps, because cross-entropy needs the values in between.

    Attributes:
        total: (B,) Σ_j e^z_j, after `exponentials`.
    """

    def __init__(self, a: Array, out: Array, divisor: float = 1.0) -> None:
        """Args: a: (B, n) pre-activations; out: (B, n), may be a; divisor: of the result."""
        maximum, self.total, divisors = (np.empty(len(a), a.dtype) for _ in range(3))
        self._sum = bind_sum_rows(out)
        self._scale_total = bind(np.multiply, self.total, _constant(divisor, a), out=divisors)
        axis, of_rows = 1, (maximum[:, None], divisors[:, None])
        if a.flags.f_contiguous and out.flags.f_contiguous:  # the same, with NumPy's inner loops over samples
            axis, of_rows, a, out = 0, (maximum, divisors), a.T, out.T
        self._find_maximum = partial(np.maximum.reduce, a, axis, None, maximum)
        self._subtract_maximum = bind(np.subtract, a, of_rows[0], out=out)
        self._exp = bind(np.exp, out, out=out)
        self._divide = bind(np.divide, out, of_rows[1], out=out)

    def shift(self) -> None:
        """out = z = a − max_j a_j, so that no exponential overflows."""
        self._find_maximum()
        self._subtract_maximum()

    def exponentials(self) -> None:
        """out = e^z."""
        self._exp()
        self._sum(self.total)

    def divide(self) -> None:
        """out = out / (divisor Σ_j e^z_j)."""
        self._scale_total()
        self._divide()

    def normalise(self) -> None:
        """From z: out = ŷ / divisor."""
        self.exponentials()
        self.divide()


def _constant(value: float, like: Array) -> Array:
    """Make an array without axes of a number: ufuncs start faster on it than on a Python number."""
    return np.array(value, like.dtype)


def softmax_cross_entropy(a: Array, losses: Array, scratch: Scratch, divisor: float, parameters: Array | None) -> Run:
    """ℓ = −Σ_j y_j log ŷ_j with ŷ = softmax(a); ∂ℓ/∂a = ŷ − e(y), or (Σ_j y_j) ŷ − y for rows of probabilities.

    With z = a − max a and s = Σ_j e^z_j, −log ŷ_j = log s − z_j, which is never negative: logits of ±10⁴ are harmless.
    """
    of_labels = _of_labels(a, losses, Softmax(a, a, divisor), divisor)
    of_probabilities = _of_probabilities(a, losses, Softmax(a, a), scratch.a, divisor)

    def run(y: Array) -> None:
        if y.ndim == 1:
            of_labels(y)
        else:
            of_probabilities(y)

    return run


def _of_labels(z: Array, losses: Array, softmax: Softmax, divisor: float) -> Run:
    """ℓ_b = log s_b − z_b[y_b], and a becomes ŷ/divisor − e(y)/divisor: each term is divided separately."""
    flat, own, find_own = _bind_own(z)
    one, picked = _constant(1.0 / divisor, z), np.empty_like(losses)
    pick = partial(flat.take, own, None, picked, "clip")  # labels were checked; "raise" would buffer the output
    operations = (
        pick,
        softmax.exponentials,
        bind(np.log, softmax.total, out=losses),
        bind(np.subtract, losses, picked, out=losses),
        softmax.divide,
        pick,
        bind(np.subtract, picked, one, out=picked),
        partial(flat.__setitem__, own, picked),
    )

    def run(y: Array) -> None:
        softmax.shift()
        find_own(y)
        for operation in operations:
            operation()

    return run


def _bind_own(rows: Array) -> tuple[Array, Array, Run]:
    """Bind a search for the elements rows[b, y_b] of (B, n).

    Returns:
        The elements in the order of memory, a view; (B,) positions there; and what sets these from labels y.
    """
    row_stride, class_stride = (stride // rows.itemsize for stride in rows.strides)
    stride, first_of_row = np.array(class_stride, np.intp), np.arange(len(rows), dtype=np.intp) * row_stride
    own = np.empty_like(first_of_row)
    add_first_of_row = bind(np.add, own, first_of_row, out=own)

    def find_own(y: Array) -> None:
        np.multiply(y, stride, out=own)
        add_first_of_row()

    return rows.reshape(-1, order="A"), own, find_own


def _of_probabilities(z: Array, losses: Array, softmax: Softmax, scratch: Array, divisor: float) -> Run:
    """ℓ_b = Σ_j y_bj (log s_b − z_bj), and from a to ((Σ_j y_bj) ŷ − y) / divisor. Where y_bj is 0, so is its term."""
    total = np.empty_like(losses)
    sum_scratch = bind_sum_rows(scratch)

    def run(y: Array) -> None:
        softmax.shift()
        np.copyto(scratch, z)
        softmax.normalise()
        np.log(softmax.total, out=total)
        np.subtract(total[:, None], scratch, out=scratch)
        np.multiply(scratch, y, out=scratch)
        sum_scratch(losses)
        if _any_nan(losses):  # perhaps of ∞ · 0: a logit is −∞, or further from the largest than numbers go
            np.copyto(scratch, 0, where=np.equal(y, 0))
            sum_scratch(losses)
        np.copyto(scratch, y)
        sum_scratch(total)
        np.multiply(z, total[:, None], out=z)
        np.subtract(z, y, out=z)
        np.divide(z, divisor, out=z)

    return run


def weighted_cross_entropy(a: Array, losses: Array, scratch: Scratch, divisor: float, parameters: Array | None) -> Run:
    """ℓ = −Σ_j t_j log ŷ_j with t_j = p_j y_j + m_j and ŷ = softmax(a); ∂ℓ/∂a = (Σ_j t_j) ŷ − t.

    Args:
        parameters: (2, n), p and m. Labels are rows e(y).
    """
    assert parameters is not None
    factor, addend = parameters
    of_label, targets, picked = factor + addend, np.empty_like(a), np.empty_like(losses)
    flat, own, find_own = _bind_own(targets)
    of_probabilities = _of_probabilities(a, losses, Softmax(a, a), scratch.a, divisor)

    def run(y: Array) -> None:
        if y.ndim == 1:
            np.copyto(targets, addend)
            of_label.take(y, None, picked, "clip")  # labels were checked; "raise" would buffer the output
            find_own(y)
            flat[own] = picked
        else:
            np.multiply(y, factor, out=targets)
            np.add(targets, addend, out=targets)
        of_probabilities(targets)

    return run


def sigmoid_binary_cross_entropy(
    a: Array, losses: Array, scratch: Scratch, divisor: float, parameters: Array | None
) -> Run:
    """ℓ = −Σ_j (y_j log ŷ_j + (1 − y_j) log(1 − ŷ_j)) with ŷ = sigmoid(a); ∂ℓ/∂a = ŷ − y.

    Term j is (max(a, 0) − a y) + log1p(e^−|a|). No logarithm is taken of a number that has rounded to 0 or 1. If y is 0
    or 1 and a agrees, the first part is exactly 0.
    """
    term, other = scratch.a, scratch.b
    sum_terms = bind_sum_rows(term)

    def run(y: Array) -> None:
        np.maximum(a, scratch.zeros, out=term)
        np.multiply(a, y, out=other)
        np.subtract(term, other, out=term)
        np.abs(a, out=other)
        np.negative(other, out=other)
        np.exp(other, out=other)
        np.log1p(other, out=other)
        np.add(term, other, out=term)
        sum_terms(losses)
        if _any_nan(losses):  # perhaps of ∞ − ∞: an infinite a agrees with y, or it does not
            np.copyto(term, np.where(np.equal(y, a > 0), 0, math.inf), where=np.isinf(a))
            sum_terms(losses)
        sigmoid(a, a, scratch)
        np.subtract(a, y, out=a)
        np.divide(a, divisor, out=a)

    return run


def identity_squared_error(a: Array, losses: Array, scratch: Scratch, divisor: float, parameters: Array | None) -> Run:
    """ℓ = ½ Σ_j (a_j − y_j)²; ∂ℓ/∂a = a − y."""
    half_squares = _bind_half_squares(a, losses, scratch.a)

    def run(y: Array) -> None:
        np.subtract(a, y, out=a)
        half_squares()
        np.divide(a, divisor, out=a)

    return run


def elementwise_squared_error(name: str) -> Build:
    """ℓ = ½ Σ_j (ŷ_j − y_j)² with ŷ = g(a) element by element: the Jacobian is diagonal, ∂ℓ/∂a = (ŷ − y) ⊙ g'(a)."""
    activation = activation_named(name)

    def build(a: Array, losses: Array, scratch: Scratch, divisor: float, parameters: Array | None) -> Run:
        outputs = np.empty_like(a)
        half_squares = _bind_half_squares(a, losses, scratch.a)
        through_output = bind_through_output(name, outputs, a, scratch)

        def run(y: Array) -> None:
            activation.forward(a, outputs, scratch)
            np.subtract(outputs, y, out=a)
            half_squares()
            through_output()
            np.divide(a, divisor, out=a)

        return run

    return build


def softmax_squared_error(a: Array, losses: Array, scratch: Scratch, divisor: float, parameters: Array | None) -> Run:
    """ℓ = ½ Σ_j (ŷ_j − y_j)² with ŷ = softmax(a).

    The Jacobian is diag(ŷ) − ŷ ŷᵀ, so with r = ŷ − y, ∂ℓ/∂a = ŷ ⊙ (r − Σ_j r_j ŷ_j).
    """
    outputs = np.empty_like(a)
    softmax = Softmax(a, outputs)
    half_squares = _bind_half_squares(a, losses, scratch.a)
    through_output = bind_through_output("softmax", outputs, a, scratch)

    def run(y: Array) -> None:
        softmax.shift()
        softmax.normalise()
        np.subtract(outputs, y, out=a)
        half_squares()
        through_output()
        np.divide(a, divisor, out=a)

    return run


def exponential_poisson(a: Array, losses: Array, scratch: Scratch, divisor: float, parameters: Array | None) -> Run:
    """ℓ = Σ_j y_j log(y_j/ŷ_j) − y_j + ŷ_j, half the deviance, with ŷ = e^a; ∂ℓ/∂a = ŷ − y.

    With d = a − log y, term j is y (expm1(d) − d), which cancels less where ŷ is near y. Where y_j is 0, term j is ŷ_j.
    """
    difference, term, is_zero = scratch.a, scratch.b, scratch.mask
    sum_terms = bind_sum_rows(term)

    def run(y: Array) -> None:
        np.equal(y, 0, out=is_zero)
        np.log(y, out=difference)
        np.subtract(a, difference, out=difference)
        np.copyto(difference, 0, where=is_zero)
        np.expm1(difference, out=term)
        np.minimum(difference, OVERFLOWN, out=difference)  # ∞ − ∞ would be NaN
        np.subtract(term, difference, out=term)
        np.multiply(term, y, out=term)
        np.exp(a, out=a)
        np.copyto(term, a, where=is_zero)
        sum_terms(losses)
        np.subtract(a, y, out=a)
        np.divide(a, divisor, out=a)

    return run


Penalty = Callable[[Array, Array, Scratch, Array | None], Callable[[], None]]
"""Binds p of residuals r, (B, n): a function that writes p(r) to an array like r and overwrites r by p'(r)."""


def elementwise(output: str, penalty: Penalty) -> Build:
    """ℓ = Σ_j p(r_j) with r = ŷ − y and ŷ = O(a), element by element; ∂ℓ/∂a = p'(r) ⊙ O'(a)."""
    activation = activation_named(output)

    def build(a: Array, losses: Array, scratch: Scratch, divisor: float, parameters: Array | None) -> Run:
        outputs = a if output == "identity" else np.empty_like(a)
        terms = scratch.a
        sum_terms = bind_sum_rows(terms)
        penalise = penalty(a, terms, scratch, parameters)
        through_output = bind_through_output(output, outputs, a, scratch)

        def run(y: Array) -> None:
            activation.forward(a, outputs, scratch)
            np.subtract(outputs, y, out=a)
            penalise()
            sum_terms(losses)
            through_output()
            np.divide(a, divisor, out=a)

        return run

    return build


def absolute(r: Array, terms: Array, scratch: Scratch, parameters: Array | None) -> Callable[[], None]:
    """p = |r|; p' = sign r, 0 at 0."""

    def run() -> None:
        np.abs(r, out=terms)
        np.sign(r, out=r)

    return run


def huber(r: Array, terms: Array, scratch: Scratch, parameters: Array | None) -> Callable[[], None]:
    """p = c (r − c/2) with c = r clipped to ±δ; p' = c.

    Args:
        parameters: (n,), δ.
    """
    assert parameters is not None
    delta, minus_delta, clipped = parameters, -parameters, scratch.b

    def run() -> None:
        np.clip(r, minus_delta, delta, out=clipped)
        np.multiply(clipped, 0.5, out=terms)
        np.subtract(r, terms, out=terms)
        np.multiply(terms, clipped, out=terms)
        np.copyto(r, clipped)

    return run


def quantile(r: Array, terms: Array, scratch: Scratch, parameters: Array | None) -> Callable[[], None]:
    """p = (1 − q) r where r > 0, −q r where r < 0; p' = 1 − q or −q, 0 at 0.

    Args:
        parameters: (2, n), 1 − q and q.
    """
    assert parameters is not None
    (above, below), other = parameters, scratch.b
    minus_below = -below

    def run() -> None:
        np.multiply(r, above, out=terms)
        np.multiply(r, minus_below, out=other)
        np.maximum(terms, other, out=terms)
        np.sign(r, out=r)
        np.maximum(r, scratch.zeros, out=other)
        np.multiply(other, above, out=other)
        np.minimum(r, scratch.zeros, out=r)
        np.multiply(r, below, out=r)
        np.add(r, other, out=r)

    return run


def bind_through_output(name: str, source: Array, delta: Array, scratch: Scratch) -> Callable[[], None]:
    """Return a function that turns delta = ∂ℓ/∂ŷ into ∂ℓ/∂a = Jᵀ delta in place, J = ∂ŷ/∂a of one output function.

    Args:
        name: of the output function: "softmax" or an activation.
        source: ŷ (B, n); or a, if the activation's derivative is computed from it; None for the identity.
        delta: (B, n).
        scratch: like delta.
    """
    if name != "softmax":
        return partial(activation_named(name).backward, delta, source, scratch)
    product, dot = scratch.a, np.empty(len(delta), delta.dtype)
    sum_product = bind_sum_rows(product)

    def through_softmax() -> None:
        np.multiply(delta, source, out=product)
        sum_product(dot)
        np.subtract(delta, dot[:, None], out=delta)
        np.multiply(delta, source, out=delta)

    return through_softmax


def _any_nan(losses: Array) -> bool:
    """Tell whether a loss is NaN, in 0.4 µs where `isnan` and `any` take 1.3. No loss is below 0 but by rounding."""
    squares = losses.dot(losses)
    return bool(squares != squares)


def _bind_half_squares(residual: Array, losses: Array, squares: Array) -> Callable[[], None]:
    """losses_b = ½ Σ_j residual_bj²."""
    sum_squares = bind_sum_rows(squares)

    def run() -> None:
        np.multiply(residual, residual, out=squares)
        sum_squares(losses)
        np.multiply(losses, 0.5, out=losses)

    return run
