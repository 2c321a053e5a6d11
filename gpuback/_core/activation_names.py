"""From the name of an activation to its row: of the table, of a family such as softplus(beta=100), or a user's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from gpuback._core.activation_families import FAMILIES, examples, with_constants
from gpuback._core.activations import ACTIVATIONS, Activation
from gpuback.errors import UnknownActivationError, unknown_name

REGISTERED: dict[str, Activation] = {}
"""What users have registered in this process, by name; see `gpuback.register_activation`."""


def activation_named(name: object, option: str = "activation") -> Activation:
    """Return the activation of that name. Its own name is canonical: softplus( beta = 100.0 ) is softplus(beta=100).

    Args:
        name: of the table, of a family or registered.
        option: what messages call it.

    Raises:
        UnknownActivationError: there is none; the message lists what there is.
        OptionError: a family's constants are out of range.
    """
    if isinstance(name, str):
        row = ACTIVATIONS.get(name) or REGISTERED.get(name)
        if row is not None:
            return row
        found = with_constants(name)
        if isinstance(found, Activation):
            return found
        if found is not None:
            return ACTIVATIONS[found]
    outputs = ["softmax"] if option == "output" else []
    message = str(unknown_name(option, name, [*outputs, *ACTIVATIONS, *examples(), *REGISTERED]))
    if isinstance(name, str) and name.isidentifier():
        message += f" One of your own: gpuback.register_activation({name!r}, …) before MLP or MLP.load."
    raise UnknownActivationError(message)


def registered_forms(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the two expressions of each of these activations that a user has registered with them."""
    rows = {name: REGISTERED[name] for name in names if name in REGISTERED}
    return {name: [row.forms.forward, row.forms.slope] for name, row in rows.items() if row.forms is not None}


def derivative_of_output(output: str) -> Literal["h", "a"]:
    """Say what an output function's derivative is computed from: "h", which is ŷ, or "a"."""
    return "h" if output == "softmax" else activation_named(output).derivative_from


def is_taken(name: str) -> bool:
    """Say whether a name belongs to the table, to a family or to an output function."""
    return name in ACTIVATIONS or name in FAMILIES or name == "softmax"
