"""Activations with constants, such as softplus(beta=100): families, and a row of the table for each choice.

A row is made when its name is met. It works as a user's own does: NumPy functions here, expressions for kernels and for
the reproducible mode.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from gpuback._core import multipliers
from gpuback._core.activations import Activation, Siren
from gpuback._core.activations_from_a import SATURATED, silu
from gpuback._core.activations_from_h import sigmoid, softplus
from gpuback._core.activations_piecewise import ZERO
from gpuback._core.expressions import NUMBER, CudaForms
from gpuback._core.multipliers import Multipliers, curved, straight
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array
from gpuback.errors import OptionError

SMALLEST, LARGEST = 1e-30, 1e30
"""Between these, every dtype's sums hold a constant and its reciprocal."""

Apply = Callable[[Array, Array, Scratch], None]


class Constant(NamedTuple):
    """A constant of a family.

    Attributes:
        default: as in the function without constants.
        positive: whether it must be above 0.
    """

    default: float
    positive: bool = True

    @property
    def expected(self) -> str:
        return f"a number from {SMALLEST:g} to {LARGEST:g}" if self.positive else f"a number within ±{LARGEST:g}"

    def holds(self, value: float) -> bool:
        return SMALLEST <= value <= LARGEST if self.positive else abs(value) <= LARGEST


class Family(NamedTuple):
    """Functions that differ in constants.

    Attributes:
        constants: by name.
        same: a function of the constants that gives the name of the same function in the table, if there is one.
        make: a function of a name and the constants that makes the row.
    """

    constants: Mapping[str, Constant]
    same: Callable[..., str | None]
    make: Callable[..., Activation]


def _row(
    name: str,
    source: Literal["h", "a"],
    initialisation: Literal["he", "glorot"] | Siren,
    forward: Apply,
    backward: Apply,
    forms: CudaForms,
    multipliers: Multipliers,
    kinks: tuple[float, ...] = (),
) -> Activation:
    return Activation(name, None, source, initialisation, forward, backward, kinks, forms, multipliers)


def _leaky_relu(name: str, slope: float) -> Activation:
    extreme = np.maximum if slope <= 1 else np.minimum

    def forward(a: Array, h: Array, scratch: Scratch) -> None:
        """h = a where a > 0, else slope a."""
        np.multiply(a, slope, out=scratch.a)
        extreme(a, scratch.a, out=h)

    def backward(dh: Array, source: Array, scratch: Scratch) -> None:
        """g' = 1 where a > 0, else slope. Where slope > 0, h has the sign of a."""
        slopes = scratch.a
        np.greater(source, ZERO, out=scratch.mask)
        np.copyto(slopes, slope)
        np.copyto(slopes, 1, where=scratch.mask)
        np.multiply(dh, slopes, out=dh)

    forms = CudaForms(f"x > 0 ? x : {slope!r} * x", f"x > 0 ? 1 : {slope!r}")
    return _row(name, "h" if slope > 0 else "a", "he", forward, backward, forms, straight(backward), (0.0,))


def _exponential_below(a: Array, h: Array, scratch: Scratch, alpha: float, width: float) -> None:
    """h = a where a > 0, else α (e^(a/width) − 1)."""
    below = scratch.a
    np.minimum(a, scratch.zeros, out=below)
    if width != 1:
        np.divide(below, width, out=below)
    np.expm1(below, out=below)
    np.multiply(below, alpha, out=below)
    np.maximum(a, scratch.zeros, out=h)
    np.add(h, below, out=h)


def _elu(name: str, alpha: float) -> Activation:
    forward = functools.partial(_exponential_below, alpha=alpha, width=1.0)

    def backward(dh: Array, h: Array, scratch: Scratch) -> None:
        """g' = 1 where h > 0, else h + α = α e^a."""
        slope = scratch.a
        np.add(h, alpha, out=slope)
        np.greater(h, ZERO, out=scratch.mask)
        np.copyto(slope, 1, where=scratch.mask)
        np.multiply(dh, slope, out=dh)

    forms = CudaForms(f"x > 0 ? x : {alpha!r} * expm1_of(x)", f"x > 0 ? 1 : x + {alpha!r}")
    return _row(name, "h", "he", forward, backward, forms, curved(backward, multipliers.elu, 2), (0.0,))


