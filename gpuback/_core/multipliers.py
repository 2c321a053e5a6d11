"""What a network's second derivatives need of an activation: m₁, m₂, m₃, functions of the array g' is computed from.

Where that is a, they are g', g'' and g'''. Where it is h = g(a), g' is some φ(h), and they are φ, φ' and φ'' of h. Then
g'' = m₁ m₂ and g''' = m₁ (m₂² + m₁ m₃), but the chain rule wants m₂ and m₃ themselves: with h's own derivatives in the
place of a's its formulas are the same, so a network need not keep a as well.

At a kink m₂ and m₃ are the derivatives from the side from which g' is taken. Functions work on whole arrays of their
caller and allocate nothing; `scratch` is of the source's shape, and `m` overlaps neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from gpuback._core import activations_from_a as from_a
from gpuback._core import activations_from_h as from_h
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array

Slope = Callable[[Array, Array, Scratch], None]
"""(dh, source, scratch) → None: dh ← dh ⊙ g', as in the table of activations."""

Fill = Callable[[Array, Sequence[Array], Scratch], None]
"""(source, m, scratch) → None: m[0] = m₁, m[1] = m₂, m[2] = m₃, as many as there are."""


class Multipliers(NamedTuple):
    """An activation's m₁, m₂, m₃.

    Attributes:
        fill: computes the first one, two or three of them.
        not_zero: how many are not 0 everywhere: 1 for a function of straight lines. `fill` takes no more.
        known: how many there are; of a user's activation perhaps not all.
    """

    fill: Fill
    not_zero: int
    known: int = 3


def straight(slope: Slope) -> Multipliers:
    """Return the multipliers of a function of straight lines."""
    return Multipliers(partial(_fill_first, slope), 1)


def curved(slope: Slope, curves: Callable[..., None], not_zero: int = 3, **constants: float) -> Multipliers:
    """Return multipliers of which `slope` computes the first, and `curves`, a function as `Fill`, the others."""

    def fill(source: Array, m: Sequence[Array], scratch: Scratch) -> None:
        if len(m) > 1:
            curves(source, m, scratch, **constants)
        _fill_first(slope, source, m, scratch)

    return Multipliers(fill, not_zero)


def _fill_first(slope: Slope, source: Array, m: Sequence[Array], scratch: Scratch) -> None:
    m[0].fill(1)
    slope(m[0], source, scratch)


# From h


