"""One layer's backward pass on arrays of the user's own."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gpuback._backends import registry
from gpuback._backends.protocol import Ops
from gpuback._core.activation_names import activation_named
from gpuback._core.precision import DTYPES, Precision
from gpuback._core.typing import Array
from gpuback.errors import DtypeError, OptionError, ShapeError


def fused_backward(
    da: Array,
    h_prev: Array,
    W: Array,
    *,
    activation_prev: str = "identity",
    a_prev: Array | None = None,
    need_da_prev: bool = True,
    allow_tf32: bool = False,
    dW: Array | None = None,
    db: Array | None = None,
    da_prev: Array | None = None,
    accumulate: bool = False,
) -> tuple[Array, Array, Array | None]:
    """One layer's backward pass: its weights' and biases' gradients and the gradient of the pre-activations below.

        dW      (+)= daᵀ h_prev          outer products of each sample, summed over the batch
        db      (+)= Σ_b da[b]
        da_prev   =  (da W) ⊙ g'(a_prev)

    Sums are float32 for 16-bit operands. Nothing is converted: all operands have one dtype and one backend. Inputs may
    be strided; outputs are C-contiguous.

    Args:
        da: (B, nO) ∂loss/∂a of this layer.
        h_prev: (B, nI) the layer's input.
        W: (nO, nI) its weights. float64, float32, bfloat16 or float16, like da and h_prev.
        activation_prev: g of the layer below, whose output is h_prev.
        a_prev: (B, nI) the pre-activations below; needed for e.g. gelu and silu, whose g' does not follow from h_prev.
        need_da_prev: False skips da_prev (the first layer's input needs no gradient).
        allow_tf32: float32 products may round their operands to TF32.
        dW, db, da_prev: arrays to write to: (nO, nI) and (nO,) in float32 (float64 for float64 operands), and (B, nI)
            in the operands' dtype. Fresh ones by default.
        accumulate: add to dW and db (which must be given) instead of overwriting them.

    Returns:
        (dW, db, da_prev); da_prev is None if it was not wanted.

    Raises:
        DeviceError: arrays of different backends or devices.
        DtypeError, ShapeError: an array does not fit the others; an output is not C-contiguous.
        BackendError: the GPU has no tensor cores for these operands, or the kernel cannot be compiled.
        OptionError: an unknown activation, a_prev missing, accumulate without dW and db, an output that overlaps an
            input.
    """
    named = {"da": da, "h_prev": h_prev, "W": W, "a_prev": a_prev, "dW": dW, "db": db, "da_prev": da_prev}
    ops = registry.ops_of(
        {name: array for name, array in named.items() if array is not None or name in ("da", "h_prev", "W")}
    )
    activation = activation_named(activation_prev)
    precision = _common_precision(da, h_prev, W, allow_tf32)
    batch_size, n_out, n_in = _layer_shape(da, h_prev, W)
    if activation.derivative_from == "a" and need_da_prev:
        if a_prev is None:
            raise OptionError(f"a_prev: {activation_prev}'s derivative needs the pre-activations below, and got None")
        _require(a_prev, "a_prev", (batch_size, n_in), precision.operand)
    if accumulate and (dW is None or db is None):
        raise OptionError("accumulate=True adds to dW and db: expected both, got None")
    if da_prev is not None and not need_da_prev:
        raise OptionError("da_prev was given, but need_da_prev=False says that it is not wanted")

    dW = _output(ops, dW, "dW", (n_out, n_in), precision.accumulator, named)
    db = _output(ops, db, "db", (n_out,), precision.accumulator, named)
    if need_da_prev:
        da_prev = _output(ops, da_prev, "da_prev", (batch_size, n_in), precision.operand, named)
    source = None
    if need_da_prev:
        source = a_prev if activation.derivative_from == "a" else h_prev
    with ops.scope():
        ops.layer_backward(da, h_prev, W, source, activation, precision, dW, db, da_prev, accumulate)
    return dW, db, da_prev


def _common_precision(da: Array, h_prev: Array, W: Array, allow_tf32: bool) -> Precision:
    if not da.dtype == h_prev.dtype == W.dtype or da.dtype not in DTYPES.values():
        raise DtypeError(
            f"da, h_prev and W: expected one dtype out of {', '.join(DTYPES)} for all three, "
            f"got {da.dtype}, {h_prev.dtype} and {W.dtype}"
        )
    return _precision(da.dtype, allow_tf32)


_precision = functools.cache(lambda dtype, allow_tf32: Precision.of(dtype, allow_tf32=allow_tf32))


def _layer_shape(da: Array, h_prev: Array, W: Array) -> tuple[int, int, int]:
    for name, array, axes in (("da", da, "(B, nO)"), ("h_prev", h_prev, "(B, nI)"), ("W", W, "(nO, nI)")):
        if array.ndim != 2 or 0 in array.shape:
            raise ShapeError(f"{name}: expected shape {axes} with at least one element, got {array.shape}")
    if da.shape[0] != h_prev.shape[0] or W.shape != (da.shape[1], h_prev.shape[1]):
        raise ShapeError(
            f"expected da (B, nO), h_prev (B, nI) and W (nO, nI), "
            f"got da {da.shape}, h_prev {h_prev.shape} and W {W.shape}"
        )
    return da.shape[0], da.shape[1], h_prev.shape[1]


def _require(array: Array, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if array.shape != shape:
        raise ShapeError(f"{name}: expected shape {shape}, got {array.shape}")
    if array.dtype != dtype:
        raise DtypeError(f"{name}: expected dtype {dtype}, got {array.dtype}")


def _output(
    ops: Ops,
    array: Array | None,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    named: dict[str, Array | None],
) -> Array:
    """Return the array to write a result to: a fresh one, or the caller's, which has to fit and to overlap no other."""
    if array is None:
        return ops.empty(shape, dtype)
    _require(array, name, shape, dtype)
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise OptionError(f"{name}: expected a writeable array, got a read-only one")
    if not array.flags.c_contiguous:
        raise ShapeError(f"{name}: expected a C-contiguous array, got strides {array.strides} for shape {shape}")
    for other, value in named.items():
        if other == name:
            break  # outputs that follow are held against this one in their turn
        if value is not None and ops.may_overlap(array, value):
            raise OptionError(f"{name}: expected an array of its own, got one that shares memory with {other}")
    return array
