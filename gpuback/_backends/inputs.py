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

NULLABLE = ("boolean", *(f"{kind}{size}" for kind in ("Int", "UInt") for size in (8, 16, 32, 64)), "Float32", "Float64")
"""pandas' dtypes of numbers of which some may be missing."""

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
    if _holds_mask(value):
        raise DtypeError(f"{what}: expected numbers without a mask, got a masked array; {what}.filled(value) fills it")
    if dtype is None or array.dtype != dtype:
        if not is_real(array.dtype):
            raise DtypeError(f"{what}: expected real numbers, got dtype {array.dtype}{_hint(value, what)}")
        if dtype is not None:
            with np.errstate(all="ignore"):
                array = array.astype(dtype)
    return np.asarray(array, order="C")


def _holds_mask(value: object) -> bool:
    """Tell whether a number is masked, here or in an array in a sequence, whose masks NumPy would drop silently."""
    if isinstance(value, (list, tuple)):
        return any(_holds_mask(item) for item in value if isinstance(item, (list, tuple, np.ma.MaskedArray)))
    return isinstance(value, np.ma.MaskedArray) and bool(np.ma.is_masked(value))


def _hint(value: object, what: str) -> str:
    """Say what makes numbers of something whose array is one of Python objects."""
    if isinstance(value, np.ndarray) or not hasattr(value, "toarray"):
        return ""
    return f": a sparse {type(value).__name__}; {what}.toarray() makes a dense array"


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
        array = np.asarray(value)
    except DLPACK_ERRORS as error:
        raise DtypeError(
            f"{what}: expected an array of real numbers, got {type(value).__name__}: {error}{_hint(value, what)}"
        ) from error
    if array.dtype == object and hasattr(value, "to_numpy") and hasattr(value, "dtypes"):
        return _of_columns(value, what)
    return array


def _of_columns(table: Any, what: str) -> Array:
    """Convert a pandas DataFrame or Series, whose columns may be boolean or nullable. What is missing is NaN.

    Raises:
        DtypeError: a column is not numeric; the message names it.
    """
    columns = []
    for name, column in table.items() if table.ndim == 2 else [(table.name, table)]:
        numbers = np.asarray(column)
        if numbers.dtype == object and str(column.dtype) in NULLABLE:  # as a number is missing
            numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
        if not is_real(numbers.dtype):
            which = "" if table.ndim == 1 else f" in column {name!r}"
            raise DtypeError(f"{what}: expected real numbers, got dtype {column.dtype}{which}")
        columns.append(numbers)
    if table.ndim == 1:
        return columns[0]
    return np.column_stack(columns) if columns else np.empty(table.shape)
