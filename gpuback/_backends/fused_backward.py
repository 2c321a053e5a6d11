"""One layer's backward pass on arrays of the user's own."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuback._backends import registry
from gpuback._backends.protocol import Ops
from gpuback._core.activation_names import activation_named
from gpuback._core.activations import Activation
from gpuback._core.precision import DTYPES, Precision
from gpuback._core.typing import Array
from gpuback.errors import DtypeError, OptionError, ShapeError

KEPT_LAYERS = 16
"""For how many combinations of shapes, dtypes, strides and options each thread keeps what it has made for a call."""

KEPT_NUMBERS = 1 << 17
"""The most numbers in da, h_prev and W together for which it is kept: larger calls take longer than the checks."""


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
    layers, key, layer = _kept.layers, None, None
    arrays = da.__class__ is h_prev.__class__ is W.__class__ is np.ndarray and da.dtype is h_prev.dtype is W.dtype
    if arrays and activation_prev.__class__ is str:
        key = da.shape, da.strides, da.dtype, h_prev.shape, W.shape, activation_prev, not need_da_prev, not allow_tf32
        layer = layers.pop(key, None)
    if layer is None or not layer.takes(a_prev):
        layer = _check(da, h_prev, W, a_prev, activation_prev, need_da_prev, allow_tf32, (dW, db, da_prev))
    if accumulate or not (dW is db is da_prev is None):
        dW, db, da_prev = layer.outputs(da, h_prev, W, a_prev, dW, db, da_prev, accumulate)
    else:
        dW, db, da_prev = layer.fresh_outputs()
    source = h_prev if layer.reads_h else a_prev
    layer.in_scope(layer.backward, da, h_prev, W, source, dW, db, da_prev, accumulate)
    if layer.is_kept:
        layers[key] = layer
        if len(layers) > KEPT_LAYERS:
            layers.pop(next(iter(layers)))
    return dW, db, da_prev


def bind_fused_backward(
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
) -> Callable[[], tuple[Array, Array, Array | None]]:
    """Return a function without arguments: `fused_backward` of these arrays, with what they hold when it is called.

    For loops over the same buffers: arguments are checked and outputs are made once, here. One thread at a time may
    call the function.

    Args:
        da, h_prev, W, a_prev: read at each call.
        dW, db, da_prev: written to at each call; fresh ones by default.
        activation_prev, need_da_prev, allow_tf32, accumulate: as `fused_backward`'s.

    Returns:
        A function that returns (dW, db, da_prev), the same arrays each time.

    Raises:
        DeviceError, DtypeError, ShapeError, OptionError: here, as `fused_backward`.
        BackendError: at a call, as `fused_backward`.

    Example:
        >>> import numpy as np
        >>> da, h_prev, W = np.ones((2, 1)), np.ones((2, 3)), np.ones((1, 3))
        >>> backward = bind_fused_backward(da, h_prev, W)
        >>> da[:] = [[1.0], [2.0]]
        >>> dW, db, da_prev = backward()
        >>> float(db[0])
        3.0
    """
    layer = _check(da, h_prev, W, a_prev, activation_prev, need_da_prev, allow_tf32, (dW, db, da_prev))
    outputs = layer.outputs(da, h_prev, W, a_prev, dW, db, da_prev, accumulate)
    source = h_prev if layer.reads_h else a_prev
    run = functools.partial(layer.in_scope, layer.backward, da, h_prev, W, source, *outputs, accumulate)

    def bound() -> tuple[Array, Array, Array | None]:
        run()
        return outputs

    return bound


class _Layer:
    """What calls with operands of the same shapes, dtypes, strides and options have in common.

    Attributes:
        reads_h: whether h_prev is what g' is computed from; otherwise a_prev, or nothing.
        backward: the backend's function, to be run by `in_scope`.
        is_kept: whether it is worth keeping for the next call.
    """

    def __init__(
        self,
        ops: Ops,
        da: Array,
        h_prev: Array,
        W: Array,
        a_prev: Array | None,
        activation: Activation,
        precision: Precision,
        need_da_prev: bool,
    ) -> None:
        self._ops, self._precision = ops, precision
        self._W_shape, self._da_prev_shape = W.shape, h_prev.shape if need_da_prev else None
        self._needs_a = bool(need_da_prev and activation.derivative_from == "a")
        self.reads_h = bool(need_da_prev and activation.derivative_from == "h")
        self.backward = ops.bind_layer_backward(da, W.shape[1], activation, precision)
        self.in_scope = ops.bind_scope()
        on_host = {type(array) for array in (da, h_prev, W)} == {np.ndarray}
        self._empty = np.empty if on_host else ops.empty  # a start at a cache line takes longer to find than it gains
        self.is_kept = on_host and da.size + h_prev.size + W.size <= KEPT_NUMBERS

    def takes(self, a_prev: Array | None) -> bool:
        """Tell whether a call that is alike in everything else needs no more checks of its operands."""
        if a_prev is None:
            return not self._needs_a
        fits = a_prev.__class__ is np.ndarray and a_prev.shape == self._da_prev_shape
        return fits and a_prev.dtype is self._precision.operand

    def fresh_outputs(self) -> tuple[Array, Array, Array | None]:
        empty, total, shape = self._empty, self._precision.accumulator, self._da_prev_shape
        da_prev = None if shape is None else empty(shape, self._precision.operand)
        return empty(self._W_shape, total), empty(self._W_shape[0], total), da_prev

    def outputs(
        self,
        da: Array,
        h_prev: Array,
        W: Array,
        a_prev: Array | None,
        dW: Array | None,
        db: Array | None,
        da_prev: Array | None,
        accumulate: bool,
    ) -> tuple[Array, Array, Array | None]:
        """Return the arrays to write to: the caller's, which have to fit and to overlap no other, or fresh ones."""
        named = {"da": da, "h_prev": h_prev, "W": W, "a_prev": a_prev, "dW": dW, "db": db, "da_prev": da_prev}
        registry.ops_of({name: array for name, array in named.items() if array is not None})
        if accumulate and (dW is None or db is None):
            raise OptionError("accumulate=True adds to dW and db: expected both, got None")
        if da_prev is not None and self._da_prev_shape is None:
            raise OptionError("da_prev was given, but need_da_prev=False says that it is not wanted")
        total, operand = self._precision.accumulator, self._precision.operand
        dW = _output(self._ops, dW, "dW", self._W_shape, total, named)
        db = _output(self._ops, db, "db", self._W_shape[:1], total, named)
        if self._da_prev_shape is not None:
            da_prev = _output(self._ops, da_prev, "da_prev", self._da_prev_shape, operand, named)
        return dW, db, da_prev


