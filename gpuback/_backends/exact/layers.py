"""The passes of a layer with `reproducible=True`, for every backend, and the functions of its output layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from gpuback._backends.exact import products
from gpuback._backends.exact.losses import RULES, Rule
from gpuback._core.activation_names import activation_named
from gpuback._core.activations import Activation
from gpuback._core.elementary import Function
from gpuback._core.losses import Loss
from gpuback._core.reproducible_forms import functions_of, require_reproducible_form
from gpuback._core.typing import Array
from gpuback.errors import OptionError

Multiply = Callable[[Array, Array, Array], object]
"""(left, right, out): out = left right, of integers whose sums float64 holds exactly, added in any order."""


class ExactLayers:
    """The passes of a layer by exact products, in workspaces with `slices`; see `gpuback._backends.protocol.Ops`."""

    _products: ClassVar[Any] = products
    """The module whose `bind_…` functions make the passes in `slices`."""

    def bind_forward(
        self,
        W: Array,
        b: Array,
        h: Array,
        a: Array | None,
        activation: Activation | None,
        workspace: Any,
    ) -> Callable[[Array], None]:
        require_reproducible_form(activation)
        bound: Callable[[Array], None] = self._products.bind_forward(workspace.slices, W, b, h, a, activation)
        return bound

    def bind_backward(
        self,
        da: Array,
        W: Array,
        da_prev: Array | None,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: Any,
    ) -> Callable[[Array, Array, Array, bool], None]:
        require_reproducible_form(activation_prev)
        bound: Callable[[Array, Array, Array, bool], None] = self._products.bind_backward(
            workspace.slices, da, W, da_prev, activation_prev, source_prev, scale
        )
        return bound

    def bind_delta(
        self,
        da: Array,
        W: Array,
        da_prev: Array,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: Any,
    ) -> Callable[[], None]:
        require_reproducible_form(activation_prev)
        bound: Callable[[], None] = self._products.bind_delta(
            workspace.slices, da, W, da_prev, activation_prev, source_prev, 1.0 / scale
        )
        return bound


def loss_rule(loss: Loss, output: str) -> Rule:
    """Return the rule that computes a loss.

    Raises:
        OptionError: it has no fixed sequence of operations.
    """
    if (loss.name, output) not in RULES:
        raise OptionError(
            f"loss {loss.name!r} with output {output!r} has no reproducible form: expected one of "
            + ", ".join(" with ".join(pair) for pair in RULES)
        )
    return RULES[loss.name, output]


def output_functions(name: str) -> tuple[Function, Function] | None:
    """Return an output function and its derivative as fixed sequences of operations; None for softmax.

    Raises:
        OptionError: there is none.
    """
    if name == "softmax":
        return None
    activation = activation_named(name)
    require_reproducible_form(activation)
    return functions_of(activation)
