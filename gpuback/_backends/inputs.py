"""Users' numbers as a backend's arrays, from arrays, nested sequences and anything with `__dlpack__`.

DLPack shares an array's memory between libraries without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuback._core.typing import Array, ArrayLike
from gpuback.errors import DeviceError, DtypeError

DLPACK_HOST = (1, 3)
"""DLPack's numbers for memory that the host reads: its own, and memory that CUDA has pinned."""

DLPACK_CUDA = (2, 13)
"""DLPack's numbers for a CUDA device's memory: its own, and managed memory."""

DLPACK_ERRORS = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)
"""The errors that exporters and importers raise: libraries agree on no kind."""


def as_host_array(value: ArrayLike, dtype: np.dtype[Any] | None, what: str) -> Array:
    """Convert real numbers of any kind to a C-contiguous NumPy array; return `value` itself where it is one already.

    Args:
        value: an array, nested sequences of numbers, anything with `__dlpack__`.
        dtype: of the result; None keeps the numbers' own. A number too large for it becomes infinite.
        what: the argument's name, for the message.

    Raises:
        DeviceError: an array in a GPU's memory.
        DtypeError: complex numbers, text, objects, tensors that cannot be shared.
    """
    if type(value) is np.ndarray and value.flags.c_contiguous and (dtype is None or value.dtype is dtype):
        return value
    array = value if isinstance(value, np.ndarray) else _host_array(value, what)
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise DtypeError(f"{what}: expected numbers without a mask, got a masked array; {what}.filled(value) fills it")
    if dtype is None or array.dtype != dtype:
        if not is_real(array.dtype):
            raise DtypeError(f"{what}: expected real numbers, got dtype {array.dtype}")
        if dtype is not None:
            with np.errstate(over="ignore"):
                array = array.astype(dtype)
    return np.asarray(array, order="C")


def is_real(dtype: np.dtype[Any]) -> bool:
    """Tell whether a dtype holds real numbers: booleans, integers, floats, bfloat16 (not NumPy's own)."""
    return dtype.kind in "biuf" or dtype.name == "bfloat16"


def dlpack_device(value: Any, what: str) -> tuple[int, int]:
    """Ask an array with `__dlpack__` for DLPack's (kind, number) of the device that it lives on.

    Raises:
        DtypeError: it lives nowhere (PyTorch's meta device, JAX's tracers and deleted arrays).
    """
    try:
        kind, number = value.__dlpack_device__()
    except DLPACK_ERRORS as error:
        raise DtypeError(f"{what}: expected an array in memory, got a {type(value).__name__}: {error}") from error
    return int(kind), int(number)


def from_dlpack(value: Any, what: str, importer: Callable[[Any], Array]) -> Array:
    """View the memory of an array that has `__dlpack__`, without a copy; read-only where the memory is.

    Args:
        value: an array of any library.
        what: the argument's name, for the message.
        importer: `from_dlpack` of the library that the view is to belong to.

    Raises:
        DtypeError: one of the two libraries refuses: the importer does not know the dtype, the tensor takes part in
            automatic differentiation, or is sparse.
    """
    try:
        if hasattr(value, "is_neg"):  # PyTorch exports a tensor that it is yet to negate without its sign
            value = value.resolve_neg()
        return importer(value)
    except DLPACK_ERRORS as error:
        dtype = str(getattr(value, "dtype", "unknown dtype")).rpartition(".")[2]
        message = f"{what}: expected an array that can be shared by DLPack, got a {type(value).__name__} of {dtype}"
        if dtype.startswith(("bfloat16", "float8")):
            raise DtypeError(
                f"{message}, which NumPy does not have. Convert it first, which loses nothing: x.float() in PyTorch, "
                "x.astype('float32') in JAX and CuPy"
            ) from error
        raise DtypeError(f"{message}: {error}") from error


def _host_array(value: ArrayLike, what: str) -> Array:
    if hasattr(value, "__dlpack__"):
        device = dlpack_device(value, what)
        if device[0] not in DLPACK_HOST:
            raise DeviceError(
                f"{what}: expected data in host memory for the numpy backend, got {type(value).__name__} on DLPack "
                f"device {device}; copy it to the host, or use net.to('cupy')"
            )
        return from_dlpack(value, what, np.from_dlpack)
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DtypeError(f"{what}: expected an array of real numbers, got {type(value).__name__}: {error}") from error