def _celu(name: str, alpha: float) -> Activation:
    forward = functools.partial(_exponential_below, alpha=alpha, width=alpha)

    def backward(dh: Array, h: Array, scratch: Scratch) -> None:
        """g' = 1 where h > 0, else h/α + 1 = e^(a/α)."""
        slope = scratch.a
        np.minimum(h, scratch.zeros, out=slope)
        np.divide(slope, alpha, out=slope)
        np.add(slope, 1, out=slope)
        np.multiply(dh, slope, out=dh)

    forms = CudaForms(f"x > 0 ? x : {alpha!r} * expm1_of(x / {alpha!r})", f"x > 0 ? 1 : x / {alpha!r} + 1")
    curves = curved(backward, multipliers.elu, 2, width=alpha)
    return _row(name, "h", "he", forward, backward, forms, curves, (0.0,))


def _softplus(name: str, beta: float) -> Activation:
    def forward(a: Array, h: Array, scratch: Scratch) -> None:
        """h = log(1 + e^(β a))/β."""
        np.multiply(a, beta, out=h)
        softplus(h, h, scratch)
        np.divide(h, beta, out=h)

    def backward(dh: Array, h: Array, scratch: Scratch) -> None:
        """g' = sigmoid(β a) = −expm1(−β h)."""
        slope = scratch.a
        np.multiply(h, -beta, out=slope)
        np.expm1(slope, out=slope)
        np.negative(slope, out=slope)
        np.multiply(dh, slope, out=dh)

    forms = CudaForms(f"softplus({beta!r} * x) / {beta!r}", f"-expm1_of(-{beta!r} * x)")
    return _row(name, "h", "he", forward, backward, forms, curved(backward, multipliers.softplus, beta=beta))


def _silu(name: str, beta: float) -> Activation:
    def forward(a: Array, h: Array, scratch: Scratch) -> None:
        """h = a·sigmoid(β a), as u·sigmoid(u)/β with u = β a."""
        u = scratch.b
        np.multiply(a, beta, out=u)
        silu(u, h, scratch)
        np.divide(h, beta, out=h)

    def backward(dh: Array, a: Array, scratch: Scratch) -> None:
        """g' = s (1 + u (1 − s)), with s = sigmoid(u) and 1 − s = sigmoid(−u)."""
        slope, s = scratch.a, scratch.b
        np.multiply(a, beta, out=s)
        sigmoid(s, s, scratch)
        np.multiply(dh, s, out=dh)
        np.multiply(a, -beta, out=s)
        sigmoid(s, s, scratch)
        np.multiply(a, beta, out=slope)
        np.clip(slope, -SATURATED, SATURATED, out=slope)
        np.multiply(slope, s, out=slope)
        np.add(slope, 1, out=slope)
        np.multiply(dh, slope, out=dh)

    u = f"({beta!r} * x)"
    below = f"({u} < -{SATURATED!r} ? -{SATURATED!r} : {u})"
    within = f"({u} > {SATURATED!r} ? {SATURATED!r} : {below})"
    forms = CudaForms(f"{below} * sigmoid({u}) / {beta!r}", f"sigmoid({u}) * (1 + {within} * sigmoid(-{u}))")
    whole = Multipliers(functools.partial(multipliers.silu, beta=beta), 3)
    return _row(name, "a", "he", forward, backward, forms, whole)


def _sine(name: str, w0: float) -> Activation:
    def forward(a: Array, h: Array, scratch: Scratch) -> None:
        """h = sin(w0 a)."""
        np.multiply(a, w0, out=h)
        np.sin(h, out=h)

    def backward(dh: Array, a: Array, scratch: Scratch) -> None:
        """g' = w0 cos(w0 a)."""
        slope = scratch.a
        np.multiply(a, w0, out=slope)
        np.cos(slope, out=slope)
        np.multiply(slope, w0, out=slope)
        np.multiply(dh, slope, out=dh)

    forms = CudaForms(f"sin_of({w0!r} * x)", f"{w0!r} * cos_of({w0!r} * x)")
    return _row(name, "a", Siren(w0), forward, backward, forms, curved(backward, multipliers.sine, w0=w0))


def _hard_tanh(name: str, low: float, high: float) -> Activation:
    if not low < high:
        raise OptionError(
            f"activation hard_tanh: expected low below high, got low={_written(low)}, high={_written(high)}"
        )

    def forward(a: Array, h: Array, scratch: Scratch) -> None:
        """h = min(max(a, low), high)."""
        np.clip(a, low, high, out=h)

    def backward(dh: Array, a: Array, scratch: Scratch) -> None:
        """g' = 1 between low and high, 0 at and beyond them. From a, as 16 bits may not hold the ends of h."""
        np.greater(a, low, out=scratch.mask)
        np.multiply(dh, scratch.mask, out=dh)
        np.less(a, high, out=scratch.mask)
        np.multiply(dh, scratch.mask, out=dh)

    forms = CudaForms(f"x < {low!r} ? {low!r} : (x > {high!r} ? {high!r} : x)", f"x > {low!r} && x < {high!r} ? 1 : 0")
    return _row(name, "a", "glorot", forward, backward, forms, straight(backward), (low, high))


