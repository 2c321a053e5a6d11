"""What follows a product with `reproducible=True` on NumPy: biases, activations, their slopes, and the roundings.

It runs in float64 over a few rows at a time, which stay in cache. Each result is rounded once where it is stored: C to
float32, a = C + b, h = g(a) and da = dh ⊙ g' to float32 and then, for 16-bit operands, to their dtype. Only IEEE
+ − × ÷ √ and comparisons decide any bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuback._core.activations import Activation
from gpuback._core.elementary import CANONICAL_NAN, SCRATCH
from gpuback._core.precision import Precision
from gpuback._core.reproducible_forms import functions_of
from gpuback._core.scratch import aligned_empty
from gpuback._core.typing import Array

ELEMENTS_AT_ONCE = 1 << 16
"""Elements that elementwise operations process at a time: a few float64 arrays of them stay in cache."""

SAME_IN_SINGLE = ("identity", "relu", "hard_tanh", "relu6")
"""Activations whose g and g' give the same numbers in float32, of a float32, as in float64: they only choose."""


class Buffers:
    """Memory by name, which grows; one worker's operations use it in turn."""

    def __init__(self) -> None:
        self._flats: dict[str, Array] = {}

    def __call__(self, name: str, *shape: int, dtype: Any = np.float64) -> Array:
        """Return an array with any contents."""
        size = math.prod(shape)
        flat = self._flats.get(name)
        if flat is None or flat.size < size:
            flat = self._flats[name] = aligned_empty(size, np.dtype(dtype))
        return flat[:size].reshape(shape)


def parts(height: int, width: int) -> list[slice]:
    """Cut a matrix's rows into slices of up to `ELEMENTS_AT_ONCE` elements."""
    at_once = max(1, ELEMENTS_AT_ONCE // width)
    return [slice(start, min(start + at_once, height)) for start in range(0, height, at_once)]


class Finish:
    """The operations on C (M, R) in float64, which they overwrite; results are (M, R) views of any strides.

    Args:
        precision: of the network.
        g: the activation, if there is one.
    """

    def __init__(self, precision: Precision, g: Activation | None) -> None:
        self._precision = precision
        self._rounds_a = g is not None and g.derivative_from == "a"
        self._functions = None if g is None else functions_of(g)
        self._in_single = g is not None and g.forms is None and g.name in SAME_IN_SINGLE

    def forward(self, buffers: Buffers, values: Array, bias: Array, a: Array, h: Array) -> None:
        """Write a = C + b, rounded once, and h = g(a), or h = a without g; bias is (M, 1)."""
        for part in parts(*values.shape):
            wide, pre, out = values[part], a[part], h[part]
            np.add(wide, bias[part], out=wide)
            self._round(buffers, wide, pre, sixteen_bit=self._rounds_a)
            if self._functions is None:
                continue
            if self._in_single:
                self._functions[0](pre, out, ())
                self._to_operand(buffers, out)
            else:
                np.copyto(wide, pre)
                self._functions[0](wide, wide, scratch(buffers, wide))
                self._round(buffers, wide, out, sixteen_bit=True)

    def delta(self, buffers: Buffers, values: Array, factor: float, source: Array | None, da_prev: Array) -> None:
        """Write da_prev = C ⊙ g'(source), or factor C without g; factor is a power of two."""
        for part in parts(*values.shape):
            wide, delta = values[part], da_prev[part]
            if factor != 1.0:
                np.multiply(wide, factor, out=wide)
            self._round(buffers, wide, delta, sixteen_bit=False)
            if self._functions is None or source is None:
                continue
            if self._in_single:
                slope = buffers("single", *wide.shape, dtype=np.float32)
                self._functions[1](source[part], slope, (buffers("single scratch", *wide.shape, dtype=np.float32),))
                np.multiply(delta, slope, out=delta)
                canonicalise_nan(delta)
                np.add(delta, 0.0, out=delta)
                self._to_operand(buffers, delta)
            else:
                slope = buffers("slope", *wide.shape)
                np.copyto(slope, source[part])
                np.copyto(wide, delta)
                self._functions[1](slope, slope, scratch(buffers, wide))
                np.multiply(slope, wide, out=wide)
                self._round(buffers, wide, delta, sixteen_bit=True)

    def gradient(self, buffers: Buffers, values: Array, factor: float, out: Array, accumulate: bool) -> None:
        """out (+)= factor C; factor is a power of two."""
        for part in parts(*values.shape):
            wide, result = values[part], out[part]
            if factor != 1.0:
                np.multiply(wide, factor, out=wide)
            if accumulate:
                addend = buffers("single", *wide.shape, dtype=np.float32)
                self._round(buffers, wide, addend, sixteen_bit=False)
                np.add(addend, result, out=result)
                canonicalise_nan(result)
            else:
                self._round(buffers, wide, result, sixteen_bit=False)

    def _round(self, buffers: Buffers, values: Array, out: Array, *, sixteen_bit: bool) -> None:
        """Round to float32, add +0 and, if `sixteen_bit`, round to a 16-bit operands' dtype. NaN becomes one NaN."""
        np.copyto(out, values, casting="same_kind")
        flat = values.reshape(-1)
        if math.isnan(flat.dot(flat)):
            np.copyto(out, CANONICAL_NAN, where=np.isnan(out))
        np.add(out, 0.0, out=out)
        if sixteen_bit:
            self._to_operand(buffers, out)

    def _to_operand(self, buffers: Buffers, out: Array) -> None:
        """Round to the operands' dtype if that has 16 bits."""
        if self._precision.sixteen_bit:
            rounded = buffers("rounded", *out.shape, dtype=self._precision.operand)
            np.copyto(rounded, out, casting="unsafe")
            np.copyto(out, rounded)


def canonicalise_nan(x: Array) -> None:
    """Make every NaN of a float32 array the one that is stored."""
    if np.isnan(np.maximum.reduce(x, axis=None, initial=-math.inf)):
        np.copyto(x, CANONICAL_NAN, where=np.isnan(x))


def scratch(buffers: Buffers, like: Array) -> tuple[Array, ...]:
    """Return what the functions of `gpuback._core.elementary` work in."""
    return tuple(buffers(f"scratch {k}", *like.shape) for k in range(SCRATCH))
