"""Activations of a user's own: how they are checked and registered, and how their functions become a row."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuback._core.activation_names import REGISTERED, is_taken
from gpuback._core.activations import Activation
from gpuback._core.expressions import CudaForms, Expression
from gpuback._core.multipliers import Multipliers
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array
from gpuback.errors import DtypeError, OptionError, ShapeError, require_known

LIMIT = 1e-6
"""How far slope may lie from differences of forward, and a form from its function, relative to the largest of both."""

STEPS = (1e-3, 1e-4, 1e-5)
"""Steps of differences. Long ones suffer from curvature, short ones from rounding; a wrong slope is wrong for all."""

FAR = np.array([10, 12, 16, 20, 30, 50, 80, 100, 300, 1e3, 1e4])
POINTS = np.concatenate([np.linspace(-8.0, 8.0, 641), np.linspace(-1.0, 1.0, 401)[1::2], -FAR, FAR])
"""Where functions are compared. Far out they may overflow, and where they do nothing is compared."""

IS_FAR = np.abs(POINTS) >= FAR[0]
PART = np.flatnonzero((POINTS > -4) & (POINTS < 2))[::-1]
"""Points that have another order, mean and maximum than all of them."""

Function = Callable[[Array], Array]

_LOCK = threading.RLock()


def register_activation(
    name: str,
    *,
    forward: Callable[[NDArray[Any]], NDArray[Any]],
    slope: Callable[[NDArray[Any]], NDArray[Any]],
    curvature: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
    third: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
    derivative_from: Literal["a", "h"] = "a",
    initialisation: Literal["glorot", "he"] = "glorot",
    kinks: Sequence[float] = (),
    cuda: CudaForms | None = None,
) -> None:
    """Register an activation under a name that `MLP` and everything else that takes names then knows.

    The functions work element by element on NumPy arrays of any shape. They return fresh arrays of the same shape and
    dtype, float32 or float64, and are called on several threads at once. `slope` is compared with differences of
    `forward` in float64, `curvature` of `slope`, `third` of `curvature`, and the forms with the functions, densely for
    |a| ≤ 8 and at 22 points out to ±10⁴.

    A name is registered in this process alone. Register it before `MLP.load` of a network with it, and in every
    process that copies or unpickles one.

    Args:
        name: an identifier that is not taken. To register it again is allowed with equal functions and options only.
        forward: h = g(a), of a.
        slope: g' of a or, with derivative_from="h", of h.
        curvature: the derivative of `slope` by its argument: g'' of a, or with derivative_from="h", where g' = φ(h), φ'
            of h. `MLP.hvp` and the like need it, `MLP.taylor` for second derivatives.
        third: the derivative of `curvature` by its argument, which the way back from second derivatives needs.
        derivative_from: "a" or "h". With "h" a is not kept for the backward pass, which saves memory; g' has to follow
            from h.
        initialisation: of the weights: "glorot", or "he" for rectifiers.
        kinks: each a at which g' or g'' jumps. Checks by differences leave their surroundings out.
        cuda: the two functions as expressions. Without it the CUDA backend and the reproducible mode refuse the
            activation.

    Raises:
        OptionError: a name that is taken or no identifier, an unknown option, a function that does not work element by
            element, one that is not the derivative of the one before, or a form that computes something else; the
            message names the worst point. Or `third` without `curvature`.
        ShapeError, DtypeError: a function returns another shape or dtype than it was given.

    Example:
        >>> import numpy as np
        >>> import gpuback
        >>> gpuback.register_activation(
        ...     "bump",
        ...     forward=lambda a: np.exp(-a * a),
        ...     slope=lambda a: -2 * a * np.exp(-a * a),
        ...     cuda=gpuback.CudaForms(forward="exp_of(-x * x)", slope="-2 * x * exp_of(-x * x)"),
        ... )
        >>> gpuback.MLP([2, 3, 1], activation="bump", loss="squared_error").architecture.activations
        ('bump',)
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise OptionError(f"name of an activation: expected an identifier such as 'bump', got {name!r}")
    if is_taken(name):
        raise OptionError(f"name of an activation: expected one that is not taken, got {name!r}, which gpuback has")
    require_known("derivative_from", derivative_from, ("a", "h"))
    require_known("initialisation", initialisation, ("glorot", "he"))
    if cuda is not None and not isinstance(cuda, CudaForms):
        raise OptionError(f"cuda: expected a gpuback.CudaForms or None, got {cuda!r}")
    for what, function in (("forward", forward), ("slope", slope)):
        if not callable(function):
            raise OptionError(f"{what}: expected a function of a NumPy array, got {function!r}")
    for what, optional in (("curvature", curvature), ("third", third)):
        if not (optional is None or callable(optional)):
            raise OptionError(f"{what}: expected a function of a NumPy array or None, got {optional!r}")
    if curvature is None and third is not None:
        raise OptionError("third: expected curvature with it, whose derivative it is")
    own = _Own(name, forward, slope, curvature, third)
    row = Activation(
        *(name, None, derivative_from, initialisation, own.forward, own.backward, _sorted(kinks), cuda),
        multipliers=Multipliers(own.fill, len(own.multipliers), len(own.multipliers)),
    )
    with _LOCK:
        before = REGISTERED.get(name)
        if before is None:
            own.check(row)
            REGISTERED[name] = row
        elif not _equal(before, row):
            raise OptionError(
                f"activation {name!r} is registered with other functions or options: expected the same ones, or "
                "another name"
            )