def sigmoid(h: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₂ = 1 − 2h, m₃ = −2; m₁ = h (1 − h)."""
    np.multiply(h, -2, out=m[1])
    np.add(m[1], 1, out=m[1])
    _fill_third(m, -2)


def tanh(h: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₂ = −2h, m₃ = −2; m₁ = 1 − h²."""
    np.multiply(h, -2, out=m[1])
    _fill_third(m, -2)


def softplus(h: Array, m: Sequence[Array], scratch: Scratch, beta: float = 1.0) -> None:
    """m₂ = β e^−βh, m₃ = −β² e^−βh; m₁ = 1 − e^−βh."""
    np.multiply(h, -beta, out=m[1])
    np.exp(m[1], out=m[1])
    np.multiply(m[1], beta, out=m[1])
    if len(m) > 2:
        np.multiply(m[1], -beta, out=m[2])


def log_sigmoid(h: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₂ = m₃ = −e^h; m₁ = 1 − e^h."""
    np.exp(h, out=m[1])
    np.negative(m[1], out=m[1])
    if len(m) > 2:
        np.copyto(m[2], m[1])


def exponential(h: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₂ = 1; m₁ = h."""
    m[1].fill(1)


def elu(h: Array, m: Sequence[Array], scratch: Scratch, width: float = 1.0) -> None:
    """m₂ = 1/width where h ≤ 0, else 0; m₁ is h/width and a constant there."""
    np.less_equal(h, 0, out=scratch.mask)
    np.multiply(scratch.mask, m[1].dtype.type(1 / width), out=m[1])


def softsign(h: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₂ = −2 sign(h) (1 − |h|) = 2 (h − sign(h)), m₃ = 2; m₁ = (1 − |h|)²."""
    np.sign(h, out=m[1])
    np.subtract(h, m[1], out=m[1])
    np.multiply(m[1], 2, out=m[1])
    _fill_third(m, 2)


def squareplus(h: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₂ = 2h q², m₃ = (2 − 6h²) q³, with q = 1/(1 + h²); m₁ = h² q."""
    x, q = scratch.a, scratch.b
    np.clip(h, 0, from_h.LARGE, out=x)
    np.multiply(x, x, out=q)
    np.add(q, 1, out=q)
    np.divide(1, q, out=q)
    np.multiply(x, q, out=m[1])
    np.multiply(m[1], q, out=m[1])
    np.multiply(m[1], 2, out=m[1])
    if len(m) > 2:
        np.multiply(x, x, out=m[2])
        np.multiply(m[2], -6, out=m[2])
        np.add(m[2], 2, out=m[2])
        for _ in range(3):
            np.multiply(m[2], q, out=m[2])


def _fill_third(m: Sequence[Array], value: float) -> None:
    if len(m) > 2:
        m[2].fill(value)


# From a. One exponential gives s = sigmoid(u), w = s (1 − s) = s' and d = 1 − 2s, for which w' = w d and d' = −2w.


def silu(a: Array, m: Sequence[Array], scratch: Scratch, beta: float = 1.0) -> None:
    """m₁ = s + u w, m₂ = β w (2 + u d), m₃ = β² w (3d + u (d² − 2w)), with s, w and d of u = β a."""
    u, w, d, spare = scratch.a, scratch.b, scratch.c, scratch.d
    np.multiply(a, beta, out=u)
    _sigmoid_and_products(u, m[0], w, d, scratch)
    np.clip(u, -from_a.SATURATED, from_a.SATURATED, out=u)
    if len(m) > 2:
        _second_by_first(w, d, m[2])
        np.multiply(m[2], u, out=m[2])
        np.multiply(d, 3, out=spare)
        np.add(m[2], spare, out=m[2])
        np.multiply(m[2], w, out=m[2])
        for _ in range(2):
            np.multiply(m[2], beta, out=m[2])
    if len(m) > 1:
        np.multiply(u, d, out=m[1])
        np.add(m[1], 2, out=m[1])
        np.multiply(m[1], w, out=m[1])
        np.multiply(m[1], beta, out=m[1])
    np.multiply(u, w, out=spare)
    np.add(m[0], spare, out=m[0])


def gelu(a: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₁ = s + a u₁ w, m₂ = w (2u₁ + a v), m₃ = w (3v + a (u₃ + 3d u₁ u₂ + u₁³ (d² − 2w))), with v = u₂ + d u₁².

    u = k (a + c a³), as in `activations_from_a.gelu`, and its derivatives are u₁ = k (1 + 3c a²), u₂ = 6kc a, u₃ = 6kc.
    """
    k, kc = from_a.GELU_SCALE, from_a.GELU_CUBIC * from_a.GELU_SCALE
    x, w, d, first, spare = scratch.a, scratch.b, scratch.c, scratch.d, scratch.e
    from_a.gelu_argument(a, x)
    _sigmoid_and_products(x, m[0], w, d, scratch)
    np.clip(a, -from_a.SATURATED, from_a.SATURATED, out=x)
    np.multiply(x, x, out=first)
    np.multiply(first, 3 * kc, out=first)
    np.add(first, k, out=first)
    if len(m) > 2:
        third = m[2]
        _second_by_first(w, d, third)
        np.multiply(third, first, out=third)
        np.multiply(third, first, out=third)
        np.multiply(d, 18 * kc, out=spare)
        np.multiply(spare, x, out=spare)
        np.add(third, spare, out=third)
        np.multiply(third, first, out=third)
        np.add(third, 6 * kc, out=third)
        np.multiply(third, x, out=third)
    if len(m) > 1:
        v = m[1]
        np.multiply(first, first, out=v)
        np.multiply(v, d, out=v)
        np.multiply(x, 6 * kc, out=spare)
        np.add(v, spare, out=v)
        if len(m) > 2:
            np.multiply(v, 3, out=spare)
            np.add(m[2], spare, out=m[2])
            np.multiply(m[2], w, out=m[2])
        np.multiply(v, x, out=v)
        np.multiply(first, 2, out=spare)
        np.add(v, spare, out=v)
        np.multiply(v, w, out=v)
    np.multiply(first, x, out=first)
    np.multiply(first, w, out=first)
    np.add(m[0], first, out=m[0])


def mish(a: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₁ = ω + a q, m₂ = q (2 + a v), m₃ = q (3v + a (v² − w − 2 (q s + ω w))), with ω = tanh(softplus(a)).

    ω' = q, q' = q v and v = 1 − s − 2ω s. Of e = e^a, with p = 1 + e and r = 1/(e (e + 2) + 2): ω = e (e + 2) r,
    s = e/p, 1 − s = 1/p, and q = (1 − ω²) s = (2p r)² s. Nothing cancels.
    """
    x, s, t, omega, v = scratch.a, scratch.b, scratch.c, scratch.d, scratch.e
    q = m[0]
    np.clip(a, -from_a.SATURATED, from_a.MISH_LIMIT, out=x)
    np.exp(x, out=s)
    np.add(s, 2, out=t)
    np.multiply(s, t, out=omega)
    np.add(omega, 2, out=q)
    np.divide(omega, q, out=omega)
    np.add(s, 1, out=t)
    np.divide(t, q, out=q)
    np.multiply(q, 2, out=q)
    np.multiply(q, q, out=q)
    np.divide(s, t, out=s)
    np.divide(1, t, out=t)
    np.multiply(q, s, out=q)
    np.multiply(omega, s, out=v)
    np.multiply(v, -2, out=v)
    np.add(v, t, out=v)
    if len(m) > 2:
        third, spare = m[2], m[1]
        np.multiply(s, t, out=t)  # w
        np.multiply(omega, t, out=third)
        np.multiply(q, s, out=spare)
        np.add(third, spare, out=third)
        np.multiply(third, -2, out=third)
        np.subtract(third, t, out=third)
        np.multiply(v, v, out=spare)
        np.add(third, spare, out=third)
        np.multiply(third, x, out=third)
        np.multiply(v, 3, out=spare)
        np.add(third, spare, out=third)
        np.multiply(third, q, out=third)
    if len(m) > 1:
        np.multiply(v, x, out=m[1])
        np.add(m[1], 2, out=m[1])
        np.multiply(m[1], q, out=m[1])
    np.multiply(q, x, out=q)
    np.add(q, omega, out=q)


def gelu_erf(a: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₂ = φ (2 − a²), m₃ = φ a (a² − 4), with the normal distribution's density φ at a; m₁ = Φ + a φ."""
    x, density = scratch.a, m[1]
    np.clip(a, -from_a.NORMAL_TAIL, from_a.NORMAL_TAIL, out=x)
    from_a.normal_density(x, density)
    if len(m) > 2:
        np.multiply(x, x, out=m[2])
        np.subtract(m[2], 4, out=m[2])
        np.multiply(m[2], x, out=m[2])
        np.multiply(m[2], density, out=m[2])
    np.multiply(x, x, out=x)
    np.subtract(2, x, out=x)
    np.multiply(density, x, out=density)


def sine(a: Array, m: Sequence[Array], scratch: Scratch, w0: float = 1.0) -> None:
    """m₂ = −w₀² sin(w₀ a), m₃ = −w₀³ cos(w₀ a); m₁ = w₀ cos(w₀ a)."""
    x = scratch.a
    np.multiply(a, w0, out=x)
    np.sin(x, out=m[1])
    np.multiply(m[1], -w0 * w0, out=m[1])
    if len(m) > 2:
        np.cos(x, out=m[2])
        np.multiply(m[2], -(w0**3), out=m[2])


def hard_swish(a: Array, m: Sequence[Array], scratch: Scratch) -> None:
    """m₂ = 1/3 where |a| < 3, else 0; m₁ is a line there."""
    np.abs(a, out=m[1])
    np.less(m[1], 3, out=scratch.mask)
    np.multiply(scratch.mask, m[1].dtype.type(1 / 3), out=m[1])


def _sigmoid_and_products(u: Array, s: Array, w: Array, d: Array, scratch: Scratch) -> None:
    """Compute s = sigmoid(u), w = s (1 − s), d = 1 − 2s from e^−|u|: nothing overflows, and w and s do not cancel."""
    smaller = scratch.e
    np.abs(u, out=w)
    np.negative(w, out=w)
    np.exp(w, out=w)
    np.add(w, 1, out=s)
    np.divide(1, s, out=s)  # sigmoid(|u|)
    np.multiply(w, s, out=smaller)  # sigmoid(−|u|)
    np.multiply(smaller, s, out=w)
    np.copysign(s, u, out=s)
    np.maximum(s, smaller, out=s)
    np.multiply(s, -2, out=d)
    np.add(d, 1, out=d)


def _second_by_first(w: Array, d: Array, out: Array) -> None:
    """out = s'''/s' = d² − 2w."""
    np.multiply(d, d, out=out)
    np.subtract(out, w, out=out)
    np.subtract(out, w, out=out)
