"""A user's function as a loss: (ŷ, y) → (ℓ, ∂ℓ/∂ŷ), called for blocks of rows, what it returns checked.

The rest is gpuback's: the output function before it, (∂ŷ/∂a)ᵀ after it, weights, 1/B and sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuback._core.activation_names import activation_named
from gpuback._core.loss_formulas import Run, Softmax, bind_through_output
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array
from gpuback.errors import DeviceError, DtypeError, OptionError, ShapeError

LossFunction = Callable[[Array, Array], tuple[Array, Array]]
"""(ŷ (B, n_L), y) → ℓ (B,) and ∂ℓ/∂ŷ (B, n_L)."""


def call(function: LossFunction, name: str, y_hat: Array, y: Array, kind: type, backend: str) -> tuple[Array, Array]:
    """Return ℓ (B,) and ∂ℓ/∂ŷ (B, n) of a user's function.

    Args:
        function, name: the function, and what messages call it.
        y_hat, y: (B, n), and B rows.
        kind: the type of the backend's arrays.
        backend: its name.

    Raises:
        ShapeError, DtypeError, DeviceError: it returned something else. What it raises itself comes out unchanged.
    """
    result: Any = function(y_hat, y)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        came = f"{len(result)} values" if isinstance(result, (tuple, list)) else type(result).__name__
        raise ShapeError(f"loss {name!r}: expected it to return two arrays, the losses and ∂ℓ/∂ŷ, got {came}")
    losses, gradient = result
    returned: list[tuple[str, Any, tuple[int, ...]]] = [
        ("losses", losses, y_hat.shape[:1]),
        ("∂ℓ/∂ŷ", gradient, y_hat.shape),
    ]
    for what, value, shape in returned:
        crossed = y.ndim == 1 and y_hat.shape[1] == 1 and np.shape(value) == (len(y), len(y))  # (B, 1) with (B,)
        hint = f"; y has shape {y.shape}: y[:, None] has one column" if crossed else ""
        require_returned(name, what, value, shape, kind, backend, hint)
    return losses, gradient


def require_returned(
    name: str, what: str, value: Any, shape: tuple[int, ...], kind: type, backend: str, hint: str = ""
) -> None:
    """Check one array of those that a user's loss has returned.

    Raises:
        ShapeError, DtypeError, DeviceError: it is something else.
    """
    array_or_number: Any = (kind, np.generic, int, float)  # a number has the wrong shape
    if not isinstance(value, array_or_number):
        came = f"{type(value).__module__}.{type(value).__qualname__}"
        wrong = DeviceError if hasattr(value, "__dlpack__") else DtypeError
        raise wrong(f"loss {name!r}: expected {what} as an array of the {backend} backend, got a {came}")
    if np.shape(value) != shape:
        raise ShapeError(f"loss {name!r}: expected {what} of shape {shape}, got {np.shape(value)}{hint}")
    if value.dtype.kind not in "fiu":
        raise DtypeError(f"loss {name!r}: expected {what} of real numbers, got {value.dtype}")


def require_function(function: LossFunction | None, name: str) -> LossFunction:
    """Return the function.

    Raises:
        OptionError: there is none, since it was saved by its name.
    """
    if function is None:
        raise OptionError(f"this network's loss was a function, {name!r}: MLP.load(path, loss=…) takes it again")
    return function


def bind(
    function: LossFunction | None, name: str, output: str, a: Array, losses: Array, scratch: Scratch, divisor: float
) -> Run:
    """Bind the loss on NumPy to its buffers, as a `gpuback._core.loss_formulas.Build` does."""
    y_hat = np.empty(a.shape, a.dtype)
    to_output, to_pre_activations = _bind_output(output, a, y_hat, scratch)
    shown = y_hat.view()
    shown.flags.writeable = False

    def run(y: Array) -> None:
        to_output()
        targets = y.view()
        targets.flags.writeable = False
        values, gradient = call(require_function(function, name), name, shown, targets, np.ndarray, "numpy")
        np.copyto(losses, values, casting="unsafe")
        np.copyto(a, gradient, casting="unsafe")
        to_pre_activations()
        np.divide(a, divisor, out=a)

    return run


def _bind_output(
    output: str, a: Array, y_hat: Array, scratch: Scratch
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions: y_hat = O(a); and, when a holds ∂ℓ/∂ŷ, a = (∂ŷ/∂a)ᵀ ∂ℓ/∂ŷ."""
    source = y_hat
    if output == "softmax":
        softmax = Softmax(a, y_hat)

        def forward() -> None:
            softmax.shift()
            softmax.normalise()
    else:
        activation = activation_named(output)
        source = np.empty_like(a) if activation.derivative_from == "a" else y_hat

        def forward() -> None:
            if source is not y_hat:
                np.copyto(source, a)
            activation.forward(a, y_hat, scratch)

    return forward, bind_through_output(output, source, a, scratch)
