"""g and g' of every activation that has them as fixed sequences of operations: the table's own, and expressions'."""

from __future__ import annotations

from functools import partial

import numpy as np

from gpuback._core import elementary
from gpuback._core.activations import Activation
from gpuback._core.elementary import SCRATCH, Buffers, Function
from gpuback._core.elementary_activations import FORWARD, SLOPE
from gpuback._core.expressions import Expression
from gpuback._core.typing import Array
from gpuback.errors import OptionError

EXPRESSION_FUNCTIONS: dict[str, Function] = {
    "exp_of": elementary.exp,
    "expm1_of": elementary.expm1,
    "log_of": elementary.log,
    "log1p_of": elementary.log1p,
    "tanh_of": elementary.tanh,
    "sqrt_of": lambda x, out, scratch: np.sqrt(x, out),
    "abs_of": lambda x, out, scratch: np.copyto(out, np.abs(x)),
    "sigmoid": elementary.sigmoid,
    "softplus": elementary.softplus,
}
"""By the names that expressions call them, as in `kernels/exact/elementary.cuh`."""


def evaluated(function: Function, x: Array) -> Array:
    """Apply a function to an array, or to a number as to an array of one; return a fresh array in x's memory order."""
    if np.ndim(x) == 2 and x.flags.fnc:
        return evaluated(function, x.T).T
    x = np.ascontiguousarray(x, np.float64)
    result, *scratch = np.empty((1 + SCRATCH, *x.shape))
    function(x, result, tuple(scratch))
    return result


_EVALUATED = {name: partial(evaluated, function) for name, function in EXPRESSION_FUNCTIONS.items()}


def functions_of(activation: Activation) -> tuple[Function, Function] | None:
    """Return g and g' as fixed sequences of operations; None if there is none.

    Those of an activation without a kernel are its forms, operation by operation.
    """
    if activation.forms is None:
        name = activation.name
        return (FORWARD[name], SLOPE[name]) if name in FORWARD and name in SLOPE else None
    forward, slope = activation.forms.expressions
    if not forward.functions | slope.functions <= set(EXPRESSION_FUNCTIONS):
        return None
    return _of_expression(forward), _of_expression(slope)


def require_reproducible_form(activation: Activation | None) -> None:
    """Raise OptionError for an activation that has no fixed sequence of operations."""
    if activation is None or functions_of(activation) is not None:
        return
    functions = ", ".join(EXPRESSION_FUNCTIONS)
    raise OptionError(
        f"activation {activation.name!r} has no reproducible form: expected one of {', '.join(FORWARD)}, or one whose "
        f"gpuback.CudaForms call no other functions than {functions}"
    )


def _of_expression(expression: Expression) -> Function:
    def function(x: Array, out: Array, scratch: Buffers) -> None:
        np.copyto(out, expression(x, _EVALUATED))

    return function
