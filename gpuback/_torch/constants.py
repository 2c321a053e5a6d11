"""PyTorch's modules with constants, and the names that gpuback has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gpuback._core.activation_families import constants_of
from gpuback._core.activation_names import activation_named
from gpuback.errors import OptionError

SMALLEST_THRESHOLD = 20
"""Above this threshold of β a, where PyTorch's softplus is a itself, log(1 + e^(β a)) is β a to 10⁻¹⁰ of it."""


def _softplus(module: Any) -> str:
    if module.threshold < SMALLEST_THRESHOLD:
        raise OptionError(f"has threshold={module.threshold!r}; expected {SMALLEST_THRESHOLD} or more")
    return f"softplus(beta={float(module.beta)!r})"


def _prelu(module: Any) -> str:
    if module.num_parameters != 1:
        raise OptionError(f"has {module.num_parameters} slopes; expected one for all units")
    if module.weight.requires_grad:
        raise OptionError(
            "trains its slope, which gpuback's leaky_relu does not; module.weight.requires_grad_(False) first"
        )
    return f"leaky_relu(slope={float(module.weight)!r})"


NAMED: dict[type[nn.Module], Callable[[Any], str]] = {
    nn.LeakyReLU: lambda module: f"leaky_relu(slope={float(module.negative_slope)!r})",
    nn.ELU: lambda module: f"elu(alpha={float(module.alpha)!r})",
    nn.CELU: lambda module: f"celu(alpha={float(module.alpha)!r})",
    nn.Softplus: _softplus,
    nn.Hardtanh: lambda module: f"hard_tanh(low={float(module.min_val)!r}, high={float(module.max_val)!r})",
    nn.PReLU: _prelu,
}
"""The name of what a module with constants computes, perhaps not canonical; OptionError says why it has none."""

MADE: dict[str, Callable[..., nn.Module]] = {
    "leaky_relu": lambda slope: nn.LeakyReLU(slope),
    "elu": lambda alpha: nn.ELU(alpha),
    "celu": lambda alpha: nn.CELU(alpha),
    "softplus": lambda beta: nn.Softplus(beta),
    "hard_tanh": lambda low, high: nn.Hardtanh(low, high),
}
"""PyTorch's module for a family's constants."""


def name_of_module(module: nn.Module) -> str:
    """Return the canonical name of what a module of `NAMED` computes.

    Raises:
        OptionError: gpuback has no such function; the message says why, to follow the module's name.
    """
    return activation_named(NAMED[type(module)](module)).name


def module_with_constants(name: str) -> nn.Module | None:
    """Make PyTorch's module for a canonical name with constants; None if there is none."""
    found = constants_of(name)
    return MADE[found[0]](**found[1]) if found is not None and found[0] in MADE else None