class _KeptLayers(threading.local):
    """The layers of a thread's latest calls, the oldest first. A call takes one out, and puts it back when it is done.

    So a signal handler that calls `fused_backward` amid a call of its thread makes a layer of its own.
    """

    def __init__(self) -> None:
        self.layers: dict[Any, _Layer] = {}


_kept = _KeptLayers()


def _check(
    da: Array,
    h_prev: Array,
    W: Array,
    a_prev: Array | None,
    activation_prev: str,
    need_da_prev: bool,
    allow_tf32: bool,
    outputs: tuple[Array | None, Array | None, Array | None],
) -> _Layer:
    """Check everything but the outputs, of which only the backend is looked at."""
    optional = {"a_prev": a_prev, "dW": outputs[0], "db": outputs[1], "da_prev": outputs[2]}
    given = {name: array for name, array in optional.items() if array is not None}
    ops = registry.ops_of({"da": da, "h_prev": h_prev, "W": W, **given})
    activation = activation_named(activation_prev)
    precision = _common_precision(da, h_prev, W, allow_tf32)
    batch_size, _, n_in = _layer_shape(da, h_prev, W)
    if activation.derivative_from == "a" and need_da_prev:
        if a_prev is None:
            raise OptionError(f"a_prev: {activation_prev}'s derivative needs the pre-activations below, and got None")
        _require(a_prev, "a_prev", (batch_size, n_in), precision.operand)
    return _Layer(ops, da, h_prev, W, a_prev, activation, precision, need_da_prev)


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
