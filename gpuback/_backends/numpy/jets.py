"""Jets through layers on NumPy: products of all planes at once, and what couples a sample's planes after them.

`gpuback._core.jets` says what a jet is, `gpuback._core.multipliers` what m₁, m₂, m₃ are. Planes lie one after the
other, so a product sees (P·rows, n) and everything else works on contiguous planes.

    forward   a_j = h_j Wᵀ   (+ b for the values;   + h_0 Ẇᵀ + ḃ for the direction in which θ moves)
              h_0 = g(a_0),  h_d = g' a_d,  h_s = g' a_s + g'' Σ_d C_sd a_d²
    backward  dh_j = da_j W  (+ da_1 Ẇ for the values, if θ moves); with z_j the planes of what g' is computed from:
              da_s = m₁ dh_s
              da_d = m₁ dh_d + 2 m₂ z_d Σ_s C_sd dh_s
              da_0 = m₁ dh_0 + m₂ (Σ_d dh_d z_d + Σ_s dh_s z_s) + m₃ Σ_s dh_s Σ_d C_sd z_d²
    sums      dW = Σ_j da_jᵀ h_j,  db = Σ_b da_0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gpuback._backends.numpy.workspace import NumpyWorkspace
from gpuback._backends.protocol import Moves
from gpuback._core.activation_names import activation_named
from gpuback._core.activations import Activation
from gpuback._core.chained_sums import bind_sum_columns, bind_sum_rows
from gpuback._core.jets import Jet
from gpuback._core.loss_formulas import Softmax
from gpuback._core.typing import Array


class NumpyJets:
    """The operations of a backend on jets; see `gpuback._backends.protocol.JetOps`."""

    def bind_jet_load(self, h: Array, workspace: NumpyWorkspace) -> Callable[[Array, Array | None], None]:
        round_h = workspace.bind_round(h)

        def load(x: Array, directions: Array | None) -> None:
            h[0] = x
            h[1:] = 0 if directions is None else directions
            if round_h is not None:
                round_h()

        return load

    def bind_jet_forward(
        self,
        jet: Jet,
        W: Array,
        b: Array,
        moves: Moves,
        h: Array,
        a: Array,
        m: Sequence[Array],
        activation: Activation | None,
        planes_in: int,
        workspace: NumpyWorkspace,
    ) -> Callable[[Array], None]:
        n_out, n_in = W.shape
        rows = h.shape[1]
        products = a[:planes_in].reshape(-1, n_out)
        operand = workspace.bind_product_operand(0, (planes_in * rows, n_in))
        spare = workspace.scratch_like(a[0]).a
        round_a = workspace.bind_round(a) if activation is not None and activation.derivative_from == "a" else None
        activate: Callable[[], object] | None = None
        if activation is not None:
            activate = _bind_activation(jet, activation, a, h, m, workspace, rounded=True)

        def forward(h_prev: Array) -> None:
            inputs = h_prev[:planes_in].reshape(-1, n_in)
            factors = inputs if operand is None else operand(inputs)
            factors.dot(W.T, products)
            a[planes_in:] = 0
            np.add(a[0], b, out=a[0])
            if moves is not None:
                factors[:rows].dot(moves[0].T, spare)
                np.add(a[1], spare, out=a[1])
                np.add(a[1], moves[1], out=a[1])
            if round_a is not None:
                round_a()
            if activate is not None:
                activate()

        return forward

    def bind_jet_output(
        self, jet: Jet, output: str, a: Array, dy: Array, workspace: NumpyWorkspace, *, to_a: bool
    ) -> tuple[Array, Callable[[], object] | None, Callable[[], object] | None]:
        round_dy = workspace.bind_round(dy)
        if output == "identity":
            return a, None, round_dy
        y = np.empty_like(a)
        if output == "softmax":
            forward, from_outputs = _bind_softmax(jet, a, y, dy, workspace)
        else:
            g = activation_named(output)
            assert g.multipliers is not None
            m = [np.empty_like(a[0]) for _ in range(min(g.multipliers.not_zero, jet.order + 1))]
            forward = _bind_activation(jet, g, a, y, m, workspace, rounded=False)
            from_outputs = _bind_delta(jet, dy, g, a if g.derivative_from == "a" else y, m, workspace)
        if to_a:
            return y, forward, round_dy

        def output_delta() -> None:
            from_outputs()
            if round_dy is not None:
                round_dy()

        return y, forward, output_delta

    def bind_jet_backward(
        self,
        jet: Jet,
        da: Array,
        W: Array,
        moves: Moves,
        dh: Array | None,
        below: tuple[Activation, Array, Sequence[Array]] | None,
        planes_in: int,
        workspace: NumpyWorkspace,
    ) -> Callable[[Array, Array | None, Array | None, bool], None]:
        (n_out, n_in), rows = W.shape, da.shape[1]
        deltas = da.reshape(-1, n_out)
        with_inputs = deltas[: planes_in * rows]
        da_operand = workspace.bind_product_operand(0, deltas.shape)
        h_operand = workspace.bind_product_operand(1, (planes_in * rows, n_in))
        sum_da = bind_sum_columns(da[0])
        finish = None if dh is None or below is None else _bind_delta(jet, dh, *below, workspace)
        outgoing = 0 if dh is None else len(dh) * rows
        spare = None if dh is None else workspace.scratch_like(dh[0]).a

        def backward(h_prev: Array, dW: Array | None, db: Array | None, accumulate: bool) -> None:
            factors = deltas if da_operand is None else da_operand(deltas)
            if dW is not None and db is not None:
                inputs = h_prev[:planes_in].reshape(-1, n_in)
                dW_sum, db_sum = dW, db
                if accumulate:
                    dW_sum, db_sum = workspace.gradient[: dW.size].reshape(dW.shape), np.empty_like(db)
                factors[: len(with_inputs)].T.dot(inputs if h_operand is None else h_operand(inputs), dW_sum)
                sum_da(db_sum)
                if accumulate:
                    np.add(dW, dW_sum, out=dW)
                    np.add(db, db_sum, out=db)
            if dh is None:
                return
            factors[:outgoing].dot(W, dh.reshape(-1, n_in))
            if moves is not None and spare is not None:
                factors[rows : 2 * rows].dot(moves[0], spare)
                np.add(dh[0], spare, out=dh[0])
            if finish is not None:
                finish()

        return backward


def _bind_activation(
    jet: Jet,
    activation: Activation,
    a: Array,
    h: Array,
    m: Sequence[Array],
    workspace: NumpyWorkspace,
    *,
    rounded: bool,
) -> Callable[[], object]:
    """Return a function: h = g(a), and m, for jets."""
    D, scratch = jet.directions, workspace.scratch_like(a[0])
    round_h = workspace.bind_round if rounded else lambda _: None
    round_values, round_planes = round_h(h[0]), round_h(h[1:])
    if activation.name == "identity":
        return partial(_copy, a, h, round_h(h))
    assert activation.multipliers is not None
    fill, from_a = activation.multipliers.fill, activation.derivative_from == "a"
    source = (a if from_a else h)[0]
    squares = _weighted_squares(jet, a, scratch.a, scratch.b)

    def activate() -> None:
        activation.forward(a[0], h[0], scratch)
        if round_values is not None:
            round_values()
        if m:
            fill(source, m, scratch)
        for s in range(len(jet.seconds)):
            plane, total = h[1 + D + s], squares(s)
            np.multiply(a[1 + D + s], m[0], out=plane)
            if total is not None and len(m) > 1:  # g'' is m₂, or m₁ m₂
                np.multiply(total, m[1], out=total)
                if not from_a:
                    np.multiply(total, m[0], out=total)
                np.add(plane, total, out=plane)
        if D > 0:
            np.multiply(a[1 : 1 + D], m[0], out=h[1 : 1 + D])
        if round_planes is not None:
            round_planes()

    return activate


def _bind_softmax(
    jet: Jet, a: Array, y: Array, dy: Array, workspace: NumpyWorkspace
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return forward, which fills y with softmax's jet, and backward, which turns dy into da in place.

    With J v = y ⊙ (v − Σ y v): y_d = J a_d, da_d = J dy_d and, with p = Σ y a_d and q = Σ y dy_d,
    da_0 = J (dy_0 + Σ_d (dy_d (a_d − p) − a_d q)).
    """
    softmax, scratch = Softmax(a[0], y[0]), workspace.scratch_like(y[0])
    product, sums = scratch.a, np.empty((y.shape[1], 1), y.dtype)
    sum_product = partial(bind_sum_rows(product), sums[:, 0])

    def times_jacobian(v: Array, out: Array) -> None:
        np.multiply(y[0], v, out=product)
        sum_product()
        np.subtract(v, sums, out=out)
        np.multiply(out, y[0], out=out)

    def forward() -> None:
        softmax.shift()
        softmax.normalise()
        for d in range(1, jet.planes):
            times_jacobian(a[d], y[d])

    def backward() -> None:
        for d in range(1, jet.planes):
            np.multiply(y[0], a[d], out=product)
            sum_product()
            np.subtract(a[d], sums, out=product)
            np.multiply(product, dy[d], out=product)
            np.add(dy[0], product, out=dy[0])
            np.multiply(y[0], dy[d], out=product)
            sum_product()
            np.multiply(a[d], sums, out=product)
            np.subtract(dy[0], product, out=dy[0])
            times_jacobian(dy[d], dy[d])
        times_jacobian(dy[0], dy[0])

    return forward, backward


