"""The coefficients of fixed sequences, as macros for the kernels that include `elementary.cuh`."""

from __future__ import annotations

from gpuback._core import elementary, elementary_activations
from gpuback._core.activations_from_a import MISH_LIMIT
from gpuback._core.activations_from_h import SELU_DEPTH, SELU_SCALE
from gpuback._core.activations_piecewise import LEAKY_SLOPE


def _macro(name: str, *values: float) -> str:
    """Write NAME=VALUE,…: floats to the bit, in hexadecimal, and integers as 64-bit ones."""
    return f"{name}={','.join(x.hex() if isinstance(x, float) else f'{x}ll' for x in values)}"


COEFFICIENTS = (
    _macro("EXP_COEFFICIENTS", *elementary.EXP_COEFFICIENTS),
    _macro("LOG_COEFFICIENTS", *elementary.LOG_COEFFICIENTS),
    _macro("SOFTPLUS_COEFFICIENTS", *elementary.SOFTPLUS_COEFFICIENTS),
    _macro("EXP_LIMIT", elementary.EXP_LIMIT),
    _macro("LOG2_E", elementary.LOG2_E),
    _macro("LN_2", elementary.LN_2),
    _macro("EXP_MAGIC", elementary.EXP_MAGIC),
    _macro("EXPONENT_SHIFT", elementary.EXPONENT_SHIFT),
    _macro("EXPONENT_MASK", elementary.EXPONENT_MASK),
    _macro("SQRT_2_BITS", elementary.SQRT_2_BITS),
    _macro("MINUS_LN_2_SCALED", elementary.MINUS_LN_2_SCALED),
    _macro("GELU_LINEAR", elementary_activations.GELU_LINEAR),
    _macro("GELU_CUBIC", elementary_activations.GELU_CUBIC),
    _macro("GELU_CUBIC_SLOPE", elementary_activations.GELU_CUBIC_SLOPE),
    _macro("GELU_LIMIT", elementary_activations.GELU_LIMIT),
    _macro("LEAKY_SLOPE", LEAKY_SLOPE),
    _macro("SELU_SCALE", SELU_SCALE),
    _macro("SELU_DEPTH", SELU_DEPTH),
    _macro("SOFTSIGN_LIMIT", elementary_activations.SOFTSIGN_LIMIT),
    _macro("MISH_LIMIT", MISH_LIMIT),
)
"""Each NAME=VALUE, in the order that compiled modules were cached with."""
