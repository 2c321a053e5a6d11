"""A network without its numbers: widths, functions, loss and precision, checked once and never changed."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from gpuback._core.activation_names import activation_named
from gpuback._core.activations import Activation
from gpuback._core.losses import LOSSES, Loss, OwnLoss, loss_of, saved_loss
from gpuback._core.parameters import Layout
from gpuback._core.precision import Precision
from gpuback._core.reproducible_forms import require_reproducible_form
from gpuback._text import quoted
from gpuback.errors import OptionError, ShapeError, require_known

_OPTIONS: dict[str, tuple[type, ...]] = {
    **{"sizes": (list,), "activation": (list,), "output": (str,), "loss": (str, dict)},
    **{"dtype": (str,), "allow_tf32": (bool,), "reproducible": (bool,)},
}
"""The types of what `as_options` returns, as they come back from a file."""


@dataclass(frozen=True)
class Architecture:
    """A network's structure; see `gpuback.MLP` for what the fields mean.

    Attributes:
        activations: one canonical name per hidden layer.
        loss_row: the loss, with its options.
    """

    sizes: tuple[int, ...]
    activations: tuple[str, ...]
    output: str
    loss_row: Loss
    precision: Precision

    @classmethod
    def create(
        cls,
        sizes: Iterable[int],
        *,
        activation: str | Sequence[str] = "relu",
        output: str | None = None,
        loss: object = "cross_entropy",
        dtype: object = "float32",
        allow_tf32: bool = False,
        reproducible: bool = False,
    ) -> Architecture:
        """Check what a user asked for and fill in the defaults.

        Raises:
            OptionError: an unknown name, an output function that the loss does not go with, options of the loss for
                another number of outputs, allow_tf32 without float32, reproducible with float64, allow_tf32, a loss
                that is a function or an activation without a reproducible form.
            ShapeError: fewer than two sizes, a width below 1, or a number of activations other than the number of
                hidden layers.
        """
        widths = _widths(sizes)
        if not isinstance(activation, (str, Sequence)):
            raise OptionError(f"activation: expected a name or one for each hidden layer, got {activation!r}")
        names = (activation,) * (len(widths) - 2) if isinstance(activation, str) else tuple(activation)
        if len(names) != len(widths) - 2:
            raise ShapeError(
                f"activation: expected one name, or {len(widths) - 2} (one per hidden layer of sizes {widths}), "
                f"got {len(names)}"
            )
        if isinstance(activation, str):
            activation_named(activation)  # also without a hidden layer
        names = tuple(activation_named(name).name for name in names)
        row = loss_of(loss)
        row.check_width(widths[-1])
        if output is None:
            output = row.default_output
        if isinstance(row, OwnLoss):
            output = output if output == "softmax" else activation_named(output, "output").name
            if reproducible:
                raise OptionError(
                    f"reproducible=True: expected one of gpuback's losses, got the function {row.name!r}, "
                    "whose bits nobody can promise"
                )
        else:
            require_known("output", output, {name for other in LOSSES.values() for name in other.outputs})
            if output not in row.outputs:
                raise OptionError(
                    f"loss {row.name!r} goes with output {' or '.join(map(repr, row.outputs))}, not with {output!r}"
                )
        precision = Precision.of(dtype, allow_tf32=allow_tf32, reproducible=bool(reproducible))
        made = cls(widths, names, output, row, precision)
        n_bytes = precision.accumulator.itemsize * sum((n + 1) * m for n, m in itertools.pairwise(widths))
        if n_bytes > sys.maxsize:
            raise OptionError(
                f"sizes: expected a network that memory can hold, got parameters of {quoted(n_bytes >> 30)} GiB"
            )
        made._require_reproducible_forms()
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields for copy and pickle, without the cached values derived from them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raise an error where a user's activation is not registered in this process, or without the forms it needs."""
        self.__dict__.update(state)
        for name in (*self.activations, self.output):
            if name != "softmax":
                activation_named(name)
        self._require_reproducible_forms()

    def _require_reproducible_forms(self) -> None:
        if self.precision.reproducible:
            for activation in self.hidden_activations:
                require_reproducible_form(activation)

    def require_learnable(self) -> None:
        """Raise OptionError if the output is always the same. A file may hold such a network."""
        if self.output == "softmax" and self.sizes[-1] == 1:
            raise OptionError(
                f"sizes {self.sizes}: expected two outputs or more behind softmax, which makes 1 of a single one"
                " whatever θ is. For two classes: two outputs, or one and loss='binary_cross_entropy'. For a quantity:"
                " loss='squared_error'"
            )

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.sizes)

    @property
    def hidden_activations(self) -> list[Activation]:
        return [activation_named(name) for name in self.activations]

    @property
    def loss(self) -> str:
        """The loss's name."""
        return self.loss_row.name

    def as_options(self) -> dict[str, Any]:
        """Return the options of which `from_options` makes this architecture again, as JSON can hold them.

        A loss that is a function is there by its name alone.
        """
        return {
            "sizes": list(self.sizes),
            "activation": list(self.activations),
            "output": self.output,
            "loss": self.loss_row.as_option(),
            "dtype": self.precision.name,
            "allow_tf32": self.precision.tf32,
            "reproducible": self.precision.reproducible,
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Architecture:
        """Make the architecture that `as_options` described.

        Raises:
            OptionError: an option is missing, unknown, or of another kind than `as_options` makes it.
            The rest as `create`.
        """
        if not isinstance(options, Mapping):
            raise OptionError(f"architecture: expected options by name, got {quoted(options)}")
        for name in {"sizes", "loss"} | set(options):
            if name not in options or name not in _OPTIONS or not isinstance(options[name], _OPTIONS[name]):
                known = " or ".join(kind.__name__ for kind in _OPTIONS.get(name, ()))
                raise OptionError(f"{name}: expected {known or 'no such option'}, got {quoted(options.get(name))}")
        for name, kind in (("sizes", int), ("activation", str)):
            if any(type(item) is not kind for item in options.get(name, ())):
                raise OptionError(f"{name}: expected a list of {kind.__name__}, got {quoted(options[name])}")
        return cls.create(**{**options, "loss": saved_loss(options["loss"])})


def _widths(sizes: Iterable[int]) -> tuple[int, ...]:
    try:
        widths = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise ShapeError(f"sizes: expected a sequence of integers (n_0, …, n_L), got {sizes!r}") from None
    if len(widths) < 2:
        raise ShapeError(f"sizes: expected at least two widths, input and output, got {widths}")
    for position, width in enumerate(widths):
        if width < 1:
            raise ShapeError(
                f"sizes: expected every width to be at least 1, got {width} at position {position} of {widths}"
            )
    return widths