def _sorted(kinks: Sequence[float]) -> tuple[float, ...]:
    try:
        points = tuple(sorted(float(kink) for kink in kinks))
    except (TypeError, ValueError):
        points = (math.nan,)
    if not all(map(math.isfinite, points)):
        raise OptionError(f"kinks: expected a sequence of finite numbers, got {kinks!r}")
    return points


class _Own:
    """A user's functions as a row calls them: into gpuback's buffers, with a look at what they return."""

    def __init__(
        self, name: str, g: Function, slope: Function, curvature: Function | None = None, third: Function | None = None
    ) -> None:
        self.name, self.g, self.slope = name, g, slope
        given = {"slope": slope, "curvature": curvature, "third": third}
        self.multipliers = {what: function for what, function in given.items() if function is not None}

    def forward(self, a: Array, h: Array, scratch: Scratch) -> None:
        """h = g(a)."""
        np.copyto(h, self._called("forward", self.g, a))

    def backward(self, dh: Array, source: Array, scratch: Scratch) -> None:
        """dh ← dh ⊙ g'."""
        np.multiply(dh, self._called("slope", self.slope, source), out=dh)

    def fill(self, source: Array, m: Sequence[Array], scratch: Scratch) -> None:
        """Fill m₁, m₂, m₃, as many as there are."""
        for array, (what, function) in zip(m, self.multipliers.items(), strict=False):
            np.copyto(array, self._called(what, function, source))

    def _called(self, what: str, function: Function, x: Array) -> Array:
        """Return a function's result for an array that it cannot write to."""
        given = x.view()
        given.flags.writeable = False
        result = function(given)
        if not isinstance(result, np.ndarray) or result.shape != x.shape:
            came = result.shape if isinstance(result, np.ndarray) else type(result).__name__
            raise ShapeError(f"{what} of activation {self.name!r}: expected an array of shape {x.shape}, got {came}")
        if result.dtype != x.dtype:
            raise DtypeError(
                f"{what} of activation {self.name!r}: expected dtype {x.dtype}, as it was given, got {result.dtype}. "
                "Python's numbers keep an array's dtype, NumPy's float64 numbers do not"
            )
        return result

    def check(self, row: Activation) -> None:
        """Compare slope with differences of forward, and the forms with both."""
        with np.errstate(all="ignore"):
            self._called("forward", self.g, POINTS.astype(np.float32).reshape(-1, 1))
            for what, function in self.multipliers.items():
                self._called(what, function, POINTS.astype(np.float32).reshape(-1, 1))
            h = self._at("forward", self.g, POINTS)
            source = h if row.derivative_from == "h" else POINTS
            slope = self._at("slope", self.slope, source)
            self._compare_derivative(row, ("forward", self.g, POINTS, h), ("slope", slope))
            before = "slope", self.slope, source, slope
            for what, function in list(self.multipliers.items())[1:]:
                values = self._at(what, function, source)
                self._compare_derivative(row, before, (what, values))
                before = what, function, source, values
            if row.forms is not None:
                forward_form, slope_form = row.forms.expressions
                self._compare_form("forward", forward_form, POINTS, h)
                self._compare_form("slope", slope_form, source, slope)

    def _at(self, what: str, function: Function, x: Array) -> Array:
        values = self._called(what, function, x)
        wrong = ~np.isfinite(values) & ~IS_FAR
        if wrong.any():
            first = int(wrong.argmax())
            raise OptionError(
                f"{what} of activation {self.name!r}: expected finite numbers, got {values[first]} at {x[first]:.6g}"
            )
        again, expected = self._called(what, function, x[PART]), values[PART]
        worst, error = _worst(again, expected)
        if error > LIMIT:
            raise OptionError(
                f"{what} of activation {self.name!r}: expected a function of each element alone, got "
                f"{expected[worst]:.9g} and {again[worst]:.9g} of {x[PART[worst]]:.6g} in two arrays"
            )
        return values

    def _compare_derivative(
        self, row: Activation, of: tuple[str, Function, Array, Array], derivative: tuple[str, Array]
    ) -> None:
        """Compare a function's values with differences of the one before, at that one's arguments."""
        (before, function, x, h), (what, slope) = of, derivative
        compared = np.isfinite(h) & np.isfinite(slope)
        for kink in row.kinks:
            compared &= np.abs(POINTS - kink) > 2 * STEPS[0]
        least, differences = np.full(len(POINTS), math.inf), slope
        last, settled = np.full(len(POINTS), math.nan), ~IS_FAR  # far out g may be too steep for differences
        for step in STEPS:
            near = [self._called(before, function, x + offset * step) for offset in (-2, -1, 1, 2)]
            found = (8 * (near[2] - near[1]) - (near[3] - near[0])) / (12 * step)
            roundings = 16 * 2.0**-53 * np.abs(h) / step
            errors = np.abs(found - slope) / (np.maximum(1.0, np.abs(slope)) + roundings / LIMIT)
            errors[np.isnan(errors)] = math.inf
            differences = np.where(errors < least, found, differences)
            least = np.minimum(least, errors)
            settled = settled | (np.abs(found - last) <= LIMIT * np.maximum(1.0, np.abs(found)) + roundings)
            last = found
        least[~(compared & settled)] = 0.0
        worst = int(least.argmax())
        if least[worst] > LIMIT:
            raise OptionError(
                f"{what} of activation {self.name!r}: expected the derivative of {before}, {differences[worst]:.9g} at "
                f"a = {POINTS[worst]:.6g}, got {slope[worst]:.9g}. If g' or g'' jumps there, name the place in kinks"
            )

    def _compare_form(self, what: str, form: Expression, x: Array, expected: Array) -> None:
        compared = np.isfinite(x) & np.isfinite(expected)
        x, expected = x[compared], expected[compared]
        found = form(x)
        worst, error = _worst(found, expected)
        if error > LIMIT:
            raise OptionError(
                f"CudaForms.{what} of activation {self.name!r}: expected what {what} computes, {expected[worst]:.9g} "
                f"at x = {x[worst]:.6g}, got {found[worst]:.9g}"
            )