def _bind_delta(
    jet: Jet, dh: Array, activation: Activation, z: Array, m: Sequence[Array], workspace: NumpyWorkspace
) -> Callable[[], object]:
    """Return a function: dh → da in place, for jets."""
    round_da = workspace.bind_round(dh)
    if activation.name == "identity":
        return round_da or _nothing
    D, scratch = jet.directions, workspace.scratch_like(dh[0])
    seconds = range(1 + D, jet.planes)
    squares = _weighted_squares(jet, z, scratch.b, scratch.c)
    total, product = scratch.a, scratch.b

    def values() -> None:
        """da_0 = m₁ dh_0 + m₂ (Σ_d dh_d z_d + Σ_s dh_s z_s) + m₃ Σ_s dh_s Σ_d C_sd z_d²."""
        np.multiply(dh[1], z[1], out=total)
        for plane in range(2, jet.planes):
            np.multiply(dh[plane], z[plane], out=product)
            np.add(total, product, out=total)
        np.multiply(total, m[1], out=total)
        for s, plane in enumerate(seconds if len(m) > 2 else ()):
            of_squares = squares(s)
            if of_squares is not None:
                np.multiply(of_squares, dh[plane], out=of_squares)
                np.multiply(of_squares, m[2], out=of_squares)
                np.add(total, of_squares, out=total)
        np.multiply(dh[0], m[0], out=dh[0])
        np.add(dh[0], total, out=dh[0])

    def direction(d: int) -> None:
        """da_d = m₁ dh_d + 2 m₂ z_d Σ_s C_sd dh_s."""
        np.multiply(dh[1 + d], m[0], out=dh[1 + d])
        weights = [2 * weights[d] for weights in jet.seconds] if len(m) > 1 else []
        if _combine(weights, dh[1 + D :], total, product):
            np.multiply(total, m[1], out=total)
            np.multiply(total, z[1 + d], out=total)
            np.add(dh[1 + d], total, out=dh[1 + d])

    def delta() -> None:
        if D > 0 and len(m) > 1:
            values()
        else:
            np.multiply(dh[0], m[0], out=dh[0])
        for d in range(D):
            direction(d)
        for plane in seconds:
            np.multiply(dh[plane], m[0], out=dh[plane])
        if round_da is not None:
            round_da()

    return delta


def _nothing() -> None:
    pass


def _copy(a: Array, h: Array, round_h: Callable[[], object] | None) -> None:
    np.copyto(h, a)
    if round_h is not None:
        round_h()


def _weighted_squares(jet: Jet, z: Array, out: Array, spare: Array) -> Callable[[int], Array | None]:
    """Return a function of s: Σ_d C_sd z_d² in `out`; None where every C_sd is 0."""

    def squares(s: int) -> Array | None:
        started = False
        for d, weight in enumerate(jet.seconds[s]):
            if weight == 0:
                continue
            term = spare if started else out
            np.multiply(z[1 + d], z[1 + d], out=term)
            if weight != 1:
                np.multiply(term, weight, out=term)
            if started:
                np.add(out, term, out=out)
            started = True
        return out if started else None

    return squares


def _combine(weights: Sequence[float], planes: Array, out: Array, spare: Array) -> bool:
    """out = Σ_s weights_s planes_s; return whether there is a weight other than 0."""
    started = False
    for weight, plane in zip(weights, planes, strict=False):
        if weight == 0:
            continue
        np.multiply(plane, weight, out=spare if started else out)
        if started:
            np.add(out, spare, out=out)
        started = True
    return started
