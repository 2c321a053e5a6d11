"""Expressions in x: what they mean, in C++ and on arrays, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuback import CudaForms
from gpuback._core.expressions import FUNCTIONS, Expression
from gpuback.errors import OptionError

X = np.array([-2.5, -1.0, -0.0, 0.0, 0.3, 1.0, 7.0])


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


MEANINGS = {
    "x": X,
    " x ": X,
    "3": np.full_like(X, 3),
    ".5e1": np.full_like(X, 5),
    "1 / 2 * x": X / 2,
    "0.5f * x": X / 2,
    "1 - 2 - x": -1 - X,
    "2 / 4 / (x + 9)": 0.5 / (X + 9),
    "-x * x": -X * X,
    "--x + +x - -x": 3 * X,
    "2 + 3 * x": 2 + 3 * X,
    "Real(2) * x": 2 * X,
    "x > 0 ? x : 0.1 * x": np.where(X > 0, X, 0.1 * X),
    "x < -1 ? -1 : x > 1 ? 1 : x": np.clip(X, -1, 1),
    "x >= 1 || x <= -1 && x != -1 ? 1 : 0": np.where((X >= 1) | (X < -1), 1, 0),
    "!(x < 0) ? 1 : (x == -1) ? 2 : 3": np.where(X >= 0, 1, np.where(X == -1, 2, 3)),
    "x > 0 || x != x ? x : 0": np.maximum(X, 0),
    "exp_of(-x * x)": np.exp(-X * X),
    "expm1_of(x)": np.expm1(X),
    "log_of(1 + abs_of(x))": np.log1p(np.abs(X)),
    "log1p_of(exp_of(x))": softplus(X),
    "tanh_of(x) * sigmoid(x)": np.tanh(X) / (1 + np.exp(-X)),
    "softplus(x)": softplus(X),
}

REFUSED = {
    "": "expected a number, x, a function or (, got the end",
    "x;": "got ';'",
    "x) + (x": "expected the end after 'x', got ')'",
    "(x": "expected ')' after '( x', got the end",
    "x +": "after 'x +', got the end",
    "x x": "expected the end after 'x', got 'x'",
    "x, x": "got ', x'",
    "x // y": "after 'x /', got '/'",
    "x /* x": "after 'x /', got '*'",
    "{x}": "got '{x}'",
    "x\n#define x 1": "got '#define x 1'",
    "x = 1": "got '= 1'",
    "x\\": "got '\\\\'",
    '"x"': "got '\"x\"'",
    "a[j]": "got '[j]'",
    "a": "got 'a'",
    "exp(x)": "expected x, Real or a function out of exp_of",
    "asm(x)": "got 'asm'",
    "exp_of": "expected '(' after 'exp_of', got the end",
    "exp_of()": "expected a number, x, a function or ( after 'exp_of (', got ')'",
    "x > 0": "expected a number, such as (x > 0 ? 1 : 0)",
    "x ? 1 : 0": "expected a condition",
    "x > 0 ? 1": "expected ':'",
    "(x > 0) + 1": "expected a number",
    "x && x > 0 ? 1 : 0": "expected a condition",
    "x > 0 > 1": "expected the end after 'x > 0', got '>'",
    "0x10": "got '0x10'",
    "1.2.3": "got '1.2.3'",
    "1e": "got '1e'",
    "1e999": "expected finite numbers, got 1e999",
    "ξ": "got 'ξ'",
    "1٣": "got '٣'",
    "(" * 33 + "x" + ")" * 33: "expected at most 32 parentheses in each other after '( (",
    "+".join(["x"] * 1500): "expected at most 250 numbers, names and signs, got 2999 in 'x+x+x",
}


@pytest.mark.parametrize("text", MEANINGS)
def test_what_an_expression_means(text: str) -> None:
    np.testing.assert_allclose(Expression(text, "g")(X), MEANINGS[text], rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(OptionError, match=f"CudaForms.slope: .*{re.escape(REFUSED[text])}"):
        CudaForms(forward="x", slope=text)


def test_the_largest_expressions() -> None:
    np.testing.assert_array_equal(Expression("+".join(["x"] * 125), "g")(np.ones(3)), np.full(3, 125))
    np.testing.assert_array_equal(Expression("-" * 248 + "x", "g")(X), X)
    np.testing.assert_array_equal(Expression("abs_of(" * 32 + "x" + ")" * 32, "g")(X), np.abs(X))
    np.testing.assert_array_equal(Expression("(x)" + "+(x)" * 40, "g")(X), Expression("x" + "+x" * 40, "g")(X))


def test_something_else_than_text() -> None:
    with pytest.raises(OptionError, match="CudaForms.forward: expected an expression in x as text, got 3"):
        CudaForms(forward=3, slope="1")  # type: ignore[arg-type]


def test_c_plus_plus_has_all_parentheses_and_no_integers() -> None:
    code = Expression("-2 * x*exp_of( - x*x ) / 3 - x", "g").code
    assert code == "((((-Real(2.0)) * x) * exp_of(((-x) * x))) / Real(3.0)) - x".join("()")
    assert Expression("(((x)))", "g").code == "x"


@given(text=st.text('x0123456789.+-*/()?:<>=!&| ;{}#"\\\n,expof_Real', max_size=40))
def test_whatever_is_read_has_no_other_code_than_its_own(text: str) -> None:
    """Nothing of a text reaches a compiler but what has been understood."""
    try:
        code = Expression(text, "g").code
    except OptionError:
        return
    assert code.count("(") == code.count(")")
    assert not set(code) & set(';{}#"\\\n,')
    assert set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\d[\d.]*(e[+-]?\d+)?", "", code))) <= {"x", "Real", *FUNCTIONS}


def test_forms_are_equal_if_their_texts_are() -> None:
    assert CudaForms("x", "1") == CudaForms("x", "1") != CudaForms("x", "1 ")
    assert len({CudaForms("x", "1"), CudaForms("x", "1")}) == 1
