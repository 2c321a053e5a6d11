"""Whatever users pass as numbers, as a NumPy array."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuback._backends import dlpack
from gpuback._core.typing import Array, ArrayLike
from gpuback.errors import DeviceError, DtypeError


def as_host_array(value: ArrayLike, dtype: np.dtype[Any] | None, what: str) -> Array:
    """Real numbers of any kind as a C-contiguous array of `dtype`; `value` itself where it is one already.

    Args:
        value: an array, nested sequences of numbers, anything with `__dlpack__`.
        dtype: None for the numbers' own. What it cannot hold becomes infinite.
        what: the argument's name, for the message.

    Raises:
        DeviceError: an array in a GPU's memory.
        DtypeError: complex numbers, text, objects, tensors that cannot be shared.
    """
    if type(value) is np.ndarray and value.flags.c_contiguous and (dtype is None or value.dtype is dtype):
        return value
    array = value if isinstance(value, np.ndarray) else _host_array(value, what)
    if dtype is None or array.dtype != dtype:
        if not is_real(array.dtype):
            raise DtypeError(f"{what}: expected real numbers, got dtype {array.dtype}")
        if dtype is not None:
            with np.errstate(over="ignore"):
                array = array.astype(dtype)
    return np.asarray(array, order="C")


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype holds real numbers: booleans, integers, floats, bfloat16 (not NumPy's own)."""
    return dtype.kind in "biuf" or dtype.name == "bfloat16"


def _host_array(value: ArrayLike, what: str) -> Array:
    if hasattr(value, "__dlpack__"):
        device = dlpack.device_of(value, what)
        if device[0] not in dlpack.HOST:
            raise DeviceError(
                f"{what}: expected data in host memory for the numpy backend, got {type(value).__name__} on DLPack "
                f"device {device}; copy it to the host, or use net.to('cupy')"
            )
        return dlpack.taken(value, what, np.from_dlpack)
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DtypeError(f"{what}: expected an array of real numbers, got {type(value).__name__}: {error}") from error