def _worst(found: Array, expected: Array) -> tuple[int, float]:
    """Return where numbers lie furthest from those expected, and how far, relative to the larger of these and 1."""
    errors = np.abs(found - expected) / np.maximum(1.0, np.abs(expected))
    errors[np.isnan(errors)] = math.inf
    worst = int(errors.argmax())
    return worst, float(errors[worst])


def _equal(row: Activation, other: Activation) -> bool:
    """Say whether two rows compute the same: equal options and the same functions."""
    own, others = _own_of(row), _own_of(other)
    if own.multipliers.keys() != others.multipliers.keys() or not _same(own.g, others.g):
        return False
    if not all(_same(function, others.multipliers[what]) for what, function in own.multipliers.items()):
        return False
    return row == replace(other, forward=row.forward, backward=row.backward, multipliers=row.multipliers)


def _own_of(row: Activation) -> _Own:
    method: Any = row.forward
    own: _Own = method.__self__
    return own


def _same(function: Function, other: Function) -> bool:
    """Say whether two functions are one, or were made by the same code, as when a notebook's cell runs again."""
    if function == other:
        return True
    if not (isinstance(function, FunctionType) and isinstance(other, FunctionType)):
        return False
    return (
        _same_code(function.__code__, other.__code__)
        and function.__globals__ is other.__globals__
        and _same_values(function.__defaults__, other.__defaults__)
        and _same_values((function.__kwdefaults__ or {}).values(), (other.__kwdefaults__ or {}).values())
        and _same_values(_cells(function), _cells(other))
    )


def _same_code(code: CodeType, other: CodeType) -> bool:
    """Say whether two codes do the same, wherever they stand in a file."""
    names = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    return all(getattr(code, name) == getattr(other, name) for name in names) and _same_values(
        code.co_consts, other.co_consts
    )


def _cells(function: FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _same_values(values: Iterable[Any] | None, others: Iterable[Any] | None) -> bool:
    """Say whether these are the same objects, equal numbers or texts, or codes that do the same."""
    return all(itertools.starmap(_same_value, itertools.zip_longest(values or (), others or ())))


def _same_value(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if isinstance(value, CodeType) and isinstance(other, CodeType):
        return _same_code(value, other)
    return type(value) is type(other) and isinstance(value, (bool, int, float, str)) and value == other
