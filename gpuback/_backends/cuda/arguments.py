"""Kernel arguments: what kernels call Python's functions, matrices and batches."""

from __future__ import annotations

import numpy as np

from gpuback._backends.cuda.arrays import pitch_of
from gpuback._core.activations import ACTIVATIONS, Activation
from gpuback._core.typing import Array
from gpuback._cuda.launch import Argument
from gpuback.errors import OptionError

SOFTMAX = -1
"""How kernels know the output function that is no activation."""


def activation_id(activation: Activation | None) -> int:
    """Return the kernels' number for an activation; without one, the identity's.

    Raises:
        OptionError: there is no kernel for it.
    """
    if activation is None:
        activation = ACTIVATIONS["identity"]
    if activation.kernel_id is None:
        raise OptionError(f"activation {activation.name!r} has no CUDA form: expected one that has, or backend='numpy'")
    return activation.kernel_id


def output_id(name: str) -> int:
    """Return the kernels' number for an output function.

    Raises:
        OptionError: there is no kernel for it.
    """
    return SOFTMAX if name == "softmax" else activation_id(ACTIVATIONS[name])


def ints(**values: int) -> dict[str, Argument]:
    """Make kernel arguments of type int."""
    return {name: np.int32(value) for name, value in values.items()}


def matrices(**given: Array | None) -> dict[str, Argument]:
    """Give each matrix its pitch: da_bo=da makes the arguments da_bo and da_pitch. None is a null pointer."""
    arguments: dict[str, Argument] = {}
    for name, matrix in given.items():
        arguments[name] = matrix
        arguments[pitch_name(name)] = np.int32(0) if matrix is None else pitch_of(matrix)
    return arguments


def pitch_name(name: str) -> str:
    """Name the parameter of a matrix's pitch: da_pitch for da_bo."""
    return f"{name.rpartition('_')[0]}_pitch"


def labels_and_targets(y: Array) -> tuple[Array | None, Array | None]:
    """Tell labels (B,) from targets (B, n_L): kernels take both, and the other one is None."""
    return (y, None) if y.ndim == 1 else (None, y)
