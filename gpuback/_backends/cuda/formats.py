"""C++ names of number formats, as the kernels' macros take them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gpuback._core.precision import Precision

Accum = Literal["float", "double"]
"""The C++ name of the accumulator's format."""


def operand_name(precision: Precision) -> str:
    """Return the C++ name of what products read."""
    return precision.name if precision.sixteen_bit else accumulator_name(precision)


def accumulator_name(precision: Precision) -> Accum:
    """Return the C++ name of the accumulator's format."""
    return accum_of(precision.accumulator)


def accum_of(dtype: np.dtype[Any]) -> Accum:
    """Return the C++ name of float32 or float64."""
    return "double" if dtype == np.float64 else "float"


def uses_tensor_cores(precision: Precision) -> bool:
    """Say whether products of this precision run on tensor cores."""
    return precision.sixteen_bit or precision.tf32