def _one(constant: str, default: Constant, names: Mapping[float, str], make: Callable[..., Activation]) -> Family:
    """Make a family of one constant, some of whose values give functions of the table."""
    return Family({constant: default}, lambda **values: names.get(values[constant]), make)


FAMILIES: dict[str, Family] = {
    "leaky_relu": _one("slope", Constant(0.01, positive=False), {0.01: "leaky_relu", 0.0: "relu"}, _leaky_relu),
    "elu": _one("alpha", Constant(1.0), {1.0: "elu"}, _elu),
    "celu": _one("alpha", Constant(1.0), {1.0: "elu"}, _celu),
    "softplus": _one("beta", Constant(1.0), {1.0: "softplus"}, _softplus),
    "sine": _one("w0", Constant(1.0), {1.0: "sine"}, _sine),
    "silu": _one("beta", Constant(1.0), {1.0: "silu"}, _silu),
    "hard_tanh": Family(
        {"low": Constant(-1.0, positive=False), "high": Constant(1.0, positive=False)},
        lambda low, high: {(-1.0, 1.0): "hard_tanh", (0.0, 6.0): "relu6"}.get((low, high)),
        _hard_tanh,
    ),
}
"""By name."""

_CALL = re.compile(r"\s*(?P<family>\w+)\s*\((?P<constants>.*)\)\s*", re.DOTALL)

_NUMBER = re.compile(rf"[+-]?{NUMBER}", re.ASCII)


def examples() -> list[str]:
    """List the families as they are written."""
    return [
        f"{name}({', '.join(f'{constant}=…' for constant in family.constants)})" for name, family in FAMILIES.items()
    ]


def with_constants(name: str) -> str | Activation | None:
    """Read a name with constants.

    Returns:
        The row, whose name is canonical: constants in the family's order, without those that have their defaults; or
        the name of the same function in the table. None if the name belongs to no family.

    Raises:
        OptionError: the family has no such constant, or a value is out of range; the message says what was expected.
    """
    match = _CALL.fullmatch(name)
    family = FAMILIES.get(match["family"] if match else name)
    if family is None:
        return None
    title = match["family"] if match else name
    values = _values(title, family, match["constants"] if match else "")
    same = family.same(**values)
    return same if same is not None else _made(title, tuple(values.items()))


def constants_of(name: str) -> tuple[str, dict[str, float]] | None:
    """Return the family and all constants of a canonical name; None if it belongs to no family."""
    match = _CALL.fullmatch(name)
    if match is None or match["family"] not in FAMILIES:
        return None
    family = match["family"]
    return family, _values(family, FAMILIES[family], match["constants"])


@functools.lru_cache(maxsize=256)
def _made(title: str, values: tuple[tuple[str, float], ...]) -> Activation:
    family = FAMILIES[title]
    told = [
        f"{constant}={_written(value)}" for constant, value in values if value != family.constants[constant].default
    ]
    return family.make(f"{title}({', '.join(told)})", **dict(values))


def _values(title: str, family: Family, text: str) -> dict[str, float]:
    """Read constant=number, …; constants that are not named have their defaults."""
    values = {constant: row.default for constant, row in family.constants.items()}
    named: set[str] = set()
    for part in text.split(",") if text.strip() else ():
        constant, sign, number = (piece.strip() for piece in part.partition("="))
        if not sign or constant not in values or constant in named:
            expected = " and ".join(f"{other}=number" for other in values)
            raise OptionError(f"activation {title}: expected {expected}, got {part.strip()!r} in '{title}({text})'")
        named.add(constant)
        row = family.constants[constant]
        value = float(number) + 0.0 if _NUMBER.fullmatch(number) else math.nan  # −0 becomes 0
        if not row.holds(value):
            raise OptionError(f"activation {title}: expected {constant} to be {row.expected}, got {number!r}")
        values[constant] = value
    return values


def _written(value: float) -> str:
    """Write a number as briefly as reads back to the same."""
    return repr(value).removesuffix(".0")
