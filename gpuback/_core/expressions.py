"""Expressions in x: a small part of C++ that kernels compile, and that is also computed here, on arrays.

    expression  sum | condition ? expression : expression
    sum         + − * / of numbers, x, functions of an expression, Real(expression) and (expression)
    condition   two sums compared by < > <= >= == !=; and such conditions joined by && || ! and parentheses

All numbers are of x's type, Real, in which 1 / 2 is a half. In C++ every operation has its parentheses, so that kernels
and arrays add and multiply in the same order. The reproducible mode rests on that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, NoReturn

import numpy as np

from gpuback._core.typing import Array
from gpuback.errors import OptionError

Functions = Mapping[str, Callable[[Array], Array]]


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


FUNCTIONS: Functions = {
    "exp_of": np.exp,
    "expm1_of": np.expm1,
    "log_of": np.log,
    "log1p_of": np.log1p,
    "tanh_of": np.tanh,
    "sqrt_of": np.sqrt,
    "sin_of": np.sin,
    "cos_of": np.cos,
    "abs_of": np.abs,
    "sigmoid": _sigmoid,
    "softplus": lambda x: np.logaddexp(x, 0.0),
}
"""What an expression may call, in kernels by the same names."""

MOST_TOKENS, DEEPEST = 250, 32
"""Numbers, names and signs of an expression, and parentheses in each other: compilers and Python's stack take these."""

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
"""A number without a sign, as a regular expression with re.ASCII."""

_TOKEN = re.compile(
    rf"\s*(?:(?P<number>{NUMBER})f?(?![\w.])|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<sign>[<>=!]=|&&|\|\||[-+*/()?:<>!]))",
    re.ASCII,
)
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    **{"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide},
    **{"<": np.less, ">": np.greater, "<=": np.less_equal, ">=": np.greater_equal},
    **{"==": np.equal, "!=": np.not_equal, "&&": np.logical_and, "||": np.logical_or},
}


class _Part(NamedTuple):
    """A part of an expression, as C++ and as a function of x."""

    code: str
    compute: Callable[[Array, Functions], Array]
    is_condition: bool = False


