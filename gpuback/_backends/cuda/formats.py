"""C++ names of number formats, as the kernels' macros take them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gpuback._core.precision import Precision

Real = Literal["float", "double"]
"""The C++ name of the accumulator's format."""


def operand_name(precision: Precision) -> str:
    """The C++ name of what products read."""
    return precision.name if precision.sixteen_bit else accumulator_name(precision)


def accumulator_name(precision: Precision) -> Real:
    """The C++ name of what sums are kept in."""
    return real_of(precision.accumulator)


def real_of(dtype: np.dtype[Any]) -> Real:
    """The C++ name of float32 or float64."""
    return "double" if dtype == np.float64 else "float"


def uses_tensor_cores(precision: Precision) -> bool:
    """Whether products of this precision run on tensor cores."""
    return precision.sixteen_bit or precision.tf32
