"""The meaning of a network's dtype: the format of products' operands, and that of sums, parameters and gradients.

| dtype    | operands of products      | θ, ∇θ, sums |
|----------|---------------------------|-------------|
| float64  | float64                   | float64     |
| float32  | float32 (or TF32, if allowed) | float32 |
| bfloat16 | bfloat16                  | float32     |
| float16  | float16, da scaled by 2^⌈log₂B⌉ | float32 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from gpuback._core.typing import Array
from gpuback.errors import DtypeError, OptionError, unknown_name

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance from 1 to the next number: the largest relative error of rounding to nearest."""

TF32_ROUNDOFF = 2.0**-11


@dataclass(frozen=True, slots=True)
class Precision:
    """The number formats of one network or one operation.

    Attributes:
        operand: the dtype that the operands of a product are rounded to.
        accumulator: the dtype of parameters, gradients and every sum: float64 for float64, else float32.
        tf32: products round their float32 operands to TF32 (11 significant bits) first.
        reproducible: every result has the same bits on every backend.
    """

    operand: np.dtype[Any]
    accumulator: np.dtype[Any]
    tf32: bool = False
    reproducible: bool = False

    @classmethod
    def of(cls, dtype: object, *, allow_tf32: bool = False, reproducible: bool = False) -> Precision:
        """Make the precision for a dtype's name or NumPy type.

        Raises:
            OptionError: an unknown name, `allow_tf32` with anything but float32, `reproducible` with float64 or
                `allow_tf32`.
        """
        name = dtype_name(dtype)
        if reproducible and name == "float64":
            raise OptionError(
                "reproducible=True goes with dtype float32, bfloat16 or float16, not with float64: reproducible "
                "products split each operand into two float64 slices, and a float64 operand does not fit into two"
            )
        if reproducible and allow_tf32:
            raise OptionError(
                "reproducible=True does not go with allow_tf32=True: how tensor cores add TF32 products differs from "
                "GPU to GPU"
            )
        if allow_tf32 and name != "float32":
            raise OptionError(f"allow_tf32=True goes with dtype float32 only, not with {name}")
        operand = DTYPES[name]
        return cls(operand, operand if operand.itemsize == 8 else DTYPES["float32"], allow_tf32, reproducible)

    @property
    def name(self) -> str:
        """The operands' dtype by name, as users write it."""
        return self.operand.name

    @property
    def sixteen_bit(self) -> bool:
        return self.operand.itemsize == 2

    def gradient_scale(self, batch_size: int) -> float:
        """Return the power of two that da carries through the backward pass: 2^⌈log₂B⌉ for float16, else 1.

        A mean over 65536 samples divides each da by 65536, below what float16 can hold. The factor undoes that. It is
        removed again, exactly, where dW and db are summed in float32.
        """
        return float(1 << (batch_size - 1).bit_length()) if self.operand == np.float16 else 1.0


def dtype_name(dtype: object) -> str:
    """Look up the name of a dtype given as a name or a NumPy type."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
        return dtype
    try:
        if dtype is None:  # np.dtype(None) is float64
            raise TypeError
        name = np.dtype(dtype).name  # type: ignore[call-overload]
    except TypeError:
        raise DtypeError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}") from None
    if name not in DTYPES:
        raise DtypeError(f"dtype: expected one of {', '.join(DTYPES)}, got {name}")
    return str(name)


def round_to_tf32(x: Array, out: Array, nan: Array | None = None) -> Array:
    """out = x rounded to TF32, which keeps 10 fraction bits of float32's 23: to nearest, ties away from zero.

    That is what `cvt.rna.tf32.f32` does: half of the last place kept is added to the magnitude and the rest cut off, so
    a carry into the exponent is right by itself, up to infinity. NaN is replaced separately, as the carry could reach
    its sign.

    Args:
        x, out: float32 arrays of one shape; `out` may be `x`.
        nan: a boolean array of that shape to work with; a fresh one by default.
    """
    bits, rounded = x.view(np.uint32), out.view(np.uint32)
    nan = np.isnan(x, out=nan)
    np.add(bits, np.uint32(0x1000), out=rounded)
    np.bitwise_and(rounded, np.uint32(0xFFFFE000), out=rounded)
    np.copyto(rounded, np.uint32(0x7FC00000), where=nan)
    return out
