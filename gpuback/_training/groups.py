"""Parameter groups: which layers an optimizer trains, with which learning rates, and whether biases decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from gpuback._core.parameters import Layout, ParameterRange
from gpuback._core.validation import in_range
from gpuback.errors import OptionError, ShapeError

Value = TypeVar("Value", bool, float)
ByLayer: TypeAlias = "Sequence[Value | tuple[Value, Value]]"
"""A value for each layer, or a pair: for its weights and for its biases."""

Pairs: TypeAlias = "tuple[tuple[Value, Value], ...]"


class Groups(NamedTuple):
    """What an optimizer does with each layer's weights and biases; None: the same with all of them.

    Attributes:
        trainable: whether they are updated.
        multipliers: of the learning rate.
        decay_biases: whether the weight decay applies to biases.
    """

    trainable: Pairs[bool] | None = None
    multipliers: Pairs[float] | None = None
    decay_biases: bool = True

    @classmethod
    def checked(cls, trainable: ByLayer[bool] | None, multipliers: ByLayer[float] | None, decay_biases: bool) -> Groups:
        """Check what a user asked for.

        Raises:
            OptionError: a value of the wrong kind or out of range, or nothing is trainable.
        """
        switches = _pairs("trainable", "True or False", trainable, _switch)
        if switches is not None and not any(map(any, switches)):
            raise OptionError(f"trainable: expected at least one True, got {trainable!r}: nothing would be trained")
        factors = _pairs("multipliers", "a number", multipliers, _factor)
        if not isinstance(decay_biases, (bool, np.bool_)):
            raise OptionError(f"decay_biases: expected True or False, got {decay_biases!r}")
        return cls(switches, factors, bool(decay_biases))

    def require_fit(self, layout: Layout) -> None:
        """Raise ShapeError unless there are as many values as the network has layers."""
        layers = len(layout.shapes)
        for name in ("trainable", "multipliers"):
            values = getattr(self, name)
            if values is not None and len(values) != layers:
                raise ShapeError(
                    f"{name}: expected {layers} values (one per layer of sizes {layout.sizes}), got {len(values)}"
                )

    def ranges(self, layout: Layout) -> list[ParameterRange] | None:
        """Cut θ where something changes; None if nothing does."""
        if self == Groups():
            return None
        ranges: list[ParameterRange] = []
        for k, ((n_in, n_out), start) in enumerate(zip(layout.shapes, layout.weight_starts, strict=True)):
            bias = start + n_in * n_out
            for i, (first, end) in enumerate([(start, bias), (bias, bias + n_out)]):
                if self.trainable is not None and not self.trainable[k][i]:
                    continue
                multiplier = 1.0 if self.multipliers is None else self.multipliers[k][i]
                part = ParameterRange(first, end, multiplier, self.decay_biases or i == 0)
                if ranges and ranges[-1].end == first and ranges[-1][2:] == part[2:]:
                    part = part._replace(start=ranges.pop().start)
                ranges.append(part)
        return None if ranges == [ParameterRange(0, layout.n_parameters, 1.0, True)] else ranges

    @property
    def trainable_layers(self) -> tuple[bool, ...] | None:
        """Whether anything in each layer is trained; None if everything in all of them is."""
        return None if self.trainable is None or all(map(all, self.trainable)) else tuple(map(any, self.trainable))

    def options(self) -> dict[str, Any]:
        """Return the arguments that are not the defaults, in their shortest form."""
        given: dict[str, Any] = {}
        if self.trainable is not None and not all(map(all, self.trainable)):
            given["trainable"] = _shortest(self.trainable)
        if self.multipliers is not None and set(self.multipliers) != {(1.0, 1.0)}:
            given["multipliers"] = _shortest(self.multipliers)
        if not self.decay_biases:
            given["decay_biases"] = False
        return given


def _pairs(
    name: str, kind: str, values: Any, checked: Callable[[str, Any], Value]
) -> tuple[tuple[Value, Value], ...] | None:
    """Make a pair for each layer of what was given; each value is checked under its name."""
    if values is None:
        return None
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise OptionError(
            f"{name}: expected a sequence with {kind}, or a pair (weights, biases), for each layer; got {values!r}"
        )
    pairs = []
    for k, value in enumerate(values):
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != 2:
                raise OptionError(f"{name}[{k}]: expected {kind}, or a pair (weights, biases), got {value!r}")
            pairs.append((checked(f"{name}[{k}][0]", value[0]), checked(f"{name}[{k}][1]", value[1])))
        else:
            one = checked(f"{name}[{k}]", value)
            pairs.append((one, one))
    return tuple(pairs)


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):  # not 0 and 1: they could be meant as layers' numbers
        raise OptionError(f"{name}: expected True or False, or a pair (weights, biases) of them, got {value!r}")
    return bool(value)


def _factor(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)):
        raise OptionError(f"{name}: expected a finite number ≥ 0, got {value!r}")
    return in_range(name, value, 0.0)


def _shortest(pairs: Pairs[Value]) -> tuple[Any, ...]:
    return tuple(weights if weights == biases else (weights, biases) for weights, biases in pairs)
