"""A network's weights and biases as scikit-learn's `coefs_` and `intercepts_`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._core.typing import Array, ArrayLike
from gpuback._network.mlp import MLP
from gpuback.errors import ShapeError

PARTS: dict[str, Callable[[MLP], Sequence[Array]]] = {
    "coefs_": lambda net: [W.T for W in net.weights],
    "intercepts_": lambda net: net.biases,
}
"""Views into θ in scikit-learn's orientation, by attribute."""


def copies_of_parts(net: MLP, name: str) -> list[NDArray[Any]]:
    """Return read-only copies on the host: a write to a copy would be lost silently."""
    copies = [np.array(net.ops.to_numpy(part), order="C") for part in PARTS[name](net)]
    for copy in copies:
        copy.flags.writeable = False
    return copies


def write_parts(net: MLP, name: str, values: Sequence[ArrayLike]) -> None:
    """Write a network's weights or biases.

    Raises:
        ShapeError: an array of another shape, or another number of arrays.
    """
    parts = PARTS[name](net)
    arrays = [net.ops.asarray(value, net.theta.dtype, name) for value in values]
    expected, came = [part.shape for part in parts], [array.shape for array in arrays]
    if came != expected:
        raise ShapeError(f"{name}: expected arrays of shapes {expected}, got {came}")
    for part, array in zip(parts, arrays, strict=True):
        part[...] = array


class Parts(list[NDArray[Any]]):
    """Copies of a network's weights or biases; an array that takes the place of one is written there as well."""

    def __init__(self, copies: Sequence[NDArray[Any]], write: Callable[[Sequence[ArrayLike]], None]) -> None:
        super().__init__(copies)
        self._write = write

    def __setitem__(self, index: Any, value: Any) -> None:
        changed = list(self)
        changed[index] = value
        self._write(changed)
        super().__setitem__(index, value)

    def __reduce__(self) -> tuple[type[list[Any]], tuple[list[Any]]]:
        return list, (list(self),)