class Expression:
    """An expression that has been read.

    Args:
        text: what users write, e.g. "-2 * x * exp_of(-x * x)".
        what: its name, for messages.

    Attributes:
        code: the same in C++, with all parentheses.
        functions: the names of the functions that it calls.

    Raises:
        OptionError: the text is none; the message says what was expected where.
    """

    def __init__(self, text: str, what: str) -> None:
        if not isinstance(text, str):
            raise OptionError(f"{what}: expected an expression in x as text, got {text!r}")
        self._text, self._what, self._tokens, self._next = text, what, self._split(text, what), 0
        self._depth = 0
        self.functions: set[str] = set()
        part = self._expression()
        if self._peek:
            self._fail("the end")
        if part.is_condition:
            self._fail("a number, such as (x > 0 ? 1 : 0), not a condition")
        self.code, self._compute = part.code, part.compute

    def __call__(self, x: Array, functions: Functions = FUNCTIONS) -> Array:
        """Compute the expression of an array, element by element, as a fresh array."""
        return np.array(np.broadcast_to(self._compute(x, functions), x.shape))

    @staticmethod
    def _split(text: str, what: str) -> list[str]:
        tokens, place, end = [], 0, len(text.rstrip())
        while place < end:
            match = _TOKEN.match(text, place)
            if match is None:
                raise OptionError(
                    f"{what}: expected numbers, x, functions, + - * / ( ) ? : < > <= >= == != && || !, "
                    f"got {text[place:].lstrip()[:12]!r} in {text!r}"
                )
            tokens.append(match["number"] or match["name"] or match["sign"])
            place = match.end()
        if len(tokens) > MOST_TOKENS:
            raise OptionError(
                f"{what}: expected at most {MOST_TOKENS} numbers, names and signs, got {len(tokens)} in {text[:60]!r}…"
            )
        return tokens

    @property
    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        """Go on past the next token if it is a wanted one, and return it."""
        token = self._peek
        if token not in wanted:
            return ""
        self._next += 1
        return token

    def _fail(self, expected: str) -> NoReturn:
        before = " ".join(self._tokens[: self._next])
        place = f" after {before!r}" if before else ""
        came = repr(self._peek) if self._peek else "the end"
        raise OptionError(f"{self._what}: expected {expected}{place}, got {came} in {self._text!r}")

    def _expect(self, token: str) -> None:
        if not self._take(token):
            self._fail(repr(token))

    def _number(self, part: _Part) -> _Part:
        if part.is_condition:
            self._fail("a number, not a condition,")
        return part

    def _condition(self, part: _Part) -> _Part:
        if not part.is_condition:
            self._fail("a condition, such as x > 0,")
        return part

    def _expression(self) -> _Part:
        first = self._either()
        if not self._take("?"):
            return first
        condition = self._condition(first)
        yes = self._number(self._expression())
        self._expect(":")
        no = self._number(self._expression())
        return _Part(
            f"({condition.code} ? {yes.code} : {no.code})",
            lambda x, f: np.where(condition.compute(x, f), yes.compute(x, f), no.compute(x, f)),
        )

    def _either(self) -> _Part:
        part = self._both()
        while self._take("||"):
            part = _joined("||", self._condition(part), self._condition(self._both()))
        return part

    def _both(self) -> _Part:
        part = self._comparison()
        while self._take("&&"):
            part = _joined("&&", self._condition(part), self._condition(self._comparison()))
        return part

    def _comparison(self) -> _Part:
        part = self._sum()
        if sign := self._take("<", ">", "<=", ">=", "==", "!="):
            return _joined(sign, self._number(part), self._number(self._sum()))
        return part

    def _sum(self) -> _Part:
        part = self._product()
        while sign := self._take("+", "-"):
            part = _joined(sign, self._number(part), self._number(self._product()))
        return part

    def _product(self) -> _Part:
        part = self._signed()
        while sign := self._take("*", "/"):
            part = _joined(sign, self._number(part), self._number(self._signed()))
        return part

    def _signed(self) -> _Part:
        if self._take("+"):
            return self._number(self._signed())
        if self._take("-"):
            part = self._number(self._signed())
            return _Part(f"(-{part.code})", lambda x, f: np.negative(part.compute(x, f)))
        if self._take("!"):
            part = self._condition(self._signed())
            return _Part(f"(!{part.code})", lambda x, f: np.logical_not(part.compute(x, f)), True)
        return self._simple()

    def _simple(self) -> _Part:
        token = self._peek
        if token == "(":
            return self._in_parentheses()
        if not re.match(r"[\w.]", token):
            self._fail("a number, x, a function or (")
        self._next += 1
        if token[0] in ".0123456789":
            number = float(token)
            if not np.isfinite(number):
                raise OptionError(f"{self._what}: expected finite numbers, got {token} in {self._text!r}")
            return _Part(f"Real({number!r})", lambda x, f: number)
        if token == "x":
            return _Part("x", lambda x, f: x)
        if token != "Real" and token not in FUNCTIONS:
            raise OptionError(
                f"{self._what}: expected x, Real or a function out of {', '.join(FUNCTIONS)}, got {token!r} "
                f"in {self._text!r}"
            )
        part = self._number(self._in_parentheses())
        if token == "Real":
            return part
        self.functions.add(token)
        return _Part(f"{token}({part.code})", lambda x, f: f[token](part.compute(x, f)))

    def _in_parentheses(self) -> _Part:
        self._expect("(")
        self._depth += 1
        if self._depth > DEEPEST:
            self._fail(f"at most {DEEPEST} parentheses in each other")
        part = self._expression()
        self._expect(")")
        self._depth -= 1
        return part


def _joined(sign: str, left: _Part, right: _Part) -> _Part:
    function = _BINARY[sign]
    return _Part(
        f"({left.code} {sign} {right.code})",
        lambda x, f: function(left.compute(x, f), right.compute(x, f)),
        sign not in "+-*/",
    )


@dataclass(frozen=True)
class CudaForms:
    """An activation and its derivative as expressions, from which kernels are compiled.

    An expression is C++ in `x`, of type `Real` (float or double): numbers, + - * /, parentheses, ?: with comparisons,
    and the functions exp_of, expm1_of, log_of, log1p_of, tanh_of, sqrt_of, sin_of, cos_of, abs_of, sigmoid and
    softplus. Numbers are of type Real, so that 1 / 2 is a half. The reproducible mode has no sin_of and cos_of. An
    expression has up to 250 numbers, names and signs, and up to 32 parentheses in each other.

    Args:
        forward: h = g(x), of x = a.
        slope: g' of x = a or, with derivative_from="h", of x = h.

    Raises:
        OptionError: a text that is no such expression; the message says what was expected where.

    Example:
        >>> from gpuback import CudaForms
        >>> CudaForms(forward="exp_of(-x * x)", slope="-2 * x * exp_of(-x * x)").forward
        'exp_of(-x * x)'
    """

    forward: str
    slope: str

    def __post_init__(self) -> None:
        _ = self.expressions  # a text that is no expression raises here, not where it is used

    def __reduce__(self) -> tuple[type[CudaForms], tuple[str, str]]:
        """Return what makes it again, for copy and pickle: the texts, not the functions that were made of them."""
        return type(self), (self.forward, self.slope)

    @cached_property
    def expressions(self) -> tuple[Expression, Expression]:
        """Both, read."""
        return Expression(self.forward, "CudaForms.forward"), Expression(self.slope, "CudaForms.slope")
